"""Benchmark of cross-entropy with sampled soft labels plus the KL term, with 4 samples, forward and backward.

Byte model: one read of logits, mu, logvar and the labels, and one write of three gradients,
``6 * N * C * S * itemsize + N * S * label itemsize``. The noise is never in memory. Operations: 20 per noise sample and
element, plus 40 per element (notes.md).
"""

from __future__ import annotations

from collections.abc import Callable

import eager as peers
import pytest
from harness import Case, Problem, on_gpu, sized_gpu_cases
from torch import Tensor

import calseg

SAMPLES, ALPHA = 4, 0.1
TARGETS = {"eager": 20, "compile": 25, "memory": 5}
NS = {2: 0.7, 4: 0.55, 14: 0.55, 32: 0.55}
CPU_CASES = [
    Case("vls_cross_entropy", classes, edge, compiled=True, memory=True, targets={"ns": NS[classes], **TARGETS})
    for classes, edge in {2: 96, 4: 96, 14: 80, 32: 64}.items()
]
GPU_CASES = sized_gpu_cases("vls_cross_entropy", {"eager": 5, "compile": 2, "floor": 1.5})
CASES = GPU_CASES if on_gpu() else CPU_CASES


def build(case: Case) -> Problem:
    """Return the problem of a case."""
    logits, mu, logvar, target = case.scores(), case.scores(), case.scores(), case.target()
    wide = target.long()

    def ours(logits: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        return calseg.vls_cross_entropy(logits, target, mu=mu, logvar=logvar, alpha=ALPHA, num_samples=SAMPLES)

    def eager(logits: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        return peers.vls_cross_entropy(logits, mu, logvar, wide, SAMPLES, ALPHA)

    operations = (20 * SAMPLES + 40) * mu.numel()
    return Problem(ours, eager, (logits, mu, logvar), case.traffic(6), SAMPLES * mu.numel(), operations)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vls_cross_entropy(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
