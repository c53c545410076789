"""Fixtures of all tests: every backend, poisoned memory, and the selection of long tests and GPU tests."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from internals import ISAS, MEMORY_OF_RESULTS, TRITON_ERROR, native

# The interpreter of Triton is slow, so test_triton.py has selected cases. With CALSEG_TEST_TRITON=1, all tests of the
# other backends run with Triton too, which takes an hour.
TRITON = ["triton"] if "CALSEG_TEST_TRITON" in os.environ else []

# Some tests interrupt runs by SIGINT. A process that a shell starts in the background ignores it, and so do its
# children.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "calseg",
    deadline=None,
    max_examples=60,
    derandomize="CI" in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("calseg")


LEFT_OUT = ("large", "gpu", "fuzz", "ptx", "nnunet")
"""Markers whose tests run only where ``-m`` asks for them."""


def pytest_configure(config: pytest.Config) -> None:
    """Choose what runs Triton kernels without a GPU: Triton's interpreter, or with ``-m ptx`` that of PTX.

    It is chosen before anything imports Triton, which reads TRITON_INTERPRET once.
    """
    if torch.cuda.is_available() or TRITON_ERROR is not None:
        return
    sys.path.insert(0, str(Path(__file__).parent / "backends"))
    if "ptx" in config.getoption("markexpr"):
        os.environ.pop("TRITON_INTERPRET", None)
        from ptx import launch

        launch.install()
    else:
        os.environ.setdefault("TRITON_INTERPRET", "1")
        import interpreter

        interpreter.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("markexpr")
    left_out = [item for item in items if any(item.get_closest_marker(m) and m not in asked for m in LEFT_OUT)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over the thousands of tests, which takes it seconds each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Allocate results in memory full of NaN, so that an element that is never written shows. Return their shapes."""
    asked: list[tuple[int, ...]] = []

    def poisoned(make: Callable[..., torch.Tensor], *args: object) -> torch.Tensor:
        result = make(*args).fill_(torch.nan)
        asked.append(tuple(result.shape))
        return result

    for module, name in MEMORY_OF_RESULTS:
        monkeypatch.setattr(module, name, partial(poisoned, getattr(module, name)))
    return asked


@contextmanager
def engine(isa: str) -> Iterator[str]:
    """Set an instruction set, and give the name of its backend.

    Use one thread, as there are thousands of tiny calls.
    """
    threads, before = torch.get_num_threads(), None if native is None else native.isa()
    torch.set_num_threads(1)
    if isa in ISAS:
        native.set_isa(isa)
    yield "cpu" if isa in ISAS else isa
    if before is not None:
        native.set_isa(before)
    torch.set_num_threads(threads)


@pytest.fixture(params=["reference", *ISAS, *TRITON])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """``"reference"``, then ``"cpu"`` under every instruction set of this machine, and ``"triton"`` if asked for."""
    with engine(request.param) as name:
        yield name


@pytest.fixture(params=ISAS)
def cpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """``"cpu"`` under every instruction set."""
    with engine(request.param) as name:
        yield name


@pytest.fixture
def set_threads() -> Iterator[object]:
    """Give ``torch.set_num_threads``, and restore the number afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def peak_growth() -> Callable[[Callable[[], object]], int]:
    """Give a function that returns how many bytes a call adds to the peak memory of the process (Linux)."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        pytest.skip("needs /proc/self/clear_refs")

    def field(name: str) -> int:
        return 1024 * int(status.read_text().split(f"{name}:")[1].split()[0])

    def measure(call: Callable[[], object]) -> int:
        gc.collect()
        clear.write_text("5")  # reset the peak to the memory in use
        before = field("VmRSS")
        call()
        return field("VmHWM") - before

    return measure


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with simulated cases in ``data``, and in ``run`` a network that was trained on them."""
    from calseg.simulation import DemoConfig, make_dataset
    from calseg.training import TrainConfig, train

    root = tmp_path_factory.mktemp("trained")
    make_dataset(root / "data", DemoConfig(cases=6, raters=2, side=16))
    config = TrainConfig(iterations=3, patch_size=(16, 16, 8), val_fraction=0.5)
    train(root / "data", root / "run", config)
    return root
