"""bench.py times the steps of the trainers and prints the figures that it promises. About 30 s.

Run: ./test.sh tests/test_bench.py
"""
import json

import pytest
import torch

import bench
import common
import train_sit
import train_vae

TINY = ("--vae tiny --model tiny/1 --image-size 32 --teacher shapes --batch-size 2 --iters 1 --device cpu "
        "--dtype fp32 --seed 1").split()


@pytest.mark.parametrize("stage", bench.STAGES)
def test_stage_reports_throughput_and_flops(stage, capsys):
    bench.main(["--stage", stage, *TINY])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["stage"] == stage and row["images_per_s"] > 0 and row["batch_size"] == 2
    steps = 10 if stage == "sample" else 1
    assert row["images_per_s"] * steps == pytest.approx(2000 / row["step_ms"], rel=0.05) and row["iters"] == 1
    assert row["tflop_per_s"] > 0 and row["mfu_percent"] > 0 and row["autocast"] == "torch.float32"


@pytest.mark.parametrize("stage, trainer", [("vae", train_vae), ("sit", train_sit)])
def test_step_is_the_trainers_own_with_all_its_networks(stage, trainer, monkeypatch):
    """At 64 px, where LPIPS and GAN are in, with a teacher from timm."""
    seen, compiled, real_step = [], [], trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda *given: seen.append(given) or real_step(*given))
    monkeypatch.setattr(common, "compile_blocks", lambda *given: compiled.extend(given))
    more = "--image-size 64 --teacher vit_tiny_patch16_224 --micro-batch-size 1 --compile on".split()
    args = bench.parse_args(["--stage", stage, *TINY, *more])
    args.compile, = args.compile  # main goes through them
    terms, skipped = bench.make_step(stage, args, common.setup("cpu"))()
    [(nets, batches, _, run, _)], names = seen, {name for part in terms for name in part}
    assert compiled[0] == "on" and nets.teacher in compiled
    assert [len(batch["rows"]) for batch in batches] == ([2] if stage == "vae" else [1, 1])
    assert not skipped and nets.teacher.name == "vit_tiny_patch16_224"
    assert names >= ({"rec", "lpips", "kl", "gan", "align", "disc"} if stage == "vae" else {"flow", "repa"})
    assert stage == "sit" or nets.send.mapper.bn.group == 2 == trainer.norm_group(run)


def test_flops_are_those_of_the_layers_also_of_attention(monkeypatch, capsys):
    """By hand, a multiply-add as 2: 32 to 64 channels, 3 x 3 at 4 x 32 x 32; 8 heads of 512 x 512 x 64."""
    x, q = torch.randn(4, 32, 32, 32), torch.randn(1, 8, 512, 64)
    convolution = torch.nn.Conv2d(32, 64, 3, padding=1)

    def step():
        convolution(x).sum().backward()  # no gradient for x: as much again as forward
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    monkeypatch.setattr(bench, "make_step", lambda *given: step)
    bench.main(["--stage", "vae", *TINY])
    row = json.loads(capsys.readouterr().out)
    flops = 2 * 2 * (4 * 64 * 32 * 9 * 32 * 32) + 2 * 2 * (8 * 512 * 512 * 64)
    assert row["tflop_per_s"] * row["step_ms"] * 1e9 == pytest.approx(flops, rel=0.01)
    assert row["mfu_percent"] == pytest.approx(100 * row["tflop_per_s"] / row["peak_tflops"], rel=0.02)
    assert row["peak_tflops"] > 1e-3
