"""Every weight file that is read or written: ours, and those that other projects publish.

A path names a file (.pt, .pth, .ckpt, .bin, .safetensors), a folder of our checkpoints (the newest counts), a
folder in diffusers' format, or hf://OWNER/REPO/FILE on the hub. These layouts are understood:

    VAE             ours; a bare state dict (SD-VAE, E2E-VAE, Send-VAE); {"state_dict"} of LDM and VA-VAE with
                    their training parts; {"model"}, {"ema"}, {"model_state_dict"} (MAR's kl16); diffusers'
                    AutoencoderKL, new and old names; "vae" in a training checkpoint of REPA-E
    SiT             ours; REPA's last.pt; {"ema", "model"} of REPA and REPA-E; willisma's SiT-XL-2-256.pt
    discriminator   a bare PatchGAN (REPA-E's); inside a checkpoint of ours, REPA-E, VA-VAE or LDM
    statistics      REPA-E's {latents_scale, latents_bias}; VA-VAE's {mean, std}; diffusers' config.json; the
                    meta.json of encode.py; BatchNorm in REPA-E's SiT; our SiT; a number s, for z' = s * z

Names may be wrapped in module. (DDP) and _orig_mod. (torch.compile). Loading is strict: every tensor of a
network comes from its file, and no other tensor is in the file. Code in a file is never run.
Read: save, newest -> fetch, read_file -> load_vae, read_sit -> statistics_for.
"""
import argparse
import functools
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save as to_bytes  # installed with timm
from torch import Tensor

import common
import data
import vae
from losses import PatchDiscriminator
from mapper import Mapper, MapperConfig
from sit import SIT_SIZES, SiT, SiTConfig

VAE, SIT = "nanosendvae-vae", "nanosendvae-sit"  # the "format" of our two checkpoints
DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


# our checkpoints: ckpt_0000123.pt

def save_file(path, state: dict) -> None:
    """Write `state` so that `path` is the old file or the whole new one; .safetensors takes tensors only.

    Raises OSError if the disk is full.
    """
    with data.replacing(path) as file:
        if Path(path).suffix == ".safetensors":
            tensors = {key: value.contiguous() for key, value in state.items()}
            file.write(to_bytes(tensors, metadata={"format": "pt"}))  # transformers and diffusers want it
        else:
            torch.save(state, file)


def snapshot(state):
    """Return a state, nested dicts and lists, with copies in host memory of all its tensors."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    return [snapshot(value) for value in state] if isinstance(state, list) else state


def save(folder, step: int, state: dict, keep: int) -> None:
    """Write the checkpoint of `step`, then delete all but the newest `keep` up to this step.

    Files of a higher step are damaged (we would have continued from them): they stay, for inspection. So does
    one that latents name.
    """
    save_file(Path(folder) / f"ckpt_{step:07d}.pt", state)
    files = checkpoints_in(folder)
    for number in sorted(number for number in files if number <= step)[:-keep]:
        if not files[number].with_suffix(".keep").exists():
            files[number].unlink()



def keep_for_latents(path) -> None:
    """Mark a checkpoint of ours as needed by latents: more training will not delete it."""
    if re.fullmatch(r"ckpt_\d+\.pt", Path(path).name):
        try:
            Path(path).with_suffix(".keep").touch()
        except OSError as error:  # a folder of somebody else
            common.print0(f"warning: {path} cannot be marked as needed ({error.strerror}); keep it yourself")


def checkpoints_in(folder) -> dict[int, Path]:
    """Return {step: file} of the checkpoints in a folder."""
    return {int(file.stem[5:]): file for file in Path(folder).glob("ckpt_*.pt") if file.stem[5:].isdecimal()}


def newest(folder, kind: str | None = None) -> dict | None:
    """Return the newest checkpoint in `folder` that can be read, with its "path"; None if there is none.

    kind: VAE or SIT; ValueError if the checkpoint is of another: two runs must not share a folder.
    """
    files = checkpoints_in(folder)
    for step in sorted(files, reverse=True):
        try:
            saved = read_file(files[step])
        except ValueError as error:
            common.print0(f"warning: {error}; passing over this checkpoint")
            continue
        if kind and saved.get("format") != kind:
            raise ValueError(f"{files[step]}: is {saved.get('format')}, wanted {kind}; use another --out")
        return {**saved, "path": str(files[step])}
    if files:
        common.print0(f"warning: none of the checkpoints in {folder} can be read")


# finding and reading files

def resolve(path) -> str:
    """Return the file that `path` names: in a folder the newest of our checkpoints, or diffusers' weights."""
    if str(path).startswith("hf://") or not os.path.isdir(path):
        return str(path)
    for name in DIFFUSERS_FILES:
        if os.path.isfile(Path(path) / name):
            return str(Path(path) / name)
    saved = newest(path)
    if saved is None:
        raise ValueError(f"{path}: no readable ckpt_*.pt and no {DIFFUSERS_FILES[0]} in it; train first")
    return saved["path"]


def fetch(path) -> Path:
    """Return the local file that `path` names. A file on the hub is downloaded to huggingface_hub's cache.

    Raises FileNotFoundError if it cannot be had, ValueError for a malformed hf:// name.
    """
    if not str(path).startswith("hf://"):
        return Path(resolve(path))
    name = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)/(.+)", str(path))
    if name is None:
        raise ValueError(f"{path}: a file on the hub is written hf://OWNER/REPO/FILE")
    from huggingface_hub import hf_hub_download  # comes with timm
    try:
        return Path(hf_hub_download(name[1], name[2]))
    except (OSError, ValueError) as error:  # what it raises without network and for wrong names
        raise FileNotFoundError(f"{path}: neither cached nor to be had from the hub ({type(error).__name__})"
                                "; check name and network, give a file, or --init none") from error


def check_out(path) -> None:
    """Raise ValueError or OSError now if the file `path` could not be written later; make its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK):
        raise ValueError(f"--out {path}: no file can be written there; give another name")


def one_line(read):
    """Return the reader read(path, ...), which data.one_line guards. A decorator."""
    @functools.wraps(read)
    def reader(path, *args):
        with data.one_line(path):
            return read(path, *args)
    return reader


class Nothing:
    """What stands for an object of a class that is not wanted."""

    def __init__(self, *_):
        """Take any arguments and keep none."""

    __setstate__ = __init__


# Classes beside the weights: Lightning's callbacks, OmegaConf's configurations, numpy's scalars.
# Newer releases of torch name those of builtins without their module.
INERT = re.compile(r"((pytorch_)?lightning(_fabric)?|omegaconf|pathlib|typing)\.[\w.]+|numpy\.dtype|numpy\."
                   r"_?core\.multiarray\.scalar|collections\.defaultdict|dict|list|tuple|str|int|float|bool")


def load_tensors(path, mmap: bool):
    """Return what torch.save wrote: tensors, plain types and argparse.Namespace (the args of REPA).

    Objects of the classes in INERT become Nothing. Raises ValueError that names another class.
    """
    allowed = [argparse.Namespace]
    for _ in range(99):
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL (?:builtins\.)?([\w.]+)|$", str(error))  # the first that is not allowed
            if not INERT.fullmatch(name[1] or ""):
                reason = f"it could run code: {name[0]}" if name[0] else "damaged?"
                raise ValueError(f"{path}: not loaded ({reason}); want a dict of tensors") from error
            stand_in = OrderedDict if name[1].endswith("Dict") else Nothing  # torch fills no other dicts
            allowed.append((stand_in, name[1] if "." in name[1] else f"builtins.{name[1]}"))


@one_line
def read_file(path) -> dict:
    """Return the content of a weight file, on the CPU, or of a .json file.

    PyTorch's zip files are mapped: read where they are used. Raises FileNotFoundError, or ValueError for
    other content.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise FileNotFoundError(f"{path}: {error.strerror}; train first (train_vae.py, train_sit.py), give a "
                                f"weight file, or hf://OWNER/REPO/FILE for one on the hub") from error
    if not head or head.lstrip().startswith((b"<", b"version https://git-lfs")):
        raise ValueError(f"{path}: empty, a web page or a Git LFS pointer; download the file itself")
    if Path(path).suffix == ".json":
        return {**json.loads(Path(path).read_text())}
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    content = {**load_tensors(path, mmap=head.startswith(b"PK"))}  # TypeError unless it is a dict
    ours = content.get("format") in (VAE, SIT) or Path(path).name.startswith("ckpt_") and head[:2] == b"PK"
    if ours and "digest" not in content and zipfile.ZipFile(path).testzip():  # torch compares no checksums
        raise ValueError("a part of it has another checksum than it was written with")
    return content


# what a file holds

def describe(content: dict) -> str:
    """Say in a few words what the content of a file is."""
    keys = [key for part in (content, *content.values()) for key in tensors(part)] or list(content)
    for part, kind in (("mlp.w12.", "a network with SwiGLU (LightningDiT), which sit.py has not"),
                       ("encoder.", "a VAE"), ("x_embedder.", "a SiT"), ("latents_", "latent statistics")):
        if any(part in str(key) for key in keys):
            return f"this is {kind}"
    return f"first keys: {', '.join(map(str, keys[:3]))}"


def tensors(state) -> dict[str, Tensor]:
    """Return the tensors of a state dict, names without prefixes of DDP and torch.compile; else {}."""
    items = state.items() if isinstance(state, dict) else ()
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", str(key)): value for key, value in items
            if isinstance(value, Tensor)}


def find_state(content: dict, names: tuple, pattern: str) -> dict[str, Tensor]:
    """Return the first of content[name] and content itself that has a tensor of a matching name; else {}."""
    for part in (*map(content.get, names), content):
        state = tensors(part)
        if any(re.match(pattern, key) for key in state):
            return state
    return {}


def differences(wanted: dict, state: dict) -> list[str]:
    """Return a line for each tensor that `state` has not as the state dict `wanted` has it; [] if it fits."""
    want, seen = ({key: tuple(value.shape) for key, value in part.items()} for part in (wanted, state))
    wrong = [key for key in sorted(want | seen) if want.get(key) != seen.get(key)]
    return [f"{key} is {seen.get(key, 'missing')}, want {want.get(key, 'none')}" for key in wrong]


def build(make, state: dict, path, fit: str):
    """Return the network make() with exactly the tensors of `state`: fp32, on the CPU, in eval mode.

    Raises ValueError that names three of the tensors that differ from `fit`, or one that repeats few numbers.
    """
    with torch.device("meta"):  # no time spent on initial weights
        network = make()
    wrong = differences(network.state_dict(), state)
    wrong += [f"{key} is not whole" for key, x in state.items() if x.nbytes > x.untyped_storage().nbytes()]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit {fit}: {'; '.join(wrong[:3])}")
    network = network.to_empty(device="cpu")
    network.load_state_dict(state)
    return network.eval()


def config_of(cls, values: dict, path):
    """Return cls(**values), a configuration from a checkpoint; fields that came later get their defaults.

    Raises ValueError for fields that `cls` does not have, that lack a default, or that ask for a network
    without end.
    """
    values = {key: value for key, value in values.items() if key != "bn_group"}  # MapperConfig had it once
    if max(values.get("depth", 0), values.get("num_res_blocks", 0)) > 1000:
        raise ValueError(f"{path}: no network has as many blocks as its configuration says")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{path}: written by another version of this code ({error})") from error


def state_hash(state: dict) -> str:
    """Return the sha256 over names, shapes and values: the same weights hash alike in any file."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# VAE, mapper, discriminator

@one_line
def load_vae(path) -> vae.VAE:
    """Return the VAE of a weight file: fp32, on the CPU, in eval mode; the EMA weights if it has any.

    The architecture is that of our checkpoint, of diffusers' config.json, or the size in VAE_SIZES that fits,
    with the file's latent channels. Raises FileNotFoundError, or ValueError for a damaged or other file.
    """
    file = fetch(path)
    content, about = read_file(file), file.with_name("config.json")
    state = find_state(content, ("vae", "ema", "state_dict", "model_state_dict", "model"),
                       r"(encoder|decoder|quant_conv|post_quant_conv)\.")
    if not state:
        raise ValueError(f"{path}: no VAE in it; {describe(content)}")
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in state:
        state = from_diffusers(state)
    training_parts = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")  # of LDM and VA-VAE
    state = {key: value for key, value in state.items() if not key.startswith(training_parts)}
    if "format" in content:
        cfg, fit = config_of(vae.VAEConfig, content["model_config"], path), "its own model_config"
    elif file.name in DIFFUSERS_FILES and about.is_file():
        cfg, fit = vae_config_from_diffusers(read_file(about)), "its config.json"
    else:
        cfg, fit = closest_size(state)
    return build(lambda: vae.VAE(cfg), state, path, fit)


def closest_size(state: dict) -> tuple[vae.VAEConfig, str]:
    """Return the size in VAE_SIZES that fits best, with the latent channels of `state`, and its name."""
    z_channels, embed_dim = state.get("post_quant_conv.weight", torch.zeros(4, 4)).shape[:2]
    fits, embed_dim = {}, None if embed_dim == z_channels else embed_dim
    for name, size in vae.VAE_SIZES.items():
        cfg = replace(size, z_channels=z_channels, embed_dim=embed_dim)
        with torch.device("meta"):
            fits[len(differences(vae.VAE(cfg).state_dict(), state))] = cfg, f"{name}, closest of our sizes"
    return fits[min(fits)]


# diffusers' name = published name of a part of a key; the last four are of diffusers' older files
DIFFUSERS_NAMES = tuple(tuple(f".{name}." for name in pair.split("=")) for pair in """
    mid_block.resnets.0=mid.block_1  mid_block.resnets.1=mid.block_2  mid_block.attentions.0=mid.attn_1
    down_blocks=down  up_blocks=up  resnets=block  attentions=attn  downsamplers.0=downsample
    upsamplers.0=upsample  conv_shortcut=nin_shortcut  group_norm=norm  conv_norm_out=norm_out
    to_q=q  to_k=k  to_v=v  to_out.0=proj_out  query=q  key=k  value=v  proj_attn=proj_out""".split())


def from_diffusers(state: dict) -> dict:
    """Return the state dict of diffusers' AutoencoderKL under the published names; attention becomes 1x1."""
    return {key: value[:, :, None, None] if ".attn" in key and value.ndim == 2 else value
            for key, value in rename(state, DIFFUSERS_NAMES).items()}


def rename(state: dict, names: tuple) -> dict:
    """Replace each (old, new) in all keys, and count the levels of the decoder from the other end."""
    level, renamed = re.compile(r"^(decoder\.up(?:_blocks)?\.)(\d+)"), {}
    for key, value in state.items():
        for old, new in names:
            key = key.replace(old, new)
        renamed[key] = value
    last = max((int(match[2]) for match in map(level.match, renamed) if match), default=0)
    return {level.sub(lambda match: f"{match[1]}{last - int(match[2])}", key): value
            for key, value in renamed.items()}


def vae_config_from_diffusers(config: dict) -> vae.VAEConfig:
    """Return the VAEConfig of diffusers' AutoencoderKL, whose defaults these are.

    Where vae.py has no such network, the weights do not fit.
    """
    widths = config.get("block_out_channels", [64])
    blocks = config.get("down_block_types", ["DownEncoderBlock2D"])
    # 256 is nominal: attention is where down_block_types says, whatever sample_size is
    attention = tuple(256 // 2 ** i for i, block in enumerate(blocks) if "Attn" in block)
    return config_of(vae.VAEConfig, dict(resolution=256, z_channels=config.get("latent_channels", 4),
        ch=widths[0], ch_mult=tuple(width // widths[0] for width in widths), attn_resolutions=attention,
        num_res_blocks=config.get("layers_per_block", 1), in_channels=config.get("in_channels", 3),
        norm_groups=config.get("norm_num_groups", 32)), "config.json")


def read_own(path) -> dict:
    """Return the checkpoint if train_vae.py wrote it, else {} (a published file)."""
    content = read_file(fetch(path))
    return content if content.get("format") == VAE and isinstance(content.get("args"), dict) else {}


@one_line
def load_mapper(path) -> Mapper:
    """Return the mapper that was trained with a VAE: fp32, CPU, eval mode; ValueError if there is none."""
    saved = read_own(path)
    if not saved.get("mapper"):
        raise ValueError(f"{path}: no mapper in it; want a checkpoint of train_vae.py, without --align 0")
    import timm  # noqa: F401  (torch 2.6 cannot import it under the device "meta", where `build` would)
    cfg = config_of(MapperConfig, saved["mapper_config"], path)
    if cfg.kind == "linear" and "bn.running_mean" not in saved["mapper"]:  # older ones heeded neither flag
        cfg = replace(cfg, norm=False, noise=False)
    return build(lambda: Mapper(cfg), saved["mapper"], path, "its own mapper_config")


@one_line
def load_discriminator(path) -> PatchDiscriminator:
    """Return the PatchGAN of a file: fp32, on the CPU, in training mode. Raises as load_vae."""
    content, prefix = read_file(fetch(path)), r"(loss\.)?(discriminator\.)?main\."
    state = find_state(content, ("discriminator", "state_dict"), prefix)
    if not state:
        raise ValueError(f"{path}: no discriminator in it; {describe(content)}; want main.0.weight ...")
    state = {re.sub(prefix, "main.", key): value for key, value in state.items() if re.match(prefix, key)}
    return build(PatchDiscriminator, state, path, "losses.PatchDiscriminator").train()


# SiT

SIT_TENSORS = {"pos_embed", "y_embedder.embedding_table.weight", "final_layer.linear.bias"}


def load_sit(path, weights: str = "ema") -> SiT:
    """Return the SiT of a weight file: fp32, on the CPU, in eval mode. weights: "ema" or "raw", not averaged.

    Raises FileNotFoundError, or ValueError for a damaged or other file, or one without such weights.
    """
    return read_sit(path, weights)[0]


@one_line
def read_sit(path, weights: str = "ema") -> tuple[SiT, dict]:
    """Return (SiT as load_sit, content of its file): our checkpoint, or whatever a published file holds."""
    content = read_file(fetch(path))
    # a bare state dict has one set of weights, and is taken for either
    state = find_state(content, ({"ema": "ema", "raw": "model"}[weights],), r"x_embedder\.proj\.weight$")
    if not SIT_TENSORS <= state.keys() or "blocks.0.mlp.w12.weight" in state:
        raise ValueError(f"{path}: no whole SiT in it with --weights {weights}; {describe(content)}")
    # REPA's older files call the blocks behind the projector decoder_blocks, counted from 0 again
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    state = {re.sub(r"^decoder_blocks\.(\d+)", lambda match: f"blocks.{depth + int(match[1])}", key): value
             for key, value in state.items() if not key.startswith("bn.")}  # bn: REPA-E's latent statistics
    if content.get("format") == SIT and content["latents"]["vae_hash"] and content["args"]:  # sample.py's
        cfg, fit = config_of(SiTConfig, content["model_config"], path), "its own model_config"
    else:
        cfg, fit = published_sit_config(state, content, path), "the published SiT closest in width"
    return build(lambda: SiT(cfg), state, path, fit), content


def published_sit_config(state: dict, content: dict, path) -> SiTConfig:
    """Return the shape of a published SiT, from its tensors and its args; the width tells depth and heads."""
    args = content.get("args")
    args = args if isinstance(args, dict) else getattr(args, "__dict__", {})
    for flag, ours in (("path_type", "linear"), ("prediction", "v")):
        if not str(args.get(flag, ours)).lower().startswith(ours):
            raise ValueError(f"{path}: its {flag} is {args[flag]}; sit.py has linear paths and velocity only")
    width, channels, p, _ = state["x_embedder.proj.weight"].shape
    size = min(SIT_SIZES.values(), key=lambda size: abs(size["hidden_size"] - width))
    use_null = args.get("cfg_prob", 0.1) > 0  # REPA builds no null label for label dropout 0
    z_dims = [len(value) for key, value in state.items() if re.fullmatch(r"projectors\.\d+\.4\.bias", key)]
    learn_sigma = len(state["final_layer.linear.bias"]) == 2 * p * p * channels
    return replace(
        SiTConfig(**size), patch_size=p, input_size=p * int(state["pos_embed"].shape[1] ** 0.5),
        in_channels=channels, num_classes=len(state["y_embedder.embedding_table.weight"]) - use_null,
        use_null=use_null, qk_norm="blocks.0.attn.q_norm.weight" in state, z_dims=tuple(z_dims),
        encoder_depth=args.get("encoder_depth", 8 if width > 768 else 4),  # else what REPA's author says
        learn_sigma=learn_sigma, reversed_time=learn_sigma)  # both are willisma's: its t = 0 is noise


# statistics of latents, for data.normalize_latents

def statistics_of(content: dict) -> tuple[Tensor, Tensor] | None:
    """Return (mean, std), each (C,) fp32, from a file's content (layouts above); None if it holds none."""
    content = content["latents"] if content.get("format") == SIT else content
    batch_norm = find_state(content, ("ema",), r"bn\.running_mean")
    if "latents_scale" in content and "latents_bias" in content:
        mean, std = content["latents_bias"], 1 / content["latents_scale"]
    elif "mean" in content and "std" in content:
        mean, std = content["mean"], content["std"]
    elif batch_norm:  # REPA-E denormalises by sqrt(var), though it normalises by sqrt(var + 1e-4)
        mean, std = batch_norm["bn.running_mean"], batch_norm["bn.running_var"].sqrt()
    elif content.get("_class_name") == "AutoencoderKL":  # z' = (z - shift) * scaling
        scaling, channels = content.get("scaling_factor") or 0.18215, content.get("latent_channels", 4)
        if scaling == 1 and not content.get("latents_std") and not content.get("shift_factor"):
            return None  # what it says if nobody knew them
        mean = content.get("latents_mean") or [content.get("shift_factor") or 0.0] * channels
        std = [s / scaling for s in content.get("latents_std") or [1.0] * channels]
    else:
        return None
    # copied: the file is mapped, and may be replaced while these are in use
    return tuple(torch.as_tensor(part, dtype=torch.float32).flatten().clone() for part in (mean, std))


@one_line
def read_statistics(path, channels: int, vae_hash: str | None = None, content: dict | None = None) -> tuple:
    """Return (mean, std), each (channels,) fp32, of --latent-stats: a file, a folder, or a number.

    content: the file's, if it was read before. Raises ValueError if there are no statistics in it, if they do
    not fit, or are of another VAE than vae_hash (encode.py's say of which).
    """
    if re.fullmatch(r"[\d.]+(e-?\d+)?", str(path)) and float(path) > 0:
        return torch.zeros(channels), torch.full((channels,), 1 / float(path))
    for name in ("meta.json", "config.json"):  # of encode.py's folders and diffusers'
        path = Path(path) / name if os.path.isfile(Path(path) / name) else path
    content = read_file(fetch(path)) if content is None else content
    mean, std = statistics_of(content) or (None, None)
    if mean is None:
        raise ValueError(f"{path}: no latent statistics in it; give --latent-stats FILE (for SD-VAE 0.18215)")
    facts = content["latents"] if content.get("format") == SIT else content
    theirs = facts.get("vae_hash", vae_hash)  # published files do not say of which VAE they are
    if vae_hash and theirs != vae_hash:
        raise ValueError(f"{path}: of VAE {theirs[:12]}, this is {vae_hash[:12]}; --vae {facts.get('vae')}")
    if not len(mean) == len(std) == channels or not torch.isfinite(mean + std).all() or std.min() <= 0:
        raise ValueError(f"{path}: {len(mean)} channels, std >= {std.min():g}; want {channels}, and std > 0")
    return mean, std


def statistics_for(sit_path, sit_checkpoint: dict, vae_hash: str, channels: int, latent_stats=None) -> tuple:
    """Return (mean, std, where they are from) of the latents that a SiT was trained on.

    latent_stats (the flag) decides; else what is in the SiT's own file. Raises ValueError if there are none,
    if they are not of the VAE of vae_hash, with so many channels, or if a SiT of ours is given others.
    """
    if latent_stats and sit_checkpoint.get("format") == SIT:
        raise ValueError(f"--latent-stats: {sit_path} carries those it was trained with; leave the flag out")
    if latent_stats:
        return *read_statistics(latent_stats, channels, vae_hash), str(latent_stats)
    return *read_statistics(sit_path, channels, vae_hash, sit_checkpoint), f"inside {sit_path}"



