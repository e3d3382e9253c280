"""Draw samples: newest SiT of out/sit and VAE of its latents -> samples/grid.png (and samples.npz for FID).

    python sample.py --cfg 1.5                                             # a picture
    torchrun --nproc_per_node=8 sample.py --cfg 2.5 --cfg-interval 0 0.75 --num-images 50000 --npz
    python sample.py --ckpt SiT-XL-2-256.pt --vae sdvae-f8d4.pt --latent-stats 0.18215    # published files
    python sample.py --sweep-cfg 1 1.25 1.5 2 2.5 --num 5000 --npz  # samples/cfg1, samples/cfg1.25, ...
    python fid.py gfid REF samples/cfg*/samples.npz  # their table

Image i is a function of (seed, i) alone: not of batch size, number of processes or --num. Beside the samples,
protocol.json says all that they depend on.
"""
import argparse
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch

import common
import data
import logs
import weights
from common import natural, positive
from sit import guided_velocity, nfe, read_sit, sample_ode, sample_sde
from vae import load_vae

SAMPLERS = ("sde", "euler", "heun")
SANE_PSNR = 40  # dB: stored latents that decode worse than this are not those of this VAE


def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("models").add_argument
    add("--ckpt", default="out/sit",
        help="SiT checkpoint, ours or published: file, folder of ours (newest), or hf://owner/repo/file")
    add("--weights", default="ema", choices=("ema", "raw"), help="averaged or last weights")
    add("--vae", default=None, help="VAE of the latents: file, folder, or hf://owner/repo/file; default: the "
        "one that encode.py used (published SiTs name none)")
    add("--latent-stats", default=None, help="for published SiTs, whose files hold none: statistics file, or "
        "0.18215 for SD-VAE; default: in the SiT (REPA-E) or beside the VAE")
    add("--sanity", nargs="?", const="", default=None, metavar="DATA", help="do not sample: decode 8 images' "
        "latents through the statistics, compare with vae(x); DATA defaults to the images encoded")
    add = parser.add_argument_group("sampling").add_argument
    add("--cfg", type=float, default=1.0, help="guidance scale, all channels; 1 = off")
    add("--sweep-cfg", type=float, nargs="+", default=None, metavar="SCALE",
        help="instead of --cfg: one run per scale, each in its folder cfg<scale> below --out")
    add("--cfg-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"),
        help="noise times with guidance, inclusive (1 = pure noise); the paper's runs: 0 0.75")
    add("--sampler", default="sde", choices=SAMPLERS, help="sde: Euler-Maruyama; euler, heun: the ODE")
    add("--steps", type=positive, default=250, help="solver steps")
    # the long name for torchrun, whose own parser takes --num for an abbreviation of one of its flags
    add("--num", "--num-images", type=natural, default=0,
        help="images; 0 = 8 of each class, at most 80 (torchrun has a --num of its own: --num-images there)")
    add("--labels", default="balanced", choices=("balanced", "random"),
        help="balanced: image i has class i mod num_classes; random: uniform, as in REPA's numbers")
    add("--batch-size", type=positive, default=64, help="images per forward and device")
    add("--npz", action="store_true",
        help="also write samples.npz (arr_0 images, arr_1 labels: ADM's format)")
    add("--compile", action="store_true", help="torch.compile the model and the decoder")
    add("--dry-run", action="store_true", help="print configuration, sizes and evaluations, then leave")
    common.add_run_flags(parser, out="samples")
    return parser.parse_args(argv)


def draw_labels(indices, policy: str, num_classes: int, seed: int) -> torch.Tensor:
    """Label of each image index (B,) int64; a function of (seed, index)."""
    if policy == "balanced":
        return torch.tensor([i % num_classes for i in indices])
    return torch.tensor([common.derive_seed(seed, "label", int(i)) % num_classes for i in indices])


@torch.no_grad()
def sample_images(model, vae, meta, indices, args, device, dtype):
    """Return uint8 images (B, H, W, 3) and labels (B,) of the given image indices, numpy.

    The state of the solver is fp32; the network runs under autocast `dtype`, the decoder too.
    """
    y = draw_labels(indices, args.labels, meta["num_classes"], args.seed)
    shape = (meta["channels"], *meta["latent_size"])
    noise = common.noise_for(shape, indices, device, args.seed, "sample")
    labels = y.to(device)

    def velocity(z_t, t):
        with common.autocast(device, dtype):
            return guided_velocity(model, z_t, t, labels, args.cfg, tuple(args.cfg_interval))

    if args.sampler == "sde":
        generators = [torch.Generator(device).manual_seed(common.derive_seed(args.seed, "sde", int(i)))
                      for i in indices]
        z = sample_sde(velocity, noise, args.steps, generators)
    else:
        z = sample_ode(velocity, noise, args.steps, heun=args.sampler == "heun")
    z = data.denormalize_latents(z, *(torch.tensor(meta[k]) for k in ("mean", "std")))
    with common.autocast(device, dtype):
        x = vae.decode(z)
    return data.to_uint8(x.float()).permute(0, 2, 3, 1).cpu().numpy(), y.numpy()


def open_models(args):
    """Return (SiT, VAE, meta, facts for the protocol), on the CPU; the meta of the latents as in encode.py.

    Our checkpoints carry their latents' meta. For a published one it is put together from its shape, its VAE
    and the latents' statistics. Raises ValueError where SiT, VAE and statistics do not belong together.
    """
    ckpt = weights.resolve(args.ckpt)
    model, content = read_sit(ckpt, args.weights)
    if content.get("format") == "nanosendvae-sit":
        meta = content["latents"]
        if args.latent_stats:
            raise ValueError(f"--latent-stats: {ckpt} carries those it was trained with; leave the flag out")
        if args.cfg != 1 and content["args"]["label_dropout"] == 0:
            raise ValueError(f"--cfg {args.cfg}: {ckpt} was trained without label dropout, so it has no "
                             f"unconditional velocity; use --cfg 1")
    else:
        meta = None  # put together once its VAE is known
        if args.vae is None:
            raise ValueError(f"{ckpt} is a published SiT, which does not name its VAE: give --vae FILE")
    vae_path = weights.resolve(args.vae or meta["vae"])
    vae = load_vae(vae_path)
    found = common.state_hash(vae.state_dict())
    meta = meta or published_meta(args, ckpt, model, content, vae, vae_path, found)
    if found != meta["vae_hash"]:
        raise ValueError(f"{vae_path} is VAE {found[:12]}, the SiT was trained on latents of VAE "
                         f"{meta['vae_hash'][:12]}; give --vae that one")
    return model, vae, meta, dict(
        checkpoint=str(ckpt), checkpoint_sha256=file_hash(weights.fetch(ckpt)),
        step=content.get("step", content.get("steps")), vae=str(vae_path), vae_hash=found,
        latents=content["args"].get("latents") if "source" not in meta else None,
        latent_statistics=meta.get("source", "in the checkpoint"))


def published_meta(args, ckpt, model, content, vae, vae_path, vae_hash):
    """Return what encode.py's meta says, for a published SiT and VAE; ValueError where they do not fit."""
    channels = vae.post_quant_conv.in_channels
    if model.config.in_channels != channels:
        raise ValueError(f"{ckpt} takes latents of {model.config.in_channels} channels, {vae_path} makes "
                         f"{channels}: give --vae the VAE that this SiT was trained on")
    mean, std, source = weights.statistics_for(ckpt, content, vae_path, vae_hash, channels, args.latent_stats)
    side = model.config.input_size
    return {"channels": channels, "latent_size": [side, side], "num_classes": model.config.num_classes,
            "class_names": [], "vae": str(vae_path), "vae_hash": vae_hash, "source": str(source),
            "mean": mean.tolist(), "std": std.tolist()}


@torch.no_grad()
def check_sanity(args, vae, meta, facts, device):
    """Decode 8 images' latents through the statistics, print the PSNR to vae(x); ValueError if they are off.

    For a SiT of ours the latents are those stored where it was trained, as long as they are there: the PSNR
    compares them with vae(x). Else, and with --sanity DATA, the images are encoded, and the PSNR only checks
    the arithmetic. The statistics themselves show in the size of the normalised latents: about 1.
    """
    dataset = data.open_dataset(args.sanity or meta.get("data", data.DEFAULT_DATA),
                                vae.stride * meta["latent_size"][0])
    first = range(min(8, len(dataset)))
    posterior = vae.encode(data.to_float(dataset.__getitems__(first)[0].to(device)))
    moments = torch.cat([posterior.mean, posterior.std], 1)
    if not args.sanity and facts["latents"] and Path(facts["latents"], "meta.json").is_file():
        stored = data.LatentFolder(facts["latents"])
        if stored.meta["vae_hash"] != meta["vae_hash"]:
            raise ValueError(f"{facts['latents']} holds latents of VAE {stored.meta['vae_hash'][:12]}, the "
                             f"SiT was trained on those of {meta['vae_hash'][:12]}")
        moments = stored.take(first).to(device)
    mean, std = (torch.tensor(meta[key]) for key in ("mean", "std"))
    z = data.normalize_latents(moments.chunk(2, 1)[0], mean, std)
    decoded, wanted = (data.to_uint8(vae.decode(z_raw)).double()
                       for z_raw in (data.denormalize_latents(z, mean, std), posterior.mean))
    psnr = 10 * math.log10(255 ** 2 / max(float((decoded - wanted).square().mean()), 1e-10))
    noise = moments.chunk(2, 1)[1] / std.view(-1, 1, 1).to(device)  # samples also have the posterior's spread
    rms = float((z.square() + noise.square()).mean().sqrt())
    common.print0(f"sanity: {psnr:.1f} dB between latents decoded through the statistics and vae(x); "
                  f"normalised latents have rms {rms:.2f}, about 1 is right")
    if psnr < SANE_PSNR or not 0.5 <= rms <= 2:
        raise ValueError(f"sanity: {psnr:.1f} dB, rms {rms:.2f}; want at least {SANE_PSNR} dB and 0.5 to 2: "
                         f"latents or statistics ({facts['latent_statistics']}) of another VAE than "
                         f"{meta['vae']}")


def sample(args, proc):
    """Write grid.png, protocol.json and, with --npz, samples.npz to args.out; return the folder."""
    model, vae, meta, facts = open_models(args)
    if args.sanity is not None:
        return check_sanity(args, vae.to(proc.device), meta, facts, proc.device)
    num = args.num or min(8 * meta["num_classes"], 80)
    evaluations = nfe(args.steps, heun=args.sampler == "heun")
    dtype = common.resolve_dtype(args.dtype, proc.device)
    common.print0("configuration: " + " ".join(f"{k}={v}" for k, v in sorted(vars(args).items())))
    common.print0(f"{num} images: {facts['checkpoint']} (step {facts['step']}, {args.weights} weights, "
                  f"{sum(p.numel() for p in model.parameters()):,} parameters, {dtype}), {args.sampler} "
                  f"{args.steps} steps = {evaluations} evaluations, cfg {args.cfg:g} in "
                  f"{tuple(args.cfg_interval)}; "
                  f"latent statistics {weights.statistics_hash(meta['mean'], meta['std'])[:12]}, "
                  f"{facts['latent_statistics']}")
    if args.dry_run:
        return None
    model, vae = model.to(proc.device), vae.to(proc.device)
    if args.compile:
        common.compile_modules(model, vae.decoder)
    mine = np.array_split(np.arange(num), proc.world)[proc.rank]
    images = np.empty((len(mine), *(vae.stride * side for side in meta["latent_size"]), 3), np.uint8)
    labels = np.empty(len(mine), np.int64)
    for first in logs.progress(range(0, len(mine), args.batch_size), proc, "sample"):
        part = slice(first, first + args.batch_size)
        images[part], labels[part] = sample_images(model, vae, meta, mine[part], args, proc.device, dtype)
    images, labels = gather(images, labels, Path(args.out), proc)
    if proc.main:
        write(args, images, labels, meta, dict(
            facts, num_images=num, nfe=evaluations, autocast=str(dtype), device=str(proc.device),
            guided_channels="all", time="t=1 noise, t=0 data",
            time_grid="linspace(1, .04, steps), 0" if args.sampler == "sde" else "linspace(1, 0, steps + 1)"))
    return args.out


def gather(images, labels, folder, proc):
    """Return all processes' images and labels on rank 0, through files: the arrays may be gigabytes."""
    if proc.world == 1:
        return images, labels
    data.save_npz(folder / f"part-{proc.rank}.npz", images, labels)
    common.barrier()
    if not proc.main:
        return None, None
    paths = [folder / f"part-{rank}.npz" for rank in range(proc.world)]
    parts = [np.load(path) for path in paths]
    joined = [np.concatenate([part[key] for part in parts]) for key in ("arr_0", "arr_1")]
    for path in paths:
        path.unlink()
    return joined


def file_hash(path) -> str:
    """Return the sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(args, images, labels, meta, facts):
    """Write the files and say where."""
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.npz").unlink(missing_ok=True)  # of an earlier run: not what protocol.json will say
    shown = images[:80]
    columns = min(meta["num_classes"], 10) if args.labels == "balanced" and meta["num_classes"] > 1 \
        else max(1, math.isqrt(len(shown)))
    data.save_grid(folder / "grid.png", shown, columns=columns, scale=max(1, 64 // images.shape[1]))
    stats = weights.statistics_hash(meta["mean"], meta["std"])
    protocol = {**{k: v for k, v in vars(args).items()}, **facts, "latent_statistics_sha256": stats,
                "class_names": meta["class_names"][:100], **common.versions()}
    (folder / "protocol.json").write_text(json.dumps(protocol, indent=1))
    print(f"wrote {folder}/grid.png" + (" (one column per class)" if columns == meta["num_classes"] else ""))
    if args.npz:
        data.save_npz(folder / "samples.npz", images, labels)
        print(f"wrote {folder}/samples.npz: {len(images)} images; "
              f"next: python fid.py gfid REF {folder}/samples.npz")


def main(argv=None):
    """Entry point of the command."""
    args = parse_args(argv)
    if not 0 <= args.cfg_interval[0] <= args.cfg_interval[1] <= 1:
        raise ValueError(f"--cfg-interval {args.cfg_interval[0]:g} {args.cfg_interval[1]:g}: want "
                         "0 <= LO <= HI <= 1, in noise time (1 = pure noise)")
    proc, scales = common.setup(args.device), args.sweep_cfg
    if scales is None:
        return sample(args, proc)
    for scale in scales:  # each exactly the run of --cfg SCALE --out OUT/cfgSCALE
        sample(argparse.Namespace(**vars(args) | {
            "cfg": scale, "sweep_cfg": None, "out": f"{args.out}/cfg{scale:g}"}), proc)
    return args.out


if __name__ == "__main__":
    common.cli(main)
