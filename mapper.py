"""Send-VAE's alignment (arXiv:2601.05823, eqs. 1-2): a frozen teacher f and a small mapper h.

    z_t  = (1 - t) * z + t * eps           # eq. 1: the latent, noised as in flow matching, t ~ U(0, 1)
    loss = mean(1 - cos(h(z_t), f(x)))     # eq. 2: alignment_loss(mapper(z, t, eps), teacher(x))

The paper writes alpha_t for 1 - t: the same distribution. What it leaves open follows REPA-E: an affine-free
BatchNorm of z before the noise, fixed sin-cos positions, REPA's three-layer SiLU projector.
Read: Teacher -> Mapper -> alignment_loss.
Letters: B images, N = grid * grid tokens of width D.
"""
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# the teacher

class Teacher(nn.Module):
    """A frozen vision model: images (B, 3, H, W) in [-1, 1] -> patch tokens (B, grid * grid, dim) fp32.

    name: any timm ViT, or "shapes", the small teacher of the embedded set. grid: tokens along each side,
    row-major. The image is normalised by the model's own mean and std, and resized to grid x patch size
    (bicubic without antialias, as REPA). The tokens are those after the final norm; prefix tokens (class,
    registers) are dropped. weights: local file (timm's or the original key names), None: timm's from the hub,
    "random": an untrained timm model, for tests and timings. Not trained, not saved in checkpoints.
    Raises FileNotFoundError if the weights cannot be had, ValueError for another kind of network.
    """

    def __init__(self, name: str, grid: int, weights: str | None = None):
        super().__init__()
        self.name, self.grid = name, grid
        if name == "shapes":
            from shapes.networks import load_teacher
            self.model = load_teacher(weights) if weights else load_teacher()
            self.dim = self.model.dim
            if grid != self.model.grid:
                raise ValueError(f"the shapes teacher has {self.model.grid} x {self.model.grid} tokens, the "
                                 f"latent asks for {grid} x {grid}; use 32 px images and --vae tiny")
        else:
            self.model, self.size, mean, std = timm_vit(name, grid, weights)
            self.dim = self.model.embed_dim
            self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        """Stay in eval mode whatever the parent does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if self.name == "shapes":
            return self.model(x).float()
        x = ((x + 1) / 2 - self.mean) / self.std
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", align_corners=False)
        return self.model.forward_features(x)[:, self.model.num_prefix_tokens:].float()  # (B, N, D)


def timm_vit(name: str, grid: int, weights: str | None):
    """Return (timm ViT for grid x grid tokens, its input size in pixels, mean, std)."""
    import timm  # here: it takes seconds to import
    try:
        shape = timm.create_model(name, pretrained=False, device="meta")
    except RuntimeError as error:
        raise ValueError(f"--teacher {name}: timm has no such model; timm.list_models('*dinov2*') lists "
                         f"names") from error
    if not hasattr(shape, "patch_embed") or not hasattr(shape, "num_prefix_tokens"):
        raise ValueError(f"--teacher {name}: no ViT; timm.list_models('vit_*') lists those that timm has")
    size = grid * shape.patch_embed.patch_size[0]
    # timm resamples the table of positions to img_size (bicubic, antialiased, as REPA).
    model = timm_network(name, "--teacher", weights, img_size=size)
    config = timm.data.resolve_model_data_config(model)
    return model, size, config["mean"], config["std"]


def timm_network(name: str, flag: str, weights=None, overlay=None, **kwargs) -> nn.Module:
    """Return a timm network without classifier, on the CPU; every tensor of it is from the weights.

    weights: local file, "random" (untrained), None: timm's from the hub or its cache. overlay: changes to
    timm's pretrained_cfg. flag: the option that named the network, for messages. Raises FileNotFoundError if
    the weights cannot be had, ValueError for an unknown name, a damaged file or one of another network.
    """
    import timm
    if weights == "random":
        return timm.create_model(name, pretrained=False, num_classes=0, **kwargs)
    if weights is not None and not os.path.isfile(weights):
        raise FileNotFoundError(f"{flag}-weights {weights}: no such file; want the weights of {name}, "
                                f"huggingface.co/timm/{name}")
    overlay = {**(overlay or {}), **({"file": str(weights), "custom_load": False} if weights else {})}
    try:
        # With its classifier, for with num_classes=0 timm is not strict: what a file lacks would stay random.
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    except Exception as error:  # timm, torch, safetensors and the hub's client raise types of their own
        raise explain(error, name, flag, weights) from error
    model.reset_classifier(0)
    return model


def explain(error: Exception, name: str, flag: str, weights) -> Exception:
    """Return the error to raise where timm could not make the network `name`: what to do, in one line."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    if any(part in text for part in ("Unknown model", "Invalid pretrained tag", "No pretrained weights")):
        return ValueError(f"{flag} {name}: {text}; timm.list_models(pretrained=True) lists what it has, and "
                          f"{flag}-weights FILE takes a local file")
    if weights is None and isinstance(error, OSError):
        return FileNotFoundError(f"{flag} {name}: not cached, nor to be had from huggingface.co/timm/{name}; "
                                 f"give {flag}-weights FILE, or {flag} shapes")
    return ValueError(f"{flag}-weights {weights or 'of the hub'}: not weights of {name}, or damaged: {text}")


# the mapper

@dataclass(frozen=True)
class MapperConfig:
    """Shape of the mapper. grid: latent tokens along a side once embedded; out_dim: the teacher's width."""
    z_channels: int
    grid: int
    out_dim: int
    patch_size: int = 1        # 1 for f16 latents, 2 for f8
    hidden_size: int = 0       # 0: the teacher's width, as in the paper (768: 12 heads, 1024: 16)
    depth: int = 1             # ViT blocks; 0 allowed (Table 2 of the paper)
    projector_dim: int = 2048
    noise: bool = True         # Table 3 of the paper
    norm: bool = True          # BatchNorm before the noise, as REPA-E; False: eq. 1 to the letter, on raw z
    kind: str = "vit"          # "linear": one patch-sized convolution (VA-VAE's has neither norm nor noise)

    @property
    def width(self) -> int:
        return self.hidden_size or self.out_dim



class Mapper(nn.Module):
    """h_phi of the paper: raw latent z (B, C, h, w) -> predicted teacher tokens (B, N, out_dim)."""

    def __init__(self, config: MapperConfig):
        super().__init__()
        self.config, dim = config, config.width
        # With the norm, the noise level of eq. 1 means the same for every VAE, and the encoder cannot grow z
        # against the noise. eps and momentum are REPA-E's.
        if config.norm:
            self.bn = nn.BatchNorm2d(config.z_channels, eps=1e-4, momentum=0.1, affine=False)
        if config.kind == "linear":
            p = config.patch_size
            self.proj = nn.Conv2d(config.z_channels, config.out_dim, p, stride=p, bias=False)
            return
        from timm.models.vision_transformer import Block, PatchEmbed  # here: timm takes seconds to import
        self.x_embedder = PatchEmbed(None, config.patch_size, config.z_channels, dim)
        self.register_buffer("pos_embed", sincos_positions(dim, config.grid))
        self.blocks = nn.ModuleList(
            Block(dim, num_heads=max(dim // 64, 1), qkv_bias=True, norm_layer=nn.LayerNorm)
            for _ in range(config.depth))
        self.projector = nn.Sequential(nn.Linear(dim, config.projector_dim), nn.SiLU(),
                                       nn.Linear(config.projector_dim, config.projector_dim), nn.SiLU(),
                                       nn.Linear(config.projector_dim, config.out_dim))
        for layer in self.modules():  # as SiT's: Xavier-uniform, the patch embedding counted as linear
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(layer.weight.flatten(1))  # a view
                nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor, t: Tensor | None = None, eps: Tensor | None = None) -> Tensor:
        """z (B, C, h, w) raw latent; t (B,) noise time in [0, 1] and eps like z, drawn here if not given."""
        z_t = z.float()
        if self.config.norm:
            z_t = self.bn(z_t)
        if self.config.noise:
            t = torch.rand(len(z), device=z.device) if t is None else t
            eps = torch.randn_like(z_t) if eps is None else eps
            t = t.view(-1, 1, 1, 1)
            z_t = (1 - t) * z_t + t * eps  # eq. 1
        if self.config.kind == "linear":
            return self.proj(z_t).flatten(2).transpose(1, 2)  # (B, N, D)
        tokens = self.x_embedder(z_t) + self.pos_embed  # (B, N, width)
        for block in self.blocks:
            tokens = block(tokens)
        return self.projector(tokens)

    def clean(self, z: Tensor) -> Tensor:
        """Return the tokens of latents z (B, C, h, w) without noise."""
        return self(z, torch.zeros(len(z), device=z.device), torch.zeros_like(z))


def sincos_positions(dim: int, grid: int) -> Tensor:
    """Return fixed 2-D positions (1, grid * grid, dim): columns in the first half, then rows (MAE).

    Each half is [sin | cos] of dim / 4 frequencies from 1 down to 1 / 10000.
    """
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    row, column = row.reshape(-1, 1) * omega, column.reshape(-1, 1) * omega  # (N, dim / 4)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()[None]


# eq. 2

def alignment_loss(pred: Tensor, target: Tensor) -> Tensor:
    """mean(1 - cos) over tokens, in [0, 2]; pred, target (B, N, D); fp32 whatever the inputs.

    A zero token counts as cosine 0. Its gradient is finite, also in fp16: norms count as at least 1e-3.
    """
    return (1 - F.cosine_similarity(pred.float(), target.float(), dim=-1, eps=1e-3)).mean()
