"""Locks what every command computes: training, latents, samples, distances, probes.

Recorded at 7e84d6d, and once more at 857f6a1, when "tiny" and "tiny/1" became smaller: with their old sizes
the code of 857f6a1 gives all numbers of 7e84d6d.

    python -m pytest tests/test_lock.py        half a minute on 2 cores
    python tests/test_lock.py                  records again, into lock.json: only where a change is wanted

It goes through the entry points alone, so that all behind them may change. Everything is float32 on a CPU.
"""
import contextlib
import importlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # for a recording; pytest has it
import conftest  # noqa: F401  puts the repository on the path and sets the number of threads

LOCK = Path(__file__).with_name("lock.json")
RUN = "--dtype fp32 --workers 0"
TRAIN = f"--steps 4 --batch-size 16 --log-every 1 --warmup 2 {RUN}"
OF_THE_MACHINE = {"step", "time", "images_per_s", "data_wait_percent", "peak_memory_gib", "eta_s", "step_ms"}
# Between vector units (AVX2, none) and numbers of threads most values move by 1e-6, where they are near 0 in
# absolute terms; an image's mean by one of its 3,072 grey levels; F1 by 2e-4. Allowed is far more than that,
# {stage: (relative, absolute)}, and less than what another noise, BatchNorm group, interval or EMA moves.
ALLOWED = {"stage1": (1e-4, 2e-5), "latents": (1e-4, 2e-5), "stage3": (1e-4, 2e-5), "samples": (0, 0.02),
           "distances": (1e-4, 1e-4), "probes": (1e-3, 3e-3)}
COUNTED = {"precision": 0.01, "recall": 0.01, "disc_accuracy": 0.02}  # one image or patch on the other side
PROBE = {**dict.fromkeys(("flat", "pooled"), ("class_accuracy", "macro_f1", "micro_f1")),
         "latent": ("effective_rank", "density_gini", "gmm_nll")}


def draw_images(count, seed):
    """uint8 (count, 32, 32, 3): patches of 8 x 8 and noise, of integers alone, equal on every machine."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 216, (count, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    return (coarse + rng.integers(0, 40, (count, 32, 32, 3))).astype(np.uint8)


def write_pictures(folder, per_class, seed):
    for i, image in enumerate(draw_images(3 * per_class, seed)):
        path = folder / f"class{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def logged(folder):
    """Every number of log.jsonl as "step/key": an evaluation may be a row of its own."""
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {f"{row['step']}/{key}": value for row in rows if "step" in row for key, value in row.items()
            if key not in OF_THE_MACHINE and type(value) in (int, float)}


def sizes(content, *parts):
    """The mean |value| of every part of a checkpoint; running statistics of BatchNorm apart, its counter of
    calls left out: nothing depends on it, and it counts steps now, not groups."""
    groups = {}
    for part in parts:
        for key, value in content[part].items():
            if value.is_floating_point():
                kind = f"/{key.split('.')[-1]}" if "running" in key else ""
                groups.setdefault(f"{part}{kind}", []).append(value.double().abs().flatten())
    return {f"|{key}|": torch.cat(values).mean().item() for key, values in groups.items()}


def redraw(state):
    """Draw all weights anew. After four steps latents decode to nearly one picture and a SiT's output is
    nearly 0: no sampler would show. And Adam's first steps turn rounding errors into whole steps of the
    parameters without a gradient, so that what builds on trained weights could only be compared loosely."""
    rng = np.random.default_rng(0)
    for key, value in sorted(state.items()):
        if value.is_floating_point() and key != "pos_embed":
            noise = torch.from_numpy(rng.standard_normal(tuple(value.shape))).float()
            gain = 0.1 if value.ndim == 1 else value[0].numel() ** -0.5
            value.copy_(gain * noise + (value.ndim == 1 and key.endswith("weight")))


def command(line):
    """Run "module flags" on the CPU, as `python module.py flags` does."""
    module, *arguments = line.split()
    importlib.import_module(module).main([*arguments, "--device", "cpu"])


def stage1(out):
    command("train_vae --data train --image-size 32 --vae tiny --init none --teacher shapes --lpips 0 "
            f"--gan 0.1 --rec l1 --bn-group 4 --micro-batch-size 4 --lr 1e-4 {TRAIN} --out vae")
    content = torch.load(out / "vae/ckpt_0000004.pt", weights_only=True)
    found = logged(out / "vae") | sizes(content, "model", "mapper", "discriminator")
    redraw(content["model"])
    torch.save(content, out / "vae.pt")
    return found


def latents(out):
    command(f"encode --data train --vae vae.pt --out latents {RUN}")
    command(f"encode --data train --split val --vae vae.pt --out held_out {RUN}")
    found = {}
    for name in ("latents", "held_out"):
        meta = json.loads((out / name / "meta.json").read_text())
        found |= {f"{name}/{key}{c}": meta[key][c] for key in ("mean", "std") for c in range(0, 28, 9)}
        stored = np.concatenate([np.load(path) for path in sorted((out / name).glob("moments-*.npy"))])
        found[f"{name}/moments"] = float(np.abs(stored).mean(dtype=np.float64))
    return found


def stage3(out):
    command("train_sit --latents latents --val-latents held_out --repa --teacher shapes --model tiny/1 "
            f"--micro-batch-size 8 --ema 0.3 --sample-every 0 --lr 1e-3 {TRAIN} --out sit")
    content = torch.load(out / "sit/ckpt_0000004.pt", weights_only=True)
    found = logged(out / "sit") | sizes(content, "model", "ema")
    behind = [(content["ema"][key] - value).abs().flatten() for key, value in content["model"].items()]
    found["|ema - model| / lr"] = torch.cat(behind).mean(dtype=torch.float64).item() / 1e-3  # shows the decay
    redraw(content["ema"])
    torch.save(content, out / "sit.pt")
    return found


def samples(out):
    found = {}
    for sampler in ("sde", "euler", "heun"):
        command(f"sample --ckpt sit.pt --sampler {sampler} --cfg 2 --cfg-interval 0.2 0.7 --steps 6 --num 8 "
                f"--npz --dtype fp32 --out {sampler}")
        images = np.load(out / sampler / "samples.npz")["arr_0"].reshape(8, -1).astype(np.float64)
        found |= {f"{sampler}/{i}/mean": value for i, value in enumerate(images.mean(1))}
        found |= {f"{sampler}/{i}/std": value for i, value in enumerate(images.std(1))}
    return found


def distances(out):
    np.savez(out / "images.npz", arr_0=draw_images(200, seed=3))
    command("fid gfid shapes images.npz --features shapes --workers 0 --out gfid.json")
    found = json.loads((out / "gfid.json").read_text())["sets"]["images.npz"]
    return {key: found[key] for key in ("fd", "kid", "precision", "recall")}


def probes(out):
    command("probe --data shapes --num-train 400 --vae vae.pt --max-iter 20 --workers 0 --out probe.json")
    found = json.loads((out / "probe.json").read_text())["vaes"][0]
    return {f"{parent}/{key}": found[parent][key] for parent, keys in PROBE.items() for key in keys}


def run_all(out):
    """Run every command in the folder `out` -> {stage: {name: number}}; paths are relative to it."""
    with contextlib.chdir(out):
        write_pictures(out / "train", 22, seed=1)
        write_pictures(out / "val", 11, seed=2)
        return {stage.__name__: stage(out) for stage in (stage1, latents, stage3, samples, distances, probes)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("lock"))


@pytest.mark.parametrize("stage", ALLOWED)
def test_numbers_are_those_recorded(found, stage):
    rtol, atol = ALLOWED[stage]
    recorded, wrong = json.loads(LOCK.read_text())[stage], []
    for key, value in recorded.items():
        now = found[stage].get(key, float("nan"))
        allowed = COUNTED.get(key.rpartition("/")[2], atol + rtol * abs(value))
        if not abs(now - value) <= allowed:
            wrong.append(f"{key} was {value:.7g}, is {now:.7g}, {allowed:.1g} allowed")
    assert not wrong, f"{len(wrong)} of {len(recorded)} other numbers\n" + "\n".join(wrong)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        LOCK.write_text(json.dumps(run_all(Path(folder)), indent=1) + "\n")
