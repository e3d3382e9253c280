"""bench.py prints one JSON line a stage with the figures it promises. About 20 s.

Run: ./test.sh tests/test_bench.py
"""
import json

import pytest
import torch

import bench


@pytest.mark.parametrize("stage", bench.STAGES)
def test_stage_reports_throughput_and_flops(stage, capsys):
    bench.main(["--stage", stage, "--vae", "tiny", "--model", "tiny/1", "--image-size", "32", "--teacher-dim",
                "64", "--batch-size", "4", "--iters", "2", "--device", "cpu", "--dtype", "fp32"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["stage"] == stage and row["images_per_s"] > 0 and row["batch_size"] == 4
    assert row["images_per_s"] == pytest.approx(4000 / row["step_ms"], rel=0.05)
    assert (row["tflop_per_s"] > 0) == (stage != "shapes")
    assert 0 <= row["mfu_percent"] < 150 and "measured here" in row["peak_source"]


def test_flops_are_those_of_the_layers():
    """A convolution by hand: 2 x multiply-adds forward, twice that backward."""
    from torch.utils.flop_counter import FlopCounterMode
    layer, x = torch.nn.Conv2d(8, 16, 3, padding=1), torch.randn(2, 8, 10, 10, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 16 * 8 * 9 * 100)
