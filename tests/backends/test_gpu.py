"""What only a GPU can show: ``pytest -m gpu``. What the interpreter, the emulation and the compilers show is in
test_triton.py and test_cuda.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_calibration as calibration
import torch
from cases import (
    LAYOUTS,
    assert_accurate,
    assert_near_bins,
    assert_near_confidences,
    assert_same_bins,
    class_weights,
    id_of,
    labels,
    scores,
)

import calseg
from calseg import native
from calseg.backends import choice, cuda, rng
from calseg.operations import BinsSpec, Labels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(choice.TRITON_ERROR is not None, reason=str(choice.TRITON_ERROR)),
]

DEVICE = torch.device("cuda")
# name -> (the call, of which of x, mu and logvar)
OPERATIONS = {
    "cross_entropy": (
        lambda t, y, b, **o: calseg.vls_cross_entropy(t["x"], y, ignore_index=255, backend=b, **o), ("x",)),
    "weighted": (
        lambda t, y, b, **o: calseg.vls_cross_entropy(
            t["x"], y, class_weights(t["x"].shape[1], torch.float32).to(y.device, t["x"].dtype), ignore_index=255,
            label_smoothing=0.1, backend=b, **o), ("x",)),
    "soft_cross_entropy": (
        lambda t, y, b, **o: calseg.soft_cross_entropy(t["x"], t["mu"].abs(), backend=b, **o), ("x", "mu")),
    "vls_cross_entropy": (
        lambda t, y, b, **o: calseg.vls_cross_entropy(
            t["x"], y, mu=t["mu"], logvar=t["logvar"], alpha=0.6, num_samples=3, seed=5, ignore_index=255, backend=b,
            **o), ("x", "mu", "logvar")),
    "vls_elbo": (
        lambda t, y, b, **o: calseg.vls_elbo(
            t["mu"], t["logvar"], y, num_samples=3, seed=5, ignore_index=255, backend=b, **o), ("mu", "logvar")),
    "gaussian_kl": (
        lambda t, y, b, **o: calseg.gaussian_kl(t["mu"], t["logvar"], backend=b, **o), ("mu", "logvar")),
    "sample_soft_labels": (  # has no reduction
        lambda t, y, b, **_: calseg.sample_soft_labels(
            t["mu"], t["logvar"], y, num_samples=3, alpha=0.6, seed=5, ignore_index=255, backend=b), ("mu", "logvar")),
    "accumulate_soft_labels": (
        lambda t, y, b, **_: calseg.accumulate_soft_labels(
            [t["x"], t["mu"]], y, alpha=0.6, ignore_index=255, backend=b), ("x", "mu")),
    "dice": (  # has no reduction, as the next two
        lambda t, y, b, **_: calseg.vls_dice_cross_entropy(
            t["x"], y, include_background=True, ignore_index=255, backend=b), ("x",)),
    "dice_of_soft_labels": (
        lambda t, y, b, **_: calseg.vls_dice_cross_entropy(
            t["x"], y, soft_labels=t["mu"].softmax(1), include_background=True, ignore_index=255, backend=b),
        ("x", "mu")),
    "dice_of_samples": (
        lambda t, y, b, **_: calseg.vls_dice_cross_entropy(
            t["x"], y, mu=t["mu"], logvar=t["logvar"], alpha=0.6, num_samples=3, seed=5, include_background=True,
            ignore_index=255, backend=b), ("x", "mu", "logvar")),
}  # fmt: skip
SAMPLED = ("vls_cross_entropy", "vls_elbo", "sample_soft_labels")
# An NVIDIA GPU's normals are off by up to 5e-6, 84 units of 2^-24. A loss has a slope of up to about 10 there.
ULPS = {name: 1024 if name in SAMPLED else 64 for name in OPERATIONS}
# The gradient of |p - Y| jumps where p = Y, and rounding may move soft labels across p.
CONTINUOUS = [name for name in OPERATIONS if not name.startswith("dice_of")]


def inputs(names, shape, dtype=torch.float32, device=DEVICE):
    seeds = {"x": 0, "mu": 1, "logvar": 2}
    tensors = {name: scores(*shape, dtype=dtype, seed=seeds[name]).to(device) for name in names}
    return tensors, labels(shape, ignore_index=255, dtype=torch.uint8).to(device)


def value_and_gradients(function, tensors, target, backend, **options):
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    value = function(leaves, target, backend, **options)
    weights = 1.0 if value.dim() == 0 else (torch.arange(value.numel(), device=value.device) % 7 - 2.5).view_as(value)
    (value * weights).sum().backward()
    return value.detach(), {name: leaf.grad for name, leaf in leaves.items()}


# ---- numbers ----


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=id_of)
@pytest.mark.parametrize("C", [1, 2, 3, 4, 14, 33, 117])
def test_values_and_gradients(name, dtype, C):
    """Values and gradients equal those of the reference in float64 on the CPU."""
    function, names = OPERATIONS[name]
    for space in ((16, 16, 16), (13, 11, 7)):
        tensors, target = inputs(names, (2, C, *space), dtype)
        wide = {k: t.double().cpu() for k, t in tensors.items()}
        for reduction in ("none", "mean"):
            value, gradients = value_and_gradients(function, tensors, target, None, reduction=reduction)
            truth, wanted = value_and_gradients(function, wide, target.cpu(), "reference", reduction=reduction)
            ulps = ULPS[name]
            assert_accurate(value.cpu(), truth, ulps=ulps, scale=2.0, what=reduction)
            for k, gradient in gradients.items():
                scale = 2.0 if value.dim() else 2.0 / target.numel()
                assert_accurate(gradient.cpu(), wanted[k], ulps=ulps, scale=scale, what=f"gradient of {k}, {reduction}")


@pytest.mark.parametrize("layout", ["channels_last", "transposed_space", "odd_offset", "every_second"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_layouts(name, layout):
    function, names = OPERATIONS[name]
    tensors, target = inputs(names, (2, 5, 12, 10))
    plain = value_and_gradients(function, tensors, target, "triton")
    other = {k: LAYOUTS[layout](t) for k, t in tensors.items()}
    value, gradients = value_and_gradients(function, other, target, "triton")
    assert_accurate(value, plain[0], ulps=8)
    for k, gradient in gradients.items():
        assert_accurate(gradient, plain[1][k], ulps=16, what=k)


@pytest.mark.parametrize("name", OPERATIONS)
def test_deterministic(name):
    """Every run gives the same bits, because no sum depends on the order in which programs end."""
    function, names = OPERATIONS[name]
    tensors, target = inputs(names, (2, 14, 64, 64, 33))
    value, gradients = value_and_gradients(function, tensors, target, "triton")
    for _ in range(5):
        again, more = value_and_gradients(function, tensors, target, "triton")
        assert torch.equal(value, again)
        assert all(torch.equal(gradients[k], more[k]) for k in names)


@pytest.mark.parametrize("name", ["cross_entropy", "vls_cross_entropy", "vls_elbo"])
def test_gradcheck_in_float64(name):
    """The reference computes float64 on the GPU."""
    function, names = OPERATIONS[name]
    tensors, target = inputs(names, (1, 3, 5), torch.float64)
    leaves = [tensors[k].requires_grad_() for k in names]
    assert torch.autograd.gradcheck(lambda *t: function(dict(zip(names, t, strict=True)), target, None), leaves)


HAS_CUDA = native.extension is not None and bool(native.extension.CUDA_ARCHITECTURES)
ENGINES = ["triton", "cuda"] if HAS_CUDA else ["triton"]
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="built without CUDA")
every_engine = pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=needs_cuda)])


@needs_cuda
@pytest.mark.parametrize("name", ["cross_entropy", "weighted"])
@pytest.mark.parametrize("dtype", cuda.LOSS_DTYPES, ids=id_of)
@pytest.mark.parametrize("C", [3, 12, 14, 33, 117])
def test_rows(name, dtype, C, monkeypatch):
    """The CUDA kernel takes channels-last logits, eagerly and as a graph, and gives the values of the reference."""
    function, names = OPERATIONS[name]
    tensors, target = inputs(names, (1, C, 35, 34, 33), dtype)
    tensors = {"x": LAYOUTS["channels_last"](tensors["x"])}
    wide = {"x": tensors["x"].double().cpu()}
    launches, launch = [], cuda.cross_entropy
    monkeypatch.setattr(cuda, "cross_entropy", lambda *given: (launches.append(given), launch(*given)))
    for reduction in ("none", "mean"):
        value, gradients = value_and_gradients(function, tensors, target, None, reduction=reduction)
        truth, wanted = value_and_gradients(function, wide, target.cpu(), "reference", reduction=reduction)
        assert_accurate(value.cpu(), truth, ulps=64, scale=2.0, what=reduction)
        scale = 2.0 if value.dim() else 2.0 / target.numel()
        assert_accurate(gradients["x"].cpu(), wanted["x"], ulps=64, scale=scale, what=f"gradient, {reduction}")
    assert len(launches) >= 3
    if name == "weighted":  # copies the weights from the CPU, which a graph cannot
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(tensors, target, None)
    graph.replay()
    assert torch.equal(captured, value)


@needs_cuda
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", cuda.LOSS_DTYPES, ids=id_of)
@pytest.mark.parametrize("C", cuda.FEW_CLASSES)
@pytest.mark.parametrize("name", ["cross_entropy", "dice"])
def test_few_classes(name, C, dtype, layout, monkeypatch):
    """The CUDA kernels take large logits, eagerly and as a graph, and give the values of the reference."""
    function, names = OPERATIONS[name]
    tensors, target = inputs(names, (1, C, 129, 128, 128), dtype)
    tensors = {"x": LAYOUTS[layout](tensors["x"])}
    wide = {"x": tensors["x"].double().cpu()}
    launches, launch = [], cuda.cross_entropy
    monkeypatch.setattr(cuda, "cross_entropy", lambda *given: (launches.append(given), launch(*given)))
    value, gradients = value_and_gradients(function, tensors, target, None, reduction="mean")
    truth, wanted = value_and_gradients(function, wide, target.cpu(), "reference", reduction="mean")
    assert_accurate(value.cpu(), truth, ulps=64, scale=2.0)
    assert_accurate(gradients["x"].cpu(), wanted["x"], ulps=64, scale=2.0 / target.numel(), what="gradient")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(tensors, target, None)
    graph.replay()
    assert torch.equal(captured, value)
    assert len(launches) >= 2


@every_engine
@pytest.mark.parametrize("class_wise", [False, True])
@pytest.mark.parametrize("n_bins", [15, 200, 4096])
@pytest.mark.parametrize("C", [2, 4, 14, 117])
def test_calibration_bins(backend, C, n_bins, class_wise):
    """Probabilities give the integers of the reference, except in NLL and Brier, and the same in every run."""
    p = torch.softmax(scores(2, C, 32, 32, 17, dtype=torch.float32), 1)
    target = labels(p.shape, ignore_index=255, dtype=torch.uint8)
    options = {"n_bins": n_bins, "class_wise": class_wise, "from_logits": False, "ignore_index": 255}
    got = calseg.calibration_bins(p.cuda(), target.cuda(), backend=backend, **options)
    wanted = calseg.calibration_bins(p, target, backend="reference", **options)
    assert_same_bins(got, wanted, units=8)
    again = calseg.calibration_bins(p.cuda(), target.cuda(), backend=backend, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@every_engine
@calibration.every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=id_of)
def test_calibration_bins_of_logits(backend, dtype, kind):
    """Every layout gives the same counts, near those of the reference, and NaN and bad labels are reported.

    The order in which Triton adds up the classes of a voxel depends on the layout, so confidences may round otherwise.
    """
    for C in (2, 3, 5, 17, 33):
        x, target = scores(2, C, 16, 15, dtype=dtype), labels((2, C, 16, 15), ignore_index=-100)
        call = lambda x, y: calseg.calibration_bins(x, y, backend=backend, **kind)  # noqa: E731
        plain = call(x.cuda(), target.cuda())
        truth = calseg.calibration_bins(x.double(), target, backend="reference", **kind)
        assert_near_bins(plain, truth, units=8)
        for layout in ("channels_last", "every_second", "odd_offset", "sliced_channels_last"):
            other = call(LAYOUTS[layout](x.cuda()), target.cuda())
            if backend == "cuda":  # a thread adds up the classes of its voxel in their order
                assert_same_bins(other, plain)
            else:
                assert_near_bins(other, plain, units=8)
                assert_near_confidences(other, plain, C)
    x[1, 0, 2, 3] = torch.nan
    assert int(call(x.cuda(), torch.zeros_like(target).cuda() + 1).num_nan) == 1
    target[1, 7, 8] = 99
    with pytest.raises(IndexError, match=r"target\[1, 7, 8\] is 99"):
        call(x.cuda(), target.cuda())


# ---- streams, graphs, devices, the compiler ----


@needs_cuda
def test_calibration_bins_in_a_graph():
    """The launch can be captured, and each replay adds the same integers."""
    x, y = scores(2, 4, 64, 64, dtype=torch.float32).cuda(), labels((2, 4, 64, 64), dtype=torch.uint8).cuda()
    results = torch.zeros(2 + 6 + 15 * 3, dtype=torch.int64, device=DEVICE)
    spec = BinsSpec(Labels(y, -100), None, 15, 0, True, False, False, False, False, 0.001)
    parts = results[8:], results[2:8], results[:2]

    def launch():
        stream = torch.cuda.current_stream().cuda_stream
        native.extension.cuda_calibration_bins(x, spec, *parts, 0, stream)

    launch()  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    results.zero_()
    for _ in range(3):
        graph.replay()
    wanted = calseg.calibration_bins(x, y, backend="cuda")
    sums = torch.stack([wanted.count, wanted.confidence, wanted.hits], 1)
    assert torch.equal(results[8:].view(15, 3).cpu(), 3 * sums)


def test_a_captured_graph_draws_fresh_noise():
    """A CUDA graph of forward and backward reads the seed tensor at every replay."""
    tensors, target = inputs(("x", "mu", "logvar"), (1, 4, 32, 32, 32))
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    seed = torch.tensor(1, device=DEVICE)

    def step(seed):
        loss = calseg.vls_cross_entropy(
            leaves["x"], target, mu=leaves["mu"], logvar=leaves["logvar"], alpha=0.5, num_samples=4, seed=seed,
            ignore_index=255, backend="triton",
        )  # fmt: skip
        return loss.detach(), torch.autograd.grad(loss, list(leaves.values()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(seed)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, gradients = step(seed)
    seen = set()
    for number in (1, 2, 3, 2**40 + 5):
        seed.fill_(number)
        graph.replay()
        loss, wanted = step(number)
        assert torch.equal(captured, loss)
        assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
        seen.add(float(captured))
    assert len(seen) == 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_captured_graph_without_a_seed_draws_fresh_noise(reduction, monkeypatch):
    """Each replay draws another seed, and its forward and backward pass use that one."""
    tensors, target = inputs(("x", "mu", "logvar"), (1, 4, 32, 32, 32))
    leaves, seeds, draw = {k: t.requires_grad_() for k, t in tensors.items()}, [], rng.draw_seed
    monkeypatch.setattr(rng, "draw_seed", lambda device: seeds.append(draw(device)) or seeds[-1])

    def step(seed):
        loss = calseg.vls_cross_entropy(
            leaves["x"], target, mu=leaves["mu"], logvar=leaves["logvar"], alpha=0.5, num_samples=4, seed=seed,
            ignore_index=255, reduction=reduction,
        )  # fmt: skip
        return loss.detach(), torch.autograd.grad(loss.sum(), list(leaves.values()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(torch.tensor(1, device=DEVICE))  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, gradients = step(None)
    (seed,) = seeds
    seen = set()
    for _ in range(4):
        graph.replay()
        loss, wanted = step(int(seed))
        assert torch.equal(captured, loss)
        assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
        seen.add(int(seed))
    assert len(seen) == 4


def test_compiled_graphs_draw_fresh_noise():
    """``mode="reduce-overhead"`` captures the whole step, and no two calls have the same noise."""
    tensors, target = inputs(("mu", "logvar"), (1, 4, 32, 32))
    counters = torch._dynamo.utils.counters["inductor"]
    before = counters["cudagraph_skips"]
    quick = torch.compile(
        lambda mu, logvar: calseg.vls_elbo(mu, logvar, target, ignore_index=255), mode="reduce-overhead", fullgraph=True
    )
    values = set()
    for _ in range(6):
        leaves = [tensors[name].clone().requires_grad_() for name in ("mu", "logvar")]
        loss = quick(*leaves)
        loss.backward()
        values.add(float(loss))
    assert len(values) == 6
    assert counters["cudagraph_skips"] == before


def test_streams():
    """Calls on several streams at once give the results of single calls."""
    function, names = OPERATIONS["vls_cross_entropy"]
    problems = [inputs(names, (1, 4, 48, 48, 40 + n)) for n in range(4)]
    wanted = [value_and_gradients(function, *problem, "triton") for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(3):
        got = []
        for stream, problem in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                got.append(value_and_gradients(function, *problem, "triton"))
        torch.cuda.synchronize()
        for (value, gradients), (truth, theirs) in zip(got, wanted, strict=True):
            assert torch.equal(value, truth)
            assert all(torch.equal(gradients[k], theirs[k]) for k in names)


def test_a_graph_of_few_programs_runs_beside_eager_calls():
    """A captured mean, which counts its own programs, gives the bits of eager code while other streams compute it."""
    function, names = OPERATIONS["cross_entropy"]
    tensors, target = inputs(names, (1, 4, 48, 48, 40))
    leaf, target = tensors["x"].requires_grad_(), target.long()

    def step():
        loss = function({"x": leaf}, target, "triton")
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    loss, gradient = step()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, captured_gradient = step()
    for _ in range(20):
        captured.zero_(), captured_gradient.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(aside):
            graph.replay()
        other = function({"x": tensors["x"].detach()}, target, "triton")
        torch.cuda.synchronize()
        assert torch.equal(other, loss)
        assert torch.equal(captured, loss)
        assert torch.equal(captured_gradient, gradient)


@pytest.mark.parametrize("ignored", [False, True])
def test_few_programs_and_many(ignored, monkeypatch):
    """The one launch of few programs gives what the launches of many give, at every number of programs."""
    from calseg.backends import triton as engine

    few = engine.FEW_PROGRAMS
    for voxels in (1, 1000, 1024 * 100 + 1, 1024 * few, 1024 * few + 1):
        x = torch.randn(1, 4, voxels, device=DEVICE)
        target = torch.randint(0, 4, (1, voxels), device=DEVICE)
        if ignored:
            target[:, ::3] = -100
        results = []
        for most in (few, 0):
            monkeypatch.setattr(engine, "FEW_PROGRAMS", most)
            leaf = x.clone().requires_grad_()
            loss = calseg.vls_cross_entropy(leaf, target, backend="triton")
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        assert_accurate(results[0][0], results[1][0].double(), ulps=16)
        assert_accurate(results[0][1], results[1][1].double(), ulps=16)


# ---- mixed precision ----


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("sample_soft_labels",
                                                                            "accumulate_soft_labels")])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=id_of)
def test_autocast(name, dtype):
    """Under autocast a loss is float32, as F.cross_entropy's is, and its gradients have the dtype of the tensors."""
    function, names = OPERATIONS[name]
    tensors, target = inputs(names, (1, 4, 16, 16), dtype)
    with torch.autocast("cuda", dtype):
        stock = torch.nn.functional.cross_entropy(scores(2, 3, dtype=dtype).cuda(), torch.tensor([0, 1]).cuda())
        value, gradients = value_and_gradients(function, tensors, target, None)
    assert value.dtype == stock.dtype == torch.float32
    assert {gradient.dtype for gradient in gradients.values()} == {dtype}
    wide = {k: t.double().cpu() for k, t in tensors.items()}
    truth, _ = value_and_gradients(function, wide, target.cpu(), "reference")
    torch.testing.assert_close(value.double().cpu(), truth, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=id_of)
def test_training_with_a_gradient_scaler(dtype):
    """Three steps under autocast and GradScaler move a net as F.cross_entropy moves it. No step is skipped."""
    x, target = torch.randn(2, 8, 24, 24, device=DEVICE), torch.randint(0, 4, (2, 24, 24), device=DEVICE)
    target[0, :5] = -100
    ends = []
    for loss_of in (calseg.vls_cross_entropy, torch.nn.functional.cross_entropy):
        torch.manual_seed(1)
        net = torch.nn.Conv2d(8, 4, 3, padding=1).to(DEVICE)
        optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cuda", init_scale=2.0**12)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype):
                loss = loss_of(net(x), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**12
        ends.append([p.detach() for p in net.parameters()])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["cross_entropy", "vls_cross_entropy", "dice"])
def test_compiled_with_graphs(name):
    """``mode="reduce-overhead"`` gives the values and gradients of eager code, in every call."""
    function, names = OPERATIONS[name]
    tensors, target = inputs(names, (1, 4, 32, 32))
    wanted, gradients = value_and_gradients(function, tensors, target, None)
    before = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    quick = torch.compile(lambda t, y, b: function(t, y, b), fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        value, got = value_and_gradients(quick, tensors, target, None)
        assert_accurate(value.clone(), wanted, ulps=16)
        for k in names:
            assert_accurate(got[k].clone(), gradients[k], ulps=16, what=k)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == before


@every_engine
def test_calibration_bins_on_a_stream(backend):
    """A call waits for earlier work on its stream."""
    x, y = scores(2, 4, 64, 64, dtype=torch.float32).cuda(), labels((2, 4, 64, 64)).cuda()
    wanted = calseg.calibration_bins(x, y, backend=backend)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**8)
        late.copy_(x)
        got = calseg.calibration_bins(late, y, backend=backend)
    assert_same_bins(got, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device_than_the_current_one():
    function, names = OPERATIONS["vls_cross_entropy"]
    tensors, target = inputs(names, (1, 4, 40, 40))
    wanted = value_and_gradients(function, tensors, target, "triton")[0]
    moved = {k: t.to("cuda:1") for k, t in tensors.items()}
    assert torch.equal(value_and_gradients(function, moved, target.to("cuda:1"), "triton")[0].to(DEVICE), wanted)
    bins = [calseg.calibration_bins(t["x"], target.to(t["x"].device)) for t in (tensors, moved)]
    assert all(map(torch.equal, *bins))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("name", ["cross_entropy", "vls_cross_entropy", "vls_elbo"])
def test_compiled(name):
    function, names = OPERATIONS[name]
    tensors, target = inputs(names, (1, 4, 32, 32))
    wanted, gradients = value_and_gradients(function, tensors, target, None)
    quick = torch.compile(lambda t, y, b: function(t, y, b), fullgraph=True)
    value, got = value_and_gradients(quick, tensors, target, None)
    assert_accurate(value, wanted, ulps=8)
    for k in names:
        assert_accurate(got[k], gradients[k], ulps=8, what=k)


@pytest.mark.parametrize("name", ["vls_cross_entropy", "dice", "dice_of_soft_labels", "dice_of_samples"])
def test_nothing_waits_for_the_gpu(name):
    function, names = OPERATIONS[name]
    tensors, target = inputs(names, (1, 4, 32, 32))
    value_and_gradients(function, tensors, target, "triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradients(function, tensors, target, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- labels out of range, size ----


def test_a_label_out_of_range_makes_the_loss_nan():
    x, target = scores(1, 3, 100, dtype=torch.float32).cuda(), torch.zeros(1, 100, dtype=torch.uint8, device=DEVICE)
    target[0, 7] = 9
    loss = calseg.vls_cross_entropy(x, target, reduction="none")
    assert loss.isnan().nonzero().tolist() == [[0, 7]]


def test_the_debug_switch_raises():
    code = (
        "import torch, calseg\n"
        "y = torch.zeros(1, 100, dtype=torch.uint8, device='cuda'); y[0, 7] = 9\n"
        "try: calseg.vls_cross_entropy(torch.zeros(1, 3, 100, device='cuda'), y)\n"
        "except IndexError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import os; os.environ['CALSEG_CHECK_LABELS'] = '1'\n" + code], capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "target[0, 7] is 9: wanted a class in [0, 3)" in done.stdout


@pytest.mark.timeout(600)
def test_more_than_two_to_the_31_elements():
    """The last voxels of more than 2^31 elements have the loss and gradient that they have alone."""
    C, size = 4, 2**29 + 2**20 + 3
    needed = 5 * C * size
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    x = torch.zeros(1, C, size, dtype=torch.bfloat16, device=DEVICE)
    tail = scores(1, C, 5000, dtype=torch.bfloat16).cuda()
    x[..., -5000:] = tail
    x.requires_grad_()
    target = torch.ones(1, size, dtype=torch.uint8, device=DEVICE)
    loss = calseg.vls_cross_entropy(x, target, reduction="sum")
    loss.backward()
    alone = tail.float().requires_grad_()
    of_tail = calseg.vls_cross_entropy(alone, target[:, -5000:], reduction="sum")
    of_tail.backward()
    wanted = float(of_tail.detach()) + (size - 5000) * torch.log(torch.tensor(float(C), dtype=torch.float64))
    assert abs(float(loss.detach()) / float(wanted) - 1) < 1e-2  # bfloat16
    assert_accurate(x.grad[..., -5000:], alone.grad, ulps=8)
    assert torch.equal(x.grad[0, :, 0].float(), torch.tensor([0.25, -0.75, 0.25, 0.25], device=DEVICE))


@pytest.mark.timeout(600)
@every_engine
def test_calibration_bins_past_two_to_the_31_elements(backend):
    """Every sum is the exact multiple of that of one voxel. The few other voxels are at the end."""
    size = 2**30 + 2**16
    if torch.cuda.mem_get_info()[0] < 6 * size:
        pytest.skip(f"needs {6 * size / 2**30:.0f} GiB of GPU memory")
    x = torch.empty(1, 2, size, dtype=torch.bfloat16, device=DEVICE)
    x[0, 0], x[0, 1] = 0.0, 1.0
    target = torch.ones(1, size, dtype=torch.uint8, device=DEVICE)
    x[0, 0, -5:], x[0, 1, -5:], target[:, -5:] = 3.0, 0.0, 0
    for class_wise in (False, True):
        bins, often, rarely = (
            calseg.calibration_bins(x[..., part], target[:, part], class_wise=class_wise, backend=backend)
            for part in (slice(None), slice(1), slice(size - 1, None))
        )
        for got, one, other in zip(bins, often, rarely, strict=True):
            assert torch.equal(got, one * (size - 5) + other * 5)


@pytest.mark.timeout(600)
def test_noise_past_two_to_the_32_voxels():
    """Voxels beyond 2^32 use the second word of the counter. Only voxels around 2^32 and at the end count."""
    size = 2**32 + 3001
    if torch.cuda.mem_get_info()[0] < 2 * size:
        pytest.skip(f"needs {2 * size / 2**30:.0f} GiB of GPU memory")
    mu, logvar = (torch.tensor(v, device=DEVICE).view(1, 2, 1).expand(1, 2, size) for v in ((0.3, -0.2), (0.5, 0.1)))
    target = torch.full((1, size), 255, dtype=torch.uint8, device=DEVICE)
    spots = [slice(2**32 - 700, 2**32 + 800), slice(size - 300, size)]
    wanted = 0.0
    for spot in spots:
        target[:, spot] = 1
        for k in range(3):
            eps = rng.standard_normal(
                99, spot.stop - spot.start, 2, k, first_voxel=spot.start, device=torch.device("cpu")
            )
            nu = torch.tensor([[0.3], [-0.2]]).double() + (torch.tensor([[0.5], [0.1]]).double() / 2).exp() * eps
            wanted -= float(torch.log_softmax(nu, 0)[1].sum()) / 3
    got = calseg.vls_elbo(mu, logvar, target, ignore_index=255, num_samples=3, beta=0.0, seed=99, reduction="sum")
    assert abs(float(got) / wanted - 1) < 1e-5


# ---- compute-sanitizer ----


@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer on PATH")
@pytest.mark.parametrize(
    ("tool", "summary"),
    [
        ("memcheck", "ERROR SUMMARY: 0 errors"),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"),
    ],
)
def test_compute_sanitizer(tool, summary):
    """compute-sanitizer finds no error. Failing probes of the driver by PyTorch and Triton do not count."""
    script = Path(__file__).with_name("every_kernel.py")
    done = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no",
         "--target-processes", "application-only", sys.executable, str(script)],
        # Every tensor an allocation of its own: a step past its end is seen.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "every kernel ran" in done.stdout
    assert summary in done.stdout, done.stdout[-4000:]
