"""Linear probes of latents: attribute F1 and class accuracy, beside other measures of a latent space.

    python probe.py --data shapes --vae out/plain/vae out/send/vae   # side by side: flattened, pooled latents
    python probe.py --data shapes --vae out/send/vae --mapper        # also the features of the mapper
    python probe.py --data shapes --sit out/sit --block 4 --t 0.3    # also those of a SiT, by the null label
    python probe.py --data pictures --classes                        # a folder of class folders

A folder's attributes.csv has a header (filename and names), then a line of file name and 0 or 1 an image.
Protocol: posterior means, standardised; logistic regression on the train split, the weight decay (one for all
attributes) chosen on the validation split, the test split used once. Letters: n images, F features, A
attributes; latents z (n, C, h, w), their tokens (n, N, C).
"""
import argparse
import csv
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import common
import data
from mapper import Mapper, MapperConfig, Teacher
from sit import interpolate, load_sit
from vae import load_vae

WEIGHT_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4)  # in the order of fitting: each starts from the weights before
SHAPES_TRAIN = 8000  # images of the embedded set to fit on; a quarter as many for validation


# probes

def fit_linear_probe(train_x: Tensor, train_y: Tensor, val_x: Tensor, val_y: Tensor, test_x: Tensor,
                     weight_decays=WEIGHT_DECAYS, max_iter: int = 100) -> dict:
    """Fit logistic regression by L-BFGS, fp32; return {"logits": of test_x, "weight_decay", "val_score"}.

    x (n, F), standardised here with the train statistics. y (n, A) of 0 and 1: a binary problem per column;
    y (n,) int64: one problem of all classes. Minimised is loss + d / 2 |W|^2, with the weight decay d of the
    best macro F1 or accuracy on the validation split. Raises ValueError for sizes that do not fit, or NaN.
    """
    if len(train_x) != len(train_y) or len(val_x) != len(val_y):
        raise ValueError(f"{len(train_x)} train and {len(val_x)} validation features for {len(train_y)} and "
                         f"{len(val_y)} targets; want as many of each")
    mean, std = train_x.float().mean(0), train_x.float().std(0)
    std = torch.where(std > 1e-8, std, 1)  # a constant feature stays 0
    train_x, val_x, test_x = ((x.float() - mean) / std for x in (train_x, val_x, test_x))
    if not train_x.isfinite().all():
        raise ValueError("features are not finite; check the network that made them")
    classes = train_y.ndim == 1
    outputs = int(max(train_y.max(), val_y.max())) + 1 if classes else train_y.shape[1]
    weight = train_x.new_zeros(outputs, train_x.shape[1]).requires_grad_()
    bias, best = train_x.new_zeros(outputs).requires_grad_(), None
    for decay in weight_decays:
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iter, tolerance_change=1e-6,
                                      line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            logits = F.linear(train_x, weight, bias)
            loss = F.cross_entropy(logits, train_y) if classes else \
                F.binary_cross_entropy_with_logits(logits, train_y.float(), reduction="sum") / len(logits)
            loss = loss + decay / 2 * weight.square().sum()
            loss.backward()
            return loss
        optimizer.step(closure)
        with torch.no_grad():
            logits = F.linear(val_x, weight, bias)
            scores = class_scores(logits, val_y) if classes else f1_scores(logits, val_y)
            score = scores["class_accuracy" if classes else "macro_f1"]
            if best is None or score > best["val_score"]:
                best = {"val_score": score, "weight_decay": decay, "logits": F.linear(test_x, weight, bias)}
    return best


def f1_scores(logits: Tensor, targets: Tensor, threshold: float = 0.0) -> dict:
    """Return {"macro_f1", "micro_f1", "per_attribute": list of A} of logits > threshold (probabilities: 0.5).

    targets (n, A) of 0 and 1. An attribute without a positive has F1 nan and stays out of both means.
    """
    guess, truth = logits > threshold, targets.bool()
    present = truth.any(0)
    hits, marked = (guess & truth).sum(0).double(), (guess.sum(0) + truth.sum(0)).double()
    f1 = torch.where(present, 2 * hits / marked.clamp_min(1), torch.nan)
    return {"macro_f1": f1[present].mean().item(), "per_attribute": f1.tolist(),
            "micro_f1": (2 * hits[present].sum() / marked[present].sum()).item()}


def top_recall(logits: Tensor, targets: Tensor, k: int = 5) -> float:
    """Share of the positive targets (n, A) that are among their image's k highest logits (DeepFashion)."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (targets.gather(1, top).sum() / targets.sum()).item()


def class_scores(logits: Tensor, labels: Tensor) -> dict:
    """Return accuracy, and balanced accuracy: its mean over the classes that occur. labels (n,)."""
    right = (logits.argmax(1) == labels).double()
    return {"class_accuracy": right.mean().item(),
            "class_balanced_accuracy": np.mean([right[labels == k].mean().item() for k in labels.unique()])}


def attribute_scores(logits: Tensor, targets: Tensor, names: list[str]) -> dict:
    """Return all scores of attributes by name; "groups": mean F1 of those with the same name before "="."""
    scores = f1_scores(logits, targets)
    f1 = dict(zip(names, scores.pop("per_attribute")))
    present = {name: value for name, value in f1.items() if value == value}
    groups = {}
    for name, value in present.items():
        groups.setdefault(name.split("=")[0], []).append(value)
    return {**scores, "top5_recall": top_recall(logits, targets), "per_attribute": present,
            "groups": {name: float(np.mean(values)) for name, values in groups.items()},
            "without_positives": sorted({*f1} - {*present})}


# other measures of a latent space

def latent_measures(z: Tensor, seed: int = 0, count: int = 2000) -> dict:
    """Return measures of latents z (n, C, h, w), the last two of `count` random tokens.

    Spread of the channels. effective_rank: exp(entropy of the covariance's spectrum). density_gini: Gini
    index of a kernel density in two dimensions, 0 = uniform (VA-VAE, arXiv:2501.01423, by t-SNE; here PCA).
    gmm_nll: fit of a Gaussian mixture (MAETok, arXiv:2502.03444), held-out nats per whitened dimension; 1.42
    for a Gaussian, lower for clusters.
    """
    from scipy.stats import gaussian_kde
    tokens = z.double().flatten(2).transpose(1, 2).flatten(0, 1).numpy()  # (n h w, C)
    spread = tokens.std(0)
    values, vectors = np.linalg.eigh(np.cov(tokens, rowvar=False).reshape(z.shape[1], -1))
    values = np.maximum(values, 1e-12)
    share, rows = values / values.sum(), np.random.default_rng(seed).permutation(len(tokens))[:count]
    white = (tokens[rows] - tokens.mean(0)) @ vectors / np.sqrt(values)  # in the order of rising variance
    density = np.sort(gaussian_kde(white[:, -2:].T)(white[:, -2:].T))
    rank, half = np.arange(1, len(rows) + 1), len(rows) // 2
    return {"channel_std_min": spread.min(), "channel_std_max": spread.max(),
            "effective_rank": np.exp(-(share * np.log(share)).sum()),
            "density_gini": (2 * rank - len(rows) - 1) @ density / (len(rows) * density.sum()),
            "gmm_nll": gmm_nll(white[:half], white[half:])}


def gmm_nll(train: np.ndarray, test: np.ndarray, components: int = 10, steps: int = 50, seed: int = 0):
    """Mean negative log-likelihood of test (n, D), nats / D, under a diagonal mixture fitted by EM."""
    from scipy.special import logsumexp
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


# images with attributes. A reader returns ({split: (data set, indices, attributes (n, A) or None)}, names).

def read_shapes(args):
    """The embedded set: train and validation images of its train split, test images of its val split."""
    num, size = args.num_train or SHAPES_TRAIN, args.image_size or 32
    train = data.Shapes(num + num // 4, 0, "train", size)
    test = data.open_dataset("shapes", size, split="val")
    rows = {"train": (train, np.arange(num)), "val": (train, np.arange(num, len(train))),
            "test": (test, np.arange(len(test)))}
    return {split: (d, i, d.attributes[i]) for split, (d, i) in rows.items()}, train.attribute_names


def read_folder(args):
    """A folder of images, perhaps with attributes.csv: 70 % train, 10 % validation, 20 % test, by seed 0."""
    dataset = data.ImageFolder(args.data, args.image_size or 256)
    n, table = len(dataset), Path(args.data) / "attributes.csv"
    names, attributes = read_attributes(table, dataset.files) if table.is_file() else ([], None)
    parts = np.split(np.random.default_rng(0).permutation(n), [7 * n // 10, 8 * n // 10])
    parts[0] = parts[0][:args.num_train or n]
    return {split: (dataset, part, None if attributes is None else attributes[part])
            for split, part in zip(("train", "val", "test"), parts)}, names


def read_attributes(path, files) -> tuple[list[str], np.ndarray]:
    """Return names and values (N, A) uint8 that a csv file gives to `files`; ValueError if it does not."""
    with open(path, newline="") as file:
        header, *lines = [line for line in csv.reader(file) if line]
    for line in lines:
        if len(line) != len(header) or not {*line[1:]} <= {"0", "1"}:
            raise ValueError(f"{path}: {','.join(line)}; want a file name and {len(header) - 1} times 0 or 1")
    values = {line[0]: line[1:] for line in lines}
    missing = [file for file in files if file not in values]
    if missing:
        raise ValueError(f"{path}: no line for {len(missing)} of {len(files)} images, such as {missing[0]}")
    return header[1:], np.array([values[file] for file in files]).astype(np.uint8)


READERS = {"shapes": read_shapes, "folder": read_folder}


# features

def load_mapper(path) -> Mapper:
    """Return the mapper that was trained with a VAE, eval mode. Raises ValueError if there was none."""
    checkpoint = common.load_checkpoint(path, "nanosendvae-vae")
    if checkpoint["mapper"] is None:
        raise ValueError(f"{path} holds no mapper: that VAE was trained with --align 0")
    mapper = Mapper(MapperConfig(**checkpoint["mapper_config"]))
    mapper.load_state_dict(checkpoint["mapper"])
    return mapper.eval()


def clean_tokens(mapper, z):
    """Return the mapper's tokens (B, N, D) of latents z without noise."""
    return mapper(z, torch.zeros(len(z), device=z.device), torch.zeros_like(z))


def sit_features(args, vae_hash, device):
    """Return a function (z raw, indices) -> mean token (B, D) of --sit after --block at --t, null label."""
    meta = common.load_checkpoint(args.sit, "nanosendvae-sit")["latents"]
    if vae_hash != meta["vae_hash"]:
        raise ValueError(f"--sit {args.sit} was trained on latents of VAE {meta['vae_hash'][:12]}, this is "
                         f"{vae_hash[:12]}; give --vae {meta['vae']}")
    model = load_sit(args.sit).to(device)
    if model.null_label is None:
        raise ValueError(f"--sit {args.sit} has no null label, and the true one would give the answer away")
    mean, std = (torch.tensor(meta[key]) for key in ("mean", "std"))

    def features(z, indices):
        eps = common.noise_for(z.shape[1:], indices.tolist(), device, args.seed, "probe")
        t = torch.full((len(z),), args.t, device=device)
        z_t, _ = interpolate(data.normalize_latents(z, mean, std), eps, t)
        y = torch.full((len(z),), model.null_label, device=device)
        return model.features(z_t, t, y, args.block).mean(1)
    return features


@torch.no_grad()
def encode(split, functions, vae, args, device) -> tuple[dict, Tensor]:
    """Return {"z": posterior means (n, C, h, w), name: features (n, F) of each function} and labels (n,)."""
    dataset, indices, _ = split
    parts, labels = {"z": []} | {name: [] for name in functions}, []
    loader = data.eval_loader(dataset, args.batch_size, workers=args.workers, indices=indices)
    for images, y, index, _ in loader:
        z = vae.encode(data.to_float(images.to(device))).mode()
        parts["z"].append(z.cpu())
        for name, function in functions.items():
            parts[name].append(function(z, index).cpu())
        labels.append(y)
    return {name: torch.cat(rows) for name, rows in parts.items()}, torch.cat(labels)


def probe_vae(path, splits, names, args, device) -> dict:
    """Return all measures of one VAE: of "flat" and "pooled" latents, and of what else args ask for."""
    vae = load_vae(path).to(device)
    result = {"vae": str(path), "vae_hash": common.state_hash(vae.state_dict())}
    functions = {}
    if args.mapper:
        mapper = load_mapper(path).to(device)
        functions["mapper"] = lambda z, index: clean_tokens(mapper, z).mean(1)
    if args.sit:
        functions["sit"] = sit_features(args, result["vae_hash"], device)
    encoded = {name: encode(split, functions, vae, args, device) for name, split in splits.items()}
    labels = [rows[1].to(device) for rows in encoded.values()]
    for rows, _ in encoded.values():
        rows |= {"flat": rows["z"].flatten(1), "pooled": rows["z"].mean((2, 3))}
    for kind in ("flat", "pooled", *functions):
        x, scores = [rows[kind].to(device) for rows, _ in encoded.values()], {}
        if names:
            y = [torch.from_numpy(split[2]).to(device) for split in splits.values()]
            fit = fit_linear_probe(x[0], y[0], x[1], y[1], x[2])
            scores |= attribute_scores(fit["logits"], y[2], names) | {"weight_decay": fit["weight_decay"]}
        if splits["train"][0].num_classes > 1:
            fit = fit_linear_probe(x[0], labels[0], x[1], labels[1], x[2])
            scores |= class_scores(fit["logits"], labels[2]) | {"class_weight_decay": fit["weight_decay"]}
        result[kind] = scores
    return result | {"latent": latent_measures(encoded["test"][0]["z"])}


@torch.no_grad()
def draw_pca(paths, dataset, args, device, count: int = 12) -> None:
    """Write args.picture: the first images; below them latents, mapper, teacher, coloured by `pca_rgb`."""
    images, _ = dataset.__getitems__(range(min(count, len(dataset))))
    x, size, rows = data.to_float(images.to(device)), images.shape[-1], [images]
    for path in paths:
        vae, checkpoint = load_vae(path).to(device), common.load_checkpoint(path, "nanosendvae-vae")
        z = vae.encode(x).mode()
        tokens = [z.flatten(2).transpose(1, 2)]  # (B, N, C)
        if checkpoint["mapper"] is not None:
            tokens.append(clean_tokens(load_mapper(path).to(device), z))
            grid = int(tokens[1].shape[1] ** 0.5)
            tokens.append(Teacher(checkpoint["teacher"], grid, args.teacher_weights).to(device)(x))
        for row in tokens:
            side = int(row.shape[1] ** 0.5)
            colours = torch.from_numpy(pca_rgb(row.cpu())).view(-1, side, side, 3).permute(0, 3, 1, 2)
            rows.append(F.interpolate(colours, size=(size, size), mode="nearest"))
    data.save_grid(args.picture, torch.cat(rows), columns=len(images), scale=max(1, 96 // size))


# command

def table(results) -> str:
    """Return the measures as text: a column per VAE."""
    rows = {"": ["/".join(Path(r["vae"]).parts[-3:]) for r in results]}
    for kind in [kind for kind in ("flat", "pooled", "mapper", "sit", "latent") if kind in results[0]]:
        for key, value in results[0][kind].items():
            if isinstance(value, float) and "weight_decay" not in key:
                rows[f"{kind} {key}"] = [f"{r[kind][key]:.4f}" for r in results]
    for name in results[0]["flat"].get("groups", {}):
        rows[f"flat F1 of {name}"] = [f"{r['flat']['groups'][name]:.4f}" for r in results]
    width = max(len(cell) for cells in rows.values() for cell in cells) + 2
    lines = [name.ljust(32) + "".join(cell.rjust(width) for cell in cells) for name, cells in rows.items()]
    return "\n".join(lines)


def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--data", default="shapes", help="'shapes', or a folder with class folders, attributes.csv, or both")
    add("--image-size", type=int, default=None, help="pixels; default 256, or 32 for 'shapes'")
    add("--num-train", type=int, default=0, help=f"images to fit on; 0 = all, {SHAPES_TRAIN} of 'shapes'")
    add("--classes", action="store_true", help="probe class labels only")
    add("--batch-size", type=int, default=64, help="images per forward")
    add("--workers", type=int, default=4, help="processes that read images")
    add = parser.add_argument_group("features").add_argument
    add("--vae", nargs="+", default=None, help="checkpoints, folders of them (newest), or "
        "hf://owner/repo/file; default: that of --sit, or out/vae")
    add("--mapper", action="store_true", help="also probe the mean of the mapper's tokens, without noise")
    add("--sit", default=None, help="also probe the mean token of this SiT: checkpoint or folder")
    add("--block", type=int, default=4, help="SiT block after which tokens are taken, counted from 1")
    add("--t", type=float, default=0.3, help="noise time of the SiT's input, 0 = clean")
    add("--seed", type=int, default=0, help="seed of that noise")
    add = parser.add_argument_group("run").add_argument
    add("--picture", default=None, help="PNG for the PCA colours of latents, mapper, teacher; default: none")
    add("--teacher-weights", default=None, help="local weights of that teacher; default: the hub's")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="auto: the first there is")
    add("--out", default="out/probe.json", help="file for all numbers, those per attribute too")
    return parser.parse_args(argv)


def main(argv=None):
    """Entry point of the command; returns what it writes."""
    args = parse_args(argv)
    proc = common.setup(args.device)
    torch.set_float32_matmul_precision("highest")  # L-BFGS compares losses that TF32 cannot tell apart
    if args.sit:
        args.sit = common.resolve_checkpoint(args.sit)
        args.vae = args.vae or [common.load_checkpoint(args.sit, "nanosendvae-sit")["latents"]["vae"]]
    paths = [common.resolve_checkpoint(path) for path in args.vae or ["out/vae"]]
    splits, names = READERS.get(args.data, read_folder)(args)
    names = [] if args.classes else names
    if not names and splits["train"][0].num_classes < 2:
        raise ValueError(f"--data {args.data}: nothing to probe; want attributes.csv, or a folder per class")
    results = [probe_vae(path, splits, names, args, proc.device) for path in paths]
    if args.picture:
        draw_pca(paths, splits["test"][0], args, proc.device)
    counts = {name: len(split[1]) for name, split in splits.items()}
    common.print0(f"linear probe of {args.data}: {counts['train']} train, {counts['val']} validation, "
                  f"{counts['test']} test images\n{table(results)}")
    for name in results[0]["flat"].get("without_positives", []):
        common.print0(f"{name}: no positive in the test split, left out of F1")
    report = {"vaes": results, "images": counts, "args": vars(args), "versions": common.versions()}
    if proc.main:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    common.cli(main)
