"""study.py: its commands, what it makes of their results, its charts; the recipe of the real set.

Run: ./test.sh tests/test_study.py     (about 10 s)
"""
import csv
import importlib
import json
import shlex
import signal
import subprocess
import sys
import time
from runpy import run_path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from scipy import stats

import data
import plot
import study

SHORT = ["--seeds", "10", "--vae-steps", "5", "--sit-steps", "8", "--samples", "10"]


def test_commands_parse_and_settings_differ_in_the_alignment_alone(tmp_path):
    args = study.parse_args([*SHORT, "--out", str(tmp_path)])
    trained = {}
    for setting in (None, *study.SETTINGS):
        for stage, command in study.stages(setting, 10, tmp_path / "a run", args).items():
            script, *flags = shlex.split(command)
            parsed = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
            assert str(tmp_path / "a run") in parsed.out
            if setting and stage == "vae":
                trained[setting] = vars(parsed)
    own = {"align", "mapper", "mapper_depth", "mapper_noise", "mapper_norm"}
    shared = [{key: value for key, value in flags.items() if key not in own} for flags in trained.values()]
    assert all(flags == shared[0] for flags in shared) and len(trained) == 13
    for kind in ("linear", "depth0", "depth1", "depth2"):
        assert trained[kind]["mapper_noise"] == "off" and trained[f"{kind}+noise"]["mapper_noise"] == "on"
        assert trained[kind]["align"] == trained[f"{kind}+noise"]["align"] == 0.2
    assert trained["plain"]["align"] == 0 and trained["depth1+noise@0.8"]["align"] == 0.8
    assert [trained[f"depth{n}"]["mapper_depth"] for n in range(3)] == [0, 1, 2]
    assert trained["linear"]["mapper"] == "linear"


@pytest.mark.parametrize("wrong", [["--settings", "plane"], ["--sit-steps", "10"], ["--jobs", "0"]])
def test_wrong_usage_is_said_before_anything_runs(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        study.parse_args(wrong)
    assert wrong[0] in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(FileNotFoundError, match="nowhere: want train/attributes.csv, val in it"):
        study.main(["--data", "nowhere"])


def stand_in(folder, script):
    """Write a program that study.py starts in place of its own scripts; it gets their name and flags."""
    program = folder / "stand_in.py"
    program.write_text(f"import json, os, sys, time\nfrom pathlib import Path\nflags = sys.argv[1:]\n"
                       f"out = Path(flags[flags.index('--out') + 1])\n{script}\n")
    return f"{sys.executable} {program}"


RESULTS = """
good = "plain linear depth1 depth1+noise".split().index(out.parent.name.rpartition("-")[0] or "plain")
facts = {"rfid.json": {"psnr_db": 20.0, "fd": 9.0, "versions": {"commit": "abc"}},
         "probe.json": {"vaes": [{"flat": {"macro_f1": 0.5 + good / 10}, "latent": {"effective_rank": 5.0},
                                  "pooled": {"macro_f1": good ** 2 / 10}}]},
         "gfid.json": {"sets": {f: {"n": 4, "fd": 30.0 - good - int(f.split("-")[-1].split("/")[0]) / 8}
                                for f in flags if f.endswith(".npz")}}}
with open("ran.txt", "a") as file:
    file.write(out.name + "\\n")
if out.name in facts:
    out.write_text(json.dumps(facts[out.name]))
"""


@pytest.fixture
def at_work(tmp_path, monkeypatch):
    """study.py runs stand-ins, in a folder of their own."""
    def use(script):
        monkeypatch.setattr(study, "PYTHON", shlex.split(stand_in(tmp_path, script)))
        monkeypatch.setattr(study, "HERE", tmp_path)
    study.stopping.clear()
    yield use
    study.stopping.clear()


def test_results_tables_and_charts_and_nothing_is_done_twice(tmp_path, at_work, capsys):
    at_work(RESULTS)
    settings = ["plain", "linear", "depth1", "depth1+noise"]
    command = [*SHORT, "--settings", *settings, "--out", str(tmp_path / "out")]
    study.main(command)
    table = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out/results.csv").open(newline="")))
    assert len(rows) == 4 * 5 and rows[0]["commit"] == "abc" and rows[0]["class_flat"] == ""
    assert [(row["guidance"], row["sit_steps"]) for row in rows[:5]] == [
        ("1", "2"), ("1", "4"), ("1", "6"), ("1", "8"), ("2", "8")]
    assert "| depth1+noise | 1 |  0.800" in table.replace("| 0", "|  0") and "26.000" in table
    assert "| f1_flat | -1.00 (-1.00 to -1.00) | -1.00" in table and table.count("Correlation with") == 1
    f1, distance = [0.0, 0.1, 0.4, 0.9], [29.0, 28.0, 27.0, 26.0]
    assert f"| f1_pooled | {stats.pearsonr(f1, distance).statistic:+.2f} (" in table
    ran = (tmp_path / "ran.txt").read_text()
    assert len(ran.splitlines()) == 1 + 4 * 11
    study.main(command)
    assert (tmp_path / "ran.txt").read_text() == ran and capsys.readouterr().out == table
    study.main([*command, "--settings", "linear"])  # the others stay in the results
    assert len(list(csv.DictReader((tmp_path / "out/results.csv").open()))) == 20
    with pytest.raises(RuntimeError, match='"vae_steps": 5.*give another --out'):
        study.main([*command, "--vae-steps", "6"])
    results, picture = tmp_path / "out/results.csv", tmp_path / "chart.png"
    plot.main(["study", str(results), "--out", str(picture)])
    assert np.asarray(Image.open(picture)).std() > 5
    figure = plot.draw_study([results], ["fd", "class_accuracy"], "sit_steps")
    assert len(figure.axes) == 1 and figure.get_size_inches().tolist() == [6, 5]  # no value: no panel
    _, linear, depth1, noise = figure.axes[0].lines
    assert noise.get_xydata().tolist() == [[2, 26.75], [4, 26.5], [6, 26.25], [8, 26.0]]
    assert depth1.get_color() == noise.get_color() != linear.get_color()
    assert (depth1.get_linestyle(), noise.get_linestyle()) == ("-", "--")  # with noise dashed and hollow
    assert depth1.get_markerfacecolor() != "none" == noise.get_markerfacecolor()
    plot.main(["study", str(results), "--x", "f1_pooled", "--keys", "fd,f1_flat", "--out", str(picture)])
    points = plot.draw_study([results], ["fd", "f1_flat"], "f1_pooled").axes[0].lines
    assert [point.get_xydata().tolist() for point in points] == [
        [[0.0, 29.0]], [[0.1, 28.0]], [[0.4, 27.0]], [[0.9, 26.0]]]
    with pytest.raises(ValueError, match="results.csv: nothing is there under fd, or --x nope"):
        plot.main(["study", str(results), "--x", "nope", "--keys", "fd"])
    (tmp_path / "empty.csv").write_text("guidance\n")
    with pytest.raises(ValueError, match="empty.csv: .*study.py writes it"):
        plot.main(["study", str(tmp_path / "empty.csv")])


def test_the_mean_and_the_standard_deviation_of_seeds(tmp_path):
    rows = [{"setting": "plain", "sit_steps": 8, "guidance": guidance, "fd": fd, "class_accuracy": "",
             **dict.fromkeys(study.MEASURES, fd)} for guidance in (1, 2) for fd in (10, 12, 17)]
    line = study.tables(rows).splitlines()[2]
    assert line.startswith("| plain | 3 | 13.000 ± 3.606 |") and line.endswith("| 13.000 ± 3.606 |  |")


def test_class_accuracy_has_a_table_of_its_own():
    rows = [{"setting": setting, "sit_steps": 8, "guidance": 1, "fd": -place, "class_accuracy": accuracy,
             **dict.fromkeys(study.MEASURES, place)}
            for setting, place, accuracy in zip(study.SETTINGS, (0, 1, 2, 3), (0.4, 0.3, 0.2, 0.2))]
    distance, accuracy = study.tables(rows).split("\n\nCorrelation with ")[1:]
    assert distance.startswith("fd ") and "| f1_flat | -1.00 (-1.00 to -1.00) | -1.00" in distance
    expected = stats.pearsonr([0, 1, 2, 3], [0.4, 0.3, 0.2, 0.2]).statistic
    assert accuracy.startswith("class_accuracy ") and f"| f1_flat | {expected:+.2f} (" in accuracy


def test_a_failed_run_is_told_at_the_end_and_the_others_go_on(tmp_path, at_work):
    at_work(RESULTS + "\nif out.parent.name == 'plain-10': print('no memory'); sys.exit(1)")
    with pytest.raises(RuntimeError, match=r"plain-10, vae: exit code 1; no memory; all of it: .*log.txt"):
        study.main([*SHORT, "--settings", "plain", "linear", "--jobs", "1", "--out", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out/results.csv").open(newline="")))
    assert {row["setting"] for row in rows} == {"linear"}


def test_a_stop_ends_the_commands_and_they_are_not_done(tmp_path):
    """Killed by SIGTERM, as a batch system does; the stand-in for a trainer saves and leaves."""
    script = ("import signal\ndef save(*_):\n    open('saved', 'w').close(); sys.exit(143)\n"
              "signal.signal(signal.SIGTERM, save)\nopen('began', 'w').close(); time.sleep(60)")
    program = (f"import study, sys; study.PYTHON = {shlex.split(stand_in(tmp_path, script))}; "
               f"from pathlib import Path; study.HERE = Path({str(tmp_path)!r}); study.run_main()")
    run = subprocess.Popen([sys.executable, "-c", program, *SHORT, "--settings", "plain", "--out",
                            str(tmp_path / "out")], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "began").exists():
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 1 and "the same command continues" in error and "Traceback" not in error
    assert (tmp_path / "saved").exists() and not (tmp_path / "out/pretrained-10/done.json").exists()


def test_pictures_of_runs_side_by_side(tmp_path):
    for name in ("plain-10", "depth1-10"):
        (tmp_path / name / "vae").mkdir(parents=True)
        (tmp_path / name / "cfg2-8").mkdir()
        colours = np.random.default_rng(0).integers(0, 255, (80, 8, 8, 3), np.uint8)
        data.save_npz(tmp_path / name / "cfg2-8/samples.npz", colours, np.zeros(80, np.int64))
        Image.fromarray(colours[0]).save(tmp_path / name / "vae/reconstructions_0000008.png")
    folders = [str(tmp_path / name) for name in ("plain-10", "depth1-10")]
    plot.main(["runs", *folders, "--out", str(tmp_path / "runs.png")])
    assert np.asarray(Image.open(tmp_path / "runs.png")).std() > 5
    drawn = [axis.images[0].get_array() for axis in plot.draw_runs(folders).axes]
    assert len(drawn) == 4 and drawn[0].shape == (8, 8, 3) and drawn[1].shape == (64, 80, 3)
    assert (drawn[3][8:16, 16:24] == colours[12]).all()  # second line, third of ten
    with pytest.raises(ValueError, match="nothing: no vae/reconstructions"):
        plot.main(["runs", str(tmp_path / "nothing")])


# the real set

def test_clip_art_becomes_a_folder_with_classes_and_attributes(tmp_path, capsys):
    main = run_path(str(ROOT / "study/clipart.py"))["main"]
    for name, count in (("birds", 10), ("flags", 10), ("rare", 3), ("stars", 10)):
        for kind in ("png", "svg"):
            (tmp_path / f"clip/{kind}/nature/{name}").mkdir(parents=True)
        for i in range(count):
            wide = Image.new("RGBA", (40, 20), (0, 0, 255, 255 if name == "birds" else 0))
            wide.save(tmp_path / f"clip/png/nature/{name}/{i}.png")
            words = f"<rdf:li>{name}</rdf:li><rdf:li> Two\n Words, &amp; more</rdf:li>" * (i < 4)
            (tmp_path / f"clip/svg/nature/{name}/{i}.svg").write_text(f"<dc:subject>{words}</dc:subject>")
    main(["--source", str(tmp_path / "clip"), "--out", str(tmp_path / "set"), "--least", "5"])
    assert "2 classes, 16 pictures to train, 3 attributes" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "set/val").iterdir()} == {"birds", "flags"}
    assert sorted(path.name for path in (tmp_path / "set/val/birds").iterdir()) == ["4.png", "9.png"]
    rows = list(csv.DictReader((tmp_path / "set/train/attributes.csv").open()))
    assert rows[0] == {"filename": "birds/0.png", "birds": "1", "flags": "0", "two words & more": "1"}
    assert rows[5]["two words & more"] == "0"
    picture = np.asarray(Image.open(tmp_path / "set/train/birds/0.png"))
    assert picture.shape == (64, 64, 3) and picture[0, 0].tolist() == [255, 255, 255]  # padded with white
    assert picture[32, 32].tolist() == [0, 0, 255]
    assert (np.asarray(Image.open(tmp_path / "set/train/flags/0.png")) == 255).all()  # transparent: white
    opened = data.open_dataset(str(tmp_path / "set/train"), 32)
    assert opened.class_names == ["birds", "flags"] and len(opened) == 16
    for source, out in (("set", "other"), ("clip", "set")):  # no pictures; a set is there already
        with pytest.raises(SystemExit, match="2"):
            main(["--source", str(tmp_path / source), "--out", str(tmp_path / out)])
