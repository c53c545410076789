"""Every backend through the same cases; fresh memory is never zero by luck; long and GPU tests only when asked for."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from calseg import ops

native = ops._native
ISAS = [] if native is None else native.available_isas()

settings.register_profile(
    "calseg",
    deadline=None,
    max_examples=60,
    derandomize="CI" in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("calseg")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("markexpr")
    left_out = [
        item for item in items if any(item.get_closest_marker(m) and m not in asked for m in ("large", "gpu"))
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are made in memory full of NaN: an element that is never written is seen."""
    empty_like, loss_out = ops.empty_like, ops._loss_out

    def poisoned_loss_out(like, dtype, reduction):
        loss = loss_out(like, dtype, reduction)
        return None if loss is None else loss.fill_(torch.nan)

    monkeypatch.setattr(ops, "empty_like", lambda tensor: empty_like(tensor).fill_(torch.nan))
    monkeypatch.setattr(ops, "_loss_out", poisoned_loss_out)


@pytest.fixture(params=["reference", *ISAS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """``"reference"``, then ``"cpu"`` under every instruction set of this machine."""
    if request.param == "reference":
        yield "reference"
        return
    before = native.isa()
    native.set_isa(request.param)
    yield "cpu"
    native.set_isa(before)


@pytest.fixture(params=ISAS)
def cpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """``"cpu"`` under every instruction set."""
    before = native.isa()
    native.set_isa(request.param)
    yield "cpu"
    native.set_isa(before)


@pytest.fixture
def set_threads() -> Iterator[object]:
    """``torch.set_num_threads``, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def peak_growth() -> Callable[[Callable[[], object]], int]:
    """By how many bytes a call raises the process's memory at its peak (Linux)."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        pytest.skip("needs /proc/self/clear_refs")

    def field(name: str) -> int:
        return 1024 * int(status.read_text().split(f"{name}:")[1].split()[0])

    def measure(call: Callable[[], object]) -> int:
        gc.collect()
        clear.write_text("5")  # the peak starts again from what is in use now
        before = field("VmRSS")
        call()
        return field("VmHWM") - before

    return measure
