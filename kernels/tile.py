"""Tiles of tensors on the device: their places in memory, loads and stores.

A program (Triton's word for a block of threads) works on one tile ``[BLOCK_C, TILE]``. The tile holds all classes, or a
block of them, of ``TILE`` voxels of one batch item. ``C`` is known at compile time, so classes that only pad a tile to
a power of two cost nothing. Arithmetic is in float32: loads convert to float32, and stores convert back. Offsets have
64 bits.

Kernels take structures as NamedTuples. Two limits of Triton 3.6 shape them:

- Triton loses the constants of a tuple inside another tuple. So no tuple holds another one.
- Triton cannot compare with None a tuple that holds None. So a structure with optional fields is never None itself. Its
  ``ptr`` is None instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl


class View(NamedTuple):
    """A tensor as ``[N, C, S]``, where one axis stands for all spatial axes.

    Strides count elements. The stride of an absent axis is 0.
    """

    ptr: Any
    stride_n: int
    stride_c: int
    stride_s: int


@dataclass(frozen=True)
class Tile:
    """The shape of a tile and its layout in registers.

    :func:`calseg.kernels.launch.choose_tile` makes it.

    Attributes:
        BLOCK_C: number of classes, a power of two.
        TILE: number of voxels, a power of two.
        ALIGN_C: a number that divides the strides of the class axis and of the batch, and S.
        ALIGN_S: a number that divides the strides of the spatial axis and of the batch.
        VEC_C: number of adjacent classes that one thread loads at once.
        VEC_S: number of adjacent voxels that one thread loads at once.
        LANE_MAJOR: the rows are ordered by lane: first class 0 of every noise quad, then class 1 of every quad, and so
            on. Where rows have few voxels, Triton spreads the rows over threads. This order keeps a quad in one thread.
        GROUPS: number of groups of VEC_S adjacent voxels that one thread holds of a class.

    The compiler makes wide loads only if it knows the alignments.
    """

    BLOCK_C: int
    TILE: int
    ALIGN_C: int = 1
    ALIGN_S: int = 1
    VEC_C: int = 1
    VEC_S: int = 1
    LANE_MAJOR: bool = False
    GROUPS: int = 1


# ---- the place of a tile ----


@triton.jit
def multiple(stride, ALIGN: tl.constexpr):
    """Return ``stride``, and tell the compiler that it is a multiple of ALIGN."""
    return stride // ALIGN * ALIGN if ALIGN > 1 else stride


@triton.jit
def num_tiles(S, tile: tl.constexpr):
    """Return the number of tiles of a batch item. The sum ``S + TILE``, as in ``tl.cdiv``, could overflow."""
    return tl.cast((S - 1) // tile.TILE + 1, tl.int32)


@triton.jit
def locate(step, S, tile: tl.constexpr):
    """Return ``(n, first, inside)`` of tile number ``step``: batch item, first voxel, and a mask of existing voxels.

    A number of a tile is below 2^31. A division without signs takes half the instructions of one with signs.
    """
    step, tiles = tl.cast(step, tl.uint32), tl.cast(num_tiles(S, tile), tl.uint32)
    n = (step // tiles).to(tl.int64)
    first = (step % tiles).to(tl.int64) * tile.TILE
    return n, first, voxels_inside(first, S, tile)


@triton.jit
def voxels_inside(first, S, tile: tl.constexpr):
    """Return a mask of the existing voxels of the tile whose first voxel is ``first``."""
    left = tl.minimum(multiple(S, tile.ALIGN_C) - first, tile.TILE).to(tl.int32)
    return tl.arange(0, tile.TILE) < left


@triton.jit
def classes(start, tile: tl.constexpr):
    """Return the class of every row of a tile whose first class is ``start``."""
    row = tl.arange(0, tile.BLOCK_C)
    if tile.LANE_MAJOR:
        row = 4 * (row % (tile.BLOCK_C // 4)) + row // (tile.BLOCK_C // 4)
    return start + row


# ---- tensors with a class axis ----


@triton.jit
def pointers(x, n, first, c, tile: tl.constexpr):
    """Return pointers ``[BLOCK_C, TILE]`` to classes ``c`` of the voxels of the tile."""
    VEC_C: tl.constexpr = tile.VEC_C
    VEC_S: tl.constexpr = tile.VEC_S
    stride_s = multiple(x.stride_s, tile.ALIGN_S)
    start = x.ptr + n * multiple(x.stride_n, tile.ALIGN_C * tile.ALIGN_S) + first * stride_s
    rows = c.to(tl.int64) * multiple(x.stride_c, tile.ALIGN_C)
    columns = tl.arange(0, tile.TILE).to(tl.int64) * stride_s
    tile_pointers = start + (rows[:, None] + columns[None, :])
    if VEC_C * VEC_S == 1:
        # State the alignment only. If told that neither axis is contiguous, Triton 3.6 spreads the classes over a warp.
        BYTES: tl.constexpr = x.ptr.dtype.element_ty.primitive_bitwidth // 8
        tile_pointers = tl.multiple_of(tile_pointers, [BYTES, BYTES])
    else:
        tile_pointers = tl.max_contiguous(tile_pointers, [VEC_C, VEC_S])
    return tile_pointers


@triton.jit
def load(x, n, first, inside, ok, c, C: tl.constexpr, tile: tl.constexpr):
    """Load classes ``c`` of the tile as float32. An unsigned integer is a fraction of the largest one of its type.

    The value is 0 past class C and where ``ok`` is false, even if memory holds a NaN there. ``ok`` may be None.
    """
    TYPE: tl.constexpr = x.ptr.dtype.element_ty
    mask = (c < C)[:, None] & inside[None, :]
    values = tl.load(pointers(x, n, first, c, tile), mask=mask, other=0).to(tl.float32)
    if TYPE.is_int():
        values *= 1.0 / (2**TYPE.primitive_bitwidth - 1)
    return values if ok is None else tl.where(ok[None, :], values, 0.0)


@triton.jit
def store(x, n, first, inside, c, values, C: tl.constexpr, tile: tl.constexpr):
    """Store classes ``c`` of the tile: the inverse of :func:`load`."""
    TYPE: tl.constexpr = x.ptr.dtype.element_ty
    mask = (c < C)[:, None] & inside[None, :]
    if TYPE.is_int():
        values = values * (2**TYPE.primitive_bitwidth - 1) + 0.5
    tl.store(pointers(x, n, first, c, tile), values.to(TYPE), mask=mask)


# ---- sums over voxels ----


@triton.jit
def thread_sums(x, tile: tl.constexpr):
    """Return the sums of every thread over its voxels, ``[TILE // (VEC_S * GROUPS)]`` or so many columns.

    They are right however the compiler lays out the tile. If it does so as Tile says, threads exchange nothing.
    """
    VEC_S: tl.constexpr = tile.VEC_S
    GROUPS: tl.constexpr = tile.GROUPS
    SUMS: tl.constexpr = tile.TILE // (VEC_S * GROUPS)
    if len(x.shape) == 1:
        added = tl.sum(tl.sum(tl.reshape(x, [GROUPS, SUMS, VEC_S]), 2), 0)
    else:
        added = tl.sum(tl.sum(tl.reshape(x, [x.shape[0], GROUPS, SUMS, VEC_S]), 3), 1)
    return added


# ---- tensors without a class axis ----


@triton.jit
def voxel_pointers(x, n, first, tile: tl.constexpr):
    """Return pointers ``[TILE]`` to the voxels of the tile in a tensor without class axis.

    The compiler is told what the numbers of the voxels are, and nothing of the pointers: it knows a stride of 1, and
    loads as many voxels at once as of the scores. With any other stride, it loads one voxel at a time.
    """
    VEC_S: tl.constexpr = tile.VEC_S
    voxels = tl.max_contiguous(tl.arange(0, tile.TILE).to(tl.int64), [VEC_S])
    return x.ptr + n * x.stride_n + first * x.stride_s + voxels * x.stride_s


@triton.jit
def store_voxels(x, n, first, inside, values, tile: tl.constexpr):
    """Store one number per voxel of the tile."""
    tl.store(voxel_pointers(x, n, first, tile), values.to(x.ptr.dtype.element_ty), mask=inside)
