"""Dtypes, shapes and memory layouts of tensors, as every backend sees them.

Kernels see every tensor as ``[N, C, S]``, its spatial axes collapsed to one stride. So channel-first, channels-last and
slices of either are read where they are. The few other layouts are copied first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LABEL_DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a value of ``dtype`` is computed: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shape_of(scores: Tensor) -> tuple[int, int, int]:
    """``(N, C, S)`` of ``[C]``, ``[N, C]`` or ``[N, C, *S]``; the rows of ``[N, C]`` are the voxels of one item."""
    sizes = scores.shape
    if len(sizes) == 1:
        return 1, sizes[0], 1
    if len(sizes) == 2:
        return 1, sizes[1], sizes[0]
    return sizes[0], sizes[1], scores.numel() // (sizes[0] * sizes[1]) if sizes[0] * sizes[1] else 0


def voxel_shape(scores: Tensor) -> tuple[int, ...]:
    """``[N, *S]`` of ``[N, C, *S]``."""
    sizes = tuple(scores.shape)
    return sizes[:1] + sizes[2:] if len(sizes) > 1 else ()


def class_axis(scores: Tensor) -> int:
    """The axis of the classes: 0 of ``[C]``, else 1."""
    return 1 if scores.dim() > 1 else 0


# ---- layouts ----


def one_stride(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The stride with which these axes are walked in row-major order, if there is one."""
    step, extent = 1, None
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if extent is None:
            step = stride
        elif stride != extent:
            return None
        extent = stride * size
    return step


def is_walkable(scores: Tensor) -> bool:
    """Whether the kernels see this tensor itself, not a copy: one stride walks its spatial axes."""
    if scores.dim() < 4 or scores.is_contiguous():
        return True
    return one_stride(scores.shape[2:], scores.stride()[2:]) is not None


def layout_like(scores: Tensor) -> torch.memory_format:
    """The layout of a result like ``scores``: its own, if the kernels can write that in place, else contiguous."""
    if scores.is_contiguous() or is_walkable(torch.empty_like(scores, device="meta")):
        return torch.preserve_format
    return torch.contiguous_format


# ---- one shape for all: [N, C, S] ----


def flat(scores: Tensor) -> Tensor:
    """``[N, C, S]``, with the voxels numbered as :func:`shape_of` counts them."""
    if scores.dim() == 1:
        return scores[None, :, None]
    return scores.transpose(0, 1)[None] if scores.dim() == 2 else scores.flatten(2)


def flat_voxels(voxels: Tensor) -> Tensor:
    """``[N, S]`` of ``[]``, ``[N]`` or ``[N, *S]``."""
    return voxels.reshape(1, -1) if voxels.dim() < 2 else voxels.flatten(1)


def unflat(scores: Tensor, like: Tensor) -> Tensor:
    """``[N, C, S]`` back in the shape of ``like``."""
    if like.dim() == 1:
        return scores[0, :, 0]
    return scores[0].transpose(0, 1) if like.dim() == 2 else scores.view(like.shape)
