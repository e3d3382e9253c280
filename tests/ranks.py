"""Run commands in several gloo processes, as torchrun does, but quickly: torch is imported once, then forked.

    python tests/ranks.py '[{"world": 3, "commands": ["train_vae --data ..."], "fault": ""}, ...]'

A job ends when all its processes have, or 10 s after the first of them has failed: torchrun ends the others
then. Prints a JSON line a job: {"codes": exit codes by rank (-9: it had to be killed), "first": ranks that
failed by themselves}. fault: Python that each process runs first; it sees `rank`.
"""
import importlib
import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import common
import encode  # these four are imported here once, for all processes
import sample
import train_sit
import train_vae

assert encode and sample and train_sit and train_vae


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_rank(rank, job, ports):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["world"]),
                   "MASTER_ADDR": "127.0.0.1"}
    exec(job.get("fault", ""), {"rank": rank, "os": os, "train_vae": train_vae})
    for command, port in zip(job["commands"], ports):
        os.environ["MASTER_PORT"] = str(port)
        name, *flags = command.split()
        common.cli(lambda: importlib.import_module(name).main(flags))


def run_job(job):
    ports, fork = [free_port() for _ in job["commands"]], multiprocessing.get_context("fork")
    processes = [fork.Process(target=run_rank, args=(rank, job, ports)) for rank in range(job["world"])]
    for process in processes:
        process.start()
    failed = None
    while any(process.is_alive() for process in processes):
        time.sleep(0.05)
        if failed is None and any(process.exitcode for process in processes):
            failed = time.monotonic()
        if failed and time.monotonic() > failed + 10:
            break
    first = [rank for rank, process in enumerate(processes) if process.exitcode]
    for process in processes:
        process.kill()
        process.join()
    return {"codes": [process.exitcode for process in processes], "first": first}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(sys.argv[1]):
        print(json.dumps(run_job(job)), flush=True)
