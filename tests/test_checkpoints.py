"""Weight files: ours (newest, damaged, pruned), published layouts, strictness, statistics, what is refused.

    python -m pytest tests/test_checkpoints.py        about 20 s on 2 cores, no network

The published layouts are written here, small, as the published codes lay them out (tests/golden/README.md
says what of that was run); the published files themselves were not at hand.
"""
import json
import os
import re
from argparse import Namespace
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import prescribed, read_fixture
from small import (SIT_SIZE, VAE_CONFIG, save, small_mapper, small_sit, small_sit_checkpoint, small_vae,
                   small_vae_checkpoint)

import checkpoints
import common
import data
import sample
import sit
import vae
from checkpoints import (load_discriminator, load_mapper, load_sit, load_vae, newest, read_statistics,
                         resolve, statistics_for)
from losses import PatchDiscriminator
from sit import SIT_SIZES, SiT, SiTConfig, sample_ode
from vae import VAE, VAE_SIZES

MEAN, STD = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([0.25, 2.0, 4.0, 0.5])
VAE_STATE, SIT_STATE = small_vae().state_dict(), small_sit().state_dict()
GOLDEN_VAE, VAE_ARCHIVE = read_fixture("vae")
GOLDEN_CASE = GOLDEN_VAE["cases"]["tiny_diffusers"]


@pytest.fixture(autouse=True)
def small_sizes_are_known(monkeypatch):
    """As published files need it."""
    monkeypatch.setitem(vae.VAE_SIZES, "small", VAE_CONFIG)
    monkeypatch.setitem(sit.SIT_SIZES, "small/1", SIT_SIZE)


def same(model, state):
    return checkpoints.state_hash(model.state_dict()) == checkpoints.state_hash(state)


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def without(state, part):
    return {key: value for key, value in state.items() if part not in key}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def batch_norm(mean=MEAN, std=STD):
    return {"bn.running_mean": mean, "bn.running_var": std ** 2, "bn.num_batches_tracked": torch.tensor(9)}


def repa_e_checkpoint(prefix=""):
    """REPA-E's training checkpoint: all its keys, an argparse.Namespace, BatchNorm in the SiT."""
    raw, ema = ({**small_sit(seed).state_dict(), **batch_norm(MEAN + seed - 2)} for seed in (1, 2))
    return {"model": prefixed(prefix, raw), "ema": prefixed(prefix, ema), "vae": prefixed(prefix, VAE_STATE),
            "discriminator": prefixed(prefix, {"main.0.weight": torch.zeros(64, 3, 4, 4)}),
            "opt": {"state": {}, "param_groups": []}, "opt_vae": {}, "opt_disc": {},
            "args": Namespace(vae="f16d32", path_type="linear", cfg_prob=0.1), "steps": 400000}


# our checkpoints

def test_our_vae_loads_with_its_own_configuration_and_its_ema_if_it_has_one(tmp_path):
    raw, ema = (small_vae(seed, stem=2, z_channels=3, norm_groups=16) for seed in (0, 1))  # not in VAE_SIZES
    path = small_vae_checkpoint(tmp_path, raw)
    loaded = load_vae(path)
    assert same(loaded, raw.state_dict()) and loaded.config == raw.config and not loaded.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    small_vae_checkpoint(tmp_path, raw, ema=ema.state_dict())
    assert same(load_vae(tmp_path), ema.state_dict())
    assert checkpoints.read_own(path)["args"]["image_size"] == 16
    assert checkpoints.read_own(save(tmp_path / "bare.pt", VAE_STATE)) == {}


def test_our_sit_loads_its_ema_or_raw_weights(tmp_path):
    raw, ema = small_sit(1, z_dims=(5,)), small_sit(2, z_dims=(5,))
    small_sit_checkpoint(tmp_path, raw, ema=ema.state_dict())
    assert same(load_sit(tmp_path), ema.state_dict()) and load_sit(tmp_path).config == raw.config
    assert same(load_sit(tmp_path, "raw"), raw.state_dict())


def test_the_mapper_loads_also_from_before_its_batch_norm_moved_to_the_trainer(tmp_path):
    mapper = small_mapper(depth=2)
    for more in ({}, {"bn_group": 32}):
        small_vae_checkpoint(tmp_path, mapper=mapper, mapper_config={**asdict(mapper.config), **more})
        loaded = load_mapper(tmp_path)
        assert same(loaded, mapper.state_dict()) and loaded.config == mapper.config and not loaded.training


def test_the_newest_readable_checkpoint_counts_by_number_and_damaged_ones_are_named(tmp_path, capsys):
    for step in (7, 9_999_999, 10_000_000):
        checkpoints.save(tmp_path, step, {"format": checkpoints.VAE, "step": step}, keep=9)
    assert (tmp_path / "ckpt_0000007.pt").is_file() and "ckpt_10000000.pt" in resolve(tmp_path)
    write(tmp_path / "ckpt_10000000.pt", (tmp_path / "ckpt_10000000.pt").read_bytes()[:-200])
    save(tmp_path / "ckpt_10000001.pt", [1])
    write(tmp_path / "ckpt_final.pt", b"not numbered")
    assert newest(tmp_path, checkpoints.VAE)["path"] == resolve(tmp_path) == str(tmp_path / "ckpt_9999999.pt")
    printed = capsys.readouterr().out
    assert "ckpt_10000000.pt" in printed and "ckpt_10000001.pt" in printed and "ckpt_9999999" not in printed


def test_without_a_readable_checkpoint_there_is_no_newest(tmp_path, capsys):
    assert newest(tmp_path, checkpoints.SIT) is None and newest(tmp_path / "none", checkpoints.SIT) is None
    assert capsys.readouterr().out == ""
    write(tmp_path / "ckpt_0000001.pt", b"PK")
    assert newest(tmp_path, checkpoints.SIT) is None and "none of the checkpoints" in capsys.readouterr().out


def test_saving_keeps_the_newest_up_to_its_step_and_all_damaged_ones_after_it(tmp_path):
    for step in (10, 20, 30, 40):
        checkpoints.save(tmp_path, step, {"step": step}, keep=9)
    checkpoints.save(tmp_path, 25, {"step": 25}, keep=2)  # 30 and 40 were damaged, or it would not be 25 now
    assert sorted(checkpoints.checkpoints_in(tmp_path)) == [20, 25, 30, 40]


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    for name in ("a.pt", "a.safetensors"):
        checkpoints.save_file(tmp_path / name, {"x": torch.ones(2)})
        with pytest.raises(Exception):
            checkpoints.save_file(tmp_path / name, {"x": torch.zeros(2), "y": lambda: 0})
        assert torch.equal(checkpoints.read_file(tmp_path / name)["x"], torch.ones(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "a.safetensors"]


# published VAEs

PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")  # DDP, torch.compile
TRAINING_PARTS = {key: torch.zeros(2) for key in (
    "loss.logvar", "loss.discriminator.main.0.weight", "loss.perceptual_loss.lin0.model.1.weight",
    "foundation_model.model.cls_token", "linear_proj.weight", "model_ema.decay")}
VAE_LAYOUTS = {
    **{f"bare {prefix}": prefixed(prefix, VAE_STATE) for prefix in PREFIXES},  # SD-VAE, E2E-VAE, Send-VAE
    "VA-VAE and LDM": {"state_dict": {**VAE_STATE, **TRAINING_PARTS}, "global_step": 7},
    "MAR's kl16": {"model": VAE_STATE},
    "averaged": {"ema": VAE_STATE, "model": prefixed("x", VAE_STATE), "epoch": 5},
    "model_state_dict": {"model_state_dict": VAE_STATE, "args": Namespace(lr=1e-4)},
    "REPA-E": repa_e_checkpoint("_orig_mod."),
}


@pytest.mark.parametrize("layout", VAE_LAYOUTS)
def test_a_published_vae_loads_from_every_layout(tmp_path, layout):
    loaded = load_vae(save(tmp_path / "vae.ckpt", VAE_LAYOUTS[layout]))
    assert same(loaded, VAE_STATE) and loaded.config == VAE_CONFIG and not loaded.training


def test_half_precision_other_latent_channels_and_safetensors_load(tmp_path):
    model = small_vae(z_channels=6, embed_dim=5).half()
    checkpoints.save_file(tmp_path / "vae.safetensors", model.state_dict())
    loaded = load_vae(tmp_path / "vae.safetensors")
    assert loaded.config == model.config and same(loaded, model.float().state_dict())


def write_diffusers(folder, name="diffusion_pytorch_model.bin", old_names=False, config=None):
    """Write the golden diffusers VAE into `folder`, config.json included; return its state dict."""
    theirs = {key: torch.from_numpy(prescribed(rule, VAE_ARCHIVE, key))
              for key, rule in GOLDEN_VAE["tensors"][GOLDEN_CASE["tensors"]].items()}
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        if old_names:
            theirs = {key.replace(new, old): value for key, value in theirs.items()}
    checkpoints.save_file(folder / name, theirs)
    write(folder / "config.json", GOLDEN_CASE["config"] if config is None else config)
    return theirs


@pytest.mark.parametrize("name, old_names", [("diffusion_pytorch_model.bin", True),
                                             ("diffusion_pytorch_model.safetensors", False)])
def test_a_diffusers_folder_loads_with_the_architecture_of_its_config(tmp_path, monkeypatch, name, old_names):
    """Its widths are those of none of VAE_SIZES: the weights alone need a size that we know."""
    theirs = write_diffusers(tmp_path / "vae", name, old_names)
    loaded = load_vae(tmp_path / "vae")
    assert same(loaded, checkpoints.from_diffusers(theirs)) and loaded.config.ch_mult == (1, 2, 3, 3)
    assert same(load_vae(tmp_path / "vae" / name), loaded.state_dict())
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(ValueError, match="closest"):
        load_vae(tmp_path / "vae" / name)
    monkeypatch.setitem(vae.VAE_SIZES, "golden", loaded.config)
    assert same(load_vae(tmp_path / "vae"), loaded.state_dict())


def test_the_published_sd_vae_of_diffusers_is_f8d4():
    """Its config.json says that no level has attention, ours that level 16 would: there is none."""
    config = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
              "norm_num_groups": 32, "down_block_types": ["DownEncoderBlock2D"] * 4}
    with torch.device("meta"):
        ours, theirs = VAE(VAE_SIZES["f8d4"]), VAE(checkpoints.vae_config_from_diffusers(config))
    assert checkpoints.differences(ours.state_dict(), theirs.state_dict()) == []


@pytest.mark.parametrize("layout", ["bare", "objective", "VA-VAE", "REPA-E", "ours"])
def test_a_discriminator_loads_from_every_file_that_has_one(tmp_path, layout):
    state = PatchDiscriminator().state_dict()
    content = {"bare": prefixed("module.", state), "objective": prefixed("discriminator.", state),
               "VA-VAE": {"state_dict": {**VAE_STATE, **prefixed("loss.discriminator.", state)}},
               "REPA-E": {**repa_e_checkpoint(), "discriminator": prefixed("_orig_mod.", state)},
               "ours": {"format": checkpoints.VAE, "model": VAE_STATE, "discriminator": state}}[layout]
    loaded = load_discriminator(save(tmp_path / "d.pt", content))
    assert same(loaded, state) and loaded.training


# published SiTs

def as_older_repa(state):
    """Its older files call the blocks behind the projector decoder_blocks and count them from 0."""
    return {re.sub(r"^blocks\.([23])", lambda match: f"decoder_blocks.{int(match[1]) - 2}", key): value
            for key, value in state.items()}


SIT_LAYOUTS = {  # (changes of the configuration, content of the file from two networks)
    "REPA's last.pt": ({"z_dims": (8, 5), "qk_norm": True}, lambda ema, raw: ema.state_dict()),
    "REPA's older last.pt": ({}, lambda ema, raw: as_older_repa(ema.state_dict())),
    "REPA": ({"encoder_depth": 3}, lambda ema, raw: {
        "ema": ema.state_dict(), "model": prefixed("module.", raw.state_dict()), "opt": {}, "steps": 400000,
        "args": Namespace(path_type="linear", prediction="v", cfg_prob=0.1, encoder_depth=3)}),
    "REPA-E": ({}, lambda ema, raw: {**repa_e_checkpoint(), "ema": {**ema.state_dict(), **batch_norm()},
                                     "model": prefixed("_orig_mod.", {**raw.state_dict(), **batch_norm()})}),
    "willisma": ({"learn_sigma": True, "reversed_time": True}, lambda ema, raw: ema.state_dict()),
    "without label dropout": ({"num_classes": 10, "use_null": False}, lambda ema, raw: {
        "ema": ema.state_dict(), "model": raw.state_dict(), "args": Namespace(cfg_prob=0.0)}),
    "one class without label dropout": ({"num_classes": 1, "use_null": False}, lambda ema, raw: {
        "ema": ema.state_dict(), "model": raw.state_dict(), "args": {"cfg_prob": 0}}),
}


@pytest.mark.parametrize("layout", SIT_LAYOUTS)
def test_a_published_sit_loads_from_every_layout(tmp_path, layout):
    changes, lay_out = SIT_LAYOUTS[layout]
    ema, raw = small_sit(1, **changes), small_sit(2, **changes)
    content = lay_out(ema, raw)
    path = save(tmp_path / "last.pt", content)
    loaded = load_sit(path)
    assert same(loaded, ema.state_dict()) and loaded.config == ema.config and not loaded.training
    assert same(load_sit(path, "raw"), (raw if "model" in content else ema).state_dict())


@pytest.mark.parametrize("name, encoder_depth", [("S/4", 4), ("B/2", 4), ("L/1", 8), ("XL/2", 8)])
def test_the_tensors_tell_a_published_size_with_repas_encoder_depth(name, encoder_depth):
    cfg = SiTConfig(z_dims=(768,), encoder_depth=encoder_depth, **SIT_SIZES[name])
    with torch.device("meta"):
        assert checkpoints.published_sit_config(SiT(cfg).state_dict(), {}, "last.pt") == cfg


# statistics

def as_repa_e(path, mean=MEAN):
    return save(path, {"latents_scale": 1 / STD.view(1, 4, 1, 1), "latents_bias": mean.view(1, 4, 1, 1)})


LISTS = {"mean": MEAN.tolist(), "std": STD.tolist()}
DIFFUSERS = {"_class_name": "AutoencoderKL", "latent_channels": 4}
STATISTICS = {
    "REPA-E": lambda dir: as_repa_e(dir / "s.pt"),
    "VA-VAE": lambda dir: save(dir / "s.pt", {"mean": MEAN.view(1, 4, 1, 1), "std": STD.view(1, 4, 1, 1)}),
    "SiT of REPA-E": lambda dir: save(dir / "s.pt", {**SIT_STATE, **batch_norm()}),
    "checkpoint of REPA-E": lambda dir: save(dir / "s.pt", repa_e_checkpoint("module.")),
    "SiT of ours": lambda dir: small_sit_checkpoint(dir, latents=LISTS).parent,
    "diffusers": lambda dir: write(dir / "s.json", {
        **DIFFUSERS, "scaling_factor": 1.0, "latents_mean": MEAN.tolist(), "latents_std": STD.tolist()}),
    "encode.py": lambda dir: write(dir / "meta.json", LISTS).parent,
}


@pytest.mark.parametrize("layout", STATISTICS)
def test_statistics_of_every_layout_normalise_as_their_own_code_does(tmp_path, layout):
    z = torch.randn(2, 4, 3, 3)
    mean, std = read_statistics(STATISTICS[layout](tmp_path), 4)
    expected = (z - MEAN.view(1, 4, 1, 1)) / STD.view(1, 4, 1, 1)
    torch.testing.assert_close(data.normalize_latents(z, mean, std), expected)
    torch.testing.assert_close(data.denormalize_latents(expected, mean, std), z)


def test_a_scalar_scale_is_a_number_or_in_a_diffusers_config(tmp_path):
    z = torch.randn(1, 4, 3, 3)
    sources = {"0.18215": z * 0.18215, "2": z * 2, "1e-1": z * 0.1,
               write(tmp_path / "a.json", DIFFUSERS): z * 0.18215,  # diffusers' default
               write(tmp_path / "b.json", {**DIFFUSERS, "scaling_factor": 0.5, "shift_factor": 0.1}):
                   (z - 0.1) * 0.5}
    for source, expected in sources.items():
        torch.testing.assert_close(data.normalize_latents(z, *read_statistics(source, 4)), expected)


def test_statistics_are_those_of_the_flag_or_inside_the_sits_file_never_what_lies_beside(tmp_path):
    ckpt, beside = tmp_path / "sit.pt", as_repa_e(tmp_path / "sit-latents-stats.pt", MEAN + 1)
    inside = {"ema": {**SIT_STATE, **batch_norm()}}
    mean, std, source = statistics_for(ckpt, inside, "abc", 4)
    assert torch.equal(mean, MEAN) and torch.allclose(std, STD) and source == f"inside {ckpt}"
    mean, _, source = statistics_for(ckpt, inside, "abc", 4, beside)
    assert torch.equal(mean, MEAN + 1) and source == str(beside)
    with pytest.raises(ValueError, match="--latent-stats"):
        statistics_for(ckpt, SIT_STATE, "abc", 4)


def test_statistics_may_be_written_over_the_file_that_they_were_read_from(tmp_path):
    path = as_repa_e(tmp_path / "s.pt")
    mean, std = read_statistics(path, 4)
    checkpoints.save_file(path, {"latents_scale": torch.ones(4), "latents_bias": torch.zeros(4)})
    assert torch.equal(mean, MEAN) and torch.equal(std, STD)
    assert torch.equal(read_statistics(path, 4)[1], torch.ones(4))


# the hub, and sampling from published pairs

def test_a_file_on_the_hub_is_fetched(tmp_path, monkeypatch):
    import huggingface_hub
    hub = {("owner/repo", "sub/vae.pt"): save(tmp_path / "vae.pt", VAE_STATE)}
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: hub[repo, name])
    assert same(load_vae("hf://owner/repo/sub/vae.pt"), VAE_STATE)


@pytest.mark.parametrize("pair", ["REPA-E", "willisma"])
def test_a_published_sit_and_vae_sample_as_their_own_code_would(tmp_path, pair):
    """By hand: the network in its own time direction, guidance, Euler, z / scale + bias, decode."""
    if pair == "REPA-E":
        theirs, sign, scale, bias, flags = small_sit(), 1, 1 / STD, MEAN, []
        content = {"ema": {**theirs.state_dict(), **batch_norm()}, "model": {}, "args": Namespace()}
    else:  # t = 0 is noise, v = z - eps, z' = 0.18215 z; the second half of the channels is not used
        theirs, sign, scale, bias = small_sit(learn_sigma=True), -1, torch.full((4,), 0.18215), torch.zeros(4)
        content, flags = theirs.state_dict(), ["--latent-stats", "0.18215"]
    ckpt, vae_path = save(tmp_path / "last.pt", content), save(tmp_path / "vae.pt", VAE_STATE)
    flags += ["--ckpt", str(ckpt), "--vae", str(vae_path), "--out", str(tmp_path / "s"), "--sampler", "euler"]
    sample.main([*flags, "--device", "cpu", "--dtype", "fp32", "--num", "3", "--steps", "3", "--cfg", "1.5",
                 "--npz"])
    y, null_label = torch.arange(3), torch.full((3,), 3)

    def velocity(z, t, _t_step):
        t = torch.full((3,), t if sign == 1 else 1 - t)
        cond, null = theirs(z, t, y), theirs(z, t, null_label)
        return sign * (null + 1.5 * (cond - null))
    with torch.no_grad():
        noise = common.noise_for((4, 8, 8), range(3), torch.device("cpu"), 0, "sample")
        z = sample_ode(velocity, noise, 3)
        x = small_vae().decode(z / scale.view(1, 4, 1, 1) + bias.view(1, 4, 1, 1))
    drawn = np.load(tmp_path / "s" / "samples.npz")["arr_0"].astype(int)
    assert np.abs(drawn - data.to_uint8(x).permute(0, 2, 3, 1).numpy()).max() <= 1
    source = f"inside {ckpt}" if pair == "REPA-E" else "0.18215"
    assert f'"latent_statistics": "{source}"' in (tmp_path / "s" / "protocol.json").read_text()


# what is refused

class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (Code(), {"args": Namespace(lr=Code()), "vae": VAE_STATE}):
        for load in (load_vae, load_sit, load_discriminator, checkpoints.read_own):
            with pytest.raises(ValueError, match="could run code.*system"):
                load(save("a.pt", content))
    assert os.listdir() == ["a.pt"]


def given(load, content, name="a.pt"):
    """Load a file of this content: bytes, or what torch.save writes."""
    writer = write if isinstance(content, bytes) else save
    return lambda dir: load(writer(dir / name, content))


def ours(load, make=small_vae_checkpoint, **changes):
    return lambda dir: load(make(dir, **changes))


def statistics(content, channels=1, vae_hash=None):
    return lambda dir: read_statistics(write(dir / "s.json", content), channels, vae_hash)


GRAY = {**VAE_STATE, "encoder.conv_in.weight": torch.zeros(32, 1, 3, 3)}
SWIGLU = prefixed("module.", {**SIT_STATE, "blocks.0.mlp.w12.weight": MEAN})
ACTNORM = {**PatchDiscriminator().state_dict(), "main.3.loc": MEAN}
COSINE, NOISE = Namespace(path_type="cosine"), {"path_type": "Linear", "prediction": "noise"}
NEWER = dict(mapper=small_mapper(), mapper_config={"novel": 1})
# (what is wrong, call with an empty folder, exception, one key word of its message)
REFUSALS = [
    ("no file", lambda dir: load_vae(dir / "none.pt"), FileNotFoundError, "No such file"),
    ("owner/repo", lambda dir: load_vae("stabilityai/sd-vae-ft-mse"), FileNotFoundError, "hf://OWNER"),
    ("hf:// without owner", lambda dir: load_vae("hf://repo/vae.pt"), ValueError, "OWNER/REPO"),
    ("hub out of reach", lambda dir: load_sit("hf://nobody/nothing/x.pt"), FileNotFoundError, "neither"),
    ("empty folder", load_vae, ValueError, "train first"),
    ("damaged folder", given(lambda file: resolve(file.parent), b"PK", "ckpt_1.pt"), ValueError, "readable"),
    ("another run's folder", ours(lambda file: newest(file.parent, "x"), small_sit_checkpoint), ValueError,
     "is nanosendvae-sit, wanted x; use another --out"),
    ("empty file", given(load_vae, b""), ValueError, "empty"),
    ("web page", given(load_vae, b"\n<!DOCTYPE html><html>Sign in"), ValueError, "web page"),
    ("text", given(load_sit, b"these are no weights"), ValueError, "damaged"),
    ("a list", given(load_vae, [1, 2]), ValueError, "not loaded"),
    ("discriminator as VAE", given(load_vae, {"main.0.bias": MEAN}), ValueError, "--disc-init"),
    ("our SiT as VAE", ours(load_vae, small_sit_checkpoint), ValueError, "--ckpt"),
    ("anything as VAE", given(load_vae, {"w": MEAN, "b": 2}), ValueError, "first keys: w"),
    ("VAE lacks a tensor", given(load_vae, without(VAE_STATE, "conv_in.bias")), ValueError, "is missing"),
    ("VAE has one more", given(load_vae, {**VAE_STATE, "more.weight": MEAN}), ValueError, "more.*want none"),
    ("VAE of gray images", given(load_vae, GRAY), ValueError, "fit small, the closest.*1, 3, 3"),
    ("half a VAE", given(load_vae, without(VAE_STATE, "decoder")), ValueError, "decoder"),
    ("our VAE, edited", ours(load_vae, model=without(VAE_STATE, "quant_conv.b")), ValueError, "model_config"),
    ("our VAE, newer", ours(load_vae, model_config={"novel": 1}), ValueError, "another version.*novel"),
    ("damaged config", lambda d: load_vae(write_diffusers(d, config=b"{") and d), ValueError, "config.json"),
    ("another config", lambda d: load_vae(write_diffusers(d, config={}) and d), ValueError, "its config"),
    ("our VAE as SiT", ours(load_sit, mapper=small_mapper()), ValueError, "a VAE"),
    ("LightningDiT", given(load_sit, {"ema": SWIGLU}), ValueError, "LightningDiT"),
    ("cut SiT", given(load_sit, without(SIT_STATE, "pos_embed")), ValueError, "no whole SiT"),
    ("shallow SiT", given(load_sit, without(SIT_STATE, "blocks.3.")), ValueError, "blocks.3.*is missing"),
    ("wide SiT", given(load_sit, small_sit(hidden_size=48).state_dict()), ValueError, "closest in width"),
    ("no EMA weights", ours(load_sit, small_sit_checkpoint, ema=None), ValueError, "--weights ema"),
    ("cosine path", given(load_sit, {"ema": SIT_STATE, "args": COSINE}), ValueError, "path_type is cosine"),
    ("noise model", given(load_sit, {"ema": SIT_STATE, "args": NOISE}), ValueError, "prediction"),
    ("no discriminator", ours(load_discriminator), ValueError, "no discriminator"),
    ("ActNorm", given(load_discriminator, ACTNORM), ValueError, "main.3.loc"),
    ("no mapper", ours(load_mapper), ValueError, "--align 0"),
    ("mapper, newer", ours(load_mapper, **NEWER), ValueError, "another version"),
    ("no statistics", statistics({"a": 1}), ValueError, "--latent-stats"),
    ("other channels", statistics(LISTS, channels=32), ValueError, "want 32"),
    ("another VAE", statistics({**LISTS, "vae_hash": "a", "vae": "x.pt"}, 4, "b"), ValueError, "--vae x.pt"),
    ("std not finite", statistics({"mean": [0.0], "std": [1e99]}), ValueError, "std > 0"),
    ("scale below 0", lambda dir: read_statistics("-1", 4), FileNotFoundError, "-1"),
]


@pytest.mark.parametrize("_, call, exception, word", REFUSALS, ids=[row[0] for row in REFUSALS])
def test_what_cannot_be_used_is_one_clear_line(tmp_path, _, call, exception, word):
    with pytest.raises(exception, match=word) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
