"""What a training run says about itself: log.jsonl, the bar, means, throughput, warnings.

Numbers stay on the device between two readings: the step itself never waits for it, `Meter.read` does.
"""
import json
import math
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import common

EARLY_LOGS = (10, 20)  # steps that are logged whatever --log-every says


class Meter:
    """Mean of named scalars over steps and processes; they stay on the device until `read`."""

    def __init__(self):
        self.sums, self.counts = {}, {}

    def add(self, values: dict) -> None:
        """Add one observation of each name: a scalar tensor or float, or (sum, count) of several."""
        for name, value in values.items():
            value, count = value if isinstance(value, tuple) else (value, 1)
            value = value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + count

    def read(self, device) -> dict:
        """Return {name: mean over steps, processes}, start anew; this waits for the device."""
        names = list(self.sums)  # in the order of adding: the same in every process
        pairs = [(self.sums[n], torch.as_tensor(self.counts[n], dtype=torch.float32)) for n in names]
        table = torch.stack([torch.stack([x.to(device) for x in pair]) for pair in pairs])
        if dist.is_initialized():
            dist.all_reduce(table)
        self.__init__()
        return {name: s / n if n else math.nan for name, (s, n) in zip(names, table.tolist())}


class Log:
    """log.jsonl (one JSON object a line, units in the key) and, terminal or not, a tqdm bar; rank 0 only."""

    def __init__(self, folder, proc: common.Proc, start: int, num_steps: int, config, tensorboard=False,
                 wandb=None):
        self.proc, self.file, self.bar, self.sinks = proc, None, None, []
        if not proc.main:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.file = open(Path(folder) / "log.jsonl", "a", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(folder)
            self.sinks.append(lambda step, row: [writer.add_scalar(k, v, step) for k, v in row.items()])
        if wandb:
            import wandb as wandb_package
            wandb_package.init(project=wandb, config=config, dir=folder)
            self.sinks.append(lambda step, row: wandb_package.log(row, step=step))
        self.write({"config": config, "command": " ".join(sys.argv), "device": str(proc.device),
                    "world": proc.world, **common.versions()})
        self.bar = tqdm(total=num_steps, initial=start, desc=Path(folder).name, unit="step", mininterval=2.0)

    def write(self, row: dict) -> None:
        """Append one row to log.jsonl."""
        if self.file:
            row = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self.file.write(json.dumps({"time": round(time.time(), 1), **row}) + "\n")

    def step(self, step: int, row: dict | None = None, show=()) -> None:
        """Advance the bar to `step`; with a row, log it and show the named values on the bar."""
        if not self.file:
            return
        self.bar.update(step - self.bar.n)
        if row:
            self.write({"step": step, **row})
            for sink in self.sinks:
                sink(step, {k: v for k, v in row.items() if isinstance(v, (int, float))})
            self.bar.set_postfix_str(", ".join(f"{k} {row[k]:.4g}" for k in show if k in row))
            if step in EARLY_LOGS:  # a loader too slow, a memory nearly full or a week to go: say so at once
                self.bar.write(f"step {step}: {row['images_per_s']:.4g} images/s, waiting for data "
                               f"{row['data_wait_percent']:.0f} % of the time, peak memory "
                               f"{row['peak_memory_gib']:.1f} GiB, {row['eta_s'] / 60:.3g} min left")

    def close(self) -> None:
        """Close file and bar."""
        if self.file:
            self.bar.close()
            self.file.close()


def progress(steps, proc: common.Proc, name: str):
    """Iterate over `steps` with a tqdm bar on rank 0."""
    return tqdm(steps, desc=name, disable=not proc.main, mininterval=2.0)


def peak_memory(device: torch.device) -> int:
    """Return the bytes that tensors took at most on a CUDA device, else this process (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Timer:
    """Throughput since the last reading: images/s, share of time waiting for data, seconds left, memory."""

    def __init__(self, proc: common.Proc, step: int, num_steps: int):
        self.proc, self.step, self.num_steps = proc, step, num_steps
        self.begin, self.waited, self.paused = time.perf_counter(), 0.0, 0.0

    @contextmanager
    def waiting(self):
        """Time spent inside counts as waiting for data."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    @contextmanager
    def pausing(self):
        """Time spent inside (evaluation, saving) does not count."""
        begin = time.perf_counter()
        yield
        self.paused += time.perf_counter() - begin

    def read(self, batch_size: int, step: int) -> dict:
        """Return the figures of the steps since the last call; call it after waiting for the device."""
        seconds = max(time.perf_counter() - self.begin - self.paused, 1e-9)
        done, left = step - self.step, self.num_steps - step
        row = {"images_per_s": done * batch_size / seconds, "step_ms": 1000 * seconds / done,
               "data_wait_percent": 100 * self.waited / seconds, "eta_s": left * seconds / done}
        row["peak_memory_gib"] = peak_memory(self.proc.device) / 2**30
        self.begin, self.step, self.waited, self.paused = time.perf_counter(), step, 0.0, 0.0
        return row


def check_health(row: dict, bad_streak: int, limit: int, step: int) -> None:
    """Raise RunStopped naming the first non-finite term once `limit` steps in a row had to be skipped;
    warn of a run that has died: gradient, GAN and alignment of the logged steps (those there are) all 0."""
    vital = [row[key] for key in ("grad_norm", "gan", "align") if key in row]
    if vital and all(abs(value) < 1e-8 for value in vital):
        common.print0(f"warning: step {step}: gradient and losses are 0, nothing is learned any more; go "
                      f"back to a checkpoint before that, with a lower --lr")
    if bad_streak >= limit:
        bad = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
        raise common.RunStopped(f"step {step}: {bad_streak} steps in a row skipped, first non-finite term: "
                                f"{bad[0] if bad else 'the gradient'}; the newest checkpoint is the last "
                                f"good one; try a lower --lr or --dtype fp32")
