"""quickstart.sh (its commands, failures, signals), its report, and the charts of plot.py.

Run: ./test.sh tests/test_quickstart.py     (about 20 s)
"""
import importlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_train import narrow  # noqa: F401  (a fixture)

import checkpoints
import data
import plot
import probe
import train_vae
from shapes import report


# quickstart.sh

def quickstart(tmp_path, script, *recipe, **env):
    """Start quickstart.sh with a shell script in place of python. recipe: "long", or nothing."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return subprocess.Popen(["bash", str(ROOT / "quickstart.sh"), *recipe, str(tmp_path / "out")], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            env={"PYTHON": str(python), "PATH": "/usr/bin:/bin", **env},
                            # bash cannot trap a signal that the shell above has set to be ignored
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


@pytest.mark.parametrize("recipe, device, size, model, batch", [
    ([], "auto", "tiny", "tiny/1", 32), (["long"], "cpu", "small", "small/2", 32),
    (["long"], "cuda", "small", "S/2", 256)])
def test_commands_parse_and_go_to_the_folder_that_was_named(tmp_path, recipe, device, size, model, batch):
    run = quickstart(tmp_path, 'echo "run $@"', *recipe, DEVICE=device)
    shown = run.communicate()[0] + (tmp_path / "out" / "plain.log").read_text()
    commands = re.findall(r"^run (?:(\w+)\.py|-m (shapes\.\w+)) (.*)", shown, re.M)
    assert run.returncode == 0 and len(commands) == 17
    for script, module, arguments in commands:
        assert str(tmp_path / "out") in arguments
        parsed = importlib.import_module(script or module).parse_args(shlex.split(arguments))
        if script.startswith("train"):
            assert parsed.batch_size == batch and parsed.cooldown < parsed.steps
            assert size == parsed.vae if script == "train_vae" else model == parsed.model


def test_a_second_run_does_only_what_is_left_and_refuses_other_settings_and_an_old_python(tmp_path):
    old = quickstart(tmp_path, 'case "$1" in -c) exit 1;; esac')
    assert "Python 3.11" in old.communicate()[1] and old.returncode == 2 and not (tmp_path / "out").exists()
    assert quickstart(tmp_path, "").wait() == 0
    again = quickstart(tmp_path, 'case "$1" in *.py) echo "ran $1";; esac')
    assert "ran " not in again.communicate()[0] and again.returncode == 0
    other = quickstart(tmp_path, "", SEED="1")
    assert "SEED=1" in other.communicate()[1] and other.returncode == 2


def test_a_failure_of_the_plain_vae_is_one_of_the_quickstart(tmp_path):
    run = quickstart(tmp_path, 'case "$*" in "fid.py rfid"*/plain/vae*) echo boom >&2; exit 3;; esac')
    errors, done = run.communicate()[1], (tmp_path / "out/done.txt").read_text()
    assert run.returncode == 1 and "boom" in errors and "plain" in errors
    assert "send-fid" in done and "plain-vae" in done and "plain-rfid" not in done and "probe" not in done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_quickstart_waits_for_both_and_calls_neither_done(tmp_path, number):
    """The stand-in for a trainer saves and exits 0 on a signal, as train_vae.py does."""
    run = quickstart(tmp_path, f"""case "$*" in *"--init {tmp_path}/out/pretrained"*)
        trap 'sleep 0.3; echo >> "{tmp_path}/saved"; exit 0' TERM INT
        echo >> "{tmp_path}/began"; n=0; while [ $n -lt 300 ]; do sleep 0.1; n=$((n + 1)); done;; esac""")
    began = tmp_path / "began"
    while not began.is_file() or len(began.read_text()) < 2:
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(number)
    run.communicate()
    assert run.returncode == 128 + number and len((tmp_path / "saved").read_text()) == 2
    assert re.fullmatch("pretrain .*\n", (tmp_path / "out/done.txt").read_text())


# the report

def write_run(folder, shift=0.0):
    """Write what the stages leave; Send-VAE is better than plain, by `shift` more than in other runs."""
    def write(name, content):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    vaes = []
    for k, arm in enumerate(report.ARMS):
        vaes.append({"flat": {"macro_f1": 0.5 + k * (0.25 + shift), "groups": {"hue": 0.5 + k / 4}},
                     "pooled": {"macro_f1": 0.25 + k / 4}})
        write(f"{arm}/rfid.json", {"n": 4000, "psnr_db": 24.0 - k, "fd": 8.0 + k})
        sets = {}
        for j in range(2):
            accuracy = 0.25 + k / 4 + j / 8
            sets[f"cfg{j + 1}/samples.npz"] = {"n": 1000, "fd": 30.0 - k - j, "class_accuracy": accuracy}
        write(f"{arm}/gfid.json", {"sets": sets, "reference": {"name": "shapes-val-4000"}})
        rows = [{"config": {}}, {"step": 10, "rec": 0.5, "flow": 2.0}, {"step": 30, "rec": "nan"},
                {"step": 20, "rec": 9.0}, {"step": 20, "rec": 0.3 - k / 10, "flow": 1.0 + k}]
        for stage in ("vae", "sit"):
            write(f"{arm}/{stage}/log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write("probe.json", {"vaes": vaes, "labels": ["plain", "send"]})
    write("settings.txt", "SEED=0 VAE_STEPS=1\n")
    return folder


def test_table_names_every_distance_and_several_runs_give_means_and_standard_deviations(tmp_path, capsys):
    table = report.markdown_table([report.measured(write_run(tmp_path))]).splitlines()
    for line in ("| PSNR, dB | 24.000 | 23.000 | -1.000 |",
                 "| probe F1 of hue, flattened | 0.500 | 0.750 | +0.250 |",
                 "| FD-judge of 4000 reconstructions vs their originals | 8.000 | 9.000 | +1.000 |",
                 "| FD-judge of 1000 samples vs shapes-val-4000, no guidance | 30.000 | 29.000 | -1.000 |",
                 "| class accuracy of samples, guidance 2 | 0.375 | 0.625 | +0.250 |"):
        assert line in table
    report.main([str(write_run(tmp_path / str(shift), shift)) for shift in (0.0, 0.1, 0.2)])
    table = capsys.readouterr().out
    assert "| probe F1, flattened | 0.500 ± 0.000 | 0.850 ± 0.100 | +0.350 ± 0.100 |" in table


def test_report_is_written_with_its_pictures(tmp_path, monkeypatch, capsys):
    """On VAEs of one step; the strips are those that the pictures name."""
    monkeypatch.setattr(data, "SHAPES_NUM", {"train": 32, "val": 16})
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where only requirements.txt is installed
    run, samples = write_run(tmp_path), np.zeros((20, 32, 32, 3), np.uint8)
    flags = ["--data", "shapes", "--vae", "tiny", "--init", "none", "--lpips", "0", "--gan", "0",
             "--batch-size", "32", "--steps", "1", "--workers", "0", "--device", "cpu", "--dtype", "fp32"]
    for k, align in enumerate((["--align", "0"], ["--teacher", "shapes"])):
        arm = run / list(report.ARMS)[k]
        train_vae.main([*flags, *align, "--out", str(arm / "vae")])
        samples += 100
        data.save_npz(arm / "samples" / "cfg2" / "samples.npz", samples, np.arange(20) % 10)
    report.main([str(run)])
    text, names = (run / "report.md").read_text(), ("reconstructions", "pca", "samples")
    assert capsys.readouterr().out.splitlines()[-1] in text and "pip install matplotlib" in text
    assert all(f"]({name}.png)" in text for name in names) and "\nMade with SEED=0 VAE_STEPS=1.\n" in text
    reconstructions, pca, samples = (np.array(Image.open(run / f"{name}.png")) for name in names)
    assert reconstructions.shape == (3 * 96, 12 * 96, 3)  # images, plain, send
    assert pca.shape == (5 * 96, 12 * 96, 3)  # images, two latents, mapper, teacher
    images = data.open_dataset("shapes", 32, "val").batch(range(12))["images"]
    tiles = pca[::3, ::3].reshape(5, 32, 12, 32, 3).transpose(0, 2, 4, 1, 3)
    assert np.array_equal(tiles[0], images.numpy())
    z = checkpoints.load_vae(run / "send" / "vae").encode(data.to_float(images)).mode().detach()
    assert np.array_equal(tiles[2], probe.colour_tokens(z.flatten(2).transpose(1, 2), 32).numpy())
    assert samples.shape == (10 * 64, 5 * 64, 3)  # a line per class: 2 plain, gap, 2 send
    assert [int(samples[5, 64 * k + 5, 0]) for k in range(5)] == [100, 100, 255, 200, 200]


# plot.py

def test_charts_show_what_the_files_say(tmp_path):
    pytest.importorskip("matplotlib")
    logs = [write_run(tmp_path) / arm / "vae" / "log.jsonl" for arm in report.ARMS]
    assert plot.read_curve(logs[1], "rec") == {10: 0.5, 20: pytest.approx(0.2)}  # the last of two; no nan
    figure = plot.draw_curves(logs, ["rec", "flow", "none"])
    assert [axis.get_title() for axis in figure.axes] == ["rec", "flow"]
    assert {line.get_label(): line.get_ydata()[-1] for line in figure.axes[1].get_lines()} == \
        {"plain/vae": 1.0, "send/vae": 2.0}
    with pytest.raises(ValueError, match="nothing is there under none"):
        plot.main(["curves", str(logs[0]), "--keys", "none"])
    plot.main(["curves", *map(str, logs), "--keys", "rec", "--out", str(tmp_path / "new" / "curves.png")])
    assert np.array(Image.open(tmp_path / "new" / "curves.png")).std() > 10
