"""export.py: every layout that it writes is read back, by the real diffusers package and by checkpoints.py.

    python -m pytest tests/test_export.py        about 10 s on 2 cores, no network
"""
import pytest
import torch
from conftest import read_fixture
from small import save, small_sit, small_sit_checkpoint, small_vae, small_vae_checkpoint
from test_checkpoints import (LISTS, MEAN, SIT_STATE, STD, VAE_STATE, repa_e_checkpoint, same,
                              small_sizes_are_known, write)  # noqa: F401  (the fixture)

import checkpoints
import export
from checkpoints import load_sit, load_vae, read_statistics
from sit import SiTConfig


def run(to, out, *flags):
    export.main(["--to", to, "--out", str(out), *map(str, flags)])


@torch.no_grad()
def test_diffusers_loads_our_export_and_encodes_and_decodes_alike(tmp_path):
    diffusers, ours = pytest.importorskip("diffusers"), small_vae()
    small_vae_checkpoint(tmp_path / "vae", ours)
    stats = write(tmp_path / "stats.json", LISTS)
    run("diffusers", tmp_path / "out", "--vae", tmp_path / "vae", "--latent-stats", stats)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out").eval()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    posterior, encoded = ours.encode(x), theirs.encode(x).latent_dist
    torch.testing.assert_close(encoded.mean, posterior.mean, atol=3e-5, rtol=0)
    torch.testing.assert_close(encoded.logvar, posterior.logvar, atol=3e-5, rtol=0)
    decoded = theirs.decode(posterior.mean).sample
    torch.testing.assert_close(decoded, ours.decode(posterior.mean), atol=6e-5, rtol=0)
    assert theirs.config.latents_mean == LISTS["mean"] and theirs.config.latents_std == LISTS["std"]
    assert same(load_vae(tmp_path / "out"), VAE_STATE)  # the very weights: the hash of the latents' VAE stays


def test_diffusers_own_folder_comes_back_as_it_was(tmp_path):
    """Saved by diffusers, loaded here, exported: the same tensors, the scalar scale at its usual place."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), scaling_factor=0.18215)
    theirs.save_pretrained(tmp_path / "theirs")
    run("diffusers", tmp_path / "out", "--vae", tmp_path / "theirs", "--latent-stats", tmp_path / "theirs")
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out")
    assert same(again, theirs.state_dict())
    assert again.config.scaling_factor == pytest.approx(0.18215) and again.config.latents_std is None


@pytest.mark.parametrize("to, name", [("safetensors", "a.safetensors"), ("ldm", "a.pt"), ("diffusers", "")])
def test_statistics_come_along_if_they_are_known(tmp_path, to, name):
    path, none = tmp_path / "out" / name, tmp_path / "none" / name
    run(to, path, "--vae", save(tmp_path / "0400000.pt", repa_e_checkpoint()))  # which has them inside
    stats = tmp_path / "out" / "a-latents-stats.pt" if name else path
    torch.testing.assert_close(read_statistics(stats, 4), (MEAN, STD))
    run(to, none, "--vae", small_vae_checkpoint(tmp_path / "vae"))
    with pytest.raises((FileNotFoundError, ValueError)):
        read_statistics(tmp_path / "none" / "a-latents-stats.pt" if name else none, 4)
    assert same(load_vae(path), VAE_STATE) and same(load_vae(none), VAE_STATE)
    if name:
        assert checkpoints.read_file(path).keys() == VAE_STATE.keys()
        assert path.stat().st_mode == stats.stat().st_mode  # safetensors' own writer makes files private


@pytest.mark.parametrize("to, table", [("repa", "repa_p1_c32"), ("repa-e", "repae_p1_c32")])
def test_a_sit_has_the_names_shapes_and_wrapper_of_the_published_code(tmp_path, to, table):
    """Against the tables that were read off REPA's and REPA-E's own modules (golden)."""
    golden, _ = read_fixture("sit")
    fields = {key: tuple(value) if isinstance(value, list) else value
              for key, value in golden["cases"][table]["config"].items()
              if key in SiTConfig.__dataclass_fields__}
    model, mean, std = small_sit(**fields), torch.randn(32), torch.rand(32) + 0.5
    small_sit_checkpoint(tmp_path, model, step=7, latents={"mean": mean.tolist(), "std": std.tolist()})
    run(to, tmp_path / "out" / "sit.pt", "--ckpt", tmp_path)
    state = torch.load(tmp_path / "out" / "sit.pt", weights_only=True)["ema"]
    assert {key: list(value.shape) for key, value in state.items()} == \
        {key: rule["shape"] for key, rule in golden["tensors"][table].items()}
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    if to == "repa-e":  # as its generate.py reads them
        assert torch.allclose(state["bn.running_var"].rsqrt(), 1 / std)
        assert torch.equal(state["bn.running_mean"], mean) and state["bn.num_batches_tracked"] == 7
    beside = torch.load(tmp_path / "out" / "sit-latents-stats.pt", weights_only=True)
    expected = {"latents_scale": 1 / std.view(1, 32, 1, 1), "latents_bias": mean.view(1, 32, 1, 1)}
    torch.testing.assert_close(beside, expected, rtol=0, atol=0)


def test_raw_weights_and_other_statistics_are_a_flag_away(tmp_path):
    ckpt = small_sit_checkpoint(tmp_path / "sit", ema=small_sit(1).state_dict())
    stats = write(tmp_path / "s.json", LISTS)
    run("repa-e", tmp_path / "raw.pt", "--ckpt", ckpt, "--weights", "raw", "--latent-stats", stats)
    assert same(load_sit(tmp_path / "raw.pt"), SIT_STATE)
    assert torch.equal(read_statistics(tmp_path / "raw.pt", 4)[0], MEAN)


@pytest.mark.parametrize("to, flag, make, word", [
    ("diffusers", "--vae", lambda path: small_vae_checkpoint(path, small_vae(stem=2)), "stem 2"),
    ("repa", "--ckpt", lambda path: save(path, small_sit(learn_sigma=True).state_dict()), "willisma"),
    ("repa-e", "--ckpt", lambda path: save(path, SIT_STATE), "--latent-stats")])
def test_what_cannot_be_exported_is_said_before_anything_is_written(tmp_path, to, flag, make, word):
    with pytest.raises(ValueError, match=word) as caught:
        run(to, tmp_path / "out", flag, make(tmp_path / "in"))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
