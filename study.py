"""The paper's claims on your machine: a VAE, fine-tuned in many ways; a SiT on each; equal measures for all.

    python study.py                                       # the embedded set; 2 CPU cores: 2.7 hours
    python study.py --jobs 8                              # one GPU: so many runs share it
    python study.py --data data/clipart --out out/clipart # a folder with train/, val/, train/attributes.csv
    python study.py --settings plain depth1+noise --seeds 10 11 12 13

Settings: plain (no alignment); the mapper is linear, or non-linear with 0, 1 or 2 ViT blocks; +noise: it sees
the latent noised as in flow matching; @W: alignment weight W, not 0.2. Every setting has the same steps,
teacher, judge and seeds, and starts from the same pretrained VAE of its seed. Every run is made by the
project's own commands. The same command goes on after a stop; finished commands are not run again.

Writes results.csv (a row per run and per place in the SiT's training) and tables.md, of all finished runs in
--out. plot.py draws the csv. Read: SETTINGS -> stages -> make -> rows_of -> tables -> main.
"""
import argparse
import csv
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from scipy import stats
from tqdm import tqdm

HERE, PYTHON = Path(__file__).parent, [sys.executable]  # where and by what commands are run
MAPPERS = {"linear": "--mapper linear", **{f"depth{n}": f"--mapper-depth {n}" for n in (0, 1, 2)}}
# The linear mapper has a norm here, too, so that the noise means the same for all.
SETTINGS = {"plain": "--align 0"} | {
    f"{name}{noise}{weight}":
        f"{flags} --mapper-norm on --mapper-noise {'on' if noise else 'off'} --align {weight[1:] or 0.2}"
    for name, flags in MAPPERS.items() for noise in ("", "+noise")
    for weight in (("", "@0.05", "@0.8") if name == "depth1" else ("",))}
# The recipe of quickstart.sh, with fewer steps.
VAE = """--image-size 32 --vae tiny --rec l2 --lpips 0 --gan 0 --teacher shapes --projector-dim 256
 --workers 1 --batch-size 32 --lr 5e-3 --beta2 0.99 --warmup 50 --eval-every 0 --save-every 200"""
SIT = """--model tiny/1 --batch-size 32 --lr 1e-2 --beta2 0.99 --warmup 100 --ema 0.99 --t-sampling lognormal
 --sample-every 0 --keep 99 --workers 0"""
PLACES = 4  # of the SiT's training at which samples are measured, equally far apart
# column in results.csv, of the latent -> (part of what probe.py and fid.py wrote, key in it)
MEASURES = {
    "f1_flat": ("flat", "macro_f1"), "f1_pooled": ("pooled", "macro_f1"),
    "class_flat": ("flat", "class_accuracy"), "class_pooled": ("pooled", "class_accuracy"),
    **{name: ("latent", name) for name in ("effective_rank", "density_gini", "gmm_nll")},
    "psnr_db": ("rfid", "psnr_db"), "reconstruction_fd": ("rfid", "fd")}
OUTCOMES = ("fd", "class_accuracy")  # of samples
KEPT = ("data", "vae_steps", "sit_steps", "samples")  # flags that are the same for all runs of an --out
WANTED = ("train/attributes.csv", "val")  # in --data
running, stopping = set(), threading.Event()  # processes; whether no new one may begin


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="shapes", help="'shapes', or a folder with train/, val/ and train/attributes.csv")
    add("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, metavar="NAME", help="to run")
    # not 0, on which the recipe was tuned
    add("--seeds", nargs="+", type=int, default=[10, 11, 12], metavar="SEED", help="of all that is random")
    add("--vae-steps", type=int, default=800, help="of each fine-tune; half as many of what they start from")
    add("--sit-steps", type=int, default=2000, help=f"of each SiT; a multiple of {PLACES}")
    add("--samples", type=int, default=500, help="drawn at each place")
    add("--jobs", type=int, default=min(os.cpu_count(), 8), help="runs side by side, a thread each")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="auto: CUDA, MPS or CPU")
    add("--out", default="out/study", help="folder of all runs and of the results")
    args = parser.parse_args(argv)
    if min(args.vae_steps // 2, args.sit_steps, args.samples // 10, args.jobs) < 1 or args.sit_steps % PLACES:
        parser.error(f"want --vae-steps 2, --samples 10, --jobs 1 or more; {PLACES} must divide --sit-steps")
    return args


# the commands of a run

def stages(setting, seed, out, args) -> dict:
    """Return {stage: command} of a run in the folder `out`, in order. Setting None: of the pretraining."""
    out, start = shlex.quote(str(out)), shlex.quote(str(out.parent / f"pretrained-{seed}"))
    folder = "" if args.data == "shapes" else Path(args.data).resolve()
    train, held_out = (shlex.quote(f"{folder}/{part}") if folder else "shapes" for part in ("train", "val"))
    run, judge = f"--seed {seed} --device {args.device}", f"--features shapes --device {args.device}"
    vae = f"train_vae.py {VAE} --data {train} {run} --compile off"
    if setting is None:
        return {"vae": f"{vae} --init none --align 0 --steps {args.vae_steps // 2} --out {out}"}
    every = args.sit_steps // PLACES
    drawn = [*((1, every * (i + 1)) for i in range(PLACES)), (2, args.sit_steps)]  # guidance, step
    sets = " ".join(f"{out}/cfg{cfg}-{step}/samples.npz" for cfg, step in drawn)
    return {
        "vae": f"{vae} --init {start} {SETTINGS[setting]} --steps {args.vae_steps} "
               f"--cooldown {args.vae_steps * 4 // 5} --out {out}/vae",
        "rfid": f"fid.py rfid {held_out} --vae {out}/vae {judge} --out {out}/rfid.json",
        "probe": f"probe.py --data {train} --vae {out}/vae {run} --out {out}/probe.json",
        "encode": f"encode.py --data {train} --vae {out}/vae {run} --compile off --out {out}/latents",
        "sit": f"train_sit.py --latents {out}/latents {SIT} --steps {args.sit_steps} --cooldown "
               f"{args.sit_steps * 7 // 10} --save-every {every} {run} --compile off --out {out}/sit",
        **{f"sample {cfg} {step}":
           f"sample.py --ckpt {out}/sit/ckpt_{step:07}.pt --vae {out}/vae --cfg {cfg} --sampler heun "
           f"--steps 8 --num {args.samples} --batch-size 100 --npz {run} --compile off "
           f"--out {out}/cfg{cfg}-{step}"
           for cfg, step in drawn},
        "fid": f"fid.py gfid {held_out} {sets} {judge} --out {out}/gfid.json"}


def make(folder: Path, commands: dict, bar) -> None:
    """Run the commands that folder/done.json does not have; it gets {command: seconds}.

    Raises RuntimeError, with the last words of a command that failed or was stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "done.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    for stage, command in commands.items():
        if command not in done:
            start = time.time()
            with open(folder / "log.txt", "ab") as log, subprocess.Popen(
                    [*PYTHON, *shlex.split(command)], cwd=HERE, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT) as process:
                running.add(process)
                if stopping.is_set():  # meanwhile
                    process.terminate()
                process.wait()
                running.discard(process)
            if process.returncode:
                last = (folder / "log.txt").read_text(errors="replace").strip().split("\n")[-1][-300:]
                raise RuntimeError(f"{folder.name}, {stage}: exit code {process.returncode}; {last}; "
                                   f"all of it: {folder}/log.txt")
            done[command] = time.time() - start
            record.with_suffix(".part").write_text(json.dumps(done, indent=1))
            record.with_suffix(".part").replace(record)  # whole or not at all
        bar.set_postfix_str(f"{folder.name} {stage}")
        bar.update()


# the results

def rows_of(folder: Path, args):
    """Yield the rows of a finished run: one for each place in the SiT's training, one more with guidance."""
    done, rfid, probe, gfid = (json.loads((folder / f"{name}.json").read_text())
                               for name in ("done", "rfid", "probe", "gfid"))
    parts, (setting, _, seed) = {"rfid": rfid, **probe["vaes"][0]}, folder.name.rpartition("-")
    common = {"data": args.data, "setting": setting, "seed": int(seed), "vae_steps": args.vae_steps,
              "seconds": round(sum(done.values())), "commit": rfid["versions"]["commit"]}
    # a folder without classes has no class accuracy
    common |= {name: parts[part].get(key, "") for name, (part, key) in MEASURES.items()}
    for path, numbers in gfid["sets"].items():
        cfg, step = Path(path).parent.name.removeprefix("cfg").split("-")
        yield common | {"guidance": int(cfg), "sit_steps": int(step), "samples": numbers["n"],
                        **{name: numbers.get(name, "") for name in OUTCOMES}}


def write_results(out: Path, args) -> list[dict]:
    """Write results.csv of all finished runs in `out`, also those of earlier calls; return its rows."""
    rows = [row for setting in SETTINGS for file in sorted(out.glob(f"{setting}-[0-9]*/gfid.json"))
            for row in rows_of(file.parent, args)]
    with open(out / "results.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return rows


def spread(values: list) -> str:
    """Return mean and standard deviation in words; "" of nothing."""
    around = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{around}" if values else ""


def correlation(x, y) -> str:
    """Return Pearson's and Spearman's r of two measures, with a 95 % bootstrap interval over the points."""
    points, words = np.array([x, y]), []
    draws = [points[:, index] for index in np.random.default_rng(0).integers(len(x), size=(1000, len(x)))]
    draws = [draw for draw in draws if np.ptp(draw, axis=1).all()]  # one point, drawn n times, has no r
    for measure in (stats.pearsonr, stats.spearmanr):
        low, high = np.percentile([measure(*draw).statistic for draw in draws], [2.5, 97.5])
        words.append(f"{measure(*points).statistic:+.2f} ({low:+.2f} to {high:+.2f})")
    return " | ".join(words)


def tables(rows: list[dict]) -> str:
    """Return Markdown: all measures of every setting, then the correlations with the samples' outcomes."""
    last = max(row["sit_steps"] for row in rows)

    def values(setting, measure, guidance=1):
        return [row[measure] for row in rows if row[measure] != "" and
                (row["setting"], row["guidance"], row["sit_steps"]) == (setting, guidance, last)]
    settings = [name for name in SETTINGS if values(name, "fd")]
    columns = [(name, 1) for name in (*MEASURES, *OUTCOMES)] + [(name, 2) for name in OUTCOMES]
    titles = " | ".join(name + ", guidance 2" * (guidance == 2) for name, guidance in columns)
    lines = [f"| setting | seeds | {titles} |", "|---" * (len(columns) + 2) + "|"]
    for setting in settings:
        cells = " | ".join(spread(values(setting, *column)) for column in columns)
        lines.append(f"| {setting} | {len(values(setting, 'fd'))} | {cells} |")
    if len(settings) > 3:
        means = {name: [statistics.mean(values(setting, name) or [np.nan]) for setting in settings]
                 for name in (*MEASURES, *OUTCOMES)}
        for outcome in (name for name in OUTCOMES if np.ptp(means[name]) > 0):  # without a value: nan
            lines += ["", f"Correlation with {outcome} of samples (no guidance, {last} steps) over the means "
                      f"of {len(settings)} settings, with a 95 % bootstrap interval:", "",
                      "| measure | Pearson's r | Spearman's r |", "|---|---|---|"]
            lines += [f"| {name} | {correlation(means[name], means[outcome])} |"
                      for name in MEASURES if np.ptp(means[name]) > 0]
    return "\n".join(lines) + "\n"


def main(argv=None):
    args = parse_args(argv)
    out, given = Path(args.out).resolve(), {key: getattr(args, key) for key in KEPT}
    if args.data != "shapes" and not all((Path(args.data) / part).exists() for part in WANTED):
        raise FileNotFoundError(f"--data {args.data}: want {', '.join(WANTED)} in it")
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != given:
        raise RuntimeError(f"{out} was made with {kept.read_text()}, not {given}; give another --out")
    kept.write_text(json.dumps(given))
    # Networks so small are slower with two threads. glibc keeps its memory between steps.
    os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "268435456",
                   "MALLOC_TRIM_THRESHOLD_": "1073741824"} | dict(os.environ)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command continues"))

    phases = [{out / f"{setting or 'pretrained'}-{seed}": (setting, seed)
               for seed in args.seeds for setting in settings} for settings in ([None], args.settings)]
    count = sum(len(stages(*run, folder, args)) for runs in phases for folder, run in runs.items())
    failures = []
    with tqdm(total=count, desc="study", dynamic_ncols=True) as bar, ThreadPoolExecutor(args.jobs) as pool:
        try:
            for runs in phases:
                for done in as_completed([pool.submit(make, folder, stages(*run, folder, args), bar)
                                          for folder, run in runs.items()]):
                    failures += [str(done.exception())] if done.exception() else []  # the others go on
                    rows = write_results(out, args)
        except BaseException as error:
            stopping.set()
            if not isinstance(error, KeyboardInterrupt):  # a Ctrl-C has reached them already
                [process.terminate() for process in tuple(running)]  # trainers save
            pool.shutdown(cancel_futures=True)
            raise
    if rows:
        (out / "tables.md").write_text(tables(rows))
        print((out / "tables.md").read_text())
    if failures:
        raise RuntimeError("\n".join(failures))


def run_main():
    """Run main; a failed command and a stop become one line and exit code 1."""
    try:
        main()
    except (RuntimeError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"error: {str(error) or 'stopped; the same command continues'}")


if __name__ == "__main__":
    run_main()
