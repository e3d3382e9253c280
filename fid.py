"""Distances between sets of images: FID and its kin, of samples (gfid) and of reconstructions (rfid).

    python fid.py gfid VIRTUAL_imagenet256_labeled.npz samples/samples.npz  # FID, sFID, IS, P/R, KID
    python fid.py gfid REF.npz samples/cfg*/samples.npz                     # a table, one line per set
    python fid.py rfid data/imagenet/val --vae out/vae                      # rFID, PSNR, SSIM, LPIPS
    python fid.py stats data/imagenet/train --out train256.npz              # a reference file of one's own
    python fid.py nearest data/imagenet/train samples/samples.npz           # are samples copies? + a picture
    python fid.py again out/gfid.json                                       # the same numbers?
    python fid.py gfid shapes samples/samples.npz --features shapes         # the embedded set, by its judge

Sets of images: "shapes" (the embedded set), a folder, an npz file (arr_0 uint8 (N, H, W, 3), labels arr_1:
ADM's) or an npy file of such an array; REF and SAMPLES also a file of statistics (ours, or mu, sigma, mu_s,
sigma_s: ADM's). Measures are those of ADM's evaluator (arXiv:2105.05233): TF1 resize, softmax without bias,
splits of 5,000, k = 3; but in fp64. Letters: n or B images, D features.
"""
import argparse
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import common
import data
import logs
from common import natural, positive
from features import INCEPTION_FILE, Extractor, FIDInception, fuse
from image_metrics import (FeatureStats, check_comparable, closer_than_training, frechet_distance,
                           inception_score, kernel_distance, nearest, precision_recall, psnr, ssim)
from losses import VGG_FILE, LPIPS
from vae import load_vae

__all__ = ["FIDInception", "FeatureStats", "frechet_distance", "inception_score", "precision_recall",
           "kernel_distance"]
REFERENCE_ROWS = 10_000  # of a reference, for precision, recall, KID: as many as ADM's files hold
SPLITS = ("train", "val", "test")
# What the numbers depend on and no flag changes; it goes into every JSON file.
SETTINGS = {"inception_score": "splits of 5000 in order, softmax without bias", "precision_recall": "k = 3",
            "kid": "100 subsets of at most 1000, seed 2020, kernel (x.y / D + 1)^3",
            "reconstruction": "posterior mean, 8 bits (LPIPS: not rounded)", "network": "fp32",
            "statistics": "fp64"}
LOW_PSNR = 22  # dB; published f16d32 have 27.6 to 28.6 on ImageNet (Send-VAE, Table 7)
SHOWN = 10  # samples in the picture of nearest images


# sets of images

def split_of(source, split: str | None = None) -> str:
    """Return the split that images belong to: as told, else by a folder's name, else "unknown"."""
    named = ["val"] if source == "shapes" else [part for part in Path(source).parts[::-1] if part in SPLITS]
    return split or (named[0] if named else "unknown")


def open_images(source: str, size: int | None, split: str | None = None):
    """Return "shapes", a folder, an npz or npy file as a data set; folders are cropped to size (256)."""
    if str(source).endswith((".npz", ".npy")):
        return data.ArrayImages(source)
    if Path(source).is_file():
        raise ValueError(f"{source}: not images; want 'shapes', a folder, .npz or .npy")
    if source == "shapes":
        split = split_of(source, split)
        if split not in data.SHAPES_NUM:
            raise ValueError(f"--split {split}: the embedded set has {', '.join(data.SHAPES_NUM)}")
        dataset = data.open_dataset(source, size or 32, split=split)
        dataset.name = f"shapes-{split}-{len(dataset)}"
    else:
        dataset = data.ImageFolder(source, size or 256)
        dataset.labels = np.full(len(dataset), -1)  # a folder's number need not be the judge's class
        dataset.name = f"{Path(source).resolve().name}-{len(dataset)}"
    return dataset


# features of sets of images

def load_extractor(name: str, weights=None, resize: str = "tf1", device="cpu") -> Extractor:
    """Return an Extractor on `device`, with .meta for FeatureStats."""
    extractor = Extractor(name, weights, resize)
    state = {k: v for k, v in extractor.net.state_dict().items() if not k.endswith("num_batches_tracked")}
    extractor.meta = {"extractor": name, "weights": common.state_hash(state), "resize": extractor.resize}
    if name == "inception":
        fuse(extractor.net)
    return extractor.to(device)


def extract(extractor, images_u8: Tensor) -> dict:
    """Return the extractor's dict of activations; a callable that returns features (B, D) will do, too."""
    outputs = extractor(images_u8)
    return outputs if isinstance(outputs, dict) else {"features": outputs}


@torch.no_grad()
def compute_stats(batches, extractor, device="cpu", meta=None, keep_every: int = 1) -> FeatureStats:
    """Measure batches (images uint8 (B, 3, H, W), labels (B,), ...) with any callable; labels < 0: none.

    The last of a batch of eval_loader are positions in the whole set. Each process brings its share of the
    batches; rank 0 gets the statistics of all.
    """
    stats = FeatureStats({**getattr(extractor, "meta", {}), **(meta or {})}, keep_every)
    for images, labels, *more in batches:
        outputs = {**extract(extractor, images.to(device)), "labels": labels}
        if keep_every != 1:  # a reference: only samples have an Inception Score
            outputs.pop("logits", None)
        stats.update(outputs, images, more[-1] if more else None)
    stats.all_reduce()
    stats.meta["pixels"] = f"{stats.pixels:016x}"
    return stats


def measure_images(dataset, source, extractor, args, proc, keep_every=1, **meta) -> FeatureStats:
    """Return the statistics of a data set, with all that they depend on in .meta."""
    if len(dataset) < proc.world:
        raise ValueError(f"{source}: {len(dataset)} images for {proc.world} processes; use fewer")
    loader = data.eval_loader(dataset, args.batch_size, proc.rank, proc.world, args.workers)
    crop = "center" if isinstance(dataset, data.ImageFolder) else "none"
    return compute_stats(logs.progress(loader, proc, dataset.name), extractor, proc.device,
                         {"name": dataset.name, "data": str(source), "image_size": dataset.image_size,
                          "crop": crop, **meta}, keep_every)


def has_statistics(source) -> bool:
    """Whether this is a file of statistics (mu, sigma), with or without images."""
    return str(source).endswith(".npz") and "mu" in data.open_arrays(source).files


def measure(source, size, extractor, args, proc, reference=False) -> FeatureStats:
    """Return the statistics of images, or those in a file; ADM's reference has images for the rows, too."""
    stored = None
    if has_statistics(source):
        stored = FeatureStats.load(source)
        with open(source, "rb") as file:
            stored.meta["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        if "extractor" not in stored.meta:
            common.print0(f"warning: {source} does not say how it was measured; only dimensions are checked")
        if not reference and stored.n is None:
            raise ValueError(f"{source} does not say of how many images it is; give the samples themselves")
        if not reference or "arr_0" not in data.open_arrays(source).files:
            return stored
    dataset = open_images(source, size, args.split if reference else None)
    sampling = Path(source).with_name("protocol.json")  # sample.py's, beside its samples
    if reference:
        keep_every, meta = -(-len(dataset) // REFERENCE_ROWS), {"split": split_of(source, args.split)}
    else:
        keep_every, meta = 1, {"sampling": json.loads(sampling.read_text())} if sampling.is_file() else {}
    stats = measure_images(dataset, source, extractor, args, proc, keep_every, **meta)
    if stored is None:
        return stats
    stored.rows = stats.rows
    stored.meta |= {"image_size": dataset.image_size, "pixels": stats.meta["pixels"]}
    return stored


# commands

def class_accuracy(rows: dict) -> dict:
    """Return {"class_accuracy": share of images that the judge takes for their label}; {} without labels."""
    if "class_logits" not in rows or (rows["labels"] < 0).any():
        return {}
    return {"class_accuracy": (rows["class_logits"].argmax(1) == rows["labels"]).double().mean().item()}


def gfid(reference: FeatureStats, samples: FeatureStats, device="cpu") -> dict:
    """Return n, fd, and what else there are numbers for: sfid, inception_score, precision, recall, kid, ...

    device: where distances between rows are computed. Raises ValueError if the two were measured differently;
    prints one warning if there are fewer images than D.
    """
    check_comparable(reference, samples)
    fewest, dim = min(n for n in (reference.n, samples.n) if n is not None), len(samples.mean())
    if fewest < dim:
        common.print0(f"warning: n = {fewest} images < D = {dim} features: singular covariance, a distance "
                      "biased upwards; compare it only at equal n")

    def distance(name):
        return frechet_distance(*(moment(name) for stats in (reference, samples)
                                  for moment in (stats.mean, stats.cov)))
    result, rows = {"n": samples.n, "fd": distance("features")}, samples.rows
    if all("spatial" in stats.sums or "spatial" in stats.moments for stats in (reference, samples)):
        result["sfid"] = distance("spatial")
    if "logits" in rows:
        result["inception_score"], result["inception_score_std"] = inception_score(rows["logits"])
    if "features" in rows and "features" in reference.rows:
        pair = [stats.rows["features"].to(device) for stats in (reference, samples)]
        size = min(1000, *map(len, pair))
        result["precision"], result["recall"] = precision_recall(*pair)
        result["kid"], result["kid_std"] = kernel_distance(*pair, subset_size=size)
        result |= {"reference_rows": len(pair[0]), "sample_rows": len(pair[1]), "kid_subset_size": size}
    return result | class_accuracy(rows)


@torch.no_grad()
def rfid(batches, vae, extractor, device="cpu", lpips=None) -> dict:
    """Compare images with their reconstructions from the posterior mean: n, fd, psnr_db, ssim, lpips, ...

    batches and extractor as in compute_stats; lpips: an LPIPS module, or None. Reconstructions are rounded to
    uint8, as when saved, for all but LPIPS. {} but in rank 0.
    """
    real, fake = FeatureStats(), FeatureStats()
    for images_u8, labels, *_ in batches:
        images = images_u8.to(device)
        x = data.to_float(images)
        x_hat = vae.decode(vae.encode(x).mode())
        images_hat = data.to_uint8(x_hat)
        real.update(extract(extractor, images), images_u8)
        rows = {"psnr_db": psnr(images, images_hat), "ssim": ssim(images, images_hat), "labels": labels}
        rows |= {} if lpips is None else {"lpips": lpips(x, x_hat)}
        fake.update({**extract(extractor, images_hat), **rows})
    real.all_reduce(), fake.all_reduce()
    if dist.is_initialized() and dist.get_rank():
        return {}
    means = {key: fake.rows[key].double().mean().item() for key in rows if key != "labels"}
    return gfid(real, fake) | means | {"pixels": f"{real.pixels:016x}"}


def report(title: str, result: dict, args, proc) -> None:
    """Print the numbers, and write them and all that they depend on to args.out (None: no file) as JSON.

    result: of one set, or {"sets": {source: result}}, which becomes a table. In the main process only.
    """
    if args.out:  # first: what was measured must not be lost
        protocol = {"title": title, **result, "settings": SETTINGS, "args": vars(args),
                    "device": str(proc.device), "processes": proc.world, "versions": common.versions()}
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(protocol, indent=1) + "\n")
    sets = result.get("sets")
    if sets is None:
        for key, value in result.items():
            if isinstance(value, float):
                print(f"{title if key == 'fd' else key:<56} {value:.4f}")
    else:  # one kind of samples may have measures that another has not
        columns = list(dict.fromkeys(key for row in sets.values() for key, value in row.items()
                                     if isinstance(value, float)))
        width, wide = max(map(len, sets)), {key: max(10, len(key)) for key in columns}
        print(f"{title}\n{'samples':<{width}} {'n':>7} " + " ".join(f"{key:>{wide[key]}}" for key in columns))
        for source, row in sets.items():
            cells = (f"{f'{row[key]:.4f}' if key in row else '-':>{wide[key]}}" for key in columns)
            print(f"{source:<{width}} {row['n']:>7} " + " ".join(cells))


def run_gfid(args, extractor, proc) -> dict:
    """Measure one or several sets of samples and the reference, and report."""
    if has_statistics(args.reference):  # before hours of samples
        planned = FeatureStats({"name": args.samples[0], **extractor.meta})
        check_comparable(FeatureStats.load(args.reference), planned)
    size = args.image_size or (32 if "shapes" in (args.reference, *args.samples) else 256)
    sets, reference = {}, None
    for source in args.samples:
        samples = measure(source, size, extractor, args, proc)
        if reference is None:
            reference = measure(args.reference, samples.meta.get("image_size", size), extractor, args, proc,
                                reference=True)
        if proc.main:
            sets[source] = gfid(reference, samples, "cuda" if proc.device.type == "cuda" else "cpu")
            sets[source]["samples"] = samples.meta
    if not proc.main:
        return {}
    name, (result, *others) = reference.meta["name"], sets.values()
    title = f"{extractor.label} vs {name}" if others else f"{extractor.label}-{result['n']} vs {name}"
    counts = sorted({row["n"] for row in sets.values()})
    if len(counts) > 1:
        print(f"warning: sets of {counts[0]} to {counts[-1]} images: their distances are not comparable")
    result = {"sets": sets} if others else result
    result |= {"reference": reference.meta, "reference_n": reference.n}
    report(title, result, args, proc)
    return result


def load_lpips(args, device):
    """Return LPIPS as the flags want it, or None."""
    if args.no_lpips or (args.features == "shapes" and not args.lpips_weights):
        return None
    cached = Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
    try:
        return LPIPS(args.lpips_weights or (cached if cached.is_file() else None)).to(device)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; here: --lpips-weights FILE, or --no-lpips") from error


def run_rfid(args, extractor, proc) -> dict:
    """Reconstruct the images of args.data, and report."""
    if has_statistics(args.data):
        meta = FeatureStats.load(args.data).meta
        raise ValueError(f"{args.data} holds statistics of {meta['name']}, split "
                         f"{meta.get('split', 'unknown')}: a reference for gfid; rfid compares "
                         "reconstructions with their originals, identically cropped: give the images")
    vae = load_vae(args.vae).to(proc.device)
    lpips = load_lpips(args, proc.device)
    dataset = open_images(args.data, args.image_size, args.split)
    if len(dataset) < proc.world:
        raise ValueError(f"{args.data}: {len(dataset)} images for {proc.world} processes; use fewer")
    loader = data.eval_loader(dataset, args.batch_size, proc.rank, proc.world, args.workers)
    result = rfid(logs.progress(loader, proc, "rfid"), vae, extractor, proc.device, lpips)
    if not proc.main:
        return {}
    split = split_of(args.data, args.split)
    result["reference"] = {**extractor.meta, "name": dataset.name, "image_size": dataset.image_size,
                           "split": split, "pixels": result.pop("pixels")}
    result["vae_hash"] = common.state_hash(vae.state_dict())
    result["lpips_hash"] = lpips and common.state_hash(lpips.state_dict())
    title = f"r{extractor.label}-{result['n']} vs originals of {dataset.name}, split {split}"
    report(title, result, args, proc)
    if result["psnr_db"] < LOW_PSNR:
        print(f"verdict: below {LOW_PSNR} dB samples cannot look like these images, whatever generator is "
              f"trained; fine-tune this VAE on images of their kind (train_vae.py --init {args.vae})")
    return result


def run_stats(args, extractor, proc) -> FeatureStats:
    """Write the statistics of args.data to args.out."""
    stats = measure(args.data, args.image_size, extractor, args, proc, reference=True)
    if proc.main:
        stats.save(args.out)
        print(f"wrote {args.out}: {stats.n} images, {len(stats.mean())} features, {stats.meta}")
    return stats


def run_nearest(args, extractor, proc) -> dict:
    """Find the training images nearest to samples; report how many are too near, and draw the nearest."""
    size = args.image_size or (32 if "shapes" in (args.train, args.samples) else 256)
    samples = open_images(args.samples, size)
    split = args.split or "train"
    train = open_images(args.train, samples.image_size, split)
    sibling = Path(args.train).with_name("val")
    heldout = args.heldout or ("shapes" if args.train == "shapes" else
                               sibling if Path(args.train).name == "train" and sibling.is_dir() else None)
    other = "train" if split == "val" else "val"
    sets = [(train, args.train, split), (samples, args.samples, "none")]
    sets += [(open_images(str(heldout), samples.image_size, other), heldout, other)] if heldout else []
    if train.image_size != samples.image_size:
        raise ValueError(f"{args.train} has images of {train.image_size} px, {args.samples} of "
                         f"{samples.image_size}; want equal sizes: --image-size for folders")
    stats = [measure_images(images, source, extractor, args, proc, split=part)
             for images, source, part in sets]
    if not proc.main:
        return {}
    device = "cuda" if proc.device.type == "cuda" else "cpu"
    rows, *others = (part.rows["features"].to(device) for part in stats)
    own = nearest(rows, rows, 2)[0][:, 1]
    ratio, indices = closer_than_training(rows, others[0], own, k=min(4, len(rows)))
    shares = [float((closer_than_training(rows, points, own)[0] < 1).double().mean()) for points in others]
    result = {"n": stats[1].n, "closer": shares[0], "heldout_closer": shares[1] if heldout else None,
              "train": stats[0].meta, "train_n": stats[0].n, "samples": stats[1].meta,
              "heldout_n": stats[2].n if heldout else None}
    title = f"nearest-{result['n']} vs {train.name}"
    report(title, result, args, proc)
    print(f"{title}: {shares[0]:.1%} of the samples are closer to a training image than any other training "
          f"image is to that; of held-out images {f'{shares[1]:.1%}' if heldout else 'about half would be'}")
    picture = []
    for i in ratio.argsort()[:SHOWN].tolist():
        sample = samples.__getitems__([i])[0]
        neighbours = train.__getitems__(indices[i].tolist())[0]
        picture += [sample, torch.full_like(sample, 255), *neighbours[:, None]]
    path = Path(args.out).with_suffix(".png")
    data.save_grid(path, torch.cat(picture), 2 + indices.shape[1], scale=max(1, 64 // samples.image_size))
    print(f"wrote {path}: the {len(picture) // (2 + indices.shape[1])} nearest samples, each beside its "
          f"{indices.shape[1]} nearest training images")
    return result


def differences(old, new, rtol: float, key: str = ""):
    """Yield a line for each number or identity in `old` (JSON) that is another in `new`."""
    if isinstance(old, dict):
        for name in old.keys() - {"args", "versions", "device", "processes"}:
            there = new.get(name) if isinstance(new, dict) else None
            yield from differences(old[name], there, rtol, f"{key}.{name}".strip("."))
    elif isinstance(old, float) and isinstance(new, float):
        if not math.isclose(old, new, rel_tol=rtol, abs_tol=rtol):
            yield f"{key} was {old:.6g}, is {new:.6g}"
    elif old != new:
        yield f"{key} was {old}, is {new}"


def run_again(args) -> dict:
    """Measure once more what a JSON file of this script says; ValueError names what came out otherwise."""
    if not Path(args.file).is_file():
        raise FileNotFoundError(f"{args.file}: no such file; want the JSON that fid.py wrote (--out)")
    try:
        old = json.loads(Path(args.file).read_text())
        before = argparse.Namespace(**old["args"])
        before.out = args.out or str(Path(args.file).with_suffix(".again.json"))
        run = {"gfid": run_gfid, "rfid": run_rfid, "nearest": run_nearest}[before.command]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{args.file}: no JSON of fid.py gfid, rfid or nearest ({error!r})") from error
    result = run_command(before, run)
    if result:
        found = sorted(differences(old, json.loads(Path(before.out).read_text()), args.rtol))
        if found:
            raise ValueError(f"{args.file}: other numbers: " + "; ".join(found))
        print(f"again: all numbers of {args.file} are the same (to {args.rtol:g}); wrote {before.out}")
    return result


def parse_args(argv=None):
    """Parse the command line."""
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add = shared.add_argument_group("measuring").add_argument
    add("--features", default="inception", help="inception, shapes (the embedded set's judge), a timm model: "
        "vit_large_patch14_dinov2.lvd142m for FD-DINOv2")
    add("--inception", default=None, help=f"local {INCEPTION_FILE}, or torch-fidelity's file; default: torch "
        "hub's cache, to which it is fetched once")
    add("--features-weights", default=None, help="local weights of the timm model; default: the hub's")
    add("--resize", default="tf1", choices=("tf1", "pytorch-fid"), help="to Inception's 299 px; tf1: ADM's")
    add("--image-size", type=positive, default=None, help="pixels that folders are cropped to; default: as "
        "the samples' npz, 32 beside 'shapes', else 256")
    add("--split", default=None, choices=SPLITS, help="split of REF, DATA or TRAIN; default: by the folder's "
        "name; 'shapes': val (of TRAIN: train)")
    add("--batch-size", type=positive, default=64, help="images per forward and device")
    add("--workers", type=natural, default=4, help="processes that read images, per device")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="auto: the first there is")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text, out, parents=(shared,)):
        sub = commands.add_parser(name, parents=parents, help=text, description=text, allow_abbrev=False,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--out", default=out, required=out is None, help="file to write")
        return sub.add_argument
    images = "'shapes', folder, npz of images (arr_0, labels arr_1) or npy"
    add = command("gfid", "Frechet distance of samples to a reference, and its kin", "out/gfid.json")
    add("reference", help=images + ", or npz of statistics")
    add("samples", nargs="+", help=images + ", or npz of statistics; several make a table")
    add = command("rfid", "Frechet distance, PSNR, SSIM, LPIPS of reconstructions to the originals",
                  "out/rfid.json")
    add("data", help=images)
    add("--vae", required=True, help="checkpoint, folder of checkpoints (newest), or hf://owner/repo/file")
    add("--lpips-weights", default=None, help="torchvision's vgg16 file; default: torch hub's cache, else "
        "timm's copy from the hub; with --features shapes: no LPIPS")
    add("--no-lpips", action="store_true", help="leave LPIPS out")
    add = command("stats", "write the statistics of a set of images, for use as a reference", None)
    add("data", help=images)
    add = command("nearest", "training images nearest to samples: how many are too near, and a picture "
                  "beside the JSON file", "out/nearest.json")
    add("train", help=images)
    add("samples", help=images)
    add("--heldout", default=None, help=images + " that the model has not seen; default: 'val' beside a "
        "folder 'train', the other split of 'shapes'")
    add = command("again", "measure once more what a JSON file says, and compare the numbers", "", ())
    add("file", help="JSON file that gfid, rfid or nearest wrote")
    add("--rtol", type=float, default=1e-6, help="relative difference (absolute below 1) that is let pass")
    return parser.parse_args(argv)


def run_command(args, run):
    """Check the sources, load the network, run one command; returns what was measured."""
    sources = [vars(args).get(key) for key in ("reference", "data", "train", "heldout", "samples")]
    for source in np.hstack([source for source in sources if source]):
        if source != "shapes" and not Path(source).exists():
            raise FileNotFoundError(f"{source}: no such file or folder; want 'shapes', a folder, npz or npy")
    proc = common.setup(args.device)
    torch.set_float32_matmul_precision("highest")  # TF32 has 10 bits of mantissa: the distances would move
    torch.backends.cudnn.allow_tf32 = False
    weights = args.inception if args.features == "inception" else args.features_weights
    if not proc.main:  # rank 0 fetches the weights, if they must be, for all
        common.barrier()
    extractor = load_extractor(args.features, weights, args.resize, proc.device)
    if proc.main:
        common.barrier()
    return run(args, extractor, proc)


def main(argv=None):
    """Entry point of the command; returns what was measured."""
    args = parse_args(argv)
    if args.command == "again":
        return run_again(args)
    runs = {"gfid": run_gfid, "rfid": run_rfid, "stats": run_stats, "nearest": run_nearest}
    return run_command(args, runs[args.command])


if __name__ == "__main__":
    common.cli(main)
