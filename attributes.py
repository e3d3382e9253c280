"""Data sets whose images have attributes, read from the files that their authors publish.

    splits = open_attributes("data/celeba", size=256)      # or "shapes"
    images, indices = splits["test"]
    images.attributes[indices], images.attribute_names, images.labels[indices], images.class_names

    shapes        the embedded set: no files
    CelebA        list_attr_celeba, list_eval_partition (.txt, or Kaggle's .csv), img_align_celeba/
                  (Liu et al. 2015)
    DeepFashion   Category and Attribute Prediction Benchmark: list_attr_cloth.txt, list_attr_img.txt,
                  list_eval_partition.txt, img/ (Liu et al. 2016)
    AwA2          Animals with Attributes 2: classes.txt, predicates.txt, predicate-matrix-binary.txt,
                  JPEGImages/CLASS/ (Xian et al. 2018)
    folder        attributes.csv (a header filename,NAME,..., then a line per image), class folders, or both

The lists of the first two may be one folder deeper (Anno/, Eval/), and so may the images (Img/). A value of 1
means present; 0 and -1 mean absent, or unknown (DeepFashion). Letters: N images, A attributes.
"""
import csv
from contextlib import suppress
from pathlib import Path

import numpy as np

import data

SPLITS = ("train", "val", "test")
SHAPES_TRAIN = 8000  # images of the embedded set to fit on; a quarter as many for validation
# what the words of the published lists mean
VALUES = {"-1": False, "0": False, "1": True}
PARTS = {"0": "train", "1": "val", "2": "test", "train": "train", "val": "val", "test": "test"}
TYPES = {"1": "texture", "2": "fabric", "3": "shape", "4": "part", "5": "style"}  # DeepFashion's README


class ListedImages(data.ImageFolder):
    """The images of a list, with .attributes (N, A) bool and .attribute_names, as the embedded set has them.

    source: the images that are there. values: {file: (A,)} of those to take, in this order. The class of an
    image is its first folder, if there are class names.
    """

    def __init__(self, source: data.ImageFiles, size: int, values: dict, names: list, class_names):
        self.attributes, self.attribute_names = np.stack(list(values.values())), names
        self.class_names = class_names or data.ONE_CLASS
        number = {name: k for k, name in enumerate(class_names)}
        source.take(list(values))
        self.set_files(source, size, [number.get(file.partition("/")[0], 0) for file in values])


def open_attributes(name: str, size: int, num_train: int = 0, seed: int = 0) -> dict:
    """Return {"train", "val", "test": (images, indices)} of "shapes", or of a folder in a format above.

    size: pixels. num_train: train images to keep, drawn by seed; 0 = all. indices: positions in `images`.
    Raises FileNotFoundError for a missing folder or list, ValueError for a damaged list, for more than 1 % of
    the images missing, and for an empty split.
    """
    if name == "shapes":
        return read_shapes(size, num_train or SHAPES_TRAIN)
    reader = next((READERS[file] for file in READERS if search(Path(name), file)), read_folder)
    splits = reader(Path(name), size)
    images, train = splits["train"]
    splits["train"] = images, np.sort(np.random.default_rng(seed).permutation(train)[:num_train or None])
    for split in SPLITS:
        if not len(splits[split][1]):
            raise ValueError(f"{name}: no image in the {split} split; want more images")
    return splits


# what the readers share

def search(root: Path, pattern: str) -> list[Path]:
    """Return the files and folders of this name in a folder of `root`, then those in `root` itself."""
    return sorted(root.glob(f"*/{pattern}")) + sorted(root.glob(pattern))


def find(root: Path, pattern: str) -> Path:
    """Return the first that `search` returns. Raises FileNotFoundError if there is none."""
    for path in search(root, pattern):
        return path
    raise FileNotFoundError(f"{root}: no {pattern} in it; want the data set unpacked as it is published")


def read_rows(path: Path):
    """Yield (number, words) of each line that has any; of a .csv its cells. ValueError if it is no text."""
    with data.one_line(path, "want text in UTF-8"), open(path, encoding="utf-8-sig") as lines:
        rows = csv.reader(lines) if path.suffix == ".csv" else map(str.split, lines)
        for number, row in enumerate(rows, 1):
            if "".join(row[:1]).strip():
                yield number, [word.strip() for word in row]


def read_list(path: Path, meaning: dict) -> tuple[list, dict]:
    """Return (header, {file: meanings of its words}) of a list with lines "file word word ...".

    The header is the last line before the first image file. Raises ValueError with file and line.
    """
    header, entries, advice = [], {}, f"want lines: file, then any of {', '.join(meaning)}; commas in .csv"
    for number, (file, *words) in read_rows(path):
        file = data.normal(file)
        if not entries and not file.lower().endswith(data.SUFFIXES):
            header = [file, *words]
            continue
        with data.one_line(f"{path}, line {number}", advice):
            first = next(iter(entries.values()), words)
            if file in entries or len(words) != len(first):
                raise ValueError(f"{file} is listed twice, or has not {len(first)} values")
            entries[file] = np.array([meaning[word] for word in words])
    if not entries:
        raise ValueError(f"{path}: no image is listed in it; {advice}")
    return header, entries


def shuffled_parts(files: list[str], seed=0) -> dict:
    """Return {file: split}: 70 % train, 10 % validation, 20 % test, drawn by seed."""
    n, order = len(files), np.random.default_rng(seed).permutation(len(files))
    parts = zip(SPLITS, np.split(order, [7 * n // 10, 8 * n // 10]))
    return {files[i]: split for split, part in parts for i in part}


def join(root, size: int, values: dict, parts: dict, names: list, class_names=()) -> dict:
    """Return the splits of the listed images that have a file below root and a split; others are left out.

    values {file: (A,)}, parts {file: split}. Raises ValueError if they are more than 1 % (one is always
    allowed), or if there are not as many names as values.
    """
    source = data.ImageFiles(root)
    there = {*source.names.tolist()} & {*parts}
    kept = {file: value for file, value in values.items() if file in there}
    lost = sorted(values.keys() - kept)
    if lost:
        note = f"{root}: {len(lost)} of {len(values)} listed images have no file or no split ({lost[0]})"
        if not kept or len(lost) > max(1, len(values) // 100):
            raise ValueError(f"{note}; want 1 % or less: fetch them, or cut the list")
        print(f"{note}; left out")
    images = ListedImages(source, size, kept, names, class_names)
    if images.attributes.shape[1] != len(names):
        raise ValueError(f"{root}: {images.attributes.shape[1]} values per image, {len(names)} names of them")
    split_of = np.array([parts[file] for file in kept])
    return {split: (images, np.flatnonzero(split_of == split)) for split in SPLITS}


# the readers

def read_shapes(size, num) -> dict:
    """The embedded set: train and validation images of its train split, test images of its val split."""
    from shapes.scenes import Shapes
    train, test = Shapes(num + num // 4, 0, "train", size), data.open_dataset("shapes", size, "val")
    return {"train": (train, np.arange(num)), "val": (train, np.arange(num, len(train))),
            "test": (test, np.arange(len(test)))}


def read_celeba(root: Path, size) -> dict:
    """CelebA: 40 attributes, the official partition (0 train, 1 validation, 2 test), the aligned images."""
    header, values = read_list(find(root, "list_attr_celeba.*"), VALUES)
    parts = read_list(find(root, "list_eval_partition.*"), PARTS)[1]
    names = [name for name in header if name != "image_id"]  # the .csv names its first column
    return join(find(root, "img_align_celeba"), size, values, parts, names)


def read_deepfashion(root: Path, size) -> dict:
    """DeepFashion: 1,000 attributes, here named type=name; its own train, val and test split."""
    values = read_list(find(root, "list_attr_img.txt"), VALUES)[1]
    parts = read_list(find(root, "list_eval_partition.txt"), PARTS)[1]
    rows = list(read_rows(find(root, "list_attr_cloth.txt")))[2:]  # below a count and a header
    names = [f"{TYPES.get(code, code)}={' '.join(words)}" for _, (*words, code) in rows]
    return join(find(root, "img").parent, size, values, parts, names)  # the listed paths begin with img/


def read_awa2(root: Path, size) -> dict:
    """AwA2: an image has the 85 attributes of its class; 50 classes.

    Its own split (trainclasses.txt, testclasses.txt) separates classes, for zero-shot learning. Here the
    images of every class are split: 70 % train, 10 % validation, 20 % test, by seed 0.
    """
    classes, names = ([words[-1] for _, words in read_rows(find(root, f"{kind}.txt"))]  # "  1<tab>antelope"
                      for kind in ("classes", "predicates"))
    matrix = [words for _, words in read_rows(find(root, "predicate-matrix-binary.txt"))]
    if len(matrix) != len(classes) or any(len(row) != len(names) or {*row} - {*VALUES} for row in matrix):
        raise ValueError(f"{root}: predicate-matrix-binary.txt is not {len(classes)} x {len(names)} of 0, 1")
    pictures, values, parts = find(root, "JPEGImages"), {}, {}
    for k, name in enumerate(classes):
        files = [f"{name}/{file}" for file in data.ImageFiles(pictures / name).names.tolist()]
        values |= dict.fromkeys(files, np.array([VALUES[word] for word in matrix[k]]))
        parts |= shuffled_parts(files, (0, k))
    return join(pictures, size, values, parts, names, classes)


def read_folder(root: Path, size) -> dict:
    """Images with attributes.csv, in class folders, or both; split as AwA2's classes, by seed 0."""
    names, classes, values = [], [], {}
    with suppress(ValueError):  # of folders train and val, or images beside folders: these are no classes
        folder = data.ImageFolder(root, size)
        classes = folder.class_names if folder.num_classes > 1 else []
        values = dict.fromkeys(folder.files.tolist(), np.zeros(0, bool))
    if (root / "attributes.csv").is_file():
        header, values = read_list(root / "attributes.csv", VALUES)
        names = header[1:]
    if not names and not classes:
        raise ValueError(f"{root}: nothing to probe; want attributes.csv, class folders, or a published set")
    return join(root, size, values, shuffled_parts(sorted(values)), names, classes)


# the file by which a format is known -> its reader
READERS = {"list_attr_celeba.*": read_celeba, "list_attr_img.txt": read_deepfashion,
           "predicate-matrix-binary.txt": read_awa2}
