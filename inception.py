"""Feature networks of fid.py: Inception, as FID defines it; the embedded set's judge; any timm model.

    features = Extractor("inception")(images_u8)["features"]    # uint8 (B, 3, H, W) -> (B, D)

Weights come from a local file, a cache or their publisher. Without them there is an error, never a random
network. Letters: B images, C channels, H W pixels, D features.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mapper import timm_network

# --features-weights also takes torch-fidelity's file of the same network.
INCEPTION_SHA256 = "6726825d"  # the start of the file's sha256
INCEPTION_FILE = f"pt_inception-2015-12-05-{INCEPTION_SHA256}.pth"
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + INCEPTION_FILE
WANTED = f"--features-weights {INCEPTION_FILE} (sha256 {INCEPTION_SHA256}...) from {INCEPTION_URL}"


def resize_tf1(x: Tensor, size: int) -> Tensor:
    """Resize (B, C, H, W) to size x size as TensorFlow 1: source = i * in / out, bilinear, no antialias."""
    for _ in range(2):  # along the width, then along the height
        scale = torch.tensor(x.shape[3] / size, dtype=torch.float32)  # TensorFlow's type, also if x is fp64
        source = torch.arange(size, device=x.device, dtype=x.dtype) * scale.to(x)
        low = source.floor().long()
        a, b = x[..., low], x[..., (low + 1).clamp(max=x.shape[3] - 1)]
        x = (a + (b - a) * (source - low)).mT
    return x


class FIDInception(nn.Module):
    """Inception-v3 of TensorFlow's 2015-12-05 graph under pytorch-fid's key names; random until loaded.

    resize, to 299 px: "tf1" (ADM, torch-fidelity) or "pytorch-fid" (half-pixel centres). The layers are
    timm's. The graph differs from them in the pooling branches: its averages leave out the padding, and its
    last block takes the maximum.
    """

    def __init__(self, resize: str = "tf1"):
        super().__init__()
        from timm.models.inception_v3 import InceptionV3  # takes seconds to import
        net, self.resize = InceptionV3(num_classes=1008), resize
        # in the order in which images pass them
        self.layers = [name for name, _ in net.named_children() if name.startswith(("Conv", "Pool", "Mixed"))]
        for name in (*self.layers, "fc"):
            self.add_module(name, getattr(net, name))

    def preprocess(self, images_u8: Tensor) -> Tensor:
        """Map uint8 (B, 3, H, W) to (B, 3, 299, 299) in about [-1, 1], in the type of the weights."""
        x = images_u8.to(self.fc.weight.dtype)
        if self.resize == "tf1":
            return (resize_tf1(x, 299) - 128) / 128
        return 2 * F.interpolate(x / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1

    def activations(self, x: Tensor):
        """Yield (layer name, its output (B, C, h, w)) from preprocessed images, from first to last."""
        for name in self.layers:
            layer, before = getattr(self, name), x
            x = layer(x)
            if hasattr(layer, "branch_pool"):  # the last channels come from timm's pooling: replace them
                pooled = F.avg_pool2d(before, 3, 1, 1, count_include_pad=False)
                branch = layer.branch_pool(F.max_pool2d(before, 3, 1, 1) if name == "Mixed_7c" else pooled)
                x = torch.cat([x[:, :-branch.shape[1]], branch], dim=1)
            yield name, x

    def forward(self, images_u8: Tensor) -> dict:
        """Return the activations of uint8 images (B, 3, H, W), each (B, D).

        "features" (pool3, 2048): means over positions, for FID; "spatial" (2023): for sFID; "logits" (1008):
        without the layer's bias, as ADM's Inception Score takes them.
        """
        for name, x in self.activations(self.preprocess(images_u8)):
            if name == "Mixed_6d":  # TF's mixed_6/conv: branch1x1 after its ReLU, channels last
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)
        features = x.mean(dim=(2, 3))
        return {"features": features, "spatial": spatial, "logits": features @ self.fc.weight.T}


def find_inception(weights=None) -> Path:
    """Return the file of Inception's weights: `weights`, else that in torch hub's cache, fetched if need be.

    Raises FileNotFoundError if it cannot be fetched. What is fetched must have the published sha256.
    """
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE)
    if not weights and not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:  # no network, full disk; RuntimeError: another sha256
            raise FileNotFoundError(f"{path}: missing, not fetched ({error!r:.90}); want {WANTED}") from error
    return path


def load_inception(weights=None, resize: str = "tf1") -> FIDInception:
    """Return the network with published weights, eval mode, CPU; `weights` and errors as in find_inception.

    Also raises ValueError if there is no such file, or something else in it.
    """
    import timm  # noqa: F401  (torch 2.6 cannot import it under the device "meta")
    path = find_inception(weights)
    with torch.device("meta"):  # no time spent on initial weights
        net = FIDInception(resize)
    # BatchNorm's counters have no use in evaluation. Published files may lack them.
    counters = {key: torch.tensor(0) for key in net.state_dict() if key.endswith("num_batches_tracked")}
    try:
        net.load_state_dict(counters | torch.load(path, "cpu", weights_only=True), assign=True)
    except Exception as error:  # unreadable, not a dict, or other keys: the answer is the same
        raise ValueError(f"{path}: no Inception ({type(error).__name__}); want {WANTED}") from error
    return net.eval()


def fuse(net: FIDInception) -> FIDInception:
    """Fold each BatchNorm into its convolution, weights channels last, in place; returns net, eval mode.

    The same function to 3e-6 of activations of about 5; about 1.4 times faster on a CPU.
    """
    for block in net.modules():
        if hasattr(block, "conv") and hasattr(block, "bn"):
            # ReLU stays: timm's norm layer includes the activation
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.ReLU(inplace=True)
    return net.to(memory_format=torch.channels_last)


class Extractor(nn.Module):
    """A feature network by name: uint8 images (B, 3, H, W) -> {"features": (B, D), ...}; frozen, eval mode.

    name: "inception" (also gives "spatial" and "logits"), "shapes" (the embedded set's judge; also gives
    "class_logits"), or a timm model (pooled features; images are resized to its own size). weights: local
    file. resize: for Inception. .label names the distance, .resize says how images are resized.

    Raises ValueError for an unknown name or other weights, FileNotFoundError if weights cannot be had.
    """

    def __init__(self, name: str, weights=None, resize: str = "tf1"):
        super().__init__()
        self.name = name
        if name == "inception":
            self.net, self.label, self.resize = load_inception(weights, resize), "FID", resize
        elif name == "shapes":
            from shapes.networks import load_judge
            self.net, self.label, self.resize = load_judge(*filter(None, [weights])), "FD-judge", "none"
        else:
            # FD-DINOv2 (arXiv:2306.04675) is defined at 224 px; timm would take 518.
            overlay = {"input_size": (3, 224, 224)} if "dinov2" in name else None
            self.net = timm_network(name, "--features", weights, overlay).eval()
            import timm
            config = timm.data.resolve_model_data_config(self.net)
            self.size = config["input_size"][1:]
            self.label, self.resize = f"FD-{name}", f"bicubic to {self.size[0]}"
            for key in ("mean", "std"):
                self.register_buffer(key, torch.tensor(config[key])[:, None, None])
        self.requires_grad_(False)

    def forward(self, images_u8: Tensor) -> dict:
        if self.name == "inception":
            return self.net(images_u8)
        if self.name == "shapes":
            return dict(zip(("features", "class_logits"), self.net(images_u8.float() / 127.5 - 1)))
        x = F.interpolate(images_u8.float() / 255, size=self.size, mode="bicubic", antialias=True)
        return {"features": self.net((x.clamp(0, 1) - self.mean) / self.std)}
