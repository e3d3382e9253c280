"""Charts of what the other scripts wrote. Needs matplotlib, as no other file does: pip install matplotlib

    python plot.py curves out/vae/log.jsonl out/plain/log.jsonl --out curves.png --keys rec,psnr_db
"""
import json
from pathlib import Path

import common
import data

# names in log.jsonl, unless --keys says others
KEYS = "loss,rec,lpips,kl,gan,align,psnr_db,flow,repa,val_flow,grad_norm"


def parse_args(argv=None):
    parser = common.new_parser(__doc__)
    add = parser.add_argument
    add("chart", choices=("curves",), help="curves of log.jsonl files")
    add("files", nargs="+", help="the log.jsonl files")
    add("--out", default="out/plot.png", help="PNG to write")
    add("--keys", default=KEYS, help="curves: names to draw; a name that no log has is left out")
    return parser.parse_args(argv)


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
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen
    panels = {key: [read_curve(log, key) for log in logs] for key in keys}
    panels = [(key, curves) for key, curves in panels.items() if any(curves)]
    if not panels:
        raise ValueError(f"{', '.join(map(str, logs))}: nothing is logged under {', '.join(keys)}")
    lines = (len(panels) + 1) // 2
    figure = Figure((12, 3 * lines), layout="constrained")
    for i, (key, curves) in enumerate(panels, 1):
        axis = figure.add_subplot(lines, 2, i, title=key, xlabel="step")
        for log, curve in zip(logs, curves):  # a log has the same colour in all panels
            name = "/".join(Path(log).resolve().parts[-3:-1]) if curve else None  # None: not in the legend
            axis.plot(list(curve), list(curve.values()), ".-", label=name)
        axis.legend()
    return figure


def main(argv=None):
    args = parse_args(argv)
    import matplotlib  # noqa: F401  (now: below, a missing package would be taken for a damaged file)
    figure = draw_curves(args.files, args.keys.split(","))
    with data.replacing(args.out) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    common.cli(main)
