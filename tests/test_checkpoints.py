"""Weight files: ours (newest, damaged, pruned), published layouts, strictness, statistics, what is refused.

    python -m pytest tests/test_checkpoints.py        about 20 s on 2 cores, no network

The published layouts are written here, small, as the published codes lay them out (tests/golden/README.md
says what of that was run); the published files themselves were not at hand.
"""
import json
import os
import sys
from argparse import Namespace
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import prescribed, read_fixture
from small import SIT_SIZE, VAE_CONFIG, save, small_mapper, small_sit, small_vae, small_vae_checkpoint

import checkpoints
import common
import data
import sample
import sit
import vae
from checkpoints import load_discriminator, load_mapper, load_sit, load_vae, newest, read_statistics
from losses import PatchDiscriminator
from mapper import MapperConfig

MEAN, STD = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([0.25, 2.0, 4.0, 0.5])
VAE_STATE, SIT_STATE = small_vae().state_dict(), small_sit().state_dict()
DISCRIMINATOR_STATE = PatchDiscriminator().state_dict()
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


def batch_norm(mean=MEAN):
    return {"bn.running_mean": mean, "bn.running_var": STD ** 2, "bn.num_batches_tracked": torch.tensor(9)}


def repa_e_checkpoint(prefix=""):
    """REPA-E's training checkpoint: all its keys, an argparse.Namespace, BatchNorm in the SiT."""
    ema, raw = ({**small_sit(seed).state_dict(), **batch_norm(MEAN + seed - 1)} for seed in (1, 2))
    return {"model": prefixed(prefix, raw), "ema": prefixed(prefix, ema), "vae": prefixed(prefix, VAE_STATE),
            "discriminator": prefixed(prefix, DISCRIMINATOR_STATE),
            "opt": {"state": {}, "param_groups": []}, "opt_vae": {}, "opt_disc": {},
            "args": Namespace(vae="f16d32", path_type="linear", cfg_prob=0.1), "steps": 400000}


# our checkpoints

def test_our_vae_and_mapper_load_with_their_own_configuration(tmp_path):
    raw, ema = (small_vae(seed, stem=2, z_channels=3, norm_groups=16) for seed in (0, 1))  # not in VAE_SIZES
    mapper = small_mapper(depth=2)
    older = {**asdict(mapper.config), "bn_group": 32}  # which is the trainer's now
    small_vae_checkpoint(tmp_path, raw, mapper, mapper_config=older)
    for loaded, theirs in ((load_vae(tmp_path), raw), (load_mapper(tmp_path), mapper)):
        assert same(loaded, theirs.state_dict()) and loaded.config == theirs.config and not loaded.training
    small_vae_checkpoint(tmp_path, raw, ema=ema.state_dict())
    assert same(load_vae(tmp_path), ema.state_dict())


def test_an_old_linear_mapper_is_read_as_it_was_trained(tmp_path):
    """Its config says norm and noise, which a linear one did not heed."""
    mapper, z = small_mapper(kind="linear", norm=False, noise=False), torch.randn(2, 4, 8, 8)
    small_vae_checkpoint(tmp_path, None, mapper, mapper_config=asdict(MapperConfig(4, 8, 16, kind="linear")))
    assert torch.equal(load_mapper(tmp_path)(z), mapper.proj(z).flatten(2).mT)


def test_the_newest_readable_checkpoint_counts_by_number_and_damaged_ones_are_named(tmp_path, capsys):
    assert newest(tmp_path, checkpoints.VAE) is newest(tmp_path / "none", checkpoints.VAE) is None
    for step in (9_999_999, 10_000_000):
        checkpoints.save(tmp_path, step, {"format": checkpoints.VAE, "step": step}, keep=9)
    older, newer = tmp_path / "ckpt_9999999.pt", tmp_path / "ckpt_10000000.pt"
    assert checkpoints.resolve(tmp_path) == str(newer) and capsys.readouterr().out == ""
    write(newer, newer.read_bytes()[:-200])
    save(tmp_path / "ckpt_10000001.pt", [1])
    write(tmp_path / "ckpt_final.pt", b"not numbered")
    assert newest(tmp_path, checkpoints.VAE)["path"] == checkpoints.resolve(tmp_path) == str(older)
    printed = capsys.readouterr().out
    assert "ckpt_10000000.pt" in printed and "ckpt_10000001.pt" in printed and older.name not in printed
    write(older, b"PK")
    assert newest(tmp_path, checkpoints.VAE) is None and "passing over" in capsys.readouterr().out


def test_saving_keeps_the_newest_up_to_its_step_and_all_damaged_ones_after_it(tmp_path):
    for step in (10, 20, 30, 40):
        checkpoints.save(tmp_path, step, {"step": step}, keep=9)
    checkpoints.save(tmp_path, 25, {"step": 25}, keep=2)  # 30 and 40 were damaged, or it would not be 25 now
    with pytest.raises(Exception):  # what cannot be written changes nothing
        checkpoints.save(tmp_path, 25, {"step": lambda: 0}, keep=1)
    assert sorted(os.listdir(tmp_path)) == [f"ckpt_00000{step}.pt" for step in (20, 25, 30, 40)]
    assert checkpoints.read_file(tmp_path / "ckpt_0000025.pt") == {"step": 25}


# published VAEs and discriminators

PREFIXES = ("", "module._orig_mod.", "_orig_mod.module.")  # DDP, torch.compile
TRAINING_PARTS = dict.fromkeys(("loss.logvar", "loss.discriminator.main.0.weight", "model_ema.decay",
                                "foundation_model.model.cls_token", "linear_proj.weight"), MEAN)
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


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_beside_the_weights_of_lightnings_files_are_not_built(tmp_path, monkeypatch, zipped):
    """As LDM's kl-f8: states of callbacks under their classes. The packages are not there when it is read."""
    classes = {module: type(name, (), {"__module__": module})
               for module, name in (("pytorch_lightning", "ModelCheckpoint"), ("omegaconf", "DictConfig"))}
    callback, config = classes["pytorch_lightning"], classes["omegaconf"]()
    config.content = {"path": Path("x"), "dims": defaultdict(dict), "loss": np.float64(3)}
    for name, state in (("a.ckpt", config), ("code.ckpt", Code())):
        for module, cls in classes.items():
            monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{cls.__name__: cls}))
        torch.save({"state_dict": VAE_STATE, "callbacks": {callback: {"best": state}}, "config": config},
                   tmp_path / name, _use_new_zipfile_serialization=zipped)
    for module in classes:
        monkeypatch.setitem(sys.modules, module, None)  # an import would raise
    assert same(load_vae(tmp_path / "a.ckpt"), VAE_STATE)
    kept = checkpoints.read_file(tmp_path / "a.ckpt")["config"]
    assert type(kept) is checkpoints.Nothing and not vars(kept)
    with pytest.raises(ValueError, match="could run code.*system"):
        load_vae(tmp_path / "code.ckpt")
    assert not os.path.exists("ran")


def test_a_file_on_the_hub_in_half_precision_with_other_latent_channels_loads(tmp_path, monkeypatch):
    model, name = small_vae(z_channels=6, embed_dim=5).half(), "sub/vae.safetensors"
    checkpoints.save_file(tmp_path / "owner/repo" / name, model.state_dict())
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: tmp_path / repo / name)
    loaded = load_vae(f"hf://owner/repo/{name}")
    assert loaded.config == model.config and same(loaded, model.float().state_dict())


@pytest.mark.parametrize("name", checkpoints.DIFFUSERS_FILES)
def test_a_diffusers_folder_loads_with_the_architecture_of_its_config(tmp_path, monkeypatch, name):
    """Its widths are those of none of VAE_SIZES: the weights alone need a size that we know."""
    theirs = {key: torch.from_numpy(prescribed(rule, VAE_ARCHIVE, key))
              for key, rule in GOLDEN_VAE["tensors"][GOLDEN_CASE["tensors"]].items()}
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        if name.endswith(".bin"):  # with the names of older files
            theirs = {key.replace(new, old): value for key, value in theirs.items()}
    checkpoints.save_file(tmp_path / name, theirs)
    config = write(tmp_path / "config.json", GOLDEN_CASE["config"])
    loaded = load_vae(tmp_path)
    assert same(loaded, checkpoints.from_diffusers(theirs)) and loaded.config.ch_mult == (1, 2, 3, 3)
    assert same(load_vae(tmp_path / name), loaded.state_dict())
    for damaged, word in ((b"{", "damaged"), ({}, "fit its config.json")):
        write(config, damaged)
        with pytest.raises(ValueError, match=word):
            load_vae(tmp_path)
    config.unlink()
    with pytest.raises(ValueError, match="closest"):
        load_vae(tmp_path)
    monkeypatch.setitem(vae.VAE_SIZES, "golden", loaded.config)
    assert same(load_vae(tmp_path), loaded.state_dict())


@pytest.mark.parametrize("content", [
    prefixed("module.", DISCRIMINATOR_STATE), prefixed("discriminator.", DISCRIMINATOR_STATE),
    {"state_dict": {**VAE_STATE, **prefixed("loss.discriminator.", DISCRIMINATOR_STATE)}},
    repa_e_checkpoint("_orig_mod."),
    {"format": checkpoints.VAE, "model": VAE_STATE, "discriminator": DISCRIMINATOR_STATE},
], ids=["bare", "objective", "VA-VAE", "REPA-E", "ours"])
def test_a_discriminator_loads_from_every_file_that_has_one(tmp_path, content):
    loaded = load_discriminator(save(tmp_path / "d.pt", content))
    assert same(loaded, DISCRIMINATOR_STATE) and loaded.training


# SiTs

WIDTH = {"hidden_size": 48}  # not a published one
SIT_LAYOUTS = {  # (changes of the configuration, content of the file from two state dicts)
    "ours": (WIDTH, lambda ema, raw: {"format": checkpoints.SIT, "ema": ema, "model": raw,
                                      "model_config": asdict(small_sit(**WIDTH).config),
                                      "latents": {"vae_hash": "a"}, "args": {"seed": 0}}),
    "REPA's last.pt": ({"z_dims": (8, 5), "qk_norm": True}, lambda ema, raw: ema),
    "REPA's older last.pt": ({}, lambda ema, raw: {  # counts the blocks behind the projector from 0 again
        key.replace("blocks.2.", "decoder_blocks.0.").replace("blocks.3.", "decoder_blocks.1."): value
        for key, value in ema.items()}),
    "REPA": ({"encoder_depth": 3}, lambda ema, raw: {
        "ema": ema, "model": prefixed("module.", raw), "opt": {}, "steps": 400000,
        "args": Namespace(path_type="Linear", prediction="v", cfg_prob=0.1, encoder_depth=3)}),
    "REPA-E": ({}, lambda ema, raw: repa_e_checkpoint("_orig_mod.")),  # which has the same two
    "willisma": ({"learn_sigma": True, "reversed_time": True}, lambda ema, raw: ema),
    "without label dropout": ({"num_classes": 1, "use_null": False}, lambda ema, raw: {
        "ema": ema, "model": raw, "args": {"cfg_prob": 0}}),
}


@pytest.mark.parametrize("layout", SIT_LAYOUTS)
def test_a_sit_loads_from_every_layout(tmp_path, layout):
    changes, lay_out = SIT_LAYOUTS[layout]
    ema, raw = small_sit(1, **changes), small_sit(2, **changes)
    content = lay_out(ema.state_dict(), raw.state_dict())
    path = save(tmp_path / "last.pt", content)
    loaded = load_sit(path)
    assert same(loaded, ema.state_dict()) and loaded.config == ema.config and not loaded.training
    assert same(load_sit(path, "raw"), (raw if "model" in content else ema).state_dict())


@pytest.mark.parametrize("name, encoder_depth", [("S/4", 4), ("B/2", 4), ("L/1", 8), ("XL/2", 8)])
def test_the_tensors_tell_a_published_size_with_repas_encoder_depth(name, encoder_depth):
    cfg = sit.SiTConfig(z_dims=(768,), encoder_depth=encoder_depth, **sit.SIT_SIZES[name])
    with torch.device("meta"):
        assert checkpoints.published_sit_config(sit.SiT(cfg).state_dict(), {}, "last.pt") == cfg


# statistics, and sampling from published pairs

REPA_E_STATISTICS = {"latents_scale": 1 / STD.view(1, 4, 1, 1), "latents_bias": MEAN.view(1, 4, 1, 1)}
LISTS = {"mean": MEAN.tolist(), "std": STD.tolist()}
DIFFUSERS, ONES = {"_class_name": "AutoencoderKL", "latent_channels": 4}, torch.ones(4)
STATISTICS = {  # layout -> (content, mean, std): z' = (z - mean) / std
    "REPA-E": (REPA_E_STATISTICS, MEAN, STD),
    "VA-VAE": ({"mean": MEAN.view(1, 4, 1, 1), "std": STD.view(1, 4, 1, 1)}, MEAN, STD),
    "checkpoint of REPA-E": (repa_e_checkpoint("module."), MEAN, STD),
    "SiT of ours": ({"format": checkpoints.SIT, "latents": LISTS}, MEAN, STD),
    "meta.json": (LISTS, MEAN, STD),  # of encode.py
    "config.json": ({**DIFFUSERS, "scaling_factor": 1.0, "latents_mean": MEAN.tolist(),
                     "latents_std": STD.tolist()}, MEAN, STD),
    "diffusers' default": (DIFFUSERS, 0 * ONES, ONES / 0.18215),
    "scalars": ({**DIFFUSERS, "scaling_factor": 0.5, "shift_factor": 1.0}, ONES, 2 * ONES),
}


@pytest.mark.parametrize("layout", STATISTICS)
def test_statistics_are_read_from_every_layout(tmp_path, layout):
    content, mean, std = STATISTICS[layout]
    if layout.endswith(".json"):
        path = write(tmp_path / layout, content).parent
    else:
        path = save(tmp_path / "s.pt", content)
    torch.testing.assert_close(read_statistics(path, 4), (mean, std))


def test_the_flag_decides_on_the_statistics_else_what_is_inside_the_sits_file(tmp_path):
    file, inside = save(tmp_path / "s.pt", REPA_E_STATISTICS), {"ema": {**SIT_STATE, **batch_norm(MEAN + 1)}}
    for flag, expected in ((None, MEAN + 1), (file, MEAN)):
        mean, _, source = checkpoints.statistics_for("sit.pt", inside, "abc", 4, flag)
        assert torch.equal(mean, expected) and source == str(flag or "inside sit.pt")


@pytest.mark.parametrize("pair", ["REPA-E", "willisma"])
def test_a_published_sit_and_vae_sample_as_their_own_code_would(tmp_path, pair):
    """By hand: the network in its own time direction, guidance, Euler, z / scale + bias, decode."""
    if pair == "REPA-E":
        theirs, sign, scale, bias, flags = small_sit(), 1, 1 / STD, MEAN, []
        content = {"ema": {**theirs.state_dict(), **batch_norm()}, "model": {}, "args": Namespace()}
    else:  # t = 0 is noise, v = z - eps, z' = 0.18215 z; the second half of the channels is not used
        theirs, sign, scale, bias = small_sit(learn_sigma=True), -1, torch.full((4,), 0.18215), torch.zeros(4)
        content, flags = theirs.state_dict(), ["--latent-stats", "0.18215"]
    flags += ["--ckpt", str(save(tmp_path / "last.pt", content)), "--out", str(tmp_path / "samples"),
              "--vae", str(save(tmp_path / "vae.pt", VAE_STATE)), "--device", "cpu", "--dtype", "fp32"]
    sample.main([*flags, *"--sampler euler --num 3 --steps 3 --cfg 1.5 --npz".split()])
    with torch.no_grad():
        z = common.noise_for((4, 8, 8), range(3), torch.device("cpu"), 0, "sample")
        for noise_level in (1, 2 / 3, 1 / 3):
            t = torch.full((3,), noise_level if sign == 1 else 1 - noise_level)
            cond, null = theirs(z, t, torch.arange(3)), theirs(z, t, torch.full((3,), 3))
            z = z - sign / 3 * (null + 1.5 * (cond - null))
        x = small_vae().decode(z / scale.view(1, 4, 1, 1) + bias.view(1, 4, 1, 1))
    drawn = np.load(tmp_path / "samples" / "samples.npz")["arr_0"].astype(int)
    assert np.abs(drawn - data.to_uint8(x).permute(0, 2, 3, 1).numpy()).max() <= 1


# what is refused

class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


OUR_VAE = {"format": checkpoints.VAE, "model": VAE_STATE, "model_config": asdict(VAE_CONFIG), "mapper": None}
ZERO = torch.zeros(1).expand(4)
GRAY = {**VAE_STATE, "encoder.conv_in.weight": torch.zeros(32, 1, 3, 3)}
# (what is wrong, what loads it, a path or the content of a file, one key word of the message)
REFUSALS = [
    ("owner/repo", load_vae, "owner/sd-vae", "hf://OWNER"),
    ("known repo", load_vae, "stabilityai/sd-vae-ft-mse", "hf://OWNER/REPO/FILE"),
    ("hf:// without owner", load_vae, "hf://repo/vae.pt", "OWNER/REPO"),
    ("hub out of reach", load_sit, "hf://nobody/nothing/x.pt", "neither.*--init none"),
    ("text", load_sit, b"these are no weights", "damaged"),
    ("code", load_vae, Code(), "could run code.*system"),
    ("without end", load_vae, {**OUR_VAE, "model_config": {"num_res_blocks": 10**9}}, "blocks"),
    ("few numbers repeated", load_sit, {**SIT_STATE, "final_layer.linear.bias": ZERO}, "not whole"),
    ("code in args", load_sit, {"ema": SIT_STATE, "args": Namespace(lr=Code())}, "could run code.*system"),
    ("anything as VAE", load_vae, {"w": MEAN, "b": 2}, "first keys: w"),
    ("VAE lacks a tensor", load_vae, without(VAE_STATE, "conv_in.bias"), "is missing"),
    ("VAE has one more", load_vae, {**VAE_STATE, "more.weight": MEAN}, "more.*want none"),
    ("VAE of gray images", load_vae, GRAY, "fit small, closest.*1, 3, 3"),
    ("our VAE, edited", load_vae, {**OUR_VAE, "model": without(VAE_STATE, "quant_conv.b")}, "model_config"),
    ("no mapper", load_mapper, OUR_VAE, "--align 0"),
    ("LightningDiT", load_sit, {**SIT_STATE, "blocks.0.mlp.w12.weight": MEAN}, "LightningDiT"),
    ("cut SiT", load_sit, without(SIT_STATE, "pos_embed"), "no whole SiT"),
    ("a VAE with its mapper", load_sit, {**OUR_VAE, "mapper": {"x_embedder.proj.bias": ZERO}}, "is a VAE"),
    ("shallow SiT", load_sit, without(SIT_STATE, "blocks.3."), "blocks.3.*is missing"),
    ("SiT has one more", load_sit, {**SIT_STATE, "more.weight": MEAN}, "more.*want none"),
    ("wide SiT", load_sit, small_sit(**WIDTH).state_dict(), "closest in width"),
    ("no EMA weights", load_sit, {"model": SIT_STATE}, "--weights ema"),
    ("cosine", load_sit, {"ema": SIT_STATE, "args": Namespace(path_type="cosine")}, "path_type is cosine"),
    ("noise model", load_sit, {"ema": SIT_STATE, "args": {"prediction": "noise"}}, "prediction"),
    ("ActNorm", load_discriminator, {**DISCRIMINATOR_STATE, "main.3.loc": MEAN}, "main.3.loc"),
    ("other channels", lambda path: read_statistics(path, 32), LISTS, "want 32"),
    ("std not finite", lambda path: read_statistics(path, 1), {"mean": [0.0], "std": [1e99]}, "std > 0"),
]


@pytest.mark.parametrize("_, load, content, word", REFUSALS, ids=[row[0] for row in REFUSALS])
def test_what_cannot_be_used_is_one_line_and_no_code_runs(tmp_path, monkeypatch, _, load, content, word):
    monkeypatch.chdir(tmp_path)
    if not isinstance(content, str):  # it is a file's
        content = (write if isinstance(content, bytes) else save)(tmp_path / "a.pt", content)
    with pytest.raises((ValueError, FileNotFoundError), match=word) as caught:
        load(content)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not os.path.exists("ran")
