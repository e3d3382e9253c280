"""Distances between sets of images: FID and its kin, of samples (gfid) and of reconstructions (rfid).

    python fid.py gfid VIRTUAL_imagenet256_labeled.npz samples/samples.npz  # FID, sFID, IS, P/R, KID
    python fid.py rfid data/imagenet/val --vae out/vae                      # rFID, PSNR, SSIM
    python fid.py stats data/imagenet/train --out train256.npz              # a reference file of one's own
    python fid.py gfid shapes samples/samples.npz --features shapes         # the embedded set, by its judge

REF and SAMPLES: "shapes" (the embedded validation set), a folder of images, an npz file of images (arr_0,
labels arr_1: ADM's), REF also a file of statistics (ours, or mu, sigma, mu_s, sigma_s: ADM's). Measures are
those of ADM's evaluator (arXiv:2105.05233): TF1 resize, softmax without bias, splits of 5,000, k = 3; but in
fp64. Letters: n or B images, D features.
"""
import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import common
import data
from features import INCEPTION_FILE, Extractor, FIDInception
from losses import LPIPS
from vae import load_vae

__all__ = ["FIDInception", "FeatureStats", "frechet_distance", "inception_score", "precision_recall",
           "kernel_distance"]
REFERENCE_ROWS = 10_000  # of a reference, for precision, recall, KID: as many as ADM's files hold
MUST_MATCH = ("extractor", "weights", "resize", "image_size", "dimensions")


# measures: numbers in, numbers out

class FeatureStats:
    """Streaming mean and covariance of features (B, D), from sums of x and of x x^T in fp64.

    .n is None where a file does not say (ADM's); .meta says what was measured how; .rows {name: (n, ...)} is
    what was kept of each image, complete after all_reduce().
    """

    def __init__(self, meta: dict | None = None, keep_every: int = 0):
        self.meta, self.keep_every, self.n = dict(meta or {}), keep_every, 0
        self.sums, self.moments, self.rows = {}, {}, {}

    def update(self, outputs) -> None:
        """Add a batch: features (B, D), or a dict of them and others. Raises ValueError if D changes.

        "features" and "spatial" enter the moments; rows are kept of every other entry, and of each
        keep_every-th of the features (0: none).
        """
        outputs = outputs if isinstance(outputs, dict) else {"features": outputs}
        for name, x in outputs.items():
            x = x.detach().cpu() if x.device.type == "mps" else x.detach()  # MPS has no fp64
            if name in ("features", "spatial"):
                total, outer = self.sums.setdefault(name, (x.new_zeros(x.shape[1]).double(), 0))
                if len(total) != x.shape[1]:
                    raise ValueError(f"{name} have {x.shape[1]} dimensions, those before {len(total)}")
                self.sums[name] = total + x.double().sum(0), outer + x.double().T @ x.double()
            if name == "features":
                x = x[(self.n + np.arange(len(x))) % self.keep_every == 0] if self.keep_every else x[:0]
            if name != "spatial" and len(x):
                self.rows.setdefault(name, []).append(x.cpu())
        self.n += len(outputs["features"])

    def all_reduce(self) -> "FeatureStats":
        """Join the rows, and all processes' statistics in the order of the ranks; call once. Returns self."""
        self.rows = {name: torch.cat(parts) for name, parts in self.rows.items()}
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, (self.n, self.rows))
            self.n = sum(n for n, _ in everyone)
            self.rows = {name: torch.cat([rows[name] for _, rows in everyone]) for name in self.rows}
            for total in (t for pair in self.sums.values() for t in pair):
                dist.all_reduce(total)
        return self

    def mean(self, name: str = "features") -> np.ndarray:
        """Return the mean (D,), fp64."""
        if name in self.moments:
            return self.moments[name][0]
        return (self.sums[name][0] / self.n).cpu().numpy()

    def cov(self, name: str = "features") -> np.ndarray:
        """Return the covariance (D, D), fp64, as np.cov(rowvar=False). Raises ValueError for one image."""
        if name in self.moments:
            return self.moments[name][1]
        if self.n < 2:
            raise ValueError(f"covariance of {self.n} image; give at least 2")
        total, outer = self.sums[name]
        return ((outer - torch.outer(total, total) / self.n) / (self.n - 1)).cpu().numpy()

    def save(self, path) -> None:
        """Write mu, sigma (mu_s, sigma_s), features, n, meta as npz; pytorch-fid and ADM's tools read it."""
        arrays = {"mu": self.mean(), "sigma": self.cov(), "n": self.n, "meta": json.dumps(self.meta)}
        if "spatial" in self.sums:
            arrays |= {"mu_s": self.mean("spatial"), "sigma_s": self.cov("spatial")}
        if "features" in self.rows:
            arrays["features"] = self.rows["features"].numpy()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(path).with_name(f".{Path(path).name}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path) -> "FeatureStats":
        """Read a file of statistics: ours, ADM's, or pytorch-fid's. Raises ValueError for another file."""
        file = np.load(path, allow_pickle=False)
        if not {"mu", "sigma"} <= {*file.files}:
            raise ValueError(f"{path} has {', '.join(file.files)}; want mu, sigma: python fid.py stats -h")
        adm = {"extractor": "inception", "resize": "tf1"} if "mu_s" in file.files else {}
        meta = json.loads(str(file["meta"])) if "meta" in file.files else adm
        stats = cls({"name": Path(path).stem, **meta})
        stats.n = int(file["n"]) if "n" in file.files else None
        for name, end in (("features", ""), ("spatial", "_s")):
            if "mu" + end in file.files:
                stats.moments[name] = tuple(file[key + end].astype(np.float64) for key in ("mu", "sigma"))
        if "features" in file.files:
            stats.rows["features"] = torch.from_numpy(file["features"])
        return stats


def check_comparable(reference: FeatureStats, samples: FeatureStats) -> None:
    """Raise ValueError naming both sides if they were measured differently; the unknown is not compared."""
    a, b = ({**stats.meta, "dimensions": len(stats.mean())} for stats in (reference, samples))
    for key in MUST_MATCH:
        if key in a and key in b and a[key] != b[key]:
            raise ValueError(f"{key} differs: {a.get('name', 'reference')} has {a[key]}, "
                             f"{b.get('name', 'samples')} has {b[key]}; measure both alike (--features, "
                             f"--resize, --image-size)")


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) in fp64 (arXiv:1706.08500); mu (D,), sigma (D, D).

    The trace of the root is the sum of the roots of the eigenvalues of R^T S2 R, where S1 = R R^T: symmetric,
    so always real, also for covariances of fewer than D images. Raises ValueError for other shapes, or NaN.
    """
    moments = [torch.as_tensor(np.asarray(a), dtype=torch.float64) for a in (mu1, sigma1, mu2, sigma2)]
    mu1, s1, mu2, s2 = moments
    if mu1.shape != mu2.shape or not s1.shape == s2.shape == (len(mu1), len(mu1)):
        raise ValueError(f"moments have shapes {[tuple(a.shape) for a in moments]}; want (D,), (D, D) twice")
    if not all(a.isfinite().all() for a in moments):
        raise ValueError("features are not finite; check the images and the feature network")
    values, vectors = torch.linalg.eigh(s1)
    # Rounding errors of 1e-16 would become 1e-8 under the root, and there are up to D of them.
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    root = vectors[:, kept] * values[kept].sqrt()  # (D, rank)
    cross = torch.linalg.eigvalsh(root.T @ s2 @ root).clamp_min(0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * cross)


def inception_score(logits: Tensor, split_size: int = 5000) -> tuple[float, float]:
    """exp(mean KL(p(y|x) || p(y))) of consecutive splits: their mean and population std (arXiv:1606.03498).

    logits (n, classes); ADM's are without the bias of the last layer.
    """
    scores = []
    for part in logits.double().split(split_size):
        log_p = part.log_softmax(1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).sum(1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return (n, m) squared distances of rows x (n, D) to rows y (m, D)."""
    return x.square().sum(1)[:, None] - 2 * x @ y.T + y.square().sum(1)


def precision_recall(reference: Tensor, samples: Tensor, k: int = 3, block: int = 1000) -> tuple:
    """Share of samples near the reference, and of references near the samples (arXiv:1904.06991); (n, D).

    Near: no farther from some point of the other set than that point's k-th neighbour there. As ADM's
    evaluator, whose fp16 distances move the third decimal; here fp64. Raises ValueError for k or fewer rows.
    """
    sets = [rows.double() for rows in (reference, samples)]
    if min(map(len, sets)) <= k:
        raise ValueError(f"{len(sets[0])} references and {len(sets[1])} samples; want more than {k} of each")

    def blockwise(function, points):
        return torch.cat([function(part) for part in points.split(block)])
    shares = []
    for rows, points in (sets, sets[::-1]):
        # k + 1: the first neighbour of a row is the row itself
        radii = blockwise(lambda part: squared_distances(part, rows).kthvalue(k + 1).values, rows)
        near = blockwise(lambda part: (squared_distances(part, rows) <= radii).any(1), points)
        shares.append(float(near.double().mean()))
    return tuple(shares)


def kernel_distance(reference: Tensor, samples: Tensor, subsets: int = 100, subset_size: int = 1000,
                    seed: int = 2020) -> tuple[float, float]:
    """KID (arXiv:1801.01401): unbiased MMD^2, kernel (x.y / D + 1)^3: mean and std over random subsets.

    Features (n, D) each. Kernel and subsets are torch-fidelity's. Raises ValueError for smaller sets.
    """
    if min(len(reference), len(samples)) < subset_size:
        raise ValueError(f"{len(samples)} samples, {len(reference)} references; KID wants {subset_size} each")
    rng, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        x, y = (rows[rng.choice(len(rows), subset_size, replace=False)].double()
                for rows in (samples, reference))
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = sum((m.sum() - m.trace()) / (subset_size * (subset_size - 1)) for m in (xx, yy))
        values.append(float(within - 2 * xy.mean()))
    return float(np.mean(values)), float(np.std(values))


def psnr(x_u8: Tensor, y_u8: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, (B,); uint8 (B, 3, H, W); 100 for equal images."""
    mse = (x_u8.float() - y_u8.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / mse.clamp_min(255**2 * 1e-10))


def ssim(x_u8: Tensor, y_u8: Tensor) -> Tensor:
    """Structural similarity of each pair (Wang et al. 2004), (B,); uint8 (B, 3, H, W), sides of at least 11.

    Gaussian window 11 x 11 of sigma 1.5, where it fits; K 0.01 and 0.03; mean over positions and colours.
    """
    x, y = (image.float() / 255 - 0.5 for image in (x_u8, y_u8))  # centred: variances keep more digits
    window = torch.exp(-torch.arange(-5, 6, device=x.device) ** 2 / (2 * 1.5**2))
    window = (window / window.sum()).view(1, 1, 11, 1)
    maps = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2)[:, None]  # (5 B 3, 1, H, W)
    mx, my, xx, yy, xy = F.conv2d(F.conv2d(maps, window), window.mT).unflatten(0, (5, len(x), -1))
    structure = (2 * (xy - mx * my) + 0.03**2) / (xx - mx * mx + yy - my * my + 0.03**2)
    mx, my = mx + 0.5, my + 0.5
    return (structure * (2 * mx * my + 0.01**2) / (mx * mx + my * my + 0.01**2)).flatten(1).mean(dim=1)


# features of sets of images

def load_extractor(name: str, weights=None, resize: str = "tf1", device="cpu") -> Extractor:
    """Return an Extractor on `device`, with .meta for FeatureStats."""
    extractor = Extractor(name, weights, resize)
    extractor.meta = {"extractor": name, "weights": common.state_hash(extractor.net.state_dict()),
                      "resize": extractor.resize}
    return extractor.to(device)


class ArrayImages:
    """The images of an npz file as a data set: arr_0 uint8 (N, H, W, 3); labels arr_1, else -1."""

    def __init__(self, path):
        file = np.load(path, allow_pickle=False)
        if "arr_0" not in file.files:
            raise ValueError(f"{path} has {', '.join(file.files)}; want images: arr_0, as of sample.py --npz")
        self.images = images = file["arr_0"]
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] != 3:
            raise ValueError(f"{path}: arr_0 is {images.dtype} {images.shape}; want uint8 (N, H, W, 3)")
        self.labels = file["arr_1"] if "arr_1" in file.files else np.full(len(images), -1)
        self.image_size, self.name = images.shape[1], Path(path).stem

    def __len__(self):
        return len(self.images)

    def __getitems__(self, indices):
        images = self.images[np.asarray(indices)].transpose(0, 3, 1, 2).copy()
        return torch.from_numpy(images), torch.from_numpy(self.labels[np.asarray(indices)])


def open_images(source: str, size: int | None):
    """Return "shapes", a folder, or an npz file as a data set; folders are center-cropped to size (256)."""
    if str(source).endswith(".npz"):
        return ArrayImages(source)
    if source == "shapes":
        dataset = data.open_dataset(source, size or 32, split="val")
        dataset.name = f"shapes-val-{len(dataset)}"
    else:
        dataset = data.ImageFolder(source, size or 256)
        dataset.labels = np.full(len(dataset), -1)  # a folder's number need not be the judge's class
        dataset.name = f"{Path(source).resolve().name}-{len(dataset)}"
    return dataset


def extract(extractor, images_u8: Tensor) -> dict:
    """Return the extractor's dict of activations; a callable that returns features (B, D) will do, too."""
    outputs = extractor(images_u8)
    return outputs if isinstance(outputs, dict) else {"features": outputs}


@torch.no_grad()
def compute_stats(batches, extractor, device="cpu", meta=None, keep_every: int = 1) -> FeatureStats:
    """Measure batches (images uint8 (B, 3, H, W), labels (B,), ...) with any callable; labels < 0: none.

    Each process brings its share of the batches and gets the statistics of all.
    """
    stats = FeatureStats({**getattr(extractor, "meta", {}), **(meta or {})}, keep_every)
    for images, labels, *_ in batches:
        stats.update({**extract(extractor, images.to(device)), "labels": labels})
    return stats.all_reduce()


def measure(source, size, extractor, args, proc, reference=False) -> FeatureStats:
    """Return the statistics of images, or those in a reference file; ADM's has images for the rows too."""
    stored = None
    if reference and str(source).endswith(".npz"):
        files = np.load(source).files
        stored = FeatureStats.load(source) if "mu" in files else None
        if stored is not None and "arr_0" not in files:
            return stored
    dataset = open_images(source, size)
    loader = data.eval_loader(dataset, args.batch_size, proc.rank, proc.world, args.workers)
    stats = compute_stats(common.progress(loader, proc, dataset.name), extractor, proc.device,
                          {"name": dataset.name, "data": str(source), "image_size": dataset.image_size,
                           "crop": "center" if isinstance(dataset, data.ImageFolder) else "none"},
                          keep_every=-(-len(dataset) // REFERENCE_ROWS) if reference else 1)
    if stored is not None:
        stored.rows, stored.meta = stats.rows, {**stored.meta, "image_size": dataset.image_size}
    return stored or stats


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
        result |= {"reference_rows": len(pair[0]), "kid_subset_size": size}
    return result | class_accuracy(rows)


@torch.no_grad()
def rfid(batches, vae, extractor, device="cpu", lpips=None) -> dict:
    """Compare images with their reconstructions from the posterior mean: n, fd, psnr_db, ssim, lpips, ...

    batches and extractor as in compute_stats; lpips: an LPIPS module, or None. Reconstructions are rounded to
    uint8, as when saved, for all but LPIPS.
    """
    real, fake = FeatureStats(), FeatureStats()
    for images, labels, *_ in batches:
        images = images.to(device)
        x = data.to_float(images)
        x_hat = vae.decode(vae.encode(x).mode())
        images_hat = data.to_uint8(x_hat)
        real.update(extract(extractor, images))
        rows = {"psnr_db": psnr(images, images_hat), "ssim": ssim(images, images_hat), "labels": labels}
        rows |= {} if lpips is None else {"lpips": lpips(x, x_hat)}
        fake.update({**extract(extractor, images_hat), **rows})
    result = gfid(real.all_reduce(), fake.all_reduce())
    return result | {key: fake.rows[key].double().mean().item() for key in rows if key != "labels"}


def report(title: str, result: dict, args, main: bool) -> None:
    """Print the numbers, and in the main process write them and what they depend on to args.out as JSON."""
    for key, value in result.items():
        if isinstance(value, float):
            common.print0(f"{title if key == 'fd' else key:<56} {value:.4f}")
    if main:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        protocol = {"title": title, **result, "args": vars(args), "versions": common.versions()}
        Path(args.out).write_text(json.dumps(protocol, indent=1) + "\n")


def parse_args(argv=None):
    """Parse the command line."""
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add = shared.add_argument_group("measuring").add_argument
    add("--features", default="inception", help="inception, shapes (the embedded set's judge), a timm model")
    add("--inception", default=None, help=f"local {INCEPTION_FILE}; default: torch hub's cache")
    add("--features-weights", default=None, help="local weights of the timm model; default: the hub's")
    add("--resize", default="tf1", choices=("tf1", "pytorch-fid"), help="to Inception's 299 px; tf1: ADM's")
    add("--image-size", type=int, default=None, help="pixels that folders are cropped to; default: as the "
        "samples' npz, 32 beside 'shapes', else 256")
    add("--batch-size", type=int, default=64, help="images per forward and device")
    add("--workers", type=int, default=4, help="processes that read images, per device")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="auto: the first there is")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text, out):
        sub = commands.add_parser(name, parents=[shared], help=text, description=text, allow_abbrev=False,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--out", default=out, required=out is None, help="file to write")
        return sub.add_argument
    images = "'shapes', folder, or npz of images (arr_0, labels arr_1)"
    add = command("gfid", "Frechet distance of samples to a reference, and its kin", "out/gfid.json")
    add("reference", help=images + ", or npz of statistics")
    add("samples", help=images)
    add = command("rfid", "Frechet distance, PSNR, SSIM of reconstructions to the originals", "out/rfid.json")
    add("data", help=images)
    add("--vae", required=True, help="checkpoint, folder of checkpoints (newest), or hf://owner/repo/file")
    add("--lpips-weights", default=None, help="torchvision's vgg16 file, or 'hub'; default: no LPIPS")
    add = command("stats", "write the statistics of a set of images, for use as a reference", None)
    add("data", help=images)
    return parser.parse_args(argv)


def run_gfid(args, extractor, proc) -> dict:
    """Measure samples and reference, and report."""
    size = args.image_size or (32 if "shapes" in (args.reference, args.samples) else 256)
    samples = measure(args.samples, size, extractor, args, proc)
    reference = measure(args.reference, samples.meta["image_size"], extractor, args, proc, reference=True)
    result = gfid(reference, samples, "cuda" if proc.device.type == "cuda" else "cpu")
    result |= {"reference": reference.meta, "reference_n": reference.n, "samples": samples.meta}
    report(f"{extractor.label}-{samples.n} vs {reference.meta['name']}", result, args, proc.main)
    return result


def run_rfid(args, extractor, proc) -> dict:
    """Reconstruct the images of args.data, and report."""
    vae = load_vae(common.resolve_checkpoint(args.vae)).to(proc.device)
    weights = args.lpips_weights
    lpips = weights and LPIPS(None if weights == "hub" else weights).to(proc.device)
    dataset = open_images(args.data, args.image_size)
    loader = data.eval_loader(dataset, args.batch_size, proc.rank, proc.world, args.workers)
    result = rfid(common.progress(loader, proc, "rfid"), vae, extractor, proc.device, lpips)
    result |= {"reference": {**extractor.meta, "name": dataset.name, "image_size": dataset.image_size},
               "vae_hash": common.state_hash(vae.state_dict())}
    report(f"r{extractor.label}-{result['n']} vs originals of {dataset.name}", result, args, proc.main)
    return result


def run_stats(args, extractor, proc) -> FeatureStats:
    """Write the statistics of args.data to args.out."""
    stats = measure(args.data, args.image_size, extractor, args, proc, reference=True)
    if proc.main:
        stats.save(args.out)
        print(f"wrote {args.out}: {stats.n} images, {len(stats.mean())} features, {stats.meta}")
    return stats


def main(argv=None):
    """Entry point of the command; returns what was measured."""
    args = parse_args(argv)
    for source in (vars(args).get(key, "shapes") for key in ("reference", "samples", "data")):
        if source != "shapes" and not Path(source).exists():
            raise FileNotFoundError(f"{source}: no such file or folder; want 'shapes', a folder or an npz")
    proc = common.setup(args.device)
    torch.set_float32_matmul_precision("highest")  # TF32 has 10 bits of mantissa: the distances would move
    torch.backends.cudnn.allow_tf32 = False
    weights = args.inception if args.features == "inception" else args.features_weights
    extractor = load_extractor(args.features, weights, args.resize, proc.device)
    return {"gfid": run_gfid, "rfid": run_rfid, "stats": run_stats}[args.command](args, extractor, proc)


if __name__ == "__main__":
    common.cli(main)
