"""The README's "In your own trainer" runs and learns; links and pictures of README.md and docs/ exist. 10 s.

Run: ./test.sh tests/test_readme.py
"""
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from small import small_vae

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# the README's sizes -> those of small_vae: 4 x 8 x 8 latents of 16 px images
SMALLER = {'"vit_base_patch14_dinov2.lvd142m", grid=16': '"test_vit.r160_in1k", grid=8, weights="random"',
           "z_channels=32, grid=16": "z_channels=4, grid=8, projector_dim=512"}


def test_the_alignment_loss_falls_in_your_own_trainer():
    section = (ROOT / "README.md").read_text().partition("## In your own trainer")[2]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    for long, short in SMALLER.items():
        assert code.count(long) == 1, f"README.md: {long} is not in the block any more"
        code = code.replace(long, short)
    torch.manual_seed(0)
    vae, align = small_vae().train(), []
    x = F.interpolate(2 * torch.rand(4, 3, 2, 2) - 1, size=16, mode="bicubic")

    def images():
        for _ in range(10):
            yield x
            align.append(names["loss"].item())  # of the step that the block has just taken

    def no_loss(x, x_hat):  # so that what is learned is learned by alignment
        assert x.shape == x_hat.shape
        return 0 * x_hat.mean()

    names = {"vae": vae, "images": images(), "your_loss": no_loss}
    exec(code, names)
    assert len(align) == 10 and max(align[-3:]) < 0.8 * align[0], align  # noise moves it from step to step
    assert vae.encoder.conv_in.weight.grad.abs().max() > 0  # z is not detached


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", link)]
    missing = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    assert not missing, f"{page.name}: {missing}"
