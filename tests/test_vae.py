"""The autoencoder: published numbers (golden), posterior, sizes, checkpointing. Files: test_weights.py.

    python -m pytest tests/test_vae.py        about 30 s on 2 cores, no network
"""
import math
from dataclasses import replace

import pytest
import torch
from conftest import fill_by_name, prescribed, read_fixture, tensor
from torch import nn

from vae import VAE, VAE_SIZES, Posterior, VAEConfig, config_from_diffusers
from weights import from_diffusers, to_diffusers

MANIFEST, ARCHIVE = read_fixture("vae")
CASES = MANIFEST["cases"]
SMALL = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, resolution=32, z_channels=4)


def config_of(case):
    """The VAEConfig of a golden case, from published (LDM) or diffusers option names."""
    theirs = case["config"]
    if "block_out_channels" not in theirs:
        ours = {key: tuple(value) if isinstance(value, list) else value for key, value in theirs.items()
                if key in VAEConfig.__dataclass_fields__}
        return VAEConfig(**ours)
    return config_from_diffusers(theirs)


def golden_vae(case):
    """The VAE of a golden case with its prescribed weights; diffusers names go through from_diffusers."""
    model = VAE(config_of(case)).eval()
    if "block_out_channels" not in case["config"]:
        return fill_by_name(model, MANIFEST, case["tensors"], ARCHIVE)
    table = MANIFEST["tensors"][case["tensors"]]
    theirs = {key: torch.from_numpy(prescribed(rule, ARCHIVE, key)) for key, rule in table.items()}
    model.load_state_dict(from_diffusers(theirs))
    return model


def close(name, output, found, atol):
    torch.testing.assert_close(found, tensor(ARCHIVE, f"{name}/{output}"), atol=atol, rtol=atol)


@pytest.mark.parametrize("name", [name for name in CASES if "config" in CASES[name]])
@torch.no_grad()
def test_the_network_equals_the_published_one(name):
    case = CASES[name]
    model = golden_vae(case)
    assert sum(p.numel() for p in model.parameters()) == case["n_params"]
    x = tensor(ARCHIVE, f"{name}/image_u8").permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
    posterior = model.encode(x)
    close(name, "mean", posterior.mean, 3e-5)
    close(name, "logvar", posterior.logvar, 3e-5)
    close(name, "z", posterior.sample(eps=tensor(ARCHIVE, f"{name}/noise")), 1e-4)
    torch.testing.assert_close(posterior.kl(), tensor(ARCHIVE, f"{name}/kl"), rtol=1e-5, atol=0)
    mean = tensor(ARCHIVE, f"{name}/mean")
    close(name, "dec_mean", model.decode(mean), 6e-5)
    model.double()
    posterior = model.encode(x.double())
    runs = {"mean": lambda: posterior.mean, "logvar": lambda: posterior.logvar,
            "dec_mean": lambda: model.decode(mean.double())}
    checked = [output for output in case["outputs"] if f"{name}/{output}@f64" in ARCHIVE.files]
    assert {"mean", "logvar"} <= set(checked)
    for output in checked:
        close(name, f"{output}@f64", runs[output](), 1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if "moments" in CASES[name]["inputs"]])
def test_the_posterior_clamps_logvar_before_everything_else(name):
    posterior = Posterior(*tensor(ARCHIVE, f"{name}/moments").chunk(2, dim=1))
    found = {"mean": posterior.mode(), "logvar": posterior.logvar, "std": posterior.std, "kl": posterior.kl(),
             "z": posterior.sample(eps=tensor(ARCHIVE, f"{name}/noise"))}
    for output in CASES[name]["outputs"]:
        torch.testing.assert_close(found[output], tensor(ARCHIVE, f"{name}/{output}"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if "compvis_to_diffusers" in CASES[name]])
def test_every_diffusers_key_maps_to_its_published_key(name):
    rows = CASES[name]["compvis_to_diffusers"]["rows"]
    renamed = from_diffusers({theirs: torch.empty(shape, device="meta") for _, theirs, _, shape in rows})
    expected = {ours: shape for ours, _, shape, _ in rows}
    assert {key: list(value.shape) for key, value in renamed.items()} == expected
    assert {key: list(value.shape) for key, value in to_diffusers(renamed).items()} == \
        {theirs: shape for _, theirs, _, shape in rows}


@pytest.mark.parametrize("size, tensors, params, encoder", [("f16d32", 342, 69_836_067, 28_413_248),
                                                            ("f8d4", 248, 83_653_863, 34_163_592)])
def test_sizes_have_the_published_number_of_tensors_and_parameters(size, tensors, params, encoder):
    with torch.device("meta"):
        model = VAE(VAE_SIZES[size])
    assert len(model.state_dict()) == tensors
    assert sum(p.numel() for p in model.parameters()) == params
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder


@torch.no_grad()
def test_f16d32_halves_and_widens_where_the_published_network_does():
    with torch.device("meta"):
        model = VAE(VAE_SIZES["f16d32"])
        x = torch.zeros(1, 3, 256, 256)
    trace = []
    for part in (model.encoder.down, [model.quant_conv, model.decoder.conv_in], reversed(model.decoder.up)):
        for module in part:
            module.register_forward_hook(lambda module, args, out: trace.append(tuple(out.shape[1:3])))
    out = model.decode(model.encode(x).mode())
    assert trace == [(128, 256), (128, 128), (256, 64), (256, 32), (512, 16), (64, 16), (512, 16),
                     (512, 16), (256, 32), (256, 64), (128, 128), (128, 256)]
    assert out.shape == x.shape and model.stride == 16


def test_attention_sits_where_the_nominal_resolution_says():
    with torch.device("meta"):
        counts = {size: [len(level.attn) for level in VAE(cfg).decoder.up] for size, cfg in VAE_SIZES.items()}
    assert counts["f16d32"] == [0, 0, 0, 0, 3] and counts["f8d4"] == [0, 0, 0, 0]


def test_kl_equals_torch_distributions_and_its_analytic_gradient():
    torch.manual_seed(0)
    mean, logvar = (torch.randn(3, 4, 2, 2, requires_grad=True) for _ in range(2))
    posterior, normal = Posterior(mean, logvar), torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), expected.sum(dim=(1, 2, 3)))
    gradients = torch.autograd.grad(posterior.kl().sum(), (mean, logvar))
    torch.testing.assert_close(gradients, (mean.detach(), 0.5 * (logvar.detach().exp() - 1)))


def test_samples_have_the_mean_and_deviation_of_the_posterior_and_follow_the_generator():
    mean, std = torch.tensor([1.5, -0.5]).view(1, 2, 1, 1), torch.tensor([0.3, 2.0]).view(1, 2, 1, 1)
    posterior = Posterior(mean.expand(1, 2, 200, 200), (2 * std.log()).expand(1, 2, 200, 200))
    z = posterior.sample(torch.Generator().manual_seed(3))
    assert torch.equal(z, posterior.sample(torch.Generator().manual_seed(3)))
    assert not torch.equal(z, posterior.sample(torch.Generator().manual_seed(4)))
    # n = 40,000: five standard errors of the mean and of the deviation
    torch.testing.assert_close(z.mean(dim=(2, 3)), mean[..., 0, 0], atol=5 * 2.0 / 200, rtol=0)
    torch.testing.assert_close(z.std(dim=(2, 3)), std[..., 0, 0], atol=0, rtol=5 / math.sqrt(2 * 40_000))


@torch.no_grad()
def test_a_stem_is_the_plain_network_on_folded_pixels():
    torch.manual_seed(0)
    folded = VAE(replace(SMALL, stem=2, in_channels=3))
    plain = VAE(replace(SMALL, stem=1, in_channels=12, resolution=SMALL.resolution // 2))
    plain.load_state_dict(folded.state_dict())
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    unfolded = nn.functional.pixel_unshuffle(x, 2)
    z = folded.encode(x).mode()
    torch.testing.assert_close(z, plain.encode(unfolded).mode())
    torch.testing.assert_close(folded.decode(z), nn.functional.pixel_shuffle(plain.decode(z), 2))
    assert folded.stride == 4 and plain.stride == 2


def test_tiny_maps_32_pixels_to_28_channels_of_4():
    model = VAE(VAE_SIZES["tiny"])
    x_hat, z, posterior = model(torch.zeros(2, 3, 32, 32), eps=torch.zeros(2, 28, 4, 4))
    assert z.shape == (2, 28, 4, 4) and x_hat.shape == (2, 3, 32, 32) and model.stride == 8
    assert torch.equal(z, posterior.mode())


def test_checkpointing_recomputes_and_leaves_outputs_and_gradients_unchanged():
    torch.manual_seed(0)
    model, x, calls, results = VAE(SMALL), torch.rand(2, 3, 16, 16) * 2 - 1, [], []
    model.encoder.mid.block_1.register_forward_pre_hook(lambda *_: calls.append(model.checkpointing))
    for model.checkpointing in (False, True):
        x_hat, _, posterior = model(x, eps=torch.ones(2, 4, 8, 8))
        loss = (x - x_hat).square().mean() + 1e-3 * posterior.kl().mean()
        results.append((x_hat, *torch.autograd.grad(loss, list(model.parameters()))))
    assert calls == [False, True, True]
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_autocast_and_memory_format_change_rounding_only():
    torch.manual_seed(0)
    model, x = VAE(SMALL).eval(), torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = model.encode(x)
    x_hat = model.decode(posterior.mode())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.encode(x)
        torch.testing.assert_close(model.decode(rounded.mode()).float(), x_hat, atol=0.05, rtol=0)
        assert all(part.dtype == torch.float32 for part in (rounded.mean, rounded.sample(), rounded.kl()))
    assert not torch.equal(rounded.mean, posterior.mean)
    torch.testing.assert_close(rounded.mean, posterior.mean, atol=0.05, rtol=0)
    model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model.decode(model.encode(x).mode()), x_hat, atol=6e-5, rtol=0)


def test_training_compiles_without_a_graph_break():
    model, x = VAE(SMALL), torch.rand(2, 3, 16, 16) * 2 - 1
    compiled = torch.compile(lambda x, eps: model(x, eps)[0], backend="eager", fullgraph=True)
    eps = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(compiled(x, eps), model(x, eps)[0])


def test_wrong_inputs_name_what_was_seen_and_wanted():
    with torch.device("meta"):
        model = VAE(SMALL)
        with pytest.raises(ValueError, match=r"torch.uint8.*float in \[-1, 1\]"):
            model.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"\(1, 3, 16, 17\).*multiples of 2"):
            model.encode(torch.zeros(1, 3, 16, 17))
        with pytest.raises(ValueError, match=r"\(1, 1, 16, 16\).*\(B, 3, H, W\)"):
            model.encode(torch.zeros(1, 1, 16, 16))
        with pytest.raises(ValueError, match=r"\(1, 8, 8, 8\).*\(B, 4, h, w\).*moments"):
            model.decode(torch.zeros(1, 8, 8, 8))


@pytest.mark.parametrize("x, seen", [(torch.full((1, 3, 16, 16), 255.0), "255 to 255"),
                                     (torch.linspace(-2.1, 2.6, 768).view(1, 3, 16, 16), "-2.1 to 2.6")])
def test_images_out_of_range_are_refused_on_a_cpu(x, seen):
    with pytest.raises(ValueError, match=f"images from {seen}, the VAE takes"):
        VAE(SMALL).encode(x)
    assert VAE(SMALL).encode(x.clamp(-1, 1)).mean.isfinite().all()
