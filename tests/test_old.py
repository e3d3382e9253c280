"""Files that the code wrote before the rebuild still load, and compute the same numbers. A few seconds.

Run: python -m pytest tests/test_old.py        (tests/old/README.md says how the files were made)
"""
import pytest
import torch
from conftest import ROOT

from checkpoints import load_sit, load_vae
from data import LatentFolder

OLD = ROOT / "tests" / "old"


def wave(*shape):
    """Numbers in [-1, 1] that every machine draws alike."""
    count = torch.Size(shape).numel()
    return torch.linspace(0, 50, count, dtype=torch.float64).sin().float().reshape(shape)


@torch.no_grad()
def test_a_vae_loads_and_encodes_as_before():
    vae = load_vae(OLD / "vae").eval()
    posterior = vae.encode(wave(2, 3, 32, 32))
    assert posterior.mean.shape == (2, 4, 4, 4)
    sums = [x.abs().sum().item() for x in (posterior.mean, posterior.logvar, vae.decode(posterior.mean))]
    assert sums == pytest.approx([32.905075, 23.062473, 1381.3774], rel=1e-4)


@torch.no_grad()
def test_a_sit_loads_and_predicts_as_before():
    model = load_sit(OLD / "sit" / "ckpt_0000002.pt").eval()
    v = model(wave(2, 4, 4, 4), torch.tensor([0.25, 0.75]), torch.tensor([0, 2]))
    assert v.shape == (2, 4, 4, 4)
    assert v.abs().sum().item() == pytest.approx(1.1723132, rel=1e-4)


def test_latents_of_two_float16_shards_are_read_as_before():
    latents = LatentFolder(OLD / "encoded")
    batch = latents.batch([23, 0, 15, 16])
    moments, labels = batch["moments"], batch["labels"]
    assert len(latents) == 24 and moments.shape == (4, 8, 4, 4) and moments.dtype == torch.float32
    assert labels.tolist() == [1, 0, 1, 1]
    sums = [x.abs().sum().item() for x in moments]
    assert sums == pytest.approx([78.763565, 78.932991, 77.611748, 78.285294], rel=1e-6)
    assert latents.mean.tolist() == pytest.approx([-0.006947999, -0.2823412, 0.4862572, 0.1170701], rel=1e-6)
    assert latents.std.tolist() == pytest.approx([1.0541627, 1.0055619, 0.92653877, 1.0013322], rel=1e-6)
