"""Linear probes: solvable, hopeless and rare attributes, optimality, scores by hand, the command end to end.

    pytest tests/test_probe.py          about 20 s on 2 CPU cores
"""
import csv
import inspect
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu, pearsonr

import attributes
import common
import data
import latent_metrics
import probe
from mapper import Mapper, MapperConfig
from sit import SIT_SIZES, SiT, SiTConfig
from vae import VAE, VAE_SIZES

CHANNELS = VAE_SIZES["tiny"].z_channels
CPU = ["--device", "cpu", "--workers", "0", "--batch-size", "100", "--cache", ""]


def random_rows(n, dim, seed):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def three(x, y):
    """Cut rows into train, validation and test, 3 : 1 : 2."""
    n = len(x) // 6
    return x[:3 * n], y[:3 * n], x[3 * n:4 * n], y[3 * n:4 * n], x[4 * n:], y[4 * n:]


def fit_and_score(x, y):
    *rows, test_y = three(x, y)
    return probe.f1_scores(probe.fit_linear_probe(*rows)["logits"], test_y)


# the fit

def test_separable_attributes_are_found_without_error():
    x = random_rows(1200, 20, 0) * torch.logspace(-3, 3, 20) + 5  # any scale and offset
    directions = random_rows(20, 6, 1)
    margin = ((x - x.mean(0)) / x.std(0)) @ directions
    x, y = x[margin.abs().amin(1) > 0.3], (margin[margin.abs().amin(1) > 0.3] > 0).int()
    score = fit_and_score(x, y)
    assert score["macro_f1"] > 0.995 and score["micro_f1"] > 0.995
    wide = torch.cat([x, 20 * (2 * y - 1).repeat_interleave(3, 1)], 1)
    assert fit_and_score(wide, y) == {"macro_f1": 1, "micro_f1": 1, "per_attribute": [1] * 6}


def test_shuffled_labels_are_recognised_at_chance():
    x, y = random_rows(6000, 30, 2), torch.randint(0, 4, (6000,), generator=torch.Generator().manual_seed(3))
    *rows, test_y = three(x, y)
    accuracy = latent_metrics.class_scores(probe.fit_linear_probe(*rows)["logits"], test_y)["class_accuracy"]
    assert abs(accuracy - 0.25) < 3 * (0.25 * 0.75 / len(test_y)) ** 0.5


def test_shuffled_attributes_have_auc_and_balanced_accuracy_of_chance():
    x, y = random_rows(6000, 30, 20), (random_rows(6000, 4, 21) > torch.tensor([-1, 0, 0.5, 1])).int()
    train_x, train_y, val_x, val_y, test_x, test_y = three(x, y)
    fit = probe.fit_linear_probe(train_x, train_y, val_x, val_y, test_x)
    scores = latent_metrics.attribute_scores(fit, train_y, val_y, test_y, list("abcd"))
    for row, truth in zip(scores["per_attribute"].values(), test_y.T):
        p, n = int(truth.sum()), int((1 - truth).sum())
        assert abs(row["auc"] - 0.5) < 3 * ((p + n + 1) / (12 * p * n)) ** 0.5
        assert abs(row["balanced_accuracy"] - 0.5) < 3 * (1 / p + 1 / n) ** 0.5 / 4


def test_classes_with_distant_centres_are_found_without_error():
    y = torch.arange(600) % 5
    x = random_rows(600, 8, 4) + 20 * torch.nn.functional.one_hot(y, 8)
    *rows, test_y = three(x, y)
    scores = latent_metrics.class_scores(probe.fit_linear_probe(*rows)["logits"], test_y)
    assert scores == {"class_accuracy": 1, "class_balanced_accuracy": 1}


def test_fit_is_the_minimum_of_the_penalised_loss():
    x, noise = random_rows(600, 5, 5), random_rows(600, 2, 6)
    y = ((x @ random_rows(5, 2, 7) + noise) > 0).int()
    train_x, train_y, val_x, val_y, *_ = three(x, y)
    decay = 0.05
    found = probe.fit_linear_probe(train_x, train_y, val_x, val_y, train_x, (decay,))["logits"].double()
    inputs, targets = ((train_x - train_x.mean(0)) / train_x.std(0)).double(), train_y.double()
    weight = torch.linalg.lstsq(torch.cat([inputs, torch.ones(len(inputs), 1)], 1), found).solution
    error = (torch.sigmoid(found) - targets) / len(inputs)
    gradient = inputs.T @ error + decay * weight[:-1]
    assert gradient.abs().max() < 5e-4 < 0.02 < (decay * weight[:-1]).abs().max()
    assert error.sum(0).abs().max() < 5e-4  # the bias has no penalty


def test_weight_decay_is_chosen_on_validation_and_the_test_split_has_no_say():
    x, y = random_rows(900, 300, 8), torch.zeros(900, 1)
    y[:, 0] = (x[:, 0] + random_rows(900, 1, 9)[:, 0] > 0).float()
    train_x, train_y, val_x, val_y, test_x, _ = three(x, y)
    rows = train_x, train_y, val_x, val_y
    best = probe.fit_linear_probe(*rows, test_x)
    scores = [probe.fit_linear_probe(*rows, test_x, (d,))["val_score"] for d in latent_metrics.WEIGHT_DECAYS]
    assert max(scores) > min(scores) + 0.02  # there is something to choose
    assert best["val_score"] == pytest.approx(max(scores), abs=0.015)
    assert probe.fit_linear_probe(*rows, 100 * test_x)["weight_decay"] == best["weight_decay"]
    assert torch.equal(best["logits"], probe.fit_linear_probe(*rows, test_x)["logits"])


def test_more_iterations_bring_a_hard_fit_nearer_to_its_minimum():
    x = random_rows(600, 40, 31) @ torch.diag(torch.logspace(0, -2, 40)) @ random_rows(40, 40, 32)
    *rows, _ = three(x, (x[:, :2] > 0).int())

    def evaluations_and_logits(max_iter):
        fit = probe.fit_linear_probe(*rows, weight_decays=(1e-4,), max_iter=max_iter)
        return fit["evaluations"], fit["logits"]
    (few, early), (more, late), (_, last) = (evaluations_and_logits(n) for n in (5, 50, 1000))
    assert few < 12 < more and (early - last).abs().mean() > 3 * (late - last).abs().mean()


def test_scale_and_offset_of_features_and_constant_ones_make_no_difference():
    x = random_rows(600, 6, 10)
    y = (x[:, :2] > 0.3).int()
    moved = torch.cat([1000 * x + 5, torch.full((600, 1), 7.0)], 1)
    *rows, _ = three(x, y)
    *moved_rows, _ = three(moved, y)
    expected = probe.fit_linear_probe(*rows)["logits"]
    torch.testing.assert_close(probe.fit_linear_probe(*moved_rows)["logits"], expected, rtol=5e-2, atol=0.2)


def test_sizes_that_do_not_fit_and_nan_are_refused():
    x, y = random_rows(30, 3, 11), torch.zeros(30, 2)
    with pytest.raises(ValueError, match="30 train and 30 validation features for 29"):
        probe.fit_linear_probe(x, y[1:], x, y, x)
    with pytest.raises(ValueError, match="not finite"):
        probe.fit_linear_probe(x * torch.nan, y, x, y, x)


class Watched:
    """Rows that remember how many of them were asked for at once."""

    def __init__(self, array):
        self.array, self.shape, self.most = array, array.shape, 0

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        self.most = max(self.most, len(self.array[rows]))
        return self.array[rows]


@pytest.mark.parametrize("kind, tolerance", [("float32", 1e-3), ("float16", 2e-2)])
def test_features_on_disk_are_fitted_in_chunks_to_the_same_minimum(tmp_path, monkeypatch, kind, tolerance):
    x, noise = random_rows(1200, 24, 22), random_rows(1200, 3, 23)
    y = ((x @ random_rows(24, 3, 24) + 2 * noise) > 0).int()
    *rows, _ = three(x, y)
    expected = probe.fit_linear_probe(*rows)
    np.save(tmp_path / "x.npy", x.numpy().astype(kind))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    train, val, test = (Watched(mapped[part]) for part in (slice(600), slice(600, 800), slice(800, None)))
    monkeypatch.setattr(latent_metrics, "CHUNK", 24 * 50)
    monkeypatch.setattr(latent_metrics, "HISTORY", 1)  # the shortest one
    fit = probe.fit_linear_probe(train, rows[1], val, rows[3], test, memory=0)
    assert fit["weight_decay"] == expected["weight_decay"]
    torch.testing.assert_close(fit["logits"], expected["logits"], rtol=tolerance, atol=20 * tolerance)
    assert {train.most, val.most, test.most} == {50}


# scores

def test_f1_equals_a_count_by_hand_and_leaves_out_attributes_without_positives():
    logits = torch.tensor([[2.0, -1, 5], [1, 1, 5], [-1, 1, -5], [-2, -1, -5]])
    targets = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 1, 0]])
    # attribute 0: tp 1 fp 1 fn 1; attribute 1: tp 2 fp 0 fn 1; attribute 2: no positive
    scores = probe.f1_scores(logits, targets)
    assert scores["per_attribute"][:2] == pytest.approx([0.5, 0.8]) and np.isnan(scores["per_attribute"][2])
    assert scores["macro_f1"] == pytest.approx(0.65) and scores["micro_f1"] == pytest.approx(6 / 9)
    assert probe.f1_scores(torch.sigmoid(logits), targets, 0.5)["macro_f1"] == pytest.approx(0.65)


@pytest.mark.parametrize("ties", [False, True])
def test_auc_equals_the_count_of_pairs_and_the_u_statistic(ties):
    x = random_rows(300, 1, 25)[:, 0].numpy()
    x = np.round(2 * x) if ties else x
    y = (x + random_rows(300, 1, 26)[:, 0].numpy() > 0.8).astype(np.uint8)
    above, below = x[y == 1][:, None], x[y == 0]
    pairs = ((above > below) + 0.5 * (above == below)).mean()
    assert latent_metrics.auc_score(x, y) == pytest.approx(pairs, abs=1e-12)
    u = mannwhitneyu(x[y == 1], x[y == 0]).statistic
    assert latent_metrics.auc_score(x, y) == pytest.approx(u / (y.sum() * (1 - y).sum()), abs=1e-12)
    assert all(np.isnan(latent_metrics.auc_score(x, y * 0 + same)) for same in (0, 1))


@pytest.mark.parametrize("ties", [False, True])
def test_chosen_threshold_has_the_best_f1_of_all(ties):
    x = random_rows(200, 1, 27)
    x = torch.round(2 * x) if ties else x
    y = (x + random_rows(200, 1, 28) > 1.2).int()
    found = latent_metrics.best_threshold(x[:, 0].numpy(), y[:, 0].numpy())
    values = x[:, 0].unique().double()
    every = [values[0] - 1, *((values[1:] + values[:-1]) / 2)]
    best = max(probe.f1_scores(x, y, threshold)["macro_f1"] for threshold in every)
    assert probe.f1_scores(x, y, found)["macro_f1"] == pytest.approx(best)
    assert best > min(probe.f1_scores(x, y, threshold)["macro_f1"] for threshold in every)
    assert found in map(float, every)
    assert latent_metrics.best_threshold(x[:, 0].numpy(), np.zeros(200)) == 0
    assert latent_metrics.best_threshold(np.array([1.0, 2, 3]), np.array([1, 0, 0])) < 1  # all marked is best


def test_thresholds_are_chosen_on_validation_and_used_on_test():
    logits, val_logits = torch.tensor([[-1.0], [-3], [-5]]), torch.tensor([[-2.0], [-2.5], [-4], [-6]])
    val_y, test_y = torch.tensor([[1], [1], [0], [0]]), torch.tensor([[1], [0], [0]])
    fit = {"logits": logits, "val_logits": val_logits, "weight_decay": 1}
    scores = latent_metrics.attribute_scores(fit, val_y, val_y, test_y, ["a"])
    assert scores["per_attribute"]["a"]["threshold"] == -3.25  # between -2.5 and -4
    assert scores["macro_f1"] == 0 and scores["macro_f1_tuned"] == pytest.approx(2 / 3)


def test_attributes_without_positives_or_negatives_are_named_and_left_out():
    logits = torch.tensor([[2.0, -1, 5, 1, 1], [1, 1, 5, 1, -1], [-1, 1, -5, 1, -1], [-2, -1, -5, 1, 3]])
    test_y = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 0, 1, 0], [1, 1, 0, 1, 0], [0, 1, 0, 1, 1]])
    ones, no_train = torch.ones(4, 5), torch.ones(4, 5)
    no_train[:, 4] = 0
    fit = {"logits": logits, "val_logits": logits, "weight_decay": 1}
    names = ["hue=red", "hue=blue", "rare", "always", "never fitted"]
    scores = latent_metrics.attribute_scores(fit, no_train, ones, test_y, names)
    assert scores["left_out"] == {"rare": "no positive in the test split",
                                  "never fitted": "no positive in the train split"}
    assert {*scores["per_attribute"]} == {"hue=red", "hue=blue", "always"}
    assert scores["macro_f1"] == pytest.approx((0.5 + 0.8 + 1) / 3)  # 4/2 of 6 marked, 4 of 5, all
    assert scores["groups"] == {"hue": pytest.approx(0.65), "always": 1}
    assert scores["without_negatives"] == ["always"]
    assert scores["auc"] == pytest.approx((3 / 4 + 2.5 / 3) / 2)  # pairs in order, a tie is half
    assert scores["balanced_accuracy"] == pytest.approx((0.5 + (2 / 3 + 1) / 2) / 2)
    with pytest.raises(ValueError, match="none of 1 attributes has a positive"):
        latent_metrics.attribute_scores(fit, torch.zeros(4, 1), ones[:, :1], test_y[:, :1], ["a"])


def test_attribute_that_is_never_marked_has_f1_zero_and_counts():
    targets = torch.tensor([[1, 1], [0, 1]])
    assert probe.f1_scores(torch.tensor([[-1.0, 1], [-1, 1]]), targets)["macro_f1"] == 0.5


def test_rare_attribute_is_found():
    x = random_rows(3000, 10, 12)
    y = (x @ random_rows(10, 1, 13)).squeeze() / 10**0.5
    rare = (y > y.quantile(0.99)).int()[:, None]
    assert 0.009 < rare.float().mean() < 0.011
    assert fit_and_score(x, rare)["macro_f1"] > 0.65  # 10 positives among 1,000 test rows


def test_top_recall_counts_the_positives_among_the_highest():
    logits = torch.tensor([[9.0, 8, 7, 6], [1, 2, 3, 4]])
    targets = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1]])
    assert latent_metrics.top_recall(logits, targets, 2) == pytest.approx(2 / 3)
    assert latent_metrics.top_recall(logits, targets, 5) == 1


def test_balanced_accuracy_gives_every_class_the_same_weight():
    labels = torch.tensor([0] * 9 + [1])
    scores = latent_metrics.class_scores(torch.tensor([[1.0, 0]]).repeat(10, 1), labels)
    assert scores["class_accuracy"] == pytest.approx(0.9) and scores["class_balanced_accuracy"] == 0.5


# other measures

def test_effective_rank_is_the_number_of_equal_directions():
    basis = torch.linalg.qr(random_rows(12, 12, 14)).Q
    z = (random_rows(200 * 16, 3, 15) @ basis[:3]).view(200, 4, 4, 12).permute(0, 3, 1, 2)
    found = probe.latent_measures(z)
    assert found["effective_rank"] == pytest.approx(3, abs=0.05)
    assert 0 < found["channel_std_min"] <= found["channel_std_max"] < 1.2


def test_density_gini_and_mixture_fit_see_clusters():
    spread = random_rows(200 * 16, 2, 16)
    centres = 20 * random_rows(4, 2, 17)
    clusters = centres[torch.arange(200 * 16) % 4] + 0.3 * spread
    uniform = torch.rand(200 * 16, 2, generator=torch.Generator().manual_seed(18))
    flat, dense, even = (probe.latent_measures(x.view(200, 4, 4, 2).permute(0, 3, 1, 2))
                         for x in (spread, clusters, uniform))
    assert flat["gmm_nll"] == pytest.approx(0.5 * np.log(2 * np.pi * np.e), abs=0.05)  # of one Gaussian
    assert dense["gmm_nll"] < flat["gmm_nll"] - 0.5
    assert even["density_gini"] < flat["density_gini"] - 0.1


def test_spectra_are_those_of_noise_of_a_wave_and_of_a_constant():
    noise = random_rows(4000 * 4, 64, 29).view(4000, 4, 8, 8).numpy()
    bands, high = latent_metrics.spatial_power(noise)
    np.testing.assert_allclose(bands, 1 / 64, rtol=0.05)
    radius = np.hypot(np.fft.fftfreq(8)[:, None], np.fft.fftfreq(8))
    assert high == pytest.approx((radius > 0.25).mean(), rel=0.02)
    wave = np.cos(2 * np.pi * 3 * np.arange(8) / 8)[None, None, None].repeat(8, 2)  # 3 cycles, in x
    bands, high = latent_metrics.spatial_power(wave)
    assert np.argmax(bands) == 3 and high == pytest.approx(1) and sum(bands[:3]) < 1e-12
    assert latent_metrics.spatial_power(np.ones((2, 1, 8, 8)))[1] == 0
    z = noise * np.array([4, 3, 2, 1])[:, None, None]
    found = latent_metrics.latent_measures(torch.from_numpy(z))
    np.testing.assert_allclose(found["spectrum"], np.array([16, 9, 4, 1]) / 30, rtol=0.03)
    np.testing.assert_allclose(found["channel_std"], [4, 3, 2, 1], rtol=0.02)


def test_pca_colours_follow_the_strongest_directions_whatever_scale_and_offset():
    weights = torch.tensor([9.0, 4, 2] + [0.01] * 5)
    tokens = (random_rows(16 * 49, 8, 19) * weights).view(16, 49, 8)
    colours = probe.pca_rgb(tokens)
    assert colours.shape == (16, 49, 3) and colours.dtype == np.uint8
    for k in range(3):
        correlation = np.corrcoef(colours[..., k].ravel(), tokens[..., k].numpy().ravel())[0, 1]
        assert correlation > 0.95  # positive: the sign is fixed
    np.testing.assert_allclose(probe.pca_rgb(3 * tokens + 7).astype(int), colours, atol=1)


# the command

@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A tiny random VAE with a mapper, one without, and a SiT on the latents of the first."""
    folder = tmp_path_factory.mktemp("probe")
    for seed, name in enumerate(("send", "plain")):
        torch.manual_seed(seed)
        vae, mapper = VAE(VAE_SIZES["tiny"]), Mapper(MapperConfig(CHANNELS, 4, 128, projector_dim=64))
        has = name == "send"
        common.save_checkpoint(folder / name / "ckpt_0000001.pt", {
            "format": "nanosendvae-vae", "step": 1, "model": vae.state_dict(), "ema": None,
            "model_config": asdict(vae.config), "mapper": mapper.state_dict() if has else None,
            "mapper_config": asdict(mapper.config) if has else None, "teacher": "shapes" if has else None,
            "args": {}})
        if has:
            sit = SiT(SiTConfig(input_size=4, in_channels=CHANNELS, hidden_size=32, depth=2, num_heads=2,
                                num_classes=10))
            for block in sit.blocks:  # away from the identity, so that labels reach the tokens
                torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.5)
            path = str(folder / name / "ckpt_0000001.pt")
            meta = {"vae": path, "vae_hash": common.state_hash(vae.state_dict()), "mean": [0.0] * CHANNELS,
                    "std": [1.0] * CHANNELS}
            common.save_checkpoint(folder / "sit" / "ckpt_0000001.pt", {
                "format": "nanosendvae-sit", "step": 1, "model": sit.state_dict(), "ema": sit.state_dict(),
                "model_config": asdict(sit.config), "latents": meta, "args": {}})
    return folder


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """600 train, 150 validation and 400 test images of the embedded set."""
    monkeypatch.setattr(attributes, "SHAPES_TRAIN", 600)
    monkeypatch.setitem(data.SHAPES_NUM, "val", 400)


def test_command_compares_vaes_side_by_side(checkpoints, tmp_path, capsys):
    report = probe.main(["--data", "shapes", "--vae", str(checkpoints / "plain"), str(checkpoints / "send"),
                         "--out", str(tmp_path / "probe.json"), *CPU])
    text = capsys.readouterr().out
    assert "600 train, 150 validation, 400 test images" in text
    assert next(line for line in text.splitlines() if line.startswith(" ")).split() == ["plain", "send"]
    for line in ("flat macro_f1", "flat macro_f1_tuned", "flat auc", "flat balanced_accuracy",
                 "pooled macro_f1", "pooled top5_recall", "flat class_accuracy", "latent effective_rank",
                 "flat F1 of hue"):
        cells = next(row for row in text.splitlines() if row.startswith(line + " ")).split()[-2:]
        assert all(0 < float(cell) < 20 for cell in cells) and cells[0] != cells[1]
    assert json.loads((tmp_path / "probe.json").read_text()) == json.loads(json.dumps(report))
    for vae in report["vaes"]:
        flat = vae["flat"]
        assert {*flat["groups"]} == {name.split("=")[0] for name in data.Shapes(1).attribute_names}
        assert flat["macro_f1"] > vae["pooled"]["macro_f1"] > 0.1  # pooling loses positions
        assert flat["macro_f1_tuned"] > flat["macro_f1"] and 0.6 < flat["auc"] < 1
        assert len(flat["per_attribute"]) == 41 and not flat["left_out"]
    bars = np.asarray(Image.open(tmp_path / "probe.png"))
    assert ((bars == (0, 0x72, 0xB2)).all(2).sum() > 5000) and ((bars == (0xD5, 0x5E, 0)).all(2).sum() > 5000)


def test_bars_are_as_long_as_their_values(tmp_path):
    values = {"a": [0.5, 0.25], "b": [1.0, 0.0]}
    probe.draw_bars(tmp_path / "bars.png", [("title", values, 1.0)], ["first", "second"])
    picture = np.asarray(Image.open(tmp_path / "bars.png"))
    for k, colour in enumerate(((0, 0x72, 0xB2), (0xD5, 0x5E, 0))):
        lengths = (picture == colour).all(2)[60:].sum(1)
        found = [length for i, length in enumerate(lengths) if length and length != lengths[i - 1]]
        expected = [values[name][k] * 630 for name in "ab"]
        np.testing.assert_allclose(found, expected, atol=2.1)


def test_probed_features_are_the_flattened_posterior_means(checkpoints, tmp_path):
    args = probe.parse_args(["--vae", "x", *CPU, "--cache", str(tmp_path)])
    found = attributes.open_attributes("shapes")
    vae = probe.load_vae(checkpoints / "plain" / "ckpt_0000001.pt")
    arrays = probe.encode(found.splits["val"], {}, vae, "hash", args, "cpu")
    shapes = data.Shapes(750, 0, "train")
    images, labels = shapes.__getitems__(range(600, 750))
    with torch.no_grad():
        mean = vae.encode(data.to_float(images)).mean
    np.testing.assert_allclose(arrays["z"], mean, rtol=1e-5, atol=1e-5)
    split = found.splits["val"]
    assert (split.classes[arrays["rows"]] == labels.numpy()).all()
    assert (split.attributes[arrays["rows"]] == shapes.attributes[600:]).all()
    assert (found.splits["test"].images.images == data.Shapes(400, 0, "val").images).all()


def test_cached_features_are_used_again_for_the_same_vae_and_images_only(checkpoints, tmp_path, monkeypatch):
    flags = ["--mapper", "--classes", "--num-train", "100", "--out", str(tmp_path / "x.json"), *CPU,
             "--cache", str(tmp_path / "cache")]
    send, plain = str(checkpoints / "send"), str(checkpoints / "plain")
    reads, loader = [], data.eval_loader
    monkeypatch.setattr(data, "eval_loader", lambda *a, **k: (reads.append(1), loader(*a, **k))[1])
    first = probe.main(["--vae", send, *flags])
    assert len(reads) == 3 and len(list((tmp_path / "cache").rglob("*.npy"))) == 9  # rows, z, mapper
    assert probe.main(["--vae", send, *flags])["vaes"] == first["vaes"] and len(reads) == 3
    flags.remove("--mapper")
    probe.main(["--vae", send, *flags, "--num-train", "50"])
    assert len(reads) == 5  # test images are the same, train and validation images are not
    probe.main(["--vae", plain, *flags])
    assert len(reads) == 8
    half = probe.main(["--vae", send, *flags, "--store", "float16"])
    assert len(reads) == 11 and not list((tmp_path / "cache").rglob(".*"))
    accuracy = [report["vaes"][0]["flat"]["class_accuracy"] for report in (first, half)]
    assert accuracy[0] == pytest.approx(accuracy[1], abs=0.02)


def test_features_that_are_not_finite_are_refused_and_leave_no_file(tmp_path):
    batches = [(slice(0, 2), (torch.ones(2, 3),)), (slice(2, 4), (torch.full((2, 3), 1e5),))]
    with pytest.raises(ValueError, match="not finite as float16.*--store float32"):
        probe.write_rows([tmp_path / "z.npy"], 4, iter(batches), "float16")
    assert not list(tmp_path.iterdir())
    probe.write_rows([tmp_path / "z.npy"], 4, iter(batches), "float32")
    assert np.load(tmp_path / "z.npy").sum() == 6 + 6e5


def test_mapper_and_sit_features_are_probed_in_eval_mode_with_the_null_label(checkpoints, monkeypatch):
    seen = []
    original = SiT.features

    def spy(self, z_t, t, y, block):
        seen.append((self.training, y.unique().tolist(), t.unique().tolist(), block))
        return original(self, z_t, t, y, block)
    mapper_modes, mapper_forward = set(), Mapper.forward
    monkeypatch.setattr(SiT, "features", spy)
    monkeypatch.setattr(Mapper, "forward", lambda self, *inputs: (mapper_modes.add(self.training),
                                                                  mapper_forward(self, *inputs))[1])
    flags = ["--sit", str(checkpoints / "sit"), "--block", "2", "--t", "0.25", "--mapper", *CPU, "--out",
             str(checkpoints / "new" / "sit.json"), "--num-train", "200", "--max-iter", "20"]
    first, second = probe.main(flags), probe.main(flags)
    assert {str(call) for call in seen} == {str((False, [10], [0.25], 2))} and mapper_modes == {False}
    (vae,) = first["vaes"]
    assert {"flat", "pooled", "mapper", "sit"} <= {*vae} and vae["sit"]["macro_f1"] > 0
    assert json.dumps(vae) == json.dumps(second["vaes"][0])  # deterministic


def test_labels_cannot_reach_the_sit(checkpoints, monkeypatch):
    args = probe.parse_args(["--sit", str(checkpoints / "sit" / "ckpt_0000001.pt"), "--block", "1", *CPU])
    vae_hash = common.load_checkpoint(args.sit)["latents"]["vae_hash"]
    name, function = probe.sit_features(args, "vae", vae_hash, "cpu")
    assert [*inspect.signature(function).parameters] == ["z", "rows"]  # neither images nor labels
    z = random_rows(6, 16 * CHANNELS, 30).view(6, -1, 4, 4)
    features = function(z, np.arange(6))
    torch.testing.assert_close(function(z[3:], np.arange(3, 6)), features[3:])  # noise by image, not batch
    assert not torch.equal(function(z, np.arange(1, 7)), features)
    other = torch.zeros(CHANNELS), torch.ones(CHANNELS) * 2
    monkeypatch.setattr(probe.weights, "statistics_of", lambda content: other)
    assert probe.sit_features(args, "vae", vae_hash, "cpu")[0] != name
    monkeypatch.undo()
    for flags in (["--block", "2"], ["--t", "0.5"], ["--seed", "1"]):  # each has a file of its own
        other = probe.parse_args(["--sit", args.sit, "--block", "1", *CPU, *flags])
        assert probe.sit_features(other, "vae", vae_hash, "cpu")[0] != name
    model, content = probe.read_sit(args.sit)
    model.null_label = None
    monkeypatch.setattr(probe, "read_sit", lambda path: (model, content))
    with pytest.raises(ValueError, match="has no null label"):
        probe.sit_features(args, "vae", vae_hash, "cpu")


def test_a_published_sit_is_probed_with_the_statistics_that_it_is_given(checkpoints, tmp_path, monkeypatch):
    """The same weights as a bare state dict: the features of our checkpoint, given its statistics."""
    ours, bare = str(checkpoints / "sit" / "ckpt_0000001.pt"), tmp_path / "sit.pt"
    stats = tmp_path / "stats.pt"
    monkeypatch.setitem(SIT_SIZES, "test/1", dict(hidden_size=32, depth=2, num_heads=2, patch_size=1))
    state = common.load_checkpoint(ours)
    torch.save(state["ema"] or state["model"], bare)
    torch.save({key: torch.tensor(state["latents"][key]) for key in ("mean", "std")}, stats)
    z, both = random_rows(3, 16 * CHANNELS, 31).view(3, -1, 4, 4), []
    vae = str(checkpoints / "plain" / "ckpt_0000001.pt")
    for sit, flags in ((ours, []), (str(bare), ["--latent-stats", str(stats)])):
        args = probe.parse_args(["--sit", sit, "--block", "1", *CPU, *flags])
        both.append(probe.sit_features(args, vae, state["latents"]["vae_hash"], "cpu")[1](z, np.arange(3)))
    assert torch.equal(*both)
    args.latent_stats = None
    with pytest.raises(ValueError, match="no latent statistics in .*give --latent-stats"):
        probe.sit_features(args, vae, "", "cpu")
    with pytest.raises(ValueError, match="does not name its VAE: give --vae"):
        probe.main(["--sit", str(bare), *CPU])


def test_sit_of_another_vae_and_missing_mapper_are_refused(checkpoints):
    plain, out = str(checkpoints / "plain"), ["--out", str(checkpoints / "x.json")]
    with pytest.raises(ValueError, match="was trained on latents of VAE"):
        probe.main(["--vae", plain, "--sit", str(checkpoints / "sit"), "--num-train", "20", *CPU, *out])
    with pytest.raises(ValueError, match="holds no mapper"):
        probe.main(["--vae", plain, "--mapper", "--num-train", "20", *CPU, *out])


@pytest.mark.parametrize("flags, message", [
    (["--report", "a", "--vae", "b"], "both name VAEs"), (["--fid-csv", "x"], "is for --report"),
    (["--t", "7"], "outside 0..1"), (["--data", "celeba:nowhere"], "nowhere: no such folder")])
def test_flags_that_do_not_go_together_are_refused(flags, message):
    vae = [] if "--report" in flags else ["--vae", "x"]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        probe.main([*flags, *vae, *CPU])


# the report

def test_report_has_every_measure_and_its_correlation_with_fid(checkpoints, tmp_path, capsys):
    torch.manual_seed(2)
    third = VAE(VAE_SIZES["tiny"])
    common.save_checkpoint(tmp_path / "third" / "ckpt_0000001.pt", {
        "format": "nanosendvae-vae", "step": 1, "model": third.state_dict(), "ema": None,
        "model_config": asdict(third.config), "mapper": None, "mapper_config": None, "teacher": None,
        "args": {}})
    vaes = [str(checkpoints / "plain"), str(checkpoints / "send"), str(tmp_path / "third")]
    (tmp_path / "fid.csv").write_text(f"\ufeffvae, fid\r\n{vaes[2]} , 5.5\r\n{vaes[0]},9\r\n{vaes[1]},7\r\n")
    report = probe.main(["--report", *vaes, "--fid-csv", str(tmp_path / "fid.csv"), "--num-train", "150",
                         "--out", str(tmp_path / "r.json"), *CPU])
    rows = {row["measure"]: row for row in report["report"]}
    assert rows["FID"]["values"] == [9, 7, 5.5]
    assert {*rows} == {"FID", *probe.REPORT} - {"attribute F1, mapper"}
    for measure, (kind, key) in probe.REPORT.items():
        if measure in rows:
            assert rows[measure]["values"] == [vae[kind][key] for vae in report["vaes"]]
            assert rows[measure]["r"] == pytest.approx(pearsonr(rows[measure]["values"], [9, 7, 5.5])[0])
    text = (tmp_path / "r_report.md").read_text()
    assert text.splitlines()[2].startswith("| FID | 9 | 7 | 5.5 |") and text.splitlines()[0] in \
        capsys.readouterr().out
    picture = Image.open(tmp_path / "r_pca.png")  # images; latents of three; mapper and teacher of send
    assert picture.height == 6 * 96 and picture.width > 12 * 96
    for name in ("r.png", "r_pca.png"):
        assert f"({name})" in text and (tmp_path / name).is_file()


def test_fid_file_that_lacks_a_vae_or_correlates_two_is_refused(tmp_path):
    path = tmp_path / "fid.csv"
    path.write_text("vae,fid\na,1\nb,2\nc,3\n")
    assert probe.read_fids(path, [("x", "c"), ("b",), ("a", "y")]) == [3, 2, 1]
    with pytest.raises(ValueError, match="no line for d; it has a, b, c"):
        probe.read_fids(path, [("a",), ("b",), ("d", "e")])
    with pytest.raises(ValueError, match="wants 3 or more"):
        probe.read_fids(path, [("a",), ("b",)])
    path.write_text("vae,fid\na,low\n")
    with pytest.raises(ValueError, match="want a header, then lines of a VAE and its FID"):
        probe.read_fids(path, [("a",)])


def test_correlation_of_what_does_not_vary_is_left_blank():
    results = [{"latent": {"gmm_nll": 1.0, "density_gini": k / 10}} for k in range(3)]
    rows = {row["measure"]: row["r"] for row in probe.report_rows(results, [3.0, 5.0, 7.0])}
    assert rows["GMM fit, nats"] is None and rows["Gini of the density"] == pytest.approx(1)
    assert "| 1 | 1 | 1 |  |" in probe.markdown(probe.report_rows(results, [3.0, 5.0, 7.0]), list("abc"))


def test_teacher_without_weights_is_named_and_its_row_left_out(checkpoints, tmp_path, capsys):
    paths = [str(checkpoints / "send" / "ckpt_0000001.pt")]
    images, _ = data.Shapes(4).__getitems__(range(4))
    args = probe.parse_args(["--teacher-weights", str(tmp_path / "none.pt")])
    probe.draw_pca(tmp_path / "pca.png", paths, ["send"], images, args, "cpu")
    assert "no row of teacher tokens" in capsys.readouterr().out
    assert Image.open(tmp_path / "pca.png").height == 3 * 96


def test_names_of_vaes_are_what_tells_them_apart():
    assert probe.short_names(["out/a/vae/ckpt_1.pt", "out/b/vae/ckpt_1.pt"]) == ["a", "b"]
    assert probe.short_names(["x/a.pt", "x/y/a.pt"]) == ["a.pt", "y/a.pt"]
    assert probe.short_names(["out/run/vae/ckpt_1.pt"]) == ["run/vae/ckpt_1.pt"]


# folders

def test_folder_is_probed_by_its_attributes_and_classes(checkpoints, tmp_path, capsys):
    shapes, folder = data.Shapes(600, 1, "train"), tmp_path / "set"
    images = shapes.images[~shapes.factors["inverted"]][:200]  # all of them with a dark background
    folder.mkdir()
    with open(folder / "lines.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "warm", "never"])
        for i, image in enumerate(images):
            name = f"class {i % 2}/{i:03d}.png"  # class 1 is the mirror image in brightness
            (folder / name).parent.mkdir(exist_ok=True)
            Image.fromarray(image if i % 2 else 255 - image).save(folder / name)
            writer.writerow([name, i % 2, 0])
    flags = ["--data", str(folder), "--image-size", "32", "--vae", str(checkpoints / "plain"), *CPU,
             "--out", str(tmp_path / "out.json")]
    report = probe.main(flags)
    assert report["vaes"][0]["flat"]["class_accuracy"] > 0.9 and "macro_f1" not in report["vaes"][0]["flat"]
    (folder / "lines.csv").rename(folder / "attributes.csv")
    capsys.readouterr()
    report = probe.main(flags)
    flat = report["vaes"][0]["flat"]
    assert flat["left_out"] == {"never": "no positive in the train split"}
    assert {*flat["per_attribute"]} == {"warm"} and flat["macro_f1"] > 0.9 and flat["class_accuracy"] > 0.9
    assert report["images"] == {"train": 140, "val": 20, "test": 40}
    assert "never: no positive in the train split" in capsys.readouterr().out
    assert "macro_f1" not in probe.main([*flags, "--classes"])["vaes"][0]["flat"]
    # attributes of one set, classes of another
    (loose := tmp_path / "loose").mkdir()
    lines = "".join(f"{i}.png,{i % 2}\n" for i in range(40))
    (loose / "attributes.csv").write_text("filename,warm\n" + lines)
    for i in range(40):
        Image.fromarray(shapes.images[i] if i % 2 else 255 - shapes.images[i]).save(loose / f"{i}.png")
    (folder / "attributes.csv").unlink()
    both = probe.main(["--data", str(loose), "--class-data", str(folder), *flags[2:]])["vaes"][0]
    assert both["flat"]["class_accuracy"] == report["vaes"][0]["flat"]["class_accuracy"]
    assert {*both["flat"]["per_attribute"]} == {"warm"} and "class_accuracy" in both["pooled"]
    with pytest.raises(ValueError, match="has no classes to probe"):
        probe.main(["--data", str(loose), "--classes", *flags[2:]])


def test_attributes_follow_the_image_that_replaces_a_corrupt_one(checkpoints, tmp_path, capsys):
    shapes = data.Shapes(60, 1, "train")
    for i, image in enumerate(shapes.images):
        Image.fromarray(image).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "attributes.csv").write_text("filename,odd\n" + "".join(f"{i:02d}.png,{i % 2}\n"
                                                                        for i in range(60)))
    Path(tmp_path / "07.png").write_bytes(b"no image")
    args = probe.parse_args(["--vae", "x", *CPU, "--cache", str(tmp_path / "cache")])
    found = attributes.open_attributes(str(tmp_path), 32)
    vae = probe.load_vae(checkpoints / "plain" / "ckpt_0000001.pt")
    split = attributes.Split(found.splits["train"].images, np.arange(5, 10), found.splits["train"].attributes)
    arrays = probe.encode(split, {}, vae, "hash", args, "cpu")
    assert arrays["rows"].tolist() == [5, 6, 8, 8, 9]
    assert np.array_equal(arrays["z"][2], arrays["z"][3])
    assert split.attributes[arrays["rows"]][:, 0].tolist() == [1, 0, 0, 0, 1]
