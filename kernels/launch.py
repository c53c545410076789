"""The host's side of a launch: how work is cut into tiles, the views that a kernel takes, and the launch itself.

The classes of a voxel stay in one thread as long as its registers hold them. Then no sum over classes needs another
thread. More classes are spread over the threads of a program, in rows of at least a sector of memory. Still more are
taken block by block. All of this is plain Python, so tests call it without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
from calseg.kernels.tile import Tile, View
from torch import Tensor

WARP = 32
VECTOR_BYTES = 16  # the widest load of a thread
SECTOR_BYTES = 32  # the least that a row of a tile spans
MAX_WARPS = 16
MAX_ALIGN = 16

Strides = tuple[int, int, int]


class Kind(NamedTuple):
    """The demands of a kernel on its tiles."""

    held: int  # elements that a thread holds at most, where it has all classes of its voxels
    fill: int  # elements that a thread gets at least, likewise
    spread: int  # elements of a thread where the classes of a voxel are spread over threads
    noise: bool = False  # the kernel draws noise, which comes in quads


# Registers bound these numbers: see the resource figures in benchmarks/notes.md.
HARD = Kind(held=64, fill=32, spread=16)
WEIGHTED = Kind(held=32, fill=32, spread=16)  # weights and smoothing: a thread holds the class weights too
SOFT = Kind(held=32, fill=16, spread=16)
BINS = Kind(held=32, fill=16, spread=16)
SAMPLED = Kind(held=16, fill=8, spread=8, noise=True)


class Geometry(NamedTuple):
    """The shape ``[N, C, S]`` of a call, and the strides ``(n, c, s)`` of its tensors with and without class axis.

    Strides count elements. Tensors that are absent have no entry.
    """

    N: int
    C: int
    S: int
    scores: list[Strides]
    voxels: list[Strides]


def common_alignment(*numbers: int) -> int:
    """Return the largest power of two, up to MAX_ALIGN, that divides all numbers."""
    bits = MAX_ALIGN
    for number in numbers:
        bits |= number
    return bits & -bits


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()


def choose_tile(kind: Kind, geometry: Geometry, itemsize: int) -> tuple[Tile, int]:
    """Return the tile of a kernel and its number of warps.

    Args:
        kind: the demands of the kernel.
        geometry: the geometry of the call.
        itemsize: the bytes of an element of the narrowest tensor.
    """
    C, S, scores = geometry.C, geometry.S, geometry.scores
    quads = kind.noise and C > 2
    rows = -(-C // 4) * 4 if kind.noise else C  # with up to two classes, a quad holds several samples
    block = power_of_two(rows if quads else C)
    if C > 1 and all(c == 1 for _, c, _ in scores):
        return _channels_last(kind, geometry, block, itemsize)
    align = 1
    if all(s == 1 for _, _, s in scores):
        align = common_alignment(S, *(stride for n, c, _ in scores for stride in (n, c)))
    # noise is made one voxel to a thread: tiles with that layout need no conversion
    vector = 1 if kind.noise else min(align, VECTOR_BYTES // itemsize)
    if rows <= kind.held:
        while vector * rows > kind.held:
            vector //= 2
        voxels = vector
        while 2 * voxels * rows <= kind.fill:
            voxels *= 2
        return Tile(block, 4 * WARP * voxels, align, 1, 1, vector, quads), 4
    width, narrowest = WARP, SECTOR_BYTES // itemsize
    while block * width > 8 * WARP * kind.spread and width > narrowest:
        width //= 2
    block = min(block, MAX_WARPS * WARP * kind.spread // width)
    return Tile(block, width, align, 1, 1, min(vector, width), quads), block * width // (WARP * kind.spread)


def _channels_last(kind: Kind, geometry: Geometry, block: int, itemsize: int) -> tuple[Tile, int]:
    """Do as :func:`choose_tile` where the classes of a voxel lie side by side."""
    align = common_alignment(*(stride for n, _, s in geometry.scores for stride in (n, s)))
    block = min(block, MAX_WARPS * WARP * kind.spread)
    vector = min(align, 4 if kind.noise else VECTOR_BYTES // itemsize, block)
    voxels = max(1, 4 * WARP * kind.spread // block)
    warps = max(1, block * voxels // (WARP * kind.spread))
    return Tile(block, voxels, 1, align, vector, 1), warps


def num_programs(geometry: Geometry, tile: Tile) -> int:
    """Return the number of programs: one for every tile."""
    return geometry.N * triton.cdiv(geometry.S, tile.TILE)


class Call:
    """The tensors of a call as its kernels take them, and the tile into which they are cut.

    Args:
        kind: the demands of the kernel on its tiles.
        geometry: the shape and the strides of the tensors.
        scores: the tensors with a class axis, None where one is absent. The first one that is there says the device.
        voxels: the tensors without a class axis, likewise.
    """

    def __init__(
        self, kind: Kind, geometry: Geometry, scores: Sequence[Tensor | None], voxels: Sequence[Tensor | None] = ()
    ) -> None:
        present = [tensor for tensor in scores if tensor is not None]
        self.like, self.geometry = present[0], geometry
        self.C, self.S = geometry.C, geometry.S
        self.tile, self.num_warps = choose_tile(kind, geometry, min(tensor.element_size() for tensor in present))
        self.programs = num_programs(geometry, self.tile)
        self.scores, self.voxels = _views(scores, geometry.scores), _views(voxels, geometry.voxels)

    def launch(self, kernel: Any, *arguments: Any) -> None:
        """Launch a kernel with one program for every tile; the tile is its last argument."""
        launch_kernel(kernel, self.programs, self.like, (*arguments, self.tile), self.num_warps)


def _views(tensors: Sequence[Tensor | None], strides: Sequence[Strides]) -> list[View | None]:
    """Return a view for every tensor that is there."""
    remaining = iter(strides)
    return [None if tensor is None else View(tensor, *next(remaining)) for tensor in tensors]


def launch_kernel(kernel: Any, programs: int, like: Tensor, arguments: Sequence[Any], num_warps: int) -> None:
    """Run ``programs`` programs of a kernel on the device of ``like`` and its current stream."""
    if programs == 0:
        return
    on_device = nullcontext() if like.device.type == "cpu" else torch.get_device_module(like.device).device(like.device)
    with on_device:
        # Ask for fused multiply-adds, whatever Triton's default becomes.
        kernel[(programs,)](*arguments, num_warps=num_warps, enable_fp_fusion=True)
