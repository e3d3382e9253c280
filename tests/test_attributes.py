"""Readers of attributes: small trees in exactly the published formats, whole and with the usual damage.

    python -m pytest tests/test_attributes.py          3 s on 2 CPU cores
"""
import numpy as np
import pytest
from PIL import Image

from attributes import SPLITS, open_attributes

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


def counts(splits):
    return [len(splits[name][1]) for name in SPLITS]


def check_values(splits, values_of):
    """Every picture has the attributes values_of(the number that it says)."""
    for images, indices in splits.values():
        batch = images.batch(indices)
        assert batch["index"].tolist() == list(indices) and batch["images"].shape[1:] == (3, 32, 32)
        numbers = (batch["images"][:, 0].float().mean((1, 2)) / 10).round().int().tolist()
        assert images.attributes[indices].astype(int).tolist() == [values_of(number) for number in numbers]


# the published trees

def bits(number):
    return [number >> k & 1 for k in range(3)]


# attributes, classes, images in each split, the attributes of a picture by its number
CELEBA = CELEBA_NAMES, ["unconditional"], [12, 4, 4], bits
DEEPFASHION = (["shape=a-line", "texture=abstract chevron print", "part=zip-up back"], ["unconditional"],
               [6, 3, 3], lambda number: [int(number % 3 == k) for k in range(3)])
AWA2 = ["black", "white", "big", "swims"], AWA_CLASSES, [21, 3, 6], lambda number: AWA_MATRIX[number // 2]
CSV = [14, 2, 4], lambda number: [number % 2, int(number > 9)]


@pytest.mark.parametrize("make, given, expected", [
    (celeba, (), CELEBA), (celeba, ("Anno", "Img/img_align_celeba"), CELEBA), (kaggle, (), CELEBA),
    (celeba, ("", "img_align_celeba", 20, " \r\n", "\t "), CELEBA),  # by tabs
    (deepfashion, ("Anno", "Img/img"), DEEPFASHION), (deepfashion, ("Anno_coarse", "Img/img"), DEEPFASHION),
    (deepfashion, ("", "img"), DEEPFASHION), (awa2, (), AWA2),
    (csv_folder, (), (["warm", "round"], ["class 0", "class 1"], *CSV)),
    (csv_folder, (("train", "val"),), (["warm", "round"], ["unconditional"], *CSV))])
def test_published_layouts_are_read_and_each_class_of_awa2_is_split_alike(tmp_path, make, given, expected):
    make(tmp_path, *given)
    for path in tmp_path.glob("list*"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark
    splits = open_attributes(str(tmp_path), 32)
    images, _ = splits["test"]
    assert (images.attribute_names, images.class_names, counts(splits)) == expected[:3]
    check_values(splits, expected[3])
    for (images, indices), count in zip(splits.values(), (7, 1, 2)):
        assert make is not awa2 or np.bincount(images.labels[indices]).tolist() == [count] * 3
    assert len({*np.concatenate([indices for _, indices in splits.values()])}) == sum(expected[2])
    fewer = open_attributes(str(tmp_path), 32, num_train=5, seed=1)
    assert counts(fewer) == [5, *expected[2][1:]] and {*fewer["train"][1]} < {*splits["train"][1]}
    if images.class_names == ["class 0", "class 1"]:
        assert images.labels.tolist() == images.attributes[:, 0].astype(int).tolist()
        (tmp_path / "attributes.csv").unlink()
        images, _ = open_attributes(str(tmp_path), 32)["test"]
        assert images.attribute_names == [] and images.class_names == ["class 0", "class 1"]


def test_one_percent_of_the_listed_images_may_be_missing(tmp_path, capsys):
    celeba(tmp_path)
    (tmp_path / "img_align_celeba" / "000014.jpg").unlink()
    draw(tmp_path / "img_align_celeba" / "999999.jpg", 9)  # and a file that is not listed
    splits = open_attributes(str(tmp_path), 32)
    images, indices = splits["val"]
    assert counts(splits) == [12, 3, 4]
    assert [str(images.files[i]) for i in indices] == ["000013.jpg", "000015.jpg", "000016.jpg"]
    assert "1 of 20 listed images have no file or no split (000014.jpg)" in capsys.readouterr().out
    check_values(splits, bits)  # nothing has moved
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
