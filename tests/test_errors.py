"""What the commands of the four stages and data.py refuse, in one table; and that tests pass every flag.

Run: ./test.sh tests/test_errors.py        (about 10 s, CPU)
A message is one line that says what was seen and what to type; one word of it is held here. The networks and
checkpoints.py have tables of their own beside their tests.
"""
import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import checkpoints
import data
import small
from sit import SIT_SIZES
from vae import VAE, VAE_SIZES

STAGE1 = ("train_vae --data {pictures} --vae tiny --init none --teacher shapes --lpips 0 --gan 0 "
          "--device cpu --image-size 32 --batch-size 8 --bn-group 8 --steps 9 --workers 0 --out {tmp}")
STAGE3 = "train_sit --latents {latents} --model tiny/1 --batch-size 8 --steps 9 --device cpu --out {tmp}"
ENCODE = "encode --data {pictures} --vae {vae} --workers 0 --device cpu --out {tmp}"
TIMM = "--teacher vit_tiny_patch16_224"
SAMPLE = "sample --ckpt {sit} --num 1 --steps 1 --device cpu --out {tmp}"
NAN, IMAGES = torch.full((8, 6, 4, 4), torch.nan), np.zeros((2, 8, 8, 3), np.uint8)


def writer(tmp):
    """Of two shards of 8 images, 3 channels, 4 x 4."""
    return data.LatentWriter(tmp, {**dict.fromkeys((*data.IDENTITY, "vae", "data"), "x"), "num_images": 16,
                                   "channels": 3, "latent_size": (4, 4), "shard_size": 8, "dtype": "float32"})


def npz(tmp, **arrays):
    np.savez(tmp / "s.npz", **arrays)
    return data.ArrayImages(tmp / "s.npz")


# (what is wrong, a command or a function of the temporary folder, the exception, one word of its message)
ROWS = [
    ("unknown flag", f"{STAGE1} --btach-size 3", SystemExit, "--btach-size"),
    ("abbreviated flag", f"{STAGE3} --batch 3", SystemExit, "--batch"),
    ("no number", f"{STAGE1} --batch-size x", SystemExit, "--batch-size"),
    ("negative", f"{STAGE1} --batch-size -4", SystemExit, "1 or more"),
    ("zero", f"{STAGE3} --log-every 0", SystemExit, "1 or more"),
    ("negative steps", f"{STAGE3} --steps -3", SystemExit, "0 or more"),
    ("unknown size", f"{STAGE1} --vae f32", SystemExit, "f16d32"),
    ("no such device", f"{ENCODE} --device mps", ValueError, "--device"),

    ("no such folder", f"{STAGE1} --data nowhere", FileNotFoundError, "--data DIR"),
    ("no ImageNet", "train_vae --device cpu", FileNotFoundError, "quickstart.sh"),
    ("no images", f"{STAGE1} --data {{bad}}/empty", ValueError, "--data DIR"),
    ("empty class folder", f"{STAGE1} --data {{bad}}/class", ValueError, "empty_one"),
    ("image beside classes", f"{STAGE1} --data {{bad}}/mixed", ValueError, "stray.png"),
    ("root of splits", f"{STAGE1} --data {{bad}}/splits", ValueError, "splits/train"),
    ("corrupt images", f"{ENCODE} --data {{bad}}/corrupt", ValueError, "corrupt"),
    ("npz is missing", lambda tmp: data.ArrayImages(tmp / "no.npz"), ValueError, "no.npz"),
    ("npz of statistics", lambda tmp: npz(tmp, mu=[0]), ValueError, "arr_0"),
    ("npz of floats", lambda tmp: npz(tmp, arr_0=NAN), ValueError, "float32"),
    ("npz of few labels", lambda tmp: npz(tmp, arr_0=IMAGES, arr_1=[1]), ValueError, "arr_1"),

    ("fewer images than a batch", f"{STAGE1} --batch-size 64 --bn-group 64", ValueError, "--batch-size 40"),
    ("no whole step", f"{STAGE1} --steps 0 --epochs 0.01", ValueError, "--steps"),
    ("uneven micro-batch", f"{STAGE1} --micro-batch-size 3", ValueError, "--batch-size 9"),
    ("BatchNorm group that is cut", f"{STAGE1} --micro-batch-size 4", ValueError, "--bn-group 4"),

    ("no start file", f"{STAGE1} --init nowhere", FileNotFoundError, "nowhere"),
    ("start of another size", f"{STAGE1} --vae f8d4 --init {{vae}}", ValueError, "--vae tiny"),
    ("start from a SiT", f"{STAGE1} --init {{sit}}", ValueError, "a SiT"),
    ("discriminator without GAN", f"{STAGE1} --disc-init x.pt", ValueError, "--gan 0"),
    ("no discriminator in it", f"{STAGE1} --gan 1 --disc-init {{sit}}", ValueError, "no discriminator"),
    ("size that does not tile", f"{STAGE1} --vae f8d4 --image-size 264", ValueError, "264"),
    ("teacher of another grid", f"{STAGE1} --image-size 64", ValueError, "32 px"),
    ("unknown teacher", f"{STAGE1} --teacher vit_none", ValueError, "vit_none"),
    ("no file of the teacher", f"{STAGE1} {TIMM} --teacher-weights nowhere", FileNotFoundError, "nowhere"),
    ("no file of LPIPS", f"{STAGE1} --lpips 1 --lpips-weights nowhere", FileNotFoundError, "nowhere"),
    ("run with another mapper", f"{STAGE1} --out {{vae}}", ValueError, "mapper"),
    *((f"{command.split()[0]} into a file", f"{command} --out {{bad}}/page.pt", ValueError, "another --out")
      for command in (STAGE1, ENCODE, STAGE3, SAMPLE)),
    ("run with a GAN", f"{STAGE1} --align 0 --out {{vae}}", ValueError, "GAN True"),
    ("run of a SiT", f"{STAGE1} --out {{sit}}", ValueError, "nanosendvae-vae"),

    ("no VAE", f"{ENCODE} --vae nowhere", FileNotFoundError, "nowhere"),
    ("folder without a VAE", f"{ENCODE} --vae {{pictures}}", ValueError, "train first"),
    ("SiT for a VAE", f"{ENCODE} --vae {{sit}}", ValueError, "a SiT"),
    ("no validation folder", f"{ENCODE} --split val", ValueError, "--split val"),
    ("latents of another VAE there", f"{ENCODE} --out {{bad}}/other_vae", ValueError, "vae_hash"),
    ("samples for moments", lambda tmp: writer(tmp).write(0, NAN[:, :3], [0] * 8), ValueError, "6, 4"),
    ("moments that are no numbers", lambda tmp: writer(tmp).write(0, NAN, [0] * 8), ValueError, "finite"),
    ("missing shards", lambda tmp: writer(tmp).finish(), ValueError, "[0, 1]"),

    ("no latents", f"{STAGE3} --latents nowhere", FileNotFoundError, "encode.py"),
    ("unfinished latents", f"{STAGE3} --latents {{bad}}/unfinished", FileNotFoundError, "encode.py"),
    ("folder of another program", f"{STAGE3} --latents {{bad}}/format", ValueError, "format"),
    ("truncated latents", f"{STAGE3} --latents {{bad}}/truncated", ValueError, "moments-00000.npy"),
    ("stored samples for moments", f"{STAGE3} --latents {{bad}}/samples", ValueError, "56, 4"),
    ("labels that are no classes", f"{STAGE3} --latents {{bad}}/labels", ValueError, "0 to 1"),
    ("moments for samples", lambda tmp: data.normalize_latents(NAN, *torch.ones(2, 3)), ValueError, "6"),
    ("channel without spread", f"{STAGE3} --latents {{bad}}/dead", ValueError, "std"),
    ("patch that does not tile", f"{STAGE3} --model S/8", ValueError, "S/1"),
    ("REPA of a block too high", f"{STAGE3} --repa --teacher shapes --repa-block 9", ValueError, "1 to 4"),
    ("REPA, other images", f"{STAGE3} --repa --teacher shapes --data {{pictures}}/a", ValueError, "--data"),
    ("held out by another VAE", f"{STAGE3} --val-latents {{bad}}/other_vae", ValueError, "vae_hash"),
    ("run on another VAE", f"{STAGE3} --latents {{bad}}/other_vae --out {{sit}}", ValueError, "vae_hash"),
    ("run of another model", f"{STAGE3} --qk-norm --out {{sit}}", ValueError, "qk_norm False, not True"),
    ("run of a VAE", f"{STAGE3} --out {{vae}}", ValueError, "nanosendvae-sit"),

    ("no SiT", f"{SAMPLE} --ckpt nowhere", FileNotFoundError, "nowhere"),
    ("VAE for a SiT", f"{SAMPLE} --ckpt {{vae}}", ValueError, "a VAE"),
    ("web page", f"{SAMPLE} --ckpt {{bad}}/page.pt", ValueError, "web page"),
    ("file of another version", f"{SAMPLE} --ckpt {{bad}}/version.pt", ValueError, "invented"),
    ("another VAE", f"{SAMPLE} --vae {{bad}}/tiny", ValueError, "of VAE"),
    ("VAE of other channels", f"{SAMPLE} --vae {{bad}}/vae", ValueError, "makes 4"),
    ("no unconditional velocity", f"{SAMPLE} --ckpt {{bad}}/labelled.pt --cfg 2", ValueError, "--cfg 1"),
    ("interval upside down", f"{SAMPLE} --cfg-interval 0.7 0.2", ValueError, "--cfg-interval"),
    ("statistics twice", f"{SAMPLE} --latent-stats 0.18215", ValueError, "--latent-stats"),
    ("published SiT alone", f"{SAMPLE} --ckpt {{bad}}/published.pt", ValueError, "--vae FILE"),
    ("published SiT, other VAE", f"{SAMPLE} --ckpt {{bad}}/published.pt --vae {{bad}}/vae", ValueError, "4"),
    ("no statistics", f"{SAMPLE} --ckpt {{bad}}/published.pt --vae {{vae}}", ValueError, "--latent-stats"),
]


@pytest.fixture(scope="module")
def paths(trained, tmp_path_factory):
    """What the commands above name: files of all stages, and damaged ones under `bad`."""
    bad = tmp_path_factory.mktemp("bad")

    def latents(name, **facts):
        shutil.copytree(trained.latents, bad / name)
        meta = json.loads((bad / name / "meta.json").read_text())
        (bad / name / "meta.json").write_text(json.dumps(meta | facts))
        return bad / name
    latents("other_vae", vae_hash="0" * 64)
    for part in (bad / "other_vae").glob("moments-*.json"):
        part.unlink()
    latents("format", format="other")
    (latents("unfinished") / "meta.json").unlink()
    with open(latents("truncated") / "moments-00000.npy", "rb+") as file:
        file.truncate(5000)
    np.save(latents("samples") / "moments-00000.npy", np.zeros((16, 28, 4, 4), np.float32))
    np.save(latents("labels") / "labels.npy", np.arange(40) - 1)
    saved = checkpoints.newest(trained.sit)
    small.save(bad / "version.pt", saved | {"model_config": saved["model_config"] | {"invented": 1}})
    small.save(bad / "labelled.pt", saved | {"args": {"label_dropout": 0}})
    latents("dead", std=[0.0] * 28)
    (bad / "empty").mkdir()
    for name in ("class", "mixed", "splits/train", "splits/val", "corrupt"):
        small.pictures(bad / name)
    (bad / "class" / "empty_one").mkdir()
    (bad / "mixed" / "a" / "0.png").rename(bad / "mixed" / "stray.png")
    for file in (bad / "corrupt").glob("*/*"):
        file.write_bytes(b"")
    small.small_vae_checkpoint(bad / "vae")
    small.small_vae_checkpoint(bad / "tiny", VAE(VAE_SIZES["tiny"]))
    published = small.small_sit(input_size=4, in_channels=28, num_classes=2, **SIT_SIZES["tiny/1"])
    small.save(bad / "published.pt", published.state_dict())
    (bad / "page.pt").write_text("<html>404</html>")
    return {"bad": bad, **vars(trained)}


@pytest.mark.parametrize("_, call, exception, word", ROWS, ids=[row[0] for row in ROWS])
def test_what_cannot_be_done_is_one_line(paths, tmp_path, monkeypatch, capsys, _, call, exception, word):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(exception) as error:
        if callable(call):
            call(tmp_path)
        else:
            script, *flags = call.format(tmp=tmp_path / "out", **paths).split()
            importlib.import_module(script).main(flags)
    if exception is SystemExit:
        assert error.value.code == 2 and word in capsys.readouterr().err
    else:
        assert word in str(error.value) and len(str(error.value).splitlines()) == 1
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {".lock"}


# flags

def flags_of(script, capsys):
    """Every flag in `script -h`, those of its commands included."""
    flags = set()
    for command in ([], ["gfid"], ["rfid"], ["stats"]) if script == "fid" else ([],):
        with pytest.raises(SystemExit):
            importlib.import_module(script).parse_args([*command, "-h"])
        for line in capsys.readouterr().out.splitlines():
            if re.match(r"  (-h, )?--", line):
                flags |= {*re.findall(r"--[a-z][\w-]*", re.split(" {2,}", line.strip())[0])}
    return flags - {"--help"}


@pytest.mark.parametrize("script", ["train_vae", "train_sit", "encode", "sample", "probe", "fid", "bench",
                                    "export", "plot"])
def test_every_flag_is_passed_by_a_test_that_names_its_script(script, capsys):
    texts = [path.read_text() for path in [*(ROOT / "tests").glob("*.py"), ROOT / "quickstart.sh"]]
    texts = "\n".join(text for text in texts if re.search(rf"\b{script}\b", text))
    flags = flags_of(script, capsys)
    assert len(flags) > 1
    missing = [flag for flag in sorted(flags) if not re.search(rf"(?<![\w-]){flag}(?![\w-])", texts)]
    assert not missing, f"{script}.py: {' '.join(missing)}"
