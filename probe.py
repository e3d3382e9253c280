"""Linear probes of latents: attributes and classes, beside the other measures of a latent space.

    python probe.py --data data/celeba --vae out/a/vae out/b/vae     # side by side: flattened, pooled latents
    python probe.py --data shapes --vae out/send/vae --mapper        # also the features of the mapper
    python probe.py --data shapes --sit out/sit --block 4 --t 0.3    # also those of a SiT, by the null label
    python probe.py --data pictures --classes                        # a folder of class folders
    python probe.py --report out/*/vae --fid-csv fid.csv   # the paper's analysis: what goes with FID?

Protocol: posterior means, standardised; logistic regression on the train split, the weight decay (one for all
attributes) and the _tuned thresholds chosen on the validation split, the test split used once
(latent_metrics.py). Features are kept in --cache, by the hashes of the VAE and of the images. Letters: n
images, F features, A attributes; latents z (n, C, h, w), their tokens (n, N, C).
"""
import argparse
import csv
import hashlib
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import common
import data
import weights
from common import natural, positive
from attributes import SHAPES_TRAIN, open_attributes
from latent_metrics import (attribute_scores, class_scores, f1_scores, fit_linear_probe, latent_measures,
                            pca_rgb)
from mapper import Mapper, MapperConfig, Teacher
from sit import interpolate, read_sit
from vae import load_vae

__all__ = ["fit_linear_probe", "f1_scores", "pca_rgb", "latent_measures"]
SHOWN = 100  # groups of attributes in table and picture, at most
KINDS = {"flat": "flattened latents", "pooled": "mean-pooled latents", "mapper": "mapper", "sit": "SiT"}
SCORES = {"macro_f1": "macro F1", "macro_f1_tuned": "macro F1, tuned", "micro_f1": "micro F1", "auc": "AUC",
          "balanced_accuracy": "balanced accuracy", "top5_recall": "top-5 recall",
          "class_accuracy": "class accuracy"}
# the rows of the report: what is printed, and where it is among the results
REPORT = {"attribute F1, flattened": ("flat", "macro_f1"), "attribute F1, pooled": ("pooled", "macro_f1"),
          "attribute F1, mapper": ("mapper", "macro_f1"),
          "attribute AUC, flattened": ("flat", "auc"), "top-5 recall, flattened": ("flat", "top5_recall"),
          "class accuracy, flattened": ("flat", "class_accuracy"),
          "class accuracy, pooled": ("pooled", "class_accuracy"),
          "Gini of the density": ("latent", "density_gini"), "GMM fit, nats": ("latent", "gmm_nll"),
          "effective rank": ("latent", "effective_rank"),
          "smallest channel std": ("latent", "channel_std_min"),
          "largest channel std": ("latent", "channel_std_max"),
          "power at high frequencies": ("latent", "high_frequency")}


# features

def load_mapper(path) -> Mapper:
    """Return the mapper that was trained with a VAE, eval mode. Raises ValueError if there was none."""
    checkpoint = weights.own_checkpoint(path)
    if checkpoint.get("mapper") is None:
        raise ValueError(f"{path} holds no mapper: only train_vae.py's are kept with their mapper, and not "
                         "with --align 0")
    mapper = Mapper(weights.config_of(MapperConfig, checkpoint["mapper_config"], path))
    mapper.load_state_dict(checkpoint["mapper"])
    return mapper.eval()


def clean_tokens(mapper, z):
    """Return the mapper's tokens (B, N, D) of latents z without noise."""
    return mapper(z, torch.zeros(len(z), device=z.device), torch.zeros_like(z))


def mapper_features(path, device):
    """Return (name with hash, function (z raw, rows) -> mean token (B, D) of the mapper, without noise)."""
    mapper = load_mapper(path).to(device)
    return f"mapper-{common.state_hash(mapper.state_dict())[:12]}", lambda z, rows: \
        clean_tokens(mapper, z).mean(1)


def sit_features(args, vae_path, vae_hash, device):
    """Return (name with hash, function (z raw, rows) -> mean token (B, D)) of --sit after --block at --t.

    The label is the null one, always: the function is given none, and the true one would give the answer
    away. The noise of an image depends on --seed and its number.
    """
    model, content = read_sit(args.sit)
    meta = content["latents"] if content.get("format") == "nanosendvae-sit" else {}
    if vae_hash != meta.get("vae_hash", vae_hash):  # published files name no VAE
        raise ValueError(f"--sit {args.sit} was trained on latents of VAE {meta['vae_hash'][:12]}, this is "
                         f"{vae_hash[:12]}; give --vae {meta['vae']}")
    model.to(device)
    if model.null_label is None:
        raise ValueError(f"--sit {args.sit} has no null label, and the true one would give the answer away")
    mean, std = weights.statistics_of(content) if meta else weights.statistics_for(
        args.sit, content, vae_path, vae_hash, model.config.in_channels, args.latent_stats)[:2]

    def features(z, rows):
        eps = common.noise_for(z.shape[1:], rows.tolist(), device, args.seed, "probe")
        t = torch.full((len(z),), args.t, device=device)
        z_t, _ = interpolate(data.normalize_latents(z, mean, std), eps, t)
        y = torch.full((len(z),), model.null_label, device=device)
        return model.features(z_t, t, y, args.block).mean(1)
    seen = common.state_hash({**model.state_dict(), "mean": mean, "std": std})[:12]
    name = f"sit-{seen}-block{args.block}-t{args.t}-seed{args.seed}"
    return name, features


def write_rows(paths, n: int, batches, store) -> None:
    """Write arrays of n rows to .npy files, each whole or not at all; batches yield (rows, one part a path).

    store: numpy type of floats. Raises ValueError for a value that is not finite in it.
    """
    temporary = [path.with_name(f".{path.name}.{os.getpid()}") for path in paths]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    arrays = [None] * len(paths)
    try:
        for rows, parts in batches:
            for i, part in enumerate(part.cpu().numpy() for part in parts):
                if arrays[i] is None:
                    dtype = store if part.dtype.kind == "f" else part.dtype
                    arrays[i] = np.lib.format.open_memmap(temporary[i], "w+", dtype, (n, *part.shape[1:]))
                with np.errstate(over="ignore"):
                    arrays[i][rows] = part
                if not np.isfinite(arrays[i][rows]).all():
                    raise ValueError(f"{paths[i].stem}: features are not finite as {store}; "
                                     "check the network that made them, or try --store float32")
        for array, source, path in zip(arrays, temporary, paths):
            array.flush()
            os.replace(source, path)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


@torch.no_grad()
def encode(split, functions, vae, vae_hash, args, device) -> dict:
    """Return mapped arrays of a split: "rows" (n,), the numbers of the images that were read, "z" posterior
    means (n, C, h, w), and the features (n, F) of each function {name: (name with hash, function)} of z.

    Files of args.cache are taken where they are: a folder says which VAE, images, size and rows.
    """
    images, n = split.images, len(split.rows)
    which = f"{images.files_hash} {images.image_size} ".encode() + np.asarray(split.rows, np.int64).tobytes()
    folder = Path(args.cache) / f"{vae_hash[:16]}-{hashlib.sha256(which).hexdigest()[:16]}-{args.store}"
    files = {name: folder / f"{name}.npy" for name in ("rows", "z")}
    if not all(file.is_file() for file in files.values()):
        def latents():
            loader = data.eval_loader(images, args.batch_size, workers=args.workers, indices=split.rows)
            for x, numbers, _, rows in loader:
                yield rows.numpy(), (numbers, vae.encode(data.to_float(x.to(device))).mode())
        write_rows([*files.values()], n, latents(), args.store)
    arrays = {name: np.load(file, mmap_mode="r") for name, file in files.items()}
    for name, (file_name, function) in functions.items():
        def features():
            for start in range(0, n, args.batch_size):
                rows = slice(start, start + args.batch_size)
                z = torch.from_numpy(np.array(arrays["z"][rows], dtype=np.float32)).to(device)
                yield rows, (function(z, arrays["rows"][rows]),)
        file = folder / f"{file_name}.npy"
        if not file.is_file():
            write_rows([file], n, features(), args.store)
        arrays[name] = np.load(file, mmap_mode="r")
    return arrays


# probing

def probe_vae(path, found, args, device) -> dict:
    """Return all measures of one VAE on an AttributeData: of "flat" and "pooled" latents, of what else args
    ask for, and of the "latent" space."""
    vae = load_vae(path).to(device)
    result = {"vae": str(path), "vae_hash": common.state_hash(vae.state_dict())}
    functions = {}
    if args.mapper:
        functions["mapper"] = mapper_features(path, device)
    if args.sit:
        functions["sit"] = sit_features(args, path, result["vae_hash"], device)
    encoded = [encode(split, functions, vae, result["vae_hash"], args, device)
               for split in found.splits.values()]
    for arrays in encoded:
        arrays["flat"] = arrays["z"].reshape(len(arrays["z"]), -1)
        arrays["pooled"] = arrays["z"].mean((2, 3), dtype=np.float32)
    pairs = [(split, arrays["rows"]) for split, arrays in zip(found.splits.values(), encoded)]
    settings = {"device": device, "memory": args.memory, "max_iter": args.max_iter}
    for kind in ("flat", "pooled", *functions):
        train_x, val_x, test_x = (arrays[kind] for arrays in encoded)
        result[kind] = {"features": train_x.shape[1]}
        if found.names and not args.classes:
            train_y, val_y, test_y = (split.attributes[rows] for split, rows in pairs)
            fit = fit_linear_probe(train_x, train_y, val_x, val_y, test_x, **settings)
            result[kind] |= attribute_scores(fit, train_y, val_y, test_y, found.names)
            result[kind]["evaluations"] = fit["evaluations"]
        if len(found.class_names) > 1:
            train_y, val_y, test_y = (split.classes[rows] for split, rows in pairs)
            fit = fit_linear_probe(train_x, train_y, val_x, val_y, test_x, **settings)
            result[kind] |= class_scores(fit["logits"], torch.from_numpy(test_y))
            result[kind]["class_weight_decay"] = fit["weight_decay"]
    return result | {"latent": latent_measures(encoded[-1]["z"])}


# tables

def short_names(paths) -> list[str]:
    """Return what tells the paths apart: without the folders that all begin with, and end with."""
    parts = [list(Path(path).parts) for path in paths]
    if len(parts) == 1:
        return ["/".join(parts[0][-3:])]
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    return ["/".join(p) for p in parts]


def groups_of(results) -> list[str]:
    """Return the groups of attributes to show: the SHOWN of the highest F1 with the first VAE, in order."""
    f1 = results[0]["flat"].get("groups", {})
    best = {*sorted(f1, key=f1.get, reverse=True)[:SHOWN]}
    return [name for name in f1 if name in best]


def table(results, labels) -> str:
    """Return the measures as text: a column per VAE."""
    rows = {"": labels}
    for kind in [kind for kind in (*KINDS, "latent") if kind in results[0]]:
        for key, value in results[0][kind].items():
            if isinstance(value, float) and "weight_decay" not in key:
                rows[f"{kind} {key}"] = [f"{r[kind][key]:.4f}" for r in results]
    for name in groups_of(results):
        rows[f"flat F1 of {name}"] = [f"{r['flat']['groups'][name]:.4f}" for r in results]
    first, width = max(map(len, rows)) + 1, max(len(cell) for cells in rows.values() for cell in cells) + 2
    return "\n".join(name.ljust(first) + "".join(cell.rjust(width) for cell in cells)
                     for name, cells in rows.items())


def read_fids(path, names: list[tuple]) -> list[float]:
    """Return the FIDs in a CSV file (header; name, FID) of VAEs that are each known by several names."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        _, *rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(row)] or [[]]
    try:
        table = {row[0]: float(row[1]) for row in rows}
    except (IndexError, ValueError) as error:
        raise ValueError(f"{path}: {error}; want a header, then lines of a VAE and its FID") from error
    found = [next((table[name] for name in known if name in table), None) for known in names]
    if None in found:
        raise ValueError(f"{path}: no line for {names[found.index(None)][0]}; it has {', '.join(table)}")
    if len(found) < 3:
        raise ValueError(f"--fid-csv with {len(found)} VAEs: a correlation wants 3 or more")
    return found


def report_rows(results, fids=None) -> list[dict]:
    """Return {"measure", "values": one per VAE, "r": Pearson's with the FIDs} of every measure in REPORT.

    The FIDs themselves come first. r is None without FIDs, or where all values are the same.
    """
    rows = [{"measure": "FID", "values": fids, "r": None}] if fids else []
    for measure, (kind, key) in REPORT.items():
        if all(key in r.get(kind, {}) for r in results):
            values = [float(r[kind][key]) for r in results]
            varied = fids and np.std(values) > 0 and np.std(fids) > 0
            rows.append({"measure": measure, "values": values,
                         "r": float(np.corrcoef(values, fids)[0, 1]) if varied else None})
    return rows


def markdown(rows, labels) -> str:
    """Return report rows as a Markdown table: a column per VAE, and one of r."""
    lines = ["| measure | " + " | ".join(labels) + " | r with FID |", "|---" * (len(labels) + 2) + "|"]
    for row in rows:
        cells = [f"{value:.4g}" for value in row["values"]]
        lines.append("| " + " | ".join([row["measure"], *cells,
                                        "" if row["r"] is None else f"{row['r']:+.4f}"]) + " |")
    return "\n".join(lines)


# pictures

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")  # Okabe and Ito's


def font(size: int):
    """Return Pillow's own font."""
    from PIL import ImageFont
    return ImageFont.load_default(size)


def draw_bars(path, panels, labels, width: int = 1000) -> None:
    """Write a PNG of horizontal bars from 0 on: panels (title, {category: a value per label}, largest)."""
    from PIL import Image, ImageDraw
    bar, gap, left, right = 14, 10, 300, 70
    row = bar * len(labels) + gap
    height = 60 + sum(90 + row * len(values) for _, values, _ in panels)
    image = Image.new("RGB", (width, height), "white")
    draw, y, x = ImageDraw.Draw(image), 20, 20
    for k, label in enumerate(labels):
        draw.rectangle((x, y, x + 15, y + 15), fill=COLOURS[k % len(COLOURS)])
        draw.text((x + 24, y + 8), label, fill="black", font=font(17), anchor="lm")
        x += 54 + int(draw.textlength(label, font(17)))
    y = 60
    for title, values, largest in panels:
        draw.text((20, y + 22), title, fill="black", font=font(20), anchor="lm")
        y, span = y + 62, width - left - right
        bottom = y + row * len(values)
        for k in range(5):
            x = left + span * k // 4
            draw.line((x, y - 6, x, bottom), fill="#DDDDDD")
            draw.text((x, y - 10), f"{largest * k / 4:.3g}", fill="#666666", font=font(13), anchor="ms")
        for category, numbers in values.items():
            draw.text((left - 12, y + (row - gap) / 2), category, fill="black", font=font(15), anchor="rm")
            for k, value in enumerate(numbers):
                end, top = left + round(span * min(value / largest, 1)), y + k * bar
                draw.rectangle((left, top, max(end, left + 1), top + bar - 3),
                               fill=COLOURS[k % len(COLOURS)])
                draw.text((end + 6, top + bar / 2 - 1), f"{value:.3f}", fill="#444444", font=font(12),
                          anchor="lm")
            y += row
        y += 28
    data.save_grid(path, np.asarray(image)[None], columns=1)


def draw_results(path, results, labels) -> None:
    """Write the bar picture: scores, F1 by group, spread and spectrum of the latents."""
    panels = []
    for kind in [kind for kind in KINDS if kind in results[0]]:
        values = {name: [r[kind][key] for r in results] for key, name in SCORES.items()
                  if key in results[0][kind]}
        panels.append((f"{KINDS[kind]}: scores on the test split", values, 1.0))
    groups = groups_of(results)
    if groups:
        panels.append(("flattened latents: F1 of attributes, or groups of them, at probability 0.5",
                       {name: [r["flat"]["groups"].get(name, 0) for r in results] for name in groups}, 1.0))
    number = min(8, *(len(r["latent"]["spectrum"]) for r in results))
    values = {f"direction {k + 1}": [r["latent"]["spectrum"][k] for r in results] for k in range(number)}
    largest = max(max(row) for row in values.values())
    unit = 0.4 * 10 ** math.floor(math.log10(largest))  # quarters of its multiples are round numbers
    panels.append(("latents: share of variance along principal directions", values,
                   math.ceil(largest / unit) * unit))
    draw_bars(path, panels, labels)


@torch.no_grad()
def draw_pca(path, vaes, labels, images, args, device) -> None:
    """Write images (B, 3, H, W) uint8, and below them latents, mapper output and teacher tokens of each VAE,
    coloured by `pca_rgb`. A teacher whose weights cannot be had is named and left out."""
    from PIL import Image, ImageDraw
    x, size, rows, teachers = data.to_float(images.to(device)), images.shape[-1], {"images": images}, {}
    for vae_path, label in zip(vaes, labels):
        vae, checkpoint = load_vae(vae_path).to(device), weights.own_checkpoint(vae_path)
        z = vae.encode(x).mode()
        tokens = {f"{label}: latent": z.flatten(2).transpose(1, 2)}  # (B, N, C)
        if checkpoint.get("mapper") is not None:
            tokens[f"{label}: mapper"] = clean_tokens(load_mapper(vae_path).to(device), z)
            teachers[checkpoint["teacher"]] = int(tokens[f"{label}: mapper"].shape[1] ** 0.5)
        rows |= {name: colour_tokens(row, size) for name, row in tokens.items()}
    for name, grid in teachers.items():
        try:
            row = Teacher(name, grid, args.teacher_weights).to(device)(x)
            rows[f"teacher {name}"] = colour_tokens(row, size)
        except FileNotFoundError as error:
            common.print0(f"no row of teacher tokens: {error}")
    scale = max(1, 96 // size)
    margin = 30 + int(max(font(16).getlength(name) for name in rows))
    data.save_grid(path, torch.cat([*rows.values()]), columns=len(images), scale=scale)
    grid = Image.open(path)
    image = Image.new("RGB", (grid.width + margin, grid.height), "white")
    image.paste(grid, (margin, 0))
    for k, name in enumerate(rows):
        middle = (margin - 12, (k + 0.5) * size * scale)
        ImageDraw.Draw(image).text(middle, name, fill="black", font=font(16), anchor="rm")
    data.save_grid(path, np.asarray(image)[None], columns=1)


def colour_tokens(tokens, size: int) -> Tensor:
    """Tokens (B, N, D) on a square grid -> images uint8 (B, 3, size, size), every token a square."""
    side = int(tokens.shape[1] ** 0.5)
    colours = torch.from_numpy(pca_rgb(tokens.cpu())).view(-1, side, side, 3).permute(0, 3, 1, 2)
    return F.interpolate(colours, size=(size, size), mode="nearest")


# command

def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--data", default="shapes", help="'shapes', or the folder of CelebA, DeepFashion, AwA2, or of images "
        "with attributes.csv or class folders; KIND:DIR (celeba, deepfashion, awa2, folder) where DIR has "
        "files of two kinds")
    add("--image-size", type=positive, default=None, help="pixels; default 256, or 32 for 'shapes'")
    add("--num-train", type=natural, default=0, help=f"images to fit on; 0 = all, {SHAPES_TRAIN} of 'shapes'")
    add("--classes", action="store_true", help="probe class labels only")
    add("--class-data", default=None, help="folder of class folders for the class probe, where --data has no "
        "classes")
    add("--batch-size", type=positive, default=64, help="images per forward")
    add("--workers", type=natural, default=4, help="processes that read images")
    add = parser.add_argument_group("features").add_argument
    add("--vae", nargs="+", default=None, help="checkpoints, folders of them (newest), or "
        "hf://owner/repo/file; default: that of --sit, or out/vae")
    add("--report", nargs="+", default=None, metavar="VAE", help="--vae, with the report: every measure of "
        "the paper's analysis in one table, and a PCA picture of latents, mapper, teacher, beside --out")
    add("--fid-csv", default=None, help="file of VAE,FID lines under a header: adds Pearson's r of every "
        "measure to the report")
    add("--mapper", action="store_true", help="also probe the mean of the mapper's tokens, without noise")
    add("--sit", default=None, help="also probe the mean token of this SiT, ours or published: file, folder "
        "of ours (newest), or hf://owner/repo/file")
    add("--latent-stats", default=None, help="for published SiTs, as in sample.py: statistics file, or "
        "0.18215 for SD-VAE; default: in the SiT (REPA-E) or beside the VAE")
    add("--block", type=positive, default=4, help="SiT block after which tokens are taken, counted from 1")
    add("--t", type=float, default=0.3, help="noise time of the SiT's input, 0 = clean")
    add("--seed", type=int, default=0, help="seed of that noise, and of --num-train")
    add = parser.add_argument_group("run").add_argument
    add("--cache", default="out/probe_cache", help="folder of features; '' = a temporary one")
    add("--store", default="float32", choices=("float32", "float16"), help="type of features on disk")
    add("--memory", type=float, default=2.0, help="GiB of train features to hold while fitting; more are "
        "read from disk for every evaluation of the loss, 0 = always")
    add("--max-iter", type=positive, default=100, help="iterations of L-BFGS for each weight decay, at most; "
        "features gain a little from more")
    add("--teacher-weights", default=None, help="local weights of the teacher in the picture; default: the "
        "hub's")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="auto: the first there is")
    add("--out", default="out/probe.json", help="file for all numbers, those per attribute too; beside it "
        "the bars (.png), and of --report the table (_report.md) and PCA picture (_pca.png)")
    return parser.parse_args(argv)


def check(args) -> None:
    """Raise ValueError for flags that do not go together; make the folder of --out."""
    if args.report and args.vae:
        raise ValueError("--report and --vae both name VAEs; give them to --report only")
    if args.fid_csv and not args.report:
        raise ValueError("--fid-csv is for --report VAE VAE VAE; without it there is no table of r")
    if not 0 <= args.t <= 1:
        raise ValueError(f"--t {args.t} is outside 0..1, where 0 is clean and 1 is noise")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # now, not after hours of fitting


def open_sets(args) -> list:
    """Return the AttributeData of --data and --class-data; ValueError if there is nothing to probe."""
    sets = [open_attributes(args.data, args.image_size, args.num_train, args.seed)]
    if args.class_data:
        sets.append(open_attributes(args.class_data, args.image_size, args.num_train, args.seed))
        sets[1].names = []
    if (args.classes or args.class_data or not sets[0].names) and len(sets[-1].class_names) < 2:
        raise ValueError(f"{args.class_data or args.data} has no classes to probe; want --class-data DIR, a "
                         "folder per class, or attributes")
    return sets


def vae_of(sit) -> str:
    """Return the VAE that a SiT checkpoint of ours names. Raises ValueError for a published one."""
    content = weights.read_file(weights.fetch(sit))  # the network itself is built later, once
    weights.sit_state(content, sit)  # another kind of file is named as what it is
    if content.get("format") != "nanosendvae-sit":
        raise ValueError(f"--sit {sit} is a published SiT, which does not name its VAE: give --vae FILE")
    return content["latents"]["vae"]


def run(args, device) -> dict:
    """Probe every VAE, draw, print; return the report."""
    check(args)
    if args.sit:
        args.sit = weights.resolve(args.sit)
        args.vae = args.vae or [vae_of(args.sit)]
    typed = args.report or args.vae or ["out/vae"]
    paths = [weights.resolve(path) for path in typed]
    labels = short_names(paths)
    fids = read_fids(args.fid_csv, [*zip(typed, paths, labels)]) if args.fid_csv else None
    sets, results = open_sets(args), []
    for found in sets:
        counts = {name: len(split.rows) for name, split in found.splits.items()}
        common.print0(f"linear probe of {args.data if found is sets[0] else args.class_data}: "
                      f"{counts['train']} train, {counts['val']} validation, {counts['test']} test images")
        for note in found.notes:
            common.print0(f"note: {note}")
    for path in paths:
        results.append(probe_vae(path, sets[0], args, device))
        for other in sets[1:]:
            for kind, scores in probe_vae(path, other, args, device).items():
                if isinstance(scores, dict) and kind != "latent":
                    results[-1][kind] |= {k: v for k, v in scores.items() if k.startswith("class")}
    common.print0(table(results, labels))
    for name, why in results[0]["flat"].get("left_out", {}).items():
        common.print0(f"{name}: {why}, left out")
    for name in results[0]["flat"].get("without_negatives", []):
        common.print0(f"{name}: no negative in the test split, left out of AUC and balanced accuracy")
    report = {"vaes": results, "labels": labels, "args": vars(args), "versions": common.versions(),
              "images": {name: len(split.rows) for name, split in sets[0].splits.items()},
              "notes": [note for found in sets for note in found.notes]}
    if args.report:
        report["report"] = report_rows(results, fids)
    Path(args.out).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")  # before the pictures
    base = Path(args.out).with_suffix("")
    draw_results(f"{base}.png", results, labels)
    if args.report:
        text = markdown(report["report"], labels)
        common.print0(f"\n{text}")
        images, _ = sets[0].splits["test"].images.__getitems__(sets[0].splits["test"].rows[:12])
        draw_pca(f"{base}_pca.png", paths, labels, images, args, device)
        Path(f"{base}_report.md").write_text(f"{text}\n\n![]({base.name}_pca.png)\n\n![]({base.name}.png)\n")
    return report


def main(argv=None):
    """Entry point of the command; returns what it writes."""
    args = parse_args(argv)
    proc = common.setup(args.device)
    torch.set_float32_matmul_precision("highest")  # L-BFGS compares losses that TF32 cannot tell apart
    if not proc.main:  # one process does it all
        return None
    if args.cache:
        return run(args, proc.device)
    with tempfile.TemporaryDirectory() as args.cache:
        return run(args, proc.device)


if __name__ == "__main__":
    common.cli(main)
