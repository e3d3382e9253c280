"""The frozen teacher, the mapper, and the loss that pulls a latent towards the teacher's tokens.

Send-VAE, eqs. 1-2 of arXiv:2601.05823: the latent z is noised as in flow matching, z_t = (1 - t) z + t eps
with t ~ U(0, 1), and a small network h (patch embedding, one ViT block, MLP) must predict the teacher's patch
tokens f(x) from z_t; the loss is mean(1 - cos(h(z_t), f(x))). (The paper's alpha_t is 1 - t: same
distribution.) What the paper leaves open follows REPA-E: affine-free BatchNorm of z before the noise (`norm`;
without it the encoder can grow z against the noise, held back by the KL term), fixed sin-cos positions,
REPA's three-layer SiLU projector.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sit import Attention, Mlp, PatchEmbed, interpolate, make_projector, sincos_pos_embed, xavier_init
from weights import timm_network

SHAPES_TEACHER = Path(__file__).parent / "assets" / "shapes_teacher.pt"


class Teacher(nn.Module):
    """A frozen vision model: images (B, 3, H, W) in [-1, 1] -> patch tokens (B, grid * grid, dim) fp32.

    name: any timm ViT, or "shapes", the small teacher of the embedded set. grid: tokens along each side of
    the output, row-major; the image is resized to grid x patch size (bicubic without antialias, after the
    model's own mean/std, as REPA does), and prefix tokens (class, registers) are dropped by the model's own
    count. weights: local file (timm or original key names); None fetches from the hub. The tokens are those
    after the final norm. Not trained, not saved in checkpoints. Raises FileNotFoundError if the weights
    cannot be had.
    """

    def __init__(self, name: str, grid: int, weights: str | None = None):
        super().__init__()
        self.name, self.grid = name, grid
        if name == "shapes":
            self.model = load_shapes_teacher(weights or SHAPES_TEACHER)
            self.dim = self.model.dim
            if grid != self.model.grid:
                raise ValueError(f"the shapes teacher has {self.model.grid} x {self.model.grid} tokens, the "
                                 f"latent asks for {grid} x {grid}; use 32 px images and --vae tiny")
        else:
            self.model, self.size, mean, std = _timm_vit(name, grid, weights)
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
        tokens = self.model.forward_features(x)  # (B, prefix + N, D)
        return tokens[:, self.model.num_prefix_tokens:].float()


def _timm_vit(name: str, grid: int, weights: str | None):
    """Build a timm ViT for a grid x grid output; return (model, input size, mean, std)."""
    import timm
    try:
        shape = timm.create_model(name, pretrained=False, device="meta")
    except RuntimeError as error:
        raise ValueError(f"--teacher {name}: timm does not know it; timm.list_models('*dinov2*') lists what "
                         f"it has") from error
    if not hasattr(shape, "patch_embed") or not hasattr(shape, "num_prefix_tokens"):
        raise ValueError(f"--teacher {name}: no ViT; timm.list_models('vit_*') lists those that timm has")
    size = grid * shape.patch_embed.patch_size[0]
    # timm resamples the position table to img_size on loading weights (bicubic, antialiased: as REPA).
    model = timm_network(name, "--teacher", weights, img_size=size)
    config = timm.data.resolve_model_data_config(model)
    return model, size, config["mean"], config["std"]


class ShapesTeacher(nn.Module):
    """Small convolutional teacher of the embedded set, trained label-free by train_teacher.py.

    x (B, 3, 32, 32) in [-1, 1] -> tokens (B, 16, dim), the 4 x 4 grid in row-major order; each token
    sees most of the image. The mean token of each position is subtracted: a direction that all images
    share would raise every cosine without saying anything. No position code. Conv + BatchNorm + ReLU,
    because ViTs of this size learn too slowly for a CPU. Raises ValueError for another image size.
    """

    image_size, grid = 32, 4

    def __init__(self, dim: int = 128, width: int = 32):
        super().__init__()
        self.dim, w = dim, width
        plan = ((12, 2 * w, 1), (2 * w, 2 * w, 1), (2 * w, 4 * w, 2), (4 * w, 4 * w, 1),  # in, out, stride
                (4 * w, 4 * w, 1), (4 * w, 4 * w, 2), (4 * w, 4 * w, 1))
        layers = [nn.PixelUnshuffle(2)]  # convolutions at full resolution would take most of the time
        for c_in, c_out, stride in plan:
            layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(True)]
        # the last norm has no affine part: every channel of a token counts alike in the cosine
        layers += [nn.Conv2d(4 * w, dim, 1, bias=False), nn.BatchNorm2d(dim, affine=False)]
        self.net = nn.Sequential(*layers)
        self.register_buffer("mean", torch.zeros(self.grid ** 2, dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"the shapes teacher takes 32 px images, got {tuple(x.shape)}: --image-size 32")
        tokens = self.net(x).flatten(2).transpose(1, 2)  # (B, dim, 4, 4) -> (B, 16, dim)
        return tokens.float() - self.mean


def load_shapes_teacher(path) -> ShapesTeacher:
    """Read the teacher that train_teacher.py wrote (fp16 weights), in fp32 on the CPU and in eval mode.

    Raises FileNotFoundError without the file, ValueError for another kind of file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; python train_teacher.py makes the shapes teacher")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format") != "nanosendvae-shapes-teacher":
        raise ValueError(f"{path} is not a shapes teacher; python train_teacher.py makes one")
    teacher = ShapesTeacher(**state["config"])
    teacher.load_state_dict(state["model"])
    return teacher.eval()


@dataclass(frozen=True)
class MapperConfig:
    """Shape of the mapper. grid: latent tokens along a side once embedded; out_dim: the teacher's width."""
    z_channels: int
    grid: int
    out_dim: int
    patch_size: int = 1
    hidden_size: int = 0       # 0: the teacher's width, as in the paper (768: 12 heads, 1024: 16)
    depth: int = 1             # ViT blocks; 0 allowed (Table 2 of the paper)
    projector_dim: int = 2048
    noise: bool = True         # Table 3 of the paper
    norm: bool = True          # BatchNorm before the noise, as REPA-E; False: eq. 1 to the letter, on raw z
    kind: str = "vit"          # "linear": one patch-sized convolution of the raw latent, no noise (as VA-VAE)
    bn_group: int = 32         # images whose statistics one BatchNorm call shares

    @property
    def width(self) -> int:
        return self.hidden_size or self.out_dim


class Block(nn.Module):
    """Pre-norm ViT block as timm's `Block`: LayerNorm eps 1e-5, exact GELU, MLP ratio 4, no LayerScale."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, 4 * dim, nn.GELU())

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Mapper(nn.Module):
    """h_phi of the paper: raw latent z (B, C, h, w) -> predicted teacher tokens (B, N, out_dim)."""

    def __init__(self, config: MapperConfig):
        super().__init__()
        self.config, dim = config, config.width
        if config.kind == "linear":
            self.proj = nn.Conv2d(config.z_channels, config.out_dim, config.patch_size, config.patch_size,
                                  bias=False)
            return
        # With it the noise level of eq. 1 means the same for every VAE; eps and momentum are REPA-E's.
        if config.norm:
            self.bn = nn.BatchNorm2d(config.z_channels, eps=1e-4, momentum=0.1, affine=False)
        self.x_embedder = PatchEmbed(config.patch_size, config.z_channels, dim)
        self.register_buffer("pos_embed", sincos_pos_embed(dim, config.grid, config.grid))
        self.blocks = nn.ModuleList(Block(dim, max(dim // 64, 1)) for _ in range(config.depth))
        self.projector = make_projector(dim, config.projector_dim, config.out_dim)
        xavier_init(self)

    def forward(self, z: Tensor, t: Tensor | None = None, eps: Tensor | None = None) -> Tensor:
        """z (B, C, h, w) raw latent; t (B,) noise time in [0, 1] and eps like z, drawn here where not given.

        In training mode the BatchNorm statistics are those of each `bn_group` images, with their gradient.
        """
        if self.config.kind == "linear":
            return self.proj(z).flatten(2).transpose(1, 2)  # (B, N, D)
        z_t = z.float()
        if self.config.norm:
            groups = z_t.split(self.config.bn_group) if self.training else (z_t,)
            z_t = torch.cat([self.bn(group) for group in groups])
        if self.config.noise:
            t = torch.rand(len(z), device=z.device) if t is None else t
            z_t, _ = interpolate(z_t, torch.randn_like(z_t) if eps is None else eps, t)
        tokens = self.x_embedder(z_t) + self.pos_embed  # (B, N, width)
        for block in self.blocks:
            tokens = block(tokens)
        return self.projector(tokens)


def alignment_loss(pred: Tensor, target: Tensor) -> Tensor:
    """mean(1 - cos) over tokens (eq. 2), in [0, 2]; pred, target (B, N, D); fp32 whatever the inputs.

    A zero token counts as cosine 0. Its gradient is finite, also in fp16: norms count as at least 1e-3.
    """
    return (1 - F.cosine_similarity(pred.float(), target.float(), dim=-1, eps=1e-3)).mean()
