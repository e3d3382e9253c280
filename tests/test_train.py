"""The training scripts: resume, micro-batches, two processes, NaN batches, the numbers logged, all flags.

Run: ./test.sh tests/test_train.py (about 2 minutes on 2 cores). The models are tiny, the images are 32 px
PNGs that the test writes, the teacher is the shipped one; two-process runs use torchrun with gloo on the CPU.
"""
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

import common
import data
import logs
import encode
import sample
import train_sit
import train_vae
import weights
from vae import load_vae

VAE = ["--vae", "tiny", "--init", "none", "--teacher", "shapes", "--lpips", "0", "--image-size", "32",
       "--device", "cpu", "--dtype", "fp32", "--workers", "0", "--batch-size", "16", "--bn-group", "4",
       "--log-every", "1", "--lr", "1e-3"]
SIT = ["--model", "tiny/1", "--device", "cpu", "--dtype", "fp32", "--workers", "0", "--batch-size", "16",
       "--log-every", "1", "--lr", "1e-3"]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 40 coloured noise pictures in two classes."""
    root = tmp_path_factory.mktemp("pictures") / "train"
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = root / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((32, 32), Image.BICUBIC).save(folder / f"{i:02d}.png")
    return str(root)


@pytest.fixture(scope="session")
def trained(pictures, tmp_path_factory):
    """A VAE of three steps, its latents, and a SiT of three steps: (folder, vae, latents, sit)."""
    folder = tmp_path_factory.mktemp("trained")
    vae, latents, sit = (str(folder / name) for name in ("vae", "latents", "sit"))
    train_vae.main(["--data", pictures, *VAE, "--steps", "3", "--out", vae])
    encode.main(["--data", pictures, "--vae", vae, "--image-size", "32", "--workers", "0", "--device", "cpu",
                 "--out", latents, "--shard-size", "16"])
    train_sit.main(["--latents", latents, *SIT, "--steps", "3", "--out", sit])
    return folder, vae, latents, sit


@pytest.fixture()
def no_preview(monkeypatch):
    """Runs of train_sit.py end without their picture, whose 50 steps take most of a short run's time."""
    monkeypatch.setattr(train_sit.Run, "preview", lambda run: None)


def newest(folder):
    return common.load_checkpoint(weights.resolve(folder))


def rows(folder):
    return [json.loads(line) for line in open(f"{folder}/log.jsonl")]


def assert_same(a, b, path=""):
    """Every tensor bit-equal, every value equal, recursively."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{path}: differ by {(a - b).abs().max()}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{path}[{i}]")
    else:
        assert a == b, path


TRAINING_STATE = ("step", "images_seen", "model", "ema", "mapper", "discriminator", "optimizer",
                  "optimizer_disc")


def assert_same_run(a, b):
    for key in TRAINING_STATE:
        assert_same(a.get(key), b.get(key), key)


def assert_same_gradient(a, b, optimizer, tolerance=2e-5):
    """Adam's first moments after one step are the gradients; compare those, since where a gradient is zero
    but for rounding (a bias before a norm) Adam turns the rounding into a step of full size."""
    a, b = (state[optimizer]["state"] for state in (a, b))
    assert a.keys() == b.keys() and len(a) > 0
    largest = max(float(entry["exp_avg"].abs().max()) for entry in a.values())
    for key in a:
        difference = float((a[key]["exp_avg"] - b[key]["exp_avg"]).abs().max())
        assert difference <= tolerance * largest, f"gradient {key} differs by {difference} of {largest}"


def assert_same_running_statistics(a, b):
    """The BatchNorm statistics of mapper and discriminator agree."""
    for part in ("mapper", "discriminator"):
        for key, value in a[part].items():
            if "running" in key:
                assert torch.allclose(value, b[part][key], atol=1e-6), key


def learning_rates(optimizer):
    return {group["lr"] for group in optimizer["param_groups"]}


def torchrun(script, *args, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               str(ROOT / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_vae_run_that_was_stopped_continues_bit_for_bit(pictures, tmp_path):
    """4 steps at once against 2 + 2 (the second command resumes); GAN, mapper and BatchNorm included."""
    flags = ["--data", pictures, *VAE, "--gan", "0.1", "--eval-every", "2"]
    train_vae.main([*flags, "--steps", "4", "--out", str(tmp_path / "whole")])
    for steps in ("2", "4"):
        train_vae.main([*flags, "--steps", steps, "--out", str(tmp_path / "parts")])
    assert_same_run(newest(tmp_path / "whole"), newest(tmp_path / "parts"))


def test_sit_run_that_was_stopped_continues_bit_for_bit(trained, tmp_path):
    flags = ["--latents", trained[2], *SIT]
    train_sit.main([*flags, "--steps", "4", "--out", str(tmp_path / "whole")])
    for steps in ("2", "4"):
        train_sit.main([*flags, "--steps", steps, "--out", str(tmp_path / "parts")])
    assert_same_run(newest(tmp_path / "whole"), newest(tmp_path / "parts"))


def test_run_continues_without_the_file_that_it_started_from(pictures, tmp_path):
    flags = ["--data", pictures, *VAE, "--gan", "0.1"]
    train_vae.main([*flags, "--steps", "1", "--out", str(tmp_path / "start")])
    flags += ["--init", str(tmp_path / "start"), "--disc-init", str(tmp_path / "start" / "ckpt_0000001.pt")]
    train_vae.main([*flags, "--steps", "2", "--out", str(tmp_path / "whole")])
    train_vae.main([*flags, "--steps", "1", "--out", str(tmp_path / "parts")])
    (tmp_path / "start" / "ckpt_0000001.pt").unlink()
    train_vae.main([*flags, "--steps", "2", "--out", str(tmp_path / "parts")])
    assert_same_run(newest(tmp_path / "whole"), newest(tmp_path / "parts"))


def test_rerun_of_the_recorded_run_stays_in_its_band(tmp_path):
    """tests/recorded_run.jsonl is the log of an earlier run, with its command: losses within 2 %, PSNR within
    0.3 dB of it (the order of summation differs between processors)."""
    recorded = [json.loads(line) for line in open(ROOT / "tests" / "recorded_run.jsonl")]
    train_vae.main([*recorded[0]["command"].split()[1:], "--out", str(tmp_path)])
    wanted, found = ([row for row in run if "loss" in row] for run in (recorded, rows(tmp_path)))
    assert [row["step"] for row in found] == [row["step"] for row in wanted] == [10, 20, 40, 60]
    for ours, theirs in zip(found, wanted):
        for key in ("loss", "rec", "kl", "align"):
            assert ours[key] == pytest.approx(theirs[key], rel=0.02), (ours["step"], key)
    assert found[-1]["psnr_db"] == pytest.approx(wanted[-1]["psnr_db"], abs=0.3)
    assert found[-1]["align"] < 0.85 * found[0]["align"] and found[-1]["rec"] < 0.5 * found[0]["rec"]


def test_first_steps_say_how_fast_they_are_and_what_they_wait_for(pictures, tmp_path, capsys):
    """Steps 10 and 20 are logged whatever --log-every says."""
    flags = ["--gan", "0", "--align", "0", "--log-every", "100", "--steps", "21", "--save-every", "50"]
    train_vae.main(["--data", pictures, *VAE, *flags, "--out", str(tmp_path)])
    logged = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["step"] for row in logged] == [10, 20, 21]
    for row in logged:
        assert row["images_per_s"] > 0 and 0 <= row["data_wait_percent"] <= 100 and row["eta_s"] >= 0
        assert 0.1 < row["peak_memory_gib"] < 24
    out, err = capsys.readouterr()
    line = (r"step {}: [\d.e+]+ images/s, waiting for data \d+ % of the time, peak memory [\d.]+ GiB, "
            r"[\d.e-]+ min left")
    assert all(re.search(line.format(step), out + err) for step in (10, 20))
    assert "precision: torch.float32 autocast" in out


def test_without_a_compiler_compile_is_one_line_and_eager(tmp_path):
    """In a process of its own: a compiler that was found once is remembered."""
    code = ("import torch, common; layer = torch.nn.Linear(2, 2); common.compile_modules(layer); "
            "assert layer._compiled_call_impl is None; print(layer(torch.ones(1, 2)).shape)")
    env = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=120)
    first, second = done.stdout.splitlines()
    assert first.startswith("torch.compile: off, runs eagerly: ") and second == "torch.Size([1, 2])"
    assert "Traceback" not in done.stderr


def test_evaluation_does_not_change_training(pictures, tmp_path):
    for name, every in (("often", "1"), ("never", "0")):
        train_vae.main(["--data", pictures, *VAE, "--gan", "0.1", "--steps", "2", "--eval-every", every,
                        "--out", str(tmp_path / name)])
    assert_same_run(newest(tmp_path / "often"), newest(tmp_path / "never"))


@pytest.fixture(scope="session")
def held_out(pictures, trained, tmp_path_factory):
    """Latents of 6 pictures in the folder `val` beside the training set's, encoded by its VAE."""
    root = tmp_path_factory.mktemp("held_out")
    (root / "train").symlink_to(pictures)
    for i in range(6):
        path = root / "val" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (40 * i, 200 - 30 * i, 90)).save(path)
    encode.main(["--data", str(root / "train"), "--split", "val", "--vae", trained[1], "--image-size", "32",
                 "--workers", "0", "--device", "cpu", "--out", str(root / "latents")])
    return str(root / "latents")


def test_held_out_flow_loss_is_that_of_fixed_draws_and_leaves_training_alone(trained, held_out, tmp_path):
    """A fresh SiT outputs 0, so its loss is the mean of v squared, here from the definitions."""
    flags = ["--latents", trained[2], *SIT]
    train_sit.main([*flags, "--steps", "3", "--out", str(tmp_path / "without")])
    for steps in ("2", "3"):  # stopped and continued: the same numbers
        train_sit.main([*flags, "--steps", steps, "--val-latents", held_out, "--val-every", "1", "--out",
                        str(tmp_path / "with")])
    assert_same_run(newest(tmp_path / "without"), newest(tmp_path / "with"))
    logged = [row for row in rows(tmp_path / "with") if "val_flow" in row]
    assert [row["step"] for row in logged] == [1, 2, 3] and logged[0]["val_flow"] != logged[2]["val_flow"]
    args = train_sit.parse_args([*flags, "--steps", "3", "--seed", "5"])
    latents, val = data.LatentFolder(trained[2]), data.LatentFolder(held_out)
    model, _ = train_sit.build(args, latents)
    run = train_sit.Run(args, common.Proc(0, 1, torch.device("cpu")), latents, val, model, None, 3)
    row = run.validate()
    assert row == run.validate()
    moments, _ = val.__getitems__(range(6))
    mean, std = moments.chunk(2, 1)
    draws = common.noise_for((2, *mean.shape[1:]), range(6), "cpu", 5, "val")
    z = (mean + std * draws[:, 0] - latents.mean[:, None, None]) / latents.std[:, None, None]
    expected = (draws[:, 1] - z).square().mean().item()
    for key in ("val_flow", "val_flow_t0", "val_flow_t1", "val_flow_t2", "val_flow_t3"):
        assert row[key] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():  # t is an input: a network that outputs it has another loss in each quarter
        model.forward = lambda z_t, t, y: t[:, None, None, None].expand_as(z_t)
        run.averaged = lambda: model
    row = run.validate()
    for k in range(4):
        wanted = (draws[:, 1] - z - (2 * k + 1) / 8).square().mean().item()
        assert row[f"val_flow_t{k}"] == pytest.approx(wanted, rel=1e-5)


def test_held_out_latents_of_another_vae_are_refused(pictures, trained, tmp_path):
    other = str(tmp_path / "vae")
    train_vae.main(["--data", pictures, *VAE, "--gan", "0", "--align", "0", "--steps", "1", "--out", other])
    flags = ["--data", pictures, "--vae", other, "--image-size", "32", "--workers", "0", "--device", "cpu"]
    with pytest.raises(ValueError, match="--split val: want --data DIR/train with DIR/val beside it"):
        encode.main([*flags, "--split", "val", "--out", str(tmp_path / "latents")])
    encode.main([*flags, "--out", str(tmp_path / "latents")])
    with pytest.raises(ValueError, match="has vae_hash .*encode both by one VAE"):
        train_sit.main(["--latents", trained[2], *SIT, "--steps", "1", "--val-latents",
                        str(tmp_path / "latents"), "--out", str(tmp_path / "sit")])


def test_vae_step_does_not_depend_on_the_micro_batch(pictures, tmp_path):
    """Discriminator and mapper have BatchNorm, so this fails unless its groups are fixed."""
    for micro in ("16", "4"):
        train_vae.main(["--data", pictures, *VAE, "--gan", "0.1", "--steps", "1", "--micro-batch-size", micro,
                        "--out", str(tmp_path / micro)])
    one, four = newest(tmp_path / "16"), newest(tmp_path / "4")
    assert_same_gradient(one, four, "optimizer")
    assert_same_gradient(one, four, "optimizer_disc")
    assert_same_running_statistics(one, four)
    for state in (one, four):  # as typed
        assert learning_rates(state["optimizer"]) == {1e-3}
        assert learning_rates(state["optimizer_disc"]) == {1e-4}


def test_sit_step_and_its_average_do_not_depend_on_the_micro_batch(trained, tmp_path, no_preview):
    for micro in ("16", "4"):
        train_sit.main(["--latents", trained[2], *SIT, "--steps", "2", "--micro-batch-size", micro,
                        "--save-every", "1", "--out", str(tmp_path / micro)])
    one, four = (common.load_checkpoint(tmp_path / micro / "ckpt_0000001.pt") for micro in ("16", "4"))
    assert_same_gradient(one, four, "optimizer")
    assert learning_rates(one["optimizer"]) == learning_rates(four["optimizer"]) == {1e-3}
    for micro, first in (("16", one), ("4", four)):  # the average moves once a step
        second = newest(tmp_path / micro)
        for key, value in second["ema"].items():
            expected = first["ema"][key].lerp(second["model"][key], 1 - 3 / 12)
            assert torch.allclose(value, expected, atol=1e-6), key


def test_two_processes_take_the_same_vae_step_as_one(pictures, tmp_path):
    """From a VAE of 20 steps: the reconstructions of a new one are nearly constant, and the discriminator's
    BatchNorm over 4 of them turns rounding of 1e-7 into 3e-4 of the gradient, in micro-batches too."""
    start = str(tmp_path / "start")
    train_vae.main(["--data", pictures, *VAE, "--gan", "0", "--align", "0", "--steps", "20", "--out", start])
    flags = ["--data", pictures, *VAE, "--init", start, "--gan", "0.1", "--steps", "1"]
    train_vae.main([*flags, "--out", str(tmp_path / "one")])
    torchrun("train_vae.py", *flags, "--out", tmp_path / "two")
    one, two = newest(tmp_path / "one"), newest(tmp_path / "two")
    assert all(one[key].keys() == two[key].keys() for key in ("model", "mapper", "discriminator"))
    assert_same_gradient(one, two, "optimizer")
    assert_same_gradient(one, two, "optimizer_disc")
    assert_same_running_statistics(one, two)
    logs = [next(row for row in rows(tmp_path / name) if "loss" in row) for name in ("one", "two")]
    for key in ("loss", "rec", "kl", "align", "gan", "disc", "grad_norm"):
        assert logs[0][key] == pytest.approx(logs[1][key], rel=1e-4), key


def test_two_processes_take_the_same_sit_step_and_encode_and_sample_the_same(pictures, trained, tmp_path):
    _, vae, latents, sit = trained
    flags = ["--latents", latents, *SIT, "--steps", "1", "--val-latents", latents]
    train_sit.main([*flags, "--out", str(tmp_path / "one")])
    torchrun("train_sit.py", *flags, "--out", tmp_path / "two")
    one, two = newest(tmp_path / "one"), newest(tmp_path / "two")
    assert one["model"].keys() == two["model"].keys() and one["ema"].keys() == two["ema"].keys()
    assert_same_gradient(one, two, "optimizer")
    logs = [rows(tmp_path / name)[-1] for name in ("one", "two")]
    for key in ("loss", "flow", "flow_t0", "val_flow", "grad_norm"):
        assert logs[0][key] == pytest.approx(logs[1][key], rel=1e-4), key
    torchrun("encode.py", "--data", pictures, "--vae", vae, "--image-size", "32", "--workers", "0",
             "--device", "cpu", "--out", tmp_path / "latents", "--shard-size", "16")
    for name in sorted(os.listdir(latents)):
        if name.endswith(".npy"):
            ours, theirs = np.load(f"{latents}/{name}"), np.load(tmp_path / "latents" / name)
            assert np.allclose(ours, theirs, atol=1e-5), name
    flags = ["--ckpt", sit, "--num-images", "5", "--steps", "3", "--device", "cpu", "--dtype", "fp32",
             "--npz"]
    sample.main([*flags, "--out", str(tmp_path / "s1")])
    torchrun("sample.py", *flags, "--out", tmp_path / "s2")
    images = [np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("s1", "s2")]
    assert images[0].shape == images[1].shape == (5, 32, 32, 3)
    assert np.abs(images[0] - images[1]).max() <= 1


def test_latents_do_not_depend_on_batch_and_workers_and_mirrored_ones_are_of_mirrored_images(
        pictures, trained, tmp_path):
    _, vae, latents, _ = trained
    for name, more in (("batch", ["--batch-size", "7", "--workers", "0"]),
                       ("flip", ["--workers", "2", "--flip"])):
        encode.main(["--data", pictures, "--vae", vae, "--image-size", "32", "--device", "cpu",
                     "--shard-size", "16", *more, "--out", str(tmp_path / name)])
        for path in Path(latents).glob("*.npy"):
            assert np.allclose(np.load(path), np.load(tmp_path / name / path.name), atol=1e-5), path.name
    images = data.to_float(data.open_dataset(pictures, 32).__getitems__(range(40))[0])
    with torch.no_grad():
        posterior = load_vae(vae).encode(images.flip(3))
    flipped = data.LatentFolder(tmp_path / "flip")
    mirrored = flipped.take(range(40), [True] * 40)
    assert torch.allclose(mirrored, torch.cat([posterior.mean, posterior.std], 1), atol=1e-5)
    assert not torch.allclose(mirrored, flipped.take(range(40)).flip(3), atol=1e-2)


def test_batch_size_does_not_change_a_sample_and_the_seed_does(trained, tmp_path):
    flags = ["--ckpt", trained[3], "--num", "7", "--steps", "4", "--cfg", "1.5", "--device", "cpu",
             "--dtype", "fp32", "--npz"]
    outs = {}
    for name, more in (("a", ["--batch-size", "7"]), ("b", ["--batch-size", "2"]), ("c", ["--seed", "1"]),
                       ("d", ["--num", "3"])):
        sample.main([*flags, *more, "--out", str(tmp_path / name)])
        outs[name] = np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int)
    assert np.abs(outs["a"] - outs["b"]).max() <= 1
    assert np.abs(outs["a"][:3] - outs["d"]).max() <= 1
    assert np.abs(outs["a"] - outs["c"]).mean() > 1


def test_averaged_or_raw_weights_are_sampled_as_asked(trained, tmp_path):
    state = newest(trained[3])
    torch.manual_seed(0)
    state["model"] = {key: value + 0.02 * torch.randn_like(value) for key, value in state["model"].items()}
    common.save_checkpoint(tmp_path / "both.pt", state)
    common.save_checkpoint(tmp_path / "raw.pt", {**state, "ema": state["model"]})
    images = {}
    for name, which in (("both", "ema"), ("both", "raw"), ("raw", "ema")):
        sample.main(["--ckpt", str(tmp_path / f"{name}.pt"), "--weights", which, "--num", "4", "--steps", "3",
                     "--device", "cpu", "--npz", "--out", str(tmp_path / "s")])
        images[name, which] = np.load(tmp_path / "s" / "samples.npz")["arr_0"]
    assert np.array_equal(images["both", "raw"], images["raw", "ema"])
    assert not np.array_equal(images["both", "raw"], images["both", "ema"])


def test_sampling_again_from_the_protocol_alone_gives_the_same_bits(trained, tmp_path):
    sample.main(["--ckpt", trained[3], "--num", "4", "--steps", "3", "--sampler", "heun", "--cfg", "2",
                 "--cfg-interval", "0.2", "0.8", "--labels", "random", "--seed", "5", "--device", "cpu",
                 "--npz", "--out", str(tmp_path / "a")])
    protocol = json.loads((tmp_path / "a" / "protocol.json").read_text())
    for key in ("checkpoint_sha256", "vae_hash", "latent_statistics_sha256", "weights", "nfe", "sampler",
                "steps", "cfg", "cfg_interval", "guided_channels", "labels", "seed", "num_images", "autocast",
                "time_grid", "torch"):
        assert key in protocol, key
    flags = [f"--{key.replace('_', '-')}={protocol[key]}" for key in (
        "weights", "sampler", "steps", "cfg", "labels", "seed", "device", "dtype", "batch_size")]
    sample.main(["--ckpt", protocol["checkpoint"], "--num", str(protocol["num_images"]), "--cfg-interval",
                 *map(str, protocol["cfg_interval"]), *flags, "--npz", "--out", str(tmp_path / "b")])
    first, second = (np.load(tmp_path / name / "samples.npz") for name in ("a", "b"))
    assert np.array_equal(first["arr_0"], second["arr_0"]) and np.array_equal(first["arr_1"], second["arr_1"])


def test_logged_loss_is_the_sum_of_its_weighted_terms(pictures, tmp_path):
    train_vae.main(["--data", pictures, *VAE, "--gan", "0.1", "--align", "0.7", "--kl", "1e-3", "--rec", "l2",
                    "--lpips", "0.5", "--lpips-weights", "random", "--steps", "2", "--out", str(tmp_path)])
    for row in rows(tmp_path):
        if "loss" in row:
            total = row["rec"] + 1e-3 * row["kl"] + 0.1 * row["gan"] + 0.7 * row["align"] + 0.5 * row["lpips"]
            assert row["loss"] == pytest.approx(total, rel=1e-6) and row["lpips"] > 0.01
            assert row["lr"] == pytest.approx(1e-3)


def run_of(pictures, tmp_path, *flags):
    """A train_vae.Run that has not started, and one batch of its data."""
    args = train_vae.parse_args(["--data", pictures, *VAE, "--steps", "9", "--out", str(tmp_path), *flags])
    torch.manual_seed(0)
    run = train_vae.Run(args, common.setup("cpu"), train_vae.build(args, 32), 9)
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(1))
    return run, (images, torch.zeros(16, dtype=torch.int64), torch.arange(16), torch.arange(16))


def test_two_steps_are_gradient_clipping_and_adamw_by_hand(pictures, tmp_path):
    run, batch = run_of(pictures, tmp_path, "--gan", "0", "--kl", "1e-3", "--align", "0.5",
                        "--grad-clip", "0.5")
    vae, mapper = copy.deepcopy((run.vae, run.mapper))
    params, x = [*vae.parameters(), *mapper.parameters()], data.to_float(batch[0])
    first, second = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    for step in range(2):
        eps = common.noise_for((2, vae.config.z_channels, 4, 4), range(16), "cpu", 0, "vae", step)
        t = common.uniform_for(1, range(16), "cpu", 0, "t", step)[:, 0]
        posterior = vae.encode(x)
        mean, logvar = posterior.mean, posterior.logvar
        z = mean + (0.5 * logvar).exp() * eps[:, 0]
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        cosine = F.cosine_similarity(mapper(z, t, eps[:, 1]), run.teacher(x), dim=-1).mean()
        loss = (x - vae.decode(z)).abs().mean() + 1e-3 * kl + 0.5 * (1 - cosine)
        gradients = torch.autograd.grad(loss, params)
        norm = sum(g.square().sum() for g in gradients).sqrt()
        assert norm > 0.5
        for i, (p, g) in enumerate(zip(params, gradients)):
            g = g * 0.5 / norm
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            m, v = first[i] / (1 - 0.9**(step + 1)), second[i] / (1 - 0.999**(step + 1))
            p.data -= 1e-3 * m / (v.sqrt() + 1e-8)
        assert not run.train_step([batch], logs.Meter())
        run.step += 1
    for ours, theirs in zip(params, [*run.vae.parameters(), *run.mapper.parameters()]):
        assert (ours - theirs).abs().max() < 0.01 * 1e-3  # a hundredth of the learning rate
    squares = sum(entry["exp_avg_sq"].sum().item() for entry in run.optimizer.state.values())
    assert squares == pytest.approx(sum(v.sum().item() for v in second), rel=1e-3)


def test_loss_of_the_vae_leaves_no_gradient_in_the_discriminator(pictures, tmp_path):
    run, batch = run_of(pictures, tmp_path, "--gan", "0.1")
    run._vae_loss(data.to_float(batch[0]), range(16), gan_on=True)[0].backward()
    assert all(p.grad is None and p.requires_grad for p in run.critic.parameters())
    for module in (run.vae.encoder, run.vae.decoder, run.mapper):
        assert all(p.grad is not None for p in module.parameters())
        assert any(p.grad.any() for p in module.parameters())


def test_teacher_is_in_no_optimizer_and_no_checkpoint(pictures, tmp_path):
    run, _ = run_of(pictures, tmp_path, "--gan", "0.1")
    for optimizer, modules in ((run.optimizer, (run.vae, run.mapper)), (run.optimizer_disc, (run.critic,))):
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert stepped == {id(p) for module in modules for p in module.parameters()}
        assert not stepped & {id(p) for p in run.teacher.parameters()}
    kept = {value.data_ptr() for part in run.state().values() if isinstance(part, dict)
            for value in part.values() if isinstance(value, torch.Tensor)}
    assert len(kept) > 100 and not kept & {value.data_ptr() for value in run.teacher.state_dict().values()}


def test_accuracy_of_the_discriminator_and_clean_alignment_are_those_by_hand(pictures, tmp_path):
    run, batch = run_of(pictures, tmp_path, "--gan", "0.1")
    x, x_hat = data.to_float(batch[0]), torch.zeros(16, 3, 32, 32)
    real, fake = (torch.cat([run.critic.discriminator(group) for group in images.split(4)])
                  for images in (x, x_hat))
    terms = run._disc_loss(x, x_hat)[1]
    right = int((real > 0).sum() + (fake < 0).sum())
    assert terms["disc_accuracy"].item() == pytest.approx(right / (real.numel() + fake.numel()))
    assert terms["disc_real"] == real.mean() and terms["disc_fake"] == fake.mean()
    run.train_step([batch], logs.Meter())  # moves the mapper's statistics
    dataset = data.open_dataset(pictures, 32)
    row = run.evaluate(dataset, "training")
    x = data.to_float(dataset.__getitems__(range(40))[0])
    with torch.no_grad():
        mapped = run.mapper.eval()(run.vae.eval().encode(x).mean, torch.zeros(40))
    cosine = (F.normalize(mapped, dim=-1) * F.normalize(run.teacher(x), dim=-1)).sum(-1)
    assert row["align_clean"] == pytest.approx(1 - cosine.mean().item(), abs=1e-5)


def snapshot(run):
    return {k: v.clone() for m in (run.vae, run.mapper, run.critic) if m is not None
            for k, v in m.state_dict().items() if "num_batches" not in k}


def test_nan_batch_changes_neither_weights_nor_statistics_nor_ema(pictures, tmp_path, monkeypatch):
    run, batch = run_of(pictures, tmp_path, "--gan", "0.1")
    meter = logs.Meter()
    assert not run.train_step([batch], meter)
    before, ema = snapshot(run), common.EMA(run.vae, 0.9)
    ema_before = {k: v.clone() for k, v in ema.state.items()}
    monkeypatch.setattr(train_vae.data, "to_float", lambda images: images.float() * float("nan"))
    skipped = run.train_step([batch], meter)
    ema.update(run.vae, 5, skipped)
    assert skipped
    assert_same(before, snapshot(run))
    assert_same(ema_before, ema.state)
    monkeypatch.undo()
    assert not run.train_step([batch], meter)
    assert any(not torch.equal(before[k], v) for k, v in snapshot(run).items())


def test_one_nan_image_costs_stage_2_its_step_and_no_more(trained, tmp_path, monkeypatch, no_preview):
    """NaN in the first of four micro-batches of the third step: checkpoints 2 and 3 hold the same."""
    loss = train_sit.Run._loss

    def spoilt(run, moments, labels, indices, rows):
        moments[rows == 0] *= float("nan") if run.step == 2 else 1
        return loss(run, moments, labels, indices, rows)
    monkeypatch.setattr(train_sit.Run, "_loss", spoilt)
    train_sit.main(["--latents", trained[2], *SIT, "--micro-batch-size", "4", "--steps", "4",
                    "--save-every", "1", "--keep", "4", "--out", str(tmp_path)])
    assert [row["skipped_steps"] for row in rows(tmp_path) if "step" in row] == [0, 0, 1, 0]
    two, three, four = (common.load_checkpoint(tmp_path / f"ckpt_000000{k}.pt") for k in (2, 3, 4))
    for key in ("model", "ema", "optimizer"):
        assert_same(two[key], three[key], key)
    for key in ("model", "ema"):
        assert all(value.isfinite().all() for value in four[key].values())
        assert any(not torch.equal(value, three[key][name]) for name, value in four[key].items())


def test_run_of_bad_steps_stops_and_names_the_term(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae.data, "to_float", lambda images: images.float() * float("nan"))
    with pytest.raises(RuntimeError, match="3 steps in a row skipped.*first non-finite term: rec"):
        train_vae.main(["--data", pictures, *VAE, "--gan", "0", "--steps", "9", "--stop-after-bad", "3",
                        "--out", str(tmp_path)])


def test_run_that_has_died_is_reported(capsys):
    alive = {"grad_norm": 1e-9, "align": 1e-9, "gan": 0.1, "loss": 0.0}
    for row, warned in ((alive, False), ({**alive, "gan": -1e-9}, True), ({"grad_norm": 0.0}, True),
                        ({"grad_norm": 1e-3}, False), ({"grad_norm": float("nan")}, False),
                        ({"grad_norm": 0.0, "align": float("nan")}, False)):
        logs.check_health(row, 0, 100, 50)
        assert ("step 50: gradient and losses are 0" in capsys.readouterr().out) == warned, row


def test_discriminator_enters_the_vae_loss_only_after_its_warmup(pictures, tmp_path):
    """Before disc_start + disc_warmup the VAE's step equals, bit for bit, the one without a GAN."""
    runs = [run_of(pictures, tmp_path, *flags)[0] for flags in (
        ["--gan", "0"], ["--gan", "0.1", "--disc-start", "1", "--disc-warmup", "1"])]
    batch = run_of(pictures, tmp_path, "--gan", "0")[1]
    plain, gan = runs
    gan.vae.load_state_dict(plain.vae.state_dict())
    gan.mapper.load_state_dict(plain.mapper.state_dict())
    disc = {k: v.clone() for k, v in gan.critic.named_parameters()}
    for step in range(3):
        for run in runs:
            run.train_step([batch], logs.Meter())
            run.step += 1
        same = all(torch.equal(v, gan.vae.state_dict()[k]) for k, v in plain.vae.state_dict().items())
        felt = "has not" if same else "has"
        assert same == (step < 2), f"step {step}: the VAE {felt} felt the discriminator"
        moved = any(not torch.equal(disc[k], v) for k, v in gan.critic.named_parameters())
        assert moved == (step >= 1), f"step {step}: the discriminator has {'' if moved else 'not '}moved"


def test_align_zero_is_a_plain_vae_bit_for_bit(pictures, tmp_path):
    """The mapper's loss reaches encoder and mapper, never decoder and teacher."""
    run, batch = run_of(pictures, tmp_path, "--gan", "0", "--align", "1")
    total, _, terms = run._vae_loss(train_vae.data.to_float(batch[0]), batch[3], False)
    decoder = list(run.vae.decoder.parameters())
    assert all(g is None for g in torch.autograd.grad(terms["align"], decoder, allow_unused=True,
                                                      retain_graph=True))
    encoder = list(run.vae.encoder.parameters())
    assert any(g is not None and g.abs().sum() > 0
               for g in torch.autograd.grad(terms["align"], encoder, allow_unused=True))
    assert all(not p.requires_grad for p in run.teacher.parameters())
    plain, _ = run_of(pictures, tmp_path, "--gan", "0", "--align", "0")
    plain.vae.load_state_dict(run.vae.state_dict())
    _, _, plain_terms = plain._vae_loss(train_vae.data.to_float(batch[0]), batch[3], False)
    assert torch.equal(terms["rec"], plain_terms["rec"]) and torch.equal(terms["kl"], plain_terms["kl"])


@pytest.mark.parametrize("flags", [
    ["--mapper", "linear"], ["--mapper-noise", "off"], ["--mapper-norm", "off"], ["--mapper-depth", "0"],
    ["--mapper-depth", "2"],
    ["--gan", "0.1", "--gan-adaptive"], ["--rec", "l2"], ["--align", "0"], ["--checkpointing"],
    ["--warmup", "2"], ["--cooldown", "2"], ["--grad-clip", "0"], ["--dtype", "bf16"],
    ["--disc-start", "1", "--gan", "0.1"]], ids=lambda flags: " ".join(flags))
def test_every_vae_flag_trains(pictures, tmp_path, flags):
    train_vae.main(["--data", pictures, *VAE, "--gan", "0", "--steps", "2", *flags, "--out", str(tmp_path)])
    logged = [row for row in rows(tmp_path) if "loss" in row]
    assert len(logged) == 2 and np.isfinite([row["loss"] for row in logged]).all()
    judged = {"disc_real", "disc_fake", "disc_accuracy"} & logged[1].keys()
    assert len(judged) == (3 if "0.1" in flags else 0)
    assert ("gan_weight" in logged[1]) == ("--gan-adaptive" in flags)


def test_mapper_switches_reach_the_mapper_and_no_norm_means_no_groups(pictures, tmp_path):
    """Without BatchNorm any micro-batch will do; a file from before the field resumes with its default."""
    common_flags = ["--data", pictures, *VAE, "--gan", "0"]
    train_vae.main([*common_flags, "--steps", "1", "--mapper-norm", "off", "--mapper-noise", "off",
                    "--micro-batch-size", "2", "--out", str(tmp_path / "off")])
    config = newest(tmp_path / "off")["mapper_config"]
    assert config["norm"] is False and config["noise"] is False
    train_vae.main([*common_flags, "--steps", "1", "--out", str(tmp_path / "on")])
    old = newest(tmp_path / "on")
    assert old["mapper_config"].pop("norm") is True and old["mapper_config"]["noise"] is True
    common.save_checkpoint(weights.resolve(tmp_path / "on"), old)
    train_vae.main([*common_flags, "--steps", "2", "--out", str(tmp_path / "on")])
    assert newest(tmp_path / "on")["step"] == 2


@pytest.mark.parametrize("flags", [
    ["--repa", "--teacher", "shapes", "--repa-block", "2"], ["--t-sampling", "lognormal"], ["--qk-norm"],
    ["--checkpointing"], ["--label-dropout", "0"], ["--dtype", "bf16"],
    ["--warmup", "2", "--cooldown", "1"]], ids=lambda flags: " ".join(flags))
def test_every_sit_flag_trains(trained, tmp_path, flags):
    train_sit.main(["--latents", trained[2], *SIT, "--steps", "2", *flags, "--out", str(tmp_path)])
    logged = [row for row in rows(tmp_path) if "loss" in row]
    assert len(logged) == 2 and np.isfinite([row["loss"] for row in logged]).all()
    for row in logged:
        assert ("repa" in row) == ("--repa" in flags)
        assert row["loss"] == pytest.approx(row["flow"] + 0.5 * row.get("repa", 0), rel=1e-6)


def test_repas_teacher_sees_the_image_of_each_latent_and_no_other_folder(pictures, trained, tmp_path,
                                                                          monkeypatch, no_preview):
    forward, loss, images, batches = train_sit.Teacher.forward, train_sit.Run._loss, [], []
    monkeypatch.setattr(train_sit.Teacher, "forward", lambda self, x: images.append(x) or forward(self, x))
    monkeypatch.setattr(train_sit.Run, "_loss", lambda *args: batches.append(args[1:]) or loss(*args))
    flags = ["--latents", trained[2], *SIT, "--repa", "--teacher", "shapes", "--repa-block", "2", "--steps",
             "1", "--micro-batch-size", "8", "--out", str(tmp_path)]
    train_sit.main(flags)
    dataset, latents = data.open_dataset(pictures, 32), data.LatentFolder(trained[2])
    assert len(images) == len(batches) == 2
    for x, ((moments, _), _, indices, _) in zip(images, batches):
        assert torch.equal(x, data.to_float(dataset.__getitems__(indices)[0]))
        assert torch.equal(moments, latents.take(indices))
    with pytest.raises(ValueError, match="was encoded from other images"):
        train_sit.main([*flags, "--data", f"{pictures}/cat"])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_runs_keep_weights_average_and_moments_in_float32(pictures, trained, tmp_path, dtype,
                                                                         no_preview):
    train_vae.main(["--data", pictures, *VAE, "--gan", "0", "--align", "0", "--dtype", dtype, "--steps", "1",
                    "--out", str(tmp_path / "vae")])
    train_sit.main(["--latents", trained[2], *SIT, "--dtype", dtype, "--steps", "1", "--out",
                    str(tmp_path / "sit")])
    vae, sit = newest(tmp_path / "vae"), newest(tmp_path / "sit")
    moments = [entry[key] for state in (vae, sit) for entry in state["optimizer"]["state"].values()
               for key in ("exp_avg", "exp_avg_sq")]
    kept = [*vae["model"].values(), *sit["model"].values(), *sit["ema"].values(), *moments]
    assert {value.dtype for value in kept} == {torch.float32} and any(m.any() for m in moments)
    full, half = (rows(folder)[1]["grad_norm"] for folder in (trained[3], tmp_path / "sit"))
    assert half != full and half == pytest.approx(full, rel=0.1)


def test_fp16_sit_saves_its_loss_scale_and_continues_with_it(trained, tmp_path, no_preview):
    flags = ["--latents", trained[2], *SIT, "--dtype", "fp16", "--batch-size", "4", "--out", str(tmp_path)]
    train_sit.main([*flags, "--steps", "1"])
    state = newest(tmp_path)
    assert state["scaler"]["_growth_tracker"] == 1
    state["scaler"]["scale"] = 1024.0
    common.save_checkpoint(weights.resolve(tmp_path), state)
    train_sit.main([*flags, "--steps", "2"])
    assert newest(tmp_path)["scaler"] == {**state["scaler"], "_growth_tracker": 2}


def all_stages(images, folder, steps):
    """VAE, latents, SiT, 10 samples; return the VAE's folder, the SiT's checkpoint, labels, grid size."""
    vae, latents, sit, samples = (str(folder / name) for name in ("vae", "latents", "sit", "samples"))
    train_vae.main(["--data", images, *VAE, "--gan", "0", "--steps", steps, "--out", vae])
    encode.main(["--data", images, "--vae", vae, "--image-size", "32", "--workers", "0", "--device", "cpu",
                 "--out", latents])
    train_sit.main(["--latents", latents, *SIT, "--steps", steps, "--out", sit])
    sample.main(["--ckpt", sit, "--num", "10", "--steps", "2", "--cfg", "1.5", "--device", "cpu", "--npz",
                 "--out", samples])
    labels = np.load(f"{samples}/samples.npz")["arr_1"].tolist()
    return vae, newest(sit), labels, Image.open(f"{samples}/grid.png").size


def test_class_names_are_the_folders_in_order_and_a_flat_folder_has_the_one(pictures, trained, tmp_path):
    state = newest(trained[3])
    assert state["latents"]["class_names"] == ["cat", "dog"] and state["model_config"]["num_classes"] == 2
    (tmp_path / "flat").mkdir()
    for path in Path(pictures).glob("*/*.png"):
        (tmp_path / "flat" / path.name).symlink_to(path)
    _, state, labels, size = all_stages(str(tmp_path / "flat"), tmp_path, steps="1")
    assert state["latents"]["class_names"] == ["unconditional"] and state["model_config"]["num_classes"] == 1
    assert labels == [0] * 10 and size == (3 * 64, 4 * 64)


def test_embedded_set_passes_all_stages_and_is_evaluated_on_other_scenes(tmp_path, monkeypatch, no_preview):
    monkeypatch.setattr(data, "SHAPES_NUM", {"train": 64, "val": 16})
    vae, state, labels, size = all_stages("shapes", tmp_path, steps="2")
    assert state["latents"]["num_images"] == 64 and state["latents"]["num_classes"] == 10
    assert labels == list(range(10)) and size == (10 * 64, 64)
    train, val = (data.open_dataset("shapes", 32, split).images for split in ("train", "val"))
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in val}
    assert [row["eval_images"] for row in rows(vae) if "eval_images" in row] == ["validation"]
    shown = np.array(Image.open(f"{vae}/reconstructions_0000002.png"))
    assert np.array_equal(shown[:32, :32], val[0])


@pytest.mark.parametrize("script", ["train_vae.py", "train_sit.py", "encode.py", "sample.py"])
def test_dry_run_prints_the_plan_and_writes_nothing(pictures, trained, tmp_path, script, capsys):
    _, vae, latents, sit = trained
    out = tmp_path / "out"
    {"train_vae.py": lambda: train_vae.main(["--data", pictures, *VAE, "--dry-run", "--out", str(out)]),
     "train_sit.py": lambda: train_sit.main(["--latents", latents, *SIT, "--dry-run", "--out", str(out)]),
     "encode.py": lambda: encode.main(["--data", pictures, "--vae", vae, "--image-size", "32",
                                       "--device", "cpu", "--dry-run", "--out", str(out)]),
     "sample.py": lambda: sample.main(["--ckpt", sit, "--device", "cpu", "--dry-run",
                                       "--out", str(out)])}[script]()
    printed = capsys.readouterr().out
    assert "configuration: " in printed and "parameters" in printed and not out.exists()


def test_batch_line_counts_processes_micro_batches_steps_epochs_and_images(pictures, trained, capsys):
    images, latents = data.open_dataset(pictures, 32), data.LatentFolder(trained[2])
    proc = common.Proc(0, 2, torch.device("cpu"))
    micro, accum = common.plan_batch(16, 4, proc.world)
    args = train_vae.parse_args(["--data", pictures, *VAE])
    train_vae.describe(args, images, train_vae.build(args, 32), micro, accum, proc, 5)
    args = train_sit.parse_args(["--latents", trained[2], *SIT])
    train_sit.describe(args, latents, train_sit.build(args, latents)[0], micro, accum, proc, 5)
    assert len(re.findall(r"^batch: 16 global = 2 processes x 2 micro-batches x 4; lr 0.001 as typed; "
                          r"2 steps/epoch, 5 steps = 2.5 epochs = 80 images$",
                          capsys.readouterr().out, re.M)) == 2


@pytest.mark.parametrize("command, message", [
    (["train_vae.py"], "data/imagenet/train: no such folder.*quickstart.sh"),
    (["train_vae.py", "--btach-size", "3"], "unrecognized arguments: --btach-size"),
    (["train_vae.py", "--batch-size", "x"], "argument --batch-size: invalid positive value: 'x'"),
    (["train_vae.py", "--batch-size", "-4"], "argument --batch-size: -4, want 1 or more"),
    (["train_sit.py", "--log-every", "0"], "argument --log-every: 0, want 1 or more"),
    (["train_sit.py", "--steps", "-3"], "argument --steps: -3, want 0 or more"),
    (["train_vae.py", "--data", "shapes", "--epochs", "0.001"], "0.001 of 20000 images make no step of"),
    (["train_sit.py", "--latents", "nowhere"], "nowhere"),
    (["sample.py", "--ckpt", "nowhere"], "nowhere"),
    (["encode.py", "--data", "shapes", "--vae", "nowhere"], "nowhere")],
    ids=lambda x: x[0] if isinstance(x, list) else "")
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, command, message):
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:], "--device", "cpu"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()[-1]) < 400


@pytest.mark.parametrize("broken, code, message", [
    (False, 1, "error: step 10: .* steps in a row skipped, first non-finite term"),
    (True, 2, "error: .*images are corrupt.*want 1 % or less")])
def test_an_error_beside_running_workers_is_one_line_and_ends(tmp_path, pictures, broken, code, message):
    """Loader workers ignore SIGTERM, by which Python ends its children: it would wait for them for ever."""
    if broken:
        for i in range(20):
            (tmp_path / "set" / "a").mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / "a" / f"{i}.png").write_bytes(b"\x89PNG")
        pictures = str(tmp_path / "set")
    flags = ["--workers", "2", "--gan", "0", "--lr", "1e30", "--stop-after-bad", "3", "--log-every", "100"]
    command = [sys.executable, str(ROOT / "train_vae.py"), "--data", pictures, *VAE, *flags, "--steps",
               "1000", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = done.stderr.replace("\r", "\n").splitlines()
    assert done.returncode == code and "Traceback" not in done.stderr
    assert any(re.match(message, line) for line in lines), done.stderr[-2000:]


def test_latents_have_the_size_that_the_vae_was_trained_on(pictures, trained, tmp_path):
    encode.main(["--data", pictures, "--vae", trained[1], "--workers", "0", "--device", "cpu", "--out",
                 str(tmp_path)])
    assert data.LatentFolder(tmp_path).meta["image_size"] == 32


def test_other_model_flags_in_the_same_folder_are_refused(pictures, trained):
    with pytest.raises(ValueError, match="other model flags"):
        train_vae.main(["--data", pictures, *VAE, "--mapper-depth", "2", "--steps", "9", "--out", trained[1]])
    with pytest.raises(ValueError, match="another model than the flags ask for"):
        train_sit.main(["--latents", trained[2], *SIT, "--qk-norm", "--steps", "9", "--out", trained[3]])


def test_checkpoint_of_another_version_is_named_and_later_fields_have_their_defaults(trained, tmp_path):
    """A SiT's and a VAE's file: without a field that has a default, and with one that is unknown."""
    _, vae, latents, sit = trained
    for name, path, field, default in (("vae", vae, "in_channels", 3), ("sit", sit, "qk_norm", False)):
        state = newest(path)
        assert state["model_config"].pop(field) == default
        common.save_checkpoint(tmp_path / name / "ckpt_0000003.pt", state)
    sample.main(["--ckpt", str(tmp_path / "sit"), "--vae", str(tmp_path / "vae"), "--num", "2", "--steps",
                 "2", "--device", "cpu", "--out", str(tmp_path / "s")])
    train_sit.main(["--latents", latents, *SIT, "--steps", "3", "--out", str(tmp_path / "sit")])
    state["model_config"]["invented"] = 1
    common.save_checkpoint(tmp_path / "sit" / "ckpt_0000003.pt", state)
    for command in (lambda: sample.main(["--ckpt", str(tmp_path / "sit"), "--device", "cpu"]),
                    lambda: train_sit.main(["--latents", latents, *SIT, "--steps", "9", "--out",
                                            str(tmp_path / "sit")])):
        with pytest.raises(ValueError, match="another version of this code.*invented") as seen:
            command()
        assert str(seen.value).count("ckpt_0000003.pt") == 1


def test_samples_of_an_earlier_run_do_not_stay_beside_a_new_protocol(trained, tmp_path):
    flags = ["--ckpt", trained[3], "--num", "2", "--steps", "2", "--device", "cpu", "--out", str(tmp_path)]
    sample.main([*flags, "--npz"])
    assert (tmp_path / "samples.npz").exists()
    sample.main([*flags, "--cfg", "2"])
    assert not (tmp_path / "samples.npz").exists() and (tmp_path / "grid.png").exists()


def test_image_size_that_the_mappers_patches_do_not_tile_is_refused(pictures):
    with pytest.raises(ValueError, match="--image-size 264 is not a multiple of 16: .*stride 8 x .*patch 2"):
        train_vae.main(["--data", pictures, *VAE, "--vae", "f8d4", "--image-size", "264", "--dry-run"])


def test_guidance_without_label_dropout_is_refused(trained, tmp_path):
    train_sit.main(["--latents", trained[2], *SIT, "--steps", "1", "--label-dropout", "0",
                    "--out", str(tmp_path / "sit")])
    with pytest.raises(ValueError, match="without label dropout"):
        sample.main(["--ckpt", str(tmp_path / "sit"), "--cfg", "2", "--device", "cpu",
                     "--out", str(tmp_path / "s")])


def test_latents_of_another_vae_are_refused(pictures, trained, tmp_path):
    other = str(tmp_path / "vae")
    train_vae.main(["--data", pictures, *VAE, "--gan", "0", "--align", "0", "--steps", "1", "--out", other])
    with pytest.raises(ValueError, match="the SiT was trained on latents of VAE"):
        sample.main(["--ckpt", trained[3], "--vae", other, "--device", "cpu", "--out", str(tmp_path / "s")])


def test_sit_trained_on_latents_of_another_vae_is_not_continued(trained, tmp_path):
    latents = shutil.copytree(trained[2], tmp_path / "latents")
    meta = json.loads((latents / "meta.json").read_text())
    ours, meta["vae_hash"] = meta["vae_hash"], "0123456789abcdef" * 4
    (latents / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=f"of VAE {ours[:12]}, .* those of 0123456789ab; use another"):
        train_sit.main(["--latents", str(latents), *SIT, "--steps", "9", "--out", trained[3]])


def test_sampling_needs_no_latents(trained, tmp_path, no_preview):
    latents = shutil.copytree(trained[2], tmp_path / "latents")
    train_sit.main(["--latents", str(latents), *SIT, "--steps", "1", "--out", str(tmp_path / "sit")])
    assert newest(tmp_path / "sit")["latents"] == json.loads((latents / "meta.json").read_text())
    flags = ["--ckpt", str(tmp_path / "sit"), "--num", "4", "--steps", "3", "--device", "cpu", "--npz"]
    images = []
    for _ in range(2):
        sample.main([*flags, "--out", str(tmp_path / "s")])
        images.append(np.load(tmp_path / "s" / "samples.npz")["arr_0"])
        for name in ("s", "latents"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
    assert np.array_equal(*images)


def test_sigterm_saves_and_the_same_command_continues(pictures, tmp_path):
    command = [sys.executable, str(ROOT / "train_vae.py"), "--data", pictures, *VAE, "--gan", "0",
               "--steps", "100000", "--save-every", "100000", "--workers", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               start_new_session=True)
    while not (tmp_path / "log.jsonl").exists() or len(rows(tmp_path)) < 4:
        time.sleep(0.2)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)  # as torchrun does: the loader's worker gets it too
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "the same command continues" in out
    assert newest(tmp_path)["step"] >= 3


def test_truncated_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    for step in (1, 2):
        common.save_checkpoint(tmp_path / f"ckpt_{step:07d}.pt", {"format": "x", "step": step})
    path = tmp_path / "ckpt_0000002.pt"
    path.write_bytes(path.read_bytes()[:200])
    assert common.latest_checkpoint(tmp_path, "x")[1]["step"] == 1
    assert "ckpt_0000002.pt" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00(X"])
def test_unreadable_newest_checkpoint_of_any_kind_is_passed_over(tmp_path, content):
    common.save_checkpoint(tmp_path / "ckpt_0000001.pt", {"format": "x", "step": 1})
    (tmp_path / "ckpt_0000002.pt").write_bytes(content)
    assert common.latest_checkpoint(tmp_path, "x")[1]["step"] == 1


def test_pruning_keeps_the_newest_that_were_written_and_never_all_for_broken_ones(tmp_path, capsys):
    """A broken file with a higher number is not one of those kept; 10,000,000 comes after 9,999,999."""
    for step in (3, 9_999_999, 10_000_000):
        common.save_checkpoint(tmp_path / f"ckpt_{step:07d}.pt", {"format": "x", "step": step})
    (tmp_path / "ckpt_20000000.pt").write_bytes((tmp_path / "ckpt_0000003.pt").read_bytes()[:-100])
    assert weights.resolve(tmp_path).endswith("ckpt_10000000.pt")
    assert "ckpt_20000000.pt: cut off or damaged; falling back" in capsys.readouterr().err
    common.prune_checkpoints(tmp_path, keep=2, step=10_000_000)
    left = sorted(int(path.stem[5:]) for path in tmp_path.iterdir())
    assert left == [9_999_999, 10_000_000, 20_000_000]
    assert common.latest_checkpoint(tmp_path, "x")[1]["step"] == 10_000_000


def test_failed_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "ckpt_0000001.pt"
    common.save_checkpoint(path, {"format": "x", "step": 1})
    with pytest.raises(Exception, match="pickle|local"):
        common.save_checkpoint(path, {"format": "x", "bad": lambda: None})
    assert common.load_checkpoint(path, "x")["step"] == 1 and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("max_norm, applied", [(2.0, 2.0), (0.0, 50.0), (60.0, 50.0)])
def test_gradient_is_clipped_to_the_norm_given_and_the_norm_before_is_returned(max_norm, applied):
    """One norm over all groups of parameters; 0 clips nothing, nor does a norm that is not reached."""
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in params], lr=9.0, fused=True)
    for param, gradient in zip(params, (30.0, -40.0)):
        param.grad = torch.tensor([gradient])
    norm, skipped = common.optimizer_step(optimizer, 1.0, max_norm)
    assert norm == 50 and not skipped
    assert [p.item() for p in params] == pytest.approx([-0.6 * applied, 0.8 * applied], rel=1e-5)


def test_ema_warms_up_follows_its_recursion_and_copies_what_is_not_trained():
    model = torch.nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    model.register_buffer("buffer", torch.zeros(3))
    ema = common.EMA(model, 0.9999)
    expected = model.weight.detach().clone()
    no = torch.tensor(False)
    for step in range(1, 1001):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.fill_(float(step))
        ema.update(model, step, no)
        decay = min(0.9999, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert torch.allclose(ema.state["weight"], expected, rtol=1e-4)
    assert ema.state["buffer"].tolist() == ema.state["bias"].tolist() == 3 * [1000]


def test_noise_of_a_row_depends_on_seed_step_and_row_alone():
    device = torch.device("cpu")
    whole = common.noise_for((3, 4), range(8), device, 0, "a", 5)
    assert torch.equal(whole[2:5], common.noise_for((3, 4), range(2, 5), device, 0, "a", 5))
    for other in ((1, "a", 5), (0, "b", 5), (0, "a", 6)):
        assert not torch.equal(whole, common.noise_for((3, 4), range(8), device, *other))
    many = common.noise_for((64,), range(2000), device, 0, "a", 5)
    assert abs(float(many.mean())) < 0.015 and abs(float(many.std()) - 1) < 0.01


def test_batch_that_does_not_fit_says_which_one_does():
    assert common.plan_batch(256, 32, 2) == (32, 4)
    with pytest.raises(ValueError, match="try --batch-size 288"):
        common.plan_batch(256, 32, 3)


def test_another_kind_of_checkpoint_in_the_folder_is_refused(tmp_path):
    common.save_checkpoint(tmp_path / "ckpt_0000005.pt", {"format": "x", "step": 5})
    with pytest.raises(ValueError, match="this is x, wanted y; use another --out"):
        common.latest_checkpoint(tmp_path, "y")


def test_optimizer_state_takes_the_layout_of_the_parameters():
    """The fused kernel would walk a state saved channels_last and loaded contiguous in the wrong order."""
    def layer():
        torch.manual_seed(0)
        return torch.nn.Conv2d(4, 6, 3)
    weights = []
    for saved_as in (torch.contiguous_format, torch.channels_last):
        first, second = layer().to(memory_format=saved_as), layer()
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        optimizers = [common.adamw(m.parameters(), 0.1) for m in (first, second)]
        first(x).square().mean().backward()
        optimizers[0].step()
        second.load_state_dict(first.state_dict())
        common.load_optimizer(optimizers[1], optimizers[0].state_dict())
        second(x).square().mean().backward()
        optimizers[1].step()
        weights.append(second.weight.detach().contiguous())
    assert torch.allclose(*weights, atol=1e-4)


def test_meter_takes_the_mean_over_all_observations_behind_it():
    meter = logs.Meter()
    meter.add({"a": (torch.tensor(3.0), torch.tensor(2.0)), "b": 1.0})
    meter.add({"a": (torch.tensor(0.0), torch.tensor(0.0)), "b": 2.0})
    assert meter.read(torch.device("cpu")) == {"a": 1.5, "b": 1.5}


def test_cut_that_would_split_a_norm_group_is_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match="micro-batch 2 is not a multiple of --bn-group 4.*try --bn-group 2"):
        train_vae.main(["--data", pictures, *VAE, "--micro-batch-size", "2", "--steps", "1", "--out",
                        str(tmp_path)])
