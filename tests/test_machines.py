"""Several machines: two torchrun agents on one, and a job that comes back after one of its processes died.

Run: ./test.sh tests/test_machines.py     (about 40 s)
"""
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_train import (SIT, VAE, assert_same_gradient, assert_same_run, assert_same_vae_step, log_of, run)

import checkpoints
import encode
import sample
import train_sit
import train_vae

# What every process does. The last one dies in the step after the second save, in its first life alone.
SCRIPT = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import common, encode, sample, train_sit, train_vae

def main():
    step, first_life = train_sit.train_step, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    def dying(nets, batches, number, *rest):
        if number == 6 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1 and first_life:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(nets, batches, number, *rest)
    if sys.argv[3:] == ["dying"]:
        train_sit.train_step = dying
    for name, flags in json.loads(sys.argv[2]):
        globals()[name].main(flags.split())
common.cli(main)
"""


def two_machines(tmp_path, commands, *more, restarts=0, each=1):
    """Run (script, flags) in turn, by two torchrun agents of `each` processes; return what they printed."""
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    begin = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc_per_node={each}",
             "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", f"--rdzv_id={port}",
             "--local_addr=127.0.0.1", f"--max_restarts={restarts}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
                   "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # docs/machines.md says why
    agents = [subprocess.Popen([*begin, tmp_path / "script.py", ROOT, json.dumps(commands), *more], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
              for _ in range(2)]
    try:
        printed = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(printed)[-3000:]
    return "".join(printed)


def commands_for(trained, out):
    """(script, flags) of all stages, and of a longer training of the SiT."""
    return [
        ("train_vae", f"--data {trained.pictures} {VAE} --init {trained.vae} --steps 1 --out {out}/vae"),
        ("encode", f"--data {trained.pictures} --vae {trained.vae} --workers 0 --device cpu --shard-size 16 "
                   f"--out {out}/latents"),
        ("train_sit", f"--latents {trained.latents} {SIT} --steps 1 --out {out}/sit"),
        ("sample", f"--ckpt {trained.sit} --num-images 5 --steps 3 --device cpu --dtype fp32 --npz "
                   f"--out {out}/samples"),
        ("train_sit", f"--latents {trained.latents} {SIT} --steps 12 --save-every 3 --log-every 4 "
                      f"--out {out}/long")]


@pytest.fixture(scope="module")
def two(trained, tmp_path_factory):
    """The folder that two machines wrote."""
    folder = tmp_path_factory.mktemp("two")
    two_machines(folder, commands_for(trained, folder))
    return folder


def test_two_machines_do_the_same_as_one_process(trained, two, tmp_path):
    for name, flags in commands_for(trained, tmp_path)[:4]:
        run(globals()[name], flags)
    vae, sit = ([checkpoints.newest(out / stage) for out in (tmp_path, two)] for stage in ("vae", "sit"))
    assert_same_vae_step(*vae)
    assert_same_gradient(sit[0]["optimizer"], sit[1]["optimizer"])
    for path in (tmp_path / "latents").glob("*.npy"):
        assert np.allclose(np.load(path), np.load(two / "latents" / path.name), atol=1e-5), path.name
    ours, theirs = (np.load(out / "samples" / "samples.npz")["arr_0"].astype(int) for out in (tmp_path, two))
    assert ours.shape == theirs.shape == (5, 32, 32, 3) and np.abs(ours - theirs).max() <= 1


def test_a_job_comes_back_after_the_death_of_a_process_and_ends_as_without(trained, two, tmp_path):
    printed = two_machines(tmp_path, commands_for(trained, tmp_path)[4:], "dying", restarts=3)
    assert "continuing from" in printed and "at step 6" in printed
    assert_same_run(two / "long", tmp_path / "long")
    ours, theirs = ({row["step"]: row["loss"] for row in log_of(out / "long")} for out in (two, tmp_path))
    assert theirs == pytest.approx(ours, rel=1e-5) and not list(tmp_path.rglob(".*.tmp"))
