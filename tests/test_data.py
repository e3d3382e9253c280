"""Images, batches and latents on disk (data.py): the crop, every kind of file, the step sampler, the shards.

    pytest tests/test_data.py        about 10 s, CPU, no network
"""
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import read_fixture
from PIL import Image, __version__ as pillow_version

import data

CROP = read_fixture("center_crop")


def picture(h=40, w=48, seed=0):
    """A smooth RGB picture, uint8 (h, w, 3)."""
    a, b, c = np.random.default_rng(seed).uniform(0.05, 0.3, 3)
    y, x = np.mgrid[:h, :w]
    waves = np.stack([np.sin(a * x), np.cos(b * y), np.sin(c * (x + y))], axis=2)
    return np.rint(127.5 + 127.5 * waves).astype(np.uint8)


def write_class_folders(root, classes=3, each=8, size=20):
    """Write `each` pictures to each of `classes` folders; return root."""
    for c in range(classes):
        (root / f"c{c}").mkdir(parents=True)
        for i in range(each):
            Image.fromarray(picture(size, size + c, seed=100 * c + i)).save(root / f"c{c}" / f"{i:02d}.png")
    return root


def pixels(image):
    return np.asarray(image).astype(int)


# center crop

@pytest.mark.parametrize("case", sorted(CROP[0]["cases"]))
def test_center_crop_equals_adm(case):
    manifest, archive = CROP
    image = Image.fromarray(archive[f"{case}/image"])
    crop = data.center_crop(image, manifest["cases"][case]["target"])
    tolerance = 0 if pillow_version == manifest["versions"]["PIL"] else 1
    assert crop.size == archive[f"{case}/crop"].shape[1::-1]
    assert np.abs(pixels(crop) - archive[f"{case}/crop"]).max() <= tolerance


@pytest.mark.parametrize("h, w", [(1, 1), (1, 30000), (30000, 1), (2000, 3)])
def test_extreme_shapes_are_cropped_to_the_middle_in_bounded_memory(h, w, monkeypatch):
    resize = Image.Image.resize

    def bounded(image, size, *args):
        assert max(size) <= 16 * 100
        return resize(image, size, *args)

    monkeypatch.setattr(Image.Image, "resize", bounded)
    image = np.zeros((h, w, 3), np.uint8)
    image[max(h // 2 - 3, 0):h // 2 + 3, max(w // 2 - 3, 0):w // 2 + 3] = (255, 0, 0)
    crop = pixels(data.center_crop(Image.fromarray(image), 16))
    assert crop.shape == (16, 16, 3)
    assert (crop[8, 8] == (255, 0, 0)).all()


# kinds of files

def test_grey_palette_and_transparent_files_keep_their_colours(tmp_path):
    rgb = Image.fromarray(picture())
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(picture(seed=1)[:, :, 0]))
    palette = rgb.quantize(64)
    grey = rgb.convert("L")
    bits = grey.convert("1")
    for name, image, want in (("rgb.png", rgb, rgb), ("grey.png", grey, grey), ("rgba.png", rgba, rgb),
                              ("bits.png", bits, bits), ("p.png", palette, palette), ("l.WEBP", rgb, rgb)):
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("WEBP") else {}))
        loaded = data.load_image(tmp_path / name)
        assert loaded.mode == "RGB" and (pixels(loaded) == pixels(want.convert("RGB"))).all(), name
    palette.save(tmp_path / "hole.png", transparency=bytes([255, 0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns when it converts such a palette directly
        assert (pixels(data.load_image(tmp_path / "hole.png")) == pixels(palette.convert("RGB"))).all()


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_are_scaled_not_clipped(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / f"deep.{suffix}")
    loaded = pixels(data.load_image(tmp_path / f"deep.{suffix}"))
    assert (loaded[..., 0] == np.rint(ramp / 257)).all() and (loaded[..., 0] == loaded[..., 2]).all()
    assert loaded.min() == 0 and loaded.max() == 255


def test_cmyk_is_converted(tmp_path):
    colours = {"red": (255, 0, 0), "white": (255, 255, 255), "blue": (0, 0, 255)}
    for name, colour in colours.items():
        Image.new("RGB", (16, 16), colour).convert("CMYK").save(tmp_path / f"{name}.jpg", quality=98)
        assert np.abs(pixels(data.load_image(tmp_path / f"{name}.jpg"))[8, 8] - colour).max() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_turns_the_image_upright(tmp_path, orientation):
    upright = picture(24, 40)
    undo = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
            5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1),
            7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo[orientation](upright))).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(data.load_image(tmp_path / "turned.png")), upright)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, suffix):
    first, second = Image.new("RGB", (20, 20), (255, 0, 0)), Image.new("RGB", (20, 20), (0, 0, 255))
    first.save(tmp_path / f"moving.{suffix}", save_all=True, append_images=[second])
    assert np.abs(pixels(data.load_image(tmp_path / f"moving.{suffix}"))[10, 10] - (255, 0, 0)).max() < 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_does_not_cost_the_image(tmp_path):
    for exif in (b"Exif", b"MM\x00*\x00\x00\x00\x08\x00"):
        Image.fromarray(picture()).save(tmp_path / "a.png", exif=exif)
        assert (pixels(data.load_image(tmp_path / "a.png")) == picture()).all()


def test_the_content_decides_the_format(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert (pixels(data.load_image(tmp_path / "a.jpg")) == picture()).all()


def test_unreadable_files_are_errors_with_their_name(tmp_path):
    for suffix in ("jpg", "png", "webp", "bmp", "gif", "tif"):
        good = tmp_path / f"good.{suffix}"
        Image.fromarray(picture(seed=3)).save(good)
        (tmp_path / f"cut.{suffix}").write_bytes(good.read_bytes()[:int(good.stat().st_size * 0.6)])
        (tmp_path / f"zero.{suffix}").write_bytes(b"")
        (tmp_path / f"text.{suffix}").write_text("<html>404 not found</html>")
        for name in (f"cut.{suffix}", f"zero.{suffix}", f"text.{suffix}", f"absent.{suffix}"):
            with pytest.raises(ValueError, match=name):
                data.load_image(tmp_path / name)


# folders

def test_ten_class_folders_give_ten_sorted_labels(tmp_path):
    for i in reversed(range(10)):
        (tmp_path / f"class {i}").mkdir()
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / f"class {i}" / "a.png")
    folder = data.ImageFolder(tmp_path, 8)
    images, labels = folder.__getitems__(range(10))
    assert folder.num_classes == 10 and folder.class_names == [f"class {i}" for i in range(10)]
    assert labels.tolist() == list(range(10)) == images[:, 0, 0, 0].tolist()
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64 and folder.labels.dtype == np.int64


def test_a_flat_folder_is_one_class(tmp_path):
    for i in range(3):
        Image.fromarray(picture(seed=i)).save(tmp_path / f"{i}.png")
    folder = data.ImageFolder(tmp_path, 16)
    assert folder.num_classes == 1 and folder.class_names == ["unconditional"]
    assert folder.labels.tolist() == [0, 0, 0]


def test_a_folder_of_train_and_val_is_refused_and_named(tmp_path):
    for name in ("train/cat/a.png", "val/cat/b.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(picture()).save(tmp_path / name)
    with pytest.raises(ValueError, match="train and val are no classes; want --data .*/train"):
        data.ImageFolder(tmp_path, 16)
    assert len(data.ImageFolder(tmp_path / "train", 16)) == 1


def test_odd_names_are_found_and_hidden_files_and_broken_links_are_not(tmp_path):
    names = ["Ünïcode/Bild mit Leerzeichen.PNG", "a/deep/er/x.JPEG", "a/y.TIFF", "a/z.Webp", "b.dir/日本.bmp"]
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture()).save(tmp_path / "set" / name)
    (tmp_path / "set/a/.hidden.png").write_bytes(b"x")
    (tmp_path / "set/.cache").mkdir()
    Image.fromarray(picture()).save(tmp_path / "set/.cache/c.png")
    (tmp_path / "set/a/notes.txt").write_text("no image")
    (tmp_path / "set/a/broken.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "set/a/loop").symlink_to(tmp_path / "set")
    Image.fromarray(picture(seed=1)).save(tmp_path / "elsewhere.png")
    (tmp_path / "set/a/link.png").symlink_to(tmp_path / "elsewhere.png")
    (tmp_path / "linked set").symlink_to(tmp_path / "set")
    folder = data.ImageFolder(tmp_path / "linked set", 16)
    assert sorted(folder.files) == sorted([*names, "a/link.png"])
    assert folder.class_names == ["a", "b.dir", "Ünïcode"]
    assert folder.__getitems__(range(6))[0].shape == (6, 3, 16, 16) and folder.num_corrupt == 0


def test_folders_without_images_are_errors_that_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder.*--data DIR"):
        data.ImageFolder(tmp_path / "absent", 16)
    with pytest.raises(ValueError, match="no images.*--data DIR"):
        data.ImageFolder(tmp_path, 16)
    write_class_folders(tmp_path, classes=2, each=1)
    (tmp_path / "nothing here").mkdir()
    with pytest.raises(ValueError, match="nothing here"):
        data.ImageFolder(tmp_path, 16)
    (tmp_path / "nothing here").rmdir()
    Image.fromarray(picture()).save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match="stray.png"):
        data.ImageFolder(tmp_path, 16)


def test_the_missing_default_folder_points_to_the_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="quickstart.sh or --data shapes"):
        data.open_dataset(data.DEFAULT_DATA, 256)


def test_a_corrupt_image_is_named_once_replaced_and_counted(tmp_path, capsys):
    folder = data.ImageFolder(write_class_folders(tmp_path), 16)
    (tmp_path / "c1/07.png").write_bytes(b"")
    for _ in range(3):
        images, labels = folder.__getitems__([15, 16])
        assert torch.equal(images[0], images[1]) and labels.tolist() == [2, 2]  # the label goes along
    assert folder.num_corrupt == 1 and capsys.readouterr().err.count("07.png") == 1
    (tmp_path / "c2/07.png").write_bytes(b"")
    with pytest.raises(ValueError, match="2 of .* images are corrupt.*c2/07.png.*1 %"):
        folder.__getitems__([23])


def test_one_percent_of_corrupt_images_passes_and_more_stops(tmp_path):
    Image.fromarray(picture(8, 8)).save(tmp_path / "good.png")
    names = [f"{i:04d}.png" for i in range(600)]
    for name in names:
        (tmp_path / name).symlink_to(tmp_path / "good.png")
    folder = data.ImageFolder(tmp_path, 8)
    for name in names[10:70:10]:
        (tmp_path / name).unlink()
    folder.__getitems__(range(600))
    assert folder.num_corrupt == 6
    (tmp_path / names[500]).unlink()
    with pytest.raises(ValueError, match="7 of"):
        folder.__getitems__([500])


def test_no_readable_image_is_an_error(tmp_path):
    (tmp_path / "only.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of 1 images"):
        data.ImageFolder(tmp_path, 8).__getitems__([0])


def test_the_files_hash_is_that_of_the_names(tmp_path):
    one = data.ImageFolder(write_class_folders(tmp_path / "one"), 8)
    same = data.ImageFolder(shutil.copytree(tmp_path / "one", tmp_path / "same"), 8)
    (tmp_path / "same/c0/00.png").rename(tmp_path / "same/c0/zz.png")
    assert one.files_hash != data.ImageFolder(tmp_path / "same", 8).files_hash
    assert one.files_hash == same.files_hash


def test_validation_folder_is_given_or_sibling_and_shares_the_labels(tmp_path):
    write_class_folders(tmp_path / "train", classes=3, each=1)
    assert data.open_dataset(str(tmp_path / "train"), 8, split="val") is None
    write_class_folders(tmp_path / "val", classes=3, each=2)
    shutil.rmtree(tmp_path / "val/c0")
    val = data.open_dataset(str(tmp_path / "train"), 8, split="val")
    assert val.num_classes == 3 and val.labels.tolist() == [1, 1, 2, 2]
    write_class_folders(tmp_path / "other", classes=4, each=1)
    with pytest.raises(ValueError, match="c3 is not among"):
        data.open_dataset(str(tmp_path / "train"), 8, split="val", val=str(tmp_path / "other"))


# pixels

def test_uint8_survives_the_way_to_floats_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(levels)
    assert x[0] == -1 and x[255] == 1 and torch.equal(data.to_uint8(x), levels)
    assert data.to_uint8(torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]


def test_grid_places_images_row_by_row_and_leaves_no_temporary_file(tmp_path):
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 2, 4) * 50
    for name, batch in (("a.png", images), ("b.png", images.permute(0, 2, 3, 1)), ("c.png", images.numpy())):
        data.save_grid(tmp_path / "new" / name, batch, columns=3, scale=2)
        grid = np.asarray(Image.open(tmp_path / "new" / name))
        assert grid.shape == (8, 24, 3)
        assert grid[::4, ::8, 0].tolist() == [[0, 50, 100], [150, 200, 255]]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.png", "b.png", "c.png"]


def test_npz_has_the_names_of_adm(tmp_path):
    images = np.stack([picture(seed=i) for i in range(3)])
    data.save_npz(tmp_path / "s.npz", images, torch.tensor([4, 5, 6]))
    with np.load(tmp_path / "s.npz") as archive:
        assert np.array_equal(archive["arr_0"], images) and archive["arr_1"].tolist() == [4, 5, 6]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    (tmp_path / "s.npz").write_text("old")
    with pytest.raises(RuntimeError), data._replacing(tmp_path / "s.npz") as file:
        file.write(b"half of the new")
        raise RuntimeError("disk full")
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"] and (tmp_path / "s.npz").read_text() == "old"


# batches

def steps(length=50, batch_size=12, world=1, micro=0, seed=3, start=0, stop=8):
    """The global batches of steps start .. stop - 1, put together by row from the parts of all ranks."""
    out = np.full((stop - start, batch_size), -1)
    for rank in range(world):
        sampler = data.StepSampler(length, batch_size, rank, world, micro, seed, start, stop)
        parts = list(sampler)
        per_step = len(parts) // (stop - start)
        for i, (indices, rows) in enumerate(parts):
            assert (out[i // per_step, rows] == -1).all(), "a row came twice"
            out[i // per_step, rows] = indices
    return out


def test_sampler_visits_each_index_once_per_epoch():
    epochs = steps(length=48, batch_size=12, stop=8).reshape(2, 48)
    assert (np.sort(epochs, axis=1) == np.arange(48)).all() and (epochs[0] != epochs[1]).any()
    tail = steps(length=50, batch_size=12, stop=8).reshape(2, 48)
    assert all(len(set(epoch)) == 48 for epoch in tail) and set(tail[0]) != set(tail[1])


@pytest.mark.parametrize("world, micro", [(1, 4), (1, 1), (2, 0), (3, 2), (4, 3)])
def test_batches_do_not_depend_on_world_and_micro_batch_size(world, micro):
    assert np.array_equal(steps(world=world, micro=micro), steps())


def test_starting_at_step_k_equals_skipping_k_steps():
    for start in (1, 3, 4, 7):
        assert np.array_equal(steps(start=start), steps()[start:])


def test_another_seed_is_another_order():
    assert (steps(seed=4) != steps(seed=3)).any()


def test_impossible_batches_are_errors_with_a_way_out():
    with pytest.raises(ValueError, match="10 images.*batch of 12.*--batch-size 10"):
        data.StepSampler(10, 12)
    with pytest.raises(ValueError, match="256.*3 processes x micro-batch 32.*--batch-size 288"):
        data.StepSampler(1000, 256, 0, 3, 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_train_loader_delivers_the_images_of_its_indices(tmp_path, workers):
    folder = data.ImageFolder(write_class_folders(tmp_path), 16)
    loader = data.make_loader(folder, 8, 1, 2, 2, seed=5, start_step=2, num_steps=7, workers=workers)
    assert loader.num_workers == workers
    batches = list(loader)
    want = list(data.StepSampler(24, 8, 1, 2, 2, 5, 2, 7))
    assert len(batches) == len(want) == 10
    for (images, labels, indices, rows), (want_indices, want_rows) in zip(batches, want):
        assert indices.tolist() == want_indices.tolist() and rows.tolist() == want_rows.tolist()
        assert torch.equal(images, folder.__getitems__(indices)[0])
        assert labels.tolist() == folder.labels[indices].tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_eval_loader_delivers_each_index_once_over_the_ranks(tmp_path, world):
    folder = data.ImageFolder(write_class_folders(tmp_path, classes=2, each=5), 16)
    batches = [batch for r in range(world) for batch in data.eval_loader(folder, 4, r, world, workers=0)]
    assert torch.cat([indices for _, _, indices, _ in batches]).tolist() == list(range(10))
    some = list(data.eval_loader(folder, 4, workers=0, indices=range(3, 9)))
    assert torch.cat([b[2] for b in some]).tolist() == [*range(3, 9)]
    assert torch.cat([b[3] for b in some]).tolist() == [*range(6)]


# latents

N, C, SIDE = 53, 3, 4


def latent_meta(**changes):
    return {"vae": "out/vae/ckpt.pt", "vae_hash": "a" * 8, "data": "some/folder", "files_hash": "b" * 8,
            "num_images": N, "image_size": 32, "channels": C, "latent_size": (SIDE, SIDE), "shard_size": 10,
            "dtype": "float32", "flip": True, "num_classes": 4, "class_names": list("wxyz"), **changes}


def fake_moments(mirrored=False):
    """Moments (N, 2C, SIDE, SIDE) with another mean, spread and std in each channel."""
    g = torch.Generator().manual_seed(1 + mirrored)
    scale = torch.tensor([0.2, 1.0, 9.0])[:, None, None]
    mean = torch.randn(N, C, SIDE, SIDE, generator=g) * scale + torch.tensor([5.0, 0.0, -20.0])[:, None, None]
    return torch.cat([mean, torch.rand(N, C, SIDE, SIDE, generator=g) * scale + 0.01], 1)


def write_latents(path, world=1, **changes):
    """Write the fake latents as `world` processes, one after the other; return how many shards."""
    written, moments, mirrored = 0, fake_moments(), fake_moments(mirrored=True)
    writers = [data.LatentWriter(path, latent_meta(**changes)) for _ in range(world)]
    for rank, writer in enumerate(writers):
        for shard in writer.missing(rank, world):
            rows = list(writer.rows(shard))
            other = mirrored[rows] if writer.meta["flip"] else None
            writer.write(shard, moments[rows], torch.tensor(rows) % 4, other)
            written += 1
    writers[0].finish()
    return written


def contents(path):
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def test_latents_come_back_as_written(tmp_path):
    write_latents(tmp_path)
    latents = data.LatentFolder(tmp_path)
    order = np.random.default_rng(0).permutation(N)
    moments, labels = latents.__getitems__(order)
    assert torch.equal(moments, fake_moments()[order]) and labels.tolist() == (order % 4).tolist()
    flips = torch.arange(N) % 3 == 0
    want = torch.where(flips[:, None, None, None], fake_moments(mirrored=True)[order], fake_moments()[order])
    assert torch.equal(latents.take(order, flips), want)
    assert (len(latents), latents.num_classes, latents.class_names) == (N, 4, list("wxyz"))


def test_latents_go_through_loader_and_worker_processes(tmp_path):
    write_latents(tmp_path)
    for workers in (0, 1):
        batches = list(data.make_loader(data.LatentFolder(tmp_path), 16, num_steps=3, workers=workers))
        indices = torch.cat([b[2] for b in batches])
        assert len(set(indices.tolist())) == 48
        assert torch.equal(torch.cat([b[0] for b in batches]), fake_moments()[indices])


@pytest.mark.parametrize("world", [2, 3])
def test_files_do_not_depend_on_the_number_of_processes(tmp_path, world):
    write_latents(tmp_path / "one")
    write_latents(tmp_path / "many", world)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@pytest.mark.parametrize("damage", ["delete", "truncate", "no sums", "stale temporary"])
def test_a_rerun_writes_only_what_is_missing_and_ends_with_identical_files(tmp_path, damage):
    write_latents(tmp_path)
    before = contents(tmp_path)
    shard = tmp_path / "moments-flip-00002.npy"
    if damage == "delete":
        shard.unlink()
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-100])
    if damage == "no sums":
        (tmp_path / "moments-00002.json").unlink()
    if damage == "stale temporary":
        shard.rename(tmp_path / ".moments-flip-00002.npy.tmp")
    assert write_latents(tmp_path, world=2) == 1
    assert contents(tmp_path) == before


def test_damaged_shards_are_named(tmp_path):
    write_latents(tmp_path)
    for name in ("labels.npy", "moments-flip-00000.npy", "moments-00005.npy"):
        shard = tmp_path / name
        whole = shard.read_bytes()
        for broken in (whole[:-1], whole[:40], b""):
            shard.write_bytes(broken)
            with pytest.raises(ValueError, match=f"{name} is missing or truncated"):
                data.LatentFolder(tmp_path)
        shard.write_bytes(whole)
    shard.unlink()
    with pytest.raises(ValueError, match="moments-00005.npy.*missing"):
        data.LatentFolder(tmp_path)
    with pytest.raises(ValueError, match=r"shards \[0, 1, 2, 3, 4, 5\]"):
        data.LatentWriter(tmp_path / "empty", latent_meta()).finish()
    with pytest.raises(FileNotFoundError, match="meta.json.*encode.py"):
        data.LatentFolder(tmp_path / "empty")


@pytest.mark.parametrize("label", [-1, 4])
def test_stored_labels_that_are_no_classes_are_named(tmp_path, label):
    """On a GPU the embedding would die of them without a message."""
    write_latents(tmp_path)
    labels = np.load(tmp_path / "labels.npy")
    labels[7] = label
    np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(ValueError, match=f"labels {min(label, 0)} to {max(label, 3)}, want 0 to 3"):
        data.LatentFolder(tmp_path)


def test_samples_in_place_of_moments_are_told_apart(tmp_path):
    writer = data.LatentWriter(tmp_path, latent_meta(flip=False))
    with pytest.raises(ValueError, match="want moments"):
        writer.write(0, fake_moments()[:10, :C], torch.zeros(10))
    write_latents(tmp_path, flip=False)
    for other in (np.zeros((10, C, SIDE, SIDE), np.float32), np.zeros((10, 2 * C, SIDE, SIDE), np.float16)):
        np.save(tmp_path / "moments-00000.npy", other)
        with pytest.raises(ValueError, match="moments-00000.npy.*want moments"):
            data.LatentFolder(tmp_path)
    write_latents(tmp_path / "plain", flip=False)
    with pytest.raises(ValueError, match="no moments of mirrored images.*--flip"):
        data.LatentFolder(tmp_path / "plain").take([0, 1], [False, True])
    with pytest.raises(ValueError, match="6 channels.*moments.*sample_latents"):
        data.normalize_latents(fake_moments(), torch.zeros(C), torch.ones(C))


@pytest.mark.parametrize("change", [{"vae_hash": "c" * 8, "vae": "other.pt"},
                                    {"files_hash": "c" * 8, "data": "other"},
                                    {"dtype": "float16"}, {"flip": False}, {"shard_size": 20}])
def test_latents_of_another_vae_or_data_set_are_not_mixed(tmp_path, change):
    write_latents(tmp_path)
    key, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"{key} {latent_meta()[key]}.*{value}"):
        data.LatentWriter(tmp_path, latent_meta(**change))
    (tmp_path / "meta.json").unlink()  # an unfinished set is recognised as well
    with pytest.raises(ValueError, match=f"{key} {latent_meta()[key]}.*{value}"):
        data.LatentWriter(tmp_path, latent_meta(**change))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_normalised_samples_have_mean_0_and_std_1(tmp_path, dtype):
    write_latents(tmp_path, dtype=dtype)
    latents = data.LatentFolder(tmp_path)
    moments = latents.take(range(N)).repeat(40, 1, 1, 1)  # 40 draws of each image
    eps = torch.randn(len(moments), C, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    z = data.normalize_latents(data.sample_latents(moments, eps), latents.mean, latents.std)
    assert z.mean((0, 2, 3)).abs().max() < 0.02 and (z.std((0, 2, 3)) - 1).abs().max() < 0.02
    mean, std = fake_moments().double().chunk(2, 1)
    exact = (mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))).sqrt()
    assert torch.allclose(latents.std.double(), exact, rtol=1e-6 if dtype == "float32" else 1e-3)


def test_denormalise_undoes_normalise():
    z = torch.randn(8, C, 4, 4) * 7 + 3
    mean, std = torch.tensor([3.0, -2.0, 0.5]), torch.tensor([7.0, 0.1, 1.0])
    assert torch.allclose(data.normalize_latents(z, mean, std)[:, 1], (z[:, 1] + 2) / 0.1)
    back = data.denormalize_latents(data.normalize_latents(z, mean, std), mean, std)
    assert torch.allclose(back, z, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_dead_channel_is_an_error(tmp_path, value):
    write_latents(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    meta["std"][1] = value
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="std"):
        data.LatentFolder(tmp_path)
    broken = fake_moments()[:10]
    broken[3, 1] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        data.LatentWriter(tmp_path / "new", latent_meta()).write(0, broken, torch.zeros(10), broken)
