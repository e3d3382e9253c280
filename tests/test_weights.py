"""Weight files: published layouts in and out, statistics, diffusers, sampling of published pairs, bad files.

    python -m pytest tests/test_weights.py        about 40 s on 2 cores, no network

The files are written here, small, exactly as the published codes lay them out (tests/golden/README.md says
what of that was run); the published files themselves were not at hand.
"""
import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ROOT, prescribed, read_fixture
from PIL import Image

import common
import data
import encode
import sample
import sit
import train_vae
import vae
import weights
from losses import PatchDiscriminator, load_discriminator
from sit import SIT_SIZES, SiT, SiTConfig, load_sit, sample_ode
from vae import VAE, VAE_SIZES, VAEConfig, load_vae

SMALL = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, resolution=32, attn_resolutions=(16,),
                  z_channels=4)
TINY_SIT = SiTConfig(input_size=8, in_channels=4, num_classes=3, z_dims=(5,), **SIT_SIZES["tiny/1"])
MEAN, STD = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([0.25, 2.0, 4.0, 0.5])
GOLDEN_VAE, VAE_ARCHIVE = read_fixture("vae")
GOLDEN_SIT, _ = read_fixture("sit")


@pytest.fixture()
def small(monkeypatch):
    """A small VAE of random weights whose architecture load_vae knows."""
    monkeypatch.setitem(vae.VAE_SIZES, "small", SMALL)
    torch.manual_seed(0)
    return VAE(SMALL)


def random_sit(cfg=TINY_SIT, seed=0):
    torch.manual_seed(seed)
    model = SiT(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model.eval()


def saved(path, content):
    torch.save(content, path)
    return path


def same(model, state):
    return model.state_dict().keys() == state.keys() and \
        all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def batch_norm(mean=MEAN, std=STD):
    return {"bn.running_mean": mean, "bn.running_var": std ** 2, "bn.num_batches_tracked": torch.tensor(9)}


# VAE files

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
    with pytest.raises(ValueError, match="own model_config, quant_conv.bias is missing"):
        load_vae(saved(tmp_path / "c.pt", content))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_bare_and_wrapped_state_dicts_load(tmp_path, small, prefix):
    state = small.state_dict()
    found = load_vae(saved(tmp_path / "vae.pt", prefixed(prefix, state)))
    assert same(found, state) and found.config == SMALL


def test_a_va_vae_checkpoint_loads_without_its_training_parts(tmp_path, small):
    state = small.state_dict()
    extra = ("loss.logvar", "loss.discriminator.main.0.weight", "loss.perceptual_loss.lin0.model.1.weight",
             "foundation_model.model.cls_token", "linear_proj.weight", "model_ema.decay")
    content = {"state_dict": {**state, **{key: torch.zeros(2) for key in extra}}, "global_step": 7}
    assert same(load_vae(saved(tmp_path / "vavae.ckpt", content)), state)
    content["state_dict"]["surprise.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="surprise.weight is unexpected: something else is stored beside"):
        load_vae(saved(tmp_path / "b.ckpt", content))


def test_half_precision_and_other_latent_channels_load(tmp_path, small):
    wide = VAE(replace(SMALL, z_channels=6, embed_dim=5)).half()
    found = load_vae(saved(tmp_path / "wide.pt", wide.state_dict()))
    assert found.config == replace(SMALL, z_channels=6, embed_dim=5)
    assert same(found, wide.float().state_dict()) and found.quant_conv.weight.dtype == torch.float32


def write_diffusers(folder, suffix, old_names=False):
    """Write the golden diffusers VAE into `folder`, config.json included; return its state dict."""
    case = GOLDEN_VAE["cases"]["tiny_diffusers"]
    theirs = {key: torch.from_numpy(prescribed(rule, VAE_ARCHIVE, key))
              for key, rule in GOLDEN_VAE["tensors"][case["tensors"]].items()}
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        if old_names:
            theirs = {key.replace(new, old): value for key, value in theirs.items()}
    folder.mkdir(exist_ok=True)
    path = folder / f"diffusion_pytorch_model{suffix}"
    weights.save_safetensors(path, theirs) if suffix == ".safetensors" else torch.save(theirs, path)
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **case["config"]}))
    return theirs


@pytest.mark.parametrize("suffix, old_names", [(".bin", True), (".safetensors", False)])
def test_a_diffusers_folder_loads_with_the_architecture_of_its_config(tmp_path, monkeypatch, suffix,
                                                                       old_names):
    """Its widths are none of VAE_SIZES, so the file alone needs a size that we know."""
    theirs = write_diffusers(tmp_path / "vae", suffix, old_names)
    found = load_vae(tmp_path / "vae")
    widths = GOLDEN_VAE["cases"]["tiny_diffusers"]["config"]["block_out_channels"]
    assert [found.config.ch * mult for mult in found.config.ch_mult] == widths
    assert found.stride == 2 ** (len(widths) - 1)
    assert same(found, weights.from_diffusers(theirs))
    with pytest.raises(ValueError, match="none of the sizes.*a folder in diffusers format brings its own"):
        load_vae(tmp_path / "vae" / f"diffusion_pytorch_model{suffix}")
    monkeypatch.setitem(vae.VAE_SIZES, "golden", found.config)
    assert same(load_vae(tmp_path / "vae" / f"diffusion_pytorch_model{suffix}"), found.state_dict())
    about = tmp_path / "vae" / "config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "use_quant_conv": False}))
    with pytest.raises(ValueError, match="use_quant_conv False: not an AutoencoderKL that vae.py has"):
        load_vae(tmp_path / "vae")


def test_a_folder_of_our_checkpoints_is_its_newest(tmp_path, small):
    content = {"format": "nanosendvae-vae", "model": VAE(SMALL).state_dict(), "ema": None,
               "model_config": asdict(SMALL), "args": {}}
    saved(tmp_path / "ckpt_0000001.pt", content)
    saved(tmp_path / "ckpt_0000002.pt", {**content, "model": small.state_dict()})
    assert same(load_vae(tmp_path), small.state_dict())
    assert weights.resolve(tmp_path).endswith("ckpt_0000002.pt")


def repae_checkpoint(path, small, prefix=""):
    """Write a REPA-E training checkpoint: all its keys, an argparse.Namespace, the BatchNorm in the SiT."""
    raw, ema, disc = random_sit(seed=1), random_sit(seed=2), PatchDiscriminator()
    content = {"model": {**prefixed(prefix, raw.state_dict()), **prefixed(prefix, batch_norm(MEAN + 1))},
               "ema": {**prefixed(prefix, ema.state_dict()), **prefixed(prefix, batch_norm())},
               "vae": prefixed(prefix, small.state_dict()),
               "discriminator": prefixed(prefix, disc.state_dict()),
               "opt": {"state": {}, "param_groups": []}, "opt_vae": {}, "opt_disc": {},
               "args": Namespace(vae="f16d32", bn_momentum=0.1, betas=[0.9, 0.999]), "steps": 400000}
    return saved(path, content), raw, ema, disc


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_repa_e_training_checkpoint_gives_vae_sit_discriminator_and_statistics(tmp_path, small, prefix):
    path, raw, ema, disc = repae_checkpoint(tmp_path / "0400000.pt", small, prefix)
    assert same(load_vae(path), small.state_dict())
    assert same(load_sit(path), ema.state_dict()) and same(load_sit(path, "raw"), raw.state_dict())
    assert same(load_discriminator(path), disc.state_dict())
    mean, std, source = weights.find_statistics(path, 4)
    assert torch.equal(mean, MEAN) and torch.allclose(std, STD) and source == str(path)


def test_a_hub_reference_is_fetched_or_explained(tmp_path, monkeypatch, small):
    import huggingface_hub
    path, asked = saved(tmp_path / "vae.pt", small.state_dict()), []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args: asked.append(args) or str(path))
    assert same(load_vae("hf://owner/repo/sub/vae.pt"), small.state_dict())
    assert asked == [("owner/repo", "sub/vae.pt")]
    for name in ("hf://repo/vae.pt", "hf://a b/repo/vae.pt"):
        with pytest.raises(ValueError, match="hf://owner/repo/file"):
            load_vae(name)


def test_an_unknown_hub_name_without_network_is_one_line(monkeypatch, tmp_path):
    """Really offline: huggingface_hub's own switch, which test.sh sets too."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    name = "hf://nobody/nothing/x.pt"
    train = ["--data", "shapes", "--vae", "tiny", "--teacher", "shapes", "--device", "cpu", "--init", name]
    for main, flags in ((encode.main, ["--data", "shapes", "--device", "cpu", "--vae", name]),
                        (train_vae.main, train), (sample.main, ["--device", "cpu", "--ckpt", name]),
                        (sit.main, ["--export", "repa", "x.pt", "--ckpt", name])):
        with pytest.raises(FileNotFoundError, match=f"{name}: neither in the local cache nor") as caught:
            main(flags)
        assert "\n" not in str(caught.value)


def test_a_command_that_cannot_read_its_file_says_so_and_leaves_with_code_2(tmp_path):
    (tmp_path / "a.pt").write_text("<html>")
    command = [str(ROOT / "vae.py"), "--export", "ldm", "x.pt", "--vae", "a.pt"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: a.pt: a web page"), done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "x.pt").exists()


# SiT files

def sits_forward(model, seed=3):
    torch.manual_seed(seed)
    return torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 3])


def test_repas_older_files_count_the_blocks_behind_the_projector_from_zero(tmp_path):
    model = random_sit(replace(TINY_SIT, z_dims=()))
    legacy = {}
    for key, value in model.state_dict().items():
        part = key.split(".")
        if part[0] == "blocks" and int(part[1]) >= 2:
            key = ".".join(["decoder_blocks", str(int(part[1]) - 2), *part[2:]])
        legacy[key] = value
    assert "decoder_blocks.1.mlp.fc1.bias" in legacy
    assert same(load_sit(saved(tmp_path / "last.pt", legacy)), model.state_dict())


def test_willismas_sit_loads_with_twice_the_channels_and_its_time_turned_around(tmp_path):
    """Their t = 0 is noise, their v = z - eps, their second half of channels unused."""
    cfg = replace(TINY_SIT, z_dims=(), learn_sigma=True)
    theirs = random_sit(cfg)
    found = load_sit(saved(tmp_path / "SiT-XL-2-256.pt", theirs.state_dict()))
    z, t, y = sits_forward(found)
    assert found.config == cfg and found.reversed_time and not theirs.reversed_time
    adapted = sit.velocity_from_reversed(theirs)
    assert torch.equal(found(z, t, y), adapted(z, t, y))
    assert torch.equal(found.features(z, t, y, 2), theirs.features(z, 1 - t, y, 2))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("which", ["ema", "raw"])
def test_a_repa_checkpoint_with_its_namespace_loads(tmp_path, prefix, which):
    sits = {"ema": random_sit(seed=1), "model": random_sit(seed=2)}
    content = {key: prefixed(prefix, model.state_dict()) for key, model in sits.items()}
    path = saved(tmp_path / "0400000.pt", {**content, "opt": {}, "args": Namespace(seed=0), "steps": 400000})
    assert same(load_sit(path, which), sits["ema" if which == "ema" else "model"].state_dict())


def test_a_sit_of_another_code_or_depth_is_named(tmp_path):
    state = random_sit().state_dict()
    lightning = {**state, "blocks.0.mlp.w12.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="no SiT in it, LightningDiT's network"):
        load_sit(saved(tmp_path / "a.pt", {"ema": prefixed("module.", lightning)}))
    shallow = {key: value for key, value in state.items() if not key.startswith("blocks.3.")}
    with pytest.raises(ValueError, match=r"10 tensors do not fit: blocks.3.*is missing.*another depth"):
        load_sit(saved(tmp_path / "b.pt", shallow))
    del state["pos_embed"]
    with pytest.raises(ValueError, match="b.pt: pos_embed is missing"):
        load_sit(saved(tmp_path / "b.pt", state))


@pytest.mark.parametrize("kind, table", [("repa", "repa_p1_c32"), ("repa-e", "repae_p1_c32")])
def test_an_exported_sit_has_the_names_shapes_and_wrapper_of_the_published_code(tmp_path, kind, table):
    """Against the tables that were read off REPA's and REPA-E's own modules (golden)."""
    theirs = GOLDEN_SIT["cases"][table]["config"]
    cfg = SiTConfig(**{key: tuple(value) if isinstance(value, list) else value
                       for key, value in theirs.items() if key in SiTConfig.__dataclass_fields__})
    model, mean, std = random_sit(cfg), torch.randn(32), torch.rand(32) + 0.5
    content = {"format": "nanosendvae-sit", "step": 7, "model": model.state_dict(), "ema": model.state_dict(),
               "model_config": asdict(cfg), "args": {},
               "latents": {"mean": mean.tolist(), "std": std.tolist()}}
    saved(tmp_path / "ckpt_0000007.pt", content)
    sit.main(["--export", kind, str(tmp_path / "out" / "sit.pt"), "--ckpt", str(tmp_path)])
    state = torch.load(tmp_path / "out" / "sit.pt", weights_only=True)["ema"]
    assert {key: list(value.shape) for key, value in state.items()} == \
        {key: rule["shape"] for key, rule in GOLDEN_SIT["tensors"][table].items()}
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    if kind == "repa-e":  # as its generate.py reads them
        assert torch.allclose(state["bn.running_var"].rsqrt(), 1 / std)
        assert torch.equal(state["bn.running_mean"], mean)
    beside = torch.load(tmp_path / "out" / "sit-latents-stats.pt", weights_only=True)
    assert torch.allclose(beside["latents_scale"].flatten(), 1 / std)
    assert torch.equal(beside["latents_bias"], mean.view(1, 32, 1, 1))


def test_a_sit_of_reversed_time_or_without_statistics_is_not_exported(tmp_path):
    reversed_time = random_sit(replace(TINY_SIT, z_dims=(), learn_sigma=True)).state_dict()
    with pytest.raises(ValueError, match="t = 0 noise"):
        sit.export("repa", tmp_path / "x.pt", saved(tmp_path / "a.pt", reversed_time))
    with pytest.raises(ValueError, match="no latent statistics for the BatchNorm; use --export repa"):
        sit.export("repa-e", tmp_path / "x.pt", saved(tmp_path / "b.pt", random_sit().state_dict()))
    assert not (tmp_path / "x.pt").exists()


# discriminators

@pytest.mark.parametrize("layout", ["bare", "objective", "va-vae", "ours"])
def test_a_discriminator_loads_from_every_file_that_has_one(tmp_path, small, layout):
    disc = PatchDiscriminator()
    state = disc.state_dict()
    content = {"bare": prefixed("module.", state), "objective": prefixed("discriminator.", state),
               "va-vae": {"state_dict": {**small.state_dict(), **prefixed("loss.discriminator.", state)}},
               "ours": {"format": "nanosendvae-vae", "model": {}, "discriminator": state}}[layout]
    assert same(load_discriminator(saved(tmp_path / "d.pt", content)), state)


def test_train_vae_starts_from_every_init_and_disc_init(tmp_path, small):
    def build(*flags):
        args = train_vae.parse_args(["--vae", "small", "--align", "0", "--lpips", "0", *map(str, flags)])
        return train_vae.build(args, 32)
    disc = PatchDiscriminator()
    write_diffusers(tmp_path / "vae", ".bin")
    saved(tmp_path / "disc.pt", disc.state_dict())
    path = saved(tmp_path / "vae.pt", small.state_dict())
    model, *_, critic = build("--init", path, "--disc-init", tmp_path / "disc.pt")
    assert same(model, small.state_dict()) and same(critic.discriminator, disc.state_dict())
    with pytest.raises(ValueError, match="--vae asks for small, --init .*holds a VAE of 4 channels at 1/8"):
        build("--init", tmp_path / "vae")
    with pytest.raises(ValueError, match="vae.pt: no discriminator in it, a VAE, for --vae or --init"):
        build("--init", path, "--disc-init", path)
    with pytest.raises(ValueError, match="--gan 0 trains without a discriminator"):
        build("--init", path, "--disc-init", tmp_path / "disc.pt", "--gan", 0)
    state = {**disc.state_dict(), "main.3.loc": torch.zeros(1)}
    with pytest.raises(ValueError, match="main.3.loc is unexpected: PatchGAN with ActNorm"):
        load_discriminator(saved(tmp_path / "actnorm.pt", state))
    vae.main(["--export", "diffusers", str(tmp_path / "mine"), "--vae", str(path)])
    model, *_ = build("--init", tmp_path / "mine")
    assert same(model, small.state_dict())


def test_the_published_sd_vae_of_diffusers_is_f8d4():
    """Its config.json says that no level has attention, ours that level 16 would: there is none."""
    about = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512],
             "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
             "down_block_types": ["DownEncoderBlock2D"] * 4}
    found = vae.config_from_diffusers(about)
    assert found.network == VAE_SIZES["f8d4"].network != VAE_SIZES["f16d32"].network
    with torch.device("meta"):
        ours, theirs = (VAE(cfg).state_dict() for cfg in (VAE_SIZES["f8d4"], found))
    assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in theirs.items()}


def test_f8_given_as_f16_is_one_line(tmp_path, monkeypatch):
    """A stand-in for the 335 MB of SD-VAE: both names, two small networks of strides 2 and 4."""
    monkeypatch.setitem(vae.VAE_SIZES, "f8d4", SMALL)
    monkeypatch.setitem(vae.VAE_SIZES, "f16d32", replace(SMALL, ch_mult=(1, 1, 2), z_channels=8))
    path = saved(tmp_path / "a.pt", VAE(SMALL).state_dict())
    args = train_vae.parse_args(["--vae", "f16d32", "--init", str(path)])
    with pytest.raises(ValueError, match="--vae asks for f16d32, --init .*a.pt holds f8d4: give --vae f8d4"):
        train_vae.build(args, 32)
    wide = VAE(replace(SMALL, ch_mult=(1, 1, 2), z_channels=16))
    args.init = str(saved(tmp_path / "b.pt", wide.state_dict()))
    with pytest.raises(ValueError, match="b.pt holds a VAE of 16 channels at 1/4"):
        train_vae.build(args, 32)


# statistics

def as_repa_e(path):
    return saved(path, {"latents_scale": 1 / STD.view(1, 4, 1, 1), "latents_bias": MEAN.view(1, 4, 1, 1)})


STATISTICS = {
    "REPA-E": as_repa_e,
    "VA-VAE": lambda path: saved(path, {"mean": MEAN.view(1, 4, 1, 1), "std": STD.view(1, 4, 1, 1)}),
    "SiT of REPA-E": lambda path: saved(path, {**random_sit().state_dict(), **batch_norm()}),
    "SiT of ours": lambda path: saved(path, {"format": "nanosendvae-sit", "latents": {
        "mean": MEAN.tolist(), "std": STD.tolist()}}),
    "diffusers": lambda path: write_json(path.with_suffix(".json"), {
        "_class_name": "AutoencoderKL", "latent_channels": 4, "scaling_factor": 1.0,
        "latents_mean": MEAN.tolist(), "latents_std": STD.tolist()}),
    "encode.py": lambda path: write_json(path.with_suffix("") / "meta.json", {
        "mean": MEAN.tolist(), "std": STD.tolist()}).parent,
}


def write_json(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("kind", STATISTICS)
def test_every_kind_of_statistics_normalises_as_its_own_code_does(tmp_path, kind):
    z = torch.randn(2, 4, 3, 3)
    mean, std = weights.read_statistics(STATISTICS[kind](tmp_path / "s.pt"), 4)
    expected = (z - MEAN.view(1, 4, 1, 1)) / STD.view(1, 4, 1, 1)
    torch.testing.assert_close(data.normalize_latents(z, mean, std), expected)
    torch.testing.assert_close(data.denormalize_latents(expected, mean, std), z)


def test_a_scalar_scale_is_a_number_or_in_a_diffusers_config(tmp_path):
    z = torch.randn(1, 4, 3, 3)
    config = {"_class_name": "AutoencoderKL", "latent_channels": 4}
    sources = {"0.18215": z * 0.18215,
               write_json(tmp_path / "a.json", config): z * 0.18215,  # diffusers' default
               write_json(tmp_path / "b.json", {**config, "scaling_factor": 0.5, "shift_factor": 0.1}):
                   (z - 0.1) * 0.5}
    for source, expected in sources.items():
        torch.testing.assert_close(data.normalize_latents(z, *weights.read_statistics(source, 4)), expected)
    with pytest.raises(ValueError, match="-1: a scale must be a positive number"):
        weights.read_statistics("-1", 4)


def test_statistics_are_found_beside_the_vae_in_its_publishers_way(tmp_path, small):
    path = saved(tmp_path / "e2e-vavae-400k.pt", small.state_dict())
    assert weights.find_statistics(path, 4) is None
    saved(tmp_path / "latents_stats.pt", {"mean": MEAN + 1, "std": STD})
    assert torch.equal(weights.find_statistics(path, 4)[0], MEAN + 1)
    as_repa_e(tmp_path / "e2e-vavae-400k-latents-stats.pt")  # the one that bears the VAE's name comes first
    mean, std, source = weights.find_statistics(path, 4)
    assert torch.equal(mean, MEAN) and source.endswith("e2e-vavae-400k-latents-stats.pt")
    write_diffusers(tmp_path / "vae", ".bin")
    mean, std, source = weights.find_statistics(tmp_path / "vae", 4)
    assert torch.allclose(std, torch.full((4,), 1 / 0.18215)) and source.endswith("config.json")
    with pytest.raises(ValueError, match="statistics of 4 channels, the VAE's latents have 32.*another VAE"):
        weights.find_statistics(path, 32)


def test_statistics_that_nobody_knows_or_of_another_vae_are_not_taken(tmp_path, small):
    vae.main(["--export", "diffusers", str(tmp_path / "out"), "--vae", str(ours(tmp_path / "vae", small))])
    assert weights.find_statistics(tmp_path / "out", 4) is None  # its config.json holds a scale of 1
    assert weights.statistics_of({"latents_scale": torch.ones(4)}) is None
    (tmp_path / "latents").mkdir()
    about = {"mean": MEAN.tolist(), "std": STD.tolist(), "vae_hash": common.state_hash(small.state_dict())}
    (tmp_path / "latents" / "meta.json").write_text(json.dumps(about))
    flags = ["--vae", str(tmp_path / "vae"), "--latent-stats", str(tmp_path / "latents")]
    vae.main(["--export", "diffusers", str(tmp_path / "a"), *flags])
    assert torch.equal(weights.find_statistics(tmp_path / "a", 4)[1], STD)
    (tmp_path / "latents" / "meta.json").write_text(json.dumps({**about, "vae_hash": "0123456789abcdef"}))
    with pytest.raises(ValueError, match="statistics of the latents of VAE 0123456789ab, this is VAE"):
        vae.main(["--export", "diffusers", str(tmp_path / "b"), *flags])


def test_statistics_may_be_written_over_the_file_that_they_were_read_from(tmp_path):
    """The file is mapped while it is read: writing into it would end the process by a bus error."""
    path = as_repa_e(tmp_path / "s.pt")
    for _ in range(2):
        mean, std = weights.read_statistics(path, 4)
        weights.save_statistics(path, mean, std)
    assert torch.equal(mean, MEAN) and torch.equal(std, STD)
    assert [p.name for p in tmp_path.iterdir()] == ["s.pt"]


def test_a_model_card_shows_the_evaluation_of_its_step_whatever_came_later(tmp_path, small):
    path = ours(tmp_path / "vae", small)
    with open(tmp_path / "vae" / "log.jsonl", "a") as log:
        log.write('\n{"step": 12, "psnr_db": 99.0}\n{"step": 13, "psnr_')  # killed while writing
    vae.main(["--export", "diffusers", str(tmp_path / "out"), "--vae", str(path), "--license", "mit"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "psnr_db: 27.5" in card and "99.0" not in card


def test_statistics_on_the_hub_are_asked_for_beside_the_vae(monkeypatch, tmp_path):
    import huggingface_hub
    stats, asked = as_repa_e(tmp_path / "s.pt"), []

    def download(repo, file):
        asked.append(file)
        if "latents" not in file:
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network")
        return str(stats)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = weights.find_statistics("hf://REPA-E/sdvae/sdvae-f8d4.pt", 4)
    assert asked == ["sdvae-f8d4-latents-stats.pt"] and torch.equal(found[0], MEAN)


# export

def ours(folder, small):
    """A checkpoint of train_vae.py, with the log of its run beside it."""
    folder.mkdir(exist_ok=True)
    rows = [{"step": 1, "psnr_db": 11.0}, {"step": 7, "loss": 1.0},
            {"step": 9, "psnr_db": 27.5, "align_clean": 0.3}]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return saved(folder / "ckpt_0000009.pt", {
        "format": "nanosendvae-vae", "step": 9, "images_seen": 9216, "model": small.state_dict(), "ema": None,
        "model_config": asdict(small.config), "teacher": "vit_base_patch14_dinov2.lvd142m",
        "versions": {"torch": "2.9", "commit": "abc"},
        "args": {"init": "hf://hustvl/vavae/a.pt", "data": "data/imagenet/train", "image_size": 256,
                 "lr": 3e-4}})


@torch.no_grad()
def test_diffusers_loads_our_export_and_encodes_and_decodes_alike(tmp_path, small):
    diffusers = pytest.importorskip("diffusers")
    ours(tmp_path / "vae", small)
    vae.main(["--export", "diffusers", str(tmp_path / "out"), "--vae", str(tmp_path / "vae"),
              "--license", "mit", "--latent-stats", str(as_repa_e(tmp_path / "s.pt"))])
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out").eval()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    posterior, found = small.encode(x), theirs.encode(x).latent_dist
    torch.testing.assert_close(found.mean, posterior.mean, atol=3e-5, rtol=0)
    torch.testing.assert_close(found.logvar, posterior.logvar, atol=3e-5, rtol=0)
    z = posterior.mean
    torch.testing.assert_close(theirs.decode(z).sample, small.decode(z), atol=6e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(theirs.config.latents_std), STD)
    back = load_vae(tmp_path / "out")  # with the very weights: the hash of the latents' VAE stays
    assert common.state_hash(back.state_dict()) == common.state_hash(small.state_dict())
    assert torch.equal(weights.find_statistics(tmp_path / "out", 4)[0], MEAN)
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("license: mit",
                 "start weights: hf://hustvl/vavae/a.pt; their licence: see https://huggingface.co/hustvl",
                 "--lr 0.0003", "data: data/imagenet/train, 256 px, 9,216 seen", "psnr_db: 27.5",
                 "align_clean: 0.3"):
        assert line in card, line


def test_diffusers_own_folder_comes_back_as_it_was(tmp_path):
    """Save with diffusers, load here, export: the same tensors and the scalar scale at its usual place."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), scaling_factor=0.18215)
    theirs.save_pretrained(tmp_path / "theirs")
    vae.export("diffusers", tmp_path / "out", tmp_path / "theirs")
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out")
    assert same(again, theirs.state_dict())
    assert again.config.scaling_factor == pytest.approx(0.18215) and again.config.latents_std is None
    assert "licence: not recorded" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind, name", [("safetensors", "a.safetensors"), ("ldm", "a.pt")])
def test_single_file_exports_hold_the_published_names_and_bring_their_statistics(tmp_path, small, kind, name):
    path = ours(tmp_path / "vae", small)
    vae.export(kind, tmp_path / "out" / name, path, as_repa_e(tmp_path / "s.pt"))
    assert weights.read_file(tmp_path / "out" / name).keys() == small.state_dict().keys()
    assert same(load_vae(tmp_path / "out" / name), small.state_dict())
    assert torch.equal(weights.find_statistics(tmp_path / "out" / name, 4)[0], MEAN)


def test_what_diffusers_cannot_hold_is_said(tmp_path):
    with pytest.raises(ValueError, match="stem 8.*--export safetensors"):
        vae.diffusers_config(VAE_SIZES["tiny"], None)


# sampling from published pairs

def draw(ckpt, out, *flags):
    return sample.main(["--ckpt", str(ckpt), "--out", str(out), "--device", "cpu", "--dtype", "fp32",
                        "--num", "3", "--sampler", "euler", "--steps", "3", "--npz", *map(str, flags)])


@pytest.mark.parametrize("pair", ["REPA-E", "willisma", "REPA"])
def test_a_published_sit_and_vae_sample_as_their_own_code_would(tmp_path, small, pair):
    """By hand: the network in its own time direction, Euler, z / scale + bias, decode."""
    cfg = replace(TINY_SIT, z_dims=(), learn_sigma=True) if pair == "willisma" else TINY_SIT
    theirs, scale, bias, flags = random_sit(cfg), 1 / STD, MEAN, ()
    ckpt, vae_path = tmp_path / "last.pt", saved(tmp_path / "vae.pt", small.state_dict())
    if pair == "REPA-E":
        saved(ckpt, {"ema": {**theirs.state_dict(), **batch_norm()}, "model": {}, "args": Namespace()})
    else:
        saved(ckpt, theirs.state_dict())
        scale, bias, flags = torch.full((4,), 0.18215), torch.zeros(4), ("--latent-stats", "0.18215")
    draw(ckpt, tmp_path / "s", "--vae", vae_path, *flags, "--cfg", "1.5")
    y = torch.arange(3)
    sign, turn = (-1, lambda t: 1 - t) if pair == "willisma" else (1, lambda t: t)

    def velocity(z, t):
        both = [theirs(z, turn(t), labels) for labels in (y, torch.full((3,), 3))]
        return sign * (both[1] + 1.5 * (both[0] - both[1]))
    with torch.no_grad():
        noise = common.noise_for((4, 8, 8), range(3), torch.device("cpu"), 0, "sample")
        z = sample_ode(velocity, noise, 3)
        x = small.decode(z / scale.view(1, 4, 1, 1) + bias.view(1, 4, 1, 1))
    found = np.load(tmp_path / "s" / "samples.npz")["arr_0"].astype(int)
    assert np.abs(found - data.to_uint8(x).permute(0, 2, 3, 1).numpy()).max() <= 1
    protocol = json.loads((tmp_path / "s" / "protocol.json").read_text())
    assert protocol["vae_hash"] == common.state_hash(small.state_dict())
    assert protocol["latent_statistics"] == (f"inside {ckpt}" if pair == "REPA-E" else "0.18215")


def test_a_pair_that_does_not_belong_together_is_an_error_that_names_both(tmp_path, small, monkeypatch):
    ckpt = saved(tmp_path / "sit.pt", random_sit().state_dict())
    path = saved(tmp_path / "vae.pt", small.state_dict())
    with pytest.raises(ValueError, match="sit.pt is a published SiT, which does not name its VAE"):
        draw(ckpt, tmp_path / "s")
    with pytest.raises(ValueError, match="no latent statistics in .*sit.pt or beside .*vae.pt.*0.18215"):
        draw(ckpt, tmp_path / "s", "--vae", path)
    as_repa_e(tmp_path / "vae-latents-stats.pt")
    inside = {**random_sit().state_dict(), **batch_norm(MEAN, 1.2 * STD)}
    both = r"[0-9a-f]{12} of the latents inside .*bn.pt are not [0-9a-f]{12} of .*vae-latents-stats.pt"
    with pytest.raises(ValueError, match=both):
        draw(saved(tmp_path / "bn.pt", inside), tmp_path / "s", "--vae", path)
    draw(saved(tmp_path / "bn.pt", {**inside, **batch_norm()}), tmp_path / "s", "--vae", path)
    wide = saved(tmp_path / "wide.pt", VAE(replace(SMALL, z_channels=8)).state_dict())
    with pytest.raises(ValueError, match="sit.pt takes latents of 4 channels, .*wide.pt makes 8"):
        draw(ckpt, tmp_path / "s", "--vae", wide, "--latent-stats", "0.18215")


@pytest.fixture()
def encoded(tmp_path, small):
    """A SiT of ours on the latents of 12 pictures: (SiT, folder of latents)."""
    rng = np.random.default_rng(0)
    for i in range(12):
        (tmp_path / "pictures" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((16, 16)).save(
            tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png")
    path = saved(tmp_path / "vae.pt", small.state_dict())
    encode.main(["--data", str(tmp_path / "pictures"), "--vae", str(path), "--image-size", "16",
                 "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "latents")])
    meta = json.loads((tmp_path / "latents" / "meta.json").read_text())
    model = random_sit()
    ckpt = saved(tmp_path / "sit.pt", {
        "format": "nanosendvae-sit", "step": 1, "model": model.state_dict(), "ema": model.state_dict(),
        "model_config": asdict(TINY_SIT), "latents": meta,
        "args": {"latents": str(tmp_path / "latents"), "label_dropout": 0.1}})
    return ckpt, tmp_path / "latents"


def test_sanity_decodes_the_stored_latents_and_notices_others(encoded, tmp_path, capsys):
    ckpt, latents = encoded
    draw(ckpt, tmp_path / "s", "--sanity")
    assert "dB between latents decoded through the statistics and vae(x)" in capsys.readouterr().out
    moments = np.load(latents / "moments-00000.npy")
    np.save(latents / "moments-00000.npy", np.roll(moments, 1, axis=0))  # the latents of other pictures
    with pytest.raises(ValueError, match="sanity: .* dB.*want at least 40 dB"):
        draw(ckpt, tmp_path / "s", "--sanity")
    content = torch.load(ckpt, weights_only=True)
    content["latents"]["std"] = [100 * s for s in content["latents"]["std"]]
    with pytest.raises(ValueError, match="sanity: .*rms 0.01.*statistics"):
        draw(saved(ckpt, content), tmp_path / "s", "--sanity", tmp_path / "pictures")
    assert not (tmp_path / "s").exists()


def test_our_checkpoints_use_their_own_statistics_only(encoded, tmp_path):
    with pytest.raises(ValueError, match="carries those it was trained with; leave the flag out"):
        draw(encoded[0], tmp_path / "s", "--latent-stats", "0.18215")


# bad files

class Code:
    """A pickle that runs a command when it is loaded the unsafe way."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(tmp_path, small):
    for content in (Code(f"touch {tmp_path}/ran"), {"args": Namespace(lr=Code(f"touch {tmp_path}/ran")),
                                                    "vae": small.state_dict()}):
        path = saved(tmp_path / "a.pt", content)
        for load in (load_vae, load_sit, load_discriminator):
            with pytest.raises(ValueError, match=r"a.pt: holds a pickled \w+.system, not loaded because it"):
                load(path)
    assert not (tmp_path / "ran").exists()


def write(path, content):
    path.write_bytes(content)
    return path


FIRST = "encoder.conv_in.weight"
TOKENS = {"x_embedder.proj.weight": torch.ones(1)}  # a SiT's key

# what is wrong: (a function of a folder and a good state dict that writes the file, the message)
BAD_FILES = {
    "missing": (lambda dir, state: dir / "none.pt", "none.pt: no such file"),
    "folder": (lambda dir, state: dir, "a folder with neither ckpt_.* nor diffusion_pytorch_model"),
    "empty": (lambda dir, state: write(dir / "a.pt", b""), "a.pt: the file is empty"),
    "html": (lambda dir, state: write(dir / "a.pt", b"\n<!DOCTYPE html><html>Sign in"), "a.pt: a web page"),
    "git lfs": (lambda dir, state: write(dir / "a.pt", b"version https://git-lfs.github.com/spec/v1"), "LFS"),
    "text": (lambda dir, state: write(dir / "a.pt", b"these are no weights"), "damaged, cut off or no"),
    "cut off": (lambda dir, state: write(dir / "b.pt", saved(dir / "a.pt", state).read_bytes()[:-5000]),
                "b.pt: damaged"),
    "safetensors": (lambda dir, state: write(dir / "a.safetensors", b"\x80\0\0\0\0\0\0\0{"), "damaged"),
    "object": (lambda dir, state: saved(dir / "a.pt", {**state, "args": np.random.default_rng}),
               "holds a pickled numpy.random"),
    "list": (lambda dir, state: saved(dir / "a.pt", [1, 2]), "no VAE in it, a list"),
    "statistics": (lambda dir, state: saved(dir / "a.pt", {"latents_scale": torch.ones(1)}),
                   "no VAE in it, latent statistics, for --latent-stats"),
    "discriminator": (lambda dir, state: saved(dir / "a.pt", {"main.0.bias": torch.ones(1)}), "--disc-init"),
    "SiT": (lambda dir, state: saved(dir / "a.pt", TOKENS), "no VAE in it, SiT weights, for --ckpt"),
    "SiT checkpoint": (lambda dir, state: saved(dir / "a.pt", {"ema": TOKENS, "steps": 5}), "SiT weights"),
    "our SiT": (lambda dir, state: saved(dir / "a.pt", {"format": "nanosendvae-sit", "model": TOKENS}),
                "a nanosendvae-sit checkpoint, not a VAE"),
    "something": (lambda dir, state: saved(dir / "a.pt", {"w": torch.ones(1)}), "VAE in it, its keys are w"),
    "gray images": (lambda dir, state: saved(dir / "a.pt", {**state, FIRST: torch.zeros(32, 1, 3, 3)}),
                    r"from small.*encoder.conv_in.weight is \(32, 1, 3, 3\), not \(32, 3, 3, 3\)"),
    "missing key": (lambda dir, state: saved(dir / "a.pt", {key: state[key] for key in list(state)[1:]}),
                    "from small it differs in 1 tensors: encoder.conv_in.weight is missing: keys were lost"),
    "half a VAE": (lambda dir, state: saved(dir / "a.pt", {key: value for key, value in state.items()
                                                           if "decoder" not in key}), "VAE without decoder"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_without_a_vae_is_one_clear_line(tmp_path, small, kind):
    make, message = BAD_FILES[kind]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_vae(make(tmp_path, small.state_dict()))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("content, message", [
    (lambda small: small.state_dict(), "no SiT in it, a VAE, for --vae or --init"),
    (lambda small: {"format": "nanosendvae-vae", "model": small.state_dict()}, "vae checkpoint, not a SiT"),
    (lambda small: {"patch_embed.proj.weight": torch.ones(1)}, "a vision transformer, for --teacher-weights"),
    (lambda small: [1], "no SiT in it, a list"),
    (lambda small: {"ema": None, "model": {"pos_embed": 0}}, "holds no EMA weights; use --weights raw")])
def test_a_file_without_a_sit_is_one_clear_line(tmp_path, small, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_sit(saved(tmp_path / "a.pt", content(small)))
    assert "\n" not in str(caught.value)


def test_damaged_diffusers_folders_and_missing_weights_are_one_clear_line(tmp_path):
    theirs = write_diffusers(tmp_path / "vae", ".bin")
    (tmp_path / "vae" / "config.json").write_text("<html>")
    with pytest.raises(ValueError, match="vae/config.json: not readable as JSON"):
        load_vae(tmp_path / "vae")
    half = {key: value for key, value in theirs.items() if key.startswith("encoder")}
    with pytest.raises(ValueError, match="half.pt.*a VAE without decoder"):
        load_vae(saved(tmp_path / "half.pt", half))
    bare = saved(tmp_path / "sit.pt", {"ema": random_sit().state_dict()})
    with pytest.raises(ValueError, match="holds no raw weights; use --weights ema"):
        load_sit(bare, "raw")


def test_exported_safetensors_may_be_read_by_whom_other_files_may(tmp_path):
    weights.save_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    common.save_checkpoint(tmp_path / "a.pt", {"x": torch.ones(1)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "a.pt").stat().st_mode


def test_an_interrupted_command_says_so_without_a_traceback(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        common.cli(main)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_guidance_interval_upside_down_is_refused():
    with pytest.raises(ValueError, match="--cfg-interval 0.8 0.2: want 0 <= LO <= HI <= 1"):
        sample.main(["--cfg-interval", "0.8", "0.2"])


def test_no_permission_is_one_clear_line(tmp_path, small):
    path = saved(tmp_path / "a.pt", small.state_dict())
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # root may read everything: be nobody for a moment
        os.seteuid(65534)
    try:
        for load in (load_vae, load_sit, load_discriminator):
            with pytest.raises(ValueError, match="a.pt: no permission to read it"):
                load(path)
    finally:
        os.seteuid(user)
