"""Distances between sets of images: FID and related measures of samples (gfid) and of reconstructions (rfid).

    python fid.py gfid VIRTUAL_imagenet256_labeled.npz samples/samples.npz  # FID, sFID, IS, P/R, KID
    python fid.py gfid REF.npz samples/cfg*/samples.npz                     # one block of numbers per set
    python fid.py gfid REF.npz SAMPLES.npz --train data/imagenet/train      # are samples copies? + a picture
    python fid.py rfid data/imagenet/val --vae out/vae                      # rFID, PSNR, SSIM, LPIPS
    python fid.py stats data/imagenet/train --out train256.npz              # a reference file of one's own
    python fid.py gfid shapes samples/samples.npz --features shapes         # the embedded set, by its judge

A set of images is "shapes" (the embedded set), a folder, an npz file (arr_0 uint8 (N, H, W, 3), labels arr_1:
ADM's format) or an npy file of such an array. REF may also be a file of statistics: ours, or one with mu,
sigma, mu_s, sigma_s (ADM's). The measures are those of ADM's evaluator (arXiv:2105.05233): TF1
resize, softmax without bias, splits of 5,000, k = 3; but in fp64.

Read: FeatureStats -> frechet_distance and the other measures -> compute_stats,
compare_pairs -> gfid -> the commands.
Letters: n or m images, B images of a batch, D features.
"""
import argparse
import json
import zipfile
from pathlib import Path

import common  # before torch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import checkpoints
import data
import inception
from losses import LPIPS

MAX_KEPT = 10_000  # images of a reference whose features are kept: as many as ADM's files hold
BLOCK = 512  # images whose distances to all others are in memory at once: to 50,000 others 200 MB
ARRAYS = (".npz", ".npy")  # files of images
KEPT = ("features", "logits", "labels", "class_logits")  # values of single images
MOMENTS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # their names in files
LOW_PSNR = 22  # dB; published f16d32 have 27.6 to 28.6 on ImageNet (Send-VAE, Table 7)


# statistics of a set of images

class FeatureStats:
    """Mean and covariance of the features of n images, from sums of x and of x x^T in fp64.

    .n         number of images; None where a file does not say
    .meta      how they were measured: extractor, weights, resize, image_size, dimensions, split, name,
               images_hash (of "shapes" and folders)
    .moments   {"features" or "spatial": (mean (D,), covariance (D, D) as np.cov's)}, numpy fp64
    .kept      {name: (m, ...)}, values of single images: features for precision, recall and KID; logits, ...
    """

    def __init__(self, meta=()):
        self.meta, self.n, self.sums, self.moments, self.kept = dict(meta), 0, {}, {}, {}

    def update(self, outputs: dict):
        """Add a batch of features (B, D) and, for sFID, spatial (B, D')."""
        self.n += len(outputs["features"])
        for name in MOMENTS:
            if name in outputs:
                x = outputs[name].detach()
                x = (x.cpu() if x.is_mps else x).double()  # MPS has no fp64
                dim = x.shape[1]
                total, outer = self.sums.setdefault(name, (x.new_zeros(dim), x.new_zeros(dim, dim)))
                total += x.sum(0)
                outer.addmm_(x.T, x)

    def keep(self, values: dict, names, chosen=slice(None)):
        """Keep of the batch's values {name: (B, ...)} those with these names, of the chosen images."""
        for name in names:
            if name in values:
                self.kept.setdefault(name, []).append(values[name].cpu()[chosen])

    def finish(self) -> "FeatureStats":
        """Compute .moments after the last batch; returns self.

        Only rank 0 gets the statistics of all processes, kept values in the order of the ranks: those of
        50,000 images take 600 MB. Each process needs at least one batch.
        """
        self.kept = {name: torch.cat(batches) for name, batches in self.kept.items()}
        if dist.is_initialized():
            for part in sum(self.sums.values(), ()):
                dist.all_reduce(part)
            shares = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
            dist.gather_object((self.n, self.kept), shares)
            if shares is None:
                return self
            self.n = sum(n for n, _ in shares)
            self.kept = {name: torch.cat([kept[name] for _, kept in shares]) for name in self.kept}
        for name, (total, outer) in self.sums.items():
            cov = (outer - torch.outer(total, total) / self.n) / (self.n - 1)
            self.moments[name] = (total / self.n).cpu().numpy(), cov.cpu().numpy()
        self.meta["dimensions"] = len(self.moments["features"][0])
        return self

    def save(self, path):
        """Write mu, sigma (mu_s, sigma_s), .kept, n, meta as npz; pytorch-fid and ADM's tools read it."""
        arrays = {"n": self.n, "meta": json.dumps(self.meta)}
        for name, moments in self.moments.items():
            arrays |= zip(MOMENTS[name], moments)
        with data.replacing(path) as file:
            np.savez(file, **arrays, **self.kept)

    @staticmethod
    @checkpoints.one_line
    def load(path) -> "FeatureStats":
        """Read a file of statistics: ours, ADM's, or pytorch-fid's. Raises ValueError for another file."""
        arrays = np.load(path, allow_pickle=False)
        stats = FeatureStats({"name": Path(path).stem, "dimensions": len(arrays["mu"])})
        stats.n = int(arrays["n"]) if "n" in arrays else None  # ADM's does not say
        stats.moments = {name: (arrays[a], arrays[b]) for name, (a, b) in MOMENTS.items() if a in arrays}
        if "mu_s" in arrays:
            stats.meta |= {"extractor": "inception", "resize": "tf1"}  # ADM's, unless "meta" says otherwise
        stats.meta |= json.loads(str(arrays.get("meta", "{}")))
        if "features" in arrays:
            stats.kept["features"] = torch.from_numpy(arrays["features"]).view(-1, len(arrays["mu"]))
        for mu, sigma in stats.moments.values():
            if mu.shape + mu.shape != sigma.shape or not np.isfinite(mu + sigma).all():
                raise ValueError(f"mean {mu.shape}, covariance {sigma.shape} do not fit, or are not finite")
        return stats


def check_comparable(reference, samples):
    """Raise ValueError naming both sides if they were measured differently.

    Fields that a file does not have are not compared.
    """
    a, b = reference.meta, samples.meta
    for key in ("extractor", "weights", "resize", "image_size", "dimensions"):
        if key in a and key in b and a[key] != b[key]:
            raise ValueError(f"{key} differs: {a.get('name')} has {a[key]}, {b.get('name')} has {b[key]}")


# measures of sets of features

def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) in fp64 (arXiv:1706.08500); mu (D,), sigma (D, D).

    The trace of the root is the sum of the roots of the eigenvalues of R^T S2 R, where S1 = R R^T. That
    matrix is symmetric, so its eigenvalues are real, also for covariances of fewer than D images.
    Raises ValueError for NaN.
    """
    mu1, s1, mu2, s2 = (torch.as_tensor(np.asarray(a)).double() for a in (mu1, sigma1, mu2, sigma2))
    if not all(a.isfinite().all() for a in (mu1, s1, mu2, s2)):
        raise ValueError("features or covariances are not finite; check the images, give at least 2")
    root, failed = torch.linalg.cholesky_ex(s1)
    if failed or root.diagonal().square().min() <= 1e-9 * s1.diagonal().max():
        # Below full rank. Some eigenvalues are rounding errors of 1e-16, of which a root would make 1e-8.
        values, vectors = torch.linalg.eigh(s1)
        positive = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        root = vectors[:, positive] * values[positive].sqrt()  # (D, rank)
    cross = torch.linalg.eigvalsh(root.T @ s2 @ root).clamp_min(0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * cross)


def inception_score(logits: Tensor, split_size=5000) -> tuple[float, float]:
    """exp(mean KL(p(y|x) || p(y))) of consecutive splits: their mean and population std (arXiv:1606.03498).

    logits (n, classes); ADM's are without the bias of the last layer. As there, a split sees its own images
    alone: the order of the images matters.
    """
    scores = []
    for part in logits.double().split(split_size):
        log_p = part.log_softmax(1)
        p = log_p.exp()
        scores.append(float((p * (log_p - p.mean(0).log())).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def in_runs(labels: Tensor) -> bool:
    """Whether labels (n,) equal the one before much more often than in random order: half way to always."""
    shares = labels.unique(return_counts=True)[1] / len(labels)
    return bool((labels[1:] == labels[:-1]).double().mean() > (1 + shares.square().sum()) / 2)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the squared distances (n, m) of x (n, D) to y (m, D), fp64."""
    x, y = x.double(), y.double()
    return (x.square().sum(1)[:, None] - 2 * x @ y.T + y.square().sum(1)).clamp_min_(0)


def nearest(points: Tensor, others: Tensor, k=1, block=BLOCK) -> tuple[Tensor, Tensor]:
    """Return squared distances (n, k) fp64 and indices (n, k) of each point's k nearest others, in order.

    points (n, D), others (m, D). A point that is also among the others finds itself.
    """
    others = others.double()
    best = [squared_distances(x, others).topk(k, largest=False) for x in points.split(block)]
    return torch.cat([part.values for part in best]), torch.cat([part.indices for part in best])


def precision_recall(reference: Tensor, samples: Tensor, k=3, block=BLOCK) -> tuple[float, float]:
    """Share of samples near the reference, and of references near the samples (arXiv:1904.06991); (n, D).

    Near: no farther from some point of the other set than that point's k-th neighbour there. As ADM's
    evaluator, whose fp16 distances move the third decimal; here fp64. Raises ValueError for too few images.
    50,000 samples, 10,000 references, D 2,048: 12.7 TFLOP, 5 minutes of one CPU core.
    """
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"{len(reference)} references and {len(samples)} samples; want more than {k} each")
    # k + 1: the first neighbour of an image is the image itself
    reference_radii, sample_radii = (nearest(x, x, k + 1, block)[0][:, k] for x in (reference, samples))
    precise, recalled = [], torch.zeros_like(reference_radii, dtype=torch.bool)
    for x, radii in zip(samples.split(block), sample_radii.split(block)):
        squares = squared_distances(x, reference)  # (block, n)
        precise.append((squares <= reference_radii).any(1))
        recalled |= (squares <= radii[:, None]).any(0)
    return torch.cat(precise).double().mean().item(), recalled.double().mean().item()


def kernel_distance(reference, samples, subsets=100, subset_size=1000, seed=2020) -> tuple[float, float]:
    """KID (arXiv:1801.01401): unbiased MMD^2, kernel (x.y / D + 1)^3: mean and std over random subsets.

    Features (n, D) each. Kernel and subsets are torch-fidelity's. Raises ValueError for smaller sets.
    """
    rng, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        x, y = (s[rng.choice(len(s), subset_size, replace=False)].double() for s in (samples, reference))
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        pairs = xx.sum() - xx.trace() + yy.sum() - yy.trace()  # unbiased: no image is paired with itself
        values.append(float(pairs / (subset_size * (subset_size - 1)) - 2 * xy.mean()))
    return float(np.mean(values)), float(np.std(values))


def closer_than_training(train: Tensor, points: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Compare the distance of each point to its nearest training image with that image's to its own nearest.

    train (n, D), points (m, D) -> (ratio (m,), indices (m, k) of the nearest training images). A ratio below
    1 is what arXiv:2102.08921 calls not authentic: about half of unseen images have it, and all copies (0,
    also if their original is there twice).
    """
    own = nearest(train, train, 2)[0][:, 1]
    squares, indices = nearest(points, train, k)
    # Smaller squared distances are the rounding of |x|^2 - 2 x.y + |y|^2: the images are equal.
    noise = 1e-12 * points.double().square().sum(1)
    squares = torch.where(squares[:, 0] < noise, 0, squares[:, 0])
    return (squares / own[indices[:, 0]].maximum(noise).clamp_min(1e-300)).sqrt(), indices


def ssim(x_u8: Tensor, y_u8: Tensor) -> Tensor:
    """Structural similarity of each pair (Wang et al. 2004), (B,); uint8 (B, 3, H, W), sides of at least 11.

    Gaussian window 11 x 11 of sigma 1.5, where it fits; K 0.01 and 0.03; mean over positions and colours.
    """
    x, y = x_u8.float() / 255 - 0.5, y_u8.float() / 255 - 0.5  # centred: variances keep more digits
    window = torch.exp(-torch.arange(-5, 6, device=x.device) ** 2 / (2 * 1.5**2))
    window = (window / window.sum()).view(1, 1, 11, 1)
    maps = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2)[:, None]  # (5 B 3, 1, H, W)
    mx, my, xx, yy, xy = F.conv2d(F.conv2d(maps, window), window.mT).unflatten(0, (5, len(x), -1))
    structure = (2 * (xy - mx * my) + 0.03**2) / (xx - mx * mx + yy - my * my + 0.03**2)
    mx, my = mx + 0.5, my + 0.5
    return (structure * (2 * mx * my + 0.01**2) / (mx * mx + my * my + 0.01**2)).flatten(1).mean(dim=1)


# from images to numbers

def load_extractor(name, weights=None, resize="tf1", device="cpu"):
    """Return an Extractor on `device`; its .meta says for FeatureStats what it is."""
    extractor = inception.Extractor(name, weights, resize)
    state = {k: v for k, v in extractor.net.state_dict().items() if not k.endswith("num_batches_tracked")}
    extractor.meta = {"extractor": name, "weights": checkpoints.state_hash(state), "resize": extractor.resize}
    if name == "inception":
        inception.fuse(extractor.net)
    return extractor.to(device)


@torch.no_grad()
def compute_stats(batches, extractor, device="cpu", meta=(), every=1, keep=KEPT) -> FeatureStats:
    """Measure batches of data.eval_loader: {"images": uint8 (B, 3, H, W), "labels", "rows": (B,)}.

    extractor: any function of uint8 images that returns a dict with "features" (B, D). What `keep` names is
    kept of every so many-th image. Each process brings its batches; rank 0 gets the statistics of all.
    """
    stats = FeatureStats(meta)
    for batch in batches:
        outputs = extractor(batch["images"].to(device))
        stats.update(outputs)
        stats.keep({**outputs, "labels": batch["labels"]}, keep, batch["rows"] % every == 0)
    return stats.finish()


def gfid(reference, samples, device="cpu") -> dict:
    """Return n, fd, and what else there are numbers for: sfid, inception_score, precision, recall, kid, ...

    device: where distances between features are computed. Raises ValueError if the two were measured
    differently; prints one warning if there are fewer images than features.
    """
    check_comparable(reference, samples)
    n, dim = min(samples.n, reference.n or samples.n), samples.meta["dimensions"]
    if n < dim:
        common.print0(f"warning: n = {n} images < D = {dim} features: the distance is biased upwards")
    result, kept = {"n": samples.n}, samples.kept
    result["fd"] = frechet_distance(*reference.moments["features"], *samples.moments["features"])
    if "spatial" in reference.moments and "spatial" in samples.moments:
        result["sfid"] = frechet_distance(*reference.moments["spatial"], *samples.moments["spatial"])
    if "logits" in kept:
        result["inception_score"], result["inception_score_std"] = inception_score(kept["logits"])
        if samples.n > 5000 and in_runs(kept.get("labels", torch.zeros(2))):  # more than one split
            common.print0("warning: labels come in runs; mixed, inception_score of splits would be higher")
            result["labels_in_runs"] = True
    if "features" in reference.kept and "features" in kept:
        theirs, mine = reference.kept["features"].to(device), kept["features"].to(device)
        size = min(1000, len(theirs), len(mine))
        result["precision"], result["recall"] = precision_recall(theirs, mine)
        result["kid"], result["kid_std"] = kernel_distance(theirs, mine, subset_size=size)
        result["reference_features"] = len(theirs)
    if "class_logits" in kept and (kept["labels"] >= 0).all():
        result["class_accuracy"] = (kept["class_logits"].argmax(1) == kept["labels"]).double().mean().item()
    return result


@torch.no_grad()
def compare_pairs(batches, vae, extractor, device="cpu", lpips=None) -> tuple[FeatureStats, FeatureStats]:
    """Measure images and their reconstructions from the posterior mean; psnr_db, ssim and lpips of the pairs
    are .kept of the second.

    batches and extractor as in compute_stats; lpips: an LPIPS module, or None. Reconstructions are rounded to
    uint8, as when saved, for all but LPIPS. Rank 0 gets the statistics of all.
    """
    real, fake = FeatureStats(), FeatureStats()
    for batch in batches:
        images = batch["images"].to(device)
        x = data.to_float(images)
        x_hat = vae.decode(vae.encode(x).mode())
        images_hat = data.to_uint8(x_hat)
        real.update(extractor(images))
        fake.update(extractor(images_hat))
        pairs = {"psnr_db": data.psnr(images, images_hat), "ssim": ssim(images, images_hat)}
        if lpips is not None:
            pairs["lpips"] = lpips(x, x_hat)
        fake.keep(pairs, pairs)
    return real.finish(), fake.finish()


# sets of images

@checkpoints.one_line
def has_array(source, name: str) -> bool:
    """Whether this is an npz file that holds this array. Raises ValueError for a damaged one."""
    return zipfile.is_zipfile(source) and f"{name}.npy" in zipfile.ZipFile(source).namelist()


def open_images(source, size, extractor, args, proc, split="val"):
    """Return (data set, batches of this process, .meta of its statistics). Folders are cropped to size.

    split: of "shapes"; of others it is told by the path. Raises ValueError for a folder of sample.py, whose
    pictures are grids, and for fewer images than processes.
    """
    path = Path(source)
    if source == "shapes":
        dataset, name = data.open_dataset(source, size, split), f"shapes-{split}"
    elif source.endswith(ARRAYS):
        dataset, name = data.ArrayImages(source), path.stem
    else:
        arrays = [*path.glob("samples.npz"), *path.glob("*/samples.npz")]
        if arrays:
            raise ValueError(f"{source}: a folder of sample.py; give {' '.join(map(str, arrays))}")
        dataset, name = data.ImageFolder(source, size), path.resolve().name
    if len(dataset) < proc.world:
        raise ValueError(f"{source}: {len(dataset)} images for {proc.world} processes; use fewer")
    common.print0(f"{source}: {len(dataset)} images of {dataset.image_size} px")
    if source != "shapes":
        split = next((part for part in ("test", "val", "train") if part in path.parts), "unknown")
    meta = {"name": f"{name}-{len(dataset)}", "split": split, "image_size": dataset.image_size,
            "images_hash": getattr(dataset, "images_hash", None)}  # None for arrays, which are one file
    loader = data.eval_loader(dataset, args.batch_size, proc, args.workers)
    return dataset, common.progress_bar(loader, proc, name), extractor.meta | meta


def measure_reference(source, size, extractor, args, proc):
    """Return the statistics of a reference: images, a file of statistics, or ADM's file, which holds both."""
    stored = FeatureStats.load(source) if has_array(source, "mu") else None
    if stored and "extractor" not in stored.meta:
        common.print0(f"warning: {source} does not say how it was measured; only dimensions are checked")
    if stored and not has_array(source, "arr_0"):
        return stored
    dataset, batches, meta = open_images(source, size, extractor, args, proc)
    every = (len(dataset) - 1) // MAX_KEPT + 1
    stats = compute_stats(batches, extractor, proc.device, meta, every, KEPT[:1])
    if stored:  # ADM's: moments of all images, and some of the images for precision, recall and KID
        stored.kept = stats.kept
        stored.meta["image_size"] = dataset.image_size
    return stored or stats


# commands

def show(title, numbers):
    """Print a block of numbers."""
    print("\n  ".join([title, *(f"{key:<22}{value:.7g}" for key, value in numbers.items())]))


def run_gfid(args, extractor, proc):
    """Compare each set with the reference, print the numbers and write them; {} on all ranks but 0."""
    device = "cuda" if proc.device.type == "cuda" else "cpu"  # MPS has no fp64
    first, size = args.samples[0], args.image_size or data.default_size(args.reference)
    if first.endswith(ARRAYS) and not args.image_size:
        size = data.ArrayImages(first).image_size
    reference = measure_reference(args.reference, size, extractor, args, proc)
    if args.train:
        train_set, batches, _ = open_images(args.train, size, extractor, args, proc, "train")
        train = compute_stats(batches, extractor, proc.device, keep=KEPT[:1]).kept["features"].to(device)
    sets, pictures = {}, []
    for source in args.samples:
        dataset, batches, meta = open_images(source, size, extractor, args, proc)
        check_comparable(reference, FeatureStats(meta))  # now, before an hour of samples
        # Otherwise labels are not the judge's classes: those of a user's folder are others.
        judged = source == "shapes" or (source.endswith(".npz") and args.reference == "shapes")
        samples = compute_stats(batches, extractor, proc.device, meta, keep=KEPT if judged else KEPT[:3])
        if proc.main:
            numbers = gfid(reference, samples, device)
            if args.train:
                ratio, indices = closer_than_training(train, samples.kept["features"].to(device), k=4)
                numbers["closer_than_training"] = (ratio < 1).double().mean().item()
                for i in ratio.argsort()[:10].tolist():  # the most suspicious ones, and what they are near to
                    pictures += [dataset.batch([i])["images"], train_set.batch(indices[i].tolist())["images"]]
            show(f"{extractor.label}-{samples.n} vs {reference.meta['name']}: {source}", numbers)
            sets[source] = {**numbers, "samples": samples.meta}
    if not proc.main:
        return {}
    result = {"sets": sets, "reference": {**reference.meta, "n": reference.n}}
    data.write_facts(args.out, {**result, "args": vars(args), "versions": common.versions()})
    if args.train:
        path = Path(args.out).with_suffix(".png")
        data.save_grid(path, torch.cat(pictures), columns=5, scale=max(1, 64 // train_set.image_size))
        print(f"wrote {path}: possible copies. About half of unseen images are closer_than_training, too")
    return result


def run_rfid(args, extractor, proc):
    """Compare images with their reconstructions, print the numbers and write them; {} on all ranks but 0."""
    if has_array(args.data, "mu"):
        raise ValueError(f"{args.data} is a reference for gfid; rfid wants images, to reconstruct them")
    vae = common.place(checkpoints.load_vae(args.vae), proc.device)
    args.no_lpips |= args.features == "shapes" and not args.lpips_weights
    lpips = None if args.no_lpips else LPIPS(args.lpips_weights).to(proc.device)
    trained = checkpoints.read_own(args.vae).get("args", {}).get("image_size")
    size = args.image_size or trained or data.default_size(args.data)
    _, batches, meta = open_images(args.data, size, extractor, args, proc)
    real, fake = compare_pairs(batches, vae, extractor, proc.device, lpips)
    if not proc.main:
        return {}
    result = gfid(real, fake) | {name: values.double().mean().item() for name, values in fake.kept.items()}
    show(f"r{extractor.label}-{result['n']} vs originals of {meta['name']}, split {meta['split']}", result)
    result |= {"reference": meta, "vae_hash": checkpoints.state_hash(vae.state_dict())}
    data.write_facts(args.out, {**result, "args": vars(args), "versions": common.versions()})
    if result["psnr_db"] < LOW_PSNR:
        print(f"verdict: below {LOW_PSNR} dB no generator helps; fine-tune by train_vae.py --init {args.vae}")
    return result


def run_stats(args, extractor, proc):
    """Measure a set of images and write its statistics to a file."""
    size = args.image_size or data.default_size(args.data)
    stats = measure_reference(args.data, size, extractor, args, proc)
    if proc.main:
        stats.save(args.out)
        print(f"wrote {args.out}: {stats.n} images, {stats.meta}")
    return stats


def parse_args(argv=None):
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument_group("measuring").add_argument
    add("--features", default="inception", help="inception, shapes (the embedded judge) or a timm model")
    add("--features-weights", help="local file; default: a cache, to which it is fetched once")
    add("--resize", default="tf1", choices=("tf1", "pytorch-fid"), help="to Inception's 299 px; tf1: ADM's")
    add("--image-size", type=common.positive, help="of folders; default: as in SAMPLES or VAE, else 256")
    add("--batch-size", type=common.positive, default=64, help="images per forward and device")
    add("--workers", type=common.natural, default=4, help="processes that read images, per device")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="auto: CUDA, MPS or CPU")
    parser = common.new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    how = {"parents": [shared], "allow_abbrev": False, "formatter_class": parser.formatter_class}
    images = "'shapes', folder, npz of images (arr_0, labels arr_1) or npy"
    add = commands.add_parser("gfid", help="distances of samples to a reference", **how).add_argument
    add("reference", help=images + ", or npz of statistics")
    add("samples", nargs="+", help=images)
    add("--train", help="training images: report copies of them, and draw them beside --out")
    add("--out", default="out/gfid.json", help="JSON file to write")
    add = commands.add_parser("rfid", help="reconstructions against their originals", **how).add_argument
    add("data", help=images)
    add("--vae", required=True, help="checkpoint, folder of checkpoints (newest), or hf://owner/repo/file")
    add("--lpips-weights", help="torchvision's vgg16 file; default: timm's copy from the hub")
    add("--no-lpips", action="store_true", help="leave LPIPS out; so does --features shapes without weights")
    add("--out", default="out/rfid.json", help="JSON file to write")
    add = commands.add_parser("stats", help="write statistics, for use as REF", **how).add_argument
    add("data", help=images)
    add("--out", required=True, help="npz file to write")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    proc = common.setup(args.device)
    checkpoints.check_out(args.out)
    # now, before weights are fetched; what is no file may be a folder in an archive
    for path in map(Path, [args.reference, *args.samples] if args.command == "gfid" else [args.data]):
        if not (path.exists() or str(path) == "shapes" or any(map(Path.is_file, path.parents))):
            advice = "; sample.py --npz makes it" * (path.name == "samples.npz")
            raise FileNotFoundError(f"{path}: no such file, folder or archive{advice}")
    common.forbid_tf32()  # it has 10 bits of mantissa: the distances would change
    extractor = load_extractor(args.features, args.features_weights, args.resize, proc.device)
    return {"gfid": run_gfid, "rfid": run_rfid, "stats": run_stats}[args.command](args, extractor, proc)


if __name__ == "__main__":
    common.cli(main)
