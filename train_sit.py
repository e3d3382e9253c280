"""Stage 3: train a SiT flow transformer on the latents that encode.py wrote.

    torchrun --nproc_per_node=8 train_sit.py --latents latents/         # SiT-XL/1, 80 epochs, batch 256
    torchrun --nproc_per_node=8 train_sit.py --latents latents/ --repa  # with the REPA loss (needs images)
    python train_sit.py --latents out/quickstart/send/latents --model tiny/1 --steps 2000   # a CPU

z is drawn anew from the stored moments in each step, and normalised per channel with the statistics stored
beside them, which travel on in the checkpoint. The same command again continues from the newest checkpoint in
--out.
Read: flow_terms (the loss), train_step, main.
"""
from dataclasses import asdict, dataclass
from pathlib import Path

import common  # before torch

import torch
from torch import nn

import checkpoints
import data
from common import natural, positive
from mapper import Teacher, alignment_loss
from sit import (SIT_SIZES, SiT, SiTConfig, drop_labels, flow_loss, guided_velocity, interpolate, sample_ode,
                 sample_t)

VAL_LATENTS = 512   # of --val-latents, always the same ones
PREVIEW_CFG = 2.0   # guidance scale of the pictures while training
PREVIEW_STEPS = 50


# -----------------------------------------------------------------------------------------------------------
# the loss and the step

@dataclass
class Networks:
    """What is trained, what judges it, and what a step needs beside the batch."""
    device: torch.device
    dtype: torch.dtype       # of autocast
    mean: torch.Tensor       # (C,) statistics of the latents
    std: torch.Tensor
    model: SiT = None        # trained
    model_ddp: nn.Module = None  # the same, wrapped for DDP
    ema: common.EMA = None   # the weights that are sampled
    teacher: Teacher = None  # frozen; None: no REPA loss
    opt: torch.optim.Optimizer = None
    scaler: torch.amp.GradScaler = None  # fp16 alone needs it


def flow_terms(nets, batch, step, args):
    """The loss of one micro-batch: E |v(z_t, t, y) - (eps - z)|^2, with --repa + w (1 - cos) to the teacher.

    All draws are functions of (seed, step, row of the global batch). Returns (loss, terms to log).
    """
    device, rows = nets.device, batch["rows"].tolist()
    moments = batch["moments"].to(device, non_blocking=True)  # (B, 2C, h, w) = [mean | std]
    y = batch["labels"].to(device, non_blocking=True)
    channels = moments.shape[1] // 2
    latent_size = moments.shape[2:]
    noise = common.noise_for((2, channels, *latent_size), rows, device, args.seed, "sit", step)
    u = common.uniform_for(2, rows, device, args.seed, "t", step)

    # The point z_t on the line from data z (t = 0) to noise eps (t = 1), and its velocity.
    z = data.sample_latents(moments, noise[:, 0])
    z = data.normalize_latents(z, nets.mean, nets.std)
    t = sample_t(u[:, 0], args.t_sampling)
    z_t, v = interpolate(z, noise[:, 1], t)

    # Without its label now and then, the network learns the unconditional velocity, which guidance needs.
    # No u is below a dropout of 0: then every label stays.
    y = drop_labels(y, u[:, 1], args.label_dropout, nets.model.config.num_classes)

    with common.autocast(device, nets.dtype):
        v_pred, projections = nets.model_ddp(z_t, t, y, return_projections=True)
    per_image = flow_loss(v_pred, v)  # (B,)
    loss = per_image.mean()
    terms = {"flow": loss}
    for k in range(4):
        # The loss by quarter of t, as (sum, count) of the images that fall there.
        inside = ((t >= k / 4) & (t < (k + 1) / 4)).float()
        terms[f"flow_t{k}"] = ((per_image * inside).sum(), inside.sum())

    # REPA: tokens from the middle of the network predict the teacher's, which sees the clean image.
    if nets.teacher is not None:
        x = data.to_float(batch["images"].to(device, non_blocking=True))
        with common.autocast(device, nets.dtype):
            target = nets.teacher(x)
        terms["repa"] = alignment_loss(projections[0], target)
        loss = loss + args.repa_weight * terms["repa"]
    terms["loss"] = loss
    return loss, terms


def train_step(nets, batches, step, args, num_steps):
    """One optimisation step on its micro-batches; step counts from 0.

    Returns (terms to log, a dict for each micro-batch and one for the step; whether the step was skipped, a
    bool tensor on the device).
    """
    all_terms = []
    for i, batch in enumerate(batches):
        # DDP averages gradients over processes after the last micro-batch only.
        with common.reducing(nets.model_ddp, last=i == len(batches) - 1):
            loss, terms = flow_terms(nets, batch, step, args)
            common.backward(loss / len(batches), nets.scaler)
        all_terms.append(terms)

    # A gradient that is not finite changes neither weights nor EMA; deciding that takes no host sync.
    lr = common.learning_rate(step, args.lr, args.warmup, args.cooldown, num_steps)
    norm, skipped = common.optimizer_step(nets.opt, lr, args.grad_clip, nets.scaler)
    nets.ema.update(nets.model, step + 1, skipped)
    all_terms.append({"grad_norm": norm, "lr": lr, "skipped_steps": skipped})
    return all_terms, skipped


# -----------------------------------------------------------------------------------------------------------
# a run

def parse_args(argv=None):
    parser = common.new_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--latents", default="latents",
        help="folder written by encode.py")
    add("--val-latents", default=None,
        help="folder of encode.py --split val: logs the EMA's flow loss on "
        f"{VAL_LATENTS} of them, always the same ones")
    add("--workers", type=natural, default=4,
        help="processes that read latents (and images), per device")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="XL/1", choices=tuple(SIT_SIZES),
        help="size/patch; /1 for f16 latents, /2 for f8")
    add("--label-dropout", type=float, default=0.1,  # DiT, SiT, REPA
        help="share of labels replaced by the null label, for guidance")
    add("--qk-norm", action="store_true", help="LayerNorm of queries and keys")
    add = parser.add_argument_group("REPA").add_argument
    add("--repa", action="store_true",
        help="add REPA's loss: the tokens after --repa-block predict the teacher's")
    add("--repa-weight", type=float, default=0.5,  # REPA
        help="weight of 1 - cos")
    add("--repa-block", type=natural, default=0,
        help="1-based; 0 = 8 for L and XL, 4 for smaller (REPA's choice)")
    add("--data", default=None,
        help="the images that were encoded; default: the folder named in the latents")
    add("--teacher", default="vit_base_patch14_dinov2.lvd142m",
        help="timm model, or 'shapes'")
    add("--teacher-weights", default=None,
        help="local file instead of the hub")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=positive, default=256,  # DiT, SiT, REPA, and the paper
        help="images per step over all devices")
    add("--epochs", type=float, default=80,  # the paper: 80, and 800 for the best numbers
        help="passes over the data (ignored with --steps)")
    add("--lr", type=float, default=1e-4,  # REPA, constant
        help="AdamW learning rate, as typed")
    add("--ema", type=float, default=0.9999,  # REPA, which does not warm it up
        help="decay of the weights' average (warms up)")
    add("--t-sampling", default="uniform", choices=("uniform", "lognormal"),  # REPA: uniform
        help="distribution of the noise time t")
    common.add_training_flags(parser, log_every=100, save_every=10000)
    add = parser.add_argument_group("looking").add_argument
    add("--val-every", type=positive, default=1000,
        help="steps between flow losses on --val-latents")
    add("--sample-every", type=natural, default=10000,
        help="steps between preview pictures, one more at the end; 0 = never")
    common.add_run_flags(parser, out="out/sit")
    return parser.parse_args(argv)


class WithImages:
    """Latents and, for REPA's teacher, the images that they were made from."""
    on_disk = True

    def __init__(self, latents, images):
        self.latents, self.images = latents, images

    def __len__(self):
        return len(self.latents)

    def batch(self, indices):
        images = self.images.batch(indices)["images"]
        return {**self.latents.batch(indices), "images": images}


def open_images(args, latents):
    """Return the images behind the latents; ValueError if they are others."""
    facts = latents.facts
    folder = args.data or facts["data"]
    # Sorted paths number the images, here and in encode.py: latent i belongs to image i.
    images = data.open_dataset(folder, facts["image_size"], facts.get("split", "train"))
    if images is None or images.images_hash != facts.get("images_hash"):  # older latents have none
        raise ValueError(f"{args.latents} was encoded from other images ({facts['data']}) than {folder} has; "
                         f"give --data the folder that encode.py read, or encode again")
    return images


def open_held_out(args, latents):
    """Return the folder of --val-latents, or None; ValueError if another VAE or other classes made it."""
    if args.val_latents is None:
        return None
    # A loss on other latents, or with other labels, would look like a number and mean nothing.
    wanted = {key: latents.facts[key] for key in ("vae_hash", "latent_size", "class_names")}
    data.read_facts(f"{args.val_latents}/meta.json", wanted, "encode both by one VAE, --split train and val")
    return data.LatentFolder(args.val_latents)


def build(args, latents, proc) -> Networks:
    """Make model, EMA, teacher and optimizer on proc's device; the model's shape follows from the latents."""
    size, (height, width) = SIT_SIZES[args.model], latents.facts["latent_size"]
    patch, depth = size["patch_size"], size["depth"]
    if height % patch or width % patch:
        raise ValueError(f"--model {args.model}: patches of {patch} do not tile {height} x {width} latents; "
                         f"try {args.model.split('/')[0]}/1")

    dtype, device = common.resolve_dtype(args.dtype, proc.device), proc.device
    nets = Networks(device, dtype, latents.mean.to(device), latents.std.to(device))
    # REPA's teacher has as many tokens as the SiT, so that token i of one predicts token i of the other.
    repa = {}
    if args.repa:
        nets.teacher = Teacher(args.teacher, height // patch, args.teacher_weights).to(device)
        block = args.repa_block or (8 if depth >= 24 else 4)
        if not 1 <= block <= depth:
            raise ValueError(f"--repa-block {block}: {args.model} has blocks 1 to {depth}")
        repa = {"z_dims": (nets.teacher.dim,), "encoder_depth": block}

    nets.model = SiT(SiTConfig(
        input_size=height,
        in_channels=latents.facts["channels"],
        num_classes=latents.num_classes,
        qk_norm=args.qk_norm,
        **size, **repa))
    nets.model.grad_checkpointing = args.checkpointing
    nets.model.train().to(device)
    nets.ema = common.EMA(nets.model, args.ema)
    common.compile_blocks(
        args.compile, device,
        nets.model, nets.teacher)

    # The positions are not trained: they are a parameter only because published files have them as one.
    nets.opt = common.adamw(nets.model, args.lr, args.beta2)
    nets.model_ddp = common.distribute(nets.model, proc)
    if dtype == torch.float16:
        nets.scaler = torch.amp.GradScaler(device.type)
    return nets


def pack(nets, latents, step, args) -> dict:
    """Return what the run needs to continue (beside images_seen) and sampling needs, as a plain dict."""
    return {
        "format": checkpoints.SIT,
        "step": step,
        "model": nets.model.state_dict(),
        "ema": nets.ema.state,  # what sample.py takes
        "model_config": asdict(nets.model.config),  # a reader builds the network from it
        "latents": latents.facts,  # with their statistics and the hash of their VAE
        "optimizer": nets.opt.state_dict(),
        "scaler": None if nets.scaler is None else nets.scaler.state_dict(),
        "args": vars(args),
        "time": "t=0 data, t=1 noise, v = eps - z",
        "versions": common.versions(),
    }


def unpack(nets, latents, saved, args) -> None:
    """Continue from a checkpoint; ValueError if it is of other latents or of another model."""
    # The same images by another VAE are other latents, and so are other images by the same.
    fixed = ["seed", "model", "qk_norm", "repa"] + ["repa_block", "teacher"] * args.repa
    common.check_resume(saved, args, fixed, saved["latents"], latents.facts)
    nets.model.load_state_dict(saved["model"])
    nets.ema.load(saved["ema"])
    common.load_optimizer(nets.opt, saved["optimizer"])
    if nets.scaler is not None and saved.get("scaler"):  # none: the run so far was not fp16
        nets.scaler.load_state_dict(saved["scaler"])


# -----------------------------------------------------------------------------------------------------------
# looking at a run

def averaged(nets) -> SiT:
    """Return a SiT in eval mode whose parameters are the EMA's tensors (not copies)."""
    with torch.device("meta"):
        model = SiT(nets.model.config)
    model.load_state_dict(nets.ema.state, assign=True)
    return model.eval()


@torch.no_grad()
def validate(nets, held_out, args) -> dict:
    """Flow loss of the EMA on held-out latents at t = 1/8, 3/8, 5/8, 7/8, always with the same noise.

    It moves as the network does, while the training loss is mostly the luck of its draws.
    """
    model, device = averaged(nets), nets.device
    count = min(VAL_LATENTS, len(held_out))
    indices = torch.linspace(0, len(held_out) - 1, count).long()  # evenly over all classes
    sums = torch.zeros(4, device=device)
    for part in indices.split(64):
        batch = held_out.batch(part.tolist())
        moments = batch["moments"].to(device)
        y = batch["labels"].to(device)
        shape = (2, moments.shape[1] // 2, *moments.shape[2:])
        noise = common.noise_for(shape, part.tolist(), device, args.seed, "val")
        z = data.normalize_latents(data.sample_latents(moments, noise[:, 0]), nets.mean, nets.std)
        # The middle of each quarter of t: the same quarters as the training loss is logged by.
        for k in range(4):
            t = torch.full((len(z),), (2 * k + 1) / 8, device=device)
            z_t, v = interpolate(z, noise[:, 1], t)
            with common.autocast(device, nets.dtype):
                v_pred = model(z_t, t, y)
            sums[k] += flow_loss(v_pred, v).sum()
    means = (sums / count).tolist()
    return {"val_flow": sum(means) / 4, **{f"val_flow_t{k}": mean for k, mean in enumerate(means)}}


@torch.no_grad()
def preview(nets, latents, step, args) -> None:
    """Write a grid of EMA samples (Euler), one column per class, the first ten classes, from fixed noise."""
    facts, device = latents.facts, nets.device
    vae = common.place(checkpoints.load_vae(facts["vae"]), device)
    model = averaged(nets)
    # Always the same noise and classes, so that the pictures of a run can be compared.
    columns = min(latents.num_classes, 10)
    y = torch.arange(4 * columns, device=device) % columns
    shape = (facts["channels"], *facts["latent_size"])
    noise = common.noise_for(shape, range(len(y)), device, args.seed, "preview")
    scale = PREVIEW_CFG if args.label_dropout > 0 else 1.0  # no dropout: no unconditional velocity

    def velocity(z_t, t, t_step):
        return guided_velocity(model, z_t, t, y, scale)

    # The solver's state is fp32; autocast concerns the networks alone.
    with common.autocast(device, nets.dtype):
        z = sample_ode(velocity, noise, PREVIEW_STEPS)
    z = data.denormalize_latents(z, nets.mean, nets.std)
    # In fp32, for a decoder may overflow in fp16; in parts, for it takes most of the memory.
    images = torch.cat([data.to_uint8(vae.decode(part)) for part in z.split(8)])
    data.save_grid(Path(args.out) / f"samples_{step:07d}.png", images, columns=columns)


def main(argv=None):
    args = parse_args(argv)
    proc = common.setup(args.device)

    # Data.
    latents = data.LatentFolder(args.latents)
    held_out = open_held_out(args, latents)
    dataset = latents
    if args.repa:
        dataset = WithImages(latents, open_images(args, latents))
    # A global batch is processes x micro-batches x images of a micro-batch.
    micro, accum = common.plan_batch(args.batch_size, args.micro_batch_size, proc.world)

    # Continue a run?
    if not args.dry_run:
        common.claim(args.out, proc)  # one run a folder
    saved = checkpoints.newest(args.out, checkpoints.SIT)  # None: a new run
    step = 0 if saved is None else saved["step"]
    common.agree(latents_hash=data.hash_of(latents.facts), checkpoint=step)
    num_steps = common.plan_steps(args.steps, args.epochs, len(latents), args.batch_size, saved)

    # Networks.
    torch.manual_seed(args.seed)  # initial weights only; the steps draw from (seed, step, row)
    nets = build(args, latents, proc)
    networks = {args.model: nets.model, "teacher": nets.teacher}
    common.print_plan(args, proc, networks, len(latents), micro, accum, num_steps)
    facts = latents.facts
    common.print0(f"latents: {len(latents):,} of {facts['channels']} channels, {facts['latent_size']}, "
                  f"{latents.num_classes} classes, VAE {facts['vae_hash'][:12]}")
    if saved is not None:
        unpack(nets, latents, saved, args)
    if args.dry_run:
        return None
    progress = common.Progress(args, proc, step, num_steps, ("loss", "repa", "val_flow"), saved)
    del saved  # its tensors have been copied

    # Training.
    loader = data.make_loader(dataset, args.batch_size, proc, micro, args.seed, progress.images_seen,
                              num_steps - step, args.workers)
    with common.Behind() as behind:
        for step, batches in progress.steps(loader, accum, behind):
            terms, skipped = train_step(nets, batches, step - 1, args, num_steps)
            # Reads numbers from the device every --log-every steps only.
            progress.record(terms, skipped)
            # Saving comes last: a run that is stopped before it comes back, and does these again.
            if held_out is not None and progress.due(args.val_every) and proc.main:
                progress.look(validate, nets, held_out, args)
            if args.sample_every and progress.due(args.sample_every) and proc.main:
                progress.look(preview, nets, latents, step, args)
            if progress.should_save():
                common.check_same(nets.model)
                state = pack(nets, latents, step, args) | {"images_seen": progress.images_seen}
                if proc.main:
                    # The step waits for a copy, not for the disk; there is room for one copy.
                    behind.wait()
                    behind(checkpoints.save, args.out, step, checkpoints.snapshot(state), args.keep)
    return args.out


if __name__ == "__main__":
    common.cli(main)
