"""How work is cut into tiles, how the kernels see tensors, and the launch. Plain Python: tests call it without a GPU.

Classes of one voxel stay in one thread as long as its registers hold them: then no sum over classes needs another
thread. More classes are spread over the threads of a program, in rows of at least a sector of memory. Still more are
taken block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
from calseg.kernels.common import Tile, View
from torch import Tensor

WARP = 32
VECTOR_BYTES = 16  # the widest load of a thread
SECTOR_BYTES = 32  # the least that a row of a tile spans
MAX_WARPS = 16
MAX_ALIGN = 16

Strides = tuple[int, int, int]


class Kind(NamedTuple):
    """What a kernel asks of its tiles: how many elements a thread can hold at most, and is given at least, where all
    classes of a voxel are in it; how many where they are spread; whether it draws noise, which comes in quads.
    """

    held: int
    fill: int
    spread: int
    noise: bool = False


# Bounded by registers: see the resource figures in benchmarks/notes.md.
HARD = Kind(held=64, fill=32, spread=16)
WEIGHTED = Kind(held=32, fill=32, spread=16)  # class weights and smoothing: the weights too are in registers
SOFT = Kind(held=32, fill=16, spread=16)
BINS = Kind(held=32, fill=16, spread=16)
SAMPLED = Kind(held=16, fill=8, spread=8, noise=True)


class Geometry(NamedTuple):
    """``[N, C, S]`` of a call, and how the tensors with and without class axis are walked (strides in elements)."""

    N: int
    C: int
    S: int
    scores: list[Strides]
    voxels: list[Strides]


def merge_items(geometry: Geometry) -> Geometry:
    """Batch items that lie behind one another in every tensor are one long item: a voxel's number stays the same."""
    N, C, S, scores, voxels = geometry
    everything = scores + voxels
    if S == 1:
        turn = lambda strides: [(0, c, n) for n, c, _ in strides]  # noqa: E731
        return Geometry(1, C, N, turn(scores), turn(voxels))
    if N == 1 or all(n == S * s for n, _, s in everything):
        keep = lambda strides: [(0, c, s) for _, c, s in strides]  # noqa: E731
        return Geometry(1, C, N * S, keep(scores), keep(voxels))
    return geometry


def common_alignment(*numbers: int) -> int:
    """The largest power of two, up to MAX_ALIGN, that divides all."""
    bits = MAX_ALIGN
    for number in numbers:
        bits |= number
    return bits & -bits


def power_of_two(number: int) -> int:
    """The next one from ``number`` on."""
    return 1 << (number - 1).bit_length()


def choose_tile(kind: Kind, geometry: Geometry, itemsize: int) -> tuple[Tile, int]:
    """The tile of a kernel and its number of warps.

    Args:
        kind: of the kernel.
        geometry: of the call.
        itemsize: of the narrowest tensor, in bytes.
    """
    C, S, scores = geometry.C, geometry.S, geometry.scores
    quads = kind.noise and C > 2
    rows = -(-C // 4) * 4 if kind.noise else C  # of up to two classes, several samples are held at once
    block = power_of_two(rows if quads else C)
    if C > 1 and all(c == 1 for _, c, _ in scores):
        return _channels_last(kind, geometry, block, itemsize)
    align = 1
    if all(s == 1 for _, _, s in scores):
        align = common_alignment(S, *(stride for n, c, _ in scores for stride in (n, c)))
    # noise is made one voxel a thread: its layout then is that of the tiles
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
    align = common_alignment(*(stride for n, _, s in geometry.scores for stride in (n, s)))
    block = min(block, MAX_WARPS * WARP * kind.spread)
    vector = min(align, 4 if kind.noise else VECTOR_BYTES // itemsize, block)
    voxels = max(1, 4 * WARP * kind.spread // block)
    warps = max(1, block * voxels // (WARP * kind.spread))
    return Tile(block, voxels, 1, align, vector, 1), warps


def num_programs(geometry: Geometry, tile: Tile) -> int:
    """One for every tile."""
    return geometry.N * triton.cdiv(geometry.S, tile.TILE)


def view(tensor: Tensor, strides: Strides) -> View:
    """A tensor as the kernels take it."""
    return View(tensor, *strides)


def launch(kernel: Any, programs: int, like: Tensor, arguments: Sequence[Any], num_warps: int) -> None:
    """Run ``programs`` programs on the device and the current stream of ``like``."""
    if programs == 0:
        return
    on_device = nullcontext() if like.device.type == "cpu" else torch.get_device_module(like.device).device(like.device)
    with on_device:
        # fused multiply-adds, whatever Triton's default becomes
        kernel[(programs,)](*arguments, num_warps=num_warps, enable_fp_fusion=True)
