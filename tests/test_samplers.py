"""Guidance and samplers: closed-form Gaussians, and every model call of REPA's samplers (golden).

    pytest tests/test_samplers.py          about 10 s on 2 CPU cores
"""
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import read_fixture, tensor

import common
import sample
import sit
from sit import SiT, SiTConfig
from vae import VAE, VAE_SIZES

MANIFEST, ARCHIVE = read_fixture("samplers")
CASES = MANIFEST["cases"]
RUNS = [name for name, case in CASES.items() if "kwargs" in case]
SCORES = [name for name, case in CASES.items() if "score" in case["outputs"]]
TINY = SiTConfig(input_size=4, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=10)


def gaussian_velocity(z_t, t, mean, std, path="linear"):
    """Exact velocity E[dz_t/dt | z_t] for data N(mean, std^2), written out independently of sit.py."""
    t = t.view(-1, 1, 1, 1)
    alpha, sigma, d_alpha, d_sigma = (1 - t, t, -1, 1) if path == "linear" else \
        (torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2),
         -math.pi / 2 * torch.sin(t * math.pi / 2), math.pi / 2 * torch.cos(t * math.pi / 2))
    centred = (z_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)
    return d_alpha * (mean + alpha * std**2 * centred) + d_sigma * sigma * centred


class Gaussian:
    """The velocity of N(mean, std^2) as a field (z_t, t), and with labels as a network (z_t, t, y)."""

    def __init__(self, mean, std, path="linear"):
        self.path = path
        self.mean, self.std = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))

    def __call__(self, z_t, t, y=0):
        mean, std = (values[y].view(-1, 1, 1, 1) for values in (self.mean, self.std))
        return gaussian_velocity(z_t, t, mean, std, self.path)


class PublishedToy:
    """The class-conditional Gaussian of the manifest, which also notes every call."""

    def __init__(self, params, path):
        self.params, self.path, self.null_label, self.calls = params, path, 1000, []

    def __call__(self, x, t, y):
        x, t = x.float(), t.float()
        self.calls.append([float(t[0]), len(t), y.tolist()])
        assert (t == t[0]).all()
        p = self.params
        _, C, H, W = x.shape
        c, i, j = (torch.arange(n).double() for n in (C, H, W))
        label = y.double().view(-1, 1, 1, 1)
        mean = p["a"] * torch.sin(p["b"] * label + p["c"] * c.view(C, 1, 1)) + p["g"] * (i.view(H, 1) - j)
        null = label == self.null_label
        mean = torch.where(null, p["u"] * torch.cos(c.view(C, 1, 1)), mean)
        std = torch.where(null, torch.full_like(label, p["us"]), p["s0"] + p["s1"] * (label % p["sm"]))
        return gaussian_velocity(x.double(), t.double(), mean, std, self.path).float()


# published samplers

@pytest.mark.parametrize("name", RUNS)
def test_samples_and_all_model_calls_equal_the_published_sampler(name, monkeypatch):
    case = CASES[name]
    kwargs = case["kwargs"]
    latents, y = tensor(ARCHIVE, f"{name}/latents"), tensor(ARCHIVE, f"{name}/y")
    model = PublishedToy(MANIFEST["toy_model"]["params"], kwargs["path_type"])
    scale, interval = max(kwargs["cfg_scale"], 1), (kwargs["guidance_low"], kwargs["guidance_high"])

    def velocity(z_t, t):
        return sit.guided_velocity(model, z_t, t, y, scale, interval)

    if "sde_noise" in case["inputs"]:
        recorded = iter(tensor(ARCHIVE, f"{name}/sde_noise"))
        monkeypatch.setattr(sit, "draw_noise", lambda like, generator: next(recorded))
        x = sit.sample_sde(velocity, latents.double(), kwargs["num_steps"], path=kwargs["path_type"])
        assert next(recorded, None) is None  # every recorded draw was used: the last step has none
    else:
        x = sit.sample_ode(velocity, latents.double(), kwargs["num_steps"], heun=kwargs["heun"])
    assert x.dtype == torch.float64
    assert model.calls == case["model_calls"]["rows"]
    assert len(model.calls) == sit.nfe(kwargs["num_steps"], kwargs["heun"])
    torch.testing.assert_close(x, tensor(ARCHIVE, f"{name}/x").double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SCORES)
def test_the_score_of_a_velocity_equals_the_published_one(name):
    v, x, t, score = (tensor(ARCHIVE, f"{name}/{key}") for key in ("v", "x", "t", "score"))
    path = "cosine" if "cosine" in name else "linear"  # the manifest says it in the name alone
    ours = sit.score_from_velocity(v.double(), x.double(), t.double(), path).float()
    torch.testing.assert_close(ours, score, rtol=1e-5, atol=1e-5)


# exact answers

@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_score_is_the_gradient_of_the_log_density_of_a_gaussian(path):
    torch.manual_seed(0)
    z, t = torch.randn(50, 1, 1, 1).double(), torch.linspace(0.04, 1, 50).double()
    sigma = t.view(-1, 1, 1, 1) if path == "linear" else torch.sin(t * math.pi / 2).view(-1, 1, 1, 1)
    alpha = 1 - sigma if path == "linear" else (1 - sigma**2).sqrt()
    expected = -(z - alpha * 1.3) / (alpha**2 * 0.4**2 + sigma**2)
    score = sit.score_from_velocity(Gaussian([1.3], [0.4], path)(z, t), z, t, path)
    torch.testing.assert_close(score, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("heun", [False, True])
def test_a_linear_field_gives_the_closed_form_product_of_the_steps(heun):
    """dz/dt = z, from t = 1 to 0 in n steps of h = 1/n; the last Heun step is an Euler step."""
    for n in (1, 2, 7):
        h = 1 / n
        expected = (1 - h + (h * h / 2 if heun else 0)) ** (n - 1) * (1 - h)
        z = sit.sample_ode(lambda z, t: z, torch.ones(2, 1, 1, 1).double(), n, heun)
        torch.testing.assert_close(z, torch.full_like(z, expected), atol=1e-14, rtol=0)


@pytest.mark.parametrize("heun, order", [(False, 1), (True, 2)])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_ode_samplers_converge_to_the_data_at_their_order(heun, order, path):
    """The exact flow of a Gaussian takes noise eps to mean + std eps."""
    noise = torch.linspace(-2, 2, 9).double().view(-1, 1, 1, 1)
    field, exact = Gaussian([1.3], [0.4], path), 1.3 + 0.4 * noise
    errors = [float((sit.sample_ode(field, noise, n, heun) - exact).abs().max()) for n in (100, 200, 400)]
    for coarse, fine in zip(errors, errors[1:]):
        assert abs(math.log2(coarse / fine) - order) < 0.1
    assert errors[-1] < (4e-3, 4e-5)[heun]


@pytest.mark.parametrize("heun", [False, True])
def test_ode_samples_have_the_mean_and_std_of_the_data(heun):
    noise = torch.randn(20000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    z = sit.sample_ode(lambda z, t: Gaussian([1.3], [0.4])(z.double(), t.double()).float(), noise, 250, heun)
    assert z.dtype == torch.float32
    assert abs(float(z.mean()) - 1.3) < 0.012 and abs(float(z.std()) - 0.4) < 0.01


def sde_closed_form(mean, std, num_steps):
    """Mean and std after Euler-Maruyama on a Gaussian: each step is affine in z, so both have a recursion."""
    m, variance = 0.0, 1.0
    grid = [1 - 0.96 * k / (num_steps - 1) for k in range(num_steps)] + [0.0]
    for t, t_next in zip(grid, grid[1:]):
        a, dt = 1 - t, t_next - t
        spread = a * a * std * std + t * t
        # v = slope z + shift for the linear path; drift v - t * score with score = -(z - a mean) / spread
        slope = (t - a * std * std) / spread
        shift = -mean - slope * a * mean
        gain = 1 + dt * (slope + t / spread)
        m = gain * m + dt * (shift - t * a * mean / spread)
        variance = gain**2 * variance + (2 * t * -dt if t_next > 0 else 0)
    return m, variance**0.5


def test_sde_samples_have_the_documented_mean_and_std():
    """REPA's sampler: mean 1.2998 and std 0.3937 in 200,000 samples of N(1.3, 0.4^2), 250 steps.

    The recursion says 1.3 and 0.39335: a step of 0.04 without noise, at the end, makes the data too narrow.
    """
    m, s = sde_closed_form(1.3, 0.4, 250)
    assert abs(m - 1.2998) < 2 * s / 200_000**0.5 and abs(s - 0.3937) < 2 * s / 400_000**0.5
    assert abs(s - 0.39335) < 1e-5
    n = 40_000
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64)
    z = sit.sample_sde(Gaussian([1.3], [0.4]), noise, 250, generator)
    assert abs(float(z.mean()) - m) < 4 * s / n**0.5
    assert abs(float(z.std()) - s) < 4 * s / (2 * n) ** 0.5


def test_zero_diffusion_is_the_ode_on_the_same_grid():
    noise = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    field, z = Gaussian([1.3], [0.4]), noise
    grid = [1 - 0.96 * k / 9 for k in range(10)] + [0.0]
    for t, t_next in zip(grid, grid[1:]):
        z = z + (t_next - t) * field(z, torch.full((5,), t, dtype=torch.float64))
    torch.testing.assert_close(sit.sample_sde(field, noise, 10, diffusion=0.0), z, atol=1e-12, rtol=0)


def test_the_last_sde_step_adds_no_noise_and_one_step_is_deterministic():
    noise = torch.randn(3, 1, 2, 2).double()
    for num_steps in (1, 2):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        one, two = (sit.sample_sde(Gaussian([0.5], [0.3]), noise, num_steps, g) for g in generators)
        assert torch.equal(one, two) == (num_steps == 1)


# guidance

class Counting:
    """A network whose branches differ in every channel; notes the labels of each call."""

    null_label = 10

    def __init__(self):
        self.calls = []

    def __call__(self, z_t, t, y):
        self.calls.append(y.tolist())
        channel = torch.arange(z_t.shape[1]).view(1, -1, 1, 1) + 1.0
        return z_t * channel + torch.sin((y.view(-1, 1, 1, 1) + 1.0) * channel) + t.view(-1, 1, 1, 1)


def draw_guidance_inputs():
    torch.manual_seed(0)
    return torch.randn(3, 5, 2, 2), torch.tensor([0, 4, 9])


@pytest.mark.parametrize("t", [0.3, torch.full((3,), 0.3)], ids=["float", "tensor"])
def test_guidance_scales_every_channel(t):
    (z, y), model = draw_guidance_inputs(), Counting()
    times = torch.full((3,), 0.3)
    cond, null = model(z, times, y), model(z, times, torch.full((3,), 10))
    assert ((cond - null).abs().amin(dim=(0, 2, 3)) > 1e-3).all()
    for scale in (0.5, 2.5, 4.0):
        model.calls.clear()
        torch.testing.assert_close(sit.guided_velocity(model, z, t, y, scale), null + scale * (cond - null))
        assert model.calls == [[0, 4, 9, 10, 10, 10]]


@pytest.mark.parametrize("t", [0.3, torch.full((3,), 0.3)], ids=["float", "tensor"])
def test_branches_that_are_not_needed_are_not_computed(t):
    (z, y), model = draw_guidance_inputs(), Counting()
    times, null = torch.full((3,), 0.3), torch.full((3,), 10)
    cond, uncond = model(z, times, y), model(z, times, null)
    for scale, interval, expected, labels in [
            (1.0, (0, 1), cond, y), (0.0, (0, 1), uncond, null),  # scale 1 conditional, 0 unconditional
            (2.5, (0.31, 1), cond, y), (0.0, (0, 0.29), cond, y),  # outside the interval
            (2.5, (0.8, 0.2), cond, y), (2.5, (1, 0), cond, y)]:  # an empty interval
        model.calls.clear()
        assert torch.equal(sit.guided_velocity(model, z, t, y, scale, interval), expected)
        assert model.calls == [labels.tolist()]


def test_the_interval_is_in_noise_time_and_includes_both_ends():
    (z, y), model = draw_guidance_inputs(), Counting()
    for t, guided in [(0.1999, False), (0.2, True), (0.5, True), (0.75, True), (0.7501, False), (1.0, False)]:
        for time in (t, torch.full((3,), t)):
            model.calls.clear()
            sit.guided_velocity(model, z, time, y, 2.0, (0.2, 0.75))
            assert len(model.calls[0]) == (6 if guided else 3), (t, time)
    plain = sit.guided_velocity(model, z, 0.4, y, 2.0)
    assert torch.equal(sit.guided_velocity(model, z, 0.4, y, 2.0, (0, 1)), plain)


def test_images_of_one_batch_with_different_times_are_each_gated_by_their_own():
    (z, y), model = draw_guidance_inputs(), Counting()
    times = torch.tensor([0.1, 0.5, 0.9])
    v = sit.guided_velocity(model, z, times, y, 3.0, (0.4, 0.6))
    for i, scale in enumerate((1.0, 3.0, 1.0)):
        alone = sit.guided_velocity(model, z[i:i + 1], times[i:i + 1], y[i:i + 1], scale)
        torch.testing.assert_close(v[i:i + 1], alone)


def test_a_step_of_the_headline_setting_guides_185_of_250_evaluations():
    """cfg 2.5 in [0, 0.75], 250 SDE steps: one call of the network per step, 65 without the null branch."""
    (z, y), model = draw_guidance_inputs(), Counting()
    sit.sample_sde(lambda z_t, t: sit.guided_velocity(model, z_t, t, y, 2.5, (0, 0.75)), z, 250)
    assert len(model.calls) == sit.nfe(250) == 250
    assert sum(len(labels) == 6 for labels in model.calls) == 185


def test_an_empty_interval_and_scale_1_give_the_conditional_sample_bit_for_bit():
    model, (z, y) = random_model(), draw_inputs()
    plain = sit.sample_ode(lambda z_t, t: model(z_t, t, y), z, 5)

    def sample(scale, interval):
        return sit.sample_ode(lambda z_t, t: sit.guided_velocity(model, z_t, t, y, scale, interval), z, 5)

    for scale, interval in ((1.0, (0, 1)), (3.0, (0.5, 0.4)), (3.0, (1.5, 2.0))):
        assert torch.equal(sample(scale, interval), plain)
    assert (sample(3.0, (0, 1)) - plain).abs().max() > 1e-2


def test_guidance_of_a_network_without_a_null_label_is_an_error():
    z, y = draw_guidance_inputs()
    model = Counting()
    model.null_label = None
    assert len(sit.guided_velocity(model, z, 0.5, y, 1.0)) == 3
    with pytest.raises(ValueError, match="guidance 1.5 needs a null label.*use scale 1"):
        sit.guided_velocity(model, z, 0.5, y, 1.5)


# networks in samplers

def random_model(cfg=TINY):
    torch.manual_seed(0)
    model = SiT(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.15)
    return model.eval()


def draw_inputs(batch=5):
    torch.manual_seed(1)
    return torch.randn(batch, 3, 4, 4), torch.arange(batch) % 10


def run(sampler, velocity, noise, generators, num_steps=10):
    if sampler == "sde":
        return sit.sample_sde(velocity, noise, num_steps, generators)
    return sit.sample_ode(velocity, noise, num_steps, heun=sampler == "heun")


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_an_image_does_not_depend_on_the_batch_it_is_in(sampler):
    """With one generator per image; the order of the batch and its size change rounding at most."""
    model, (noise, y) = random_model(), draw_inputs()

    def sample(indices):
        generators = [torch.Generator().manual_seed(100 + i) for i in indices]
        return run(sampler, lambda z, t: sit.guided_velocity(model, z, t, y[indices], 2.0, (0.2, 0.8)),
                   noise[indices], generators)

    everything = sample([0, 1, 2, 3, 4])
    assert everything.isfinite().all()
    for indices in ([3], [4, 0, 3]):
        torch.testing.assert_close(sample(indices), everything[indices], atol=1e-4, rtol=1e-4)


def test_noise_of_one_generator_per_image_is_bit_equal_in_every_batch():
    like = torch.empty(3, 2, 4, 4)

    def draw(seeds):
        return sit.draw_noise(like[:len(seeds)], [torch.Generator().manual_seed(seed) for seed in seeds])

    assert torch.equal(draw([5, 6, 7])[[2, 0]], draw([7, 5]))
    one = torch.Generator().manual_seed(5)
    assert torch.equal(sit.draw_noise(like[:1], one), draw([5]))
    with pytest.raises(ValueError):
        sit.draw_noise(like, [one, one])


def test_the_state_is_float32_unless_the_noise_is_float64():
    model, (noise, y) = random_model(), draw_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        for sampler in ("euler", "heun", "sde"):
            seen = []

            def velocity(z, t):
                seen.append((z.dtype, t.dtype, t.shape))
                return model(z, t, y)

            for given, state in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                                 (torch.float64, torch.float64)):
                seen.clear()
                assert run(sampler, velocity, noise.to(given), None).dtype == state
                assert set(seen) == {(state, state, (5,))}


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_a_velocity_in_half_precision_is_not_rounded_again(sampler):
    """A network under autocast returns bf16; the arithmetic of the steps stays in float32."""
    noise = torch.randn(4, 3, 4, 4)

    def sample(dtype):
        generator = torch.Generator().manual_seed(0)
        return run(sampler, lambda z, t: (z / 3).bfloat16().to(dtype), noise, generator)

    assert torch.equal(sample(torch.bfloat16), sample(torch.float32))


def test_a_network_of_reversed_time_samples_the_same_images():
    """willisma/SiT: t = 0 noise, t = 1 data, v = z - eps."""
    ours = Gaussian([1.3, -0.5, 0.0], [0.4, 0.7, 1.0])

    def theirs(z_t, t, y):
        return -ours(z_t, 1 - t, y)

    ours.null_label = theirs.null_label = 2
    adapted = sit.velocity_from_reversed(theirs)
    noise, y = torch.randn(4, 1, 3, 3).double(), torch.tensor([0, 1, 0, 1])

    def sample(model):
        return run("heun", lambda z, t: sit.guided_velocity(model, z, t, y, 1.7, (0, 0.6)), noise, None)

    torch.testing.assert_close(sample(adapted), sample(ours), atol=1e-12, rtol=0)


def test_steps_are_counted_as_evaluations_of_the_velocity():
    for n in (1, 2, 9):
        for sampler, calls in (("euler", n), ("heun", 2 * n - 1), ("sde", n)):
            seen, noise = [], torch.randn(1, 1, 2, 2)

            def velocity(z, t):
                seen.append(float(t[0]))
                return z

            z = run(sampler, velocity, noise, None, n)
            assert z.isfinite().all() and len(seen) == calls == sit.nfe(n, sampler == "heun")
            assert seen[0] == 1 and min(seen) > 0  # t = 0, where the score has no meaning, is never evaluated


def test_no_value_on_a_device_is_read():
    """Reading would wait for a GPU; on the meta device it raises. Steps outside still run one branch only."""
    with torch.device("meta"):
        model, z, y, t = SiT(TINY), torch.empty(3, 3, 4, 4), torch.empty(3, dtype=torch.int64), torch.empty(3)
    batches = []
    model.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    for interval in ((0, 1), (0.2, 0.6), (0.6, 0.2)):  # always, by a mask, never
        sit.guided_velocity(model, z, t, y, 2.0, interval)
    assert batches == [6, 6, 3]
    steps = {"euler": [3, 3, 6, 6], "heun": [3, 3, 3, 3, 6, 6, 6], "sde": [3, 3, 6, 3]}
    for sampler, expected in steps.items():
        batches.clear()
        run(sampler, lambda z, t: sit.guided_velocity(model, z, t, y, 2.0, (0.2, 0.6)), z, None, 4)
        assert batches == expected


def test_zero_steps_are_an_error():
    for sampler in (sit.sample_ode, sit.sample_sde):
        with pytest.raises(ValueError, match="num_steps is 0"):
            sampler(lambda z, t: z, torch.randn(1, 1, 2, 2), 0)


# sample.py

def test_a_sweep_of_guidance_scales_is_one_ordinary_run_per_scale(tmp_path):
    torch.manual_seed(0)
    vae = VAE(VAE_SIZES["tiny"])
    save = {"format": "nanosendvae-vae", "step": 1, "model": vae.state_dict(), "ema": None,
            "model_config": asdict(vae.config), "args": {}}
    common.save_checkpoint(tmp_path / "vae.pt", save)
    config = vae.config
    channels, side = config.z_channels, 32 // vae.stride
    model = random_model(replace(TINY, input_size=side, in_channels=channels))
    latents = {"vae": str(tmp_path / "vae.pt"), "vae_hash": common.state_hash(vae.state_dict()),
               "num_classes": 10, "class_names": [str(i) for i in range(10)], "channels": channels,
               "latent_size": [side, side], "mean": [0.0] * channels, "std": [1.0] * channels}
    common.save_checkpoint(tmp_path / "sit.pt", {
        "format": "nanosendvae-sit", "step": 1, "model": model.state_dict(), "ema": model.state_dict(),
        "model_config": asdict(model.config), "latents": latents, "args": {"label_dropout": 0.1}})
    flags = ["--ckpt", str(tmp_path / "sit.pt"), "--num", "4", "--steps", "3", "--sampler", "euler",
             "--device", "cpu", "--dtype", "fp32", "--npz"]
    sample.main([*flags, "--sweep-cfg", "1", "2.5", "--out", str(tmp_path / "sweep")])
    sample.main([*flags, "--cfg", "2.5", "--out", str(tmp_path / "one")])
    assert sorted(folder.name for folder in (tmp_path / "sweep").iterdir()) == ["cfg1", "cfg2.5"]
    images = {name: np.load(tmp_path / name / "samples.npz")["arr_0"] for name in
              ("sweep/cfg1", "sweep/cfg2.5", "one")}
    assert (images["sweep/cfg2.5"] == images["one"]).all()
    assert (images["sweep/cfg1"] != images["one"]).any()
    protocols = [json.loads((tmp_path / name / "protocol.json").read_text())
                 for name in ("sweep/cfg2.5", "one")]
    assert {key for key in protocols[1] if protocols[0][key] != protocols[1][key]} == {"out"}
