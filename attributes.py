"""Data sets whose images have attributes: the readers of their published files, for probe.py.

    found = open_attributes("data/celeba", size=256)      # or "shapes", or "celeba:data/celeba"
    found.splits["test"]; found.names; found.notes

    shapes        the embedded set: no files
    celeba        list_attr_celeba.txt, list_eval_partition.txt; img_align_celeba/       (Liu et al. 2015)
    deepfashion   Category and Attribute Prediction Benchmark: list_attr_cloth.txt, list_attr_img.txt,
                  list_eval_partition.txt; img/                                           (Liu et al. 2016)
    awa2          Animals with Attributes 2: classes.txt, predicates.txt, predicate-matrix-binary.txt;
                  JPEGImages/CLASS/                                                       (Xian et al. 2018)
    folder        attributes.csv, or class folders, or both

Lists are found in the folder itself and in Anno/, Anno_coarse/ and Eval/, images also in Img/. A value of 1
is a positive; 0 and -1 are none (in DeepFashion 0 means unknown). Letters: N images of the set, A attributes.
"""
import csv
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import data

SPLITS = ("train", "val", "test")
SHAPES_TRAIN = 8000  # images of the embedded set to fit on; a quarter as many for validation
TYPES = {"1": "texture", "2": "fabric", "3": "shape", "4": "part", "5": "style"}  # DeepFashion's README
LISTS, PICTURES = ("", "Anno", "Anno_coarse", "Eval"), ("", "Img")


@dataclass
class Split:
    """Some images of a data set, whose "labels" are the numbers of the images that were read.

    rows (n,): the numbers of the split's images; attributes (N, A) uint8 and classes (N,) int64 are those of
    the whole set, or None. Use the numbers a batch brings: another image may replace a corrupt one.
    """
    images: object
    rows: np.ndarray
    attributes: np.ndarray | None = None
    classes: np.ndarray | None = None


@dataclass
class AttributeData:
    """Splits "train", "val" and "test"; names of attributes and of classes; notes: what was left out."""
    splits: dict
    names: list = field(default_factory=list)
    class_names: list = field(default_factory=list)
    notes: list = field(default_factory=list)


class ListedImages(data.ImageFolder):
    """The images of a list of files below a folder; a batch's labels are their numbers in that list."""

    def __init__(self, root, files: list[str], size: int):
        self.root, self.image_size, self.files = Path(root), size, np.array(files)
        self.labels, self.class_names, self.num_classes = np.arange(len(files)), ["unconditional"], 1
        # sizes and times too: another download may bring other pictures under the same names
        stats = (os.stat(self.root / name) for name in files)
        parts = (f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in zip(files, stats))
        self.files_hash = hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
        self.corrupt, self.num_corrupt, self.num_seen = set(), 0, 0


def open_attributes(data_flag: str, size: int | None = None, num_train: int = 0, seed: int = 0):
    """Return the AttributeData of "shapes", a folder, or KIND:folder; without KIND its files tell.

    size: pixels; None: 256, or 32 for shapes. num_train: train images to keep, by seed; 0 = all. Raises
    FileNotFoundError, or ValueError for a damaged list, a folder of two kinds, over 1 % of files missing.
    """
    if data_flag == "shapes":
        return read_shapes(size or 32, num_train or SHAPES_TRAIN)
    kind, _, root = data_flag.partition(":")
    if kind not in READERS or not root:
        kind, root = None, data_flag
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root}: no such folder; want --data shapes, --data DIR, or one of "
                                f"{', '.join(READERS)} before it, as in --data celeba:DIR")
    if kind is None:
        fitting = [kind for kind, (_, mark) in READERS.items() if mark and find(root, mark, LISTS)]
        if len(fitting) > 1:
            raise ValueError(f"{root} has the files of {' and '.join(fitting)}; say which to read: "
                             f"--data {fitting[0]}:{root}")
        kind = fitting[0] if fitting else "folder"
    found = READERS[kind][0](Path(root), size or 256)
    for name, split in found.splits.items():
        if name == "train" and 0 < num_train < len(split.rows):
            split.rows = np.sort(np.random.default_rng(seed).permutation(split.rows)[:num_train])
        if not len(split.rows):
            raise ValueError(f"{root}: no image in the {name} split; want more images")
    return found


# what the readers share

def find(root, name: str, places=("",), wanted: bool = False) -> Path | None:
    """Return root/place/name for the first place that has it, else None, or FileNotFoundError if wanted."""
    for place in places:
        path = Path(root) / place / name
        if path.exists():
            return path
    if wanted:
        tried = ", ".join(str(Path(place) / name) for place in places)
        raise FileNotFoundError(f"{root}: none of {tried}; want the data set unpacked as it is published")
    return None


def read_lines(path):
    """Yield (number, line) of all lines that are not blank: any line ends, no byte order mark."""
    with open(path, encoding="utf-8-sig") as file:
        yield from ((number, line.strip()) for number, line in enumerate(file, 1) if line.strip())


def read_counted(path):
    """Return (header, iterator over lines) of a list that begins with the number of its entries and a header.

    Raises ValueError if there is no number, and at the end if it is wrong: the file is cut off.
    """
    lines = read_lines(path)
    (_, count), (_, header) = next(lines, (1, "")), next(lines, (2, ""))
    if not count.isdecimal() or not header:
        raise ValueError(f"{path}: want the number of entries on line 1 and a header on line 2")

    def entries():
        seen = 0
        for seen, line in enumerate(lines, 1):
            yield line
        if seen != int(count):
            raise ValueError(f"{path}: {seen} entries, its first line says {count}; was it cut off?")
    return header, entries()


def read_values(words: list[str], count: int, where: str) -> np.ndarray:
    """Return `count` values of -1, 0 or 1 as uint8, 1 where positive. ValueError for anything else."""
    if len(words) != count or not {*words} <= {"-1", "0", "1"}:
        raise ValueError(f"{where}: {len(words)} values ({' '.join(words)[:40]}); want {count} of -1, 0 or 1")
    return np.array([word == "1" for word in words], dtype=np.uint8)


def read_images(lines, count: int, path) -> dict:
    """Return {file: (A,) uint8} of lines "file value value ..."; ValueError for a file listed twice."""
    values = {}
    for number, line in lines:
        file, *words = line.split()
        if file in values:
            raise ValueError(f"{path}, line {number}: {file} is listed twice; remove one")
        values[file] = read_values(words, count, f"{path}, line {number}")
    return values


def read_parts(lines, splits: dict, path) -> dict:
    """Return {file: split} of lines "file word"; splits {word: split}."""
    parts = {}
    for number, line in lines:
        file, *words = line.split()
        if len(words) != 1 or words[0] not in splits:
            raise ValueError(f"{path}, line {number}: {line[:60]!r}; want a file and one of "
                             f"{', '.join(splits)}")
        parts[file] = splits[words[0]]
    return parts


def shuffled_parts(files, seed=0) -> dict:
    """Return {file: split}: 70 % train, 10 % validation, 20 % test, drawn by seed."""
    n, order = len(files), np.random.default_rng(seed).permutation(len(files))
    cuts = np.split(order, [7 * n // 10, 8 * n // 10])
    return {files[i]: split for split, part in zip(SPLITS, cuts) for i in part}


def join(root, size, values: dict, parts: dict, names: list[str], what) -> AttributeData:
    """Return the images below root that have attributes {file: (A,)} and a part {file: split}.

    Others are left out and noted. Raises ValueError if more than 1 % of the listed ones (one is always
    allowed) have no file or no part.
    """
    there, notes = {*data._find_images(root)}, []
    for having, lack in ((there, f"no file below {root}"), (parts, "no split")):
        without = [file for file in values if file not in having]
        if len(without) > max(1, len(values) // 100):
            raise ValueError(f"{what}: {len(without)} of {len(values)} images have {lack}, such as "
                             f"{without[0]}; want 1 % or less: fetch them, or cut the list")
        if without:
            notes.append(f"{len(without)} of {len(values)} listed images have {lack}, left out: {without[0]}")
    unlisted = there - {*values}
    if unlisted:
        notes.append(f"{len(unlisted)} images below {root} are not listed, left out: {min(unlisted)}")
    files = [file for file in values if file in there and file in parts]
    if not files:
        raise ValueError(f"{what}: no listed image has a file below {root}")
    images, attributes = ListedImages(root, files, size), np.stack([values[file] for file in files])
    part = np.array([parts[file] for file in files])
    splits = {split: Split(images, np.flatnonzero(part == split), attributes) for split in SPLITS}
    return AttributeData(splits, names, notes=notes)


def add_classes(found: AttributeData, class_names: list[str]) -> AttributeData:
    """Give every image the class of its folder."""
    number = {name: k for k, name in enumerate(class_names)}
    for split in found.splits.values():
        split.classes = np.array([number[file.partition("/")[0]] for file in split.images.files])
    found.class_names = class_names
    return found


# the readers

def read_shapes(size, num) -> AttributeData:
    """The embedded set: train and validation images of its train split, test images of its val split."""
    train = data.Shapes(num + num // 4, 0, "train", size)
    test = data.open_dataset("shapes", size, split="val")
    rows = {"train": (train, np.arange(num)), "val": (train, np.arange(num, len(train))),
            "test": (test, np.arange(len(test)))}
    splits = {split: Split(images, part, images.attributes, images.labels)
              for split, (images, part) in rows.items()}
    train.labels, test.labels = np.arange(len(train)), np.arange(len(test))
    return AttributeData(splits, train.attribute_names, train.class_names)


def read_celeba(root, size) -> AttributeData:
    """CelebA: 40 attributes, the official partition (0 train, 1 validation, 2 test), the aligned images."""
    path = find(root, "list_attr_celeba.txt", LISTS, wanted=True)
    header, lines = read_counted(path)
    values = read_images(lines, len(header.split()), path)
    partition = find(root, "list_eval_partition.txt", LISTS, wanted=True)
    parts = read_parts(read_lines(partition), dict(zip("012", SPLITS)), partition)
    pictures = find(root, "img_align_celeba", PICTURES, wanted=True)
    pictures = find(pictures, "img_align_celeba") or pictures  # its archive unpacked in a folder of its name
    return join(pictures, size, values, parts, header.split(), path)


def read_deepfashion(root, size) -> AttributeData:
    """DeepFashion: 1,000 attributes, here named type=name; its own train, val and test split."""
    path, names = find(root, "list_attr_cloth.txt", LISTS, wanted=True), []
    for number, line in read_counted(path)[1]:
        *words, kind = line.split()  # the name has spaces
        if kind not in TYPES or not words:
            raise ValueError(f"{path}, line {number}: {line!r}; want a name and a type of 1 to 5")
        names.append(f"{TYPES[kind]}={' '.join(words)}")
    path = find(root, "list_attr_img.txt", LISTS, wanted=True)
    values = read_images(read_counted(path)[1], len(names), path)
    partition = find(root, "list_eval_partition.txt", LISTS, wanted=True)
    parts = read_parts(read_counted(partition)[1], {split: split for split in SPLITS}, partition)
    pictures = find(root, "img", PICTURES, wanted=True).parent  # the listed paths begin with img/
    return join(pictures, size, values, parts, names, path)


def read_awa2(root, size) -> AttributeData:
    """AwA2: an image has the 85 attributes of its class; 50 classes.

    Its own split (trainclasses.txt, testclasses.txt) parts classes, for zero-shot learning. Here every class
    is parted: 70 % of its images train, 10 % validation, 20 % test, by seed 0.
    """
    lists = {}
    for name in ("classes.txt", "predicates.txt"):
        path = find(root, name, wanted=True)
        lists[name] = [line.split(maxsplit=1)[-1] for _, line in read_lines(path)]  # "  1<tab>antelope"
    classes, names = lists.values()
    path = find(root, "predicate-matrix-binary.txt", wanted=True)
    matrix = [read_values(line.split(), len(names), f"{path}, line {i}") for i, line in read_lines(path)]
    if len(matrix) != len(classes):
        raise ValueError(f"{path}: {len(matrix)} rows for {len(classes)} classes of classes.txt")
    pictures, values, parts = find(root, "JPEGImages", wanted=True), {}, {}
    empty = [name for name in classes if not (pictures / name).is_dir()]
    for k, name in enumerate(classes):
        files = [] if name in empty else [f"{name}/{file}" for file in data._find_images(pictures / name)]
        values |= {file: matrix[k] for file in files}
        parts |= shuffled_parts(files, (0, k))
    found = add_classes(join(pictures, size, values, parts, names, path), classes)
    if empty:
        found.notes.append(f"{len(empty)} of {len(classes)} classes have no folder in {pictures}: {empty[0]}")
    return found


def read_folder(root, size) -> AttributeData:
    """Images in class folders, with attributes.csv, or both: 70 % train, 10 % validation, 20 % test, seed 0.

    That file has a header (filename and names), then a line of file name and values an image.
    """
    table = root / "attributes.csv"
    if table.is_file():
        names, values = read_attributes(table)
        classes = {file.partition("/")[0] for file in values if "/" in file}
        classes = sorted(classes) if all("/" in file for file in values) else []
    else:
        folder = data.ImageFolder(root, size)
        names, values = [], {str(file): np.zeros(0, np.uint8) for file in folder.files}
        classes = folder.class_names if folder.num_classes > 1 else []
    if not names and not classes:
        raise ValueError(f"{root}: nothing to probe; want attributes.csv, a folder per class, or the lists "
                         "of CelebA, DeepFashion or AwA2 as they are published")
    found = join(root, size, values, shuffled_parts(sorted(values)), names, table if names else root)
    return add_classes(found, classes) if classes else found


def read_attributes(path) -> tuple[list[str], dict]:
    """Return names and {file: (A,) uint8} of a csv file."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = [(i, [cell.strip() for cell in row]) for i, row in enumerate(csv.reader(file), 1) if any(row)]
    if len(rows) < 2:
        raise ValueError(f"{path}: want a header (filename and names), then a line an image")
    (_, (_, *names)), *rows = rows
    values = {}
    for number, (name, *words) in rows:
        if name in values:
            raise ValueError(f"{path}, line {number}: {name} is listed twice; remove one")
        values[name] = read_values(words, len(names), f"{path}, line {number}")
    return names, values


READERS = {"celeba": (read_celeba, "list_attr_celeba.txt"),  # and the file that only that kind has
           "deepfashion": (read_deepfashion, "list_attr_img.txt"),
           "awa2": (read_awa2, "predicate-matrix-binary.txt"),
           "folder": (read_folder, "attributes.csv")}
