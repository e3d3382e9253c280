"""Train the teacher and the judge of the embedded set. Run once: made shapes/teacher.pt and shapes/judge.pt.

    python -m shapes.train                                # both, on one CPU thread: 20 and 4 minutes
    python -m shapes.train --judge-steps 0 --out out/toy  # the teacher alone, into another folder

Teacher (for --teacher shapes): InfoNCE (arXiv:1807.03748) between two frames of the same scene, which differ
in position, size, rotation, light and texture phase. No label enters the loss. But only a renderer (or a
video) gives such pairs, and the teacher learns to ignore what differs between them. Half of each batch shares
colours, so the network must use shape and fill. The other half are its own nearest neighbours (hard
negatives). A second loss asks each token for the thumbnail of its own cell: it keeps colour and place.
Judge (for fid.py): trained on class and attributes, with blur and noise, because it will see reconstructions.
tests/test_shapes.py measures both on the "val" split, on which neither is trained.
Read: train_teacher, train_judge. Letters: N scenes or tokens, B images of a batch, H W pixels, D features.
"""
import common  # before torch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoints
from shapes.networks import ShapesJudge, ShapesTeacher
from shapes.scenes import Shapes

SCENES = 24000    # to train on
LR = 2e-3         # peak of both; linear to 0
PAIRS = 96        # pairs of frames in a batch of the teacher
GROUPS = 4        # clusters that a batch is drawn from; even, divides PAIRS
CLUSTERS = 300    # of k-means
MINE_EVERY = 300  # steps between two clusterings by the network's own embedding


def parse_args(argv=None):
    parser = common.new_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=common.natural, default=5000, help="steps of the teacher; 0 = do not train it")
    add("--judge-steps", type=common.natural, default=1500, help="steps of the judge; 0 = do not train it")
    common.add_run_flags(parser, out="shapes")
    parser.set_defaults(seed=1000)  # other scenes than those that the VAE sees by default
    return parser.parse_args(argv)


def as_input(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [-1, 1], channels last in memory."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def soften(x: Tensor, rng, blur, noise) -> Tensor:
    """Mix each image (B, 3, H, W) with its 3 x 3 mean by a random share up to `blur`, and add white noise of
    a random standard deviation up to `noise`. rng: numpy's generator."""
    amount = torch.from_numpy(rng.random((2, len(x), 1, 1, 1), np.float32))
    x = x.lerp(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1), blur * amount[0])
    return x + noise * amount[1] * torch.from_numpy(rng.standard_normal(x.shape, np.float32))


@torch.no_grad()
def in_chunks(function, images: np.ndarray, device) -> Tensor:
    """Apply function to 500 images at a time; return the results, CPU, fp32."""
    parts = np.split(images, range(500, len(images), 500))
    return torch.cat([function(as_input(part).to(device)).float().cpu() for part in parts])


def training_steps(net, steps, device):
    """Yield (step, losses): the caller fills the dict, whose sum then takes `net` one step down."""
    net.to(device, memory_format=torch.channels_last).train()
    optimizer = common.adamw(net, LR, weight_decay=0.05)
    for step in range(steps):
        losses = {}
        yield step, losses
        sum(losses.values()).backward()
        common.optimizer_step(optimizer, common.learning_rate(step, LR, 100, steps, steps), max_norm=1.0)
        if step % 100 == 0:
            print(f"step {step}:", *(f"{name} {loss:.3f}" for name, loss in losses.items()), flush=True)


# teacher

def colour_histograms(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) -> (N, 64): square roots of the shares of 4 x 4 x 4 colours, so that norms are 1."""
    bins = (images // 64).astype(np.int64) @ np.array([16, 4, 1])  # (N, H, W) in 0..63
    shares = np.stack([(bins == b).mean(axis=(1, 2)) for b in range(64)], axis=1)
    return torch.from_numpy(shares).float().sqrt()


def cluster(points: Tensor, seed: int) -> list[np.ndarray]:
    """Group points (N, D) by k-means; return the indices of each group that can fill its part of a batch."""
    centres = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:CLUSTERS]]
    for _ in range(15):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        total = torch.zeros_like(centres).index_add_(0, nearest, points)
        count = torch.bincount(nearest, minlength=len(centres))[:, None]
        centres = torch.where(count > 0, total / count.clamp(min=1), centres)
    groups = [np.flatnonzero(nearest.numpy() == k) for k in range(len(centres))]
    return [group for group in groups if len(group) >= PAIRS // GROUPS]


def train_teacher(steps, seed, device, dtype) -> ShapesTeacher:
    """Return the teacher, trained on four frames of each scene."""
    torch.manual_seed(seed)
    teacher, rng = ShapesTeacher(), np.random.default_rng(seed)
    head = nn.Sequential(nn.Linear(2 * teacher.dim, 256), nn.ReLU(), nn.Linear(256, 128))  # not kept
    thumbnail = nn.Linear(teacher.dim, 48)  # not kept
    net = nn.ModuleList((teacher, head, thumbnail))

    def embed(x):
        with common.autocast(device, dtype):
            tokens = teacher(x)
            # the mean is what tokens agree on, the maximum what a single one has seen
            pooled = torch.cat([tokens.mean(dim=1), tokens.amax(dim=1)], dim=1)  # (B, 2 D)
            return F.normalize(head(pooled).float(), dim=1), thumbnail(tokens).float()

    frames = [Shapes(SCENES, seed, frame=k).images for k in range(4)]
    sources = 2 * [cluster(colour_histograms(frames[0]), seed)]  # groups of scenes that share their colours
    for step, losses in training_steps(net, steps, device):
        if step and step % MINE_EVERY == 0:  # half of the groups: neighbours in the network's own eyes
            net.eval()
            sources[1] = cluster(in_chunks(lambda x: embed(x)[0], frames[0], device), seed + step)
            net.train()

        # two frames of each scene of a few groups
        index = np.concatenate([rng.choice(source[rng.integers(len(source))], PAIRS // GROUPS, replace=False)
                                for source in sources * (GROUPS // 2)])
        images = np.concatenate([frames[k][index] for k in rng.choice(len(frames), 2, replace=False)])
        x = soften(as_input(images), rng, blur=0.0, noise=0.1).to(device)  # (2 PAIRS, 3, H, W)
        embedding, guess = embed(x)

        # InfoNCE both ways: each frame must find the other frame of its scene among those of the batch
        a, b = embedding.chunk(2)
        logits, same = a @ b.T / 0.1, torch.arange(PAIRS, device=device)  # 0.1: its temperature
        losses["contrast"] = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        # each token must know its cell at half resolution
        cells = F.pixel_unshuffle(F.avg_pool2d(x, 2), 4).flatten(2).transpose(1, 2)  # (B, 16, 48): 3 x 4 x 4
        losses["thumbnail"] = 2.0 * F.mse_loss(guess, cells)
    teacher.eval()
    teacher.mean.copy_(in_chunks(teacher, frames[0][:10000], device).mean(dim=0))
    return teacher


# judge

def train_judge(steps, seed, device, dtype) -> ShapesJudge:
    """Return the judge, trained on class (cross entropy) and attributes (binary cross entropy)."""
    torch.manual_seed(seed)
    data, judge, rng = Shapes(SCENES, seed), ShapesJudge(), np.random.default_rng(seed)
    for _, losses in training_steps(judge, steps, device):
        index = rng.integers(len(data), size=128)
        x = soften(as_input(data.images[index]), rng, blur=0.8, noise=0.15).to(device)
        label, attributes = (torch.from_numpy(y[index]).to(device) for y in (data.labels, data.attributes))
        with common.autocast(device, dtype):
            features, logits = judge(x)
            guess = judge.attribute_head(features)
        losses["class"] = F.cross_entropy(logits.float(), label)
        losses["attributes"] = 10 * F.binary_cross_entropy_with_logits(guess.float(), attributes.float())
    return judge.eval()


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(1)  # more would add up in another order
    device = common.setup(args.device).device
    dtype = common.resolve_dtype(args.dtype, device)
    stages = {"judge": (args.judge_steps, train_judge), "teacher": (args.steps, train_teacher)}
    for name, (steps, train) in stages.items():
        if steps:
            net = train(steps, args.seed, device, dtype).cpu().half()
            # shapes.networks.load reads it. Empty config: sizes are the default ones.
            content = {"format": f"nanosendvae-shapes-{name}", "config": {}, "model": net.state_dict()}
            facts = {"args": vars(args), "versions": common.versions()}
            checkpoints.save_file(f"{args.out}/{name}.pt", content | facts)
            print(f"wrote {args.out}/{name}.pt")


if __name__ == "__main__":
    common.cli(main)
