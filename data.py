"""Images and latents on disk, and the order in which a run sees them (a function of seed and step alone).

    dataset = open_dataset("data/imagenet/train", 256)         # or "shapes", the embedded set, or "x.zip"
    loader = make_loader(dataset, 256, proc, micro, seed, images_seen, steps, workers)
    latents = LatentFolder("latents")                          # written by encode.py with LatentWriter

* Images are uint8 RGB at file borders, (B, 3, H, W); inside the programs float32 in [-1, 1].
* A data set has len(), on_disk (reading takes time) and batch(indices), a dict of tensors. One of images also
  has num_classes, class_names, image_size, and images_hash, which says which images these are; "index" in its
  batches are the images really read. Loaders add "indices" and "rows", what was asked for and where.
* Latents on disk are raw posterior moments [mean | std], 2C channels. `sample_latents` draws z from them,
  `normalize_latents` scales it per channel by the statistics kept beside them; nothing else knows a scale.
"""
import atexit
import contextlib
import difflib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import sys
import tarfile
import unicodedata
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

DEFAULT_DATA = "data/imagenet/train"
# Pillow's formats that are read, by the content of a file; which files are pictures is told by the suffix.
FORMATS = {"JPEG": ".jpg .jpeg .jpe .jfif .mpo", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif",
           "TIFF": ".tif .tiff", "JPEG2000": ".jp2", "AVIF": ".avif", "PPM": ".ppm .pgm .pbm .pnm"}
SUFFIXES = tuple(" ".join(FORMATS.values()).split())
OTHER_SUFFIXES = tuple(".heic .heif .jxl .psd .svg .tga .exr .raw .dng .cr2 .cr3 .nef .arw .orf".split())
SYSTEM_FOLDERS = {"@eadir", "__macosx", ".ipynb_checkpoints", "#recycle", "$recycle.bin", "lost+found"}
# Words that make a folder's name that of a split, alone or beside others: val, seg_test, training_set
SPLITS = {"train": "train(ing)?", "val": "val(id(ation)?)?", "test": "test(ing)?|dev|eval(uation)?"}
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's orientation -> PIL's Image.Transpose
MAX_PIXELS, MAX_BYTES = 2**28, 2**30  # of a picture, and of its file in an archive
ONE_CLASS = ["unconditional"]
SHAPES_NUM = {"train": 20000, "val": 4000}  # images of the embedded set
LATENTS_FORMAT = "nanosendvae-latents"
# Latents that differ in one of these must not share a folder.
IDENTITY = ("vae_hash", "images_hash", "num_images", "image_size", "channels", "latent_size", "shard_size",
            "dtype", "precision")
PLAUSIBLE = 5e4  # moments are far below; a flipped bit of an exponent is mostly far above
OPEN_SHARDS = 128  # each holds a file handle, of which macOS gives a process 256


# images

def middle(image, w: int, h: int):
    """Return the middle w x h pixels of a PIL image."""
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


def center_crop(image, size: int):
    """Scale the short side of a PIL RGB image to `size` and cut out the middle; return a PIL RGB image.

    ADM's center_crop_arr: halve with a box filter while the short side is >= 2 * size, then bicubic.
    """
    from PIL import Image
    # differs from ADM: only the middle 100:1 of a longer strip is scaled; 1 x 100000 would take gigabytes.
    image = middle(image, *(min(side, 100 * min(image.size)) for side in image.size))
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    return middle(image, size, size)


@functools.cache
def readable() -> tuple[list[str], tuple]:
    """Return (formats, suffixes) of FORMATS that this Pillow reads; no EPS, which runs programs."""
    from PIL import Image
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN and name in Image.SAVE]  # both: it is built in
    return formats, tuple(" ".join(map(FORMATS.get, formats)).split())


def turn_of(image) -> int | None:
    """Return the PIL transpose that turns an image upright, or None. Of EXIF this tag alone is read."""
    with contextlib.suppress(Exception):  # Pillow raises anything: a broken EXIF block spoils no pixels
        return TURNS.get(image.getexif().get(0x0112))


def to_8_bits(image):
    """Return a PIL image of deep grey values (modes I and F) as one of 8 bits, others as they are.

    16 bits are divided by 257. A TIFF of int32 or floats does not say its scale: it is the smallest of 0..1,
    0..255 and 0..65535 that holds all values. ValueError if none does, or if the highest is between 1 and 2.
    """
    from PIL import Image
    if image.mode[0] not in "IF":
        return image
    values, white = np.asarray(image, dtype=np.float64), 65535
    if image.mode == "F" or image.mode == "I" and image.format == "TIFF":
        low, high = values.min(), values.max()
        white = next((limit for limit in (1, 255, 65535) if high <= limit), 0)
        if not (white and low >= 0) or 1 < high < 2:
            raise ValueError(f"values from {low:g} to {high:g}, want 0 to 1, 255 or 65535")
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def load_image(path, opened=None):
    """Read a file as a PIL RGB image: first frame, upright by its EXIF tag, deep greys scaled to 8 bits.

    Transparency is dropped as in ADM: pixels keep the colour stored under the alpha. The format is told from
    the content, not the suffix. opened: a function that returns the open file, if it is not one at `path`.
    Raises ValueError with the file's name if it cannot be decoded to the end, or has over MAX_PIXELS.
    """
    from PIL import Image, PngImagePlugin
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above this number and refuses twice of it
    PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes that Photoshop and ComfyUI add; by default 1 MiB
    try:
        with warnings.catch_warnings(), opened() if opened else open(path, "rb") as file:
            warnings.simplefilter("ignore")
            with Image.open(file, formats=readable()[0]) as opened_image:
                opened_image.load()
                turn, image = turn_of(opened_image), to_8_bits(opened_image)
                image = image if turn is None else image.transpose(turn)  # ADM never turns
                if image.mode == "P" and "transparency" in image.info:
                    image = image.convert("RGBA")
                return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # on damaged files Pillow raises anything, IndexError and MemoryError too
        reason = text_of(getattr(error, "strerror", None) or error).split(" <")[0]
        raise ValueError(f"{path}: not a readable image ({type(error).__name__}: {reason})") from error


def to_float(images_u8: Tensor) -> Tensor:
    """Map uint8 pixels to float32 in [-1, 1]: x / 127.5 - 1."""
    return images_u8.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Map floats in [-1, 1] to uint8, rounded and clamped: -1 -> 0, 1 -> 255; the inverse of `to_float`.

    Raises ValueError for what is no number, which would become a black pixel.
    """
    if not x.isfinite().all():
        raise ValueError("the decoder made pixels that are not finite; check the weights and the precision")
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def psnr(x_u8: Tensor, y_u8: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, (B,); uint8 (B, 3, H, W); 100 for equal images."""
    mse = (x_u8.float() - y_u8.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / mse.clamp_min(255**2 * 1e-10))


@contextlib.contextmanager
def replacing(path):
    """Open a temporary file for writing that takes the place of `path` only once all of it is on the disk.

    Raises OSError, in one line, if the disk is full or cannot be written: the file that was there is kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        free = shutil.disk_usage(path.parent).free
        done = temporary.stat().st_size if temporary.exists() else 0
        reason = "the disk is full" if free < 2**20 else text_of(error)
        raise OSError(f"{path}: not written ({reason}), {free >> 20} MiB free, over {done >> 20} MiB wanted; "
                      f"what was there before is kept") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_grid(path, images_u8, columns: int, scale: int = 1) -> None:
    """Write uint8 images, (N, 3, H, W) or (N, H, W, 3), row by row as one PNG; `scale` repeats pixels."""
    from PIL import Image
    images = np.asarray(images_u8.cpu() if isinstance(images_u8, Tensor) else images_u8)
    images = images if images.shape[3] == 3 else images.transpose(0, 2, 3, 1)
    n, h, w, _ = images.shape
    lines = -(-n // columns)  # rounded up
    grid = np.full((lines * columns, h, w, 3), 255, dtype=np.uint8)
    grid[:n] = images
    grid = grid.reshape(lines, columns, h, w, 3).swapaxes(1, 2).reshape(lines * h, columns * w, 3)
    with replacing(path) as file:
        Image.fromarray(grid.repeat(scale, 0).repeat(scale, 1)).save(file, format="PNG")


def save_npz(path, images: np.ndarray, labels) -> None:
    """Write images uint8 (N, H, W, 3) as arr_0 and labels (N,) as arr_1: ADM's format of sample files."""
    with replacing(path) as file:
        np.savez(file, images, np.asarray(labels))


# where pictures lie

def text_of(error) -> str:
    """Return the text of another library's error without its line ends, shortened."""
    return " ".join(str(error).split())[:300]


def note(text: str) -> None:
    """Print a line on stderr, on rank 0 alone: what was left out, scaled up, or taken in another way."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {text}", file=sys.stderr, flush=True)


def why_left_out(name: str) -> str | None:
    """Return why a file, or a folder "x/", is left out ("": no word of it); None if it is not."""
    name = name.lower()
    parts = name.split("/")
    if not SYSTEM_FOLDERS.isdisjoint(parts):
        return "system folders"
    if name.startswith(".") or "/." in name:
        return ""
    if not parts[-1] or name.endswith(readable()[1]):
        return None
    return "pictures that Pillow cannot read" if name.endswith(SUFFIXES + OTHER_SUFFIXES) else "other files"


def list_folder(root: Path):
    """Yield (name, size, where it lies, what is wrong) of all below a folder; names of folders end with "/".

    Threads read the folders: on a network file system each waits for the server.
    """
    def scan(prefix):
        for entry in os.scandir(root / prefix):
            link, name = entry.is_symlink(), prefix + entry.name
            if os.path.isdir(entry.path) if link else entry.is_dir():
                # Paths are resolved for links alone: for each of many folders that takes time.
                if not link or not leads_back(root / prefix, Path(entry.path).resolve()):
                    yield f"{name}/", 0, name, ""
            elif os.path.isfile(entry.path) if link else entry.is_file():
                yield name, entry.stat().st_size, name, None
            else:
                yield name, 0, name, "broken links"

    todo = [""]
    with ThreadPoolExecutor(16) as pool:
        while todo:
            level, todo = todo, []
            for found in pool.map(lambda prefix: [*scan(prefix)], level):
                todo += [name for name, *_ in found if name.endswith("/") and why_left_out(name) is None]
                yield from found


def leads_back(folder: Path, target: Path) -> bool:
    """Whether a link in `folder` to `target` leads to a folder that was passed on the way to the link."""
    return any(passed.resolve().is_relative_to(target) for passed in (folder, *folder.parents))


def zip_members(path: Path):
    """Yield (name, size, (offset, packed size; 0: stored as it is), is a link) of each file in a .zip."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{info.filename} is encrypted, or packed by another method than deflate")
            where = info.header_offset, info.compress_size if info.compress_type else 0
            if not info.is_dir():
                name, link = info.filename.replace("\\", "/"), stat.S_ISLNK(info.external_attr >> 16)
                yield name, info.file_size, where, link


def tar_members(path: Path):
    """Yield what zip_members does, of a .tar that is not compressed."""
    with tarfile.open(path, "r:") as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # of a million files they would take a gigabyte
            if archive.offset < info.offset_data:  # Python before 3.11.14 would go round in circles
                raise ValueError(f"{info.name} has a size below 0")
            if not info.isdir():
                yield info.name, info.size, (info.offset_data, 0), not info.isreg() or info.issparse()
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(512).strip(b"\0"):  # tarfile takes a damaged header for the end
            raise ValueError(f"it is damaged at byte {archive.offset}")


def list_archive(path: Path, inner: tuple) -> list[tuple]:
    """Return what list_folder yields, of the folder `inner` (its parts) in a .zip or .tar; follows no link.

    Raises ValueError for a damaged archive, and for names that lead out of it.
    """
    found = {}  # of a name that comes twice the last counts, as after unpacking
    with one_line(path, "want a .zip or a plain .tar: unpack it, or make a .zip of the pictures"):
        for name, size, where, link in (zip_members if path.suffix.lower() == ".zip" else tar_members)(path):
            parts = [part for part in name.split("/") if part not in ("", ".")]
            if name.startswith("/") or name[1:3] == ":/" or ".." in parts or size >> 62:
                raise ValueError(f"{name} leads out of it, or has no possible size")
            if tuple(parts[:len(inner)]) == inner:
                found["/".join(parts[len(inner):])] = size, where, "links" if link else None
    return [(name, *rest) for name, rest in found.items() if name]


def zip_start(file, header: int) -> int:
    """Return where a member of a zip begins: behind its local header, 30 bytes, name and extra field."""
    file.seek(header + 26)
    return header + 30 + int(np.frombuffer(file.read(4), "<u2").sum())


class ImageFiles:
    """The pictures below a folder, or in a .zip or .tar (or a folder in it: "x.zip/train") that stays packed.

    .names relative, with "/", in Unicode NFC, sorted; .sizes in bytes; .folders, names of the first level;
    .left_out, a line on the rest. All is listed anew at each start. Every reading opens the archive itself,
    so that it works in forked and spawned workers.
    """

    def __init__(self, root):
        self.root = Path(root)
        paths = (path for path in (self.root, *self.root.parents) if path.suffix.lower() in (".zip", ".tar"))
        self.archive = next((path for path in paths if path.is_file()), None)
        if not self.archive and not self.root.is_dir():
            hint = "; without ImageNet: ./quickstart.sh or --data shapes" if str(root) == DEFAULT_DATA else ""
            raise FileNotFoundError(f"{root}: no such folder, .zip or .tar (no .gz); want images{hint}")
        found = (list_archive(self.archive, self.root.relative_to(self.archive).parts) if self.archive
                 else list_folder(self.root))
        rows, left, folders, self.table = [], {}, set(), None
        for name, size, where, wrong in found:
            name = normal(name)
            own = why_left_out(name)
            why = wrong if own is None or own and wrong else own
            folders |= {name.partition("/")[0]} if "/" in name else set()
            if name == "dataset.json":
                self.table = size, where
            elif why is None:
                rows.append((name, size, where))
            elif why:
                left.setdefault(why, []).append(name)
        self.folders = sorted(name for name in folders if why_left_out(f"{name}/") is None)
        names, sizes, where = zip(*sorted(rows)) if rows else ((), (), ())
        # Arrays, not lists: touching a million reference counts would copy the list into every worker.
        self.names, self.sizes = np.array(names, dtype=str), np.array(sizes, dtype="<i8")
        self.where = self.names if where == names else np.array(where)
        self.left_out = "; ".join(f"{why}: {len(some)} ({min(some)})" for why, some in sorted(left.items()))

    def take(self, names: list[str]) -> None:
        """Keep these files alone, in this order."""
        row = {name: i for i, name in enumerate(self.names.tolist())}
        rows = np.array([row[name] for name in names], dtype=np.int64)
        self.names, self.sizes, self.where = self.names[rows], self.sizes[rows], self.where[rows]

    def open(self, i: int):
        """Return file i, open for reading its bytes."""
        return self.open_at(self.sizes[i], self.where[i])

    def open_at(self, size, where):
        """Return the file of `size` bytes that lies there. ValueError if it has others, or over MAX_BYTES."""
        if not self.archive:
            return open(self.root / str(where), "rb")
        offset, packed, most = int(where[0]), int(where[1]), min(int(size), MAX_BYTES)
        with open(self.archive, "rb") as file:
            file.seek(zip_start(file, offset) if self.archive.suffix.lower() == ".zip" else offset)
            content = file.read(min(packed, MAX_BYTES) or most)
        if packed:  # one byte more than there should be tells of a bomb
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, most + 1)
        if len(content) != size:
            raise ValueError(f"its {size} bytes are not whole in the archive, or over {MAX_BYTES}")
        return io.BytesIO(content)

    def read_table(self) -> dict | None:
        """Return {name: label} of the dataset.json in the root (EDM2's format), {} if it gives no labels.

        None if there is no such file. Raises ValueError if it is damaged, or not of just these images.
        """
        if self.table is None:
            return None
        with (one_line(self.root / "dataset.json", 'want {"labels": [["a/b.png", 0], ...]}, or no such file'),
              self.open_at(*self.table) as stream):
            pairs = json.load(stream).get("labels") or []
            table = {normal(name): label for name, label in pairs}
            if len(table) < len(pairs) or not all(type(k) is int and 0 <= k < 2**20 for k in table.values()):
                raise ValueError("a name comes twice, or a label is no class number")
            wrong = {*self.names.tolist()} ^ table.keys() if table else ()
            if wrong:
                raise ValueError(f"{len(wrong)} names are only there or only among the images: {min(wrong)}")
            return table


def normal(name: str) -> str:
    """Return a name as its Unicode normal form NFC: file systems spell the same name in several ways."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


# data sets

def find_labels(files: ImageFiles, class_names: list[str] | None = None) -> tuple[list[str], list[int]]:
    """Return (class names, label of each image): by dataset.json, else by the first folder, else one class.

    class_names: those of the training images, by which the classes are numbered. Raises ValueError for
    folders that are no classes, and for classes that are not among class_names.
    """
    names, table = files.names.tolist(), None if class_names == ONE_CLASS else files.read_table()
    if table:
        keys = [str(table[name]) for name in names]
        classes = [str(label) for label in range(max(table.values()) + 1)]
    else:
        keys = [name.partition("/")[0] if "/" in name and table is None else "" for name in names]
        classes = sorted({*keys} - {""})
    if table is None and class_names != ONE_CLASS:
        check_folders(files, keys, classes)
    if class_names == ONE_CLASS or not (classes or class_names):
        return ONE_CLASS, [0] * len(names)
    number = {name: label for label, name in enumerate(class_names or classes)}
    unknown = {*keys} - {*number}
    if unknown:
        raise ValueError(f"{files.root}: {min(unknown) or 'no folder'} is none of {len(number)} classes")
    return list(number), [number[key] for key in keys]


def check_folders(files: ImageFiles, keys: list[str], classes: list[str]) -> None:
    """Raise ValueError if the folders in the root cannot be classes."""
    root, folders = files.root, files.folders
    splits = {name: split_of(name) for name in folders if split_of(name)}
    train = [name for name, (split, _) in splits.items() if split == "train"]
    found, rests = len(splits), {rest for _, rest in splits.values()}
    # Splits share what else is in their names, mostly nothing; the classes bullet_train and test_tube do not.
    if found and len(rests) <= max(1, found - 1) and (found == len(folders) or 0 < len(train) < found):
        wanted = root / [*train, *splits][0]
        raise ValueError(f"{root}: its folders {' and '.join(splits)} are no classes; want --data {wanted}")
    if classes and "" in keys:
        first = files.names[keys.index("")]
        raise ValueError(f"{root}: images ({first}) beside {len(classes)} class folders; move one away")
    if classes and classes != folders:
        raise ValueError(f"{root}: no images in class folder {min({*folders} - {*classes})}; move it away")
    inner = {name.split("/")[1] for name in files.names.tolist() if name.count("/") > 1}
    if len(classes) == 1 and len(inner) > 1:
        raise ValueError(f"{root}: {classes[0]} would be the only class: put its images into one folder, or "
                         f"for {min(inner)} ... as classes want --data {root / classes[0]}")


def split_of(name: str) -> tuple[str, str] | None:
    """Return (train, val or test; what else is in its name) of a folder like val, seg_test; else None."""
    for split, words in SPLITS.items():
        rest, count = re.subn(rf"(^|[\W_])({words})([\W_]?(set|data|images|imgs|\d+))?(?=[\W_]|$)", "",
                              name.lower(), count=1)
        if count:
            return split, rest.strip("_- ")


class ImageFolder:
    """The images below a folder or in an archive: each sub-folder is a class, in sorted order, or all are.

    A dataset.json in the root (EDM2's format) gives other labels. class_names: those of the training images,
    so that held-out ones number their classes alike; ONE_CLASS: folders are no classes.
    .files paths relative to root, .labels int64 (N,), .images_hash says which images these are. A corrupt
    image is named on stderr, replaced by the next readable one and its label, and listed in .corrupt for all
    loader workers together; more than 1 % of the set (one is always allowed) raise ValueError.
    """
    on_disk = True

    def __init__(self, root, size: int, class_names: list[str] | None = None):
        files = ImageFiles(root)
        if not len(files.names):
            has = files.left_out or "nothing"
            raise ValueError(f"{root}: no images in it (found: {has}); want files {' '.join(SUFFIXES)}")
        self.class_names, labels = find_labels(files, class_names)
        if files.left_out:
            note(f"{root}: left out are {files.left_out}")
        self.set_files(files, size, labels)

    def set_files(self, source: ImageFiles, size: int, labels) -> None:
        """Take over all images of `source`, with their labels."""
        self.root, self.image_size, self.num_classes = source.root, size, len(self.class_names)
        self.source, self.files, self.labels = source, source.names, np.array(labels, dtype=np.int64)
        self.is_corrupt = torch.zeros(len(self), dtype=torch.uint8).share_memory_()  # by the workers
        with contextlib.suppress(ValueError):
            short, first = min(self.decode(0).size), f"{self.root}/{self.files[0]}"
            if short < size:
                note(f"{first} has a side of {short} pixels and is scaled up to --image-size {size}")

    def __len__(self):
        return len(self.files)

    @functools.cached_property
    def images_hash(self) -> str:
        """Which images these are: sha256 of names, sizes and labels, and of what evenly spaced files hold.

        1,000 files are read, or all if there are no more. Copies elsewhere and archives have the same hash.
        """
        digest = hashlib.sha256("\n".join(self.files.tolist()).encode("utf-8", "surrogatepass"))
        digest.update(self.source.sizes.tobytes() + self.labels.astype("<i8").tobytes())
        for i in np.unique(np.linspace(0, len(self) - 1, min(len(self), 1000)).astype(int)):
            # A file that cannot be opened counts as empty: reading its batch names it.
            with contextlib.suppress(Exception), self.source.open(i) as file:
                digest.update(file.read())
        return digest.hexdigest()

    @property
    def corrupt(self) -> list[int]:
        """The indices of the images that this process and its loader workers have found corrupt so far."""
        return self.is_corrupt.nonzero().flatten().tolist()

    def batch(self, indices) -> dict:
        """Return images uint8 (B, 3, size, size), their labels and index (B,): those really read."""
        images, index = zip(*(self.read(int(i)) for i in indices))
        return as_batch(np.stack(images), self.labels, np.array(index))

    def read(self, index: int):
        """Return (uint8 (size, size, 3), index) of the first readable image from `index` on."""
        for i in ((index + k) % len(self) for k in range(len(self))):
            image = self.load(i)
            if image is not None:
                return np.asarray(center_crop(image, self.image_size)), i
            if len(self.corrupt) > max(1, len(self) // 100):
                for other in range(len(self) if len(self) <= 2000 else 0):  # of a few, name all
                    self.load(other)
                names = self.files[self.corrupt].tolist()
                raise ValueError(f"{self.root}: {len(names)} of {len(self)} images are corrupt, want 1 % or "
                                 f"less; mend or remove {', '.join(names[:20])}{' ...' * (len(names) > 20)}")
        raise ValueError(f"{self.root}: none of {len(self)} images is readable")

    def decode(self, i: int):
        """Return image i as load_image does."""
        return load_image(self.root / str(self.files[i]), lambda: self.source.open(i))

    def load(self, i: int):
        """Return image i as load_image does, or None for a corrupt one, which is named once."""
        try:
            return None if self.is_corrupt[i] else self.decode(i)
        except ValueError as error:
            print(f"corrupt image: {error}; the next one replaces it", file=sys.stderr, flush=True)
            self.is_corrupt[i] = 1


def as_batch(images: np.ndarray, labels: np.ndarray, index: np.ndarray) -> dict:
    """Return tensors: images (B, H, W, 3) as (B, 3, H, W), index (B,), and those of the labels (N,)."""
    arrays = {"images": images.transpose(0, 3, 1, 2).copy(), "labels": labels[index], "index": index}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def map_member(path, name: str):
    """Return array `name` of an npz file, mapped if it is stored as np.savez does, else read."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        info, version = archive.getinfo(f"{name}.npy"), np.lib.format.read_magic(member)
        if info.compress_type != zipfile.ZIP_STORED or version != (1, 0):
            return np.load(path, allow_pickle=False)[name]
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        start = zip_start(archive.fp, info.header_offset) + member.tell()
    return np.memmap(path, dtype, "r", start, shape, order="F" if fortran else "C")


class ArrayImages:
    """The images of an npz or npy file as a data set: uint8 (N, H, W, 3); labels arr_1, else -1.

    They are mapped into memory, not read; but for compressed npz files.
    """
    on_disk = False

    def __init__(self, path):
        with one_line(path, "want an npz or npy file of images, as of sample.py --npz"):
            file = np.load(path, mmap_mode="r", allow_pickle=False)
            if isinstance(file, np.ndarray):
                self.images, labels = file, None
            else:
                self.images, labels = map_member(path, "arr_0"), file.get("arr_1")
            shape, dtype = tuple(self.images.shape), self.images.dtype
            if len(shape) != 4 or dtype != np.uint8 or shape[3] != 3:
                raise ValueError(f"images are {dtype} {shape}, not uint8 (N, H, W, 3)")
            self.labels = np.full(shape[0], -1) if labels is None else np.asarray(labels).astype(np.int64)
            if self.labels.shape != shape[:1]:
                raise ValueError(f"{shape[0]} images, but labels arr_1 {self.labels.shape}")
        self.image_size = shape[1]

    def __len__(self):
        return len(self.images)

    def batch(self, indices) -> dict:
        """Return images uint8 (B, 3, H, W), labels and index (B,)."""
        index = np.asarray(indices)
        return as_batch(self.images[index], self.labels, index)


def default_size(name: str) -> int:
    """Return the image size in pixels where none is given."""
    return 32 if name == "shapes" else 256


def held_out(name: str) -> Path | None:
    """Return the validation images beside training ones: val of train, val_set of train_set; else None."""
    path = Path(name)
    split, rest = split_of(path.name) or ("", "")
    if split != "train":
        return None
    beside = os.listdir(path.parent) if path.parent.is_dir() else ImageFiles(path.parent).folders
    found = [name for name in sorted(beside) if split_of(name) == ("val", rest)]
    return path.parent / found[0] if found else None


def open_dataset(name: str, size: int, split: str = "train", val: str | None = None, labelled: bool = True):
    """Return the embedded set for "shapes", else an ImageFolder, or None if there is no validation folder.

    split "val" of a folder or archive: `val` if given, else what `held_out` finds. labelled=False: labels are
    not wanted, so that held-out images need no folders as the training images have.
    """
    if name == "shapes":
        from shapes.scenes import Shapes
        return Shapes(SHAPES_NUM[split], 0, split, size)
    if split == "train":
        return ImageFolder(name, size)
    folder = val or held_out(name)
    if folder is None:
        return None
    return ImageFolder(folder, size, find_labels(ImageFiles(name))[0] if labelled else ONE_CLASS)


# batches

def make_loader(dataset, batch_size, proc, micro, seed, images_seen, steps, workers: int) -> DataLoader:
    """Return a loader of one process's micro-batches for so many steps, after so many images."""
    start, accum = images_seen // batch_size, batch_size // (proc.world * micro)
    batch_of = functools.partial(train_batch, dataset, batch_size, proc, micro, seed)
    return loader_of(dataset, range(start * accum, (start + steps) * accum), batch_of, workers)


def train_batch(dataset, batch_size: int, proc, micro: int, seed: int, k: int) -> dict:
    """Return micro-batch k of one process, a dict of tensors; sizes that fit are common.plan_batch's job.

    Step s is slice s, batch_size long, of an endless line of permutations, one an epoch, each a function of
    (seed, epoch); the end of an epoch that fills no batch is dropped. Process r takes part r of the slice,
    cut into micro-batches: the step is the same for any number of processes and any micro-batch.
    """
    step, part = divmod(k, batch_size // (proc.world * micro))
    epoch, slice_ = divmod(step, len(dataset) // batch_size)
    order = epoch_order(seed, epoch, len(dataset))
    rows = proc.rank * batch_size // proc.world + part * micro + np.arange(micro)
    return numbered_batch(dataset, order[slice_ * batch_size:], rows)


@functools.lru_cache(1)
def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """Return the order in which an epoch goes through a data set of this length."""
    return np.random.default_rng((seed, epoch)).permutation(length)


def eval_loader(dataset, batch_size: int, proc=None, workers: int = 4, indices=None, group=None):
    """Return a loader of one process: `indices` (default: all) in order, each once over the processes.

    group: every so many of them a new batch begins. "rows" are positions in `indices`. Processes may have
    different numbers of batches: no collective calls inside.
    """
    indices = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
    rank, world = (proc.rank, proc.world) if proc else (0, 1)
    rows = np.array_split(np.arange(len(indices)), world)[rank]
    groups = [rows[i:i + group] for i in range(0, len(rows), group)] if group else [rows]
    parts = [part[i:i + batch_size] for part in groups for i in range(0, len(part), batch_size)]
    return loader_of(dataset, parts, functools.partial(numbered_batch, dataset, indices), workers)


def numbered_batch(dataset, indices, rows) -> dict:
    """Return the batch of indices[rows]; "indices" and "rows" say which they are, and where in the batch."""
    index = indices[rows]
    return {**dataset.batch(index), "indices": torch.from_numpy(index), "rows": torch.from_numpy(rows)}


# Loader workers ignore SIGTERM, by which Python ends its children: it would wait for them for ever.
atexit.register(lambda: [process.kill() for process in multiprocessing.active_children() if process.daemon])


def loader_of(dataset, items, batch_of, workers: int) -> DataLoader:
    """Return a DataLoader of batch_of(item), a batch of `dataset`, for each of the items in order."""
    # In-memory data sets need no worker processes, and more than there are cores get in each other's way.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers, cores) if dataset.on_disk else 0
    return DataLoader(items, batch_size=None, collate_fn=batch_of, num_workers=workers,
                      pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_signals,
                      prefetch_factor=4 if workers else None)


def ignore_signals(_worker) -> None:
    """torchrun signals the whole process group; workers must outlive the trainer's last batch and save."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# latents

def sample_latents(moments: Tensor, eps: Tensor) -> Tensor:
    """Draw z = mean + std * eps (B, C, h, w), fp32, from moments (B, 2C, h, w) = [mean | std]."""
    mean, std = moments.float().chunk(2, dim=1)
    return mean + std * eps


def normalize_latents(z_raw: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (z_raw - mean) / std in fp32; z_raw (B, C, h, w), statistics (C,)."""
    mean, std = fit_statistics(z_raw, mean, std)
    return (z_raw.float() - mean) / std


def denormalize_latents(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return z * std + mean in fp32: the inverse of `normalize_latents`."""
    mean, std = fit_statistics(z, mean, std)
    return z.float() * std + mean


def fit_statistics(z: Tensor, mean: Tensor, std: Tensor) -> list[Tensor]:
    """Return mean and std (C,) as (C, 1, 1) on z's device; ValueError for another number of channels."""
    if z.shape[1] != len(mean):
        hint = "; these are moments, draw z with sample_latents" if z.shape[1] == 2 * len(mean) else ""
        raise ValueError(f"latents have {z.shape[1]} channels, their statistics {len(mean)}{hint}")
    return [s.to(z.device, torch.float32)[:, None, None] for s in (mean, std)]


@contextlib.contextmanager
def one_line(path, advice: str = "download or make it again"):
    """Turn whatever goes wrong while `path` is read into a ValueError of one line that names it.

    A file from elsewhere may have anything in any place. Our own errors that name it stay as they are.
    """
    try:
        yield
    except Exception as error:
        own = isinstance(error, (ValueError, FileNotFoundError)) and not getattr(error, "errno", None)
        if own and Path(path).name in str(error):
            raise
        wrong = "no such file" if isinstance(error, FileNotFoundError) else (
            f"damaged, or not what is wanted here ({type(error).__name__}: {text_of(error)[:150]})")
        raise ValueError(f"{path}: {wrong}; {advice}") from error


def read_facts(file, wanted: dict, advice: str = "run encode.py again") -> dict:
    """Return the dict in a .json file; ValueError if it is damaged, or has other values than those wanted."""
    with one_line(file, advice):
        facts = {**json.loads(Path(file).read_bytes())}
        wrong = [f"{key} {str(facts.get(key))[:40]}, not {str(value)[:40]}" for key, value in wanted.items()
                 if facts.get(key) != value]
        if wrong:
            raise ValueError(f"{file} is of {'; '.join(wrong[:3])}; {advice}")
        return facts


def write_facts(file, facts: dict) -> None:
    """Write plain values as a .json file."""
    with replacing(file) as out:
        out.write(json.dumps(facts, indent=1).encode())


def hash_of(facts) -> str:
    """Return the sha256 of plain values, which a .json file keeps as they are."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def map_array(file, dtype: str, shape: tuple):
    """Map a .npy file into memory; ValueError if it is missing, damaged, or of another type or shape."""
    with one_line(file, "run encode.py again"):
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
            raise ValueError(f"{array.dtype} {array.shape}, want {dtype} {shape}")
        return array


def plausible(moments: np.ndarray) -> np.ndarray:
    """Tell of each of the moments (B, 2C, h, w) whether all its numbers are finite and small enough; (B,)."""
    return np.abs(moments).max(axis=(1, 2, 3)) < PLAUSIBLE  # False for NaN


class Shards:
    """The files of a long work on many images: shard s is of the images s * shard_size and on.

    facts: num_images, shard_size; of latents what meta.json says (see LatentWriter). What writes them has
    read(shard, check), which raises ValueError if a shard is not whole.
    """
    name = "moments-{:05d}.npy"

    def __init__(self, path, facts: dict):
        self.path, self.facts, self.size = Path(path), facts, facts["shard_size"]
        self.num_shards = -(-facts["num_images"] // self.size)

    def images_of(self, shard: int) -> range:
        """Return the data set indices of a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, self.facts["num_images"]))

    def shape_of(self, shard: int) -> tuple:
        """Return the shape of a shard's array: (n, 2C, h, w)."""
        return len(self.images_of(shard)), 2 * self.facts["channels"], *self.facts["latent_size"]

    def file_of(self, shard: int) -> Path:
        return self.path / self.name.format(shard)

    def open_shard(self, shard: int):
        """Return the mapped array of a shard; ValueError if it is not whole."""
        return map_array(self.file_of(shard), self.facts["dtype"], self.shape_of(shard))

    def missing(self, check: bool = False) -> list[int]:
        """Return the shards that are not there, whole; check: read them to the end, name what is damaged."""
        missing = []
        for shard in range(self.num_shards):
            try:
                self.read(shard, check)
            except ValueError as error:
                missing.append(shard)
                if check:
                    note(error)
        return missing

    def hash_latents(self, labels) -> str:
        """Return the sha256 that says which latents these are, wherever they and their images are."""
        content = map(self.facts.get, ("class_names", "mean", "std", "moments_sha256"))
        return hash_of([labels.tolist(), *content])


class LatentWriter(Shards):
    """Write the posterior moments of a data set, whole shards at a time, from any number of processes.

        writer = LatentWriter("latents", facts)           # in every process
        for shard in writer.missing():                    # complete ones are left alone
            writer.write(shard, moments, labels)          # of the images writer.images_of(shard)
        writer.finish()                                   # on rank 0, once all are done

    facts: plain dict with IDENTITY's entries, vae, data, num_classes, class_names and what else is to be
    kept. After each shard a .json is written, with labels, corrupt images, sha256 and fp64 sums, which
    `finish` adds up in order: neither files nor statistics depend on the number of processes. A damaged file
    counts as missing. ValueError if the folder has latents of another VAE, data or precision.
    """

    def __init__(self, path, facts: dict):
        super().__init__(path, {"format": LATENTS_FORMAT, **facts, "latent_size": list(facts["latent_size"])})
        identity = {key: self.facts[key] for key in IDENTITY}
        for file in (self.path / "meta.json", *self.path.glob("moments-*.json")):
            try:
                there = read_facts(file, {})
            except ValueError:  # missing or damaged: it will be written
                continue
            advice = f"that was VAE {there.get('vae')}, data {there.get('data')}; what has changed wants "
            read_facts(file, identity, f"{advice}another --out, or remove that folder")

    def read(self, shard: int, check: bool = False) -> dict:
        """Return what the .json of a shard says; ValueError if it is damaged, or the array not whole.

        check: also compare the array's numbers with those that were written.
        """
        array, record = self.open_shard(shard), read_facts(self.file_of(shard).with_suffix(".json"), {})
        intact = record.pop("record_sha256", None) == hash_of(record)
        if not intact or check and record["moments_sha256"] != hashlib.sha256(array).hexdigest():
            raise ValueError(f"{self.file_of(shard)} or its .json is not what was written; encoded again")
        return record

    def write(self, shard: int, moments: Tensor, labels: Tensor, corrupt=()) -> None:
        """Store a shard: moments (n, 2C, h, w), labels (n,) and the numbers of the corrupt images."""
        array = np.ascontiguousarray(moments.cpu().numpy(), self.facts["dtype"])
        if not plausible(array).all():
            raise ValueError(f"shard {shard}: moments are not finite; check the VAE, or try --dtype fp32")
        # "squares": mean^2 + std^2 of each channel of z
        squares = np.einsum("nchw,nchw->c", array, array, dtype=np.float64).reshape(2, -1).sum(0)
        record = {key: self.facts[key] for key in (*IDENTITY, "vae", "data")} | {
            "sum": array[:, :self.facts["channels"]].sum((0, 2, 3), dtype=np.float64).tolist(),
            "squares": squares.tolist(), "moments_sha256": hashlib.sha256(array).hexdigest(),
            "labels": labels.tolist(), "corrupt": list(corrupt)}
        with replacing(self.file_of(shard)) as file:
            np.save(file, array)
        write_facts(self.file_of(shard).with_suffix(".json"), {**record, "record_sha256": hash_of(record)})

    def finish(self) -> dict:
        """Write labels.npy and, last, meta.json with the statistics of z; return the facts in it.

        Per channel Var(z) = Var(mean) + E[std^2] over images and positions, as z = mean + std * eps.
        Raises ValueError if a shard is missing, or if more than 1 % of the images were corrupt.
        """
        facts, parts = self.facts, [self.read(shard) for shard in range(self.num_shards)]
        corrupt, num = sum(len(part["corrupt"]) for part in parts), facts["num_images"]
        if corrupt:
            note(f"{corrupt} of {num} images are corrupt, the next ones replace them")
        if corrupt > max(1, num // 100):
            raise ValueError(f"{corrupt} of {num} images are corrupt (1 % may be): mend, remove {self.path}")
        count = num * np.prod(facts["latent_size"])
        mean, squares = (np.sum([part[key] for part in parts], axis=0) / count for key in ("sum", "squares"))
        std, labels = np.sqrt(squares - mean ** 2), np.concatenate([part["labels"] for part in parts])
        with replacing(self.path / "labels.npy") as file:
            np.save(file, labels)
        facts |= {"mean": mean.tolist(), "std": std.tolist(), "count": int(count), "corrupt": corrupt,
                  "moments_sha256": [part["moments_sha256"] for part in parts]}
        facts["latents_hash"] = self.hash_latents(labels)
        write_facts(self.path / "meta.json", facts)
        return facts


class LatentFolder(Shards):
    """The posterior moments that encode.py wrote, memory-mapped; .facts as LatentWriter.finish returns them.

    .mean, .std (C,) fp32 statistics of z; .labels int64 (N,); .num_classes.
    Every file is checked on opening: ValueError names one that is missing, damaged or something else.
    """
    on_disk = True

    def __init__(self, path):
        path, file, advice = Path(path), Path(path) / "meta.json", "want --latents DIR; run encode.py"
        with one_line(path, advice):
            facts = read_facts(file, {"format": LATENTS_FORMAT}, advice)
            facts |= {key: str(facts[key]) for key in ("vae", "vae_hash", "data")}
            facts |= {"image_size": int(facts["image_size"]), "num_classes": len(facts["class_names"])}
            super().__init__(path, facts)
            self.shard = functools.lru_cache(OPEN_SHARDS)(self.open_shard)
            for shard in range(self.num_shards):
                self.open_shard(shard)
            self.labels = np.array(map_array(path / "labels.npy", "int64", (facts["num_images"],)))
            self.mean, self.std = torch.tensor(facts["mean"]), torch.tensor(facts["std"])
            self.num_classes, low, high = facts["num_classes"], self.labels.min(), self.labels.max()
            fits = len(self.mean) == len(self.std) == facts["channels"] and self.std.min() > 0
            if not fits or low < 0 or high >= self.num_classes:
                raise ValueError(f"{file}: labels {low} to {high}, want 0 to {self.num_classes - 1}; std "
                                 f"{facts['std']}, want {facts['channels']} > 0; check the VAE, encode again")
            # Folders of older versions have no hash.
            if facts.get("latents_hash") not in (None, self.hash_latents(self.labels)):
                raise ValueError(f"{file} or labels.npy beside it is damaged; run encode.py again")

    def __len__(self):
        return len(self.labels)

    def __reduce__(self):
        return LatentFolder, (self.path,)  # a spawned worker maps the files itself; pickled maps are copies

    def batch(self, indices) -> dict:
        """Return moments fp32 (B, 2C, h, w) and labels int64 (B,); ValueError names a damaged shard."""
        index = np.asarray(indices)
        moments = np.empty((len(index), *self.shape_of(0)[1:]), np.float32)
        for row, i in zip(moments, index.tolist()):  # copied one by one: a view would keep its shard open
            row[:] = self.shard(i // self.size)[i % self.size]
        bad = index[~plausible(moments)]
        if len(bad):
            raise ValueError(f"{self.file_of(bad[0] // self.size)} is damaged: moments of image {bad[0]} are "
                             f"not finite, or not below {PLAUSIBLE:g}; mend it with encode.py --check")
        return {"moments": torch.from_numpy(moments), "labels": torch.from_numpy(self.labels[index])}


# samples

def find_classes(wanted, names: list[str], num_classes: int, most: int | None = None):
    """Return the numbers of classes given by name or number; None, which stands for all, if none are given.

    most: if there are more, so many instead of all, evenly spaced. ValueError offers names that are close.
    """
    if not wanted:
        return [i * num_classes // most for i in range(most)] if most and num_classes > most else None
    numbers = {str(i): i for i in range(num_classes)} | {name: i for i, name in enumerate(names)}
    for name in wanted:
        if name not in numbers:
            near = difflib.get_close_matches(name, names) or names[:10] + ["..."] * (len(names) > 10)
            number = f"a number from 0 to {num_classes - 1}"
            raise ValueError(f"--classes {name}: want {' or '.join([*near, number])}")
    return [numbers[name] for name in wanted]


class Parts(Shards):
    """The images that a command has drawn so far, `size` to a file, until all `num` are there.

        parts = Parts("samples/parts", {"num_images": 50000, "shard_size": 64})  # in every process
        for part in parts.begin(settings):                # on rank 0: those that are missing
            save_npz(parts.file_of(part), images, labels)  # of the images parts.images_of(part)
        parts.save_npz("samples/samples.npz")             # on rank 0, one part at a time in memory
    """
    name = "part-{:05d}.npz"

    def begin(self, settings: dict) -> list[int]:
        """Return the parts that are missing or damaged. settings: what the images depend on, as JSON has it.

        Raises ValueError that names what differs from the settings of parts that are there.
        """
        file = self.path / "settings.json"
        if file.is_file():
            read_facts(file, settings, f"finish that command, give another --out, or remove {self.path}")
        elif any(self.path.glob("[!.]*")):  # this folder is removed in the end
            raise ValueError(f"{self.path} holds files of others; give another --out")
        write_facts(file, settings)
        return self.missing()

    def read(self, part: int, check: bool = False):
        """Return (images, labels) of a part; ValueError if it is not whole, by the checksums of its zip."""
        file = self.file_of(part)
        with one_line(file), np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays["arr_0"], arrays["arr_1"]
            if len(images) != len(self.images_of(part)):
                raise ValueError(f"{len(images)} images, want {len(self.images_of(part))}")
            return images, labels

    def save_npz(self, path) -> None:
        """Write what `save_npz` writes, of all parts."""
        shape, labels = (self.facts["num_images"], *self.read(0)[0].shape[1:]), []
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for part in range(self.num_shards):
                    images, its_labels = self.read(part)
                    member.write(images.tobytes())
                    labels.append(its_labels)
            with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.concatenate(labels))
