"""Benchmark of cross-entropy with class indices, forward and backward.

The peer is ``F.cross_entropy``. On a GPU, Liger-Kernel and flash-attn are further peers if they are installed. Byte
model: one read of the logits and of the labels, and one write of the gradient,
``2 * N * C * S * itemsize + N * S * label itemsize``.
"""

from __future__ import annotations

from collections.abc import Callable

import gpu_peers
import pytest
import torch.nn.functional as F
from harness import Case, Loss, Problem, gpu_case, on_gpu
from torch import Tensor

import calseg

EDGES = {2: 128, 4: 128, 14: 128, 32: 112, 117: 96}
COPY = {2: 1.6, 4: 1.3, 14: 1.3, 32: 1.3, 117: 1.6}
CPU_CASES = [
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
# With 33 classes at 512^3, calseg and the copy need 53 GB in float32, and plain PyTorch twice as much. With 117
# classes, the tensors do not fit a GPU of 80 GB.
GPU_CASES = [
    gpu_case("cross_entropy", classes, edge, dtype, compiled=edge == 256, memory=edge >= 256,
             alone=(classes, edge) == (33, 512), targets={"copy_share": share, "eager": 5, "compile": 2})
    for dtype, share in (("float32", 0.9), ("bfloat16", 0.85))
    for edge in (128, 256, 512) for classes in (2, 4, 14, 33, 117) if (classes, edge) != (117, 512)
]  # fmt: skip
CASES = GPU_CASES if on_gpu() else CPU_CASES


def build(case: Case) -> Problem:
    """Return the problem of a case. The peers take int64 labels only, so these are converted outside of their time."""
    logits, target = case.scores(), case.target()
    wide = target.long()
    as_float32 = on_gpu()  # as autocast does, because F.cross_entropy adds up bfloat16 in bfloat16 on a GPU

    def ours(logits: Tensor) -> Tensor:
        return calseg.vls_cross_entropy(logits, target)

    def eager(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float() if as_float32 else logits, wide)

    def rows(name: str) -> Loss:
        return lambda logits: gpu_peers.PEERS[name](logits, wide)

    rivals: dict[str, tuple[Loss, tuple[Tensor, ...]]] = {}
    if not on_gpu():
        if case.dtype == "bfloat16":
            rivals["float32"] = ours, (logits.float(),)
    elif case.edge <= 256:  # Liger starts 1024 threads per voxel, which takes seconds at 512^3
        rivals |= {name: (rows(name), (logits,)) for name in gpu_peers.PEERS if gpu_peers.problem(name) is None}
    return Problem(ours, eager, (logits,), case.traffic(2), rivals=rivals)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cross_entropy(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
