"""KL autoencoder: image x (B, 3, H, W) in [-1, 1] <-> latent z (B, C, h, w).

    vae = VAE(VAE_SIZES["f16d32"])                      # from scratch
    vae = load_vae("hf://REPA-E/sdvae/sdvae-f8d4.pt")   # or a local file: published or ours
    posterior = vae.encode(x)                           # Posterior(mean, logvar), both (B, C, h, w) float32
    x_hat = vae.decode(posterior.sample())              # about [-1, 1], not clamped

The network is the encoder and decoder of latent diffusion (arXiv:2112.10752) with its state-dict names, so
that SD-VAE (f8d4) and VA-VAE, IN-VAE, E2E-VAE, Send-VAE (f16d32) files load strictly. Latents are raw here;
their normalisation is data.py's. Letters: B batch, C channels, H W image pixels, h w latent pixels.
"""
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the autoencoder: level i has ch * ch_mult[i] channels at side / (stem * 2^i)."""
    ch: int = 128
    ch_mult: tuple = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2          # per encoder level; a decoder level has one more
    attn_resolutions: tuple = (16,)  # sides of the levels with attention, at the nominal resolution
    resolution: int = 256            # nominal: places the attention, whatever size the images really have
    z_channels: int = 32
    embed_dim: int | None = None     # channels of z; None = z_channels, as in every released file
    in_channels: int = 3
    stem: int = 1                    # fold stem x stem pixels into channels; 1 = the published network
    norm_groups: int = 32


# f16d32 and f8d4 are the released files (REPA-E's models/autoencoder.py, VA-VAE's configs); tiny is ours, for
# 32x32 images on a CPU: folding the pixels first saves the convolutions at full resolution, the dearest ones
VAE_SIZES = {
    "f16d32": VAEConfig(),
    "f8d4": VAEConfig(ch_mult=(1, 2, 4, 4), z_channels=4),
    "tiny": VAEConfig(ch=160, ch_mult=(1,), attn_resolutions=(), resolution=32, z_channels=16, stem=8),
}


class Posterior:
    """Diagonal Gaussian q(z|x): mean, logvar (B, C, h, w) in float32 (float64 stays), logvar in [-30, 20]."""

    def __init__(self, mean, logvar):
        self.mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
        self.logvar = logvar.to(self.mean.dtype).clamp(-30.0, 20.0)

    @property
    def std(self):
        """Standard deviation, shape of mean."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None, eps: Tensor | None = None) -> Tensor:
        """Return z = mean + std * eps, shape of mean; eps is standard normal noise, drawn if not given."""
        if eps is None:
            device = self.mean.device if generator is None else generator.device
            eps = torch.randn(self.mean.shape, generator=generator, device=device)
        return self.mean + self.std * eps.to(self.mean)

    def mode(self) -> Tensor:
        """Return the mean."""
        return self.mean

    def kl(self) -> Tensor:
        """Return KL(q || N(0, I)) in nats, (B,), summed over C, h, w."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each behind GroupNorm and swish, on a residual branch."""

    def __init__(self, in_ch, out_ch, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_ch, eps=1e-6)
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_ch, eps=1e-6)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1)
        if in_ch != out_ch:
            self.nin_shortcut = nn.Conv2d(in_ch, out_ch, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions; q, k, v are 1x1 convolutions, as published."""

    def __init__(self, ch, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, ch, eps=1e-6)
        self.q = nn.Conv2d(ch, ch, 1)
        self.k = nn.Conv2d(ch, ch, 1)
        self.v = nn.Conv2d(ch, ch, 1)
        self.proj_out = nn.Conv2d(ch, ch, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (p(h).flatten(2).transpose(1, 2).unsqueeze(1) for p in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)         # (B, 1, hw, C): one head
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)   # (B, C, h, w)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halve the size: 3x3 convolution of stride 2, padded at the right and bottom only."""

    def __init__(self, ch):
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the size: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, ch):
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, in_ch, out_ch, num_blocks, has_attn, groups):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(in_ch if i == 0 else out_ch, out_ch, groups)
                                   for i in range(num_blocks))
        self.attn = nn.ModuleList(AttnBlock(out_ch, groups) for _ in range(num_blocks if has_attn else 0))

    def forward(self, h, checkpointing):
        for i, block in enumerate(self.block):
            h = run(block, h, checkpointing)
            if len(self.attn) > 0:
                h = run(self.attn[i], h, checkpointing)
        return h


class Mid(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, ch, groups):
        super().__init__()
        self.block_1 = ResnetBlock(ch, ch, groups)
        self.attn_1 = AttnBlock(ch, groups)
        self.block_2 = ResnetBlock(ch, ch, groups)

    def forward(self, h, checkpointing):
        for block in (self.block_1, self.attn_1, self.block_2):
            h = run(block, h, checkpointing)
        return h


def run(block, h, checkpointing):
    """Return block(h); with checkpointing its inner activations are recomputed in the backward pass."""
    return checkpoint(block, h, use_reentrant=False) if checkpointing else block(h)


def level_shapes(cfg):
    """Return [(channels, has_attn)] of the levels, highest resolution first."""
    top = cfg.resolution // cfg.stem
    return [(cfg.ch * mult, top // 2 ** i in cfg.attn_resolutions) for i, mult in enumerate(cfg.ch_mult)]


class Encoder(nn.Module):
    """x (B, 3, H, W) -> (B, 2 z_channels, h, w)."""

    def __init__(self, cfg):
        super().__init__()
        self.stem = cfg.stem
        self.conv_in = nn.Conv2d(cfg.in_channels * cfg.stem ** 2, cfg.ch, 3, padding=1)
        self.down = nn.ModuleList()
        ch = cfg.ch
        for i, (out_ch, has_attn) in enumerate(level_shapes(cfg)):
            level = Level(ch, out_ch, cfg.num_res_blocks, has_attn, cfg.norm_groups)
            if i < len(cfg.ch_mult) - 1:
                level.downsample = Downsample(out_ch)
            self.down.append(level)
            ch = out_ch
        self.mid = Mid(ch, cfg.norm_groups)
        self.norm_out = nn.GroupNorm(cfg.norm_groups, ch, eps=1e-6)
        self.conv_out = nn.Conv2d(ch, 2 * cfg.z_channels, 3, padding=1)

    def forward(self, x, checkpointing=False):
        h = self.conv_in(F.pixel_unshuffle(x, self.stem))
        for i, level in enumerate(self.down):
            h = level(h, checkpointing)
            if i < len(self.down) - 1:
                h = level.downsample(h)
        h = self.mid(h, checkpointing)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> x_hat (B, 3, H, W), not clamped. up[0], the highest resolution, runs last."""

    def __init__(self, cfg):
        super().__init__()
        self.stem = cfg.stem
        levels = level_shapes(cfg)
        ch = levels[-1][0]
        self.conv_in = nn.Conv2d(cfg.z_channels, ch, 3, padding=1)
        self.mid = Mid(ch, cfg.norm_groups)
        up = []
        for i, (out_ch, has_attn) in reversed(list(enumerate(levels))):
            level = Level(ch, out_ch, cfg.num_res_blocks + 1, has_attn, cfg.norm_groups)
            if i > 0:
                level.upsample = Upsample(out_ch)
            up.insert(0, level)
            ch = out_ch
        self.up = nn.ModuleList(up)
        self.norm_out = nn.GroupNorm(cfg.norm_groups, ch, eps=1e-6)
        self.conv_out = nn.Conv2d(ch, cfg.in_channels * cfg.stem ** 2, 3, padding=1)

    def forward(self, z, checkpointing=False):
        h = self.mid(self.conv_in(z), checkpointing)
        for i, level in reversed(list(enumerate(self.up))):
            h = level(h, checkpointing)
            if i > 0:
                h = level.upsample(h)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.stem)


class VAE(nn.Module):
    """The autoencoder of a VAEConfig. Set `checkpointing = True` to train with less memory and more time."""

    def __init__(self, cfg):
        super().__init__()
        self.config = cfg
        self.checkpointing = False
        embed_dim = cfg.z_channels if cfg.embed_dim is None else cfg.embed_dim
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, cfg.z_channels, 1)

    @property
    def stride(self):
        """Image pixels per latent pixel."""
        return self.config.stem * 2 ** (len(self.config.ch_mult) - 1)

    def encode(self, x: Tensor) -> Posterior:
        """Return the Posterior of x (B, 3, H, W), float in [-1, 1]; H and W multiples of `stride`.

        The range is the caller's duty (data.to_float keeps it): checking it would stall a GPU every step.
        Raises ValueError on integers, another channel count or size.
        """
        if not x.is_floating_point():
            raise ValueError(f"images are {x.dtype}, the VAE takes float in [-1, 1]: use data.to_float(x)")
        channels, stride = self.config.in_channels, self.stride
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % stride or x.shape[3] % stride:
            raise ValueError(f"images have shape {tuple(x.shape)}, this VAE takes (B, {channels}, H, W), "
                             f"H and W multiples of {stride}: resize or crop them")
        moments = self.quant_conv(self.encoder(x, self.checkpointing))
        return Posterior(*moments.chunk(2, dim=1))

    def decode(self, z: Tensor) -> Tensor:
        """Return images (B, 3, H, W), about [-1, 1], not clamped, of raw latents z (B, C, h, w).

        Raises ValueError on another channel count, for example the 2C channels of stored moments.
        """
        channels = self.post_quant_conv.in_channels
        if z.ndim != 4 or z.shape[1] != channels:
            raise ValueError(f"latents have shape {tuple(z.shape)}, this VAE decodes (B, {channels}, h, w): "
                             f"if these are moments (2 x {channels} channels), sample from them first")
        return self.decoder(self.post_quant_conv(z), self.checkpointing)

    def forward(self, x, eps=None):
        """Return (x_hat, z, posterior) of x, with z = posterior.sample(eps=eps)."""
        posterior = self.encode(x)
        z = posterior.sample(eps=eps)
        return self.decode(z), z, posterior


# Loading: read the file (fetch, read_file), bring its keys to our names (unpack), find the architecture.

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
TRAINING_KEYS = ("loss.", "foundation_model.", "linear_proj.")  # beside the VAE in VA-VAE and LDM checkpoints

# diffusers' AutoencoderKL -> ours, replaced in this order; the last four: attention names of older files
DIFFUSERS_NAMES = (
    ("mid_block.resnets.0.", "mid.block_1."), ("mid_block.resnets.1.", "mid.block_2."),
    ("mid_block.attentions.0.", "mid.attn_1."), ("down_blocks.", "down."), (".resnets.", ".block."),
    (".attentions.", ".attn."), ("downsamplers.0.", "downsample."), ("upsamplers.0.", "upsample."),
    ("conv_shortcut.", "nin_shortcut."), ("group_norm.", "norm."), ("conv_norm_out.", "norm_out."),
    ("to_q.", "q."), ("to_k.", "k."), ("to_v.", "v."), ("to_out.0.", "proj_out."),
    ("query.", "q."), ("key.", "k."), ("value.", "v."), ("proj_attn.", "proj_out."),
)


def load_vae(path: str | Path) -> VAE:
    """Return the VAE of a weight file: float32, on the CPU, in eval mode.

    path: a file, or hf://owner/repo/file for the hub. Taken are our checkpoints (EMA weights where they hold
    any, else the raw ones), bare state dicts with the published names, {"state_dict": ...} as VA-VAE and LDM
    training write it, and diffusers' AutoencoderKL weights (.bin, .safetensors). Files other than ours must
    have the architecture of one of VAE_SIZES; the number of latent channels is read from the file.
    Raises FileNotFoundError, or ValueError for a file that is damaged or holds something else.
    """
    state, cfg = unpack(read_file(fetch(path)), path)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    if cfg is None:
        cfg = infer_config(shapes, path)
    wrong = differences(cfg, shapes)
    if wrong:
        raise ValueError(f"{path}: its weights do not fit its own model_config, {summary(wrong)}: was it "
                         "edited, or written by another version?")
    with torch.device("meta"):  # no time spent on initial weights
        vae = VAE(cfg)
    vae.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return vae.eval()


def fetch(path):
    """Return the local Path of `path`; hf://owner/repo/file is downloaded to the cache of huggingface_hub."""
    if not str(path).startswith("hf://"):
        return Path(path)
    parts = re.fullmatch(r"hf://([^/]+/[^/]+)/(.+)", str(path))
    if parts is None:
        raise ValueError(f"{path}: a file on the hub is written hf://owner/repo/file")
    from huggingface_hub import hf_hub_download  # comes with timm
    try:
        return Path(hf_hub_download(parts[1], parts[2]))
    except OSError as error:  # what huggingface_hub raises without network, and for wrong names
        raise FileNotFoundError(f"{path}: neither in the local cache nor to be had from the hub "
                                f"({type(error).__name__}): check the name and the network, or download "
                                f"{parts[2]} elsewhere and give its path") from error


def read_file(path):
    """Return the content of a .safetensors file, or of anything that torch.load(weights_only=True) reads."""
    if not path.is_file():
        seen = "a folder, give the weight file in it" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {seen}")
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path}: the file is empty: download or copy it again")
    if head.lstrip().startswith((b"<", b"version https://git-lfs")):
        raise ValueError(f"{path}: a web page or Git LFS pointer, not weights (it starts {head[:16]!r}): "
                         "download the file itself")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # comes with timm
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zip and safetensors each raise types of their own
        pickled = re.search(r"GLOBAL ([\w.]+)", str(error))
        if pickled:
            raise ValueError(f"{path}: holds a pickled {pickled[1]}, not loaded because it could run code: "
                             "if you trust it, load it yourself and save its state dict alone") from error
        raise ValueError(f"{path}: damaged, cut off or no weight file ({type(error).__name__}): download or "
                         "copy it again") from error


def unpack(content, path):
    """Return (state dict in our names, VAEConfig or None) of a file's content. New layouts belong here."""
    content = content if isinstance(content, dict) else {}
    if "format" in content:
        if content["format"] != "nanosendvae-vae":
            raise ValueError(f"{path}: a {content['format']} checkpoint, not a VAE: give one of train_vae.py")
        cfg = {key: tuple(v) if isinstance(v, list) else v for key, v in content["model_config"].items()}
        return content["ema"] or content["model"], VAEConfig(**cfg)
    state = content.get("state_dict", content)
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(key)): value for key, value in state.items()}
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in state:
        state = from_diffusers(state)
    if not any(key.startswith(PARTS) for key in state):
        keys = [key for value in (state, *content.values()) if isinstance(value, dict) for key in value]
        sit = any("x_embedder" in str(key) for key in keys)
        raise ValueError(f"{path}: no VAE in it, its keys are {summary(list(state))}: "
                         + ("these are SiT weights, for load_sit" if sit else "give the VAE's weight file"))
    return {key: value for key, value in state.items() if not key.startswith(TRAINING_KEYS)}, None


def from_diffusers(state_dict):
    """Return the state dict of diffusers' AutoencoderKL under our key names.

    There up_blocks count from the lowest resolution, and attention is linear: (C, C), not (C, C, 1, 1).
    """
    last = max(int(key.split(".")[2]) for key in state_dict if key.startswith("decoder.up_blocks."))
    renamed = {}
    for key, value in state_dict.items():
        key = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", key)
        for theirs, ours in DIFFUSERS_NAMES:
            key = key.replace(theirs, ours)
        renamed[key] = value[:, :, None, None] if ".attn" in key and value.ndim == 2 else value
    return renamed


def infer_config(shapes, path):
    """Return the VAEConfig behind {key: shape}: one of VAE_SIZES, with the latent channels of the file.

    Raises ValueError that names the closest size and what differs from it.
    """
    channels = {}
    if len(shapes.get("post_quant_conv.weight", ())) == 4:
        z_channels, embed_dim = shapes["post_quant_conv.weight"][:2]
        channels = dict(z_channels=z_channels, embed_dim=None if embed_dim == z_channels else embed_dim)
    sizes = {name: replace(cfg, **channels) for name, cfg in VAE_SIZES.items()}
    wrong = {name: differences(cfg, shapes) for name, cfg in sizes.items()}
    closest = min(wrong, key=lambda name: len(wrong[name]))
    if wrong[closest]:
        raise ValueError(f"{path}: none of the sizes {', '.join(VAE_SIZES)}; from {closest} it differs in "
                         f"{len(wrong[closest])} tensors: {summary(wrong[closest])}")
    return sizes[closest]


def differences(cfg, shapes):
    """Return one line for each tensor in which a file's {key: shape} differs from VAE(cfg); [] if it fits."""
    with torch.device("meta"):
        wanted = {key: tuple(value.shape) for key, value in VAE(cfg).state_dict().items()}
    return ([f"{key} is {shapes[key]}, not {shape}" for key, shape in wanted.items()
             if shapes.get(key, shape) != shape]
            + [f"{key} is missing" for key in wanted if key not in shapes]
            + [f"{key} is unexpected" for key in shapes if key not in wanted])


def summary(items):
    """Return the first three items as text, and the number of the others."""
    return "; ".join(items[:3]) + (f"; and {len(items) - 3} more" if len(items) > 3 else "")
