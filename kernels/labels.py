"""Labels and class weights: how the host describes them to a kernel, and how a tile reads them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from calseg.kernels.tile import View, voxel_pointers


class Labels(NamedTuple):
    """Class indices or a mask ``[N, S]`` of any integer dtype; ``ptr`` is None where there are none.

    ``ignore`` is the label of ignored voxels, or None where no label can have that value.
    """

    ptr: Any = None
    stride_n: int | None = None
    stride_s: int | None = None
    ignore: int | None = None


def labels_argument(view: View | None, labels: Any) -> Labels:
    """Describe the labels of a spec, or None, to a kernel; ``view`` is the view of their tensor."""
    if view is None:
        return Labels()
    info, ignore_index = torch.iinfo(labels.tensor.dtype), labels.ignore_index
    if not info.min <= ignore_index <= info.max:
        ignore_index = None
    elif ignore_index >= 2**63:  # kernels compare signed numbers
        ignore_index -= 2**64
    return Labels(view.ptr, view.stride_n, view.stride_s, ignore_index)


@triton.jit
def load_labels(labels, n, first, inside, C: tl.constexpr, IS_MASK: tl.constexpr, tile: tl.constexpr):
    """Load ``(label, ok, bad)``: the label as int32, -1 where ignored; if its voxel counts; if it is not a class."""
    given = tl.load(voxel_pointers(labels, n, first, tile), mask=inside, other=0)
    NARROW: tl.constexpr = given.dtype.primitive_bitwidth < 32 or given.dtype == tl.int32
    given = given.to(tl.int32 if NARROW else tl.int64)
    # Make none of the three from another: Triton 3.6 would move it before the one that it depends on.
    label, ok, bad = given, inside, (given < 0) | (given >= C)
    if labels.ignore is not None:
        counts = given != labels.ignore
        label, ok, bad = tl.where(counts, label, -1), ok & counts, counts & bad
    bad = inside & False if IS_MASK else inside & bad
    return tl.where(inside, label, -1).to(tl.int32), ok, bad


@triton.jit
def load_labels_or_none(labels, n, first, inside, C: tl.constexpr, tile: tl.constexpr):
    """Do as :func:`load_labels`; without labels every voxel counts, and none has a class."""
    if labels.ptr is None:
        label, ok, bad = tl.full([tile.TILE], -1, tl.int32), inside, inside & False
    else:
        label, ok, bad = load_labels(labels, n, first, inside, C, False, tile)
    return label, ok, bad


@triton.jit
def class_weights(weight, c, C: tl.constexpr):
    """Return the weights of classes ``c``, 1 without ``weight``; 0 past class C."""
    valid = c < C
    return tl.where(valid, 1.0, 0.0) if weight is None else tl.load(weight + c, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def label_weights(weight, label, C: tl.constexpr):
    """Return ``weight[label]`` where the label is a class, else 0."""
    return tl.load(weight + label, mask=(label >= 0) & (label < C), other=0.0).to(tl.float32)


@triton.jit
def blend_with_labels(estimate, scale, label, ok, bad, alpha, c):
    """Return ``(1 - alpha) * onehot(label) + scale * estimate``; 0 where ignored, NaN where a label is not a class."""
    hard = tl.where(c[:, None] == label[None, :], 1.0 - alpha, 0.0)
    blended = tl.where(ok[None, :], hard + scale * estimate, 0.0)
    return tl.where(bad[None, :], float("nan"), blended)
