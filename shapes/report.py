"""The report of ./quickstart.sh: plain VAE and Send-VAE side by side, in a table and in pictures.

Both are fine-tunes of one pretrained VAE, without and with alignment to the shapes teacher (by a mapper
without noise), for equally many steps, on the same data and seed. A SiT is trained on the latents of each,
again for equally many steps. The judge, in whose features FD and class accuracy are measured, was trained
by neither.

    python -m shapes.report out/quickstart                 # writes report.md and its pictures
    python -m shapes.report out/seed0 out/seed1 out/seed2  # prints mean and standard deviation over runs

Nothing is computed here but the pictures: the numbers are those that the stages have written.
"""
import statistics
from pathlib import Path

import common  # before torch

import numpy as np
import torch

import checkpoints
import data
import probe

ARMS = {"plain": "plain VAE", "send": "Send-VAE"}  # folder in a run -> name
KEYS = "rec,psnr_db,align,flow,grad_norm"  # what the command in the report draws
SHOWN = 12  # images in the pictures of reconstructions and latents


def parse_args(argv=None):
    parser = common.new_parser(__doc__)
    parser.add_argument("runs", nargs="+", help="folders that quickstart.sh wrote")
    return parser.parse_args(argv)


# the table

@checkpoints.one_line
def measured(run: Path) -> dict:
    """Return {arm: {measure: value}} of one run. Raises ValueError if a stage has not run."""
    table, advice = {}, "./quickstart.sh DIR makes it"
    for arm, vae in zip(ARMS, data.read_facts(run / "probe.json", {}, advice)["vaes"]):
        rfid, gfid = (data.read_facts(run / arm / f"{name}.json", {}, advice) for name in ("rfid", "gfid"))
        values = {"PSNR, dB": rfid["psnr_db"], "probe F1, flattened": vae["flat"]["macro_f1"],
                  "probe F1, pooled": vae["pooled"]["macro_f1"],
                  f"FD-judge of {rfid['n']} reconstructions vs their originals": rfid["fd"]}
        for how, drawn in zip(("no guidance", "guidance 2"), gfid["sets"].values()):
            values[f"FD-judge of {drawn['n']} samples vs {gfid['reference']['name']}, {how}"] = drawn["fd"]
            values[f"class accuracy of samples, {how}"] = drawn["class_accuracy"]
        values |= {f"probe F1 of {name}, flattened": f1 for name, f1 in vae["flat"]["groups"].items()}
        table[arm] = values
    return table


def markdown_table(tables: list[dict]) -> str:
    """Return the two arms of one run side by side; of several runs mean and standard deviation."""
    lines = ["| measure | plain VAE | Send-VAE | difference |", "|---|---|---|---|"]
    for name in tables[0]["plain"]:
        plain, send = ([table[arm][name] for table in tables] for arm in ARMS)
        difference = [b - a for a, b in zip(plain, send)]
        line = f"| {name} |"
        for values, sign in ((plain, ""), (send, ""), (difference, "+")):
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            line += f" {statistics.mean(values):{sign}.3f}{spread} |"
        lines.append(line)
    return "\n".join(lines)


# the pictures

@torch.no_grad()
def draw_pictures(run: Path) -> None:
    """Write reconstructions.png, pca.png and samples.png into the run's folder."""
    val = data.open_dataset("shapes", 32, "val")
    n, images, paths = val.num_classes, val.batch(range(SHOWN))["images"], [run / arm / "vae" for arm in ARMS]
    x, vaes = data.to_float(images), map(checkpoints.load_vae, paths)
    strips = [images, *(data.to_uint8(vae.decode(vae.encode(x).mode())) for vae in vaes)]
    data.save_grid(run / "reconstructions.png", torch.cat(strips), columns=SHOWN, scale=3)
    probe.draw_pca(run / "pca.png", paths, ARMS.values(), images, None, torch.device("cpu"))

    columns = []  # (n, H, W, 3) each
    for arm in ARMS:
        samples = data.ArrayImages(run / arm / "samples" / "cfg2" / "samples.npz").images
        rounds = samples[:len(samples) // n * n].reshape(-1, n, 32, 32, 3)  # image i has class i mod n
        columns += [*rounds[:8], np.full_like(rounds[0], 255)]  # and a white gap
    grid = np.concatenate(np.stack(columns[:-1], axis=1))  # of (n, 8 + 1 + 8, H, W, 3)
    data.save_grid(run / "samples.png", grid, columns=len(columns) - 1, scale=2)


def main(argv=None):
    runs = [Path(run) for run in parse_args(argv).runs]
    table = markdown_table([measured(run) for run in runs])
    if len(runs) == 1:
        draw_pictures(runs[0])
        logs = " ".join(f"{runs[0]}/{arm}/{stage}/log.jsonl" for stage in ("vae", "sit") for arm in ARMS)
        made = [f"Made with {file.read_text().strip()}." for file in runs[0].glob("settings.txt")]
        text = ["# Quickstart report", __doc__.split("\n\n")[1], *made, table,
                "Images, reconstructions of plain VAE and Send-VAE: ![](reconstructions.png)",
                "Principal components as colour: images, latents of both VAEs, mapper, teacher: ![](pca.png)",
                "Samples, guidance 2, a line per class; left plain VAE, right Send-VAE: ![](samples.png)",
                f"Losses over steps: `pip install matplotlib; python plot.py curves {logs} --keys {KEYS}`"]
        (runs[0] / "report.md").write_text("\n\n".join(text) + "\n")
    print(table)


if __name__ == "__main__":
    common.cli(main)
