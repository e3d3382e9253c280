"""A toy data set that needs no download: coloured shapes, rendered by numpy, with exact attributes.

    dataset = Shapes(20000, seed=0, split="train")     # .images .labels .attributes .attribute_names .factors
    other = Shapes(20000, seed=0, split="train", frame=1)   # the same scenes; pose, size and light drawn anew

Scene i depends on (seed, split, i) alone. Read: _draw_factors (what is in a scene) -> _render -> Shapes.
Letters: N scenes, H W pixels.
"""
import functools
import hashlib

import numpy as np
import torch

SHAPES = ("disk", "square", "triangle", "star", "plus", "ring", "heart", "crescent", "arrow", "halfdisk")
TEXTURES = ("plain", "gradient", "stripes", "checker")
FILLS = ("solid", "stripes", "rim")
SECONDS = ("none", "disk", "square", "triangle")
# RGB in [0, 1]. Objects are bright and backgrounds are dark, so no combination has low contrast. Half of the
# scenes are inverted in lightness, so a weighted sum of pixels says little about the shape.
HUES = {"red": (.95, .15, .15), "orange": (1., .55, .10), "yellow": (.98, .92, .20), "green": (.25, .85, .25),
        "cyan": (.20, .90, .95), "blue": (.25, .45, 1.), "purple": (.68, .30, 1.), "pink": (1., .50, .80)}
BACKGROUNDS = {"black": (.05, .05, .05), "navy": (.05, .08, .36), "maroon": (.40, .05, .10),
               "forest": (.04, .30, .08), "plum": (.30, .05, .34), "slate": (.34, .38, .44),
               "brown": (.40, .24, .08), "teal": (.03, .32, .35)}
# a factor -> what it can be; in the order in which _draw_factors draws them
TABLES = {"shape": SHAPES, "hue": HUES, "background": BACKGROUNDS, "texture": TEXTURES, "fill": FILLS,
          "second": SECONDS}
SCENE = 64.0   # side of a scene in scene units, at any number of pixels
PERIOD = 16.0  # of stripes and checkers, in scene units
SPLITS = {"train": 0, "val": 1}


def _signed_distance(shape, x, y):
    """Return the distance of points to a shape of radius about 1; negative inside, y points down."""
    r, side = np.hypot(x, y), np.abs(x)
    if shape == "disk":
        return r - 0.9
    if shape == "square":
        return np.maximum(side, np.abs(y)) - 0.78
    if shape == "triangle":
        return np.maximum(y, 0.866 * side - 0.5 * y) - 0.5
    if shape == "star":
        # Five-fold symmetry: fold the plane into half a sector. One edge is left, from tip to inner corner.
        half, tip, inner = np.pi / 5, 0.95, 0.42
        angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)
        normal = np.array([inner * np.sin(half), tip - inner * np.cos(half)])
        normal = (normal / np.hypot(*normal)).astype(np.float32)
        return (r * np.cos(angle) - tip) * normal[0] + r * np.sin(angle) * normal[1]
    if shape == "plus":
        return np.maximum(np.minimum(side, np.abs(y)) - 0.3, np.maximum(side, np.abs(y)) - 0.9)
    if shape == "ring":
        return np.abs(r - 0.68) - 0.27
    if shape == "heart":  # a square that stands on its corner, with a disk on each of its upper sides
        return np.minimum((side + np.abs(y - 0.1) - 0.8) * np.sqrt(0.5, dtype=np.float32),
                          np.hypot(side - 0.4, y + 0.3) - 0.566)
    if shape == "crescent":
        return np.maximum(r - 0.95, 0.72 - np.hypot(x - 0.48, y))
    if shape == "arrow":
        head = np.maximum(0.1 - x, 0.66 * (x - 0.95) + 0.75 * np.abs(y))
        return np.minimum(head, np.maximum(np.abs(x + 0.4) - 0.5, np.abs(y) - 0.26))
    return np.maximum(np.hypot(x, y - 0.4) - 0.95, y - 0.4)  # halfdisk


def _square_wave(wave, pixel, period):
    """Turn a sine wave of amplitude 1 into 0 and 1, with edges about one pixel wide."""
    return np.clip(0.5 + wave * period / (2 * np.pi * pixel), 0, 1)


def _mix(under, over, alpha):
    """Blend colours (N, 1 or H, 1 or W, 3) by alpha (N, H, W)."""
    return under + alpha[..., None] * (over - under)


def _shape_alpha(names, which, x, y, radius, pixel):
    """Return distance in scene units and anti-aliased coverage, (N, H, W) each; which: (N, 1, 1) indices."""
    distance = np.full(x.shape, SCENE, np.float32)
    for k in np.unique(which):
        same = (which == k).ravel()
        if names[k] != "none":
            distance[same] = _signed_distance(names[k], (x / radius)[same], (y / radius)[same])
    distance *= radius
    return distance, np.clip(0.5 - distance / pixel, 0, 1)


def _render(f, size):
    """Render scenes: f is the dict of factor arrays (N,); returns uint8 (N, size, size, 3)."""
    pixel = SCENE / size
    at = (np.arange(size, dtype=np.float32) + 0.5) * pixel  # pixel centres
    f = {k: (v.astype(np.float32) if v.dtype == float else v)[:, None, None] for k, v in f.items()}
    colour = np.array(list(HUES.values()), np.float32)  # (8, 3)
    base = np.array(list(BACKGROUNDS.values()), np.float32)[f["background"]]  # (N, 1, 1, 3)

    # background: a plain colour, or a pale texture over it
    phase = 2 * np.pi * f["phase"]
    u, v = np.broadcast_arrays(at[None, None, :], at[None, :, None])
    across = np.where(f["vertical"], v, u)  # (N, H, W)
    wave = np.sin(2 * np.pi / PERIOD * across + phase)
    other = np.sin(2 * np.pi / PERIOD * (u + v - across) + 2 * phase)
    ramp = np.where(f["phase"] < 0.5, across, SCENE - across) / SCENE
    tone = np.choose(f["texture"], (np.float32(0), ramp, _square_wave(wave, pixel, PERIOD),
                                    _square_wave(wave * other, pixel, PERIOD)))
    image = _mix(base, base + 0.25 * (1 - base), tone)

    # main object, in its own axes
    c, s = np.cos(np.radians(f["rotation"])), np.sin(np.radians(f["rotation"]))
    x, y = u - f["x"], v - f["y"]
    x, y = c * x + s * y, c * y - s * x
    distance, alpha = _shape_alpha(SHAPES, f["shape"], x, y, f["size"], pixel)
    stripes = _square_wave(np.sin(2 * np.pi / 10 * x), pixel, 10)
    rim = np.clip(0.5 - (distance + 3) / pixel, 0, 1)  # the coloured rim is 3 units wide
    pale = np.choose(f["fill"], (np.float32(0), stripes, rim))
    hue = colour[f["hue"]]
    image = _mix(image, _mix(hue, hue + 0.7 * (1 - hue), pale), alpha)

    # second object, in a corner, always solid
    x, y = u - f["second_x"], v - f["second_y"]
    alpha = _shape_alpha(SECONDS, f["second"], x, y, f["second_size"], pixel)[1]
    image = _mix(image, colour[f["second_hue"]], alpha)
    # inversion: lightness of the HSL model becomes 1 - lightness, the hue stays
    channels = [image[..., k:k + 1] for k in range(3)]  # numpy's own max over so short an axis is slow
    inverted = image + 1 - functools.reduce(np.maximum, channels) - functools.reduce(np.minimum, channels)
    image = np.where(f["inverted"][..., None], inverted, image)
    return np.rint(255 * np.clip(image * f["light"][..., None], 0, 1)).astype(np.uint8)


def _draw_factors(num, seed, split, frame):
    """Draw the factors of scenes 0..num-1: dict of arrays (num,). Scene i does not depend on num."""
    tens = -(-num // len(SHAPES)) * len(SHAPES)  # num, rounded up: each shape comes once in ten scenes
    a = np.random.default_rng([split, 0, seed]).random((tens, 8))  # what is in a scene
    b = np.random.default_rng([split, 1 + frame, seed]).random((tens, 10))  # how this frame shows it
    f = {key: (a[:, i] * len(names)).astype(int) for i, (key, names) in enumerate(TABLES.items())}
    f["shape"] = np.argsort(a[:, 0].reshape(-1, len(SHAPES)), axis=1).ravel()
    f["second"] = np.maximum(a[:, 5] * 6 - 2, 0).astype(int)  # none for half of them
    other = 1 + (a[:, 6] * (len(HUES) - 1)).astype(int)  # never the main hue
    f |= {"inverted": a[:, 7] < 0.5, "second_hue": (f["hue"] + other) % len(HUES)}
    f |= {"x": 25 + 14 * b[:, 0], "y": 25 + 14 * b[:, 1], "size": 18 + 7 * b[:, 2],
          "rotation": 60 * b[:, 3] - 30, "light": 0.85 + 0.25 * b[:, 4], "phase": b[:, 5],
          "vertical": b[:, 6] < 0.5, "second_x": np.where(b[:, 7] % 0.5 < 0.25, 9, 55) + 4 * b[:, 8] - 2,
          "second_y": np.where(b[:, 7] < 0.5, 9, 55) + 40 * b[:, 8] % 4 - 2, "second_size": 6.5 + 2 * b[:, 9]}
    return {k: v[:num] for k, v in f.items()}


class Shapes:
    """num scenes in memory: a shape on a background, in half of them a second, small shape in a corner.

    Image i of a (seed, split, frame) is the same for every num. The splits "train" and "val" never share a
    random stream. Another `frame` shows the same scenes, but position, size, rotation, light, texture phase
    and place of the second shape are drawn anew. The label is the main shape; the classes are balanced.

    .images uint8 (N, size, size, 3) RGB; .labels int64 (N,); .attributes uint8 (N, A), their names in
    .attribute_names; .factors dict of arrays (N,): indices into the tables above; x, y, size in 64ths of the
    side; rotation in degrees. Raises ValueError for another split, num < 1, size < 8, seed < 0, frame < 0.
    """

    class_names = list(SHAPES)
    num_classes = len(SHAPES)
    on_disk = False

    def __init__(self, num: int, seed: int = 0, split: str = "train", size: int = 32, frame: int = 0):
        if split not in SPLITS or num < 1 or size < 8 or seed < 0 or frame < 0:
            raise ValueError(f"split {split!r}, num {num}, size {size}, seed {seed}, frame {frame}: want "
                             "split train or val, num >= 1, size >= 8, seed >= 0, frame >= 0")
        self.image_size = size
        self.factors = _draw_factors(num, seed, SPLITS[split], frame)
        parts = [{k: v[i:i + 64] for k, v in self.factors.items()} for i in range(0, num, 64)]
        self.images = np.concatenate([_render(part, size) for part in parts])
        self.labels = self.factors["shape"].astype(np.int64)
        columns = {f"{key}={name}": self.factors[key] == i
                   for key, names in TABLES.items() for i, name in enumerate(names)}
        columns |= {"tone=inverted": self.factors["inverted"], "position=right": self.factors["x"] > 32,
                    "position=low": self.factors["y"] > 32, "size=large": self.factors["size"] > 21.5}
        self.attribute_names = list(columns)
        self.attributes = np.stack(list(columns.values()), axis=1).astype(np.uint8)

    def __len__(self):
        return len(self.labels)

    @functools.cached_property
    def images_hash(self) -> str:
        """Which images these are: sha256 of all pixels."""
        return hashlib.sha256(self.images).hexdigest()

    def batch(self, indices) -> dict:
        """Return {"images": uint8 (B, 3, H, W), "labels": int64 (B,), "index": int64 (B,), the positions}."""
        index = np.asarray(indices, dtype=np.int64)
        images = np.ascontiguousarray(self.images[index].transpose(0, 3, 1, 2))
        arrays = {"images": images, "labels": self.labels[index], "index": index}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
