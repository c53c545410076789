"""Benchmark of cross-entropy with small inputs, forward and backward, where the time is that of the call.

The cases are a 2-D batch, the levels of a deep-supervision loss, and classification ``[N, C]``. The time includes
Python. The byte model is that of bench_cross_entropy.py. These sizes fit the cache, so the GB/s mean little, and the
ratio counts.

With MONAI there is one more case: its Dice plus cross-entropy on labels as its data sets give them, ``MetaTensor`` of
float32. Beside the ratio to ``DiceCELoss`` stands by how much the call is longer than with the same labels as a plain
tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import bench_cross_entropy
import pytest
from harness import Case, Problem

TARGETS = {"eager": 1}
CASES = [
    Case("small", 4, 64, batch=2, axes=2, targets=TARGETS),
    *(Case("small", 3, edge, batch=2, targets=TARGETS) for edge in (4, 8, 16, 32)),
    Case("small", 10, 1, batch=32, axes=0, targets=TARGETS),
]
META_TENSOR = Case(
    "small_meta_tensor", 3, 8, batch=2, labels="float32", targets={"monai": 1, "microseconds_over_plain": 20}
)
if find_spec("monai"):
    CASES.append(META_TENSOR)


def build(case: Case) -> Problem:
    """Return the problem of a case."""
    if case.operation == META_TENSOR.operation:
        return build_meta_tensor(case)
    return replace(bench_cross_entropy.build(case), copied=False, rivals={})


def build_meta_tensor(case: Case) -> Problem:
    """Return the problem of the loss for MONAI, on labels that are a ``MetaTensor``."""
    from monai.data.meta_tensor import MetaTensor
    from monai.losses import DiceCELoss

    from calseg.integrations.monai import DiceVLSLoss

    options = {"include_background": False, "to_onehot_y": True, "softmax": True}
    ours, logits, label = DiceVLSLoss(**options), case.scores(), case.target()[:, None]
    meta = MetaTensor(label)
    rivals = {
        "plain": (partial(ours, target=label), (logits,)),
        "monai": (partial(DiceCELoss(**options), target=meta), (logits,)),
    }
    return Problem(partial(ours, target=meta), None, (logits,), case.traffic(3, 2), copied=False, rivals=rivals)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_small(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
