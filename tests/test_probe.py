"""Linear probes: solvable, hopeless and rare attributes, optimality, F1 by hand, the command end to end.

    pytest tests/test_probe.py          about 10 s on 2 CPU cores
"""
import csv
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import probe
from mapper import Mapper, MapperConfig
from sit import SiT, SiTConfig
from vae import VAE, VAE_SIZES

CPU = ["--device", "cpu", "--workers", "0", "--batch-size", "100"]


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
    accuracy = probe.class_scores(probe.fit_linear_probe(*rows)["logits"], test_y)["class_accuracy"]
    assert abs(accuracy - 0.25) < 3 * (0.25 * 0.75 / len(test_y)) ** 0.5


def test_classes_with_distant_centres_are_found_without_error():
    y = torch.arange(600) % 5
    x = random_rows(600, 8, 4) + 20 * torch.nn.functional.one_hot(y, 8)
    *rows, test_y = three(x, y)
    scores = probe.class_scores(probe.fit_linear_probe(*rows)["logits"], test_y)
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
    scores = [probe.fit_linear_probe(*rows, test_x, (d,))["val_score"] for d in probe.WEIGHT_DECAYS]
    assert max(scores) > min(scores) + 0.02  # there is something to choose
    assert best["val_score"] == pytest.approx(max(scores), abs=0.015)
    assert probe.fit_linear_probe(*rows, 100 * test_x)["weight_decay"] == best["weight_decay"]
    assert torch.equal(best["logits"], probe.fit_linear_probe(*rows, test_x)["logits"])


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


# scores

def test_f1_equals_a_count_by_hand_and_leaves_out_attributes_without_positives():
    logits = torch.tensor([[2.0, -1, 5], [1, 1, 5], [-1, 1, -5], [-2, -1, -5]])
    targets = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 1, 0]])
    # attribute 0: tp 1 fp 1 fn 1; attribute 1: tp 2 fp 0 fn 1; attribute 2: no positive
    scores = probe.f1_scores(logits, targets)
    assert scores["per_attribute"][:2] == pytest.approx([0.5, 0.8]) and np.isnan(scores["per_attribute"][2])
    assert scores["macro_f1"] == pytest.approx(0.65) and scores["micro_f1"] == pytest.approx(6 / 9)
    assert probe.f1_scores(torch.sigmoid(logits), targets, 0.5)["macro_f1"] == pytest.approx(0.65)
    named = probe.attribute_scores(logits, targets, ["hue=red", "hue=blue", "rare"])
    assert named["without_positives"] == ["rare"] and named["groups"] == {"hue": pytest.approx(0.65)}


def test_attribute_that_is_never_marked_has_f1_zero_and_counts():
    targets = torch.tensor([[1, 1], [0, 1]])
    assert probe.f1_scores(torch.tensor([[-1.0, 1], [-1, 1]]), targets)["macro_f1"] == 0.5


def test_rare_attribute_is_found():
    x = random_rows(3000, 10, 12)
    y = (x @ random_rows(10, 1, 13)).squeeze() / 10**0.5
    rare = (y > y.quantile(0.98)).int()[:, None]
    assert 0.01 < rare.float().mean() < 0.03
    assert fit_and_score(x, rare)["macro_f1"] > 0.85


def test_top_recall_counts_the_positives_among_the_highest():
    logits = torch.tensor([[9.0, 8, 7, 6], [1, 2, 3, 4]])
    targets = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1]])
    assert probe.top_recall(logits, targets, 2) == pytest.approx(2 / 3)
    assert probe.top_recall(logits, targets, 5) == 1


def test_balanced_accuracy_gives_every_class_the_same_weight():
    labels = torch.tensor([0] * 9 + [1])
    scores = probe.class_scores(torch.tensor([[1.0, 0]]).repeat(10, 1), labels)
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
        vae, mapper = VAE(VAE_SIZES["tiny"]), Mapper(MapperConfig(16, 4, 128, projector_dim=64))
        has = name == "send"
        common.save_checkpoint(folder / name / "ckpt_0000001.pt", {
            "format": "nanosendvae-vae", "step": 1, "model": vae.state_dict(), "ema": None,
            "model_config": asdict(vae.config), "mapper": mapper.state_dict() if has else None,
            "mapper_config": asdict(mapper.config) if has else None, "teacher": "shapes" if has else None,
            "args": {}})
        if has:
            sit = SiT(SiTConfig(input_size=4, in_channels=16, hidden_size=32, depth=2, num_heads=2,
                                num_classes=10))
            for block in sit.blocks:  # away from the identity, so that labels reach the tokens
                torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.5)
            path = str(folder / name / "ckpt_0000001.pt")
            meta = {"vae": path, "vae_hash": common.state_hash(vae.state_dict()), "mean": [0.0] * 16,
                    "std": [1.0] * 16}
            common.save_checkpoint(folder / "sit" / "ckpt_0000001.pt", {
                "format": "nanosendvae-sit", "step": 1, "model": sit.state_dict(), "ema": sit.state_dict(),
                "model_config": asdict(sit.config), "latents": meta, "args": {}})
    return folder


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """600 train, 150 validation and 400 test images of the embedded set."""
    monkeypatch.setattr(probe, "SHAPES_TRAIN", 600)
    monkeypatch.setitem(data.SHAPES_NUM, "val", 400)


def test_command_compares_vaes_side_by_side(checkpoints, capsys):
    report = probe.main(["--data", "shapes", "--vae", str(checkpoints / "plain"), str(checkpoints / "send"),
                         "--picture", str(checkpoints / "pca.png"), "--out", str(checkpoints / "probe.json"),
                         *CPU])
    text = capsys.readouterr().out
    assert "600 train, 150 validation, 400 test images" in text
    for line in ("flat macro_f1", "pooled macro_f1", "flat class_accuracy", "latent effective_rank",
                 "flat F1 of hue"):
        cells = next(row for row in text.splitlines() if row.startswith(line + " ")).split()[-2:]
        assert all(0 < float(cell) < 20 for cell in cells) and cells[0] != cells[1]
    assert json.loads((checkpoints / "probe.json").read_text()) == json.loads(json.dumps(report))
    for vae in report["vaes"]:
        assert {*vae["flat"]["groups"]} == {name.split("=")[0] for name in data.Shapes(1).attribute_names}
        assert vae["flat"]["macro_f1"] > vae["pooled"]["macro_f1"] > 0.1  # pooling loses positions
    picture = Image.open(checkpoints / "pca.png")
    assert picture.size == (12 * 96, 5 * 96)  # images; plain latents; latents, mapper, teacher of send


def test_probed_features_are_the_flattened_posterior_means(checkpoints):
    args = probe.parse_args(["--vae", "x", *CPU])
    splits, _ = probe.read_shapes(args)
    vae = probe.load_vae(checkpoints / "plain" / "ckpt_0000001.pt")
    rows, labels = probe.encode(splits["val"], {}, vae, args, "cpu")
    shapes = data.Shapes(750, 0, "train")
    images, expected = shapes.__getitems__(range(600, 750))
    with torch.no_grad():
        mean = vae.encode(data.to_float(images)).mean
    torch.testing.assert_close(rows["z"], mean, rtol=1e-5, atol=1e-5)
    assert torch.equal(labels, expected) and (splits["val"][2] == shapes.attributes[600:]).all()
    assert (splits["test"][0].images == data.Shapes(400, 0, "val").images).all()


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
             str(checkpoints / "sit.json")]
    first, second = probe.main(flags), probe.main(flags)
    assert {str(call) for call in seen} == {str((False, [10], [0.25], 2))} and mapper_modes == {False}
    (vae,) = first["vaes"]
    assert {"flat", "pooled", "mapper", "sit"} <= {*vae} and vae["sit"]["macro_f1"] > 0
    assert json.dumps(vae) == json.dumps(second["vaes"][0])  # deterministic


def test_sit_of_another_vae_and_missing_mapper_are_refused(checkpoints):
    plain, out = str(checkpoints / "plain"), ["--out", str(checkpoints / "x.json")]
    with pytest.raises(ValueError, match="was trained on latents of VAE"):
        probe.main(["--vae", plain, "--sit", str(checkpoints / "sit"), "--num-train", "20", *CPU, *out])
    with pytest.raises(ValueError, match="holds no mapper"):
        probe.main(["--vae", plain, "--mapper", "--num-train", "20", *CPU, *out])


def test_folder_is_probed_by_its_attributes_and_classes(checkpoints, tmp_path, capsys):
    shapes = data.Shapes(200, 1, "train")
    with open(tmp_path / "lines.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "warm", "never"])
        for i, image in enumerate(shapes.images):
            name = f"class {i % 2}/{i:03d}.png"  # class 1 is the mirror image in brightness
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.fromarray(image if i % 2 else 255 - image).save(tmp_path / name)
            writer.writerow([name, i % 2, 0])
    flags = ["--data", str(tmp_path), "--image-size", "32", "--vae", str(checkpoints / "plain"), *CPU,
             "--out", str(tmp_path / "out.json")]
    report = probe.main(flags)
    assert report["vaes"][0]["flat"]["class_accuracy"] > 0.9 and "macro_f1" not in report["vaes"][0]["flat"]
    (tmp_path / "lines.csv").rename(tmp_path / "attributes.csv")
    capsys.readouterr()
    report = probe.main(flags)
    flat = report["vaes"][0]["flat"]
    assert flat["without_positives"] == ["never"] and {*flat["per_attribute"]} == {"warm"}
    assert flat["macro_f1"] > 0.9
    assert report["images"] == {"train": 140, "val": 20, "test": 40}
    assert "never: no positive in the test split" in capsys.readouterr().out
    assert "macro_f1" not in probe.main([*flags, "--classes"])["vaes"][0]["flat"]


def test_attribute_file_with_gaps_or_other_values_is_refused(tmp_path):
    path = tmp_path / "attributes.csv"
    path.write_text("filename,a,b\nx.png,0,1\ny.png,1,1\n")
    names, values = probe.read_attributes(path, ["y.png", "x.png"])
    assert names == ["a", "b"] and values.tolist() == [[1, 1], [0, 1]]
    with pytest.raises(ValueError, match="no line for 1 of 2 images, such as z.png"):
        probe.read_attributes(path, ["x.png", "z.png"])
    for line in ("x.png,0,2", "x.png,0"):
        path.write_text(f"filename,a,b\n{line}\n")
        with pytest.raises(ValueError, match="want a file name and 2 times 0 or 1"):
            probe.read_attributes(path, ["x.png"])


def test_folder_without_attributes_or_classes_has_nothing_to_probe(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="nothing to probe"):
        probe.main(["--data", str(tmp_path), "--vae", "nowhere.pt", *CPU])
