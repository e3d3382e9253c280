"""Run commands in several gloo processes, as torchrun does, but quickly: all is imported once, then forked.

A job: (processes, command, Python that each process runs first: it sees `rank` and the stages). It ends when
all its processes have, or 10 s after the first of them has failed: torchrun ends the others then.
"""
import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import timm  # noqa: F401  each fork would import it anew
import torch

import common
import encode
import sample
import train_sit
import train_vae

STAGES = {module.__name__: module for module in (train_vae, encode, train_sit, sample)}


def run_jobs(*jobs):
    """Run jobs in a process of their own; return (exit codes of each job by rank, -9 for a process that had
    to be killed; all that went to stderr)."""
    done = subprocess.run([sys.executable, __file__, json.dumps(jobs)], capture_output=True, text=True,
                          timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line[6:]) for line in done.stdout.splitlines() if line[:6] == "codes "], done.stderr


def run_rank(rank, world, port, command, fault):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    exec(fault, {"rank": rank, "os": os, **STAGES})
    name, *flags = command.split()
    common.cli(lambda: importlib.import_module(name).main(flags))


def run_job(world, *job):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, fork = server.getsockname()[1], multiprocessing.get_context("fork")
    processes = [fork.Process(target=run_rank, args=(rank, world, port, *job)) for rank in range(world)]
    for process in processes:
        process.start()
    end = time.monotonic() + 120
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        time.sleep(0.05)
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + 10)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(sys.argv[1]):
        print("codes", json.dumps(run_job(*job)), flush=True)
