"""Train the embedded set's teacher and judge; run once, the results ship as small files in assets/.

    python train_teacher.py                   # both, on one CPU thread; the files record seconds and metrics
    python train_teacher.py --judge-steps 0   # the teacher alone

Teacher (for --teacher shapes): time-contrastive and label-free, not DINO. InfoNCE (arXiv:1807.03748)
between two frames of the same scene, where position, size, rotation, light and texture phase differ. No
label enters the loss, but only a renderer (or a video) gives such pairs, and what they share is what the
teacher calls the same. Half of the negatives are alike in colour, so that shape and fill have to tell
them apart; the other half are alike to the network itself, so that what it neglects comes in. A second,
smaller loss asks each token for the thumbnail of its own cell and keeps colour and place.
Judge (for fid.py): supervised on class and attributes, with blur and noise so that it stays sane on
reconstructions. Both are measured on the "val" split, which neither is trained on.
"""
import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (adamw, add_run_flags, autocast, cli, learning_rate, optimizer_step, resolve_dtype,
                    save_checkpoint, setup)
from data import Shapes
from features import ShapesJudge, load_shapes_judge
from mapper import ShapesTeacher, load_shapes_teacher


def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train the teacher and the judge of the embedded set.",
                                     allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=5000, help="teacher optimizer steps; 0 = leave the file alone")
    add("--judge-steps", type=int, default=1500, help="judge optimizer steps; 0 = leave the file alone")
    add("--scenes", type=int, default=24000, help="scenes to train on")
    add("--frames", type=int, default=4, help="frames rendered of each scene for the teacher, >= 2")
    add("--pairs", type=int, default=96, help="teacher batch: pairs of frames")
    add("--groups", type=int, default=4, help="clusters that one teacher batch draws from")
    add("--clusters", type=int, default=300, help="k-means clusters of the scenes")
    add("--mine-every", type=int, default=300, help="steps between clusterings by its own embedding")
    add("--tau", type=float, default=0.1, help="InfoNCE temperature")
    add("--thumbnail", type=float, default=2.0, help="weight of the thumbnail loss; 0 = off")
    add("--lr", type=float, default=2e-3, help="peak learning rate of both, linear to 0")
    add("--threads", type=int, default=1, help="CPU threads")
    add_run_flags(parser, out="assets")
    parser.set_defaults(seed=1000)  # other scenes than those that the VAE sees by default
    return parser.parse_args(argv)


def as_input(images: np.ndarray, rng=None, blur: float = 0.0, noise: float = 0.0) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [-1, 1].

    With a numpy generator rng, each image is mixed with its 3 x 3 mean by a random share up to `blur`, and
    gets white noise of a random standard deviation up to `noise`.
    """
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    x = x.float() / 127.5 - 1
    if rng is None:
        return x
    amount = torch.from_numpy(rng.random((2, len(x), 1, 1, 1), np.float32))
    if blur:
        soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        x = torch.lerp(x, soft, blur * amount[0])
    return x + noise * amount[1] * torch.from_numpy(rng.standard_normal(x.shape, np.float32))


# teacher

def colour_histograms(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) -> (N, 64): square roots of the shares of 4 x 4 x 4 colours, so that norms are 1."""
    bins = (images // 64).astype(np.int64) @ np.array([16, 4, 1])  # (N, H, W) in 0..63
    shares = np.stack([(bins == b).mean(axis=(1, 2)) for b in range(64)], axis=1)
    return torch.from_numpy(shares).float().sqrt()


def cluster(points: Tensor, clusters: int, seed: int, at_least: int) -> list[np.ndarray]:
    """Group points (N, D) by k-means; return the index arrays of the groups with `at_least` members."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=generator)[:clusters]]
    for _ in range(15):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        total = torch.zeros_like(centres).index_add_(0, nearest, points)
        count = torch.bincount(nearest, minlength=len(centres))[:, None]
        centres = torch.where(count > 0, total / count.clamp(min=1), centres)
    groups = (np.flatnonzero(nearest.numpy() == k) for k in range(len(centres)))
    return [group for group in groups if len(group) >= at_least]


def pool(tokens: Tensor) -> Tensor:
    """(B, N, D) -> (B, 2 D): the mean says what tokens agree on, the maximum what a single one has seen."""
    return torch.cat([tokens.mean(dim=1), tokens.amax(dim=1)], dim=1)


@torch.no_grad()
def in_chunks(function, images: np.ndarray, device) -> Tensor:
    """Apply function to clean images, 500 at a time; returns the results on the CPU, fp32."""
    return torch.cat([function(as_input(images[i:i + 500]).to(device)).float().cpu()
                      for i in range(0, len(images), 500)])


def train_teacher(args, frames: list[np.ndarray], device, dtype) -> ShapesTeacher:
    """Return the trained teacher. frames: uint8 (N, H, W, 3) each, the same scenes in the same order."""
    torch.manual_seed(args.seed)
    teacher = ShapesTeacher()
    head = nn.Sequential(nn.Linear(2 * teacher.dim, 256), nn.ReLU(), nn.Linear(256, 128))  # not kept
    thumbnail = nn.Linear(teacher.dim, 48)  # not kept
    net = nn.ModuleList((teacher, head, thumbnail)).to(device, memory_format=torch.channels_last).train()
    optimizer = adamw(net.parameters(), args.lr, weight_decay=0.05)
    each = args.pairs // args.groups
    rng, start = np.random.default_rng(args.seed), time.time()

    def embed(x):
        with autocast(device, dtype):
            return F.normalize(head(pool(teacher(x))).float(), dim=1)
    sources = [cluster(colour_histograms(frames[0]), args.clusters, args.seed, each)]
    for step in range(args.steps):
        if step and step % args.mine_every == 0:
            net.eval()
            own = in_chunks(embed, frames[0], device)
            sources[1:] = [cluster(own, args.clusters, args.seed + step, each)]
            net.train()
        groups = [sources[i % len(sources)] for i in range(args.groups)]
        index = np.concatenate([rng.choice(g[rng.integers(len(g))], each, replace=False) for g in groups])
        first, second = rng.choice(len(frames), 2, replace=False)
        x = as_input(np.concatenate([frames[first][index], frames[second][index]]), rng, noise=0.1).to(device)
        with autocast(device, dtype):
            tokens = teacher(x)
            embedding, guess = head(pool(tokens)), thumbnail(tokens)
        a, b = F.normalize(embedding.float(), dim=1).chunk(2)
        logits, same = a @ b.T / args.tau, torch.arange(len(a), device=device)
        contrast = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        cells = F.pixel_unshuffle(F.avg_pool2d(x, 2), 4).flatten(2).transpose(1, 2)  # (B, 16, 48): 3 x 4 x 4
        colour = F.mse_loss(guess.float(), cells)
        (contrast + args.thumbnail * colour).backward()
        optimizer_step(optimizer, learning_rate(step, args.lr, 100, args.steps, args.steps), max_norm=1.0)
        if step % 100 == 0:
            right = (logits.argmax(dim=1) == same).float().mean().item()
            print(f"teacher step {step:5d}  contrast {contrast.item():.3f}  right {right:.3f}  "
                  f"thumbnail {colour.item():.3f}  {time.time() - start:.0f} s", flush=True)
    teacher.eval()
    teacher.mean.copy_(in_chunks(teacher, frames[0][:10000], device).mean(dim=0))
    return teacher.cpu()


def factor_accuracy(logits: Tensor, data: Shapes, first: int = 0) -> dict[str, float]:
    """Per factor: argmax over its one-vs-rest columns, or sign for single columns; from row `first` on."""
    result, truth = {}, torch.from_numpy(data.attributes[first:])
    for factor in dict.fromkeys(name.split("=")[0] for name in data.attribute_names):
        columns = [i for i, name in enumerate(data.attribute_names) if name.split("=")[0] == factor]
        if factor in ("tone", "position", "size"):
            right = (logits[:, columns] > 0) == truth[:, columns].bool()
        else:
            right = logits[:, columns].argmax(dim=1) == truth[:, columns].argmax(dim=1)
        result[factor] = round(right.float().mean().item(), 4)
    return result


def probe(features: Tensor, data: Shapes, num_train: int = 8000) -> dict[str, float]:
    """Linear probe of features (N, D): macro F1 over attributes, accuracy per factor; on the later rows."""
    mean, std = features[:num_train].mean(dim=0), features[:num_train].std(dim=0) + 1e-6
    x, y = (features - mean) / std, torch.from_numpy(data.attributes).float()
    linear = nn.Linear(x.shape[1], y.shape[1])
    nn.init.zeros_(linear.weight)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(linear(x[:num_train]), y[:num_train])
        loss = loss + 1e-5 * linear.weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    with torch.no_grad():
        logits = linear(x[num_train:])
    guess, truth = logits > 0, y[num_train:].bool()
    f1 = 2 * (guess & truth).sum(dim=0) / (guess.sum(dim=0) + truth.sum(dim=0)).clamp(min=1)
    return {"f1_macro": round(f1.mean().item(), 4), **factor_accuracy(logits, data, num_train)}


# judge

def train_judge(args, data: Shapes, device, dtype) -> ShapesJudge:
    """Return the judge, trained on class (cross entropy) and attributes (binary cross entropy) of `data`."""
    torch.manual_seed(args.seed)
    judge = ShapesJudge(data.num_classes, len(data.attribute_names))
    judge.to(device, memory_format=torch.channels_last).train()
    optimizer = adamw(judge.parameters(), args.lr, weight_decay=0.05)
    rng, start = np.random.default_rng(args.seed), time.time()
    for step in range(args.judge_steps):
        index = rng.integers(len(data), size=128)
        x = as_input(data.images[index], rng, blur=0.8, noise=0.15).to(device)
        label = torch.from_numpy(data.labels[index]).to(device)
        attributes = torch.from_numpy(data.attributes[index]).float().to(device)
        with autocast(device, dtype):
            features, logits = judge(x)
            attribute_logits = judge.attribute_logits(features)
        loss = (F.cross_entropy(logits.float(), label)
                + 10 * F.binary_cross_entropy_with_logits(attribute_logits.float(), attributes))
        loss.backward()
        lr = learning_rate(step, args.lr, 100, args.judge_steps, args.judge_steps)
        optimizer_step(optimizer, lr, max_norm=1.0)
        if step % 100 == 0:
            print(f"judge step {step:5d}  loss {loss.item():.3f}  {time.time() - start:.0f} s", flush=True)
    return judge.cpu().eval()


@torch.no_grad()
def judge_accuracy(judge: ShapesJudge, data: Shapes, blur: float = 0.0, noise: float = 0.0) -> dict:
    """Accuracy of class and factors on `data`, blurred and noisy up to the given amounts."""
    rng = np.random.default_rng(0)
    parts = [judge(as_input(data.images[i:i + 500], rng, blur, noise)) for i in range(0, len(data), 500)]
    features, logits = (torch.cat(column) for column in zip(*parts))
    right = (logits.argmax(dim=1) == torch.from_numpy(data.labels)).float().mean().item()
    return {"class": round(right, 4), **factor_accuracy(judge.attribute_logits(features), data)}


def save_half(path: str, kind: str, model: nn.Module, config: dict, args, **rest) -> None:
    """Write weights as fp16 and plain values; loads with weights_only=True."""
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    args = {k: v for k, v in vars(args).items() if k != "out"}
    save_checkpoint(path, {"format": f"nanosendvae-{kind}", "config": config, "model": weights, "args": args,
                           **rest})


def main(argv=None):
    """Entry point of the command."""
    args = parse_args(argv)
    if args.pairs % args.groups or args.frames < 2:
        raise ValueError(f"--pairs {args.pairs} must be a multiple of --groups {args.groups}, and --frames "
                         f"{args.frames} at least 2")
    torch.set_num_threads(args.threads)
    device = setup(args.device).device
    dtype = resolve_dtype(args.dtype, device)
    data, test = Shapes(args.scenes, args.seed), Shapes(11000, args.seed, "val")
    if args.judge_steps:
        path, start = f"{args.out}/shapes_judge.pt", time.time()
        judge = train_judge(args, data, device, dtype)
        seconds = round(time.time() - start)
        config = {"num_classes": data.num_classes, "num_attributes": len(data.attribute_names)}
        save_half(path, "shapes-judge", judge, config, args)
        judge = load_shapes_judge(path)  # what is measured is what ships: the fp16 weights
        metrics = {"clean": judge_accuracy(judge, test), "soft": judge_accuracy(judge, test, 0.8, 0.15)}
        save_half(path, "shapes-judge", judge, config, args, metrics=metrics, seconds=seconds)
        print(f"judge: {seconds} s, accuracy {metrics}", flush=True)
    if args.steps:
        path, start = f"{args.out}/shapes_teacher.pt", time.time()
        others = [Shapes(args.scenes, args.seed, frame=k).images for k in range(1, args.frames)]
        teacher = train_teacher(args, [data.images, *others], device, dtype)
        seconds, config = round(time.time() - start), {"dim": teacher.dim}
        save_half(path, "shapes-teacher", teacher, config, args)
        teacher = load_shapes_teacher(path)
        metrics = probe(in_chunks(lambda x: pool(teacher(x)), test.images, "cpu"), test)
        save_half(path, "shapes-teacher", teacher, config, args, metrics=metrics, seconds=seconds)
        print(f"teacher: {seconds} s, probe of mean and max pooled tokens {metrics}", flush=True)


if __name__ == "__main__":
    cli(main)
