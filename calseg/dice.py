"""Dice plus cross-entropy from the sums of the overlap: the last step of :func:`calseg.vls_dice_cross_entropy`.

The sums of a batch item and a class are ``S = sum (p + Y)`` and ``D = sum |p - Y|`` over voxels, float64
``[N, C, 2]``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function


class DiceOptions(NamedTuple):
    """Options of the sum of Dice and cross-entropy, with the names of :func:`calseg.vls_dice_cross_entropy`.

    ``dtype`` is that of the result, and ``process_group`` the group of processes over which the sums are added.
    """

    dice_weight: float
    ce_weight: float
    include_background: bool
    batch_dice: bool
    smooth: tuple[float, float]
    dice_class_weight: Tensor | None
    reduction: str
    scale: float | Tensor
    dtype: torch.dtype
    process_group: Any


class SumOverProcesses(Function):
    """The sum of a tensor over the processes of a group. The gradient is that of the sum of the processes' losses."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return SumOverProcesses.apply(gradients[0], ctx.group), None


def over_processes(options: DiceOptions, sums: Tensor) -> Tensor:
    """Return the sums over all processes: ``sums`` itself if this one is alone."""
    if options.process_group is None:
        return sums
    total: Tensor = SumOverProcesses.apply(sums, options.process_group)
    return total


def dice_ratios(options: DiceOptions, sums: Tensor) -> Tensor:
    """Return ``1 - (S - D + smooth) / (S + smooth)`` of items and classes, ``[N, C]``, with the background left out.

    It is computed as ``D / (S + smooth)``. A class without any mass has loss 0 if both smoothing numbers are the same.
    """
    if options.batch_dice:
        sums = sums.sum(0, keepdim=True)
    mass, difference = sums.unbind(2)
    numerator, denominator = options.smooth
    if numerator != denominator:
        nothing_counts = mass.detach().sum() == 0
        difference = torch.where(nothing_counts, difference, difference + (denominator - numerator))
    mass = mass + denominator
    ratios = torch.where(mass == 0, 0.0, difference / torch.where(mass == 0, 1.0, mass))
    return ratios if options.include_background else ratios[:, 1:]


def dice_cross_entropy(options: DiceOptions, loss: Tensor, sums: Tensor, all_sums: Tensor) -> Tensor:
    """Return Dice plus cross-entropy. Autograd can compute its gradients, to any order.

    Args:
        options: the options.
        loss: the cross-entropy and the KL term of this process, a 0-d tensor. It adds 0 if no voxel counts.
        sums: the sums of this process.
        all_sums: the sums over all processes, by :func:`over_processes`.
    """
    ratios = dice_ratios(options, all_sums)
    if options.dice_class_weight is not None:
        ratios = ratios * options.dice_class_weight.to(ratios.dtype)[-ratios.shape[1] :]
    total = options.dice_weight * ratios.sum() / (max(ratios.numel(), 1) if options.reduction == "mean" else 1)
    if options.ce_weight:
        nothing_counts = sums.detach()[..., 0].sum() == 0
        total = total + options.ce_weight * torch.where(nothing_counts, 0.0, loss)
    return (options.scale * total).to(options.dtype)


def dice_and_slopes(options: DiceOptions, loss: Tensor, sums: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor]:
    """Return :func:`dice_cross_entropy` and its slopes, a row of float64.

    The slopes are the gradient of the sums over all processes, that of the loss, and that of the sum of the losses of
    all voxels. ``divisor`` is that of the loss.
    """
    leaves = loss.detach().requires_grad_(), over_processes(options, sums).detach().requires_grad_()
    with torch.enable_grad():
        total = dice_cross_entropy(options, leaves[0], sums, leaves[1])
        of_loss, of_sums = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    of_loss = of_loss.to(sums.dtype)
    of_voxel = torch.where(of_loss == 0, 0.0, of_loss / divisor)
    return total.detach(), torch.cat([of_sums.flatten(), of_loss.view(1), of_voxel.view(1)])
