"""The report of the quickstart: its table from the files of the stages, its pictures. A few seconds.

Run: ./test.sh tests/test_quickstart.py
"""
import json

import numpy as np
import pytest
from PIL import Image

import data
import quickstart
import train_vae
from vae import load_vae


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


def test_report_is_written_with_its_pictures(tmp_path, monkeypatch, capsys):
    """On VAEs of one step; the rows are those that the report names."""
    monkeypatch.setattr(data, "SHAPES_NUM", {"train": 32, "val": 16})
    run = write_run(tmp_path / "run")
    common_flags = ["--data", "shapes", "--vae", "tiny", "--init", "none", "--lpips", "0", "--gan", "0",
                    "--batch-size", "32", "--steps", "1", "--workers", "0", "--device", "cpu"]
    samples = {"arr_0": np.zeros((20, 32, 32, 3), np.uint8), "arr_1": np.arange(20) % 10}
    for kind, flags in (("plain", ["--align", "0"]), ("send", ["--teacher", "shapes"])):
        train_vae.main([*common_flags, *flags, "--out", str(tmp_path / kind)])
        (run / kind / "vae" / "log.jsonl").replace(tmp_path / kind / "log.jsonl")
        (run / kind / "vae").rmdir()
        (tmp_path / kind).replace(run / kind / "vae")
        (run / kind / "samples" / "cfg2").mkdir(parents=True)
        samples["arr_0"] = samples["arr_0"] + 100  # plain 100, send 200
        np.savez(run / kind / "samples" / "cfg2" / "samples.npz", **samples)
    quickstart.main([str(run)])
    report = (run / "report.md").read_text()
    assert capsys.readouterr().out.splitlines()[-1] in report
    pictures = {name: np.array(Image.open(run / f"{name}.png"))
                for name in ("reconstructions", "pca", "samples", "curves")}
    assert all(f"]({name}.png)" in report for name in pictures)
    assert pictures["reconstructions"].shape == (3 * 96, 12 * 96, 3)  # original, plain, send
    assert pictures["pca"].shape == (5 * 96, 12 * 96, 3)  # image, two latents, mapper, teacher
    images, _ = data.open_dataset("shapes", 32, split="val").__getitems__(range(12))
    tiles = pictures["pca"][::3, ::3].reshape(5, 32, 12, 32, 3).transpose(0, 2, 4, 1, 3)
    assert np.array_equal(tiles[0], images.numpy())
    z = load_vae(run / "send" / "vae").encode(data.to_float(images)).mode()
    latent = quickstart.enlarge(quickstart.pca_rgb(z.flatten(2).transpose(1, 2))).numpy()
    assert np.array_equal(tiles[2], latent)
    assert pictures["samples"].shape == (10 * 64, 5 * 64, 3)  # a row per class: 2 plain, gap, 2 send
    assert [int(pictures["samples"][5, 64 * k + 5, 0]) for k in range(5)] == [100, 100, 255, 200, 200]


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
