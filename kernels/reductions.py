"""Reduction of a loss over voxels: the divisors of the mean, the sum over voxels, and the upstream gradient.

All sums are added in a fixed order: first within each program, then over the programs. No sum is added up by atomic
additions, and the host never waits for the device.

In a call of many programs, small kernels before and after the main one compute the divisors and the sum over programs.
A call of few programs is over before the host has launched them. There, the main kernel does all: programs count the
voxels that matter beside the loss, and the last program that is done adds up the sums of all. It knows the divisor only
then, so the gradients are those for a divisor of all voxels, and lack the correction that the program stores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from calseg.kernels import launch as host
from calseg.kernels.labels import Labels, label_weights, load_labels
from calseg.kernels.launch import Call
from calseg.kernels.tile import Tile, View, locate, num_tiles, store_voxels, thread_sums, voxel_pointers
from torch import Tensor

SCAN_BYTES = 32  # that a thread of scan_labels loads at once
SCAN_WARPS = 16
MAX_SUMS = 1024
FINISH_BLOCK = 4096
FEW_PROGRAMS = 2048  # with 4 classes, 2^21 voxels: on an H100 their traffic takes about 25 us, and a launch 5
FEW_SUMS = tl.constexpr(1024)  # that the last program adds at once


class Upstream(NamedTuple):
    """The upstream gradient of every voxel: a factor, divided by the divisors of the mean, times a tensor ``[N, S]``.

    The factor, which also multiplies the loss, is ``scale`` times ``factor``, a 0-d tensor or None. ``sums``
    ``[2, NUM_SUMS]`` holds the divisors of the loss and of the KL term, as partial sums if NUM_SUMS is above 1. It is
    None if there are no divisors, or if ``scale`` includes them. ``ptr`` is the tensor ``[N, S]``, and None if that is
    1 everywhere.
    """

    scale: float
    factor: Any = None
    sums: Any = None
    ptr: Any = None
    stride_n: int | None = None
    stride_s: int | None = None


class Partials(NamedTuple):
    """The sums of every program over its voxels, from which the reduced loss is computed.

    ``ptr`` is ``[rows, programs]`` and one number more, in a row. The rows are the loss, the KL term if there is one,
    and the number of voxels that count if ``voxels``, the number of all, is given. It is None if no sum is wanted.

    With ``counter``, the program that is done last stores the reduced loss in ``loss``, sets the counter back to 0, and
    stores the correction of the gradients after the rows: ``voxels`` divided by the voxels that count.
    """

    ptr: Any = None
    counter: Any = None
    loss: Any = None
    voxels: float | None = None


class LossArguments(NamedTuple):
    """The arguments of the launch of any loss.

    ``tensors`` and ``gradients`` are :class:`calseg.operations.LossTensors` of views. At most one of ``loss`` and
    ``partials.ptr`` is given. ``loss`` receives the loss of every voxel.
    """

    tensors: Any
    gradients: Any
    labels: Labels
    upstream: Upstream
    loss: View | None
    partials: Partials
    num_sums: int  # length of ``upstream.sums``
    with_kl: bool  # the loss has a KL term
    overlap: Tensor | None = None  # receives the overlap of every program: see calseg.kernels.overlap
    grad_overlap: Tensor | None = None  # gradient of the overlap


# ---- the upstream gradient ----


@triton.jit
def load_factor(upstream):
    """Return the factor of the loss, a number."""
    scale = upstream.scale
    return scale if upstream.factor is None else scale * tl.load(upstream.factor).to(tl.float32)


@triton.jit
def divisors(sums, NUM_SUMS: tl.constexpr):
    """Return the divisors of the mean: of the loss, and of the KL term."""
    i = tl.arange(0, NUM_SUMS)
    return tl.sum(tl.load(sums + i), 0), tl.sum(tl.load(sums + NUM_SUMS + i), 0)


@triton.jit
def load_scales(upstream, NUM_SUMS: tl.constexpr):
    """Return the factor of the loss and the divisors of the loss and of the KL term: three numbers for all voxels.

    A kernel calls it first, so that it waits for these numbers and for its tile at the same time.
    """
    loss_divisor, kl_divisor = 1.0, 1.0
    if upstream.sums is not None:
        loss_divisor, kl_divisor = divisors(upstream.sums, NUM_SUMS)
    return tl.cast(load_factor(upstream), tl.float32), loss_divisor, kl_divisor


@triton.jit
def load_upstream(upstream, scales, n, first, inside, ok, tile: tl.constexpr):
    """Return the upstream gradients of the loss and of the KL term of every voxel, given :func:`load_scales`.

    They are 0 where ``ok`` is false.
    """
    factor, loss_divisor, kl_divisor = scales
    of_loss, of_kl = factor, factor
    if upstream.sums is not None:
        of_loss, of_kl = factor / loss_divisor, factor / kl_divisor
    if upstream.ptr is not None:
        of_voxel = tl.load(voxel_pointers(upstream, n, first, tile), mask=inside, other=0.0).to(tl.float32)
        of_loss, of_kl = of_loss * of_voxel, of_kl * of_voxel
    return tl.where(ok, of_loss, 0.0), tl.where(ok, of_kl, 0.0)


# ---- the divisors of the mean ----


@triton.jit
def scan_labels(
    labels,  # [N, S]
    weight,  # [C] or None
    sums,  # out [2, NUM_SUMS]: sums of the weights of the labels, numbers of voxels that count
    totals,  # out [2]: their sums, which the program computes that is done last
    counter,  # of programs that are done, or None: then there are no totals
    N,
    S,
    C: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    IS_MASK: tl.constexpr,
    tile: tl.constexpr,
):
    """Compute the divisors of the mean: partial sums, one per program, and their totals."""
    steps = tl.cast(N, tl.int64) * num_tiles(S, tile)
    SUMS: tl.constexpr = tile.TILE // tile.VEC_S
    weights = tl.full([SUMS], 0.0, tl.float32)
    counts = tl.full([SUMS], 0, tl.int32)
    for step in range(tl.program_id(0).to(tl.int64), steps, NUM_SUMS):
        n, first, inside = locate(step, S, tile)
        label, ok, _ = load_labels(labels, n, first, inside, C, IS_MASK, tile)
        counts += thread_sums(ok.to(tl.int32), tile)
        if weight is not None:
            weights += thread_sums(label_weights(weight, label, C), tile)
    count = tl.sum(counts, 0).to(tl.float32)
    tl.store(sums + NUM_SUMS + tl.program_id(0), count)
    tl.store(sums + tl.program_id(0), tl.sum(weights, 0) if weight is not None else count)
    if counter is not None and is_last(counter):
        of_loss, of_kl = divisors(sums, NUM_SUMS)
        tl.store(totals, of_loss)
        tl.store(totals + 1, of_kl)


def mean_divisors(call: Call, labels: Labels, is_mask: bool, weight: Tensor | None) -> tuple[Tensor, int]:
    """Return the divisors of the loss and of the KL term, ``[2, NUM_SUMS]``, and NUM_SUMS: see :class:`Upstream`."""
    (N, C, S), like = call.geometry[:3], call.like
    if labels.stride_n == S * labels.stride_s:  # the items are one row of labels
        N, S = 1, N * S
    itemsize = labels.ptr.element_size()
    voxels = host.WARP * SCAN_WARPS * max(1, SCAN_BYTES // itemsize)
    tile = Tile(1, voxels, VEC_S=host.VECTOR_BYTES // itemsize)
    num_sums = host.power_of_two(min(N * -(-S // voxels), MAX_SUMS))
    sums = torch.empty((2, num_sums), dtype=torch.float32, device=like.device)
    totals = torch.empty((2, 1), dtype=torch.float32, device=like.device)
    counter = None if like.is_xpu else counter_of(like)
    arguments = (labels, weight, sums, totals, counter, N, S, C, num_sums, is_mask, tile)
    host.launch_kernel(scan_labels, num_sums, like, arguments, SCAN_WARPS)
    return (sums, num_sums) if counter is None else (totals, 1)


# ---- the sum over voxels ----


@triton.jit
def store_sum(partials, row: tl.constexpr, value):
    """Store the sum of this program over its voxels in a row of the partial sums."""
    tl.store(partials.ptr + row * tl.num_programs(0).to(tl.int64) + tl.program_id(0), value)


@triton.jit
def store_sums(partials, value, kl, ok):
    """Store the sums of this program, given that of the loss, the KL term of every voxel or None, and which count."""
    store_sum(partials, 0, value)
    if kl is not None:
        store_sum(partials, 1, tl.sum(kl, 0))
    if partials.voxels is not None:
        store_sum(partials, 1 if kl is None else 2, tl.sum(ok.to(tl.float32), 0))


@triton.jit
def store_loss(loss, partials, upstream, value, kl, beta, ok, n, first, inside, tile: tl.constexpr):
    """Store the loss of every voxel, times its factor, or this program's share of the sums.

    ``kl`` is None where there is no KL term.
    """
    if loss is not None:
        value = value if kl is None else value + beta * kl
        store_voxels(loss, n, first, inside, load_factor(upstream) * value, tile)
    if partials.ptr is not None:
        store_sums(partials, tl.sum(value, 0), kl, ok)


@triton.jit
def _added(partials, row: tl.constexpr, num_programs, BLOCK: tl.constexpr):
    """Return the sum of a row of the partial sums, added in an order that is always the same."""
    i = tl.arange(0, BLOCK)
    added = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, num_programs, BLOCK):
        added += tl.load(partials.ptr + row * num_programs + start + i, mask=start + i < num_programs, other=0.0)
    return tl.sum(added, 0)


@triton.jit
def added_loss(
    partials, upstream, beta, num_programs, WITH_KL: tl.constexpr, NUM_SUMS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the reduced loss, and the divisor of its mean if that was computed on the device, else 1."""
    num_programs = tl.cast(num_programs, tl.int64)
    factor = load_factor(upstream)
    value, kl, divisor = _added(partials, 0, num_programs, BLOCK) * factor, 0.0, 1.0
    if WITH_KL:
        kl = _added(partials, 1, num_programs, BLOCK) * factor
    if upstream.sums is not None:
        divisor, kl_divisor = divisors(upstream.sums, NUM_SUMS)
        value, kl = value / divisor, kl / kl_divisor
    if WITH_KL:
        value += beta * kl
    if partials.voxels is not None:
        divisor = _added(partials, 2 if WITH_KL else 1, num_programs, BLOCK)
        value *= partials.voxels / divisor
    return value, divisor


@triton.jit
def _store_reduced(
    partials, upstream, beta, num_programs, WITH_KL: tl.constexpr, NUM_SUMS: tl.constexpr, BLOCK: tl.constexpr
):
    """Store the reduced loss, and the correction of the gradients if voxels were counted."""
    value, count = added_loss(partials, upstream, beta, num_programs, WITH_KL, NUM_SUMS, BLOCK)
    if partials.voxels is not None:
        rows = tl.cast(num_programs, tl.int64) * (3 if WITH_KL else 2)
        # Where no voxel counts, the gradients are 0 already, and must not become NaN.
        tl.store(partials.ptr + rows, tl.where(count == 0.0, 1.0, partials.voxels / count))
    tl.store(partials.loss, value.to(partials.loss.dtype.element_ty))


@triton.jit
def is_last(counter):
    """Count this program as done, and return whether it is the last one. Then the counter is back at 0.

    The addition to the counter releases what this program stored, and acquires what all before it did.
    """
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def finish(partials, upstream, beta, WITH_KL: tl.constexpr, NUM_SUMS: tl.constexpr):
    """Compute the reduced loss, if this is the last program that is done and there is a counter."""
    if partials.counter is not None and is_last(partials.counter):
        _store_reduced(partials, upstream, beta, tl.num_programs(0), WITH_KL, NUM_SUMS, FEW_SUMS)


@triton.jit
def finish_loss(
    partials, upstream, num_partials, beta, WITH_KL: tl.constexpr, NUM_SUMS: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute the reduced loss from the partial sums. The kernel has one program."""
    _store_reduced(partials, upstream, beta, num_partials, WITH_KL, NUM_SUMS, BLOCK)


def finish_block(call: Call) -> int:
    """Return how many programs' sums are added at once."""
    return min(FINISH_BLOCK, host.power_of_two(call.programs))


def launch_finish_loss(call: Call, spec: Any, given: LossArguments) -> None:
    """Launch the kernel that computes the reduced loss from the partial sums."""
    beta = spec.sampling.beta if given.with_kl else 0.0
    arguments = (given.partials, given.upstream, call.programs, beta, given.with_kl, given.num_sums, finish_block(call))
    host.launch_kernel(finish_loss, 1, call.like, arguments, 8)


_counters: dict[tuple[torch.device, int], Tensor] = {}


def counter_of(like: Tensor) -> Tensor:
    """Return a counter of programs that are done, int32 and 0, for a launch on the current stream of a device.

    The launches of a stream run one after the other, and each leaves the counter at 0. So a stream has one. A captured
    graph may be replayed on any stream, and gets one of its own, which each replay sets to 0.
    """
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.zeros((), dtype=torch.int32, device=like.device)
    key = like.device, host.stream_of(like)
    counter = _counters.get(key)
    if counter is None:
        counter = _counters[key] = torch.zeros((), dtype=torch.int32, device=like.device)
    return counter


def partials_of(call: Call, dtype: torch.dtype, rows: int, voxels: float | None, at_once: bool) -> Partials:
    """Return memory for the partial sums of a call and for its loss. With ``at_once``, the main kernel computes it."""
    ptr = torch.empty(rows * call.programs + 1, dtype=torch.float32, device=call.like.device)
    loss = torch.empty((), dtype=dtype, device=call.like.device)
    return Partials(ptr, counter_of(call.like) if at_once else None, loss, voxels)
