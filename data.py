"""Images and latents on disk, and the order in which a run sees them (a function of seed and step alone).

    dataset = open_dataset("data/imagenet/train", 256)         # or "shapes", the embedded set
    loader = make_loader(dataset, 256, proc, micro, seed, start_step, num_steps, workers)
    latents = LatentFolder("latents")                          # written by encode.py with LatentWriter

* Images are uint8 RGB at file borders, (B, 3, H, W); inside the programs float32 in [-1, 1].
* A data set has len(), on_disk (reading takes time) and batch(indices), a dict of tensors. One of images also
  has num_classes, class_names, image_size, and files_hash, which says which images these are; "index" in its
  batches are the images really read. Loaders add "indices" and "rows", what was asked for and where.
* Latents on disk are raw posterior moments [mean | std], 2C channels. `sample_latents` draws z from them,
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

DEFAULT_DATA = "data/imagenet/train"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SHAPES_NUM = {"train": 20000, "val": 4000}  # images of the embedded set
LATENTS_FORMAT = "nanosendvae-latents"
# Latents that differ in one of these must not share a folder.
IDENTITY = ("vae_hash", "files_hash", "num_images", "image_size", "channels", "latent_size", "shard_size",
            "dtype")


# images

def middle(image, w: int, h: int):
    """Return the middle w x h pixels of a PIL image."""
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


def center_crop(image, size: int):
    """Scale the short side of a PIL image to `size` and cut out the middle; return a PIL RGB image.

    ADM's center_crop_arr: halve with a box filter while the short side is >= 2 * size, then bicubic.
    """
    from PIL import Image
    image = image if image.mode == "RGB" else image.convert("RGB")
    # differs from ADM: only the middle 100:1 of a longer strip is scaled; 1 x 100000 would take gigabytes.
    image = middle(image, *(min(side, 100 * min(image.size)) for side in image.size))
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    return middle(image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC),
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


def psnr(x_u8: Tensor, y_u8: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, (B,); uint8 (B, 3, H, W); 100 for equal images."""
    mse = (x_u8.float() - y_u8.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / mse.clamp_min(255**2 * 1e-10))


@contextlib.contextmanager
def replacing(path):
    """Open a temporary file for writing that takes the place of `path` only once all of it is on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_grid(path, images_u8, columns: int, scale: int = 1) -> None:
    """Write uint8 images, (N, 3, H, W) or (N, H, W, 3), row by row as one PNG; `scale` repeats pixels."""
    from PIL import Image
    images = np.asarray(images_u8.cpu() if isinstance(images_u8, Tensor) else images_u8)
    images = images if images.shape[3] == 3 else images.transpose(0, 2, 3, 1)
    n, h, w, _ = images.shape
    lines = math.ceil(n / columns)
    grid = np.full((lines * columns, h, w, 3), 255, dtype=np.uint8)
    grid[:n] = images
    grid = grid.reshape(lines, columns, h, w, 3).swapaxes(1, 2).reshape(lines * h, columns * w, 3)
    with replacing(path) as file:
        Image.fromarray(grid.repeat(scale, 0).repeat(scale, 1)).save(file, format="PNG")


def save_npz(path, images: np.ndarray, labels) -> None:
    """Write images uint8 (N, H, W, 3) as arr_0 and labels (N,) as arr_1: ADM's format of sample files."""
    with replacing(path) as file:
        np.savez(file, images, np.asarray(labels))


# data sets

def find_images(folder, prefix: str = "") -> list[str]:
    """Return image paths below a folder, relative, sorted; no hidden entries, broken links or link loops."""
    files = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            # Paths are resolved for links alone: asking the file system for each of many folders takes time.
            loop = entry.is_symlink() and Path(folder).resolve().is_relative_to(Path(entry.path).resolve())
            if not loop:
                files += find_images(entry.path, f"{prefix}{entry.name}/")
        elif entry.is_file() and entry.name.lower().endswith(SUFFIXES):
            files.append(prefix + entry.name)
    return files


def class_folders(root) -> list[str]:
    """Return the names of the folders in `root`, sorted, without hidden ones."""
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
        files, folders = find_images(root), class_folders(root)
        if not files:
            raise ValueError(f"{root}: no images in it; want --data DIR with files {' '.join(SUFFIXES)}")
        if {"train", "val"} <= {*folders}:
            raise ValueError(f"{root}: its folders train and val are no classes; want --data {root}/train")
        loose = [name for name in files if "/" not in name]
        classes = sorted({name.partition("/")[0] for name in files if "/" in name})
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
        number = {name: label for label, name in enumerate(self.class_names)}
        labels = [number[name.partition("/")[0]] if classes else 0 for name in files]
        self.set_files(root, size, files, labels)

    def set_files(self, root, size: int, files: list[str], labels) -> None:
        """Take over paths relative to `root`, with their labels."""
        self.root, self.image_size, self.num_classes = Path(root), size, len(self.class_names)
        self.labels = np.array(labels, dtype=np.int64)
        # An array, not a list: touching a million reference counts would copy the list into every worker.
        self.files = np.array(files)
        self.files_hash = hashlib.sha256("\n".join(files).encode("utf-8", "surrogateescape")).hexdigest()
        self.corrupt, self.num_corrupt, self.num_seen = set(), 0, 0

    def __len__(self):
        return len(self.files)

    def batch(self, indices) -> dict:
        """Return images uint8 (B, 3, size, size), their labels and index (B,): those really read."""
        images, index = zip(*(self.read(int(i)) for i in indices))
        images = np.stack(images).transpose(0, 3, 1, 2).copy()
        return {"images": torch.from_numpy(images), "labels": torch.from_numpy(self.labels[list(index)]),
                "index": torch.tensor(index)}

    def read(self, index: int):
        """Return (uint8 (size, size, 3), index) of the first readable image from `index` on."""
        for i in itertools.chain(range(index, len(self)), range(index)):
            if i in self.corrupt:
                continue
            self.num_seen += 1
            try:
                image = load_image(self.root / str(self.files[i]))
            except ValueError as error:
                self.report_corrupt(i, error)
            else:
                return np.asarray(center_crop(image, self.image_size)), i
        raise ValueError(f"{self.root}: none of {len(self)} images is readable")

    def report_corrupt(self, index: int, error) -> None:
        """Name a corrupt image; ValueError if there are too many."""
        self.corrupt.add(index)
        self.num_corrupt += 1
        seen = min(len(self), self.num_seen)
        print(f"corrupt image {self.num_corrupt}: {error}; the next one replaces it", file=sys.stderr)
        allowed = max(1, min(len(self), max(seen, 1000)) // 100)
        if self.num_corrupt > allowed:
            raise ValueError(f"{self.root}: {self.num_corrupt} of {seen} images are corrupt (last: "
                             f"{self.files[index]}), want 1 % or less; repair or remove them")


def map_member(path, name: str):
    """Return array `name` of an npz file, mapped if it is stored as np.savez does, else read."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        info, version = archive.getinfo(f"{name}.npy"), np.lib.format.read_magic(member)
        if info.compress_type != zipfile.ZIP_STORED or version != (1, 0):
            return np.load(path, allow_pickle=False)[name]
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        header = member.tell()
    with open(path, "rb") as file:  # the zip's local header: 30 bytes, then name and extra field
        file.seek(info.header_offset + 26)
        start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    return np.memmap(path, dtype, "r", start + header, shape, order="F" if fortran else "C")


class ArrayImages:
    """The images of an npz or npy file as a data set: uint8 (N, H, W, 3); labels arr_1, else -1.

    They are mapped into memory, not read; but for compressed npz files.
    """
    on_disk = False

    def __init__(self, path):
        try:
            file = np.load(path, mmap_mode="r", allow_pickle=False)
            if isinstance(file, np.ndarray):
                self.images, labels = file, None
            elif "arr_0" in file.files:
                self.images, labels = map_member(path, "arr_0"), file.get("arr_1")
            else:
                raise ValueError(f"it has {', '.join(file.files)}, want images: arr_0, as of sample.py --npz")
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a whole npz or npy file of images ({error})") from error
        shape, dtype = tuple(self.images.shape), self.images.dtype
        if len(shape) != 4 or dtype != np.uint8 or shape[3] != 3:
            raise ValueError(f"{path}: images are {dtype} {shape}; want uint8 (N, H, W, 3)")
        self.labels = np.full(shape[0], -1) if labels is None else np.asarray(labels).astype(np.int64)
        if self.labels.shape != shape[:1]:
            raise ValueError(f"{path}: {shape[0]} images, but labels arr_1 {self.labels.shape}")
        self.image_size, self.name = shape[1], Path(path).stem

    def __len__(self):
        return len(self.images)

    def batch(self, indices) -> dict:
        """Return images uint8 (B, 3, H, W), labels and index (B,)."""
        index = np.asarray(indices)
        images = torch.from_numpy(np.ascontiguousarray(self.images[index])).permute(0, 3, 1, 2)
        return {"images": images, "labels": torch.from_numpy(self.labels[index]),
                "index": torch.from_numpy(index)}


def default_size(name: str) -> int:
    """Return the image size in pixels where none is given."""
    return 32 if name == "shapes" else 256


def open_dataset(name: str, size: int, split: str = "train", val: str | None = None, seed: int = 0):
    """Return the embedded set for "shapes", else an ImageFolder, or None if there is no validation folder.

    split "val" of a folder: `val` if given, else the sibling `val` of a folder named `train`.
    """
    if name == "shapes":
        from shapes.scenes import Shapes
        return Shapes(SHAPES_NUM[split], seed, split, size)
    if split == "train":
        return ImageFolder(name, size)
    sibling = Path(name).parent / "val"
    folder = val or (sibling if Path(name).name == "train" and sibling.is_dir() else None)
    return None if folder is None else ImageFolder(folder, size, class_folders(name))


# batches

class TrainBatches:
    """Item k is micro-batch k of one process, a dict of tensors; sizes that fit are common.plan_batch's job.

    Step s is slice s, batch_size long, of an endless line of permutations, one an epoch, each a function of
    (seed, epoch); the end of an epoch that fills no batch is dropped. Process r takes part r of the slice,
    cut into micro-batches: the step is the same for any number of processes and any micro-batch.
    """

    def __init__(self, dataset, batch_size: int, proc, micro: int, seed: int):
        self.dataset, self.batch_size, self.micro, self.seed = dataset, batch_size, micro, seed
        self.first, self.accum = proc.rank * batch_size // proc.world, batch_size // (proc.world * micro)
        self.epoch, self.order = None, None

    def __getitem__(self, k: int) -> dict:
        step, part = divmod(k, self.accum)
        epoch, slice_ = divmod(step, len(self.dataset) // self.batch_size)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
        rows = self.first + part * self.micro + np.arange(self.micro)
        return numbered_batch(self.dataset, self.order[slice_ * self.batch_size + rows], rows)


class EvalBatches:
    """Item k is batch k of one process: `indices` in order, each once over the processes."""

    def __init__(self, dataset, indices, batch_size: int, proc=None):
        rows = np.arange(len(indices))
        if proc is not None:
            rows = np.array_split(rows, proc.world)[proc.rank]
        self.dataset, self.indices = dataset, indices
        self.parts = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, k: int) -> dict:
        return numbered_batch(self.dataset, self.indices[self.parts[k]], self.parts[k])


def numbered_batch(dataset, indices, rows) -> dict:
    """Return dataset.batch(indices) with "indices" and "rows": positions in the data set and in the batch."""
    return {**dataset.batch(indices), "indices": torch.from_numpy(indices), "rows": torch.from_numpy(rows)}


def make_loader(dataset, batch_size: int, proc, micro: int, seed: int, start_step: int, num_steps: int,
                workers: int) -> DataLoader:
    """Return a loader of the micro-batches of TrainBatches, from start_step to the end of num_steps."""
    batches = TrainBatches(dataset, batch_size, proc, micro, seed)
    return loader_of(batches, range(start_step * batches.accum, num_steps * batches.accum), workers)


def eval_loader(dataset, batch_size: int, proc=None, workers: int = 4, indices=None) -> DataLoader:
    """Return a loader over `indices` (default: all), in order, each once over the processes.

    "rows" are positions in `indices`. Processes may have different numbers of batches: no collective calls
    inside.
    """
    indices = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
    batches = EvalBatches(dataset, indices, batch_size, proc)
    return loader_of(batches, range(len(batches)), workers)


def loader_of(batches, order, workers: int) -> DataLoader:
    """Return a DataLoader of batches[k] for k in order."""
    # In-memory data sets need no worker processes, and more than there are cores get in each other's way.
    workers = min(workers, os.cpu_count() or 1) if batches.dataset.on_disk else 0
    return DataLoader(batches, batch_size=None, sampler=order, num_workers=workers,
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


def map_array(file, dtype: str, shape: tuple):
    """Map a .npy file into memory; ValueError if it is missing, truncated, or of another type or shape."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file} is missing or truncated ({error}); run encode.py again") from error
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{file} has {array.dtype} {array.shape}, want {dtype} {shape}; encode again")
    return array


class Shards:
    """The files of a set of latents: shard s holds the moments of the images s * shard_size and on.

    facts: what meta.json says (see LatentWriter).
    """

    def __init__(self, path, facts: dict):
        self.path, self.facts, self.size = Path(path), facts, facts["shard_size"]
        self.num_shards = math.ceil(facts["num_images"] / self.size)

    def images_of(self, shard: int) -> range:
        """Return the data set indices of a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, self.facts["num_images"]))

    def shape_of(self, shard: int) -> tuple:
        """Return the shape of a shard's array: (n, 2C, h, w)."""
        return len(self.images_of(shard)), 2 * self.facts["channels"], *self.facts["latent_size"]

    def file_of(self, shard: int, suffix: str = "npy") -> Path:
        return self.path / f"moments-{shard:05d}.{suffix}"

    def open_shard(self, shard: int):
        """Return the mapped array of a shard; ValueError if it is not whole."""
        return map_array(self.file_of(shard), self.facts["dtype"], self.shape_of(shard))


class LatentWriter(Shards):
    """Write the posterior moments of a data set, whole shards at a time, from any number of processes.

        writer = LatentWriter("latents", facts)           # in every process
        for shard in writer.missing(rank, world):         # complete ones are left alone
            writer.write(shard, moments, labels)          # of the images writer.images_of(shard)
        writer.finish()                                   # on rank 0, once all are done

    facts: plain dict with IDENTITY's entries, vae, data, num_classes, class_names and what else is to be
    kept. Beside each shard a .json holds labels and fp64 sums, which `finish` adds up in order: neither files
    nor statistics depend on the number of processes. ValueError if the folder has latents of another VAE or
    data.
    """

    def __init__(self, path, facts: dict):
        super().__init__(path, {"format": LATENTS_FORMAT, **facts, "latent_size": list(facts["latent_size"])})
        self.path.mkdir(parents=True, exist_ok=True)
        for file in [*self.path.glob("moments-*.json"), *self.path.glob("meta.json")]:
            there, ours = json.loads(file.read_text()), self.facts
            for key in IDENTITY:
                if there[key] != ours[key]:
                    raise ValueError(f"{path} has latents with {key} {there[key]} (VAE {there['vae']}, data "
                                     f"{there['data']}), this run {ours[key]} (VAE {ours['vae']}, data "
                                     f"{ours['data']}); choose another folder, or remove that one")

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """Return the shards of process `rank` that are not there, whole, with labels and sums."""
        return [shard for shard in range(rank, self.num_shards, world) if not self.is_complete(shard)]

    def is_complete(self, shard: int) -> bool:
        try:
            self.open_shard(shard)
        except ValueError:
            return False
        return self.file_of(shard, "json").is_file()

    def write(self, shard: int, moments: Tensor, labels: Tensor) -> None:
        """Store one shard: moments (n, 2C, h, w) and labels (n,) of its images."""
        array = moments.cpu().numpy().astype(self.facts["dtype"])
        if array.shape != self.shape_of(shard) or len(labels) != len(array):
            raise ValueError(f"shard {shard}: moments {array.shape}, want {self.shape_of(shard)}")
        if not np.isfinite(array).all():
            raise ValueError(f"shard {shard}: moments are not finite; check the VAE, or try --dtype fp32")
        mean, std = np.split(array, 2, axis=1)
        sums = {"mean": mean.sum((0, 2, 3), dtype=np.float64).tolist(),
                "mean2": np.einsum("nchw,nchw->c", mean, mean, dtype=np.float64).tolist(),
                "std2": np.einsum("nchw,nchw->c", std, std, dtype=np.float64).tolist()}
        with replacing(self.file_of(shard)) as file:
            np.save(file, array)
        own = {key: self.facts[key] for key in (*IDENTITY, "vae", "data")}
        with replacing(self.file_of(shard, "json")) as file:
            file.write(json.dumps({**own, **sums, "labels": labels.tolist()}).encode())

    def finish(self) -> dict:
        """Write labels.npy and, last, meta.json with the statistics of z; return the facts in it.

        Per channel Var(z) = Var(mean) + E[std^2] over images and positions, as z = mean + std * eps.
        Raises ValueError if a shard is missing.
        """
        if self.missing():
            raise ValueError(f"{self.path}: shards {self.missing()} are missing; run encode.py again")
        parts = [json.loads(self.file_of(s, "json").read_text()) for s in range(self.num_shards)]
        count = self.facts["num_images"] * np.prod(self.facts["latent_size"])
        mean, mean2, std2 = (np.sum([part[key] for part in parts], axis=0) / count
                             for key in ("mean", "mean2", "std2"))
        std = np.sqrt(mean2 - mean ** 2 + std2)
        with replacing(self.path / "labels.npy") as file:
            np.save(file, np.concatenate([part["labels"] for part in parts]))
        self.facts |= {"mean": mean.tolist(), "std": std.tolist(), "count": int(count)}
        with replacing(self.path / "meta.json") as file:
            file.write(json.dumps(self.facts, indent=1).encode())
        return self.facts


class LatentFolder(Shards):
    """The posterior moments that encode.py wrote, memory-mapped; .facts as LatentWriter.finish returns them.

    .mean, .std (C,) fp32 statistics of z; .labels int64 (N,); .num_classes, .class_names, .image_size.
    Every file is checked on opening: ValueError names one that is missing, truncated or something else.
    """
    on_disk = True

    def __init__(self, path):
        file = Path(path) / "meta.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; want --latents DIR that encode.py has finished")
        facts = json.loads(file.read_text())
        if facts.get("format") != LATENTS_FORMAT:
            raise ValueError(f"{file}: format {facts.get('format')}, want {LATENTS_FORMAT} of encode.py")
        super().__init__(path, facts)
        self.maps = [self.open_shard(shard) for shard in range(self.num_shards)]
        self.labels = np.array(map_array(self.path / "labels.npy", "int64", (facts["num_images"],)))
        self.mean, self.std = torch.tensor(facts["mean"]), torch.tensor(facts["std"])
        if not (self.mean.isfinite() & self.std.isfinite() & (self.std > 0)).all():
            raise ValueError(f"{file}: std {facts['std']}, want numbers > 0; check the VAE and encode again")
        self.num_classes, self.class_names = facts["num_classes"], facts["class_names"]
        self.image_size = facts["image_size"]
        if self.labels.min() < 0 or self.labels.max() >= self.num_classes:
            raise ValueError(f"{path}: labels {self.labels.min()} to {self.labels.max()}, want 0 to "
                             f"{self.num_classes - 1}; remove the folder and encode again")

    def __len__(self):
        return len(self.labels)

    def __reduce__(self):
        return LatentFolder, (self.path,)  # a spawned worker maps the files itself; pickled maps are copies

    def batch(self, indices) -> dict:
        """Return moments fp32 (B, 2C, h, w) and labels int64 (B,)."""
        index = np.asarray(indices)
        moments = np.stack([self.maps[i // self.size][i % self.size] for i in index.tolist()])
        return {"moments": torch.from_numpy(moments.astype(np.float32, copy=False)),
                "labels": torch.from_numpy(self.labels[index])}
