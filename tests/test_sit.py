"""SiT: the network against the published ones (golden), initialisation, shapes, interpolant, loss, loading.

    pytest tests/test_sit.py          about 20 s on 2 CPU cores
"""
import re
from dataclasses import asdict, fields

import pytest
import torch
import torch.nn.functional as F
from conftest import fill_by_name, read_fixture, tensor
from torch import nn

import sit
from sit import SIT_SIZES, SiT, SiTConfig

MANIFEST, ARCHIVE = read_fixture("sit")
CASES = MANIFEST["cases"]
FORWARD = [name for name, case in CASES.items() if "config" in case and "v" in case["outputs"]]
TRAIN = [name for name, case in CASES.items() if "rand" in case["inputs"] and "config" not in case]
REPAE = [name for name, case in CASES.items() if "noise" in case["inputs"]]
BATCH_NORM = [name for name, case in CASES.items() if "bn_out" in case["outputs"]]
TINY = SiTConfig(input_size=4, in_channels=3, hidden_size=32, depth=3, num_heads=2, num_classes=10,
                 z_dims=(6,), encoder_depth=2, projector_dim=16)


class RepaE(SiT):
    """REPA-E's SiT: ours with its affine-free BatchNorm of the latents in front (ours lives in data.py)."""

    def __init__(self, cfg, momentum):
        super().__init__(cfg)
        self.bn = nn.BatchNorm2d(cfg.in_channels, eps=1e-4, momentum=momentum, affine=False)


def config_of(published):
    """Translate a published constructor's keyword arguments to our config."""
    names = {field.name for field in fields(SiTConfig)}
    values = {key: value for key, value in published.items() if key in names}
    values["z_dims"] = tuple(values.get("z_dims", ()))
    return SiTConfig(**values, use_null=published.get("class_dropout_prob", 0.1) > 0)


def published_model(case):
    config = config_of(case["config"])
    momentum = case["config"].get("bn_momentum")
    model = SiT(config) if momentum is None else RepaE(config, momentum)
    return fill_by_name(model.eval(), MANIFEST, case["tensors"], ARCHIVE)


def random_model(cfg=TINY, seed=0):
    """A SiT whose zero-initialised layers are random too, so that every path through it shows."""
    torch.manual_seed(seed)
    model = SiT(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model.eval()


def draw_inputs(cfg=TINY, batch=4, size=None, seed=1):
    torch.manual_seed(seed)
    h, w = size or (cfg.input_size, cfg.input_size)
    return torch.randn(batch, cfg.in_channels, h, w), torch.rand(batch), torch.arange(batch) % cfg.num_classes


def compare(name, values, atol=None):
    """Compare named outputs with the archive; without atol with the float64 run, where one is stored.

    The float64 network has a float32 part, the waves of the time embedding, and exp and cos of float32
    differ between processors: one unit in the last place of each moves the outputs by up to 4.6e-8 of their
    largest value. An eps of 1e-5 for 1e-6 in a LayerNorm moves each network's outputs by 6e-7 at least.
    """
    for key, value in values.items():
        stored = f"{name}/{key}@f64" if atol is None else f"{name}/{key}"
        if stored in ARCHIVE:
            expected = tensor(ARCHIVE, stored)
            allowed = 1e-7 * expected.abs().max().item() if atol is None else atol
            torch.testing.assert_close(value.detach().to(expected.dtype), expected, atol=allowed, rtol=0,
                                       msg=lambda message: f"{stored}: {message}")


# published networks

@pytest.mark.parametrize("name", FORWARD)
def test_the_forward_pass_equals_the_published_network(name):
    case = CASES[name]
    model = published_model(case)
    x, t, y = (tensor(ARCHIVE, f"{name}/{key}") for key in ("x", "t", "y"))
    waves = []
    model.t_embedder.mlp.register_forward_pre_hook(lambda _, args: waves.append(args[0]))
    v, zs = model(x, t, y, return_projections=True)
    outputs = {"v": v, **{f"zs{i}": z for i, z in enumerate(zs)}, "pos_embed": model.pos_embed,
               "t_emb": model.t_embedder(t), "t_freq": waves[0]}
    assert {key for key in case["outputs"] if key != "cfg_v"} <= set(outputs)
    compare(name, outputs, atol=2e-5)
    v, zs = model.double()(x.double(), t, y, return_projections=True)
    compare(name, {"v": v, **{f"zs{i}": z for i, z in enumerate(zs)}})


@pytest.mark.parametrize("name", [name for name in FORWARD if "cfg_v" in CASES[name]["outputs"]])
def test_guidance_equals_the_published_one_on_the_three_channels_that_it_guides(name):
    """willisma/SiT guides the first three channels only; ours guides all of them."""
    model = published_model(CASES[name])
    recipe = CASES[name]["inputs"]["cfg_y"]["recipe"]
    scale = float(re.search(r"cfg_scale = ([\d.]+)", recipe)[1])
    row = int(re.search(r"cfg_t = t\[(\d+)\]", recipe)[1])
    y, expected = (tensor(ARCHIVE, f"{name}/{key}") for key in ("cfg_y", "cfg_v"))
    n = len(y) // 2
    x, t = tensor(ARCHIVE, f"{name}/x")[:n], tensor(ARCHIVE, f"{name}/t")[row].repeat(n)
    assert (y[n:] == model.null_label).all()
    guided = sit.guided_velocity(model, x, t, y[:n], scale)
    torch.testing.assert_close(guided[:, :3], expected[:n, :3], atol=5e-5, rtol=0)
    torch.testing.assert_close(model(x, t, y[:n])[:, 3:], expected[:n, 3:], atol=2e-5, rtol=0)
    assert (guided[:, 3:] - expected[:n, 3:]).abs().max() > 1e-2


@pytest.mark.parametrize("name", TRAIN)
def test_label_dropout_in_front_of_the_network_equals_the_published_training_mode(name):
    case = CASES[name]
    base = next(key for key in FORWARD if CASES[key]["tensors"] == case["tensors"])
    model = published_model(CASES[base])
    x, t, y = (tensor(ARCHIVE, f"{base}/{key}") for key in ("x", "t", "y"))
    rate = CASES[base]["config"]["class_dropout_prob"]
    dropped = sit.drop_labels(y, tensor(ARCHIVE, f"{name}/rand"), rate, model.null_label)
    assert (dropped != y).any()
    compare(name, {"v": model(x, t, dropped)}, atol=2e-5)


def repae_forward(name, model, training=False, dtype=torch.float32):
    """Rebuild REPA-E's forward: BatchNorm, interpolant, both losses. Returns x, with its graph, and all."""
    case = CASES[name]
    x, y, t, noise = (tensor(ARCHIVE, f"{name}/{key}") for key in ("x", "y", "t", "noise"))
    if training:
        rate = case["config"]["class_dropout_prob"]
        y = sit.drop_labels(y, tensor(ARCHIVE, f"{name}/rand"), rate, model.null_label)
    x = x.to(dtype).requires_grad_()
    model.bn.train(training)
    z_t, v = sit.interpolate(model.bn(x), noise.to(dtype), t.flatten().to(dtype), case["config"]["path_type"])
    v_pred, zs = model(z_t, t.flatten(), y, return_projections=True)
    targets = [tensor(ARCHIVE, f"{name}/z{k}").to(dtype) for k in range(len(zs))]
    cosines = [F.cosine_similarity(z, target, dim=-1).mean() for z, target in zip(zs, targets)]
    outputs = {"model_output": v_pred, "denoising_loss": sit.flow_loss(v_pred, v),
               "proj_loss": -sum(cosines) / len(zs), **{f"zs_tilde{k}": z for k, z in enumerate(zs)}}
    return x, {("train_" if training else "eval_") + key: value for key, value in outputs.items()}


@pytest.mark.parametrize("name", REPAE)
def test_the_evaluation_forward_equals_repa_e(name):
    model = published_model(CASES[name])
    x, outputs = repae_forward(name, model)
    compare(name, outputs, atol=2e-5)
    gradient, = torch.autograd.grad(outputs["eval_proj_loss"], x)
    compare(name, {"align_grad_x": gradient}, atol=1e-4 * float(gradient.abs().max()))
    plain = [tensor(ARCHIVE, f"{name}/{key}") for key in ("x", "t", "y")]
    plain[1] = plain[1].flatten()
    compare(name, {"inference_v": model(*plain), "latents_scale": model.bn.running_var.rsqrt(),
                   "latents_bias": model.bn.running_mean}, atol=2e-5)
    for key in CASES[name]["outputs"]:
        if key.startswith("feats_depth"):
            tokens = model.features(*plain, block=int(key.removeprefix("feats_depth")))
            compare(name, {key: tokens}, atol=2e-5)
    model.double()
    compare(name, repae_forward(name, model, dtype=torch.float64)[1])
    compare(name, {"inference_v": model(plain[0].double(), *plain[1:])})


@pytest.mark.parametrize("name", REPAE)
def test_one_training_forward_and_its_gradients_equal_repa_e(name):
    case = CASES[name]
    model = published_model(case)
    assert case["loss"] == "denoising_loss.mean() + 0.5 * proj_loss"
    _, outputs = repae_forward(name, model, training=True)
    compare(name, {**outputs, "train_bn_running_mean": model.bn.running_mean,
                   "train_bn_running_var": model.bn.running_var}, atol=2e-5)
    (outputs["train_denoising_loss"].mean() + 0.5 * outputs["train_proj_loss"]).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert sorted(gradients) == sorted(case["grad_names"])
    norms = torch.stack([gradients[key].double().norm() for key in case["grad_names"]])
    torch.testing.assert_close(norms, tensor(ARCHIVE, f"{name}/train_grad_norms"), rtol=1e-4, atol=1e-6)
    for key in case["outputs"]:
        if key.startswith("train_grad:"):
            gradient = gradients[key.removeprefix("train_grad:")]
            compare(name, {key: gradient}, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", BATCH_NORM)
def test_repa_e_normalises_latents_as_ours_up_to_its_eps(name):
    """REPA-E's BatchNorm has eps 1e-4 in the variance, its exported scale and normalize_latents have not."""
    from data import normalize_latents
    x, scale, bias, variance = (tensor(ARCHIVE, f"{name}/{key}") for key in
                                ("x", "latents_scale", "latents_bias", "running_var"))
    torch.testing.assert_close(scale**-2, variance, rtol=1e-6, atol=0)
    ours = normalize_latents(x, bias, 1 / scale) * (variance / (variance + 1e-4)).sqrt().view(1, -1, 1, 1)
    compare(name, {"bn_out": ours}, atol=2e-5)


@pytest.mark.parametrize("published", MANIFEST["published_sizes"], ids=lambda published: published["label"])
def test_parameter_counts_equal_the_published_sizes(published):
    """On the meta device. REPA's SiT-S has a final layer of width 768 on tokens of 384 and cannot run."""
    name = re.search(r"SiT-(\w+/\d+)", published["label"]).group(1)
    kwargs = {"learn_sigma": False, **published["kwargs"]}
    with torch.device("meta"):
        model = SiT(config_of({**kwargs, **SIT_SIZES[name]}))
    count = {key: p.numel() for key, p in model.named_parameters()}
    part = {name: sum(n for key, n in count.items() if key.startswith(name))
            for name in ("final_layer", "projectors")}
    outputs, width = published["final_layer_linear"]
    published_final = outputs * width + outputs + 2 * width * width + 2 * width
    assert sum(count.values()) - part["final_layer"] + published_final == published["params_total"]
    assert part["final_layer"] == published_final or width != model.config.hidden_size
    assert count["pos_embed"] == published["params_pos_embed"]
    assert part["projectors"] == published["params_projectors"]
    assert len(model.state_dict()) == published["n_state_dict_keys"] - len(published["buffers"])


@pytest.mark.parametrize("table", [key for key in MANIFEST["tensors"] if key.startswith("published_keys:")])
def test_state_dict_names_and_shapes_equal_the_published_ones(table):
    rules = {key: tuple(rule["shape"]) for key, rule in MANIFEST["tensors"][table].items()}
    state = {key: torch.empty(shape, device="meta") for key, shape in rules.items()}
    cfg = sit._infer_config(state, "x.pt")
    name = re.search(r"SiT-(\w+/\d+)", table).group(1)
    assert {key: getattr(cfg, key) for key in SIT_SIZES[name]} == SIT_SIZES[name]
    with torch.device("meta"):
        ours = {key: tuple(value.shape) for key, value in SiT(cfg).state_dict().items()}
    assert ours == {key: shape for key, shape in rules.items() if not key.startswith("bn.")}


LOSS_MANIFEST, LOSS_ARCHIVE = read_fixture("sit_loss")


@pytest.mark.parametrize("name", LOSS_MANIFEST["cases"])
def test_times_interpolant_and_losses_equal_repa(name):
    from mapper import alignment_loss
    case = LOSS_MANIFEST["cases"][name]
    config, inputs = case["config"], case["inputs"]
    get = {key: tensor(LOSS_ARCHIVE, f"{name}/{key}") for key in (*inputs, *case["outputs"])}
    # REPA draws a normal for "lognormal"; ours turns a uniform draw into that normal.
    u = get["rand"].flatten() if "rand" in get else torch.special.ndtr(get["randn"].double().flatten())
    t = sit.sample_t(u, config["weighting"], config["path_type"]).float()
    z_t, v = sit.interpolate(get["images"], get["noise"], t, config["path_type"])
    loss = sit.flow_loss(get["model_output"], v)
    for value, key in ((t, "t"), (z_t, "model_input"), (loss, "denoising_loss")):
        torch.testing.assert_close(value, get[key], rtol=1e-6, atol=1e-6)
    teachers = [key.removeprefix("zs") for key in inputs if re.fullmatch(r"zs\d+", key)]
    losses = [alignment_loss(get[f"zs_tilde{k}"], get[f"zs{k}"]) - 1 for k in teachers]
    torch.testing.assert_close(sum(losses) / len(losses), get["proj_loss"], rtol=1e-6, atol=1e-6)


# initialisation

def test_a_fresh_network_outputs_exactly_zero():
    z, t, y = draw_inputs()
    torch.manual_seed(0)
    model = SiT(TINY)
    v_pred, projections = model(z, t, y, return_projections=True)
    assert torch.equal(v_pred, torch.zeros_like(z)) and projections[0].abs().min() > 0
    _, v = sit.interpolate(z, torch.randn_like(z), t)
    assert torch.equal(sit.flow_loss(v_pred, v), v.square().mean(dim=(1, 2, 3)))


def test_blocks_of_a_fresh_network_are_the_identity():
    z, t, y = draw_inputs()
    model = SiT(TINY)
    embedded = model.x_embedder(z) + model.pos_embed
    assert torch.equal(model.features(z, t, y, block=3), embedded)


def test_initial_weights_have_the_published_distributions():
    torch.manual_seed(0)
    model = SiT(SiTConfig(patch_size=2, in_channels=8, hidden_size=384, depth=1, num_heads=6, num_classes=200,
                          z_dims=(64,), encoder_depth=1)).requires_grad_(False)
    block = model.blocks[0]
    xavier = (block.attn.qkv, block.mlp.fc1, model.projectors[0][2], model.x_embedder.proj)
    for weight in (layer.weight.flatten(1) for layer in xavier):
        bound = (6 / (weight.shape[0] + weight.shape[1])) ** 0.5  # Xavier: uniform in +- bound
        assert 0.98 * bound < weight.abs().max() <= bound
        assert abs(float(weight.std()) / (bound / 3**0.5) - 1) < 0.03
    for layer in (model.y_embedder.embedding_table, model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        assert abs(float(layer.weight.std()) / 0.02 - 1) < 0.03
    biases = [value for key, value in model.named_parameters() if key.endswith("bias")]
    assert len(biases) == 13 and not any(bias.any() for bias in biases)
    assert not SiT(TINY).pos_embed.requires_grad


# positions, patches, sizes

def test_positions_encode_column_then_row_with_sine_then_cosine():
    dim, h, w = 16, 3, 5
    pos = sit.sincos_pos_embed(dim, h, w)[0].double()
    for row in range(h):
        for column in range(w):
            for k in range(dim // 4):
                omega = 10000 ** (-k / (dim / 4))
                quarter = pos[row * w + column].view(4, dim // 4)[:, k]
                angles = torch.tensor([column * omega, row * omega], dtype=torch.float64)
                expected = torch.stack([angles.sin(), angles.cos()], dim=1).flatten()
                torch.testing.assert_close(quarter, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("h, w, p", [(3, 3, 2), (2, 5, 2), (4, 1, 3), (3, 4, 1)])
def test_unpatchify_undoes_cutting_into_patches(h, w, p):
    """Patches row by row, each with its values in the order row, column, channel."""
    image = torch.randn(2, 3, h * p, w * p)
    cut = [image[:, :, i * p:(i + 1) * p, j * p:(j + 1) * p] for i in range(h) for j in range(w)]
    patches = torch.stack([patch.permute(0, 2, 3, 1).flatten(1) for patch in cut], dim=1)
    assert torch.equal(sit.unpatchify(patches, h, w, p), image)


def test_a_patch_of_the_input_reaches_the_same_patch_of_the_output():
    """Token order in = token order out, also for a non-square latent: without attention a patch is local."""
    cfg = SiTConfig(**{**asdict(TINY), "input_size": 8, "patch_size": 2})
    torch.manual_seed(0)
    model = SiT(cfg)
    nn.init.normal_(model.final_layer.linear.weight)
    z, t, y = draw_inputs(cfg, batch=1, size=(4, 10))
    changed = z.clone()
    changed[:, :, 2:4, 6:8] += 1
    moved = (model(changed, t, y) - model(z, t, y)).abs().sum(1)[0] > 0
    expected = torch.zeros(4, 10, dtype=torch.bool)
    expected[2:4, 6:8] = True
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("size", [(3, 8), (8, 3), (8, 8)])
def test_other_latent_sizes_run_with_the_same_absolute_positions(size):
    """As a network of that nominal size; a non-square grid has a part of the square one's positions."""
    h, w = size
    square = sit.sincos_pos_embed(32, 8, 8).view(8, 8, 32)
    assert torch.equal(sit.sincos_pos_embed(32, h, w), square[:h, :w].reshape(1, h * w, 32))
    model, inputs = random_model(), draw_inputs(size=size)
    larger = SiT(SiTConfig(**{**asdict(TINY), "input_size": 8}))
    larger.load_state_dict({**model.state_dict(), "pos_embed": larger.pos_embed})
    assert torch.equal(larger(*inputs), model(*inputs))


# interpolant, times, loss, labels

@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_interpolant_is_data_at_0_and_noise_at_1_and_v_is_its_time_derivative(path):
    torch.manual_seed(0)
    z, eps = torch.randn(2, 5, 3, 2, 2).double()
    for end, value in ((z, 0.0), (eps, 1.0)):
        z_t, _ = sit.interpolate(z, eps, torch.full((5,), value).double(), path)
        torch.testing.assert_close(z_t, end, atol=1e-15, rtol=0)
    t, h = torch.linspace(0.01, 0.99, 5).double(), 1e-5
    later, earlier = (sit.interpolate(z, eps, t + step, path)[0] for step in (h, -h))
    difference = (later - earlier) / (2 * h)
    torch.testing.assert_close(difference, sit.interpolate(z, eps, t, path)[1], atol=1e-8, rtol=0)


def test_the_linear_velocity_is_noise_minus_data():
    z, eps = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    assert torch.equal(sit.interpolate(z, eps, torch.rand(2))[1], eps - z)


def test_lognormal_times_have_a_normal_log_ratio_of_noise_to_data():
    u = (torch.arange(10000).double() + 0.5) / 10000
    for path in ("linear", "cosine"):
        t = sit.sample_t(u, "lognormal", path)
        alpha, sigma, _, _ = sit.path_coefficients(t, path)
        log_ratio = (sigma / alpha).log()
        assert abs(float(log_ratio.mean())) < 1e-6 and abs(float(log_ratio.std()) - 1) < 1e-3
        assert (t.diff() > 0).all()
    assert torch.equal(sit.sample_t(u), u)
    assert sit.sample_t(torch.zeros(1), "lognormal") == 0  # the draw 0 is possible and must not give NaN


def test_the_flow_loss_is_a_float32_mean_per_image_also_under_half_precision():
    v_pred, v = torch.full((2, 4, 64, 64), 300.0, dtype=torch.float16), torch.zeros(2, 4, 64, 64)
    v_pred[1] = 2.0
    loss = sit.flow_loss(v_pred, v)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, torch.tensor([90000.0, 4.0]))  # 300^2 overflows fp16


def test_labels_are_dropped_at_the_asked_rate():
    n, p = 200_000, 0.1
    y = torch.arange(n) % 10
    dropped = sit.drop_labels(y, torch.rand(n, generator=torch.Generator().manual_seed(0)), p, 10)
    rate = float((dropped == 10).double().mean())
    assert abs(rate - p) < 5 * (p * (1 - p) / n) ** 0.5  # false alarm once in two million seeds
    assert torch.equal(dropped[dropped < 10], y[dropped < 10])
    u = torch.rand(100)
    assert torch.equal(sit.drop_labels(y[:100], u, 0.0, 10), y[:100])
    assert (sit.drop_labels(y[:100], u, 1.0, 10) == 10).all()


def test_the_null_label_is_the_number_of_classes_and_no_class():
    model = random_model()
    assert model.null_label == 10 and model.y_embedder.embedding_table.num_embeddings == 11
    z, t, _ = draw_inputs(batch=1)
    outputs = [model(z, t, torch.tensor([label])) for label in range(11)]
    assert all((outputs[10] - out).abs().max() > 1e-3 for out in outputs[:10])
    bare = SiT(SiTConfig(**{**asdict(TINY), "use_null": False}))
    assert bare.null_label is None and bare.y_embedder.embedding_table.num_embeddings == 10


# forward variants

def test_projections_and_features_read_the_tokens_after_the_numbered_block():
    model, inputs = random_model(), draw_inputs()
    v, (projection,) = model(*inputs, return_projections=True)
    tokens = {k: model.features(*inputs, block=k) for k in (1, 2, 3)}
    assert torch.equal(projection, model.projectors[0](tokens[TINY.encoder_depth]))
    condition = model.t_embedder(inputs[1]) + model.y_embedder(inputs[2])
    assert torch.equal(tokens[3], model.blocks[2](model.blocks[1](tokens[1], condition), condition))
    assert torch.equal(v, model(*inputs))


def test_learn_sigma_discards_the_second_half_of_the_channels():
    cfg = SiTConfig(**{**asdict(TINY), "learn_sigma": True})
    model, inputs = random_model(cfg), draw_inputs(cfg)
    v = model(*inputs)
    with torch.no_grad():
        model.final_layer.linear.weight.view(2, TINY.in_channels, -1)[1] += 1
    assert v.shape == inputs[0].shape and torch.equal(model(*inputs), v)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for flag in (False, True):
        model = random_model()
        model.grad_checkpointing = flag
        v, (projection,) = model(*draw_inputs(), return_projections=True)
        (v.square().mean() + projection.square().mean()).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 40
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-6, atol=1e-7, msg=key)


def test_the_network_runs_on_the_meta_device_for_size_estimates():
    with torch.device("meta"):
        v, (projection,) = SiT(TINY)(*draw_inputs(), return_projections=True)
    assert v.shape == (4, 3, 4, 4) and projection.shape == (4, 16, 6)


def test_the_whole_network_compiles_to_one_graph():
    """fullgraph raises on any branch that depends on a tensor's values, such as a check of the labels."""
    model, inputs = random_model(), draw_inputs()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_under_autocast_times_are_embedded_in_float32_and_tokens_are_summed_in_float32(qk_norm):
    model, (z, t, y) = random_model(SiTConfig(**{**asdict(TINY), "qk_norm": qk_norm})), draw_inputs()
    exact = model.t_embedder(t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.t_embedder(t), exact)
        assert model.features(z, t, y, block=3).dtype == torch.float32
        v = model(z, t, y)
    expected = model(z, t, y).detach()
    torch.testing.assert_close(v.float(), expected, atol=0.05 * float(expected.abs().max()), rtol=0)


# errors

def test_wrong_inputs_are_named():
    model, (z, t, y) = random_model(SiTConfig(**{**asdict(TINY), "patch_size": 2})), draw_inputs()
    with pytest.raises(ValueError, match="6 channels, this SiT wants 3.*moments"):
        model(torch.cat([z, z], dim=1), t, y)
    with pytest.raises(ValueError, match="5 channels, this SiT wants 3$"):
        model(torch.randn(4, 5, 4, 4), t, y)
    with pytest.raises(ValueError, match="4 x 5 do not divide into patches of 2"):
        model(torch.randn(4, 3, 4, 5), t, y)
    for label in (-1, 11):
        with pytest.raises(ValueError, match=f"label {label} is outside 0..10"):
            model(z, t, torch.tensor([0, 10, label, 1]))
    with pytest.raises(ValueError, match="block 0 is outside 1..3"):
        model.features(z, t, y, block=0)
    with pytest.raises(ValueError, match="encoder_depth 8 is outside 1..3"):
        SiT(SiTConfig(**{**asdict(TINY), "encoder_depth": 8}))
    with pytest.raises(ValueError, match="'cosin'"):
        sit.interpolate(z, z, t, "cosin")
    with pytest.raises(ValueError, match="'normal'"):
        sit.sample_t(t, "normal")
    with pytest.raises(ValueError, match="32 is not divisible by 5 heads"):
        sit.Attention(32, 5)


# checkpoints

def write_checkpoint(path, **changes):
    model, ema = random_model(seed=0), random_model(seed=1)
    torch.save({"format": "nanosendvae-sit", "step": 7, "model": model.state_dict(), "ema": ema.state_dict(),
                "model_config": asdict(TINY), "args": {}, **changes}, path)
    return model, ema


def test_a_checkpoint_gives_back_its_ema_or_raw_network(tmp_path):
    model, ema = write_checkpoint(tmp_path / "ckpt.pt")
    inputs = draw_inputs()
    loaded = sit.load_sit(tmp_path / "ckpt.pt")
    assert loaded.config == TINY and not loaded.training
    assert torch.equal(loaded(*inputs), ema(*inputs))
    assert torch.equal(sit.load_sit(tmp_path / "ckpt.pt", "raw")(*inputs), model(*inputs))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapped_names_load(tmp_path, prefix):
    state = {prefix + key: value for key, value in random_model(seed=2).state_dict().items()}
    write_checkpoint(tmp_path / "ckpt.pt", model=state)
    inputs = draw_inputs()
    assert torch.equal(sit.load_sit(tmp_path / "ckpt.pt", "raw")(*inputs), random_model(seed=2)(*inputs))


@pytest.mark.parametrize("changes", [{}, {"learn_sigma": True, "z_dims": ()},
                                     {"z_dims": (8, 4), "qk_norm": True}])
def test_a_bare_published_state_dict_loads_with_the_shape_read_off_its_tensors(tmp_path, changes):
    """A named size (tiny), since the heads follow the width; REPA-E's BatchNorm buffers are left out."""
    cfg = SiTConfig(input_size=6, in_channels=4, num_classes=7, z_dims=(5,), **SIT_SIZES["tiny/1"])
    cfg = SiTConfig(**{**asdict(cfg), **changes})
    model = random_model(cfg)
    torch.save({**model.state_dict(), "bn.running_mean": torch.zeros(4)}, tmp_path / "last.pt")
    loaded = sit.load_sit(tmp_path / "last.pt")
    assert loaded.config == cfg and not loaded.pos_embed.requires_grad
    z, t, y = draw_inputs(cfg, batch=2)
    expected = -model(z, 1 - t, y) if cfg.learn_sigma else model(z, t, y)  # willisma's time is reversed
    assert torch.equal(loaded(z, t, y), expected)


@pytest.mark.parametrize("name, encoder_depth", [("S/4", 4), ("B/2", 4), ("L/1", 8), ("XL/2", 8)])
def test_a_named_size_is_recognised_by_its_tensors_with_repa_s_encoder_depth(name, encoder_depth):
    size = SIT_SIZES[name]
    cfg = SiTConfig(input_size=16, in_channels=8, z_dims=(768,), encoder_depth=encoder_depth, **size)
    with torch.device("meta"):
        assert sit._infer_config(SiT(cfg).state_dict(), "x.pt") == cfg


def test_what_cannot_be_loaded_is_named(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(FileNotFoundError, match="ckpt.pt: no such file"):
        sit.load_sit(path)
    write_checkpoint(path, ema=None)
    with pytest.raises(ValueError, match="no EMA weights; use --weights raw"):
        sit.load_sit(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged"):
        sit.load_sit(path)
    torch.save({"format": "nanosendvae-vae", "model": {}}, path)
    with pytest.raises(ValueError, match="a nanosendvae-vae checkpoint, not a SiT: give one of train_sit.py"):
        sit.load_sit(path)
    torch.save({**random_model().state_dict()}, path)
    with pytest.raises(ValueError, match="width 32"):
        sit.load_sit(path)
