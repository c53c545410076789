"""Cross-entropy on class indices, forward and backward, against ``F.cross_entropy``.

Byte model: read the logits once, write their gradient once, read the labels once:
``2 * N * C * S * itemsize + N * S * label itemsize``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from harness import Case, Problem
from torch import Tensor

import calseg

EDGES = {2: 128, 4: 128, 14: 128, 32: 112, 117: 96}
COPY = {2: 2.0, 4: 1.3, 14: 1.3, 32: 1.3, 117: 1.6}
CASES = [
    *(
        Case("cross_entropy", classes, edge, compiled=True, memory=True,
             targets={"copy": COPY[classes], "eager": 12, "compile": 5, "memory": 5})
        for classes, edge in EDGES.items()
    ),
    *(
        Case("cross_entropy", classes, edge, labels="uint8", targets={"copy": COPY[classes]})
        for classes, edge in EDGES.items()
    ),
    *(
        Case("cross_entropy", classes, edge, "bfloat16", targets={"float32": 1})
        for classes, edge in EDGES.items()
    ),
]  # fmt: skip


def build(case: Case) -> Problem:
    """F.cross_entropy takes int64 labels only: it gets them widened beforehand, at no cost to it."""
    logits, target = case.scores(), case.target()
    wide = target.long()

    def ours(logits: Tensor) -> Tensor:
        return calseg.vls_cross_entropy(logits, target)

    def eager(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, wide)

    rivals = {"float32": (ours, (logits.float(),))} if case.dtype == "bfloat16" else {}
    return Problem(ours, eager, (logits,), case.traffic(2), rivals=rivals)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cross_entropy(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
