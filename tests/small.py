"""Small networks, checkpoints and pictures that all tests share: functions of their arguments and of `seed`.

The VAE takes 16 px pictures to latents of 4 x 8 x 8 (stride 2), which SiT and mapper take. Their sizes
are not in VAE_SIZES and SIT_SIZES; a test of published files adds them there.
"""
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import checkpoints
from mapper import Mapper, MapperConfig
from sit import SiT, SiTConfig
from vae import VAE, VAEConfig

VAE_CONFIG = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(16,), resolution=32,
                       z_channels=4)
SIT_SIZE = dict(hidden_size=32, depth=4, num_heads=2, patch_size=1)
SIT_CONFIG = SiTConfig(input_size=8, in_channels=4, num_classes=3, **SIT_SIZE)
MAPPER_CONFIG = MapperConfig(z_channels=4, grid=8, out_dim=16, projector_dim=32)


def small_vae(seed=0, **changes) -> VAE:
    """A VAE of random weights. changes: other fields of its VAEConfig."""
    torch.manual_seed(seed)
    return VAE(replace(VAE_CONFIG, **changes)).eval()


def small_sit(seed=0, **changes) -> SiT:
    """A SiT of random weights, also where training starts from zeros. changes: fields of its SiTConfig."""
    torch.manual_seed(seed)
    model = SiT(replace(SIT_CONFIG, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model.eval()


def small_mapper(seed=0, **changes) -> Mapper:
    """A mapper of random weights. changes: other fields of its MapperConfig."""
    torch.manual_seed(seed)
    return Mapper(replace(MAPPER_CONFIG, **changes)).eval()


def small_vae_checkpoint(folder, vae=None, mapper=None, step=1, image_size=16, **changes) -> Path:
    """Write folder/ckpt_<step>.pt as train_vae.py does, without optimizers; return its path.

    vae: small_vae() if not given. mapper: none if not given. changes: other entries of the checkpoint.
    """
    vae = vae or small_vae()
    state = {"format": checkpoints.VAE, "step": step, "images_seen": 8 * step, "model": vae.state_dict(),
             "ema": None, "model_config": asdict(vae.config), "mapper": None, "mapper_config": None,
             "teacher": None, "discriminator": None, "optimizer": {}, "optimizer_disc": None,
             "scalers": [None, None], "versions": {},
             "args": {"vae": "small", "init": "none", "data": "pictures", "image_size": image_size}}
    if mapper is not None:
        state |= {"mapper": mapper.state_dict(), "mapper_config": asdict(mapper.config), "teacher": "shapes"}
    return save(Path(folder) / f"ckpt_{step:07d}.pt", state | changes)


def small_sit_checkpoint(folder, sit=None, vae=None, step=1, latents=None, **changes) -> Path:
    """Write folder/ckpt_<step>.pt as train_sit.py does, without optimizer; return its path.

    sit: small_sit() if not given. vae: the one that the latents are of; small_vae() if not given. latents:
    other facts of them, such as vae (its path), mean, std (lists). changes: other entries of the checkpoint.
    """
    sit, vae = sit or small_sit(), vae or small_vae()
    side, channels, classes = sit.config.input_size, sit.config.in_channels, sit.config.num_classes
    facts = {"vae": "vae.pt", "vae_hash": checkpoints.state_hash(vae.state_dict()), "data": "pictures",
             "image_size": side * vae.stride, "channels": channels, "latent_size": [side, side],
             "num_classes": classes, "class_names": [str(label) for label in range(classes)],
             "mean": [0.0] * channels, "std": [1.0] * channels}
    state = {"format": checkpoints.SIT, "step": step, "images_seen": 8 * step, "model": sit.state_dict(),
             "ema": sit.state_dict(), "model_config": asdict(sit.config), "latents": facts | (latents or {}),
             "optimizer": {}, "scaler": None, "time": "t=0 data, t=1 noise, v = eps - z", "versions": {},
             "args": {"latents": "latents", "label_dropout": 0.1, "model": "small"}}
    return save(Path(folder) / f"ckpt_{step:07d}.pt", state | changes)


def save(path, content) -> Path:
    """Write a file with torch.save; return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def pictures(root, n=8, classes=2, size=32) -> Path:
    """Write n smooth random PNGs, in turn into the class folders a, b, ... (classes=0: flat); return root."""
    root, rng = Path(root), np.random.default_rng(0)
    for i in range(n):
        folder = root / chr(ord("a") + i % classes) if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        blobs = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        blobs.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return root
