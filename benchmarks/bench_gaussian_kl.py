"""Benchmark of the KL divergence of a Gaussian over the logits from the standard normal, forward and backward.

Byte model: one read of mu and logvar, and one write of two gradients, ``4 * N * C * S * itemsize``.
"""

from __future__ import annotations

from collections.abc import Callable

import eager as peers
import pytest
from harness import Case, Problem, on_gpu, sized_gpu_cases

import calseg

CPU_CASES = [
    Case("gaussian_kl", classes, 96, labels="", compiled=classes == 4, memory=True, targets={"memory": 5})
    for classes in (4, 32)
]
GPU_CASES = sized_gpu_cases("gaussian_kl", {"eager": 5, "compile": 2}, labels="")
CASES = GPU_CASES if on_gpu() else CPU_CASES


def build(case: Case) -> Problem:
    """Return the problem of a case."""
    return Problem(calseg.gaussian_kl, peers.gaussian_kl, (case.scores(), case.scores()), case.traffic(4, 0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gaussian_kl(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
