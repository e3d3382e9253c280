"""common.py: batch arithmetic, seeds, the guarded optimizer step, EMA, Progress, errors of commands.

Run: ./test.sh tests/test_common.py        (about 8 s; more than one process: test_train.py)
"""
import copy
import json
import math
import os
import signal
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
import data
import fid
import train_vae
import vae

CPU = common.Proc(0, 1, torch.device("cpu"))
NO, YES = torch.tensor(False), torch.tensor(True)


# the plan of a run

@pytest.mark.parametrize("plan, args, wanted", [
    (common.plan_batch, (256, 32, 2), (32, 4)), (common.plan_batch, (256, 0, 8), (32, 1)),
    (common.plan_batch, (256, 0, 1), (256, 1)), (common.plan_batch, (6, 1, 3), (1, 2)),
    (common.plan_batch, (256, 32, 3), "--batch-size 288"), (common.plan_batch, (10, 0, 4), "--batch-size 16"),
    # at most 32 fit, in groups of 8; a run at step 6 that has seen 80 images of 200
    (common.plan_batch, (128, 0, 1, 48, 8), (32, 4)),
    (common.plan_batch, (20, 0, 1, 8, 8), "of 8, or try --bn-group 4"),
    (common.plan_steps, (0, 2, 100, 10, {"step": 6, "images_seen": 80}), 18),
    (common.plan_steps, (7, 80, 100, 32), 7), (common.plan_steps, (0, 80, 100, 32), 240),
    (common.plan_steps, (0, 0.5, 100, 10), 5), (common.plan_steps, (0, 0.01, 100, 10), "--steps"),
    (common.plan_steps, (0, 1, 32, 32), 1), (common.plan_steps, (5, 1, 31, 32), "--batch-size 31")])
def test_batches_and_steps_are_planned_or_a_size_that_fits_is_named(plan, args, wanted):
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            plan(*args)
    else:
        assert plan(*args) == wanted


@pytest.mark.parametrize("step, factor", [(0, 0.25), (2, 0.75), (3, 1), (50, 1), (98, 1), (99, 0.5)])
def test_the_learning_rate_rises_stays_and_falls(step, factor):
    assert common.learning_rate(step, 0.1, 4, 2, 100) == pytest.approx(0.1 * factor)
    assert common.learning_rate(step, 0.1, 0, 0, 100) == 0.1


@pytest.mark.parametrize("has_bf16", [True, False])
def test_the_precision_is_the_one_asked_for_or_what_the_hardware_is_fast_at(has_bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16, raising=False)
    for device, otherwise in (("cuda", torch.float16), ("cpu", torch.float32)):
        wanted = torch.bfloat16 if has_bf16 else otherwise
        assert common.resolve_dtype("auto", torch.device(device)) == wanted
        assert common.resolve_dtype("fp16", torch.device(device)) == torch.float16
    assert common.resolve_dtype("auto", torch.device("mps")) == torch.float32


# the optimisation step

@pytest.mark.parametrize("max_norm, applied", [(2.0, 2.0), (0.0, 50.0), (60.0, 50.0)])
def test_the_gradient_is_clipped_to_the_norm_given_and_the_norm_before_is_returned(max_norm, applied):
    """One norm over all groups of parameters; 0 clips nothing, nor does a norm that is not reached."""
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in params], lr=9.0, fused=True)
    for param, gradient in zip(params, (30.0, -40.0)):
        param.grad = torch.tensor([gradient])
    norm, skipped = common.optimizer_step(optimizer, 1.0, max_norm)
    assert norm == 50 and not skipped and all(p.grad is None for p in params)
    assert [p.item() for p in params] == pytest.approx([-0.6 * applied, 0.8 * applied], rel=1e-5)


@pytest.mark.parametrize("saved_as", [torch.contiguous_format, torch.channels_last])
def test_the_optimizer_state_takes_the_layout_of_the_parameters(saved_as):
    """The fused kernel would walk a state saved channels_last and loaded contiguous in the wrong order."""
    torch.manual_seed(0)
    first, second = (torch.nn.Conv2d(4, 6, 3) for _ in range(2))
    first, x = first.to(memory_format=saved_as), torch.randn(2, 4, 8, 8)
    one, two = (common.adamw(layer, 0.1) for layer in (first, second))
    first(x).square().mean().backward()
    one.step()
    second.load_state_dict(first.state_dict())
    common.load_optimizer(two, copy.deepcopy(one.state_dict()))
    for layer, optimizer in ((first, one), (second, two)):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    assert torch.allclose(first.weight, second.weight, atol=1e-4)


def test_the_average_warms_up_and_copies_what_is_not_trained():
    model = torch.nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    ema, before = common.EMA(model, 0.9999), model.weight.detach().clone()
    with torch.no_grad():
        model.weight.fill_(7.0), model.bias.fill_(7.0)
    ema.update(model, 4, YES)  # a skipped step moves nothing
    ema.update(model, 5, NO)
    assert torch.allclose(ema.state["weight"], before.lerp(model.weight, 1 - 6 / 15))
    assert ema.state["bias"].tolist() == 3 * [7]


def test_what_runs_behind_comes_in_order_and_its_errors_are_raised(capsys):
    order, seen = [], threading.Event()

    def note(number, error=None):
        assert number != 2 or seen.wait(20)
        order.append(number)
        if error:
            raise error
    with common.Behind() as behind:
        for number in range(3):
            behind(note, number)
        assert order == [0, 1]
        seen.set()
    assert order == [0, 1, 2]
    with pytest.raises(OSError, match="full"), common.Behind() as behind:
        behind(note, 3, OSError("full"))
    with pytest.raises(KeyError, match="first"), common.Behind() as behind:  # the error on its way
        behind(note, 4, OSError("full"))
        raise KeyError("first")
    assert order == [0, 1, 2, 3, 4] and "warning: full" in capsys.readouterr().out


def test_fp32_is_exact_and_tf32_is_not():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for name, wanted in (("tf32", ("high", True)), ("fp32", ("highest", False))):
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.allow_tf32 = True
            common.resolve_dtype(name, torch.device("cpu"))
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == wanted
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_without_a_compiler_compile_says_so_and_runs_eagerly(monkeypatch, capsys):
    def no_compiler(function):
        raise RuntimeError("no C++ compiler\nand more")
    monkeypatch.setattr(torch, "compile", no_compiler)
    layer = vae.ResnetBlock(8, 8, 2)
    for wanted, device in (("off", "cuda"), ("auto", "cpu"), ("on", "cpu")):
        common.compile_blocks(wanted, torch.device(device), layer, None)
    said, = capsys.readouterr().out.splitlines()
    assert said.startswith("torch.compile: off, runs eagerly: RuntimeError('no C++ compiler")
    assert layer._compiled_call_impl is None


# progress

@pytest.fixture()
def progress_of(tmp_path):
    """make(flags of train_vae.py or train_sit.py) -> Progress; signals are handled as before afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def make(flags="", step=0, num_steps=100, saved=None):
        args = train_vae.parse_args(f"--batch-size 4 --out {tmp_path}/run {flags}".split())
        return common.Progress(args, CPU, step, num_steps, saved=saved)
    yield make
    for number, handler in before.items():
        signal.signal(number, handler)


def train(progress, terms, accum=1, skipped=NO, after=lambda step: None):
    """Go through the steps with terms(step), a list of dicts; return the log's rows of steps."""
    for step, batches in progress.steps(iter(int, 1), accum):
        assert batches == [0] * accum
        progress.record(terms(step), skipped)
        after(step) or progress.should_save()
    rows = map(json.loads, open(f"{progress.args.out}/log.jsonl"))
    return [row for row in rows if "config" not in row]


def test_rows_hold_means_over_steps_and_micro_batches_and_steps_10_and_20_always(progress_of):
    progress = progress_of("--log-every 25", num_steps=60)
    rows = train(progress, lambda step: [
        {"a": torch.tensor(float(step)), "part": (torch.tensor(6.0), torch.tensor(3.0))},
        {"a": step + 1.0, "part": (0.0, 0)}, {"lr": 0.5, "none": (0.0, 0.0)}], accum=2)
    assert [row["step"] for row in rows] == [1, 10, 20, 25, 50, 60]  # the first, for it is saved
    assert [row["a"] for row in rows] == [1.5, 6.5, 16, 23.5, 38.5, 56]  # of the steps since the last row
    for row in rows:
        assert (row["part"], row["lr"], row["none"]) == (2, 0.5, "nan")
        assert row["images_per_s"] == pytest.approx(4000 / row["step_ms"])
        assert 0 <= row["data_wait_percent"] <= 100 and 0.05 < row["peak_memory_gib"] < 24
        assert row["eta_s"] == pytest.approx((60 - row["step"]) * row["step_ms"] / 1000)
    assert progress.shown.keys() == {"images_per_s", "data_wait_percent", "peak_memory_gib"}  # on the bar


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_loop_and_its_echo_does_no_harm(progress_of, number, code, capsys):
    progress, seen = progress_of(), []

    def interrupt(step):
        seen.append((step, bool(progress.stopping), progress.should_save()))
        for _ in range(2 * (step == 3)):  # torchrun passes it on once more
            os.kill(os.getpid(), number)
    with pytest.raises(SystemExit) as left:
        train(progress, lambda step: [{"a": 1.0}], after=interrupt)
    assert left.value.code == code
    assert seen == [(1, False, True), (2, False, False), (3, False, False), (4, True, True)]
    assert "stopped by a signal; the newest checkpoint is of step 4;" in capsys.readouterr().out
    progress.signal_time -= 3  # long ago: a second Ctrl-C is meant
    with pytest.raises(KeyboardInterrupt) if code == 130 else nullcontext():
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("seconds, looks", [(4.9, [1, 2, 3, 4, 5, 6]), (0.01, [1, 11, 21])])
def test_slow_steps_are_looked_at_one_by_one_for_a_signal_to_any_process(
        progress_of, monkeypatch, seconds, looks):
    """torchrun kills 30 s after its signal. The other process asks to stop in the last look."""
    progress, now, seen = progress_of(), [100.0], []
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    progress.proc, progress.looked = common.Proc(0, 2, torch.device("cpu")), (0, now[0])

    def all_reduce(news, op):
        seen.append(progress.step)
        news[0] = max(news[0], 15 * (len(seen) == len(looks)))
    monkeypatch.setattr(common.dist, "all_reduce", all_reduce)
    while not progress.stopping:
        progress.step += 1
        now[0] += seconds
        progress.agree_to_stop()
    assert seen == looks and progress.stopping == 15


def test_too_many_skipped_steps_in_a_row_stop_the_run_and_name_the_term(progress_of):
    """Also where the row of the log comes after the streak; two in a row of three are not too many."""
    terms = [{"lr": 0.1, "rec": math.nan}]
    for log_every, bad, stop in ((1, {1, 2, 3}, 3), (8, {4, 5, 6}, 8), (1, {1, 2, 4, 5, 7, 8}, None)):
        progress = progress_of(f"--stop-after-bad 3 --log-every {log_every}", num_steps=9)
        for step, _ in progress.steps(iter(int, 1), 1):
            if step != stop:
                progress.record(terms, torch.tensor(step in bad))
                progress.must_save = False
                continue
            with pytest.raises(common.RunStopped, match=f"step {stop}: 3 steps in a row skipped.*: rec"):
                progress.record(terms, torch.tensor(step in bad))
            break


def test_nothing_is_saved_while_steps_are_skipped(progress_of):
    """Skipped: 1, 4 to 6, and the last two or the last one of 9."""
    for skipped, saved in (({1, 4, 5, 6, 8, 9}, [2, 7]), ({1, 4, 5, 6, 9}, [2, 7, 8, 9])):
        progress, seen = progress_of("--save-every 4", num_steps=9), []
        with pytest.raises(common.RunStopped, match="of step 7") if 8 in skipped else nullcontext():
            for step, _ in progress.steps(iter(int, 1), 1):
                progress.record([], torch.tensor(step in skipped))
                seen += [step] if progress.should_save() else []
        assert seen == saved


def test_a_continued_run_logs_as_if_it_had_not_stopped(progress_of):
    """A save begins a new row. Rows of later steps and damaged lines go; what is between them stays."""
    def rows(progress):
        terms = train(progress, lambda step: [{"a": torch.tensor(float(step))}])
        return [(row["step"], row["a"]) for row in terms]
    wanted = rows(progress_of("--log-every 4 --save-every 6", num_steps=9))
    assert wanted == [(1, 1), (4, 3), (6, 5.5), (8, 7.5), (9, 9)]
    log = Path(progress_of().args.out) / "log.jsonl"
    lines = [json.dumps({"step": step, "a": a}).encode() for step, a in wanted]
    damaged = [b'{"step": "x"}', lines[1][:9], b'{"step": 6, "config": 1}', b"{"]
    log.write_bytes(b"\n".join([lines[0], *damaged, *lines[1:], b"{"]))
    again = progress_of("--log-every 4 --save-every 6", step=6, num_steps=9, saved={"images_seen": 24})
    assert rows(again) == wanted and again.images_seen == 36 and not [*log.parent.glob(".*.tmp")]


def test_a_log_that_cannot_be_written_does_not_end_training(progress_of, capsys):
    progress = progress_of("--log-every 1", num_steps=2)
    progress.file = open("/dev/full", "ab", buffering=0)
    for step, _ in progress.steps(iter(int, 1), 1):
        progress.record([{"a": 1.0}], NO)
        progress.should_save()
    assert progress.step == 2 and "No space left" in capsys.readouterr().err


@pytest.mark.parametrize("row, dead", [
    ({"grad_norm": 1e-9, "align": 1e-9, "gan": 0.1}, False), ({"grad_norm": 1e-9, "gan": -1e-9}, True),
    ({"grad_norm": 0.0}, True), ({"grad_norm": 1e-3}, False), ({"grad_norm": math.nan}, False),
    ({"grad_norm": 0.0, "align": math.nan}, False)])
def test_a_run_that_has_died_is_reported(progress_of, row, dead, capsys):
    train(progress_of(num_steps=10), lambda step: [row])
    assert ("step 10: gradient and losses are 0" in capsys.readouterr().out) == dead


def test_tensorboard_and_wandb_get_the_numbers_where_they_are_installed(progress_of, monkeypatch):
    seen = []
    board = SimpleNamespace(SummaryWriter=lambda out: SimpleNamespace(
        add_scalar=lambda *x: seen.append(x), close=lambda: seen.append("board")))
    run = SimpleNamespace(log=lambda row, step: seen.append((row, step)), finish=lambda: seen.append("run"))
    wandb = SimpleNamespace(init=lambda project, **_: seen.append(project) or run)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    progress = progress_of("--tensorboard --wandb project", num_steps=1)
    train(progress, lambda step: [{"a": 2.0}], after=lambda step: progress.log({"name": "x", "a": 3.0}))
    assert seen[0] == "project" and seen[-2:] == ["board", "run"] and "name" not in str(seen)
    assert all(x in seen for x in [("a", 2.0, 1), ({"a": 2.0}, 1), ("a", 3.0, 1), ({"a": 3.0}, 1)])
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(ModuleNotFoundError, match="wandb"):
        progress_of("--wandb project")


# errors of commands

@pytest.mark.parametrize("error, code, line", [
    (ValueError("wrong"), 2, "error: wrong"), (FileNotFoundError("gone"), 2, "error: gone"),
    (ModuleNotFoundError("x"), 2, "error: x; pip install it"), (common.RunStopped("nan"), 1, "error: nan"),
    (OSError("full"), 1, "error: full"), (KeyboardInterrupt(), 130, "error: interrupted"),
    (ZeroDivisionError("bug"), 1, "error: bug")])
def test_an_error_ends_a_command_by_one_line_and_its_code(error, code, line, capsys, monkeypatch, tmp_path):
    """At once, without waiting for other processes; torchrun reads the line from its file."""
    def main():
        raise error
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as left:
        common.cli(main)
    printed = capsys.readouterr().err.splitlines()
    assert left.value.code == code and printed[-1] == line
    assert (len(printed) > 1) == (line == "error: bug")  # a bug shows where it is
    assert json.loads((tmp_path / "error.json").read_text())["message"] == line


def test_an_evaluation_is_printed_or_is_a_warning_and_after_a_signal_there_is_none(progress_of, capsys):
    progress, done = progress_of(num_steps=4), []
    with pytest.raises(SystemExit):
        for step, _ in progress.steps(iter(int, 1), 1):
            progress.record([{"a": 1.0}], NO)
            progress.look(lambda: done.append(step) or {"images": "few", "psnr_db": 1 / (step - 2) / 3})
            progress.should_save()
            progress.signalled = 15 * (step == 2)
    printed = capsys.readouterr().out
    assert done == [1, 2] and "step 1: images few, psnr_db -0.3333\n" in printed
    assert "step 2: <lambda> failed: division by zero" in printed


@pytest.mark.parametrize("flags, more", [
    ("--align 0 --gan 0", []), ("--gan 0 --mapper-norm off", ["mapper"]), ("", ["mapper", "bn_group"])])
def test_what_a_vae_run_keeps_for_life(flags, more):
    mapper = ["teacher", "mapper", "mapper_depth", "projector_dim", "mapper_noise", "mapper_norm"]
    kept = train_vae.fixed_flags(train_vae.parse_args(flags.split()))
    assert kept == ["seed", "image_size"] + mapper * ("mapper" in more) + ["bn_group"] * ("bn_group" in more)


def test_images_that_are_evaluated_are_spread_evenly_over_the_set_and_in_the_picture(monkeypatch, tmp_path):
    class Images(list):
        def batch(self, indices):
            asked.append(indices)
            pixels = (torch.tensor(indices) // 25).to(torch.uint8)
            return {"images": pixels.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)}
    vae = SimpleNamespace(encode=lambda x: SimpleNamespace(mode=lambda: x, kl=lambda: x), decode=lambda z: z)
    nets = SimpleNamespace(send=SimpleNamespace(eval=lambda: None, vae=vae, mapper=None),
                           device=CPU.device, dtype=torch.float32)
    asked, drawn = [], []
    monkeypatch.setattr(data, "save_grid", lambda path, pairs, columns: drawn.append(pairs[:, 0, 0, 0]))
    train_vae.evaluate(nets, Images(range(6301)), "validation", 1, SimpleNamespace(out=tmp_path))
    assert asked == [[*range(0, 6301, 100)]]
    assert drawn[0].tolist() == [i // 25 for i in range(0, 6301, 400) for _ in range(2)]  # and its x_hat


def test_a_wrong_flag_is_one_line_and_help_has_the_usage(capsys):
    for script, flags, code in ((train_vae, ["--stpes", "9"], 2), (fid, ["rfid", "a"], 2), (fid, ["-h"], 0)):
        with pytest.raises(SystemExit, match=str(code)):
            script.parse_args(flags)
    printed = capsys.readouterr()
    wrong, missing = printed.err.splitlines()
    assert "--stpes 9; -h lists the flags" in wrong and "--vae; -h lists" in missing
    assert "usage: " in printed.out
