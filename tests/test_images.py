"""Pictures from outside (data.py): folders, archives, dataset.json, odd pixels, damage, identity.
Run: ./test.sh tests/test_images.py        (about 10 s, CPU; crop and plain files: tests/test_data.py)
"""
import json
import random
import shutil
import struct
import tarfile
import traceback
import unicodedata
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from test_errors import ENCODE, STAGE1

import data
import encode
import small
import train_vae
from common import Proc

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def packed(root, file, prefix="", level=zipfile.ZIP_STORED):
    """Write the files below root into a .zip or .tar, in no order; return its path."""
    is_zip = file.suffix.lower() == ".zip"
    tar = dict(mode="w", format=tarfile.GNU_FORMAT)
    with zipfile.ZipFile(file, "w", level) if is_zip else tarfile.open(file, **tar) as archive:
        for path in sorted(Path(root).rglob("*"), reverse=True):
            name = f"{prefix}{path.relative_to(root)}"
            if not is_zip:
                info = archive.gettarinfo(path)
                info.name = name
                archive.addfile(info, open(path, "rb") if info.isreg() else None)
            elif path.is_file():
                archive.writestr(name, path.read_bytes())
    return file


def run(command, *flags, **paths):
    """Run train_vae or encode in this process."""
    script, *words = command.format(**paths).split()
    return {"train_vae": train_vae, "encode": encode}[script].main([*words, *flags])


# which images

@pytest.mark.parametrize("name, prefix, level", [
    ("a.zip", "", zipfile.ZIP_STORED), ("a.ZIP", "", zipfile.ZIP_DEFLATED), ("a.tar", "", None),
    ("a.tar", "./", None), ("a.zip", "set/train/", zipfile.ZIP_DEFLATED)])
def test_an_archive_is_read_as_the_folder_it_was_made_from(tmp_path, name, prefix, level):
    root = small.pictures(tmp_path / "set")
    for other in ("a/@eaDir/0.png", "__MACOSX/a/._0.png", ".git/0.png"):
        (root / other).parent.mkdir(parents=True)
        shutil.copy(root / "a/0.png", root / other)
    if prefix == "set/train/":  # a folder in the archive, with its validation images beside it
        prefix, file = "set/", packed(root, tmp_path / name, prefix)
        with zipfile.ZipFile(file, "a", level) as archive:
            archive.write(root / "b/1.png", "set/val/b/1.png")
        path = file / "set/train"
        assert data.open_dataset(str(path), 16, "val").labels.tolist() == [1]
    else:
        path = packed(root, tmp_path / name, prefix, level)
    folder, archive = (data.ImageFolder(path, 16) for path in (root, path))
    assert archive.files.tolist() == folder.files.tolist() and archive.class_names == ["a", "b"]
    assert archive.images_hash == folder.images_hash and archive.labels.tolist() == folder.labels.tolist()
    workers = dict(num_workers=1, multiprocessing_context="spawn") if name == "a.ZIP" else {}
    batches = data.EvalBatches(archive, np.arange(8), 8)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, **workers)
    assert torch.equal(next(iter(loader))["images"], folder.batch(range(8))["images"])


def test_the_commands_read_archives(trained, tmp_path):
    file = packed(trained.pictures, tmp_path / "pictures.zip")
    run(ENCODE, "--shard-size", "16", pictures=file, vae=trained.vae, tmp=tmp_path / "latents")
    ours, theirs = data.LatentFolder(tmp_path / "latents"), data.LatentFolder(trained.latents)
    assert torch.equal(ours.batch(range(40))["moments"], theirs.batch(range(40))["moments"])
    assert ours.facts["images_hash"] == theirs.facts["images_hash"]


def test_the_hash_tells_replaced_pictures_sizes_names_and_labels_but_not_places(tmp_path):
    root = small.pictures(tmp_path / "set")
    shutil.copytree(root, tmp_path / "copy")

    def hash_of(path=root):
        return data.ImageFolder(path, 16).images_hash
    seen = [hash_of()]
    assert hash_of(tmp_path / "copy") == seen[0]
    (root / "a/0.png").write_bytes((root / "a/0.png").read_bytes()[::-1])  # of the same size
    seen.append(hash_of())
    (root / "a/0.png").rename(root / "a/zz.png")
    seen.append(hash_of())
    (root / "dataset.json").write_text(json.dumps({"labels": [
        [file, 1] for file in data.ImageFolder(root, 16).files.tolist()]}))
    seen.append(hash_of())
    assert len({*seen}) == 4
    (tmp_path / "many").mkdir()
    for i in range(2500):  # of more than 1,000 the last is among those that are read
        (tmp_path / f"many/{i:04}.png").write_bytes(b"x")
    before = hash_of(tmp_path / "many")
    (tmp_path / "many/2499.png").write_bytes(b"y")
    assert hash_of(tmp_path / "many") != before


def test_what_is_left_out_is_said_once_by_kind_and_all_formats_are_read(tmp_path, capsys):
    root = small.pictures(tmp_path / "set")
    for name in ("a/x.jfif", "a/x.jpe", "b/x.ppm", "b/x.pgm", "b/x.PNM"):
        Image.open(root / "a/0.png").save(root / name, "jpeg" if ".j" in name else "ppm")
    for name in ("a/@eaDir/0.png", "b/.ipynb_checkpoints/1.png", "$RECYCLE.BIN/0.png", "__MACOSX/a/0.png"):
        (root / name).parent.mkdir(parents=True)
        shutil.copy(root / "a/0.png", root / name)
    for name in ("a/0.heic", "a/1.nef", "Thumbs.db"):
        (root / name).write_text("x")
    (root / "a/gone.png").symlink_to("nowhere.png")
    (root / "a/self.png").symlink_to("self.png")
    (root / "c").symlink_to("nowhere")
    folder = data.ImageFolder(root, 32)
    said = capsys.readouterr().err.splitlines()
    assert len(folder) == 13 and folder.batch(range(13))["labels"].tolist() == [0] * 6 + [1] * 7
    assert len(said) == 1 and folder.corrupt == []
    for part in ("system folders: 4", "broken links: 3 (a/gone.png)", "read: 2 (a/0.heic)", "Thumbs.db"):
        assert part in said[0]


def test_names_in_nfc_and_nfd_are_the_same(tmp_path):
    for split, form in (("train", "NFC"), ("val", "NFD")):
        for name in ("Büro", "Öl"):
            small.pictures(tmp_path / split / unicodedata.normalize(form, name), n=2, classes=0)
    train, val = (data.open_dataset(str(tmp_path / "train"), 32, split) for split in ("train", "val"))
    assert train.class_names == val.class_names and train.images_hash == val.images_hash
    assert torch.equal(train.batch(range(4))["images"], val.batch(range(4))["images"]) and not val.corrupt


@pytest.mark.parametrize("folders, wanted", [
    (("train", "test"), "train"), (("Train", "Test"), "Train"), (("training", "testing", "x"), "training"),
    (("train", "valid", "test"), "train"), (("train", "validation"), "train"), (("train",), "train"),
    (("val", "test"), "test"), (("train", "car", "bus"), None), (("val", "car"), None), (("a",), None)])
def test_splits_are_no_classes(tmp_path, folders, wanted):
    for name in folders:
        small.pictures(tmp_path / name, n=2)
    if wanted:
        with pytest.raises(ValueError, match=f"--data {tmp_path}/{wanted}$"):
            data.ImageFolder(tmp_path, 32)
        assert len(data.ImageFolder(tmp_path, 32, labelled=False)) == 2 * len(folders)
    else:
        assert data.ImageFolder(tmp_path, 32).class_names == sorted(folders)


@pytest.mark.parametrize("train, val", [("train", "Valid"), ("Train", "validation"), ("training", "val"),
                                        ("train.zip", "val.zip")])
def test_a_vae_is_evaluated_on_held_out_images_without_classes(tmp_path, train, val):
    """As Tiny-ImageNet has them: train/CLASS/images, val/images."""
    small.pictures(tmp_path / "a", n=8, classes=2)
    small.pictures(tmp_path / "b" / "images", n=4, classes=0)
    for part, name in ((tmp_path / "a", train), (tmp_path / "b", val)):
        packed(part, tmp_path / name) if ".zip" in name else part.rename(tmp_path / name)
    path = str(tmp_path / train)
    held_out = data.open_dataset(path, 32, "val", labelled=False)
    assert len(held_out) == 4 and held_out.num_classes == 1
    with pytest.raises(ValueError, match="images is not among 2 training classes"):
        data.open_dataset(path, 32, "val")
    if val == "Valid":
        run(STAGE1, "--steps", "1", "--eval-every", "1", pictures=path, tmp=tmp_path / "out")
        assert "psnr" in (tmp_path / "out/log.jsonl").read_text()


def test_labels_of_dataset_json_are_read(trained, tmp_path):
    root = small.pictures(tmp_path / "images")
    names = sorted(str(path.relative_to(root)) for path in root.glob("*/*.png"))
    labels = [[name, k % 3] for k, name in enumerate(names)]
    (root / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    for path in (root, packed(root, tmp_path / "images.zip"), packed(root, tmp_path / "images.tar")):
        folder = data.ImageFolder(path, 32)
        assert folder.class_names == ["0", "1", "2"] and folder.labels.tolist() == [k % 3 for k in range(8)]
    run(ENCODE, pictures=root, vae=trained.vae, tmp=tmp_path / "latents")
    assert data.LatentFolder(tmp_path / "latents").labels.tolist() == [k % 3 for k in range(8)]
    for labels in ({"labels": None}, {}):
        (root / "dataset.json").write_text(json.dumps(labels))
        assert data.ImageFolder(root, 32).class_names == ["unconditional"]


NAMES = ["a/0.png", "b/1.png"]
REFUSED = [
    ("file is missing", {"labels": [[name, 0] for name in (*NAMES, "a/2.png")]}, "a/2.png"),
    ("image without a label", {"labels": [["a/0.png", 0]]}, "b/1.png"),
    ("name that leads out", {"labels": [["../a/0.png", 0], *([name, 0] for name in NAMES)]}, "../a/0.png"),
    ("vector for a label", {"labels": [[name, [0.5]] for name in NAMES]}, "label"),
    ("huge label", {"labels": [[name, 10**12] for name in NAMES]}, "label"),
    ("twice", {"labels": [["a/0.png", 0], ["a/0.png", 1], ["b/1.png", 1]]}, "twice"),
    ("a list", [1], "dataset.json"), ("damaged", '{"labels": [["a/0', "dataset.json"),
    ("nested", "[" * 100000, "dataset.json"), ("no text", b"\xff\xfe\x00", "dataset.json"),
]


@pytest.mark.parametrize("_, content, word", REFUSED, ids=[row[0] for row in REFUSED])
def test_a_dataset_json_that_does_not_fit_is_refused(tmp_path, _, content, word):
    root = small.pictures(tmp_path, n=2)
    content = content if isinstance(content, (str, bytes)) else json.dumps(content)
    (root / "dataset.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=word) as error:
        data.ImageFolder(root, 32)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("prefix", ["../", "/etc/", "C:/", "a/../../"])
@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_names_that_lead_out_of_an_archive_are_refused(tmp_path, suffix, prefix):
    root = small.pictures(tmp_path / "set", n=1)
    with pytest.raises(ValueError, match=f"{prefix}a.* leads out"):
        data.ImageFolder(packed(root, tmp_path / f"x.{suffix}", prefix), 32)


def test_links_are_left_out_and_other_archives_refused(tmp_path, capsys):
    root = small.pictures(tmp_path / "set", n=2)
    for link in ("a/link.png", "a/up.png"):
        (root / link).symlink_to("0.png" if "link" in link else "/etc/passwd")
    zipped = packed(root, tmp_path / "x.zip")
    with zipfile.ZipFile(zipped, "a") as archive:
        info = zipfile.ZipInfo("a/z.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    assert len(data.ImageFolder(packed(root, tmp_path / "x.tar"), 32)) == 2
    assert "links: 2 (a/link.png)" in capsys.readouterr().err
    assert len(data.ImageFolder(zipped, 32)) == 4 and "links: 1 (a/z.png)" in capsys.readouterr().err
    for name in ("x.tar.gz", "x.7z", "no.zip", "no.tar"):
        (tmp_path / name).write_bytes(b"\x1f\x8b" * 999)
        with pytest.raises(ValueError, match=name):
            data.ImageFolder(tmp_path / name, 32)
    with pytest.raises(ValueError, match="deflate"):
        data.ImageFolder(packed(root, tmp_path / "bz.zip", level=zipfile.ZIP_BZIP2), 32)
    content = bytearray((tmp_path / "x.tar").read_bytes())
    content[content.rindex(b"a/0.png")] ^= 1  # of a damaged header in the midst tarfile says nothing
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        data.ImageFolder(tmp_path / "x.tar", 32)


# pixels

def exif_of(*entries):
    """An EXIF block of (tag, type, the four bytes of its value)."""
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(
        struct.pack(">HHL4s", tag, kind, 1, value) for tag, kind, value in entries) + bytes(20)


@pytest.mark.parametrize("other", [(0x0128, 4, struct.pack(">L", 70000)), (0x011A, 10, b"\0\0\0\x26"),
                                   (0x0100, 5, b"\0\0\0\x26"), (0x8769, 4, b"\xff\xff\xff\xff")])
def test_pictures_are_turned_whatever_else_their_exif_says(tmp_path, other):
    turn = (0x0112, 3, b"\0\x06\0\0")
    for suffix in ("jpg", "png", "webp"):
        Image.new("RGB", (32, 16)).save(tmp_path / f"x.{suffix}", exif=exif_of(*sorted((turn, other))))
        assert data.load_image(tmp_path / f"x.{suffix}").size == (16, 32)


@pytest.mark.parametrize("name, values, want", [
    ("x.tif", RAMP.astype("f4"), RAMP * 255), ("x.tif", (RAMP * 255).astype("f4"), RAMP * 255),
    ("x.tif", (RAMP * 65535).astype("f4"), RAMP * 255), ("x.tif", (RAMP * 255).astype("i4"), RAMP * 255),
    ("x.tif", (RAMP * 65535).astype("i4"), RAMP * 255), ("x.tif", (RAMP * 9).astype("u2"), RAMP * 0),
    ("x.png", (RAMP * 65535).astype("u2"), RAMP * 255), ("x.png", (RAMP * 200).astype("u2"), RAMP * 0),
    ("x.tif", RAMP.astype("f4") - 1, "-1 to 0"), ("x.tif", RAMP.astype("f4") * 1.5, "to 1.5"),
    ("x.tif", np.full((8, 8), np.nan, "f4"), "nan"), ("x.tif", (RAMP * 1e6).astype("i4"), "to 1e\\+06")])
def test_deep_greys_are_scaled_by_their_range_or_refused_with_it(tmp_path, name, values, want):
    Image.fromarray(values).save(tmp_path / name)
    if isinstance(want, str):
        with pytest.raises(ValueError, match=f"{name}.*{want}"):
            data.load_image(tmp_path / name)
    else:
        assert np.abs(np.asarray(data.load_image(tmp_path / name))[..., 0] - want).max() <= 1


def test_large_texts_and_pictures_are_read_and_bombs_are_not(tmp_path, monkeypatch):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 2**21, zip=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png", pnginfo=texts, icc_profile=bytes(2**21))
    texts.add_text("bomb", "x" * 2**27, zip=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "bomb.png", pnginfo=texts)
    Image.new("1", (2**10, 2**10)).save(tmp_path / "large.png")
    assert data.MAX_PIXELS == 2**28
    monkeypatch.setattr(data, "MAX_PIXELS", 2**20)  # quick
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("x.png", "large.png"):
            assert data.load_image(tmp_path / name)
    Image.new("1", (2**10, 2**10 + 1)).save(tmp_path / "large.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")  # which a program would have to read
    (tmp_path / "a.eps").rename(tmp_path / "eps.png")
    for name in ("large.png", "bomb.png", "eps.png"):
        with pytest.raises(ValueError, match=name):
            data.load_image(tmp_path / name)


def test_a_small_first_picture_is_said_to_be_scaled_up(pictures, capsys, monkeypatch):
    data.ImageFolder(pictures, 32)
    assert not capsys.readouterr().err
    data.ImageFolder(pictures, 256)
    assert "0.png has 32 x 32 pixels and is scaled up to 256; want --image-size 32" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    data.ImageFolder(pictures, 256)
    assert not capsys.readouterr().err


# damage

@pytest.mark.parametrize("workers", [0, 8])
def test_one_percent_may_be_damaged_whatever_the_number_of_workers(tmp_path, capfd, monkeypatch, workers):
    """Eight workers that counted for themselves would see less than 1 % each."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr("torch.utils.data.DataLoader.check_worker_number_rationality", lambda _: None)
    root = small.pictures(tmp_path / "set", n=200, classes=0, size=8)

    def read():
        folder = data.ImageFolder(root, 8)
        for _ in range(2):
            for batch in data.eval_loader(folder, 8, Proc(0, 1, torch.device("cpu")), workers):
                assert len(batch["images"]) == 8
        return folder.corrupt
    damaged = [19, 90, 111, 150, 199]
    files = data.ImageFolder(root, 8).files
    for i in damaged[:2]:
        (root / files[i]).write_bytes(b"")
    assert read() == damaged[:2]
    said = capfd.readouterr().err
    assert [said.count(f"/{files[i]}:") for i in damaged[:2]] == [1, 1]
    for i in damaged:
        (root / files[i]).write_bytes(b"")
    with pytest.raises(ValueError, match="5 of 200 images") as error:
        read()
    assert all(files[i] in str(error.value) for i in damaged)  # all at once
    traceback.clear_frames(error.tb)  # they hold the loader, whose workers would outlive the tests


def test_damaged_files_fail_with_one_line(tmp_path):
    rng, image = random.Random(0), Image.fromarray((RAMP.repeat(3).reshape(8, 8, 3) * 255).astype(np.uint8))
    (small.pictures(tmp_path / "set", n=4) / "dataset.json").write_text(json.dumps(
        {"labels": [[name, 0] for name in ("a/0.png", "b/1.png", "a/2.png", "b/3.png")]}))
    for name in ("x.jpg", "x.png", "x.gif", "x.tif", "x.webp", "x.bmp", "x.ppm", "x.jp2"):
        exif = {"exif": exif_of((0x0112, 3, b"\0\x06\0\0"))} if name in ("x.jpg", "x.png", "x.tif") else {}
        image.save(tmp_path / name, **exif)
    for name in ("y.zip", "z.zip", "y.tar"):
        packed(tmp_path / "set", tmp_path / name, level=zipfile.ZIP_DEFLATED if name == "z.zip" else 0)
    failed = 0
    for file in [*tmp_path.glob("?.*"), tmp_path / "set/dataset.json"]:
        sound = file.read_bytes()
        for _ in range(60):
            content = bytearray(sound[:rng.randrange(len(sound))] if rng.random() < 0.3 else sound)
            for _ in range(rng.randrange(1, 4) if content else 0):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(content)
            try:
                if file.name[0] == "x":
                    data.load_image(file)
                else:
                    folder = data.ImageFolder(file if file.name[0] in "yz" else file.parent, 32)
                    folder.batch(range(len(folder)))
            except ValueError as error:
                failed += 1
                assert len(str(error).splitlines()) == 1 and str(tmp_path) in str(error)
        file.write_bytes(sound)
    assert failed > 200
