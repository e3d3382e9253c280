"""Throughput, model FLOP utilisation and peak memory of every stage, one JSON line each.

    python bench.py                              # all stages at the paper's sizes, eager and compiled; a GPU
    python bench.py --stage vae sit --batch-size 32 --compile off
    python bench.py --vae tiny --model tiny/1 --image-size 32 --teacher shapes --batch-size 64    # for a CPU

    vae       train_vae.train_step: teacher, mapper, LPIPS, GAN, both optimizers; 32 images
    encode    encode.encode_batch at encode.py's own precision, TF32, unless --dtype says another; 64 images
    sit       train_sit.train_step with --repa and the EMA; 256 images in micro-batches of 128
    sample    10 steps of sample.py's SDE with guidance 2.5 in [0, .75]; step_ms is one; 64 images
    fid       Inception at 299 px whatever the image size, fp32; 64 images

Weights and inputs are random, which makes no step slower or faster. The images are on the device already:
what it costs to read them is in a run's log.jsonl (data_wait_percent). FLOPs are those of one step, by
torch's counter; a multiply-add is 2. MFU is their share of what the device reaches in a product of
matrices of side 8192 (CPU: 512), in the type of --dtype (peak_tflops).
"""
import json
import time
from itertools import product
from types import SimpleNamespace

import common  # before torch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import encode
import inception
import sample
import train_sit
import train_vae
from sit import SIT_SIZES, SiT, SiTConfig
from vae import VAE, VAE_SIZES

STAGES = {"vae": 32, "encode": 64, "sit": 256, "sample": 64, "fid": 64}  # images a step
OWN_DTYPE = {"encode": "tf32", "fid": "fp32"}  # of --dtype auto
SAMPLE_STEPS = 10


def parse_args(argv=None):
    parser = common.new_parser(__doc__)
    add = parser.add_argument_group("bench").add_argument
    add("--stage", nargs="+", default=list(STAGES), choices=list(STAGES), help="what to time")
    add("--vae", default="f16d32", choices=tuple(VAE_SIZES), help="autoencoder")
    add("--model", default="XL/1", choices=tuple(SIT_SIZES), help="SiT")
    add("--teacher", default="vit_base_patch14_dinov2.lvd142m", help="timm model, or 'shapes'")
    add("--image-size", type=common.positive, default=256, help="pixels; below 64 LPIPS and GAN are off")
    add("--batch-size", type=common.positive, help="images per step on this device; None: as above")
    add("--micro-batch-size", type=common.positive, default=128, help="most images of sit in one forward")
    add("--compile", nargs="+", choices=("off", "on"), help="a line for each; None: off, on CUDA both")
    add("--iters", type=common.positive, default=10, help="timed steps; fewer if they take over 10 s")
    common.add_run_flags(parser)
    return parser.parse_args(argv)


def make_step(stage: str, args, proc):
    """Build the networks and random inputs of a stage; return its step, a function without arguments."""
    device, dtype, size = proc.device, common.resolve_dtype(args.dtype, proc.device), args.batch_size
    torch.manual_seed(args.seed)
    vae = VAE(VAE_SIZES[args.vae]).eval()
    channels, side = vae.config.z_channels, args.image_size // vae.stride
    # What data.LatentFolder knows of latents, and a batch as the loaders make it.
    latents = SimpleNamespace(num_classes=1000, mean=torch.zeros(channels), std=torch.ones(channels))
    facts = latents.facts = {"channels": channels, "latent_size": (side, side), "num_classes": 1000,
                             "mean": latents.mean.tolist(), "std": latents.std.tolist()}
    images = torch.randint(256, (size, 3, args.image_size, args.image_size), dtype=torch.uint8, device=device)
    batch = {"images": images, "moments": torch.rand(size, 2 * channels, side, side, device=device),
             "labels": torch.randint(1000, (size,), device=device), "rows": torch.arange(size)}
    flags = f"--batch-size {size} --dtype {args.dtype} --teacher {args.teacher} --compile {args.compile}"
    flags += " --teacher-weights random" * (args.teacher != "shapes")

    if stage == "vae":
        flags += f" --vae {args.vae} --init none --image-size {args.image_size}"
        flags += " --lpips-weights random" if args.image_size >= 64 else " --lpips 0 --gan 0"
        run = train_vae.parse_args(flags.split())
        nets = train_vae.build(run, proc)
        return lambda: train_vae.train_step(nets, [batch], 0, run, 1)

    if stage == "sit":
        run = train_sit.parse_args(f"{flags} --model {args.model} --repa".split())
        nets = train_sit.build(run, latents, proc)
        parts = zip(*(value.split(args.micro_batch_size) for value in batch.values()))
        batches = [dict(zip(batch, part)) for part in parts]
        return lambda: train_sit.train_step(nets, batches, 0, run, 1)

    if stage == "encode":
        common.place(vae, device)
        common.compile_blocks(args.compile, device, vae.encoder)
        return lambda: encode.encode_batch(vae, images, dtype)

    if stage == "sample":
        run = sample.parse_args(f"--steps {SAMPLE_STEPS} --cfg 2.5 --cfg-interval 0 .75 "
                                f"--compile {args.compile}".split())
        model = SiT(SiTConfig(input_size=side, in_channels=channels, **SIT_SIZES[args.model])).eval()
        sample.prepare(model, vae, run, device, dtype)
        return lambda: sample.draw_latents(model, facts, range(size), run, device, dtype)

    net = inception.fuse(inception.FIDInception().eval().requires_grad_(False)).to(device)
    return lambda: net(images)


def time_steps(step, iters: int, device) -> tuple:
    """Return (seconds of the first call, sorted seconds of `iters` calls; fewer, if all take over 10 s).

    Two calls warm up.
    """
    times = []
    while len(times) < 2 + iters and sum(times[2:]) < 10:
        begin = time.perf_counter()
        step()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - begin)
    return times[0], sorted(times[2:])


def main(argv=None):
    args = parse_args(argv)
    proc = common.setup(args.device)
    dtype, on_cuda = common.resolve_dtype(args.dtype, proc.device), proc.device.type == "cuda"
    name = torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads"
    # what the device reaches in a matrix product
    a = torch.randn(2 * [8192 if on_cuda else 512], device=proc.device, dtype=dtype)
    peak = 2 * len(a)**3 / time_steps(lambda: a @ a, 3, proc.device)[1][0] / 1e12
    for stage, compiled in product(args.stage, args.compile or (["off", "on"] if on_cuda else ["off"])):
        common.setup(args.device)  # allows TF32 again, where the stage before did not
        size, dtype = args.batch_size or STAGES[stage], args.dtype
        dtype = OWN_DTYPE.get(stage, dtype) if dtype == "auto" else dtype
        row = {**vars(args), "stage": stage, "batch_size": size, "compile": compiled, "dtype": dtype}
        step = make_step(stage, SimpleNamespace(**row), proc)
        # A CPU's fused attention is unknown to the counter; the products that it is made of are not.
        flops = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), flops, common.compiled_if(False):
            step()
        if on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        first, times = time_steps(step, args.iters, proc.device)
        del step  # with its networks, before the next are built
        seconds = times[len(times) // 2]  # the median
        tflops = flops.get_total_flops() / seconds / 1e12
        row |= {"first_step_s": round(first, 1), "images_per_s": round(size / seconds, 2),
                "step_ms": round(1000 * seconds / (SAMPLE_STEPS if stage == "sample" else 1), 2),
                "tflop_per_s": float(f"{tflops:.4g}"), "mfu_percent": round(100 * tflops / peak, 2),
                "peak_tflops": float(f"{peak:.4g}"), "device": name, "iters": len(times),
                "autocast": str(common.resolve_dtype(dtype, proc.device)), **common.versions()}
        if on_cuda:
            row["peak_memory_gib"] = round(common.peak_memory(proc.device) / 2**30, 2)
        common.print0(json.dumps(row))


if __name__ == "__main__":
    common.cli(main)
