"""Tiles of tensors on the device: where a tile lies, and how it is loaded and stored.

A program works on one tile ``[BLOCK_C, TILE]``: all classes, or a block of them, of ``TILE`` voxels of one batch item.
``C`` is known at compile time, so classes that only pad a tile to a power of two cost nothing. Arithmetic is in
float32: values are widened when they are loaded and narrowed when they are stored. Offsets are 64 bits wide.

Kernels take structures as NamedTuples. Two limits of Triton 3.6 shape them. It loses the constants of a tuple inside
another tuple, so no tuple holds another one. It cannot compare with None a tuple that holds None, so a structure with
optional fields is never None itself; its ``ptr`` is None instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl


class View(NamedTuple):
    """A tensor as ``[N, C, S]``, its spatial axes collapsed to one. Strides count elements; an absent axis has 0."""

    ptr: Any
    stride_n: int
    stride_c: int
    stride_s: int


@dataclass(frozen=True)
class Tile:
    """The shape of a tile and its place in registers; made by :func:`calseg.kernels.launch.choose_tile`.

    ``ALIGN_C`` and ``ALIGN_S`` divide every stride of their axis, the stride of the batch and S. The compiler must know
    them to make wide loads. ``VEC_C`` or ``VEC_S`` adjacent elements go to one thread.

    ``LANE_MAJOR`` orders the rows by lane: first class 0 of every noise quad, then class 1 of every quad, and so on.
    With few voxels to a row, Triton spreads the rows over the threads. This order keeps a quad in one thread.
    """

    BLOCK_C: int
    TILE: int
    ALIGN_C: int = 1
    ALIGN_S: int = 1
    VEC_C: int = 1
    VEC_S: int = 1
    LANE_MAJOR: bool = False


# ---- where a tile lies ----


@triton.jit
def multiple(stride, ALIGN: tl.constexpr):
    """Return ``stride``, and tell the compiler that it is a multiple of ALIGN."""
    return stride // ALIGN * ALIGN if ALIGN > 1 else stride


@triton.jit
def locate(step, S, tile: tl.constexpr):
    """Return the batch item of tile number ``step``, its first voxel, and a mask of the TILE voxels that exist."""
    tiles = tl.cdiv(S, tile.TILE).to(tl.int32)
    n = (step // tiles).to(tl.int64)
    first = (step % tiles).to(tl.int64) * tile.TILE
    left = tl.minimum(multiple(S, tile.ALIGN_C) - first, tile.TILE).to(tl.int32)
    return n, first, tl.arange(0, tile.TILE) < left


@triton.jit
def classes(start, tile: tl.constexpr):
    """Return the class of every row of the tile, counted from ``start``."""
    row = tl.arange(0, tile.BLOCK_C)
    if tile.LANE_MAJOR:
        row = 4 * (row % (tile.BLOCK_C // 4)) + row // (tile.BLOCK_C // 4)
    return start + row


# ---- tensors with a class axis ----


@triton.jit
def pointers(x, n, first, c, tile: tl.constexpr):
    """Return pointers ``[BLOCK_C, TILE]`` to the classes ``c`` of the tile's voxels."""
    VEC_C: tl.constexpr = tile.VEC_C
    VEC_S: tl.constexpr = tile.VEC_S
    stride_s = multiple(x.stride_s, tile.ALIGN_S)
    start = x.ptr + n * multiple(x.stride_n, tile.ALIGN_C * tile.ALIGN_S) + first * stride_s
    rows = c.to(tl.int64) * multiple(x.stride_c, tile.ALIGN_C)
    columns = tl.arange(0, tile.TILE).to(tl.int64) * stride_s
    tile_pointers = start + (rows[:, None] + columns[None, :])
    if VEC_C * VEC_S == 1:
        # Give the alignment only. Told that neither axis is contiguous, Triton 3.6 spreads the classes over a warp.
        BYTES: tl.constexpr = x.ptr.dtype.element_ty.primitive_bitwidth // 8
        tile_pointers = tl.multiple_of(tile_pointers, [BYTES, BYTES])
    else:
        tile_pointers = tl.max_contiguous(tile_pointers, [VEC_C, VEC_S])
    return tile_pointers


@triton.jit
def load(x, n, first, inside, ok, c, C: tl.constexpr, tile: tl.constexpr):
    """Load classes ``c`` of the tile as float32; 0 past class C and where a voxel does not count, even over a NaN."""
    mask = (c < C)[:, None] & inside[None, :]
    values = tl.load(pointers(x, n, first, c, tile), mask=mask, other=0.0).to(tl.float32)
    return values if ok is None else tl.where(ok[None, :], values, 0.0)


@triton.jit
def store(x, n, first, inside, c, values, C: tl.constexpr, tile: tl.constexpr):
    """Store what :func:`load` loads."""
    mask = (c < C)[:, None] & inside[None, :]
    tl.store(pointers(x, n, first, c, tile), values.to(x.ptr.dtype.element_ty), mask=mask)


# ---- tensors without a class axis ----


@triton.jit
def voxel_pointers(x, n, first, tile: tl.constexpr):
    """Return pointers ``[TILE]`` to the tile's voxels in a tensor without class axis."""
    VEC_S: tl.constexpr = tile.VEC_S
    start = x.ptr + n * x.stride_n + first * x.stride_s
    return tl.max_contiguous(start + tl.arange(0, tile.TILE).to(tl.int64) * x.stride_s, [VEC_S])


@triton.jit
def store_voxels(x, n, first, inside, values, tile: tl.constexpr):
    """Store a number for every voxel."""
    tl.store(voxel_pointers(x, n, first, tile), values.to(x.ptr.dtype.element_ty), mask=inside)
