"""Benchmark of the objective of stage 1 with 4 samples, forward and backward.

Byte model: one read of mu, logvar and the labels, and one write of two gradients,
``4 * N * C * S * itemsize + N * S * label itemsize``. Operations: 20 per noise sample and element, plus 25 per element
(notes.md).
"""

from __future__ import annotations

from collections.abc import Callable

import eager as peers
import pytest
from harness import Case, Problem, on_gpu, sized_gpu_cases
from torch import Tensor

import calseg

SAMPLES = 4
CPU_CASES = [
    Case("vls_elbo", classes, edge, compiled=classes == 4, memory=True, targets={"memory": 5})
    for classes, edge in {2: 96, 4: 96, 14: 80, 32: 64}.items()
]
GPU_CASES = sized_gpu_cases("vls_elbo", {"eager": 5, "compile": 2, "floor": 1.5})
CASES = GPU_CASES if on_gpu() else CPU_CASES


def build(case: Case) -> Problem:
    """Return the problem of a case."""
    mu, logvar, target = case.scores(), case.scores(), case.target()
    wide = target.long()

    def ours(mu: Tensor, logvar: Tensor) -> Tensor:
        return calseg.vls_elbo(mu, logvar, target, num_samples=SAMPLES)

    def eager(mu: Tensor, logvar: Tensor) -> Tensor:
        return peers.vls_elbo(mu, logvar, wide, SAMPLES)

    operations = (20 * SAMPLES + 25) * mu.numel()
    return Problem(ours, eager, (mu, logvar), case.traffic(4), SAMPLES * mu.numel(), operations)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vls_elbo(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
