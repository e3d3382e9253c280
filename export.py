"""Write a VAE or a SiT, ours or a published one, for other projects.

    python export.py --to diffusers --vae out/vae --out send-vae --latent-stats latents
    python export.py --to ldm --vae out/vae --out send-vae.pt --latent-stats latents   # for REPA-E's scripts
    python export.py --to repa-e --ckpt out/sit --out sit.pt                           # for its generate.py

    diffusers     a folder for AutoencoderKL.from_pretrained; the latents' statistics are in its config.json
    safetensors   a VAE file under the published names, fp32
    ldm           the same as .pt
    repa          {"ema": SiT} under REPA's names
    repa-e        the same, with the latents' statistics as BatchNorm inside

Statistics come from --latent-stats, or from inside the file that is read. Beside a single file they are
written to <name>-latents-stats.pt, as REPA-E has it. checkpoints.py reads all of these layouts back.
"""
from pathlib import Path

import common  # before torch

import torch
from torch import Tensor

import checkpoints
import data
from vae import VAEConfig, level_shapes


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return our VAE state dict under diffusers' names: the inverse of checkpoints.from_diffusers."""
    # the newer of two names stands first, and is the one that replaces ours
    renamed = checkpoints.rename(state, [names[::-1] for names in checkpoints.DIFFUSERS_NAMES])
    # attention is linear there: (C, C), not (C, C, 1, 1)
    return {key: x[:, :, 0, 0] if ".attentions." in key and x.ndim == 4 else x for key, x in renamed.items()}


def diffusers_config(cfg: VAEConfig, statistics: tuple | None) -> dict:
    """Return the config.json of diffusers' AutoencoderKL; statistics: (mean, std) of the latents, each (C,).

    Raises ValueError for a network that diffusers does not have.
    """
    if cfg.stem != 1 or cfg.embed_dim not in (None, cfg.z_channels):
        raise ValueError(f"diffusers has no VAE of stem {cfg.stem}, embed_dim {cfg.embed_dim}; use --to ldm")
    scale, mean, std = 1.0, None, None  # diffusers' way to say that they are not known
    if statistics:
        mean, std = (part.tolist() for part in statistics)
        if not any(mean) and len({*std}) == 1:  # one number: where diffusers' pipelines look for it
            scale, mean, std = 1 / std[0], None, None
    widths, attention = zip(*level_shapes(cfg))
    blocks = ["Attn" * has_attn for has_attn in attention]
    return {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "sample_size": cfg.resolution,
        "in_channels": cfg.in_channels, "out_channels": cfg.in_channels, "latent_channels": cfg.z_channels,
        "block_out_channels": widths, "layers_per_block": cfg.num_res_blocks,
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in blocks],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in blocks[::-1]],
        "norm_num_groups": cfg.norm_groups, "scaling_factor": scale, "latents_mean": mean, "latents_std": std}


def export_vae(args) -> tuple | None:
    """Write the VAE of --vae to --out, a folder for "diffusers", else a file. Return its statistics."""
    vae = checkpoints.load_vae(args.vae)
    state, channels = vae.state_dict(), vae.post_quant_conv.in_channels
    statistics = checkpoints.statistics_of(checkpoints.read_file(checkpoints.fetch(args.vae)))
    if args.latent_stats:
        statistics = checkpoints.read_statistics(args.latent_stats, channels, checkpoints.state_hash(state))
    if args.to == "diffusers":
        data.write_facts(Path(args.out) / "config.json", diffusers_config(vae.config, statistics))
        checkpoints.save_file(Path(args.out) / checkpoints.DIFFUSERS_FILES[0], to_diffusers(state))
    else:
        checkpoints.save_file(args.out, state)
    return statistics


def export_sit(args) -> tuple | None:
    """Write the SiT of --ckpt to the file --out. Return the statistics of its latents, or None.

    Raises ValueError for weights of reversed time, which would load there and sample noise.
    """
    sit, content = checkpoints.read_sit(args.ckpt, args.weights)
    if sit.config.learn_sigma or sit.config.reversed_time:
        raise ValueError(f"{args.ckpt}: willisma's SiT (learn_sigma, t = 0 is noise) cannot become REPA's")
    state, statistics = sit.state_dict(), checkpoints.statistics_of(content)
    if args.latent_stats:
        statistics = checkpoints.read_statistics(args.latent_stats, sit.config.in_channels)
    if args.to == "repa-e":
        if statistics is None:
            raise ValueError(f"{args.ckpt}: no latent statistics for the BatchNorm; give --latent-stats")
        state["bn.running_mean"], state["bn.running_var"] = statistics[0], statistics[1].square()
        state["bn.num_batches_tracked"] = torch.tensor(content.get("step", 0))
    checkpoints.save_file(args.out, {"ema": state})
    return statistics


def parse_args(argv=None):
    parser = common.new_parser(__doc__)
    add = parser.add_argument
    add("--to", required=True, choices=("diffusers", "safetensors", "ldm", "repa", "repa-e"), help="layout")
    add("--vae", default="out/vae", help="file, folder (our newest, or diffusers') or hf://OWNER/REPO/FILE")
    add("--ckpt", default="out/sit", help="the SiT, for repa and repa-e; as --vae")
    add("--weights", default="ema", choices=("ema", "raw"), help="of the SiT: averaged or last weights")
    add("--out", required=True, help="file to write; for diffusers a folder")
    add("--latent-stats", help="file, folder of encode.py, number s for z' = s z; default: inside the file")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    statistics = export_sit(args) if args.to in ("repa", "repa-e") else export_vae(args)
    if statistics and args.to != "diffusers":  # z' = (z - latents_bias) * latents_scale
        mean, std = (part.view(1, -1, 1, 1) for part in statistics)
        beside = Path(args.out).with_name(f"{Path(args.out).stem}-latents-stats.pt")
        checkpoints.save_file(beside, {"latents_scale": 1 / std, "latents_bias": mean})
    print(f"wrote {args.out}; latent statistics: {'written, too' if statistics else 'none known'}")


if __name__ == "__main__":
    common.cli(main)
