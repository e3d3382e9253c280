"""What every script needs and no paper is about: processes, precision, seeds, the guarded step, progress.

* One process without a launcher, many under torchrun; `setup()` reads torchrun's variables and nothing else.
* Randomness is a function of (seed, stream, step, row of the global batch), not of world size or micro-batch.
* A training step does not wait for the device: numbers stay there until they are logged. Only the question
  whether a signal has come waits, every 10 steps of several processes, or in each that takes over 0.5 s.
"""
import argparse
import hashlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

# Idle threads sleep. Spinning ones are a tenth faster on idle cores, and were 13 times slower beside other
# work. OpenMP reads this once, when torch is loaded: so scripts import this file first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch._functorch.config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
          "tf32": torch.float32}
# The classes that are compiled. GroupNorm is one that no block has around it; Block is timm's, of a ViT.
BLOCKS = {"SiTBlock", "ResnetBlock", "AttnBlock", "GroupNorm", "LPIPS", "Block"}


# processes

class Proc(NamedTuple):
    """This process among its peers: rank of world, and the device it computes on."""
    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


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
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    if world > 1 and not dist.is_initialized():
        # An hour: one process may have more to read, or an evaluation to do, while the others wait.
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=1))
    return Proc(rank, world, torch.device(kind, local) if kind == "cuda" else torch.device(kind))


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def agree(**facts) -> None:
    """Raise ValueError, in every process, if the processes do not all have the same facts."""
    everyone = [facts] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(everyone) > 1:
        dist.all_gather_object(everyone, facts)
    for (rank, theirs), key in product(enumerate(everyone), facts):
        if theirs[key] != everyone[0][key]:
            raise ValueError(f"processes see different {key}: process 0 {everyone[0][key]}, process {rank} "
                             f"{theirs[key]}; folders must be shared, or equal")


def share_out(items: list, proc: Proc) -> list:
    """Return this process's share of `items`, as evenly as can be. Rank 0's list counts for all."""
    box = [items]
    if proc.world > 1:
        dist.broadcast_object_list(box)
    return box[0][proc.rank::proc.world]


class Behind:
    """Run functions in a thread beside the caller, one after the other.

        with common.Behind() as behind:    # leaving it waits for the last one, also after an error
            behind(write, path, state)     # returns at once, unless the one before is not done
    """

    def __init__(self):
        self.pool, self.last = ThreadPoolExecutor(1), None

    def __enter__(self):
        return self

    def __call__(self, function, *args) -> None:
        self.wait()
        self.last = self.pool.submit(function, *args)

    def check(self) -> None:
        """Raise what the last function has raised, if it is done."""
        if self.last and self.last.done():
            self.wait()

    def wait(self) -> None:
        """Return once the last function is done; raise, once, what it has raised."""
        last, self.last = self.last, None
        if last:
            last.result()

    def __exit__(self, kind, *_):
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            print0(f"warning: {error}")  # the error that is on its way counts


LOCKS = {}  # the lock files of this process; closing one would give its lock up


def claim(folder, proc: Proc) -> None:
    """Make `folder` this run's own until the process ends, in whatever way; remove a killed run's leftovers.

    Rank 0 does it for all, which wait. Raises ValueError if another run writes there, or if nobody can.
    """
    if not proc.main:
        return barrier()
    folder = Path(folder).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        LOCKS[folder] = LOCKS.get(folder) or open(folder / ".lock", "w")
        import fcntl
        # A record lock: loader workers do not inherit it, so it ends with this process.
        fcntl.lockf(LOCKS[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another run writes there; wait, or give another --out") from None
    except (ModuleNotFoundError, OSError) as error:
        if folder not in LOCKS:
            raise ValueError(f"--out {folder}: no folder that can be written ({error.strerror})") from error
        # Windows; Lustre without -o flock
        print(f"warning: {folder} has no locks: a second run into it would not be noticed")
    for file in folder.glob(".*.tmp"):
        file.unlink()
    barrier()


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a network of convolutions to `device`, channels last in memory: so they are fastest."""
    channels_last = device.type != "mps"  # where it has given wrong results
    return module.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)


def distribute(module: nn.Module, proc: Proc) -> nn.Module:
    """Return DDP of `module`, or with one process the module itself. Buffers (BatchNorm's) stay as the
    processes compute them."""
    if proc.world == 1:
        return module
    # DDP warns about 1 x 1 convolutions, whose two memory layouts are identical. Harmless.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    ddp = DDP(module, gradient_as_bucket_view=True)  # no copy of the gradients
    ddp.broadcast_buffers = False  # the constructor's argument has another name since torch 2.14
    return ddp


def reducing(module: nn.Module, last: bool):
    """Return the context of a micro-batch: gradients are averaged over processes after the last one only."""
    return nullcontext() if last or not isinstance(module, DDP) else module.no_sync()


def check_same(module: nn.Module) -> None:
    """Raise ValueError if the processes' parameters have drifted apart (compared by their sum)."""
    agree(parameters=str(sum(p.detach().sum().cpu().double() for p in module.parameters()).item()))


def print0(*values) -> None:
    """Print a line on rank 0 only, above a progress bar if there is one."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(" ".join(map(str, values)))
        sys.stdout.flush()


# commands

class RunStopped(RuntimeError):
    """A training run that cannot go on, such as one whose gradients are no numbers."""


def cli(main) -> None:
    """Run a script's main(); an error that a user can mend becomes one line on stderr.

    Exit codes: 2 for a wrong flag, file or folder, 1 for a run that could not go on, 130 and 143 for a run
    that SIGINT or SIGTERM stopped.
    """
    code = 0
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code
    except BaseException as error:
        code = report_error(error)
    if code:
        sys.stdout.flush()
        for worker in multiprocessing.active_children():
            worker.kill()  # loader workers ignore SIGTERM, and would be waited for
        # At once: peers may wait for this process in a collective. torchrun ends them when it is gone.
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()


def report_error(error: BaseException) -> int:
    """Print an error as one line, the last one; return the exit code."""
    text, code = str(error).strip(), 1
    if isinstance(error, KeyboardInterrupt):  # the trainers catch the signal themselves, and save
        text, code = "interrupted", 130
    elif isinstance(error, (ValueError, FileNotFoundError, ModuleNotFoundError)):
        code, text = 2, text + "; pip install it" * isinstance(error, ModuleNotFoundError)
    elif isinstance(error, torch.OutOfMemoryError):
        text = f"{text.partition('. ')[0]}; try a smaller --batch-size, --micro-batch-size, --bn-group (VAE)"
    elif not isinstance(error, (RunStopped, OSError)):
        traceback.print_exception(error)
    if text.startswith("Caught "):  # in a loader's worker: torch puts the whole traceback into the text
        text = text.splitlines()[-1].partition(": ")[2]
    text = f"error: {' '.join(text.split())}"
    for bar in list(tqdm._instances):
        bar.close()  # or it would be drawn once more, below the error
    print(text, file=sys.stderr, flush=True)
    with suppress(KeyError, OSError):  # torchrun's own report ends with what is in this file
        line = json.dumps({"message": text, "timestamp": int(time.time())})
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(line)
    return code


class Parser(argparse.ArgumentParser):
    """A parser, also of sub-commands, that tells a wrong flag in one line."""

    def error(self, message):
        """Print the message and leave."""
        self.exit(2, f"{self.prog}: error: {message}; -h lists the flags\n")


def new_parser(doc: str) -> argparse.ArgumentParser:
    """Return the parser of a script: described by the first paragraph of its docstring; -h shows defaults."""
    return Parser(description=doc.split("\n\n")[0], allow_abbrev=False,
                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def add_run_flags(parser, out: str | None = None) -> None:
    """Add the flags that every script has: device, precision, seed, and where to write."""
    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="auto: CUDA, MPS or CPU")
    add("--dtype", default="auto", choices=tuple(DTYPES), help="autocast: bf16, else fp16 on CUDA, or fp32")
    add("--seed", type=int, default=0, help="seed of all randomness")
    if out is not None:
        add("--out", default=out, help="output folder")


def add_training_flags(parser, log_every: int, save_every: int) -> None:
    """Add what both trainers have beside their recipe: schedule, speed, logging, saving."""
    add = parser.add_argument_group("schedule and speed").add_argument
    add("--steps", type=natural, default=0, help="optimisation steps; 0 = from --epochs")
    add("--warmup", type=natural, default=0, help="steps over which lr rises from 0")
    add("--cooldown", type=natural, default=0, help="last steps over which lr falls to 0")
    add("--beta2", type=float, default=0.999, help="AdamW's decay of squared gradients; .99 for short runs")
    add("--grad-clip", type=float, default=1.0, help="gradient norm; 0 = off")
    add("--micro-batch-size", type=natural, default=0, help="images at once; 0 = all, VAE: what fits 80 GB")
    add_compile_flag(parser)
    add("--checkpointing", action="store_true", help="recompute activations in backward: less memory, slower")
    add = parser.add_argument_group("logging and saving").add_argument
    add("--log-every", type=positive, default=log_every, help="steps")
    add("--save-every", type=positive, default=save_every, help="steps between checkpoints")
    add("--keep", type=positive, default=2, help="newest checkpoints kept")
    add("--stop-after-bad", type=positive, default=100, help="stop after so many non-finite steps in a row")
    add("--tensorboard", action="store_true", help="also log there (needs the package tensorboard)")
    add("--wandb", default=None, metavar="PROJECT", help="also log there (needs the package wandb)")
    add("--dry-run", action="store_true", help="print configuration, sizes and batches, then leave")


def add_compile_flag(parser) -> None:
    """Add --compile to a command whose networks may be compiled."""
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"), help="auto: on CUDA")


def natural(text: str, least: int = 0) -> int:
    """argparse type: an integer of at least 0; `positive`: of at least 1."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text}, want an integer of {least} or more")
    return int(text)


positive = partial(natural, least=1)


def print_config(args) -> None:
    """Print every flag with its value."""
    print0("configuration: " + " ".join(f"{key}={value}" for key, value in sorted(vars(args).items())))


def print_plan(args, proc: Proc, networks: dict, num_images: int, micro: int, accum: int, steps: int) -> None:
    """Print the resolved configuration, parameter counts {name: module or None} and the batch arithmetic."""
    print_config(args)
    for name, module in networks.items():
        if module is not None:
            params = list(module.parameters())
            trained = sum(p.numel() for p in params if p.requires_grad)
            print0(f"parameters: {name} {sum(p.numel() for p in params):,} ({trained:,} trained)")
    print0(f"precision: {resolve_dtype(args.dtype, proc.device)} autocast; device: {proc.device}")
    per_epoch = num_images // args.batch_size
    print0(f"batch: {args.batch_size} global = {proc.world} processes x {accum} micro-batches x {micro}; lr "
           f"{args.lr:g}; {per_epoch} steps/epoch, {steps:,} steps = {steps / max(per_epoch, 1):.1f} epochs")


def plan_batch(batch_size: int, micro_batch_size: int, world: int, fits: int = 0, group: int = 1) -> tuple:
    """Return (micro-batch size, micro-batches a step); ValueError names a size that fits.

    micro_batch_size 0: all images of a device, or at most `fits` (0: no limit). group: images that share the
    statistics of a BatchNorm; if they spanned two micro-batches, a step would depend on how a batch is cut.
    """
    share = max(batch_size // world, 1)
    sizes = [m for m in range(1, share + 1) if share % m == 0 and m % group == 0] or [share]
    small = [m for m in sizes if m <= fits] or sizes[:1]  # at least one group, whether it fits or not
    micro = micro_batch_size or (small if fits else sizes)[-1]
    if batch_size % (world * micro):
        size = math.ceil(batch_size / (world * micro)) * world * micro
        raise ValueError(f"--batch-size {batch_size} is not a multiple of {world} processes x micro-batch "
                         f"{micro}; try --batch-size {size}")
    if micro % group:
        raise ValueError(f"micro-batch {micro} is no multiple of --bn-group {group}; make it and the batch "
                         f"multiples of {group}, or try --bn-group {math.gcd(micro, group)}")
    return micro, batch_size // (world * micro)


def plan_steps(steps: int, epochs: float, num_images: int, batch_size: int, saved: dict | None = None) -> int:
    """Return `steps`, or those of `epochs` if it is 0; ValueError if that makes none.

    saved: checkpoint of the run that is continued. What it has seen counts in images, as its batch size may
    have been another.
    """
    if num_images < batch_size:
        raise ValueError(f"a batch of {batch_size} wants more images; try --batch-size {num_images} or less")
    step, seen = (saved["step"], saved["images_seen"]) if saved else (0, 0)
    steps = steps or max(step, step + int(epochs * (num_images // batch_size)) - seen // batch_size)
    if steps < 1:
        raise ValueError(f"--epochs {epochs:g} of {num_images} images make no step; give --steps")
    return steps


def check_resume(saved: dict, args, fixed: list, then: dict, now: dict) -> None:
    """Say which flags differ from those of the run that is continued.

    fixed: flags that make another run. then, now: facts, of which their hashes and num_classes do; older
    checkpoints lack some. ValueError names what differs, with both sides.
    """
    there, here = ({**flags, **{key: facts[key] for key in facts if key.endswith(("_hash", "num_classes"))}}
                   for flags, facts in ((saved["args"], then), (vars(args), now)))
    changed = {key: value for key, value in here.items() if there.get(key, value) != value}
    for key in ("num_classes", "images_hash", "vae_hash", "latents_hash", *fixed):
        if key in changed:
            raise ValueError(f"{saved['path']} was trained with {key} {there[key]}, not {changed[key]}; give "
                             f"the same {key.removesuffix('_hash')}, or another --out")
    print0(f"continuing from {saved['path']} at step {saved['step']}")
    if changed:
        print0("changed: " + ", ".join(f"{key} {there[key]} -> {value}" for key, value in changed.items()))


def versions() -> dict:
    """Return what produced a file: torch, python, git commit (empty outside a checkout)."""
    commit = ""
    with suppress(OSError):  # no git on this machine
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent,
                                capture_output=True, text=True).stdout.strip()
    return {"torch": str(torch.__version__), "python": sys.version.split()[0], "commit": commit}


# precision

def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Autocast type for `--dtype`; auto: bf16 if the hardware has it, else fp16 on CUDA, fp32 elsewhere."""
    if name == "fp32":
        forbid_tf32()
    if DTYPES[name] is not None:
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # On a CPU without bf16 instructions bf16 is emulated and slower than fp32.
    fast = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if fast else torch.float32


def forbid_tf32() -> None:
    """Compute products of fp32 in full. Else those of CUDA are TF32, by torch's defaults and `setup`."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def autocast(device: torch.device, dtype: torch.dtype):
    """Return the autocast context for `dtype`; none for fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# randomness

def derive_seed(*key) -> int:
    """Return a 63-bit seed, a hash of the key (ints and strings): equal on every machine and process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def noise_for(shape, rows, device, *key) -> Tensor:
    """Normal noise (len(rows), *shape) fp32; row r depends on (*key, r) and the type of `device` alone."""
    return fill_rows(torch.empty(len(rows), *shape, device=device), Tensor.normal_, rows, key)


def uniform_for(count: int, rows, device, *key) -> Tensor:
    """Uniform draws in [0, 1), (len(rows), count) fp32; row r is a function of (*key, r) alone."""
    return fill_rows(torch.empty(len(rows), count), Tensor.uniform_, rows, key).to(device, non_blocking=True)


def fill_rows(out: Tensor, draw, rows, key) -> Tensor:
    """Fill each row r of `out` by draw(row, generator), the generator seeded by (*key, r); return `out`."""
    generator = torch.Generator(out.device)
    for values, row in zip(out, rows):
        draw(values, generator=generator.manual_seed(derive_seed(*key, int(row))))
    return out


# the optimisation step

def compile_blocks(wanted: str, device: torch.device, *networks) -> None:
    """torch.compile the BLOCKS of the networks in place (names stay), as --compile wants it.

    Block by block: equal ones share their code, so it takes seconds where whole networks take minutes. The
    code is made in the first step. Without a compiler everything stays eager, and a line says so.
    """
    if wanted == "off" or wanted == "auto" and device.type != "cuda":
        return
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # no compiler, no triton, a platform without either
        return print0(f"torch.compile: off, runs eagerly: {' '.join(repr(error).split())[:200]}")
    torch._dynamo.config.suppress_errors = True
    # By default 8 variants of the same code: a VAE has a dozen shapes, each once for every precision.
    torch._dynamo.config.cache_size_limit = 256
    torch._dynamo.config.optimize_ddp = False  # it would cut the blocks in pieces, as it must whole networks
    torch._functorch.config.donated_buffer = False  # --gan-adaptive goes through a graph more than once
    for module in chain.from_iterable(network.modules() for network in networks if network is not None):
        if type(module).__name__ in BLOCKS:
            module.compile(dynamic=False)  # code for any shape would be slower
    print0("torch.compile: on, block by block; the first step makes the code")


def compiled_if(whole: bool):
    """Return the context of a batch: one that is not whole is no reason to make code anew."""
    return torch.compiler.set_stance("default" if whole else "force_eager")


def adamw(module: nn.Module, lr: float, beta2: float = 0.999, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW in one fused kernel: faster, and it can skip a step on the device (see `optimizer_step`)."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)


def load_optimizer(optimizer, state: dict) -> None:
    """Load with the parameters' strides: the fused kernel walks parameter and state in storage order."""
    optimizer.load_state_dict(state)
    for param, entry in optimizer.state.items():
        for key, value in entry.items():  # copies: nothing of the file that was read stays in use
            entry[key] = torch.empty_like(param if value.shape == param.shape else value).copy_(value)


def learning_rate(step: int, lr: float, warmup: int, cooldown: int, num_steps: int) -> float:
    """lr at `step` (0-based): linear rise in `warmup` steps, constant, linear fall in the last `cooldown`."""
    return lr * min(1.0, (step + 1) / max(warmup, 1), (num_steps - step) / max(cooldown, 1))


def backward(loss: Tensor, scaler=None) -> None:
    """Backpropagate; with a GradScaler (fp16) the scaled loss."""
    (loss if scaler is None else scaler.scale(loss)).backward()


def optimizer_step(optimizer, lr: float, max_norm: float, scaler=None) -> tuple[Tensor, Tensor]:
    """Clip, step unless the gradient is not finite, clear; return (gradient norm before clipping, skipped).

    Both are tensors on the device: the fused optimizer decides there, by `found_inf`, so the host does not
    wait. max_norm 0 = no clipping. scaler: GradScaler of fp16 runs, one an optimizer.
    """
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
        # The fused kernel of MPS does not look at found_inf: there the host waits and decides.
        if norm.device.type != "mps" or not skipped:
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
        # A weight on the device for each: the host need not know whether the step was skipped.
        torch._foreach_lerp_([self.state[k] for k in names], [state[k] for k in names], [weight] * len(names))
        for key in state.keys() - names:
            self.state[key].copy_(state[key])

    def load(self, state: dict) -> None:
        """Take over a saved average."""
        for key, value in self.state.items():
            value.copy_(state[key])


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over groups of `group` images, so that a step does not depend on micro-batch and world size.

    Running statistics move once per optimizer step, in `update_batch_norms`, by the mean over all groups and
    processes. What they are is collected in .seen until then.
    Forward: images (B, C, H, W), B a multiple of `group`.
    """
    group, seen = 32, None

    @classmethod
    def convert(cls, module: nn.Module, group: int) -> nn.Module:
        """Turn each BatchNorm2d of `module` into one of groups: its tensors stay, its forward changes."""
        for layer in module.modules():
            if type(layer) is nn.BatchNorm2d:
                layer.__class__, layer.group = cls, group
        return module

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        out, self.seen = [], self.seen or []
        for part in x.split(self.group):
            mean, var = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
            # Momentum 1 fills mean and var with the statistics of this group.
            out.append(F.batch_norm(part, mean, var, self.weight, self.bias, True, 1.0, self.eps))
            self.seen.append(torch.stack([mean, var]))
        return torch.cat(out)


@torch.no_grad()
def update_batch_norms(module: nn.Module, skipped: Tensor) -> None:
    """Move the running statistics of every GroupBatchNorm2d below `module`; once per optimizer step.

    A skipped step leaves them as they were.
    """
    for layer in module.modules():
        if isinstance(layer, GroupBatchNorm2d) and layer.seen:
            now = torch.stack(layer.seen).mean(0)  # (2, C)
            layer.seen = None
            if dist.is_initialized():
                dist.all_reduce(now)
                now /= dist.get_world_size()
            for running, new in zip((layer.running_mean, layer.running_var), now):
                running.copy_(torch.where(skipped, running, running.lerp(new, layer.momentum)))
            layer.num_batches_tracked += ~skipped


# progress

def progress_bar(steps, proc: Proc, name: str):
    """Iterate over `steps` with a tqdm bar on rank 0."""
    return tqdm(steps, desc=name, disable=not proc.main, mininterval=2.0)


def peak_memory(device: torch.device) -> int:
    """Return the bytes that tensors took at most on a CUDA device, else this process (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Progress:
    """Bar, log.jsonl, throughput and stop signal of a run. Numbers stay on the device until they are logged.

        with Behind() as behind:
            for step, batches in progress.steps(loader, accum, behind):  # from 1; ends after SIGTERM, too
                terms, skipped = train_step(...)
                progress.record(terms, skipped)
                if progress.should_save(): behind(...)

    The stopwatch runs from asking for the batches to the end of `record`: evaluation and saving, which come
    after, do not count.
    Rank 0 writes; every process must call `record`, which is collective.
    """

    def __init__(self, args, proc: Proc, step: int, num_steps: int, show=("loss",), saved=None):
        """saved: the checkpoint of this step, if a run is continued; it has images_seen."""
        self.args, self.proc, self.step, self.num_steps, self.show = args, proc, step, num_steps, show
        self.images_seen = saved["images_seen"] if saved else 0
        self.sums = {}  # {name: (sum, count)} since the last row
        self.bad_streak = self.worst_streak = torch.zeros((), device=proc.device)
        self.seconds, self.waited, self.last_read, self.shown, self.first = 0.0, 0.0, step, {}, step + 1
        self.stopping = self.signalled = 0  # the number of the signal
        self.next_look, self.looked, self.must_save, self.saved = step, (step, time.monotonic()), False, step
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        self.file, self.bar, self.sinks = None, None, []
        if proc.main:
            self.open_log()

    def open_log(self) -> None:
        """Open log.jsonl, the bar and what else was asked for; the first row says what runs where."""
        args, path = self.args, Path(self.args.out) / "log.jsonl"
        self.cut_log(path)
        self.file = open(path, "ab", buffering=0)
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(args.out)
            self.sinks.append((lambda name, value: board.add_scalar(name, value, self.step), board.close))
        if args.wandb:
            import wandb
            run = wandb.init(project=args.wandb, config=vars(args), dir=args.out)
            self.sinks.append((lambda name, value: run.log({name: value}, step=self.step), run.finish))
        self.write({"step": self.step, "config": vars(args), "command": " ".join(sys.argv),
                    "device": str(self.proc.device), "world": self.proc.world, **versions()})
        self.bar = tqdm(total=self.num_steps, initial=self.step, desc=path.parent.name, unit="step",
                        mininterval=2.0)

    def cut_log(self, path: Path) -> None:
        """Leave out of log.jsonl what comes again, the rows after this step, and lines that are damaged."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept, temporary = [], path.with_name(".log.jsonl.tmp")
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            with suppress(ValueError, TypeError, KeyError):
                row = json.loads(line)
                if line.endswith(b"\n") and row["step"] + ("config" in row) <= self.step:
                    kept.append(line)
        with suppress(OSError):  # a full disk; training goes on
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, path)

    def look(self, function, *args) -> None:
        """Log and print what an evaluation returns. Training goes on where it fails. After a signal it is
        left out."""
        try:
            with compiled_if(False):
                row = {} if self.stopping else function(*args) or {}
            self.log(row)
            if row:
                print0(f"step {self.step}:", ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else
                                                       f"{name} {value}" for name, value in row.items()))
        except Exception as error:
            print0(f"warning: step {self.step}: {function.__name__} failed: {str(error)[:300]}")

    def on_signal(self, number, _frame) -> None:
        """Note the signal, so that the loop can save and leave; a second Ctrl-C kills.

        What repeats it within two seconds is no second one: torchrun passes on what its processes got, too.
        """
        if not self.signalled:
            self.signalled, self.signal_time = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self.signal_time + 2:
            raise KeyboardInterrupt

    def steps(self, loader, accum: int, behind=Behind()):
        """Yield (step, its micro-batches) until the last step; SystemExit after a signal, once saved.

        Raises what `behind`, which writes the checkpoints, has raised.
        """
        if self.step >= self.num_steps:
            print0(f"nothing left to do at step {self.step} of {self.num_steps}; more: --steps or --epochs")
        batches = iter(loader)
        while self.step < self.num_steps and not self.stopping:
            behind.check()
            begin = time.perf_counter()
            micro_batches = [next(batches) for _ in range(accum)]
            self.waited += time.perf_counter() - begin
            self.step, self.began = self.step + 1, begin
            self.images_seen += self.args.batch_size
            yield self.step, micro_batches
        behind.wait()
        if self.file:
            for close in (self.bar.close, self.file.close, *(close for _, close in self.sinks)):
                close()
        if self.stopping and self.step < self.num_steps:
            print0(f"stopped by a signal; {self.newest()}; the same command continues")
            barrier()  # torchrun ends the others 30 s after the first has left: rank 0 may still save
            raise SystemExit(128 + self.stopping)
        if self.must_save:
            raise RunStopped(f"the last steps of {self.step} were skipped, and are not saved; "
                             f"{self.newest()}; try a lower --lr or --dtype fp32")
        if self.step >= self.first:
            print0(f"done: {self.args.out}, step {self.step}")

    def newest(self) -> str:
        """Say which checkpoint there is to go back to."""
        return f"the newest checkpoint is of step {self.saved}" if self.saved else "nothing has been saved"

    def should_save(self) -> bool:
        """Whether to save now: every --save-every steps, at the last, before stopping, and at the first one:
        a save that fails should fail soon.

        While steps are skipped it is put off: weights that make no finite gradient may be spoilt, and would
        push the good ones out. Only a single skipped step at the end is saved: it changed nothing.
        """
        last = bool(self.stopping) or self.step == self.num_steps
        if not self.must_save or int(self.bad_streak) > last:  # waits for the device
            return False
        self.must_save, self.saved = False, self.step
        return True

    def record(self, terms: list, skipped: Tensor) -> None:
        """Take in a step: `terms` are dicts of scalars (tensor, number, or (sum, count)), one a micro-batch.

        Every --log-every steps, and before a save, their means are read from the device, logged and checked:
        what is saved begins a new row. RunStopped is raised if --stop-after-bad steps in a row were skipped.
        """
        for name, value in (item for part in terms for item in part.items()):
            value, count = value if isinstance(value, tuple) else (value, 1)
            total, counts = self.sums.get(name, (0, 0))
            self.sums[name] = total + torch.as_tensor(value).detach().float(), counts + count
        self.bad_streak = (self.bad_streak + 1) * skipped
        self.worst_streak = torch.maximum(self.worst_streak, self.bad_streak)
        self.agree_to_stop()
        self.must_save |= bool(self.stopping) or self.step == 1 or self.due(self.args.save_every)
        # Steps 10 and 20 are logged whatever --log-every says.
        due = self.must_save or self.due(self.args.log_every) or self.step in (10, 20)
        row = self.read_means() if due and self.sums else None  # this waits for the device
        self.seconds += time.perf_counter() - self.began
        if self.bar and self.step == self.first:
            print0(f"first step: {self.seconds:.1f} s")  # with compiling, where that is on
        if row is not None:
            self.log({**row, **self.read_throughput()})
            self.check_health(row)
        if self.bar:
            self.bar.update(self.step - self.bar.n)

    def read_means(self) -> dict:
        """Return {name: mean over steps and processes} and start anew; waits for the device."""
        # In the order of adding, which is the same in every process.
        values = [torch.as_tensor(value) for pair in self.sums.values() for value in pair]
        table = torch.stack([value.to(self.proc.device, torch.float32) for value in values]).view(-1, 2)
        if dist.is_initialized():
            dist.all_reduce(table)
        names, self.sums = list(self.sums), {}
        return {name: total / n if n else math.nan for name, (total, n) in zip(names, table.tolist())}

    def read_throughput(self) -> dict:
        """Return speed, waiting and memory of the steps since the last call."""
        done, left = self.step - self.last_read, self.num_steps - self.step
        seconds = max(self.seconds, 1e-9)
        row = {"images_per_s": done * self.args.batch_size / seconds, "step_ms": 1000 * seconds / done,
               "data_wait_percent": 100 * self.waited / seconds, "eta_s": left * seconds / done,
               "peak_memory_gib": peak_memory(self.proc.device) / 2**30}
        self.seconds, self.waited, self.last_read = 0.0, 0.0, self.step
        return row

    def check_health(self, row: dict) -> None:
        """Raise RunStopped, naming the first non-finite term, once too many steps in a row were skipped; warn
        of a run that has died: gradient, GAN and alignment (those there are) all 0."""
        vital = [abs(row[key]) for key in ("grad_norm", "gan", "align") if key in row]
        if vital and all(value < 1e-8 for value in vital):
            print0(f"warning: step {self.step}: gradient and losses are 0; go back, with a lower --lr")
        streak = int(self.worst_streak)
        if streak >= self.args.stop_after_bad:
            bad = [key for key, value in row.items() if not math.isfinite(value)]
            raise RunStopped(f"step {self.step}: {streak} steps in a row skipped, first non-finite term: "
                             f"{[*bad, 'the gradient'][0]}; {self.newest()}; try a lower --lr, --dtype fp32")

    def agree_to_stop(self) -> None:
        """Set `stopping` in all processes once any was signalled.

        torchrun kills 30 s after its signal, so slow steps are looked at one by one, others ten at a time.
        """
        if self.proc.world == 1:
            self.stopping = self.signalled
        elif self.step >= self.next_look:
            (step, then), self.looked = self.looked, (self.step, time.monotonic())
            seconds = (self.looked[1] - then) / (self.step - step)  # of one step
            news = torch.tensor([self.signalled, seconds], dtype=torch.float32, device=self.proc.device)
            dist.all_reduce(news, op=dist.ReduceOp.MAX)
            signalled, seconds = news.tolist()
            self.stopping = int(signalled)
            self.next_look = self.step + (1 if seconds > 0.5 else 10)

    def due(self, every: int) -> bool:
        """Whether to do now what is done every so many steps and at the last one (0: only then)."""
        return self.step == self.num_steps or bool(every) and self.step % every == 0

    def log(self, row: dict) -> None:
        """Write one line of log.jsonl, show the chosen values on the bar."""
        if not self.file or not row:
            return
        self.write({"step": self.step, **row})
        for (sink, _), (name, value) in product(self.sinks, row.items()):
            if isinstance(value, (int, float)):
                sink(name, value)
        # A loader that is too slow, a memory nearly full: they are seen at once.
        shown = (*self.show, "images_per_s", "data_wait_percent", "peak_memory_gib")
        self.shown |= {key: f"{row[key]:.4g}" for key in shown if key in row}
        self.bar.set_postfix(self.shown)

    def write(self, row: dict) -> None:
        """Append one JSON object to log.jsonl; numbers that JSON does not have become text.

        Training goes on where that fails, on a full disk for one.
        """
        row = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line = (json.dumps({"time": round(time.time(), 1), **row}) + "\n").encode()
        end = self.file.tell()
        try:
            if self.file.write(line) < len(line):  # a part of it: the disk became full
                self.file.truncate(end)
                raise OSError("no space left on its disk")
        except OSError as error:
            print(f"warning: log.jsonl lacks a row of step {self.step}: {error}", file=sys.stderr)
