"""SiT: the network against the published ones (golden), initialisation, shapes, interpolant, loss, labels.

    python -m pytest tests/test_sit.py        about 15 s on 2 cores, no network"""
import re
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import fill_by_name, read_fixture, tensor
from small import SIT_CONFIG, small_sit
from torch import nn

import sit
from data import normalize_latents
from mapper import alignment_loss
from sit import SIT_SIZES, SiT, SiTConfig

MANIFEST, ARCHIVE = read_fixture("sit")
LOSS_MANIFEST, LOSS_ARCHIVE = read_fixture("sit_loss")
CASES = MANIFEST["cases"]
FORWARD = [name for name, case in CASES.items() if "config" in case and "v" in case["outputs"]]
TRAIN = [name for name, case in CASES.items() if "rand" in case["inputs"] and "config" not in case]
REPAE = [name for name, case in CASES.items()  # we have no cosine path
         if "noise" in case["inputs"] and case["config"]["path_type"] == "linear"]
LINEAR = [name for name, case in LOSS_MANIFEST["cases"].items() if case["config"]["path_type"] == "linear"]
PROJECTED = dict(z_dims=(6,), encoder_depth=2, projector_dim=16)  # a small SiT with a teacher of width 6


def config_of(published):
    """Translate a published constructor's keyword arguments to our config."""
    values = {field.name: published[field.name] for field in fields(SiTConfig) if field.name in published}
    values["z_dims"] = tuple(values.get("z_dims", ()))
    return SiTConfig(**values, use_null=published.get("class_dropout_prob", 0.1) > 0)


def published(name, *keys):
    """The network of a golden case, and these tensors of the case."""
    case = CASES[name]
    model = SiT(config_of(case["config"]))
    if "bn_momentum" in case["config"]:  # REPA-E's BatchNorm of the latents; ours are normalised by data.py
        model.bn = nn.BatchNorm2d(model.config.in_channels, 1e-4, case["config"]["bn_momentum"], affine=False)
    return fill_by_name(model.eval(), MANIFEST, case["tensors"], ARCHIVE), *stored(name, *keys)


def stored(name, *keys):
    return [tensor(ARCHIVE, f"{name}/{key}") for key in keys]


def draw_inputs(batch=4, h=8, w=8):
    torch.manual_seed(1)
    return torch.randn(batch, 4, h, w), torch.rand(batch), torch.arange(batch) % 3


def compare(name, values, atol=None):
    """Compare named outputs with the archive; without atol with the float64 run, where one is stored.

    The float64 network's waves of the time embedding are float32; exp and cos differ between processors:
    by up to 4.6e-8 of the largest output. An eps of 1e-5 for 1e-6 in a LayerNorm moves each output by 6e-7.
    """
    for key, value in values.items():
        entry = f"{name}/{key}@f64" if atol is None else f"{name}/{key}"
        if entry in ARCHIVE:
            expected = tensor(ARCHIVE, entry)
            allowed = 1e-7 * expected.abs().max().item() if atol is None else atol
            torch.testing.assert_close(value.detach().to(expected.dtype), expected, atol=allowed, rtol=0,
                                       msg=lambda message: f"{entry}: {message}")


@pytest.mark.parametrize("name", FORWARD)
def test_the_forward_pass_equals_the_published_network(name):
    (model, x, t, y), waves = published(name, "x", "t", "y"), []
    model.t_embedder.mlp.register_forward_pre_hook(lambda _, args: waves.append(args[0]))
    v, zs = model(x, t, y, return_projections=True)
    outputs = {"v": v, **{f"zs{i}": z for i, z in enumerate(zs)}, "pos_embed": model.pos_embed,
               "t_emb": model.t_embedder(t), "t_freq": waves[0]}
    assert {key for key in CASES[name]["outputs"] if key != "cfg_v"} <= set(outputs)
    compare(name, outputs, atol=2e-5)
    v, zs = model.double()(x.double(), t, y, return_projections=True)
    compare(name, {"v": v, **{f"zs{i}": z for i, z in enumerate(zs)}})
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.float().t_embedder(t), outputs["t_emb"], atol=0, rtol=0)
    for train in TRAIN:  # label dropout in front of the network is the published training mode
        if CASES[train]["tensors"] == CASES[name]["tensors"]:
            rate = CASES[name]["config"]["class_dropout_prob"]
            dropped = sit.drop_labels(y, *stored(train, "rand"), rate, model.null_label)
            assert (dropped != y).any()
            compare(train, {"v": model(x, t, dropped)}, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in FORWARD if "cfg_v" in CASES[name]["outputs"]])
def test_guidance_equals_the_published_one_on_the_three_channels_that_it_guides(name):
    """willisma/SiT guides the first three channels only; ours guides all of them."""
    model, x, t, y, expected = published(name, "x", "t", "cfg_y", "cfg_v")
    row, scale = re.findall(r"cfg_t = t\[(\d+).*cfg_scale = ([\d.]+)", str(CASES[name]["inputs"]["cfg_y"]))[0]
    n = len(y) // 2
    x, t = x[:n], float(t[int(row)])
    assert (y[n:] == model.null_label).all()
    guided = sit.guided_velocity(model, x, t, y[:n], float(scale))
    torch.testing.assert_close(guided[:, :3], expected[:n, :3], atol=5e-5, rtol=0)
    plain = model(x, torch.full((n,), t), y[:n])
    torch.testing.assert_close(plain[:, 3:], expected[:n, 3:], atol=2e-5, rtol=0)
    assert (guided[:, 3:] - expected[:n, 3:]).abs().max() > 1e-2


def repae_forward(name, model, training=False, dtype=torch.float32):
    """Rebuild REPA-E's forward: BatchNorm, interpolant, both losses. Returns x, with its graph, and all."""
    x, y, t, noise = stored(name, "x", "y", "t", "noise")
    if training:
        rate = CASES[name]["config"]["class_dropout_prob"]
        y = sit.drop_labels(y, *stored(name, "rand"), rate, model.null_label)
    x = x.to(dtype).requires_grad_()
    model.bn.train(training)
    z_t, v = sit.interpolate(model.bn(x), noise.to(dtype), t.flatten().to(dtype))
    v_pred, zs = model(z_t, t.flatten(), y, return_projections=True)
    targets = [target.to(dtype) for target in stored(name, *(f"z{k}" for k in range(len(zs))))]
    cosines = [F.cosine_similarity(z, target, dim=-1).mean() for z, target in zip(zs, targets)]
    outputs = {"model_output": v_pred, "denoising_loss": sit.flow_loss(v_pred, v),
               "proj_loss": -sum(cosines) / len(zs), **{f"zs_tilde{k}": z for k, z in enumerate(zs)}}
    return x, {("train_" if training else "eval_") + key: value for key, value in outputs.items()}


@pytest.mark.parametrize("name", REPAE)
def test_an_evaluation_and_a_training_forward_and_its_gradients_equal_repa_e(name):
    model, x, t, y = published(name, "x", "t", "y")
    latents, outputs = repae_forward(name, model)
    gradient, = torch.autograd.grad(outputs["eval_proj_loss"], latents)
    compare(name, {"align_grad_x": gradient}, atol=1e-4 * float(gradient.abs().max()))
    t, prefix = t.flatten(), "feats_depth"
    blocks = [key.removeprefix(prefix) for key in CASES[name]["outputs"] if key.startswith(prefix)]
    tokens = {prefix + block: model.features(x, t, y, int(block)) for block in blocks}
    compare(name, {**outputs, **tokens, "inference_v": model(x, t, y), "latents_bias": model.bn.running_mean,
                   "latents_scale": model.bn.running_var.rsqrt()}, atol=2e-5)
    model.double()
    outputs = repae_forward(name, model, dtype=torch.float64)[1]
    compare(name, {**outputs, "inference_v": model(x.double(), t, y)})
    case, (model,) = CASES[name], published(name)
    assert case["loss"] == "denoising_loss.mean() + 0.5 * proj_loss"
    _, outputs = repae_forward(name, model, training=True)
    compare(name, {**outputs, "train_bn_running_mean": model.bn.running_mean,
                   "train_bn_running_var": model.bn.running_var}, atol=2e-5)
    (outputs["train_denoising_loss"].mean() + 0.5 * outputs["train_proj_loss"]).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert sorted(gradients) == sorted(case["grad_names"])
    norms = torch.stack([gradients[key].double().norm() for key in case["grad_names"]])
    torch.testing.assert_close(norms, *stored(name, "train_grad_norms"), rtol=1e-4, atol=1e-6)
    for key, gradient in gradients.items():
        compare(name, {f"train_grad:{key}": gradient}, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "bn_out" in case["outputs"]])
def test_repa_e_normalises_latents_as_ours_up_to_its_eps(name):
    """REPA-E's BatchNorm has eps 1e-4 in the variance, its exported scale and normalize_latents have not."""
    x, scale, bias, variance = stored(name, "x", "latents_scale", "latents_bias", "running_var")
    torch.testing.assert_close(scale**-2, variance, rtol=1e-6, atol=0)
    ours = normalize_latents(x, bias, 1 / scale) * (variance / (variance + 1e-4)).sqrt().view(1, -1, 1, 1)
    compare(name, {"bn_out": ours}, atol=2e-5)


@pytest.mark.parametrize("published", MANIFEST["published_sizes"], ids=lambda published: published["label"])
def test_parameter_counts_equal_the_published_sizes(published):
    """On the meta device. REPA's SiT-S has a final layer of width 768 on tokens of 384 and cannot run."""
    name = re.search(r"SiT-(\w+/\d+)", published["label"]).group(1)
    with torch.device("meta"):
        model = SiT(config_of({"learn_sigma": False, **published["kwargs"], **SIT_SIZES[name]}))
    outputs, width = published["final_layer_linear"]
    if width != model.config.hidden_size:
        model.final_layer = sit.FinalLayer(width, outputs)
    assert sum(p.numel() for p in model.parameters()) == published["params_total"]
    assert model.pos_embed.numel() == published["params_pos_embed"]
    assert sum(p.numel() for p in model.projectors.parameters()) == published["params_projectors"]
    assert len(model.state_dict()) == published["n_state_dict_keys"] - len(published["buffers"])


@pytest.mark.parametrize("name", LINEAR)
def test_times_interpolant_and_losses_equal_repa(name):
    case = LOSS_MANIFEST["cases"][name]
    get = {key: tensor(LOSS_ARCHIVE, f"{name}/{key}") for key in (*case["inputs"], *case["outputs"])}
    # REPA draws a normal for "lognormal"; ours turns a uniform draw into that normal.
    u = get["rand"].flatten() if "rand" in get else torch.special.ndtr(get["randn"].double().flatten())
    t = sit.sample_t(u, case["config"]["weighting"]).float()
    assert sit.sample_t(torch.zeros(1), case["config"]["weighting"]) == 0  # this draw must not give NaN
    z_t, v = sit.interpolate(get["images"], get["noise"], t)
    loss = sit.flow_loss(get["model_output"], v)
    for value, key in ((t, "t"), (z_t, "model_input"), (loss, "denoising_loss")):
        torch.testing.assert_close(value, get[key], rtol=1e-6, atol=1e-6)
    teachers = [key.removeprefix("zs") for key in case["inputs"] if re.fullmatch(r"zs\d+", key)]
    losses = [alignment_loss(get[f"zs_tilde{k}"], get[f"zs{k}"]) - 1 for k in teachers]
    torch.testing.assert_close(sum(losses) / len(losses), get["proj_loss"], rtol=1e-6, atol=1e-6)
    loss = sit.flow_loss(torch.full((1, 4, 64, 64), 300.0).half(), torch.zeros(1, 4, 64, 64))
    assert loss.dtype == torch.float32 and loss == 90000  # 300^2 overflows fp16


def test_initial_weights_have_the_published_distributions_and_give_exactly_zero():
    torch.manual_seed(0)
    model = SiT(SiTConfig(patch_size=2, in_channels=4, hidden_size=384, depth=1, num_heads=6, num_classes=200,
                          z_dims=(64,), encoder_depth=1))
    block, t_mlp, (z, t, y) = model.blocks[0], model.t_embedder.mlp, draw_inputs(h=16, w=16)
    xavier = [block.attn.qkv, block.mlp.fc1, model.projectors[0][2], model.x_embedder.proj]
    for layer in (*xavier, model.y_embedder.embedding_table, t_mlp[0], t_mlp[2]):
        weight = layer.weight.detach().flatten(1)
        bound = (6 / sum(weight.shape)) ** 0.5 if layer in xavier else 3**0.5 * 0.02  # uniform in +- bound
        assert abs(float(weight.std()) / (bound / 3**0.5) - 1) < 0.03
        assert (0.98 * bound < weight.abs().max() <= bound) == (layer in xavier)
    biases = [value for key, value in model.named_parameters() if key.endswith("bias")]
    assert len(biases) == 13 and not any(bias.any() for bias in biases) and not model.pos_embed.requires_grad
    v, (projection,) = model(z, t, y, return_projections=True)
    assert torch.equal(v, torch.zeros_like(z)) and projection.abs().min() > 0
    assert torch.equal(model.features(z, t, y, block=1), model.x_embedder(z) + model.pos_embed)


@pytest.mark.parametrize("h, w", [(4, 10), (10, 4), (10, 10)])
def test_other_latent_sizes_keep_absolute_positions_and_places(h, w):
    """As a network of that nominal size; a non-square grid has a part of the square one's positions. Without
    attention a patch of the input reaches the same patch of the output."""
    model, larger, (z, t, y) = small_sit(), small_sit(input_size=10), draw_inputs(h=h, w=w)
    larger.load_state_dict({**model.state_dict(), "pos_embed": larger.pos_embed})
    assert torch.equal(larger(z, t, y), model(z, t, y))
    part = larger.pos_embed.view(10, 10, -1)[:h, :w].reshape(1, h * w, -1)
    assert torch.equal(sit.sincos_pos_embed(model.config.hidden_size, h, w), part)
    local, changed = SiT(replace(SIT_CONFIG, patch_size=2)), z.clone()  # zeros of the start: no attention
    nn.init.normal_(local.final_layer.linear.weight)
    changed[:, :, 2:4, 0:2] += 1
    assert torch.equal(local(changed, t, y) != local(z, t, y), changed != z)


def test_reversed_time_turns_time_and_velocity_around():
    """willisma/SiT: t = 0 is noise, v = z - eps."""
    model, turned = small_sit(**PROJECTED), small_sit(**PROJECTED, reversed_time=True)
    z, t, y = draw_inputs()
    v, projections = turned(z, t, y, return_projections=True)
    expected = model(z, 1 - t, y, return_projections=True)
    torch.testing.assert_close((-v, projections), expected, atol=0, rtol=0)
    assert torch.equal(turned.features(z, t, y, 3), model.features(z, 1 - t, y, 3))


@pytest.mark.parametrize("word, call", [
    ("moments", lambda z, t, y: small_sit()(torch.cat([z, z], dim=1), t, y)),
    ("8 x 5", lambda z, t, y: small_sit(patch_size=2)(z[..., :5], t, y)),
    ("labels -1 to 1 are outside 0..3", lambda z, t, y: small_sit()(z, t, y - 1)),
    ("labels 2 to 4 are outside 0..3", lambda z, t, y: small_sit()(z, t, y + 2)),
    ("block 0", lambda z, t, y: small_sit().features(z, t, y, block=0)),
    ("depth 8", lambda *_: SiT(replace(SIT_CONFIG, z_dims=(6,), encoder_depth=8)))])
def test_wrong_inputs_are_refused(word, call):
    with pytest.raises(ValueError, match=word):
        call(*draw_inputs())
