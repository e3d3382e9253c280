"""The embedded set's two small networks: a teacher to align with, and a judge to measure with.

    tokens = load_teacher()(x)              # x (B, 3, 32, 32) in [-1, 1] -> (B, 16, 128) fp32
    features, logits = load_judge()(x)      # (B, 128) for the Frechet distance, (B, 10) of the classes

`python -m shapes.train` made teacher.pt and judge.pt beside this file. They hold fp16 weights and, under
"metrics", how good the network was when it was made.
"""
from pathlib import Path

import torch
from torch import Tensor, nn


def convolutions(plan):
    """Return 3x3 convolution, BatchNorm and ReLU for each (channels in, channels out, stride) of the plan."""
    layers = [nn.PixelUnshuffle(2)]  # convolutions at full resolution would take most of the time
    for c_in, c_out, stride in plan:
        layers += nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(True)
    return layers


def check_size(x: Tensor):
    """Raise ValueError unless images are 32 x 32: the linear layer and the grid were made for that size."""
    if x.shape[-2:] != (32, 32):
        raise ValueError(f"the shapes networks take 32 px images, got {tuple(x.shape)}: --image-size 32")


class ShapesTeacher(nn.Module):
    """Convolutional teacher, trained without labels. Raises ValueError for another image size.

    x (B, 3, 32, 32) in [-1, 1] -> tokens (B, 16, dim), the 4 x 4 grid in row-major order. Each token sees
    most of the image. The mean token of each position is subtracted: a direction that all images share would
    raise every cosine and say nothing. There is no position code. Why no ViT: one of this size learns too
    slowly on a CPU.
    """

    grid = 4

    def __init__(self, dim: int = 128):
        super().__init__()
        self.dim = dim
        plan = (12, 64, 1), (64, 64, 1), (64, 128, 2), *[(128, 128, 1)] * 2, (128, 128, 2), (128, 128, 1)
        # The last norm has no affine part: every channel of a token counts alike in the cosine.
        self.net = nn.Sequential(*convolutions(plan), nn.Conv2d(128, dim, 1, bias=False),
                                 nn.BatchNorm2d(dim, affine=False))
        self.register_buffer("mean", torch.zeros(self.grid ** 2, dim))

    def forward(self, x: Tensor) -> Tensor:
        check_size(x)
        return self.net(x).flatten(2).mT.float() - self.mean  # (B, dim, 4, 4) -> (B, 16, dim)


class ShapesJudge(nn.Module):
    """Classifier of class and attributes; no VAE or SiT sees it. Raises ValueError for another image size.

    x (B, 3, 32, 32) in [-1, 1] -> (features (B, 128) fp32, class logits (B, num_classes)).
    attribute_head(features) -> logits (B, num_attributes), in the order of Shapes.attribute_names.
    """

    def __init__(self, num_classes: int = 10, num_attributes: int = 41):
        super().__init__()
        plan = (12, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 128, 2)
        self.net = nn.Sequential(*convolutions(plan), nn.Flatten(), nn.Linear(16 * 128, 128),
                                 nn.BatchNorm1d(128), nn.ReLU())
        self.class_head = nn.Linear(128, num_classes)
        self.attribute_head = nn.Linear(128, num_attributes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_size(x)
        features = self.net(x).float()
        return features, self.class_head(features)


def load(path, cls):
    """Read a network of class `cls`: fp32, on the CPU, in eval mode.

    Raises ValueError without the file, or if it holds something else.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        net = cls(**saved["config"])
        net.load_state_dict(saved["model"])
        return net.eval()
    except Exception as error:  # missing, unreadable, not a dict, other tensors: the answer is the same
        raise ValueError(f"{path}: no {cls.__name__} ({error!r:.80}); shapes.train makes it") from error


def load_teacher(path=Path(__file__).with_name("teacher.pt")) -> ShapesTeacher:
    """Return the teacher that ships with this file, or that of another file; see `load`."""
    return load(path, ShapesTeacher)


def load_judge(path=Path(__file__).with_name("judge.pt")) -> ShapesJudge:
    """Return the judge that ships with this file, or that of another file; see `load`."""
    return load(path, ShapesJudge)
