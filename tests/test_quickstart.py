"""The report of the quickstart: its table from the files of the stages, its curves from the logs. A second.

Run: ./test.sh tests/test_quickstart.py
"""
import json

import numpy as np
import pytest
from PIL import Image

import quickstart


def write_run(folder, shift=0.0):
    """Write what the stages leave: Send-VAE is `shift` better in F1 and accuracy than in the first run."""
    def write(name, content):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    vaes = []
    for k, kind in enumerate(quickstart.KINDS):
        vaes.append({"flat": {"macro_f1": 0.5 + k * (0.25 + shift), "groups": {"hue": 0.5 + k / 4}},
                     "pooled": {"macro_f1": 0.25 + k / 4}})
        write(f"{kind}/rfid.json", {"n": 4000, "psnr_db": 24.0 - k, "fd": 8.0 + k})
        sets = {name: {"n": 1000, "fd": 30.0 - k - j, "class_accuracy": 0.25 + k * (0.25 + shift) + j / 8}
                for j, name in enumerate(("cfg1/samples.npz", "cfg2/samples.npz"))}
        write(f"{kind}/gfid.json", {"sets": sets, "reference": {"name": "shapes-val-4000"}})
        rows = [{"config": {}}, {"step": 10, "rec": 0.5, "flow": 2.0, "grad_norm": 1.0, "val_flow": 2.0},
                {"step": 20, "rec": 9.0},
                {"step": 20, "rec": 0.3 - k / 10, "align": 0.9, "psnr_db": 20.0 + k},
                {"step": 30, "rec": 0.25, "align": 0.7, "psnr_db": 21.0, "flow": 1.0 + k, "grad_norm": k / 2,
                 "val_flow": 1.5 - k}]
        for stage in ("vae", "sit"):
            write(f"{kind}/{stage}/log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write("probe.json", {"vaes": vaes})
    write("seconds.txt", "pretrain 5\nprobe 6\n" + "".join(
        f"{kind}-{stage} {10 + k}\n" for k, kind in enumerate(quickstart.KINDS) for stage in (
            "vae", "rfid", "latents", "sit", "sample", "fid")))
    return folder


def test_table_names_every_distance_by_n_and_reference_and_puts_the_difference_last(tmp_path):
    table = quickstart.markdown_table([quickstart.measured(write_run(tmp_path))]).splitlines()
    assert "| PSNR, dB | 24.00 | 23.00 | -1.000 |" in table
    assert "| probe F1, flattened | 0.500 | 0.750 | +0.250 |" in table
    assert "| FD-judge of 4000 reconstructions vs their originals | 8.00 | 9.00 | +1.000 |" in table
    assert "| FD-judge of 1000 samples vs shapes-val-4000, no guidance | 30.00 | 29.00 | -1.000 |" in table
    assert "| FD-judge of 1000 samples vs shapes-val-4000, guidance 2 | 29.00 | 28.00 | -1.000 |" in table
    assert "| class accuracy of samples, guidance 2 | 0.375 | 0.625 | +0.250 |" in table
    assert "| seconds, SiT | 10 | 11 | +1 |" in table


def test_table_of_several_runs_has_means_and_standard_deviations(tmp_path):
    runs = [quickstart.measured(write_run(tmp_path / str(shift), shift)) for shift in (0.0, 0.1, 0.2)]
    table = quickstart.markdown_table(runs)
    assert "| probe F1, flattened | 0.500 ± 0.000 | 0.850 ± 0.100 | +0.350 ± 0.100 |" in table


def test_stage_that_has_not_run_is_named(tmp_path):
    (write_run(tmp_path) / "send" / "gfid.json").unlink()
    with pytest.raises(FileNotFoundError, match="send/gfid.json is missing: that stage has not run"):
        quickstart.measured(tmp_path)


def test_curves_are_those_of_the_logs(tmp_path):
    run = write_run(tmp_path)
    log = run / "send" / "vae" / "log.jsonl"
    assert quickstart.read_curve(log, "rec") == [(10, 0.5), (20, pytest.approx(0.2)), (30, 0.25)]
    quickstart.draw_curves(run)
    picture = np.array(Image.open(run / "curves.png")).astype(int)
    assert picture.shape == (900, 1120, 3)
    blue, orange = (abs(picture - np.array(colour)).sum(2) < 30 for colour in ((0, 114, 178), (213, 94, 0)))
    panel = {(i, j): (slice(300 * i + 50, 300 * i + 280), slice(560 * j + 70, 560 * j + 540))
             for i in range(3) for j in range(2)}
    for place, where in panel.items():
        assert blue[where].any() == (place != (1, 0)), place  # only Send-VAE has an alignment
        assert orange[where].any(), place
    for kind in quickstart.KINDS:  # of an older version, and with a loss that was not finite
        log = run / kind / "sit" / "log.jsonl"
        log.write_text(log.read_text().replace("val_flow", "old").replace('"flow": 2.0', '"flow": "nan"'))
    quickstart.draw_curves(run)
    assert not np.array_equal(picture, np.array(Image.open(run / "curves.png")))
    rows, columns = np.nonzero(orange[panel[1, 0]])  # alignment falls from .9 (top left) to .7
    assert rows[columns.argmin()] < 10 and rows[columns.argmax()] > 200
