"""Shared by all tests: the repository on the path, and the golden fixtures (format: tests/golden/README.md).

The folder is $GOLDEN, or tests/golden; cases, configurations and weights come from its manifests alone.
"""
import json
import os
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
GOLDEN = Path(os.environ.get("GOLDEN", ROOT / "tests" / "golden"))
os.environ["HF_HUB_OFFLINE"] = "1"  # as test.sh: the hub's client would try again for a minute
torch.set_num_threads(1)  # ./test.sh runs two processes; the networks are too small for two threads to help


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """A test whose own process asks for another machine fails, whatever the code does about such errors."""
    def local_only(function, host_of):
        def call(*args, **kwargs):
            host = host_of(*args)
            if isinstance(host, str) and not re.match(r"127\.|::1$|localhost$|$", host):
                pytest.fail(f"this test reaches the network: {host}")
            return function(*args, **kwargs)
        return call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only(
            socket.socket.connect, lambda sock, address: address[0] if isinstance(address, tuple) else None))
        patch.setattr(socket, "getaddrinfo", local_only(socket.getaddrinfo, lambda host, *_: host))
        yield


def read_fixture(name):
    """Return (manifest dict, npz archive) of one golden fixture."""
    manifest = json.loads((GOLDEN / f"{name}.json").read_text())
    return manifest, np.load(GOLDEN / f"{name}.npz", allow_pickle=False)


def tensor(archive, key):
    """Return one array of the archive as a torch tensor."""
    return torch.from_numpy(archive[key])


def prescribed(rule, archive=None, key=None):
    """Return the array that a manifest rule prescribes: stored data, or a scaled standard normal by seed."""
    if rule["kind"] == "data":
        return archive["weights/" + key]
    z = np.random.default_rng(rule["seed"]).standard_normal(rule["shape"]).astype(np.float32)
    scaled = np.float32(rule["scale"]) * (np.abs(z) if rule["kind"] == "abs_plus" else z)
    return scaled + np.float32({"normal": 0, "one_plus": 1, "abs_plus": rule.get("offset", 0)}[rule["kind"]])


def fill_by_name(module, manifest, table, archive=None, rename=lambda key: key, ignore=()):
    """Give every tensor of `module` the value that manifest["tensors"][table] prescribes for its name.

    rename: our state-dict key -> key in the manifest; ignore: manifest keys that our module need not have.
    Raises on a missing key, a key left over, or another shape; 'as_built' tensors are left alone.
    """
    todo = dict(manifest["tensors"][table])
    with torch.no_grad():
        for key, value in module.state_dict().items():
            rule = todo.pop(rename(key))
            if list(value.shape) != rule["shape"]:
                raise ValueError(f"{key}: shape {list(value.shape)}, expected {rule['shape']}")
            if rule["kind"] != "as_built":
                value.copy_(torch.from_numpy(prescribed(rule, archive, rename(key))))
    left = [key for key, rule in todo.items() if rule["kind"] != "as_built" and key not in ignore]
    if left:
        raise KeyError(f"not in the module: {left[:5]} (+{max(len(left) - 5, 0)})")
    return module


# what several files share

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """The path of 40 pictures of 32 px in the class folders a and b."""
    import small
    return str(small.pictures(tmp_path_factory.mktemp("pictures") / "train", n=40))


def make_trained(pictures, root):
    """Write into the folder `root` what the stages leave; return the paths of what `trained` names."""
    import encode
    import small
    from data import LatentFolder
    from losses import PatchDiscriminator
    from vae import VAE, VAE_SIZES
    torch.manual_seed(0)
    vae = VAE(VAE_SIZES["tiny"])
    for p in vae.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    disc = PatchDiscriminator().state_dict()
    small.small_vae_checkpoint(root / "vae", vae, image_size=32, discriminator=disc)
    encode.main(["--data", pictures, "--vae", str(root / "vae"), "--workers", "0", "--device", "cpu",
                 "--shard-size", "16", "--out", str(root / "latents")])
    facts = LatentFolder(root / "latents").facts
    sit = small.small_sit(input_size=4, in_channels=facts["channels"], num_classes=2)
    small.small_sit_checkpoint(root / "sit", sit, vae, latents=facts)
    paths = {name: str(root / name) for name in ("vae", "latents", "sit")}
    return SimpleNamespace(pictures=pictures, **paths)


@pytest.fixture(scope="session")
def trained(pictures, tmp_path_factory):
    """Paths of what the stages leave: .pictures -> .vae -> .latents -> .sit, tiny, of random weights.

    The VAE's weights have unit gain, so that outputs differ from image to image, as they do after training.
    """
    return make_trained(pictures, tmp_path_factory.mktemp("trained"))
