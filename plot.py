"""Charts of what the other scripts wrote. Needs matplotlib, as no other file does: pip install matplotlib

    python plot.py curves out/vae/log.jsonl out/plain/log.jsonl --out curves.png --keys rec,psnr_db
    python plot.py study out/study/results.csv                # of study.py: samples over the SiT's steps
    python plot.py study out/study/results.csv --x f1_pooled  # and over another measure
    python plot.py runs out/study/plain-10 out/study/depth1-10       # their reconstructions and samples
"""
import csv
import json
import statistics
from pathlib import Path

import numpy as np

import common
import data

# names in log.jsonl and in results.csv, unless --keys says others
KEYS = "loss,rec,lpips,kl,gan,align,psnr_db,flow,repa,val_flow,grad_norm,fd,class_accuracy"


def parse_args(argv=None):
    parser = common.new_parser(__doc__)
    add = parser.add_argument
    add("chart", choices=("curves", "study", "runs"), help="what to draw")
    add("files", nargs="+", help="log.jsonl files; study: results.csv; runs: folders in study.py's --out")
    add("--out", default="out/plot.png", help="PNG to write")
    add("--keys", default=KEYS, help="names to draw, a panel each; a name that no file has is left out")
    add("--x", default="sit_steps", help="study: the column along the horizontal axis")
    return parser.parse_args(argv)


def new_figure(panels: int, width=6.0, height=3.0):
    """Return a figure for so many panels, up to two in a line, and a function that adds the next panel."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen
    lines, columns = (panels + 1) // 2, min(panels, 2)
    figure = Figure((width * columns, height * lines), layout="constrained")
    return figure, lambda **how: figure.add_subplot(lines, columns, len(figure.axes) + 1, **how)


def read_curve(log, key: str) -> dict[int, float]:
    """Return {step: value} of one name in a log.jsonl, by rising step.

    Of a step that was logged twice, because a run was continued, the last value counts. Values that are not
    finite are left out: the log has them as text. So is a last line that a crash has torn.
    """
    with data.one_line(log):
        rows = [json.loads(line) for line in Path(log).read_text().splitlines() if line.endswith("}")]
        values = {row["step"]: row[key] for row in rows if isinstance(row.get(key), (int, float))}
        return dict(sorted(values.items()))


def draw_curves(logs: list, keys: list[str], _x=None):
    """Return a figure: a panel per name that a log has, a curve per log."""
    panels = {key: [read_curve(log, key) for log in logs] for key in keys}
    panels = [(key, curves) for key, curves in panels.items() if any(curves)]
    figure, panel = new_figure(len(panels))
    for key, curves in panels:
        axis = panel(title=key, xlabel="step")
        for log, curve in zip(logs, curves):  # a log has the same colour in all panels
            name = "/".join(Path(log).resolve().parts[-3:-1]) if curve else None  # None: not in the legend
            axis.plot(list(curve), list(curve.values()), ".-", label=name)
        axis.legend()
    return figure


def draw_study(files: list, keys: list[str], x: str):
    """Return a figure of study.py's results.csv, without guidance: a panel per name, a colour per setting;
    with noise dashed and hollow.

    Over x = sit_steps a line through the means of the seeds; over another measure a point per seed, at the
    last step. Names without a value are left out: a study of pictures has no class accuracy.
    """
    with data.one_line(files[0], "study.py writes it"), open(files[0], newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["guidance"] == "1"]
        last = max(int(row["sit_steps"]) for row in rows)
        rows = [row for row in rows if row.get(x) and (x == "sit_steps" or int(row["sit_steps"]) == last)]
    keys = [key for key in keys if any(row.get(key) for row in rows)]
    bases = list(dict.fromkeys(row["setting"].replace("+noise", "") for row in rows))
    figure, panel = new_figure(len(keys), height=5.0)
    for key in keys:
        axis = panel(xlabel=x, ylabel=key)
        for setting in dict.fromkeys(row["setting"] for row in rows):
            points = [(float(row[x]), float(row[key])) for row in rows if row["setting"] == setting]
            places = sorted({place for place, _ in points})
            means = [statistics.mean(value for at, value in points if at == place) for place in places]
            i, noise = bases.index(setting.replace("+noise", "")), "+noise" in setting
            axis.plot(places, means, "os^D"[i % 4], linestyle=("-", "--")[noise] if x == "sit_steps" else "",
                      color=f"C{i % 10}", markerfacecolor="none" if noise else f"C{i % 10}", label=setting)
        axis.legend(fontsize="small")
    return figure


def draw_runs(folders: list, *_):
    """Return a figure: a line per run of study.py, its last picture of reconstructions and its samples."""
    from matplotlib.image import imread
    figure, panel = new_figure(2 * len(folders), width=4.8, height=2.6)
    for folder in map(Path, folders):
        drawn, pictures = [*folder.glob("cfg2-*/samples.npz")], sorted(folder.glob("vae/recon*.png"))
        if not drawn or not pictures:
            raise ValueError(f"{folder}: no vae/reconstructions_*.png and cfg2-*/samples.npz in it, which "
                             f"study.py leaves there")
        samples = data.ArrayImages(drawn[0]).images[:80]  # a line of ten: a sample of each of ten classes
        samples = np.concatenate([np.concatenate(samples[i::10][:len(samples) // 10]) for i in range(10)], 1)
        for title, image in (("images, reconstructions", imread(pictures[-1])), ("samples", samples)):
            axis = panel(title=f"{folder.name}: {title}")
            axis.imshow(image, interpolation="nearest")
            axis.set_axis_off()
    return figure


def main(argv=None):
    args = parse_args(argv)
    import matplotlib  # noqa: F401  (now: below, a missing package would be taken for a damaged file)
    draw = {"curves": draw_curves, "study": draw_study, "runs": draw_runs}[args.chart]
    figure = draw(args.files, args.keys.split(","), args.x)
    if not figure.axes:
        raise ValueError(f"{', '.join(args.files)}: nothing is there under {args.keys}, or --x {args.x}")
    with data.replacing(args.out) as file:
        figure.savefig(file, format="png")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    common.cli(main)
