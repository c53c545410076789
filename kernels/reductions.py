"""Reduction of a loss over voxels: the divisors of the mean, the sum over voxels, and the upstream gradient.

All sums are added in a fixed order: first within each program, then over the programs. No kernel uses atomic additions,
and the host never waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from calseg.kernels import launch as host
from calseg.kernels.labels import Labels, label_weights, load_labels
from calseg.kernels.launch import Call
from calseg.kernels.tile import Tile, View, locate, num_tiles, store_voxels, voxel_pointers
from torch import Tensor

SCAN_BYTES = 16  # that a thread of scan_labels loads at once
SCAN_WARPS = 16
MAX_SUMS = 256
FINISH_BLOCK = 4096


class Upstream(NamedTuple):
    """The upstream gradient of every voxel: a factor, divided by the divisors of the mean, times a tensor ``[N, S]``.

    The factor, which also multiplies the loss, is ``scale`` times ``factor``, a 0-d tensor or None. ``sums``
    ``[2, NUM_SUMS]`` holds partial sums of the divisors of the loss and of the KL term. It is None if there are no
    divisors, or if ``scale`` includes them. ``ptr`` is the tensor ``[N, S]``, and None if that is 1 everywhere.
    """

    scale: float
    factor: Any = None
    sums: Any = None
    ptr: Any = None
    stride_n: int | None = None
    stride_s: int | None = None


class LossArguments(NamedTuple):
    """The arguments of the launch of any loss.

    ``tensors`` and ``gradients`` are :class:`calseg.operations.LossTensors` of views. At most one of ``loss`` and
    ``partials`` is given. ``loss`` receives the loss of every voxel. ``partials`` receives the sums of every program
    over its voxels.
    """

    tensors: Any
    gradients: Any
    labels: Labels
    upstream: Upstream
    loss: View | None
    partials: Tensor | None
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
def load_upstream(upstream, n, first, inside, ok, NUM_SUMS: tl.constexpr, tile: tl.constexpr):
    """Return the upstream gradients of the loss and of the KL term of every voxel. They are 0 where ``ok`` is false."""
    of_loss = tl.full([tile.TILE], 0.0, tl.float32) + load_factor(upstream)
    of_kl = of_loss
    if upstream.sums is not None:
        loss_divisor, kl_divisor = divisors(upstream.sums, NUM_SUMS)
        of_loss, of_kl = of_loss / loss_divisor, of_kl / kl_divisor
    if upstream.ptr is not None:
        factor = tl.load(voxel_pointers(upstream, n, first, tile), mask=inside, other=0.0).to(tl.float32)
        of_loss, of_kl = of_loss * factor, of_kl * factor
    return tl.where(ok, of_loss, 0.0), tl.where(ok, of_kl, 0.0)


# ---- the divisors of the mean ----


@triton.jit
def scan_labels(
    labels,  # [N, S]
    weight,  # [C] or None
    sums,  # out [2, NUM_SUMS]: sums of the weights of the labels, numbers of voxels that count
    N,
    S,
    C: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    IS_MASK: tl.constexpr,
    tile: tl.constexpr,
):
    """Compute partial sums of the divisors of the mean, one per program."""
    steps = tl.cast(N, tl.int64) * num_tiles(S, tile)
    weights = tl.full([tile.TILE], 0.0, tl.float32)
    counts = tl.full([tile.TILE], 0, tl.int32)
    for step in range(tl.program_id(0).to(tl.int64), steps, NUM_SUMS):
        n, first, inside = locate(step, S, tile)
        label, ok, _ = load_labels(labels, n, first, inside, C, IS_MASK, tile)
        counts += ok.to(tl.int32)
        if weight is not None:
            weights += label_weights(weight, label, C)
    count = tl.sum(counts, 0).to(tl.float32)
    tl.store(sums + NUM_SUMS + tl.program_id(0), count)
    tl.store(sums + tl.program_id(0), tl.sum(weights, 0) if weight is not None else count)


def mean_divisors(call: Call, labels: Labels, is_mask: bool, weight: Tensor | None) -> tuple[Tensor, int]:
    """Return partial sums of the divisors of the loss and of the KL term, ``[2, NUM_SUMS]``, and NUM_SUMS."""
    (N, C, S), like = call.geometry[:3], call.like
    if labels.stride_n == S * labels.stride_s:  # the items are one row of labels
        N, S = 1, N * S
    itemsize = labels.ptr.element_size()
    voxels = host.WARP * SCAN_WARPS * max(1, SCAN_BYTES // itemsize)
    tile = Tile(1, voxels, VEC_S=host.VECTOR_BYTES // itemsize)
    num_sums = host.power_of_two(min(N * triton.cdiv(S, voxels), MAX_SUMS))
    sums = torch.empty((2, num_sums), dtype=torch.float32, device=like.device)
    host.launch_kernel(
        scan_labels, num_sums, like, (labels, weight, sums, N, S, C, num_sums, is_mask, tile), SCAN_WARPS
    )
    return sums, num_sums


# ---- the sum over voxels ----


@triton.jit
def store_sum(partials, row: tl.constexpr, values):
    """Store the sum of this program over its voxels. Row 0 is for the loss, row 1 for the KL term."""
    tl.store(partials + row * tl.num_programs(0).to(tl.int64) + tl.program_id(0), tl.sum(values, 0))


@triton.jit
def store_loss(loss, partials, upstream, value, kl, beta, n, first, inside, tile: tl.constexpr):
    """Store the loss of every voxel, times its factor, or this program's share of the sums.

    ``kl`` is None where there is no KL term.
    """
    if loss is not None:
        value = value if kl is None else value + beta * kl
        store_voxels(loss, n, first, inside, load_factor(upstream) * value, tile)
    if partials is not None:
        store_sum(partials, 0, value)
        if kl is not None:
            store_sum(partials, 1, kl)


@triton.jit
def finish_loss(
    partials,  # [1 or 2, num_partials]: sums of the loss and of the KL term
    upstream,
    out,  # out []
    num_partials,
    beta,
    WITH_KL: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the reduced loss from the partial sums. The kernel has one program."""
    i = tl.arange(0, BLOCK)
    loss = tl.full([BLOCK], 0.0, tl.float32)
    kl = loss
    for start in range(0, tl.cast(num_partials, tl.int64), BLOCK):
        mask = start + i < num_partials
        loss += tl.load(partials + start + i, mask=mask, other=0.0)
        if WITH_KL:
            kl += tl.load(partials + num_partials + start + i, mask=mask, other=0.0)
    factor = load_factor(upstream)
    value, kl_value = tl.sum(loss, 0) * factor, tl.sum(kl, 0) * factor
    if upstream.sums is not None:
        loss_divisor, kl_divisor = divisors(upstream.sums, NUM_SUMS)
        value, kl_value = value / loss_divisor, kl_value / kl_divisor
    if WITH_KL:
        value += beta * kl_value
    tl.store(out, value.to(out.dtype.element_ty))


def reduced_loss(call: Call, spec: Any, given: LossArguments) -> Tensor:
    """Return the reduced loss from the partial sums."""
    value = torch.empty((), dtype=spec.dtype, device=call.like.device)
    block = min(FINISH_BLOCK, host.power_of_two(call.programs))
    beta = spec.sampling.beta if given.with_kl else 0.0
    arguments = (given.partials, given.upstream, value, call.programs, beta, given.with_kl, given.num_sums, block)
    host.launch_kernel(finish_loss, 1, call.like, arguments, 8)
    return value
