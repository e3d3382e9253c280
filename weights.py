"""Weight files: find and read them safely, bring published layouts to our key names, write ours for others.

A weight file is named by a local path (.pt, .pth, .ckpt, .bin, .safetensors), a folder (of our checkpoints:
the newest; of diffusers: the weights in it), or hf://owner/repo/file. Layouts that are understood:

    VAE     ours; bare state dict (SD-VAE, E2E-VAE, Send-VAE as REPA-E stores them); {"state_dict"} of LDM and
            VA-VAE with loss.*, foundation_model.*, linear_proj.*; diffusers' AutoencoderKL, new and old
            attention names; a REPA-E training checkpoint ("vae")
    SiT     ours; bare (REPA's last.pt with its legacy names, willisma's SiT-XL-2-256.pt); {"ema", "model"} of
            REPA and REPA-E, with the BatchNorm that holds the latent statistics
    any     wrapped in module. (DDP) and _orig_mod. (torch.compile)

Statistics of a published VAE's latents come from the file beside it: <name>-latents-stats.pt (REPA-E),
latents_stats.pt (VA-VAE) or diffusers' config.json. They become (mean, std) of data.normalize_latents.
"""
import argparse
import hashlib
import json
import math
import os
import re
import sys
import zipfile
from pathlib import Path

import torch

import common

DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# a key that gives a file away -> what to do with that file; the first that fits counts
KINDS = (
    (r"latents_(scale|bias)$|^mean$", "latent statistics, for --latent-stats"),
    (r"blocks\.\d+\.mlp\.w12\.", "LightningDiT's network or another with SwiGLU, which sit.py does not have"),
    (r"x_embedder\.", "SiT weights, for --ckpt"),
    (r"(^|\.)main\.\d+\.", "a PatchGAN discriminator, for --disc-init"),
    (r"^encoder\.(conv_in|down)|^quant_conv", "a VAE, for --vae or --init"),
    (r"patch_embed\.", "a vision transformer, for --teacher-weights"),
    (r"^features\.\d", "a VGG16, for --lpips-weights"),
    (r"Mixed_5b\.", "an Inception network, for fid.py --inception"),
)


# finding and reading

def resolve(path) -> str:
    """Return `path`; for a folder of our checkpoints the newest in it. hf:// and diffusers folders stay."""
    if str(path).startswith("hf://") or not os.path.isdir(path) or _diffusers_file(path):
        return str(path)
    files = common.checkpoints(path)
    if not files:
        raise FileNotFoundError(f"{path}: a folder with neither ckpt_*.pt nor {DIFFUSERS_FILES[0]}; "
                                "train first, or give the weight file")
    for step in sorted(files, reverse=True):
        if zipfile.is_zipfile(files[step]):  # the end of a zip file names its parts: a cut one has none
            return str(files[step])
        print(f"warning: {files[step]}: cut off or damaged; falling back to the one before", file=sys.stderr)
    raise ValueError(f"{path}: none of its {len(files)} checkpoints is readable")


def _diffusers_file(folder):
    files = [Path(folder) / name for name in DIFFUSERS_FILES]
    return next(filter(os.path.isfile, files), None)  # unlike Path.is_file, no error without permission


def fetch(path) -> Path:
    """Return the local file behind `path`; hf://owner/repo/file is downloaded to huggingface_hub's cache.

    Raises FileNotFoundError if it cannot be had, ValueError for a malformed hf:// name.
    """
    if not str(path).startswith("hf://"):
        path = Path(resolve(path))
        return _diffusers_file(path) or path
    parts = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)/(.+)", str(path))
    if parts is None:
        raise ValueError(f"{path}: a file on the hub is written hf://owner/repo/file")
    from huggingface_hub import hf_hub_download  # comes with timm
    try:
        return Path(hf_hub_download(parts[1], parts[2]))
    except (OSError, ValueError) as error:  # what huggingface_hub raises without network, for wrong names
        raise FileNotFoundError(f"{path}: neither in the local cache nor to be had from the hub "
                                f"({type(error).__name__}): check the name and the network, or download "
                                f"{parts[2]} elsewhere and give its path") from error


def timm_network(name: str, flag: str, weights=None, overlay=None, **kwargs):
    """Return a timm network without classifier, on the CPU; every tensor of it is from the weights.

    weights: local file, None = timm's from the hub or its cache. overlay: changes to timm's pretrained_cfg.
    Raises FileNotFoundError if the weights cannot be had, ValueError for a name that timm does not know, a
    damaged file or one of another network; `flag` is the option that named the network.
    """
    import timm  # takes seconds to import
    if weights is not None and not os.path.isfile(weights):
        raise FileNotFoundError(f"{flag}-weights {weights}: no such file; want the weights of {name}, "
                                f"huggingface.co/timm/{name}")
    overlay = {**(overlay or {}), **({"file": str(weights)} if weights else {})}

    def create(**more):
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs, **more)
    try:
        try:
            model = create()
        except RuntimeError as error:
            # With num_classes=0 timm loads by strict=False, and what the file lacks would stay random: only
            # for a file that differs in nothing but its classifier.
            keys = re.findall(r'"([^"]+)"', str(error)) + re.findall(r"size mismatch for (\S+):", str(error))
            heads = timm.get_pretrained_cfg(name).classifier if keys else ()
            heads = (heads,) if isinstance(heads, str) else heads
            if not keys or any(key.rpartition(".")[0] not in heads for key in keys):
                raise
            model = create(num_classes=0)
    except Exception as error:  # timm, torch, safetensors and the hub's client raise types of their own
        text = " ".join(str(error).split())[:300] or type(error).__name__
        if "Unknown model" in text or "Invalid pretrained tag" in text:
            raise ValueError(f"{flag} {name}: none of its own names, and timm does not know it "
                             "(timm.list_models())") from error
        if "No pretrained weights" in text:
            raise ValueError(f"{flag} {name}: timm has no weights of it; give {flag}-weights FILE") from error
        if weights is None and isinstance(error, OSError):
            raise FileNotFoundError(
                f"{flag} {name}: its weights are not in the local cache and the hub (huggingface.co/timm/"
                f"{name}) cannot be reached; fetch the file elsewhere and give {flag}-weights FILE, or use "
                f"{flag} shapes") from error
        raise ValueError(f"{flag}-weights {weights or 'from the hub'}: not the weights of {name}, or "
                         f"damaged: {text}") from error
    model.reset_classifier(0)
    return model


def own_checkpoint(path) -> dict:
    """Return the checkpoint if train_vae.py wrote it, else {} (a published file, or one on the hub)."""
    try:
        return common.load_checkpoint(resolve(path), "nanosendvae-vae")
    except (ValueError, FileNotFoundError):
        return {}


def config_of(kind, values: dict, path):
    """Return kind(**values), a configuration from a checkpoint; fields that came later have their defaults.

    Raises ValueError for fields that `kind` has not, or that have no default.
    """
    try:
        return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    except TypeError as error:
        raise ValueError(f"{path}: written by another version of this code ({error})") from error


def read_file(path):
    """Return the content of a weight file on the CPU; PyTorch zip files are mapped, not read, until used.

    Pickled code is refused: only tensors, plain types, and argparse.Namespace (a bag of plain values, which
    REPA's and REPA-E's checkpoints contain) are built. Raises FileNotFoundError or ValueError, one line each.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except PermissionError as error:
        raise ValueError(f"{path}: no permission to read it: chmod it, or copy it elsewhere") from error
    except OSError as error:
        raise FileNotFoundError(f"{path}: no such file; train first, or give the weight file") from error
    if not head:
        raise ValueError(f"{path}: the file is empty: download or copy it again")
    if head.lstrip().startswith((b"<", b"version https://git-lfs")):
        raise ValueError(f"{path}: a web page or Git LFS pointer, not weights (it starts {head[:16]!r}): "
                         "download the file itself")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # comes with timm
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK"))
    except Exception as error:  # torch, pickle, zip and safetensors each raise types of their own
        pickled = re.search(r"GLOBAL ([\w.]+)", str(error))
        if pickled:
            raise ValueError(f"{path}: holds a pickled {pickled[1]}, not loaded because it could run code: "
                             "if you trust it, load it yourself and save its state dict alone") from error
        raise ValueError(f"{path}: damaged, cut off or no weight file ({type(error).__name__}): download or "
                         "copy it again") from error


def unwrap(state: dict) -> dict:
    """Return the state dict without the prefixes of DDP and torch.compile, whatever their order."""
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", str(key)): value for key, value in state.items()}


def describe(content) -> str:
    """Say what a file's content is, by its keys, and what it is for; for error messages."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}, no dict of weights"
    if "format" in content:
        return f"a {content['format']} checkpoint"
    parts = [content, *(value for value in content.values() if isinstance(value, dict))]
    keys = [key for part in parts for key in unwrap(part)]
    for pattern, meaning in KINDS:
        if any(re.search(pattern, key) for key in keys):
            return meaning
    return f"its keys are {summary(list(map(str, content)))}"


def summary(items) -> str:
    """Return the first three items as text, and the number of the others."""
    return "; ".join(items[:3]) + (f"; and {len(items) - 3} more" if len(items) > 3 else "")


def differences(wanted: dict, found: dict) -> list[str]:
    """Return one line for each tensor in which {key: tensor} `found` differs from `wanted`; [] if it fits."""
    return ([f"{key} is {tuple(found[key].shape)}, not {tuple(value.shape)}" for key, value in wanted.items()
             if key in found and found[key].shape != value.shape]
            + [f"{key} is missing" for key in wanted if key not in found]
            + [f"{key} is unexpected" for key in found if key not in wanted])


def load_strictly(module, state: dict, path, reason: str) -> None:
    """Load `state` into `module` (copied to its dtype); ValueError lists differing keys, says `reason`."""
    wrong = differences(module.state_dict(), state)
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit: {summary(wrong)}: {reason}")
    module.load_state_dict(state)


# published layouts

VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# beside the VAE in checkpoints of VA-VAE and LDM
TRAINING_KEYS = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")

# diffusers' AutoencoderKL and ours, replaced in either direction; its older files name attention otherwise
DIFFUSERS_NAMES = (
    (".mid_block.resnets.0.", ".mid.block_1."), (".mid_block.resnets.1.", ".mid.block_2."),
    (".mid_block.attentions.0.", ".mid.attn_1."), (".down_blocks.", ".down."), (".up_blocks.", ".up."),
    (".resnets.", ".block."), (".attentions.", ".attn."), (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."), (".conv_shortcut.", ".nin_shortcut."), (".group_norm.", ".norm."),
    (".conv_norm_out.", ".norm_out."), (".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."),
    (".to_out.0.", ".proj_out."),
)
OLD_DIFFUSERS_NAMES = ((".query.", ".q."), (".key.", ".k."), (".value.", ".v."),
                       (".proj_attn.", ".proj_out."))


def vae_state(content, path) -> tuple[dict, dict | None]:
    """Return (VAE state dict in our names, our model_config or None) of a file's content.

    Raises ValueError if there is no VAE in it. New layouts belong here.
    """
    if isinstance(content, dict) and "format" in content:
        if content["format"] != "nanosendvae-vae":
            raise ValueError(f"{path}: {describe(content)}, not a VAE: give one of train_vae.py")
        return unwrap(content["ema"] or content["model"]), content["model_config"]
    inner = content if isinstance(content, dict) else {}
    state = unwrap(inner.get("state_dict") or inner.get("vae") or inner)
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in state:
        state = from_diffusers(state)
    if not any(key.startswith(VAE_PARTS) for key in state):
        raise ValueError(f"{path}: no VAE in it, {describe(content)}: give the VAE's weight file")
    return {key: value for key, value in state.items() if not key.startswith(TRAINING_KEYS)}, None


def sit_state(content, path, which: str = "ema") -> dict:
    """Return the SiT state dict of a file's content, REPA's names; which: "ema" or "raw" (not averaged).

    Raises ValueError if there is no SiT in it, or no such weights. A bare state dict has one set.
    """
    name = {"ema": "ema", "raw": "model"}[which]
    state = content if isinstance(content, dict) else {}
    if "model" in state or "ema" in state:
        if state.get("format", "nanosendvae-sit") != "nanosendvae-sit":
            raise ValueError(f"{path}: {describe(content)}, not a SiT: give one of train_sit.py")
        if not state.get(name):
            other = {"ema": "raw", "raw": "ema"}[which]
            raise ValueError(f"{path} holds no {which.replace('ema', 'EMA')} weights; use --weights {other}")
        state = state[name]
    state = unwrap(state)
    if any("blocks.0.mlp.w12." in key for key in state) or "x_embedder.proj.weight" not in state:
        raise ValueError(f"{path}: no SiT in it, {describe(content)}: give a checkpoint of train_sit.py, "
                         "SiT, REPA or REPA-E")
    # REPA's older files call the blocks behind the projector decoder_blocks, counted from 0 again
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    return {re.sub(r"^decoder_blocks\.(\d+)", lambda found: f"blocks.{int(found[1]) + depth}", key): value
            for key, value in state.items()}


def discriminator_state(content, path) -> dict:
    """Return a PatchGAN state dict, keys main.N.*, of a bare file or a VAE training checkpoint's content."""
    state = content if isinstance(content, dict) else {}
    state = unwrap(state.get("discriminator") or state.get("state_dict") or state)
    state = {re.sub(r"^(loss\.)?discriminator\.", "", key): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key.startswith("main.")}
    if not state:
        raise ValueError(f"{path}: no discriminator in it, {describe(content)}: give REPA-E's "
                         "*-discriminator-ckpt.pt, or a checkpoint of a VAE training with GAN")
    return state


def from_diffusers(state_dict: dict) -> dict:
    """Return the state dict of diffusers' AutoencoderKL under our key names.

    There up_blocks count from the lowest resolution, and attention is linear: (C, C), not (C, C, 1, 1).
    """
    renamed = _rename(state_dict, DIFFUSERS_NAMES + OLD_DIFFUSERS_NAMES)
    return {key: value[:, :, None, None] if ".attn" in key and value.ndim == 2 else value
            for key, value in renamed.items()}


def to_diffusers(state: dict) -> dict:
    """Return our VAE state dict under diffusers' current names: the inverse of `from_diffusers`."""
    renamed = _rename(state, [(ours, theirs) for theirs, ours in DIFFUSERS_NAMES])
    return {key: value[:, :, 0, 0] if ".attentions." in key and value.ndim == 4 else value
            for key, value in renamed.items()}


def _rename(state, names):
    """Replace each (old, new) of `names` in all keys, and count decoder levels from the other end."""
    renamed = {}
    for key, value in state.items():
        for old, new in names:
            key = key.replace(old, new)
        renamed[key] = value
    level = r"^(decoder\.up(?:_blocks)?\.)(\d+)"
    last = max((int(found[2]) for key in renamed if (found := re.match(level, key))), default=0)
    return {re.sub(level, lambda found: f"{found[1]}{last - int(found[2])}", key): value
            for key, value in renamed.items()}


# statistics of latents

def statistics_of(content) -> tuple | None:
    """Return (mean, std), each (C,) fp32, from a file's content; None if it holds none.

    REPA-E: latents_bias and latents_scale = 1 / std; its SiT: BatchNorm bn.running_mean, bn.running_var.
    VA-VAE, and our meta.json: mean, std. diffusers' config.json: latents_mean, latents_std, else shift_factor
    and scaling_factor (z' = (z - shift) * scaling; 0.18215 where the file does not say, as diffusers has it).
    """
    if not isinstance(content, dict):
        return None
    if "latents_scale" in content and "latents_bias" in content:
        mean, std = content["latents_bias"], 1 / content["latents_scale"]
    elif "mean" in content and "std" in content:
        mean, std = content["mean"], content["std"]
    elif content.get("_class_name") == "AutoencoderKL":
        scaling, channels = content.get("scaling_factor") or 0.18215, content.get("latent_channels", 4)
        if scaling == 1 and not any(map(content.get, ("latents_mean", "latents_std", "shift_factor"))):
            return None  # what stands there where nobody knew them
        mean = content.get("latents_mean") or [content.get("shift_factor") or 0.0] * channels
        std = [s / scaling for s in content.get("latents_std") or [1.0] * channels]
    elif "latents" in content and content.get("format") == "nanosendvae-sit":
        return statistics_of(content["latents"])
    else:
        state = content.get("ema") or content
        state = unwrap({key: value for key, value in state.items() if "bn.running_" in str(key)})
        if "bn.running_mean" not in state:
            return None
        # REPA-E normalises by sqrt(var + 1e-4) and denormalises by sqrt(var); sampling needs the latter
        mean, std = state["bn.running_mean"], state["bn.running_var"].sqrt()
    # a copy: the file is mapped, and may be written over while this is in use
    return tuple(torch.as_tensor(value, dtype=torch.float32).flatten().clone() for value in (mean, std))


def statistics_hash(mean, std) -> str:
    """Return the sha256 of latent statistics, tensors or lists."""
    numbers = [torch.as_tensor(part).tolist() for part in (mean, std)]
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def statistics_for(sit, content, vae_path, vae_hash: str, channels: int, latent_stats=None) -> tuple:
    """Return (mean, std, source) for a published SiT `sit` of this file content on the latents of a VAE.

    latent_stats (the flag) decides; else those in the SiT's file; else those beside the VAE. ValueError
    if there are none, if the last two contradict each other, or if they are of another VAE.
    """
    if latent_stats:
        return *read_statistics(latent_stats, channels, vae_hash), str(latent_stats)
    inside, beside = statistics_of(content), find_statistics(vae_path, channels)
    if inside is None and beside is None:
        raise ValueError(f"no latent statistics in {sit} or beside {vae_path}: give --latent-stats FILE "
                         "(0.18215 for SD-VAE with SiT's and REPA's checkpoints)")
    if inside is None:
        return beside
    mean, std = _checked(inside, sit, channels)
    if beside and not (torch.allclose(std, beside[1], rtol=0.05)
                       and ((mean - beside[0]).abs() <= 0.05 * std).all()):
        raise ValueError(f"statistics {statistics_hash(mean, std)[:12]} of the latents inside {sit} are not "
                         f"{statistics_hash(*beside[:2])[:12]} of {beside[2]}: another VAE than the SiT's? "
                         "--latent-stats FILE decides")
    return mean, std, f"inside {sit}"


def read_statistics(path, channels: int, vae_hash: str | None = None) -> tuple:
    """Return (mean, std), each (channels,) fp32, of --latent-stats.

    path: statistics file (as in `statistics_of`), folder written by encode.py or in diffusers format, or a
    number s for z' = s * z (SD-VAE with SiT and REPA: 0.18215). Raises ValueError if it does not fit, or
    is of another VAE than the one of vae_hash (encode.py's folders say of which they are).
    """
    try:
        scale = float(str(path))
    except ValueError:
        content = _read_any(path)
        found = content.get("vae_hash", vae_hash) if isinstance(content, dict) else vae_hash
        if vae_hash and found != vae_hash:
            raise ValueError(f"{path}: statistics of the latents of VAE {found[:12]}, this is VAE "
                             f"{vae_hash[:12]}; encode with this one") from None
        return _checked(statistics_of(content), path, channels)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"--latent-stats {path}: a scale must be a positive number, such as 0.18215")
    return torch.zeros(channels), torch.full((channels,), 1 / scale)


def _checked(found, path, channels):
    """Return the statistics `found` in a file, or raise ValueError if they are none or do not fit."""
    if found is None:
        raise ValueError(f"{path}: no latent statistics in it; wanted {{latents_scale, latents_bias}}, "
                         "{mean, std}, a folder of encode.py, or a number such as 0.18215")
    mean, std = found
    if not len(mean) == len(std) == channels:
        raise ValueError(f"{path}: statistics of {len(mean)} channels, the VAE's latents have {channels}: "
                         "these belong to another VAE")
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ValueError(f"{path}: std from {std.min():g} to {std.max():g}, want finite numbers > 0")
    return mean, std


def _read_any(path):
    """Content of a weight file, a .json, or the meta.json or config.json of a folder."""
    if not str(path).startswith("hf://") and os.path.isdir(path):
        files = [Path(path) / name for name in ("meta.json", "config.json")]
        path = next(filter(Path.is_file, files), path)
    file = fetch(path)
    return read_json(file) if file.suffix == ".json" else read_file(file)


def read_json(path):
    """Return the content of a JSON file. Raises FileNotFoundError or ValueError, one line each."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error


def find_statistics(vae_path, channels: int) -> tuple | None:
    """Return (mean, std, source) of the latents of a VAE file, from what lies beside it or in it; else None.

    Looked for in this order: <name>-latents-stats.pt, latents_stats.pt, config.json (diffusers); then
    BatchNorm inside the file (REPA-E training checkpoints). Ours have none: encode.py makes and keeps them.
    """
    vae_path = str(vae_path)
    is_folder = not vae_path.startswith("hf://") and os.path.isdir(vae_path)
    folder, _, name = (vae_path, "", "diffusion_pytorch_model") if is_folder else vae_path.rpartition("/")
    stem = re.sub(r"\.\w+$", "", name)
    for name in (f"{stem}-latents-stats.pt", "latents_stats.pt", "config.json"):
        source = f"{folder}/{name}" if folder else name
        try:
            found = statistics_of(_read_any(source))
        except FileNotFoundError:
            continue
        if found is not None:  # a config.json may be anything
            return *_checked(found, source, channels), source
    content = None if is_folder else read_file(fetch(vae_path))
    if isinstance(content, dict) and "vae" in content and statistics_of(content):
        return *_checked(statistics_of(content), vae_path, channels), vae_path
    return None


# writing: to a temporary name first, because the old file may be what is being read (mapped)

def save_safetensors(path, state: dict) -> None:
    """Write a state dict as fp32 .safetensors, with the metadata that transformers and diffusers expect."""
    from safetensors.torch import save_file  # comes with timm
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.float().contiguous() for key, value in state.items()}
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(state, temporary, metadata={"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(temporary, 0o666 & ~mask)  # as open() would have it; the package makes files private
    os.replace(temporary, path)


def save_statistics(path, mean, std) -> None:
    """Write (mean, std), each (C,), as REPA-E's {latents_scale, latents_bias}, each (1, C, 1, 1)."""
    common.save_checkpoint(path, {"latents_scale": 1 / std.view(1, -1, 1, 1),
                                  "latents_bias": mean.view(1, -1, 1, 1)})


def model_card(source, content, statistics, licence: str | None) -> str:
    """Return the README.md of an exported VAE: recipe, data, metrics, start weights and their licence.

    content: the checkpoint it was made from, if that is ours (its args say the recipe; log.jsonl beside it
    the metrics), else anything. statistics: (mean, std, where from) or None.
    """
    ours = isinstance(content, dict) and content.get("format") == "nanosendvae-vae"
    args, versions = (content["args"], content.get("versions", {})) if ours else ({}, {})
    start = args.get("init", source)
    page = re.match(r"hf://([\w.-]+/[\w.-]+)", str(start))
    terms = ("none of others: trained from scratch" if start == "none" else
             f"see https://huggingface.co/{page[1]}" if page else "not recorded")
    title = "# KL autoencoder " + ("trained with" if ours else "converted by") + " nanoSendVAE"
    lines = ["---", f"license: {licence or 'unknown'}", "library_name: diffusers", "---", "", title, "",
             f"* exported from: `{Path(str(source)).name}`" + (f", step {content['step']:,}" if ours else ""),
             f"* start weights: {start}; their licence: {terms}"]
    if ours:
        teacher = content.get("teacher")
        method = f"Send-VAE (arXiv 2601.05823), teacher {teacher}" if teacher else "plain KL-VAE"
        lines += [f"* data: {args.get('data')}, {args.get('image_size')} px, {content['images_seen']:,} seen",
                  f"* method: {method}",
                  "* made with: " + ", ".join(f"{key} {value}" for key, value in versions.items() if value)]
    known = statistics and f"in config.json, from `{Path(str(statistics[2])).name}`"
    lines += ["* statistics of the latents, z' = (z - latents_mean) / latents_std: "
              + (known or "not known, encode.py computes them")]
    rows = _evaluations(source, content["step"]) if ours else []
    if rows:
        lines += ["", "## Metrics", "", *(f"* {key}: {value}" for key, value in rows)]
    if ours:
        skip = ("out", "device", "dry_run", "wandb")
        recipe = [f"--{key.replace('_', '-')} {value}" for key, value in args.items() if key not in skip]
        lines += ["", "## Recipe", "", "```", *recipe, "```"]
    return "\n".join(lines) + "\n"


def _evaluations(checkpoint, step):
    """The last evaluation up to `step` in the log.jsonl beside a checkpoint, as (name, value); [] if none."""
    log, rows = Path(checkpoint).parent / "log.jsonl", []
    for line in log.read_text().splitlines() if log.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # a killed run may leave half a line
            continue
    rows = [row for row in rows if "psnr_db" in row and row["step"] <= step]
    keys = ("step", "eval_images", "psnr_db", "align_clean", "kl_per_dim_nats", "effective_rank")
    return [(key, rows[-1][key]) for key in keys if key in rows[-1]] if rows else []
