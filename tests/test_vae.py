"""The autoencoder: published numbers (golden), posterior, sizes, checkpointing, loading of file layouts.

    python -m pytest tests/test_vae.py        about 30 s on 2 cores, no network
"""
import math
from argparse import Namespace
from dataclasses import asdict, replace

import pytest
import torch
from conftest import fill_by_name, prescribed, read_fixture, tensor
from torch import nn

import vae
from vae import VAE, VAE_SIZES, Posterior, VAEConfig, from_diffusers, load_vae

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
    widths = theirs["block_out_channels"]
    attn = tuple(256 // 2 ** i for i, kind in enumerate(theirs["down_block_types"]) if "Attn" in kind)
    return VAEConfig(ch=widths[0], ch_mult=tuple(width // widths[0] for width in widths), resolution=256,
                     num_res_blocks=theirs["layers_per_block"], attn_resolutions=attn,
                     z_channels=theirs["latent_channels"], norm_groups=theirs["norm_num_groups"])


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


def test_tiny_maps_32_pixels_to_16_channels_of_4():
    model = VAE(VAE_SIZES["tiny"])
    x_hat, z, posterior = model(torch.zeros(2, 3, 32, 32), eps=torch.zeros(2, 16, 4, 4))
    assert z.shape == (2, 16, 4, 4) and x_hat.shape == (2, 3, 32, 32) and model.stride == 8
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


# Loading

@pytest.fixture()
def small(monkeypatch):
    """A small VAE of random weights whose architecture load_vae knows."""
    monkeypatch.setitem(vae.VAE_SIZES, "small", SMALL)
    torch.manual_seed(0)
    return VAE(SMALL)


def saved(path, content):
    torch.save(content, path)
    return path


def same(model, state):
    return model.state_dict().keys() == state.keys() and \
        all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_our_checkpoint_loads_with_its_configuration_and_its_ema_if_any(tmp_path):
    torch.manual_seed(0)
    cfg = replace(SMALL, stem=2, z_channels=3, norm_groups=16)  # not one of VAE_SIZES
    raw, ema = VAE(cfg), VAE(cfg)
    content = {"format": "nanosendvae-vae", "step": 1, "model": raw.state_dict(), "ema": None,
               "model_config": asdict(cfg), "args": {}}
    found = load_vae(saved(tmp_path / "a.pt", content))
    assert same(found, raw.state_dict()) and found.config == cfg and not found.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in found.parameters())
    assert same(load_vae(saved(tmp_path / "b.pt", {**content, "ema": ema.state_dict()})), ema.state_dict())
    del content["model"]["quant_conv.bias"]
    with pytest.raises(ValueError, match="quant_conv.bias is missing"):
        load_vae(saved(tmp_path / "c.pt", content))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_bare_and_wrapped_state_dicts_load(tmp_path, small, prefix):
    state = small.state_dict()
    path = saved(tmp_path / "vae.pt", {prefix + key: value for key, value in state.items()})
    found = load_vae(path)
    assert same(found, state) and found.config == SMALL
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(found.encode(x).mean, small.encode(x).mean)


def test_a_va_vae_checkpoint_loads_without_its_training_parts(tmp_path, small):
    state = small.state_dict()
    extra = ("loss.logvar", "loss.discriminator.main.0.weight", "foundation_model.model.cls_token",
             "linear_proj.weight")
    content = {"state_dict": {**state, **{key: torch.zeros(2) for key in extra}}, "global_step": 7}
    assert same(load_vae(saved(tmp_path / "vavae.ckpt", content)), state)
    content["state_dict"]["surprise.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="surprise.weight is unexpected"):
        load_vae(saved(tmp_path / "b.ckpt", content))


def test_half_precision_and_other_latent_channels_load(tmp_path, small):
    wide = VAE(replace(SMALL, z_channels=6, embed_dim=5)).half()
    found = load_vae(saved(tmp_path / "wide.pt", wide.state_dict()))
    assert found.config == replace(SMALL, z_channels=6, embed_dim=5)
    assert same(found, wide.float().state_dict()) and found.quant_conv.weight.dtype == torch.float32


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_diffusers_files_load_with_current_and_legacy_names(tmp_path, monkeypatch, suffix):
    from safetensors.torch import save_file
    case = min((case for case in CASES.values() if "block_out_channels" in case.get("config", {})),
               key=lambda case: case["n_params"])
    monkeypatch.setitem(vae.VAE_SIZES, "golden", config_of(case))
    theirs = {key: torch.from_numpy(prescribed(rule, ARCHIVE, key))
              for key, rule in MANIFEST["tensors"][case["tensors"]].items()}
    legacy = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for names in ({}, legacy):
        state = {}
        for key, value in theirs.items():
            for new, old in names.items():
                key = key.replace(new, old)
            state[key] = value
        path = tmp_path / f"diffusion_pytorch_model{suffix}"
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        assert same(load_vae(path), golden_vae(case).state_dict())


def test_a_hub_reference_is_fetched_or_explained(tmp_path, monkeypatch, small):
    import huggingface_hub
    path, asked = saved(tmp_path / "vae.pt", small.state_dict()), []

    def offline(repo, file):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args: asked.append(args) or str(path))
    assert same(load_vae("hf://owner/repo/sub/vae.pt"), small.state_dict())
    assert asked == [("owner/repo", "sub/vae.pt")]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match="hf://owner/repo/vae.pt.*network.*give its path"):
        load_vae("hf://owner/repo/vae.pt")
    with pytest.raises(ValueError, match="hf://owner/repo/file"):
        load_vae("hf://repo/vae.pt")


def write(path, data):
    path.write_bytes(data)
    return path


FIRST = "encoder.conv_in.weight"
TOKENS = {"x_embedder.proj.weight": torch.ones(1)}  # a SiT's key

# what is wrong: (a function of a folder and a good state dict that writes the file, the message)
BAD_FILES = {
    "missing": (lambda dir, state: dir / "none.pt", "none.pt: no such file"),
    "folder": (lambda dir, state: dir, "a folder, give the weight file in it"),
    "empty": (lambda dir, state: write(dir / "a.pt", b""), "a.pt: the file is empty"),
    "html": (lambda dir, state: write(dir / "a.pt", b"\n<!DOCTYPE html><html>Sign in"), "a.pt: a web page"),
    "git lfs": (lambda dir, state: write(dir / "a.pt", b"version https://git-lfs.github.com/spec/v1"), "LFS"),
    "text": (lambda dir, state: write(dir / "a.pt", b"these are no weights"), "damaged, cut off or no"),
    "cut off": (lambda dir, state: write(dir / "b.pt", saved(dir / "a.pt", state).read_bytes()[:-5000]),
                "b.pt: damaged"),
    "safetensors": (lambda dir, state: write(dir / "a.safetensors", b"\x80\0\0\0\0\0\0\0{"), "damaged"),
    "object": (lambda dir, state: saved(dir / "a.pt", {**state, "args": Namespace()}),
               "holds a pickled argparse.Namespace"),
    "list": (lambda dir, state: saved(dir / "a.pt", [1, 2]), "no VAE in it"),
    "statistics": (lambda dir, state: saved(dir / "a.pt", {"latents_scale": torch.ones(1)}),
                   "its keys are latents_scale: give the VAE's weight file"),
    "SiT": (lambda dir, state: saved(dir / "a.pt", TOKENS), "SiT weights, for load_sit"),
    "SiT checkpoint": (lambda dir, state: saved(dir / "a.pt", {"ema": TOKENS, "steps": 5}), "these are SiT"),
    "our SiT": (lambda dir, state: saved(dir / "a.pt", {"format": "nanosendvae-sit", "model": TOKENS}),
                "a nanosendvae-sit checkpoint, not a VAE"),
    "gray images": (lambda dir, state: saved(dir / "a.pt", {**state, FIRST: torch.zeros(32, 1, 3, 3)}),
                    r"from small.*encoder.conv_in.weight is \(32, 1, 3, 3\), not \(32, 3, 3, 3\)"),
    "missing key": (lambda dir, state: saved(dir / "a.pt", {key: state[key] for key in list(state)[1:]}),
                    "from small it differs in 1 tensors: encoder.conv_in.weight is missing"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_without_a_vae_is_one_clear_line(tmp_path, small, kind):
    make, message = BAD_FILES[kind]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_vae(make(tmp_path, small.state_dict()))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
