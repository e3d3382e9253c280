"""Files from strangers: bits flipped, cut, values of other types. A reader returns, or fails with one line.
8 s; FUZZ=700 python -m pytest tests/test_fuzz.py: forty times as many cases."""
import copy
import io
import json
import os
import random
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import pictures, save, small_mapper, small_sit, small_vae
from test_attributes import awa2, celeba, csv_folder, deepfashion, kaggle
from test_checkpoints import LISTS, MEAN, STD, batch_norm
from test_images import exif_of, packed

import checkpoints
import data
import fid
import plot
import vae
from attributes import open_attributes
from shapes import networks, report

READS = int(os.environ.get("FUZZ", 16))  # of each file and each kind of damage
VALUES = [None, -1, 0, 10**30, 1e400, "", "\0/x", [], [[1, "a"]], {}, {"a": 1}, True]
TENSORS = [MEAN, MEAN.long(), torch.zeros(1).expand(2**20, 2**20), torch.eye(2).to_sparse()]


def flipped(content: bytes, rng) -> bytes:
    """Return the content cut, or with bits flipped, or with a piece of it at another place."""
    content, n, kind = bytearray(content), len(content), rng.randrange(4)
    ends = [*range(min(n, 400)), *range(max(0, n - 400), n)]  # where headers and directories are
    places = [rng.choice(rng.choice((ends, range(n)))) for _ in range(3)]
    if kind == 0:
        return bytes(content[:places[0]])
    if kind == 1:
        content[places[0]:places[0] + 30] = content[places[1]:places[1] + 30]
    for place in places[:rng.randrange(1, 4)] if kind > 1 else ():
        content[place] ^= 1 << rng.randrange(8)
    return bytes(content)


def swapped(value, rng, others):
    """Return nested dicts and lists with one value left out, or replaced by one of `others`."""
    if rng.random() < 0.2 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(others)
    value, key = copy.copy(value), rng.choice([*value] if isinstance(value, dict) else range(len(value)))
    value[key] = swapped(value[key], rng, others)
    if rng.random() < 0.2:
        del value[key]
    return value


def write(path, content):
    """Write a dict in the format that the suffix names; bytes as they are."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content, default=str))
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row, default=str)}\n" for row in content["rows"]))
    elif path.suffix == ".npz":
        np.savez(path, **content)
    else:
        checkpoints.save_file(path, content)


VAE, SIT = small_vae(ch=8, ch_mult=(1,), norm_groups=8), small_sit(depth=1)
MAPPER, TEACHER = small_mapper(out_dim=8, projector_dim=8), networks.ShapesTeacher(9)
STATES = [network.state_dict() for network in (VAE, SIT, MAPPER, TEACHER)]
LOADERS = [checkpoints.load_vae, checkpoints.load_mapper, checkpoints.load_discriminator,
           checkpoints.load_sit, lambda path: checkpoints.load_sit(path, "raw"),
           lambda path: checkpoints.read_statistics(path, 4)]
MOMENTS = {"mu": np.zeros(4), "sigma": np.eye(4), "n": 9, "meta": '{"image_size": 32}',
           "features": np.random.default_rng(0).random((9, 4))}
DIFFUSERS = {"block_out_channels": [8], "down_block_types": ["DownEncoderBlock2D"], "norm_num_groups": 8}
PROBE = {"labels": ["a"], "vaes": [{"flat": {"macro_f1": 0.5, "groups": {"hue": 0.5}}, "pooled": {}}] * 2}
ROWS = [{"step": 0, "config": {"a": 1}}, *({"step": i, "loss": i / 9, "psnr_db": "nan"} for i in range(9))]


def measure(path):
    if fid.has_array(path, "mu"):
        write(path.with_name("sound.npz"), MOMENTS)
        fid.gfid(*(fid.FeatureStats.load(file) for file in (path, path.with_name("sound.npz"))))


def read_pictures(root):
    folder = data.ImageFolder(root, 32)
    folder.batch(range(len(folder)))


def picture(kind):
    file, image = io.BytesIO(), Image.linear_gradient("L").resize((8, 8)).convert("RGB")
    image.save(file, kind, exif=exif_of((0x0112, 3, b"\0\x06\0\0")))
    return file.getvalue()


def archive(name, level):
    with tempfile.TemporaryDirectory() as folder:
        return packed(pictures(f"{folder}/set", n=2), Path(folder) / name, level=level).read_bytes()


# file -> (its sound content, what reads it)
FILES = {
    "ours.pt": ({"format": checkpoints.VAE, "model": STATES[0], "model_config": asdict(VAE.config),
                 "mapper": STATES[2], "mapper_config": asdict(MAPPER.config), "args": {}}, LOADERS),
    "sit.pt": ({"format": checkpoints.SIT, "model": STATES[1], "model_config": asdict(SIT.config),
                "ema": STATES[1], "latents": {"vae": "v", "vae_hash": "h", **LISTS},
                "args": {"label_dropout": 0.1}}, LOADERS),
    "published.ckpt": ({"ema": STATES[1] | batch_norm(), "vae": STATES[0], "args": {"path_type": "Linear"},
                        "discriminator": {"main.0.bias": MEAN}}, LOADERS),
    "vae.safetensors": (dict(STATES[0]), LOADERS[:1]),
    "latents.pt": ({"latents_scale": STD, "latents_bias": MEAN}, LOADERS[-1:]),
    "stats.json": ({"vae_hash": "a", **LISTS}, LOADERS[-1:]),
    "config.json": (DIFFUSERS, [lambda path: checkpoints.load_vae(path.parent), *LOADERS[-1:]]),
    "teacher.pt": ({"config": {"dim": 9}, "model": STATES[3]},
                   [networks.load_teacher]),
    "moments.npz": (MOMENTS, [measure]),
    "images.npz": ({"arr_0": np.zeros((3, 8, 8, 3), np.uint8), "arr_1": np.arange(3)},
                   [lambda path: data.ArrayImages(str(path)).batch([0, 1])]),
    "probe.json": (PROBE, [lambda path: report.measured(path.parent)]),
    "log.jsonl": ({"rows": ROWS}, [lambda path: plot.read_curve(path, "loss")]),
    "dataset.json": ({"labels": [["a/0.png", 0], ["b/1.png", 0]]},
                     [lambda path: read_pictures(path.parent)]),
    **{f"x.{suffix}": (picture(suffix), [data.load_image])
       for suffix in ("jpeg", "png", "gif", "tiff", "webp", "bmp", "ppm", "jpeg2000")},
    **{f"{level}.{suffix}": (archive(f"{level}.{suffix}", level), [read_pictures])
       for suffix, level in (("zip", zipfile.ZIP_STORED), ("zip", zipfile.ZIP_DEFLATED), ("tar", 0))},
}


def fails_with_one_line(read, path):
    """Read; return whether that failed."""
    try:
        read(path)
        return False
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        assert "\n" not in text and len(text) < 700 and text, text
        return True


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_loads_or_fails_with_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(vae, "VAE_SIZES", {"small": VAE.config})  # sooner than to compare with all of them
    (content, readers), path, rng, failed = FILES[name], tmp_path / name, random.Random(name), 0
    save(tmp_path / checkpoints.DIFFUSERS_FILES[1], {"encoder.down_blocks.0.resnets.0.conv1.weight": MEAN})
    pictures(tmp_path, n=2)  # of dataset.json
    write(path, content)
    sound, others = path.read_bytes(), VALUES + TENSORS * (path.suffix in (".pt", ".ckpt"))
    for i in range(2 * READS // len(readers)):
        flip = i % 2 or isinstance(content, bytes)
        try:
            write(path, flipped(sound, rng) if flip else swapped(content, rng, others))
        except Exception:  # no such file can be written
            continue
        failed += sum([fails_with_one_line(read, path) for read in readers])
    assert failed


@pytest.mark.parametrize("make", [celeba, kaggle, deepfashion, awa2, csv_folder])
@pytest.mark.filterwarnings("ignore")
def test_damaged_lists_of_attributes_are_read_or_fail_with_one_line(tmp_path, make):
    make(tmp_path)
    for path in sorted([*tmp_path.glob("**/*.txt"), *tmp_path.glob("**/*.csv")]):
        sound, rng = path.read_bytes(), random.Random(path.name)
        for i in range(READS + 1):
            path.write_bytes(flipped(sound, rng) if i < READS else sound)
            fails_with_one_line(lambda path: open_attributes(str(path), 32), tmp_path)


def test_a_torn_last_line_of_a_log_is_skipped(tmp_path):
    write(tmp_path / "log.jsonl", {"rows": ROWS})
    sound = (tmp_path / "log.jsonl").read_bytes()
    for cut in range(2, len(json.dumps(ROWS[-1])) + 1):
        (tmp_path / "log.jsonl").write_bytes(sound[:-cut])
        assert len(plot.read_curve(tmp_path / "log.jsonl", "loss")) == 8


@pytest.mark.parametrize("name, read", [("mu", fid.FeatureStats.load), ("arr_0", data.ArrayImages)])
def test_a_header_that_claims_a_terabyte_is_refused(tmp_path, name, read):
    """A file of 24 bytes whose header says 2**40."""
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (2**38, 2, 2)})
        file.write(bytes(24))
    for level in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / f"{level}.npz", "w", level) as archive:
            archive.write(tmp_path / "a.npy", f"{name}.npy")
    for path in ("a.npy", "0.npz", "8.npz"):
        with pytest.raises(ValueError, match=path):
            read(str(tmp_path / path))
