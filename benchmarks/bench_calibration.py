"""Benchmarks of calibration bins from logits, and of the ACE losses.

The peer of the calibration bins is torchmetrics in its usual form: the logits are permuted and reshaped before they are
binned. Byte model: one read of the logits and of the labels. "reads" is the time in units of ``logits.view(-1).max()``,
a read that is measured in the same rounds.

The peer of the ACE losses, forward and backward, is the reference backend, which is the loss in plain PyTorch. Byte
model: two reads of the logits and of the labels, and one write of the gradient,
``3 * N * C * S * itemsize + 2 * N * S``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from harness import Case, Problem, gpu_case, on_gpu
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

import calseg

EDGES = {2: 128, 4: 128, 14: 128, 32: 112, 117: 96}
CPU_CASES = [
    *(
        Case("calibration_bins", classes, edge, labels="uint8", memory=True,
             targets={"read": 1.5, "eager": 60, "memory": 5} if classes >= 4 else {"eager": 60, "memory": 5})
        for classes, edge in EDGES.items()
    ),
    *(Case("calibration_bins", classes, edge, "bfloat16", "uint8") for classes, edge in EDGES.items()),
    *(
        Case(f"ace_loss_{binning}", classes, edge // 2, labels="uint8", memory=True, targets={"memory": 5})
        for binning in ("hard", "soft") for classes, edge in EDGES.items()
    ),
]  # fmt: skip
# The ACE losses have no kernel for a GPU. Cases of 512^3 have no peer: torchmetrics counts in float32, so a bin stops
# at 2^24 voxels.
GPU_CASES = [
    gpu_case("calibration_bins", classes, edge, dtype, memory=True, alone=edge == 512,
             targets={"read_share": 0.9, "eager": 5})
    for dtype in ("float32", "bfloat16") for edge in (128, 256, 512) for classes in (2, 4, 14, 33, 117)
    if edge < 512 or classes <= 14
]  # fmt: skip
CASES = GPU_CASES if on_gpu() else CPU_CASES


def build(case: Case) -> Problem:
    """Return the problem of a case."""
    return _bins(case) if case.operation == "calibration_bins" else _loss(case)


def _loss(case: Case) -> Problem:
    """Return the problem of an ACE loss."""
    logits, target = case.scores(), case.target()
    binning = case.operation.removeprefix("ace_loss_")

    def ours(logits: Tensor) -> Tensor:
        return calseg.ace_loss(logits, target, binning=binning)

    def eager(logits: Tensor) -> Tensor:
        return calseg.ace_loss(logits, target, binning=binning, backend="reference")

    return Problem(ours, eager, (logits,), case.traffic(3, 2))


def _bins(case: Case) -> Problem:
    """Return the problem of the calibration bins."""
    logits, target = case.scores(), case.target()

    def ours(logits: Tensor) -> Tensor:
        return calseg.calibration_error(logits, target)

    def eager(logits: Tensor) -> Tensor:
        flat = logits.movedim(1, -1).reshape(-1, case.classes)
        return multiclass_calibration_error(flat, target.reshape(-1).long(), case.classes, validate_args=False)

    return Problem(ours, eager, (logits,), case.traffic(1), backward=False, read=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_calibration(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
