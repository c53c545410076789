"""What the kernels share on the device: tiles of tensors, labels, softmax pieces and the noise.

A program works on one tile: all classes, or a block of them, of ``TILE`` voxels of one batch item, ``[BLOCK_C, TILE]``.
``C`` is known at compile time, so classes that only pad a tile to a power of two cost nothing. Arithmetic is float32:
what is loaded is widened at once, and narrowed when it is stored. Offsets are 64 bits wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))


class View(NamedTuple):
    """A tensor as ``[N, C, S]``, the spatial axes collapsed; strides in elements, 0 for an axis that it lacks."""

    ptr: Any
    stride_n: int
    stride_c: int
    stride_s: int


@dataclass(frozen=True)
class Tile:
    """How a tile is cut and held; made by :func:`calseg.kernels.launch.choose_tile`.

    ``ALIGN_C`` and ``ALIGN_S`` divide every stride of these axes (and S, and the batch's stride): what the compiler
    must know for wide loads. ``VEC_C`` or ``VEC_S`` adjacent elements go to one thread. ``LANE_MAJOR``: of the four
    classes of a noise quad the first of all quads come first, then the second, ...: with few voxels to a row, classes
    are spread over threads from the last row on, and this keeps a quad in one thread.
    """

    BLOCK_C: int
    TILE: int
    ALIGN_C: int = 1
    ALIGN_S: int = 1
    VEC_C: int = 1
    VEC_S: int = 1
    LANE_MAJOR: bool = False


# ---- tiles ----


@triton.jit
def multiple(stride, ALIGN: tl.constexpr):
    """``stride``, which the compiler then knows for a multiple of ALIGN."""
    return stride // ALIGN * ALIGN if ALIGN > 1 else stride


@triton.jit
def locate(step, S, tile: tl.constexpr):
    """Of the tile number ``step``: its batch item, its first voxel, and which of the TILE voxels from there exist."""
    tiles = tl.cdiv(S, tile.TILE).to(tl.int32)
    n = (step // tiles).to(tl.int64)
    first = (step % tiles).to(tl.int64) * tile.TILE
    left = tl.minimum(multiple(S, tile.ALIGN_C) - first, tile.TILE).to(tl.int32)
    return n, first, tl.arange(0, tile.TILE) < left


@triton.jit
def classes(start, tile: tl.constexpr):
    """The classes of the tile's rows, from ``start`` on."""
    row = tl.arange(0, tile.BLOCK_C)
    if tile.LANE_MAJOR:
        row = 4 * (row % (tile.BLOCK_C // 4)) + row // (tile.BLOCK_C // 4)
    return start + row


@triton.jit
def pointers(x, n, first, c, tile: tl.constexpr):
    """Pointers to the classes ``c`` of the tile's voxels, ``[BLOCK_C, TILE]``."""
    VEC_C: tl.constexpr = tile.VEC_C
    VEC_S: tl.constexpr = tile.VEC_S
    stride_s = multiple(x.stride_s, tile.ALIGN_S)
    start = x.ptr + n * multiple(x.stride_n, tile.ALIGN_C * tile.ALIGN_S) + first * stride_s
    rows = c.to(tl.int64) * multiple(x.stride_c, tile.ALIGN_C)
    columns = tl.arange(0, tile.TILE).to(tl.int64) * stride_s
    tile_pointers = start + (rows[:, None] + columns[None, :])
    if VEC_C * VEC_S == 1:
        # Said by the alignment: told that neither axis is contiguous, Triton 3.6 spreads the classes over a warp.
        BYTES: tl.constexpr = x.ptr.dtype.element_ty.primitive_bitwidth // 8
        tile_pointers = tl.multiple_of(tile_pointers, [BYTES, BYTES])
    else:
        tile_pointers = tl.max_contiguous(tile_pointers, [VEC_C, VEC_S])
    return tile_pointers


@triton.jit
def load(x, n, first, inside, ok, c, C: tl.constexpr, tile: tl.constexpr):
    """Classes ``c`` of the tile in float32; 0 where a voxel does not count (NaN may lie there) or a class is none."""
    mask = (c < C)[:, None] & inside[None, :]
    values = tl.load(pointers(x, n, first, c, tile), mask=mask, other=0.0).to(tl.float32)
    return values if ok is None else tl.where(ok[None, :], values, 0.0)


@triton.jit
def store(x, n, first, inside, c, values, C: tl.constexpr, tile: tl.constexpr):
    """What :func:`load` loads."""
    mask = (c < C)[:, None] & inside[None, :]
    tl.store(pointers(x, n, first, c, tile), values.to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def voxel_pointers(x, n, first, tile: tl.constexpr):
    """Pointers to the tile's voxels in a tensor without class axis, ``[TILE]``."""
    VEC_S: tl.constexpr = tile.VEC_S
    start = x.ptr + n * x.stride_n + first * x.stride_s
    return tl.max_contiguous(start + tl.arange(0, tile.TILE).to(tl.int64) * x.stride_s, [VEC_S])


# ---- voxels: labels, upstream gradients, sums ----


# A tuple holds no other one, and one that can hold None is never None itself: Triton 3.6 loses what is constant in an
# inner tuple, and cannot compare one that holds None.


class Labels(NamedTuple):
    """Class indices or a mask, ``[N, S]``, of any integer dtype, or (ptr None) none; ``ignore`` is None where no label
    can equal it.
    """

    ptr: Any
    stride_n: int | None
    stride_s: int | None
    ignore: int | None


class Upstream(NamedTuple):
    """The gradient that comes in: ``scale``, over the mean's divisors, times a tensor ``[N, S]`` or (ptr None) 1.

    ``sums`` ``[2, NUM_SUMS]`` adds up to the divisors of the loss and of the KL term; None where they are in ``scale``.
    """

    scale: float
    sums: Any
    ptr: Any
    stride_n: int | None
    stride_s: int | None


@triton.jit
def load_labels(labels, n, first, inside, C: tl.constexpr, IS_MASK: tl.constexpr, tile: tl.constexpr):
    """``(label, ok, bad)``: int32 (-1 where ignored), whether a voxel counts, and whether its label is no class."""
    given = tl.load(voxel_pointers(labels, n, first, tile), mask=inside, other=0)
    NARROW: tl.constexpr = given.dtype.primitive_bitwidth < 32 or given.dtype == tl.int32
    given = given.to(tl.int32 if NARROW else tl.int64)
    # None of the three is made of another: Triton 3.6 would move one before what it is made of.
    label, ok, bad = given, inside, (given < 0) | (given >= C)
    if labels.ignore is not None:
        counts = given != labels.ignore
        label, ok, bad = tl.where(counts, label, -1), ok & counts, counts & bad
    bad = inside & False if IS_MASK else inside & bad
    return tl.where(inside, label, -1).to(tl.int32), ok, bad


@triton.jit
def divisors(sums, NUM_SUMS: tl.constexpr):
    """The mean's divisors of the loss and of the KL term."""
    i = tl.arange(0, NUM_SUMS)
    return tl.sum(tl.load(sums + i), 0), tl.sum(tl.load(sums + NUM_SUMS + i), 0)


@triton.jit
def load_upstream(upstream, n, first, inside, ok, NUM_SUMS: tl.constexpr, tile: tl.constexpr):
    """dLoss/dl and dLoss/dK of every voxel; 0 where a voxel does not count."""
    of_loss = tl.full([tile.TILE], 0.0, tl.float32) + upstream.scale
    of_kl = of_loss
    if upstream.sums is not None:
        loss_divisor, kl_divisor = divisors(upstream.sums, NUM_SUMS)
        of_loss, of_kl = of_loss / loss_divisor, of_kl / kl_divisor
    if upstream.ptr is not None:
        factor = tl.load(voxel_pointers(upstream, n, first, tile), mask=inside, other=0.0).to(tl.float32)
        of_loss, of_kl = of_loss * factor, of_kl * factor
    return tl.where(ok, of_loss, 0.0), tl.where(ok, of_kl, 0.0)


@triton.jit
def store_sum(partials, row: tl.constexpr, values):
    """This program's share of a sum over all voxels; row 0 is the loss, row 1 the KL term."""
    tl.store(partials + row * tl.num_programs(0).to(tl.int64) + tl.program_id(0), tl.sum(values, 0))


@triton.jit
def store_voxels(x, n, first, inside, values, tile: tl.constexpr):
    """A number per voxel."""
    tl.store(voxel_pointers(x, n, first, tile), values.to(x.ptr.dtype.element_ty), mask=inside)


@triton.jit
def class_weights(weight, c, C: tl.constexpr):
    """Weights of classes, ones without any; 0 for what is none."""
    valid = c < C
    return tl.where(valid, 1.0, 0.0) if weight is None else tl.load(weight + c, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def label_weights(weight, label, C: tl.constexpr):
    """``weight[label]`` where the label is a class, else 0."""
    return tl.load(weight + label, mask=(label >= 0) & (label < C), other=0.0).to(tl.float32)


# ---- softmax ----


@triton.jit
def exp_of(x):
    """exp(x) for x <= 0: within 2^-24 |x| of the result, which is small where x is not. Two instructions, not six."""
    return tl.exp2(x * LOG2E)


@triton.jit
def exp_any(x):
    """exp(x) to 2 ulp, for any x."""
    x = tl.where(x > 89.0, 89.0, tl.where(x < -104.0, -104.0, x))  # NaN stays
    n = tl.floor(x * LOG2E + 0.5)
    rest = (x - n * 0.693359375) + n * 2.12194440e-4
    return tl.exp2(rest * LOG2E) * tl.exp2(n)


@triton.jit
def reciprocal(x):
    """1 / x to 3 ulp for x of at least 1, as sums of a softmax are; a division takes three times the instructions."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def top_and_sum(x, c, scale, C: tl.constexpr):
    """max and ``sum exp(scale * (x - max))`` over the classes; NaN stays NaN."""
    top = tl.max(tl.where((c < C)[:, None], x, -INF), 0)
    return top, tl.sum(tl.where((c < C)[:, None], exp_of((x - top[None, :]) * scale), 0.0), 0)


@triton.jit
def online_top_and_sum(top, total, x, c, scale, C: tl.constexpr):
    """:func:`top_and_sum` of the classes so far and of another block of them; begin with (-inf, 0)."""
    x = tl.where((c < C)[:, None], x, -INF)
    higher = tl.maximum(top, tl.max(x, 0))
    shift = tl.where(higher == -INF, 0.0, higher)  # nothing but -inf so far: not yet NaN
    return higher, total * exp_of((top - shift) * scale) + tl.sum(exp_of((x - shift[None, :]) * scale), 0)
