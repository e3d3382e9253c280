"""Distances between sets of images: golden numbers, closed forms, brute force, invariances, and the commands.

    pytest tests/test_fid.py          about 30 s on 2 CPU cores, half of it Inception at 299 px
"""
import copy
import functools
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, fill_by_name, read_fixture, tensor
from PIL import Image
from small import pictures, small_vae, small_vae_checkpoint

import checkpoints
import data
import fid
import inception
import losses
from shapes.scenes import Shapes

METRICS, NUMBERS = read_fixture("metrics")
INCEPTION, ACTIVATIONS = read_fixture("inception")
KINDS = sorted({(case, key.split("/")[1]) for case in INCEPTION["cases"] for key in ACTIVATIONS.files
                if key.startswith(case + "/") and key.count("/") == 2})
JUDGE = ["--features", "shapes", "--device", "cpu", "--workers", "0"]
TOLERANCE = {"sfid": 5e-5, "softmax": 1e-7, "softmax_unbiased": 1e-7}  # README's table; the others 2e-5
TAPS = {"Pool1": "64", "Pool2": "192", "Mixed_6e": "768", "Mixed_7c": "2048"}  # the fixture has their means


def stats_of(x, batch=64, **meta):
    """Statistics of features x (n, D), streamed in batches; the features are kept."""
    stats = fid.FeatureStats(meta)
    for part in torch.as_tensor(x).split(batch):
        stats.update({"features": part})
        stats.keep({"features": part}, ["features"])
    return stats.finish()


def distance(a, b):
    return fid.frechet_distance(*a.moments["features"], *b.moments["features"])


def gaussian(n, dim, seed, scale=1.0, shift=0.0):
    return scale * np.random.default_rng(seed).standard_normal((n, dim)) + shift


# golden numbers

@pytest.mark.parametrize("name", METRICS["cases"])
def test_frechet_distance_equals_the_published_codes(name):
    a, b = stats_of(NUMBERS[f"{name}/ref"]), stats_of(NUMBERS[f"{name}/sample"])
    rel = 1e-3 if min(a.n, b.n) <= a.meta["dimensions"] else 1e-6
    for key in ("fd_pytorch_fid", "fd_adm", "fd_torch_fidelity"):
        assert distance(a, b) == pytest.approx(float(NUMBERS[f"{name}/{key}"]), rel=rel)


@pytest.mark.parametrize("name", METRICS["cases"])
@pytest.mark.parametrize("block", [64, 1000])
def test_precision_and_recall_equal_the_exact_definition_and_almost_adms(name, block):
    ref, sample = tensor(NUMBERS, f"{name}/ref"), tensor(NUMBERS, f"{name}/sample")
    for k in (3, 5):
        precision, recall = fid.precision_recall(ref, sample, k, block)
        assert precision == pytest.approx(float(NUMBERS[f"{name}/exact_precision_k{k}"]), abs=1e-6)
        assert recall == pytest.approx(float(NUMBERS[f"{name}/exact_recall_k{k}"]), abs=1e-6)
    flips = METRICS["cases"][name]["adm_float16_vs_exact"]  # decisions that ADM's fp16 distances change
    precision, recall = fid.precision_recall(ref, sample, block=block)
    for value, key, changed in ((precision, "adm_precision", flips["sample_inside_flips"] / len(sample)),
                                (recall, "adm_recall", flips["ref_covered_flips"] / len(ref))):
        assert value == pytest.approx(float(NUMBERS[f"{name}/{key}"]), abs=changed + 1e-6)


@pytest.mark.parametrize("name", METRICS["cases"])
def test_kernel_distance_equals_torch_fidelity(name):
    ref, sample = tensor(NUMBERS, f"{name}/ref"), tensor(NUMBERS, f"{name}/sample")
    kid = METRICS["cases"][name]["kid"]
    values = fid.kernel_distance(ref, sample, kid["kid_subsets"], kid["kid_subset_size"], kid["rng_seed"])
    for value, key in zip(values, ("kid_mean", "kid_std")):
        assert value == pytest.approx(float(NUMBERS[f"{name}/{key}"]), rel=2e-5, abs=1e-6)  # fp32 there
        assert value == pytest.approx(float(NUMBERS[f"{name}/{key}_float64_input"]), rel=1e-9)
    n = min(len(ref), len(sample))
    whole, spread = fid.kernel_distance(ref[:n], sample[:n], subsets=1, subset_size=n)
    assert whole == pytest.approx(float(NUMBERS[f"{name}/mmd2_first_rows"]), rel=1e-9) and spread == 0


@pytest.mark.parametrize("name", [name for name in METRICS["cases"] if f"{name}/is_features" in NUMBERS])
def test_inception_score_equals_adm_and_torch_fidelity(name):
    logits = tensor(NUMBERS, f"{name}/is_features") @ tensor(NUMBERS, f"{name}/is_weight")
    found = [re.fullmatch(rf"{name}/is_(adm_split|torch_fidelity_splits)(\d+)(?:_ordered_mean)?", key)
             for key in NUMBERS.files]
    for match in filter(None, found):  # ADM's by images in a split, torch-fidelity's by number of splits
        size = int(match[2]) if match[1] == "adm_split" else len(logits) // int(match[2])
        mean, std = fid.inception_score(logits, size)
        assert mean == pytest.approx(float(NUMBERS[match[0]]), rel=1e-6)
        if match[1] != "adm_split":
            stored = float(NUMBERS[match[0].replace("mean", "std")])
            assert std == pytest.approx(stored, rel=1e-5, abs=1e-6)
    assert len({match[1] for match in found if match}) == 2


@functools.cache
def network(table):
    """Return Inception with a table of weights, filled as the manifest says."""
    import timm  # noqa: F401  (torch 2.6 cannot import it under the device "meta")
    with torch.device("meta"):
        net = inception.FIDInception()
    return fill_by_name(net.to_empty(device="cpu").eval(), INCEPTION, table, ACTIVATIONS)


@pytest.mark.parametrize("name, kind", KINDS)
@pytest.mark.parametrize("variant", ["fp32", "fp64", "fused"])
def test_inception_activations_equal_the_published_ports(name, kind, variant):
    dtype = torch.float64 if variant == "fp64" else torch.float32
    net = network(INCEPTION["cases"][name]["tensors"]).to(dtype)
    net = inception.fuse(copy.deepcopy(net)) if variant == "fused" else net
    net.resize = kind.replace("_", "-")
    with torch.no_grad():
        images = tensor(ACTIVATIONS, f"{name}/images_u8").permute(0, 3, 1, 2)
        out = net(images)
        x = net.preprocess(images)
        resized = x[:, :, ::13, ::13]
        out |= {TAPS[layer]: y.mean((2, 3)) for layer, y in net.activations(x) if layer in TAPS}
    out["sfid"], out["logits_unbiased"] = out["spatial"].view(-1, 17, 17, 7), out["logits"]
    out["logits"] = out["logits"] + net.fc.bias.detach()
    out |= {key.replace("logits", "softmax"): out[key].softmax(1) for key in ("logits", "logits_unbiased")}
    out["resized_slice"] = resized * 128 + 128 if kind == "tf1" else (resized + 1) / 2
    stored = [key for key in ACTIVATIONS.files if key.startswith(f"{name}/{kind}/")]
    checked = 0
    for key in stored:
        output, _, exact = key.split("/")[-1].partition("@")
        if (exact == "f64") == (dtype == torch.float64):
            atol = 1e-9 if exact else TOLERANCE.get(output, 2e-5)
            np.testing.assert_allclose(out[output].numpy(), ACTIVATIONS[key], rtol=1e-6, atol=atol,
                                       err_msg=key)
            checked += 1
    assert checked == len([key for key in stored if ("@" in key) == (dtype == torch.float64)])


def test_inception_weights_load_from_a_file_as_published_and_nothing_else_does(tmp_path, monkeypatch, capsys):
    net = network(next(iter(INCEPTION["tensors"]))).float()
    state = {key: value for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "published.pth")  # the published file has no batch counters
    loaded = inception.Extractor("inception", tmp_path / "published.pth", "pytorch-fid").net
    assert loaded.resize == "pytorch-fid" and not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in state.items())
    torch.save({key: value for key, value in state.items() if key != "fc.bias"}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match="short.pth"):
        inception.load_inception(tmp_path / "short.pth")
    torch.save(net.state_dict(), tmp_path / "counted.pth")  # with counters, and torch's notes of versions
    monkeypatch.chdir(tmp_path)
    np.save("three.npy", Shapes(3).images)
    flags = "stats three.npy --resize pytorch-fid --device cpu --workers 0 --out s.npz".split()
    facts = [fid.main([*flags, "--features-weights", name]).meta for name in ("published.pth", "counted.pth")]
    assert facts[0] == facts[1] and facts[0]["resize"] == "pytorch-fid"
    digest = hashlib.sha256((tmp_path / "counted.pth").read_bytes()).hexdigest()
    assert f"counted.pth has sha256 {digest}, want" in capsys.readouterr().out


def test_inception_weights_are_fetched_once_into_the_cache_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    published, target = tmp_path / "elsewhere.pth", tmp_path / "checkpoints" / inception.INCEPTION_FILE
    published.write_bytes(b"weights")
    monkeypatch.setattr(inception, "INCEPTION_URL", published.as_uri())
    with pytest.raises(FileNotFoundError, match="hash"):  # its sha256 is not 6726825d
        inception.find_inception()
    assert not target.exists()
    monkeypatch.setattr(inception, "INCEPTION_SHA256", "9a129038")  # sha256 of b"weights"
    assert inception.find_inception() == target and target.read_bytes() == b"weights"
    published.unlink()
    assert inception.find_inception().unlink() is None  # from the cache
    with pytest.raises(FileNotFoundError, match=f"{inception.INCEPTION_FILE}.*github.com/mseitzer"):
        fid.main(["gfid", "shapes", "shapes", "--device", "cpu"])  # no file, no network: no random network


# closed forms

def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form_in_any_rotation():
    rng, zero = np.random.default_rng(0), np.zeros(50)
    mu1, mu2, a, b = rng.standard_normal(50), rng.standard_normal(50), rng.random(50), 5 * rng.random(50)
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert fid.frechet_distance(mu1, np.diag(a), mu2, np.diag(b)) == pytest.approx(
        ((mu1 - mu2) ** 2).sum() + expected, rel=1e-9)
    q, _ = np.linalg.qr(rng.standard_normal((50, 50)))
    assert fid.frechet_distance(zero, q * a @ q.T, zero, q * b @ q.T) == pytest.approx(expected, rel=1e-7)


# statistics

@pytest.mark.parametrize("batch", [1, 13, 500])
def test_streaming_statistics_equal_numpy_in_one_piece(batch):
    x = gaussian(200, 12, 6, 3, 100).astype(np.float32)  # far from 0: fp32 sums would lose digits
    stats = stats_of(x, batch)
    mean, cov = stats.moments["features"]
    assert stats.n == 200
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-8, atol=1e-9)


def test_two_processes_measure_what_one_does(small_set, tmp_path):
    folder, shapes = small_set
    samples = str(tmp_path / "odd.npz")  # unequal shares
    data.save_npz(samples, shapes.images[:141], shapes.labels[:141])
    command = ["gfid", str(folder / "pictures"), samples, *JUDGE, "--image-size", "32", "--train", samples]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, str(ROOT / "fid.py"), *command, "--out", str(tmp_path / "two.json")],
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("FD-judge-141 vs pictures-300") == 1
    one = fid.main([*command, "--batch-size", "37", "--out", str(tmp_path / "one.json")])["sets"][samples]
    two = json.loads((tmp_path / "two.json").read_text())["sets"][samples]
    assert one.pop("samples") == two.pop("samples")
    assert two == pytest.approx(one, rel=1e-5, abs=1e-5)


def test_statistics_survive_a_file(tmp_path):
    stats = stats_of(gaussian(50, 6, 10), name="noise-50", extractor="none", image_size=32)
    stats.save(tmp_path / "stats.npz")
    again = fid.FeatureStats.load(tmp_path / "stats.npz")
    assert again.n == 50 and again.meta == stats.meta
    for mine, theirs in zip(stats.moments["features"], again.moments["features"]):
        assert (mine == theirs).all()
    assert torch.equal(again.kept["features"], stats.kept["features"])


@pytest.mark.parametrize("key", ["extractor", "resize", "weights", "image_size"])
def test_statistics_that_were_measured_differently_are_not_compared(key):
    a, b = (stats_of(gaussian(9, 4, 0), name=name, **{key: name}) for name in ("left", "right"))
    with pytest.raises(ValueError, match=f"{key}.*left has left, right has right"):
        fid.gfid(a, b)


def test_adm_reference_is_compared_without_its_number_of_images(tmp_path):
    x, s = gaussian(90, 6, 11), gaussian(90, 5, 12)
    np.savez(tmp_path / "VIRTUAL_x.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False), mu_s=s.mean(0),
             sigma_s=np.cov(s, rowvar=False))
    reference = fid.FeatureStats.load(tmp_path / "VIRTUAL_x.npz")
    assert reference.meta == {"name": "VIRTUAL_x", "extractor": "inception", "resize": "tf1", "dimensions": 6}
    samples = fid.FeatureStats({"extractor": "inception", "resize": "tf1", "weights": "aa"})
    samples.update({"features": torch.from_numpy(x), "spatial": torch.from_numpy(s + 1)})
    result = fid.gfid(reference, samples.finish())
    assert abs(result["fd"]) < 1e-6 and result["sfid"] == pytest.approx(5) and result["n"] == 90


# nearest neighbours, by brute force

@pytest.mark.parametrize("block", [4, 1000])
def test_nearest_images_equal_brute_force_and_find_planted_copies(block):
    train, points = gaussian(30, 5, 24), gaussian(20, 5, 25)
    points[:8] = train[10:18] + 1e-3
    squares = ((points[:, None] - train) ** 2).sum(2)
    distances, indices = fid.nearest(torch.from_numpy(points), torch.from_numpy(train), 3, block)
    np.testing.assert_allclose(distances, np.sort(squares, 1)[:, :3], atol=1e-12)
    assert (indices.numpy() == np.argsort(squares, 1)[:, :3]).all()
    own = ((train[:, None] - train) ** 2).sum(2) + 1e9 * np.eye(30)
    expected = np.sqrt(squares.min(1) / own.min(1)[squares.argmin(1)])
    ratio, indices = fid.closer_than_training(torch.from_numpy(train), torch.from_numpy(points), k=2)
    np.testing.assert_allclose(ratio, expected, rtol=1e-6)
    assert (ratio[:8] < 0.01).all() and indices[:8, 0].tolist() == [*range(10, 18)]
    twice = torch.from_numpy(np.concatenate([gaussian(40, 2048, 28)] * 2) + 3)  # each training image twice
    assert (fid.closer_than_training(twice, twice[:20])[0] == 0).all()
    assert (fid.closer_than_training(twice, twice[:20] + 0.01)[0] > 1).all()


def test_ssim_equals_the_definition_at_one_window():
    rng = np.random.default_rng(18)
    x, y = rng.integers(0, 256, (2, 1, 3, 11, 11), dtype=np.uint8)  # one window per colour
    line = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5**2))
    w = np.outer(line, line) / np.outer(line, line).sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for a, b in zip(x[0].astype(float), y[0].astype(float)):
        ma, mb = (w * a).sum(), (w * b).sum()
        va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
        values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    assert fid.ssim(x, y).item() == pytest.approx(np.mean(values), abs=1e-5)
    assert fid.ssim(x, x).item() == pytest.approx(1, abs=1e-5)


# measuring, on the embedded set and by its judge

def amplifier(gain):
    """A VAE whose reconstruction of x is gain * x."""
    return SimpleNamespace(encode=lambda x: SimpleNamespace(mode=lambda: x), decode=lambda z: gain * z)


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """An embedded set of which the judge sees all in a second."""
    monkeypatch.setattr(data, "SHAPES_NUM", {"train": 1000, "val": 400})


@pytest.fixture(scope="module")
def judge():
    return fid.load_extractor("shapes")


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    """300 images of the training split: (folder, data set); as npz with labels and as a folder of PNGs."""
    folder, shapes = tmp_path_factory.mktemp("small"), Shapes(300, 5, "train")
    data.save_npz(folder / "samples.npz", shapes.images, shapes.labels)
    (folder / "pictures").mkdir()
    for i, image in enumerate(shapes.images):
        Image.fromarray(image).save(folder / "pictures" / f"{i:03d}.png")
    return folder, shapes


def test_equal_images_are_at_distance_zero_and_lpips_alone_sees_more_than_eight_bits(judge):
    same = fid.rfid(data.eval_loader(Shapes(200, 0, "val"), 64), amplifier(1), judge)
    assert abs(same["fd"]) < 1e-3 and (same["psnr_db"], same["n"]) == (100, 200)

    def lpips(x, x_hat):
        assert x_hat.abs().max() > 2
        return (x - x_hat).abs().mean((1, 2, 3))
    shapes = Shapes(20, 0, "val")
    result = fid.rfid(data.eval_loader(shapes, 20), amplifier(3), judge, lpips=lpips)
    x = shapes.images.astype(np.float64)
    clipped = np.clip(np.rint(3 * (x - 127.5) + 127.5), 0, 255)
    mse = ((x - clipped) ** 2).mean((1, 2, 3))
    assert result["psnr_db"] == pytest.approx((10 * np.log10(255**2 / mse)).mean(), abs=0.01)
    assert result["lpips"] == pytest.approx(2 * np.abs(x / 127.5 - 1).mean(), rel=1e-4)


def test_any_function_extracts_features_and_some_of_a_reference_are_kept():
    def extractor(images_u8):
        return {"features": images_u8.float().mean((2, 3))}
    a = fid.compute_stats(data.eval_loader(Shapes(60, 0, "val"), 16), extractor, every=7, keep=("features",))
    b = fid.compute_stats(data.eval_loader(Shapes(60, 1, "val"), 16), extractor)
    result = fid.gfid(a, b)
    assert result["n"] == 60 and result["fd"] > 0 and "class_accuracy" not in result
    assert result["reference_features"] == 9 and [*a.kept] == ["features"]  # images 0, 7, ... 56


@torch.no_grad()
def test_dinov2_gives_the_class_token_at_224_px(tmp_path, monkeypatch):
    """FD-DINOv2 (arXiv:2306.04675) by the smallest of the family; the file has positions for 518 px."""
    import timm
    name, create = "vit_small_patch14_dinov2.lvd142m", timm.create_model
    torch.save(create(name, depth=1).state_dict(), tmp_path / "dino.pth")
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, depth=1, **kwargs))
    extractor, images = fid.load_extractor(name, tmp_path / "dino.pth"), Shapes(2).batch([0, 1])["images"]
    x = torch.nn.functional.interpolate(images.float() / 255, size=224, mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    tokens = extractor.net.forward_features((x.clamp(0, 1) - mean) / std)  # ImageNet's
    assert tokens.shape == (2, 1 + 16 * 16, 384) and extractor.label == f"FD-{name}"
    torch.testing.assert_close(extractor(images)["features"], tokens[:, 0])


# commands

def test_gfid_prints_a_block_per_set_and_writes_its_protocol(small_set, tmp_path, capsys):
    folder, shapes = small_set
    few = tmp_path / "few.npz"
    data.save_npz(few, shapes.images[:50], shapes.labels[:50])
    sources = [str(folder / "samples.npz"), str(few)]
    result = fid.main(["gfid", "shapes", *sources, *JUDGE, "--out", str(tmp_path / "out" / "gfid.json")])
    text = capsys.readouterr().out
    for source, n in zip(sources, (300, 50)):
        numbers = result["sets"][source]
        assert re.search(rf"^FD-judge-{n} vs shapes-val-400: {re.escape(source)}\n  n +{n}\n  fd +"
                         rf"{numbers['fd']:.7g}\n", text, re.M)
    assert text.count("warning") == 1 and "n = 50 images < D = 128" in text
    protocol = json.loads((tmp_path / "out" / "gfid.json").read_text())
    assert protocol["sets"] == result["sets"] and protocol["args"]["samples"] == sources
    expected = {"extractor": "shapes", "image_size": 32, "n": 400, "split": "val", "name": "shapes-val-400"}
    assert protocol["reference"].items() >= expected.items()
    assert {"precision", "recall", "kid", "class_accuracy"} <= {*protocol["sets"][sources[0]]}


def test_a_warning_says_that_class_ordered_samples_have_a_low_inception_score(tmp_path, monkeypatch, capsys):
    """The number is ADM's: of 5,000 consecutive images."""
    def extractor(images_u8):
        number = images_u8[:, 0, 0, 0].long()
        return {"features": torch.rand(len(number), 3), "logits": 40 * torch.eye(10)[number]}
    extractor.meta, extractor.label, labels = {}, "FID", np.arange(10_000) % 10
    monkeypatch.setattr(fid, "load_extractor", lambda *_: extractor)
    monkeypatch.setattr(fid, "precision_recall", lambda *_: (0, 0))
    monkeypatch.chdir(tmp_path)
    np.save("few.npy", np.zeros((50, 2, 2, 3), np.uint8))
    for name, order in (("mixed", labels), ("runs", np.sort(labels))):
        np.savez(name, np.tile(order.astype("u1")[:, None, None, None], (1, 2, 2, 3)), order.astype(">u2"))
    sets = fid.main(["gfid", "few.npy", "mixed.npz", "runs.npz", *JUDGE])["sets"]
    assert capsys.readouterr().out.count("labels come in runs") == 1
    for name, score in (("mixed", 10), ("runs", 5)):
        assert sets[f"{name}.npz"]["inception_score"] == pytest.approx(score, rel=1e-3)
        assert ("labels_in_runs" in sets[f"{name}.npz"]) == (name == "runs")
    assert json.loads(Path("out/gfid.json").read_text())["sets"]["runs.npz"]["labels_in_runs"]


def test_class_accuracy_is_of_the_embedded_set_alone(small_set, tmp_path):
    flags = [*JUDGE, "--out", str(tmp_path / "out.json")]
    arrays, folders = (str(small_set[0] / name) for name in ("samples.npz", "pictures"))
    sets = fid.main(["gfid", "shapes", "shapes", arrays, folders, *flags])["sets"]
    assert sets["shapes"]["class_accuracy"] > 0.97 and sets[arrays]["class_accuracy"] > 0.97
    assert "class_accuracy" not in sets[folders]
    assert "class_accuracy" not in fid.main(["gfid", folders, arrays, *flags])["sets"][arrays]


def test_train_finds_planted_copies_names_their_share_and_draws_them(small_set, tmp_path):
    train, unseen = data.open_dataset("shapes", 32, "train"), Shapes(100, 77, "val")
    noisy = train.images[900:940].astype(int) + np.random.default_rng(0).integers(-3, 4, (40, 32, 32, 3))
    copies = np.concatenate([noisy.clip(0, 255).astype(np.uint8), unseen.images[:60]])
    for name, images in (("copied", copies), ("unseen", unseen.images)):
        data.save_npz(tmp_path / f"{name}.npz", images, np.zeros(len(images), int))
    sources = [str(tmp_path / f"{name}.npz") for name in ("copied", "unseen")]
    flags = [*JUDGE, "--train", "shapes", "--out", str(tmp_path / "a.json")]
    sets = fid.main(["gfid", "shapes", *sources, *flags])["sets"]
    copied, clean = (sets[source]["closer_than_training"] for source in sources)
    assert 0.3 < clean < 0.7 and copied == pytest.approx(0.4 + 0.6 * clean, abs=0.1)
    picture = np.asarray(Image.open(tmp_path / "a.png"))[::2, ::2].reshape(20, 32, 5, 32, 3).swapaxes(1, 2)
    for sample, first, *_ in picture[:10]:  # a planted copy, the image that it copies, ...
        assert abs(sample.astype(int) - first).max() <= 3


def test_statistics_of_a_folder_are_a_reference_at_distance_zero_of_it(small_set, tmp_path, capsys):
    folder, _ = small_set
    arrays, folders = str(folder / "samples.npz"), str(folder / "pictures")

    def run(command, *sources, out="zero.json"):
        return fid.main([command, *sources, *JUDGE, "--image-size", "32", "--out", str(tmp_path / out)])
    run("stats", folders, out="ref.npz")
    sets = run("gfid", str(tmp_path / "ref.npz"), folders, arrays)["sets"]
    for numbers in sets.values():
        assert abs(numbers["fd"]) < 1e-3 and numbers["precision"] == numbers["recall"] == 1
    assert capsys.readouterr().out.count("FD-judge-300 vs pictures-300") == 2
    mu, sigma = fid.FeatureStats.load(tmp_path / "ref.npz").moments["features"]
    np.savez(tmp_path / "plain.npz", mu=mu, sigma=sigma)  # as pytorch-fid's
    assert abs(run("gfid", str(tmp_path / "plain.npz"), arrays)["sets"][arrays]["fd"]) < 1e-3
    assert "does not say how it was measured" in capsys.readouterr().out
    np.savez(tmp_path / "VIRTUAL.npz", mu=mu, sigma=sigma, arr_0=np.load(arrays)["arr_0"][:200])  # as ADM's
    result = run("gfid", str(tmp_path / "VIRTUAL.npz"), arrays)
    numbers = result["sets"][arrays]
    assert abs(numbers["fd"]) < 1e-3 and result["reference"]["n"] is None
    assert numbers["reference_features"] == 200 and result["reference"]["image_size"] == 32


def test_rfid_command_reports_psnr_ssim_and_the_originals(small_set, tmp_path, capsys):
    folder, _ = small_set
    vae = small_vae()
    checkpoint = str(small_vae_checkpoint(tmp_path / "vae", vae))
    result = fid.main(["rfid", str(folder / "samples.npz"), "--vae", checkpoint, "--no-lpips", *JUDGE,
                       "--out", str(tmp_path / "rfid.json")])
    text = capsys.readouterr().out
    assert re.search(r"^rFD-judge-300 vs originals of samples-300, split unknown$", text, re.M)
    assert result["psnr_db"] < fid.LOW_PSNR and "verdict: below 22 dB" in text
    x = data.to_float(Shapes(300, 5, "train").batch(range(300))["images"])
    with torch.no_grad():
        x_hat = vae.decode(vae.encode(x).mode())
    assert result["psnr_db"] == pytest.approx(data.psnr(data.to_uint8(x_hat), data.to_uint8(x)).mean().item())
    protocol = json.loads((tmp_path / "rfid.json").read_text())
    assert {"n", "fd", "psnr_db", "ssim"} <= {*protocol} and "lpips" not in protocol
    assert protocol["vae_hash"] == checkpoints.state_hash(vae.state_dict())
    torch.save(losses.LPIPS("random").features.state_dict(prefix="features."), tmp_path / "vgg16.pth")
    root = pictures(tmp_path / "val", n=6, classes=0, size=48)
    checkpoint = str(small_vae_checkpoint(tmp_path / "vae", vae, image_size=32))  # folders are cropped to it
    result = fid.main(["rfid", str(root), "--vae", checkpoint, *JUDGE, "--lpips-weights",
                       str(tmp_path / "vgg16.pth"), "--out", str(tmp_path / "lpips.json")])
    assert "6 images of 32 px" in (text := capsys.readouterr().out) and "of val-6, split val\n" in text
    assert result["reference"]["images_hash"] == data.ImageFolder(root, 32).images_hash
    x = data.to_float(data.ImageFolder(root, 32).batch(range(6))["images"])
    with torch.no_grad():
        expected = losses.LPIPS(tmp_path / "vgg16.pth")(x, vae.decode(vae.encode(x).mode())).mean().item()
    assert result["lpips"] == pytest.approx(expected, rel=1e-4)


def fill(folder):
    """Write the wrong files of REFUSALS."""
    images = np.zeros((5, 32, 32, 3), np.uint8)
    data.save_npz(folder / "samples" / "cfg1" / "samples.npz", images, np.arange(5))
    data.save_grid(folder / "samples" / "grid.png", images, 5)
    stats = stats_of(gaussian(9, 128, 0), name="theirs", extractor="inception", resize="tf1")
    stats.save(folder / "theirs.npz")
    (folder / "cut.npz").write_bytes((folder / "theirs.npz").read_bytes()[:-300])
    np.save(folder / "small.npy", images)
    np.save(folder / "wide.npy", np.zeros((5, 64, 64, 3), np.uint8))
    np.savez(folder / "ADM.npz", mu=np.zeros(4), sigma=np.eye(4), arr_0=images)  # holds images, too
    np.savez(folder / "torn.npz", mu=np.zeros(4), sigma=np.eye(3))
    nan = small_vae()
    nan.decoder.conv_out.bias.data[1] = torch.nan
    small_vae_checkpoint(folder / "nan", nan)


REFUSALS = [  # id, call, exception, key word
    ("reference not there", ["gfid", "nowhere", "shapes"], FileNotFoundError, "nowhere"),
    ("samples not there", ["gfid", "shapes", "nowhere.npz"], ValueError, "nowhere.npz"),
    ("damaged npz", ["gfid", "cut.npz", "shapes"], ValueError, "cut.npz"),
    ("statistics as originals", ["rfid", "theirs.npz", "--vae", "none"], ValueError, "theirs.npz"),
    ("reference as originals", ["rfid", "ADM.npz", "--vae", "none"], ValueError, "ADM.npz.*gfid"),
    ("no statistics", ["gfid", "torn.npz", "shapes"], ValueError, "torn.npz"),
    ("black pictures", ["rfid", "small.npy", "--vae", "nan"], ValueError, "not finite"),
    ("out is a folder", ["stats", "small.npy", "--out", "samples"], ValueError, "--out"),
    ("another network's statistics", ["gfid", "theirs.npz", "shapes"], ValueError, "theirs has inception"),
    ("folder of sample.py", ["gfid", "shapes", "samples"], ValueError, "cfg1.samples.npz"),
    ("images of two sizes", ["gfid", "small.npy", "wide.npy"], ValueError, "image_size"),
    ("few images", lambda: fid.precision_recall(torch.ones(3, 2), torch.ones(9, 2)), ValueError, "3 each"),
    ("NaN", lambda: distance(*[stats_of(np.full((9, 4), np.nan))] * 2), ValueError, "finite"),
    ("Inception not there", lambda: inception.load_inception("absent.pth"), ValueError, "absent.pth"),
]


@pytest.mark.parametrize("call, exception, word", [line[1:] for line in REFUSALS],
                         ids=[line[0] for line in REFUSALS])
def test_wrong_input_is_one_clear_line(call, exception, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path)
    with pytest.raises(exception, match=word) as caught:
        call() if callable(call) else fid.main([*call, *JUDGE])
    assert "\n" not in str(caught.value)
