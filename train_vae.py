"""Stage 1: fine-tune (or train) a KL autoencoder so that its noised latent predicts a teacher's patch tokens.

    torchrun --nproc_per_node=8 train_vae.py                     # the paper: f16d32, ImageNet, 80 epochs
    python train_vae.py --data DIR --batch-size 32 --steps 1000  # one device, your own pictures
    python train_vae.py --data shapes --vae tiny --init none --teacher shapes --lpips 0 --gan 0  # no download

Running the same command again continues from the newest checkpoint in --out; the continued run is bit-equal
to an uninterrupted one on a CPU. Each step takes the same optimisation step on any number of processes.
Loss (eq. 3 of arXiv:2601.05823): L1 + LPIPS + 0.1 GAN + 1e-6 KL + 1.0 alignment; `--align 0` is a plain
KL-VAE.
"""
import argparse
import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import common
import data
import logs
import weights
from common import natural, positive
from losses import (LPIPS, PatchDiscriminator, StepBatchNorm, adaptive_gan_weight, discriminator_loss,
                    generator_loss, load_discriminator, vae_loss)
from mapper import Mapper, MapperConfig, Teacher, alignment_loss
from vae import VAE, VAE_SIZES, Posterior, load_vae

FORMAT = "nanosendvae-vae"
PUBLISHED_INIT = "hf://hustvl/vavae-imagenet256-f16d32-dinov2/vavae-imagenet256-f16d32-dinov2.pt"
MAPPER_PATCH = {"f16d32": 1, "f8d4": 2, "tiny": 1}  # mapper tokens = teacher tokens (16 x 16 at 256 px)
EVAL_IMAGES = 64


def parse_args(argv=None):
    """Parse the command line; the defaults are the paper's fine-tune."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--data", default=data.DEFAULT_DATA,
        help="folder of class folders, flat folder, or 'shapes' (embedded set)")
    add("--val", default=None,
        help="folder of held-out images; default: the folder 'val' beside 'train', if any")
    add("--image-size", type=positive, default=None, help="pixels; default 256, or 32 for 'shapes'")
    add("--workers", type=natural, default=8, help="processes that read images, per device")
    add = parser.add_argument_group("model").add_argument
    add("--vae", default="f16d32", choices=tuple(VAE_SIZES), help="architecture; must fit --init")
    add("--init", default=PUBLISHED_INIT,
        help="start weights: file, folder (ours, diffusers'), hf://owner/repo/file, or 'none' (from scratch)")
    add("--teacher", default="vit_base_patch14_dinov2.lvd142m", help="timm model, or 'shapes'")
    add("--teacher-weights", default=None, help="local file instead of the hub")
    add("--mapper", default="vit", choices=("vit", "linear"),
        help="linear: one convolution, no noise (as VA-VAE)")
    add("--mapper-depth", type=natural, default=1, help="ViT blocks; 0 = patch embedding and MLP only")
    add("--projector-dim", type=positive, default=2048, help="hidden width of the mapper's MLP")
    add("--mapper-noise", default="on", choices=("on", "off"), help="noise the latent before the mapper")
    add("--mapper-norm", default="on", choices=("on", "off"),
        help="BatchNorm of the latent before noise and (vit) mapper, as REPA-E; off: eq. 1 on the raw latent")
    add = parser.add_argument_group("loss (weights; 0 = off)").add_argument
    add("--align", type=float, default=1.0, help="alignment, mean(1 - cos)")
    add("--rec", default="l1", choices=("l1", "l2"), help="reconstruction, mean over elements")
    add("--lpips", type=float, default=1.0, help="LPIPS (VGG16)")
    add("--lpips-weights", default=None, help="local torchvision VGG16 file instead of the hub")
    add("--kl", type=float, default=1e-6, help="KL, nats summed over the latent, mean over images")
    add("--gan", type=float, default=0.1, help="hinge PatchGAN, weight in the VAE loss")
    add("--gan-adaptive", action="store_true",
        help="scale --gan by the gradient ratio at the last layer (as VQGAN), per micro-batch")
    add("--disc-init", default="none",
        help="discriminator to start from: file or hf://owner/repo/file, or 'none' (from scratch)")
    add("--disc-start", type=natural, default=0, help="step at which the discriminator begins to train")
    add("--disc-warmup", type=natural, default=0, help="further steps before it enters the VAE loss")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=positive, default=1024, help="images per step over all devices")
    add("--micro-batch-size", type=natural, default=0, help="images per forward and device; 0 = all at once")
    add("--epochs", type=float, default=80, help="passes over the data (ignored with --steps)")
    add("--steps", type=natural, default=0, help="optimisation steps; 0 = from --epochs")
    add("--lr", type=float, default=3e-4, help="AdamW learning rate, as typed")
    add("--disc-lr", type=float, default=1e-4, help="AdamW learning rate of the discriminator")
    add("--warmup", type=natural, default=0, help="steps over which lr rises from 0")
    add("--cooldown", type=natural, default=0, help="last steps over which lr falls to 0")
    add("--grad-clip", type=float, default=1.0, help="gradient norm; 0 = off")
    add("--bn-group", type=positive, default=32, help="images per BatchNorm call in mapper and discriminator")
    add("--compile", action="store_true", help="torch.compile encoder, decoder and teacher")
    add("--checkpointing", action="store_true", help="recompute activations in backward: less memory, slower")
    add = parser.add_argument_group("logging").add_argument
    add("--log-every", type=positive, default=50, help="steps")
    add("--eval-every", type=natural, default=1000,
        help="steps between evaluations with a picture; 0 = at the end only")
    add("--save-every", type=positive, default=5000, help="steps between checkpoints")
    add("--keep", type=positive, default=2, help="newest checkpoints kept")
    add("--stop-after-bad", type=positive, default=100, help="stop after so many non-finite steps in a row")
    add("--tensorboard", action="store_true", help="also log there (needs the package tensorboard)")
    add("--wandb", default=None, metavar="PROJECT", help="also log there (needs the package wandb)")
    add("--dry-run", action="store_true", help="print configuration, sizes, batches and memory, then leave")
    common.add_run_flags(parser, out="out/vae")
    return parser.parse_args(argv)


class Trainee(nn.Module):
    """VAE and mapper in one forward, so that one DDP wrapper sees all their parameters."""

    def __init__(self, vae: VAE, mapper: Mapper | None):
        super().__init__()
        self.vae, self.mapper = vae, mapper

    def forward(self, x, eps_z, t, eps):
        """x (B, 3, H, W) -> reconstruction, posterior, predicted teacher tokens (None without a mapper)."""
        posterior = self.vae.encode(x)
        z = posterior.sample(eps=eps_z)
        pred = None if self.mapper is None else self.mapper(z, t, eps)
        return self.vae.decode(z), posterior.mean, posterior.logvar, pred


class Critic(nn.Module):
    """The discriminator on real and fake in one forward (for DDP), in groups of `bn_group` images."""

    def __init__(self, discriminator: PatchDiscriminator, bn_group: int):
        super().__init__()
        self.discriminator, self.bn_group = discriminator, bn_group

    def judge(self, x):
        """Logits of images x; BatchNorm sees `bn_group` images at a time, real and fake apart."""
        return torch.cat([self.discriminator(group) for group in x.split(self.bn_group)])

    def forward(self, real, fake):
        return self.judge(real), self.judge(fake)


def build(args, image_size, checkpoint=None):
    """Return (vae, mapper or None, teacher or None, lpips or None, critic or None), on the CPU.

    checkpoint: of the run that is continued; it holds all that --init and --disc-init began with.
    """
    init, disc_init = (args.init, args.disc_init) if checkpoint is None else (checkpoint, "none")
    vae = VAE(VAE_SIZES[args.vae]) if init == "none" else load_vae(weights.resolve(init))
    if vae.config.network != VAE_SIZES[args.vae].network:
        held = vae.config.z_channels, vae.stride
        name = next((f"{k}: give --vae {k}" for k, v in VAE_SIZES.items() if v.network == vae.config.network),
                    f"a VAE of {held[0]} channels at 1/{held[1]}, which --vae has no name for")
        raise ValueError(f"--vae asks for {args.vae}, {'' if checkpoint else '--init '}{init} holds {name}")
    patch = MAPPER_PATCH[args.vae] if args.align > 0 else 1
    if image_size % (vae.stride * patch):
        raise ValueError(f"--image-size {image_size} is not a multiple of {vae.stride * patch}: the VAE's "
                         f"stride {vae.stride} x the mapper's patch {patch}")
    vae.checkpointing = args.checkpointing
    mapper = teacher = None
    if args.align > 0:
        grid = image_size // vae.stride // patch
        teacher = Teacher(args.teacher, grid, args.teacher_weights)
        mapper = Mapper(MapperConfig(
            z_channels=vae.config.z_channels, grid=grid, out_dim=teacher.dim, patch_size=patch,
            kind=args.mapper, depth=args.mapper_depth, projector_dim=args.projector_dim,
            noise=args.mapper_noise == "on", norm=args.mapper_norm == "on", bn_group=args.bn_group))
    lpips = LPIPS(args.lpips_weights) if args.lpips > 0 else None
    if args.disc_init != "none" and args.gan == 0:
        raise ValueError("--disc-init: --gan 0 trains without a discriminator; leave one of them out")
    critic = None
    if args.gan > 0:
        disc = PatchDiscriminator() if disc_init == "none" else load_discriminator(disc_init)
        critic = Critic(disc, args.bn_group)
    return vae.train(), mapper, teacher, lpips, critic


def describe(args, dataset, modules, micro, accum, proc, steps):
    """Print the resolved configuration, parameter counts, batch arithmetic and the memory to expect."""
    vae, mapper, teacher, lpips, critic = modules
    common.print0("configuration: " + " ".join(f"{k}={v}" for k, v in sorted(vars(args).items())))
    trained = 0
    for name, module in (("vae", vae), ("mapper", mapper), ("discriminator", critic),
                         ("teacher (frozen)", teacher), ("lpips (frozen)", lpips)):
        if module is not None:
            count = sum(p.numel() for p in module.parameters())
            trained += 0 if "frozen" in name else count
            common.print0(f"parameters: {name} {count:,}")
    per_epoch = len(dataset) // args.batch_size
    common.print0(f"data: {len(dataset):,} images, {dataset.num_classes} classes, {args.image_size} px")
    common.print0(f"precision: {common.resolve_dtype(args.dtype, proc.device)} autocast, float32 weights "
                  f"and losses; device: {proc.device}")
    common.print0(f"batch: {args.batch_size} global = {proc.world} processes x {accum} micro-batches x "
                  f"{micro}; lr {args.lr:g} as typed; {per_epoch} steps/epoch, {steps:,} steps = "
                  f"{steps / max(per_epoch, 1):.1f} epochs = {steps * args.batch_size:,} images")
    with torch.device("meta"):
        shadow = VAE(vae.config)
    x = torch.empty(1, 3, args.image_size, args.image_size, device="meta")
    saved = common.saved_bytes(lambda: shadow.decode(shadow.encode(x).mode()))
    common.print0(f"memory: about {(16 * trained + micro * saved) / 2**30:.1f} GiB per device in fp32 "
                  f"(weights, gradients, AdamW; {saved / 2**20:.0f} MiB of VAE activations an image), about "
                  f"half the activations under bf16; "
                  f"teacher, LPIPS and discriminator activations come on top")


def train(args, proc):
    """Train to args.steps; return the folder of checkpoints."""
    dataset = data.open_dataset(args.data, args.image_size)
    micro, accum = common.plan_batch(args.batch_size, args.micro_batch_size, proc.world)
    has_norms = args.gan > 0 or args.align > 0 and args.mapper == "vit" and args.mapper_norm == "on"
    if has_norms and micro % args.bn_group and (micro < args.batch_size or micro > args.bn_group):
        raise ValueError(f"micro-batch {micro} is not a multiple of --bn-group {args.bn_group}: the step "
                         f"would depend on how the batch is cut; try --bn-group "
                         f"{math.gcd(micro, args.bn_group)}")
    steps = common.plan_steps(args.steps, args.epochs, len(dataset), args.batch_size)
    torch.manual_seed(args.seed)  # initialisation only; the steps draw from (seed, step, row)
    found = common.latest_checkpoint(args.out, FORMAT)
    modules = build(args, args.image_size, found and str(found[0]))
    describe(args, dataset, modules, micro, accum, proc, steps)
    if args.dry_run:
        return None
    run = Run(args, proc, modules, steps)
    if found is not None:
        run.resume(*found)
    del found  # its tensors have been copied
    loader = data.make_loader(dataset, args.batch_size, proc.rank, proc.world, micro, args.seed, run.step,
                              steps, args.workers if proc.device.type != "mps" else 0)
    val_set = data.open_dataset(args.data, args.image_size, split="val", val=args.val)
    run.loop(loader, accum, val_set or dataset, "validation" if val_set is not None else "training")
    return args.out


def latent_summary(z):
    """Collapse detector of latents z (B, C, h, w): spread of the channels, effective rank (exp of the
    spectrum's entropy)."""
    rows = z.float().cpu().transpose(0, 1).flatten(1)  # (C, B*h*w); eigvalsh is not on every device
    spectrum = torch.linalg.eigvalsh(torch.cov(rows)).clamp_min(1e-12)
    share = spectrum / spectrum.sum()
    return {"latent_std_min": rows.std(1).min().item(), "latent_std_max": rows.std(1).max().item(),
            "effective_rank": torch.exp(-(share * share.log()).sum()).item()}


class Run:
    """The state of one training run (all that a checkpoint holds) and the loop over it."""

    def __init__(self, args, proc, modules, steps):
        self.args, self.proc, self.num_steps, self.step = args, proc, steps, 0
        self.vae, self.mapper, self.teacher, self.lpips, self.critic = (
            m if m is None else m.to(proc.device) for m in modules)
        if proc.device.type == "cuda":  # cuDNN's bf16 convolutions want NHWC
            for module in (self.vae, self.lpips, self.critic):
                if module is not None:
                    module.to(memory_format=torch.channels_last)
        self.dtype = common.resolve_dtype(args.dtype, proc.device)
        trainee = Trainee(self.vae, self.mapper)
        self.optimizer = common.adamw(trainee.parameters(), args.lr)
        self.optimizer_disc = (None if self.critic is None else
                               common.adamw(self.critic.parameters(), args.disc_lr))
        fp16 = self.dtype == torch.float16
        self.scalers = [torch.amp.GradScaler(proc.device.type) for _ in range(2)] if fp16 else [None, None]
        self.norms = StepBatchNorm(*[m for m in (self.mapper, self.critic) if m is not None])
        if args.compile:
            common.compile_modules(self.vae.encoder, self.vae.decoder, self.teacher)
        self.trainee = common.distribute(trainee, proc)
        self.critic_ddp = None if self.critic is None else common.distribute(self.critic, proc)

    def state(self):
        """Everything that the run needs to continue, as a plain dict; unwrapped names."""
        args, disc = self.args, self.critic and self.critic.discriminator
        return {"format": FORMAT, "step": self.step, "images_seen": self.step * args.batch_size,
                "model": self.vae.state_dict(), "ema": None, "model_config": asdict(self.vae.config),
                "mapper": self.mapper and self.mapper.state_dict(),
                "mapper_config": self.mapper and asdict(self.mapper.config),
                "teacher": args.teacher if self.mapper else None,
                "discriminator": disc and disc.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "optimizer_disc": self.optimizer_disc and self.optimizer_disc.state_dict(),
                "scalers": [s and s.state_dict() for s in self.scalers],
                "args": vars(args), "versions": common.versions()}

    def save(self):
        """Write ckpt_<step>.pt, atomically, on rank 0; all ranks check first that they agree."""
        common.check_same(self.trainee)
        if self.proc.main:
            common.save_checkpoint(Path(self.args.out) / f"ckpt_{self.step:07d}.pt", self.state())
            common.prune_checkpoints(self.args.out, self.args.keep, self.step)

    def resume(self, path, state):
        """Continue from a checkpoint; ValueError if it was made with flags of another model."""
        theirs, ours = state["mapper_config"], self.mapper and asdict(self.mapper.config)
        theirs = theirs and asdict(weights.config_of(MapperConfig, theirs, path))
        if theirs != ours or (state["discriminator"] is None) != (self.critic is None) or \
                state["teacher"] != (self.args.teacher if self.mapper else None):
            raise ValueError(f"{path} was made with other model flags ({state['args']['vae']}, "
                             f"mapper {theirs}); give the same flags or another --out")
        self.step = state["step"]  # the VAE's weights came with build
        common.load_optimizer(self.optimizer, state["optimizer"])
        if self.mapper is not None:
            self.mapper.load_state_dict(state["mapper"])
        if self.critic is not None:
            self.critic.discriminator.load_state_dict(state["discriminator"])
            common.load_optimizer(self.optimizer_disc, state["optimizer_disc"])
        for scaler, saved in zip(self.scalers, state.get("scalers", [])):
            if scaler is not None and saved:  # none: the run so far was not fp16
                scaler.load_state_dict(saved)
        common.print0(f"continuing from {path} at step {self.step}")

    def loop(self, loader, accum, eval_set, eval_name):
        """Step until num_steps or a signal, logging, evaluating and saving on the way."""
        args, stop, timer = self.args, common.StopSignal(), logs.Timer(self.proc, self.step, self.num_steps)
        log = logs.Log(args.out, self.proc, self.step, self.num_steps, vars(args), args.tensorboard,
                       args.wandb)
        meter, batches = logs.Meter(), iter(loader)
        bad_streak = torch.zeros((), device=self.proc.device)
        show = ("loss", "rec", "align", "images_per_s")
        while self.step < self.num_steps:
            with timer.waiting():
                micro_batches = [next(batches) for _ in range(accum)]
            skipped = self.train_step(micro_batches, meter)
            bad_streak = (bad_streak + 1) * skipped
            self.step += 1
            done, row = self.step == self.num_steps, None
            if self.step % args.log_every == 0 or self.step in logs.EARLY_LOGS or done:
                row = {**meter.read(self.proc.device), **timer.read(args.batch_size, self.step)}
                logs.check_health(row, int(bad_streak), args.stop_after_bad, self.step)
            if self.proc.world == 1 or self.step % min(args.log_every, 10) == 0:
                done |= stop.agreed(self.proc)  # torchrun kills 30 s after its signal
            if args.eval_every and self.step % args.eval_every == 0 or self.step == self.num_steps:
                with timer.pausing():
                    row = {**(row or {}), **self.evaluate(eval_set, eval_name)}
            log.step(self.step, row, show)
            if self.step % args.save_every == 0 or self.step == 1 or done:
                with timer.pausing():
                    self.save()
            if done:
                break
        log.close()
        if self.step < self.num_steps:
            common.print0(f"stopped by a signal, saved at step {self.step}; the same command continues")

    def train_step(self, micro_batches, meter):
        """One optimisation step of VAE + mapper, then of the discriminator; return whether it was skipped."""
        args, device = self.args, self.proc.device
        gan_on = self.critic is not None and self.step >= args.disc_start + args.disc_warmup
        disc_on = self.critic is not None and self.step >= args.disc_start
        self.norms.begin()
        for i, (images, _labels, _indices, rows) in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            x = data.to_float(images.to(device, non_blocking=True))
            with common.reducing(self.trainee, last):
                loss, x_hat, terms = self._vae_loss(x, rows.tolist(), gan_on)
                self._backward(loss / len(micro_batches), self.scalers[0])
            if disc_on:
                with common.reducing(self.critic_ddp, last):
                    loss_disc, disc_terms = self._disc_loss(x, x_hat.detach())
                    self._backward(loss_disc / len(micro_batches), self.scalers[1])
                terms |= disc_terms
            meter.add(terms)
        lr = common.learning_rate(self.step, args.lr, args.warmup, args.cooldown, self.num_steps)
        norm, skipped = common.optimizer_step(self.optimizer, lr, args.grad_clip, self.scalers[0])
        meter.add({"grad_norm": norm, "lr": lr, "skipped_steps": skipped})
        if disc_on:
            lr = common.learning_rate(self.step, args.disc_lr, args.warmup, args.cooldown, self.num_steps)
            norm, bad = common.optimizer_step(self.optimizer_disc, lr, args.grad_clip, self.scalers[1])
            meter.add({"grad_norm_disc": norm})
            skipped = skipped | bad
        self.norms.end(skipped)
        return skipped

    @staticmethod
    def _backward(loss, scaler):
        (loss if scaler is None else scaler.scale(loss)).backward()

    def _vae_loss(self, x, rows, gan_on):
        """Return (total, reconstruction, named terms before weighting) for one micro-batch."""
        args, vae, device = self.args, self.vae, self.proc.device
        shape = (vae.config.z_channels, x.shape[2] // vae.stride, x.shape[3] // vae.stride)
        eps = common.noise_for((2, *shape), rows, device, args.seed, "vae", self.step)
        t = common.uniform_for(1, rows, device, args.seed, "t", self.step)[:, 0]
        with common.autocast(device, self.dtype):
            target = None if self.teacher is None else self.teacher(x)
            x_hat, mean, logvar, pred = self.trainee(x, eps[:, 0], t, eps[:, 1])
        terms = vae_loss(x, x_hat, Posterior(mean, logvar), rec=args.rec, lpips=self.lpips,
                         lpips_weight=args.lpips, kl_weight=args.kl)
        total = terms.pop("loss")
        if gan_on:
            # The VAE's gradient passes through, none stays in the discriminator.
            self.critic.requires_grad_(False)
            with common.autocast(device, self.dtype):
                logits = self.critic.judge(x_hat)
            self.critic.requires_grad_(True)
            terms["gan"] = generator_loss(logits)
            weight = args.gan
            if args.gan_adaptive:
                scale = 2.0**10 if self.dtype == torch.float16 else 1.0
                terms["gan_weight"] = adaptive_gan_weight(total, terms["gan"], vae.decoder.conv_out.weight,
                                                          scale=scale)
                weight = weight * terms["gan_weight"]
            total = total + weight * terms["gan"]
        if pred is not None:
            terms["align"] = alignment_loss(pred, target)
            total = total + args.align * terms["align"]
        return total, x_hat, {**terms, "loss": total}

    def _disc_loss(self, x, x_hat):
        """Return (hinge loss, terms) of the discriminator on the same reconstruction, detached."""
        with common.autocast(self.proc.device, self.dtype):
            real, fake = self.critic_ddp(x, x_hat)
        loss = discriminator_loss(real.float(), fake.float())
        accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return loss, {"disc": loss, "disc_real": real.float().mean(), "disc_fake": fake.float().mean(),
                      "disc_accuracy": accuracy}

    @torch.no_grad()
    def evaluate(self, dataset, name):
        """PSNR, held-out alignment, latent statistics of the first images of `dataset`; writes a picture."""
        if not self.proc.main:
            return {}
        self.vae.eval()
        images, _ = dataset.__getitems__(range(min(EVAL_IMAGES, len(dataset))))
        x = data.to_float(images.to(self.proc.device))
        with common.autocast(self.proc.device, self.dtype):
            posterior = self.vae.encode(x)
            z = posterior.mode()
            x_hat = self.vae.decode(z).float()
        mse = (data.to_uint8(x_hat).float() - images.to(x_hat.device)).pow(2).mean((1, 2, 3)).clamp_min(1e-10)
        row = {"eval_images": name, "psnr_db": (10 * torch.log10(255**2 / mse)).mean().item(),
               "kl_per_dim_nats": (posterior.kl().mean() / z[0].numel()).item(), **latent_summary(z)}
        if self.mapper is not None:
            self.mapper.eval()
            with common.autocast(self.proc.device, self.dtype):
                pred = self.mapper(z, torch.zeros(len(z), device=z.device), torch.zeros_like(z))
                row["align_clean"] = alignment_loss(pred, self.teacher(x)).item()
            self.mapper.train()
        self.vae.train()
        pairs = torch.stack([images[:16], data.to_uint8(x_hat[:16]).cpu()], 1).flatten(0, 1)
        data.save_grid(Path(self.args.out) / f"reconstructions_{self.step:07d}.png", pairs, columns=8)
        return row


def main(argv=None):
    """Entry point of the command."""
    args = parse_args(argv)
    args.image_size = args.image_size or (32 if args.data == "shapes" else 256)
    proc = common.setup(args.device)
    return train(args, proc)


if __name__ == "__main__":
    common.cli(main)
