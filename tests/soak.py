"""Kill the four stages at random, again and again: each ends as without a kill. test_soak.py kills ten times.

    .venv/bin/python tests/soak.py --kills 200 --out /tmp/soak       # 5 minutes on 2 cores

A stage, one process of one thread on the CPU, runs once without a kill. Then the same command runs in another
folder and gets SIGKILL, half of the time at a random moment, half of the time while it saves. It is started
again until it ends by itself, and what it leaves is compared with the first run: that is a round. Runs are
forks of this process, so that a start does not import torch again.
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch: a fork copies no threads
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import timm  # noqa: F401  with torch._dynamo: each fork would import them anew
import torch
import torch._dynamo
from torch.utils._pytree import tree_flatten

import checkpoints
import common
import data
import encode
import sample
import sit
import train_sit
import train_vae
import vae

RUN = "--device cpu --dtype fp32 --seed 7"
TRAIN = f"{RUN} --batch-size 4 --steps 10 --save-every 2 --log-every 3 --workers 0"
# All read what the first run wrote, so that a stage answers for itself.
STAGES = {
    train_vae: f"--data shapes --vae tiny --init none --teacher shapes --lpips 0 --projector-dim 64 "
               f"--eval-every 5 {TRAIN}",
    encode: f"--data shapes --vae {{first}}/train_vae --shard-size 8 {RUN}",
    train_sit: f"--latents {{first}}/encode --model tiny/1 --val-latents {{first}}/encode --val-every 5 "
               f"--sample-every 5 {TRAIN}",
    sample: f"--ckpt {{first}}/train_sit --steps 4 --cfg 2 --num 64 --batch-size 8 --npz {RUN}"}
OF_THE_MACHINE = {"time", "images_per_s", "data_wait_percent", "peak_memory_gib", "eta_s", "step_ms"}
OF_THE_RUN = {"args", "versions"}  # of a checkpoint; args name the folder
OTHER_BYTES = {"protocol.json", ".lock"}     # they name folder and process


def shrink() -> None:
    """Make data, networks and pictures small, so that a stage takes seconds; every part of it stays."""
    data.SHAPES_NUM |= {"train": 128, "val": 32}
    vae.VAE_SIZES["tiny"] = dataclasses.replace(vae.VAE_SIZES["tiny"], ch=32)
    sit.SIT_SIZES["tiny/1"] |= {"hidden_size": 48}
    train_vae.PatchDiscriminator = functools.partial(train_vae.PatchDiscriminator, ndf=8)
    train_vae.EVAL_IMAGES, train_sit.VAL_LATENTS, train_sit.PREVIEW_STEPS = 16, 32, 2


def start(stage, folder: Path, inputs: Path) -> int:
    """Start a stage in a process group of its own; return its process id. What it prints goes to a file."""
    pid = os.fork()
    with contextlib.suppress(OSError):  # both sides do it: neither knows who is first
        os.setpgid(pid, pid)
    if pid:
        return pid
    try:
        printed = os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1), os.dup2(printed, 2)
        flags = STAGES[stage].format(first=inputs).split()
        common.cli(lambda: stage.main([*flags, "--out", str(folder)]))  # ends the process if it fails
        os._exit(0)
    finally:
        os._exit(1)


def in_save(folder: Path) -> bool:
    """Whether a temporary file is there."""
    return any(name.endswith(".tmp") for _, _, names in os.walk(folder) for name in names)


def wait(pid: int, folder: Path, seconds: float = 1e9, saves: int = 0) -> tuple[bool, bool]:
    """Wait until the process ends, or kill it: after `seconds`, or when it begins its save of number `saves`.
    Return (whether it was killed, whether in a save); RuntimeError if it failed."""
    end, began, saving = time.monotonic() + seconds, 0, in_save(folder)  # that of the run before
    while time.monotonic() < end and not began == saves > 0:
        time.sleep(0.001)
        done, status = os.waitpid(pid, os.WNOHANG)
        if status:
            raise RuntimeError(f"{folder}: status {status}\n{folder.with_suffix('.txt').read_text()[-2000:]}")
        if done:
            return False, False
        before, saving = saving, in_save(folder)
        began += saving and not before
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True, began > 0 and in_save(folder)


def soak(stage, first: Path, out: Path, kills: int, draw: random.Random) -> list[str]:
    """Kill one stage so many times; print how often; return what differs from the first run."""
    begin, wrong, killed, in_saves, inputs = time.monotonic(), [], 0, 0, first
    first, folder = first / stage.__name__, out / stage.__name__
    wait(start(stage, first, inputs), first)
    length = time.monotonic() - begin
    while killed < kills and not wrong:
        shutil.rmtree(folder, ignore_errors=True)
        again = True
        while again:
            when = {"saves": draw.randint(1, 4)}
            if killed == kills:  # now it may end
                when = {}
            elif 2 * in_saves > killed:
                when = {"seconds": draw.uniform(0, length)}
            again, saving = wait(start(stage, folder, inputs), folder, **when)
            killed, in_saves = killed + again, in_saves + saving
        wrong = differences(first, folder)
    print(f"{stage.__name__}: {killed} kills, {in_saves} in saves", flush=True)
    return wrong


def differences(first: Path, folder: Path) -> list[str]:
    """Return the names of the files of a stage in which two folders differ, or that only one of them has."""
    ours, theirs = ({str(path.relative_to(part)) for path in part.rglob("*")} for part in (folder, first))
    wrong = [name for name in ours & theirs if content(first / name) != content(folder / name)]
    wrong += ours ^ theirs
    return [str(folder / name) for name in sorted(wrong)]


def content(path: Path):
    """Return what must be equal in a file: of checkpoints, arrays and logs the numbers, else the bytes."""
    if path.is_dir() or path.name in OTHER_BYTES:
        return None
    if path.suffix == ".pt":
        saved = checkpoints.read_file(path)
        values, keys = tree_flatten({key: saved[key] for key in saved.keys() - OF_THE_RUN})
        return keys, [x.numpy().tobytes() if isinstance(x, torch.Tensor) else x for x in values]
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name].tobytes() for name in arrays.files}
    if path.name == "log.jsonl":  # without the row of each start
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: row[key] for key in row.keys() - OF_THE_MACHINE} for row in rows if "config" not in row]
    return path.read_bytes()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("/tmp/soak"), help="what is in it is removed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shrink()
    first, out, draw, wrong = args.out / "first", args.out / "killed", random.Random(args.seed), []
    for path in (first, out):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    for i, stage in enumerate(STAGES):
        wrong += soak(stage, first, out, args.kills * (i + 1) // 4 - args.kills * i // 4, draw)
    print("\n".join(f"differs: {name}" for name in wrong) or f"OK after {args.kills} kills")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
