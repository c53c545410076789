"""Multiplication of gradients by the upstream factor of a reduced loss.

The forward pass computes the gradients for a factor of 1. The backward pass multiplies them by the actual one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from calseg.kernels import launch as host
from torch import Tensor

BLOCK_SIZE = 4096
MAX_PROGRAMS = 2048


@triton.jit
def scale_gradient(
    gradient,  # in and out: contiguous memory
    factor,  # []
    size,
    BLOCK: tl.constexpr,
):
    """Compute ``gradient *= factor``. A factor of 1, the usual one, leaves the memory untouched."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            i = start + tl.arange(0, BLOCK)
            values = tl.load(gradient + i, mask=i < size).to(tl.float32)
            tl.store(gradient + i, (values * by).to(gradient.dtype.element_ty), mask=i < size)


def launch(gradient: Tensor, factor: Tensor) -> None:
    """Launch the kernel, which multiplies a gradient in place by a 0-d tensor."""
    size = gradient.numel()
    programs = min(triton.cdiv(size, BLOCK_SIZE), MAX_PROGRAMS)
    host.launch_kernel(scale_gradient, programs, gradient, (gradient, factor, size, BLOCK_SIZE), 8)
