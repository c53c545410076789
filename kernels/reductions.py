"""The small kernels around a loss: the mean's divisors before it, its sum after it, the upstream factor in backward.

Sums are made in a fixed order, of a program and then over programs: no atomics, and nothing waits for the host.
"""

from __future__ import annotations

import triton
import triton.language as tl
from calseg.kernels.common import divisors, label_weights, load_labels, locate


@triton.jit
def scan_labels(
    labels,  # [N, S]
    weight,  # [C] or None
    sums,  # out [2, NUM_SUMS]: weights of the labels, voxels that count
    N,
    S,
    C: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    IS_MASK: tl.constexpr,
    tile: tl.constexpr,
):
    """The mean's divisors, as one share a program."""
    steps = N * tl.cdiv(S, tile.TILE).to(tl.int32)
    weights = tl.full([tile.TILE], 0.0, tl.float32)
    counts = tl.full([tile.TILE], 0, tl.int32)
    for step in range(tl.program_id(0), steps, NUM_SUMS):
        n, first, inside = locate(step, S, tile)
        label, ok, _ = load_labels(labels, n, first, inside, C, IS_MASK, tile)
        counts += ok.to(tl.int32)
        if weight is not None:
            weights += label_weights(weight, label, C)
    count = tl.sum(counts, 0).to(tl.float32)
    tl.store(sums + NUM_SUMS + tl.program_id(0), count)
    tl.store(sums + tl.program_id(0), tl.sum(weights, 0) if weight is not None else count)


@triton.jit
def finish_loss(
    partials,  # [1 or 2, num_partials]: the loss and the KL term
    sums,  # [2, NUM_SUMS] or None
    out,  # out []
    num_partials,
    scale,
    beta,
    WITH_KL: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of all voxels, by one program."""
    i = tl.arange(0, BLOCK)
    loss = tl.full([BLOCK], 0.0, tl.float32)
    kl = loss
    for start in range(0, num_partials, BLOCK):
        mask = start + i < num_partials
        loss += tl.load(partials + start + i, mask=mask, other=0.0)
        if WITH_KL:
            kl += tl.load(partials + num_partials + start + i, mask=mask, other=0.0)
    value, kl_value = tl.sum(loss, 0) * scale, tl.sum(kl, 0) * scale
    if sums is not None:
        loss_divisor, kl_divisor = divisors(sums, NUM_SUMS)
        value, kl_value = value / loss_divisor, kl_value / kl_divisor
    if WITH_KL:
        value += beta * kl_value
    tl.store(out, value.to(out.dtype.element_ty))


@triton.jit
def scale_gradient(
    gradient,  # in and out: contiguous memory
    factor,  # []
    size,
    BLOCK: tl.constexpr,
):
    """``gradient *= factor``; where that is 1, as in most backward passes, no memory is touched."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            i = start + tl.arange(0, BLOCK)
            values = tl.load(gradient + i, mask=i < size).to(tl.float32)
            tl.store(gradient + i, (values * by).to(gradient.dtype.element_ty), mask=i < size)
