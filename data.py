"""Images, labels and latents: all that is read from and written to disk, and the embedded data set.

    dataset = open_dataset("data/imagenet/train", 256)    # or "shapes"
    loader = make_loader(dataset, batch_size=256)         # yields (images_u8, labels, indices, rows)
    latents = LatentFolder("latents")                     # written by encode.py with LatentWriter

Conventions
* Images are uint8 RGB at file borders, (B, 3, H, W); inside the programs float32 in [-1, 1].
* A data set has len(), num_classes, class_names, image_size, files_hash (says which images these are) and
  __getitems__(indices) -> (batch, labels).
* Latents on disk are raw posterior moments [mean | std], 2C channels. `sample_latents` draws z_raw from them,
  `normalize_latents` scales it per channel by the statistics kept beside them; nothing else knows a scale.
"""
import contextlib
import hashlib
import itertools
import json
import math
import os
import signal
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from shapes import Shapes

DEFAULT_DATA = "data/imagenet/train"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SHAPES_NUM = {"train": 20000, "val": 4000}  # images of the embedded set
LATENTS_FORMAT = "nanosendvae-latents"
# Latents that differ in one of these must not share a folder.
IDENTITY = ("vae_hash", "files_hash", "num_images", "image_size", "channels", "latent_size", "shard_size",
            "dtype", "flip")


# images

def _middle(image, w, h):
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


def center_crop(image, size: int):
    """Scale the short side of a PIL image to `size` and cut out the middle; return a PIL RGB image.

    ADM's center_crop_arr: halve with a box filter while the short side is >= 2 * size, then bicubic.
    """
    from PIL import Image
    image = image if image.mode == "RGB" else image.convert("RGB")
    # differs from ADM: only the middle 100:1 of a longer strip is scaled; 1 x 100000 would take gigabytes.
    image = _middle(image, *(min(side, 100 * min(image.size)) for side in image.size))
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    return _middle(image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC),
                   size, size)


def load_image(path):
    """Read a file as a PIL RGB image: first frame, upright by its EXIF tag, 16 bits scaled to 8.

    Transparency is dropped as in ADM: pixels keep the colour stored under the alpha. The format is told from
    the content, not the suffix. Raises ValueError with the file's name if it cannot be decoded to the end.
    """
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as image:
            image.load()
            with contextlib.suppress(SyntaxError, struct.error):  # a broken EXIF block spoils no pixels
                image = ImageOps.exif_transpose(image)  # differs from ADM, which ignores the tag
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
                image = Image.fromarray(np.rint(np.asarray(image) / 257.0).clip(0, 255).astype(np.uint8))
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        reason = str(error).replace(repr(str(path)), "it")
        raise ValueError(f"{path}: not a readable image ({type(error).__name__}: {reason})") from error


def to_float(images_u8: Tensor) -> Tensor:
    """Map uint8 pixels to float32 in [-1, 1]: x / 127.5 - 1."""
    return images_u8.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Map floats in [-1, 1] to uint8, rounded and clamped: -1 -> 0, 1 -> 255; the inverse of `to_float`."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


@contextlib.contextmanager
def _replacing(path):
    """Open a temporary file for writing that takes the place of `path` only once all is written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_grid(path, images_u8, columns: int, scale: int = 1) -> None:
    """Write uint8 images, (N, 3, H, W) or (N, H, W, 3), row by row as one PNG; `scale` repeats pixels."""
    from PIL import Image
    images = np.asarray(images_u8.cpu() if isinstance(images_u8, Tensor) else images_u8)
    if images.ndim != 4 or images.dtype != np.uint8 or 3 not in (images.shape[1], images.shape[3]):
        raise ValueError(f"grid of {images.dtype} {images.shape}; want uint8 (N, 3, H, W) or (N, H, W, 3)")
    images = images if images.shape[3] == 3 else images.transpose(0, 2, 3, 1)
    n, h, w, _ = images.shape
    grid = np.full((-(-n // columns) * columns, h, w, 3), 255, dtype=np.uint8)
    grid[:n] = images
    grid = grid.reshape(-1, columns, h, w, 3).swapaxes(1, 2).reshape(-1, columns * w, 3)  # (rows * h, ., 3)
    with _replacing(path) as file:
        Image.fromarray(grid.repeat(scale, 0).repeat(scale, 1)).save(file, format="PNG")


def save_npz(path, images: np.ndarray, labels) -> None:
    """Write images uint8 (N, H, W, 3) as arr_0 and labels (N,) as arr_1: ADM's format of sample files."""
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] != 3:
        raise ValueError(f"npz of {images.dtype} {images.shape}; want uint8 (N, H, W, 3)")
    with _replacing(path) as file:
        np.savez(file, images, np.asarray(labels))


# data sets

def _find_images(folder, prefix: str = "") -> list[str]:
    """Return image paths below a folder, relative, sorted; no hidden entries, broken links or link loops."""
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if not (entry.is_symlink() and Path(folder).resolve().is_relative_to(Path(entry.path).resolve())):
                found += _find_images(entry.path, f"{prefix}{entry.name}/")
        elif entry.is_file() and entry.name.lower().endswith(SUFFIXES):
            found.append(prefix + entry.name)
    return found


def _class_folders(root) -> list[str]:
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))


class ImageFolder:
    """The images below a folder: each sub-folder is a class, in sorted order; without sub-folders one class.

    class_names: those of the training folder, so that a validation folder numbers its classes alike.
    .files paths relative to root, .labels int64 (N,), .files_hash sha256 of the paths. A corrupt image is
    named on stderr, replaced by the next readable one and its label, and counted in .num_corrupt; more than
    1 % of the images seen (of 1,000 until then; one is always allowed) raise ValueError. Loader workers are
    processes of their own: each counts what it sees.
    """
    on_disk = True

    def __init__(self, root, size: int, class_names: list[str] | None = None):
        if not Path(root).is_dir():
            hint = "; without ImageNet: ./quickstart.sh or --data shapes" if str(root) == DEFAULT_DATA else ""
            raise FileNotFoundError(f"{root}: no such folder; want --data DIR with a folder of images per "
                                    f"class, or with images only{hint}")
        found, folders = _find_images(root), _class_folders(root)
        if not found:
            raise ValueError(f"{root}: no images in it; want --data DIR with files {' '.join(SUFFIXES)}")
        if {"train", "val"} <= {*folders}:
            raise ValueError(f"{root}: its folders train and val are no classes; want --data {root}/train")
        loose = [name for name in found if "/" not in name]
        classes = sorted({name.partition("/")[0] for name in found if "/" in name})
        if loose and classes:
            raise ValueError(f"{root}: {len(loose)} images ({loose[0]}) beside {len(classes)} class folders; "
                             "move them into one, or the folders away")
        if classes and classes != folders:
            empty = min({*folders} - {*classes})
            raise ValueError(f"{root}: no images in class folder {empty}; fill or remove it")
        self.class_names = (class_names or classes) if classes else ["unconditional"]
        unknown = {*classes} - {*self.class_names}
        if unknown:
            raise ValueError(f"{root}: {min(unknown)} is not among {len(self.class_names)} training classes; "
                             "want the same folder names")
        self.root, self.image_size, self.num_classes = Path(root), size, len(self.class_names)
        number = {name: label for label, name in enumerate(self.class_names)}
        self.labels = np.array([number[name.partition("/")[0]] if classes else 0 for name in found])
        # An array, not a list: touching a million reference counts would copy the list into every worker.
        self.files = np.array(found)
        self.files_hash = hashlib.sha256("\n".join(found).encode("utf-8", "surrogateescape")).hexdigest()
        self.corrupt, self.num_corrupt, self.num_seen = set(), 0, 0

    def __len__(self):
        return len(self.files)

    def __getitems__(self, indices) -> tuple[Tensor, Tensor]:
        """Return (uint8 (B, 3, size, size), int64 (B,)) for a list of indices."""
        images, labels = zip(*(self._read(int(index)) for index in indices))
        return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy()), torch.tensor(labels)

    def _read(self, index):
        """Return (uint8 (size, size, 3), label) of the first readable image from `index` on."""
        for i in itertools.chain(range(index, len(self)), range(index)):
            if i in self.corrupt:
                continue
            self.num_seen += 1
            try:
                image = load_image(self.root / str(self.files[i]))
            except ValueError as error:
                self._report(i, error)
            else:
                return np.asarray(center_crop(image, self.image_size)), int(self.labels[i])
        raise ValueError(f"{self.root}: none of {len(self)} images is readable")

    def _report(self, index, error):
        self.corrupt.add(index)
        self.num_corrupt, seen = self.num_corrupt + 1, min(len(self), self.num_seen)
        print(f"corrupt image {self.num_corrupt}: {error}; the next one replaces it", file=sys.stderr)
        if self.num_corrupt > max(1, min(len(self), max(seen, 1000)) // 100):
            raise ValueError(f"{self.root}: {self.num_corrupt} of {seen} images are corrupt (last: "
                             f"{self.files[index]}), want 1 % or less; repair or remove them")


class _Inflated:
    """An array (N, ...) in a compressed npz file: [indices] decompresses up to there, in constant memory."""

    def __init__(self, path, name, header, dtype, shape):
        self.member, self.header = zipfile.ZipFile(path).open(name), header
        self.dtype, self.shape, self.ndim = dtype, shape, len(shape)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, indices):
        size, out = math.prod(self.shape[1:]) * self.dtype.itemsize, []
        for i in indices:  # seeking backwards starts anew: in ascending order each byte is read once
            self.member.seek(self.header + int(i) * size)
            out.append(np.frombuffer(self.member.read(size), self.dtype).reshape(self.shape[1:]))
        return np.stack(out)


def _map_npz(path, name: str):
    """Return array `name` of an npz file without reading it: as np.savez stores it, mapped into memory."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name + ".npy")
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = read[version](member)
            header = member.tell()
    if fortran:
        raise ValueError(f"{path}: {name} is stored column by column; save np.ascontiguousarray of it")
    if info.compress_type != zipfile.ZIP_STORED:
        return _Inflated(path, info, header, dtype, shape)
    with open(path, "rb") as file:  # zip's local header: 30 bytes, then name and extra field
        file.seek(info.header_offset + 26)
        start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    return np.memmap(path, dtype, "r", start + header, shape)


def open_arrays(path):
    """Return np.load's archive of an npz file, or the mapped array of an npy file; ValueError if broken."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a whole npz or npy file ({error}); write it again") from error


class ArrayImages:
    """The images of an npz or npy file as a data set: uint8 (N, H, W, 3), read when asked for, not before."""

    def __init__(self, path):
        file, labels = open_arrays(path), None
        if isinstance(file, np.ndarray):
            self.images = file
        elif "arr_0" in file.files:
            self.images, labels = _map_npz(path, "arr_0"), file["arr_1"] if "arr_1" in file.files else None
        else:
            raise ValueError(f"{path} has {', '.join(file.files)}; want images: arr_0, as of sample.py --npz")
        shape, dtype = tuple(self.images.shape), self.images.dtype
        if len(shape) != 4 or dtype != np.uint8 or shape[3] != 3:
            raise ValueError(f"{path}: images are {dtype} {shape}; want uint8 (N, H, W, 3)")
        self.labels = np.full(shape[0], -1) if labels is None else labels
        if self.labels.shape != shape[:1]:
            raise ValueError(f"{path}: {shape[0]} images, but labels arr_1 {self.labels.shape}")
        self.image_size, self.name = shape[1], Path(path).stem

    def __len__(self):
        return len(self.images)

    def __getitems__(self, indices):
        rows = np.asarray(indices)
        images = torch.from_numpy(np.ascontiguousarray(self.images[rows]))
        return images.permute(0, 3, 1, 2), torch.from_numpy(self.labels[rows])


def open_dataset(data: str, size: int, split: str = "train", val: str | None = None, seed: int = 0):
    """Return the embedded set for "shapes", else an ImageFolder, or None if there is no validation folder.

    split "val" of a folder: `val` if given, else the sibling `val` of a folder named `train`.
    """
    if data == "shapes":
        return Shapes(SHAPES_NUM[split], seed, split, size)
    if split == "train":
        return ImageFolder(data, size)
    sibling = Path(data).parent / "val"
    folder = val or (sibling if Path(data).name == "train" and sibling.is_dir() else None)
    return None if folder is None else ImageFolder(folder, size, _class_folders(data))


# batches

class StepSampler:
    """Micro-batches of one process for optimiser steps start_step .. num_steps - 1 (None: without end).

    Step k is slice k, batch_size long, of an endless row of permutations, one an epoch, each a function of
    (seed, epoch); the end of an epoch that fills no batch is dropped. Rank r takes part r of the slice, cut
    into micro-batches: the step is the same for every world size, micro-batch size and start.
    Yields (indices, rows): positions in the data set and in the global batch, int64 arrays.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world: int = 1, micro_batch_size: int = 0,
                 seed: int = 0, start_step: int = 0, num_steps: int | None = None):
        self.micro = micro_batch_size or max(batch_size // world, 1)
        if batch_size % (world * self.micro):
            fits = -(-batch_size // (world * self.micro)) * world * self.micro
            raise ValueError(f"batch size {batch_size} is not a multiple of {world} processes x micro-batch "
                             f"{self.micro}; try --batch-size {fits}")
        if length < batch_size:
            raise ValueError(f"{length} images are no batch of {batch_size}; try --batch-size {length}")
        self.length, self.batch_size, self.part, self.rank = length, batch_size, batch_size // world, rank
        self.seed, self.start_step, self.num_steps = seed, start_step, num_steps

    def __iter__(self):
        shuffled = None
        for step in itertools.count(self.start_step):
            if self.num_steps is not None and step >= self.num_steps:
                return
            epoch, k = divmod(step, self.length // self.batch_size)
            if epoch != shuffled:
                order, shuffled = np.random.default_rng((self.seed, epoch)).permutation(self.length), epoch
            for row in range(self.rank * self.part, (self.rank + 1) * self.part, self.micro):
                rows = np.arange(row, row + self.micro)
                yield order[k * self.batch_size + rows], rows


class _WithRows:
    """A data set whose batches also say which indices and rows they are."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitems__(self, batch):
        return *self.dataset.__getitems__(batch[0]), *map(torch.from_numpy, batch)


def _ignore_signals(_worker):
    """torchrun signals the whole process group; workers must outlive the trainer's last batch and save."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _loader(dataset, batches, workers):
    workers = workers if getattr(dataset, "on_disk", False) else 0  # what is in memory needs no reading ahead
    return DataLoader(_WithRows(dataset), batch_sampler=batches, collate_fn=tuple, num_workers=workers,
                      pin_memory=torch.cuda.is_available(), worker_init_fn=_ignore_signals,
                      prefetch_factor=4 if workers else None)


def make_loader(dataset, batch_size: int, rank: int = 0, world: int = 1, micro_batch_size: int = 0,
                seed: int = 0, start_step: int = 0, num_steps: int | None = None, workers: int = 4):
    """Return a loader of the micro-batches of `StepSampler`: (batch, labels, indices, rows)."""
    steps = StepSampler(len(dataset), batch_size, rank, world, micro_batch_size, seed, start_step, num_steps)
    return _loader(dataset, steps, workers)


def eval_loader(dataset, batch_size: int, rank: int = 0, world: int = 1, workers: int = 4,
                indices=None) -> DataLoader:
    """Return a loader over `indices` (default: all), in order, each once over the ranks; as `make_loader`.

    rows are positions in `indices`. Ranks may have different numbers of batches: no collective calls inside.
    """
    indices = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
    rows = np.array_split(np.arange(len(indices)), world)[rank]
    parts = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    return _loader(dataset, [(indices[part], part) for part in parts], workers)


# latents

def sample_latents(moments: Tensor, eps: Tensor) -> Tensor:
    """Draw z_raw = mean + std * eps (B, C, h, w), fp32, from moments (B, 2C, h, w) = [mean | std]."""
    mean, std = moments.float().chunk(2, dim=1)
    return mean + std * eps


def _statistics(z, mean, std):
    if z.shape[1] != len(mean):
        hint = "; these are moments, draw z with sample_latents" if z.shape[1] == 2 * len(mean) else ""
        raise ValueError(f"latents have {z.shape[1]} channels, their statistics {len(mean)}{hint}")
    return (s.to(z.device, torch.float32)[:, None, None] for s in (mean, std))


def normalize_latents(z_raw: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (z_raw - mean) / std in fp32; z_raw (B, C, h, w), statistics (C,)."""
    mean, std = _statistics(z_raw, mean, std)
    return (z_raw.float() - mean) / std


def denormalize_latents(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return z * std + mean in fp32: the inverse of `normalize_latents`."""
    mean, std = _statistics(z, mean, std)
    return z.float() * std + mean


def _map_array(file, what, dtype, shape):
    """Map a .npy file into memory; ValueError if it is missing, truncated, or of another type or shape."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file} is missing or truncated ({error}); run encode.py again") from error
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{file} has {array.dtype} {array.shape}, want {what} {dtype} {shape}; encode again")
    return array


class _Shards:
    """The files of a set of latents: shard s holds rows s * shard_size and on; twice, if meta says flip."""

    def __init__(self, path, meta):
        self.path, self.meta, self.size = Path(path), meta, meta["shard_size"]
        self.names = ("moments", "moments-flip") if meta["flip"] else ("moments",)
        self.num_shards = -(-meta["num_images"] // self.size)

    def rows(self, shard: int) -> range:
        """Return the data set indices of a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, self.meta["num_images"]))

    def _shape(self, shard):
        return len(self.rows(shard)), 2 * self.meta["channels"], *self.meta["latent_size"]

    def _file(self, name, shard, suffix="npy"):
        return self.path / f"{name}-{shard:05d}.{suffix}"

    def _open(self, name, shard):
        file, shape = self._file(name, shard), self._shape(shard)
        return _map_array(file, "moments [mean | std]", self.meta["dtype"], shape)


class LatentWriter(_Shards):
    """Write the posterior moments of a data set, whole shards at a time, from any number of processes.

        writer = LatentWriter("latents", meta)            # in every process
        for shard in writer.missing(rank, world):         # complete ones are left alone
            writer.write(shard, moments, labels)          # of the images writer.rows(shard)
        writer.finish()                                   # on rank 0, once all are done

    meta: plain dict with IDENTITY's entries, vae, data, num_classes, class_names and what else is to be kept.
    Beside each shard a .json holds labels and fp64 sums, which `finish` adds up in order: neither files nor
    statistics depend on the number of processes. ValueError if the folder has latents of another VAE or data.
    """

    def __init__(self, path, meta: dict):
        super().__init__(path, {"format": LATENTS_FORMAT, **meta, "latent_size": list(meta["latent_size"])})
        self.path.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.path.glob("m*.json")):
            found = json.loads(file.read_text())
            for key in IDENTITY:
                if found[key] != self.meta[key]:
                    raise ValueError(f"{path} has latents with {key} {found[key]} (VAE {found['vae']}, data "
                                     f"{found['data']}), this run {self.meta[key]} (VAE {self.meta['vae']}, "
                                     f"data {self.meta['data']}); choose another folder, or remove that one")

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """Return the shards of process `rank` that are not there, whole, with labels and sums."""
        return [shard for shard in range(rank, self.num_shards, world) if not self._is_complete(shard)]

    def _is_complete(self, shard):
        try:
            for name in self.names:
                self._open(name, shard)
        except ValueError:
            return False
        return self._file("moments", shard, "json").is_file()

    def write(self, shard: int, moments: Tensor, labels: Tensor, mirrored: Tensor | None = None) -> None:
        """Store one shard: moments (n, 2C, h, w) of its rows; of the mirrored images if meta has flip."""
        arrays = [m.cpu().numpy().astype(self.meta["dtype"]) for m in (moments, mirrored) if m is not None]
        want = [self._shape(shard)] * len(self.names)
        if [a.shape for a in arrays] != want or len(labels) != len(moments):
            raise ValueError(f"shard {shard}: got {[a.shape for a in arrays]} and {len(labels)} labels, "
                             f"want moments [mean | std] {want}")
        if not all(np.isfinite(a).all() for a in arrays):
            raise ValueError(f"shard {shard}: moments are not finite; check the VAE, or try --dtype fp32")
        mean, std = np.split(arrays[0], 2, axis=1)
        sums = {"mean": mean.sum((0, 2, 3), dtype=np.float64).tolist()}
        for key, a in (("mean2", mean), ("std2", std)):
            sums[key] = np.einsum("nchw,nchw->c", a, a, dtype=np.float64).tolist()
        for name, array in zip(self.names, arrays):
            with _replacing(self._file(name, shard)) as file:
                np.save(file, array)
        own = {key: self.meta[key] for key in (*IDENTITY, "vae", "data")}
        with _replacing(self._file("moments", shard, "json")) as file:
            file.write(json.dumps(own | sums | {"labels": labels.tolist()}).encode())

    def finish(self) -> dict:
        """Write labels.npy and, last, meta.json with the statistics of z_raw; return the latter.

        Per channel Var(z) = Var(mean) + E[std^2] over images and positions, as z = mean + std * eps.
        Raises ValueError if a shard is missing.
        """
        if self.missing():
            raise ValueError(f"{self.path}: shards {self.missing()} are missing; run encode.py again")
        parts = [json.loads(self._file("moments", s, "json").read_text()) for s in range(self.num_shards)]
        count = self.meta["num_images"] * np.prod(self.meta["latent_size"])
        mean, mean2, std2 = (np.sum([part[key] for part in parts], axis=0) / count
                             for key in ("mean", "mean2", "std2"))
        std = np.sqrt(mean2 - mean ** 2 + std2)
        with _replacing(self.path / "labels.npy") as file:
            np.save(file, np.concatenate([part["labels"] for part in parts]))
        self.meta |= {"mean": mean.tolist(), "std": std.tolist(), "count": int(count)}
        with _replacing(self.path / "meta.json") as file:
            file.write(json.dumps(self.meta, indent=1).encode())
        return self.meta


class LatentFolder(_Shards):
    """The posterior moments that encode.py wrote, memory-mapped; .meta as LatentWriter.finish returns it.

    .mean, .std (C,) fp32 statistics of z_raw; .labels int64 (N,); .num_classes, .class_names, .image_size.
    Every file is checked on opening: ValueError names one that is missing, truncated or something else.
    """
    on_disk = True

    def __init__(self, path):
        file = Path(path) / "meta.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; want --latents DIR that encode.py has finished")
        meta = json.loads(file.read_text())
        if meta.get("format") != LATENTS_FORMAT:
            raise ValueError(f"{file}: format {meta.get('format')}, want {LATENTS_FORMAT} of encode.py")
        super().__init__(path, meta)
        self.maps = {(name, s): self._open(name, s) for name in self.names for s in range(self.num_shards)}
        self.labels = np.array(_map_array(self.path / "labels.npy", "labels", "int64", (meta["num_images"],)))
        self.mean, self.std = torch.tensor(meta["mean"]), torch.tensor(meta["std"])
        if not (self.mean.isfinite() & self.std.isfinite() & (self.std > 0)).all():
            raise ValueError(f"{file}: std {meta['std']}, want numbers > 0; check the VAE and encode again")
        self.num_classes, self.class_names = meta["num_classes"], meta["class_names"]
        self.image_size = meta["image_size"]
        if not ((0 <= self.labels) & (self.labels < self.num_classes)).all():
            raise ValueError(f"{path}: labels {self.labels.min()} to {self.labels.max()}, want 0 to "
                             f"{self.num_classes - 1}; remove the folder and encode again")

    def __len__(self):
        return len(self.labels)

    def __reduce__(self):
        return LatentFolder, (self.path,)  # a spawned worker maps the files itself; pickled maps are copies

    def take(self, indices, flips=None) -> Tensor:
        """Return moments (B, 2C, h, w) fp32 of `indices`; of the mirrored image where flips (B,) is true."""
        flips = [False] * len(indices) if flips is None else flips
        if any(flips) and not self.meta["flip"]:
            raise ValueError(f"{self.path} has no moments of mirrored images; run encode.py --flip")
        names = [self.names[int(flip)] for flip in flips]
        rows = [self.maps[name, int(i) // self.size][int(i) % self.size] for name, i in zip(names, indices)]
        return torch.from_numpy(np.stack(rows).astype(np.float32, copy=False))

    def __getitems__(self, indices) -> tuple[Tensor, Tensor]:
        """Return (moments (B, 2C, h, w) fp32, labels int64 (B,)) for a list of indices."""
        return self.take(indices), torch.from_numpy(self.labels[np.asarray(indices)])
