"""Six files stand alone: each copied into an empty folder computes a number there.

    python -m pytest tests/test_copy.py        about 10 s on 2 cores, no network
"""
import json
import shutil
import subprocess
import sys
from textwrap import dedent

from conftest import ROOT

# file -> (program, the line that it prints)
PROGRAMS = {
    "vae": ("""
        vae = VAE(VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4))
        posterior = vae.encode(torch.zeros(2, 3, 32, 32))
        print(vae.decode(posterior.mean * 0).isfinite().sum().item())
        """, "6144"),
    "sit": ("""
        model = SiT(SiTConfig(input_size=4, in_channels=3, **SIT_SIZES["tiny/1"]))
        noise, y = torch.ones(2, 3, 4, 4), torch.tensor([0, 1])
        z = sample_ode(lambda z, t, t_step: guided_velocity(model, z, t, y, 2.0, t_step=t_step), noise, 3)
        print(z.sum().item())
        """, "96.0"),  # a fresh network says 0
    "mapper": ("""
        mapper, x = Mapper(MapperConfig(4, 4, 384, projector_dim=8)), torch.zeros(2, 3, 56, 56)
        target = Teacher("vit_small_patch14_dinov2.lvd142m", 4, "random")(x)
        print(round(alignment_loss(target, -target).item(), 3), mapper.clean(torch.ones(2, 4, 4, 4)).numel())
        """, "2.0 12288"),
    "losses": ("""
        print(discriminator_loss(torch.zeros(3), torch.zeros(3)).item())
        LPIPS("random")
        """, "1.0"),
    "data": ("""
        save_npz("images.npz", np.full((3, 8, 8, 3), 255, np.uint8), [2, 1, 0])
        batch = ArrayImages("images.npz").batch([0, 2])
        print(to_float(batch["images"]).mean().item(), batch["labels"].tolist())
        """, "1.0 [2, 0]"),
    "common": ("""
        layer = torch.nn.Linear(1, 1, bias=False)
        (3 * layer.weight).sum().backward()
        print(*(x.item() for x in optimizer_step(adamw(layer, 0.1), 0.1, 1.0)))
        """, "3.0 False")}


# Each is used in a fork of one process, which has imported what takes seconds, but none of ours.
FORKS = """if True:
    import json, os, sys, traceback
    import numpy, timm, torch
    for name, program in json.loads(sys.argv[1]).items():
        if os.fork() == 0:
            sys.path.insert(0, os.path.abspath(name))
            try:
                exec(f"from {name} import *; import torch" + program, {})
            except Exception:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(0)  # quicker than an orderly end
        os.wait()
"""


def test_six_files_work_without_the_others(tmp_path):
    for name in PROGRAMS:
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", tmp_path / name)
    programs = json.dumps({name: dedent(program) for name, (program, _) in PROGRAMS.items()})
    done = subprocess.run([sys.executable, "-I", "-c", FORKS, programs], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.stdout.splitlines() == [expected for _, expected in PROGRAMS.values()], done.stderr
    # beside losses.py belong the linear heads of LPIPS
    assert "assets/lpips_vgg_linear.pt'" in done.stderr and done.stderr.count("Traceback") == 1
