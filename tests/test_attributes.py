"""Readers of attributes: small trees in exactly the published formats, whole and with the usual damage.

    python -m pytest tests/test_attributes.py          3 s on 2 CPU cores
"""
import numpy as np
import pytest
from PIL import Image

import data
from attributes import SPLITS, open_attributes
from shapes.scenes import Shapes

CELEBA_NAMES = ["5_o_Clock_Shadow", "Bald", "Young"]
AWA_CLASSES = ["antelope", "grizzly+bear", "killer+whale"]
AWA_MATRIX = [[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 1]]


def draw(path, number):
    """Write a picture that says its number: red 10 * number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 48), (10 * number, 99, 0)).save(path, quality=95)


def write(path, lines, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((end.join(lines) + end).encode())


def celeba(root, lists="", pictures="img_align_celeba", count=20, end="\n", space=" "):
    """CelebA as published: values -1 and 1 in columns, image i has attribute k if bit k of i is set."""
    lines = [f"{count}", " ".join(CELEBA_NAMES) + " "]
    for i in range(1, count + 1):
        lines.append(f"{i:06d}.jpg " + space.join(f"{1 if i >> k & 1 else -1:2d}" for k in range(3)))
        draw(root / pictures / f"{i:06d}.jpg", i)
    write(root / lists / "list_attr_celeba.txt", lines, end)
    parts = [f"{i:06d}.jpg {(i > count - 8) + (i > count - 4)}" for i in range(1, count + 1)]
    write(root / ("Eval" if lists == "Anno" else lists) / "list_eval_partition.txt", parts, end)


def kaggle(root):
    """CelebA as Kaggle has it: comma-separated, with a header; the images in a folder of a folder."""
    celeba(root, pictures="img_align_celeba/img_align_celeba")
    for name, header, start in (("list_attr_celeba", CELEBA_NAMES, 2), ("list_eval_partition", ["part"], 0)):
        lines = (root / f"{name}.txt").read_text().splitlines()[start:]
        rows = [["image_id", *header], *(line.split() for line in lines)]
        write(root / f"{name}.csv", [",".join(row) for row in rows], "\r\n")
        (root / f"{name}.txt").unlink()


def deepfashion(root, anno="Anno", pictures="Img/img"):
    """DeepFashion as published: attribute names with spaces and a type; image i has attribute i % 3."""
    names = [("a-line", 3), ("abstract chevron print", 1), ("zip-up back", 4)]
    write(root / anno / "list_attr_cloth.txt", ["3", "attribute_name  attribute_type"] +
          [f"{name:<40} {code}" for name, code in names])
    files = [f"img/Sheer_Pleated-Front_Blouse/img_{i:08d}.jpg" for i in range(1, 13)]
    lines = ["12", "image_name  attribute_labels"]
    for i, file in enumerate(files, 1):
        values = " ".join(f"{1 if i % 3 == k else -(i % 2):2d}" for k in range(3))  # 0: unknown
        lines.append(f"{file:<70} {values} ")
        draw(root / pictures / file[4:], i)
    write(root / anno / "list_attr_img.txt", lines)
    write(root / "Eval" / "list_eval_partition.txt", ["12", "image_name  evaluation_status"] + [
        f"{file:<70} {'train' if i < 6 else 'val' if i < 9 else 'test'}" for i, file in enumerate(files)])


def awa2(root, each=10):
    """AwA2 as published: numbered classes and predicates behind a tab, a matrix of 0 and 1, class folders."""
    write(root / "classes.txt", [f"{i:6d}\t{name}" for i, name in enumerate(AWA_CLASSES, 1)])
    predicates = ["black", "white", "big", "swims"]
    write(root / "predicates.txt", [f"{i:6d}\t{name}" for i, name in enumerate(predicates, 1)])
    write(root / "predicate-matrix-binary.txt", [" ".join(map(str, row)) for row in AWA_MATRIX])
    for k, name in enumerate(AWA_CLASSES):
        for i in range(each):
            draw(root / "JPEGImages" / name / f"{name}_1{i + 1:04d}.jpg", 2 * k)


def csv_folder(root, folders=("class 0", "class 1")):
    """20 images in two folders; attribute warm: odd number; round: 10 or more."""
    lines = ["\ufefffilename, warm ,round"]
    for i in range(20):
        draw(root / folders[i % 2] / f"Bild ü{i}.JPG", i)
        lines.append(f"{folders[i % 2]}/Bild ü{i}.JPG, {i % 2},{1 if i > 9 else -1} ")
    write(root / "attributes.csv", [*lines, ""], "\r\n")


def files_of(splits, name):
    images, indices = splits[name]
    return [str(images.files[i]) for i in indices]


def check_values(splits, values_of):
    """Every picture has the attributes values_of(the number that it says)."""
    for images, indices in splits.values():
        batch = images.batch(indices)
        assert batch["index"].tolist() == list(indices) and batch["images"].shape[1:] == (3, 32, 32)
        numbers = (batch["images"][:, 0].float().mean((1, 2)) / 10).round().int().tolist()
        assert images.attributes[indices].astype(int).tolist() == [values_of(number) for number in numbers]


def counts(splits):
    return [len(splits[name][1]) for name in SPLITS]


# the published trees

@pytest.mark.parametrize("make", [
    celeba, kaggle, lambda root: celeba(root, "Anno", "Img/img_align_celeba"),
    lambda root: celeba(root, end=" \r\n", space="\t ")], ids=["flat", "kaggle", "folders", "tabs"])
def test_celeba_is_read_in_its_published_layouts(tmp_path, make):
    make(tmp_path)
    for path in tmp_path.glob("list*"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark
    splits = open_attributes(str(tmp_path), 32)
    images, _ = splits["test"]
    assert images.attribute_names == CELEBA_NAMES and images.class_names == ["unconditional"]
    assert counts(splits) == [12, 4, 4]
    assert files_of(splits, "val") == [f"{i:06d}.jpg" for i in (13, 14, 15, 16)]
    check_values(splits, lambda number: [number >> k & 1 for k in range(3)])


@pytest.mark.parametrize("anno, pictures", [("Anno", "Img/img"), ("Anno_coarse", "Img/img"), ("", "img")])
def test_deepfashion_is_read_in_its_published_layouts(tmp_path, anno, pictures):
    deepfashion(tmp_path, anno, pictures)
    splits = open_attributes(str(tmp_path), 32)
    names = splits["train"][0].attribute_names
    assert names == ["shape=a-line", "texture=abstract chevron print", "part=zip-up back"]
    assert counts(splits) == [6, 3, 3]
    check_values(splits, lambda number: [int(number % 3 == k) for k in range(3)])


def test_awa2_gives_images_their_class_attributes_and_splits_every_class(tmp_path):
    awa2(tmp_path)
    splits = open_attributes(str(tmp_path), 32)
    for name, count in zip(SPLITS, (7, 1, 2)):
        images, indices = splits[name]
        assert images.attribute_names == ["black", "white", "big", "swims"]
        assert images.class_names == AWA_CLASSES
        assert np.bincount(images.labels[indices]).tolist() == [count] * 3
    check_values(splits, lambda number: AWA_MATRIX[number // 2])
    assert len({*sum((files_of(splits, name) for name in SPLITS), [])}) == 30
    fewer = open_attributes(str(tmp_path), 32, num_train=5, seed=1)  # the other splits stay
    assert counts(fewer) == [5, 3, 6] and files_of(fewer, "test") == files_of(splits, "test")


@pytest.mark.parametrize("folders, classes", [(("class 0", "class 1"), ["class 0", "class 1"]),
                                              (("train", "val"), ["unconditional"])])
def test_attributes_csv_is_read_above_class_folders_and_above_train_and_val(tmp_path, folders, classes):
    csv_folder(tmp_path, folders)
    splits = open_attributes(str(tmp_path), 32)
    images, _ = splits["test"]
    assert images.attribute_names == ["warm", "round"] and images.class_names == classes
    assert counts(splits) == [14, 2, 4]
    check_values(splits, lambda number: [number % 2, int(number > 9)])
    if len(classes) == 2:
        assert images.labels.tolist() == images.attributes[:, 0].astype(int).tolist()
        (tmp_path / "attributes.csv").unlink()
        other = open_attributes(str(tmp_path), 32)
        assert other["test"][0].attribute_names == [] and other["test"][0].class_names == classes


def test_embedded_set_has_exact_attributes_and_fits_on_as_many_images_as_asked(monkeypatch):
    monkeypatch.setitem(data.SHAPES_NUM, "val", 30)
    splits, shapes = open_attributes("shapes", 32, num_train=40), Shapes(50, 0, "train")
    assert counts(splits) == [40, 10, 30]
    images, indices = splits["val"]
    assert indices.tolist() == [*range(40, 50)] and (images.images == shapes.images).all()
    assert (splits["test"][0].images == Shapes(30, 0, "val").images).all()


def test_one_percent_of_the_listed_images_may_be_missing(tmp_path, capsys):
    celeba(tmp_path)
    (tmp_path / "img_align_celeba" / "000014.jpg").unlink()
    draw(tmp_path / "img_align_celeba" / "999999.jpg", 9)  # and a file that is not listed
    splits = open_attributes(str(tmp_path), 32)
    assert counts(splits) == [12, 3, 4]
    assert "1 of 20 listed images have no file or no split (000014.jpg)" in capsys.readouterr().out
    check_values(splits, lambda number: [number >> k & 1 for k in range(3)])  # nothing has moved
    change(tmp_path / "list_eval_partition.txt", "000002.jpg 0\n", "")
    with pytest.raises(ValueError, match="2 of 20"):
        open_attributes(str(tmp_path), 32)


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def damage(file, old, new):
    """Return a call that makes CelebA's tree, changes one of its files and opens it."""
    def call(root):
        celeba(root)
        change(root / file, old, new)
        open_attributes(str(root), 32)
    return call


def table(text, encoding="utf-8"):
    """Return a call that opens a folder of a.png with this attributes.csv."""
    def call(root):
        draw(root / "a.png", 1)
        if text:
            (root / "attributes.csv").write_bytes(text.encode(encoding))
        open_attributes(str(root), 32)
    return call


ATTR, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"
REFUSALS = [
    ("another value", damage(ATTR, "000003.jpg  1", "000003.jpg  2"), ValueError, "line 5: .*'2'"),
    ("listed twice", damage(ATTR, "000003.jpg", "000002.jpg"), ValueError, "000002.jpg is .*twice"),
    ("names and values", damage(ATTR, " Bald", ""), ValueError, "3 values"),
    ("a list cut off", damage(PARTITION, "000020.jpg 2\n", "000020.jpg"), ValueError, "line 20"),
    ("semicolons", table("filename;a\na.png;1\n"), ValueError, "attributes.csv: .* commas"),
    ("Latin-1", table("filename,schön\na.png,1\n", "latin-1"), ValueError, "attributes.csv: .* UTF-8"),
    ("nothing to probe", table(""), ValueError, "nothing to probe"),
    ("an empty split", table("filename,a\na.png,0\n"), ValueError, "train split"),
    ("no folder", lambda root: open_attributes(str(root / "nowhere"), 32), FileNotFoundError, "nowhere")]


@pytest.mark.parametrize("call, error, word", [case[1:] for case in REFUSALS], ids=[c[0] for c in REFUSALS])
def test_what_cannot_be_read_is_refused(tmp_path, call, error, word):
    with pytest.raises(error, match=word):
        call(tmp_path)
