"""Stage 4. Noise -> latents -> images: newest SiT of out/sit and the VAE of its latents -> samples/grid.png.

    python sample.py --cfg 1.5                                             # a picture
    torchrun --nproc_per_node=8 sample.py --cfg 2.5 --cfg-interval 0 0.75 --num-images 50000 --npz   # for FID
    python sample.py --ckpt SiT-XL-2-256.pt --vae sdvae-f8d4.pt --latent-stats 0.18215    # published files

Image i is a function of (seed, i) on one type of device: up to rounding not of batch size, processes, threads
and --num. On a CPU it is equal bit for bit on any number of processes, if --batch-size and threads are equal
and its batch is as long. protocol.json beside the samples says all that they depend on. The same command
continues after a stop, also with a larger --num: the batches that are done wait in OUT/parts.
"""
import math
import shutil
from pathlib import Path

import common  # before torch

import numpy as np
import torch

import checkpoints
import data
from common import natural, positive
from sit import guided_velocity, nfe, sample_ode, sample_sde

SHOWN, COLUMNS = 80, 20  # images in grid.png, and columns, at most
FREE = {"num", "num_images", "out", "npz", "commit"}  # what may change when a command is continued


def parse_args(argv=None):
    parser = common.new_parser(__doc__)
    add = parser.add_argument_group("sampling").add_argument
    add("--ckpt", default="out/sit", help="SiT, ours or published: file, folder, hf://owner/repo/file")
    add("--weights", default="ema", choices=("ema", "raw"), help="averaged or last weights")
    add("--vae", help="VAE of the latents, as --ckpt; default: that of encode.py (published SiTs name none)")
    add("--latent-stats", help="for published SiTs: file, or 0.18215 for SD-VAE; default: in the SiT's file")
    add("--cfg", type=float, default=1.0, help="guidance scale, all channels; 1 = off")
    add("--cfg-interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LO", "HI"),
        help="noise times with guidance, inclusive (1 = pure noise); E2E-VAVAE's: 0 0.75")
    add("--sampler", default="sde", choices=("sde", "euler", "heun"), help="sde: Euler-Maruyama, or the ODE")
    add("--steps", type=positive, default=250, help="solver steps")
    # The long name is for torchrun, whose own parser takes --num for an abbreviation of one of its flags.
    add("--num", "--num-images", type=natural, default=0,
        help="images; 0 = 8 of each class (torchrun has a --num of its own: --num-images there)")
    add("--classes", nargs="+", metavar="CLASS", help="names or numbers; default: all, 10 without --num")
    add("--labels", default="balanced", choices=("balanced", "random"), help="in turn, or uniform as in REPA")
    add("--batch-size", type=positive, default=64, help="images per forward and device")
    add("--npz", action="store_true", help="also write samples.npz (arr_0, arr_1: ADM's format)")
    add("--dry-run", action="store_true", help="print configuration, sizes and evaluations, then leave")
    common.add_compile_flag(parser)
    common.add_run_flags(parser, out="samples")
    args = parser.parse_args(argv)
    low, high = args.cfg_interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"--cfg-interval {low:g} {high:g}: want times 0 <= LO <= HI <= 1, where 1 is noise")
    return args


def draw_labels(indices, args, num_classes: int) -> torch.Tensor:
    """Return the label of each image (B,) int64; a function of (seed, index) and the classes to draw."""
    classes, draws = args.classes or range(num_classes), indices
    if args.labels == "random":
        draws = [common.derive_seed(args.seed, "label", int(i)) for i in indices]
    return torch.tensor([classes[draw % len(classes)] for draw in draws])


def draw_latents(model, latents, indices, args, device, dtype):
    """Return normalised latents (B, C, h, w) fp32 and labels (B,) of the given image numbers.

    latents: what encode.py's meta.json says. The solver's state is fp32; the network runs under autocast
    `dtype`.
    """
    y = draw_labels(indices, args, latents["num_classes"]).to(device)
    shape = (latents["channels"], *latents["latent_size"])
    noise = common.noise_for(shape, indices, device, args.seed, "sample")

    def velocity(z_t, t, t_step):
        with common.autocast(device, dtype):
            return guided_velocity(model, z_t, t, y, args.cfg, args.cfg_interval, t_step)

    if args.sampler == "sde":
        # One generator per image, so that its noise does not depend on the batch.
        seeds = [common.derive_seed(args.seed, "sde", int(i)) for i in indices]
        z = sample_sde(velocity, noise, args.steps, [torch.Generator(device).manual_seed(s) for s in seeds])
    else:
        z = sample_ode(velocity, noise, args.steps, heun=args.sampler == "heun")
    return z, y


@torch.no_grad()
def decode(vae, latents, z, dtype):
    """Return uint8 images (B, H, W, 3), numpy, of what draw_latents drew."""
    z = data.denormalize_latents(z, torch.tensor(latents["mean"]), torch.tensor(latents["std"]))
    with common.autocast(z.device, torch.float32 if dtype == torch.float16 else dtype):  # it may overflow
        return data.to_uint8(vae.decode(z)).permute(0, 2, 3, 1).cpu().numpy()


def prepare(model, vae, args, device, dtype):
    """Move both networks to the device, and make them as fast as they get there."""
    model.to(device)
    common.place(vae, device)
    # Autocast would cast these weights in each of the solver's steps. The time embedding stays fp32.
    for name, layer in model.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and not name.startswith("t_embedder"):
            layer.to(dtype)
    common.compile_blocks(args.compile, device, model, vae.decoder)


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
    if not published and args.cfg != 1 and saved["args"]["label_dropout"] == 0:
        raise ValueError(f"--cfg {args.cfg}: {ckpt} was trained without label dropout; use --cfg 1")

    try:
        vae_path = checkpoints.resolve(args.vae or saved["latents"]["vae"])
        vae = checkpoints.load_vae(vae_path)
    except FileNotFoundError as error:
        wanted = "its VAE" if published else f"VAE {saved['latents']['vae_hash'][:12]}"
        raise FileNotFoundError(f"{error}; {ckpt} wants {wanted}: give --vae a copy of it") from error
    vae_hash, channels = checkpoints.state_hash(vae.state_dict()), vae.post_quant_conv.in_channels
    if model.config.in_channels != channels:
        raise ValueError(f"{ckpt} takes latents of {model.config.in_channels} channels, {vae_path} makes "
                         f"{channels}: give --vae the VAE that this SiT was trained on")
    # Also compares the VAE with the one that the statistics are of, where they say.
    mean, std, source = checkpoints.statistics_for(ckpt, saved, vae_hash, channels, args.latent_stats)
    latents = saved["latents"] if not published else {
        "channels": channels, "latent_size": [model.config.input_size] * 2, "class_names": [],
        "num_classes": model.config.num_classes, "mean": mean.tolist(), "std": std.tolist()}
    return model, vae, latents, {
        "checkpoint": str(ckpt), "step": saved.get("step", saved.get("steps")),
        "weights_sha256": checkpoints.state_hash(model.state_dict()),
        "vae": str(vae_path), "vae_hash": vae_hash, "latent_statistics": source,
        "latents": None if published else saved["args"]["latents"],
        "latent_statistics_sha256": data.hash_of([mean.tolist(), std.tolist()])}


def write(args, parts, latents, protocol):
    """Write the files and say where."""
    folder, classes = Path(args.out), args.classes or range(latents["num_classes"])
    (folder / "samples.npz").unlink(missing_ok=True)  # of an earlier run: not what protocol.json will say
    first = [parts.read(part)[0] for part in range(parts.num_shards)[:SHOWN // parts.size + 1]]
    shown = np.concatenate(first)[:SHOWN]
    columns, order = max(1, math.isqrt(len(shown))), "in the order of their numbers, not by class"
    if args.labels == "balanced" and 1 < len(classes) <= COLUMNS:
        names = dict(enumerate(latents["class_names"]))
        columns, order = len(classes), f"a column each: {', '.join(str(names.get(i, i)) for i in classes)}"
    data.save_grid(folder / "grid.png", shown, columns=columns, scale=max(1, 64 // shown.shape[1]))
    print(f"wrote {folder}/grid.png ({order})")
    data.write_facts(folder / "protocol.json", protocol)
    if args.npz:
        parts.save_npz(folder / "samples.npz")
        print(f"wrote {folder}/samples.npz; next: python fid.py gfid REF {folder}/samples.npz")
    shutil.rmtree(parts.path)


def main(argv=None):
    args = parse_args(argv)
    proc = common.setup(args.device)
    model, vae, latents, facts = open_models(args)
    names, num_classes = latents["class_names"], latents["num_classes"]
    args.classes = data.find_classes(args.classes, names, num_classes, most=None if args.num else 10)
    num = args.num or 8 * len(args.classes or range(num_classes))
    evaluations = nfe(args.steps, heun=args.sampler == "heun")
    dtype = common.resolve_dtype(args.dtype, proc.device)
    common.print_config(args)
    common.print0(f"{num} images of {evaluations} evaluations: {facts['checkpoint']}, step {facts['step']}, "
                  f"{sum(p.numel() for p in model.parameters()):,} parameters, {dtype}")
    if args.dry_run:
        return None

    grid = "linspace(1, .04, steps), 0" if args.sampler == "sde" else "linspace(1, 0, steps + 1)"
    protocol = {**vars(args), **facts, "num_images": num, "nfe": evaluations, "autocast": str(dtype),
                "device": proc.device.type, "guided_channels": "all", "time": "t=1 noise, t=0 data",
                "time_grid": grid, "class_names": names[:100], **common.versions()}
    settings = {key: value for key, value in protocol.items() if key not in FREE}
    common.agree(**settings)
    common.claim(args.out, proc)
    prepare(model, vae, args, proc.device, dtype)

    # A part is a batch, and always the same one, whichever process draws it.
    parts = data.Parts(Path(args.out) / "parts", {"num_images": num, "shard_size": args.batch_size})
    missing = common.share_out(parts.begin(settings) if proc.main else [], proc)

    with common.Behind() as behind:  # a part is written beside the sampling of the next
        for part in common.progress_bar(missing, proc, "sample, batches"):
            indices = parts.images_of(part)
            with common.compiled_if(len(indices) == args.batch_size):
                z, y = draw_latents(model, latents, indices, args, proc.device, dtype)
                images = decode(vae, latents, z, dtype)
            behind(data.save_npz, parts.file_of(part), images, y.cpu())

    common.barrier()
    if proc.main:
        write(args, parts, latents, protocol)
    return args.out


if __name__ == "__main__":
    common.cli(main)
