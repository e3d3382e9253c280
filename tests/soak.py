"""Kill the four stages at random, again and again: each ends as without a kill. test_soak.py kills ten times.

    .venv/bin/python tests/soak.py --kills 200 --out /tmp/soak       # 5 to 10 minutes on 2 cores

One process of one thread on the CPU, float32, the embedded set. A stage runs once without a kill. Then the
same command runs in another folder and gets SIGKILL, half of the time at a random moment, half of the time
while it saves (a temporary file is there). It is started again until it ends by itself, and what it leaves is
compared with the first run. That is a round; rounds go on until the stage has had its share of the kills.
Runs are forks of this process, so that a start does not import torch again.
"""
import argparse
import contextlib
import dataclasses
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
TRAIN = f"{RUN} --batch-size 4 --steps 16 --save-every 2 --log-every 3 --workers 0"
# All read what the first run wrote, so that a stage answers for itself.
STAGES = {
    train_vae: f"--data shapes --vae tiny --init none --teacher shapes --lpips 0 --projector-dim 64 "
               f"--eval-every 8 {TRAIN}",
    encode: f"--data shapes --vae {{first}}/train_vae --shard-size 16 {RUN}",
    train_sit: f"--latents {{first}}/encode --model tiny/1 --val-latents {{first}}/encode --val-every 8 "
               f"--sample-every 8 {TRAIN}",
    sample: f"--ckpt {{first}}/train_sit --steps 6 --cfg 2 --num 96 --batch-size 8 --npz {RUN}"}
OF_THE_MACHINE = {"time", "images_per_s", "data_wait_percent", "peak_memory_gib", "eta_s", "step_ms"}
OF_THE_RUN = {"args", "versions", "digest"}  # of a checkpoint; args name the folder
OTHER_BYTES = {"protocol.json", ".lock"}     # they name folder and process


def shrink() -> None:
    """Make data, networks and pictures small, so that a stage takes seconds; every part of it stays."""
    data.SHAPES_NUM |= {"train": 512, "val": 64}
    vae.VAE_SIZES["tiny"] = dataclasses.replace(vae.VAE_SIZES["tiny"], ch=32)
    sit.SIT_SIZES["tiny/1"] |= {"hidden_size": 48}
    train_vae.EVAL_IMAGES, train_sit.VAL_LATENTS, train_sit.PREVIEW_STEPS = 16, 32, 2


def start(stage, folder: Path, first: Path) -> int:
    """Start a stage in a process group of its own; return its process id. What it prints goes to a file."""
    sys.stdout.flush()
    pid = os.fork()
    with contextlib.suppress(OSError):  # both sides do it: neither knows who is first
        os.setpgid(pid, pid)
    if pid:
        return pid
    code = 1
    try:
        printed = os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1), os.dup2(printed, 2)
        common.cli(lambda: stage.main([*STAGES[stage].format(first=first).split(), "--out", str(folder)]))
        code = 0
    except SystemExit as error:
        code = error.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def unfinished(folder: Path) -> list[str]:
    """Return the temporary files below a folder."""
    return [name for _, _, names in os.walk(folder) for name in names if name.endswith(".tmp")]


def wait(pid: int, folder: Path, seconds: float = 1e9, saves: int = 0) -> tuple[bool, bool]:
    """Wait until the process ends, or kill it; return (whether it was killed, whether in a save).

    It is killed after `seconds`; or, with `saves`, as soon as it is seen to begin its save of that number.
    RuntimeError with what it printed last, if it failed.
    """
    end, began = time.monotonic() + seconds, 0
    saving = bool(unfinished(folder))  # of the run before
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done and status:
            raise RuntimeError(f"{folder}: status {status}\n{folder.with_suffix('.txt').read_text()[-2000:]}")
        if done:
            return False, False
        before, saving = saving, bool(unfinished(folder))
        began += saving and not before
        if time.monotonic() > end or began == saves > 0:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return True, began > 0 and bool(unfinished(folder))
        time.sleep(0.0003)


def soak(stage, first: Path, out: Path, kills: int, draw: random.Random) -> tuple[dict, list[str]]:
    """Kill one stage so many times; return (counts, what differs from the first run)."""
    begin, wrong = time.monotonic(), []
    first, folder, inputs = first / stage.__name__, out / stage.__name__, first
    wait(start(stage, first, inputs), first)
    length = time.monotonic() - begin
    counts = {"kills": 0, "in saves": 0, "starts": 0, "rounds": 0}
    while counts["kills"] < kills and not wrong:
        shutil.rmtree(folder, ignore_errors=True)
        killed = True
        while killed:
            if counts["kills"] == kills:  # now it may end
                when = {}
            elif 2 * counts["in saves"] > counts["kills"]:
                when = {"seconds": draw.uniform(0, length)}
            else:
                when = {"saves": draw.randint(1, 4)}
            killed, in_save = wait(start(stage, folder, inputs), folder, **when)
            counts["starts"] += 1
            counts["kills"] += killed
            counts["in saves"] += in_save
        counts["rounds"] += 1
        wrong = differences(first, folder)
    return {**counts, "seconds": round(time.monotonic() - begin)}, wrong


def differences(first: Path, folder: Path) -> list[str]:
    """Return the names of the files of a stage in which two folders differ, or that only one of them has."""
    ours, theirs = ({str(path.relative_to(part)) for path in part.rglob("*")} for part in (folder, first))
    # A preview of train_sit.py comes after the save of its step and is not drawn later.
    wrong = [name for name in ours ^ theirs if name in ours or not name.startswith("samples_")]
    wrong += [name for name in ours & theirs if content(first / name) != content(folder / name)]
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    names = [stage.__name__ for stage in STAGES]
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("/tmp/soak"), help="what is in it is removed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", default=names, choices=names)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shrink()
    first, out, draw, wrong, total = args.out / "first", args.out / "killed", random.Random(args.seed), [], 0
    for path in (first, out):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    left = [stage for stage in STAGES if stage.__name__ in args.stages]
    for stage in STAGES:
        share = (args.kills - total) // len(left) if stage in left else 0
        counts, differ = soak(stage, first, out, share, draw)
        if stage in left:
            left.remove(stage)
            print(f"{stage.__name__}: " + ", ".join(f"{n} {name}" for name, n in counts.items()), flush=True)
        total += counts["kills"]
        wrong += differ
    print("\n".join(f"differs: {name}" for name in wrong) or f"OK after {total} kills")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
