"""The stages: resume, micro-batches, two processes, NaN batches, steps by hand, the effect of every flag.

Run: ./test.sh tests/test_train.py        (about 50 s on 2 cores)
Networks are tiny, the teacher is the shipped one. Two processes run under torchrun with gloo on the CPU.
"""
import copy
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
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
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

def test_a_vae_run_that_was_stopped_continues_bit_for_bit(trained, tmp_path):
    """3 steps at once against 1 + 2, with GAN and mapper. The second part needs no start file any more, and
    evaluation, in all steps or at the end, changes nothing."""
    start = shutil.copytree(trained.vae, tmp_path / "start")
    flags = f"--data {trained.pictures} {VAE} --init {start} --disc-init {start}"
    run(train_vae, f"{flags} --val {trained.pictures} --eval-every 1 --steps 3 --out {tmp_path}/whole")
    run(train_vae, f"{flags} --eval-every 0 --steps 1 --out {tmp_path}/parts")
    shutil.rmtree(start)
    run(train_vae, f"{flags} --eval-every 0 --steps 3 --out {tmp_path}/parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    for name, steps, images in (("whole", [1, 2, 3], "validation"), ("parts", [1, 3], "training")):
        evaluated = log_of(tmp_path / name, "psnr_db")
        assert [row["step"] for row in evaluated] == steps and evaluated[0]["eval_images"] == images
        assert Image.open(tmp_path / name / "reconstructions_0000003.png").size == (8 * 32, 4 * 32)


def test_a_sit_run_that_was_stopped_continues_bit_for_bit(trained, tmp_path, monkeypatch):
    """With REPA. Held-out losses and pictures, in one of the two runs only, change nothing."""
    monkeypatch.setattr(train_sit, "PREVIEW_STEPS", 2)
    flags = f"--latents {trained.latents} {SIT} {REPA}"
    run(train_sit, f"{flags} --steps 3 --save-every 1 --keep 2 --out {tmp_path}/whole")
    flags += f" --val-latents {trained.latents} --val-every 1 --sample-every 2 --out {tmp_path}/parts"
    run(train_sit, f"{flags} --steps 1")
    run(train_sit, f"{flags} --steps 3")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert [row["step"] for row in log_of(tmp_path / "parts", "val_flow")] == [1, 2, 3]
    files = {name: sorted(os.listdir(tmp_path / name)) for name in ("whole", "parts")}
    assert files["whole"] == [".lock", "ckpt_0000002.pt", "ckpt_0000003.pt", "log.jsonl"]
    assert files["parts"][-3:] == [f"samples_000000{step}.png" for step in (1, 2, 3)]


def test_the_recorded_run_is_repeated_within_its_band(tmp_path, monkeypatch):
    """tests/recorded_run.jsonl is the log of a run at commit 7e84d6d, with its command, on 512 images of the
    embedded set: losses within 1 %, PSNR within 0.3 dB (the order of sums differs between processors)."""
    monkeypatch.setattr(data, "SHAPES_NUM", {"train": 512, "val": 64})
    recorded = [json.loads(line) for line in open(ROOT / "tests" / "recorded_run.jsonl")]
    train_vae.main([*recorded[0]["command"].split()[1:], "--out", str(tmp_path)])
    wanted, ours = [row for row in recorded if "loss" in row], log_of(tmp_path)
    assert [row["step"] for row in ours] == [row["step"] for row in wanted] == [10, 20, 30]
    for row, theirs in zip(ours, wanted):
        for key in ("loss", "rec", "kl", "align"):
            assert row[key] == pytest.approx(theirs[key], rel=0.01), (row["step"], key)
    assert log_of(tmp_path, "psnr_db")[-1]["psnr_db"] == pytest.approx(recorded[-1]["psnr_db"], abs=0.3)
    assert ours[-1]["align"] < 0.8 * ours[0]["align"] and ours[-1]["rec"] < 0.6 * ours[0]["rec"]


@pytest.mark.parametrize("script, flags", [
    (train_vae, f"--data {{pictures}} {VAE} --micro-batch-size 4"),
    (train_sit, f"--latents {{latents}} {SIT} --micro-batch-size 4"),
    (encode, "--data {pictures} --vae {vae} --device cpu"), (sample, "--ckpt {sit} --device cpu")])
def test_a_dry_run_prints_the_plan_and_writes_nothing(trained, tmp_path, script, flags, capsys):
    run(script, f"{flags.format(**vars(trained))} --dry-run --out {tmp_path}/out")
    printed = capsys.readouterr().out
    assert "configuration: " in printed and "parameters" in printed and not (tmp_path / "out").exists()
    assert script in (encode, sample) or (
        "batch: 8 global = 1 processes x 2 micro-batches x 4; lr 0.001 as typed; 5 steps/epoch, 400 steps = "
        "80.0 epochs = 3,200 images" in printed)


def test_sigterm_saves_and_the_same_command_continues(pictures, tmp_path):
    flags = f"--data {pictures} {VAE} --gan 0 --align 0 --workers 1 --steps 100000 --save-every 100000"
    process = subprocess.Popen([sys.executable, ROOT / "train_vae.py", *flags.split(), "--out", tmp_path],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (tmp_path / "log.jsonl").exists() or len(log_of(tmp_path)) < 3:
        time.sleep(0.1)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)  # as torchrun does: the loader's worker gets it too
    printed, _ = process.communicate(timeout=60)
    step = checkpoints.newest(tmp_path)["step"]
    assert process.returncode == 143 and f"saved at step {step}; the same command" in printed.decode()
    assert step >= 3 and log_of(tmp_path)[-1]["step"] == step


# both processes of torchrun run this
TWO_PROCESSES = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch, common, encode, sample, train_sit, train_vae

def main():
    for name, flags in json.loads(sys.argv[2]).items():
        globals()[name].main(flags.split())
    # Means are taken over the processes; a signal to one of them stops both, at the same step.
    proc = common.setup("cpu")
    args = train_sit.parse_args(["--log-every", "4", "--batch-size", "2", "--out", sys.argv[3]])
    progress = common.Progress(args, proc, 0, 100)
    try:
        for step, _ in progress.steps(iter(int, 1), 1):
            progress.record([{"rank": proc.rank, "part": (1.0 * proc.rank, proc.rank)}], torch.tensor(False))
            if step == 5 and proc.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit as left:
        assert (step, left.code) == (11, 143), step
    layer = torch.nn.Linear(2, 2)
    common.check_same(common.distribute(layer, proc))
    layer.weight.data.add_(proc.rank)
    try:
        common.check_same(layer)
    except ValueError as error:
        common.print0("seen:", error)
common.cli(main)
"""


def test_two_processes_do_the_same_as_one(trained, tmp_path, monkeypatch):
    """A step of both trainers, latents, samples; and what common.py does over processes."""
    one, two = tmp_path / "one", tmp_path / "two"
    commands = {
        "train_vae": f"--data {trained.pictures} {VAE} --init {trained.vae} --steps 1 --out {one}/vae",
        "encode": f"--data {trained.pictures} --vae {trained.vae} --workers 0 --device cpu --shard-size 16 "
                  f"--out {one}/latents",
        "train_sit": f"--latents {trained.latents} {SIT} --steps 1 --val-latents {trained.latents} "
                     f"--out {one}/sit",
        "sample": f"--ckpt {trained.sit} --num-images 5 --steps 3 --device cpu --dtype fp32 --npz "
                  f"--out {one}/samples"}
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    begin = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    theirs = json.dumps(commands).replace(str(one), str(two))
    done = subprocess.run([*begin, tmp_path / "script.py", ROOT, theirs, tmp_path / "progress"], timeout=300,
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "seen: processes see different parameters" in done.stdout
    assert [(row["step"], row["rank"], row["part"]) for row in log_of(tmp_path / "progress", "rank")] == [
        (4, 0.5, 1), (8, 0.5, 1), (10, 0.5, 1)]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as there: another order of sums may turn a hinge or a LeakyReLU around
    for name, flags in commands.items():
        run(globals()[name], flags)
    torch.set_num_threads(threads)
    vae, sit = ([checkpoints.newest(out / stage) for out in (one, two)] for stage in ("vae", "sit"))
    assert_same_vae_step(*vae)
    assert_same_gradient(sit[0]["optimizer"], sit[1]["optimizer"])
    assert vae[0]["model"].keys() == vae[1]["model"].keys() and sit[0]["ema"].keys() == sit[1]["ema"].keys()
    for stage, keys in (("vae", "loss rec kl align gan disc grad_norm"),
                        ("sit", "loss flow flow_t0 grad_norm val_flow")):
        ours, theirs = (log_of(out / stage)[0] | log_of(out / stage, "step")[-1] for out in (one, two))
        for key in keys.split():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    for path in (one / "latents").glob("*.npy"):
        assert np.allclose(np.load(path), np.load(two / "latents" / path.name), atol=1e-5), path.name
    ours, theirs = (np.load(out / "samples" / "samples.npz")["arr_0"].astype(int) for out in (one, two))
    assert ours.shape == theirs.shape == (5, 32, 32, 3) and np.abs(ours - theirs).max() <= 1


# steps of the VAE

def test_two_steps_are_gradient_clipping_and_adamw_by_hand(trained):
    nets, args = vae_nets("--gan 0 --kl 1e-3 --align 0.5 --grad-clip 0.5")
    vae, mapper = copy.deepcopy((nets.send.vae, nets.send.mapper))
    params, batch = [*vae.parameters(), *mapper.parameters()], batch_of(trained, range(8))
    x = data.to_float(batch["images"])
    first, second = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    for step in range(2):
        eps = common.noise_for((2, vae.config.z_channels, 4, 4), range(8), "cpu", 0, "vae", step)
        t = common.uniform_for(1, range(8), "cpu", 0, "t", step)[:, 0]
        posterior = vae.encode(x)
        mean, logvar = posterior.mean, posterior.logvar
        z = mean + (0.5 * logvar).exp() * eps[:, 0]
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        cosine = F.cosine_similarity(mapper(z, t, eps[:, 1]), nets.teacher(x), dim=-1).mean()
        loss = (x - vae.decode(z)).abs().mean() + 1e-3 * kl + 0.5 * (1 - cosine)
        gradients = torch.autograd.grad(loss, params)
        norm = sum(g.square().sum() for g in gradients).sqrt()
        assert norm > 0.5
        for i, (p, g) in enumerate(zip(params, gradients)):
            g = g * 0.5 / norm
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            m, v = first[i] / (1 - 0.9**(step + 1)), second[i] / (1 - 0.999**(step + 1))
            p.data -= 1e-3 * m / (v.sqrt() + 1e-8)
        terms, skipped = train_vae.train_step(nets, [batch], step, args, 9)
        assert not skipped and terms[-1]["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
    for ours, theirs in zip(params, nets.send.parameters()):
        assert (ours - theirs).abs().max() < 0.01 * 1e-3  # a hundredth of the learning rate
    squares = sum(entry["exp_avg_sq"].sum().item() for entry in nets.opt.state.values())
    assert squares == pytest.approx(sum(v.sum().item() for v in second), rel=1e-3)


def test_each_loss_trains_its_own_networks_and_none_the_teacher(trained):
    nets, args = vae_nets()
    x = data.to_float(batch_of(trained, range(8))["images"])
    loss, _, terms = train_vae.loss_terms(nets, x, range(8), 0, args)
    vae, mapper = nets.send.vae, nets.send.mapper
    for term, reached in (("align", (vae.encoder, mapper)), ("gan", (vae.encoder, vae.decoder))):
        for module in (vae.encoder, vae.decoder, mapper):
            gradients = torch.autograd.grad(terms[term], list(module.parameters()), retain_graph=True,
                                            allow_unused=True)
            assert any(g is not None and g.any() for g in gradients) == (module in reached), term
    loss.backward()
    assert all(p.grad is None and p.requires_grad for p in nets.disc.parameters())
    for optimizer, module in ((nets.opt, nets.send), (nets.opt_disc, nets.disc)):
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert stepped == {id(p) for p in module.parameters()}
    kept = {value.data_ptr() for part in train_vae.pack(nets, 1, args).values() if isinstance(part, dict)
            for value in part.values() if isinstance(value, torch.Tensor)}
    assert len(kept) > 100 and not kept & {value.data_ptr() for value in nets.teacher.state_dict().values()}


def test_what_is_logged_beside_the_loss_is_that_by_hand(trained, tmp_path):
    """Accuracy of the discriminator; PSNR, clean alignment and spread of the latents in an evaluation."""
    nets, args = vae_nets(f"--out {tmp_path}")
    batch, x_hat = batch_of(trained, range(8)), torch.zeros(8, 3, 32, 32)
    x = data.to_float(batch["images"])
    real, fake = (torch.cat([nets.disc(group) for group in images.split(4)]) for images in (x, x_hat))
    _, terms = train_vae.disc_terms(nets, x, x_hat)
    right = torch.cat([real > 0, fake < 0]).float().mean()
    assert terms["disc_accuracy"].item() == pytest.approx(right.item())
    train_vae.train_step(nets, [batch], 0, args, 9)  # moves the mapper's statistics
    dataset = data.open_dataset(trained.pictures, 32)
    row = train_vae.evaluate(nets, dataset, "training", 1, args)
    x = data.to_float(dataset.batch(range(40))["images"])
    with torch.no_grad():
        z = nets.send.vae.eval().encode(x).mean
        x_hat, tokens = nets.send.vae.decode(z), nets.send.mapper.eval()(z, torch.zeros(40))
    cosine = F.cosine_similarity(tokens, nets.teacher(x), dim=-1)
    assert row["align_clean"] == pytest.approx(1 - cosine.mean().item(), abs=1e-5)
    mse = (data.to_uint8(x).float() - data.to_uint8(x_hat).float()).square().mean((1, 2, 3))
    assert row["psnr_db"] == pytest.approx((10 * torch.log10(255**2 / mse)).mean().item(), rel=1e-4)
    share = torch.linalg.eigvalsh(torch.cov(z.transpose(0, 1).flatten(1)))
    rank = torch.special.entr(share / share.sum()).sum().exp().item()
    assert row["effective_rank"] == pytest.approx(rank, rel=1e-3)


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
    "--compile": "", "--disc-init {vae}": f"loss grad_norm {ALL_GAN}", "--bn-group 8": f"{ALIGN} {ALL_GAN}",
    "--init {vae}": f"rec kl {ALIGN} gan disc disc_fake grad_norm_disc",
    "--lr 2e-3": "lr", "--warmup 4": "lr", "--cooldown 9": "lr", "--disc-lr 2e-4": "disc*",
    "--grad-clip 1e-9": "send* disc*", "--seed 1": f"rec {ALIGN} gan disc disc_fake grad_norm_disc"}
SIT_EFFECTS = {
    "--t-sampling lognormal": "flow loss grad_norm", "--label-dropout 0.9": "flow loss grad_norm",
    "--qk-norm": "flow loss grad_norm", "--seed 1": "flow loss grad_norm", "--checkpointing": "",
    "--repa": "repa loss grad_norm", "--repa --repa-weight 0.1": "repa loss grad_norm", "--ema 0.1": "ema*",
    "--lr 2e-3": "lr", "--warmup 4": "lr", "--cooldown 9": "lr", "--grad-clip 1e-9": "model* ema*",
    "--dtype bf16": "flow loss grad_norm", "--compile": ""}


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
    """The modules that were to be compiled, which they are not."""
    seen = []
    monkeypatch.setattr(common, "compile_modules", lambda *modules: seen.extend(filter(None, modules)))
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
    assert compiled == ([vae.encoder, vae.decoder, nets.teacher] if flags == "--compile" else [])


@pytest.mark.parametrize("flags", SIT_EFFECTS)
def test_every_flag_of_the_sit_has_its_effect(trained, base, flags, compiled):
    nets, args = sit_nets(trained, f"{flags} {REPA if 'repa' in flags else ''}")
    ours = numbers_of(train_sit, nets, args, trained)
    assert changes(ours, base["sit"]) == {*SIT_EFFECTS[flags].split()}
    assert ours["loss"] == pytest.approx(ours["flow"] + args.repa_weight * ours.get("repa", 0), rel=1e-5)
    assert nets.model.grad_checkpointing == ("point" in flags)
    assert compiled == ([nets.model] if flags == "--compile" else [])


def test_the_loss_scale_of_fp16_is_saved_and_continued_with(trained):
    (nets, args), (again, _) = sit_nets(trained, "--dtype fp16"), sit_nets(trained, "--dtype fp16")
    numbers_of(train_sit, nets, args, trained)
    nets.scaler.update(1024.0)
    latents = data.LatentFolder(trained.latents)
    train_sit.unpack(again, latents, {**train_sit.pack(nets, latents, 2, args), "path": "ckpt.pt"}, args)
    assert again.scaler.get_scale() == 1024


def test_scales_and_batch_norm_groups_of_a_vae_run_are_those_it_was_stopped_with():
    (nets, args), (again, other) = vae_nets("--dtype fp16"), vae_nets("--dtype fp16 --bn-group 2")
    for scaler, scale in ((nets.scaler, 64.0), (nets.scaler_disc, 512.0)):
        scaler.scale(torch.ones(()))  # creates its state
        scaler.load_state_dict({**scaler.state_dict(), "scale": scale})
    saved = {**train_vae.pack(nets, 1, args), "path": "ckpt.pt"}
    with pytest.raises(ValueError, match="--bn-group 4"):
        common.check_resume(saved, other, train_vae.fixed_flags(other), {}, {})
    train_vae.unpack(again, saved, args)
    assert (again.scaler.get_scale(), again.scaler_disc.get_scale()) == (64, 512)


# steps of the SiT, and what it is judged by

def draws_of(latents, rows, *key):
    """(normalised z, eps): both draws of a key, by the definitions."""
    noise = common.noise_for((2, 28, 4, 4), rows, "cpu", *key)
    mean, std = latents.batch(rows)["moments"].chunk(2, 1)
    z = (mean + std * noise[:, 0] - latents.mean[:, None, None]) / latents.std[:, None, None]
    return z, noise[:, 1]


def test_the_loss_of_the_sit_is_that_by_hand(trained):
    """Flow loss, its quarters by time, and REPA's, for rows in any order, on the images of the latents."""
    nets, args = sit_nets(trained, f"{REPA} --seed 5 --label-dropout 0.5")
    latents, rows = data.LatentFolder(trained.latents), [3, 0, 7, 5, 1, 6, 2, 4]
    batch, (z, eps) = batch_of(trained, rows), draws_of(latents, rows, 5, "sit", 2)
    encoded = checkpoints.load_vae(trained.vae).encode(data.to_float(batch["images"])).mean
    assert torch.allclose(batch["moments"][:, :28], encoded, atol=1e-5)
    t, drop = common.uniform_for(2, rows, "cpu", 5, "t", 2).T
    y, t_ = torch.where(drop < 0.5, 2, batch["labels"]), t.view(-1, 1, 1, 1)
    v, tokens = nets.model((1 - t_) * z + t_ * eps, t, y, return_projections=True)
    flow = (v - (eps - z)).square().mean((1, 2, 3))
    target = nets.teacher(data.to_float(batch["images"]))
    repa = 1 - F.cosine_similarity(tokens[0], target, dim=-1).mean()
    loss, terms = train_sit.flow_terms(nets, batch, 2, args)
    assert 0 < (drop < 0.5).sum() < 8 and terms["repa"].item() == pytest.approx(repa.item(), rel=1e-5)
    assert loss.item() == pytest.approx((flow.mean() + 0.5 * repa).item(), rel=1e-5)
    for k in range(4):
        (total, count), inside = terms[f"flow_t{k}"], (4 * t).long() == k
        assert count == inside.sum() and total.item() == pytest.approx(flow[inside].sum().item(), rel=1e-5)


def test_the_held_out_loss_is_that_of_the_average_for_fixed_draws(trained):
    (nets, args), latents = sit_nets(trained), data.LatentFolder(trained.latents)
    for value in nets.ema.state.values():
        value *= 0.9
    row, model = train_sit.validate(nets, latents, args), copy.deepcopy(nets.model).eval()
    assert row == train_sit.validate(nets, latents, args)
    model.load_state_dict(nets.ema.state)
    z, eps = draws_of(latents, range(40), 0, "val")
    for k, t in enumerate((1 / 8, 3 / 8, 5 / 8, 7 / 8)):
        with torch.no_grad():
            v = model((1 - t) * z + t * eps, torch.full((40,), t), torch.from_numpy(latents.labels))
        wanted = (v - (eps - z)).square().mean().item()
        assert row[f"val_flow_t{k}"] == pytest.approx(wanted, rel=1e-4)
    assert row["val_flow"] == pytest.approx(np.mean([row[f"val_flow_t{k}"] for k in range(4)]))


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
        x = checkpoints.load_vae(trained.vae).decode(z)
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
    for flags in ("--num 6 --batch-size 4", "--num 3 --compile", "--num 6 --weights raw"):
        again, _ = samples_of(trained, tmp_path, flags)
        assert np.abs(again - base[:len(again)]).max() <= 1, flags
    for flags in ("--seed 1", "--cfg 1", "--sampler euler", "--sampler heun", "--cfg-interval 0 0.5",
                  "--labels random", "--steps 4"):
        assert np.abs(samples_of(trained, tmp_path, f"--num 6 {flags}")[0] - base).max() > 1, flags
    assert [type(module).__name__ for module in compiled] == ["SiT", "Decoder"]
