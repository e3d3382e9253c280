"""Distances between sets of images: golden numbers, closed forms, brute force, and the commands.

    pytest tests/test_fid.py          about 30 s on 2 CPU cores, half of it Inception at 299 px
"""
import copy
import functools
import json
import re

import numpy as np
import pytest
import torch
from conftest import fill_by_name, read_fixture, tensor
from PIL import Image
from ranks import run_job
from small import pictures, small_vae, small_vae_checkpoint

import checkpoints
import data
import fid
import inception
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
def test_distances_precision_and_recall_equal_the_published_codes(name):
    ref, sample = tensor(NUMBERS, f"{name}/ref"), tensor(NUMBERS, f"{name}/sample")
    a, b = stats_of(ref), stats_of(sample)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-6) and abs(distance(a, a)) < 1e-6
    rel = 1e-3 if min(a.n, b.n) <= a.meta["dimensions"] else 1e-6
    for key in ("fd_pytorch_fid", "fd_adm", "fd_torch_fidelity"):
        assert distance(a, b) == pytest.approx(float(NUMBERS[f"{name}/{key}"]), rel=rel)
    for k in (3, 5):
        precision, recall = fid.precision_recall(ref, sample, k, block=64)
        assert precision == pytest.approx(float(NUMBERS[f"{name}/exact_precision_k{k}"]), abs=1e-6)
        assert recall == pytest.approx(float(NUMBERS[f"{name}/exact_recall_k{k}"]), abs=1e-6)
    flips = METRICS["cases"][name]["adm_float16_vs_exact"]  # decisions that ADM's fp16 distances change
    precision, recall = fid.precision_recall(ref, sample)
    for value, key, changed in ((precision, "adm_precision", flips["sample_inside_flips"] / len(sample)),
                                (recall, "adm_recall", flips["ref_covered_flips"] / len(ref))):
        assert value == pytest.approx(float(NUMBERS[f"{name}/{key}"]), abs=changed + 1e-6)
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


@pytest.mark.parametrize("name, kind, variant", [
    *((*kind, "fp32") for kind in KINDS), *((*kind, "fp64") for kind in KINDS if kind[0] == "px64"),
    (*KINDS[0], "fused")])
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


def test_inception_weights_load_from_a_file_as_published(tmp_path, monkeypatch, capsys):
    net = network("inception").float()
    state = {key: value for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "published.pth")  # the published file has no batch counters
    loaded = inception.load_inception(tmp_path / "published.pth", "pytorch-fid")
    assert loaded.resize == "pytorch-fid" and not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in state.items())
    torch.save(net.state_dict(), tmp_path / "counted.pth")  # with counters, and torch's notes of versions
    monkeypatch.chdir(tmp_path)
    np.save("two.npy", Shapes(2).images)
    flags = "stats two.npy --features-weights counted.pth --resize pytorch-fid --device cpu --workers 0"
    facts = fid.main([*flags.split(), "--out", "s.npz"]).meta
    assert facts["weights"] == checkpoints.state_hash(state) and facts["resize"] == "pytorch-fid"


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


# statistics

def test_adm_reference_is_compared_without_its_number_of_images(tmp_path):
    """And sums are fp64: far from 0 those in fp32 would lose digits."""
    x, s = gaussian(90, 6, 11, 3, 100).astype(np.float32).astype(float), gaussian(90, 5, 12)
    np.savez(tmp_path / "VIRTUAL_x.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False), mu_s=s.mean(0),
             sigma_s=np.cov(s, rowvar=False))
    reference = fid.FeatureStats.load(tmp_path / "VIRTUAL_x.npz")
    assert reference.meta == {"name": "VIRTUAL_x", "extractor": "inception", "resize": "tf1", "dimensions": 6}
    samples = fid.FeatureStats({"extractor": "inception", "resize": "tf1", "weights": "aa"})
    for rows in np.split(np.arange(90), (13, 50)):
        samples.update({"features": torch.from_numpy(x[rows]).float(),
                        "spatial": torch.from_numpy(s[rows] + 1)})
    result = fid.gfid(reference, samples.finish())
    assert abs(result["fd"]) < 1e-6 and result["sfid"] == pytest.approx(5) and result["n"] == 90


# nearest neighbours, by brute force

def test_nearest_images_equal_brute_force_and_find_planted_copies():
    train, points = gaussian(30, 5, 24), gaussian(20, 5, 25)
    points[:8] = train[10:18] + 1e-3
    squares = ((points[:, None] - train) ** 2).sum(2)
    distances, indices = fid.nearest(torch.from_numpy(points), torch.from_numpy(train), 3, block=8)
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
    assert fid.ssim(x, x).item() == pytest.approx(1, abs=1e-5) and data.psnr(x, x).item() == 100


# measuring, on the embedded set and by its judge

@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """An embedded set of which the judge sees all in a second."""
    monkeypatch.setattr(data, "SHAPES_NUM", {"train": 600, "val": 200})


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    """The path of 150 images with labels as npz, and of the same as a folder of PNGs."""
    folder, shapes = tmp_path_factory.mktemp("small"), Shapes(150, 5, "train")
    data.save_npz(folder / "samples.npz", shapes.images, shapes.labels)
    (folder / "pictures").mkdir()
    for i, image in enumerate(shapes.images):
        Image.fromarray(image).save(folder / "pictures" / f"{i:03d}.png")
    return str(folder / "samples.npz"), str(folder / "pictures")


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

def test_two_processes_measure_what_one_does(small_set, tmp_path, capfd):
    samples, pictures = small_set
    odd = tmp_path / "odd.npz"  # unequal shares
    data.save_npz(odd, *(np.load(samples)[name][:141] for name in ("arr_0", "arr_1")))
    command = f"gfid {pictures} {odd} {' '.join(JUDGE)} --image-size 32 --train {odd} --out {tmp_path}"
    assert run_job(2, f"fid {command}/two.json", "") == [0, 0]
    assert capfd.readouterr().out.count("FD-judge-141 vs pictures-150") == 1
    one = fid.main([*f"{command}/one.json".split(), "--batch-size", "37"])["sets"][str(odd)]
    two = json.loads((tmp_path / "two.json").read_text())["sets"][str(odd)]
    assert one.pop("samples") == two.pop("samples")
    assert two == pytest.approx(one, rel=1e-5, abs=1e-5)


def test_gfid_prints_a_block_per_set_and_writes_its_protocol(small_set, tmp_path, monkeypatch, capsys):
    """Of the reference every second image is kept; class accuracy is of the embedded set alone."""
    monkeypatch.setattr(fid, "MAX_KEPT", 150)
    (samples, pictures), few = small_set, str(tmp_path / "few.npz")
    data.save_npz(few, *(np.load(samples)[name][:50] for name in ("arr_0", "arr_1")))
    sizes = {samples: 150, few: 50, pictures: 150, "shapes": 200}
    result = fid.main(["gfid", "shapes", *sizes, *JUDGE, "--out", str(tmp_path / "out" / "gfid.json")])
    text = capsys.readouterr().out
    for source, n in sizes.items():
        numbers = result["sets"][source]
        assert re.search(rf"^FD-judge-{n} vs shapes-val-200: {re.escape(source)}\n  n +{n}\n  fd +"
                         rf"{numbers['fd']:.7g}\n", text, re.M)
        assert {"precision", "recall", "kid"} <= {*numbers} and numbers["reference_features"] == 100
        assert numbers["samples"]["split"] == ("val" if source == "shapes" else "unknown")
        assert numbers.get("class_accuracy", source == pictures) > 0.97
    assert "class_accuracy" not in result["sets"][pictures]
    assert text.count("warning") == 1 and "n = 50 images < D = 128" in text
    protocol = json.loads((tmp_path / "out" / "gfid.json").read_text())
    assert protocol["sets"] == result["sets"] and protocol["args"]["samples"] == [*sizes]
    expected = {"extractor": "shapes", "image_size": 32, "n": 200, "split": "val", "name": "shapes-val-200"}
    assert protocol["reference"].items() >= expected.items()


def test_a_warning_says_that_class_ordered_samples_have_a_low_inception_score(capsys):
    """The number is ADM's: of 5,000 consecutive images."""
    stats, mixed = stats_of(gaussian(10_000, 3, 0)), torch.arange(10_000) % 10
    for labels, score, warnings in ((mixed, 10, 0), (mixed.sort().values, 5, 1)):
        stats.kept = {"logits": 40 * torch.eye(10)[labels], "labels": labels}
        result = fid.gfid(stats, stats)
        assert result["inception_score"] == pytest.approx(score, rel=1e-3)
        assert result.get("labels_in_runs", 0) == warnings
        assert capsys.readouterr().out.count("labels come in runs") == warnings


def test_train_finds_planted_copies_names_their_share_and_draws_them(tmp_path):
    train, unseen = data.open_dataset("shapes", 32, "train"), Shapes(100, 77, "val")
    noisy = train.images[500:540].astype(int) + np.random.default_rng(0).integers(-3, 4, (40, 32, 32, 3))
    copies = np.concatenate([noisy.clip(0, 255).astype(np.uint8), unseen.images[:60]])
    for name, images in (("copied", copies), ("unseen", unseen.images)):
        data.save_npz(tmp_path / f"{name}.npz", images, np.zeros(len(images), int))
    sources = [str(tmp_path / f"{name}.npz") for name in ("copied", "unseen")]
    flags = [*JUDGE, "--train", "shapes", "--out", str(tmp_path / "a.json")]
    sets = fid.main(["gfid", sources[1], *sources, *flags])["sets"]
    copied, clean = (sets[source]["closer_than_training"] for source in sources)
    assert 0.3 < clean < 0.7 and copied == pytest.approx(0.4 + 0.6 * clean, abs=0.1)
    picture = np.asarray(Image.open(tmp_path / "a.png"))[::2, ::2].reshape(20, 32, 5, 32, 3).swapaxes(1, 2)
    for sample, first, *_ in picture[:10]:  # a planted copy, the image that it copies, ...
        assert abs(sample.astype(int) - first).max() <= 3


def test_statistics_of_a_folder_are_a_reference_at_distance_zero_of_it(small_set, tmp_path, capsys):
    arrays, folder = small_set

    def run(command, *sources, out="zero.json"):
        return fid.main([command, *sources, *JUDGE, "--image-size", "32", "--out", str(tmp_path / out)])
    run("stats", folder, out="ref.npz")
    result = run("gfid", str(tmp_path / "ref.npz"), folder, arrays)
    for numbers in result["sets"].values():
        assert abs(numbers["fd"]) < 1e-3 and numbers["precision"] == numbers["recall"] == 1
        assert "class_accuracy" not in numbers and result["reference"]["n"] == 150
    assert capsys.readouterr().out.count("FD-judge-150 vs pictures-150") == 2
    mu, sigma = fid.FeatureStats.load(tmp_path / "ref.npz").moments["features"]
    np.savez(tmp_path / "plain.npz", mu=mu, sigma=sigma)  # as pytorch-fid's
    assert abs(run("gfid", str(tmp_path / "plain.npz"), arrays)["sets"][arrays]["fd"]) < 1e-3
    assert "does not say how it was measured" in capsys.readouterr().out
    np.savez(tmp_path / "VIRTUAL.npz", mu=mu, sigma=sigma, arr_0=np.load(arrays)["arr_0"][:60])  # as ADM's
    result = run("gfid", str(tmp_path / "VIRTUAL.npz"), arrays)
    numbers = result["sets"][arrays]
    assert abs(numbers["fd"]) < 1e-3 and result["reference"]["n"] is None
    assert numbers["reference_features"] == 60 and result["reference"]["image_size"] == 32


@torch.no_grad()
def test_rfid_command_reports_psnr_ssim_lpips_and_the_originals(tmp_path, monkeypatch, capsys):
    """LPIPS itself: tests/test_losses.py. Here a distance that says how it was made."""
    class Distance(torch.nn.Module):
        def __init__(self, weights):
            super().__init__()
            assert weights == "vgg16.pth"

        def forward(self, x, x_hat):
            return (x - x_hat).abs().mean((1, 2, 3))
    monkeypatch.setattr(fid, "LPIPS", Distance)
    vae, root = small_vae(), pictures(tmp_path / "val", n=6, classes=0, size=48)
    checkpoint = str(small_vae_checkpoint(tmp_path / "vae", vae, image_size=32))  # folders are cropped to it
    flags = ["rfid", str(root), "--vae", checkpoint, *JUDGE, "--out", str(tmp_path / "rfid.json")]
    for without in ([], ["--no-lpips", "--lpips-weights", "vgg16.pth"]):
        assert "lpips" not in fid.main([*flags, *without])
        assert json.loads((tmp_path / "rfid.json").read_text())["args"]["no_lpips"]
    fid.main([*flags, "--lpips-weights", "vgg16.pth"])
    text, protocol = capsys.readouterr().out, json.loads((tmp_path / "rfid.json").read_text())
    assert re.search(r"^rFD-judge-6 vs originals of val-6, split val$", text, re.M)
    assert "6 images of 32 px" in text and "verdict: below 22 dB" in text
    images, judge = data.ImageFolder(root, 32).batch(range(6))["images"], fid.load_extractor("shapes")
    x = data.to_float(images)
    x_hat = vae.decode(vae.encode(x).mode())
    rounded = data.to_uint8(x_hat)
    expected = {"psnr_db": data.psnr(images, rounded).mean(), "ssim": fid.ssim(images, rounded).mean(),
                "lpips": (x - x_hat).abs().mean(),
                "fd": distance(*(stats_of(judge(part)["features"]) for part in (images, rounded)))}
    for name, value in expected.items():
        assert protocol[name] == pytest.approx(float(value), rel=1e-4)
    assert protocol["n"] == 6 and protocol["vae_hash"] == checkpoints.state_hash(vae.state_dict())
    assert protocol["reference"]["images_hash"] == data.ImageFolder(root, 32).images_hash


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A folder of the wrong files of REFUSALS."""
    folder, images = tmp_path_factory.mktemp("wrong"), np.zeros((5, 32, 32, 3), np.uint8)
    data.save_npz(folder / "samples" / "cfg1" / "samples.npz", images, np.arange(5))
    stats = stats_of(gaussian(9, 128, 0), name="theirs", extractor="inception", resize="tf1")
    stats.save(folder / "theirs.npz")
    (folder / "cut.npz").write_bytes((folder / "theirs.npz").read_bytes()[:-300])
    np.save(folder / "small.npy", images)
    np.save(folder / "wide.npy", np.zeros((5, 64, 64, 3), np.uint8))
    np.savez(folder / "ADM.npz", mu=np.zeros(4), sigma=np.eye(4), arr_0=images)  # holds images, too
    np.savez(folder / "torn.npz", mu=np.zeros(4), sigma=np.eye(3))
    torch.save({"fc.bias": torch.zeros(1008)}, folder / "short.pth")
    nan = small_vae()
    nan.decoder.conv_out.bias.data[1] = torch.nan
    small_vae_checkpoint(folder / "nan", nan)
    return folder


def compare(key):
    """Compare two sets, of which one was measured differently."""
    fid.gfid(*(stats_of(gaussian(9, 4, 0), name=name, **{key: name}) for name in ("left", "right")))


REFUSALS = [  # id, call, exception, key word
    ("reference not there", ["gfid", "nowhere", "shapes"], FileNotFoundError, "nowhere"),
    ("samples not there", ["gfid", "shapes", "no/samples.npz"], FileNotFoundError, "no/samples.npz.*--npz"),
    ("damaged npz", ["gfid", "cut.npz", "shapes"], ValueError, "cut.npz"),
    ("statistics as originals", ["rfid", "theirs.npz", "--vae", "none"], ValueError, "theirs.npz"),
    ("reference as originals", ["rfid", "ADM.npz", "--vae", "none"], ValueError, "ADM.npz.*gfid"),
    ("no statistics", ["gfid", "torn.npz", "shapes"], ValueError, "torn.npz"),
    ("black pictures", ["rfid", "small.npy", "--vae", "nan"], ValueError, "not finite"),
    ("out is a folder", ["stats", "small.npy", "--out", "samples"], ValueError, "--out"),
    ("another network's statistics", ["gfid", "theirs.npz", "small.npy"], ValueError, "theirs has inception"),
    ("folder of sample.py", ["gfid", "shapes", "samples"], ValueError, "cfg1.samples.npz"),
    ("images of two sizes", ["gfid", "small.npy", "wide.npy"], ValueError, "image_size"),
    ("few images", lambda: fid.precision_recall(torch.ones(3, 2), torch.ones(9, 2)), ValueError, "3 each"),
    ("NaN", lambda: distance(*[stats_of(np.full((9, 4), np.nan))] * 2), ValueError, "finite"),
    ("Inception not there", lambda: inception.load_inception("absent.pth"), ValueError, "absent.pth"),
    ("not all of Inception", lambda: inception.load_inception("short.pth"), ValueError, "short.pth"),
    *((f"another {key}", lambda key=key: compare(key), ValueError, f"{key}.*left has left, right has right")
      for key in ("extractor", "resize", "weights", "image_size")),
]


@pytest.mark.parametrize("call, exception, word", [line[1:] for line in REFUSALS],
                         ids=[line[0] for line in REFUSALS])
def test_wrong_input_is_one_clear_line(call, exception, word, wrong, monkeypatch):
    monkeypatch.chdir(wrong)
    with pytest.raises(exception, match=word) as caught:
        call() if callable(call) else fid.main([*call, *JUDGE])
    assert "\n" not in str(caught.value)
