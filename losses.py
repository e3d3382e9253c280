"""What the autoencoder is trained against: reconstruction, LPIPS, KL, and a PatchGAN.

    loss, terms = vae_loss(x, x_hat, posterior, lpips=LPIPS(None))     # rec + LPIPS + 1e-6 KL
    g_loss = generator_loss(disc(x_hat))                               # the trainer adds it, weighted
    d_loss = discriminator_loss(disc(x), disc(x_hat.detach()))

Images are (B, 3, H, W) floats in [-1, 1]. Losses are float32 (float64 stays), also under autocast.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VGG_FILE = "vgg16-397923af.pth"  # torchvision's name; the digits begin the file's sha256
LINEAR_HEADS = Path(__file__).parent / "assets" / "lpips_vgg_linear.pt"  # 1,472 floats, BSD-2-Clause


def at_least_float32(x):
    """Return x as float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LPIPS(nn.Module):
    """Learned perceptual distance (arXiv:1801.03924, version 0.1 with VGG16): images x, y in [-1, 1] -> (B,).

    weights: file of torchvision's vgg16 (keys features.N.*), or None for timm's vgg16.tv_in1k from the hub;
    "random" leaves the trunk untrained, for tests and timings only. The linear heads are those of the `lpips`
    package, in assets/. Keys: features.N.*, lin{k}.model.1.weight. Frozen; gradients reach x and y.
    Under autocast the trunk runs in its type, but what is compared is always fp32.
    """
    TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def __init__(self, weights):
        super().__init__()
        self.features = vgg16_trunk(weights)
        for k, tap in enumerate(self.TAPS):
            # published index 0 is a Dropout, which must not run where LPIPS is a loss
            channels = self.features[tap - 1].out_channels
            head = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))
            self.add_module(f"lin{k}", nn.ModuleDict({"model": head}))
        # ImageNet's mean and std. Inputs must be in [-1, 1]; this is the only normalisation.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        heads = torch.load(LINEAR_HEADS, map_location="cpu", weights_only=True)
        self.load_state_dict({**self.features.state_dict(prefix="features."), **heads})
        self.requires_grad_(False)

    def forward(self, x, y):
        """Return the distance of each pair, (B,) float32. x, y (B, 3, H, W) in [-1, 1], H and W >= 16."""
        return self.per_layer(x, y).sum(dim=1)

    def per_layer(self, x, y):
        """Return the share of each of the five layers in the distance, (B, 5)."""
        pairs = zip(self.taps(at_least_float32(x)), self.taps(at_least_float32(y)))
        with torch.autocast(x.device.type, enabled=False):
            shares = [getattr(self, f"lin{k}")["model"]((unit_length(a) - unit_length(b)).square())
                      for k, (a, b) in enumerate(pairs)]  # each (B, 1, h, w)
        return torch.stack([share.mean(dim=(1, 2, 3)) for share in shares], dim=1)

    def taps(self, x):
        """Return the five feature maps of x, each (B, C, h, w)."""
        x, out = (x - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.TAPS:
                out.append(x)
        return out


def unit_length(x):
    """Divide x (B, C, h, w) by its norm over C, to which the published code adds 1e-10; at least fp32.

    The clamp changes no norm above 1e-10; without it the gradient at an all-zero pixel is 0 * inf = nan.
    """
    x = at_least_float32(x)
    return x / (x.square().sum(dim=1, keepdim=True).clamp_min(1e-20).sqrt() + 1e-10)


def vgg16_trunk(weights):
    """Return the convolutions of VGG16 up to relu5_3 as a Sequential; `weights` as in LPIPS.

    Raises FileNotFoundError if the hub cannot be reached, ValueError on a missing or another file.
    """
    import timm  # takes seconds to import
    if weights is None:
        try:
            return timm.create_model("vgg16.tv_in1k", pretrained=True).features[:30]
        except OSError as error:
            raise FileNotFoundError(f"LPIPS: timm/vgg16.tv_in1k is neither cached nor to be had from the "
                                    f"hub: give --lpips-weights FILE (https://download.pytorch.org/models/"
                                    f"{VGG_FILE}) or --lpips 0 (fid.py: --no-lpips)") from error
    with torch.device("meta"):  # the whole network has 138 M parameters, the trunk 15 M
        trunk = timm.create_model("vgg16").features[:30]
    trunk = trunk.to_empty(device="cpu")
    if weights == "random":
        for layer in trunk:
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
        return trunk
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        # a full vgg16 file also holds the classifier, which LPIPS has no use for
        trunk.load_state_dict({key.removeprefix("features."): value for key, value in state.items()
                               if key.startswith("features.")})
    except Exception as error:  # missing, unreadable, not a dict, or other keys: the answer is the same
        raise ValueError(f"--lpips-weights {weights}: not torchvision's {VGG_FILE} ({type(error).__name__}); "
                         f"it is at https://download.pytorch.org/models/{VGG_FILE}") from error
    return trunk


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv:1611.07004): images (B, 3, H, W) -> logits (B, 1, h, w), each for an overlapping patch.

    Taming's NLayerDiscriminator with its keys main.N.*: n_layers convolutions of stride 2, one of stride 1,
    and the output. 256 px give 30 x 30 logits. Its BatchNorm must not mix real and fake images: give them in
    two calls, or convert it to common.GroupBatchNorm2d.
    """

    def __init__(self, ndf=64, n_layers=3, in_channels=3):
        super().__init__()
        layers = [nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        ch = ndf
        for i in range(1, n_layers + 1):
            out_ch = ndf * min(2 ** i, 8)
            layers += [nn.Conv2d(ch, out_ch, 4, stride=2 if i < n_layers else 1, padding=1, bias=False),
                       nn.BatchNorm2d(out_ch), nn.LeakyReLU(0.2, inplace=True)]
            ch = out_ch
        self.main = nn.Sequential(*layers, nn.Conv2d(ch, 1, 4, padding=1))
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, x):
        return self.main(x)


def discriminator_loss(logits_real, logits_fake):
    """Return the discriminator's hinge loss, a scalar: half of mean relu(1 - real) + mean relu(1 + fake)."""
    real, fake = at_least_float32(logits_real), at_least_float32(logits_fake)
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def generator_loss(logits_fake):
    """Return the autoencoder's part, a scalar: minus the mean logit of its reconstructions."""
    return -at_least_float32(logits_fake).mean()


def adaptive_gan_weight(nll, g_loss, last_layer, max_weight=1e4, scale=1.0):
    """Return |d nll / d last_layer| / |d g_loss / d last_layer| as a constant in [0, max_weight].

    Eq. 7 of VQGAN (arXiv:2012.09841). nll: the loss to weigh g_loss against; terms that do not reach
    last_layer, such as KL, make no difference. last_layer: weight of the decoder's last convolution. scale:
    factor on the losses while they are differentiated, for fp16, whose gradients of a mean over pixels
    would be rounded to 0. 0 where no graph is recorded.
    """
    if not (torch.is_grad_enabled() and nll.requires_grad and g_loss.requires_grad):
        return torch.zeros((), device=last_layer.device)

    def gradient_norm(loss):
        gradient, = torch.autograd.grad(scale * loss, last_layer, retain_graph=True)
        return at_least_float32(gradient).norm() / scale
    return (gradient_norm(nll) / (gradient_norm(g_loss) + 1e-4)).clamp(0.0, max_weight).detach()


def vae_loss(x: Tensor, x_hat: Tensor, posterior, rec: str = "l1", lpips=None, lpips_weight: float = 1.0,
             kl_weight: float = 1e-6) -> tuple[Tensor, dict]:
    """Return (rec + lpips_weight * lpips + kl_weight * kl, the three terms before weighting), scalars.

    rec: mean over all elements of |x - x_hat| ("l1") or its square ("l2"); lpips: mean over the batch of
    lpips(x, x_hat), 0 without one; kl: nats, summed over C, h, w, mean over the batch. The scale is that of
    REPA-E (LDM sums rec over the pixels).
    """
    if rec not in ("l1", "l2"):
        raise ValueError(f"rec is {rec!r}, choose 'l1' or 'l2'")
    x, x_hat = at_least_float32(x), at_least_float32(x_hat)
    error = x - x_hat
    terms = {"rec": error.abs().mean() if rec == "l1" else error.square().mean(),
             "lpips": error.new_zeros(()) if lpips is None else lpips(x, x_hat).mean(),
             "kl": posterior.kl().mean()}
    return terms["rec"] + lpips_weight * terms["lpips"] + kl_weight * terms["kl"], terms
