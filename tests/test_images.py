"""Pictures from outside (data.py): folders, archives, dataset.json, odd pixels. Damage: test_fuzz.py."""
import json
import pickle
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
from test_train import VAE

import data
import small
import train_vae
from common import Proc


def packed(root, file, prefix="", level=zipfile.ZIP_STORED):
    """Write the files below root into a .zip or .tar, in no order; return its path."""
    is_zip, tar = file.suffix.lower() == ".zip", dict(mode="w", format=tarfile.GNU_FORMAT)
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


@pytest.mark.parametrize("name, prefix, level", [
    ("a.zip", "", zipfile.ZIP_STORED), ("a.ZIP", "", zipfile.ZIP_DEFLATED), ("a.tar", "", None),
    ("a.tar", "./", None), ("a.zip", "set/train/", zipfile.ZIP_DEFLATED)])
def test_an_archive_is_read_as_the_folder_it_was_made_from(tmp_path, name, prefix, level):
    root = small.pictures(tmp_path / "set")
    for other in ("a/@eaDir/0.png", "__MACOSX/a/._0.png", ".git/0.png"):
        (root / other).parent.mkdir(parents=True)
        shutil.copy(root / "a/0.png", root / other)
    path = packed(root, tmp_path / name, prefix, level) / prefix
    if prefix == "set/train/":  # a folder in the archive, with its validation images beside it
        with zipfile.ZipFile(tmp_path / name, "a", level) as archive:
            archive.write(root / "b/1.png", "set/val/b/1.png")
        assert data.open_dataset(str(path), 16, "val").labels.tolist() == [1]
    folder, archive = (data.ImageFolder(path, 16) for path in (root, path))
    for key in ("files", "labels", "class_names", "images_hash"):
        assert list(getattr(archive, key)) == list(getattr(folder, key)), key
    in_a_worker = pickle.loads(pickle.dumps(archive))  # one that is spawned
    for images in (archive, in_a_worker):
        assert torch.equal(images.batch(range(8))["images"], folder.batch(range(8))["images"])


def test_the_hash_tells_replaced_pictures_sizes_names_and_labels_but_not_places(tmp_path):
    root, many = small.pictures(tmp_path / "set"), tmp_path / "many"
    picture, hash_of = root / "a/0.png", lambda path: data.ImageFolder(path, 16).images_hash
    seen = [hash_of(root)]
    assert hash_of(shutil.copytree(root, tmp_path / "copy")) == seen[0]
    labels = {"labels": [[f"{'ab'[i % 2]}/{i or 'zz'}.png", 1] for i in range(8)]}
    for change in (lambda: picture.write_bytes(picture.read_bytes()[::-1]),  # of the same size
                   lambda: picture.rename(root / "a/zz.png"),
                   lambda: (root / "dataset.json").write_text(json.dumps(labels))):
        change()
        seen.append(hash_of(root))
    many.mkdir()
    for i in range(1500):  # of more than 1,000 the last is among those that are read
        (many / f"{i:04}.png").write_bytes(b"x")
    seen.append(hash_of(many))
    (many / "1499.png").write_bytes(b"y")
    assert len({*seen, hash_of(many)}) == 6


def test_what_is_left_out_is_said_once_by_kind_and_all_formats_are_read(tmp_path, capsys):
    root = small.pictures(tmp_path / "set")
    for name in ("a/x.jfif", "a/x.jpe", "b/x.ppm", "b/x.pgm", "b/x.PNM"):
        Image.open(root / "a/0.png").save(root / name, "jpeg" if ".j" in name else "ppm")
    for name in ("a/@eaDir/0.png", "b/.ipynb_checkpoints/1.png", "$RECYCLE.BIN/0.png", "__MACOSX/a/0.png",
                 "a/0.heic", "a/1.nef", "Thumbs.db"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "a/0.png", root / name)
    for name, target in (("a/gone.png", "nowhere.png"), ("a/self.png", "self.png"), ("c", "nowhere")):
        (root / name).symlink_to(target)
    folder = data.ImageFolder(root, 32)
    said = capsys.readouterr().err.splitlines()
    assert folder.batch(range(13))["labels"].tolist() == [0] * 6 + [1] * 7 and len(folder) == 13
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


def test_splits_are_no_classes(tmp_path):
    for folders, wanted in (
            ("train test", "train"), ("Train Test", "Train"), ("training testing x", "training"),
            ("train valid", "train"), ("train validation", "train"), ("train", "train"), ("val test", "test"),
            ("seg_test seg_train x", "seg_train"), ("test_set training_set", "training_set"),
            ("dev train", "train"), ("train_images val_images", "train_images"), ("a", "a"),
            ("test-dev train val", "train"), ("test train train_extra val", "train"),
            ("train2017 val2017", "train2017"),
            ("train car bus", None), ("val car", None), ("bullet_train test_tube steam_train", None)):
        root = tmp_path / folders
        for name in folders.split():
            small.pictures(root / name, n=2)
        if wanted:
            with pytest.raises(ValueError, match=f"--data {root}/{wanted}$"):
                data.ImageFolder(root, 32)
            assert data.ImageFolder(root, 32, data.ONE_CLASS).num_classes == 1
        else:
            assert data.ImageFolder(root, 32).class_names == sorted(folders.split())


def test_a_vae_is_evaluated_on_held_out_images_without_classes(tmp_path):
    """As Tiny-ImageNet has them: train/CLASS/images, val/images."""
    small.pictures(tmp_path / "a", n=8, classes=2)
    small.pictures(tmp_path / "b" / "images", n=4, classes=0)
    for train, val in (("train", "Valid"), ("Train", "validation"), ("training", "val"),
                       ("train.zip", "val.zip")):
        root = tmp_path / f"of {train}"
        root.mkdir()
        for part, name in (("a", train), ("b", val)):
            (packed if ".zip" in name else shutil.copytree)(tmp_path / part, root / name)
        path = str(root / train)
        held_out = data.open_dataset(path, 32, "val", labelled=False)
        assert len(held_out) == 4 and held_out.num_classes == 1
        with pytest.raises(ValueError, match="images is none of 2 classes"):
            data.open_dataset(path, 32, "val")
        train_vae.main(["--data", path, *f"{VAE} --align 0 --gan 0 --dry-run".split()])


def test_labels_of_dataset_json_are_read_or_refused(tmp_path):
    root = small.pictures(tmp_path / "images")
    labels = [[name, k % 3] for k, name in enumerate(data.ImageFolder(root, 32).files.tolist())]
    (root / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    for path in (root, packed(root, tmp_path / "images.zip"), packed(root, tmp_path / "images.tar")):
        folder = data.ImageFolder(path, 32)
        assert folder.class_names == ["0", "1", "2"]
        assert folder.batch(range(8))["labels"].tolist() == [k % 3 for k in range(8)]
    for content, word in (
            ({"labels": None}, None), ({}, None), ({"labels": [*labels, ["a/9.png", 0]]}, "a/9.png"),
            ({"labels": labels[:-1]}, "b/7.png"), ({"labels": [*labels, ["../a/0.png", 0]]}, "../a/0.png"),
            ({"labels": [[name, [0.5]] for name, _ in labels]}, "label"), ([1], "dataset.json"),
            ({"labels": [[name, 10**12] for name, _ in labels]}, "label"),
            ({"labels": [*labels, labels[0]]}, "twice"), (b'{"labels": [["a/0', "dataset.json"),
            (b"[" * 100000, "dataset.json"), (b"\xff\xfe\x00", "dataset.json")):
        (root / "dataset.json").write_bytes(
            content if isinstance(content, bytes) else json.dumps(content).encode())
        if word is None:
            assert data.ImageFolder(root, 32).class_names == ["unconditional"]
            continue
        with pytest.raises(ValueError, match=word) as error:
            data.ImageFolder(root, 32)
        assert len(str(error.value).splitlines()) == 1


def test_what_leads_out_of_an_archive_and_other_archives_are_refused_or_left_out(tmp_path, capsys):
    root = small.pictures(tmp_path / "set", n=2)
    tar, bz = packed(root, tmp_path / "x.tar"), packed(root, tmp_path / "bz.zip", level=zipfile.ZIP_BZIP2)
    content = bytearray(tar.read_bytes())
    content[content.rindex(b"a/0.png")] ^= 1  # of a damaged header in the midst tarfile says nothing
    tar.write_bytes(content)
    refused = [(tar, "damaged"), (bz, "deflate")]
    for i, prefix in enumerate(("../", "/etc/", "C:/", "a/../../")):
        refused += [(packed(root, tmp_path / f"{i}.{suffix}", prefix), f"{prefix}[ab].* leads out")
                    for suffix in ("zip", "tar")]
    for name in ("x.tar.gz", "no.zip", "no.tar"):
        (tmp_path / name).write_bytes(b"\x1f\x8b" * 999)
        refused.append((tmp_path / name, name))
    for path, word in refused:
        with pytest.raises((ValueError, FileNotFoundError), match=word):
            data.ImageFolder(path, 32)
    zipped, info = packed(root, tmp_path / "x.zip"), zipfile.ZipInfo("a/z.png")
    info.external_attr = 0o120777 << 16  # a link
    with zipfile.ZipFile(zipped, "a") as archive:
        archive.writestr(info, "/etc/passwd")
    for link, target in (("a/link.png", "0.png"), ("a/up.png", "/etc/passwd")):
        (root / link).symlink_to(target)
    for path, links in ((zipped, "1 (a/z.png)"), (packed(root, tar), "2 (a/link.png)")):
        assert len(data.ImageFolder(path, 32)) == 2 and f"links: {links}" in capsys.readouterr().err


def exif_of(*entries):
    """An EXIF block of (tag, type, the four bytes of its value)."""
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(
        struct.pack(">HHL4s", tag, kind, 1, value) for tag, kind, value in entries) + bytes(20)


def test_pictures_are_turned_whatever_else_their_exif_says(tmp_path):
    for tag, kind, value in ((0x0128, 4, struct.pack(">L", 70000)), (0x011A, 10, b"\0\0\0\x26"),
                             (0x0100, 5, b"\0\0\0\x26"), (0x8769, 4, b"\xff\xff\xff\xff")):
        exif = exif_of(*sorted([(0x0112, 3, b"\0\x06\0\0"), (tag, kind, value)]))
        for name in ("x.jpg", "x.png", "x.webp"):
            Image.new("RGB", (32, 16)).save(tmp_path / name, exif=exif)
            assert data.load_image(tmp_path / name).size == (16, 32)


def test_deep_greys_are_scaled_by_their_range_or_refused_with_it(tmp_path):
    """More of 16 bits: test_data.py."""
    ramp, file = np.linspace(0, 1, 64).reshape(8, 8), tmp_path / "x.tif"
    for values, dtype, want in (
            (ramp, "f4", 255), (ramp * 255, "f4", 255), (ramp * 65535, "f4", 255), (ramp * 255, "i4", 255),
            (ramp * 65535, "i4", 255), (ramp * 200, "u2", 0), (ramp - 1, "f4", "-1 to 0"),
            (ramp * 1.5, "f4", "to 1.5"), (ramp * np.nan, "f4", "nan"), (ramp * 1e6, "i4", "to 1e\\+06")):
        Image.fromarray(values.astype(dtype)).save(file)
        if isinstance(want, str):
            with pytest.raises(ValueError, match=f"x.tif.*{want}"):
                data.load_image(file)
        else:
            assert np.abs(np.asarray(data.load_image(file))[..., 0] - ramp * want).max() <= 1, (want, dtype)


def test_large_texts_and_pictures_are_read_and_bombs_are_not(tmp_path, monkeypatch):
    assert data.MAX_PIXELS == 2**28
    monkeypatch.setattr(data, "MAX_PIXELS", 2**20)  # quick
    texts, black = PngImagePlugin.PngInfo(), Image.new("RGB", (9, 9))
    texts.add_text("workflow", "x" * 2**21, zip=True)
    black.save(tmp_path / "x.png", pnginfo=texts, icc_profile=bytes(2**21))
    texts.add_text("bomb", "x" * 2**27, zip=True)
    black.save(tmp_path / "bomb.png", pnginfo=texts)
    black.save(tmp_path / "eps.png", "eps")  # which a program would have to read
    for name, rows in (("large.png", 2**10), ("larger.png", 2**10 + 1)):
        Image.new("1", (2**10, rows)).save(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.load_image(tmp_path / "x.png") and data.load_image(tmp_path / "large.png")
    for name in ("larger.png", "bomb.png", "eps.png"):
        with pytest.raises(ValueError, match=name):
            data.load_image(tmp_path / name)


def test_a_small_first_picture_is_said_to_be_scaled_up_once(pictures, capsys, monkeypatch):
    text = f"{pictures}/a/0.png has a side of 32 pixels and is scaled up to --image-size 256"
    for size, rank, said in ((32, 0, False), (256, 0, True), (256, 1, False)):
        monkeypatch.setenv("RANK", str(rank))
        data.ImageFolder(pictures, size)
        assert (text in capsys.readouterr().err) == said


def test_one_percent_may_be_damaged_whatever_the_number_of_workers(tmp_path, capfd, monkeypatch):
    """Three workers that counted for themselves would see 1 % or less each. None: test_data.py."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr("torch.utils.data.DataLoader.check_worker_number_rationality", lambda _: None)
    root = small.pictures(tmp_path / "set", n=200, classes=0, size=8)
    damaged, files = [19, 90, 111, 150, 199], data.ImageFolder(root, 8).files

    def read(count):
        for i in damaged[:count]:
            (root / files[i]).write_bytes(b"")
        folder = data.ImageFolder(root, 8)
        for _ in range(2):
            for batch in data.eval_loader(folder, 8, Proc(0, 1, torch.device("cpu")), 3):
                assert len(batch["images"]) == 8
        said = capfd.readouterr().err
        assert folder.corrupt == damaged[:2] and all(said.count(f"/{files[i]}:") == 1 for i in damaged[:2])
    read(2)
    with pytest.raises(ValueError, match="5 of 200 images") as error:
        read(5)
    assert all(files[i] in str(error.value) for i in damaged)  # all at once
    traceback.clear_frames(error.tb)  # they hold the loader, whose workers would outlive the tests
