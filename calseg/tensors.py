"""Dtypes, shapes and memory layouts of tensors.

Kernels see every tensor as ``[N, C, S]``, where one axis S with one stride stands for all spatial axes. They can so
read channel-first tensors, channels-last tensors, and slices of either in place. Tensors of other layouts are copied
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PLAIN_TYPES = (Tensor, torch.nn.Parameter)  # types of tensors that have memory of their own
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LABEL_DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.bool, *FLOAT_DTYPES,
)  # fmt: skip
SOFT_LABEL_DTYPES = (*FLOAT_DTYPES, torch.uint8, torch.uint16)  # an integer is a fraction of its largest value


NO_CLASS = -(2**63)  # in place of a label that is no whole number of 64 bits


def as_integers(labels: Tensor) -> Tensor:
    """Return labels as int64. One that is not whole, or too large, becomes NO_CLASS."""
    wide = labels.long()
    if labels.is_floating_point():
        return torch.where(labels == wide, wide, NO_CLASS)
    return torch.where(wide < 0, NO_CLASS, wide) if labels.dtype == torch.uint64 else wide


def as_fractions(soft_labels: Tensor) -> Tensor:
    """Return soft labels in the dtype in which they are computed. Integers are fractions of their largest value."""
    wide = soft_labels.to(compute_dtype(soft_labels.dtype))
    return wide if soft_labels.is_floating_point() else wide / torch.iinfo(soft_labels.dtype).max


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of ``dtype`` are computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shape_of(scores: Tensor) -> tuple[int, int, int]:
    """Return ``(N, C, S)`` of scores ``[C]``, ``[N, C]`` or ``[N, C, *S]``.

    The rows of ``[N, C]`` count as the voxels of one batch item.
    """
    sizes = scores.shape
    if len(sizes) == 1:
        return 1, sizes[0], 1
    if len(sizes) == 2:
        return 1, sizes[1], sizes[0]
    return sizes[0], sizes[1], scores.numel() // (sizes[0] * sizes[1]) if sizes[0] * sizes[1] else 0


def voxel_shape(scores: Tensor) -> tuple[int, ...]:
    """Return the shape ``[N, *S]`` of labels for scores ``[N, C, *S]``."""
    sizes = tuple(scores.shape)
    return sizes[:1] + sizes[2:] if len(sizes) > 1 else ()


def class_axis(scores: Tensor) -> int:
    """Return the axis of the classes: 0 for ``[C]``, else 1."""
    return 1 if scores.dim() > 1 else 0


# ---- subclasses ----


def plain(value: Any) -> Any:
    """Return a tensor of a subclass that has memory, such as MONAI's MetaTensor, as the plain tensor of that memory.

    Every attribute of such a tensor takes microseconds, because its class sees the access. Other values are returned as
    they are: also a subclass that only dispatches operations, and has no memory of its own.
    """
    if not isinstance(value, Tensor) or type(value) in PLAIN_TYPES:
        return value
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)


# ---- layouts ----


def one_stride(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """Return the one stride by which these axes can be read in row-major order, or None if there is none."""
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
    """Return whether kernels can read this tensor in place: one stride stands for all of its spatial axes."""
    if scores.dim() < 4 or scores.is_contiguous():
        return True
    return one_stride(scores.shape[2:], scores.stride()[2:]) is not None


def layout_like(scores: Tensor) -> torch.memory_format:
    """Return the memory format of a result like ``scores``.

    It is that of ``scores`` if kernels can write it in place, else contiguous.
    """
    if scores.is_contiguous() or is_walkable(torch.empty_like(scores, device="meta")):
        return torch.preserve_format
    return torch.contiguous_format


# ---- conversion to the shape [N, C, S] and back ----


def flat(scores: Tensor) -> Tensor:
    """Return scores as ``[N, C, S]``, the shape that :func:`shape_of` gives."""
    if scores.dim() == 1:
        return scores[None, :, None]
    return scores.transpose(0, 1)[None] if scores.dim() == 2 else scores.flatten(2)


def flat_voxels(voxels: Tensor) -> Tensor:
    """Return ``[]``, ``[N]`` or ``[N, *S]`` as ``[N, S]``."""
    return voxels.reshape(1, -1) if voxels.dim() < 2 else voxels.flatten(1)


def unflat(scores: Tensor, like: Tensor) -> Tensor:
    """Return ``[N, C, S]`` in the shape of ``like``: the inverse of :func:`flat`."""
    if like.dim() == 1:
        return scores[0, :, 0]
    return scores[0].transpose(0, 1) if like.dim() == 2 else scores.view(like.shape)
