"""Labels and class weights: their description for a kernel, loads, and blending with soft labels."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from calseg.kernels.tile import View, voxel_pointers


class Labels(NamedTuple):
    """Class indices ``[N, S]`` of any dtype, or a mask. ``ptr`` is None if there are no labels.

    ``ignore`` is the label of ignored voxels, or None if the dtype cannot hold that value.
    """

    ptr: Any = None
    stride_n: int | None = None
    stride_s: int | None = None
    ignore: int | None = None


@cache
def holds(dtype: torch.dtype, number: int) -> bool:
    """Return whether a dtype has a value that equals this integer."""
    if not dtype.is_floating_point:
        return torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max
    info = torch.finfo(dtype)
    lowest_bit = max(1, number & -number)
    return abs(number) <= info.max and abs(number) // lowest_bit < 2 / info.eps


def labels_argument(view: View | None, labels: Any) -> Labels:
    """Return the argument by which a kernel receives ``labels``, the labels of a spec or None.

    ``view`` is the view of the tensor of the labels.
    """
    if view is None:
        return Labels()
    ignore_index = labels.ignore_index
    if not holds(labels.tensor.dtype, ignore_index):
        ignore_index = None
    elif ignore_index >= 2**63:  # kernels compare signed numbers of 64 bits
        ignore_index -= 2**64
    return Labels(view.ptr, view.stride_n, view.stride_s, ignore_index)


@triton.jit
def load_labels(labels, n, first, inside, C: tl.constexpr, IS_MASK: tl.constexpr, tile: tl.constexpr):
    """Load the labels of the tile and return ``(label, ok, bad)``.

    ``label`` is int32 and -1 where ignored. ``ok`` is true where the voxel counts. ``bad`` is true where the label is
    neither a class nor ignored. A mask has no bad labels.
    """
    given = tl.load(voxel_pointers(labels, n, first, tile), mask=inside, other=0)
    NARROW: tl.constexpr = given.dtype.primitive_bitwidth < 32 or given.dtype == tl.int32
    WHOLE: tl.constexpr = given.dtype.is_int()
    if WHOLE:
        given = given.to(tl.int32 if NARROW else tl.int64)
        bad = (given < 0) | (given >= C)
        label = given
    else:
        given = given.to(tl.float32 if NARROW else given.dtype)
        bad = ((given >= 0) & (given < C) & (tl.floor(given) == given)) == 0
        label = tl.where((given >= 0) & (given < C), given, -1)  # an integer cannot hold every float
    # Compute none of the three results from another one: Triton 3.6 would move it before the one that it depends on.
    ok = inside
    if labels.ignore is not None:
        counts = given != labels.ignore
        label, ok, bad = tl.where(counts, label, -1), ok & counts, counts & bad
    bad = inside & False if IS_MASK else inside & bad
    return tl.where(inside, label, -1).to(tl.int32), ok, bad


@triton.jit
def load_labels_or_none(labels, n, first, inside, C: tl.constexpr, tile: tl.constexpr):
    """Do as :func:`load_labels`. If there are no labels, every voxel counts, and all labels are -1."""
    if labels.ptr is None:
        label, ok, bad = tl.full([tile.TILE], -1, tl.int32), inside, inside & False
    else:
        label, ok, bad = load_labels(labels, n, first, inside, C, False, tile)
    return label, ok, bad


@triton.jit
def class_weights(weight, c, C: tl.constexpr):
    """Return the weights of classes ``c``. They are 1 if ``weight`` is None, and 0 past class C."""
    valid = c < C
    return tl.where(valid, 1.0, 0.0) if weight is None else tl.load(weight + c, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def weighted(w, share):
    """Return ``w * share``, or 0 where a class has no share, even if its weight is infinite."""
    return tl.where(share == 0.0, 0.0, w * share)


@triton.jit
def label_weights(weight, label, C: tl.constexpr):
    """Return ``weight[label]`` where the label is a class, and 0 elsewhere."""
    return tl.load(weight + label, mask=(label >= 0) & (label < C), other=0.0).to(tl.float32)


@triton.jit
def blend_with_labels(estimate, scale, label, ok, bad, alpha, c):
    """Return ``(1 - alpha) * onehot(label) + scale * estimate``.

    It is 0 where the voxel is ignored, and NaN where the label is not a class.
    """
    hard = tl.where(c[:, None] == label[None, :], 1.0 - alpha, 0.0)
    blended = tl.where(ok[None, :], hard + scale * estimate, 0.0)
    return tl.where(bad[None, :], float("nan"), blended)
