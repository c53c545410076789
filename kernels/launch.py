"""Launch of kernels: the choice of a tile, the views of tensors that a kernel takes, and the launch itself.

If one thread can hold all classes of a voxel in registers, it does, and no sum over classes needs another thread. More
classes are spread over the threads of a program, in rows of at least a sector of memory. If a program cannot hold all
classes, it takes them block by block. The module is plain Python, so tests call it without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from calseg.kernels.tile import Tile, View
from torch import Tensor
from triton.compiler import CompiledKernel

from calseg.installation import extension

WARP = 32
VECTOR_BYTES = 16  # the widest load of a thread
SECTOR_BYTES = 32  # the least length of a row of a tile
MAX_WARPS = 16
MAX_VOXELS = 8  # of a thread that holds all their classes: with more, the compiler loads them one after the other
MAX_ALIGN = 16
ENOUGH_WARPS = 8192  # of all programs: four times as many as an H100 or H200 holds at once, or more
MAX_PROGRAMS = 2**31 - 1  # the limit of CUDA
MAX_KEPT = 4096  # plans, and compiled kernels, that are kept for the next call of the same kind

Strides = tuple[int, int, int]


class TileDemands(NamedTuple):
    """The demands of a kernel on its tiles.

    Attributes:
        held: the most elements that a thread can hold, if it holds all classes of its voxels.
        fill: the least elements that a thread should get, if it holds all classes of its voxels.
        spread: the elements of a thread, if the classes of a voxel are spread over threads.
        noise: the kernel draws noise, which comes in quads.
        classes: the most classes of which a thread can hold all, if fewer than ``held``: it has other numbers of each
            class too. None if there are no such numbers.
        adjacent: the most adjacent voxels that a thread loads at once, if the classes are spread over threads.
        tiles: the most tiles that a program takes, one after the other. If above 1, threads add up what they have.
    """

    held: int
    fill: int
    spread: int
    noise: bool = False
    classes: int | None = None
    adjacent: int = 2
    tiles: int = 1


# The number of registers of a thread limits these numbers: see the resource figures in benchmarks/notes.md.
HARD = TileDemands(held=66, fill=32, spread=64)
WEIGHTED = TileDemands(held=32, fill=32, spread=16)  # a thread also holds the class weights
SOFT = TileDemands(held=32, fill=16, spread=16)
OVERLAP = TileDemands(held=66, fill=8, spread=64, classes=44, adjacent=4, tiles=8)  # its sums, with one-hot labels
SLOPES = TileDemands(held=32, fill=56, spread=64, classes=16)  # the gradient of that
TOP_LABEL = TileDemands(held=56, fill=16, spread=32)  # calibration bins of the top label
BINS = TileDemands(held=32, fill=16, spread=16)  # of every class
SAMPLED = TileDemands(held=16, fill=8, spread=16, noise=True)


class Geometry(NamedTuple):
    """The shape ``[N, C, S]`` of a call, and the strides ``(n, c, s)`` of its tensors.

    ``scores`` are the tensors with a class axis, ``voxels`` those without. Strides count elements. Absent tensors have
    no entry.
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


def choose_tile(demands: TileDemands, geometry: Geometry, itemsize: int) -> tuple[Tile, int]:
    """Return the tile of a kernel and its number of warps.

    Args:
        demands: the demands of the kernel on its tile.
        geometry: the geometry of the call.
        itemsize: the bytes of an element of the narrowest tensor.
    """
    C, S, scores = geometry.C, geometry.S, geometry.scores
    quads = demands.noise and C > 2
    rows = -(-C // 4) * 4 if demands.noise else C
    block = power_of_two(rows if quads else C)
    if C > 1 and all(c == 1 for _, c, _ in scores):
        return _channels_last(demands, geometry, block, itemsize)
    align = 1
    if all(s == 1 for _, _, s in scores):
        align = common_alignment(S, *(stride for n, c, _ in scores for stride in (n, c)))
    # Noise is drawn with one voxel per thread. A tile of that layout needs no conversion.
    vector = 1 if demands.noise else min(align, VECTOR_BYTES // itemsize)
    if rows <= (demands.classes or demands.held):
        while vector * rows > demands.held:
            vector //= 2
        voxels = vector
        while 2 * voxels * rows <= demands.fill and voxels < MAX_VOXELS:
            voxels *= 2
        return Tile(block, 4 * WARP * voxels, align, 1, 1, vector, quads, voxels // vector), 4
    vector = min(vector, demands.adjacent)
    width, narrowest, spread = WARP * max(1, vector // 2), SECTOR_BYTES // itemsize, demands.spread
    if demands.classes is not None:  # with fewer adjacent voxels, a thread has more classes, and their numbers
        spread = spread * vector // demands.adjacent
    if demands.noise and block > 64:
        spread //= 2  # with so many classes, one program would take all registers of a multiprocessor
    width = max(width, WARP * spread // block)
    while block * width > 8 * WARP * spread and width > narrowest:
        width //= 2
    block = min(block, MAX_WARPS * WARP * spread // width)
    return Tile(block, width, align, 1, 1, vector, quads), block * width // (WARP * spread)


def _channels_last(demands: TileDemands, geometry: Geometry, block: int, itemsize: int) -> tuple[Tile, int]:
    """Do as :func:`choose_tile` for tensors in which the classes of a voxel are adjacent."""
    align = common_alignment(*(stride for n, _, s in geometry.scores for stride in (n, s)))
    spread = 8 if demands.noise else min(demands.spread, 16)
    if demands.tiles > 1 and not 4 < block < 32:  # in a loop, the compiler loads more one after the other
        spread = 8
    block = min(block, MAX_WARPS * WARP * spread)
    vector = min(align, 4 if demands.noise else VECTOR_BYTES // itemsize, block)
    # If a thread loads one class at a time, the classes of a voxel lie in many threads. Let these be of one warp.
    voxels = max(1, (1 if vector == 1 else 4) * WARP * spread // block)
    warps = max(1, block * voxels // (WARP * spread))
    of_class = max(vector, block // WARP)  # that a thread holds of a voxel
    return Tile(block, voxels, 1, align, vector, 1, GROUPS=max(1, min(voxels, spread // of_class))), warps


def num_programs(geometry: Geometry, tile: Tile, num_warps: int, most_tiles: int) -> int:
    """Return the number of programs, each with up to ``most_tiles`` tiles of one batch item.

    They have fewer tiles if there were too few programs, so that those that are done last do not leave a GPU idle.
    """
    tiles = -(-geometry.S // tile.TILE)
    if tile.BLOCK_C < geometry.C:
        most_tiles = 1
    of_program = min(most_tiles, geometry.N * tiles * num_warps // ENOUGH_WARPS)
    return geometry.N * -(-tiles // max(1, of_program))


class Plan(NamedTuple):
    """What the shapes, the strides and the dtypes of a call say of its launches.

    ``in_cuda`` says that the main kernel is one in CUDA C++. A program is a block of its threads.
    """

    geometry: Geometry
    tile: Tile
    num_warps: int
    programs: int
    in_cuda: bool = False


def plan(
    demands: TileDemands, geometry: Geometry, scores: Sequence[Tensor | None], block_voxels: int | None = None
) -> Plan:
    """Return the plan of a call with these tensors with a class axis. An absent one is None.

    ``block_voxels`` is the number of voxels of a block of the kernel in CUDA C++, if that one is to run.

    Raises:
        ValueError: there are more voxels than programs can take.
    """
    present = [tensor for tensor in scores if tensor is not None]
    if block_voxels is not None:
        tile, num_warps = Tile(power_of_two(geometry.C), block_voxels), 4
    else:
        tile, num_warps = choose_tile(demands, geometry, min(tensor.element_size() for tensor in present))
    programs = num_programs(geometry, tile, num_warps, 1 if block_voxels is not None else demands.tiles)
    if programs > MAX_PROGRAMS:
        voxels, most = geometry.N * geometry.S, MAX_PROGRAMS * tile.TILE
        raise ValueError(f"{tuple(present[0].shape)}: got {voxels} voxels, wanted up to {most} on a GPU")
    return Plan(geometry, tile, num_warps, programs, block_voxels is not None)


class Call:
    """A call of an operation: the views of its tensors, and the tile into which its work is cut.

    Args:
        plan: the plan of the call.
        scores: the tensors with a class axis. An absent one is None. The first other one gives the device.
        voxels: the tensors without a class axis. An absent one is None.
    """

    __slots__ = ("C", "S", "geometry", "in_cuda", "like", "num_warps", "programs", "scores", "tile", "voxels")

    def __init__(self, plan: Plan, scores: Sequence[Tensor | None], voxels: Sequence[Tensor | None] = ()) -> None:
        self.geometry, self.tile, self.num_warps, self.programs, self.in_cuda = plan
        _, self.C, self.S, of_scores, of_voxels = plan.geometry
        self.like = next(tensor for tensor in scores if tensor is not None)
        self.scores, self.voxels = _views(scores, of_scores), _views(voxels, of_voxels)

    def launch(self, kernel: Any, *arguments: Any) -> None:
        """Launch a kernel with the programs of the plan. The tile is added as its last argument."""
        launch_kernel(kernel, self.programs, self.like, (*arguments, self.tile), self.num_warps)


def _views(tensors: Sequence[Tensor | None], strides: Sequence[Strides]) -> list[View | None]:
    """Return a view of every tensor, and None for an absent one."""
    remaining = iter(strides)
    return [None if tensor is None else View(tensor, *next(remaining)) for tensor in tensors]


# ---- launches ----
#
# Triton looks at every argument of every launch, to find the kernel that it compiled for arguments of this kind. That
# takes ten times as long as the launch. So a compiled kernel is kept by a key that holds all that Triton looks at.

_kept: dict[tuple[Any, ...], CompiledKernel] = {}


def _key(
    kernel: Any, programs: int, device: int, arguments: Sequence[Any], num_warps: int
) -> tuple[Any, ...] | None:  # fmt: skip
    """Return the key of the compiled kernel for a launch on a device, or None if there is none.

    Triton's interpreter compiles nothing, and without the extension Triton looks for the kernel itself.
    """
    if extension is None or not isinstance(kernel, triton.JITFunction):
        return None
    key = [kernel.fn, programs, device, num_warps]
    if kernel.do_not_specialize:
        names = kernel.do_not_specialize
        arguments = [None if n in names else a for n, a in zip(kernel.arg_names, arguments, strict=True)]
    extension.add_to_launch_key(tuple(arguments), key)
    return tuple(key)


def _keep(key: tuple[Any, ...] | None, compiled: Any) -> None:
    """Keep a compiled kernel for an NVIDIA GPU. For others, Triton looks at more: the size of a tensor, on AMD."""
    if key is not None and isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
        if len(_kept) >= MAX_KEPT:
            _kept.clear()
        _kept[key] = compiled


def _is_observed() -> bool:
    """Return whether a profiler, such as Triton's, wants to hear of every launch."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def stream_of(like: Tensor) -> int:
    """Return the current stream of the device of a tensor, as a number. In Triton's interpreter there is one."""
    return 0 if like.is_cpu else int(triton.runtime.driver.active.get_current_stream(like.get_device()))


def launch_kernel(kernel: Any, programs: int, like: Tensor, arguments: Sequence[Any], num_warps: int) -> None:
    """Launch ``programs`` programs of a kernel on the device of ``like``, on its current stream."""
    if programs == 0:
        return
    device = like.get_device()
    if device >= 0:
        module = torch.get_device_module(like.device)
        if module.current_device() != device:
            with module.device(device):
                _launch(kernel, programs, like, device, arguments, num_warps)
            return
    _launch(kernel, programs, like, device, arguments, num_warps)


def _launch(
    kernel: Any, programs: int, like: Tensor, device: int, arguments: Sequence[Any], num_warps: int
) -> None:  # fmt: skip
    """Launch a kernel on the current device."""
    key = _key(kernel, programs, device, arguments, num_warps)
    compiled = None if key is None else _kept.get(key)
    if compiled is not None and not _is_observed():
        stream = triton.runtime.driver.active.get_current_stream(device)
        compiled.run(
            programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments
        )  # fmt: skip
        return
    try:
        # Request fused multiply-adds, which are Triton's default today.
        compiled = kernel[(programs,)](*arguments, num_warps=num_warps, enable_fp_fusion=True)
    except RuntimeError as error:
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{kernel.fn.__name__}: the launch failed while a CUDA graph is captured. Run the step once before "
                "the capture, with tensors of the same shapes, dtypes and layouts: the first launch compiles and "
                "loads the kernel"
            ) from error
        raise
    _keep(key, compiled)
