"""Benchmark of soft labels sampled from mu and logvar and blended with labels, with 4 samples.

One operation is forward alone, the other forward and backward. Byte model of forward: one read of mu, logvar and the
labels, and one write of the soft labels, ``3 * N * C * S * itemsize + N * S * label itemsize``. Backward draws the
noise again. It reads mu, logvar, the upstream gradient and the labels, and writes two gradients, which adds
``5 * N * C * S * itemsize + N * S * label itemsize``. Samples are counted once, although they are drawn twice.
Operations of forward: 15 per noise sample and element (notes.md).
"""

from __future__ import annotations

from collections.abc import Callable

import eager as peers
import pytest
import torch
from harness import Case, Problem, gpu_case, on_gpu, sized_gpu_cases
from torch import Tensor

import calseg

SAMPLES, ALPHA = 4, 0.1
TARGETS = {"eager": 20, "ns": 0.4, "memory": 5}
CPU_CASES = [
    *(
        Case("soft_labels", classes, edge, compiled=True, memory=True, targets={"compile": 25, **TARGETS})
        for classes, edge in {2: 96, 4: 96, 14: 80, 32: 64}.items()
    ),
    Case("soft_labels_backward", 4, 96, memory=True),
]
GPU_CASES = [
    *sized_gpu_cases("soft_labels", {"eager": 5, "compile": 2, "floor": 1.5}),
    *(
        gpu_case("soft_labels_backward", classes, 256, dtype, memory=True, targets={"eager": 5})
        for dtype in ("float32", "bfloat16") for classes in (4, 33)
    ),
]  # fmt: skip
CASES = GPU_CASES if on_gpu() else CPU_CASES


def build(case: Case) -> Problem:
    """Return the problem of a case."""
    mu, logvar, target = case.scores(), case.scores(), case.target()
    wide = target.long()

    def ours(mu: Tensor, logvar: Tensor) -> Tensor:
        return calseg.sample_soft_labels(mu, logvar, target, num_samples=SAMPLES, alpha=ALPHA)

    def eager(mu: Tensor, logvar: Tensor) -> Tensor:
        return peers.sample_soft_labels(mu, logvar, wide, SAMPLES, ALPHA)

    samples = SAMPLES * mu.numel()
    if case.operation == "soft_labels":
        return Problem(ours, eager, (mu, logvar), case.traffic(3), samples, 15 * samples, backward=False)
    return Problem(ours, eager, (mu, logvar), case.traffic(8, 2), samples, upstream=torch.randn_like(mu))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_soft_labels(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
