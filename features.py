"""Networks in whose features fid.py compares images: Inception, the embedded set's judge, any timm model.

    features = Extractor("inception")(images_u8)["features"]    # images uint8 (B, 3, H, W), features (B, D)

Weights come from a file, a cache or their publisher, or there is an error that names them: never random.
"""
import hashlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from weights import timm_network

# The same network by two publishers: pytorch-fid's file, fetched where there is none, and torch-fidelity's.
# The digits begin the sha256 of the former; whether of the latter, too, which repeats them, is unchecked.
INCEPTION_SHA256 = "6726825d"
INCEPTION_FILE = f"pt_inception-2015-12-05-{INCEPTION_SHA256}.pth"
INCEPTION_FILES = (INCEPTION_FILE, f"weights-inception-2015-12-05-{INCEPTION_SHA256}.pth")
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + INCEPTION_FILE
JUDGE_FILE = Path(__file__).parent / "assets" / "shapes_judge.pt"


def resize_tf1(x: Tensor, size: int) -> Tensor:
    """Resize (B, C, H, W) to size x size as TensorFlow 1: source = i * in / out, bilinear, no antialias."""
    for dim in (3, 2):
        last = x.shape[dim] - 1
        scale = torch.tensor((last + 1) / size, dtype=torch.float32)  # as TensorFlow, whatever the type of x
        source = torch.arange(size, device=x.device, dtype=x.dtype) * scale.to(x)
        low = source.floor().long()
        share = (source - low).view([-1 if d == dim else 1 for d in range(4)])
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=last))
        x = a + (b - a) * share
    return x


class FIDInception(nn.Module):
    """Inception-v3 of TensorFlow's 2015-12-05 graph under pytorch-fid's key names; random until loaded.

    resize, to 299 px: "tf1" (ADM, torch-fidelity) or "pytorch-fid" (half-pixel centres). The layers are
    timm's; unlike them the graph averages without counting the padding, and its last block takes the maximum.
    """
    LAYERS = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Pool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3",
              "Pool2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d",
              "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c")
    TAPS = {"Pool1": "64", "Pool2": "192", "Mixed_6e": "768", "Mixed_7c": "2048"}

    def __init__(self, resize: str = "tf1"):
        super().__init__()
        from timm.models.inception_v3 import InceptionV3  # takes seconds to import
        net, self.resize = InceptionV3(num_classes=1008), resize
        for name in (*self.LAYERS, "fc"):
            self.add_module(name, getattr(net, name))

    def preprocess(self, images_u8: Tensor) -> Tensor:
        """Map uint8 (B, 3, H, W) to (B, 3, 299, 299) in about [-1, 1], in the type of the weights."""
        x = images_u8.to(self.fc.weight.dtype)
        if self.resize == "tf1":
            return (resize_tf1(x, 299) - 128) / 128
        return 2 * F.interpolate(x / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1

    def forward(self, images_u8: Tensor) -> dict:
        """Return the activations of uint8 images (B, 3, H, W), each (B, D).

        "64", "192", "768", "2048" (pool3): means over positions; "spatial" (2023): for sFID; "logits" (1008);
        "logits_unbiased": without the layer's bias, as ADM's Inception Score takes them.
        """
        x, out = self.preprocess(images_u8), {}
        for name in self.LAYERS:
            layer, before = getattr(self, name), x
            x = layer(x)
            if hasattr(layer, "branch_pool"):  # its channels are the last ones: replace them
                pooled = F.max_pool2d(before, 3, 1, 1) if name == "Mixed_7c" else \
                    F.avg_pool2d(before, 3, 1, 1, count_include_pad=False)
                branch = layer.branch_pool(pooled)
                x = torch.cat([x[:, :-branch.shape[1]], branch], dim=1)
            if name in self.TAPS:
                out[self.TAPS[name]] = x.mean(dim=(2, 3))
            if name == "Mixed_6d":  # TF's mixed_6/conv: branch1x1 after its ReLU, channels last
                out["spatial"] = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)
        out["logits_unbiased"] = out["2048"] @ self.fc.weight.T
        return {**out, "logits": out["logits_unbiased"] + self.fc.bias}


def find_inception(weights=None) -> Path:
    """Return the file of Inception's weights: `weights`, or torch hub's cache, to which it is fetched once.

    Raises FileNotFoundError with name, source and sha256 where there is none, ValueError if what lies under
    pytorch-fid's name is not that file; another file of one's own is named in a warning.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    found = [path for path in ([Path(weights)] if weights else [cache / name for name in INCEPTION_FILES])
             if path.is_file()]
    if not found:
        cause = "no such file"
        if not weights:
            try:
                cache.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(INCEPTION_URL, str(cache / INCEPTION_FILE), INCEPTION_SHA256)
                return cache / INCEPTION_FILE
            except (OSError, RuntimeError) as error:  # no network, full disk; RuntimeError: another sha256
                cause = f"not there, and not fetched ({type(error).__name__}: {str(error)[:80]})"
        raise FileNotFoundError(
            f"{weights or cache / INCEPTION_FILE}: {cause}; FID wants {INCEPTION_FILE} (its sha256 "
            f"begins with {INCEPTION_SHA256}) from {INCEPTION_URL}: put it there, or give --inception FILE")
    with open(found[0], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(INCEPTION_SHA256):
        seen = f"{found[0]}: sha256 {digest[:8]}, that of {INCEPTION_FILE} begins with {INCEPTION_SHA256}"
        if found[0].name == INCEPTION_FILE:
            raise ValueError(f"{seen}; fetch it again from {INCEPTION_URL}")
        print(f"warning: {seen}; distances are comparable only to those by the same weights", file=sys.stderr)
    return found[0]


def load_inception(weights=None, resize: str = "tf1") -> FIDInception:
    """Return the network with published weights, eval mode, CPU; `weights` and errors as in find_inception.

    Also raises ValueError for a file of something else.
    """
    path = find_inception(weights)
    with torch.device("meta"):  # no time spent on initial weights
        net = FIDInception(resize)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        # BatchNorm's counters, which evaluation has no use for: published files may lack them
        counters = {k: torch.tensor(0) for k in net.state_dict() if k.endswith("num_batches_tracked")}
        net.load_state_dict({**counters, **state}, assign=True)
    except Exception as error:  # unreadable, not a dict, or other keys: the answer is the same
        raise ValueError(f"{path}: not {INCEPTION_FILE} ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:200]}); fetch it from {INCEPTION_URL}") from error
    return net.eval()


def fuse(net: FIDInception) -> FIDInception:
    """Fold each BatchNorm into its convolution, weights channels last, in place; returns net, eval mode.

    The same function to 3e-6 of activations of about 5; about 1.4 times faster on a CPU.
    """
    for block in net.modules():
        if hasattr(block, "conv") and hasattr(block, "bn"):
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.ReLU(inplace=True)
    return net.to(memory_format=torch.channels_last)


class ShapesJudge(nn.Module):
    """Judge of the embedded set, trained on class and attributes by train_teacher.py; no VAE or SiT sees it.

    x (B, 3, 32, 32) in [-1, 1] -> (features (B, 128) for the Frechet distance, class logits (B, 10)).
    attribute_logits(features) -> (B, num_attributes), the columns of Shapes.attribute_names.
    """

    def __init__(self, num_classes: int = 10, num_attributes: int = 41, width: int = 32):
        super().__init__()
        w = width
        layers = [nn.PixelUnshuffle(2)]
        for c_in, c_out, stride in ((12, 2 * w, 1), (2 * w, 2 * w, 1), (2 * w, 4 * w, 2), (4 * w, 4 * w, 1),
                                    (4 * w, 4 * w, 2)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(True)]
        layers += [nn.Flatten(), nn.Linear(16 * 4 * w, 128), nn.BatchNorm1d(128), nn.ReLU()]
        self.net = nn.Sequential(*layers)
        self.class_head = nn.Linear(128, num_classes)
        self.attribute_head = nn.Linear(128, num_attributes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-2:] != (32, 32):
            raise ValueError(f"the shapes judge takes 32 px images, got {tuple(x.shape)}: --image-size 32")
        features = self.net(x).float()
        return features, self.class_head(features)

    def attribute_logits(self, features: Tensor) -> Tensor:
        return self.attribute_head(features)


def load_shapes_judge(path=JUDGE_FILE) -> ShapesJudge:
    """Read the judge that train_teacher.py wrote (fp16 weights), in fp32 on the CPU and in eval mode.

    Raises FileNotFoundError without the file, ValueError for another kind of file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; python train_teacher.py makes the shapes judge")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format") != "nanosendvae-shapes-judge":
        raise ValueError(f"{path} is not a shapes judge; python train_teacher.py makes one")
    judge = ShapesJudge(**state["config"])
    judge.load_state_dict(state["model"])
    return judge.eval()


def load_timm(name: str, weights=None) -> nn.Module:
    """Return a timm model without classifier, eval mode, CPU; weights: local file, None fetches from the hub.

    Raises ValueError for an unknown name, FileNotFoundError if the weights cannot be had.
    """
    # FD-DINOv2, arXiv:2306.04675; timm would take 518
    overlay = {"input_size": (3, 224, 224)} if "dinov2" in name else {}
    return timm_network(name, "--features", weights, overlay).eval()


class Extractor(nn.Module):
    """A feature network by name: uint8 images (B, 3, H, W) -> {"features": (B, D), ...}; frozen, eval mode.

    name: "inception" (which also gives "spatial" and "logits"), "shapes" (the embedded set's judge; also
    "class_logits"), or a timm model (pooled features, images resized to its own size). weights: local file.
    resize: for Inception. .label names the distance, .resize says what was done.
    """

    def __init__(self, name: str, weights=None, resize: str = "tf1"):
        super().__init__()
        self.name = name
        if name == "inception":
            self.net, self.label, self.resize = load_inception(weights, resize), "FID", resize
        elif name == "shapes":
            self.net, self.label, self.resize = load_shapes_judge(), "FD-judge", "none"
        else:
            self.net, self.label = load_timm(name, weights), f"FD-{name}"
            from timm.data import resolve_model_data_config
            config = resolve_model_data_config(self.net)
            self.size, self.resize = config["input_size"][1:], f"bicubic to {config['input_size'][1]}"
            for key in ("mean", "std"):
                self.register_buffer(key, torch.tensor(config[key]).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, images_u8: Tensor) -> dict:
        if self.name == "inception":
            out = self.net(images_u8)
            return {"features": out["2048"], "spatial": out["spatial"], "logits": out["logits_unbiased"]}
        if self.name == "shapes":
            return dict(zip(("features", "class_logits"), self.net(images_u8.float() / 127.5 - 1)))
        x = F.interpolate(images_u8.float() / 255, size=self.size, mode="bicubic", antialias=True).clamp(0, 1)
        return {"features": self.net((x - self.mean) / self.std)}
