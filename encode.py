"""Stage 2. Images -> latents/: mean and std of every posterior, labels, per-channel statistics.

    torchrun --nproc_per_node=8 encode.py                    # newest VAE of out/vae, ImageNet -> latents/
    python encode.py --data shapes --vae out/vae --out latents

Writes memory-mapped shards of [mean | std] per image (raw, REPA's layout), labels.npy, and meta.json with the
per-channel mean and std of z and the hash of the VAE. Run it again to continue: complete shards are kept,
damaged ones are made again.
"""
import math
from itertools import chain, islice

import common  # before torch

import torch

import checkpoints
import data
from common import natural, positive


def parse_args(argv=None):
    parser = common.new_parser(__doc__)
    add = parser.add_argument_group("encode").add_argument
    add("--data", default=data.DEFAULT_DATA, help="folder of class folders or images, .zip, .tar, 'shapes'")
    add("--split", default="train", choices=("train", "val"),
        help="val: of 'shapes', or the folder 'val' beside a --data 'train' (for train_sit.py --val-latents)")
    add("--vae", default="out/vae", help="file, folder (our newest, or diffusers'), or hf://owner/repo/file")
    add("--image-size", type=positive, help="pixels; default: the VAE's, else 256, or 32 for 'shapes'")
    add("--batch-size", type=positive, default=64, help="images per forward and device")
    add("--shard-size", type=positive, default=8192, help="images per file")
    add("--store", default="float32", choices=("float32", "float16"), help="type on disk")
    add("--workers", type=natural, default=8, help="processes that read images, per device")
    add("--check", action="store_true", help="also read the shards that are there; make damaged ones again")
    add("--dry-run", action="store_true", help="print configuration and size on disk, then leave")
    common.add_compile_flag(parser)
    common.add_run_flags(parser, out="latents")
    # As REPA-E caches. Latents are made once and used for a million steps; docs/results.md has the errors.
    parser.set_defaults(dtype="tf32")
    return parser.parse_args(argv)


@torch.no_grad()
def encode_batch(vae, images, dtype):
    """Return moments [mean | std] (B, 2C, h, w), fp32, of uint8 images (B, 3, H, W), on their device."""
    with common.autocast(images.device, dtype):
        posterior = vae.encode(data.to_float(images))
    return torch.cat([posterior.mean, posterior.std], 1).float()


def main(argv=None):
    args = parse_args(argv)
    proc = common.setup(args.device)
    dtype = common.resolve_dtype(args.dtype, proc.device)
    # On a CPU tf32 is fp32, and the latents of both may share a folder.
    precision = "tf32" if (args.dtype, proc.device.type) == ("tf32", "cuda") else str(dtype)[6:]

    # The VAE, and the images at the size that it was trained on.
    path = checkpoints.resolve(args.vae)
    trained_on = checkpoints.read_own(path).get("args", {}).get("image_size")
    size = args.image_size or trained_on or data.default_size(args.data)
    dataset = data.open_dataset(args.data, size, args.split)
    if dataset is None:
        raise ValueError(f"--split val: no val beside {args.data}; give it as --data, without --split")
    vae = checkpoints.load_vae(path)
    channels, side = vae.config.z_channels, size // vae.stride

    common.print_config(args)
    bytes_each = 2 * channels * side * side * (4 if args.store == "float32" else 2)
    common.print0(f"{len(dataset):,} images of {size} px -> {channels} x {side} x {side} latents, "
                  f"{len(dataset) * bytes_each / 2**30:.2f} GiB in {args.out}; VAE {path} "
                  f"({sum(p.numel() for p in vae.parameters()):,} parameters, {dtype})")
    if args.dry_run:
        return

    # What the latents are of: another VAE or other images must not get into the same folder.
    facts = {"vae": path, "vae_hash": checkpoints.state_hash(vae.state_dict()), "data": args.data,
             "split": args.split, "images_hash": dataset.images_hash, "num_images": len(dataset),
             "image_size": size, "num_classes": dataset.num_classes, "class_names": list(dataset.class_names),
             "channels": channels, "latent_size": (side, side), "shard_size": args.shard_size,
             "dtype": args.store, "precision": precision, "versions": common.versions()}
    common.agree(vae_hash=facts["vae_hash"], images_hash=facts["images_hash"])
    common.claim(args.out, proc)
    writer = data.LatentWriter(args.out, facts)
    checkpoints.keep_for_latents(path)
    common.place(vae, proc.device)
    common.compile_blocks(args.compile, proc.device, vae.encoder)

    # The shards that are missing are shared out evenly. One loader reads them all, a thread writes them: the
    # network never waits for a file.
    missing = common.share_out(writer.missing(args.check) if proc.main else [], proc)
    indices = list(chain.from_iterable(map(writer.images_of, missing)))
    batches = iter(data.eval_loader(dataset, args.batch_size, None, args.workers, indices, args.shard_size))
    with common.Behind() as behind:
        for shard in common.progress_bar(missing, proc, "encode, shards"):
            moments, labels, corrupt = [], [], []
            for batch in islice(batches, math.ceil(len(writer.images_of(shard)) / args.batch_size)):
                images = batch["images"].to(proc.device, non_blocking=True)
                with common.compiled_if(len(images) == args.batch_size):
                    moments.append(encode_batch(vae, images, dtype))
                labels.append(batch["labels"])
                # Another image was read in place of each that is corrupt.
                corrupt += batch["indices"][batch["index"] != batch["indices"]].tolist()
            behind(writer.write, shard, torch.cat(moments).cpu(), torch.cat(labels), corrupt)

    common.barrier()
    if proc.main:
        facts = writer.finish()
        print(f"{args.out}: {facts['num_images']:,} images, {facts['num_classes']} classes, channel std "
              f"{min(facts['std']):.3f} to {max(facts['std']):.3f}")
    return args.out


if __name__ == "__main__":
    common.cli(main)
