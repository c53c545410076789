"""Tests of the native engine in a process: threads, forks, instruction sets, pooled memory, and a missing extension."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import FLOATS, labels, scores
from internals import empty_like, native, needs_native

import calseg

pytestmark = [needs_native, pytest.mark.timeout(180)]
MIB = 2**20


def results(shape=(2, 5, 31, 67), dtype=torch.float32):
    """Return the results and gradients of every operation on data of several chunks, as a list of tensors."""
    x, mu, logvar = (scores(*shape, dtype=dtype, seed=k).requires_grad_() for k in range(3))
    target = labels(shape, ignore_index=-100)
    soft = mu.detach().abs()  # no torch.softmax: it depends on the number of threads, and hangs in a forked child
    values = [
        calseg.vls_cross_entropy(x, target, label_smoothing=0.1),
        calseg.vls_cross_entropy(x, target, reduction="none"),
        calseg.soft_cross_entropy(x, soft, reduction="sum"),
        calseg.vls_cross_entropy(x, target, mu=mu, logvar=logvar, seed=1, num_samples=2),
        calseg.vls_cross_entropy(x, target, mu=mu, logvar=logvar, seed=1, num_samples=2, reduction="none"),
        calseg.vls_elbo(mu, logvar, target, seed=1),
        calseg.gaussian_kl(mu, logvar),
        calseg.sample_soft_labels(mu, logvar, target, seed=1),
        calseg.accumulate_soft_labels((x, mu), target),
        calseg.ace_loss(x, target),
        calseg.ace_loss(x, target, binning="soft", reduction="none"),
    ]
    out = list(values)
    for value in values:
        upstream = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape) + 0.5
        gradients = torch.autograd.grad(value, (x, mu, logvar), upstream, allow_unused=True)
        out += [g for g in gradients if g is not None]
    return [t.detach() for t in out]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_results_are_where_the_inputs_are(set_threads):
    """Results are on the device of the inputs, whatever ``torch.set_default_device`` is."""
    set_threads(2)
    x, target = scores(2, 4, 8, 9), labels((2, 4, 8, 9))
    maps = lambda: (x, x * 2)  # noqa: E731
    calls = {
        "bins": lambda: calseg.calibration_bins(x, target).count,
        "ece": lambda: calseg.calibration_error(x, target),
        "adaptive": lambda: calseg.calibration_error_from_bins(calseg.calibration_bins(x, target), equal_mass=3),
        "soft labels": lambda: calseg.sample_soft_labels(x, x, target, seed=1),
        "accumulated": lambda: calseg.accumulate_soft_labels(maps(), target),
        "accumulated by the reference": lambda: calseg.accumulate_soft_labels(maps(), target, backend="reference"),
        "bins by the reference": lambda: calseg.calibration_bins(x, target, backend="reference").count,
    }
    wanted = {name: call() for name, call in calls.items()}
    with torch.device("meta"):
        got = {name: call() for name, call in calls.items()}
        drawn = calseg.sample_soft_labels(x, x)
    assert drawn.isfinite().all()
    for name, value in got.items():
        assert torch.equal(value, wanted[name]), name
    leaf = x.float().requires_grad_()
    losses = [lambda: calseg.vls_cross_entropy(leaf, target), lambda: calseg.ace_loss(leaf, target, binning="soft"),
              lambda: calseg.vls_cross_entropy(leaf, target, mu=leaf, logvar=leaf, seed=1, backend="cpu")]  # fmt: skip
    for loss in losses:
        value, gradient = loss().detach(), torch.autograd.grad(loss(), leaf)[0]
        with torch.device("meta"):
            again = loss()
            assert torch.equal(again.detach(), value)
            assert torch.equal(torch.autograd.grad(again, leaf)[0], gradient)


# ---- threads ----


def test_bit_for_bit_from_run_to_run(set_threads):
    set_threads(3)
    wanted = results()
    assert all(same(results(), wanted) for _ in range(5))


def test_calls_from_several_python_threads():
    """Six Python threads may call the engine at once, and get the results of calls one after another."""
    shapes = [(1, 3 + i % 4, 40 + i, 50) for i in range(6)]
    wanted = [results(shape) for shape in shapes]
    start = threading.Barrier(6)

    def work(index):
        start.wait()
        return all(same(results(shapes[index]), wanted[index]) for _ in range(3))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


def test_the_interpreter_runs_while_the_engine_does(set_threads):
    """The GIL is released, so that another Python thread runs, where the machine has a core for it."""
    set_threads(1)
    x, target = scores(1, 8, 256, 256, dtype=torch.float32), labels((1, 8, 256, 256))
    mu = torch.zeros_like(x)
    counted, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            counted[0] += 1

    counter = threading.Thread(target=count)
    before, longest = sys.getswitchinterval(), 0
    sys.setswitchinterval(1e-4)
    counter.start()
    try:
        for _ in range(20):  # in a call that holds the GIL, the thread cannot count at all
            start = counted[0]
            calseg.vls_cross_entropy(x, target, mu=mu, logvar=mu, num_samples=32, seed=0)
            longest = max(longest, counted[0] - start)
            if longest > 1000:
                break
    finally:
        stop.set()
        counter.join()
        sys.setswitchinterval(before)
    assert longest > 1000


# ---- forks ----


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_runs_and_agrees(set_threads):
    """A forked child does not wait for the threads of the OpenMP runtime, which only the parent has."""
    set_threads(2)
    wanted = [t.sum().item() for t in results()]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if [t.sum().item() for t in results()] == wanted else 3
        finally:
            os._exit(code)
    assert _exit_code(child) == 0
    assert [t.sum().item() for t in results()] == wanted  # and the parent goes on


def _exit_code(pid: int, seconds: float = 60) -> int | None:
    """Return the exit status of a child. If it takes too long, end the child and return None."""
    done = threading.Event()
    timer = threading.Timer(seconds, lambda: done.is_set() or os.kill(pid, 9))
    timer.start()
    _, status = os.waitpid(pid, 0)
    done.set()
    timer.cancel()
    return os.waitstatus_to_exitcode(status)


def _put_results(queue):
    queue.put([float(t.double().sum()) for t in results()])


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_multiprocessing(method, set_threads):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip("not on this platform")
    set_threads(2)
    wanted = [float(t.double().sum()) for t in results()]
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    child = context.Process(target=_put_results, args=(queue,))
    child.start()
    child.join(90)
    alive = child.is_alive()
    if alive:
        child.kill()
        child.join()
    assert not alive
    assert child.exitcode == 0
    assert queue.get() == wanted


class SoftLabelDataset(torch.utils.data.Dataset):
    """Data set that computes soft labels in the worker."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        mu = scores(1, 3, 40, 40, dtype=torch.float32, seed=index)
        return calseg.sample_soft_labels(mu, torch.zeros_like(mu), seed=index)[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_dataloader_workers(set_threads):
    set_threads(2)
    results()
    dataset = SoftLabelDataset()
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for step, batch in enumerate(loader):
        assert torch.equal(batch, torch.stack([dataset[2 * step], dataset[2 * step + 1]]))


# ---- instruction sets and info ----


def test_instruction_sets():
    names = native.available_isas()
    assert names[-1] == "baseline"
    before = native.isa()
    for name in names:
        native.set_isa(name)
        assert calseg.info()["isa"] == name
    native.set_isa(before)
    with pytest.raises(ValueError, match=r"'sse17' is not available here: wanted one of .*baseline"):
        native.set_isa("sse17")
    assert native.isa() == before


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_instruction_set_from_the_environment():
    done = run_python("import calseg; print(calseg.info()['isa'])", CALSEG_ISA="baseline")
    assert done.stdout.strip() == "baseline"
    done = run_python("import calseg; calseg.info", CALSEG_ISA="sse17")
    assert "instruction set 'sse17' is not available here" in done.stdout + done.stderr


def test_info_is_flat_json():
    info = calseg.info()
    assert json.loads(json.dumps(info)) == info
    assert info["backends"][:2] == ["reference", "cpu"]
    triton_runs = info["triton_error"] is None and (torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ)
    assert ("triton" in info["backends"]) == triton_runs
    assert (info["triton"] is None) == (info["triton_error"] is not None)
    assert info["isa"] in info["available_isas"]
    assert info["native_error"] is None
    assert info["threading_layer"] in ("openmp", "threads")
    assert info["num_threads"] == torch.get_num_threads()
    assert info["torch"] == torch.__version__


def test_without_the_extension():
    """Without the extension, there is one warning, the reference is used, and backend='cpu' raises a clear error."""
    code = """if True:
        import sys, warnings
        sys.modules["calseg._native"] = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import calseg, torch
            calseg.vls_cross_entropy  # a first name: `import calseg` alone loads nothing
        (warning,) = [w for w in caught if "calseg" in str(w.message)]
        assert warning.category is RuntimeWarning and "\\n" not in str(warning.message), warning
        assert "reference" in str(warning.message)
        x = torch.randn(2, 3, 5, requires_grad=True)
        y = torch.randint(0, 3, (2, 5))
        loss = calseg.vls_cross_entropy(x, y, mu=x.detach(), logvar=x.detach(), seed=0)
        loss.backward()
        assert x.grad.isfinite().all() and x.grad.count_nonzero() == x.numel()
        assert torch.equal(calseg.vls_cross_entropy(x, y), calseg.vls_cross_entropy(x, y, backend="reference"))
        assert calseg.sample_soft_labels(x, x, seed=0).sum() > 9
        calseg.empty_cache()
        info = calseg.info()
        assert "cpu" not in info["backends"] and info["native_error"] and info["isa"] is None
        try:
            calseg.vls_cross_entropy(x, y, backend="cpu")
        except RuntimeError as error:
            assert "backend='cpu': the native engine is not available" in str(error)
            print("done")
    """
    done = run_python(code)
    assert done.stdout.strip() == "done", done.stdout + done.stderr


# ---- kept memory ----


@pytest.fixture
def empty_pool():
    calseg.empty_cache()
    yield
    calseg.empty_cache()


def held() -> int:
    return calseg.info()["pool_held_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="the pool is Linux only")
@pytest.mark.usefixtures("empty_pool")
class TestBufferPool:
    def test_sizes_layouts_and_dtypes(self):
        """Pooled memory works in every dtype and layout. Small results are allocated by PyTorch."""
        for dtype in FLOATS:
            like = torch.zeros(1, 8, 128, 64, 64, dtype=dtype)
            for example in (like, like.to(memory_format=torch.channels_last_3d), like.transpose(0, 1)):
                made = empty_like(example)
                assert (made.shape, made.dtype, made.stride()) == (
                    example.shape,
                    dtype,
                    torch.empty_like(example).stride(),
                )
                made.fill_(1.0)
                assert float(made.float().sum()) == example.numel()
        del made
        assert held() > 0
        calseg.empty_cache()
        assert empty_like(torch.zeros(100)).numel() == 100
        assert held() == 0

    def test_freed_memory_is_used_again(self):
        like = torch.zeros(8 * MIB // 4)
        first = empty_like(like)
        address = first.data_ptr()
        del first
        assert held() == 8 * MIB
        second = empty_like(like)
        assert second.data_ptr() == address
        assert held() == 0
        third = empty_like(like)
        assert third.data_ptr() != address
        del second, third
        assert held() == 16 * MIB
        calseg.empty_cache()
        assert held() == 0

    def test_never_holds_more_than_was_in_use_at_once(self):
        """If sizes change from step to step, blocks that do not fit are returned to the system."""
        most = 0
        for size in (8, 12, 9, 40, 8, 16, 11, 64, 8, 9):
            like = [torch.zeros(1, device="meta").expand(size * MIB // 4) for _ in range(2)]
            live = [empty_like(torch.empty(t.shape)) for t in like]
            most = max(most, sum(t.numel() * 4 for t in live))
            assert held() + sum(t.numel() * 4 for t in live) <= most + 2 * 2 * MIB  # rounded up to 2 MiB each
            del live
            assert held() <= most + 2 * 2 * MIB

    def test_a_view_keeps_the_memory(self):
        made = empty_like(torch.zeros(8 * MIB // 4)).fill_(3.0)
        part = made[5:10]
        del made
        assert held() == 0
        other = empty_like(torch.zeros(8 * MIB // 4)).fill_(4.0)
        assert part.tolist() == [3.0] * 5
        del part, other
        assert held() == 16 * MIB

    def test_a_training_step_takes_its_gradients_memory_again(self):
        x = scores(1, 4, 128, 64, 64, dtype=torch.float32).requires_grad_()
        target = labels((1, 4, 128, 64, 64), dtype=torch.uint8)
        places = set()
        for _ in range(4):
            x.grad = None
            calseg.vls_cross_entropy(x, target).backward()
            places.add(x.grad.data_ptr())
        assert len(places) == 1

    def test_threads_share_it(self):
        def work(index):
            for _ in range(30):
                made = empty_like(torch.empty((4 + index) * MIB // 4)).fill_(index)
                assert float(made[0]) == float(made[-1]) == index
            return True

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))
