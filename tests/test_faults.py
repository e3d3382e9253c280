"""Runs that are stopped, doubled, short of disk, or whose processes do not agree; damaged checkpoints (25 s).
Kills at random: tests/soak.py. Restarts by torchrun: test_machines.py."""
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from ranks import run_jobs
from test_parts import drawn, same_samples  # noqa: F401
from test_train import CPU, SIT, VAE, assert_same_gradient, assert_same_vae_step, log_of, run

import checkpoints
import common
import data
import encode
import sample
import train_sit
import train_vae

PLAIN = f"{VAE} --gan 0 --align 0"  # two networks fewer: for what does not concern them
STEP = f"{VAE} --batch-size 12 --bn-group 2 --steps 1"


def hold(folder):
    common.claim(folder, CPU)
    (folder / "held").touch()
    time.sleep(100)


def test_a_second_run_into_a_folder_is_refused_until_the_first_is_gone(trained, tmp_path):
    first = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path,), daemon=True)
    first.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.05)
        assert first.is_alive()
    flags = f"--ckpt {trained.sit} --device cpu --num 1 --steps 1"
    for stage, flags in ((train_vae, f"--data {trained.pictures} {PLAIN}"),
                         (train_sit, f"--latents {trained.latents} {SIT}"),
                         (encode, f"--data {trained.pictures} --vae {trained.vae} --device cpu"),
                         (sample, flags)):
        with pytest.raises(ValueError, match="another run writes there"):
            stage.main([*flags.split(), "--out", str(tmp_path)])
    first.kill()
    first.join()
    (tmp_path / ".ckpt_0000077.pt.tmp").write_bytes(b"of a run that was killed while it saved")
    run(sample, f"{flags} --out {tmp_path}")
    assert (tmp_path / "grid.png").exists() and not [*tmp_path.glob(".*.tmp")]


def test_a_full_disk_ends_a_run_by_one_line_and_keeps_all(pictures, tmp_path, monkeypatch, capsys):
    """The size of files is limited for the process, which fails as on a full disk."""
    flags = f"--data {pictures} {PLAIN} --out {tmp_path} --steps"
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    run(train_vae, f"{flags} 1")
    monkeypatch.setattr(os, "_exit", sys.exit)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most[1]))
    try:
        with pytest.raises(SystemExit, match="^1$"):
            common.cli(lambda: run(train_vae, f"{flags} 2"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    printed = capsys.readouterr().err
    for part in ("ckpt_0000002.pt: not written", "MiB free", "is kept"):
        assert part in printed.splitlines()[-1]
    assert "Traceback" not in printed and not [*tmp_path.glob(".*.tmp")]
    assert checkpoints.newest(tmp_path)["step"] == 1


def test_flipped_bits_in_a_checkpoint_are_noticed_and_the_one_before_is_taken(tmp_path, capsys):
    """Or they do no harm: in the padding between the parts of the file."""
    tensors = torch.randn(999), torch.arange(7, dtype=torch.uint8), torch.randn(8, 8).bfloat16()
    saved = {"format": checkpoints.VAE, "numbers": [1.5, {"lr": 3e-4}], "tensors": tensors}
    for step in (1, 2):
        checkpoints.save(tmp_path, step, saved | {"step": step}, keep=2)
    file, rng, harmless = tmp_path / "ckpt_0000002.pt", np.random.default_rng(0), 0
    whole = file.read_bytes()
    for _ in range(100):
        flipped, place = bytearray(whole), rng.integers(len(whole))
        flipped[place] ^= 1 << rng.integers(8)
        file.write_bytes(flipped)
        newest = checkpoints.newest(tmp_path)
        if newest["step"] == 2:
            harmless += 1
            assert newest["numbers"] == saved["numbers"] and newest["format"] == saved["format"]
            assert all(map(torch.equal, newest["tensors"], tensors))
    assert harmless < 40 and "passing over this checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("script, other, changed, seen", [
    (train_vae, "images_hash", "--lr 5e-4 --kl 1e-3", 24),
    (train_sit, "latents_hash", "--lr 5e-4 --batch-size 4", 16)])
def test_what_makes_another_run_is_refused_and_other_changes_are_said(
        script, other, changed, seen, trained, tmp_path, capsys):
    base = f"--latents {trained.latents} {SIT}"
    if script is train_vae:
        base = f"--data {trained.pictures} {PLAIN}"
    source, there = base.split()[:2]
    folder, base = shutil.copytree(there, tmp_path / "other"), f"{base} --out {tmp_path}/out --steps"
    if script is train_vae:  # one picture is another one, of the same name and size
        shutil.copy(folder / "a/0.png", folder / "a/2.png")
    else:  # two images have changed their classes
        latents = data.LatentFolder(folder)
        latents.labels[[0, -1]] = latents.labels[[-1, 0]]
        np.save(folder / "labels.npy", latents.labels)
        facts = latents.facts | {"latents_hash": latents.hash_latents(latents.labels)}
        (folder / "meta.json").write_text(json.dumps(facts))
    script.main(f"{base} 1".split())
    cases = [("--seed 1", "seed 0, not 1"), (f"{source} {folder}", other)]
    if script is train_sit:
        cases += [("--qk-norm", "qk_norm False, not"), ("--repa --teacher shapes", "repa False, not True")]
    for flags, refused in cases:
        for dry in ("--dry-run", ""):  # which says so, too
            with pytest.raises(ValueError, match=refused):
                script.main(f"{base} 3 {flags} {dry}".split())
    for said in ("lr 0.001 -> 0.0005", "nothing left to do at step 3 of 3"):
        script.main(f"{base} 3 {changed}".split())
        assert said in capsys.readouterr().out
    assert checkpoints.newest(tmp_path / "out")["images_seen"] == seen


def test_an_evaluation_that_was_not_reached_is_made_up_for(pictures, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    flags = f"--data {pictures} {PLAIN} --eval-every 1 --out {tmp_path} --steps 1"
    with monkeypatch.context() as patch:
        patch.setattr(train_vae, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            run(train_vae, flags)
    run(train_vae, flags)
    assert [row["step"] for row in log_of(tmp_path, "psnr_db")] == [1]


# several processes

IN_A_STEP = """
import signal
step = train_sit.train_step
def train_step(nets, batches, number, *rest):
    if number == 3:
        {fault}
    return step(nets, batches, number, *rest)
train_sit.train_step = train_step"""
# As a cgroup's stop: torchrun passes the signal on, so that each process gets it twice.
TWICE = IN_A_STEP.format(fault="[os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]")
RAISES = IN_A_STEP.format(fault="rank == 2 and 1 / 0")
KILLED = """
import numpy, signal
write, parts = numpy.savez, []
def die(file, *arrays):
    parts.append(file)
    if len(parts) == 2:
        file.write(b"half a part")
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, *arrays)
numpy.savez = die"""


@pytest.fixture(scope="module")
def jobs(trained, drawn, tmp_path_factory):  # noqa: F811
    """(folder, {job: exit codes of its processes}, what all jobs printed on stderr); one start for all."""
    out = tmp_path_factory.mktemp("jobs")
    vae, sit = f"train_vae --data {trained.pictures}", f"train_sit --latents {trained.latents} {SIT}"
    for rank in "01":  # each has a disk of its own
        shutil.copytree(trained.pictures, out / rank / "pictures")
        shutil.copytree(trained.latents, out / rank / "latents")
    facts = json.loads((out / "1/latents/meta.json").read_text())
    (out / "1/latents/meta.json").write_text(json.dumps({**facts, "latents_hash": None}))  # of older latents
    next((out / "1/pictures/a").iterdir()).unlink()
    for folder, kind in (("vae", checkpoints.VAE), ("sit", checkpoints.SIT)):
        checkpoints.save(out / "0" / folder, 1, {"format": kind, "step": 1}, keep=1)
    apart = f"os.chdir(f'{out}/{{rank}}')"
    table = {
        "vae3": (3, f"{vae} {STEP} --init {trained.vae} --micro-batch-size 2 --out {out}/vae3", ""),
        "sit3": (3, f"{sit} --batch-size 12 --steps 1 --out {out}/sit3", ""),
        "sit4": (4, f"{sit} --batch-size 12 --steps 1 --micro-batch-size 1 --out {out}/sit4", ""),
        "raises": (3, f"{sit} --batch-size 12 --steps 99 --out {out}/raises", RAISES),
        "twice": (2, f"{sit} --steps 999 --out {out}/twice", TWICE),
        "pictures": (2, f"train_vae --data pictures {PLAIN} --steps 2 --out new", apart),
        "vae": (2, f"{vae} {PLAIN} --steps 2 --out vae", apart),
        "sit": (2, f"{sit} --steps 2 --out sit", apart),
        "latents": (2, f"train_sit --latents latents {SIT} --steps 2 --out {out}/new", apart),
        "killed": (3, f"sample {drawn[0]} --out {out}/killed", KILLED)}
    codes, errors = run_jobs(*table.values())
    return out, dict(zip(table, codes)), errors


def test_one_three_and_four_processes_take_the_same_step(trained, jobs, tmp_path):
    """Two: test_train.py. Another order of sums may turn a hinge or a LeakyReLU of the VAE's losses around; a
    wrong scale would be off by a half."""
    out, codes, errors = jobs
    assert codes["vae3"] + codes["sit3"] + codes["sit4"] == [0] * 10, errors
    run(train_vae, f"--data {trained.pictures} {STEP} --init {trained.vae} --out {tmp_path}/vae")
    run(train_sit, f"--latents {trained.latents} {SIT} --batch-size 12 --steps 1 --out {tmp_path}/sit")
    assert_same_vae_step(checkpoints.newest(tmp_path / "vae"), checkpoints.newest(out / "vae3"), 1e-2)
    one, *more = (checkpoints.newest(path) for path in (tmp_path / "sit", out / "sit3", out / "sit4"))
    for other in more:
        assert_same_gradient(one["optimizer"], other["optimizer"], tolerance=2e-4)
        assert one["images_seen"] == other["images_seen"] == 12


def test_processes_that_fail_or_do_not_agree_end_the_job_by_their_line(jobs):
    """Rank 2 of 3 raises in the middle; two ranks see other checkpoints, or other images. No rank hangs that
    has something to say; the others are torchrun's to end."""
    _, codes, errors = jobs
    assert codes["raises"][2] == 1 and 0 not in codes["raises"] and "error: division by zero" in errors
    assert codes["pictures"] == codes["vae"] == codes["sit"] == codes["latents"] == [2, 2], errors
    for word, count in (("images_hash", 2), ("checkpoint", 4), ("latents_hash", 2)):
        assert errors.count(f"processes see different {word}: process 0 ") == count


def test_a_signal_to_every_process_saves_the_run_at_one_step(jobs):
    out, codes, errors = jobs
    assert codes["twice"] == [143, 143], errors
    step = checkpoints.newest(out / "twice")["step"]
    assert 4 <= step <= 11 and log_of(out / "twice")[-1]["step"] == step


def test_samples_of_killed_processes_are_continued_to_the_same_bits(drawn, jobs, monkeypatch):  # noqa: F811
    """Three, each killed while it writes its second part; then one."""
    (flags, whole), out = drawn, jobs[0] / "killed"
    parts, flags = out / "parts", f"{flags} --out {out}"
    assert jobs[1]["killed"] == [-9] * 3, jobs[2]
    assert {file.name for file in parts.iterdir()} == {"settings.json"} | {
        f"part-{i:05d}.npz" if i < 3 else f".part-{i:05d}.npz.tmp" for i in range(6)}
    for name, value in (("cfg", 2), ("seed", 1), ("batch-size", 5), ("steps", 4)):
        with pytest.raises(ValueError, match=f"{name.replace('-', '_')} .*, not {value}.* remove"):
            run(sample, f"{flags} --{name} {value}")
    damaged = bytearray((parts / "part-00001.npz").read_bytes())
    damaged[1000] ^= 1
    (parts / "part-00001.npz").write_bytes(damaged)
    calls, draw = [], sample.draw_latents
    monkeypatch.setattr(sample, "draw_latents", lambda *given: calls.append(given[2]) or draw(*given))
    run(sample, flags)
    assert [batch[0] // 4 for batch in calls] == [1, 3, 4, 5] and same_samples(out, whole)
