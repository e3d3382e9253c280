"""Runs that are stopped, doubled, short of disk, or whose processes do not agree; damaged checkpoints.

Run: ./test.sh tests/test_faults.py        (about 40 s on 2 cores)
Kills at random: tests/soak.py. Restarts by torchrun: test_machines.py.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_train import SIT, VAE, assert_same_gradient, assert_same_vae_step, log_of, run

import checkpoints
import data
import train_vae

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
PLAIN = f"{VAE} --gan 0 --align 0"  # two networks fewer: for what does not concern them


def start(command, **kwargs):
    """Start a command in a process of its own."""
    script, *flags = command.split()
    return subprocess.Popen([sys.executable, ROOT / f"{script}.py", *flags], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, cwd=ROOT, **kwargs)


def finish(command, **kwargs):
    """Return (exit code, stdout, lines of stderr without the bar) of a command."""
    process = start(command, **kwargs)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, [line for line in err.replace("\r", "\n").splitlines() if line.strip()]


def run_jobs(*jobs):
    """Run jobs of tests/ranks.py; return (their results, all that was printed on stderr)."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "ranks.py", json.dumps(jobs)], cwd=ROOT,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"codes"')], done.stderr


def wait_for(condition, process):
    while not condition():
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()


# one process

def test_a_second_run_into_a_folder_is_refused_until_the_first_is_gone(pictures, trained, tmp_path):
    command = f"train_vae --data {pictures} {PLAIN} --steps 100000 --save-every 1 --out {tmp_path}"
    process = start(command)
    wait_for(lambda: checkpoints.checkpoints_in(tmp_path), process)
    for flags in (command, f"train_sit --latents {trained.latents} {SIT} --steps 1 --out {tmp_path}",
                  f"encode --data {pictures} --vae {trained.vae} --device cpu --out {tmp_path}",
                  f"sample --ckpt {trained.sit} --device cpu --steps 1 --out {tmp_path}"):
        script, *flags = flags.split()
        with pytest.raises(ValueError, match="another run writes there"):
            __import__(script).main(flags)
    process.kill()
    process.communicate()
    (tmp_path / ".ckpt_0000077.pt.tmp").write_bytes(b"of a run that was killed while it saved")
    step = checkpoints.newest(tmp_path)["step"]
    run(train_vae, f"--data {pictures} {PLAIN} --steps {step + 1} --out {tmp_path}")
    assert checkpoints.newest(tmp_path)["step"] == step + 1 and not [*tmp_path.glob(".*.tmp")]


def test_a_full_disk_ends_a_run_by_one_line_and_keeps_what_was_there(pictures, tmp_path):
    """The size of files is limited for the process, which fails as on a full disk."""
    command = f"train_vae --data {pictures} {PLAIN} --save-every 1 --out {tmp_path}"
    run(train_vae, f"--data {pictures} {PLAIN} --steps 2 --out {tmp_path}")
    limit = """if True:
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        import common, train_vae
        common.cli(lambda: train_vae.main(sys.argv[1:]))"""
    done = subprocess.run([sys.executable, "-c", limit, *command.split()[1:], "--steps", "4"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "ckpt_0000003.pt: not written" in line and "MiB free" in line and "is kept" in line
    assert checkpoints.newest(tmp_path)["step"] == 2 and not [*tmp_path.glob(".*.tmp")]


def test_flipped_bits_in_a_checkpoint_are_noticed_and_the_one_before_is_taken(trained, tmp_path, capsys):
    """Or they do no harm: in the padding between the parts of the file."""
    saved = {"format": checkpoints.VAE, "progress": {}, "numbers": [1.5, {"lr": 3e-4}], "tensors": {
        "a": torch.randn(999), "b": torch.arange(7, dtype=torch.uint8), "c": torch.randn(8, 8).bfloat16()}}
    for step in (1, 2):
        checkpoints.save(tmp_path, step, saved | {"step": step}, keep=2)
    file, rng, harmless = tmp_path / "ckpt_0000002.pt", np.random.default_rng(0), 0
    whole = file.read_bytes()
    for _ in range(150):
        flipped, place = bytearray(whole), rng.integers(len(whole))
        flipped[place] ^= 1 << rng.integers(8)
        file.write_bytes(flipped)
        newest = checkpoints.newest(tmp_path)
        if newest["step"] == 2:
            harmless += 1
            newest = {key: newest[key] for key in (*saved, "step")}
            assert checkpoints.digest(newest) == checkpoints.digest(saved | {"step": 2})
    assert harmless < 60 and "passing over this checkpoint" in capsys.readouterr().out


def test_latents_keep_the_vae_that_they_need(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoints.save(tmp_path, step, {"step": step}, keep=1)
        if step == 2:
            checkpoints.keep_for_latents(tmp_path / "ckpt_0000002.pt")
    assert sorted(checkpoints.checkpoints_in(tmp_path)) == [2, 4]


CHANGES = [  # (flags of the first run, of the second, what is refused, or said and done)
    ("train_vae", "", "--seed 1", "--seed 0, not 1"), ("train_vae", "", "--data {other}", "images_hash"),
    ("train_vae", "--gan 1", "--gan 1 --bn-group 2", "--bn-group 4, not 2"),
    ("train_vae", "", "--gan 1", "GAN False"), ("train_vae", "", "--lr 5e-4 --kl 1e-3", None),
    ("train_sit", "", "--seed 1", "--seed 0, not 1"),
    ("train_sit", "", "--latents {other}", "latents_hash"),
    ("train_sit", "", "--lr 5e-4 --batch-size 4", None)]


@pytest.mark.parametrize("script, before, after, refused", CHANGES)
def test_what_makes_another_run_is_refused_and_other_changes_are_said(
        script, before, after, refused, trained, tmp_path, capsys):
    base = {"train_vae": f"--data {trained.pictures} {PLAIN}",
            "train_sit": f"--latents {trained.latents} {SIT}"}
    other = shutil.copytree(base[script].split()[1], tmp_path / "other")
    if script == "train_vae":  # one picture is another one, of the same name and size
        pixels = sorted((other / "a").iterdir())
        pixels[3].write_bytes(pixels[4].read_bytes())
    else:  # two images have changed their classes
        latents = data.LatentFolder(other)
        latents.labels[[0, -1]] = latents.labels[[-1, 0]]
        np.save(other / "labels.npy", latents.labels)
        facts = latents.facts | {"latents_hash": latents.hash_latents(latents.labels)}
        (other / "meta.json").write_text(json.dumps(facts))
    main, base = __import__(script).main, f"{base[script]} --out {tmp_path}/out"
    main(f"{base} {before} --steps 1".split())
    capsys.readouterr()
    flags = f"{base} {after.format(other=other)} --steps 3".split()
    if refused:
        for dry in (["--dry-run"], []):  # which says so, too
            with pytest.raises(ValueError, match=refused):
                main([*flags, *dry])
        return
    main(flags)
    printed = capsys.readouterr().out
    saved = checkpoints.newest(tmp_path / "out")
    assert "lr 0.001 -> 0.0005" in printed and saved["images_seen"] == 8 + 2 * (4 if "size 4" in after else 8)
    main(flags)
    assert "nothing left to do at step 3 of 3" in capsys.readouterr().out


def test_an_evaluation_that_was_not_reached_is_made_up_for(pictures, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    flags = f"--data {pictures} {PLAIN} --eval-every 2 --out {tmp_path} --steps"
    with monkeypatch.context() as patch:
        patch.setattr(train_vae, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            run(train_vae, f"{flags} 2")
    run(train_vae, f"{flags} 2")
    assert [row["step"] for row in log_of(tmp_path, "psnr_db")] == [2]


# several processes

def test_one_three_and_four_processes_take_the_same_step(trained, tmp_path):
    """Two: test_train.py."""
    jobs = [{"world": world, "commands": [
        f"train_vae --data {trained.pictures} {VAE} --batch-size 24 --bn-group 2 --micro-batch-size {micro} "
        f"--init {trained.vae} --steps 1 --out {tmp_path}/{world}/vae",
        f"train_sit --latents {trained.latents} {SIT} --batch-size 24 --micro-batch-size {micro} --steps 1 "
        f"--out {tmp_path}/{world}/sit"]} for world, micro in ((1, 0), (3, 8), (4, 2))]
    results, errors = run_jobs(*jobs)
    assert [result["codes"] for result in results] == [[0] * world for world in (1, 3, 4)], errors
    one = [checkpoints.newest(tmp_path / "1" / stage) for stage in ("vae", "sit")]
    for world in (3, 4):
        vae, sit = (checkpoints.newest(tmp_path / str(world) / stage) for stage in ("vae", "sit"))
        # Another order of sums may turn a hinge or a LeakyReLU around; a wrong scale would be off by a half.
        assert_same_vae_step(one[0], vae, tolerance=1e-2)
        assert_same_gradient(one[1]["optimizer"], sit["optimizer"], tolerance=2e-4)
        assert vae["images_seen"] == sit["images_seen"] == 24


def test_processes_that_fail_or_do_not_agree_end_the_job_by_their_line(trained, tmp_path):
    """Rank 2 of 3 raises in the middle; two ranks see other checkpoints, or other images. No rank hangs that
    has something to say; the others are torchrun's to end."""
    run(train_vae, f"--data {trained.pictures} {PLAIN} --steps 1 --out {tmp_path}/0/vae")
    (tmp_path / "1").mkdir()
    shutil.copytree(trained.pictures, tmp_path / "1" / "pictures")
    shutil.copytree(trained.pictures, tmp_path / "0" / "pictures")
    next((tmp_path / "1" / "pictures" / "a").iterdir()).unlink()
    job = {"world": 2, "fault": f"os.chdir(f'{tmp_path}/{{rank}}')"}  # each has a disk of its own
    raises = "if rank == 2: train_vae.train_step = lambda *args: 1 / 0"
    command = f"train_vae {PLAIN} --batch-size 12 --steps 9 --data"
    results, errors = run_jobs(
        {"world": 3, "fault": raises, "commands": [f"{command} {trained.pictures} --out {tmp_path}/three"]},
        {**job, "commands": [f"{command} {trained.pictures} --out vae"]},
        {**job, "commands": [f"{command} pictures --out new"]})
    assert 2 in results[0]["first"] and results[0]["codes"][2] == 1 and "error: division by zero" in errors
    for result, word in zip(results[1:], ("checkpoint", "images_hash")):
        assert result["codes"] == [2, 2], errors
        assert f"processes see different {word}: process 0 " in errors


@pytest.mark.parametrize("fault, code, word", [
    ("raise ValueError('rank 1 cannot')", 2, "error: rank 1 cannot"),
    ("os.kill(os.getpid(), 9)", -9, "SIGKILL")])
def test_torchrun_ends_with_the_line_of_the_rank_that_failed(fault, code, word, trained, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""if True:
        import os, sys
        sys.path.insert(0, {str(ROOT)!r})
        import common, train_vae
        step = train_vae.train_step
        def train_step(*args):
            if args[2] == 2 and os.environ["RANK"] == "1":
                {fault}
            return step(*args)
        train_vae.train_step = train_step
        common.cli(lambda: train_vae.main(sys.argv[1:]))""")
    flags = f"--data {trained.pictures} {PLAIN} --steps 100000 --save-every 1 --out {tmp_path}/out"
    begin = time.monotonic()
    done = subprocess.run([*TORCHRUN, script, *flags.split()], capture_output=True, text=True, timeout=120)
    end = [line for line in done.stderr.splitlines() if line.strip(" =")][-3:]
    assert done.returncode and any(word in line for line in end), done.stderr[-3000:]
    assert time.monotonic() - begin < 60 and checkpoints.newest(tmp_path / "out")["step"] == 2


def test_a_signal_to_every_process_of_torchrun_saves_the_run(pictures, tmp_path):
    """As a cgroup's stop: torchrun passes the signal on, so that each process gets it twice."""
    flags = f"--data {pictures} {PLAIN} --steps 100000 --save-every 100000 --out {tmp_path}"
    process = subprocess.Popen([*TORCHRUN, ROOT / "train_vae.py", *flags.split()], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: (Path(tmp_path) / "log.jsonl").exists() and len(log_of(tmp_path)) > 3, process)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    step = checkpoints.newest(tmp_path)["step"]
    assert process.returncode and step > 3 and log_of(tmp_path)[-1]["step"] == step
