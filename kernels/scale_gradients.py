"""Multiplication of gradients by the upstream factor of a reduced loss.

The forward pass computes the gradients for a factor of 1. The backward pass multiplies them by the actual one, all in
one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from calseg.kernels import launch as host
from torch import Tensor

BLOCK_SIZE = 4096
MAX_PROGRAMS = 2048
AT_ONCE = 3  # gradients that a launch takes: those of the logits, mu and logvar


@triton.jit
def _scale(gradient, by, first, size, BLOCK: tl.constexpr):
    """Multiply a block of a gradient, which is None if there is none."""
    if gradient is not None:
        i = first + tl.arange(0, BLOCK)
        values = tl.load(gradient + i, mask=i < size).to(tl.float32)
        tl.store(gradient + i, (values * by).to(gradient.dtype.element_ty), mask=i < size)


@triton.jit
def scale_gradients(
    gradient0,  # in and out: contiguous memory, as the next two
    gradient1,  # or None
    gradient2,  # or None
    factor,  # []
    corrections,  # the last number is another factor; or None
    last,  # its place
    size,  # of each gradient
    BLOCK: tl.constexpr,
):
    """Compute ``gradient *= factor``. A factor of 1, the usual one, leaves the memory untouched."""
    by = tl.load(factor).to(tl.float32)
    if corrections is not None:
        by *= tl.load(corrections + last)
    if by != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            _scale(gradient0, by, first, size, BLOCK)
            _scale(gradient1, by, first, size, BLOCK)
            _scale(gradient2, by, first, size, BLOCK)


def launch(gradients: Sequence[Tensor], factor: Tensor, corrections: Tensor | None) -> None:
    """Launch the kernel, which multiplies gradients of the same size in place.

    The factor is a 0-d tensor, times the last number of ``corrections``, which is None if there is none.
    """
    last = 0 if corrections is None else len(corrections) - 1
    for start in range(0, len(gradients), AT_ONCE):
        some = gradients[start : start + AT_ONCE]
        size = some[0].numel()
        programs = min(-(-size // BLOCK_SIZE), MAX_PROGRAMS)
        absent = (None,) * (AT_ONCE - len(some))
        arguments = (*some, *absent, factor, corrections, last, size, BLOCK_SIZE)
        host.launch_kernel(scale_gradients, programs, some[0], arguments, 8)
