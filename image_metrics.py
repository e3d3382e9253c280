"""How far apart two sets are, in numbers: features and images in, measures out. fid.py brings the images.

    stats = FeatureStats(); stats.update(features)                  # streaming mean and covariance
    frechet_distance(mu1, sigma1, mu2, sigma2)                      # FID, if the features are Inception's
    precision_recall(reference, samples), kernel_distance(reference, samples), inception_score(logits)
    nearest(points, rows), closer_than_training(train, points)      # what was copied?
    psnr(x_u8, y_u8), ssim(x_u8, y_u8)                              # of pairs of images

All in fp64 but psnr and ssim. Letters: n, m or B images, D features.
"""
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

MUST_MATCH = ("extractor", "weights", "resize", "image_size", "dimensions")
BLOCK = 2048  # rows of a tile of distances: 32 MiB in fp64, whatever the number of images


class FeatureStats:
    """Streaming mean and covariance of features (B, D), from sums of x and of x x^T in fp64.

    .n is None where a file does not say (ADM's); .meta says what was measured how; .rows {name: (n, ...)} is
    what was kept of each image; .pixels sums hashes of the images: equal for the same images in any order,
    file, batch size. n, rows and pixels are complete in rank 0 after all_reduce().
    """

    def __init__(self, meta: dict | None = None, keep_every: int = 0):
        self.meta, self.keep_every, self.n, self.pixels = dict(meta or {}), keep_every, 0, 0
        self.sums, self.moments, self.rows = {}, {}, {}

    def update(self, outputs, images_u8: Tensor | None = None, positions=None) -> None:
        """Add a batch: features (B, D), or a dict of them and others. Raises ValueError if D changes.

        "features" and "spatial" enter the moments; rows are kept of every other entry, and of the features of
        each image whose position is a multiple of keep_every (0: none). images_u8 (B, 3, H, W, on the
        CPU) enter .pixels; positions (B,): of these images among all (default: as if they came in order).
        """
        outputs = outputs if isinstance(outputs, dict) else {"features": outputs}
        # first, while a GPU still computes the features
        for image in [] if images_u8 is None else images_u8.permute(0, 2, 3, 1).numpy():
            digest = hashlib.blake2b(np.ascontiguousarray(image), digest_size=8).digest()
            self.pixels = (self.pixels + int.from_bytes(digest, "little")) % 2**64
        if positions is None:
            positions = torch.arange(self.n, self.n + len(outputs["features"]))
        for name, x in outputs.items():
            x = x.detach().cpu() if x.device.type == "mps" else x.detach()  # MPS has no fp64
            if name in ("features", "spatial"):
                dim, like = x.shape[1], dict(dtype=torch.float64, device=x.device)
                total, outer = self.sums.setdefault(
                    name, (torch.zeros(dim, **like), torch.zeros(dim, dim, **like)))
                if len(total) != dim:
                    raise ValueError(f"{name} have {dim} dimensions, those before {len(total)}")
                total += x.double().sum(0)
                outer.addmm_(x.double().T, x.double())
            if name == "features":
                x = x[(positions % self.keep_every == 0).to(x.device)] if self.keep_every else x[:0]
            if name != "spatial" and len(x):
                self.rows.setdefault(name, []).append(x.cpu())
        self.n += len(outputs["features"])

    def all_reduce(self) -> "FeatureStats":
        """Join the batches' rows, and all processes' statistics, rows by rank; call once. Returns self.

        Only rank 0 gets everything: 50,000 images have rows of 600 MB. Each process needs a batch at least.
        """
        self.rows = {name: torch.cat(parts) for name, parts in self.rows.items()}
        if dist.is_initialized():
            main = dist.get_rank() == 0
            everyone = [None] * dist.get_world_size() if main else None
            dist.gather_object((self.n, self.pixels, self.rows), everyone)
            for total in (t for pair in self.sums.values() for t in pair):
                dist.all_reduce(total)
            if main:
                counts, pixels, rows = zip(*everyone)
                self.n, self.pixels = sum(counts), sum(pixels) % 2**64
                self.rows = {name: torch.cat([part[name] for part in rows if name in part])
                             for name in rows[0]}
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
    """Raise ValueError naming both sides if they were measured differently; what a file omits is let pass."""
    a, b = ({**stats.meta, **({"dimensions": len(stats.mean())} if stats.sums or stats.moments else {})}
            for stats in (reference, samples))
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
    root = square_root(s1)  # (D, rank)
    cross = torch.linalg.eigvalsh(root.T @ s2 @ root).clamp_min(0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * cross)


def square_root(sigma: Tensor) -> Tensor:
    """Return R (D, rank) with R R^T = sigma, positive semi-definite fp64."""
    root, failed = torch.linalg.cholesky_ex(sigma)
    if not failed and root.diagonal().square().min() > 1e-9 * sigma.diagonal().max():
        return root
    # Singular: rounding errors of 1e-16 would become 1e-8 under the next root, up to D of them. Slower.
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


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


def tiles(rows: Tensor, block: int = BLOCK):
    """Yield (slice, rows[slice] in fp64): never a whole copy, which for 50,000 x 2,048 would be 0.8 GB."""
    for first in range(0, len(rows), block):
        part = slice(first, first + block)
        yield part, rows[part].double()


def nearest(points: Tensor, rows: Tensor, k: int = 1, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Return squared distances (n, k) fp64 and indices (n, k) of each point's k nearest rows, nearest first.

    points (n, D), rows (m, D); a point that is also a row finds itself. Memory: a tile of distances.
    """
    found = []
    for _, a in tiles(points, block):
        best = a.new_full((len(a), k), torch.inf), a.new_zeros((len(a), k), dtype=torch.int64)
        for part, b in tiles(rows, block):
            squares = squared_distances(a, b).clamp_min_(0)  # (n', m')
            near = squares.topk(min(k, len(b)), dim=1, largest=False)
            values, order = torch.cat([best[0], near.values], 1).topk(k, dim=1, largest=False)
            best = values, torch.cat([best[1], near.indices + part.start], 1).gather(1, order)
        found.append(best)
    return tuple(map(torch.cat, zip(*found)))


def precision_recall(reference: Tensor, samples: Tensor, k: int = 3, block: int = BLOCK) -> tuple:
    """Share of samples near the reference, and of references near the samples (arXiv:1904.06991); (n, D).

    Near: no farther from some point of the other set than that point's k-th neighbour there. As ADM's
    evaluator, whose fp16 distances move the third decimal; here fp64. Raises ValueError for k or fewer rows.
    50,000 samples, 10,000 references, D 2,048: 12.7 TFLOP, 5 minutes of one CPU core; 1.3 GiB.
    """
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"{len(reference)} references and {len(samples)} samples; want more than {k} each")
    # k + 1: the first neighbour of a row is the row itself
    ref_radii, radii = (nearest(rows, rows, k + 1, block)[0][:, k] for rows in (reference, samples))
    near_ref, near_samples = (torch.zeros_like(r, dtype=torch.bool) for r in (radii, ref_radii))
    for mine, a in tiles(samples, block):
        for theirs, b in tiles(reference, block):
            squares = squared_distances(a, b).clamp_min_(0)
            near_ref[mine] |= (squares <= ref_radii[theirs]).any(1)
            near_samples[theirs] |= (squares <= radii[mine, None]).any(0)
    return near_ref.double().mean().item(), near_samples.double().mean().item()


def closer_than_training(train: Tensor, points: Tensor, own: Tensor | None = None, k: int = 1) -> tuple:
    """Compare each point's distance to its nearest training row with that row's distance to its own nearest.

    train (n, D), points (m, D); own (n,): nearest(train, train, 2)[0][:, 1], if at hand. Returns (ratio (m,),
    indices (m, k) of the nearest rows). A ratio below 1 is what arXiv:2102.08921 calls not authentic: about
    half of unseen images have it, all copies do (also of rows that are there twice: their ratio is 0).
    """
    own = nearest(train, train, 2)[0][:, 1] if own is None else own
    squares, indices = nearest(points, train, k)
    # below this a squared distance of rows x is the rounding of |x|^2 - 2 x.y + |y|^2: the rows are equal
    noise = 1e-12 * points.double().square().sum(1)
    squares = torch.where(squares[:, 0] < noise, 0, squares[:, 0])
    return (squares / own[indices[:, 0]].maximum(noise).clamp_min(1e-300)).sqrt(), indices


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
