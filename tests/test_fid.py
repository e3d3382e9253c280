"""Distances between sets of images: golden numbers, closed forms, brute force, invariances, and the commands.

    pytest tests/test_fid.py          about 25 s on 2 CPU cores, half of it Inception at 299 px
"""
import argparse
import copy
import hashlib
import json
import re
import subprocess
import sys
import tracemalloc
import urllib.error
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT, fill_by_name, read_fixture, tensor
from PIL import Image

import common
import data
import features
import fid
import image_metrics
import losses
from vae import VAE, VAE_SIZES

METRICS, NUMBERS = read_fixture("metrics")
INCEPTION, ACTIVATIONS = read_fixture("inception")
KINDS = sorted({(case, key.split("/")[1]) for case in INCEPTION["cases"] for key in ACTIVATIONS.files
                if key.startswith(case + "/") and key.count("/") == 2})
JUDGE = ["--features", "shapes", "--device", "cpu"]
TOLERANCE = {"sfid": 5e-5, "softmax": 1e-7, "softmax_unbiased": 1e-7}  # README's table; the others 2e-5


def stats_of(x, batch=64):
    """Statistics of rows x (n, D), streamed in batches."""
    stats = fid.FeatureStats(keep_every=1)
    for part in torch.as_tensor(x).split(batch):
        stats.update(part)
    return stats.all_reduce()


def distance(a, b):
    return fid.frechet_distance(a.mean(), a.cov(), b.mean(), b.cov())


def gaussian(n, dim, seed, scale=1.0, shift=0.0):
    return scale * np.random.default_rng(seed).standard_normal((n, dim)) + shift


def random_covariance(dim, seed):
    a = np.random.default_rng(seed).standard_normal((dim, 2 * dim))
    return a @ a.T / (2 * dim)


# golden numbers

@pytest.mark.parametrize("name", METRICS["cases"])
def test_frechet_distance_equals_the_published_codes(name):
    pair = [stats_of(NUMBERS[f"{name}/{key}"]) for key in ("ref", "sample")]
    rel = 1e-3 if any(stats.n <= len(stats.mean()) for stats in pair) else 1e-6
    for key in ("fd_pytorch_fid", "fd_adm", "fd_torch_fidelity"):
        assert distance(*pair) == pytest.approx(float(NUMBERS[f"{name}/{key}"]), rel=rel)


@pytest.mark.parametrize("name", METRICS["cases"])
@pytest.mark.parametrize("block", [64, 1000])
def test_precision_and_recall_equal_the_exact_definition_and_almost_adms(name, block):
    ref, sample = tensor(NUMBERS, f"{name}/ref"), tensor(NUMBERS, f"{name}/sample")
    for k in (3, 5):
        found = fid.precision_recall(ref, sample, k, block)
        for value, measure in zip(found, ("precision", "recall")):
            assert value == pytest.approx(float(NUMBERS[f"{name}/exact_{measure}_k{k}"]), abs=1e-6)
    flips = METRICS["cases"][name]["adm_float16_vs_exact"]  # decisions that ADM's fp16 distances change
    found = fid.precision_recall(ref, sample, block=block)
    for value, measure, share in zip(found, ("precision", "recall"), (
            flips["sample_inside_flips"] / len(sample), flips["ref_covered_flips"] / len(ref))):
        assert value == pytest.approx(float(NUMBERS[f"{name}/adm_{measure}"]), abs=share + 1e-6)


@pytest.mark.parametrize("name", METRICS["cases"])
def test_kernel_distance_equals_torch_fidelity(name):
    pair, kid = [tensor(NUMBERS, f"{name}/{key}") for key in ("ref", "sample")], METRICS["cases"][name]["kid"]
    found = fid.kernel_distance(*pair, kid["kid_subsets"], kid["kid_subset_size"], kid["rng_seed"])
    for value, key in zip(found, ("kid_mean", "kid_std")):
        assert value == pytest.approx(float(NUMBERS[f"{name}/{key}"]), rel=2e-5, abs=1e-6)  # fp32 there
        assert value == pytest.approx(float(NUMBERS[f"{name}/{key}_float64_input"]), rel=1e-9)
    n = min(map(len, pair))
    whole, spread = fid.kernel_distance(pair[0][:n], pair[1][:n], subsets=1, subset_size=n)
    assert whole == pytest.approx(float(NUMBERS[f"{name}/mmd2_first_rows"]), rel=1e-9) and spread == 0


@pytest.mark.parametrize("name", [name for name in METRICS["cases"] if f"{name}/is_features" in NUMBERS])
def test_inception_score_equals_adm_and_torch_fidelity(name):
    logits = tensor(NUMBERS, f"{name}/is_features") @ tensor(NUMBERS, f"{name}/is_weight")
    seen = 0
    for key in (key.split("/")[1] for key in NUMBERS.files if key.startswith(f"{name}/is_")):
        adm, parts = re.fullmatch(r"is_adm_split(\d+)", key), re.fullmatch(
            r"is_torch_fidelity_splits(\d+)_(ordered|shuffled)_mean", key)
        if adm:
            found = fid.inception_score(logits, int(adm[1]))
        elif parts:
            shuffled = np.random.RandomState(2020).permutation(len(logits))
            rows = logits[shuffled] if parts[2] == "shuffled" else logits
            found = fid.inception_score(rows, len(logits) // int(parts[1]))
            std = float(NUMBERS[f"{name}/{key.removesuffix('mean')}std"])
            assert found[1] == pytest.approx(std, rel=1e-5, abs=1e-6)
        else:
            continue
        assert found[0] == pytest.approx(float(NUMBERS[f"{name}/{key}"]), rel=1e-6)
        seen += 1
    assert seen


@pytest.fixture(scope="module")
def inception():
    """Inception networks by table of weights, filled as the manifest says; made once."""
    made = {}

    def get(table):
        if table not in made:
            with torch.device("meta"):
                net = fid.FIDInception()
            made[table] = fill_by_name(net.to_empty(device="cpu").eval(), INCEPTION, table, ACTIVATIONS)
        return made[table]
    return get


@pytest.mark.parametrize("name, kind", KINDS)
@pytest.mark.parametrize("variant", ["fp32", "fp64", "fused"])
def test_inception_activations_equal_the_published_ports(name, kind, variant, inception):
    dtype = torch.float64 if variant == "fp64" else torch.float32
    net = inception(INCEPTION["cases"][name]["tensors"]).to(dtype)
    net = features.fuse(copy.deepcopy(net)) if variant == "fused" else net
    net.resize = kind.replace("_", "-")
    with torch.no_grad():
        images = tensor(ACTIVATIONS, f"{name}/images_u8").permute(0, 3, 1, 2)
        out = net(images)
        resized = net.preprocess(images)[:, :, ::13, ::13]
    out["sfid"] = out["spatial"].view(-1, 17, 17, 7)
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
    assert checked or dtype == torch.float64
    assert checked == len([key for key in stored if ("@" in key) == (dtype == torch.float64)])


def test_inception_weights_load_from_a_file_as_published_and_nothing_else_does(tmp_path, inception):
    net = inception(next(iter(INCEPTION["tensors"]))).float()
    state = {key: value for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "weights.pth")  # the published file has no batch counters
    loaded = fid.Extractor("inception", tmp_path / "weights.pth", "pytorch-fid").net
    assert loaded.resize == "pytorch-fid" and not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in state.items())
    torch.save({key: value for key, value in state.items() if key != "fc.bias"}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match="short.pth: not pt_inception"):
        features.load_inception(tmp_path / "short.pth")
    with pytest.raises(FileNotFoundError, match="absent.pth.*6726825d.*https://.*--inception"):
        features.load_inception(tmp_path / "absent.pth")
    torch.save(net.state_dict(), tmp_path / "weights.pth")  # with counters, and torch's notes of versions
    metas = [fid.load_extractor("inception", tmp_path / f"{name}.pth").meta for name in ("weights", "copy")
             if name == "weights" or torch.save(state, tmp_path / "copy.pth") is None]
    assert metas[0] == metas[1]  # the values are hashed, not the file


def test_inception_weights_are_fetched_once_into_the_cache_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    published, target = tmp_path / "elsewhere.pth", tmp_path / "checkpoints" / features.INCEPTION_FILE
    published.write_bytes(b"weights")
    monkeypatch.setattr(features, "INCEPTION_URL", published.as_uri())
    with pytest.raises(FileNotFoundError, match="not fetched.*invalid hash"):  # its sha256 is not 6726825d
        features.find_inception()
    assert not target.exists()
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(b"weights").hexdigest()[:8])
    assert features.find_inception() == target and target.read_bytes() == b"weights"
    published.unlink()
    assert features.find_inception() == target  # from the cache
    target.write_bytes(b"wei")
    with pytest.raises(ValueError, match="sha256 .* fetch it again"):
        features.find_inception()
    target.rename(target.with_name(features.INCEPTION_FILES[1]))  # torch-fidelity's name: its sha256 is open
    assert features.find_inception().name.startswith("weights-inception")
    assert "comparable only to those by the same weights" in capsys.readouterr().err


def test_without_inception_weights_there_is_an_error_not_a_random_network(tmp_path, monkeypatch):
    def offline(*_):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match="pt_inception-2015-12-05-6726825d.pth.*not fetched.*sha256 "
                       "begins with 6726825d.*github.com/mseitzer.*--inception FILE"):
        fid.main(["gfid", "shapes", "shapes", "--device", "cpu"])


# closed forms

def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    mu1, mu2, a, b = rng.standard_normal(50), rng.standard_normal(50), rng.random(50), 5 * rng.random(50)
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert fid.frechet_distance(mu1, np.diag(a), mu2, np.diag(b)) == pytest.approx(expected, rel=1e-9)


def test_equal_covariances_leave_the_squared_distance_of_the_means():
    sigma, mu = random_covariance(40, 1), np.linspace(-1, 2, 40)
    assert fid.frechet_distance(mu, sigma, 0 * mu, sigma) == pytest.approx((mu**2).sum(), rel=1e-9)


def test_scaled_covariance_costs_trace_times_squared_difference_of_scales():
    sigma, zero = random_covariance(40, 2), np.zeros(40)
    expected = np.trace(sigma) * (3 - 1) ** 2
    assert fid.frechet_distance(zero, sigma, zero, 9 * sigma) == pytest.approx(expected, rel=1e-9)
    eye = np.eye(40)
    assert fid.frechet_distance(zero, eye, zero, 16 * eye) == pytest.approx(40 * (4 - 1) ** 2, rel=1e-9)


def test_frechet_distance_of_commuting_rotated_gaussians_does_not_depend_on_the_rotation():
    q, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((30, 30)))
    a, b, zero = np.linspace(0.1, 2, 30), np.linspace(3, 0, 30), np.zeros(30)
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert fid.frechet_distance(zero, q * a @ q.T, zero, q * b @ q.T) == pytest.approx(expected, rel=1e-7)


def test_frechet_distance_is_symmetric_and_zero_for_equal_sets_also_below_full_rank():
    full, short = stats_of(gaussian(300, 64, 4, 30)), stats_of(gaussian(20, 64, 5, 40, 3))
    assert distance(full, short) == pytest.approx(distance(short, full), rel=1e-6)
    assert np.isfinite(distance(full, short)) and distance(full, short) > 0
    assert abs(distance(full, full)) < 1e-3 and abs(distance(short, short)) < 1e-3


def test_square_root_of_full_and_of_deficient_rank_gives_the_matrix_back():
    full = torch.from_numpy(random_covariance(40, 20))
    x = torch.from_numpy(gaussian(15, 40, 21))
    for sigma, rank in ((full, 40), (torch.cov(x.T), 14), (torch.cov(x.T) + 1e-13 * full, 40)):
        root = image_metrics.square_root(sigma)
        torch.testing.assert_close(root @ root.T, sigma, atol=1e-12, rtol=1e-9)
        assert root.shape[1] <= rank
    with_cholesky = distance(stats_of(gaussian(400, 30, 22)), stats_of(gaussian(20, 30, 23)))
    with_eigenvectors = distance(stats_of(gaussian(20, 30, 23)), stats_of(gaussian(400, 30, 22)))
    assert with_cholesky == pytest.approx(with_eigenvectors, rel=1e-6)


def test_constant_features_have_the_squared_distance_of_the_means():
    pair = [stats_of(np.full((5, 3), value)) for value in (1.0, 3.0)]
    assert distance(*pair) == pytest.approx(3 * 2**2)


def test_frechet_distance_refuses_nan_and_other_shapes():
    good = np.zeros(4), np.eye(4)
    with pytest.raises(ValueError, match="not finite"):
        fid.frechet_distance(*good, np.full(4, np.nan), np.eye(4))
    with pytest.raises(ValueError, match="shapes"):
        fid.frechet_distance(*good, np.zeros(5), np.eye(5))


# statistics

@pytest.mark.parametrize("batch", [1, 13, 500])
def test_streaming_statistics_equal_numpy_in_one_piece(batch):
    x = gaussian(200, 12, 6, 3, 100).astype(np.float32)  # far from 0: fp32 sums would lose digits
    stats = stats_of(x, batch)
    assert stats.n == 200
    np.testing.assert_allclose(stats.mean(), x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.cov(), np.cov(x.astype(np.float64), rowvar=False), rtol=1e-8, atol=1e-9)


def test_statistics_and_measures_do_not_depend_on_the_order_of_the_images():
    x, y = gaussian(120, 8, 7), gaussian(100, 8, 8, 1.2)
    shuffled = np.random.default_rng(9).permutation(120)
    expected = distance(stats_of(x), stats_of(y))
    assert distance(stats_of(x[shuffled]), stats_of(y)) == pytest.approx(expected, rel=1e-9)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    assert fid.precision_recall(x, y) == fid.precision_recall(x[shuffled], y)


def test_changing_dimensions_and_single_images_are_refused():
    stats = stats_of(gaussian(1, 4, 0))
    with pytest.raises(ValueError, match="at least 2"):
        stats.cov()
    with pytest.raises(ValueError, match="5 dimensions, those before 4"):
        stats.update(torch.zeros(2, 5))


def test_two_processes_measure_what_one_does(small_set, tmp_path):
    """Unequal parts: statistics, rows, hash of the pixels, and a whole command."""
    folder, _ = small_set
    command = ["gfid", str(folder / "pictures"), str(folder / "samples.npz"), *JUDGE, "--workers", "0"]
    script = tmp_path / "run.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, common, fid
proc = common.setup("cpu")
mine = slice(0, 7) if proc.main else slice(7, 20)
stats, rows = fid.FeatureStats(keep_every=2), torch.arange(20)
images = torch.arange(20 * 48).view(20, 3, 4, 4).to(torch.uint8)
stats.update({{"features": torch.arange(60.).view(20, 3).sin()[mine], "labels": rows[mine]}}, images[mine],
             rows[mine])
stats.all_reduce()
stats.meta["pixels"] = stats.pixels
if proc.main:
    assert stats.rows["labels"].tolist() == list(range(20)), stats.rows
    stats.save({str(tmp_path / "two.npz")!r})
fid.main({command + ["--out", str(tmp_path / "two.json")]})
common.finish()
""")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, str(script)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("vs pictures-300") == 1
    x = torch.arange(60.).view(20, 3).sin()
    one, two = stats_of(x), fid.FeatureStats.load(tmp_path / "two.npz")
    assert two.n == 20
    np.testing.assert_allclose(two.mean(), one.mean(), rtol=1e-12)
    np.testing.assert_allclose(two.cov(), one.cov(), rtol=1e-12)
    assert torch.equal(two.rows["features"], x[::2])
    one = fid.main([*command, "--batch-size", "37", "--out", str(tmp_path / "one.json")])
    protocol = json.loads((tmp_path / "two.json").read_text())
    assert protocol["processes"] == 2
    assert not [*fid.differences(json.loads(json.dumps(one)), protocol, 1e-5)]


def test_the_hash_of_the_pixels_is_of_the_images_in_any_order_and_layout():
    images, x = torch.arange(20 * 48).view(20, 3, 4, 4).to(torch.uint8), torch.zeros(20, 2)
    whole, pieces, other = (fid.FeatureStats() for _ in range(3))
    whole.update(x, images)
    for i in torch.randperm(20):
        pieces.update(x[i][None], images[i][None].contiguous(memory_format=torch.channels_last))
    assert whole.pixels == pieces.pixels != 0
    images[3, 0, 0, 0] += 1
    other.update(x, images)
    assert other.pixels != whole.pixels


def test_statistics_survive_a_file(tmp_path):
    stats = stats_of(gaussian(50, 6, 10))
    stats.meta = {"name": "noise-50", "extractor": "none", "image_size": 32}
    stats.save(tmp_path / "stats.npz")
    again = fid.FeatureStats.load(tmp_path / "stats.npz")
    assert again.n == 50 and again.meta == stats.meta
    assert (again.mean() == stats.mean()).all() and (again.cov() == stats.cov()).all()
    assert torch.equal(again.rows["features"], stats.rows["features"])
    assert [file.name for file in tmp_path.iterdir()] == ["stats.npz"]


@pytest.mark.parametrize("key, mine, theirs", [
    ("extractor", "inception", "shapes"), ("resize", "tf1", "pytorch-fid"), ("weights", "aa", "bb"),
    ("image_size", 256, 32)])
def test_statistics_that_were_measured_differently_are_not_compared(key, mine, theirs):
    a, b = stats_of(gaussian(9, 4, 0)), stats_of(gaussian(9, 4, 1))
    a.meta, b.meta = {"name": "left", key: mine}, {"name": "right", key: theirs}
    with pytest.raises(ValueError, match=f"{key} differs: left has {mine}, right has {theirs}"):
        fid.gfid(a, b)
    with pytest.raises(ValueError, match="dimensions differs: reference has 5, right has 4"):
        fid.gfid(stats_of(gaussian(9, 5, 0)), b)


def test_adm_reference_is_compared_without_its_number_of_images(tmp_path):
    x, s = gaussian(90, 6, 11), gaussian(90, 5, 12)
    np.savez(tmp_path / "VIRTUAL_x.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False), mu_s=s.mean(0),
             sigma_s=np.cov(s, rowvar=False))
    reference = fid.FeatureStats.load(tmp_path / "VIRTUAL_x.npz")
    assert reference.n is None
    assert reference.meta == {"name": "VIRTUAL_x", "extractor": "inception", "resize": "tf1"}
    samples = fid.FeatureStats({"extractor": "inception", "resize": "tf1", "weights": "aa"})
    samples.update({"features": torch.from_numpy(x), "spatial": torch.from_numpy(s + 1)})
    result = fid.gfid(reference, samples.all_reduce())
    assert abs(result["fd"]) < 1e-6 and result["sfid"] == pytest.approx(5) and result["n"] == 90
    samples.meta["resize"] = "pytorch-fid"
    with pytest.raises(ValueError, match="resize"):
        fid.gfid(reference, samples)


# sets of images in files

def write_arrays(folder, images, labels):
    """The same images in every accepted container: {name: path}."""
    np.savez(folder / "stored.npz", images, labels)
    np.savez_compressed(folder / "deflated.npz", images, labels)
    np.save(folder / "array.npy", images)
    return [folder / name for name in ("stored.npz", "deflated.npz", "array.npy")]


def test_arrays_of_images_are_read_as_needed_and_alike_from_every_container(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (400, 64, 64, 3), dtype=np.uint8)  # 4.9 MB
    for path in write_arrays(tmp_path, images, np.arange(400)):
        tracemalloc.start()
        dataset = data.ArrayImages(path)
        found = [batch[:2] for batch in data.eval_loader(dataset, 16)]
        kept = sum(x.numel() for x, _ in found)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < kept + 1e6, f"{path.name}: {peak} bytes for batches of {kept}"
        assert (torch.cat([x for x, _ in found]).permute(0, 2, 3, 1).numpy() == images).all()
        assert torch.cat([y for _, y in found]).tolist() == ([-1] * 400 if path.suffix == ".npy" else
                                                             [*range(400)])
        assert (dataset.__getitems__([7, 3])[0][1].permute(1, 2, 0).numpy() == images[3]).all()
        assert dataset.image_size == 64 and len(dataset) == 400


def test_damaged_and_foreign_arrays_are_named(tmp_path):
    images = np.zeros((5, 8, 8, 3), np.uint8)
    stored = write_arrays(tmp_path, images, np.arange(5))[0]
    (tmp_path / "cut.npz").write_bytes(stored.read_bytes()[:-300])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "array.npy").read_bytes()[:-300])
    for name in ("cut.npz", "empty.npz", "cut.npy"):
        with pytest.raises(ValueError, match=f"{name}: not a whole npz or npy file"):
            data.ArrayImages(tmp_path / name)
    for array, message in ((images.astype(np.float32), "images are float32"), (images[..., :1], "8, 8, 1"),
                           (np.asfortranarray(images), "column by column")):
        np.savez(tmp_path / "other.npz", array)
        with pytest.raises(ValueError, match=message):
            data.ArrayImages(tmp_path / "other.npz")
    np.savez(tmp_path / "other.npz", images, np.arange(4))
    with pytest.raises(ValueError, match=r"5 images, but labels arr_1 \(4,\)"):
        data.ArrayImages(tmp_path / "other.npz")


# nearest neighbours, by brute force

def brute_precision_recall(ref, sample, k):
    def radius(points, i):
        return sorted(((points[i] - p) ** 2).sum() for p in points)[k]

    def share(points, others):
        radii = [radius(others, i) for i in range(len(others))]
        return np.mean([any(((p - o) ** 2).sum() <= r for o, r in zip(others, radii)) for p in points])
    return share(sample, ref), share(ref, sample)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_brute_force(k):
    ref, sample = gaussian(30, 3, 13), gaussian(25, 3, 14, 0.7, 0.5)
    expected = brute_precision_recall(ref, sample, k)
    found = fid.precision_recall(torch.from_numpy(ref), torch.from_numpy(sample), k, block=4)
    assert found == pytest.approx(expected) and 0 < found[0] < 1 and 0 < found[1] < 1


def test_equal_sets_have_precision_and_recall_one_and_far_sets_zero():
    x = torch.from_numpy(gaussian(40, 4, 15))
    assert fid.precision_recall(x, x) == (1, 1)
    assert fid.precision_recall(x, x + 100) == (0, 0)
    same = torch.ones(6, 2)
    assert fid.precision_recall(same, same) == (1, 1)  # radius 0: the ball holds its border
    with pytest.raises(ValueError, match="more than 3"):
        fid.precision_recall(x[:3], x)


@pytest.mark.parametrize("block", [4, 1000])
def test_nearest_rows_equal_brute_force_and_find_planted_copies(block):
    train, points = gaussian(30, 5, 24), gaussian(20, 5, 25)
    points[:8] = train[10:18] + 1e-3
    squares = ((points[:, None] - train) ** 2).sum(2)
    found, indices = image_metrics.nearest(torch.from_numpy(points), torch.from_numpy(train), 3, block)
    np.testing.assert_allclose(found, np.sort(squares, 1)[:, :3], atol=1e-12)
    assert (indices.numpy() == np.argsort(squares, 1)[:, :3]).all()
    own = ((train[:, None] - train) ** 2).sum(2) + 1e9 * np.eye(30)
    expected = np.sqrt(squares.min(1) / own.min(1)[squares.argmin(1)])
    ratio, indices = image_metrics.closer_than_training(torch.from_numpy(train), torch.from_numpy(points),
                                                        k=2)
    np.testing.assert_allclose(ratio, expected, rtol=1e-6)
    assert (ratio[:8] < 0.01).all() and indices[:8, 0].tolist() == [*range(10, 18)]
    exact = image_metrics.closer_than_training(torch.from_numpy(train), torch.from_numpy(train))[0]
    assert (exact < 1e-6).all()
    twice = torch.from_numpy(np.concatenate([gaussian(40, 2048, 28)] * 2) + 3)  # each training row twice
    assert (image_metrics.closer_than_training(twice, twice[:20])[0] == 0).all()
    assert (image_metrics.closer_than_training(twice, twice[:20] + 0.01)[0] > 1).all()


def test_a_table_shows_every_measure_of_every_set_and_a_dash_where_there_is_none(capsys, tmp_path):
    """Labelled samples have a class accuracy, those of a folder have not, whichever comes first."""
    sets = {"a.npz": {"n": 5, "fd": 1.5, "class_accuracy": 0.25}, "b": {"n": 6, "fd": 2.5, "kid": 0.125}}
    for order in (sets, dict(reversed(sets.items()))):
        args = argparse.Namespace(out=str(tmp_path / "out.json"))
        fid.report("FID vs x", {"sets": order}, args, common.Proc(0, 1, torch.device("cpu")))
        _, header, *rows = capsys.readouterr().out.splitlines()
        cells = {row.split()[0]: dict(zip(header.split(), row.split())) for row in rows}
        assert cells["a.npz"]["class_accuracy"] == "0.2500" and cells["a.npz"]["kid"] == "-"
        assert cells["b"]["class_accuracy"] == "-" and cells["b"]["kid"] == "0.1250"
        assert json.loads((tmp_path / "out.json").read_text())["sets"] == sets


def test_files_that_are_no_images_and_protocols_that_are_not_there_are_named(tmp_path):
    (tmp_path / "vae.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="vae.pt: not images; want 'shapes', a folder, .npz or .npy"):
        fid.open_images(str(tmp_path / "vae.pt"), 32)
    with pytest.raises(FileNotFoundError, match="none.json: no such file; want the JSON"):
        fid.main(["again", str(tmp_path / "none.json")])


def test_about_half_of_unseen_points_are_closer_to_training_than_training_is_to_itself():
    train, unseen = (torch.from_numpy(gaussian(1500, 6, seed)) for seed in (26, 27))
    share = (image_metrics.closer_than_training(train, unseen)[0] < 1).double().mean()
    assert 0.4 < share < 0.6


def test_kernel_distance_is_unbiased_and_grows_with_the_shift():
    x, y = (torch.from_numpy(gaussian(600, 10, seed)) for seed in (16, 17))
    near, spread = fid.kernel_distance(x, y, subsets=50, subset_size=100)
    assert abs(near) < 4 * spread / 50**0.5 + 0.02
    assert fid.kernel_distance(x, y + 1, subsets=10, subset_size=100)[0] > 1
    with pytest.raises(ValueError, match="600 samples, 600 references; KID wants 1000"):
        fid.kernel_distance(x, y)


def test_inception_score_is_one_without_and_the_number_of_classes_with_certainty():
    assert fid.inception_score(torch.zeros(50, 7))[0] == pytest.approx(1)
    assert fid.inception_score(100 * torch.eye(7).repeat(5, 1))[0] == pytest.approx(7)


# images

def test_psnr_is_the_closed_form_for_a_constant_error():
    x = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    y = torch.stack([x[0] + 5, x[1]])
    assert fid.psnr(x, y).tolist() == pytest.approx([20 * np.log10(255 / 5), 100])


def test_ssim_equals_the_definition_at_one_window_and_the_closed_form_for_flat_images():
    rng = np.random.default_rng(18)
    x, y = rng.integers(0, 256, (2, 1, 3, 11, 11), dtype=np.uint8)  # one window per colour
    line = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5**2))
    w = np.outer(line, line) / np.outer(line, line).sum()
    values = []
    for a, b in zip(x[0].astype(float), y[0].astype(float)):
        ma, mb = (w * a).sum(), (w * b).sum()
        va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    found = fid.ssim(torch.from_numpy(x), torch.from_numpy(y)).item()
    assert found == pytest.approx(np.mean(values), abs=1e-5)
    flat = [torch.full((1, 3, 20, 24), value, dtype=torch.uint8) for value in (50, 90)]
    expected = (2 * 50 * 90 + c1) / (50**2 + 90**2 + c1)
    assert fid.ssim(*flat).item() == pytest.approx(expected, abs=1e-4)
    images = torch.from_numpy(rng.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8))
    assert fid.ssim(images, images).tolist() == pytest.approx([1, 1, 1], abs=1e-5)


# commands, on the embedded set and its judge

class Identity:
    """A VAE that reconstructs exactly."""

    def encode(self, x):
        self.mode = lambda: x
        return self

    @staticmethod
    def decode(z):
        return z


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
    folder, shapes = tmp_path_factory.mktemp("small"), data.Shapes(300, 5, "train")
    data.save_npz(folder / "samples.npz", shapes.images, shapes.labels)
    (folder / "pictures").mkdir()
    for i, image in enumerate(shapes.images):
        Image.fromarray(image).save(folder / "pictures" / f"{i:03d}.png")
    return folder, shapes


def test_identical_reconstructions_have_distance_zero_and_perfect_psnr_and_ssim(judge):
    result = fid.rfid(data.eval_loader(data.Shapes(200, 0, "val"), 64), Identity(), judge)
    assert abs(result["fd"]) < 1e-3 and result["psnr_db"] == 100 and result["n"] == 200
    assert result["ssim"] == pytest.approx(1, abs=1e-5) and result["class_accuracy"] > 0.97


def test_lpips_sees_the_raw_reconstruction_and_the_others_its_eight_bits(judge):
    class Louder(Identity):
        @staticmethod
        def decode(z):
            return 3 * z
    seen = []

    def lpips(x, x_hat):
        seen.append(x_hat.abs().max().item())
        return (x - x_hat).abs().mean((1, 2, 3))
    shapes = data.Shapes(20, 0, "val")
    result = fid.rfid(data.eval_loader(shapes, 20), Louder(), judge, lpips=lpips)
    x = shapes.images.astype(np.float64)
    clipped = np.clip(np.rint(3 * (x - 127.5) + 127.5), 0, 255)
    mse = ((x - clipped) ** 2).mean((1, 2, 3))
    assert max(seen) == pytest.approx(3, rel=0.1)
    assert result["psnr_db"] == pytest.approx((10 * np.log10(255**2 / mse)).mean(), abs=0.01)
    assert result["lpips"] == pytest.approx(2 * np.abs(x / 127.5 - 1).mean(), rel=1e-4)


def test_judge_knows_the_classes_and_sees_noise(judge):
    shapes = data.Shapes(400, 3, "train")
    clean = fid.compute_stats(data.eval_loader(shapes, 100), judge)
    others = fid.compute_stats(data.eval_loader(data.Shapes(400, 4, "train"), 100), judge)
    noisy = data.Shapes(400, 4, "train")
    noise = 80 * np.random.default_rng(0).standard_normal(noisy.images.shape)
    noisy.images = np.clip(noisy.images + noise, 0, 255).astype(np.uint8)
    damaged = fid.compute_stats(data.eval_loader(noisy, 100), judge)
    assert fid.gfid(clean, damaged)["fd"] > 2 * fid.gfid(clean, others)["fd"]
    assert fid.gfid(clean, others)["class_accuracy"] > 0.97


def test_any_callable_extracts_features():
    def extractor(images_u8):
        return images_u8.float().mean((2, 3))
    loaders = [data.eval_loader(data.Shapes(60, seed, "val"), 16) for seed in (0, 1)]
    result = fid.gfid(*(fid.compute_stats(loader, extractor) for loader in loaders))
    assert result["n"] == 60 and result["fd"] > 0 and "class_accuracy" not in result


def test_gfid_prints_n_and_reference_and_writes_its_protocol(small_set, capsys):
    folder, _ = small_set
    result = fid.main(["gfid", "shapes", str(folder / "samples.npz"), *JUDGE,
                       "--out", str(folder / "gfid.json")])
    text = capsys.readouterr().out
    assert re.search(r"^FD-judge-300 vs shapes-val-\d+ +[\d.]+$", text, re.M)
    assert "warning" not in text  # 300 images > 128 features
    protocol = json.loads((folder / "gfid.json").read_text())
    assert protocol["fd"] == result["fd"] and protocol["n"] == 300 and protocol["class_accuracy"] > 0.97
    assert "samples.npz" in protocol["args"]["samples"][0]
    assert {"precision", "recall", "kid", "title", "versions", "settings", "device"} <= {*protocol}
    assert {"extractor", "weights", "resize", "crop", "image_size", "pixels"} <= {*protocol["reference"]}
    assert protocol["reference"]["split"] == "val" and protocol["samples"]["crop"] == "none"


def test_several_sets_of_samples_make_one_table(small_set, capsys):
    folder, shapes = small_set
    paths = []
    for scale, n in (("cfg1", 200), ("cfg2.5", 150)):
        data.save_npz(folder / scale / "samples.npz", shapes.images[:n], shapes.labels[:n])
        (folder / scale / "protocol.json").write_text(json.dumps({"cfg": float(scale[3:])}))
        paths.append(str(folder / scale / "samples.npz"))
    many = fid.main(["gfid", "shapes", *paths, *JUDGE, "--out", str(folder / "many.json")])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("warning: sets of 150 to 200 images: ") for line in lines) == 1
    start = lines.index("FD-judge vs shapes-val-400")
    assert lines[start + 1].split()[:3] == ["samples", "n", "fd"]
    single = fid.main(["gfid", "shapes", paths[1], *JUDGE, "--out", str(folder / "single.json")])
    for line, path, n in zip(lines[start + 2:], paths, (200, 150)):
        assert line.split()[:3] == [path, str(n), f"{many['sets'][path]['fd']:.4f}"]
    row = many["sets"][paths[1]]
    assert {key: row[key] for key in ("fd", "kid", "n", "precision")} == \
        {key: single[key] for key in ("fd", "kid", "n", "precision")}
    assert row["samples"]["sampling"] == {"cfg": 2.5}


def test_a_protocol_measured_again_gives_the_same_numbers_or_says_what_is_another(small_set, capsys):
    folder, shapes = small_set
    data.save_npz(folder / "mine.npz", shapes.images[:200], shapes.labels[:200])
    command = ["gfid", str(folder / "pictures"), str(folder / "mine.npz"), *JUDGE, "--workers", "0",
               "--image-size", "32", "--out", str(folder / "first.json")]
    first = fid.main(command)
    fid.main(["again", str(folder / "first.json"), "--rtol", "0"])
    assert "all numbers of" in capsys.readouterr().out
    second = json.loads((folder / "first.again.json").read_text())
    assert {key: second[key] for key in first} == json.loads(json.dumps(first))
    data.save_npz(folder / "mine.npz", shapes.images[100:], shapes.labels[100:])
    with pytest.raises(ValueError, match="first.json: other numbers: fd was .* samples.pixels was"):
        fid.main(["again", str(folder / "first.json")])
    (folder / "other.json").write_text('{"args": {"command": "stats"}}')
    with pytest.raises(ValueError, match="other.json: no JSON of fid.py gfid"):
        fid.main(["again", str(folder / "other.json")])


def test_nearest_finds_planted_copies_names_their_share_and_draws_them(small_set, capsys):
    folder, _ = small_set
    train, unseen = data.open_dataset("shapes", 32, "train"), data.Shapes(100, 77, "val")
    noisy = train.images[900:940].astype(int) + np.random.default_rng(0).integers(-3, 4, (40, 32, 32, 3))
    copies = np.concatenate([noisy.clip(0, 255).astype(np.uint8), unseen.images[:60]])
    shares = {}
    for name, images in (("copied", copies), ("unseen", unseen.images)):
        data.save_npz(folder / f"{name}.npz", images, np.zeros(len(images), int))
        result = fid.main(["nearest", "shapes", str(folder / f"{name}.npz"), *JUDGE, "--batch-size", "500",
                           "--out", str(folder / f"{name}.json")])
        shares[name] = result["closer"]
        assert re.search(rf"^nearest-100 vs shapes-train-1000: {result['closer']:.1%} of the samples .*; of "
                         rf"held-out images {result['heldout_closer']:.1%}$", capsys.readouterr().out, re.M)
    assert abs(shares["unseen"] - result["heldout_closer"]) < 4 * 0.5 / 10
    assert shares["copied"] == pytest.approx(0.4 + 0.6 * shares["unseen"], abs=0.1)
    assert result["train_n"] == 1000 and result["heldout_n"] == 400 and result["train"]["split"] == "train"
    picture = np.asarray(Image.open(folder / "copied.png"))[::2, ::2].reshape(10, 32, 6, 32, 3).swapaxes(1, 2)
    for sample, gap, first, *_ in picture:  # each row: a planted copy, white, the image that it copies, ...
        assert abs(sample.astype(int) - first).max() <= 3 and (gap == 255).all()


def test_statistics_of_a_folder_are_a_reference_at_distance_zero_of_it(small_set, capsys):
    folder, _ = small_set
    flags = [*JUDGE, "--workers", "0", "--image-size", "32"]
    fid.main(["stats", str(folder / "pictures"), "--out", str(folder / "ref.npz"), *flags])
    for samples in ("pictures", "samples.npz"):
        result = fid.main(["gfid", str(folder / "ref.npz"), str(folder / samples), *flags, "--out",
                           str(folder / "zero.json")])
        assert abs(result["fd"]) < 1e-3 and result["precision"] == result["recall"] == 1
        assert re.search(r"^FD-judge-300 vs pictures-300 ", capsys.readouterr().out, re.M)
    stats = fid.FeatureStats.load(folder / "ref.npz")  # as ADM's: moments and images, no n
    images = np.load(folder / "samples.npz")["arr_0"][:200]
    np.savez(folder / "VIRTUAL.npz", mu=stats.mean(), sigma=stats.cov(), arr_0=images)
    result = fid.main(["gfid", str(folder / "VIRTUAL.npz"), str(folder / "samples.npz"), *flags, "--out",
                       str(folder / "zero.json")])
    assert abs(result["fd"]) < 1e-3 and result["reference_rows"] == 200 and result["reference_n"] is None
    assert re.search(r"^FD-judge-300 vs VIRTUAL ", capsys.readouterr().out, re.M)


def test_few_images_give_one_warning_with_n_and_dimensions(small_set, capsys):
    folder, shapes = small_set
    data.save_npz(folder / "few.npz", shapes.images[:50], shapes.labels[:50])
    result = fid.main(["gfid", "shapes", str(folder / "few.npz"), *JUDGE, "--out", str(folder / "few.json")])
    text = capsys.readouterr().out
    assert text.count("warning") == 1 and "n = 50 images < D = 128 features" in text
    assert np.isfinite(result["fd"])


def test_rfid_command_reports_psnr_ssim_and_the_originals(small_set, capsys):
    folder, _ = small_set
    torch.manual_seed(0)
    vae = VAE(VAE_SIZES["tiny"])
    common.save_checkpoint(folder / "vae" / "ckpt_0000001.pt", {
        "format": "nanosendvae-vae", "step": 1, "model": vae.state_dict(), "ema": None,
        "model_config": asdict(vae.config), "args": {}})
    result = fid.main(["rfid", str(folder / "samples.npz"), "--vae", str(folder / "vae"), *JUDGE,
                       "--out", str(folder / "rfid.json")])
    text = capsys.readouterr().out
    assert re.search(r"^rFD-judge-300 vs originals of samples, split unknown +[\d.]+$", text, re.M)
    assert result["psnr_db"] < fid.LOW_PSNR and "verdict: below 22 dB" in text
    x = data.to_float(data.Shapes(300, 5, "train").__getitems__(range(300))[0])
    with torch.no_grad():
        x_hat = vae.eval().decode(vae.encode(x).mode())
    mse = (data.to_uint8(x_hat).double() - data.to_uint8(x).double()).square().mean((1, 2, 3))
    assert result["psnr_db"] == pytest.approx((10 * torch.log10(255**2 / mse)).mean().item(), abs=1e-4)
    assert json.loads((folder / "rfid.json").read_text())["vae_hash"] == common.state_hash(vae.state_dict())
    assert "lpips" not in result
    torch.save(losses.LPIPS("random").features.state_dict(prefix="features."), folder / "vgg16.pth")
    few = folder / "test" / "few.npy"
    few.parent.mkdir()
    np.save(few, data.Shapes(6, 5, "train").images)
    result = fid.main(["rfid", str(few), "--vae", str(folder / "vae"), *JUDGE, "--lpips-weights",
                       str(folder / "vgg16.pth"), "--out", str(folder / "lpips.json")])
    with torch.no_grad():
        expected = losses.LPIPS(folder / "vgg16.pth")(x[:6], x_hat[:6]).mean().item()
    assert result["lpips"] == pytest.approx(expected, rel=1e-4) and result["lpips_hash"]
    assert re.search(r"^rFD-judge-6 vs originals of few, split test +[\d.]+$", capsys.readouterr().out, re.M)
    fid.main(["again", str(folder / "lpips.json"), "--rtol", "0"])


def test_a_gfid_reference_is_refused_by_rfid_with_or_without_images(small_set):
    folder, shapes = small_set
    stats = stats_of(gaussian(9, 4, 0))
    stats.meta = {"name": "imagenet", "split": "train"}
    stats.save(folder / "mu.npz")
    np.savez(folder / "adm.npz", mu=stats.mean(), sigma=stats.cov(), arr_0=shapes.images[:20])
    for name, whose in (("mu", "imagenet, split train"), ("adm", "adm, split unknown")):
        with pytest.raises(ValueError, match=f"statistics of {whose}.*a reference for gfid.*give the images"):
            fid.main(["rfid", str(folder / f"{name}.npz"), "--vae", "none", *JUDGE])


def test_another_measurement_is_refused_before_any_image_is_measured(small_set, monkeypatch):
    folder, _ = small_set
    stats = stats_of(gaussian(9, 128, 0))
    stats.meta = {"name": "theirs", "extractor": "inception", "resize": "tf1"}
    stats.save(folder / "theirs.npz")
    monkeypatch.setattr(fid, "measure", None)  # would be called
    with pytest.raises(ValueError, match="extractor differs: theirs has inception, .*samples.npz has shapes"):
        fid.main(["gfid", str(folder / "theirs.npz"), str(folder / "samples.npz"), *JUDGE])


def test_a_reference_that_says_nothing_is_used_with_a_warning(small_set, capsys):
    folder, _ = small_set
    fid.main(["stats", "shapes", *JUDGE, "--out", str(folder / "ours.npz")])
    ours = fid.FeatureStats.load(folder / "ours.npz")
    assert {"crop", "split", "weights", "resize", "extractor", "pixels"} <= {*ours.meta} and ours.n == 400
    np.savez(folder / "plain.npz", mu=ours.mean(), sigma=ours.cov())  # as pytorch-fid's
    results = [fid.main(["gfid", str(folder / f"{name}.npz"), str(folder / "samples.npz"), *JUDGE, "--out",
                         str(folder / f"{name}.json")]) for name in ("ours", "plain")]
    assert results[0]["fd"] == pytest.approx(results[1]["fd"], rel=1e-9)
    assert capsys.readouterr().out.count("does not say how it was measured") == 1
    assert "sha256" in results[1]["reference"]
    with pytest.raises(ValueError, match="does not say of how many images"):
        fid.main(["gfid", str(folder / "ours.npz"), str(folder / "plain.npz"), *JUDGE])
    swapped = fid.main(["gfid", "shapes", str(folder / "ours.npz"), *JUDGE, "--out", str(folder / "s.json")])
    assert abs(swapped["fd"]) < 1e-3 and swapped["n"] == 400  # statistics may also stand for samples


@pytest.mark.parametrize("flags, wanted", [
    ([], True), (["--no-lpips"], False), (["--features", "shapes"], False),
    (["--features", "shapes", "--lpips-weights", "file"], True)])
def test_lpips_is_measured_unless_it_cannot_be_meant(flags, wanted, monkeypatch):
    def absent(_):
        raise FileNotFoundError("no VGG16")
    monkeypatch.setattr(fid, "LPIPS", absent)
    args = fid.parse_args(["rfid", "shapes", "--vae", "x", *flags])
    if wanted:
        with pytest.raises(FileNotFoundError, match="no VGG16; here: --lpips-weights FILE, or --no-lpips"):
            fid.load_lpips(args, "cpu")
    else:
        assert fid.load_lpips(args, "cpu") is None


@pytest.mark.parametrize("source, given, split", [
    ("data/imagenet/val", None, "val"), ("data/train/dogs", None, "train"), ("pictures", None, "unknown"),
    ("data/imagenet/val", "train", "train"), ("shapes", None, "val"), ("shapes", "train", "train")])
def test_split_is_told_by_the_folder_or_the_flag(source, given, split):
    assert fid.split_of(source, given) == split


@pytest.mark.parametrize("flags, message", [
    (["gfid", "nowhere", "shapes"], "nowhere"),
    (["gfid", "shapes", "nowhere.npz"], "nowhere.npz"),
    (["rfid", "shapes", "--vae", "nowhere.pt"], "nowhere.pt"),
    (["gfid", "shapes", "shapes", "--image-size", "64"], "32 px"),
    (["stats", "shapes", "--split", "test", "--out", "x.npz"], "--split test: the embedded set has train"),
    (["nearest", "shapes", "shapes", "--heldout", "nowhere"], "nowhere"),
])
def test_wrong_input_is_one_clear_line(flags, message, capsys):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        fid.main([*flags, *JUDGE])


def test_timm_model_extracts_pooled_features_from_a_local_file(tmp_path):
    import timm
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", num_classes=7)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    extractor = fid.load_extractor("resnet10t", tmp_path / "net.pth")
    images = data.Shapes(2).__getitems__([0, 1])[0]
    size = timm.data.resolve_model_data_config(net)
    x = torch.nn.functional.interpolate(images.float() / 255, size=size["input_size"][1:], mode="bicubic",
                                        antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(size[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = net.eval().forward_features((x - mean) / std).mean((2, 3))
    torch.testing.assert_close(extractor(images)["features"], expected)
    without = {key: value for key, value in net.state_dict().items() if not key.startswith("fc.")}
    torch.save(without, tmp_path / "headless.pth")
    loaded = features.load_timm("resnet10t", tmp_path / "headless.pth").state_dict()
    assert loaded.keys() == without.keys() and all(torch.equal(loaded[key], without[key]) for key in without)
    torch.save({key: value for key, value in without.items() if key != "bn1.weight"}, tmp_path / "part.pth")
    torch.save({**net.state_dict(), "bn1.weight": torch.ones(7)}, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "net.pth").read_bytes()[:-1000])
    for name, error in (("other.pth", ValueError), ("part.pth", ValueError), ("cut.pth", ValueError),
                        ("absent.pth", FileNotFoundError)):
        with pytest.raises(error, match=name) as caught:
            features.load_timm("resnet10t", tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no_such_model: none of its own names"):
        fid.load_extractor("no_such_model")


def test_dinov2_gives_the_class_token_at_224_px(tmp_path):
    """FD-DINOv2 (arXiv:2306.04675) by the smallest of the family; the file has positions for 518 px."""
    import timm
    torch.manual_seed(0)
    name = "vit_small_patch14_dinov2.lvd142m"
    torch.save(timm.create_model(name, depth=1).state_dict(), tmp_path / "dino.pth")
    timm_model = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda *args, **kwargs: timm_model(*args, depth=1, **kwargs))
        extractor = fid.load_extractor(name, tmp_path / "dino.pth")
    images = data.Shapes(2).__getitems__([0, 1])[0]
    x = torch.nn.functional.interpolate(images.float() / 255, size=(224, 224), mode="bicubic",
                                        antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = (x - mean) / std  # ImageNet's
    with torch.no_grad():
        tokens = extractor.net.forward_features(x)
        found = extractor(images)["features"]
    assert tokens.shape == (2, 1 + 16 * 16, 384) and extractor.label == f"FD-{name}"
    torch.testing.assert_close(found, tokens[:, 0])
