"""encode.py and sample.py, which work in parts: stopped, continued, damaged. Killed: test_faults.py."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import run

import checkpoints
import common
import data
import encode
import sample
import small

SAMPLE = "--steps 3 --cfg 1.5 --device cpu --dtype fp32 --batch-size 4 --npz"


def content_of(folder):
    """The bytes of every file that stays, but for the lock."""
    return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.name != ".lock"}


@pytest.fixture()
def encoded(trained, tmp_path):
    """(flags, a copy of the latents that they made, its files): 40 images in shards of 16."""
    shutil.copytree(trained.latents, tmp_path / "latents")
    flags = f"--data {trained.pictures} --vae {trained.vae} --workers 0 --device cpu --shard-size 16 "
    return f"{flags} --out {tmp_path}/latents", tmp_path / "latents", content_of(trained.latents)


def test_encode_repairs_what_a_fault_left_and_with_check_what_has_changed(encoded, capsys):
    """It ignores files of others."""
    flags, folder, whole = encoded
    (folder / "moments.json").write_text('{"of": "another program"}')
    for name in ("moments-00002.json", "labels.npy", "meta.json"):
        (folder / name).write_bytes(b'{"vae_hash": "0')
    with pytest.raises(ValueError, match="meta.json: .*; run encode.py"):
        data.LatentFolder(folder)
    np.load(folder / "moments-00001.npy", mmap_mode="r+")[3, 0, 0, 0] += 0.25
    run(encode, flags)
    (folder / "moments.json").unlink()
    assert {name for name in whole if content_of(folder)[name] != whole[name]} == {"moments-00001.npy"}
    for said in (True, False):
        run(encode, f"{flags} --check")
        assert content_of(folder) == whole and ("moments-" in capsys.readouterr().err) == said


def test_latents_of_pictures_replaced_in_place_or_of_another_precision_are_refused(encoded, tmp_path):
    flags, folder, whole = encoded
    pictures, there = flags.split()[1], json.loads(whole["meta.json"])
    copy = flags.replace(pictures, str(shutil.copytree(pictures, tmp_path / "copy")))
    run(encode, copy)  # a copy elsewhere is the same
    assert json.loads((folder / "meta.json").read_text())["latents_hash"] == there["latents_hash"]
    Image.new("RGB", (32, 32), "red").save(tmp_path / "copy" / "a" / "0.png")
    with pytest.raises(ValueError, match=f"images_hash {there['images_hash'][:12]}.*, not [0-9a-f]+;"):
        run(encode, copy)
    with pytest.raises(ValueError, match="precision float32, not bfloat16"):
        run(encode, f"{flags} --dtype bf16")


def test_the_vae_of_latents_outlives_more_training_and_its_absence_is_explained(trained, tmp_path):
    folder = shutil.copytree(trained.vae, tmp_path / "vae")
    vae = folder / "ckpt_0000001.pt"
    run(encode, f"--data {trained.pictures} --workers 0 --device cpu --vae {folder} --out {tmp_path}/latents")
    for step in (2, 3, 4):
        checkpoints.save(folder, step, {"format": checkpoints.VAE, "step": step}, keep=1)
    assert sorted(checkpoints.checkpoints_in(folder)) == [1, 4]
    latents = data.LatentFolder(tmp_path / "latents").facts
    sit = small.small_sit(input_size=4, in_channels=latents["channels"], num_classes=2)
    small.small_sit_checkpoint(tmp_path / "sit", sit, latents=latents)
    vae.unlink()
    with pytest.raises(FileNotFoundError, match=f"{vae}.*{latents['vae_hash'][:12]}.*--vae"):
        run(sample, f"--ckpt {tmp_path}/sit {SAMPLE} --num 1 --out {tmp_path}/samples")


def test_corrupt_images_are_counted_over_shards_and_runs_whatever_the_workers(encoded, tmp_path, capfd):
    flags = encoded[0]
    pictures = shutil.copytree(flags.split()[1], tmp_path / "train")
    (pictures / "a" / "2.png").write_bytes(b"no picture")
    flags = f"{flags} --data {pictures} --out {tmp_path}/corrupt --workers"
    run(encode, f"{flags} 2")
    (tmp_path / "corrupt" / "moments-00002.json").unlink()
    run(encode, f"{flags} 0")
    assert data.LatentFolder(tmp_path / "corrupt").facts["corrupt"] == 1
    assert capfd.readouterr().err.count("1 of 40 images are corrupt") == 2


@pytest.fixture(scope="module")
def drawn(trained, tmp_path_factory):
    """(flags without --out, files) of 21 samples by one process without a stop."""
    out, flags = tmp_path_factory.mktemp("whole"), f"--ckpt {trained.sit} {SAMPLE} --num-images 21"
    run(sample, f"{flags} --out {out}")
    return flags, content_of(out)


def same_samples(folder, whole):
    there = content_of(folder)
    assert there.keys() == whole.keys() == {"grid.png", "protocol.json", "samples.npz"}  # no parts, no .tmp
    return all(there[name] == whole[name] for name in ("grid.png", "samples.npz"))


def test_a_larger_number_goes_on_from_a_smaller_one(drawn, tmp_path, monkeypatch):
    (flags, whole), calls, draw = drawn, [], sample.draw_latents

    def draw_or_stop(*given):
        if len(calls) == 3 and given[3].num == 13:
            raise KeyboardInterrupt
        calls.append(given[2])
        return draw(*given)

    monkeypatch.setattr(sample, "draw_latents", draw_or_stop)
    with pytest.raises(KeyboardInterrupt):
        run(sample, f"{flags} --num 13 --out {tmp_path}")
    run(sample, f"{flags} --out {tmp_path}")
    assert [i for batch in calls for i in batch] == [*range(21)] and same_samples(tmp_path, whole)
    ours = data.ArrayImages(tmp_path / "samples.npz")  # as numpy writes it, so that it can be mapped
    data.save_npz(tmp_path / "numpy.npz", ours.images, np.arange(21) % 2)
    assert isinstance(ours.images, np.memmap) and ours.images.shape == (21, 32, 32, 3)
    assert (tmp_path / "numpy.npz").read_bytes() == whole["samples.npz"]


def test_a_last_part_that_another_number_has_drawn_is_drawn_anew(drawn, tmp_path, monkeypatch):
    flags, whole = drawn
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.Parts, "save_npz", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(sample, f"{flags} --num 13 --out {tmp_path}")
    run(sample, f"{flags} --num 11 --out {tmp_path}")
    ours = data.ArrayImages(tmp_path / "samples.npz")
    assert len(ours) == len(ours.labels) == 11
    (tmp_path / "whole.npz").write_bytes(whole["samples.npz"])
    assert (ours.images == data.ArrayImages(tmp_path / "whole.npz").images[:11]).all()


def test_classes_are_drawn_by_name_or_number_and_shown_in_columns(trained, tmp_path, capsys):
    """Of 30 classes: those that were asked for, ten of them, or all."""
    vae, names = checkpoints.load_vae(trained.vae), [f"n{i:02d}" for i in range(29)] + ["3"]
    sit = small.small_sit(input_size=4, in_channels=28, num_classes=30)
    small.small_sit_checkpoint(tmp_path / "sit", sit, vae, latents={"class_names": names, "vae": trained.vae})
    random = [(2, 20)[common.derive_seed(0, "label", i) % 2] for i in range(9)]
    for flags, labels, text in (
            ("--classes n07 5 3", [7, 5, 29] * 8, "n07, n05, 3)"),
            ("", [*range(0, 30, 3)] * 8, "n00, n03, n06"), ("--num 31", [*range(30), 0], "not by class"),
            ("--classes 2 n20 --num 9 --labels random", random, "not by class")):
        run(sample, f"--ckpt {tmp_path}/sit {SAMPLE} --steps 1 --cfg 1 {flags} --out {tmp_path}/samples")
        assert np.load(tmp_path / "samples" / "samples.npz")["arr_1"].tolist() == labels
        assert text in capsys.readouterr().out
    for wanted, word in (("n007", "n07"), ("30", "0 to 29"), ("-1", "0 to 29")):
        with pytest.raises(ValueError, match=f"--classes {wanted}: want .*{word}"):
            data.find_classes([wanted], names, 30)
    for few, said in ((0, "want a n"), (3, "n02 or a number from 0 t"), (11, r"n09 or \.\.\. or a number f")):
        with pytest.raises(ValueError, match=said):
            data.find_classes(["x"], names[:few], few)


def test_pixels_that_are_no_numbers_stop_the_command(trained, tmp_path, monkeypatch):
    """fp16, which may overflow, is not used for the decoder."""
    seen, vae = [], checkpoints.load_vae(trained.vae)
    monkeypatch.setattr(type(vae), "decode", lambda self, z: seen.append(
        torch.is_autocast_enabled("cpu")) or torch.full((len(z), 3, 32, 32), 7e4).to(z.dtype))
    flags = f"--ckpt {trained.sit} --num 2 --steps 1 --sampler euler --device cpu --out {tmp_path}"
    for dtype in ("fp16", "bf16"):
        run(sample, f"{flags} --dtype {dtype}")
    assert seen == [False, True]
    monkeypatch.setattr(type(vae), "decode", lambda self, z: torch.full((len(z), 3, 32, 32), float("nan")))
    with pytest.raises(ValueError, match="not finite"):
        run(sample, flags)
    assert not (tmp_path / "samples.npz").exists()
