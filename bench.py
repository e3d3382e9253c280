"""Throughput, model FLOP utilisation and peak memory of every stage, one JSON line each.

    python bench.py                                     # all stages at the paper's sizes; wants a GPU
    python bench.py --stage vae sit --batch-size 32     # some of them
    python bench.py --vae tiny --model tiny/1 --image-size 32 --batch-size 64  # quickstart's sizes, for a CPU

Weights and inputs are random: speed does not depend on them. FLOPs are counted by torch's flop counter in the
very step that is timed (a multiply-add is 2); MFU divides by the bf16 peak of the data sheet where the device
is known, else by a matrix product measured here (`peak_source` says which).
"""
import argparse
import json
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

import common
import data
from losses import LPIPS, PatchDiscriminator, discriminator_loss, generator_loss, vae_loss
from mapper import Mapper, MapperConfig, alignment_loss
from sit import SIT_SIZES, SiT, SiTConfig, flow_loss, guided_velocity, interpolate, sample_ode
from vae import VAE, VAE_SIZES, Posterior

# Dense bf16 (V100: fp16).
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "V100": 125}


def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("bench").add_argument
    add("--stage", nargs="+", default=list(STAGES), choices=tuple(STAGES), help="what to time")
    add("--vae", default="f16d32", choices=tuple(VAE_SIZES), help="autoencoder")
    add("--model", default="XL/1", choices=tuple(SIT_SIZES), help="SiT")
    add("--image-size", type=int, default=256, help="pixels")
    add("--teacher-dim", type=int, default=768, help="width of the teacher's tokens")
    add("--batch-size", type=int, default=32, help="images per step on this device")
    add("--iters", type=int, default=10, help="timed steps (after 3 to warm up)")
    add("--compile", action="store_true", help="torch.compile the networks")
    common.add_run_flags(parser)
    return parser.parse_args(argv)


def vae_step(args, device, dtype):
    """One step of train_vae.py: reconstruction, LPIPS, GAN, KL, alignment; then the discriminator."""
    vae = VAE(VAE_SIZES[args.vae]).to(device)
    side = args.image_size // vae.stride
    patch = 2 if side > 16 else 1
    mapper = Mapper(MapperConfig(z_channels=vae.config.z_channels, grid=side // patch, patch_size=patch,
                                 out_dim=args.teacher_dim)).to(device)
    big = args.image_size >= 64  # LPIPS's five poolings and the discriminator want more than 32 px
    lpips = LPIPS("random").to(device) if big else None
    critic = PatchDiscriminator().to(device) if big else None
    if device.type == "cuda":
        for module in (vae, lpips, critic):
            module.to(memory_format=torch.channels_last)
    if args.compile:
        common.compile_modules(vae.encoder, vae.decoder)
    optimizer = common.adamw([*vae.parameters(), *mapper.parameters()], 1e-4)
    optimizer_disc = common.adamw(critic.parameters(), 1e-4) if big else None
    x = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device) * 2 - 1
    target = torch.randn(args.batch_size, (side // patch) ** 2, args.teacher_dim, device=device)

    def step():
        with common.autocast(device, dtype):
            posterior = vae.encode(x)
            z = posterior.sample()
            pred, x_hat = mapper(z), vae.decode(z)
        loss = vae_loss(x, x_hat, Posterior(posterior.mean, posterior.logvar), lpips=lpips,
                        lpips_weight=float(big))["loss"] + alignment_loss(pred, target)
        if big:
            critic.requires_grad_(False)
            with common.autocast(device, dtype):
                loss = loss + 0.1 * generator_loss(critic(x_hat))
            critic.requires_grad_(True)
        loss.backward()
        common.optimizer_step(optimizer, 1e-4, 1.0)
        if big:
            with common.autocast(device, dtype):
                loss = discriminator_loss(critic(x).float(), critic(x_hat.detach()).float())
            loss.backward()
            common.optimizer_step(optimizer_disc, 1e-4, 1.0)
    return step


def encode_step(args, device, dtype):
    """One batch of encode.py."""
    vae = VAE(VAE_SIZES[args.vae]).to(device).eval()
    x = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device) * 2 - 1

    @torch.no_grad()
    def step():
        with common.autocast(device, dtype):
            vae.encode(x)
    return step


def make_sit(args, device):
    """Return (SiT, noise, labels) of the benchmark's size."""
    config = VAE_SIZES[args.vae]
    side = args.image_size // VAE(config).stride
    model = SiT(SiTConfig(input_size=side, in_channels=config.z_channels, num_classes=1000,
                          **SIT_SIZES[args.model]))
    z = torch.randn(args.batch_size, config.z_channels, side, side, device=device)
    if args.compile:
        common.compile_modules(model)
    return model.to(device), z, torch.randint(1000, (args.batch_size,), device=device)


def sit_step(args, device, dtype):
    """One step of train_sit.py (without REPA), with the EMA."""
    model, z, y = make_sit(args, device)
    optimizer = common.adamw([p for p in model.parameters() if p.requires_grad], 1e-4)
    ema = common.EMA(model, 0.9999)

    def step():
        t = torch.rand(len(z), device=device)
        z_t, v = interpolate(z, torch.randn_like(z), t)
        with common.autocast(device, dtype):
            v_pred = model(z_t, t, y)
        flow_loss(v_pred, v).mean().backward()
        _, skipped = common.optimizer_step(optimizer, 1e-4, 1.0)
        ema.update(model, 1, skipped)
    return step


def sample_step(args, device, dtype):
    """Ten guided Euler steps of sample.py and the decoder: images/s here is for 10 steps."""
    model, z, y = make_sit(args, device)
    vae = VAE(VAE_SIZES[args.vae]).to(device).eval()
    model.eval()

    @torch.no_grad()
    def step():
        with common.autocast(device, dtype):
            vae.decode(sample_ode(lambda z_t, t: guided_velocity(model, z_t, t, y, 1.5), z, 10))
    return step


def shapes_step(args, device, dtype):
    """Rendering of the embedded set, one core of the CPU."""
    seeds = iter(range(10**6))
    return lambda: data.Shapes(args.batch_size, seed=next(seeds))


STAGES = {"vae": vae_step, "encode": encode_step, "sit": sit_step, "sample": sample_step,
          "shapes": shapes_step}


def wait(device):
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(step, iters, device):
    """Median seconds of one call of `step`, after 3 calls to warm up."""
    times = []
    for i in range(3 + iters):
        wait(device)
        begin = time.perf_counter()
        step()
        wait(device)
        times.append(time.perf_counter() - begin)
    return sorted(times[3:])[iters // 2]


def peak_tflops(device, dtype):
    """Return (peak TFLOP/s, where it is from)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    for key, value in PEAK_TFLOPS.items():
        if key in name and dtype != torch.float32:
            return value, f"data sheet of {key}, dense bf16"
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds_of(lambda: a @ a, 5, device) / 1e12, f"{n} x {n} matrix product measured here"


def main(argv=None):
    """Entry point of the command."""
    args = parse_args(argv)
    proc = common.setup(args.device)
    device, dtype = proc.device, common.resolve_dtype(args.dtype, proc.device)
    peak, source = peak_tflops(device, dtype)
    name = (torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"CPU, {torch.get_num_threads()} threads")
    for stage in args.stage:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(args.seed)
        step = STAGES[stage](args, device, dtype)
        with FlopCounterMode(display=False) as counter:
            step()
        seconds = seconds_of(step, args.iters, device)
        tflops = counter.get_total_flops() / seconds / 1e12
        row = {"stage": stage, "images_per_s": round(args.batch_size / seconds, 2),
               "step_ms": round(1000 * seconds, 2), "tflop_per_s": round(tflops, 3),
               "mfu_percent": round(100 * tflops / peak, 2), "peak_tflops": round(peak, 2),
               "peak_source": source, "batch_size": args.batch_size, "vae": args.vae, "model": args.model,
               "image_size": args.image_size, "autocast": str(dtype), "compile": args.compile, "device": name,
               "iters": args.iters, **common.versions()}
        if device.type == "cuda":
            row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    common.cli(main)
