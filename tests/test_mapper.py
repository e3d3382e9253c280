"""Teacher, mapper and alignment loss: golden DINOv2 tokens, token grids, noise ends, counts, fp16.

Run: ./test.sh tests/test_mapper.py (about 20 s: a ViT-S and a ViT-B on the CPU). Teachers have random
weights, written to files in the published layout and read back by the real loading code.
"""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fill_by_name, read_fixture, tensor

import mapper
from mapper import Mapper, MapperConfig, Teacher, alignment_loss
from sit import interpolate

TEACHER, TEACHER_DATA = read_fixture("teacher")
DINOV2_S = "vit_small_patch14_dinov2.lvd142m"
# Tolerances of tests/golden/README.md: float32 on a CPU; where a fixture holds float64, that.
FLOAT32, FLOAT64 = 3e-5, 1e-9


@pytest.fixture(scope="module")
def dinov2_file(tmp_path_factory):
    """A DINOv2-S file of random weights with its published 37 x 37 position table."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(DINOV2_S, pretrained=False)
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vits14_pretrain.pth"
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("case", TEACHER["cases"])
def test_dinov2_tokens_are_those_of_repa(case, tmp_path):
    """The fixture's weights go through a file with the 37 x 37 table: timm resamples it as REPA does."""
    import timm
    spec = TEACHER["cases"][case]
    config = spec["config"]
    name = f"{config['arch']}_patch{config['patch_size']}_dinov2.lvd142m"
    size = config["checkpoint_grid"] * config["patch_size"]
    published = timm.create_model(name, pretrained=False, img_size=size)
    fill_by_name(published, TEACHER, spec["tensors"], TEACHER_DATA, ignore=("mask_token",))
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    teacher = Teacher(name, config["used_grid"], str(tmp_path / "weights.pth"))
    images = tensor(TEACHER_DATA, f"{case}/images_u8").permute(0, 3, 1, 2)
    seen = []
    teacher.model.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    teacher.model.norm.register_forward_hook(lambda _, args, out: seen.append(out))
    tokens = teacher(images.float() / 127.5 - 1)
    assert tokens.shape[1] == config["used_grid"] ** 2
    found = {"patch_tokens": tokens, "patch_tokens_first8": tokens[..., :8],
             "patch_tokens_mean": tokens.mean(-1), "patch_tokens_norm": tokens.norm(dim=-1)}
    found |= {"preprocessed_slice": seen[0][:, :, ::8, ::8], "cls_token": seen[1][:, 0],
              "pos_embed_resampled_first8": teacher.model.pos_embed[0, :, :8]}
    checked = 0
    for output in spec["outputs"]:
        if output in found:
            wanted = tensor(TEACHER_DATA, f"{case}/{output}")
            atol = FLOAT32 * max(1, float(wanted.abs().max()) / 4)  # a norm adds up the errors of its entries
            assert torch.allclose(found[output], wanted, atol=atol), output
            checked += 1
    assert checked == len(spec["outputs"])
    # In float64 the fixture took REPA's own float32 input, x / 255, and the float32 positions: ours, cast.
    x = (images.float() / 255 - teacher.mean) / teacher.std
    x = F.interpolate(x, size=(teacher.size, teacher.size), mode="bicubic", align_corners=False)
    exact = teacher.model.double().forward_features(x.double())[:, teacher.model.num_prefix_tokens:]
    wanted = tensor(TEACHER_DATA, f"{case}/patch_tokens_first8@f64")
    assert torch.allclose(exact[..., :8], wanted, atol=FLOAT64, rtol=FLOAT64)


# Every family of the README's table: (timm name, patch, prefix tokens). Widths are real, one block deep.
ZOO = [("vit_small_patch14_dinov2.lvd142m", 14, 1), ("vit_base_patch14_dinov2.lvd142m", 14, 1),
       ("vit_large_patch14_dinov2.lvd142m", 14, 1), ("vit_giant_patch14_dinov2.lvd142m", 14, 1),
       ("vit_small_patch14_reg4_dinov2.lvd142m", 14, 5), ("vit_base_patch14_reg4_dinov2.lvd142m", 14, 5),
       ("vit_large_patch14_reg4_dinov2.lvd142m", 14, 5), ("vit_giant_patch14_reg4_dinov2.lvd142m", 14, 5),
       ("vit_small_patch16_dinov3.lvd1689m", 16, 5), ("vit_base_patch16_dinov3.lvd1689m", 16, 5),
       ("vit_large_patch16_dinov3.lvd1689m", 16, 5), ("vit_huge_plus_patch16_dinov3.lvd1689m", 16, 5),
       ("vit_base_patch16_siglip_256.webli", 16, 0), ("vit_large_patch16_siglip_256.webli", 16, 0),
       ("vit_so400m_patch14_siglip_224.webli", 14, 0), ("vit_base_patch16_clip_quickgelu_224.openai", 16, 1),
       ("vit_large_patch14_clip_quickgelu_224.openai", 14, 1), ("vit_base_patch16_224.mae", 16, 1),
       ("vit_large_patch16_224.mae", 16, 1), ("vit_huge_patch14_224.mae", 14, 1),
       ("vit_huge_patch14_gap_224.in1k_ijepa", 14, 0), ("vit_giant_patch16_gap_224.in22k_ijepa", 16, 0)]
RUN = ("vit_small_patch14_dinov2", "vit_small_patch14_reg4", "vit_small_patch16_dinov3",  # one of each family
       "vit_base_patch16_siglip", "vit_base_patch16_clip_quickgelu", "vit_base_patch16_224.mae",
       "vit_huge_patch14_gap")


@pytest.mark.parametrize("name, patch, prefix", ZOO, ids=[name for name, *_ in ZOO])
def test_every_teacher_has_the_grid_of_the_latent_from_64_to_512_pixels(name, patch, prefix, monkeypatch):
    """On the meta device: shapes without the weights, through Teacher's own forward."""
    import timm
    create, built = timm.create_model, []

    def meta(name, pretrained, device=None, pretrained_cfg_overlay=None, **kwargs):
        built.append(create(name, pretrained=False, device="meta", depth=1, **kwargs))
        return built[-1]
    monkeypatch.setattr(timm, "create_model", meta)
    for pixels in (64, 128, 256, 512):
        teacher = Teacher(name, pixels // 16).to("meta")
        assert teacher.model is built[-1] and teacher.model.num_prefix_tokens == prefix
        assert teacher.size == patch * pixels // 16
        tokens = teacher(torch.empty(2, 3, pixels, pixels, device="meta"))
        assert tokens.shape == (2, (pixels // 16) ** 2, teacher.dim)
    assert not isinstance(teacher.model.norm, torch.nn.Identity)  # the tokens are those after a final norm
    with torch.device("meta"):  # its width is cut into heads of 64
        assert Mapper(MapperConfig(32, 16, teacher.dim)).blocks[0].attn.num_heads == teacher.dim // 64


@pytest.mark.parametrize("name, patch, prefix", [row for row in ZOO if row[0].startswith(RUN)],
                         ids=[name for name, *_ in ZOO if name.startswith(RUN)])
def test_teacher_tokens_equal_timms_own_forward(name, patch, prefix, monkeypatch, tmp_path):
    """Random weights through a file of the published image size; one block, because huge ones are slow here.

    By hand: timm's statistics, bicubic resize, the file's positions resampled by timm, prefix tokens off.
    """
    import timm
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, depth=1, **kwargs))
    torch.manual_seed(0)
    published = create(name, pretrained=False, depth=1, num_classes=0)
    for key, parameter in published.named_parameters():  # norms and layer scales about 1
        scale = parameter.ndim == 1 and key.endswith(("weight", "gamma"))
        torch.nn.init.normal_(parameter, mean=float(scale), std=0.05)
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    grid = 6
    teacher = Teacher(name, grid, str(tmp_path / "weights.pth"))
    model = create(name, pretrained=True, depth=1, num_classes=0, img_size=grid * patch,
                   pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")}).eval()
    cfg = timm.get_pretrained_cfg(name)
    x = torch.rand(2, 3, 96, 96) * 2 - 1
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (cfg.mean, cfg.std))
    x_theirs = F.interpolate(((x + 1) / 2 - mean) / std, size=(grid * patch,) * 2, mode="bicubic")
    with torch.no_grad():
        theirs = model.forward_intermediates(x_theirs, indices=1, norm=True, output_fmt="NLC",
                                             intermediates_only=True)[-1]
    tokens = teacher(x)
    assert theirs.shape == (2, grid * grid, teacher.dim)
    torch.testing.assert_close(tokens, theirs, atol=FLOAT32, rtol=1e-4)
    assert float(tokens.std(dim=1).mean()) > 1e-2  # the tokens differ from place to place


@pytest.mark.parametrize("pixels", [32, 64, 128, 192, 256, 384, 512])
def test_token_grid_follows_the_latent_grid_at_every_image_size(pixels, dinov2_file):
    grid = max(pixels // 16, 2)
    teacher = Teacher(DINOV2_S, grid, dinov2_file)
    assert teacher(torch.zeros(1, 3, pixels, pixels)).shape == (1, grid * grid, teacher.dim)


def test_teacher_input_is_normalised_by_its_own_mean_and_std(dinov2_file, monkeypatch):
    teacher = Teacher(DINOV2_S, 4, dinov2_file)
    seen = []
    monkeypatch.setattr(teacher.model, "forward_features",
                        lambda x: seen.append(x) or torch.zeros(1, 17, 384))
    teacher(torch.full((1, 3, 64, 64), 0.5))  # 0.5 in [-1, 1] is 0.75 in [0, 1]
    for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        assert torch.allclose(seen[0][:, channel], torch.full((1, 56, 56), (0.75 - mean) / std), atol=1e-5)


def test_prefix_tokens_are_dropped_by_the_models_own_count(tmp_path):
    """With four registers and a class token patch tokens begin at 5; row by row, as a bright one shows."""
    import timm
    name = "vit_small_patch14_reg4_dinov2.lvd142m"
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    torch.save(model.state_dict(), tmp_path / "reg.pth")
    teacher = Teacher(name, 4, str(tmp_path / "reg.pth"))
    x = torch.full((1, 3, 56, 56), -1.0)
    bright = x.clone()
    bright[:, :, 14:28, 42:56] = 1  # row 1, column 3 of the 4 x 4 grid
    assert teacher(x).shape == (1, 16, 384)
    embed = teacher.model.patch_embed((bright - x) / 2)
    embed = embed.flatten(1, 2) if embed.ndim == 4 else embed
    assert int((embed - embed[:, :1]).abs().sum(-1).argmax()) == 1 * 4 + 3
    change = (teacher(bright) - teacher(x)).norm(dim=-1)
    assert int(change.argmax()) == 1 * 4 + 3


def test_teacher_stays_frozen_in_eval_and_out_of_the_optimizer(dinov2_file):
    teacher = Teacher(DINOV2_S, 4, dinov2_file)
    torch.nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    x = torch.zeros(1, 3, 56, 56, requires_grad=True)
    assert not teacher(x).requires_grad


def test_weights_that_are_not_the_teachers_are_one_line_that_says_what_differs(tmp_path, dinov2_file):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes(open(dinov2_file, "rb").read()[:5000])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name, reason in (("other.pth", "Missing.*cls_token"), ("cut.pth", ""), ("empty.safetensors", "")):
        with pytest.raises(ValueError, match=rf"-weights .*{name}: not the weights.*{reason}") as seen:
            Teacher(DINOV2_S, 4, str(tmp_path / name))
        assert "\n" not in str(seen.value) and "hub" not in str(seen.value)
    with pytest.raises(ValueError, match="--teacher resnet18: no ViT"):
        Teacher("resnet18", 4, dinov2_file)


def test_missing_or_unknown_teacher_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="--teacher-weights .*no such file.*co/timm/vit_small"):
        Teacher(DINOV2_S, 4, str(tmp_path / "none.pth"))
    with pytest.raises(FileNotFoundError, match="hub.*--teacher-weights FILE.*--teacher shapes"):
        Teacher(DINOV2_S, 4)
    with pytest.raises(ValueError, match="timm does not know it"):
        Teacher("vit_enormous", 4)
    with pytest.raises(ValueError, match="4 x 4 tokens"):
        Teacher("shapes", 16)


def test_shapes_teacher_tells_scenes_apart_and_is_centred():
    """Two frames of a scene are closer than two scenes, and no direction is common to all images."""
    from shapes import Shapes
    teacher = Teacher("shapes", 4)
    tokens = []
    for frame in (0, 1):
        images = Shapes(400, seed=3, split="val", frame=frame).images
        tokens.append(teacher(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1))
    same = F.cosine_similarity(*tokens, dim=-1).mean()
    other = F.cosine_similarity(tokens[0], tokens[1].roll(1, 0), dim=-1).mean()
    assert same > 0.6 and abs(float(other)) < 0.1
    assert tokens[0].mean(0).norm(dim=-1).mean() < 0.2 * tokens[0].norm(dim=-1).mean()


@pytest.mark.parametrize("width, heads, count", [(768, 12, 14_458_112), (1024, 16, None)])
def test_mapper_has_the_papers_heads_and_size(width, heads, count):
    with torch.device("meta"):
        model = Mapper(MapperConfig(z_channels=32, grid=16, out_dim=width))
    assert model.blocks[0].attn.num_heads == heads
    total = sum(p.numel() for p in model.parameters())
    assert total == count or count is None and round(total / 1e6, 2) == 21.02


def small(**changes):
    torch.manual_seed(0)
    return Mapper(MapperConfig(**{**dict(z_channels=8, grid=4, out_dim=64, projector_dim=32), **changes}))


def test_mapper_reads_the_noised_normalised_latent():
    """By hand: batch norm of 4 images each, interpolant, patch embedding, positions, block, projector."""
    model, z = small(bn_group=4).train(), 3 + 2 * torch.randn(8, 8, 4, 4)
    t, eps = torch.rand(8), torch.randn(8, 8, 4, 4)
    parts = []
    for group in z.split(4):
        mean, var = group.mean((0, 2, 3), keepdim=True), group.var((0, 2, 3), keepdim=True, correction=0)
        parts.append((group - mean) / torch.sqrt(var + 1e-4))
    z_t = (1 - t.view(-1, 1, 1, 1)) * torch.cat(parts) + t.view(-1, 1, 1, 1) * eps
    tokens = model.x_embedder(z_t) + model.pos_embed
    block = model.blocks[0]
    tokens = tokens + block.attn(block.norm1(tokens))
    tokens = tokens + block.mlp(block.norm2(tokens))
    assert torch.allclose(model(z, t, eps), model.projector(tokens), atol=1e-5)


def test_noise_at_its_ends():
    """t = 1 hides the latent altogether, t = 0 hides the noise; without noise t is not looked at."""
    model, z = small().eval(), torch.randn(4, 8, 4, 4)
    eps, other = torch.randn(2, 4, 8, 4, 4)
    one, zero = torch.ones(4), torch.zeros(4)
    assert torch.equal(model(z, one, eps), model(z + 1, one, eps))
    assert torch.equal(model(z, zero, eps), model(z, zero, other))
    assert not torch.allclose(model(z, zero, eps), model(z + torch.randn_like(z), zero, eps))
    assert torch.equal(small(noise=False).eval()(z), model(z, zero, eps))


def test_with_the_norm_the_scale_of_the_latent_does_not_matter():
    """The batch norm takes it out: so the encoder cannot beat the noise by growing z."""
    z, t, eps = torch.randn(16, 8, 4, 4), torch.rand(16), torch.randn(16, 8, 4, 4)
    model = small().train()
    assert torch.allclose(model(z, t, eps), model(5 * z + 2, t, eps), atol=1e-3)
    z.requires_grad_(True)
    model(z, t, eps).square().sum().backward()
    z = z.detach(), z.grad
    along = (z[1] * (z[0] - z[0].mean((0, 2, 3), keepdim=True))).sum()
    assert abs(float(along)) < 1e-2 * float(z[0].norm() * z[1].norm())


def test_without_the_norm_the_noise_falls_on_the_raw_latent():
    """Eq. 1 to the letter: the same weights without the norm's buffers, and growing z drowns the noise."""
    model, z, t, eps = small(norm=False), torch.randn(16, 8, 4, 4), torch.rand(16), torch.randn(16, 8, 4, 4)
    assert set(small().state_dict()) - set(model.state_dict()) == {
        "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    z_t, _ = interpolate(z, eps, t)
    assert torch.equal(model(z, t, eps), model(z_t, torch.zeros(16), eps))
    change = [(model(s * z, t, eps) - model(s * z, t, -eps)).norm() / model(s * z, t, eps).norm()
              for s in (1, 100)]
    assert change[1] < change[0] / 10


@pytest.mark.parametrize("kind, patch", [("vit", 1), ("vit", 2), ("linear", 1), ("linear", 2)])
def test_patch_size_gives_row_major_tokens(kind, patch):
    model = small(kind=kind, patch_size=patch, grid=4, noise=False, depth=0).eval()
    z = torch.zeros(1, 8, 4 * patch, 4 * patch)
    moved = z.clone()
    moved[:, :, patch:2 * patch, 3 * patch:] = 1
    change = (model(moved) - model(z)).norm(dim=-1)[0]
    assert change.shape == (16,) and int(change.argmax()) == 7 and int((change > 1e-6).sum()) == 1


def test_alignment_loss_by_hand_and_its_range():
    a = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]])
    b = torch.tensor([[[3.0, 0.0], [0.0, -1.0], [1.0, 0.0]]])
    assert float(alignment_loss(a, b)) == pytest.approx((0 + 2 + 1 - np.sqrt(0.5)) / 3, abs=1e-6)
    assert abs(float(alignment_loss(torch.randn(64, 16, 512), torch.randn(64, 16, 512))) - 1) < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zero_token_in_half_precision_gives_a_finite_loss_and_gradient(dtype):
    """F.normalize of a zero vector in fp16 is NaN: its eps of 1e-12 underflows."""
    pred = torch.randn(2, 4, 8).to(dtype)
    pred[0, 0] = 0
    pred.requires_grad_(True)
    loss = alignment_loss(pred, torch.randn(2, 4, 8).to(dtype))
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(pred.grad).all()


def test_mapper_uses_the_interpolant_of_the_flow():
    z, eps, t = torch.randn(3, 8, 4, 4), torch.randn(3, 8, 4, 4), torch.rand(3)
    assert mapper.interpolate is interpolate
    z_t, v = interpolate(z, eps, t)
    assert torch.allclose(z_t, z + t.view(-1, 1, 1, 1) * v, atol=1e-6)
