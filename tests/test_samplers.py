"""Guidance and samplers: precision, devices, and every model call of REPA's samplers (golden).
Run: ./test.sh tests/test_samplers.py        (about 10 s, CPU)
"""
import pytest
import torch
from conftest import read_fixture, tensor
from small import SIT_CONFIG

import sit

MANIFEST, ARCHIVE = read_fixture("samplers")
CASES = MANIFEST["cases"]
RUNS = [name for name in CASES if CASES[name].get("kwargs", {}).get("path_type") == "linear"]  # not cosine


def run(sampler, velocity, noise, num_steps=10, generator=None):
    if sampler == "sde":
        return sit.sample_sde(velocity, noise, num_steps, generator)
    return sit.sample_ode(velocity, noise, num_steps, heun=sampler == "heun")


def guided(model, y, scale, interval=(0, 1)):
    """The velocity field that sample.py integrates."""
    return lambda z, t, t_step: sit.guided_velocity(model, z, t, y, scale, interval, t_step)


def gaussian_velocity(z_t, t, mean, std):
    """Exact velocity E[eps - z | z_t] for data N(mean, std^2), written out independently of sit.py."""
    centred = (z_t - (1 - t) * mean) / ((1 - t)**2 * std**2 + t**2)
    return t * centred - mean - (1 - t) * std**2 * centred


class PublishedToy:
    """The class-conditional Gaussian of the manifest, which also notes every call."""
    params = MANIFEST["toy_model"]["params"]

    def __init__(self, null_label=1000):
        self.null_label, self.calls = null_label, []

    def __call__(self, x, t, y):
        x, t = x.float(), t.float()
        self.calls.append([float(t[0]), len(t), y.tolist()])
        assert (t == t[0]).all()
        p = self.params
        c, i, j = (torch.arange(n).double() for n in x.shape[1:])
        label, c = y.double().view(-1, 1, 1, 1), c.view(-1, 1, 1)
        null = label == 1000
        mean = p["a"] * torch.sin(p["b"] * label + p["c"] * c) + p["g"] * (i.view(-1, 1) - j)
        mean = torch.where(null, p["u"] * torch.cos(c), mean)
        std = torch.where(null, torch.full_like(label, p["us"]), p["s0"] + p["s1"] * (label % p["sm"]))
        return gaussian_velocity(x.double(), t.double().view(-1, 1, 1, 1), mean, std).float()


@pytest.mark.parametrize("name", RUNS)
def test_samples_and_all_model_calls_equal_the_published_sampler(name, monkeypatch):
    case = CASES[name]
    kwargs, model = case["kwargs"], PublishedToy()
    latents, y = tensor(ARCHIVE, f"{name}/latents").double(), tensor(ARCHIVE, f"{name}/y")
    interval = kwargs["guidance_low"], kwargs["guidance_high"]
    velocity = guided(model, y, max(kwargs["cfg_scale"], 1), interval)
    sde = "sde_noise" in case["inputs"]
    recorded = iter(tensor(ARCHIVE, f"{name}/sde_noise") if sde else ())
    monkeypatch.setattr(sit, "draw_noise", lambda like, generator: next(recorded))
    x = run("sde" if sde else "heun" if kwargs["heun"] else "euler", velocity, latents, kwargs["num_steps"])
    assert next(recorded, None) is None  # every recorded draw was used: the last step has none
    assert x.dtype == torch.float64 and model.calls == case["model_calls"]["rows"]
    assert len(model.calls) == sit.nfe(kwargs["num_steps"], kwargs["heun"])
    torch.testing.assert_close(x, tensor(ARCHIVE, f"{name}/x").double(), atol=1e-5, rtol=0)


Z, Y = torch.randn(3, 5, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 9])
HALF = (0.2, 0.75)


@pytest.mark.parametrize("scale, interval, t, t_step, acts", [
    (2, HALF, 0.1999, None, False), (2, HALF, 0.2, None, True), (2, HALF, 0.5, None, True),
    (2, HALF, 0.75, None, True), (2, HALF, 0.7501, None, False), (2, HALF, 1.0, None, False),
    (2, HALF, 0.5, 0.8, False), (2, HALF, 0.1, 0.2, True),  # a Heun step decides by its first time
    (0, (0, 1), 0.3, None, True), (0.5, (0, 1), 0.3, None, True), (4, (0, 1), 0.3, None, True),
    (1, (0, 1), 0.5, None, False), (2, (0.8, 0.2), 0.5, None, False), (2, (1, 0), 1.0, None, False)])
def test_guidance_scales_all_channels_from_end_to_end_of_its_interval(scale, interval, t, t_step, acts):
    """Where guidance does not act, no null label is needed, and its branch is not computed."""
    model = PublishedToy(1000 if acts else None)
    v = sit.guided_velocity(model, Z, t, Y, scale, interval, t_step)
    assert [labels for _, _, labels in model.calls] == [[0, 4, 9, 1000, 1000, 1000] if acts else [0, 4, 9]]
    cond, null = (model(Z, torch.full((3,), t), y) for y in (Y, torch.full((3,), 1000)))
    assert ((cond - null).abs().amin(dim=(0, 2, 3)) > 1e-3).all()
    torch.testing.assert_close(v, null + scale * (cond - null) if acts else cond)


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_the_state_is_float32_unless_the_noise_is_float64(sampler):
    """A network under autocast returns bf16; the arithmetic of the steps stays in float32."""
    def sample(given, dtype):
        generator, noise = torch.Generator().manual_seed(0), torch.linspace(-2, 2, 48).view(1, 3, 4, 4)
        return run(sampler, lambda z, t, t_step: (z / 3).bfloat16().to(dtype), noise.to(given), 10, generator)
    assert torch.equal(sample(torch.float32, torch.bfloat16), sample(torch.float32, torch.float32))
    assert sample(torch.bfloat16, torch.bfloat16).dtype == torch.float32
    assert sample(torch.float64, torch.float32).dtype == torch.float64


def test_no_value_on_a_device_is_read():
    """Reading would wait for a GPU; on the meta device it raises. Steps outside still run one branch only."""
    with torch.device("meta"):
        model, z, y = sit.SiT(SIT_CONFIG), torch.empty(3, 4, 8, 8), torch.empty(3, dtype=torch.int64)
    batches = []
    model.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    for sampler, expected in ("euler", [3, 3, 6, 6]), ("heun", [3, 3, 3, 3, 6, 6, 6]), ("sde", [3, 3, 6, 3]):
        batches.clear()
        run(sampler, guided(model, y, 2.0, (0.2, 0.6)), z, 4)
        assert batches == expected


def test_wrong_inputs_are_refused():
    for call, word in ((lambda: sit.guided_velocity(PublishedToy(None), Z, 0.5, Y, 1.5), "null label"),
                       (lambda: sit.sample_ode(None, Z, 0), "num_steps is 0"),
                       (lambda: sit.sample_sde(None, Z, 0), "num_steps is 0"),
                       (lambda: sit.draw_noise(Z, [torch.Generator()]), "argument")):
        with pytest.raises(ValueError, match=word):
            call()
