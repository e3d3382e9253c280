"""What must hold on a GPU: precision, attention, memory format, compile, no host sync, stages at full size.

    ./test.sh tests/test_gpu.py             # the same tests on the CPU, small; 20 s, the first time a minute
    ./test.sh tests/test_gpu.py -m gpu -s   # on a CUDA device; -s shows seconds and peak memory of stages

Each test runs on the CPU (but for the comparison of the two devices) and, marked `gpu`, on a CUDA device.
Weights are random, in files of the published layouts where a file is read; pictures are noise.
"""
import json
import shutil
import time

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import common
import encode
import mapper
import sample
import sit
import train_sit
import train_vae
import vae
from losses import PatchDiscriminator, vgg16_trunk

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
DINOV2 = "vit_base_patch14_dinov2.lvd142m"


@pytest.fixture(autouse=True)
def exact_float32():
    """float32 means float32 (common.setup allows TF32 on CUDA)."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def make_vae():
    model = vae.VAE(vae.VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(16,),
                                  resolution=32, z_channels=4)).eval()
    return model, lambda x: model.decode(model.encode(x).mode()), (torch.rand(2, 3, 32, 32) * 2 - 1,)


def make_sit():
    model = sit.SiT(sit.SiTConfig(input_size=8, in_channels=4, hidden_size=96, depth=2, num_heads=3,
                                  patch_size=1, num_classes=5, qk_norm=True)).eval()
    for p in model.parameters():  # a fresh one outputs zero
        torch.nn.init.normal_(p, std=0.1) if p.requires_grad else None
    return model, model, (torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([1, 5]))


def make_mapper():
    model = mapper.Mapper(mapper.MapperConfig(z_channels=4, grid=8, out_dim=96, projector_dim=64)).eval()
    return model, model, (torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.randn(2, 4, 8, 8))


def make_discriminator():
    model = PatchDiscriminator().eval()
    return model, model, (torch.rand(2, 3, 64, 64) * 2 - 1,)


NETWORKS = {"vae": make_vae, "sit": make_sit, "mapper": make_mapper, "discriminator": make_discriminator}


def network(name, device):
    """Return (module, function, inputs) on the device, the same numbers on every device."""
    torch.manual_seed(0)
    module, function, inputs = NETWORKS[name]()
    module.to(device)
    return module, function, [x.to(device) for x in inputs]


def with_gradients(module, function, inputs):
    """Return output and parameter gradients of the mean square of function(*inputs), on the CPU."""
    out = function(*inputs)
    used = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out.float().square().mean(), used)
    return [x.detach().float().cpu() for x in (out, *grads)]


def relative_error(found, wanted):
    """Largest distance of two lists of tensors, relative to the norm of the wanted ones' largest."""
    scale = max(float(w.norm()) for w in wanted[1:])
    errors = [float((f - w).norm()) / scale for f, w in zip(found[1:], wanted[1:])]
    return max(float((found[0] - wanted[0]).norm() / wanted[0].norm()), *errors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NETWORKS)
def test_cuda_computes_what_the_cpu_computes(name):
    on_cuda, on_cpu = (with_gradients(*network(name, device)) for device in ("cuda", "cpu"))
    assert relative_error(on_cuda, on_cpu) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_autocast_changes_rounding_only(name, device):
    module, function, inputs = network(name, device)
    exact = with_gradients(module, function, inputs)
    with torch.autocast(device, torch.bfloat16):
        rounded = with_gradients(module, function, inputs)
    assert 1e-5 < relative_error(rounded, exact) < 0.05


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["vae", "sit", "mapper"])
def test_fused_attention_equals_softmax_written_out(name, device, monkeypatch):
    module, function, inputs = network(name, device)
    fused, calls = with_gradients(module, function, inputs), []

    def eager(q, k, v):
        calls.append(q.shape)
        return torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1) @ v
    monkeypatch.setattr(F, "scaled_dot_product_attention", eager)
    assert relative_error(with_gradients(module, function, inputs), fused) < 1e-5
    assert len(calls) > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["vae", "discriminator"])
def test_channels_last_changes_nothing_but_the_layout(name, device):
    module, function, (x,) = network(name, device)
    plain = with_gradients(module, function, [x])
    module.to(memory_format=torch.channels_last)
    assert any(p.ndim == 4 and not p.is_contiguous() for p in module.parameters())
    x = x.to(memory_format=torch.channels_last)
    assert relative_error(with_gradients(module, function, [x]), plain) < 1e-4


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["vae", "sit", "mapper"])
def test_compiled_networks_compute_the_same(name, device):
    module, function, inputs = network(name, device)
    plain = with_gradients(module, function, inputs)
    torch._dynamo.reset()
    parts = (module.encoder, module.decoder) if name == "vae" else (module,)
    with torch._dynamo.config.patch(suppress_errors=False):
        common.compile_modules(*parts)
        torch._dynamo.config.suppress_errors = False
        torch._dynamo.utils.counters.clear()
        assert relative_error(with_gradients(module, function, inputs), plain) < 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(parts)


# the scripts

SMALL = {"px": 32, "batch": 8, "vae": ["--vae", "tiny", "--teacher", "shapes", "--lpips", "0"],
         "sit": ["--model", "tiny/1", "--teacher", "shapes", "--repa-block", "2"]}
# the paper's networks
FULL = {"px": 256, "batch": 32, "vae": ["--vae", "f16d32"], "sit": ["--model", "XL/1"]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """folder(px): 40 pictures of coarse noise in two classes."""
    def folder(px):
        root = tmp_path_factory.mktemp("pictures") / "train"
        rng = np.random.default_rng(0)
        for i in range(40):
            path = root / ("cat", "dog")[i % 2] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((px, px), Image.BICUBIC).save(path)
        return str(root)
    return folder


def flags_of(sizes, device, tmp_path):
    """Return the flags of (train_vae.py, train_sit.py); full size writes the files that it would fetch."""
    run = ["--device", device, "--workers", "0", "--batch-size", str(sizes["batch"]), "--log-every", "1"]
    stage1 = [*sizes["vae"], "--init", "none", "--image-size", str(sizes["px"]), "--bn-group", "8", *run]
    stage2 = [*sizes["sit"], *run]
    if sizes is FULL:
        teacher, vgg = str(tmp_path / "dinov2.pth"), str(tmp_path / "vgg16.pth")
        torch.save(timm.create_model(DINOV2, pretrained=False).state_dict(), teacher)
        torch.save(vgg16_trunk("random").state_dict(prefix="features."), vgg)
        stage1 += ["--teacher-weights", teacher, "--lpips-weights", vgg]
        stage2 += ["--teacher-weights", teacher]
    return stage1, stage2


def losses(folder):
    """The logged losses of a run."""
    rows = [json.loads(line) for line in open(f"{folder}/log.jsonl")]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("device, sizes", [("cpu", SMALL), pytest.param("cuda", FULL, marks=GPU)],
                         ids=["cpu-small", "cuda-full"])
def test_every_stage_takes_a_real_step(device, sizes, pictures, tmp_path):
    """VAE (two steps, all losses), latents, SiT with REPA (two steps), samples; prints what each took."""
    images, px = pictures(sizes["px"]), str(sizes["px"])
    stage1, stage2 = flags_of(sizes, device, tmp_path)
    folder = {name: str(tmp_path / name) for name in ("vae", "latents", "sit", "samples")}
    stages = {
        "train_vae": (train_vae, ["--data", images, *stage1, "--steps", "2", "--out", folder["vae"]]),
        "encode": (encode, ["--data", images, "--vae", folder["vae"], "--image-size", px, "--workers", "0",
                            "--device", device, "--out", folder["latents"]]),
        "train_sit": (train_sit, ["--latents", folder["latents"], *stage2, "--repa", "--steps", "2",
                                  "--out", folder["sit"]]),
        "sample": (sample, ["--ckpt", folder["sit"], "--num", "8", "--steps", "4", "--cfg", "1.5", "--device",
                            device, "--out", folder["samples"]])}
    for name, (script, flags) in stages.items():
        begin, peak = time.perf_counter(), ""
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        script.main(flags)
        if device == "cuda":
            gib = torch.cuda.max_memory_allocated() / 2**30
            assert 1 < gib < 75, name
            peak = f", peak {gib:.1f} GiB"
        print(f"\n{name}: {time.perf_counter() - begin:.1f} s{peak}")
    for name in ("vae", "sit"):
        assert len(losses(folder[name])) == 2 and np.isfinite(losses(folder[name])).all()
    grid = np.array(Image.open(f"{folder['samples']}/grid.png"))
    assert grid.std() > 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [2.0**8, 2.0**60])
def test_fp16_trains_with_a_scaler_and_skips_what_overflows(scale, device, pictures, tmp_path, monkeypatch):
    """The first scale fits: weights move. The second overflows: none moves, and it is halved each step."""
    stage1, _ = flags_of(SMALL, device, tmp_path)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, init_scale=scale))
    train_vae.main(["--data", pictures(32), *stage1, "--gan", "0", "--align", "0", "--dtype", "fp16",
                    "--steps", "2", "--save-every", "1", "--out", str(tmp_path)])
    rows = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    overflows = scale > 2**16
    assert [row["skipped_steps"] for row in rows if "skipped_steps" in row] == [overflows] * 2
    one, two = (torch.load(tmp_path / f"ckpt_000000{k}.pt", weights_only=True) for k in (1, 2))
    assert two["scalers"][0]["scale"] == (scale / 4 if overflows else scale)
    assert overflows == all(torch.equal(one["model"][key], value) for key, value in two["model"].items())


class NoReads(TorchDispatchMode):
    """Raises where the host reads a value by item(), float(), int(), bool(), torch.equal or nonzero: on a GPU
    it would wait for all kernels before. (What else waits, such as .cpu(), does nothing on a CPU.)"""
    READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default,
             torch.ops.aten.nonzero.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.READS:
            raise AssertionError(f"host reads a tensor: {func}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("script", [train_vae, train_sit], ids=["train_vae", "train_sit"])
def test_a_training_step_never_waits_for_the_device(script, device, pictures, tmp_path, monkeypatch):
    """Seen from the second step on. On CUDA torch itself watches; on a CPU see NoReads."""
    monkeypatch.setattr(vae, "check_range", lambda x: None)  # reads, but on a CPU only
    images, watched = pictures(32), []
    stage1, stage2 = flags_of(SMALL, device, tmp_path)
    if script is train_sit:
        train_vae.main(["--data", images, *stage1, "--steps", "1", "--out", str(tmp_path / "vae")])
        encode.main(["--data", images, "--vae", str(tmp_path / "vae"), "--image-size", "32", "--workers", "0",
                     "--device", device, "--out", str(tmp_path / "latents")])
    step = script.Run.train_step

    def watch(run, *args):
        if run.step == 0:
            return step(run, *args)
        watched.append(run.step)
        if device == "cpu":
            with NoReads():
                return step(run, *args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(run, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(script.Run, "train_step", watch)
    flags = (["--data", images, *stage1] if script is train_vae else
             ["--latents", str(tmp_path / "latents"), *stage2, "--repa"])
    script.main([*flags, "--steps", "3", "--out", str(tmp_path / "run")])
    assert watched == [1, 2]


def test_a_read_in_the_step_would_be_seen():
    with pytest.raises(AssertionError, match="host reads"), NoReads():
        float(torch.ones(()))
