"""The autoencoder: published numbers (golden), posterior, sizes, stem. Files: test_checkpoints.py.
Run: ./test.sh tests/test_vae.py        (about 25 s, CPU)
"""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import fill_by_name, prescribed, read_fixture, tensor
from small import VAE_CONFIG, small_vae

from checkpoints import from_diffusers, vae_config_from_diffusers
from vae import VAE, VAE_SIZES, Posterior, VAEConfig

MANIFEST, ARCHIVE = read_fixture("vae")
CASES = MANIFEST["cases"]


def golden_vae(case):
    """The VAE of a golden case with its prescribed weights; diffusers' names go through from_diffusers."""
    options, table = case["config"], MANIFEST["tensors"][case["tensors"]]
    if "block_out_channels" in options:
        model = VAE(vae_config_from_diffusers(options)).eval()
        theirs = {key: torch.from_numpy(prescribed(rule, ARCHIVE, key)) for key, rule in table.items()}
        model.load_state_dict(from_diffusers(theirs))
        return model
    config = VAEConfig(**{key: tuple(value) if isinstance(value, list) else value
                          for key, value in options.items() if key in VAEConfig.__dataclass_fields__})
    return fill_by_name(VAE(config).eval(), MANIFEST, case["tensors"], ARCHIVE)


def close(name, output, value, atol):
    torch.testing.assert_close(value, tensor(ARCHIVE, f"{name}/{output}"), atol=atol, rtol=atol)


@pytest.mark.parametrize("name", [name for name in CASES if "config" in CASES[name]])
@torch.no_grad()
def test_the_network_equals_the_published_one(name):
    case = CASES[name]
    model = golden_vae(case)
    assert sum(p.numel() for p in model.parameters()) == case["n_params"]
    x = tensor(ARCHIVE, f"{name}/image_u8").permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
    posterior, mean = model.encode(x), tensor(ARCHIVE, f"{name}/mean")
    close(name, "mean", posterior.mean, 3e-5)
    close(name, "logvar", posterior.logvar, 3e-5)
    close(name, "z", posterior.sample(eps=tensor(ARCHIVE, f"{name}/noise")), 1e-4)
    torch.testing.assert_close(posterior.kl(), tensor(ARCHIVE, f"{name}/kl"), rtol=1e-5, atol=0)
    close(name, "dec_mean", model.decode(mean), 6e-5)
    checked = [output for output in case["outputs"] if f"{name}/{output}@f64" in ARCHIVE.files]
    assert {"mean", "logvar"} <= set(checked)
    posterior = model.double().encode(x.double())
    close(name, "mean@f64", posterior.mean, 1e-9)
    close(name, "logvar@f64", posterior.logvar, 1e-9)
    if "dec_mean" in checked:
        close(name, "dec_mean@f64", model.decode(mean.double()), 1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if "moments" in CASES[name]["inputs"]])
def test_the_posterior_clamps_logvar_before_everything_else(name):
    posterior = Posterior(*tensor(ARCHIVE, f"{name}/moments").chunk(2, dim=1))
    ours = {"mean": posterior.mode(), "logvar": posterior.logvar, "std": posterior.std, "kl": posterior.kl(),
            "z": posterior.sample(eps=tensor(ARCHIVE, f"{name}/noise"))}
    for output in CASES[name]["outputs"]:
        close(name, output, ours[output], 1e-6)


@pytest.mark.parametrize("size, params, encoder, attention", [
    ("f16d32", 69_836_067, 28_413_248, [0, 0, 0, 0, 3]), ("f8d4", 83_653_863, 34_163_592, [0, 0, 0, 0])])
def test_sizes_are_the_published_networks(size, params, encoder, attention):
    with torch.device("meta"):
        model = VAE(VAE_SIZES[size])
    assert model.stride == int(size[1:].partition("d")[0])
    assert sum(p.numel() for p in model.parameters()) == params
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    assert [len(level.attn) for level in model.decoder.up] == attention
    plain = replace(model.config, attn_resolutions=())
    assert (plain.network == model.config.network) == (sum(attention) == 0)


def test_the_gradient_of_kl_and_a_drawn_sample_are_those_of_a_normal_distribution():
    torch.manual_seed(0)
    mean, logvar = (torch.randn(3, 4, 2, 2, requires_grad=True) for _ in range(2))
    posterior = Posterior(mean, logvar)
    gradients = torch.autograd.grad(posterior.kl().sum(), (mean, logvar))
    torch.testing.assert_close(gradients, (mean.detach(), 0.5 * (logvar.detach().exp() - 1)))
    noise = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    sample = posterior.sample(torch.Generator().manual_seed(3))
    torch.testing.assert_close(sample, mean + (0.5 * logvar).exp() * noise)


@torch.no_grad()
def test_a_stem_is_the_plain_network_on_folded_pixels():
    folded = small_vae(stem=2)
    plain = small_vae(in_channels=12, resolution=VAE_CONFIG.resolution // 2)
    plain.load_state_dict(folded.state_dict())
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    z = folded.encode(x).mode()
    torch.testing.assert_close(z, plain.encode(F.pixel_unshuffle(x, 2)).mode())
    torch.testing.assert_close(folded.decode(z), F.pixel_shuffle(plain.decode(z), 2))
    assert folded.stride == 4 and plain.stride == 2


def test_checkpointing_recomputes_the_activations():
    model, x, calls = small_vae().train(), torch.zeros(1, 3, 16, 16), []
    model.encoder.mid.block_1.register_forward_pre_hook(lambda *_: calls.append(model.checkpointing))
    for model.checkpointing in (False, True):
        model(x)[0].sum().backward()
    assert calls == [False, True, True]


def test_wrong_inputs_are_refused():
    model, x = small_vae(), torch.zeros(1, 3, 16, 16)
    for call, given, word in ((model.encode, x.byte(), "uint8"), (model.encode, x + 255, "255 to 255"),
                              (model.encode, torch.zeros(1, 3, 16, 17), "multiples of 2"),
                              (model.decode, torch.zeros(1, 8, 8, 8), "moments")):
        with pytest.raises(ValueError, match=word):
            call(given)
