"""SiT, the flow transformer on latents: network, interpolant, flow loss, guidance and samplers.

Time as in REPA: t = 0 is data, t = 1 is noise; z_t = (1 - t) z + t eps; the network predicts v = eps - z.
Sampling integrates from t = 1 down to t = 0, and guidance intervals are in this time. willisma/SiT runs
the other way round (t = 0 is noise): load_sit marks its files, the network then turns t and v around itself.

Shapes: B images, C channels of an H x W latent, patches of p x p, N = (H/p)(W/p) tokens of width D.
References: SiT arXiv:2401.08740, REPA arXiv:2410.06940, DiT arXiv:2212.09748.
"""
import argparse
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import common
from weights import (config_of, fetch, load_strictly, read_file, resolve, save_statistics, sit_state,
                     statistics_of)


# pieces that mapper.py shares
def sincos_pos_embed(dim: int, h: int, w: int) -> Tensor:
    """Return fixed 2-D sine-cosine positions (1, h*w, dim), float32, tokens row by row (MAE, base 10000).

    The first half of the channels encodes the column, the second the row; each half is [sin | cos].
    """
    if dim % 4:
        raise ValueError(f"positions need a width that is a multiple of 4, got {dim}")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]  # 2 x (h*w, dim/4)
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()[None]


class PatchEmbed(nn.Module):
    """Latent (B, C, H, W) to tokens (B, N, D), row by row: a convolution whose stride is its kernel."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, z):
        return self.proj(z).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) to (B, N, D), with timm's parameter names."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        self.num_heads, head = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = (nn.LayerNorm(head) if qk_norm else nn.Identity() for _ in "qk")
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two-layer MLP, (..., dim) to (..., dim); act is a module such as nn.GELU()."""

    def __init__(self, dim: int, hidden: int, act: nn.Module):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), act, nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def make_projector(dim: int, hidden: int, out: int) -> nn.Sequential:
    """Build REPA's projector from transformer width to teacher width: three linear layers, SiLU between."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                         nn.Linear(hidden, out))


def xavier_init(model: nn.Module) -> None:
    """Initialise every linear layer and patch embedding of `model` as SiT does: Xavier-uniform, bias zero."""
    for module in model.modules():
        layer = module.proj if isinstance(module, PatchEmbed) else module
        if isinstance(module, (PatchEmbed, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight.flatten(1))  # a view; the convolution counts as linear
            nn.init.zeros_(layer.bias)


# network
@dataclass(frozen=True)
class SiTConfig:
    """Shape of a SiT; stored in every checkpoint. Defaults: SiT-B/1 on f16d32 latents of 256 px ImageNet."""
    input_size: int = 16  # nominal latent height = width; fixes pos_embed, other sizes still run
    patch_size: int = 1
    in_channels: int = 32
    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    num_classes: int = 1000  # the null label of guidance is num_classes
    use_null: bool = True  # False: no null label in the table, as REPA builds it for label dropout 0
    qk_norm: bool = False
    learn_sigma: bool = False  # willisma/SiT: twice the output channels, the second half is discarded
    z_dims: tuple = ()  # teacher widths, one REPA projector each
    encoder_depth: int = 4  # the projectors read the tokens after this block, counted from 1
    projector_dim: int = 2048


_WIDTHS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
SIT_SIZES = {f"{name}/{patch}": dict(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
             for name, (width, depth, heads) in _WIDTHS.items() for patch in (1, 2, 4, 8)}
SIT_SIZES["tiny/1"] = dict(hidden_size=192, depth=4, num_heads=3, patch_size=1)  # for the embedded data set


class TimestepEmbedder(nn.Module):
    """Time (B,) in [0, 1], not scaled by 1000, to (B, D): 256 cosines and sines, MLP; fp32 in autocast."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        steps = torch.arange(128, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * steps / 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, 256), fp32 whatever the weights are
        device = "cpu" if t.is_meta else t.device.type  # the meta device (size estimates) has no autocast
        with torch.autocast(device, enabled=False):
            return self.mlp(waves.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Label (B,) int64 to (B, D); dropping labels for guidance is drop_labels' job, outside the network."""

    def __init__(self, num_labels: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_labels, hidden_size)

    def forward(self, y):
        # Looking at values would wait for a GPU, and break the graph of torch.compile: on the CPU only.
        if y.device.type == "cpu" and not torch.compiler.is_compiling():
            last = self.embedding_table.num_embeddings - 1
            for label in y[(y < 0) | (y > last)].tolist():
                raise ValueError(f"label {label} is outside 0..{last}, the labels and null label of this SiT")
        return self.embedding_table(y)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply adaLN's shift and scale (B, D) to tokens (B, N, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class SiTBlock(nn.Module):
    """Transformer block with adaLN-Zero (DiT, section 3.2): tokens x (B, N, D), condition c (B, D)."""

    def __init__(self, cfg: SiTConfig):
        super().__init__()
        D = cfg.hidden_size
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(D, cfg.num_heads, cfg.qk_norm)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(D, int(D * cfg.mlp_ratio), nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # (B, D)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens (B, N, D) to patches (B, N, p*p*C), modulated by the condition."""

    def __init__(self, hidden_size: int, outputs: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def unpatchify(patches: Tensor, h: int, w: int, patch_size: int) -> Tensor:
    """Lay patches (B, h*w, p*p*C), values in the order row, column, channel, out as (B, C, h*p, w*p)."""
    B, p = len(patches), patch_size
    return patches.view(B, h, w, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(B, -1, h * p, w * p)


class SiT(nn.Module):
    """Velocity network v(z_t, t, y), with REPA's parameter names, so that published files load strictly.

    Set `grad_checkpointing = True` to recompute the blocks in backward (less memory, the same gradients), and
    `reversed_time = True` where the weights were trained with t = 0 noise, v = z - eps (willisma/SiT).
    """

    def __init__(self, cfg: SiTConfig):
        super().__init__()
        if cfg.z_dims and not 1 <= cfg.encoder_depth <= cfg.depth:
            raise ValueError(f"encoder_depth {cfg.encoder_depth} is outside 1..{cfg.depth}, the blocks")
        self.config, self.grad_checkpointing, self.reversed_time = cfg, False, False
        self.null_label = cfg.num_classes if cfg.use_null else None  # label of the unconditional branch
        D, side = cfg.hidden_size, cfg.input_size // cfg.patch_size
        self.x_embedder = PatchEmbed(cfg.patch_size, cfg.in_channels, D)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(cfg.num_classes + cfg.use_null, D)
        self.pos_embed = nn.Parameter(sincos_pos_embed(D, side, side), requires_grad=False)
        self.blocks = nn.ModuleList(SiTBlock(cfg) for _ in range(cfg.depth))
        self.projectors = nn.ModuleList(make_projector(D, cfg.projector_dim, dim) for dim in cfg.z_dims)
        self.final_layer = FinalLayer(D, cfg.patch_size**2 * cfg.in_channels * (1 + cfg.learn_sigma))
        xavier_init(self)
        for embedding in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)
        gates = [block.adaLN_modulation[1] for block in self.blocks]
        for layer in (*gates, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(layer.weight)  # adaLN-Zero: blocks start as the identity, the output is exactly 0

    def _embed(self, z_t, t, y):
        cfg, (_, C, H, W), p = self.config, z_t.shape, self.config.patch_size
        if C != cfg.in_channels:
            hint = "; these look like posterior moments: sample them" if C == 2 * cfg.in_channels else ""
            raise ValueError(f"latents have {C} channels, this SiT wants {cfg.in_channels}{hint}")
        if H % p or W % p:
            raise ValueError(f"latents of {H} x {W} do not divide into patches of {p} x {p}")
        pos = self.pos_embed if H == W == cfg.input_size else \
            sincos_pos_embed(cfg.hidden_size, H // p, W // p).to(self.pos_embed)
        x = self.x_embedder(z_t.to(pos.dtype)) + pos  # (B, N, D)
        t = 1 - t if self.reversed_time else t
        return x, self.t_embedder(t) + self.y_embedder(y)  # condition (B, D)

    def _run(self, blocks, x, c):
        for block in blocks:
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, c, use_reentrant=False) if recompute else block(x, c)
        return x

    def forward(self, z_t: Tensor, t: Tensor, y: Tensor, return_projections: bool = False):
        """Return v (B, C, H, W) for latents z_t (B, C, H, W), times t (B,) in [0, 1], labels y (B,) int64.

        With return_projections: (v, [one (B, N, z_dim) per teacher]), from the tokens after encoder_depth.
        Raises ValueError on a wrong channel count or size, and for y on the CPU on a label out of range.
        """
        cfg, p, blocks = self.config, self.config.patch_size, list(self.blocks)
        x, c = self._embed(z_t, t, y)
        x = self._run(blocks[:cfg.encoder_depth], x, c)
        projections = [projector(x) for projector in self.projectors] if return_projections else []
        x = self._run(blocks[cfg.encoder_depth:], x, c)
        out = unpatchify(self.final_layer(x, c), z_t.shape[2] // p, z_t.shape[3] // p, p)
        v = out[:, :cfg.in_channels]  # drops the second half under learn_sigma
        v = -v if self.reversed_time else v
        return (v, projections) if return_projections else v

    def features(self, z_t: Tensor, t: Tensor, y: Tensor, block: int) -> Tensor:
        """Return the tokens (B, N, D) after block number `block`, counted from 1."""
        if not 1 <= block <= self.config.depth:
            raise ValueError(f"block {block} is outside 1..{self.config.depth}, the blocks of this SiT")
        return self._run(self.blocks[:block], *self._embed(z_t, t, y))


# interpolant and loss
def path_coefficients(t: Tensor, path: str = "linear") -> tuple:
    """Return alpha_t, sigma_t of z_t = alpha_t z + sigma_t eps, and their derivatives in t (SiT, sec. 2)."""
    if path == "linear":
        return 1 - t, t, -1.0, 1.0
    if path == "cosine":
        cos, sin = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        return cos, sin, -math.pi / 2 * sin, math.pi / 2 * cos
    raise ValueError(f"path {path!r} is unknown; use 'linear' or 'cosine'")


def interpolate(z: Tensor, eps: Tensor, t: Tensor, path: str = "linear") -> tuple[Tensor, Tensor]:
    """Return (z_t, v): data z and noise eps (B, ...) mixed at times t (B,), and the velocity dz_t/dt."""
    alpha_t, sigma_t, d_alpha_t, d_sigma_t = path_coefficients(t.view(-1, *[1] * (z.ndim - 1)), path)
    return alpha_t * z + sigma_t * eps, d_alpha_t * z + d_sigma_t * eps


def sample_t(u: Tensor, kind: str = "uniform", path: str = "linear") -> Tensor:
    """Turn uniform draws u into training times; "lognormal": sigma_t / alpha_t = exp(N(0, 1)), as in REPA."""
    if kind == "uniform":
        return u
    if kind != "lognormal":
        raise ValueError(f"distribution of t {kind!r} is unknown; use 'uniform' or 'lognormal'")
    n = math.sqrt(2) * torch.erfinv(2 * u - 1)
    return torch.sigmoid(n) if path == "linear" else 2 / math.pi * torch.atan(torch.exp(n))


def flow_loss(v_pred: Tensor, v: Tensor) -> Tensor:
    """Return the squared error per image (B,), mean over C, H, W, in float32 (float64 for float64 v)."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    return (v_pred.to(dtype) - v.to(dtype)).square().flatten(1).mean(dim=1)


def drop_labels(y: Tensor, u: Tensor, p: float, null_label: int) -> Tensor:
    """Replace labels y (B,) by the null label where the uniform draws u (B,) are below p."""
    return torch.where(u < p, null_label, y)


# guidance
def _guidance_acts(t, low, high):
    """Say whether low <= t <= high: a bool, or a mask (B,) if images differ or only the device knows t."""
    if low <= 0 and high >= 1 or low > high:
        return bool(low <= high)
    start = getattr(t, "step_start", t)  # set by the samplers: a Python float, no look at the device
    if not isinstance(start, Tensor):
        return bool(low <= start <= high)
    inside = (low <= start) & (start <= high)
    mixed = inside.device.type != "cpu" or inside.any() != inside.all()
    return inside if mixed else bool(inside.all())


def guided_velocity(model, z_t: Tensor, t, y: Tensor, cfg_scale: float, cfg_interval: tuple = (0.0, 1.0)):
    """Return v_null + cfg_scale (v_cond - v_null), in every channel, inside the interval; v_cond outside.

    model(z_t, t, y) with .null_label; t a float or (B,); cfg_interval (low, high) in noise time, inclusive
    (arXiv:2404.07724). One call of the network, of a doubled batch where both branches are needed; scale 1
    is v_cond, scale 0 v_null. Raises ValueError if guidance is asked of a network without a null label.
    """
    times = t if isinstance(t, Tensor) else z_t.new_full((len(z_t),), t)
    acts = cfg_scale != 1 and _guidance_acts(t, *cfg_interval)
    if acts is False:
        return model(z_t, times, y).to(z_t.dtype)
    if model.null_label is None:
        raise ValueError(f"guidance {cfg_scale:g} needs a null label, this SiT has none; use scale 1")
    y_null = torch.full_like(y, model.null_label)
    if acts is True and cfg_scale == 0:
        return model(z_t, times, y_null).to(z_t.dtype)
    v = model(torch.cat([z_t, z_t]), torch.cat([times, times]), torch.cat([y, y_null]))
    v_cond, v_null = v.to(z_t.dtype).chunk(2)
    v = v_null + cfg_scale * (v_cond - v_null)
    return v if acts is True else torch.where(acts.view(-1, *[1] * (v.ndim - 1)), v, v_cond)


def velocity_from_reversed(model):
    """Wrap a network of the other time direction (t = 0 noise, v = z - eps) into our model(z_t, t, y)."""
    def velocity(z_t, t, y):
        return -model(z_t, 1 - t, y)
    velocity.null_label = model.null_label
    return velocity


# samplers
def nfe(num_steps: int, heun: bool = False) -> int:
    """Return the evaluations of the velocity in a run: num_steps, for Heun 2 num_steps - 1."""
    return 2 * num_steps - 1 if heun else num_steps


def draw_noise(like: Tensor, generator=None) -> Tensor:
    """Draw N(0, 1) like (B, ...); generator: None, one, or a list of one per image, whatever their batch."""
    if isinstance(generator, (list, tuple)):
        return torch.stack([draw_noise(image, one) for image, one in zip(like, generator, strict=True)])
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


def _start(noise, num_steps):
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; at least 1 step is needed")
    return noise.to(torch.promote_types(noise.dtype, torch.float32))


def _evaluate(velocity, z, t, step_start):
    times = z.new_full((len(z),), t)
    # Guidance is decided once per step, in float64, as in REPA: Heun's second evaluation follows the first.
    times.step_start = step_start
    return velocity(z, times).to(z.dtype)


@torch.no_grad()
def sample_ode(velocity, noise: Tensor, num_steps: int, heun: bool = False) -> Tensor:
    """Integrate dz/dt = velocity(z_t, t) from noise (t = 1) to data (t = 0), on an even grid of num_steps.

    noise (B, C, h, w); t is (B,). Returns normalised latents like noise; the state is fp32, fp64 if noise is.
    Heun (arXiv:2206.00364, Alg. 1 with sigma -> t) averages both ends of each step but the last.
    """
    z = _start(noise, num_steps)
    grid = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
    for t, t_next in pairwise(grid):
        v = _evaluate(velocity, z, t, t)
        if heun and t_next > 0:
            v = (v + _evaluate(velocity, z + (t_next - t) * v, t_next, t)) / 2
        z = z + (t_next - t) * v
    return z


def score_from_velocity(v: Tensor, z_t: Tensor, t: Tensor, path: str = "linear") -> Tensor:
    """Return the score, the gradient of log p_t(z_t), from the velocity at times t (B,) > 0 (SiT, eq. 9)."""
    alpha_t, sigma_t, d_alpha_t, d_sigma_t = path_coefficients(t.view(-1, *[1] * (z_t.ndim - 1)), path)
    ratio = alpha_t / d_alpha_t
    return (ratio * v - z_t) / (sigma_t**2 - ratio * d_sigma_t * sigma_t)


@torch.no_grad()
def sample_sde(velocity, noise: Tensor, num_steps: int, generator=None, path: str = "linear",
               diffusion: float = 1.0) -> Tensor:
    """Integrate the reverse SDE from noise to data by Euler-Maruyama, with num_steps calls of velocity.

    Times linspace(1, 0.04, num_steps), then 0: the last step adds no noise. Diffusion w(t) = 2t, times
    `diffusion` (0: the ODE on this grid). Other arguments as in sample_ode; generator as in draw_noise.
    Source: REPA's euler_maruyama_sampler (= willisma/SiT: diffusion "sigma", last step "Mean" of 0.04).
    """
    z = _start(noise, num_steps)
    grid = torch.linspace(1, 0.04, num_steps, dtype=torch.float64).tolist() + [0.0]
    for t, t_next in pairwise(grid):
        v, w = _evaluate(velocity, z, t, t), 2 * t * diffusion
        z_next = z + (t_next - t) * (v - w / 2 * score_from_velocity(v, z, z.new_full((1,), t), path))
        z = z_next + math.sqrt(w * (t - t_next)) * draw_noise(z, generator) if t_next > 0 else z_next
    return z


# checkpoints
def _infer_config(state, path):
    """Read a published shape (REPA, REPA-E, willisma) off its tensors; heads by the width."""
    missing = [key for key in ("pos_embed", "y_embedder.embedding_table.weight", "final_layer.linear.weight")
               if key not in state]
    if missing:
        raise ValueError(f"{path}: {missing[0]} is missing: not SiT as REPA and willisma publish it, or cut "
                         "off")
    width, channels, p, _ = state["x_embedder.proj.weight"].shape
    size = next((size for size in SIT_SIZES.values() if size["hidden_size"] == width), None)
    if size is None:
        raise ValueError(f"{path}: a state dict of width {width}, which is none of the sizes "
                         f"{', '.join(SIT_SIZES)}")
    return SiTConfig(
        math.isqrt(state["pos_embed"].shape[1]) * p, p, channels, width, size["depth"], size["num_heads"],
        num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
        qk_norm="blocks.0.attn.q_norm.weight" in state,
        encoder_depth=8 if width > 768 else 4,  # not in the file: what REPA's author says
        learn_sigma=len(state["final_layer.linear.weight"]) == 2 * p * p * channels,
        z_dims=tuple(len(state[key]) for key in state if re.fullmatch(r"projectors\.\d+\.4\.bias", key)))


def read_sit(path: str | Path, which: str = "ema") -> tuple[SiT, dict]:
    """Return (SiT, content of its file); the SiT as load_sit does. The content is our checkpoint's dict (with
    "latents": their statistics and VAE), or whatever a published file holds.
    """
    content = read_file(fetch(path))
    state = sit_state(content, path, which)
    ours = content.get("format") == "nanosendvae-sit"
    cfg = config_of(SiTConfig, content["model_config"], path) if ours else _infer_config(state, path)
    with torch.device("meta"):  # no time spent on initial weights
        model = SiT(cfg)
    state = {key: value for key, value in state.items() if not key.startswith("bn.")}
    reason = "edited, or of another version" if ours else "a network of another depth, or another code"
    load_strictly(model.to_empty(device="cpu"), state, path, reason)
    # The only published SiT with learn_sigma is willisma's, and that is how its time direction is known.
    model.reversed_time = not ours and cfg.learn_sigma
    return model.eval(), content


def load_sit(path: str | Path, weights: str = "ema") -> SiT:
    """Return the SiT of a file: fp32, on the CPU, in eval mode.

    path: file, folder of our checkpoints (newest), or hf://owner/repo/file; ours, or as REPA, REPA-E and
    willisma publish it (REPA-E's BatchNorm, the statistics of the latents, is left out). weights: "ema" or
    "raw"; a bare state dict has one set. Raises FileNotFoundError, or ValueError for a damaged file, another
    kind of content, no such weights.
    """
    return read_sit(path, weights)[0]


def export(kind: str, out, path, which: str = "ema") -> None:
    """Write the SiT at `path` as {"ema": state dict}, REPA's names; beside it <name>-latents-stats.pt.

    kind: "repa", or "repa-e": with the latent statistics as BatchNorm inside, as REPA-E's SiT has them.
    Raises ValueError for weights of reversed time, which would load there and sample noise.
    """
    model, content = read_sit(path, which)
    if model.reversed_time or model.config.learn_sigma:
        raise ValueError(f"{path}: willisma's SiT (learn_sigma, t = 0 noise) cannot become one of REPA's")
    state, statistics = model.state_dict(), statistics_of(content)
    if kind == "repa-e":
        if statistics is None:
            raise ValueError(f"{path}: holds no latent statistics for the BatchNorm; use --export repa")
        state |= {"bn.running_mean": statistics[0], "bn.running_var": statistics[1].square(),
                  "bn.num_batches_tracked": torch.tensor(content.get("step", 0))}
    out = Path(out)
    common.save_checkpoint(out, {"ema": state})
    beside = out.with_name(f"{out.stem}-latents-stats.pt")
    if statistics is not None:
        save_statistics(beside, *statistics)
    print(f"wrote {out}" + (f" and {beside}" if statistics is not None else ""))


def parse_args(argv=None):
    """Parse the command line of `python sit.py`."""
    parser = argparse.ArgumentParser(description="Write a SiT for REPA's and REPA-E's scripts.",
                                     allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ckpt", default="out/sit", help="checkpoint, folder of them (newest), or hf://owner/repo/file")
    add("--weights", default="ema", choices=("ema", "raw"), help="averaged or last weights")
    add("--export", nargs=2, required=True, metavar=("KIND", "FILE"),
        help="repa: REPA's names; repa-e: with the latent statistics as BatchNorm inside")
    args = parser.parse_args(argv)
    if args.export[0] not in ("repa", "repa-e"):
        parser.error(f"--export {args.export[0]}: want repa or repa-e")
    return args


def main(argv=None):
    """Entry point of the command."""
    args = parse_args(argv)
    export(*args.export, resolve(args.ckpt), args.weights)


if __name__ == "__main__":
    common.cli(main)
