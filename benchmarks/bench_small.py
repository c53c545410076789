"""Benchmark of cross-entropy with small inputs, forward and backward, where the time is that of the call.

The cases are a 2-D batch, the levels of a deep-supervision loss, and classification ``[N, C]``. The time includes
Python. The byte model is that of bench_cross_entropy.py. These sizes fit the cache, so the GB/s mean little, and the
ratio counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import bench_cross_entropy
import pytest
from harness import Case, Problem

TARGETS = {"eager": 1}
CASES = [
    Case("small", 4, 64, batch=2, axes=2, targets=TARGETS),
    *(Case("small", 3, edge, batch=2, targets=TARGETS) for edge in (4, 8, 16, 32)),
    Case("small", 10, 1, batch=32, axes=0, targets=TARGETS),
]


def build(case: Case) -> Problem:
    """Return the problem of a case."""
    return replace(bench_cross_entropy.build(case), copied=False, rivals={})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_small(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
