"""CUDA against the CPU: the same networks, precisions, layouts and stages; and steps that never wait.

    ./test.sh tests/test_gpu.py          # on the CPU, small: 20 s
    ./test.sh tests/test_gpu.py -m gpu   # on a CUDA device

Each test runs on the CPU (but for the comparison of the two devices) and, marked `gpu`, on a CUDA device.
Weights are random, in files of the published layouts where a file is read; pictures are noise.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import log_of, narrow, trained  # noqa: F401  (fixtures)
from torch.utils._python_dispatch import TorchDispatchMode

import common
import data
import encode
import sample
import sit
import small
import train_sit
import train_vae
import vae
from losses import LPIPS, PatchDiscriminator, adaptive_gan_weight

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """float32 means float32 (common.setup allows TF32 on CUDA)."""
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


NETWORKS = ("vae", "sit", "mapper", "discriminator")


def network(name, device):
    """Return (module, inputs) on the device, the same numbers on every device."""
    torch.manual_seed(0)
    z, t, x = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.rand(2, 3, 64, 64) * 2 - 1
    module, inputs = {
        "vae": lambda: (small.small_vae(), (x[:, :, ::4, ::4], z)),
        "sit": lambda: (small.small_sit(hidden_size=96, qk_norm=True), (z, t, torch.tensor([1, 3]))),
        "mapper": lambda: (small.small_mapper(out_dim=96, projector_dim=64), (z, t, z.flip(0))),
        "discriminator": lambda: (PatchDiscriminator().eval(), (x,))}[name]()
    return module.to(device), [x.to(device) for x in inputs]


def with_gradients(module, inputs):
    """Return output and parameter gradients of the mean square of module(*inputs), on the CPU."""
    out = module(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    used = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out.float().square().mean(), used)
    return [x.detach().float().cpu() for x in (out, *grads)]


def relative_error(ours, wanted):
    """Largest distance of two lists of tensors, relative to the norm of the wanted ones' largest."""
    scale = max(float(w.norm()) for w in wanted[1:])
    errors = [float((f - w).norm()) / scale for f, w in zip(ours[1:], wanted[1:])]
    return max(float((ours[0] - wanted[0]).norm() / wanted[0].norm()), *errors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NETWORKS)
def test_device_bf16_autocast_and_channels_last_change_rounding_only(name, device):
    module, inputs = network(name, device)
    exact = with_gradients(module, inputs)
    if device == "cuda":
        assert relative_error(exact, with_gradients(*network(name, "cpu"))) < 1e-4
    with torch.autocast(device, torch.bfloat16):
        assert 1e-5 < relative_error(with_gradients(module, inputs), exact) < 0.05
    module.to(memory_format=torch.channels_last)
    assert name not in ("vae", "discriminator") or not all(p.is_contiguous() for p in module.parameters())
    inputs[0] = inputs[0].to(memory_format=torch.channels_last)
    assert relative_error(with_gradients(module, inputs), exact) < 1e-4


@pytest.fixture()
def compile_it(monkeypatch):
    """A function that compiles a module as the scripts do, and returns torch's counters.

    On a CPU the graphs run without inductor, whose C++ would take minutes to build."""
    def compile_it(module, device):
        if device == "cpu":
            monkeypatch.setattr(torch, "compile", lambda *given, real=torch.compile, **more:
                                real(*given, backend="aot_eager", **more))
        torch._dynamo.reset()
        common.compile_blocks("on", torch.device(device), module)
        torch._dynamo.config.suppress_errors = False
        torch._dynamo.utils.counters.clear()
        return torch._dynamo.utils.counters
    yield compile_it
    torch._dynamo.reset()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name, graphs", [("vae", 7), ("sit", 1), ("mapper", 1)])
def test_compiled_blocks_compute_the_same_and_share_their_graphs(name, graphs, device, compile_it):
    """As many graphs as there are blocks of other shapes; in bf16 as many again."""
    module, inputs = network(name, device)
    plain, counters = with_gradients(module, inputs), compile_it(module, device)
    for again in range(2):
        assert relative_error(with_gradients(module, inputs), plain) < 1e-4
        assert counters["stats"]["unique_graphs"] == graphs
    with torch.autocast(device, torch.bfloat16):
        assert relative_error(with_gradients(module, inputs), plain) < 0.05
    assert counters["stats"]["unique_graphs"] == 2 * graphs and not counters["graph_break"]


@pytest.mark.parametrize("device", DEVICES)
def test_the_adaptive_gan_weight_goes_through_a_compiled_lpips(device, compile_it):
    """After a step without it, as while the discriminator warms up."""
    torch.manual_seed(0)
    lpips, last = LPIPS("random").to(device), torch.nn.Conv2d(3, 3, 3, padding=1, device=device)
    x = torch.rand(2, 3, 32, 32, device=device) * 2 - 1

    def weight():
        x_hat = last(x)
        return adaptive_gan_weight(lpips(x, x_hat).mean(), x_hat.mean(), last.weight).item()
    plain, counters = weight(), compile_it(lpips, device)
    lpips(x, last(x)).mean().backward()
    assert weight() == pytest.approx(plain, rel=1e-3)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_of_the_vae_keeps_at_most_900_mib_an_image(device):
    """For the backward pass, at 256 px in bf16; the weights that autocast casts are kept once a step.

    The meta device computes nothing, but it has no autocast: on a CPU one real image passes."""
    network, kept = vae.VAE(vae.VAE_SIZES["f16d32"]), {}
    network.to(device, memory_format=torch.channels_last)
    shapes = {p.shape for p in network.parameters()}

    def pack(x):
        if x.shape not in shapes:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast(device, torch.bfloat16):
        out = network(torch.zeros(1, 3, 256, 256, device=device))
    assert 500 < sum(kept.values()) / 2**20 < 900 and out[0].requires_grad


# the scripts

SMALL = {"px": 32, "batch": 8, "vae": "--vae tiny --teacher shapes --lpips-weights random",
         "sit": "--model tiny/1 --teacher shapes --repa-block 2"}
# the paper's networks
FULL = {"px": 256, "batch": 32, "vae": "--vae f16d32 --teacher-weights random --lpips-weights random",
        "sit": "--model XL/1 --teacher-weights random"}


def flags_of(sizes, device):
    """The flags of (train_vae.py, train_sit.py)."""
    run = f"--device {device} --workers 0 --batch-size {sizes['batch']} --log-every 1"
    return (f"{sizes['vae']} --init none --image-size {sizes['px']} --bn-group 8 {run}",
            f"{sizes['sit']} --repa --sample-every 0 {run}")


@pytest.mark.parametrize("device, sizes", [("cpu", SMALL), pytest.param("cuda", FULL, marks=GPU)],
                         ids=["cpu-small", "cuda-full"])
def test_every_stage_takes_a_real_step(device, sizes, tmp_path):
    """VAE (two steps, all losses), latents, SiT with REPA (two steps), samples."""
    images, (stage1, stage3) = small.pictures(tmp_path / "train", 40, 2, sizes["px"]), flags_of(sizes, device)
    for script, name, flags in (
            (train_vae, "vae", f"--data {images} {stage1} --steps 2"),
            (encode, "latents", f"--data {images} --vae {tmp_path}/vae --workers 0 --device {device}"),
            (train_sit, "sit", f"--latents {tmp_path}/latents {stage3} --steps 2"),
            (sample, "samples", f"--ckpt {tmp_path}/sit --num 8 --steps 4 --cfg 1.5 --device {device}")):
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        script.main([*flags.split(), "--out", str(tmp_path / name)])
        if device == "cuda":
            assert 1 < torch.cuda.max_memory_allocated() / 2**30 < 75, name
    for name in ("vae", "sit"):
        losses = [row["loss"] for row in log_of(tmp_path / name)]
        assert len(losses) == 2 and np.isfinite(losses).all()
    assert np.array(Image.open(tmp_path / "samples" / "grid.png")).std() > 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [2.0**8, 2.0**60])
def test_fp16_trains_with_a_scaler_and_skips_what_overflows(scale, device):
    """The first scale fits: weights move. The second overflows: none moves, and it is halved each step."""
    flags = f"{flags_of(SMALL, device)[0]} --lpips 0 --gan 0 --align 0 --dtype fp16"
    args = train_vae.parse_args(flags.split())
    nets, overflows = train_vae.build(args, common.setup(device)), scale > 2**16
    nets.scaler.load_state_dict({**nets.scaler.state_dict(), "scale": scale})
    batch = {"images": torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), "rows": torch.arange(8)}
    before = {key: value.clone() for key, value in nets.send.state_dict().items()}
    for step in range(2):
        assert train_vae.train_step(nets, [batch], step, args, 2)[1] == overflows
    assert nets.scaler.get_scale() == (scale / 4 if overflows else scale)
    after = nets.send.state_dict()
    assert overflows == all(torch.equal(before[key], after[key]) for key in before)


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
def test_a_training_step_never_waits_for_the_device(script, device, trained, tmp_path, monkeypatch):
    """Seen from the second step on, with what Progress notes. On CUDA torch watches; on a CPU see NoReads."""
    monkeypatch.setattr(vae, "check_range", lambda x: None)  # these two read, but on a CPU only
    monkeypatch.setattr(sit.LabelEmbedder, "forward", lambda self, y: self.embedding_table(y))
    proc = common.setup(device)
    flags = f"{flags_of(SMALL, device)[script is train_sit]} --log-every 9 --out {tmp_path}"
    args, latents = script.parse_args(flags.split()), data.LatentFolder(trained.latents)
    nets = script.build(args, proc) if script is train_vae else script.build(args, latents, proc)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    batch = {**latents.batch(range(8)), "images": images, "rows": torch.arange(8)}
    if device == "cuda":  # as the loader's
        batch = {key: value.pin_memory() for key, value in batch.items()}
    progress = common.Progress(args, proc, 0, 4)  # the first step compiles; it is saved, and logged
    for step, _ in progress.steps(iter(int, 1), 1):
        watched = step in (2, 3)  # the last step is logged: it reads
        if watched and device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            with NoReads() if watched and device == "cpu" else torch.enable_grad():
                progress.record(*script.train_step(nets, [batch], step - 1, args, 4))
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        progress.must_save = False
    assert progress.step == 4
    assert [row["skipped_steps"] for row in log_of(tmp_path, "skipped_steps")] == [0, 0]


def test_a_read_in_the_step_would_be_seen():
    with pytest.raises(AssertionError, match="host reads"), NoReads():
        float(torch.ones(()))
