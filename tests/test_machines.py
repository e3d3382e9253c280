"""Two torchrun agents on one machine, whose job comes back after one of its processes died (25 s)."""
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_train import SIT, assert_same_gradient, assert_same_run, log_of, run

import checkpoints
import encode
import sample
import train_sit

# What every process does. The last one dies in the step after the second save of "killed", in its first life.
SCRIPT = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import common, encode, sample, train_sit
step, life = train_sit.train_step, os.environ["TORCHELASTIC_RESTART_COUNT"] + os.environ["RANK"]

def dying(nets, batches, number, args, *rest):
    if args.out.endswith("killed") and number == 6 and life == "01":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(nets, batches, number, args, *rest)
train_sit.train_step = dying
common.cli(lambda: [globals()[name].main(flags.split()) for name, flags in json.loads(sys.argv[2])])
"""
STAGES = {  # train_vae.py in two processes: test_train.py
    encode: "--data {pictures} --vae {vae} --workers 0 --device cpu --shard-size 16 --out {out}/latents",
    train_sit: f"--latents {{latents}} {SIT} --steps 1 --out {{out}}/sit",
    sample: "--ckpt {sit} --num-images 5 --steps 3 --device cpu --dtype fp32 --npz --out {out}/samples"}
LONGER = f"--latents {{latents}} {SIT} --steps 9 --save-every 3 --log-every 4 --out {{out}}/"


@pytest.fixture(scope="module")
def two(trained, tmp_path_factory):
    """(the folder that two machines wrote, what they printed): the same training twice, with and without the
    death of a process; then the other stages."""
    out = tmp_path_factory.mktemp("two")
    (out / "script.py").write_text(SCRIPT)
    commands = [("train_sit", f"{LONGER}killed"), ("train_sit", f"{LONGER}whole"),
                *((stage.__name__, flags) for stage, flags in STAGES.items())]
    commands = json.dumps([(name, flags.format(out=out, **vars(trained))) for name, flags in commands])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
               "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", f"--rdzv_id={port}",
               "--local_addr=127.0.0.1", "--max_restarts=3", out / "script.py", ROOT, commands]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
                   "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # docs/machines.md says why
    agents = [subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=environment) for _ in range(2)]
    try:
        printed = "".join([agent.communicate(timeout=180)[0] for agent in agents])
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], printed[-3000:]
    return out, printed


def test_two_machines_do_the_same_as_one_process(trained, two, tmp_path):
    for stage, flags in STAGES.items():
        run(stage, flags.format(out=tmp_path, **vars(trained)))
    assert_same_gradient(*(checkpoints.newest(out / "sit")["optimizer"] for out in (tmp_path, two[0])))
    for path in (tmp_path / "latents").glob("*.npy"):
        assert np.allclose(np.load(path), np.load(two[0] / "latents" / path.name), atol=1e-5), path.name
    ours, theirs = (np.load(out / "samples/samples.npz")["arr_0"].astype(int) for out in (tmp_path, two[0]))
    assert ours.shape == theirs.shape == (5, 32, 32, 3) and np.abs(ours - theirs).max() <= 1


def test_a_job_comes_back_after_the_death_of_a_process_and_ends_as_without(two):
    out, printed = two
    assert "killed/ckpt_0000006.pt at step 6" in printed and not list(out.rglob(".*.tmp"))
    assert_same_run(out / "whole", out / "killed")
    whole, killed = ({row["step"]: row["loss"] for row in log_of(out / name)} for name in ("whole", "killed"))
    assert killed == pytest.approx(whole, rel=1e-5)
