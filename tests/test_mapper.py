"""Teacher, mapper and alignment loss: golden DINOv2 tokens, timm's own forward, noise ends, counts, fp16.

    python -m pytest tests/test_mapper.py        about 35 s on 2 cores, no network: weights are random"""
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import fill_by_name, read_fixture, tensor
from small import save, small_mapper
from torch import nn

from mapper import Mapper, MapperConfig, Teacher, alignment_loss, sincos_positions, timm_network
from sit import interpolate, sincos_pos_embed

MANIFEST, ARCHIVE = read_fixture("teacher")
DINOV2_S = "vit_small_patch14_dinov2.lvd142m"
FLOAT32, FLOAT64 = 3e-5, 1e-9  # tolerances of tests/golden/README.md, for float32 on a CPU and for float64


@pytest.mark.parametrize("case", MANIFEST["cases"])
def test_dinov2_tokens_are_those_of_repa(case, tmp_path):
    """The fixture's weights go through a file with the 37 x 37 table: timm resamples it as REPA does."""
    spec, config = MANIFEST["cases"][case], MANIFEST["cases"][case]["config"]
    name = f"{config['arch']}_patch{config['patch_size']}_dinov2.lvd142m"
    with torch.device("meta"):  # no time spent on initial weights
        published = timm.create_model(name, img_size=config["checkpoint_grid"] * config["patch_size"])
    published = fill_by_name(published.to_empty(device="cpu"), MANIFEST, spec["tensors"], ARCHIVE,
                             ignore=("mask_token",))
    teacher = Teacher(name, config["used_grid"], str(save(tmp_path / "weights.pth", published.state_dict())))
    images, seen = tensor(ARCHIVE, f"{case}/images_u8").permute(0, 3, 1, 2), []
    teacher.model.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    teacher.model.norm.register_forward_hook(lambda _, args, out: seen.append(out))
    tokens = teacher(images.float() / 127.5 - 1)
    assert tokens.shape[1] == config["used_grid"] ** 2
    ours = {"patch_tokens_first8": tokens[..., :8], "patch_tokens_mean": tokens.mean(-1),
            "patch_tokens_norm": tokens.norm(dim=-1), "cls_token": seen[1][:, 0],
            "preprocessed_slice": seen[0][:, :, ::8, ::8],
            "pos_embed_resampled_first8": teacher.model.pos_embed[0, :, :8]}
    assert ours.keys() == set(spec["outputs"])
    for output, value in ours.items():
        wanted = tensor(ARCHIVE, f"{case}/{output}")
        atol = FLOAT32 * max(1, float(wanted.abs().max()) / 4)  # a norm adds up the errors of its entries
        assert torch.allclose(value, wanted, atol=atol), output
    # In float64 the fixture took REPA's own float32 input, x / 255, and the float32 positions: ours, cast.
    x = (images[:1].float() / 255 - teacher.mean) / teacher.std
    x = F.interpolate(x, size=(teacher.size, teacher.size), mode="bicubic", align_corners=False)
    exact = teacher.model.double().forward_features(x.double())[:, teacher.model.num_prefix_tokens:]
    wanted = tensor(ARCHIVE, f"{case}/patch_tokens_first8@f64")[:1]
    atol = FLOAT64 if torch.__version__ >= "2.8" else 1e-6  # torch before 2.8 resizes the picture in fp32
    assert torch.allclose(exact[..., :8], wanted, atol=atol, rtol=FLOAT64)


# every family of docs/weights.md
FAMILIES = ["vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m",
            "vit_small_patch16_dinov3.lvd1689m", "vit_base_patch16_siglip_256.webli",
            "vit_base_patch16_clip_quickgelu_224.openai", "vit_base_patch16_224.mae",
            "vit_huge_patch14_gap_224.in1k_ijepa"]


@pytest.fixture()
def one_block(monkeypatch):
    """timm builds every ViT one block deep: the width is real, and the huge ones stay fast here."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=1, **options))


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_a_teacher_in_training_equal_timms_own_forward(name, one_block, tmp_path):
    """By hand, from a file of the published size: statistics, bicubic resize, positions, no prefix tokens."""
    torch.manual_seed(0)
    published, grid = timm.create_model(name, pretrained=False), 6  # with the classifier, if it has one
    for key, parameter in published.named_parameters():  # norms and layer scales about 1
        scale = parameter.ndim == 1 and key.endswith(("weight", "gamma"))
        nn.init.normal_(parameter, mean=float(scale), std=0.05)
    path = str(save(tmp_path / "weights.pth", published.state_dict()))
    size = grid * published.patch_embed.patch_size[0]
    teacher = Teacher(name, grid, path)
    model = timm.create_model(name, pretrained=True, img_size=size,
                              pretrained_cfg_overlay={"file": path}).eval()
    cfg, x = timm.get_pretrained_cfg(name), torch.rand(2, 3, 96, 96)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (cfg.mean, cfg.std))
    x_theirs = F.interpolate((x - mean) / std, size=(size, size), mode="bicubic")
    with torch.no_grad():
        theirs, = model.forward_intermediates(x_theirs, indices=1, norm=True, output_fmt="NLC",
                                              intermediates_only=True)
    tokens = nn.Sequential(teacher).train()((2 * x - 1).requires_grad_())
    assert theirs.shape == (2, grid * grid, teacher.dim) and not tokens.requires_grad
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    torch.testing.assert_close(tokens, theirs, atol=FLOAT32, rtol=1e-4)
    assert float(tokens.std(dim=1).mean()) > 1e-2  # the tokens differ from place to place


@pytest.mark.parametrize("width, heads, millions", [(768, 12, 14.46), (1024, 16, 21.02)])
def test_the_mapper_has_the_papers_heads_and_size(width, heads, millions):
    with torch.device("meta"):
        model = Mapper(MapperConfig(z_channels=32, grid=16, out_dim=width))
    assert model.blocks[0].attn.num_heads == heads
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def draw():
    torch.manual_seed(1)
    return 3 + 2 * torch.randn(8, 4, 8, 8), torch.rand(8), torch.randn(8, 4, 8, 8)


def test_the_mapper_reads_the_noised_normalised_latent():
    """By hand: batch norm, SiT's interpolant, patch embedding, positions, block, projector.

    The gradient, too: batch norm's takes out the scale, so that the encoder cannot beat the noise by it."""
    model, (z, t, eps) = small_mapper(out_dim=128).train(), draw()
    z.requires_grad_()
    mean, var = z.mean((0, 2, 3), keepdim=True), z.var((0, 2, 3), keepdim=True, correction=0)
    z_t, _ = interpolate((z - mean) / torch.sqrt(var + 1e-4), eps, t)
    x = model.x_embedder.proj(z_t).flatten(2).transpose(1, 2) + sincos_pos_embed(128, 8, 8)
    block = model.blocks[0]
    q, k, v = block.attn.qkv(block.norm1(x)).view(8, 64, 3, 2, 64).permute(2, 0, 3, 1, 4)  # two heads of 64
    attention = (q @ k.transpose(-2, -1) / 64**0.5).softmax(-1) @ v
    x = x + block.attn.proj(attention.transpose(1, 2).flatten(2))
    x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    ours, by_hand = model(z, t, eps), model.projector(x)
    torch.testing.assert_close(ours, by_hand, atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(out.square().sum(), z, retain_graph=True)[0] for out in (ours, by_hand)]
    torch.testing.assert_close(*gradients, atol=1e-4 * float(gradients[0].abs().max()), rtol=0)
    linear = small_mapper(kind="linear", patch_size=2).train()  # 4 x 4 tokens, row by row
    torch.testing.assert_close(linear(z, t, eps)[:, 7], linear.proj(z_t[..., 2:4, 6:8]).flatten(1))
    raw = small_mapper(kind="linear", patch_size=2, norm=False, noise=False)  # VA-VAE's
    assert torch.equal(raw(z)[:, 7], raw.proj(z[..., 2:4, 6:8]).flatten(1)) and not list(raw.buffers())
    torch.testing.assert_close(sincos_positions(128, 8), sincos_pos_embed(128, 8, 8), atol=0, rtol=0)


def test_clean_tokens_are_those_at_t_0_and_norm_and_noise_can_be_left_out():
    model, (z, t, eps) = small_mapper(), draw()
    for clean in (small_mapper(noise=False)(z), model.clean(z)):
        assert torch.equal(clean, model(z, torch.zeros(8), eps))
    plain = small_mapper(norm=False)  # eq. 1 to the letter
    assert {key for key in model.state_dict() if not key.startswith("bn.")} == set(plain.state_dict())
    assert torch.equal(plain(z, t, eps), plain.clean(interpolate(z, eps, t)[0]))


def test_the_alignment_loss_by_hand_its_range_and_a_zero_token_in_half_precision():
    a = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]])
    b = torch.tensor([[[3.0, 0.0], [0.0, -1.0], [1.0, 0.0]]])
    assert float(alignment_loss(a, b)) == pytest.approx((0 + 2 + 1 - 0.5**0.5) / 3, abs=1e-6)
    assert abs(float(alignment_loss(torch.randn(64, 16, 512), torch.randn(64, 16, 512))) - 1) < 0.01
    for dtype in (torch.float16, torch.bfloat16):  # F.normalize(0) in fp16 is NaN: its eps underflows
        pred, target = torch.randn(2, 2, 4, 8).to(dtype)
        pred[0, 0] = 0
        loss = alignment_loss(pred.requires_grad_(True), target)
        loss.backward()
        assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(pred.grad).all()


def load_without(folder, *keys):
    """Read a ViT-Ti that lacks these tensors."""
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    path = save(folder / "a.pth", {key: value for key, value in state.items() if key not in keys})
    return timm_network("vit_tiny_patch16_224", "--net", str(path))


@pytest.mark.parametrize("call, exception, word", [
    (lambda folder: load_without(folder, "blocks.7.norm1.bias"), ValueError, "blocks.7"),
    (lambda folder: load_without(folder, "head.weight"), ValueError, "head.weight"),
    (lambda folder: Teacher(DINOV2_S, 4, __file__), ValueError, "not weights of"),
    (lambda folder: Teacher(DINOV2_S, 4, "none.pth"), FileNotFoundError, "--teacher-weights none"),
    (lambda folder: Teacher(DINOV2_S, 4), FileNotFoundError, "huggingface.co/timm/.*shapes"),
    (lambda folder: Teacher("vit_enormous", 4), ValueError, "no such model"),
    (lambda folder: Teacher("resnet18", 4), ValueError, "no ViT"),
    (lambda folder: Teacher("shapes", 16), ValueError, "4 x 4"),
    (lambda folder: timm_network("vit_enormous", "--net"), ValueError, "--net vit_enormous")])
def test_what_is_no_teacher_is_refused_in_one_line(call, exception, word, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # whatever this machine has
    with pytest.raises(exception, match=word) as refusal:
        call(tmp_path)
    assert "\n" not in str(refusal.value)
