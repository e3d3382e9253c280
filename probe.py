"""How much can a linear classifier read from a latent? Attributes (F1), classes; and the shape of the space.

    python probe.py --data data/celeba --vae out/a/vae out/b/vae     # side by side: flattened, pooled latents
    python probe.py --data shapes --vae out/send/vae --mapper        # also the tokens of the mapper
    python probe.py --data shapes --sit out/sit --block 4 --t 0.3    # also those of a SiT
    python probe.py --data pictures/train --classes                     # a folder of class folders
    python probe.py --report out/*/vae                               # a table of all measures, a PCA picture

Protocol: posterior means, standardised by the train split; logistic regression fitted on the train split; one
weight decay for all attributes, chosen on the validation split; the test split is used once.
Read: encode -> fit_linear_probe -> attribute_scores, latent_measures -> probe_set -> main.
Letters: n images, F features, A attributes; latents z (n, C, h, w), tokens (n, N, D).
"""
import math
from itertools import compress, product
from pathlib import Path

import common  # before torch

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import logsumexp, softmax
from scipy.stats import entropy, gaussian_kde, mannwhitneyu, norm, rankdata
from torch import Tensor

import checkpoints
import data
from attributes import SHAPES_TRAIN, SPLITS, open_attributes
from common import natural, positive
from mapper import Teacher
from sit import interpolate

WEIGHT_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4)  # in the order of fitting: each fit starts from the one before
CHUNK = 2**22     # features that are standardised at a time: 16 MiB, about the size of a cache
HELD = 2**29      # up to so many train features are held as float32 while fitting (2 GiB), more as float16
HISTORY = 2**28   # numbers in the history of L-BFGS, at most: 2 GiB with their differences


# features

@torch.no_grad()
def encode(images, indices, nets: dict, args, device, store) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Return (index (n,), {name: features (n, F)}) of a split, on the CPU, as the floating type `store`.

    nets: {"vae"}, and if they are probed "mapper", "sit" and "statistics", the (mean, std) of its latents.
    index: positions of the images that were read. Another image may have taken the place of a damaged one.
    """
    index, features, dtype = [], {}, common.resolve_dtype(args.dtype, device)
    for batch in data.eval_loader(images, args.batch_size, workers=args.workers, indices=indices):
        with common.autocast(device, dtype):
            z = nets["vae"].encode(data.to_float(batch["images"].to(device))).mode().float()
        parts = {"flat": z.flatten(1), "pooled": z.mean((2, 3))}
        if "mapper" in nets:
            parts["mapper"] = nets["mapper"].clean(z).mean(1)
        if "sit" in nets:
            # the noise of an image depends on --seed and its number, not on its batch
            eps = common.noise_for(z.shape[1:], batch["index"].tolist(), device, args.seed, "probe")
            t = z.new_full((len(z),), args.t)
            z_t, _ = interpolate(data.normalize_latents(z, *nets["statistics"]), eps, t)
            # always the null label: the true label would leak the answer
            y = torch.full((len(z),), nets["sit"].null_label, device=device)
            parts["sit"] = nets["sit"].features(z_t, t, y, args.block).mean(1)
        for name, part in parts.items():
            features.setdefault(name, []).append(part.to(store).cpu())
        index.append(batch["index"])
    return torch.cat(index).numpy(), {name: torch.cat(parts) for name, parts in features.items()}


# the fit

def fit_linear_probe(train_x, train_y, val_x, val_y, test_x, weight_decays=WEIGHT_DECAYS, max_iter=100,
                     device="cpu"):
    """Fit logistic regression by L-BFGS in fp32; return its logits (n, A) on test_x.

    x (n, F) of any floating type, standardised here by the train split (a batch norm without affine part, in
    eval mode). y (n, A) of 0 and 1: a binary problem per column. y (n,) int64: one problem of all classes.
    Minimised is the mean over images of the loss, plus d / 2 |W|^2. The weight decay d is the one of the best
    macro F1, or accuracy, on the validation split. max_iter: iterations of L-BFGS for each weight decay.
    Returns {"logits", "weight_decay", "val_score"}. Raises ValueError for features that are not finite.
    """
    train_x, train_y, val_x, val_y, test_x = map(torch.as_tensor, (train_x, train_y, val_x, val_y, test_x))
    mean, std = (statistic.to(device) for statistic in statistics(train_x))
    held = torch.float32 if train_x.numel() <= HELD else torch.float16
    x = torch.cat([standardise(part, mean, std).to(held) for part in chunks(train_x)])
    outputs = train_y.shape[1] if train_y.ndim == 2 else int(max(train_y.max(), val_y.max())) + 1
    weight = torch.zeros(outputs, x.shape[1], device=device, requires_grad=True)
    bias, fits = torch.zeros(outputs, device=device, requires_grad=True), []
    for decay in weight_decays:
        minimise(weight, bias, x, train_y.to(device), decay, max_iter)
        guess, logits = (logits_of(part, mean, std, weight, bias) for part in (val_x, test_x))
        score = class_accuracy(guess, val_y) if val_y.ndim == 1 else f1_scores(guess, val_y)["macro_f1"]
        fits.append({"logits": logits, "weight_decay": decay, "val_score": score})
    return max(fits, key=lambda fit: fit["val_score"])


def minimise(weight, bias, x, y, decay, max_iter):
    """Move weight (A, F) and bias (A,) to the minimum of the penalised loss of standardised features x."""
    parts, history = chunks(x), min(100, max(10, HISTORY // weight.numel()))
    # attributes are problems of their own: their losses add up
    loss_of = F.cross_entropy if y.ndim == 1 else F.binary_cross_entropy_with_logits
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iter, history_size=history,
                                  tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = decay / 2 * weight.square().sum()
        total.backward()
        for part, targets in zip(parts, y.split(len(parts[0]))):  # their gradients add up
            targets = targets if y.ndim == 1 else targets.float()
            loss = loss_of(F.linear(part.float(), weight, bias), targets, reduction="sum") / len(y)
            loss.backward()
            total = total.detach() + loss.detach()
        return total
    optimizer.step(closure)


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Return parts of the rows of x (n, F), about CHUNK numbers each."""
    return x.split(max(1, CHUNK // x.shape[1]))


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (F,) of the rows of x, summed in fp64; 1 for a constant feature."""
    mean = sum(part.cpu().double().sum(0) for part in chunks(x)) / len(x)
    squares = sum((part.cpu().double() - mean).square().sum(0) for part in chunks(x))
    std = (squares / max(len(x) - 1, 1)).sqrt()
    return mean.float(), torch.where(std > 1e-8, std, 1).float()


def standardise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (x - mean) / std in fp32, on the device of the statistics. ValueError if it is not finite."""
    x = (x.to(mean.device).float() - mean) / std
    if not x.isfinite().all():
        raise ValueError("features are not finite; check the network that made them")
    return x


@torch.no_grad()
def logits_of(x: Tensor, mean, std, weight, bias) -> Tensor:
    """Return the logits (n, A) of features x on the CPU."""
    return torch.cat([F.linear(standardise(part, mean, std), weight, bias).cpu() for part in chunks(x)])


# scores

def f1_scores(logits: Tensor, targets: Tensor) -> dict:
    """Return {"macro_f1", "micro_f1", "per_attribute": list of A} at probability 0.5.

    targets (n, A) of 0 and 1. An attribute without a positive has F1 nan and stays out of both means.
    """
    guess, truth = logits > 0, targets.bool()
    marked = (guess.sum(0) + truth.sum(0)).double().where(truth.any(0), torch.nan)
    hits = 2 * (guess & truth).sum(0).double()
    micro, f1 = hits.sum() / marked.nansum(), hits / marked
    return {"macro_f1": f1.nanmean().item(), "micro_f1": micro.item(), "per_attribute": f1.tolist()}


def auc_score(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the share of (positive, negative) pairs of one attribute (n,) in the right order; a tie is half.

    By ranks (Mann-Whitney); there must be positives and negatives.
    """
    above, below = (logits[targets == k].astype(float) for k in (1, 0))
    return float(mannwhitneyu(above, below, method="asymptotic").statistic / (len(above) * len(below)))


def top_recall(logits: Tensor, targets: Tensor, k=5) -> float:
    """Return the share of positive targets (n, A) among the k highest logits of their image (DeepFashion)."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (targets.gather(1, top).sum() / targets.sum()).item()


def class_accuracy(logits: Tensor, labels) -> float:
    """Return the share of images whose highest logit (n, K) is that of their label (n,)."""
    return (logits.argmax(1) == torch.as_tensor(labels)).double().mean().item()


def attribute_scores(logits: Tensor, train_y, val_y, test_y, names: list[str]) -> dict:
    """Return all scores of logits (n, A) on the test split; y (n, A) arrays of 0 and 1.

    "groups": mean F1 of the attributes with the same name before "=". An attribute without a positive in one
    of the splits, or without a negative in the test split, is in "left_out" and in no mean. Raises ValueError
    if no attribute is left.
    """
    shares = [np.asarray(y).mean(0) for y in (train_y, val_y, test_y)]
    usable = (np.min(shares, axis=0) > 0) & (shares[2] < 1)
    if not usable.any():
        raise ValueError(f"none of {len(names)} attributes has positives in all splits; want more images")
    names, left_out = (list(compress(names, use)) for use in (usable, ~usable))
    logits, targets = logits[:, usable], torch.as_tensor(test_y)[:, usable]
    scores, attributes, groups = f1_scores(logits, targets), {}, {}
    for name, f1, x, y in zip(names, scores["per_attribute"], logits.T.numpy(), targets.T.numpy()):
        attributes[name] = {"f1": f1, "share": float(y.mean()), "auc": auc_score(x, y)}
        groups.setdefault(name.split("=")[0], []).append(f1)
    return scores | {"per_attribute": attributes, "left_out": left_out,
                     "auc": float(np.mean([row["auc"] for row in attributes.values()])),
                     "top5_recall": top_recall(logits, targets),
                     "groups": {name: float(np.mean(values)) for name, values in groups.items()}}


# measures of a latent space

def latent_measures(z, most=4000, count=2000) -> dict:
    """Return measures of latents z (n, C, h, w), array or tensor; of every so many-th, if over `most`.

    channel_std_min, channel_std_max: the smallest and largest of the channels. effective_rank: exp of the
    entropy of the shares of variance along the principal directions of the tokens. density_gini: Gini index
    of a kernel density in two dimensions, 0 = uniform (VA-VAE, arXiv:2501.01423, by t-SNE; here by PCA).
    gmm_nll: fit of a Gaussian mixture (MAETok, arXiv:2502.03444), held-out nats per whitened dimension; 1.42
    for a Gaussian, lower for clusters; without directions in which the latents do not vary (collapsed
    channels). The last two are of `count` random tokens.
    """
    z = np.asarray(z[::math.ceil(len(z) / most)], dtype=np.float64)
    tokens = z.transpose(0, 2, 3, 1).reshape(-1, z.shape[1])  # (n h w, C)
    values, vectors = np.linalg.eigh(np.cov(tokens, rowvar=False).reshape(z.shape[1], -1))
    values = np.maximum(values, 1e-12)  # rising
    some = tokens[np.random.default_rng(0).permutation(len(tokens))[:count]]
    white = (some - tokens.mean(0)) @ vectors / np.sqrt(values)
    varying, half = white[:, values > 1e-6 * values[-1]], len(some) // 2
    density = gaussian_kde(white[:, -2:].T)(white[:, -2:].T)
    gini = (2 * rankdata(density) - len(some) - 1) @ density / (len(some) * density.sum())
    return {"effective_rank": float(np.exp(entropy(values))), "density_gini": float(gini),
            "gmm_nll": gmm_nll(varying[:half], varying[half:]),
            "channel_std_min": float(tokens.std(0).min()), "channel_std_max": float(tokens.std(0).max())}


def gmm_nll(train: np.ndarray, test: np.ndarray, components=10, steps=50, seed=0):
    """Return the mean negative log-likelihood of test (n, D), nats / D, under a diagonal mixture (by EM)."""
    means = train[np.random.default_rng(seed).choice(len(train), components, replace=False)]
    variances, weights = np.ones_like(means), np.full(components, 1 / components)

    def joint(x):  # log of weight times density, (n, components)
        return np.log(weights) + norm.logpdf(x[:, None], means, np.sqrt(variances)).sum(2)
    for _ in range(steps):
        share = softmax(joint(train), axis=1)
        count = share.sum(0) + 1e-9
        weights, means = count / count.sum(), share.T @ train / count[:, None]
        # the floor keeps a component from collapsing onto one token
        variances = np.maximum(share.T @ train**2 / count[:, None] - means**2, 1e-2)
    return float(-logsumexp(joint(test), axis=1).mean() / test.shape[1])


# one VAE on one data set

def probe_set(splits: dict, nets: dict, with_attributes, args, device) -> dict:
    """Return {name of features: scores, "latent": measures} of a VAE on the splits of open_attributes."""
    index, features = {}, {}
    for split, (images, indices) in splits.items():
        # float16 halves the largest part: CelebA's train split, 162,770 x 8,192 features, takes 2.7 GB
        store = torch.float16 if split == "train" else torch.float32
        index[split], features[split] = encode(images, indices, nets, args, device, store)
    result = {name: {"features": x.shape[1]} for name, x in features["test"].items()}
    targets = ["attributes"] * with_attributes + ["labels"] * (len(images.class_names) > 1)
    for name, target in product(result, targets):
        x = [features[split][name] for split in SPLITS]
        y = [getattr(splits[split][0], target)[index[split]] for split in SPLITS]
        fit = fit_linear_probe(x[0], y[0], x[1], y[1], x[2], max_iter=args.max_iter, device=device)
        logits, decay = fit["logits"], fit["weight_decay"]
        if target == "labels":
            result[name] |= {"class_accuracy": class_accuracy(logits, y[2]), "class_weight_decay": decay}
        else:
            result[name] |= attribute_scores(logits, *y, images.attribute_names) | {"weight_decay": decay}
    flat, side = features["test"]["flat"], images.image_size // nets["vae"].stride
    return result | {"latent": latent_measures(flat.view(len(flat), -1, side, side))}


# table and picture

def table(results, labels) -> str:
    """Return the single numbers of all VAEs as a Markdown table: one column per VAE."""
    rows = {"": labels, "---": ["---"] * len(labels)}
    for part in ("flat", "pooled", "mapper", "sit", "latent"):
        for key, value in results[0].get(part, {}).items():
            if isinstance(value, float):
                rows[f"{part}: {key}"] = [f"{result[part][key]:.4f}" for result in results]
    for group in results[0]["flat"].get("groups", {}):
        rows[f"flat: F1 of {group}"] = [f"{result['flat']['groups'][group]:.4f}" for result in results]
    return "\n".join(f"| {' | '.join([name, *cells])} |" for name, cells in rows.items())


def colour_tokens(tokens: Tensor, size) -> Tensor:
    """Colour tokens (B, N, D) of a square grid by their first three principal components over all of them.

    Returns images, uint8 (B, 3, size, size), in which every token is a square.
    """
    flat = tokens.detach().cpu().double().flatten(0, 1)
    axes = torch.linalg.eigh(flat.T.cov()).eigenvectors[:, -3:].flip(1)  # (D, 3)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # the sign is arbitrary: fix it
    colour = flat @ axes
    low, high = torch.quantile(colour, colour.new_tensor([0.02, 0.98]), dim=0)
    colour = ((colour - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    colour = (255 * colour).round().to(torch.uint8).view(len(tokens), math.isqrt(tokens.shape[1]), -1, 3)
    return F.interpolate(colour.permute(0, 3, 1, 2), size)


@torch.no_grad()
def draw_pca(path, vaes, labels, images: Tensor, teacher_weights, device) -> list[str]:
    """Write images uint8 (B, 3, H, W), below them latents, mapper and teacher tokens, by `colour_tokens`.

    Returns the names of these strips.
    """
    x, size = data.to_float(images.to(device)), images.shape[-1]
    strips, teachers = {"images": images}, {}
    for vae_path, label in zip(vaes, labels):
        z, own = checkpoints.load_vae(vae_path).to(device).encode(x).mode(), checkpoints.read_own(vae_path)
        strips[f"{label}: latent"] = colour_tokens(z.flatten(2).mT, size)
        if own.get("mapper") is not None:
            tokens = checkpoints.load_mapper(vae_path).to(device).clean(z)
            strips[f"{label}: mapper"] = colour_tokens(tokens, size)
            teachers[own["teacher"]] = math.isqrt(tokens.shape[1])
    for name, grid in teachers.items():
        strips[f"teacher {name}"] = colour_tokens(Teacher(name, grid, teacher_weights).to(device)(x), size)
    data.save_grid(path, torch.cat(list(strips.values())), columns=len(images), scale=max(1, 96 // size))
    return list(strips)


# command

def parse_args(argv=None):
    parser = common.new_parser(__doc__)
    add = parser.add_argument
    add("--data", default="shapes", help="'shapes', or a folder as attributes.py says")
    add("--image-size", type=positive, help="pixels; default: the first VAE's, else 256, or 32 for 'shapes'")
    add("--num-train", type=natural, default=0, help=f"images to fit on; 0 = all, {SHAPES_TRAIN} of 'shapes'")
    add("--classes", action="store_true", help="probe class labels only")
    add("--batch-size", type=positive, default=64, help="images per forward")
    add("--workers", type=natural, default=4, help="processes that read images")
    add("--vae", nargs="+", help="files, folders (newest), or hf://...; default: that of --sit, or out/vae")
    add("--report", nargs="+", metavar="VAE", help="as --vae; also writes a table and a PCA picture")
    add("--mapper", action="store_true", help="also probe the mean of the mapper's tokens, without noise")
    add("--sit", help="also probe the mean token of this SiT, ours or published: as --vae")
    add("--latent-stats", help="as in sample.py: statistics of the SiT's latents; default: those in its file")
    add("--block", type=positive, default=4, help="SiT block after which tokens are taken, counted from 1")
    add("--t", type=float, default=0.3, help="noise time of the SiT's input, 0 = clean")
    add("--max-iter", type=positive, default=100, help="iterations of L-BFGS for each weight decay, at most")
    add("--teacher-weights", help="local weights of the teacher in the picture; default: the hub's")
    add("--out", default="out/probe.json", help="file of all numbers, those of each attribute too")
    common.add_run_flags(parser)
    parser.set_defaults(dtype="fp32")
    return parser.parse_args(argv)


def open_sit(args) -> tuple:
    """Return (SiT, content of its file) of --sit; set --vae to the one that it names, if none is given."""
    args.sit = checkpoints.resolve(args.sit)
    sit, sit_file = checkpoints.read_sit(args.sit)
    if sit.null_label is None:
        raise ValueError(f"--sit {args.sit} has no null label, and the true one would leak the answer")
    if not args.vae and not args.report:
        if sit_file.get("format") != checkpoints.SIT:
            raise ValueError(f"--sit {args.sit} is published and does not name its VAE: give --vae FILE")
        args.vae = [sit_file["latents"]["vae"]]
    return sit, sit_file


def main(argv=None):
    args = parse_args(argv)
    proc = common.setup(args.device)
    # L-BFGS compares losses that TF32 cannot tell apart.
    common.forbid_tf32()
    if not proc.main:  # one process does it all
        return None
    if not 0 <= args.t <= 1:
        raise ValueError(f"--t {args.t} is outside 0..1, where 0 is clean and 1 is noise")
    checkpoints.check_out(args.out)

    # networks
    sit, sit_file = open_sit(args) if args.sit else (None, None)
    labels = args.report or args.vae or ["out/vae"]
    paths = [checkpoints.resolve(path) for path in labels]
    trained_on = checkpoints.read_own(paths[0]).get("args", {}).get("image_size")
    args.image_size = args.image_size or trained_on or data.default_size(args.data)

    # data
    splits = open_attributes(args.data, args.image_size, args.num_train, args.seed)
    counts = {split: len(indices) for split, (_, indices) in splits.items()}
    print(f"linear probe of {args.data} at {args.image_size} px: {counts} images")
    images, indices = splits["test"]
    with_attributes = bool(images.attribute_names) and not args.classes
    if args.classes and len(images.class_names) == 1:
        raise ValueError(f"{args.data}: no classes in it; want a folder per class")

    # picture
    base = Path(args.out).with_suffix("")
    if args.report:
        shown = images.batch(indices[::(len(indices) + 11) // 12])["images"]  # evenly over all classes
        strips = draw_pca(f"{base}_pca.png", paths, labels, shown, args.teacher_weights, proc.device)

    # probes
    results = []
    for path in paths:
        nets = {"vae": checkpoints.load_vae(path).to(proc.device)}
        result = {"vae": str(path), "vae_hash": checkpoints.state_hash(nets["vae"].state_dict())}
        if args.mapper:
            nets["mapper"] = checkpoints.load_mapper(path).to(proc.device)
        if args.sit:
            nets["sit"] = sit.to(proc.device)
            *nets["statistics"], _ = checkpoints.statistics_for(
                args.sit, sit_file, result["vae_hash"], sit.config.in_channels, args.latent_stats)
        results.append(result | probe_set(splits, nets, with_attributes, args, proc.device))

    # report
    text = table(results, labels)
    print(text)
    if left_out := results[0]["flat"].get("left_out"):
        print(f"left out, without positives or negatives in a split: {', '.join(left_out)}")
    report = {"vaes": results, "labels": labels, "args": vars(args), "versions": common.versions(),
              "images": counts, "images_hash": {name: pair[0].images_hash for name, pair in splits.items()}}
    data.write_facts(args.out, report)
    if args.report:
        text += f"\n\n![]({base.name}_pca.png)\n\nFrom the top: {', '.join(strips)}.\n"
        Path(f"{base}_report.md").write_text(text)
    return report


if __name__ == "__main__":
    common.cli(main)
