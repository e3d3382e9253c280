"""Charts of what the other scripts wrote. Needs matplotlib, as no other file does: pip install matplotlib

    python plot.py curves out/vae/log.jsonl out/plain/log.jsonl --out curves.png --keys rec,psnr_db
    python plot.py study study/results.csv                    # of study.py: samples over the SiT's steps
    python plot.py study study/results.csv --x f1_pooled      # and over another measure
    python plot.py runs out/study/plain-10 out/study/depth1-10       # their reconstructions and samples
"""
import csv
import json
import statistics
from pathlib import Path

import numpy as np

import common
import data

# names in log.jsonl, unless --keys says others; and in results.csv
KEYS = "loss,rec,lpips,kl,gan,align,psnr_db,flow,repa,val_flow,grad_norm"
MEASURES = "fd,class_accuracy"


def parse_args(argv=None):
    parser = common.new_parser(__doc__)
    add = parser.add_argument
    add("chart", choices=("curves", "study", "runs"), help="what to draw")
    add("files", nargs="+", help="log.jsonl files; study: results.csv; runs: folders in study.py's --out")
    add("--out", default="out/plot.png", help="PNG to write")
    add("--keys", help=f"names to draw, a panel each; default: {KEYS}; of study {MEASURES}")
    add("--x", default="sit_steps", help="study: the column along the horizontal axis")
    return parser.parse_args(argv)


def new_figure(panels: int, width=6.0, height=3.0):
    """Return a figure for so many panels, two in a line, and a function that adds the next panel."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen
    lines = (panels + 1) // 2
    figure = Figure((2 * width, height * lines), layout="constrained")
    return figure, lambda **how: figure.add_subplot(lines, 2, len(figure.axes) + 1, **how)


def read_curve(log, key: str) -> dict[int, float]:
    """Return {step: value} of one name in a log.jsonl, by rising step.

    Of a step that was logged twice, because a run was continued, the last value counts. Values that are not
    finite are left out: the log has them as text. So is a last line that a crash has torn.
    """
    with data.one_line(log):
        rows = [json.loads(line) for line in Path(log).read_text().splitlines() if line.endswith("}")]
        values = {row["step"]: row[key] for row in rows if isinstance(row.get(key), (int, float))}
        return dict(sorted(values.items()))


def draw_curves(logs: list, keys: list[str]):
    """Return a figure: a panel per name, a curve per log. ValueError if no log has any of the names."""
    panels = {key: [read_curve(log, key) for log in logs] for key in keys}
    panels = [(key, curves) for key, curves in panels.items() if any(curves)]
    if not panels:
        raise ValueError(f"{', '.join(map(str, logs))}: nothing is logged under {', '.join(keys)}")
    figure, panel = new_figure(len(panels))
    for key, curves in panels:
        axis = panel(title=key, xlabel="step")
        for log, curve in zip(logs, curves):  # a log has the same colour in all panels
            name = "/".join(Path(log).resolve().parts[-3:-1]) if curve else None  # None: not in the legend
            axis.plot(list(curve), list(curve.values()), ".-", label=name)
        axis.legend()
    return figure


def read_results(path, keys: list[str]) -> dict:
    """Return {setting: {step: {key: [a value per seed]}}} of study.py's results.csv, without guidance."""
    table = {}
    with data.one_line(path, "study.py writes it"), open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["guidance"] == "1":
                values = table.setdefault(row["setting"], {}).setdefault(int(row["sit_steps"]), {})
                [values.setdefault(key, []).append(float(row[key])) for key in keys]
    if not table:
        raise ValueError(f"{path}: no row without guidance in it; study.py writes it")
    return table


def draw_study(path, x: str, keys: list[str]):
    """Return a figure: a panel per name, a colour per setting of study.py.

    Over x = sit_steps a line, the mean of the seeds. Over another measure a point per seed, at the last step.
    """
    table = read_results(path, [x, *keys])
    figure, panel = new_figure(len(keys), height=5.0)
    for key in keys:
        axis = panel(xlabel=x, ylabel=key)
        for i, (setting, steps) in enumerate(table.items()):
            points = (steps[max(steps)][x], steps[max(steps)][key])
            if x == "sit_steps":
                points = sorted(steps), [statistics.mean(steps[step][key]) for step in sorted(steps)]
            axis.plot(*points, "os^D"[i % 4] + "-" * (x == "sit_steps"), color=f"C{i % 10}", label=setting)
    axis.legend(fontsize="small")
    return figure


def draw_runs(folders: list):
    """Return a figure: a line per run of study.py, its last picture of reconstructions and its samples."""
    from matplotlib.image import imread
    figure, panel = new_figure(2 * len(folders), width=8.0, height=2.6)
    for folder in map(Path, folders):
        drawn, pictures = sorted(folder.glob("cfg2-*/samples.npz")), sorted(folder.glob("vae/recon*.png"))
        if not drawn or not pictures:
            raise ValueError(f"{folder}: no vae/reconstructions_*.png and cfg2-*/samples.npz in it, which "
                             f"study.py leaves there")
        samples = data.ArrayImages(drawn[-1]).images[:80]
        samples = np.concatenate([np.concatenate(samples[i::10][:8]) for i in range(10)], axis=1)
        for title, image in (("images, reconstructions", imread(pictures[-1])), ("samples", samples)):
            axis = panel(title=f"{folder.name}: {title}")
            axis.imshow(image, interpolation="nearest")
            axis.set_axis_off()
    return figure


def main(argv=None):
    args = parse_args(argv)
    import matplotlib  # noqa: F401  (now: below, a missing package would be taken for a damaged file)
    keys = (args.keys or (KEYS if args.chart == "curves" else MEASURES)).split(",")
    if args.chart == "study":
        figure = draw_study(args.files[0], args.x, keys)
    else:
        figure = draw_runs(args.files) if args.chart == "runs" else draw_curves(args.files, keys)
    with data.replacing(args.out) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    common.cli(main)
