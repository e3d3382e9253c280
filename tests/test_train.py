"""The stages: resume, micro-batches, two processes, NaN batches, steps by hand, the effect of every flag.

Run: ./test.sh tests/test_train.py        (about 40 s on 2 cores)
Networks are narrower than the tiny ones, the teacher is the shipped one. Processes are those of ranks.py.
"""
import copy
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_trained
from PIL import Image
from ranks import run_jobs
from torch.utils._pytree import tree_flatten

import checkpoints
import common
import data
import encode
import sample
import small
import train_sit
import train_vae
from sit import SIT_SIZES
from vae import VAE_SIZES

CPU = common.Proc(0, 1, torch.device("cpu"))
RUN = "--device cpu --dtype fp32 --workers 0 --batch-size 8 --log-every 1 --lr 1e-3"
VAE = (f"{RUN} --vae tiny --init none --teacher shapes --lpips 0 --image-size 32 --projector-dim 64 "
       "--bn-group 4")
SIT = f"{RUN} --model tiny/1 --sample-every 0"
REPA = "--repa --teacher shapes --repa-block 2"


def run(script, flags):
    script.main(flags.split())
    common.LOCKS.clear()  # this process lives on, but the run has ended


def log_of(folder, key="loss"):
    """The rows of log.jsonl that hold `key`."""
    rows = [json.loads(line) for line in open(f"{folder}/log.jsonl")]
    return [row for row in rows if key in row]


def assert_same(a, b):
    """Nested dicts and lists are equal, tensors bit for bit."""
    (a, keys), (b, other_keys) = tree_flatten(a), tree_flatten(b)
    assert keys == other_keys
    assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b))


def assert_same_run(a, b):
    a, b = checkpoints.newest(a), checkpoints.newest(b)
    for key in a.keys() - {"args", "versions", "path"}:
        assert_same(a[key], b[key])


def assert_same_gradient(a, b, tolerance=2e-5):
    """Adam's first moments after one step are the gradients. Compare those: where a gradient is zero but for
    rounding (a bias before a norm) Adam turns the rounding into a step of full size."""
    a, b = ([entry["exp_avg"] for entry in state["state"].values()] for state in (a, b))
    largest = max(float(x.abs().max()) for x in a)
    assert len(a) == len(b) > 0
    assert max(float((x - y).abs().max()) for x, y in zip(a, b)) <= tolerance * largest


def assert_same_vae_step(a, b, tolerance=2e-5):
    """Of two checkpoints after one step: gradients, and BatchNorm statistics of mapper and discriminator."""
    for optimizer in ("optimizer", "optimizer_disc"):
        assert_same_gradient(a[optimizer], b[optimizer], tolerance)
    for part in ("mapper", "discriminator"):
        running = [key for key in a[part] if "running" in key]
        assert running and all(torch.allclose(a[part][key], b[part][key], atol=1e-6) for key in running)


# The tiny networks are narrower here, for the sake of time, and in the processes that are started.
NARROW = """
from dataclasses import replace
from sit import SIT_SIZES
from vae import VAE_SIZES
VAE_SIZES["tiny"] = replace(VAE_SIZES["tiny"], ch=32)
SIT_SIZES["tiny/1"] = {**SIT_SIZES["tiny/1"], "hidden_size": 48}
"""


@pytest.fixture(scope="module", autouse=True)
def narrow():
    before = VAE_SIZES["tiny"], SIT_SIZES["tiny/1"]
    exec(NARROW, {})
    yield
    VAE_SIZES["tiny"], SIT_SIZES["tiny/1"] = before


@pytest.fixture(scope="module")
def trained(narrow, pictures, tmp_path_factory):
    return make_trained(pictures, tmp_path_factory.mktemp("trained"))


def batch_of(trained, rows):
    """A batch for either trainer: images, their latents and labels; row i is image i."""
    latents, images = data.LatentFolder(trained.latents), data.ImageFolder(trained.pictures, 32)
    return {**train_sit.WithImages(latents, images).batch(rows), "rows": torch.tensor(rows)}


def vae_nets(flags=""):
    """(networks, args) of train_vae.py, before the first step."""
    args = train_vae.parse_args(f"{VAE} {flags}".split())
    torch.manual_seed(0)
    return train_vae.build(args, CPU), args


def sit_nets(trained, flags=""):
    """(networks, args) of train_sit.py, with random weights also where training starts from zeros."""
    args = train_sit.parse_args(f"{SIT} {flags}".split())
    nets = train_sit.build(args, data.LatentFolder(trained.latents), CPU)
    model = small.small_sit(input_size=4, in_channels=28, num_classes=2, **SIT_SIZES[args.model])
    nets.model.load_state_dict(model.state_dict(), strict=False)
    nets.ema = common.EMA(nets.model, args.ema)
    return nets, args


# whole runs

def test_a_vae_run_that_was_stopped_continues_bit_for_bit(trained, tmp_path, capsys):
    """3 steps at once against 1 + 2, with GAN and mapper. The second part needs no start file any more, and
    evaluation, in all steps or at the end, changes nothing."""
    start = shutil.copytree(trained.vae, tmp_path / "start")
    flags = f"--data {trained.pictures} {VAE} --init {start} --disc-init {start}"
    run(train_vae, f"{flags} --val {trained.pictures} --eval-every 1 --steps 3 --out {tmp_path}/whole")
    run(train_vae, f"{flags} --eval-every 0 --steps 1 --out {tmp_path}/parts")
    shutil.rmtree(start)
    for said in (1, 0):  # the second time nothing is left to do
        capsys.readouterr()
        run(train_vae, f"{flags} --eval-every 0 --steps 3 --out {tmp_path}/parts")
        assert capsys.readouterr().out.count(f"done: {tmp_path}/parts, step 3") == said
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    for name, steps, images in (("whole", [1, 2, 3], "validation"), ("parts", [1, 3], "training")):
        evaluated = log_of(tmp_path / name, "psnr_db")
        assert [row["step"] for row in evaluated] == steps and evaluated[0]["eval_images"] == images
        assert Image.open(tmp_path / name / "reconstructions_0000003.png").size == (8 * 32, 4 * 32)


def test_a_sit_run_that_was_stopped_continues_bit_for_bit(trained, tmp_path, monkeypatch):
    """With REPA. Held-out losses and pictures, in one of the two runs only, change nothing. A torn
    row of the log goes."""
    monkeypatch.setattr(train_sit, "PREVIEW_STEPS", 2)
    flags = f"--latents {trained.latents} {SIT} {REPA}"
    run(train_sit, f"{flags} --steps 3 --save-every 1 --keep 2 --out {tmp_path}/whole")
    flags += f" --val-latents {trained.latents} --val-every 1 --sample-every 2 --out {tmp_path}/parts"
    run(train_sit, f"{flags} --steps 1")
    log = tmp_path / "parts" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 1, "to')
    run(train_sit, f"{flags} --steps 3")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert [row["step"] for row in log_of(tmp_path / "parts", "val_flow")] == [1, 2, 3]
    files = {name: sorted(os.listdir(tmp_path / name)) for name in ("whole", "parts")}
    assert files["whole"] == [".lock", "ckpt_0000002.pt", "ckpt_0000003.pt", "log.jsonl"]
    assert files["parts"][-3:] == [f"samples_000000{step}.png" for step in (1, 2, 3)]


def test_a_checkpoint_is_of_its_step_though_it_is_written_while_others_run(trained, tmp_path, monkeypatch):
    """The first is written once step 3 has begun; where that fails, step 4 does not begin."""
    flags, step = f"--latents {trained.latents} {SIT}", train_sit.train_step
    begun, written = threading.Event(), threading.Event()
    run(train_sit, f"{flags} --steps 1 --out {tmp_path}/one")

    def train_step(nets, batches, number, *rest):
        if number == 2:
            begun.set()
            assert written.wait(20)
            time.sleep(0.2)  # the error is there
        assert number < 3
        return step(nets, batches, number, *rest)

    def save(*given, save=checkpoints.save):
        assert begun.wait(20)
        save(*given)
        written.set()
        raise OSError("the disk is full")
    monkeypatch.setattr(train_sit, "train_step", train_step)
    monkeypatch.setattr(checkpoints, "save", save)
    with pytest.raises(OSError, match="full"):
        run(train_sit, f"{flags} --steps 9 --out {tmp_path}/nine")
    assert_same(*(torch.load(tmp_path / name / "ckpt_0000001.pt", weights_only=True)["optimizer"]
                  for name in ("one", "nine")))


@pytest.mark.parametrize("script, flags", [
    (train_vae, f"--data {{pictures}} {VAE} --micro-batch-size 4"),
    (train_sit, f"--latents {{latents}} {SIT} --micro-batch-size 4"),
    (encode, "--data {pictures} --vae {vae} --device cpu"), (sample, "--ckpt {sit} --device cpu")])
def test_a_dry_run_prints_the_plan_and_writes_nothing(trained, tmp_path, script, flags, capsys):
    run(script, f"{flags.format(**vars(trained))} --dry-run --out {tmp_path}/out")
    printed = capsys.readouterr().out
    assert "configuration: " in printed and "parameters" in printed and not (tmp_path / "out").exists()
    assert script in (encode, sample) or (
        "batch: 8 global = 1 processes x 2 micro-batches x 4; lr 0.001; 5 steps/epoch, 400 steps = "
        "80.0 epochs" in printed)


# A fault in the trainer's step, as its process runs it first in ranks.py.
FAULT = """
import multiprocessing, signal
import common
step = train_vae.train_step
def train_step(nets, batches, number, *rest):
    if number == 3:
        {fault}
    return step(nets, batches, number, *rest)
train_vae.train_step = train_step
"""
# As torchrun does: the loader's workers get the signal, too.
SIGNAL = """for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
            os.kill(process.pid, signal.SIGTERM)"""


def all_stages(trained, out):
    return {
        "train_vae": f"--data {trained.pictures} {VAE} --init {trained.vae} --steps 1 --out {out}/vae",
        "encode": f"--data {trained.pictures} --vae {trained.vae} --workers 0 --device cpu --shard-size 16 "
                  f"--out {out}/latents",
        "train_sit": f"--latents {trained.latents} {SIT} --steps 1 --val-latents {trained.latents} "
                     f"--out {out}/sit",
        "sample": f"--ckpt {trained.sit} --num-images 5 --steps 3 --device cpu --dtype fp32 --npz "
                  f"--out {out}/samples"}


@pytest.fixture(scope="module")
def jobs(trained, tmp_path_factory):
    """Run jobs of two processes and of one; return (folder, their exit codes, stderr)."""
    out = tmp_path_factory.mktemp("jobs")
    corrupt = small.pictures(out / "corrupt")
    for file in corrupt.glob("*/*"):
        file.write_bytes(b"")

    def job(world, name, fault="pass", pictures=trained.pictures):
        command = (f"train_vae {VAE} --gan 0 --align 0 --workers 2 --steps 5 --save-every 100 "
                   f"--data {pictures} --out {out}/{name}")
        return world, command, NARROW + FAULT.format(fault=fault)
    stages = [(2, f"{name} {flags}", NARROW) for name, flags in all_stages(trained, out).items()]
    codes, errors = run_jobs(
        *stages, job(2, "drifting", "next(nets.send.parameters()).data.add_(rank)"),
        job(1, "stopped", SIGNAL), job(1, "raising", "raise common.RunStopped('no numbers')"),
        job(1, "corrupt", pictures=corrupt))
    return out, codes, errors


def test_signals_and_errors_beside_or_in_loaders_workers_end_processes_by_one_line(jobs):
    """Loader workers ignore SIGTERM, by which Python ends its children: it would wait for them for ever."""
    out, codes, errors = jobs
    assert codes[4:] == [[2, 2], [143], [1], [2]] and "Traceback" not in errors, errors[-3000:]
    assert checkpoints.newest(out / "stopped")["step"] == log_of(out / "stopped")[-1]["step"] == 4
    for line in ("processes see different parameters", "no numbers\n", ".*images are corrupt"):
        assert re.search(f"error: {line}", errors), line


def test_two_processes_do_the_same_as_one(trained, jobs, tmp_path):
    """A step of both trainers, latents, samples."""
    two, codes, errors = jobs
    assert codes[:4] == 4 * [[0, 0]], errors[-3000:]
    for name, flags in all_stages(trained, tmp_path).items():
        if name != "encode":  # trained.latents are those of one process
            run(globals()[name], flags)
    vae, sit = ([checkpoints.newest(out / stage) for out in (tmp_path, two)] for stage in ("vae", "sit"))
    assert_same_vae_step(*vae)
    assert_same_gradient(*(saved["optimizer"] for saved in sit))
    assert vae[0]["model"].keys() == vae[1]["model"].keys() and sit[0]["ema"].keys() == sit[1]["ema"].keys()
    for stage, keys in (("vae", "loss rec kl align gan disc grad_norm"),
                        ("sit", "loss flow flow_t0 grad_norm val_flow")):
        ours, theirs = (log_of(out / stage)[0] | log_of(out / stage, "step")[-1] for out in (tmp_path, two))
        for key in keys.split():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    for path in Path(trained.latents).glob("*.npy"):
        assert np.allclose(np.load(path), np.load(two / "latents" / path.name), atol=1e-5), path.name
    ours, theirs = (np.load(out / "samples" / "samples.npz")["arr_0"].astype(int) for out in (tmp_path, two))
    assert ours.shape == theirs.shape == (5, 32, 32, 3) and np.abs(ours - theirs).max() <= 1


# one step

def states_of(nets):
    """Copies of all that a step may change: networks, optimizer, average."""
    parts = {name: getattr(nets, name, None) for name in ("send", "disc", "model", "opt", "ema")}
    return {name: copy.deepcopy(part.state if name == "ema" else part.state_dict())
            for name, part in parts.items() if part is not None}


def test_a_step_does_not_depend_on_the_micro_batch(trained):
    """The VAE's discriminator and mapper have BatchNorm, whose groups are fixed. The average moves once."""
    vae, sit = [], []
    for micro in (8, 4):
        batches = [batch_of(trained, range(i, i + micro)) for i in range(0, 8, micro)]
        nets, args = vae_nets(f"--init {trained.vae} --grad-clip 0")  # clipping would hide a wrong scale
        train_vae.train_step(nets, batches, 0, args, 9)
        vae.append(train_vae.pack(nets, 1, args))
        nets, args = sit_nets(trained, "--grad-clip 0")
        before = copy.deepcopy(nets.ema.state)
        train_sit.train_step(nets, batches, 1, args, 9)
        sit.append(nets.opt.state_dict())
        for key, value in nets.model.state_dict().items():
            assert torch.allclose(nets.ema.state[key], before[key].lerp(value, 1 - 3 / 12), atol=1e-6), key
    assert_same_vae_step(*vae)
    assert_same_gradient(*sit)


@pytest.mark.parametrize("stage", ["vae", "sit"])
def test_one_nan_image_costs_its_step_and_no_more(trained, stage):
    """In the first of two micro-batches: weights, optimizer, EMA and BatchNorm statistics stay."""
    script, key = (train_vae, "images") if stage == "vae" else (train_sit, "moments")
    nets, args = vae_nets() if stage == "vae" else sit_nets(trained)
    batches = [batch_of(trained, range(i, i + 4)) for i in (0, 4)]
    spoilt = [{**batches[0], key: batches[0][key].float().clone()}, batches[1]]
    spoilt[0][key][0] = float("nan")
    assert not script.train_step(nets, batches, 0, args, 9)[1]
    before = states_of(nets)
    terms, skipped = script.train_step(nets, spoilt, 1, args, 9)
    assert skipped and terms[-1]["skipped_steps"]
    assert_same(before, states_of(nets))
    assert not script.train_step(nets, batches, 2, args, 9)[1]
    after = [x for x in tree_flatten(states_of(nets))[0] if isinstance(x, torch.Tensor)]
    assert all(x.isfinite().all() for x in after)


# the effect of each flag: which numbers of a step it changes (name*: the weights afterwards); all others stay

ALIGN, ALL_GAN = "align loss grad_norm", "gan disc disc_real disc_fake grad_norm_disc"
VAE_EFFECTS = {
    "--rec l2": "rec loss grad_norm", "--kl 1e-3": "loss grad_norm", "--gan 0.3": "loss grad_norm",
    "--align 0.3": "loss grad_norm", "--align 0": ALIGN, "--gan 0": f"loss grad_norm {ALL_GAN}",
    "--lpips 0.5 --lpips-weights random": "lpips loss grad_norm", "--teacher-weights shapes/teacher.pt": "",
    "--mapper linear": ALIGN, "--mapper-noise off": ALIGN, "--mapper-norm off": ALIGN,
    "--mapper-depth 0": ALIGN, "--mapper-depth 2": ALIGN, "--projector-dim 32": ALIGN,
    "--gan-adaptive": "gan_weight loss grad_norm", "--disc-start 2": f"loss grad_norm {ALL_GAN}",
    "--disc-warmup 1": "", "--disc-warmup 2": "gan loss grad_norm disc*", "--checkpointing": "",
    "--compile on": "", "--disc-init {vae}": f"loss grad_norm {ALL_GAN}",
    "--bn-group 8": f"{ALIGN} {ALL_GAN}",
    "--init {vae}": f"rec kl {ALIGN} gan disc disc_fake grad_norm_disc",
    "--lr 2e-3": "lr", "--warmup 4": "lr", "--cooldown 9": "lr", "--disc-lr 2e-4": "disc*",
    "--grad-clip 1e-9": "send* disc*", "--seed 1": f"rec {ALIGN} gan disc disc_fake grad_norm_disc"}
SIT_EFFECTS = {
    "--t-sampling lognormal": "flow loss grad_norm", "--label-dropout 0.9": "flow loss grad_norm",
    "--qk-norm": "flow loss grad_norm", "--seed 1": "flow loss grad_norm", "--checkpointing": "",
    "--repa": "repa loss grad_norm", "--repa --repa-weight 0.1": "repa loss grad_norm", "--ema 0.1": "ema*",
    "--lr 2e-3": "lr", "--warmup 4": "lr", "--cooldown 9": "lr", "--grad-clip 1e-9": "model* ema*",
    "--dtype bf16": "flow loss grad_norm", "--compile on": ""}


def numbers_of(script, nets, args, trained):
    """Every number that step 1 logs, and hashes of what it leaves."""
    terms, _ = script.train_step(nets, [batch_of(trained, range(8))], 1, args, 9)
    numbers = {key: torch.as_tensor(value[0] if isinstance(value, tuple) else value).item()
               for part in terms for key, value in part.items()}
    states = states_of(nets)
    del states["opt"]
    assert {x.dtype for x in tree_flatten(states)[0]} <= {torch.float32, torch.int64}
    return numbers | {f"{name}*": checkpoints.state_hash(state) for name, state in states.items()}


def changes(ours, base):
    """The names of the numbers that differ, without those that follow from others, or count a few images."""
    differ = {key for key in ours.keys() | base.keys() if ours.get(key) != base.get(key)}
    differ -= {"disc_accuracy", "flow_t0", "flow_t1", "flow_t2", "flow_t3"}
    if differ & {"grad_norm", "lr"}:
        differ -= {"send*", "model*", "ema*"}
    if differ & {"grad_norm_disc", "lr"}:
        differ -= {"disc*"}
    return differ


@pytest.fixture(scope="module")
def base(trained):
    """Numbers of a step of both trainers without further flags, and the VAE's first weights."""
    nets, args = vae_nets()
    start = copy.deepcopy((nets.send.vae.state_dict(), nets.disc.state_dict()))
    return {"vae": numbers_of(train_vae, nets, args, trained), "start": start,
            "sit": numbers_of(train_sit, *sit_nets(trained), trained)}


@pytest.fixture()
def compiled(monkeypatch):
    """The networks that were to be compiled, which they are not."""
    seen = []
    monkeypatch.setattr(common, "compile_blocks", lambda wanted, device, *networks: wanted == "on" and
                        seen.extend(filter(None, networks)))
    return seen


@pytest.mark.parametrize("flags", VAE_EFFECTS)
def test_every_flag_of_the_vae_has_its_effect(trained, base, flags, compiled):
    nets, args = vae_nets(flags.format(**vars(trained)))
    if "--init" not in flags:
        nets.send.vae.load_state_dict(base["start"][0])
    if "--disc-init" not in flags and nets.disc is not None:
        nets.disc.load_state_dict(base["start"][1])
    ours = numbers_of(train_vae, nets, args, trained)
    assert changes(ours, base["vae"]) == {*VAE_EFFECTS[flags].split()}
    total = ours["rec"] + args.lpips * ours["lpips"] + args.kl * ours["kl"]
    total += args.align * ours.get("align", 0) + args.gan * ours.get("gan_weight", 1) * ours.get("gan", 0)
    assert ours["loss"] == pytest.approx(total, rel=1e-5)
    vae = nets.send.vae
    assert (vae.checkpointing, ours["lpips"] > 0) == ("point" in flags, "lpips" in flags)
    assert compiled == ([nets.send, nets.teacher] if flags == "--compile on" else [])


@pytest.mark.parametrize("flags", SIT_EFFECTS)
def test_every_flag_of_the_sit_has_its_effect(trained, base, flags, compiled):
    nets, args = sit_nets(trained, f"{flags} {REPA if 'repa' in flags else ''}")
    ours = numbers_of(train_sit, nets, args, trained)
    assert changes(ours, base["sit"]) == {*SIT_EFFECTS[flags].split()}
    assert ours["loss"] == pytest.approx(ours["flow"] + args.repa_weight * ours.get("repa", 0), rel=1e-5)
    assert nets.model.grad_checkpointing == ("point" in flags)
    assert compiled == ([nets.model] if flags == "--compile on" else [])


def test_beta2_reaches_all_optimizers(trained):  # a first step does not depend on it
    nets = [vae_nets("--beta2 .9")[0], sit_nets(trained, "--beta2 .9")[0]]
    for optimizer in (nets[0].opt, nets[0].opt_disc, nets[1].opt):
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.9)


def test_the_loss_scales_of_fp16_are_saved_and_continued_with(trained):
    (vae, args), (vae_again, _) = vae_nets("--dtype fp16"), vae_nets("--dtype fp16")
    (sit, sit_args), (sit_again, _) = sit_nets(trained, "--dtype fp16"), sit_nets(trained, "--dtype fp16")
    for scaler, scale in ((vae.scaler, 64.0), (vae.scaler_disc, 512.0), (sit.scaler, 1024.0)):
        scaler.scale(torch.ones(()))  # creates its state
        scaler.load_state_dict({**scaler.state_dict(), "scale": scale})
    train_vae.unpack(vae_again, {**train_vae.pack(vae, 1, args), "path": "ckpt.pt"}, args)
    latents = data.LatentFolder(trained.latents)
    saved = {**train_sit.pack(sit, latents, 1, sit_args), "path": "ckpt.pt"}
    train_sit.unpack(sit_again, latents, saved, sit_args)
    scalers = (vae_again.scaler, vae_again.scaler_disc, sit_again.scaler)
    assert [scaler.get_scale() for scaler in scalers] == [64, 512, 1024]


def test_the_preview_shows_samples_of_the_average(trained, tmp_path, monkeypatch):
    """A fresh SiT says velocity 0, so its samples are the noise that they start from."""
    monkeypatch.setattr(train_sit, "PREVIEW_STEPS", 2)
    args = train_sit.parse_args([*SIT.split(), "--out", str(tmp_path)])
    latents = data.LatentFolder(trained.latents)
    nets = train_sit.build(args, latents, CPU)
    torch.nn.init.constant_(nets.model.final_layer.linear.weight, float("nan"))  # not of the average
    train_sit.preview(nets, latents, 7, args)
    noise = common.noise_for((28, 4, 4), range(8), "cpu", 0, "preview")
    z = data.denormalize_latents(noise, latents.mean, latents.std)
    with torch.no_grad():
        x = common.place(checkpoints.load_vae(trained.vae), z.device).decode(z)
    data.save_grid(tmp_path / "wanted.png", data.to_uint8(x), columns=2)
    assert (tmp_path / "samples_0000007.png").read_bytes() == (tmp_path / "wanted.png").read_bytes()


# latents and samples

def test_latents_do_not_depend_on_batch_and_workers_and_a_split_is_a_folder(trained, tmp_path):
    (tmp_path / "train").symlink_to(trained.pictures)
    small.pictures(tmp_path / "val", n=6)
    flags = f"--data {tmp_path}/train --vae {trained.vae} --device cpu --batch-size 7 --workers 2"
    run(encode, f"{flags} --shard-size 16 --out {tmp_path}/latents")
    for path in Path(trained.latents).glob("*.npy"):
        assert np.allclose(np.load(path), np.load(tmp_path / "latents" / path.name), atol=1e-5), path.name
    run(encode, f"{flags} --split val --image-size 48 --store float16 --out {tmp_path}/held_out")
    facts = data.LatentFolder(tmp_path / "held_out").facts
    assert (facts["num_images"], facts["latent_size"], facts["dtype"]) == (6, [6, 6], "float16")


def samples_of(trained, out, flags):
    """The images of sample.py, int (N, 32, 32, 3), and its protocol."""
    run(sample, f"--ckpt {trained.sit} --steps 3 --cfg 1.5 --device cpu --npz --out {out} {flags}")
    protocol = json.loads((out / "protocol.json").read_text())
    return np.load(out / "samples.npz")["arr_0"].astype(int), protocol


def test_a_sample_is_a_function_of_seed_number_and_recipe(trained, tmp_path, compiled):
    """Not of the batch and of how many there are (nor of --weights, which are equal here)."""
    base, _ = samples_of(trained, tmp_path, "--num 6")
    for flags in ("--num 6 --batch-size 4", "--num 3 --compile on", "--num 6 --weights raw"):
        again, _ = samples_of(trained, tmp_path, flags)
        assert np.abs(again - base[:len(again)]).max() <= 1, flags
    for flags in ("--seed 1", "--cfg 1", "--sampler euler", "--sampler heun", "--cfg-interval 0 0.5",
                  "--labels random", "--steps 4"):
        assert np.abs(samples_of(trained, tmp_path, f"--num 6 {flags}")[0] - base).max() > 1, flags
    assert [type(module).__name__ for module in compiled] == ["SiT", "Decoder"]
