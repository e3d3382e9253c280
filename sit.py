"""SiT (arXiv:2401.08740): a transformer that predicts the velocity v = eps - z of z_t = (1 - t) z + t eps.

t = 0 is data, t = 1 is noise, as in REPA (arXiv:2410.06940). willisma/SiT counts the other way; the config's
reversed_time turns its weights around. Sampling integrates from t = 1 down to t = 0.

Read: SiTBlock -> SiT -> flow_loss -> guided_velocity -> sample_ode, sample_sde.
Letters: B images, C channels of an H x W latent, patches of p x p, N = (H/p)(W/p) tokens of width D.
"""
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


# pieces

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
    first, middle, last = nn.Linear(dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out)
    return nn.Sequential(first, nn.SiLU(), middle, nn.SiLU(), last)


def xavier_init(model: nn.Module) -> None:
    """Initialise every linear layer and patch embedding of `model` as SiT does: Xavier-uniform, bias zero."""
    for module in model.modules():
        layer = module.proj if isinstance(module, PatchEmbed) else module
        if isinstance(module, (PatchEmbed, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight.flatten(1))  # a view; the convolution counts as linear
            nn.init.zeros_(layer.bias)


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
    reversed_time: bool = False  # weights trained with t = 0 noise, v = z - eps (willisma/SiT)


_WIDTHS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
SIT_SIZES = {f"{name}/{patch}": dict(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
             for name, (width, depth, heads) in _WIDTHS.items() for patch in (1, 2, 4, 8)}
# for the embedded data set: latents of 4 x 4, and of 8 x 8
SIT_SIZES["tiny/1"] = dict(hidden_size=128, depth=4, num_heads=4, patch_size=1)
SIT_SIZES["small/2"] = dict(hidden_size=192, depth=6, num_heads=6, patch_size=2)


class TimestepEmbedder(nn.Module):
    """Time (B,) in [0, 1], not scaled by 1000, to (B, D): 256 cosines and sines, MLP; fp32 in autocast."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        steps = torch.arange(128, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * steps / 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, 256), fp32 whatever the weights are
        device = "cpu" if t.is_meta else t.device.type  # the meta device has no autocast
        with torch.autocast(device, enabled=False):
            return self.mlp(waves.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Label (B,) int64 to (B, D); dropping labels for guidance is drop_labels' job, outside the network."""

    def __init__(self, num_labels: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_labels, hidden_size)

    def forward(self, y):
        # On the CPU only: looking at values would wait for a GPU, and break the graph of torch.compile.
        if y.device.type == "cpu" and not torch.compiler.is_compiling():
            last = self.embedding_table.num_embeddings - 1
            if len(y) and (y.min() < 0 or y.max() > last):
                raise ValueError(f"labels {int(y.min())} to {int(y.max())} are outside 0..{last}, the labels "
                                 f"and the null label of this SiT")
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

    Set `grad_checkpointing = True` to recompute the blocks in backward: less memory, the same gradients.
    """

    def __init__(self, cfg: SiTConfig):
        super().__init__()
        if cfg.z_dims and not 1 <= cfg.encoder_depth <= cfg.depth:
            raise ValueError(f"encoder_depth {cfg.encoder_depth} is outside 1..{cfg.depth}, the blocks")
        self.config, self.grad_checkpointing = cfg, False
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
        t = 1 - t if cfg.reversed_time else t
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
        v = -v if cfg.reversed_time else v
        return (v, projections) if return_projections else v

    def features(self, z_t: Tensor, t: Tensor, y: Tensor, block: int) -> Tensor:
        """Return the tokens (B, N, D) after block number `block`, counted from 1."""
        if not 1 <= block <= self.config.depth:
            raise ValueError(f"block {block} is outside 1..{self.config.depth}, the blocks of this SiT")
        return self._run(self.blocks[:block], *self._embed(z_t, t, y))


# interpolant and loss

def interpolate(z: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return (z_t, v): data z and noise eps (B, ...) mixed at times t (B,), and the velocity dz_t/dt."""
    t = t.view(-1, *[1] * (z.ndim - 1))
    return (1 - t) * z + t * eps, eps - z


def sample_t(u: Tensor, kind: str = "uniform") -> Tensor:
    """Turn uniform draws u into training times; "lognormal": t / (1 - t) = exp(N(0, 1)), as in REPA."""
    if kind == "uniform":
        return u
    if kind != "lognormal":
        raise ValueError(f"distribution of t {kind!r} is unknown; use 'uniform' or 'lognormal'")
    return torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * u - 1))


def flow_loss(v_pred: Tensor, v: Tensor) -> Tensor:
    """Return the squared error per image (B,), mean over C, H, W, in float32 (float64 for float64 v)."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    return (v_pred.to(dtype) - v.to(dtype)).square().flatten(1).mean(dim=1)


def drop_labels(y: Tensor, u: Tensor, p: float, null_label: int) -> Tensor:
    """Replace labels y (B,) by the null label where the uniform draws u (B,) are below p."""
    return torch.where(u < p, null_label, y)


# guidance

def guided_velocity(model, z_t: Tensor, t: float, y: Tensor, cfg_scale: float,
                    cfg_interval: tuple = (0.0, 1.0), t_step: float | None = None) -> Tensor:
    """Return v_null + s (v_cond - v_null), in every channel, while low <= t_step <= high; else v_cond.

    model(z_t, t, y) with .null_label. t: noise time. cfg_interval: (low, high) in noise time, inclusive
    (arXiv:2404.07724). t_step: where the solver's step began; REPA lets it decide for both evaluations of a
    Heun step (None: t). Raises ValueError if guidance is asked of a network without a null label.
    """
    times = z_t.new_full((len(z_t),), t)
    low, high = cfg_interval
    if cfg_scale == 1 or not low <= (t if t_step is None else t_step) <= high:
        return model(z_t, times, y).to(z_t.dtype)
    if model.null_label is None:
        raise ValueError(f"guidance {cfg_scale:g} needs a null label, this SiT has none; use scale 1")
    # One call of a doubled batch is faster than two calls.
    y_null = torch.full_like(y, model.null_label)
    both = model(torch.cat([z_t, z_t]), torch.cat([times, times]), torch.cat([y, y_null]))
    v_cond, v_null = both.to(z_t.dtype).chunk(2)
    return v_null + cfg_scale * (v_cond - v_null)


# samplers: velocity(z, t, t_step) with floats t, the time of z, and t_step, where the solver's step began

def nfe(num_steps: int, heun: bool = False) -> int:
    """Return how often a run evaluates the velocity: num_steps, for Heun 2 num_steps - 1."""
    return 2 * num_steps - 1 if heun else num_steps


def draw_noise(like: Tensor, generator=None) -> Tensor:
    """Draw N(0, 1) like (B, ...); generator: None, one, or a list of one per image, whatever their batch."""
    if isinstance(generator, (list, tuple)):
        return torch.stack([draw_noise(image, one) for image, one in zip(like, generator, strict=True)])
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


def start_state(noise: Tensor, num_steps: int) -> Tensor:
    """Return the state that a solver starts from: noise in fp32, fp64 if it is fp64."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; at least 1 step is needed")
    return noise.to(torch.promote_types(noise.dtype, torch.float32))


@torch.no_grad()
def sample_ode(velocity, noise: Tensor, num_steps: int, heun: bool = False) -> Tensor:
    """Integrate dz/dt = velocity from noise (t = 1) to data (t = 0), on an even grid of num_steps.

    noise (B, C, h, w). Returns normalised latents like noise; the state is fp32, fp64 if noise is.
    Heun (arXiv:2206.00364, Alg. 1 with sigma -> t) averages both ends of each step but the last.
    """
    z = start_state(noise, num_steps)
    for t, t_next in pairwise(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()):
        v = velocity(z, t, t).to(z.dtype)
        if heun and t_next > 0:
            z_euler = z + (t_next - t) * v
            v = (v + velocity(z_euler, t_next, t).to(z.dtype)) / 2
        z = z + (t_next - t) * v
    return z


@torch.no_grad()
def sample_sde(velocity, noise: Tensor, num_steps: int, generator=None) -> Tensor:
    """Integrate the reverse SDE from noise to data by Euler-Maruyama, with num_steps calls of velocity.

    Times linspace(1, 0.04, num_steps), then 0: the last step adds no noise. Diffusion w(t) = 2t. Other
    arguments as in sample_ode; generator as in draw_noise.
    Source: REPA's euler_maruyama_sampler (= willisma/SiT: diffusion "sigma", last step "Mean" of 0.04).
    """
    z = start_state(noise, num_steps)
    for t, t_next in pairwise([*torch.linspace(1, 0.04, num_steps, dtype=torch.float64).tolist(), 0.0]):
        v = velocity(z, t, t).to(z.dtype)
        score = -(z + (1 - t) * v) / t  # gradient of log p_t (SiT, eq. 9, on the linear path)
        w = 2 * t
        z = z + (t_next - t) * (v - w / 2 * score)
        if t_next > 0:
            z = z + math.sqrt(w * (t - t_next)) * draw_noise(z, generator)
    return z
