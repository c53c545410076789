"""pytest hooks of the benchmarks: options, the ``measure`` fixture, and the table at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest
import report
import torch

ROWS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("calseg benchmarks")
    group.addoption("--quick", action="store_true", help="tiny sizes, three rounds: does it all still run?")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    group.addoption("--results", type=Path, metavar="FILE", help="write the figures to FILE as JSON")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if (device := config.getoption("--device")) != "cpu":
        if not torch.cuda.is_available():
            raise pytest.UsageError(f"--device: got {device!r}, but torch finds no CUDA device")
        torch.set_default_device(device)
    config.option.benchmark_quiet = True  # hide the table of pytest-benchmark, which -v shows
    config.stash[ROWS] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # warnings of the peers


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[harness.Case], None]:
    """Return a function that measures a case of the module's ``build``, and adds its row to the table."""

    def run(case: harness.Case) -> None:
        quick = request.config.getoption("--quick")
        row = harness.measure(benchmark, request.module.build, case, quick=quick)
        if row is not None:
            request.config.stash[ROWS].append(row)

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    head = report.header(quick=config.getoption("--quick"))
    terminalreporter.section("calseg benchmarks")
    terminalreporter.write_line(report.render(head, rows))
    if results := config.getoption("--results"):
        report.write_json(results, head, rows)
        terminalreporter.write_line(f"written to {results}")
