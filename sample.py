"""Stage 4. Noise -> latents -> images: newest SiT of out/sit and the VAE of its latents -> samples/grid.png.

    python sample.py --cfg 1.5                                             # a picture
    torchrun --nproc_per_node=8 sample.py --cfg 2.5 --cfg-interval 0 0.75 --num-images 50000 --npz   # for FID
    python sample.py --ckpt SiT-XL-2-256.pt --vae sdvae-f8d4.pt --latent-stats 0.18215    # published files

Image i is a function of (seed, i) alone: not of batch size, number of processes or --num. protocol.json
beside the samples says all that they depend on.
"""
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch

import checkpoints
import common
import data
from common import natural, positive
from sit import guided_velocity, nfe, sample_ode, sample_sde

SHOWN = 80  # images in grid.png, at most


def parse_args(argv=None):
    parser = common.new_parser(__doc__)
    add = parser.add_argument_group("models").add_argument
    add("--ckpt", default="out/sit",
        help="SiT checkpoint, ours or published: file, folder of ours (newest), or hf://owner/repo/file")
    add("--weights", default="ema", choices=("ema", "raw"), help="averaged or last weights")
    add("--vae", default=None, help="VAE of the latents: file, folder, or hf://owner/repo/file; default: the "
        "one that encode.py used (published SiTs name none)")
    add("--latent-stats", default=None, help="for published SiTs, whose files hold none: statistics file, or "
        "0.18215 for SD-VAE; default: those in the SiT's file (REPA-E)")
    add = parser.add_argument_group("sampling").add_argument
    add("--cfg", type=float, default=1.0, help="guidance scale, all channels; 1 = off")
    add("--cfg-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"),
        help="noise times with guidance, inclusive (1 = pure noise); the paper's runs: 0 0.75")
    add("--sampler", default="sde", choices=("sde", "euler", "heun"),
        help="sde: Euler-Maruyama; euler, heun: the ODE")
    add("--steps", type=positive, default=250, help="solver steps")
    # The long name is for torchrun, whose own parser takes --num for an abbreviation of one of its flags.
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
    args = parser.parse_args(argv)
    low, high = args.cfg_interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"--cfg-interval {low:g} {high:g}: want 0 <= LO <= HI <= 1, in noise time (1 = pure "
                         "noise)")
    return args


def draw_labels(indices, policy: str, num_classes: int, seed: int) -> torch.Tensor:
    """Return the label of each image (B,) int64; a function of (seed, index)."""
    if policy == "balanced":
        return torch.tensor([i % num_classes for i in indices])
    return torch.tensor([common.derive_seed(seed, "label", int(i)) % num_classes for i in indices])


@torch.no_grad()
def sample_images(model, vae, latents, indices, args, device, dtype):
    """Return uint8 images (B, H, W, 3) and labels (B,) of the given image numbers, numpy.

    latents: what encode.py's meta.json says. The solver's state is fp32; network and decoder run under
    autocast `dtype`.
    """
    y = draw_labels(indices, args.labels, latents["num_classes"], args.seed)
    shape = (latents["channels"], *latents["latent_size"])
    noise = common.noise_for(shape, indices, device, args.seed, "sample")
    y_device = y.to(device)

    def velocity(z_t, t, t_step):
        with common.autocast(device, dtype):
            return guided_velocity(model, z_t, t, y_device, args.cfg, args.cfg_interval, t_step)

    if args.sampler == "sde":
        # One generator per image, so that its noise does not depend on the batch.
        generators = [torch.Generator(device).manual_seed(common.derive_seed(args.seed, "sde", int(i)))
                      for i in indices]
        z = sample_sde(velocity, noise, args.steps, generators)
    else:
        z = sample_ode(velocity, noise, args.steps, heun=args.sampler == "heun")
    z = data.denormalize_latents(z, torch.tensor(latents["mean"]), torch.tensor(latents["std"]))
    with common.autocast(device, dtype):
        x = vae.decode(z)
    return data.to_uint8(x).permute(0, 2, 3, 1).cpu().numpy(), y.numpy()


def open_models(args):
    """Return (SiT, VAE, latents, facts for protocol.json), on the CPU; latents: as encode.py's meta.json.

    Our checkpoints carry what their latents are. For a published SiT it is put together from its shape and
    the latents' statistics. Raises ValueError where SiT, VAE and statistics do not belong together.
    """
    ckpt = checkpoints.resolve(args.ckpt)
    model, saved = checkpoints.read_sit(ckpt, args.weights)
    published = saved.get("format") != checkpoints.SIT
    if published and args.vae is None:
        raise ValueError(f"{ckpt} is a published SiT, which does not name its VAE: give --vae FILE")
    if not published and args.latent_stats:
        raise ValueError(f"--latent-stats: {ckpt} carries those it was trained with; leave the flag out")
    if not published and args.cfg != 1 and saved["args"]["label_dropout"] == 0:
        raise ValueError(f"--cfg {args.cfg}: {ckpt} was trained without label dropout, so it has no "
                         f"unconditional velocity; use --cfg 1")

    vae_path = checkpoints.resolve(args.vae or saved["latents"]["vae"])
    vae = checkpoints.load_vae(vae_path)
    vae_hash, channels = checkpoints.state_hash(vae.state_dict()), vae.post_quant_conv.in_channels
    if model.config.in_channels != channels:
        raise ValueError(f"{ckpt} takes latents of {model.config.in_channels} channels, {vae_path} makes "
                         f"{channels}: give --vae the VAE that this SiT was trained on")
    # Also compares the VAE with the one that the statistics are of, where they say.
    mean, std, source = checkpoints.statistics_for(ckpt, saved, vae_hash, channels, args.latent_stats)
    side = model.config.input_size
    latents = saved["latents"] if not published else {
        "channels": channels, "latent_size": [side, side], "num_classes": model.config.num_classes,
        "class_names": [], "mean": mean.tolist(), "std": std.tolist()}
    with open(checkpoints.fetch(ckpt), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return model, vae, latents, {
        "checkpoint": str(ckpt), "checkpoint_sha256": digest, "step": saved.get("step", saved.get("steps")),
        "vae": str(vae_path), "vae_hash": vae_hash, "latent_statistics": source,
        "latents": None if published else saved["args"]["latents"],
        "latent_statistics_sha256": checkpoints.statistics_hash(mean, std)}


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
    images, labels = (np.concatenate([part[key] for part in parts]) for key in ("arr_0", "arr_1"))
    for path in paths:
        path.unlink()
    return images, labels


def write(args, images, labels, latents, facts):
    """Write the files and say where."""
    folder, num_classes = Path(args.out), latents["num_classes"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.npz").unlink(missing_ok=True)  # of an earlier run: not what protocol.json will say
    shown = images[:SHOWN]
    by_class = args.labels == "balanced" and num_classes > 1
    columns = min(num_classes, 10) if by_class else max(1, math.isqrt(len(shown)))
    note = " (one column per class)" if by_class and columns == num_classes else ""
    data.save_grid(folder / "grid.png", shown, columns=columns, scale=max(1, 64 // images.shape[1]))
    print(f"wrote {folder}/grid.png{note}")
    protocol = {**vars(args), **facts, "class_names": latents["class_names"][:100], **common.versions()}
    with data.replacing(folder / "protocol.json") as file:
        file.write(json.dumps(protocol, indent=1).encode())
    if args.npz:
        data.save_npz(folder / "samples.npz", images, labels)
        print(f"wrote {folder}/samples.npz: {len(images)} images; "
              f"next: python fid.py gfid REF {folder}/samples.npz")


def main(argv=None):
    args = parse_args(argv)
    proc = common.setup(args.device)
    model, vae, latents, facts = open_models(args)
    num = args.num or min(8 * latents["num_classes"], SHOWN)
    evaluations = nfe(args.steps, heun=args.sampler == "heun")
    dtype = common.resolve_dtype(args.dtype, proc.device)
    common.print_config(args)
    common.print0(f"{num} images: {facts['checkpoint']} (step {facts['step']}, {args.weights} weights, "
                  f"{sum(p.numel() for p in model.parameters()):,} parameters, {dtype}), {args.sampler} "
                  f"{args.steps} steps = {evaluations} evaluations, cfg {args.cfg:g} in "
                  f"{tuple(args.cfg_interval)}; latent statistics "
                  f"{facts['latent_statistics_sha256'][:12]}, {facts['latent_statistics']}")
    if args.dry_run:
        return None

    model, vae = model.to(proc.device), vae.to(proc.device)
    if args.compile:
        common.compile_modules(model, vae.decoder)

    # Each process draws a part of the images, batch by batch.
    mine = np.array_split(np.arange(num), proc.world)[proc.rank]
    side = [vae.stride * size for size in latents["latent_size"]]
    images, labels = np.empty((len(mine), *side, 3), np.uint8), np.empty(len(mine), np.int64)
    for first in common.progress_bar(range(0, len(mine), args.batch_size), proc, "sample"):
        part = slice(first, first + args.batch_size)
        images[part], labels[part] = sample_images(model, vae, latents, mine[part], args, proc.device, dtype)

    images, labels = gather(images, labels, Path(args.out), proc)
    if proc.main:
        grid = "linspace(1, .04, steps), 0" if args.sampler == "sde" else "linspace(1, 0, steps + 1)"
        write(args, images, labels, latents, {
            **facts, "num_images": num, "nfe": evaluations, "autocast": str(dtype),
            "device": str(proc.device), "guided_channels": "all", "time": "t=1 noise, t=0 data",
            "time_grid": grid})
    return args.out


if __name__ == "__main__":
    common.cli(main)
