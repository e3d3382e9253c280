"""bench.py prints one JSON line a stage with the figures it promises. About 30 s.

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
    assert row["mfu_percent"] >= 0  # its size is that of the machine and of its load
    assert "measured here" in row["peak_source"]


def test_flops_are_those_of_the_layers():
    """A convolution by hand: 2 x multiply-adds forward, twice that backward."""
    from torch.utils.flop_counter import FlopCounterMode
    layer, x = torch.nn.Conv2d(8, 16, 3, padding=1), torch.randn(2, 8, 10, 10, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 16 * 8 * 9 * 100)


def test_fid_is_compared_with_what_is_installed_part_by_part(monkeypatch, capsys):
    """The other package is ours once more, with another distance: the line must show it."""
    def installed(state, weights, batch_size):
        features, _, folders = bench.fid_of_ours(weights, "pytorch-fid", 64, batch_size)
        return features, lambda *moments: 2 * bench.frechet_distance(*moments), folders
    monkeypatch.setattr(bench, "PACKAGES", {"json": (installed, "pytorch-fid"), "not_there": (None, None)})
    small = [m for seed in (0, 1) for m in (seed * torch.ones(8).numpy(), torch.eye(8).numpy())]
    monkeypatch.setattr(bench, "make_moments", lambda noise: small)
    bench.compare_fid(bench.parse_args(["--image-size", "64", "--batch-size", "2", "--iters", "1"]))
    rows = {row["part"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert [*rows] == ["network", "distance", "total"]
    assert rows["distance"]["values"] == [16, 8] and rows["distance"]["relative_difference"] == 0.5
    for part in ("network", "total"):
        assert rows[part]["relative_difference"] < 1e-6 and rows[part]["values"][0] > 0
        theirs, ours = rows[part]["seconds"]
        assert rows[part]["ratio"] == pytest.approx(theirs / ours, rel=0.1)
    monkeypatch.setattr(bench, "PACKAGES", {"not_there": (None, None)})
    with pytest.raises(ModuleNotFoundError, match="pip install pytorch-fid==0.3.0"):
        bench.compare_fid(bench.parse_args([]))
