"""Stage 1: fine-tune (or train) a KL autoencoder so that its noised latent predicts a teacher's patch tokens.

    torchrun --nproc_per_node=8 train_vae.py                     # the paper: f16d32, ImageNet, 80 epochs
    python train_vae.py --data DIR --batch-size 32 --steps 1000  # one device, your own pictures
    python train_vae.py --data shapes --vae tiny --init none --teacher shapes --lpips 0 --gan 0  # no download

The same command again continues from the newest checkpoint in --out; on a CPU the continued run is bit-equal
to an uninterrupted one. A step is the same on any number of processes.
Read: SendVAE (the method), loss_terms (eq. 3 of arXiv:2601.05823), train_step, main.
"""
from dataclasses import asdict, dataclass
from pathlib import Path

import common  # before torch

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import AdamW

import checkpoints
import data
from common import natural, positive
from losses import (LPIPS, PatchDiscriminator, adaptive_gan_weight, discriminator_loss, generator_loss,
                    vae_loss)
from mapper import Mapper, MapperConfig, Teacher, alignment_loss
from vae import VAE, VAE_SIZES

PUBLISHED_INIT = "hf://hustvl/vavae-imagenet256-f16d32-dinov2/vavae-imagenet256-f16d32-dinov2.pt"
# The mapper has as many tokens as the teacher: 16 x 16 at 256 px.
MAPPER_PATCH = {"f16d32": 1, "f8d4": 2, "tiny": 1, "small": 2}
EVAL_IMAGES = 64  # reconstructed for PSNR while training
NO_HUB = """Without a hub, what would come from there needs a local file, or goes: --init FILE or none; \
--teacher-weights FILE, or --teacher shapes --vae tiny --image-size 32; --lpips-weights FILE or --lpips 0"""


# -----------------------------------------------------------------------------------------------------------
# the method

class SendVAE(nn.Module):
    """The method's trained part: autoencoder and mapper in one forward, so that one DDP wrapper sees both."""

    def __init__(self, vae: VAE, mapper: Mapper | None):  # without a mapper: a plain KL-VAE
        super().__init__()
        self.vae, self.mapper = vae, mapper

    def forward(self, x, eps_z, t, eps):
        """x (B, 3, H, W); eps_z, eps (B, C, h, w) noise; t (B,) -> (x_hat, posterior, tokens or None)."""
        x_hat, z, posterior = self.vae(x, eps_z)                          # z = mean + std * eps_z
        tokens = None if self.mapper is None else self.mapper(z, t, eps)  # h(z_t): eq. 1 is in there
        return x_hat, posterior, tokens


@dataclass
class Networks:
    """What is trained, what judges it, and the optimizers; *_ddp are the same modules, wrapped for DDP."""
    device: torch.device
    dtype: torch.dtype        # of autocast
    send: SendVAE = None      # trained
    send_ddp: nn.Module = None
    disc: PatchDiscriminator = None  # trained against it; None: no GAN
    disc_ddp: nn.Module = None
    teacher: Teacher = None   # frozen; None: no alignment
    lpips: LPIPS = None       # frozen
    opt: AdamW = None
    opt_disc: AdamW = None
    scaler: GradScaler = None  # fp16 alone needs them
    scaler_disc: GradScaler = None


def loss_terms(nets, x, rows, step, args):
    """Eq. 3: L = L_rec + LPIPS + w_gan L_gan + w_kl KL + w_align L_align, for images x (B, 3, H, W).

    rows: where these images are in the global batch; all draws are functions of (seed, step, row).
    Returns (L, x_hat, the terms before weighting).
    """
    vae = nets.send.vae
    latent_shape = (vae.config.z_channels, x.shape[2] // vae.stride, x.shape[3] // vae.stride)
    # One call makes both noises: eps_z draws z from the posterior, eps turns z into z_t.
    noise = common.noise_for((2, *latent_shape), rows, nets.device, args.seed, "vae", step)
    t = common.uniform_for(1, rows, nets.device, args.seed, "t", step)[:, 0]
    eps_z, eps = noise[:, 0], noise[:, 1]

    # Networks run in bf16 where the hardware has it; the losses below are fp32.
    with common.autocast(nets.device, nets.dtype):
        target = None if nets.teacher is None else nets.teacher(x)     # f(x)
        x_hat, posterior, tokens = nets.send_ddp(x, eps_z, t, eps)
        # L_rec + LPIPS + w_kl KL; only LPIPS's convolutions are not fp32
        loss, terms = vae_loss(x, x_hat, posterior, args.rec, nets.lpips, args.lpips, args.kl)

    # w_gan L_gan: the discriminator joins after its own warm-up
    if nets.disc is not None and step >= args.disc_start + args.disc_warmup:
        terms["gan"], weight = gan_term(nets, x_hat), args.gan
        if args.gan_adaptive:
            # By the gradients of this micro-batch: here the step does depend on how a batch is cut.
            terms["gan_weight"] = gan_weight(nets, loss, terms["gan"])
            weight = weight * terms["gan_weight"]
        loss = loss + weight * terms["gan"]

    # w_align L_align: eq. 2
    if tokens is not None:
        terms["align"] = alignment_loss(tokens, target)
        loss = loss + args.align * terms["align"]

    terms["loss"] = loss
    return loss, x_hat, terms


def gan_term(nets, x_hat):
    """L_gan: minus the mean logit of the reconstructions."""
    # The gradient passes through the discriminator; none stays in its parameters.
    nets.disc.requires_grad_(False)
    with common.autocast(nets.device, nets.dtype):
        logits = nets.disc(x_hat)
    nets.disc.requires_grad_(True)
    return generator_loss(logits)


def gan_weight(nets, loss, gan):
    """VQGAN's adaptive weight: the ratio of both gradients at the decoder's last layer."""
    # Gradients of a mean over pixels are so small that fp16 would round them to 0.
    scale = 2.0**10 if nets.dtype == torch.float16 else 1.0
    return adaptive_gan_weight(loss, gan, nets.send.vae.decoder.conv_out.weight, scale=scale)


def disc_terms(nets, x, x_hat):
    """Hinge loss of the discriminator on the same reconstructions; returns (loss, terms)."""
    with common.autocast(nets.device, nets.dtype):
        # One forward for DDP. GroupBatchNorm2d keeps real and fake images apart.
        real, fake = nets.disc_ddp(torch.cat([x, x_hat.detach().to(x.dtype)])).float().chunk(2)
    loss = discriminator_loss(real, fake)
    # Near 1/2 the GAN is in balance; at 1 the discriminator has won, and its gradient says little.
    accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    return loss, {
        "disc": loss,
        "disc_real": real.mean(),
        "disc_fake": fake.mean(),
        "disc_accuracy": accuracy,
    }


def train_step(nets, batches, step, args, num_steps):
    """One optimisation step of VAE and mapper, then of the discriminator, on the micro-batches of a step.

    step counts from 0. Returns (terms to log, a dict for each micro-batch and one for the step; whether the
    step was skipped, a bool tensor on the device).
    """
    all_terms = []
    use_disc = nets.disc is not None and step >= args.disc_start
    for i, batch in enumerate(batches):
        # Gradients add up over micro-batches; DDP averages them over processes after the last one.
        last = i == len(batches) - 1
        x = data.to_float(batch["images"].to(nets.device, non_blocking=True))
        # 1. Autoencoder and mapper.
        with common.reducing(nets.send_ddp, last):
            loss, x_hat, terms = loss_terms(nets, x, batch["rows"].tolist(), step, args)
            common.backward(loss / len(batches), nets.scaler)
        # 2. Discriminator, on the same reconstructions.
        if use_disc:
            with common.reducing(nets.disc_ddp, last):
                loss, more = disc_terms(nets, x, x_hat)
                common.backward(loss / len(batches), nets.scaler_disc)
            terms |= more
        all_terms.append(terms)

    # 3. Both optimizers. A gradient that is not finite changes nothing; deciding that takes no host sync.
    lr = common.learning_rate(step, args.lr, args.warmup, args.cooldown, num_steps)
    norm, skipped = common.optimizer_step(nets.opt, lr, args.grad_clip, nets.scaler)
    common.update_batch_norms(nets.send, skipped)
    summary = {"grad_norm": norm, "lr": lr, "skipped_steps": skipped}
    if use_disc:
        lr = common.learning_rate(step, args.disc_lr, args.warmup, args.cooldown, num_steps)
        norm, bad = common.optimizer_step(nets.opt_disc, lr, args.grad_clip, nets.scaler_disc)
        # The discriminator has seen the reconstructions: its statistics of a bad VAE step do not count.
        skipped = skipped | bad
        common.update_batch_norms(nets.disc, skipped)
        summary["grad_norm_disc"] = norm
    return [*all_terms, summary], skipped


# -----------------------------------------------------------------------------------------------------------
# a run

def parse_args(argv=None):
    parser = common.new_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data", default=data.DEFAULT_DATA,
        help="folder of class folders or of images, .zip, .tar, or 'shapes' (embedded set)")
    add("--val", default=None,
        help="folder of held-out images; default: the folder 'val' beside 'train', if any")
    add("--image-size", type=positive, default=None,
        help="pixels; default 256, or 32 for 'shapes'")
    add("--workers", type=natural, default=8, help="processes that read images, per device")
    add = parser.add_argument_group("model").add_argument
    add("--vae", default="f16d32", choices=tuple(VAE_SIZES),
        help="architecture; must fit --init")
    add("--init", default=PUBLISHED_INIT,  # the paper fine-tunes VA-VAE
        help="start weights: file, folder (ours, diffusers'), hf://owner/repo/file, or 'none' (from scratch)")
    # The size of DINOv2 is not in the paper; B is REPA-E's.
    add("--teacher", default="vit_base_patch14_dinov2.lvd142m",
        help="timm model, or 'shapes'")
    add("--teacher-weights", default=None, help="local file instead of the hub")
    add("--mapper", default="vit", choices=("vit", "linear"),
        help="linear: one convolution (as VA-VAE)")
    add("--mapper-depth", type=natural, default=1,  # the paper, Table 2
        help="ViT blocks; 0 = patch embedding and MLP only")
    add("--projector-dim", type=positive, default=2048,  # as REPA's projector
        help="hidden width of the mapper's MLP")
    # The paper, Table 3. VA-VAE has neither of the two.
    add("--mapper-noise", choices=("auto", "on", "off"), default="auto",
        help="noise the latent before the mapper; auto: on, off for a linear one")
    add("--mapper-norm", choices=("auto", "on", "off"), default="auto",  # not in the paper; REPA-E has it
        help="BatchNorm of the latent before noise and mapper, as REPA-E; off: eq. 1 on the raw latent; "
             "auto: on, off for a linear one")
    add = parser.add_argument_group("loss (weights; 0 = off)").add_argument
    add("--align", type=float, default=1.0,  # the paper; REPA-E has 1.5
        help="alignment, mean(1 - cos); 0: a plain KL-VAE")
    # The paper says MSE; REPA-E, whose set-up it uses, has L1.
    add("--rec", default="l1", choices=("l1", "l2"), help="reconstruction, mean over elements")
    add("--lpips", type=float, default=1.0,  # this and the next two weights are REPA-E's; the paper has none
        help="LPIPS (VGG16)")
    add("--lpips-weights", default=None, help="local torchvision VGG16 file instead of the hub")
    add("--kl", type=float, default=1e-6,
        help="KL, nats summed over the latent, mean over images")
    add("--gan", type=float, default=0.1, help="hinge PatchGAN, weight in the VAE loss")
    add("--gan-adaptive", action="store_true",
        help="scale --gan by the gradient ratio at the last layer (as VQGAN), per micro-batch")
    add("--disc-init", default="none",
        help="discriminator to start from: file or hf://owner/repo/file, or 'none' (from scratch)")
    add("--disc-start", type=natural, default=0,  # REPA-E; VQGAN and VA-VAE start later
        help="step at which the discriminator begins to train")
    add("--disc-warmup", type=natural, default=0, help="further steps before it enters the VAE loss")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=positive, default=1024,  # the paper
        help="images per step over all devices")
    add("--epochs", type=float, default=80,  # the paper
        help="passes over the data (ignored with --steps)")
    add("--lr", type=float, default=3e-4,  # the paper, constant
        help="AdamW learning rate, as typed")
    add("--disc-lr", type=float, default=1e-4,  # REPA-E; not in the paper
        help="AdamW learning rate of the discriminator")
    add("--bn-group", type=positive, default=32,
        help="images that share BatchNorm's statistics, in mapper and discriminator; divides a micro-batch")
    common.add_training_flags(parser, log_every=50, save_every=5000)
    add = parser.add_argument_group("looking").add_argument
    add("--eval-every", type=natural, default=1000,
        help="steps between evaluations with a picture; 0 = at the end only")
    common.add_run_flags(parser, out="out/vae")
    args = parser.parse_args(argv)
    args.image_size = args.image_size or data.default_size(args.data)
    args.bn_group = min(args.bn_group, args.batch_size)  # a smaller batch is one group
    for flag in ("mapper_noise", "mapper_norm"):
        if getattr(args, flag) == "auto":
            setattr(args, flag, "on" if args.mapper == "vit" else "off")
    return args


def build(args, proc, saved=None) -> Networks:
    """Make all networks and optimizers on proc's device.

    saved: checkpoint of the run that is continued. It holds all that --init and --disc-init began with, so
    those files are not needed any more. Raises ValueError where flags and files do not fit together.
    """
    nets = Networks(proc.device, common.resolve_dtype(args.dtype, proc.device))
    try:
        vae = build_vae(args, saved)
        nets.teacher, mapper = build_alignment(args, vae)
        nets.lpips = LPIPS(args.lpips_weights) if args.lpips > 0 else None
        nets.disc = build_disc(args, saved)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. {NO_HUB}") from error
    nets.send = SendVAE(vae, mapper).train()

    for module in (nets.send, nets.disc, nets.lpips, nets.teacher):
        if module is None:
            continue
        # However a batch is cut, BatchNorm in what is trained sees groups of this many images.
        if module in (nets.send, nets.disc):
            common.GroupBatchNorm2d.convert(module, args.bn_group)
        module.to(proc.device)
    for module in (vae, nets.lpips, nets.disc):
        # cuDNN's bf16 convolutions want NHWC. Teacher and mapper are transformers.
        if proc.device.type == "cuda" and module is not None:
            module.to(memory_format=torch.channels_last)
    common.compile_blocks(
        args.compile, proc.device,
        nets.send, nets.teacher, nets.lpips)

    nets.send_ddp = common.distribute(nets.send, proc)
    nets.opt = common.adamw(nets.send, args.lr, args.beta2)
    if nets.disc is not None:
        nets.disc_ddp = common.distribute(nets.disc, proc)
        nets.opt_disc = common.adamw(nets.disc, args.disc_lr, args.beta2)
    if nets.dtype == torch.float16:
        # One an optimizer: a step of one may overflow where the other's does not.
        nets.scaler = GradScaler(proc.device.type)
        nets.scaler_disc = GradScaler(proc.device.type)
    return nets


def build_vae(args, saved) -> VAE:
    """Return the autoencoder: of the run that is continued, of --init, or with random weights.

    Raises ValueError if it is not --vae, or if its stride does not tile --image-size.
    """
    if saved is not None:
        source, vae = saved["path"], checkpoints.load_vae(saved["path"])
    elif args.init != "none":
        source, vae = f"--init {args.init}", checkpoints.load_vae(args.init)
    else:
        source, vae = "--init none", VAE(VAE_SIZES[args.vae])
    # A published file says by its shapes which size it is; the mapper's patch goes by the name.
    if vae.config.network != VAE_SIZES[args.vae].network:
        fitting = [name for name, size in VAE_SIZES.items() if size.network == vae.config.network]
        advice = f"give --vae {fitting[0]}" if fitting else "--vae has no name for it"
        raise ValueError(f"{source} holds a VAE of {vae.config.z_channels} channels at 1/{vae.stride}, "
                         f"--vae {args.vae} is another one; {advice}")
    # A row of pixels that fills no token would be dropped without a word.
    multiple = vae.stride * (MAPPER_PATCH[args.vae] if args.align > 0 else 1)
    if args.image_size % multiple:
        raise ValueError(f"--image-size {args.image_size} is not a multiple of {multiple}, the VAE's stride "
                         f"x the mapper's patch")
    vae.checkpointing = args.checkpointing
    return vae


def build_alignment(args, vae):
    """Return (teacher, mapper), which meet on a grid of tokens; (None, None) for --align 0."""
    if args.align == 0:
        return None, None
    patch = MAPPER_PATCH[args.vae]
    grid = args.image_size // vae.stride // patch
    teacher = Teacher(args.teacher, grid, args.teacher_weights)
    mapper = Mapper(MapperConfig(
        z_channels=vae.config.z_channels,
        grid=grid,
        out_dim=teacher.dim,
        patch_size=patch,
        kind=args.mapper,
        depth=args.mapper_depth,
        projector_dim=args.projector_dim,
        noise=args.mapper_noise == "on",
        norm=args.mapper_norm == "on"))
    return teacher, mapper


def build_disc(args, saved):
    """Return the discriminator, None for --gan 0; `unpack` fills that of a run that is continued."""
    if args.gan > 0:
        from_file = args.disc_init != "none" and saved is None
        disc = checkpoints.load_discriminator(args.disc_init) if from_file else PatchDiscriminator()
        return disc.train()
    if args.disc_init != "none":
        raise ValueError("--disc-init: --gan 0 trains without a discriminator; leave one of them out")


def norm_group(args) -> int:
    """Return how many images share the statistics of a BatchNorm; 1 if nothing that is trained has one."""
    mapper_norm = args.align > 0 and args.mapper_norm == "on"
    return args.bn_group if args.gan > 0 or mapper_norm else 1


def fixed_flags(args) -> list:
    """Return the flags that a run keeps for life."""
    mapper = ["teacher", "mapper", "mapper_depth", "projector_dim", "mapper_noise", "mapper_norm"]
    return ["seed", "image_size"] + mapper * (args.align > 0) + ["bn_group"] * (norm_group(args) > 1)


def state_of(module):
    """Return the state dict of a module, optimizer or scaler; None of None."""
    return None if module is None else module.state_dict()


def pack(nets, step, args) -> dict:
    """Return what a run needs to continue, as a plain dict with unwrapped names (main adds two entries)."""
    vae, mapper = nets.send.vae, nets.send.mapper
    return {
        "format": checkpoints.VAE,
        "step": step,
        # The VAE itself: encode.py needs nothing else.
        "model": vae.state_dict(),
        "ema": None,  # readers take an average where there is one; this trainer keeps none
        "model_config": asdict(vae.config),
        # What the run needs beside it.
        "mapper": state_of(mapper),
        "mapper_config": None if mapper is None else asdict(mapper.config),
        "teacher": None if mapper is None else args.teacher,
        "discriminator": state_of(nets.disc),
        "optimizer": nets.opt.state_dict(),
        "optimizer_disc": state_of(nets.opt_disc),
        "scalers": [state_of(nets.scaler), state_of(nets.scaler_disc)],
        "args": vars(args),
        "versions": common.versions(),
    }


def unpack(nets, saved, args) -> None:
    """Continue from a checkpoint, whose VAE `build` took; ValueError if its flags made other networks."""
    mapper = nets.send.mapper
    # Without one of these networks, or with one more, the run would be another.
    for name, there, here in (("mapper", saved["mapper"], mapper),
                              ("GAN", saved["discriminator"], nets.disc)):
        if (there is None) != (here is None):
            raise ValueError(f"{saved['path']} was trained with {name} {there is not None}, not "
                             f"{here is not None}; give the same flags, or another --out")
    # AdamW's moments, too: without them the first steps after a stop would be other ones.
    common.load_optimizer(nets.opt, saved["optimizer"])
    if mapper is not None:
        mapper.load_state_dict(saved["mapper"])
    if nets.disc is not None:
        nets.disc.load_state_dict(saved["discriminator"])
        common.load_optimizer(nets.opt_disc, saved["optimizer_disc"])
    for scaler, state in zip((nets.scaler, nets.scaler_disc), saved.get("scalers") or []):
        if scaler is not None and state:  # none: the run so far was not fp16
            scaler.load_state_dict(state)


@torch.no_grad()
def evaluate(nets, dataset, name, step, args) -> dict:
    """PSNR, KL, alignment and spread of the latents of some images of `dataset`; writes a picture.

    Leaves the networks in eval mode.
    """
    nets.send.eval()
    vae, mapper = nets.send.vae, nets.send.mapper
    # Evenly over all classes, which come one after the other.
    indices = torch.linspace(0, len(dataset) - 1, min(EVAL_IMAGES, len(dataset))).long()
    # By the posterior mean, not a draw: two evaluations differ by the weights alone.
    images = dataset.batch(indices.tolist())["images"].to(nets.device)
    x = data.to_float(images)
    with common.autocast(nets.device, nets.dtype):
        posterior = vae.encode(x)
        z = posterior.mode()
    images_hat = data.to_uint8(vae.decode(z))  # in fp32: a decoder may overflow in fp16
    row = {
        "eval_images": name,
        "psnr_db": data.psnr(images, images_hat).mean().item(),
        "kl_per_dim_nats": (posterior.kl().mean() / z[0].numel()).item(),
        **latent_summary(z),
    }
    if mapper is not None:
        with common.autocast(nets.device, nets.dtype):
            # Without noise: the loss while training never reaches 0, since noise hides the image.
            row["align_clean"] = alignment_loss(mapper.clean(z), nets.teacher(x)).item()
    # Original, reconstruction, ... of up to 16, evenly over the classes again.
    pairs = torch.stack([images, images_hat], 1)[::(len(images) + 15) // 16].flatten(0, 1)
    data.save_grid(Path(args.out) / f"reconstructions_{step:07d}.png", pairs, columns=8)
    return row


def latent_summary(z) -> dict:
    """Show a collapse of latents z (B, C, h, w): spread of the channels, effective rank (exp of the
    spectrum's entropy)."""
    channels = z.float().cpu().transpose(0, 1).flatten(1)  # (C, B*h*w); eigvalsh is not on every device
    spectrum = torch.linalg.eigvalsh(torch.cov(channels)).clamp_min(1e-12)
    # A latent of which k directions of equal spread are used has rank k, whatever the number of channels.
    share = spectrum / spectrum.sum()
    std = channels.std(1)
    return {
        "latent_std_min": std.min().item(),
        "latent_std_max": std.max().item(),
        "effective_rank": torch.exp(-(share * share.log()).sum()).item(),
    }


def main(argv=None):
    args = parse_args(argv)
    proc = common.setup(args.device)

    # Data.
    train_set = data.open_dataset(args.data, args.image_size)
    val_set = data.open_dataset(args.data, args.image_size, "val", args.val, labelled=False)
    # Without held-out images the evaluation sees training images, and its rows say so.
    eval_set, eval_name = (train_set, "training") if val_set is None else (val_set, "validation")
    # A global batch is processes x micro-batches x images of a micro-batch. 32 of 256 px fit 80 GB.
    fits = 32 * 256**2 // args.image_size**2 if proc.device.type == "cuda" else 0
    micro, accum = common.plan_batch(args.batch_size, args.micro_batch_size, proc.world, fits,
                                     norm_group(args))

    # Continue a run?
    if not args.dry_run:
        common.claim(args.out, proc)  # one run a folder
    saved = checkpoints.newest(args.out, checkpoints.VAE)  # None: a new run
    step = 0 if saved is None else saved["step"]
    images = f"{train_set.images_hash[:16]} of {len(train_set)} images"
    common.agree(images_hash=images, checkpoint=step)
    if saved is not None:
        common.check_resume(saved, args, fixed_flags(args), saved, {"images_hash": images})
    num_steps = common.plan_steps(args.steps, args.epochs, len(train_set), args.batch_size, saved)

    # Networks: `send` is trained, `disc` is trained against it, teacher and LPIPS only judge.
    torch.manual_seed(args.seed)  # initial weights only; the steps draw from (seed, step, row)
    nets = build(args, proc, saved)
    networks = {"vae": nets.send.vae, "mapper": nets.send.mapper, "discriminator": nets.disc,
                "teacher": nets.teacher, "lpips": nets.lpips}
    common.print_plan(args, proc, networks, len(train_set), micro, accum, num_steps)
    common.print0(f"data: {len(train_set):,} images, {train_set.num_classes} classes, {args.image_size} px")
    if saved:
        unpack(nets, saved, args)
    if args.dry_run:
        return
    progress = common.Progress(args, proc, step, num_steps, ("loss", "rec", "align"), saved)
    del saved  # its tensors have been copied

    # Training.
    loader = data.make_loader(train_set, args.batch_size, proc, micro, args.seed, progress.images_seen,
                              num_steps - step, args.workers)
    with common.Behind() as behind:
        for step, batches in progress.steps(loader, accum, behind):
            terms, skipped = train_step(nets, batches, step - 1, args, num_steps)
            # Reads numbers from the device every --log-every steps only.
            progress.record(terms, skipped)
            # Saving comes last: a run that is stopped before it comes back, and evaluates again.
            if progress.due(args.eval_every) and proc.main:
                progress.look(evaluate, nets, eval_set, eval_name, step, args)
                nets.send.train()  # also where the evaluation failed
            if progress.should_save():
                common.check_same(nets.send)
                state = pack(nets, step, args) | {"images_hash": images, "images_seen": progress.images_seen}
                if proc.main:
                    # The step waits for a copy, not for the disk; there is room for one copy.
                    behind.wait()
                    behind(checkpoints.save, args.out, step, checkpoints.snapshot(state), args.keep)
    return args.out


if __name__ == "__main__":
    common.cli(main)
