"""Linear probes: optimality, rare attributes, scores by hand, measures of a space, the command end to end.

    python -m pytest tests/test_probe.py          15 s on 2 CPU cores
"""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import attributes
import common
import data
import probe
from shapes.scenes import Shapes
from sit import SIT_SIZES
from small import small_mapper, small_sit, small_sit_checkpoint, small_vae, small_vae_checkpoint

CPU = ["--device", "cpu", "--workers", "0", "--batch-size", "100"]


def random_rows(n, dim, seed):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def three(x, y):
    """Cut rows into train, validation and test, 3 : 1 : 2."""
    n = len(x) // 6
    return x[:3 * n], y[:3 * n], x[3 * n:4 * n], y[3 * n:4 * n], x[4 * n:], y[4 * n:]


# the fit

def test_fit_is_the_minimum_of_the_penalised_loss():
    x, noise = random_rows(600, 5, 5), random_rows(600, 2, 6)
    y = ((x @ random_rows(5, 2, 7) + noise) > 0).int()
    train_x, train_y, val_x, val_y, *_ = three(x, y)
    decay = 0.05
    logits = probe.fit_linear_probe(train_x, train_y, val_x, val_y, train_x, (decay,))["logits"].double()
    inputs, targets = ((train_x - train_x.mean(0)) / train_x.std(0)).double(), train_y.double()
    weight = torch.linalg.lstsq(torch.cat([inputs, torch.ones(len(inputs), 1)], 1), logits).solution
    error = (torch.sigmoid(logits) - targets) / len(inputs)
    gradient = inputs.T @ error + decay * weight[:-1]
    assert gradient.abs().max() < 5e-4 < 0.02 < (decay * weight[:-1]).abs().max()
    assert error.sum(0).abs().max() < 5e-4  # the bias has no penalty
    # Scale, offset and constant features make no difference.
    train_x, val_x = (torch.cat([1000 * x + 5, torch.full((len(x), 1), 7.0)], 1) for x in (train_x, val_x))
    moved = probe.fit_linear_probe(train_x, train_y, val_x, val_y, train_x, (decay,))["logits"].double()
    torch.testing.assert_close(moved, logits, rtol=1e-2, atol=0.02)


def test_weight_decay_is_chosen_on_validation_and_the_test_split_has_no_say():
    x = random_rows(900, 300, 8)
    y = (x[:, :1] + random_rows(900, 1, 9) > 0).float()
    *rows, test_x, _ = three(x, y)
    best = probe.fit_linear_probe(*rows, test_x)
    scores = [probe.fit_linear_probe(*rows, test_x, (decay,))["val_score"] for decay in probe.WEIGHT_DECAYS]
    assert max(scores) > min(scores) + 0.02  # there is something to choose
    assert best["val_score"] == pytest.approx(max(scores), abs=0.015)
    assert probe.fit_linear_probe(*rows, 100 * test_x)["weight_decay"] == best["weight_decay"]
    assert torch.equal(best["logits"], probe.fit_linear_probe(*rows, test_x)["logits"])


@pytest.mark.parametrize("store, held, tolerance", [(np.float32, 2**29, 1e-3), (np.float16, 0, 2e-2)])
def test_float16_features_in_chunks_lead_to_the_same_minimum(monkeypatch, store, held, tolerance):
    x, noise = random_rows(1200, 24, 22), random_rows(1200, 3, 23)
    y = ((x @ random_rows(24, 3, 24) + 2 * noise) > 0).int()
    train_x, train_y, val_x, val_y, test_x, _ = three(x, y)
    expected = probe.fit_linear_probe(train_x, train_y, val_x, val_y, test_x)
    monkeypatch.setattr(probe, "CHUNK", 24 * 50)
    monkeypatch.setattr(probe, "HELD", held)
    monkeypatch.setattr(probe, "HISTORY", 1)  # the shortest one
    fit = probe.fit_linear_probe(train_x.numpy().astype(store), train_y, val_x, val_y, test_x)
    assert fit["weight_decay"] == expected["weight_decay"]
    torch.testing.assert_close(fit["logits"], expected["logits"], rtol=tolerance, atol=20 * tolerance)


# scores

def test_attributes_without_positives_or_negatives_are_named_and_left_out():
    logits = torch.tensor([[2.0, -1, 5, 1, 1], [1, 1, 5, 1, -1], [-1, 1, -5, 1, -1], [-2, -1, -5, 1, 3]])
    test_y = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 0, 1, 0], [1, 1, 0, 1, 0], [0, 1, 0, 1, 1]])
    ones, no_train = torch.ones(4, 5), torch.ones(4, 5)
    no_train[:, 4] = 0
    names = ["hue=red", "hue=blue", "rare", "always", "never fitted"]
    scores = probe.attribute_scores(logits, no_train, ones, test_y, names)
    assert scores["left_out"] == ["rare", "always", "never fitted"]
    assert {*scores["per_attribute"]} == {"hue=red", "hue=blue"}
    assert scores["macro_f1"] == pytest.approx((0.5 + 0.8) / 2)  # 2 * 1 of 4 marked, 2 * 2 of 5
    assert scores["micro_f1"] == pytest.approx(2 * 3 / 9) and scores["groups"] == {"hue": pytest.approx(0.65)}
    assert scores["auc"] == pytest.approx((3 / 4 + 2.5 / 3) / 2)  # pairs in order, a tie is half
    scores = probe.f1_scores(-torch.ones(3, 2), torch.tensor([[1, 0]] * 3))  # no marks; no positives
    assert scores["macro_f1"] == 0 and np.isnan(scores["per_attribute"][1])
    logits, targets = torch.tensor([[9.0, 8, 7, 6], [1, 2, 3, 4]]), torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1]])
    assert probe.top_recall(logits, targets, 2) == pytest.approx(2 / 3)


# measures of a latent space

def test_measures_of_a_gaussian_that_spans_4_of_12_channels_are_their_closed_forms():
    basis, shares = torch.linalg.qr(random_rows(12, 12, 14)).Q, np.array([16, 9, 4, 1]) / 30
    noise = random_rows(200 * 16, 4, 29)
    tokens = noise * torch.tensor([4.0, 3, 2, 1]) @ basis[:4] + 5

    def measures(tokens):
        return probe.latent_measures(tokens.view(200, 4, 4, -1).permute(0, 3, 1, 2))
    found = measures(tokens)
    assert found["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=0.04)
    for end, wanted in ("min", tokens.std(0).min()), ("max", tokens.std(0).max()):
        assert found[f"channel_std_{end}"] == pytest.approx(wanted.item(), rel=1e-3)
    assert found["gmm_nll"] == pytest.approx(0.5 * np.log(2 * np.pi * np.e), abs=0.05)
    assert found["density_gini"] == pytest.approx(1 / 3, abs=0.03)  # its density at its points is uniform
    clusters = measures(20 * random_rows(4, 2, 17)[torch.arange(200 * 16) % 4] + 0.3 * noise[:, :2])
    assert clusters["gmm_nll"] < found["gmm_nll"] - 0.5


def test_pca_colours_follow_the_strongest_directions_whatever_scale_and_offset():
    tokens = (random_rows(16 * 49, 8, 19) * torch.tensor([9.0, 4, 2] + [0.01] * 5)).view(16, 49, 8)
    colours = probe.colour_tokens(tokens, 14)
    assert colours.shape == (16, 3, 14, 14) and colours.dtype == torch.uint8
    for k in range(3):
        of_token = colours[:, k, ::2, 1::2].flatten()
        assert np.corrcoef(of_token, tokens[..., k].flatten())[0, 1] > 0.95  # positive: the sign is fixed
    torch.testing.assert_close(probe.colour_tokens(3 * tokens + 7, 14).int(), colours.int(), atol=1, rtol=0)


# the command

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """send: a random VAE with a mapper; plain: another without; other, no_null: SiTs that do not fit."""
    folder = tmp_path_factory.mktemp("probe")
    send = small_vae_checkpoint(folder / "send", mapper=small_mapper())
    small_vae_checkpoint(folder / "plain", vae=small_vae(seed=1))
    small_sit_checkpoint(folder / "other", vae=small_vae(seed=1), latents={"vae": str(send)})
    small_sit_checkpoint(folder / "no_null", sit=small_sit(use_null=False))
    return folder


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """400 train, 100 validation and 150 test images of the embedded set."""
    monkeypatch.setattr(attributes, "SHAPES_TRAIN", 400)
    monkeypatch.setitem(data.SHAPES_NUM, "val", 150)


def test_command_compares_vaes_side_by_side(folder, tmp_path, capsys):
    report = probe.main(["--vae", str(folder / "plain"), str(folder / "send"), "--max-iter", "15",
                         "--out", str(tmp_path / "probe.json"), *CPU])
    text = capsys.readouterr().out
    assert "at 16 px: {'train': 400, 'val': 100, 'test': 150}" in text  # the VAEs were trained at 16
    assert report["labels"] == report["args"]["vae"] and report["args"]["image_size"] == 16
    assert json.loads((tmp_path / "probe.json").read_text()) == json.loads(json.dumps(report))
    assert report["images_hash"]["test"] == Shapes(150, 0, "val", 16).images_hash
    cells = {row[0]: row[1:] for row in (line[2:-2].split(" | ") for line in text.splitlines())}
    for i, vae in enumerate(report["vaes"]):
        flat = vae["flat"]
        assert flat["macro_f1"] > vae["pooled"]["macro_f1"] > 0.05  # pooling loses positions
        assert len(flat["per_attribute"]) == 41 and 0.6 < flat["auc"] < 1 and 0.1 < flat["class_accuracy"] < 1
        for name, value in (("flat: macro_f1", flat["macro_f1"]), ("flat: F1 of hue", flat["groups"]["hue"]),
                            ("latent: effective_rank", vae["latent"]["effective_rank"])):
            assert float(cells[name][i]) == pytest.approx(value, abs=1e-4)


def test_features_are_posterior_means_and_mean_tokens_without_noise_or_label():
    """In batches of 30; the noise of the SiT depends on the image alone."""
    args = probe.parse_args(["--block", "1", "--t", "0.25", *CPU, "--batch-size", "30"])
    nets = {"vae": small_vae(), "mapper": small_mapper(), "sit": small_sit(),
            "statistics": (torch.zeros(4), torch.ones(4))}
    images, indices = attributes.open_attributes("shapes", 16)["val"]
    index, features = probe.encode(images, indices, nets, args, torch.device("cpu"), torch.float32)
    assert index.tolist() == list(range(400, 500))
    with torch.no_grad():
        shown = Shapes(500, 0, "train", 16).batch(range(400, 500))["images"]
        z = nets["vae"].encode(data.to_float(shown)).mean
        tokens = nets["mapper"](z, torch.zeros(100), torch.zeros_like(z))
        z_t = 0.75 * z + 0.25 * common.noise_for(z.shape[1:], range(400, 500), "cpu", 0, "probe")
        no_label = torch.full((100,), nets["sit"].null_label)  # the true label would leak the answer
        noised = nets["sit"].features(z_t, torch.full((100,), 0.25), no_label, 1)
    expected = {"flat": z.flatten(1), "pooled": z.mean((2, 3)), "mapper": tokens.mean(1),
                "sit": noised.mean(1)}
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_a_sit_names_its_vae_and_a_published_one_is_given_the_statistics(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(attributes, "SHAPES_TRAIN", 100)
    monkeypatch.setitem(data.SHAPES_NUM, "val", 40)
    flags, sit = ["--mapper", "--max-iter", "5", *CPU], small_sit(**SIT_SIZES["tiny/1"])
    small_sit_checkpoint(tmp_path, sit, latents={"vae": str(folder / "send")})
    ours = probe.main(["--sit", str(tmp_path), *flags, "--out", str(tmp_path / "a.json")])["vaes"][0]
    assert {"flat", "pooled", "mapper", "sit"} <= {*ours} and ours["sit"]["macro_f1"] > 0
    torch.save({"ema": sit.state_dict()}, tmp_path / "sit.pt")
    flags += ["--sit", str(tmp_path / "sit.pt"), "--out", str(tmp_path / "b.json"), "--latent-stats", "1"]
    assert probe.main([*flags, "--vae", str(folder / "send")])["vaes"][0] == ours  # and deterministic
    with pytest.raises(ValueError, match="--vae FILE"):
        probe.main(flags)


def test_report_has_a_table_and_a_picture_and_says_first_what_the_picture_lacks(folder, tmp_path, capsys):
    flags = ["--num-train", "60", "--max-iter", "5", "--out", str(tmp_path / "r.json"), *CPU]
    probe.main(["--report", str(folder / "plain"), *flags])
    text = (tmp_path / "r_report.md").read_text()
    said = capsys.readouterr().out
    assert "{'train': 60, 'val': 15," in said
    assert "| latent: gmm_nll |" in said and "| latent: gmm_nll |" in text
    assert f"![](r_pca.png)\n\nFrom the top: images, {folder}/plain: latent.\n" in text
    assert Image.open(tmp_path / "r_pca.png").size == (12 * 96, 2 * 96)
    with pytest.raises(ValueError, match="none.pt"):
        probe.main(["--report", str(folder / "send"), *flags, "--teacher-weights", str(tmp_path / "none.pt")])


def test_folder_is_probed_by_its_attributes_and_classes(folder, tmp_path, capsys):
    """Class 1 is the mirror image of class 0 in brightness; attribute "warm" is the class."""
    shapes, root, loose = Shapes(400, 1, "train"), tmp_path / "set", tmp_path / "loose"
    dark, lines = shapes.images[~shapes.factors["inverted"]][:120], {root: [], loose: []}
    for i, image in enumerate(dark):
        for path, name in (root, f"class {i % 2}/{i:03d}.png"), (loose, f"{i:03d}.png"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image if i % 2 else 255 - image).save(path / name)
            lines[path].append(f"{name},{i % 2},0")

    def run(path, *flags):
        report = probe.main(["--report", str(folder / "plain"), *CPU, "--out", str(tmp_path / "out.json"),
                             "--max-iter", "15", "--data", str(path), *flags])
        assert report["images"] == {"train": 84, "val": 12, "test": 24}
        return report["vaes"][0]["flat"]
    classes = run(root)
    first = Image.open(tmp_path / "out_pca.png").crop((0, 0, 12 * 96, 96))  # images, a part of each class
    tiles = np.array(first.resize((12 * 32, 32)), int).reshape(32, 12, 32, 3).swapaxes(0, 1)[:, None]
    pictures = np.array([image if i % 2 else 255 - image for i, image in enumerate(dark)], int)
    assert (np.abs(tiles - pictures).sum((2, 3, 4)).argmin(1) % 2).tolist() == [0] * 6 + [1] * 6
    assert classes["class_accuracy"] > 0.9 and "macro_f1" not in classes
    for path, rows in lines.items():
        (path / "attributes.csv").write_text("\n".join(["filename,warm,never", *rows]))
    both, attributes = run(root), run(loose)
    assert both["class_accuracy"] == classes["class_accuracy"] and "class_accuracy" not in attributes
    for flat in both, attributes:
        assert flat["macro_f1"] > 0.9
        assert flat["left_out"] == ["never"] and {*flat["per_attribute"]} == {"warm"}
    assert capsys.readouterr().out.count("in a split: never\n") == 2
    assert "macro_f1" not in run(root, "--classes")
    with pytest.raises(ValueError, match="no classes"):
        run(loose, "--classes")


def command(*flags):
    """Return a call of the command; names in `flags` are those of the fixture's folders."""
    def call(folder):
        names = [str(folder / flag) if (folder / flag).is_dir() else flag for flag in flags]
        probe.main([*names, "--num-train", "20", *CPU, "--out", str(folder / "x.json")])
    return call


def fit_nan(_):
    probe.fit_linear_probe(*[torch.full((30, 2), torch.nan), torch.zeros(30, 2)] * 2, torch.zeros(1, 2))


REFUSALS = [
    ("features are nan", fit_nan, ValueError, "not finite"),
    ("no positive", lambda _: probe.attribute_scores(*[torch.zeros(4, 1)] * 4, "a"), ValueError, "none of 1"),
    ("no time", command("--vae", "send", "--t", "7"), ValueError, "--t"),
    ("no mapper", command("--vae", "plain", "--mapper"), ValueError, "no mapper"),
    ("another VAE", command("--vae", "send", "--sit", "other"), ValueError, "of VAE .*, this is"),
    ("other statistics", command("--sit", "other", "--latent-stats", "1"), ValueError, "--latent-stats"),
    ("no null label", command("--sit", "no_null"), ValueError, "null label")]


@pytest.mark.parametrize("call, error, word", [case[1:] for case in REFUSALS], ids=[c[0] for c in REFUSALS])
def test_what_cannot_be_probed_is_refused(folder, call, error, word):
    with pytest.raises(error, match=word):
        call(folder)
