"""What every script shares: processes, precision, randomness, guarded optimizer step, EMA, checkpoints.

* One process without a launcher, many under torchrun; `setup()` reads torchrun's variables and nothing else.
* Randomness is a function of (seed, stream, step, row of the global batch), not of world size or micro-batch.
* A checkpoint is a plain dict of tensors and plain values, written to a temporary file and renamed.
"""
import argparse
import gc
import hashlib
import math
import os
import signal
import subprocess
import sys
import traceback
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# processes, devices, precision

@dataclass(frozen=True)
class Proc:
    """This process among its peers: rank of world, and the device it computes on."""
    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def add_run_flags(parser, out: str | None = None) -> None:
    """Add the flags that every script has: device, precision, seed, and where to write."""
    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"),
        help="auto: CUDA, else MPS, else CPU")
    add("--dtype", default="auto", choices=tuple(DTYPES),
        help="autocast type; auto: bf16 where the hardware has it, else fp16 on CUDA, fp32 elsewhere")
    add("--seed", type=int, default=0, help="seed of all randomness")
    if out is not None:
        add("--out", default=out, help="output folder")


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}, want 1 or more")
    return int(text)


def natural(text: str) -> int:
    """argparse type: an integer of at least 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text}, want 0 or more")
    return int(text)


def setup(device: str = "auto") -> Proc:
    """Join torchrun's process group (or be rank 0 of 1), choose the device; ValueError if it is not there."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k in available if available[k]) if device == "auto" else device
    if not available[kind]:
        raise ValueError(f"--device {kind}: no such device here; use --device auto or cpu")
    if kind == "cuda":
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        torch.backends.cudnn.benchmark = True
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return Proc(rank, world, torch.device(kind, local) if kind == "cuda" else torch.device(kind))


def finish() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def distribute(module: nn.Module, proc: Proc) -> nn.Module:
    """Return DDP of `module`, or with one process the module itself. Buffers (BatchNorm's) stay as the
    processes compute them."""
    if proc.world == 1:
        return module
    # Raised for weights of 1 x 1 convolutions: their two layouts in memory are one.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    ddp = DDP(module)
    ddp.broadcast_buffers = False  # the constructor's argument has another name since torch 2.14
    return ddp


def reducing(module: nn.Module, last: bool):
    """Return the context of a micro-batch: gradients are averaged over processes after the last one only."""
    return nullcontext() if last or not isinstance(module, DDP) else module.no_sync()


def print0(*values) -> None:
    """Print on rank 0 only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*values, flush=True)


class RunStopped(RuntimeError):
    """A training run that cannot go on, such as one whose gradients are no numbers."""


def cli(main) -> None:
    """Run a script's main(); a wrong flag, file or folder becomes one line on stderr and exit code 2."""
    try:
        main()
    except Exception as error:
        expected = isinstance(error, (ValueError, FileNotFoundError, ModuleNotFoundError, RunStopped))
        if expected:
            text = str(error).strip()
            if text.startswith("Caught "):  # in a loader's worker, whose traceback torch puts into the text
                text = text.splitlines()[-1].partition(": ")[2]
            tqdm.write(f"error: {text}", file=sys.stderr)  # below a bar, if there is one
        else:
            traceback.print_exc()
        # The frames hold the loader; its workers ignore SIGTERM, and an exit would wait for them for ever.
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        sys.exit(2 if expected and not isinstance(error, RunStopped) else 1)
    except KeyboardInterrupt:  # train_vae.py and train_sit.py catch the signal themselves, and save
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        finish()


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Autocast type for `--dtype`; auto: bf16 if the hardware has it, else fp16 on CUDA, fp32 elsewhere."""
    if DTYPES[name] is not None:
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # On a CPU without bf16 instructions bf16 is emulated and slower than fp32.
    fast = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype):
    """Return the autocast context for `dtype`; none for fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def plan_batch(batch_size: int, micro_batch_size: int, world: int) -> tuple[int, int]:
    """Return (micro_batch_size, accum_steps); micro 0 = one a device. ValueError names a size that fits."""
    micro = micro_batch_size or max(batch_size // world, 1)
    if batch_size % (world * micro):
        fits = math.ceil(batch_size / (world * micro)) * world * micro
        raise ValueError(f"--batch-size {batch_size} is not a multiple of {world} processes x micro-batch "
                         f"{micro} = {world * micro}; try --batch-size {fits}")
    return micro, batch_size // (world * micro)


def plan_steps(steps: int, epochs: float, num_images: int, batch_size: int) -> int:
    """Return `steps`, or those of `epochs` if it is 0; ValueError if that makes none."""
    steps = steps or int(epochs * (num_images // batch_size))
    if num_images < batch_size:
        raise ValueError(f"{num_images} images are no batch of {batch_size}; try --batch-size {num_images}")
    if steps < 1:
        raise ValueError(f"--epochs {epochs:g} of {num_images} images make no step of --batch-size "
                         f"{batch_size}; give --steps, or a smaller batch")
    return steps


# randomness

def derive_seed(*key) -> int:
    """Return a 63-bit seed, a hash of the key (ints and strings): equal on every machine and process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def noise_for(shape, rows, device, *key) -> Tensor:
    """Normal noise (len(rows), *shape) fp32; row r depends on (*key, r) and the type of `device` alone."""
    out, generator = torch.empty(len(rows), *shape, device=device), torch.Generator(device)
    for i, row in enumerate(rows):
        generator.manual_seed(derive_seed(*key, int(row)))
        out[i].normal_(generator=generator)
    return out


def uniform_for(count: int, rows, device, *key) -> Tensor:
    """Uniform draws in [0, 1), (len(rows), count) fp32; row r is a function of (*key, r) alone."""
    out, generator = torch.empty(len(rows), count), torch.Generator()
    for i, row in enumerate(rows):
        generator.manual_seed(derive_seed(*key, int(row)))
        out[i].uniform_(generator=generator)
    return out.to(device, non_blocking=True)


# the optimisation step

def saved_bytes(forward) -> int:
    """Return the bytes that autograd keeps for the backward of `forward()`; works on the meta device too."""
    seen = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (seen.setdefault(x.untyped_storage()._cdata, x), x)[1], lambda x: x):
        forward()
    return sum(x.untyped_storage().nbytes() for x in seen.values() if not isinstance(x, nn.Parameter))


def compile_modules(*modules) -> None:
    """torch.compile each module in place (names stay); without a compiler stay eager and say so."""
    modules = [m for m in modules if m is not None]
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=next(modules[0].parameters()).device))
    except Exception as error:  # no compiler, no triton, a platform without either
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return print0(f"torch.compile: off, runs eagerly: {reason[:200]}")
    torch._dynamo.config.suppress_errors = True
    for module in modules:
        module.compile()
    print0("torch.compile: on; what cannot be compiled runs eagerly")


def adamw(params, lr: float, betas=(0.9, 0.999), weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW in one fused kernel: faster, and it can skip a step on the device (see `optimizer_step`)."""
    return torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def load_optimizer(optimizer, state: dict) -> None:
    """Load with the parameters' strides: the fused kernel walks parameter and state in storage order."""
    optimizer.load_state_dict(state)
    for param, entry in optimizer.state.items():
        for key, value in entry.items():
            if value.shape == param.shape:
                entry[key] = torch.empty_like(param).copy_(value)


def learning_rate(step: int, lr: float, warmup: int, cooldown: int, num_steps: int) -> float:
    """lr at `step` (0-based): linear rise in `warmup` steps, constant, linear fall in the last `cooldown`."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    fall = min(1.0, (num_steps - step) / cooldown) if cooldown else 1.0
    return lr * min(rise, fall)


def optimizer_step(optimizer, lr: float, max_norm: float, scaler=None) -> tuple[Tensor, Tensor]:
    """Clip, step unless the gradient is not finite, clear; return (gradient norm before clipping, skipped).
    Both are tensors on the device: deciding there, by the fused optimizer's `found_inf`, spares the host a
    synchronisation a step. max_norm 0 = no clipping. scaler: GradScaler of fp16 runs, one an optimizer."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = lr
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(params, max_norm or math.inf)
    skipped = ~torch.isfinite(norm)
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.found_inf = skipped.float()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


class EMA:
    """Exponential moving average of parameters, fp32 (buffers: copies). Decay min(decay, (1 + s) / (10 + s)),
    so that the initialisation is gone in a few hundred steps (0.9999 throughout: still 90 % after 1,000)."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.state = decay, {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, skipped: Tensor) -> None:
        """Move towards the model after optimizer step `step` (1-based), unless that step was skipped."""
        names, state = {k for k, p in model.named_parameters() if p.requires_grad}, model.state_dict()
        weight = (1 - min(self.decay, (1 + step) / (10 + step))) * (~skipped).float()
        average, current = [self.state[k] for k in names], [state[k] for k in names]
        difference = torch._foreach_sub(current, average)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(average, difference)
        for key in state.keys() - names:
            self.state[key].copy_(state[key])

    def load(self, state: dict) -> None:
        """Take over a saved average."""
        for key, value in self.state.items():
            value.copy_(state[key])


# checkpoints

def save_checkpoint(path, state: dict) -> None:
    """Write `state` (tensors and plain values) so that `path` is either the old file or the whole new one."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, format: str | None = None) -> dict:
    """Read a checkpoint of ours onto the CPU; `format` is the kind wanted, ValueError if it is not that."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zip and pickle each raise types of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a readable checkpoint ({reason[:120]})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: a {type(state).__name__}, not a checkpoint of ours")
    found = state.get("format")
    if format is not None and found != format:
        raise ValueError(f"{path}: this is {found or 'a file without a format'}, wanted {format}")
    return state


def checkpoints(folder) -> dict:
    """Return {step: path} of the checkpoints in a folder."""
    return {int(p.stem[5:]): p for p in Path(folder).glob("ckpt_*.pt") if p.stem[5:].isdecimal()}


def latest_checkpoint(folder, format: str):
    """Return (path, state) of the newest readable checkpoint in `folder`, or None; a broken one is named."""
    files = checkpoints(folder)
    for step in sorted(files, reverse=True):
        try:
            state = load_checkpoint(files[step])
        except ValueError as error:
            print0(f"warning: {error}; falling back to the one before")
            continue
        if state.get("format") != format:
            raise ValueError(f"{files[step]}: this is {state.get('format')}, wanted {format}; "
                             f"use another --out")
        return files[step], state
    if files:
        print0(f"warning: none of the checkpoints in {folder} is readable; starting anew")
    return None


def prune_checkpoints(folder, keep: int, step: int) -> None:
    """Delete all but the newest `keep` checkpoints up to `step`, which has just been written; what has a
    higher number could not be read, or the run would have continued from it."""
    files = checkpoints(folder)
    for number in sorted(number for number in files if number <= step)[:-keep]:
        files[number].unlink()




def state_hash(state: dict) -> str:
    """sha256 over names, shapes and values of a state dict: the same weights hash alike in any file."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def versions() -> dict:
    """Return what produced a file: torch, python, git commit (empty outside a checkout)."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent,
                                capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    return {"torch": str(torch.__version__), "python": sys.version.split()[0], "commit": commit}


def check_same(module: nn.Module) -> None:
    """Raise RuntimeError if the processes' parameters have drifted apart (compared by their fp64 sum)."""
    if not dist.is_initialized():
        return
    total = sum(p.detach().double().sum() for p in module.parameters())
    low, high = total.clone(), total.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise RuntimeError(f"parameters differ between processes: sums from {low.item()} to {high.item()}")


# signals

class StopSignal:
    """Turns SIGTERM and SIGINT into a flag, so that the loop can save and leave; a second signal kills."""

    def __init__(self):
        self.seen = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number, _frame) -> None:
        self.seen = True
        signal.signal(number, signal.SIG_DFL)

    def agreed(self, proc: Proc) -> bool:
        """Whether any process has been signalled; collective, so call it at the same step everywhere."""
        if proc.world == 1:
            return self.seen
        flag = torch.tensor(float(self.seen), device=proc.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
