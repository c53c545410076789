"""Cross-entropy on small inputs, forward and backward: the cost of a call with hardly anything to compute.

A 2D batch, the levels of a deep-supervision loss and classification ``[N, C]``; Python overhead included.
Byte model: that of bench_cross_entropy.py (these sizes are in cache: read the ratio, not the GB/s).
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
    return replace(bench_cross_entropy.build(case), copied=False, rivals={})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_small(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
