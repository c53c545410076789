"""Overlap of the probabilities p with the labels Y: its sums over voxels, and the gradient of the logits.

The overlap of a batch item and a class is the pair ``sum (p + Y)``, ``sum |p - Y|``. The kernels of the cross-entropies
compute it beside the loss, if asked to: every program stores the sums over its tiles, and the sums of the programs are
added in float64, in a fixed order. In the backward pass, the kernels of :mod:`calseg.kernels.cross_entropy` get the
gradient of the overlap, and add its part to the gradient of the logits.

Least memory traffic: one read of each input forward, and one read of logits and soft labels and one write of the
gradient backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from calseg.kernels.launch import OVERLAP, SAMPLED, SLOPES, SOFT, Call, TileDemands
from torch import Tensor


@triton.jit
def store_class_sums(overlap, both, apart, c, C: tl.constexpr):
    """Store the sums over the second axis as this program's of classes ``c`` in ``overlap``, ``[programs, C, 2]``."""
    to = overlap + 2 * (tl.program_id(0).to(tl.int64) * C + c)
    tl.store(to, tl.sum(both, 1), mask=c < C)
    tl.store(to + 1, tl.sum(apart, 1), mask=c < C)


@triton.jit
def store_overlap(overlap, p, y, ok, c, C: tl.constexpr):
    """Store this program's sums of classes ``c`` in ``overlap``, float32 ``[programs, C, 2]``.

    Only voxels that are ``ok`` count. It is None if p and y are 0 elsewhere.
    """
    both, apart = p + y, tl.abs(p - y)
    if ok is not None:
        both, apart = tl.where(ok[None, :], both, 0.0), tl.where(ok[None, :], apart, 0.0)
    store_class_sums(overlap, both, apart, c, C)


@triton.jit
def overlap_slope(grad_overlap, p, y, n, c, C: tl.constexpr):
    """Return the gradient with respect to p for classes ``c``, given that of the overlap, float64 ``[N, C, 2]``."""
    place = grad_overlap + 2 * (n * C + c)
    of_sum = tl.load(place, mask=c < C, other=0.0).to(tl.float32)[:, None]
    of_difference = tl.load(place + 1, mask=c < C, other=0.0).to(tl.float32)[:, None]
    return tl.where(p > y, of_sum + of_difference, tl.where(p < y, of_sum - of_difference, of_sum))


@triton.jit
def overlap_dot(grad_overlap, p, y, n, c, C: tl.constexpr):
    """Return the sum over classes ``c`` of p times its gradient, ``[TILE]``."""
    return tl.sum(p * overlap_slope(grad_overlap, p, y, n, c, C), 0)


@triton.jit
def overlap_gradient(grad_overlap, p, y, ok, dot, n, c, C: tl.constexpr):
    """Return the gradient of the logits of classes ``c``. ``dot`` is :func:`overlap_dot` summed over all classes."""
    slope = overlap_slope(grad_overlap, p, y, n, c, C)
    return tl.where(ok[None, :], p * (slope - dot[None, :]), 0.0)


# With one-hot labels, p is below Y for the label and above it for all other classes, so a class has two slopes.


@triton.jit
def overlap_slopes(grad_overlap, n, c, C: tl.constexpr):
    """Return the gradients with respect to p of classes ``c`` where p is above Y, and where it is below, ``[BLOCK_C]``.

    Both are None if ``grad_overlap`` is.
    """
    above, below = None, None
    if grad_overlap is not None:
        place = grad_overlap + 2 * (n * C + c)
        of_sum, of_difference = tl.load(place, mask=c < C, other=0.0), tl.load(place + 1, mask=c < C, other=0.0)
        above, below = (of_sum + of_difference).to(tl.float32), (of_sum - of_difference).to(tl.float32)
    return above, below


@triton.jit
def one_hot_slope(above, below, label, c):
    """Return the gradient with respect to p of classes ``c``, given :func:`overlap_slopes`, ``[BLOCK_C, TILE]``."""
    return tl.where(c[:, None] == label[None, :], below[:, None], above[:, None])


def tile_demands(tensors: Any, *, backward: bool) -> TileDemands:
    """Return the demands of a pass with these tensors."""
    if tensors.mu is not None:
        return SAMPLED
    if tensors.soft_labels is not None:
        return SOFT
    return SLOPES if backward else OVERLAP


def empty_overlap(call: Call) -> Tensor:
    """Return memory for the sums of every program."""
    return torch.empty((call.programs, call.C, 2), dtype=torch.float32, device=call.like.device)


def finished_overlap(call: Call, overlap: Tensor) -> Tensor:
    """Return the overlap of every batch item and class, float64 ``[N, C, 2]``, from the sums of the programs."""
    return overlap.view(call.geometry.N, -1, call.C, 2).sum(1, dtype=torch.float64)
