"""Dice plus cross-entropy from the sums of the overlap, and its slopes: the last kernel of the forward pass.

It also adds up the losses of the programs, as :func:`calseg.kernels.reductions.finish_loss` does for other losses. So
the forward pass takes the main kernel, one that adds the programs' sums of the overlap, and this one. The formulas are
in :mod:`calseg.dice`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from calseg.kernels import launch as host
from calseg.kernels.launch import Call
from calseg.kernels.reductions import LossArguments, added_loss, finish_block
from torch import Tensor

MOST_RATIOS = 256  # that a step of the kernel takes
WARPS = 4


@triton.jit
def mass_of(sums, num_ratios, BLOCK: tl.constexpr):
    """Return the sum of S over items and classes, which is 0 where no voxel counts."""
    i = tl.arange(0, BLOCK)
    mass = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(0, num_ratios, BLOCK):
        mass += tl.load(sums + 2 * (start + i), mask=start + i < num_ratios, other=0.0)
    return tl.sum(mass, 0)


@triton.jit
def finish_dice(
    partials,
    upstream,
    num_partials,
    beta,
    divisor,  # of the mean of the losses, where the host knows it
    sums,  # [N, C, 2], of this process
    all_sums,  # [N, C, 2], over all processes
    class_weight,  # [C] or None
    slopes,  # out [2 N C + 2]
    total,  # out []
    dice_weight,
    ce_weight,
    scale,
    factor,  # [] or None, multiplied with the scale
    smooth,
    gap,  # between the smoothing numbers of denominator and numerator
    items,  # whose sums are added: the batch, or 1
    ratios,  # the product of all other items and the classes
    C,
    first_class,
    WITH_KL: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    SUMS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the loss and its slopes. The kernel has one program."""
    ratios = tl.cast(ratios, tl.int64)
    loss, counted = added_loss(partials, upstream, beta, num_partials, WITH_KL, NUM_SUMS, SUMS_BLOCK)
    nothing_counts = mass_of(sums, items * ratios, BLOCK) == 0.0
    gap = tl.where(mass_of(all_sums, items * ratios, BLOCK) == 0.0, 0.0, gap)
    if factor is not None:
        scale *= tl.load(factor).to(tl.float64)
    dice_weight = dice_weight * scale
    added = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(0, ratios, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside, c = i < ratios, i % C
        mass, difference = tl.full([BLOCK], 0.0, tl.float64), tl.full([BLOCK], 0.0, tl.float64)
        for item in range(0, items):
            place = all_sums + 2 * (item * ratios + i)
            mass += tl.load(place, mask=inside, other=0.0)
            difference += tl.load(place + 1, mask=inside, other=0.0)
        mass += smooth
        counts, weight = inside & (c >= first_class), tl.full([BLOCK], 1.0, tl.float64) * dice_weight
        if class_weight is not None:
            weight *= tl.load(class_weight + c, mask=inside, other=0.0).to(tl.float64)
        inverse = tl.where(mass == 0.0, 0.0, 1.0 / tl.where(mass == 0.0, 1.0, mass))
        ratio = (difference + gap) * inverse
        of_difference = tl.where(counts, weight * inverse, 0.0)
        added += tl.where(counts, weight * ratio, 0.0)
        of_mass = tl.where(counts, -of_difference * ratio, 0.0)
        for item in range(0, items):
            place = slopes + 2 * (item * ratios + i)
            tl.store(place, of_mass, mask=inside)
            tl.store(place + 1, of_difference, mask=inside)
    of_loss = tl.where(nothing_counts, 0.0, ce_weight * scale)
    result = tl.sum(added, 0) + tl.where(of_loss == 0.0, 0.0, of_loss * loss)
    tl.store(total, result.to(tl.float32).to(total.dtype.element_ty))
    last = slopes + 2 * items * ratios
    tl.store(last, of_loss)
    tl.store(last + 1, tl.where(of_loss == 0.0, 0.0, of_loss / (divisor * counted)))


def launch(
    call: Call, spec: Any, options: Any, given: LossArguments, sums: Tensor, all_sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss and its slopes, as :func:`calseg.dice.dice_and_slopes` does, of a call with partial sums.

    ``options`` are :class:`calseg.dice.DiceOptions`.
    """
    like, (N, C, _) = call.like, sums.shape
    items, ratios = (N, C) if options.batch_dice else (1, N * C)
    first_class = 0 if options.include_background else 1
    num_counted = max(ratios // C * (C - first_class), 1) if options.reduction == "mean" else 1
    total = torch.empty((), dtype=options.dtype, device=like.device)
    slopes = torch.empty(2 * N * C + 2, dtype=torch.float64, device=like.device)
    numerator, denominator = options.smooth
    is_counted = given.partials.voxels is not None or given.upstream.sums is not None
    divisor = 1.0 if is_counted or spec.reduction == "sum" else float(N * call.S)
    scale, factor = (1.0, options.scale.resolve_neg()) if isinstance(options.scale, Tensor) else (options.scale, None)
    weight = None if options.dice_class_weight is None else options.dice_class_weight.resolve_neg().contiguous()
    arguments = (
        given.partials, given.upstream, call.programs, spec.sampling.beta if given.with_kl else 0.0, divisor, sums,
        all_sums, weight, slopes, total, options.dice_weight / num_counted,
        float(options.ce_weight), scale, factor, float(denominator), denominator - numerator, items, ratios, C,
        first_class, given.with_kl, given.num_sums, finish_block(call),
        min(MOST_RATIOS, host.power_of_two(ratios)),
    )  # fmt: skip
    host.launch_kernel(finish_dice, 1, like, arguments, WARPS)
    return total, slopes
