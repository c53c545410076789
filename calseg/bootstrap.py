"""Confidence intervals over cases: the percentile bootstrap.

Voxels of one volume are not independent, volumes of different patients are: what is drawn with replacement are
whole cases. Cases are put in an order of their own first and every sum is of integers or over a sorted axis, so
that an interval is the same, bit for bit, whatever the order in which cases came.

Source: Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calseg import checks as check
from calseg.calibration import CalibrationBins

NUM_RESAMPLES = 2000
BLOCK_BYTES = 1 << 25


class Interval(NamedTuple):
    """A value and the ends of its interval, float64; NaN where there is no case, the ends also for fewer than two."""

    value: Tensor
    lower: Tensor
    upper: Tensor


def check_options(confidence_level: float, num_resamples: int, seed: int) -> None:
    """The options that the intervals of this module share."""
    check.check_number("confidence_level", confidence_level, 0.0, 1.0, "between 0 and 1", open_low=True)
    if confidence_level == 1:
        raise ValueError("confidence_level: got 1, wanted a number below 1")
    check.check_integer("num_resamples", num_resamples, 1)
    check.check_integer("seed", seed, 0)


def mean_interval(
    values: Tensor, *, confidence_level: float = 0.95, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """The mean over the cases of ``values`` float ``[cases]``, and its interval. NaN, a case without a value, is left
    out before anything is drawn."""
    check_options(confidence_level, num_resamples, seed)
    present = values.detach().double().cpu()
    present = present[~present.isnan()].sort().values
    drawn = [present[index].mean(1) for index in _draws(len(present), num_resamples, seed, 8 * len(present))]
    return _interval(present.mean(), drawn, len(present), confidence_level)


def pooled_interval(
    cases: CalibrationBins,
    statistic: Callable[[CalibrationBins], Tensor],
    *,
    confidence_level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """``statistic`` of the sums over all ``cases``, and its interval over the cases drawn with replacement.

    ``cases`` has one item per case, and ``statistic`` takes any number of items at once: ``[items, ...]`` to
    ``[items]`` or ``[items, K]``. Cases without a voxel are left out before anything is drawn.
    """
    check_options(confidence_level, num_resamples, seed)
    rows = torch.cat([field.reshape(len(field), -1) for field in cases], 1)
    rows = rows[cases.num_voxels > 0]
    rows = rows[torch.from_numpy(np.lexsort(rows.numpy().T[::-1]).copy())]
    shapes = [field.shape[1:] for field in cases]
    sizes = [shape.numel() for shape in shapes]

    def value(sums: Tensor) -> Tensor:
        fields = zip(sums.split(sizes, 1), shapes, strict=True)
        return statistic(CalibrationBins(*(part.reshape(len(sums), *shape) for part, shape in fields))).double()

    drawn = []
    for index in _draws(len(rows), num_resamples, seed, 8 * sum(sizes)):
        times = index.new_zeros(len(index), len(rows)).scatter_add_(1, index, torch.ones_like(index))
        drawn.append(value(times @ rows))
    return _interval(value(rows.sum(0, keepdim=True))[0], drawn, len(rows), confidence_level)


def _draws(cases: int, num_resamples: int, seed: int, bytes_each: int) -> list[Tensor]:
    """``num_resamples`` rows of case numbers drawn with replacement, in blocks that bound the memory of their use."""
    if cases < 2:
        return []
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(cases, (num_resamples, cases), generator=generator, device="cpu")
    return list(index.split(max(1, BLOCK_BYTES // max(bytes_each, 1))))


def _interval(value: Tensor, drawn: list[Tensor], cases: int, confidence_level: float) -> Interval:
    if cases < 2:
        return Interval(value, torch.full_like(value, torch.nan), torch.full_like(value, torch.nan))
    tail, drawn_values = (1 - confidence_level) / 2, torch.cat(drawn)
    # Values that were drawn, not points between two of them, one of which may be infinite.
    lower = torch.quantile(drawn_values, tail, dim=0, interpolation="lower")
    upper = torch.quantile(drawn_values, 1 - tail, dim=0, interpolation="higher")
    return Interval(value, lower, upper)
