"""Stage 2: train a SiT flow transformer on the latents that encode.py wrote.

    torchrun --nproc_per_node=8 train_sit.py --latents latents/         # SiT-XL/1, 80 epochs, batch 256
    torchrun --nproc_per_node=8 train_sit.py --latents latents/ --repa  # with the REPA loss (needs images)
    python train_sit.py --latents out/quickstart/send/latents --model tiny/1 --steps 2000   # a CPU

z is drawn anew from the stored moments in each step, normalised per channel with the statistics stored beside
them (which travel on in the checkpoint). Running the same command again continues from the newest checkpoint
in --out.
"""
import argparse
from dataclasses import asdict
from pathlib import Path

import torch

import common
import data
import logs
import weights
from common import natural, positive
from mapper import Teacher, alignment_loss
from sit import (SIT_SIZES, SiT, SiTConfig, drop_labels, flow_loss, guided_velocity, interpolate, sample_ode,
                 sample_t)
from vae import load_vae

FORMAT = "nanosendvae-sit"
VAL_LATENTS = 512


def parse_args(argv=None):
    """Parse the command line; the defaults are REPA's recipe on f16 latents, as in the paper."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--latents", default="latents", help="folder written by encode.py")
    add("--val-latents", default=None, help="folder of encode.py --split val: logs the EMA's flow loss on "
        f"{VAL_LATENTS} of them, always the same ones")
    add("--workers", type=natural, default=4, help="processes that read latents (and images), per device")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="XL/1", choices=tuple(SIT_SIZES), help="size/patch; /1 for f16 latents, /2 for f8")
    add("--label-dropout", type=float, default=0.1,
        help="share of labels replaced by the null label, for guidance")
    add("--qk-norm", action="store_true", help="LayerNorm of queries and keys")
    add = parser.add_argument_group("REPA").add_argument
    add("--repa", action="store_true",
        help="add REPA's loss: the tokens after --repa-block predict the teacher's")
    add("--repa-weight", type=float, default=0.5, help="weight of 1 - cos")
    add("--repa-block", type=natural, default=0,
        help="1-based; 0 = 8 for L and XL, 4 for smaller (REPA's choice)")
    add("--data", default=None, help="the images that were encoded; default: the folder named in the latents")
    add("--teacher", default="vit_base_patch14_dinov2.lvd142m", help="timm model, or 'shapes'")
    add("--teacher-weights", default=None, help="local file instead of the hub")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=positive, default=256, help="images per step over all devices")
    add("--micro-batch-size", type=natural, default=0, help="images per forward and device; 0 = all at once")
    add("--epochs", type=float, default=80, help="passes over the data (ignored with --steps)")
    add("--steps", type=natural, default=0, help="optimisation steps; 0 = from --epochs")
    add("--lr", type=float, default=1e-4, help="AdamW learning rate, as typed")
    add("--warmup", type=natural, default=0, help="steps over which lr rises from 0")
    add("--cooldown", type=natural, default=0, help="last steps over which lr falls to 0")
    add("--grad-clip", type=float, default=1.0, help="gradient norm; 0 = off")
    add("--ema", type=float, default=0.9999, help="decay of the weights' average (warms up)")
    add("--t-sampling", default="uniform", choices=("uniform", "lognormal"),
        help="distribution of the noise time t")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--checkpointing", action="store_true", help="recompute activations in backward: less memory, slower")
    add = parser.add_argument_group("logging").add_argument
    add("--log-every", type=positive, default=100, help="steps")
    add("--val-every", type=positive, default=1000, help="steps between flow losses on --val-latents")
    add("--sample-every", type=natural, default=10000,
        help="steps between preview pictures; 0 = at the end only")
    add("--preview-cfg", type=float, default=2.0, help="guidance scale of the previews")
    add("--save-every", type=positive, default=10000, help="steps between checkpoints")
    add("--keep", type=positive, default=2, help="newest checkpoints kept")
    add("--stop-after-bad", type=positive, default=100, help="stop after so many non-finite steps in a row")
    add("--tensorboard", action="store_true", help="also log there (needs the package tensorboard)")
    add("--wandb", default=None, metavar="PROJECT", help="also log there (needs the package wandb)")
    add("--dry-run", action="store_true", help="print configuration, sizes, batches and memory, then leave")
    common.add_run_flags(parser, out="out/sit")
    return parser.parse_args(argv)


def build(args, latents):
    """Return (model, teacher or None), on the CPU; the model's shape follows from the latents."""
    meta, size = latents.meta, SIT_SIZES[args.model]
    teacher, repa = None, {}
    height, width = meta["latent_size"]
    if height % size["patch_size"] or width % size["patch_size"]:
        raise ValueError(f"--model {args.model}: patches of {size['patch_size']} do not tile "
                         f"{height} x {width} latents; try {args.model.split('/')[0]}/1")
    if args.repa:
        teacher = Teacher(args.teacher, height // size["patch_size"], args.teacher_weights)
        block = args.repa_block or (8 if size["depth"] >= 24 else 4)
        if not 1 <= block <= size["depth"]:
            raise ValueError(f"--repa-block {block}: {args.model} has blocks 1 to {size['depth']}")
        repa = dict(z_dims=(teacher.dim,), encoder_depth=block)
    config = SiTConfig(input_size=height, in_channels=meta["channels"], num_classes=meta["num_classes"],
                       qk_norm=args.qk_norm, **size, **repa)
    model = SiT(config)
    model.grad_checkpointing = args.checkpointing
    return model.train(), teacher


def describe(args, latents, model, micro, accum, proc, steps):
    """Print the resolved configuration, parameter counts, batch arithmetic and the memory to expect."""
    common.print0("configuration: " + " ".join(f"{k}={v}" for k, v in sorted(vars(args).items())))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    meta, per_epoch = latents.meta, len(latents) // args.batch_size
    common.print0(f"parameters: {args.model} {sum(p.numel() for p in model.parameters()):,} "
                  f"({trained:,} trained)")
    common.print0(f"latents: {len(latents):,} of {meta['channels']} x {meta['latent_size'][0]} x "
                  f"{meta['latent_size'][1]}, {meta['num_classes']} classes, VAE {meta['vae_hash'][:12]}")
    common.print0(f"precision: {common.resolve_dtype(args.dtype, proc.device)} autocast, float32 weights "
                  f"and losses; device: {proc.device}")
    common.print0(f"batch: {args.batch_size} global = {proc.world} processes x {accum} micro-batches x "
                  f"{micro}; lr {args.lr:g} as typed; {per_epoch} steps/epoch, {steps:,} steps = "
                  f"{steps / max(per_epoch, 1):.1f} epochs = {steps * args.batch_size:,} images")
    with torch.device("meta"):
        shadow = SiT(model.config)
    z = torch.empty(1, meta["channels"], *meta["latent_size"], device="meta")
    y = torch.zeros(1, dtype=torch.int64, device="meta")
    saved = common.saved_bytes(lambda: shadow(z, torch.empty(1, device="meta"), y))
    common.print0(f"memory: about {(20 * trained + micro * saved) / 2**30:.1f} GiB per device in fp32 "
                  f"(weights, gradients, AdamW, EMA; {saved / 2**20:.0f} MiB of activations an image), about "
                  f"half the activations under bf16; the REPA teacher comes on top")


def train(args, proc):
    """Train to the number of steps; return the folder of checkpoints."""
    latents = data.LatentFolder(args.latents)
    held_out = None if args.val_latents is None else data.LatentFolder(args.val_latents)
    for key in ("vae_hash", "latent_size", "class_names"):
        if held_out is not None and held_out.meta[key] != latents.meta[key]:
            raise ValueError(f"{args.val_latents} has {key} {str(held_out.meta[key])[:80]}, {args.latents} "
                             f"{str(latents.meta[key])[:80]}; encode both by one VAE, --split train and val")
    micro, accum = common.plan_batch(args.batch_size, args.micro_batch_size, proc.world)
    steps = common.plan_steps(args.steps, args.epochs, len(latents), args.batch_size)
    torch.manual_seed(args.seed)  # initialisation only; the steps draw from (seed, step, row)
    model, teacher = build(args, latents)
    describe(args, latents, model, micro, accum, proc, steps)
    if args.dry_run:
        return None
    images = None
    if args.repa:
        images = data.open_dataset(args.data or latents.meta["data"], latents.meta["image_size"],
                                   latents.meta.get("split", "train"))
        if images.files_hash != latents.meta["files_hash"]:
            raise ValueError(f"{args.latents} was encoded from other images ({latents.meta['data']}) than "
                             f"{args.data or latents.meta['data']}; give --data the folder that encode.py "
                             f"read")
    run = Run(args, proc, latents, held_out, model, teacher, steps)
    run.resume()
    loader = data.make_loader(latents if images is None else WithImages(latents, images), args.batch_size,
                              proc.rank, proc.world, micro, args.seed, run.step, steps, args.workers)
    run.loop(loader, accum)
    return args.out


class WithImages:
    """Latents and, for REPA's teacher, the images that they were made from."""
    on_disk = True

    def __init__(self, latents, images):
        self.latents, self.images = latents, images

    def __len__(self):
        return len(self.latents)

    def __getitems__(self, indices):
        moments, labels = self.latents.__getitems__(indices)
        return (moments, self.images.__getitems__(indices)[0]), labels


class Run:
    """The state of one training run (all that a checkpoint holds) and the loop over it."""

    def __init__(self, args, proc, latents, held_out, model, teacher, steps):
        self.args, self.proc, self.num_steps, self.step = args, proc, steps, 0
        self.held_out = held_out
        self.meta, self.model = latents.meta, model.to(proc.device)
        self.mean, self.std = latents.mean.to(proc.device), latents.std.to(proc.device)
        self.teacher = teacher if teacher is None else teacher.to(proc.device)
        self.dtype = common.resolve_dtype(args.dtype, proc.device)
        self.optimizer = common.adamw([p for p in model.parameters() if p.requires_grad], args.lr)
        self.scaler = torch.amp.GradScaler(proc.device.type) if self.dtype == torch.float16 else None
        self.ema = common.EMA(self.model, args.ema)
        if args.compile:
            common.compile_modules(self.model, self.teacher)
        self.ddp = common.distribute(self.model, proc)

    def state(self):
        """All that the run needs to continue, and that sampling needs, as a plain dict; unwrapped names."""
        return {"format": FORMAT, "step": self.step, "images_seen": self.step * self.args.batch_size,
                "model": self.model.state_dict(), "ema": self.ema.state,
                "model_config": asdict(self.model.config), "latents": self.meta,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler and self.scaler.state_dict(), "args": vars(self.args),
                "time": "t=0 data, t=1 noise, v = eps - z", "versions": common.versions()}

    def save(self):
        """Write ckpt_<step>.pt, atomically, on rank 0; all ranks check first that they agree."""
        common.check_same(self.model)
        if self.proc.main:
            common.save_checkpoint(Path(self.args.out) / f"ckpt_{self.step:07d}.pt", self.state())
            common.prune_checkpoints(self.args.out, self.args.keep, self.step)

    def resume(self):
        """Continue from the newest readable checkpoint in --out, if there is one."""
        found = common.latest_checkpoint(self.args.out, FORMAT)
        if found is None:
            return
        path, state = found
        if state["latents"]["vae_hash"] != self.meta["vae_hash"]:
            raise ValueError(f"{path} was trained on latents of VAE {state['latents']['vae_hash'][:12]}, "
                             f"{self.args.latents} holds those of {self.meta['vae_hash'][:12]}; "
                             f"use another --out")
        if weights.config_of(SiTConfig, state["model_config"], path) != self.model.config:
            raise ValueError(f"{path} holds {state['args']['model']}, another model than the flags ask for "
                             f"({self.args.model}); give the same flags or another --out")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.ema.load(state["ema"])
        common.load_optimizer(self.optimizer, state["optimizer"])
        if self.scaler is not None and state.get("scaler"):  # none: the run so far was not fp16
            self.scaler.load_state_dict(state["scaler"])
        common.print0(f"continuing from {path} at step {self.step}")

    def loop(self, loader, accum):
        """Step until num_steps or a signal, logging, drawing previews and saving on the way."""
        args, stop, timer = self.args, common.StopSignal(), logs.Timer(self.proc, self.step, self.num_steps)
        log = logs.Log(args.out, self.proc, self.step, self.num_steps, vars(args), args.tensorboard,
                       args.wandb)
        meter, batches = logs.Meter(), iter(loader)
        bad_streak = torch.zeros((), device=self.proc.device)
        while self.step < self.num_steps:
            with timer.waiting():
                micro_batches = [next(batches) for _ in range(accum)]
            skipped = self.train_step(micro_batches, meter)
            bad_streak = (bad_streak + 1) * skipped
            self.step += 1
            self.ema.update(self.model, self.step, skipped)
            done, row = self.step == self.num_steps, None
            if self.step % args.log_every == 0 or self.step in logs.EARLY_LOGS or done:
                row = {**meter.read(self.proc.device), **timer.read(args.batch_size, self.step)}
                logs.check_health(row, int(bad_streak), args.stop_after_bad, self.step)
            if self.proc.world == 1 or self.step % min(args.log_every, 10) == 0:
                done |= stop.agreed(self.proc)  # torchrun kills 30 s after its signal
            with timer.pausing():
                if self.held_out is not None and (self.step % args.val_every == 0 or
                                                  self.step == self.num_steps):
                    row = {**(row or {}), **self.validate()}
                log.step(self.step, row, ("loss", "repa", "val_flow", "images_per_s"))
                if self.step % args.save_every == 0 or self.step == 1 or done:
                    self.save()  # first: a preview may take minutes on a CPU, or fail
                if args.sample_every and self.step % args.sample_every == 0 or self.step == self.num_steps:
                    self.preview()
            if done:
                break
        log.close()
        if self.step < self.num_steps:
            common.print0(f"stopped by a signal, saved at step {self.step}; the same command continues")

    def train_step(self, micro_batches, meter):
        """One optimisation step; return whether it was skipped."""
        args = self.args
        for i, batch in enumerate(micro_batches):
            with common.reducing(self.ddp, last=i == len(micro_batches) - 1):
                loss, terms = self._loss(*batch)
                loss = loss / len(micro_batches)
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            meter.add(terms)
        lr = common.learning_rate(self.step, args.lr, args.warmup, args.cooldown, self.num_steps)
        norm, skipped = common.optimizer_step(self.optimizer, lr, args.grad_clip, self.scaler)
        meter.add({"grad_norm": norm, "lr": lr, "skipped_steps": skipped})
        return skipped

    def _loss(self, moments, labels, _indices, rows):
        """Return (loss, named terms) of one micro-batch; all draws are functions of (seed, step, row)."""
        args, device, step = self.args, self.proc.device, self.step
        moments, images = moments if self.teacher is not None else (moments, None)
        moments, y = moments.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        rows = rows.tolist()
        draws = common.noise_for((2, moments.shape[1] // 2, *moments.shape[2:]), rows, device,
                                 args.seed, "sit", step)
        u = common.uniform_for(2, rows, device, args.seed, "t", step)
        z = data.normalize_latents(data.sample_latents(moments, draws[:, 0]), self.mean, self.std)
        t = sample_t(u[:, 0], args.t_sampling)
        y = drop_labels(y, u[:, 1], args.label_dropout, self.model.config.num_classes)
        z_t, v = interpolate(z, draws[:, 1], t)
        with common.autocast(device, self.dtype):
            v_pred, projections = self.ddp(z_t, t, y, return_projections=True)
        per_image = flow_loss(v_pred, v)  # (B,)
        loss = flow = per_image.mean()
        terms = {"flow": flow}
        for k in range(4):  # the flow loss by quarter of t: means of the images that fall there
            inside = ((t >= k / 4) & (t < (k + 1) / 4)).float()
            terms[f"flow_t{k}"] = ((per_image * inside).sum(), inside.sum())
        if self.teacher is not None:
            with common.autocast(device, self.dtype):
                target = self.teacher(data.to_float(images.to(device, non_blocking=True)))
            terms["repa"] = alignment_loss(projections[0], target)
            loss = loss + args.repa_weight * terms["repa"]
        return loss, {**terms, "loss": loss}

    def averaged(self):
        """Return a SiT in eval mode whose parameters are the EMA's tensors (not copies)."""
        with torch.device("meta"):
            model = SiT(self.model.config)
        model.load_state_dict(self.ema.state, assign=True)
        return model.eval()

    @torch.no_grad()
    def validate(self):
        """Flow loss of the EMA on held-out latents at t = 1/8, 3/8, 5/8, 7/8, always with the same noise: it
        moves as the network does, while the training loss is mostly the luck of its draws."""
        if not self.proc.main:
            return {}
        model, device, losses = self.averaged(), self.proc.device, []
        indices = torch.linspace(0, len(self.held_out) - 1, min(VAL_LATENTS, len(self.held_out))).long()
        for rows in indices.split(64):
            moments, y = (x.to(device) for x in self.held_out.__getitems__(rows.tolist()))
            draws = common.noise_for((2, moments.shape[1] // 2, *moments.shape[2:]), rows.tolist(), device,
                                     self.args.seed, "val")
            z = data.normalize_latents(data.sample_latents(moments, draws[:, 0]), self.mean, self.std)
            times = torch.tensor([1, 3, 5, 7], device=device) / 8
            pairs = [interpolate(z, draws[:, 1], t.expand(len(z))) for t in times]
            with common.autocast(device, self.dtype):
                v_pred = [model(z_t, t.expand(len(z)), y) for t, (z_t, _) in zip(times, pairs)]
            losses.append(torch.stack([flow_loss(p, v) for p, (_, v) in zip(v_pred, pairs)], 1))
        means = torch.cat(losses).mean(0).tolist()  # of (n, 4)
        return {"val_flow": sum(means) / 4, **{f"val_flow_t{k}": mean for k, mean in enumerate(means)}}

    @torch.no_grad()
    def preview(self):
        """Write a grid of EMA samples (Euler, 50 steps), the first classes in order, from fixed noise."""
        if not self.proc.main:
            return
        try:
            vae = load_vae(self.meta["vae"]).to(self.proc.device)
        except (ValueError, FileNotFoundError) as error:
            return common.print0(f"no preview: {error}")
        model = self.averaged()
        columns = min(self.meta["num_classes"], 10)
        y = torch.arange(4 * columns, device=self.proc.device) % columns
        shape = (self.meta["channels"], *self.meta["latent_size"])
        noise = common.noise_for(shape, range(len(y)), self.proc.device, self.args.seed, "preview")
        scale = self.args.preview_cfg if self.args.label_dropout > 0 else 1.0
        with common.autocast(self.proc.device, self.dtype):
            z = sample_ode(lambda z_t, t: guided_velocity(model, z_t, t, y, scale), noise, 50)
            parts = data.denormalize_latents(z, self.mean, self.std).split(8)  # decoding takes most memory
            x = torch.cat([vae.decode(part) for part in parts])
        path = Path(self.args.out) / f"samples_{self.step:07d}.png"
        data.save_grid(path, data.to_uint8(x.float()).cpu(), columns=columns)


def main(argv=None):
    """Entry point of the command."""
    args = parse_args(argv)
    return train(args, common.setup(args.device))


if __name__ == "__main__":
    common.cli(main)
