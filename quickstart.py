"""The report of ./quickstart.sh: plain VAE and Send-VAE side by side, as a table and as pictures.

Both are fine-tunes of one pretrained VAE, for as many steps, without and with alignment (as in the paper,
where Send-VAE is a fine-tune; there the VAE that it starts from stands beside it).

    python quickstart.py out/quickstart                 # writes report.md and four pictures
    python quickstart.py out/seed0 out/seed1 out/seed2  # prints mean and standard deviation over runs

It only reads what the stages measured; nothing is computed here but the pictures.
"""
import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import common
import data
import weights
from mapper import Teacher
from probe import COLOURS, font, load_mapper, pca_rgb
from vae import load_vae

KINDS = ("plain", "send")
SHOWN = 12  # images in the picture of reconstructions
GUIDANCE = {"cfg1": "no guidance", "cfg2": "guidance 2"}  # folders of samples, in the order of gfid.json


def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="folders that quickstart.sh wrote")
    return parser.parse_args(argv)


def read_json(path) -> dict:
    """Return the JSON object in a file; a stage that did not run is one clear error."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing: that stage has not run; "
                                f"./quickstart.sh continues where it stopped")
    return json.loads(Path(path).read_text())


def read_seconds(run) -> dict:
    """Return {stage: seconds} (the last entry of each stage)."""
    return {name: int(value) for name, value in (line.split() for line in open(Path(run) / "seconds.txt"))}


def measured(run) -> dict:
    """Return {kind: {measure: value}} of one run, from the files of its stages."""
    run, probe, seconds = Path(run), read_json(Path(run) / "probe.json"), read_seconds(run)
    table = {}
    for i, kind in enumerate(KINDS):
        rfid, gfid = read_json(run / kind / "rfid.json"), read_json(run / kind / "gfid.json")
        vae = probe["vaes"][i]
        table[kind] = {
            "PSNR, dB": rfid["psnr_db"],
            "probe F1, flattened": vae["flat"]["macro_f1"],
            "probe F1, pooled": vae["pooled"]["macro_f1"],
            f"FD-judge of {rfid['n']} reconstructions vs their originals": rfid["fd"],
            **{f"FD-judge of {samples['n']} samples vs {gfid['reference']['name']}, {how}": samples["fd"]
               for how, samples in zip(GUIDANCE.values(), gfid["sets"].values())},
            **{f"class accuracy of samples, {how}": samples["class_accuracy"]
               for how, samples in zip(GUIDANCE.values(), gfid["sets"].values())},
            "seconds, VAE (fine-tune)": seconds[f"{kind}-vae"],
            "seconds, SiT": seconds[f"{kind}-sit"],
            "seconds, sampling": seconds[f"{kind}-sample"],
        }
    return table


def markdown_table(tables) -> str:
    """Return the side-by-side table of one run, or mean +- standard deviation over several."""
    lines = ["| measure | plain VAE | Send-VAE | difference |", "|---|---|---|---|"]
    for name in tables[0]["plain"]:
        cells = []
        for values in ([t["plain"][name] for t in tables], [t["send"][name] for t in tables],
                       [t["send"][name] - t["plain"][name] for t in tables]):
            digits = 0 if name.startswith("seconds") else 3 if max(map(abs, values)) < 2 else 2
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            sign = "+" if len(cells) == 2 else ""
            cells.append(f"{statistics.mean(values):{sign}.{digits}f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@torch.no_grad()
def draw_pictures(run) -> None:
    """Write reconstructions.png, samples.png (one row per class) and pca.png into the run's folder."""
    run, val = Path(run), data.open_dataset("shapes", 32, split="val")
    images, _ = val.__getitems__(range(SHOWN))
    x, rows, pca_rows = data.to_float(images), [images], []
    for kind in KINDS:
        checkpoint = common.load_checkpoint(weights.resolve(run / kind / "vae"))
        vae = load_vae(run / kind / "vae")
        z = vae.encode(x).mode()
        rows.append(data.to_uint8(vae.decode(z)))
        pca_rows.append(pca_rgb(z.flatten(2).transpose(1, 2)))
        if checkpoint["mapper"]:
            mapper = load_mapper(run / kind / "vae")
            pca_rows.append(pca_rgb(mapper(z, torch.zeros(len(z)), torch.zeros_like(z))))
            pca_rows.append(pca_rgb(Teacher("shapes", vae.config.resolution // vae.stride)(x)))
    data.save_grid(run / "reconstructions.png", torch.cat(rows), columns=SHOWN, scale=3)
    data.save_grid(run / "pca.png", torch.cat([images, *map(enlarge, pca_rows)]), columns=SHOWN, scale=3)
    grids = []
    for kind in KINDS:
        arrays = np.load(run / kind / "samples" / "cfg2" / "samples.npz")
        shown = min(8, int(np.bincount(arrays["arr_1"], minlength=val.num_classes).min()))
        per_class = [arrays["arr_0"][arrays["arr_1"] == k][:shown] for k in range(val.num_classes)]
        grids.append(np.stack(per_class))  # (classes, 8, H, W, 3)
    gap = np.full_like(grids[0][:, :1], 255)
    both = np.concatenate([grids[0], gap, grids[1]], axis=1)
    data.save_grid(run / "samples.png", both.reshape(-1, *both.shape[2:]), columns=both.shape[1], scale=2)


def read_curve(log, key) -> list:
    """Return [(step, value), ...] of one name in a log.jsonl; of a step that was logged twice, the last.
    Values that are not finite, which the log writes as text, are left out."""
    rows = [json.loads(line) for line in open(log)]
    return sorted({row["step"]: row[key] for row in rows if isinstance(row.get(key), float)}.items())


def draw_curves(run) -> None:
    """Write curves.png: what the losses of a run that goes well look like, both VAEs and both SiTs."""
    run, both = Path(run), dict(zip(KINDS, ("plain VAE", "Send-VAE")))
    vae = {kind: run / kind / "vae" / "log.jsonl" for kind in KINDS}
    sit = {kind: run / kind / "sit" / "log.jsonl" for kind in KINDS}
    panels = {
        "VAE: reconstruction loss (L2)": {both[k]: read_curve(vae[k], "rec") for k in KINDS},
        "VAE: PSNR of 64 held-out images, dB": {both[k]: read_curve(vae[k], "psnr_db") for k in KINDS},
        "VAE: alignment, 1 - cos": {both["send"]: read_curve(vae["send"], "align")},
        "SiT: flow loss, held-out latents (each its own scale)":
            {both[k]: read_curve(sit[k], "val_flow") for k in KINDS},
        "SiT: flow loss, training": {both[k]: read_curve(sit[k], "flow") for k in KINDS},
        "SiT: gradient norm": {both[k]: read_curve(sit[k], "grad_norm") for k in KINDS}}
    width, height = 560, 300
    image = Image.new("RGB", (2 * width, 3 * height), "white")
    for i, (title, curves) in enumerate(panels.items()):
        draw_panel(ImageDraw.Draw(image), i % 2 * width, i // 2 * height, width, height, title, curves)
    data.save_grid(run / "curves.png", np.asarray(image)[None], columns=1)


def draw_panel(draw, x, y, width, height, title, curves) -> None:
    """Draw {label: [(step, value), ...]} as lines into a rectangle, five ticks an axis."""
    points = np.array([point for curve in curves.values() for point in curve])
    left, top, right, bottom = x + 70, y + 50, x + width - 20, y + height - 30
    draw.text((x + 20, y + 18), title, fill="black", font=font(16), anchor="lm")
    if len(points) == 0:  # such as the logs of an older version
        return
    (first, low), (last, high) = points.min(0), points.max(0)

    def place(step, value):
        return (left + (right - left) * (step - first) / max(last - first, 1),
                bottom - (bottom - top) * (value - low) / max(high - low, 1e-12))
    grey = dict(fill="#666666", font=font(13))
    for k in range(5):
        step, value = first + (last - first) * k / 4, low + (high - low) * k / 4
        column, row = place(step, value)
        draw.line((left, row, right, row), fill="#DDDDDD")
        draw.text((left - 8, row), f"{value:.3g}", anchor="rm", **grey)
        draw.text((column, bottom + 14), f"{step:.0f}", anchor="mm", **grey)
    for k, (label, curve) in enumerate(curves.items()):
        colour = COLOURS[(k + (len(curves) == 1)) % len(COLOURS)]  # a lone curve is Send-VAE's
        draw.line([place(*point) for point in curve], fill=colour, width=3, joint="curve")
        draw.text((right - 110 * (len(curves) - k), y + 38), label, fill=colour, font=font(14), anchor="lm")


def enlarge(rgb, size: int = 32) -> torch.Tensor:
    """Token colours uint8 (B, N, 3) -> images (B, 3, size, size), every token a square."""
    side = int(rgb.shape[1] ** 0.5)
    grid = torch.as_tensor(rgb).reshape(len(rgb), side, side, 3).permute(0, 3, 1, 2)
    return grid.repeat_interleave(size // side, 2).repeat_interleave(size // side, 3)


def write_report(run) -> str:
    """Write report.md and return its table."""
    run, table = Path(run), markdown_table([measured(run)])
    seconds, probe = read_seconds(run), read_json(run / "probe.json")
    names = data.open_dataset("shapes", 32, split="val").class_names
    arms = [sum(value for name, value in seconds.items() if name.startswith(f"{kind}-")) for kind in KINDS]
    text = f"""# Quickstart report

Plain VAE and Send-VAE: one pretrained VAE ({seconds['pretrain']} s), fine-tuned without and with alignment to
the shapes teacher (by a mapper without noise) for as many steps, on the same data and seed; a SiT on the \
latents of each, for as many steps.
The judge network, in whose features FD and class accuracy are measured, was trained by neither.

{table}

Seconds: {seconds['pretrain']} for the VAE that both start from; {arms[0]} and {arms[1]} for the stages of \
the plain VAE and of
Send-VAE, side by side; {seconds['probe']} for the probe.

Reconstructions (original, plain VAE, Send-VAE): ![](reconstructions.png)

Samples, guidance 2, one row per class ({", ".join(names)}); \
left plain VAE, right Send-VAE: ![](samples.png)

First three principal components as colour: image, latent of the plain VAE, latent of the Send-VAE, \
mapper output,
teacher tokens: ![](pca.png)

Losses over steps of the fine-tuned VAEs and of the SiTs: ![](curves.png)

Probe F1 by group of attributes (flattened latents):

{group_table(probe)}
"""
    (run / "report.md").write_text(text)
    return table


def group_table(probe) -> str:
    """Return the probe's F1 per attribute group, a column per VAE."""
    groups = [vae["flat"]["groups"] for vae in probe["vaes"]]
    lines = ["| attribute | plain VAE | Send-VAE |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | " + " | ".join(f"{g[name]:.3f}" for g in groups) + " |"
                              for name in groups[0]])


def main(argv=None):
    """Entry point of the command."""
    runs = parse_args(argv).runs
    if len(runs) == 1:
        table = write_report(runs[0])
        draw_pictures(runs[0])
        draw_curves(runs[0])
        print(table)
    else:
        print(markdown_table([measured(run) for run in runs]))


if __name__ == "__main__":
    common.cli(main)
