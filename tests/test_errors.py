"""What the commands of the four stages and data.py refuse, in one table (8 s). Each message is one
line; one word of it is held here. What networks and their files refuse: beside their tests."""
import importlib
import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT

import checkpoints
import data
import small
from sit import SIT_SIZES
from vae import VAE

STAGE1 = ("train_vae --data {pictures} --vae tiny --init none --teacher shapes --lpips 0 --gan 0 "
          "--device cpu --image-size 32 --batch-size 8 --bn-group 8 --steps 9 --workers 0 --out {tmp}")
STAGE3 = "train_sit --latents {latents} --model tiny/1 --batch-size 8 --steps 9 --device cpu --out {tmp}"
ENCODE = "encode --data {pictures} --vae {vae} --workers 0 --device cpu --out {tmp}"
SAMPLE = "sample --ckpt {sit} --num 1 --steps 1 --device cpu --out {tmp}"
PIXELS = np.zeros((2, 8, 8, 3), np.uint8)


def npz(tmp, **arrays):
    np.savez(tmp / "s.npz", **arrays)
    return data.ArrayImages(tmp / "s.npz")


# (what is wrong, a command or a function of the temporary folder, the exception, one word of its message)
ROWS = [
    ("abbreviated flag", f"{STAGE3} --batch 3", SystemExit, "--batch"),
    ("zero", f"{STAGE3} --log-every 0", SystemExit, "1 or more"),
    ("negative steps", f"{STAGE3} --steps -3", SystemExit, "0 or more"),
    ("no such device", f"{ENCODE} --device mps", ValueError, "--device"),
    ("no such folder", f"{STAGE1} --data nowhere", FileNotFoundError, "no such folder, .zip"),
    ("no ImageNet", "train_vae --device cpu", FileNotFoundError, "quickstart.sh"),
    ("no images", f"{STAGE1} --data {{bad}}/empty", ValueError, "no images in it"),
    ("empty class folder", f"{STAGE1} --data {{bad}}/class", ValueError, "empty_one"),
    ("image beside classes", f"{STAGE1} --data {{bad}}/mixed", ValueError, "0.png"),
    ("npz of statistics", lambda tmp: npz(tmp, mu=[0]), ValueError, "arr_0"),
    ("npz of floats", lambda tmp: npz(tmp, arr_0=PIXELS / 2), ValueError, "float64"),
    ("npz of few labels", lambda tmp: npz(tmp, arr_0=PIXELS, arr_1=[1]), ValueError, "arr_1"),
    ("no whole step", f"{STAGE1} --steps 0 --epochs 0.01", ValueError, "--steps"),
    ("BatchNorm group that is cut", f"{STAGE1} --micro-batch-size 4", ValueError, "--bn-group 4"),
    ("no start file", f"{STAGE1} --init nowhere", FileNotFoundError, "nowhere"),
    ("start of another size", f"{STAGE1} --vae f8d4 --init {{vae}}", ValueError, "--vae tiny"),
    ("start from a SiT", f"{STAGE1} --init {{sit}}", ValueError, "a SiT"),
    ("discriminator without GAN", f"{STAGE1} --disc-init x.pt", ValueError, "--gan 0"),
    ("size that does not tile", f"{STAGE1} --vae f8d4 --image-size 264", ValueError, "264"),
    ("run with another mapper", f"{STAGE1} --out {{vae}}", ValueError, "mapper"),
    ("run without a GAN", f"{STAGE1} --align 0 --gan 1 --out {{bad}}/tiny", ValueError, "GAN False"),
    ("no discriminator", f"{STAGE1} --gan 1 --disc-init {{sit}}", ValueError, "no discriminator"),
    *((f"{command.split()[0]} into a file", f"{command} --out {{bad}}/page.pt", ValueError, "--out")
      for command in (STAGE1, ENCODE, STAGE3, SAMPLE)),
    ("run of a SiT", f"{STAGE1} --out {{sit}}", ValueError, "nanosendvae-vae"),
    ("folder without a VAE", f"{ENCODE} --vae {{pictures}}", ValueError, "train first"),
    ("no validation folder", f"{ENCODE} --split val", ValueError, "--split val"),
    ("no latents", f"{STAGE3} --latents nowhere", ValueError, "json: no such file; want --latents DIR"),
    ("folder of another program", f"{STAGE3} --latents {{bad}}/format", ValueError, "format"),
    ("stored samples for moments", f"{STAGE3} --latents {{bad}}/samples", ValueError, "56, 4"),
    ("labels that are no classes", f"{STAGE3} --latents {{bad}}/labels", ValueError, "0 to 1"),
    ("channel without spread", f"{STAGE3} --latents {{bad}}/dead", ValueError, "std"),
    ("patch that does not tile", f"{STAGE3} --model S/8", ValueError, "S/1"),
    ("REPA of a block too high", f"{STAGE3} --repa --teacher shapes --repa-block 9", ValueError, "1 to 4"),
    ("REPA, other images", f"{STAGE3} --repa --teacher shapes --data {{pictures}}/a", ValueError, "--data"),
    ("held out by another VAE", f"{STAGE3} --val-latents {{bad}}/other_vae", ValueError, "vae_hash"),
    ("run on another VAE", f"{STAGE3} --latents {{bad}}/other_vae --out {{sit}}", ValueError, "vae_hash"),
    ("run of another model", f"{STAGE3} --qk-norm --out {{sit}}", ValueError, "model small, not tiny/1"),
    ("run of a VAE", f"{STAGE3} --out {{vae}}", ValueError, "nanosendvae-sit"),
    ("VAE for a SiT", f"{SAMPLE} --ckpt {{vae}}", ValueError, "a VAE"),
    ("web page", f"{SAMPLE} --ckpt {{bad}}/page.pt", ValueError, "web page"),
    ("file of another version", f"{SAMPLE} --ckpt {{bad}}/version.pt", ValueError, "invented"),
    ("another VAE", f"{SAMPLE} --vae {{bad}}/tiny", ValueError, "of VAE"),
    ("VAE of other channels", f"{SAMPLE} --vae {{bad}}/vae", ValueError, "makes 4"),
    ("no unconditional velocity", f"{SAMPLE} --ckpt {{bad}}/labelled.pt --cfg 2", ValueError, "--cfg 1"),
    ("interval upside down", f"{SAMPLE} --cfg-interval 0.7 0.2", ValueError, "--cfg-interval"),
    ("statistics twice", f"{SAMPLE} --latent-stats 0.18215", ValueError, "--latent-stats"),
    ("published SiT alone", f"{SAMPLE} --ckpt {{bad}}/published.pt", ValueError, "--vae FILE"),
    ("no statistics", f"{SAMPLE} --ckpt {{bad}}/published.pt --vae {{vae}}", ValueError, "--latent-stats"),
]


@pytest.fixture(scope="module")
def paths(trained, tmp_path_factory):
    """What the commands above name: files of all stages, and damaged ones under `bad`."""
    bad, vae = tmp_path_factory.mktemp("bad"), checkpoints.load_vae(trained.vae)
    for name, changes in (("other_vae", {"vae_hash": "0" * 64}), ("format", {"format": "other"}),
                          ("samples", {}), ("labels", {}), ("dead", {"std": [0.0] * 28})):
        meta = json.loads((shutil.copytree(trained.latents, bad / name) / "meta.json").read_text())
        (bad / name / "meta.json").write_text(json.dumps(meta | changes))
    np.save(bad / "samples/moments-00000.npy", np.zeros((16, 28, 4, 4), np.float32))
    np.save(bad / "labels/labels.npy", np.arange(40) - 1)
    saved = checkpoints.newest(trained.sit)
    small.save(bad / "version.pt", saved | {"model_config": saved["model_config"] | {"invented": 1}})
    small.save(bad / "labelled.pt", saved | {"args": {"label_dropout": 0}})
    published = small.small_sit(input_size=4, in_channels=28, num_classes=2, **SIT_SIZES["tiny/1"])
    small.save(bad / "published.pt", published.state_dict())
    small.pictures(bad / "mixed", n=1, classes=0)
    for folder in (small.pictures(bad / "mixed"), small.pictures(bad / "class"), bad / "empty"):
        (folder / "empty_one").mkdir(parents=True)
    small.small_vae_checkpoint(bad / "vae")
    small.small_vae_checkpoint(bad / "tiny", VAE(vae.config), image_size=32)
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


@pytest.mark.parametrize("script", ["train_vae", "train_sit", "encode", "sample", "probe", "fid", "bench",
                                    "export", "plot"])
def test_every_flag_is_passed_by_a_test_that_names_its_script(script, capsys):
    texts = [path.read_text() for path in [*(ROOT / "tests").glob("*.py"), ROOT / "quickstart.sh"]]
    texts, flags = "\n".join(text for text in texts if re.search(rf"\b{script}\b", text)), set()
    for command in (["gfid"], ["rfid"], ["stats"]) if script == "fid" else ([],):
        with pytest.raises(SystemExit):
            importlib.import_module(script).parse_args([*command, "-h"])
        flags |= {*re.findall(r"^  (--[a-z][\w-]*)", capsys.readouterr().out, re.M)}
    assert len(flags) > 1
    assert not [flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", texts)]
