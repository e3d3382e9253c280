"""What probe.py measures, numbers in, numbers out: linear probes, their scores, the shape of a latent space.

    fit = fit_linear_probe(train_x, train_y, val_x, val_y, test_x)   # arrays, tensors, memory-mapped files
    f1_scores(fit["logits"], test_y)["macro_f1"]
    latent_measures(z)["effective_rank"]

Letters: n rows, F features, A attributes; latents z (n, C, h, w), their tokens (n, N, C).
"""
import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import logsumexp
from scipy.stats import gaussian_kde, rankdata
from torch import Tensor

WEIGHT_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4)  # in the order of fitting: each starts from the weights before
CHUNK = 2**22  # features that are standardised at a time: 16 MiB, near what a cache holds
MEASURED = 4000  # images whose latents are measured, at most
HISTORY = 2**28  # numbers in the history of L-BFGS, at most: 2 GiB with their differences


# the fit

def fit_linear_probe(train_x, train_y, val_x, val_y, test_x, weight_decays=WEIGHT_DECAYS, max_iter: int = 100,
                     device="cpu", memory: float = 2.0) -> dict:
    """Fit logistic regression by L-BFGS, fp32; return logits (n, A) of test_x, and how they came about.

    x (n, F), any float type, in memory or mapped; standardised here with the train statistics (a batch norm
    without affine part, in eval mode). y (n, A) of 0 and 1: a binary problem per column; y (n,)
    int64: one problem of all classes. Minimised is loss + d / 2 |W|^2 over all rows, with the weight decay d
    of the best macro F1 or accuracy on the validation split. Train features beyond `memory` GiB are read
    anew for each evaluation of the loss; the minimum is the same.
    Returns {"logits", "val_logits", "weight_decay", "val_score", "evaluations": of the loss, all in all}.
    Raises ValueError for sizes that do not fit, or NaN.
    """
    if len(train_x) != len(train_y) or len(val_x) != len(val_y):
        raise ValueError(f"{len(train_x)} train and {len(val_x)} validation features for {len(train_y)} and "
                         f"{len(val_y)} targets; want as many of each")
    train_y, val_y = torch.as_tensor(train_y), torch.as_tensor(val_y)
    statistics, width, classes = _statistics(train_x), train_x.shape[1], train_y.ndim == 1
    outputs = int(max(train_y.max(), val_y.max())) + 1 if classes else train_y.shape[1]
    weight = torch.zeros(outputs, width, device=device, requires_grad=True)
    bias = torch.zeros(outputs, device=device, requires_grad=True)
    history = min(100, max(10, HISTORY // weight.numel()))
    fits = 4 * len(train_x) * width <= memory * 2**30
    kept = list(_chunks(train_x, statistics, device)) if fits else None
    targets, best, evaluations = train_y.to(device), None, 0
    for decay in weight_decays:
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iter, history_size=history,
                                      tolerance_change=1e-6, line_search_fn="strong_wolfe")

        def closure():
            nonlocal evaluations
            evaluations += 1
            optimizer.zero_grad()
            total = decay / 2 * weight.square().sum()
            total.backward()
            for rows, x in kept or _chunks(train_x, statistics, device):  # gradients add up
                loss = _loss(F.linear(x, weight, bias), targets[rows]) / len(targets)
                loss.backward()
                total = total.detach() + loss.detach()
            return total
        optimizer.step(closure)
        logits = _logits(val_x, statistics, weight, bias)
        score = class_scores(logits, val_y)["class_accuracy"] if classes else \
            f1_scores(logits, val_y)["macro_f1"]
        if best is None or score > best["val_score"]:
            found = weight.detach().clone(), bias.detach().clone()
            best = {"val_score": score, "weight_decay": decay, "val_logits": logits}
    return best | {"logits": _logits(test_x, statistics, *found), "evaluations": evaluations}


def _loss(logits, targets):
    """Sum over rows, and over attributes, which are problems of their own."""
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets, reduction="sum")
    return F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="sum")


def _parts(x):
    """Yield (slice, copy of those rows of x in fp32), CHUNK features at a time; mapped files stay on disk."""
    step = max(1, CHUNK // x.shape[1])
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        yield rows, x[rows].to(torch.float32, copy=True) if isinstance(x, Tensor) else \
            torch.from_numpy(np.array(x[rows], dtype=np.float32))


def _statistics(x):
    """Return mean and standard deviation (F,) of rows, summed in fp64. ValueError if they are not finite."""
    mean = sum(part.cpu().double().sum(0) for _, part in _parts(x)) / len(x)
    square = sum((part.cpu().double() - mean).square().sum(0) for _, part in _parts(x))
    std = (square / max(len(x) - 1, 1)).sqrt()
    if not (mean.isfinite() & std.isfinite()).all():
        raise ValueError("features are not finite; check the network that made them")
    return mean.float(), torch.where(std > 1e-8, std, 1).float()  # a constant feature stays 0


def _chunks(x, statistics, device):
    """Yield (slice, standardised rows on the device)."""
    mean, std = (value.to(device) for value in statistics)
    for rows, part in _parts(x):
        yield rows, part.to(device).sub_(mean).div_(std)


@torch.no_grad()
def _logits(x, statistics, weight, bias):
    """Return logits (n, A) on the CPU. ValueError if they are not finite."""
    logits = torch.cat([F.linear(part, weight, bias).cpu() for _, part in
                        _chunks(x, statistics, weight.device)])
    if not logits.isfinite().all():
        raise ValueError("features are not finite; check the network that made them")
    return logits


# scores

def f1_scores(logits: Tensor, targets: Tensor, threshold=0.0) -> dict:
    """Return {"macro_f1", "micro_f1", "per_attribute": list of A} of logits > threshold (probabilities: 0.5).

    targets (n, A) of 0 and 1; threshold: a number or (A,). An attribute without a positive has F1 nan and
    stays out of both means.
    """
    guess, truth = logits > threshold, targets.bool()
    present = truth.any(0)
    hits, marked = (guess & truth).sum(0).double(), (guess.sum(0) + truth.sum(0)).double()
    f1 = torch.where(present, 2 * hits / marked.clamp_min(1), torch.nan)
    return {"macro_f1": f1[present].mean().item(), "per_attribute": f1.tolist(),
            "micro_f1": (2 * hits[present].sum() / marked[present].sum()).item()}


def best_threshold(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the threshold of the highest F1 on one attribute's rows (n,), among all that part two logits.

    Halfway between neighbours; the highest of several. 0, which is a probability of 0.5, without a positive.
    """
    if not targets.any():
        return 0.0
    order = np.argsort(-logits, kind="stable")
    x, hits = logits[order].astype(np.float64), np.cumsum(targets[order], dtype=np.int64)
    f1 = 2 * hits / (np.arange(1, len(x) + 1) + hits[-1])  # if the first k + 1 are marked
    f1[:-1][x[:-1] == x[1:]] = -1  # equal logits cannot be parted
    k = f1.argmax()
    return float((x[k] + x[k + 1]) / 2 if k + 1 < len(x) else x[k] - 1)


def auc_score(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the share of (positive, negative) pairs of one attribute in the right order; ties count half.

    By ranks (Mann-Whitney); nan without a positive or without a negative.
    """
    positives, negatives = int(targets.sum()), int((1 - targets).sum())
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(logits)[targets.astype(bool)].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))


def balanced_accuracy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean of the shares of positives and of negatives (n,) on their side of 0; nan without."""
    right, truth = (logits > 0) == targets, targets.astype(bool)
    if truth.all() or not truth.any():
        return float("nan")
    return float((right[truth].mean() + right[~truth].mean()) / 2)


def top_recall(logits: Tensor, targets: Tensor, k: int = 5) -> float:
    """Share of the positive targets (n, A) that are among their image's k highest logits (DeepFashion)."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (targets.gather(1, top).sum() / targets.sum()).item()


def class_scores(logits: Tensor, labels: Tensor) -> dict:
    """Return accuracy, and balanced accuracy: its mean over the classes that occur. labels (n,)."""
    right = (logits.argmax(1) == labels).double()
    return {"class_accuracy": right.mean().item(),
            "class_balanced_accuracy": np.mean([right[labels == k].mean().item() for k in labels.unique()])}


def attribute_scores(fit: dict, train_y, val_y, test_y, names: list[str]) -> dict:
    """Return all scores of a fit on its test split; y: (n, A) arrays of 0 and 1; names of the attributes.

    Keys ending in _tuned: at thresholds chosen on the validation split, else at probability 0.5. "groups":
    mean F1 of those with the same name before "=". An attribute without a positive in one of the splits is
    in "left_out" with the reason and in no mean; one without a negative in the test split has neither AUC
    nor balanced accuracy. Raises ValueError if no attribute is left.
    """
    splits = {"train": train_y, "validation": val_y, "test": test_y}
    left_out = {name: f"no positive in the {split} split" for split, y in reversed(splits.items())
                for name, positive in zip(names, np.asarray(y).any(0)) if not positive}
    kept = [i for i, name in enumerate(names) if name not in left_out]
    if not kept:
        raise ValueError(f"none of {len(names)} attributes has a positive in the train, validation and test "
                         "split; want more images")
    logits, val_logits = fit["logits"][:, kept], fit["val_logits"][:, kept]
    y, val_y = (np.asarray(values)[:, kept].astype(np.uint8) for values in (test_y, val_y))
    columns = [(logits[:, i].numpy(), y[:, i]) for i in range(len(kept))]
    thresholds = [best_threshold(val_logits[:, i].numpy(), val_y[:, i]) for i in range(len(kept))]
    targets = torch.from_numpy(y)
    at_half, tuned = f1_scores(logits, targets), f1_scores(logits, targets, torch.tensor(thresholds).double())
    measures = {"f1": at_half["per_attribute"], "f1_tuned": tuned["per_attribute"], "threshold": thresholds,
                "balanced_accuracy": [balanced_accuracy(*column) for column in columns],
                "auc": [auc_score(*column) for column in columns], "share": y.mean(0).tolist()}
    table = {names[i]: {key: values[k] for key, values in measures.items() if values[k] == values[k]}
             for k, i in enumerate(kept)}
    groups = {}
    for name, row in table.items():
        groups.setdefault(name.split("=")[0], []).append(row["f1"])
    mean = {key: float(np.mean([row[key] for row in table.values() if key in row] or [np.nan]))
            for key in ("balanced_accuracy", "auc")}
    return {"macro_f1": at_half["macro_f1"], "micro_f1": at_half["micro_f1"],
            "macro_f1_tuned": tuned["macro_f1"], "micro_f1_tuned": tuned["micro_f1"],
            **{key: value for key, value in mean.items() if value == value},
            "top5_recall": top_recall(logits, targets), "weight_decay": fit["weight_decay"],
            "groups": {name: float(np.mean(values)) for name, values in groups.items()},
            "per_attribute": table, "left_out": left_out,
            "without_negatives": [name for name, row in table.items() if "auc" not in row]}


# measures of a latent space

def latent_measures(z, seed: int = 0, count: int = 2000) -> dict:
    """Return measures of latents z (n, C, h, w), array or tensor; of MEASURED of them, by seed, if more.

    channel_std: of each channel, with the smallest and largest. spectrum: share of variance along each
    principal direction of the tokens, falling; effective_rank: exp of its entropy. spatial_power: mean power
    of the centred channels at 0, 1, 2 ... cycles per side (rounded radius, the share of a coefficient);
    high_frequency: share of it beyond half the highest frequency along a side.
    density_gini: Gini index of a kernel density in two dimensions, 0 = uniform (VA-VAE, arXiv:2501.01423, by
    t-SNE; here PCA). gmm_nll: fit of a Gaussian mixture (MAETok, arXiv:2502.03444), held-out nats per
    whitened dimension; 1.42 for a Gaussian, lower for clusters; without directions in which the latents do
    not vary (collapsed channels). Both are of `count` random tokens.
    """
    rng = np.random.default_rng(seed)
    images = np.sort(rng.permutation(len(z))[:MEASURED]) if len(z) > MEASURED else slice(None)
    z = np.asarray(z[images], dtype=np.float64)
    tokens = z.transpose(0, 2, 3, 1).reshape(-1, z.shape[1])  # (n h w, C)
    spread = tokens.std(0)
    values, vectors = np.linalg.eigh(np.cov(tokens, rowvar=False).reshape(z.shape[1], -1))
    values = np.maximum(values, 1e-12)
    share, rows = values / values.sum(), np.random.default_rng(seed).permutation(len(tokens))[:count]
    white = (tokens[rows] - tokens.mean(0)) @ vectors / np.sqrt(values)  # in the order of rising variance
    varying = white[:, values > 1e-6 * values[-1]]
    density = np.sort(gaussian_kde(white[:, -2:].T)(white[:, -2:].T))
    rank, half = np.arange(1, len(rows) + 1), len(rows) // 2
    power, high = spatial_power(z - tokens.mean(0)[:, None, None])
    return {"channel_std_min": spread.min(), "channel_std_max": spread.max(),
            "effective_rank": np.exp(-(share * np.log(share)).sum()), "high_frequency": high,
            "density_gini": (2 * rank - len(rows) - 1) @ density / (len(rows) * density.sum()),
            "gmm_nll": gmm_nll(varying[:half], varying[half:]), "channel_std": spread.tolist(),
            "spectrum": share[::-1].tolist(), "spatial_power": power}


def spatial_power(z: np.ndarray) -> tuple[list[float], float]:
    """Return the radial power spectrum of z (n, C, h, w) and the share beyond half the Nyquist frequency."""
    power = sum((np.abs(np.fft.fft2(part)) ** 2).sum((0, 1)) for part in np.array_split(z, -(-len(z) // 64)))
    share = power / max(power.sum(), 1e-300)  # (h, w)
    h, w = share.shape
    radius = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w))  # cycles per pixel, 0.5 = Nyquist
    cycles = np.rint(radius * max(h, w)).astype(int)
    bands = [share[cycles == k].mean() for k in range(max(h, w) // 2 + 1)]
    return [float(value) for value in bands], float(share[radius > 0.25].sum())


def gmm_nll(train: np.ndarray, test: np.ndarray, components: int = 10, steps: int = 50, seed: int = 0):
    """Mean negative log-likelihood of test (n, D), nats / D, under a diagonal mixture fitted by EM."""
    means = train[np.random.default_rng(seed).choice(len(train), components, replace=False)]
    variances, weights = np.ones_like(means), np.full(components, 1 / components)

    def joint(x):  # log of weight times density, (n, components)
        squares = ((x[:, None] - means) ** 2 / variances + np.log(2 * np.pi * variances)).sum(2)
        return np.log(weights) - squares / 2
    for _ in range(steps):
        log_p = joint(train)
        share = np.exp(log_p - logsumexp(log_p, axis=1, keepdims=True))
        count = share.sum(0) + 1e-9
        weights, means = count / count.sum(), share.T @ train / count[:, None]
        # the floor keeps a component from collapsing onto one token
        variances = np.maximum(share.T @ train**2 / count[:, None] - means**2, 1e-2)
    return float(-logsumexp(joint(test), axis=1).mean() / test.shape[1])


def pca_rgb(tokens: Tensor) -> np.ndarray:
    """Colour tokens (B, N, D) by their first three principal components over all of them: uint8 (B, N, 3)."""
    flat = tokens.double().flatten(0, 1)
    flat = flat - flat.mean(0)
    axes = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(1)  # (D, 3)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # the sign is arbitrary: fix it
    colour = flat @ axes
    low, high = torch.quantile(colour, colour.new_tensor([0.02, 0.98]), dim=0)
    colour = ((colour - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return (255 * colour).round().to(torch.uint8).view(*tokens.shape[:2], 3).numpy()
