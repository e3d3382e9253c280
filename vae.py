"""KL autoencoder of latent diffusion (arXiv:2112.10752): image x (B, 3, H, W) <-> latent z (B, C, h, w).

    vae = VAE(VAE_SIZES["f16d32"])               # from scratch; checkpoints.load_vae reads published weights
    posterior = vae.encode(x)                    # x in [-1, 1]; Posterior(mean, logvar), (B, C, h, w) fp32
    x_hat = vae.decode(posterior.sample())       # about [-1, 1], not clamped

Sizes: f16d32 (VA-VAE, IN-VAE, E2E-VAE, Send-VAE), f8d4 (SD-VAE), tiny and small (the embedded set). Module
names are those of the published files. Latents are raw here; data.py normalises them.
Read: ResnetBlock, AttnBlock -> Encoder, Decoder -> VAE.
Letters: B batch, C latent channels, H W image pixels, h w latent pixels.
"""
from dataclasses import dataclass

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

    @property
    def network(self):
        """What the network depends on: f8d4's attn_resolutions are never hit, so () is the same network."""
        return (level_shapes(self), self.num_res_blocks, self.z_channels, self.embed_dim or self.z_channels,
                self.in_channels, self.stem, self.norm_groups)


# f16d32 and f8d4 are the released files (REPA-E's models/autoencoder.py, VA-VAE's configs). tiny is ours, for
# 32 x 32 images on a CPU: folding the pixels first saves the most expensive convolutions, those at full size.
VAE_SIZES = {
    "f16d32": VAEConfig(),
    "f8d4": VAEConfig(ch_mult=(1, 2, 4, 4), z_channels=4),
    "tiny": VAEConfig(ch=96, ch_mult=(1,), num_res_blocks=0, attn_resolutions=(), resolution=32,
                      z_channels=28, stem=8),
    "small": VAEConfig(ch=96, ch_mult=(1,), num_res_blocks=0, attn_resolutions=(), resolution=32,
                       z_channels=8, stem=4),
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


class GroupNorm(nn.GroupNorm):
    """GroupNorm, then swish unless that is off, of x (B, C, H, W), in x's own type; statistics are float32.

    Autocast would make it all float32: over half of the VAE's memory, and a cast before and after each norm.
    """

    def __init__(self, groups, channels, swish=True):
        super().__init__(groups, channels, eps=1e-6)
        self.swish = swish

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)  # CUDA wants one type for all
            h = F.group_norm(x, self.num_groups, weight, bias, self.eps)
        return F.silu(h) if self.swish else h


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each behind GroupNorm and swish, on a residual branch."""

    def __init__(self, in_ch, out_ch, groups):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_ch)
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_ch)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1)
        if in_ch != out_ch:
            self.nin_shortcut = nn.Conv2d(in_ch, out_ch, 1)

    def forward(self, x):
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions; q, k, v are 1x1 convolutions, as published."""

    def __init__(self, ch, groups):
        super().__init__()
        self.norm = GroupNorm(groups, ch, swish=False)
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
        self.norm_out = GroupNorm(cfg.norm_groups, ch)
        self.conv_out = nn.Conv2d(ch, 2 * cfg.z_channels, 3, padding=1)

    def forward(self, x, checkpointing=False):
        h = self.conv_in(F.pixel_unshuffle(x, self.stem))
        for i, level in enumerate(self.down):
            h = level(h, checkpointing)
            if i < len(self.down) - 1:
                h = level.downsample(h)
        h = self.mid(h, checkpointing)
        return self.conv_out(self.norm_out(h))


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
        self.norm_out = GroupNorm(cfg.norm_groups, ch)
        self.conv_out = nn.Conv2d(ch, cfg.in_channels * cfg.stem ** 2, 3, padding=1)

    def forward(self, z, checkpointing=False):
        h = self.mid(self.conv_in(z), checkpointing)
        for i, level in reversed(list(enumerate(self.up))):
            h = level(h, checkpointing)
            if i > 0:
                h = level.upsample(h)
        return F.pixel_shuffle(self.conv_out(self.norm_out(h)), self.stem)


def check_range(x):
    """Raise ValueError if an image is far out of [-1, 1], as in [0, 255] or by ImageNet's mean and std.

    The limit is 1.5, since reconstructions overshoot. The range is checked on the CPU only, outside of
    torch.compile: on a GPU the check would stall every step.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and (x.detach().abs() > 1.5).any():
        raise ValueError(f"images from {x.min():.3g} to {x.max():.3g}, the VAE takes [-1, 1]: use "
                         f"data.to_float of uint8")


class VAE(nn.Module):
    """The autoencoder of a VAEConfig. Set `checkpointing = True` to train with less memory and more time."""

    def __init__(self, cfg):
        super().__init__()
        self.config = cfg
        self.checkpointing = False

        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        embed_dim = cfg.embed_dim or cfg.z_channels
        self.quant_conv = nn.Conv2d(2 * cfg.z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, cfg.z_channels, 1)

    @property
    def stride(self):
        """Image pixels per latent pixel."""
        return self.config.stem * 2 ** (len(self.config.ch_mult) - 1)

    def encode(self, x: Tensor) -> Posterior:
        """Return the Posterior of x (B, 3, H, W), float in [-1, 1]; H and W multiples of `stride`.

        Raises ValueError on integers, another channel count or size, and on a CPU on values out of range.
        """
        if not x.is_floating_point():
            raise ValueError(f"images are {x.dtype}, the VAE takes float in [-1, 1]: use data.to_float(x)")
        channels, stride = self.config.in_channels, self.stride
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % stride or x.shape[3] % stride:
            raise ValueError(f"images have shape {tuple(x.shape)}, this VAE takes (B, {channels}, H, W), "
                             f"H and W multiples of {stride}: resize or crop them")
        check_range(x)
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
