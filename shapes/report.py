"""The report of ./quickstart.sh: plain VAE and Send-VAE side by side, in a table and in pictures.

Both are fine-tunes of one pretrained VAE, without and with alignment to the shapes teacher (by a mapper
without noise), for as many steps, on the same data and seed. A SiT is trained on the latents of each, again
for as many steps. The judge, in whose features FD and class accuracy are measured, was trained by neither.

    python -m shapes.report out/quickstart                 # writes report.md and its pictures
    python -m shapes.report out/seed0 out/seed1 out/seed2  # prints mean and standard deviation over runs

Nothing is computed here but the pictures: the numbers are those that the stages have written.
"""
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

import checkpoints
import common
import data
import plot
import probe

ARMS = {"plain": "plain VAE", "send": "Send-VAE"}  # folder in a run -> name
SHOWN = 12  # images in the pictures of reconstructions and latents


def parse_args(argv=None):
    parser = common.new_parser(__doc__)
    parser.add_argument("runs", nargs="+", help="folders that quickstart.sh wrote")
    return parser.parse_args(argv)


# the table

def measured(run: Path) -> dict:
    """Return {arm: {measure: value}} of one run. Raises FileNotFoundError if a stage has not run."""
    # of a stage that ran twice, the last time counts
    seconds = dict(line.split() for line in (run / "seconds.txt").read_text().splitlines())
    table = {}
    for arm, vae in zip(ARMS, json.loads((run / "probe.json").read_text())["vaes"]):
        rfid, gfid = (json.loads((run / arm / name).read_text()) for name in ("rfid.json", "gfid.json"))
        values = {"PSNR, dB": rfid["psnr_db"], "probe F1, flattened": vae["flat"]["macro_f1"],
                  "probe F1, pooled": vae["pooled"]["macro_f1"],
                  f"FD-judge of {rfid['n']} reconstructions vs their originals": rfid["fd"]}
        for how, drawn in zip(("no guidance", "guidance 2"), gfid["sets"].values()):
            values[f"FD-judge of {drawn['n']} samples vs {gfid['reference']['name']}, {how}"] = drawn["fd"]
            values[f"class accuracy of samples, {how}"] = drawn["class_accuracy"]
        values |= {f"probe F1 of {name}, flattened": f1 for name, f1 in vae["flat"]["groups"].items()}
        for stage in ("vae", "sit"):
            values[f"seconds, {stage}"] = int(seconds[f"{arm}-{stage}"])
        table[arm] = values
    return table


def markdown_table(tables: list[dict]) -> str:
    """Return the two arms of one run side by side; of several runs mean and standard deviation."""
    lines = ["| measure | plain VAE | Send-VAE | difference |", "|---|---|---|---|"]
    for name in tables[0]["plain"]:
        plain, send = ([table[arm][name] for table in tables] for arm in ARMS)
        difference = [b - a for a, b in zip(plain, send)]
        cells = [name]
        for values, sign in ((plain, ""), (send, ""), (difference, "+")):
            digits = 0 if name.startswith("seconds") else 3 if max(map(abs, values)) < 2 else 2
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):{sign}.{digits}f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# the pictures

@torch.no_grad()
def draw_pictures(run: Path) -> None:
    """Write reconstructions.png, pca.png and samples.png into the run's folder."""
    val = data.open_dataset("shapes", 32, "val")
    images, vaes = val.batch(range(SHOWN))["images"], [run / arm / "vae" for arm in ARMS]
    strips = [images]
    for path in vaes:
        vae = checkpoints.load_vae(path)
        strips.append(data.to_uint8(vae.decode(vae.encode(data.to_float(images)).mode())))
    data.save_grid(run / "reconstructions.png", torch.cat(strips), columns=SHOWN, scale=3)
    add_labels(run / "reconstructions.png", ["images", *ARMS.values()])
    names = probe.draw_pca(run / "pca.png", vaes, ARMS.values(), images, None, torch.device("cpu"))
    add_labels(run / "pca.png", names)

    columns = []  # (classes, H, W, 3) each
    for arm in ARMS:
        archive = np.load(run / arm / "samples" / "cfg2" / "samples.npz")
        samples, labels = archive["arr_0"], archive["arr_1"]
        by_class = [samples[labels == k] for k in range(val.num_classes)]
        for i in range(min(8, *map(len, by_class))):
            columns.append(np.stack([images[i] for images in by_class]))
        columns.append(np.full_like(columns[0], 255))  # a white gap
    grid = np.stack(columns[:-1], axis=1)  # (classes, 8 + 1 + 8, H, W, 3)
    data.save_grid(run / "samples.png", grid.reshape(-1, *grid.shape[2:]), columns=grid.shape[1], scale=2)


def add_labels(path, labels: list[str]) -> None:
    """Write a name left of each strip of a picture."""
    picture = ImageOps.expand(Image.open(path), border=(150, 0, 0, 0), fill="white")
    for k, label in enumerate(labels):
        middle = (k + 0.5) * picture.height / len(labels)
        ImageDraw.Draw(picture).text((140, middle), label, "black", ImageFont.load_default(15), anchor="rm")
    picture.save(path)


def draw_curves(run: Path) -> str:
    """Write curves.png and return the line that shows it; without matplotlib, the command that draws it."""
    logs = [f"{run}/{arm}/{stage}/log.jsonl" for stage in ("vae", "sit") for arm in ARMS]
    keys = "rec,psnr_db,align,flow,val_flow,grad_norm"
    command = ["curves", *logs, "--keys", keys, "--out", f"{run}/curves.png"]
    try:
        plot.main(command)
    except ModuleNotFoundError:
        return f"Losses over steps: `pip install matplotlib; python plot.py {' '.join(command)}`"
    return "Losses over steps of the fine-tuned VAEs and of the SiTs: ![](curves.png)"


def main(argv=None):
    runs = [Path(run) for run in parse_args(argv).runs]
    table = markdown_table([measured(run) for run in runs])
    if len(runs) == 1:
        draw_pictures(runs[0])
        text = ["# Quickstart report", __doc__.split("\n\n")[1], table,
                "![](reconstructions.png)\n\nPrincipal components as colour: ![](pca.png)",
                "Samples, guidance 2, a line per class; left plain VAE, right Send-VAE: ![](samples.png)",
                draw_curves(runs[0])]
        (runs[0] / "report.md").write_text("\n\n".join(text) + "\n")
    print(table)


if __name__ == "__main__":
    common.cli(main)
