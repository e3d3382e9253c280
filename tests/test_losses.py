"""LPIPS, PatchGAN, loss terms and complete published objectives (golden); batch norm in groups.

    python -m pytest tests/test_losses.py        about 25 s on 2 cores, no network

ActNorm, LeCAM, the vanilla GAN loss, training of logvar and VA-VAE's VF loss are golden, but not ours."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import fill_by_name, read_fixture, tensor
from small import save
from torch import nn

from common import GroupBatchNorm2d, update_batch_norms
from losses import (LPIPS, PatchDiscriminator, adaptive_gan_weight, discriminator_loss, generator_loss,
                    unit_length, vae_loss)
from vae import Posterior

PERCEPTUAL, PERCEPTUAL_ARCHIVE = read_fixture("lpips")
MANIFEST, ARCHIVE = read_fixture("discriminator")
CASES = MANIFEST["cases"]
LPIPS_BF16 = 5e-3, 0.2  # errors of the distance and of its gradient's direction, relative; docs/results.md


def cases_with(name):
    """Names of the discriminator fixture's cases that have this input; ours has no ActNorm."""
    return [key for key, case in CASES.items()
            if name in case["inputs"] and not (case.get("config") or {}).get("use_actnorm")]


def golden(module, rules, archive, part):
    """Fill `module` from the part of a golden table in which its key `part` is, whatever the prefix."""
    prefix = next(key for key in rules if key.endswith(part)).removesuffix(part)
    rules = {key.removeprefix(prefix): rule for key, rule in rules.items() if key.startswith(prefix)}
    return fill_by_name(module, {"tensors": {"part": rules}}, "part", archive)


def golden_lpips(manifest, case):
    """LPIPS with a golden trunk; checks on the way that the linear heads we ship are the published ones."""
    model = LPIPS("random")
    heads = {key: value.clone() for key, value in model.state_dict().items() if key.startswith("lin")}
    golden(model, manifest["tensors"][case["tensors"]], PERCEPTUAL_ARCHIVE, "features.0.weight")
    assert sum(value.numel() for value in heads.values()) == 1472
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in heads.items())
    return model


def check(ours, case, group=""):
    """Compare {output: tensor} with a golden group: losses 1e-4 relative, gradients 2e-3 of their largest.

    A ReLU whose input is 0 up to rounding may open on one processor alone: then the gradient of one part of
    the image moves (by 6e-4 on an AMD without AVX-512), while the losses stay.
    """
    for name, value in ours.items():
        expected = tensor(ARCHIVE, f"{case}/{group}{name}")
        atol = 2e-3 * expected.abs().max().item() if expected.ndim else 1e-6
        torch.testing.assert_close(value.detach().reshape(expected.shape), expected, rtol=1e-4, atol=atol)


def groups(case):
    """Yield (mode, step, kind, prefix) of a published objective's outputs: eval_step100_vf/ and so on."""
    for prefix in dict.fromkeys(name.split("/")[0] for name in CASES[case]["outputs"]):
        if "_step" in prefix:
            mode, step, kind = prefix.split("_")
            yield mode, int(step.removeprefix("step")), kind, prefix + "/"


@pytest.mark.parametrize("name", PERCEPTUAL["cases"])
def test_lpips_equals_the_published_distance_frozen_and_nearly_in_bf16(name, tmp_path):
    lpips = golden_lpips(PERCEPTUAL, PERCEPTUAL["cases"][name])
    get = {key.split("/")[1]: tensor(PERCEPTUAL_ARCHIVE, key) for key in PERCEPTUAL_ARCHIVE.files
           if key.startswith(name + "/")}
    x = get["images_u8"].permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
    a = torch.cat([x, x, x[:2], torch.full_like(x[:1], -0.5)])
    b = torch.cat([x.roll(1, 0), (x + get["noise"]).clamp(-1, 1), x[:2], torch.full_like(x[:1], 0.25)])
    with torch.no_grad():
        torch.testing.assert_close(lpips.per_layer(a, b), get["per_layer"], atol=1e-6, rtol=0)
        for k, tap in enumerate(lpips.taps(x[:1])):
            torch.testing.assert_close(tap[0, :6, :4, :4], get[f"tap{k}"], atol=2e-5, rtol=1e-5)
        a, b = a[:2], b[:2]  # the others have shown the same layers
        distance = lpips(a, b)
        ours = {"distance": distance, "distance_01_normalize": distance,
                "repae_quirk": lpips(2 * a - 1, 2 * b - 1)}  # REPA-E scales [-1, 1] images a second time
        for key, value in ours.items():
            torch.testing.assert_close(value, get[key][:2], atol=1e-6, rtol=0)
        exact = copy.deepcopy(lpips).double()(a.double(), b.double())
        torch.testing.assert_close(exact, get["distance@f64"][:2], atol=1e-9, rtol=0)
    trunk = {key: value for key, value in lpips.state_dict().items() if key.startswith("features.")}
    path = save(tmp_path / "vgg16.pth", {**trunk, "classifier.0.bias": torch.zeros(4)})  # as torchvision's
    again = LPIPS(path)(a, b)
    assert torch.equal(again, distance) and not again.requires_grad
    grad, = torch.autograd.grad(lpips(a, b.requires_grad_()).sum(), b)
    torch.testing.assert_close(grad, get["grad_b"], atol=1e-4 * get["grad_b"].abs().max().item(), rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        rough = lpips(a, b)
        assert lpips.taps(b)[0].dtype == torch.bfloat16 and rough.dtype == torch.float32
    rough_grad, = torch.autograd.grad(rough.sum(), b)
    torch.testing.assert_close(rough.detach(), distance, atol=0, rtol=LPIPS_BF16[0])
    assert 0 < (rough_grad - grad).norm() < LPIPS_BF16[1] * grad.norm()


def test_unit_length_has_a_gradient_at_zero():
    x = torch.tensor([0.0, 1e-9, 1.0]).expand(1, 5, 1, 3).clone().requires_grad_()
    torch.testing.assert_close(unit_length(x), x / (x.norm(dim=1, keepdim=True) + 1e-10))
    unit_length(x).sum().backward()
    assert x.grad.isfinite().all()


def golden_discriminator(case):
    cfg = {"ndf": 64, "n_layers": 3, "input_nc": 3, **case.get("config", {})}
    model = PatchDiscriminator(cfg["ndf"], cfg["n_layers"], cfg["input_nc"]).eval()
    return golden(model, MANIFEST["tensors"][case["tensors"]], ARCHIVE, "main.0.weight")


@pytest.mark.parametrize("name", cases_with("real"))
@torch.no_grad()
def test_the_discriminator_equals_the_published_one(name):
    case, real, fake = CASES[name], tensor(ARCHIVE, f"{name}/real"), tensor(ARCHIVE, f"{name}/fake")
    model = golden_discriminator(case)
    assert sum(p.numel() for p in model.parameters()) == case["n_params"]
    ours = {"eval_real": model(real), "eval_fake": model(fake)}
    ours["hinge_d_loss"] = discriminator_loss(ours["eval_real"], ours["eval_fake"])
    ours["g_loss"] = generator_loss(ours["eval_fake"])
    ours |= {"train_real": model.train()(real), "train_fake": model(fake)}
    ours |= {f"after_two_calls:{key}": value for key, value in model.named_buffers() if "running" in key}
    assert set(case["outputs"]) - {"vanilla_d_loss"} == ours.keys()
    model = golden_discriminator(case).double()
    ours |= {"eval_real@f64": model(real.double()), "eval_fake@f64": model(fake.double())}
    for key, value in ours.items():
        atol = 1e-9 if "@f64" in key else 2e-5
        torch.testing.assert_close(value, tensor(ARCHIVE, f"{name}/{key}"), atol=atol, rtol=atol)


def test_the_discriminator_has_the_published_initial_weights():
    torch.manual_seed(0)
    weights = [p.detach() for key, p in PatchDiscriminator().named_parameters() if key.endswith("weight")]
    for weight in weights:
        assert abs(weight.mean() - float(weight.ndim == 1)) < 5 * 0.02 / weight.numel() ** 0.5
        assert abs(weight.std() / 0.02 - 1) < 5 / (2 * weight.numel()) ** 0.5


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms_and_its_scale_saves_fp16():
    w, c = torch.ones(4, requires_grad=True), torch.tensor([3.0, 0.0, 4.0, 0.0])
    weight = adaptive_gan_weight(7 * (w * c).sum(), 0.5 * (w * c).sum(), w)
    torch.testing.assert_close(weight, torch.tensor(35.0 / (2.5 + 1e-4)))  # float32
    assert not weight.requires_grad and adaptive_gan_weight((w * c).sum(), 1e-9 * w.sum(), w) == 1e4
    half = torch.ones(4, dtype=torch.float16, requires_grad=True)
    weight = adaptive_gan_weight((300 * half).sum(), half.sum(), half)  # squares of 300 overflow float16
    torch.testing.assert_close(weight, torch.tensor(600 / (2 + 1e-4)))
    with torch.no_grad():
        assert adaptive_gan_weight((w * c).sum(), w.sum(), w) == 0
    # a mean over 2**26 values of fp16 has gradients of 1.5e-8, which round to 0 without a scale
    w, x = torch.tensor([0.5], requires_grad=True), torch.full((1000,), 0.25)
    nll, g_loss = ((w.half() * x.half()).float().sum() / num for num in (2.0**26, 2.0**10))
    wanted = 250 / 2**26 / (250 / 2**10 + 1e-4)
    for scale, exact in ((1.0, False), (2.0**10, True)):
        assert (abs(adaptive_gan_weight(nll, g_loss, w, scale=scale) - wanted) < 0.01 * wanted) == exact


def test_loss_terms_on_published_and_hand_made_numbers_and_in_float32_whatever_the_networks_return():
    for name in cases_with("logits_real"):
        real, fake = (tensor(ARCHIVE, f"{name}/logits_{kind}") for kind in ("real", "fake"))
        check({"hinge_d_loss": discriminator_loss(real, fake)}, name)
    x, x_hat = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    posterior = Posterior(torch.full((2, 4, 2, 2), 2.0), torch.zeros(2, 4, 2, 2))  # KL 4/2 per element
    loss, terms = vae_loss(x, x_hat, posterior, lpips=lambda a, b: (a - b).abs().amax(dim=(1, 2, 3)),
                           lpips_weight=2.0, kl_weight=0.01)
    assert terms == {"rec": 0.5, "lpips": 0.5, "kl": 32.0}
    torch.testing.assert_close(loss, torch.tensor(0.5 + 2 * 0.5 + 0.01 * 32))
    x, x_hat, moments = x.bfloat16(), torch.rand(2, 3, 4, 4).bfloat16(), torch.randn(2, 2, 4, 2, 2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = vae_loss(x, x_hat, Posterior(*moments), rec="l2", kl_weight=1e-3)
    exact = vae_loss(x.float(), x_hat.float(), Posterior(*moments.float()), rec="l2", kl_weight=1e-3)
    torch.testing.assert_close((loss, terms), exact, atol=0, rtol=0)  # dtypes too
    assert terms["rec"] == x_hat.float().square().mean() and terms["lpips"] == 0


@pytest.mark.parametrize("name", cases_with("hidden"))
def test_the_parts_of_the_complete_ldm_objective_equal_the_published_ones(name):
    """LDM sums rec + LPIPS over pixels and channels, and weighs the GAN by gradient norms."""
    case, cfg, lpips = CASES[name], CASES[name]["config"], golden_lpips(MANIFEST, CASES[name])
    get = {key: tensor(ARCHIVE, f"{name}/{key}") for key in case["inputs"]}
    x, last = get["inputs"], get["last_layer_weight"].requires_grad_()
    posterior = Posterior(*F.conv2d(get["enc_hidden"], get["enc_last_layer_weight"], padding=1).chunk(2, 1))
    hidden = F.conv2d(posterior.sample(eps=get["noise"]), get["mid_weight"])
    x_hat = F.conv2d(get["hidden"] + F.interpolate(hidden, scale_factor=8), last, padding=1)
    terms = vae_loss(x, x_hat, posterior, lpips=lpips)[1]
    rec = terms["rec"] + cfg.get("perceptual_weight", 1.0) * terms["lpips"]
    logvar = tensor(ARCHIVE, next(f"{name}/{key}" for key in case["outputs"] if key.endswith("/logvar")))
    nll = x[0].numel() * (rec / logvar.exp() + logvar)
    for mode, _, kind, prefix in groups(name):
        if kind != "disc":
            g_loss = generator_loss(golden_discriminator(case).train(mode == "train")(x_hat))
            check({"kl_loss": terms["kl"], "nll_loss": nll, "rec_loss": rec, "g_loss": g_loss,
                   "d_weight": cfg["disc_weight"] * adaptive_gan_weight(nll, g_loss, last)}, name, prefix)


@pytest.mark.parametrize("name", cases_with("moments"))
def test_the_complete_repa_e_objective_is_vae_loss_plus_gan(name):
    case, cfg, lpips = CASES[name], CASES[name]["config"]["losses"], golden_lpips(MANIFEST, CASES[name])
    x, x_hat = tensor(ARCHIVE, f"{name}/inputs"), tensor(ARCHIVE, f"{name}/reconstructions").requires_grad_()
    posterior = Posterior(*tensor(ARCHIVE, f"{name}/moments").chunk(2, dim=1))
    # the published code scales images in [-1, 1] a second time; a switch we do not offer
    loss, terms = vae_loss(x, x_hat, posterior, cfg["reconstruction_loss"], lambda a, b:
                           lpips(2 * a - 1, 2 * b - 1), cfg["perceptual_weight"], cfg["kl_weight"])
    rec = cfg["reconstruction_weight"] * terms["rec"] / math.exp(cfg["logvar_init"])
    perceptual, kl = cfg["perceptual_weight"] * terms["lpips"], cfg["kl_weight"] * terms["kl"]
    torch.testing.assert_close(loss, terms["rec"] + perceptual + kl)
    for mode, step, kind, prefix in groups(name):
        model = golden_discriminator(case).train(mode == "train")
        factor = cfg["discriminator_factor"] * (step >= cfg["discriminator_start"])
        if kind == "disc":
            d_loss = factor * discriminator_loss(model(x), model(x_hat.detach()))
            ours = {"discriminator_loss": d_loss}
            if not cfg["lecam_regularization_weight"]:  # LeCAM has a part in the gradient
                ours["d_total_d_main.0.weight"], = torch.autograd.grad(d_loss, model.main[0].weight)
        else:
            g_loss = generator_loss(model(x_hat))
            total = rec + perceptual + kl + cfg["discriminator_weight"] * factor * g_loss
            grad, = torch.autograd.grad(total, x_hat, retain_graph=True)
            ours = {"total": total, "reconstruction_loss": rec, "perceptual_loss": perceptual, "kl_loss": kl,
                    "gan_loss": g_loss, "d_total_d_reconstructions": grad}
        check(ours, name, prefix)


@pytest.mark.parametrize("skipped", [False, True])
def test_batch_norm_in_groups_is_plain_batch_norm_of_each_group(skipped):
    """Outputs, gradients, names; statistics move once a step by the mean over its groups, unless skipped."""
    torch.manual_seed(0)
    plain, x = PatchDiscriminator(ndf=8), torch.randn(12, 3, 32, 32)
    grouped = GroupBatchNorm2d.convert(copy.deepcopy(plain), 4)
    start = {key: value.clone() for key, value in plain.state_dict().items()}
    torch.testing.assert_close(dict(grouped.state_dict()), start, atol=0, rtol=0)
    for layer in plain.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # running statistics are the mean over all calls
    logits = torch.cat([plain(part) for part in x.split(4)])
    ours = torch.cat([grouped(x[:8]), grouped(x[8:])])  # two micro-batches
    torch.testing.assert_close(ours, logits)
    gradients = [torch.autograd.grad(out.square().sum(), list(model.parameters()))
                 for out, model in ((ours, grouped), (logits, plain))]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    for _ in range(2):  # the second time there is nothing new
        update_batch_norms(grouped, torch.tensor(skipped))
    state, moved = grouped.state_dict(), [key for key in start if "running" in key]
    assert len(moved) == 6 and state["main.3.num_batches_tracked"] == (not skipped)
    for key in moved:
        mean = plain.state_dict()[key]
        torch.testing.assert_close(state[key], start[key] if skipped else start[key].lerp(mean, 0.1))
    plain.load_state_dict(state)
    assert torch.equal(grouped.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("call, exception, word", [
    (lambda _: LPIPS("none.pth"), ValueError, "none.pth"),
    (lambda _: LPIPS(None), FileNotFoundError, "hub.*--lpips-weights FILE.*--lpips 0"),
    (lambda _: LPIPS(__file__), ValueError, "not torchvision's"),
    (lambda folder: LPIPS(save(folder / "a", {"features.0.bias": torch.ones(64)})), ValueError, "not torch"),
    (lambda _: vae_loss(*torch.zeros(2, 3, 4), Posterior(*torch.zeros(2, 1)), "mse"), ValueError, "'l1'")])
def test_wrong_inputs_are_refused(call, exception, word, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # whatever this machine has
    with pytest.raises(exception, match=word):
        call(tmp_path)
