"""Throughput, model FLOP utilisation and peak memory of every stage, one JSON line each.

    python bench.py                                     # all stages at the paper's sizes; wants a GPU
    python bench.py --stage vae sit --batch-size 32     # some of them
    python bench.py --vae tiny --model tiny/1 --image-size 32 --batch-size 64  # quickstart's sizes, for a CPU
    python bench.py --stage fid --against --device cpu  # beside pytorch-fid and torch-fidelity, if installed

Weights and inputs are random: speed does not depend on them. FLOPs are counted by torch's flop counter in the
very step that is timed (a multiply-add is 2); MFU divides by the bf16 peak of the data sheet where the device
is known, else by a matrix product measured here (`peak_source` says which).
"""
import argparse
import importlib.util
import json
import math
import tempfile
import time
import zlib
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import common
import data
from common import positive
from features import Extractor, FIDInception, fuse
from fid import compute_stats
from image_metrics import frechet_distance
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
    add("--image-size", type=positive, default=256, help="pixels")
    add("--teacher-dim", type=positive, default=768, help="width of the teacher's tokens")
    add("--batch-size", type=positive, default=32, help="images per step on this device")
    add("--iters", type=positive, default=10, help="timed steps (after 3 to warm up)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--against", action="store_true", help="beside pytorch-fid and torch-fidelity, if installed: same "
        "images, weights, moments; on the CPU; minutes")
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


def inception_state() -> dict:
    """Return weights of FIDInception that are a function of their names, scaled so that activations vary."""
    with torch.device("meta"):
        state = FIDInception().state_dict()
    for key, value in state.items():
        z = torch.randn(value.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        state[key] = (torch.tensor(0) if key.endswith("num_batches_tracked") else z.abs() + 0.5
                      if key.endswith("running_var") else z * math.sqrt(2 / value[0].numel()) if z.ndim > 1
                      else 0.1 * z + key.endswith("weight"))
    return state


def fid_step(args, device, dtype):
    """One batch of fid.py through Inception, 299 px whatever the image size; fp32."""
    net = FIDInception()
    net.load_state_dict(inception_state())
    net = fuse(net.eval()).to(device)
    images = torch.randint(256, (args.batch_size, args.image_size, args.image_size, 3), dtype=torch.uint8)
    images = images.permute(0, 3, 1, 2).to(device)

    @torch.no_grad()
    def step():
        net(images)
    return step


STAGES = {"vae": vae_step, "encode": encode_step, "sit": sit_step, "sample": sample_step,
          "shapes": shapes_step, "fid": fid_step}


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


# fid.py beside the published packages

def pytorch_fid(state, file, batch_size):
    """Return pytorch-fid 0.3.0's features of images, distance of moments, and distance of folders."""
    from pytorch_fid import fid_score, inception
    published = mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state)
    with published:
        net = inception.InceptionV3([3]).eval()

    def folders(a, b):
        with published:
            return fid_score.calculate_fid_given_paths([a, b], batch_size, "cpu", 2048, num_workers=0)
    return lambda images: net(images / 255)[0].flatten(1), fid_score.calculate_frechet_distance, folders


def torch_fidelity(state, file, batch_size):
    """Return torch-fidelity 0.4.0's features of images, distance of moments, and distance of folders."""
    from torch_fidelity import calculate_metrics
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], file)
    key = "frechet_inception_distance"

    def distance(mu1, sigma1, mu2, sigma2):
        pair = ({"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2})
        return fid_statistics_to_metric(*pair, verbose=False)[key]

    def folders(a, b):
        return calculate_metrics(input1=a, input2=b, fid=True, cuda=False, batch_size=batch_size, cache=False,
                                 feature_extractor_weights_path=file, verbose=False, save_cpu_ram=True)[key]
    return lambda images: net(images)[0], distance, folders


# package: its functions, and its way to resize
PACKAGES = {"pytorch_fid": (pytorch_fid, "pytorch-fid"), "torch_fidelity": (torch_fidelity, "tf1")}


def fid_of_ours(weights, resize, size, batch_size):
    """Return the same three functions by fid.py."""
    def load():
        extractor = Extractor("inception", weights, resize)
        fuse(extractor.net)
        return extractor
    network = load()

    def folders(*pair):
        extractor = load()  # the packages load theirs in this call, too
        loaders = [data.eval_loader(data.ImageFolder(a, size), batch_size, workers=0) for a in pair]
        stats = [compute_stats(loader, extractor, keep_every=0) for loader in loaders]
        return frechet_distance(*(moment() for s in stats for moment in (s.mean, s.cov)))
    return lambda images: network(images)["features"], frechet_distance, folders


def make_moments(noise) -> list:
    """Return mu (2048,), sigma (2048, 2048) of two sets of 5,000 rows, with a falling spectrum."""
    spectrum, moments = 0.5 * torch.exp(-torch.arange(2048, dtype=torch.float64) / 300), []
    for scale in (1, 1.1):
        x = torch.randn(5000, 2048, generator=noise, dtype=torch.float64) * spectrum * scale
        moments += [x.mean(0).numpy(), torch.cov(x.T).numpy()]
    return moments


def write_images(folder, num, size, noise) -> Tensor:
    """Write `num` smooth, noisy images as PNG; return them, uint8 (num, 3, size, size)."""
    x = F.interpolate(torch.rand(num, 3, 8, 8, generator=noise), size=(size, size), mode="bicubic")
    x = (255 * x + 20 * torch.rand(x.shape, generator=noise)).clamp(0, 255).to(torch.uint8)
    for i, image in enumerate(x):
        data.save_grid(f"{folder}/{i:05d}.png", image[None], 1)
    return x


def timed(function, inputs, iters):
    """Return (result, seconds, processor seconds) of a call: the least of `iters`, after a first if > 1."""
    times = []
    for _ in range(iters + (iters > 1)):
        begin = time.perf_counter(), time.process_time()
        result = function(*inputs)
        times.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return result, *map(min, zip(*times[iters > 1:]))


def installed_packages() -> list:
    """Return the names of PACKAGES that are installed; ModuleNotFoundError if none is."""
    found = [name for name in PACKAGES if importlib.util.find_spec(name)]
    if not found:
        raise ModuleNotFoundError("--against: pip install pytorch-fid==0.3.0 torch-fidelity==0.4.0 (or one)")
    return found


@torch.inference_mode()
def compare_fid(args) -> None:
    """Print a JSON line for each installed package and part: seconds (theirs, ours), ratio, difference.

    Parts: network (images to features, fp32), distance (of moments, D = 2,048), total (two folders of
    --batch-size PNG files to the number). cpu_ratio is of processor time: a busy machine changes it little.
    """
    found = installed_packages()
    state, noise, size = inception_state(), torch.Generator().manual_seed(args.seed), args.image_size
    with tempfile.TemporaryDirectory() as folder:
        weights, halves = f"{folder}/weights.pth", (f"{folder}/a", f"{folder}/b")
        torch.save(state, weights)
        images = [write_images(half, args.batch_size, size, noise) for half in halves][0]
        inputs = {"network": (images,), "distance": make_moments(noise), "total": halves}
        for name in found:
            make, resize = PACKAGES[name]
            functions = zip(make(state, weights, args.batch_size),
                            fid_of_ours(weights, resize, size, args.batch_size))
            for part, pair in zip(inputs, functions):
                iters = args.iters if part == "network" else 1
                values, seconds, cpu = zip(*(timed(f, inputs[part], iters) for f in pair))
                theirs, ours = (torch.as_tensor(value, dtype=torch.float64) for value in values)
                row = {"stage": "fid", "part": part, "against": name, "images": args.batch_size,
                       "ratio": round(seconds[0] / seconds[1], 2),
                       "cpu_ratio": round(cpu[0] / max(cpu[1], 1e-9), 2),
                       "seconds": [round(s, 3) for s in seconds], "cpu_seconds": [round(s, 3) for s in cpu],
                       "relative_difference": float((theirs - ours).abs().max() / theirs.abs().max()),
                       "values": [float(theirs.mean()), float(ours.mean())],
                       "threads": torch.get_num_threads(), **common.versions()}
                print(json.dumps(row), flush=True)


def main(argv=None):
    """Entry point of the command."""
    args = parse_args(argv)
    proc = common.setup(args.device)
    device, dtype = proc.device, common.resolve_dtype(args.dtype, proc.device)
    if args.against:
        installed_packages()  # before minutes of other stages
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
               "step_ms": round(1000 * seconds, 2), "tflop_per_s": float(f"{tflops:.4g}"),
               "mfu_percent": round(100 * tflops / peak, 2), "peak_tflops": round(peak, 2),
               "peak_source": source, "batch_size": args.batch_size, "vae": args.vae, "model": args.model,
               "image_size": args.image_size,
               "autocast": str(torch.float32 if stage == "fid" else dtype),
               "compile": args.compile, "device": name,
               "iters": args.iters, **common.versions()}
        if device.type == "cuda":
            row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        print(json.dumps(row), flush=True)
    if args.against:
        compare_fid(args)


if __name__ == "__main__":
    common.cli(main)
