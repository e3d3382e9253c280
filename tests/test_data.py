"""Images, batches and latents on disk (data.py): crop, every kind of file, order of the batches, shards.
Run: ./test.sh tests/test_data.py        (about 5 s, CPU; what is refused: tests/test_errors.py)
"""
import json
import os
import resource
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_fixture
from PIL import Image, __version__ as pillow_version

import data
import small
from common import Proc

CROP = read_fixture("center_crop")
CPU = torch.device("cpu")


def picture(h=40, w=48, seed=0):
    """A smooth RGB picture, uint8 (h, w, 3)."""
    y, x = np.mgrid[:h, :w]
    return np.stack([4 * x + 20 * seed, 200 - 5 * y, 2 * (x + y)], axis=2).astype(np.uint8)


def pixels(image):
    """The integers of a PIL image, or of a file as load_image reads it."""
    return np.asarray(data.load_image(image) if isinstance(image, Path) else image).astype(int)


# one image

@pytest.mark.parametrize("case", sorted(CROP[0]["cases"]))
def test_center_crop_equals_adm(case):
    manifest, archive = CROP
    image = Image.fromarray(archive[f"{case}/image"])
    crop = pixels(data.center_crop(image, manifest["cases"][case]["target"]))
    tolerance = 0 if pillow_version == manifest["versions"]["PIL"] else 1
    assert crop.shape == archive[f"{case}/crop"].shape
    assert np.abs(crop - archive[f"{case}/crop"]).max() <= tolerance


@pytest.mark.parametrize("h, w", [(1, 1), (1, 30000), (30000, 1), (2000, 3)])
def test_extreme_shapes_are_cropped_to_the_middle_in_bounded_memory(h, w, monkeypatch):
    resize, sizes = Image.Image.resize, []
    monkeypatch.setattr(Image.Image, "resize", lambda *args: sizes.append(args[1]) or resize(*args))
    image = np.zeros((h, w, 3), np.uint8)
    image[max(h // 2 - 3, 0):h // 2 + 3, max(w // 2 - 3, 0):w // 2 + 3] = (255, 0, 0)
    crop = pixels(data.center_crop(Image.fromarray(image), 16))
    assert crop.shape == (16, 16, 3) and (crop[8, 8] == (255, 0, 0)).all() and np.max(sizes) <= 16 * 100


def test_grey_palette_transparent_deep_and_cmyk_files_keep_their_colours(tmp_path):
    rgb = Image.fromarray(picture())
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(picture(seed=1)[:, :, 0]))
    palette, grey, bits = rgb.quantize(64), rgb.convert("L"), rgb.convert("1")
    for name, image, want in (("rgb.png", rgb, rgb), ("rgba.png", rgba, rgb), ("grey.png", grey, grey),
                              ("bits.png", bits, bits), ("p.png", palette, palette), ("l.WEBP", rgb, rgb)):
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("WEBP") else {}))
        assert (pixels(tmp_path / name) == pixels(want.convert("RGB"))).all(), name
    palette.save(tmp_path / "hole.png", transparency=bytes([255, 0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns when it converts such a palette directly
        assert (pixels(tmp_path / "hole.png") == pixels(palette.convert("RGB"))).all()
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for name in ("deep.png", "deep.tiff"):
        Image.fromarray(ramp).save(tmp_path / name)
        assert (pixels(tmp_path / name) == np.rint(ramp / 257)[..., None]).all()
    for colour in ((255, 0, 0), (255, 255, 255), (0, 0, 255)):
        Image.new("RGB", (16, 16), colour).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
        assert np.abs(pixels(tmp_path / "cmyk.jpg")[8, 8] - colour).max() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_turns_the_image_upright(tmp_path, orientation):
    upright, exif = picture(24, 40), Image.Exif()
    undo = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
            5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1),
            7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a, -1)}
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo[orientation](upright))).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "turned.png"), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_animations_and_wrong_suffixes_are_read(tmp_path):
    red, blue = (Image.new("RGB", (20, 20), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    for name in ("moving.gif", "moving.webp", "moving.png"):
        red.save(tmp_path / name, save_all=True, append_images=[blue])
        assert np.abs(pixels(tmp_path / name)[10, 10] - (255, 0, 0)).max() < 8
    for exif in (b"Exif", b"MM\x00*\x00\x00\x00\x08\x00"):  # broken ones
        Image.fromarray(picture()).save(tmp_path / "a.jpg", "png", exif=exif)
        assert (pixels(tmp_path / "a.jpg") == picture()).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tif"])
def test_unreadable_files_are_errors_with_their_name(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(picture(seed=3)).save(file)
    whole = file.read_bytes()
    for content in (whole[:int(len(whole) * 0.6)], b"", b"<html>404</html>"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=file.name):
            data.load_image(file)


def test_uint8_survives_the_way_to_floats_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(levels)
    assert x[0] == -1 and x[255] == 1 and torch.equal(data.to_uint8(x), levels)
    assert data.to_uint8(torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]


# folders

def test_class_folders_are_numbered_in_sorted_order_and_a_flat_folder_is_one_class(tmp_path):
    for i in reversed(range(10)):
        (tmp_path / "ten" / f"class {i}").mkdir(parents=True)
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / "ten" / f"class {i}" / "a.png")
    folder = data.ImageFolder(tmp_path / "ten", 8)
    batch = folder.batch(range(10))
    assert folder.num_classes == 10 and folder.class_names == [f"class {i}" for i in range(10)]
    assert batch["labels"].tolist() == list(range(10)) == batch["images"][:, 0, 0, 0].tolist()
    assert batch["images"].shape == (10, 3, 8, 8) and batch["index"].tolist() == list(range(10))
    assert batch["images"].dtype == torch.uint8 and batch["labels"].dtype == torch.int64
    flat = data.ImageFolder(small.pictures(tmp_path / "flat", 3, 0), 16)
    assert flat.class_names == ["unconditional"] and flat.labels.tolist() == [0, 0, 0]


def test_odd_names_and_links_are_read(tmp_path):
    """What is left out: test_images.py."""
    names = ["Ünïcode/Bild mit Leer.PNG", "a/deep/er/x.JPEG", "a/y.TIFF", "a/z.Webp", "b.dir/日本.bmp"]
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture()).save(tmp_path / "set" / name)
    Image.fromarray(picture(seed=1)).save(tmp_path / "elsewhere.png")
    for name, target in (("a/link.png", "elsewhere.png"), ("a/loop", "set"), ("../linked set", "set")):
        (tmp_path / "set" / name).symlink_to(tmp_path / target)
    folder = data.ImageFolder(tmp_path / "linked set", 16)
    assert sorted(folder.files) == sorted([*names, "a/link.png"])
    assert folder.class_names == ["a", "b.dir", "Ünïcode"]
    assert folder.batch(range(6))["images"].shape == (6, 3, 16, 16) and folder.corrupt == []


def test_the_next_image_takes_the_place_of_a_corrupt_one(tmp_path, capsys):
    """With its own label and index. (More than 1 %: test_images.py.)"""
    few = data.ImageFolder(small.pictures(tmp_path / "few", n=24, classes=3), 16)
    (tmp_path / "few" / few.files[15]).write_bytes(b"")
    for _ in range(3):
        batch = few.batch([15, 16])
        assert torch.equal(batch["images"][0], batch["images"][1])
        assert batch["labels"].tolist() == [2, 2] and batch["index"].tolist() == [16, 16]
    assert few.corrupt == [15] and capsys.readouterr().err.count(few.files[15]) == 1


def test_validation_images_share_the_labels_of_training(tmp_path):
    train = str(small.pictures(tmp_path / "train", n=3, classes=3))
    assert data.open_dataset(train, 8, split="val") is None
    shutil.rmtree(small.pictures(tmp_path / "val", n=6, classes=3) / "a")
    val = data.open_dataset(train, 8, split="val")
    assert val.num_classes == 3 and val.labels.tolist() == [1, 1, 2, 2]


# files of many images

def test_a_grid_places_images_row_by_row(tmp_path):
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 2, 4) * 50
    for batch in (images, images.permute(0, 2, 3, 1), images.numpy()):
        data.save_grid(tmp_path / "new" / "grid.png", batch, columns=3, scale=2)
        grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
        assert grid.shape == (8, 24, 3) and os.listdir(tmp_path / "new") == ["grid.png"]
        assert grid[::4, ::8, 0].tolist() == [[0, 50, 100], [150, 200, 255]]


def test_npz_has_the_names_of_adm_and_is_mapped_unless_compressed(tmp_path):
    images = np.stack([picture(seed=i) for i in range(3)])
    data.save_npz(tmp_path / "s.npz", images, torch.tensor([4, 5, 6]))
    with np.load(tmp_path / "s.npz") as archive:
        assert np.array_equal(archive["arr_0"], images) and archive["arr_1"].tolist() == [4, 5, 6]
    np.savez_compressed(tmp_path / "packed.npz", images)
    np.savez(tmp_path / "turned.npz", np.asfortranarray(images))
    np.save(tmp_path / "s.npy", images)
    for name in ("s.npz", "packed.npz", "turned.npz", "s.npy"):
        dataset = data.ArrayImages(tmp_path / name)
        batch = dataset.batch([2, 0])
        assert np.array_equal(batch["images"].permute(0, 2, 3, 1), images[[2, 0]]), name
        assert batch["labels"].tolist() == ([6, 4] if name == "s.npz" else [-1, -1]), name
        assert isinstance(dataset.images, np.memmap) == (name != "packed.npz"), name


# batches

class Numbers(list):
    """A data set whose image i is the number i."""
    on_disk = True

    def batch(self, indices):
        return {"images": torch.as_tensor(indices)}


def steps(length=50, batch_size=12, world=1, micro=12, seed=3, start=0, stop=8):
    """The global batches of steps start ... stop - 1, put together by row from the parts of all ranks."""
    out, accum = np.full((stop - start, batch_size), -1), batch_size // (world * micro)
    for rank in range(world):
        loader = data.make_loader(Numbers(range(length)), batch_size, Proc(rank, world, CPU), micro, seed,
                                  start * batch_size, stop - start, workers=0)
        assert len(loader) == (stop - start) * accum
        for k, batch in enumerate(loader):
            assert (out[k // accum, batch["rows"]] == -1).all(), "a row came twice"
            out[k // accum, batch["rows"]] = batch["images"]
    return out


def test_each_image_comes_once_an_epoch_and_the_seed_decides_the_order():
    for length in (48, 50):  # of 50 images the last two of an epoch fill no batch
        epochs = steps(length).reshape(2, 48)
        assert all(len(set(epoch)) == 48 for epoch in epochs) and (epochs[0] != epochs[1]).any()
    assert (steps(seed=4) != steps(seed=3)).any()


@pytest.mark.parametrize("world, micro", [(1, 4), (1, 1), (2, 6), (3, 2), (4, 3)])
def test_batches_depend_neither_on_processes_and_micro_batch_nor_on_where_the_run_starts(world, micro):
    for start in (0, 1, 3, 4, 7):
        assert np.array_equal(steps(world=world, micro=micro, start=start), steps()[start:])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_eval_loader_delivers_each_index_once_over_the_processes(world):
    batches = [batch for rank in range(world)
               for batch in data.eval_loader(Numbers(range(12)), 4, Proc(rank, world, CPU), 0, range(2, 12))]
    assert torch.cat([batch["images"] for batch in batches]).tolist() == list(range(2, 12))
    assert torch.cat([batch["rows"] for batch in batches]).tolist() == list(range(10))


def test_every_group_begins_a_batch():
    batches = data.eval_loader(Numbers(range(12)), 4, None, 0, range(1, 12), group=5)
    assert [batch["images"].tolist() for batch in batches] == [[1, 2, 3, 4], [5], [6, 7, 8, 9], [10], [11]]


# latents

N, C, SIDE = 53, 3, 4
FACTS = {"vae": "out/vae/ckpt.pt", "vae_hash": "a" * 8, "data": "some/folder", "images_hash": "b" * 8,
         "num_images": N, "image_size": 32, "channels": C, "latent_size": (SIDE, SIDE), "shard_size": 10,
         "dtype": "float32", "precision": "float32", "num_classes": 4, "class_names": list("wxyz")}
MOMENTS = torch.rand(N, 2 * C, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) + 0.01


def write_latents(path, world=1, **changes):
    """Write the fake latents as `world` processes, one after the other; return how many shards."""
    written = 0
    writers = [data.LatentWriter(path, {**FACTS, **changes}) for _ in range(world)]
    missing = writers[0].missing()
    for rank, writer in enumerate(writers):
        for shard in missing[rank::world]:
            images = list(writer.images_of(shard))
            writer.write(shard, MOMENTS[images], torch.tensor(images) % 4)
            written += 1
    writers[0].finish()
    return written


@pytest.mark.parametrize("workers", [0, 2])
def test_latents_come_back_as_written_through_loaders_too(tmp_path, workers):
    write_latents(tmp_path)
    latents, order = data.LatentFolder(tmp_path), np.random.default_rng(0).permutation(N)
    assert (len(latents), latents.num_classes, latents.facts["class_names"]) == (N, 4, list("wxyz"))
    for batch in ({**latents.batch(order), "indices": torch.from_numpy(order)},
                  *data.make_loader(latents, 16, Proc(0, 1, CPU), 16, 0, 0, 3, workers)):
        assert torch.equal(batch["moments"], MOMENTS[batch["indices"]])
        assert torch.equal(batch["labels"], batch["indices"] % 4)


@pytest.mark.parametrize("name", ["moments-00000.npy", "moments-00005.json", "labels.npy", "meta.json"])
@pytest.mark.parametrize("how", ["gone", "cut", "empty", "flipped"])
def test_a_rerun_writes_only_what_is_missing_and_ends_with_identical_files(tmp_path, name, how):
    """Written by three processes, continued by two: the files are those that one process writes."""
    write_latents(tmp_path / "one")
    write_latents(tmp_path / "many", world=3)
    file = tmp_path / "many" / name
    sound, flipped = file.read_bytes(), bytearray(file.read_bytes())
    digits = [i for i, byte in enumerate(sound) if chr(byte).isdigit()]
    flipped[digits[-1] if ".json" in name else -8] ^= 1  # the last number, or label
    file.write_bytes({"cut": sound[:-1], "flipped": flipped}.get(how, b""))
    if how == "gone":
        file.unlink()
    if name in ("labels.npy", "meta.json") or (name.endswith("npy") and how != "flipped"):
        with pytest.raises((ValueError, FileNotFoundError), match=f"{name}.*encode.py"):
            data.LatentFolder(tmp_path / "many")
    if name == "moments-00000.npy" and how == "flipped":  # read only when it is asked for
        assert data.LatentWriter(tmp_path / "many", FACTS).missing() == []
        assert data.LatentWriter(tmp_path / "many", FACTS).missing(check=True) == [0]
        file.unlink()
    assert write_latents(tmp_path / "many", world=2) == ("moments" in name)
    one, many = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "many"))
    assert one == many


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**100])
def test_absurd_moments_are_refused_when_they_are_written_and_when_they_are_read(tmp_path, value):
    write_latents(tmp_path)
    array = np.load(tmp_path / "moments-00002.npy", mmap_mode="r+")
    array[3, 4, 1, 1] = value
    array.flush()
    latents = data.LatentFolder(tmp_path)
    latents.batch([22, 24, 52])
    with pytest.raises(ValueError, match="moments-00002.npy .*image 23.*--check"):
        latents.batch([22, 23, 52])
    with pytest.raises(ValueError, match="moments are not finite"):
        data.LatentWriter(tmp_path, FACTS).write(2, torch.from_numpy(np.array(array)), torch.zeros(10))


def test_damaged_latents_are_one_line_whatever_is_wrong_with_them(tmp_path):
    """Values of other types, or cut; or they are read as before."""
    write_latents(tmp_path)
    sound = (tmp_path / "meta.json").read_text()
    others = [None, -1, 0, 10**30, "", "\0/x", [], [[1, "a"]], {}, True, 1.5, float("nan"), [-1], [10**400]]
    texts = [json.dumps({**json.loads(sound), key: value}) for key in json.loads(sound) for value in others]
    refused, texts = 0, [*texts, "[]", "3", '"x"', "{}", "[" * 10**5, "\0", sound[:-1], sound[:99]]
    for text in texts:
        (tmp_path / "meta.json").write_text(text)
        try:
            assert torch.equal(data.LatentFolder(tmp_path).batch(range(N))["labels"], torch.arange(N) % 4)
        except (ValueError, FileNotFoundError) as error:
            assert len(str(error).splitlines()) == 1 and str(tmp_path) in str(error)
            refused += 1
    assert refused > 0.5 * len(texts)


def test_more_shards_than_a_process_may_open_files(tmp_path, monkeypatch):
    write_latents(tmp_path, shard_size=1)
    monkeypatch.setattr(data, "OPEN_SHARDS", 8)
    limits, there = resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (there + 20, limits[1]))
    try:
        latents = data.LatentFolder(tmp_path)
        for _ in range(2):
            assert torch.equal(latents.batch(range(N))["moments"], MOMENTS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_than_one_percent_of_corrupt_images_over_all_shards_are_too_many(tmp_path, capsys):
    writer = data.LatentWriter(tmp_path, FACTS)
    for corrupt in ([[], [], [21], [], [], []], [[3], [], [21], [], [], []]):
        for shard, numbers in enumerate(corrupt):
            images = list(writer.images_of(shard))
            writer.write(shard, MOMENTS[images], torch.tensor(images) % 4, numbers)
        if sum(corrupt, []) == [21]:
            assert writer.finish()["corrupt"] == 1 and "1 of 53 images" in capsys.readouterr().err
    with pytest.raises(ValueError, match="2 of 53 images are corrupt"):
        writer.finish()


@pytest.mark.parametrize("change", [{"vae_hash": "c" * 8, "vae": "other.pt"}, {"num_images": 54},
                                    {"images_hash": "c" * 8, "data": "other"}, {"image_size": 64},
                                    {"dtype": "float16"}, {"shard_size": 20},
                                    {"precision": "bfloat16"}])
def test_latents_of_another_vae_or_data_set_are_not_mixed(tmp_path, change):
    write_latents(tmp_path)
    key, value = next(iter(change.items()))
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{key} {FACTS[key]}.*{value}"):
            data.LatentWriter(tmp_path, {**FACTS, **change})
        (tmp_path / "meta.json").unlink(missing_ok=True)  # an unfinished set is recognised as well


def test_more_than_one_corrupt_image_of_a_few_stops_without_loader_workers_too(tmp_path, capsys):
    root = small.pictures(tmp_path / "set", n=10, classes=0)
    for name in ("3.png", "7.png"):
        (root / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match="2 of 10 images are corrupt.* remove 3.png, 7.png"):
        data.ImageFolder(root, 16).batch(range(10))
    assert capsys.readouterr().err.count("the next one replaces it") == 2
