"""Images to latents: the posterior moments of every image, with labels and statistics, for train_sit.py.

    torchrun --nproc_per_node=8 encode.py                    # newest VAE of out/vae, ImageNet -> latents/
    python encode.py --data shapes --vae out/vae --out latents

Writes memory-mapped shards of [mean | std] per image (raw, REPA's layout), labels.npy, and meta.json with the
per-channel mean and std of z and the hash of the VAE. Run it again to continue: complete shards are kept.
"""
import argparse

import torch

import common
import data
import logs
import weights
from common import natural, positive
from vae import load_vae


def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("encode").add_argument
    add("--data", default=data.DEFAULT_DATA,
        help="folder of class folders, flat folder, or 'shapes' (embedded set)")
    add("--split", default="train", choices=("train", "val"),
        help="val: of 'shapes', or the folder 'val' beside a --data 'train' (for train_sit.py --val-latents)")
    add("--vae", default="out/vae",
        help="checkpoint, folder (newest of ours, or diffusers'), or hf://owner/repo/file")
    add("--image-size", type=positive, default=None,
        help="pixels; default: what the VAE was trained on, else 256, or 32 for 'shapes'")
    add("--batch-size", type=positive, default=64, help="images per forward and device")
    add("--shard-size", type=positive, default=8192, help="images per file")
    add("--store", default="float32", choices=("float32", "float16"), help="type on disk")
    add("--flip", action="store_true", help="also store the moments of the mirrored images, for "
        "LatentFolder.take(flips=...); train_sit.py, like REPA, does not use them")
    add("--workers", type=natural, default=8, help="processes that read images, per device")
    add("--dry-run", action="store_true", help="print configuration and size on disk, then leave")
    common.add_run_flags(parser, out="latents")
    parser.set_defaults(dtype="fp32")  # as REPA-E caches: latents are made once and used for a million steps
    return parser.parse_args(argv)


@torch.no_grad()
def encode(args, proc):
    """Write the latents of args.data; return the folder."""
    if common.DTYPES[args.dtype] is torch.float32:  # latents are made once: no TF32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    path = weights.resolve(args.vae)
    trained = weights.own_checkpoint(path).get("args", {})
    size = args.image_size or trained.get("image_size") or (32 if args.data == "shapes" else 256)
    dataset = data.open_dataset(args.data, size, args.split)
    if dataset is None:
        raise ValueError(f"--split val: want --data DIR/train with DIR/val beside it, not {args.data}; or "
                         f"give the folder of held-out images as --data, without --split")
    vae = load_vae(path)
    side = size // vae.stride
    per_image = 2 * vae.config.z_channels * side * side * (4 if args.store == "float32" else 2)
    common.print0("configuration: " + " ".join(f"{k}={v}" for k, v in sorted(vars(args).items())))
    dtype = common.resolve_dtype(args.dtype, proc.device)
    common.print0(f"{len(dataset):,} images of {size} px -> {vae.config.z_channels} x {side} x {side} "
                  f"latents, {len(dataset) * per_image * (1 + args.flip) / 2**30:.2f} GiB in {args.out}; "
                  f"VAE {path} ({sum(p.numel() for p in vae.parameters()):,} parameters, {dtype})")
    if args.dry_run:
        return None
    writer = data.LatentWriter(args.out, {
        "vae": path, "vae_hash": common.state_hash(vae.state_dict()), "data": args.data,
        "split": args.split, "files_hash": dataset.files_hash, "num_images": len(dataset), "image_size": size,
        "channels": vae.config.z_channels, "latent_size": (side, side), "shard_size": args.shard_size,
        "dtype": args.store, "flip": args.flip, "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names), "versions": common.versions()})
    vae.to(proc.device)
    if proc.device.type == "cuda":
        vae.to(memory_format=torch.channels_last)

    def moments(images):
        """uint8 (B, 3, H, W) -> [mean | std] (B, 2C, h, w)"""
        with common.autocast(proc.device, dtype):
            posterior = vae.encode(data.to_float(images))
        return torch.cat([posterior.mean, posterior.std], 1).float().cpu()

    for shard in logs.progress(writer.missing(proc.rank, proc.world), proc, "encode, shards"):
        parts = []
        for images, labels, _, _ in data.eval_loader(dataset, args.batch_size, workers=args.workers,
                                                     indices=writer.rows(shard)):
            images = images.to(proc.device, non_blocking=True)
            parts.append((moments(images), labels, moments(images.flip(3)) if args.flip else None))
        plain, labels, mirrored = zip(*parts)
        writer.write(shard, torch.cat(plain), torch.cat(labels), torch.cat(mirrored) if args.flip else None)
    common.barrier()
    if proc.main:
        meta = writer.finish()
        print(f"wrote {args.out}: {meta['num_images']:,} images, {meta['num_classes']} classes; channel std "
              f"{min(meta['std']):.3f} to {max(meta['std']):.3f}")
    return args.out


def main(argv=None):
    """Entry point of the command."""
    args = parse_args(argv)
    return encode(args, common.setup(args.device))


if __name__ == "__main__":
    common.cli(main)
