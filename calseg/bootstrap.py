"""Confidence intervals over cases, by the percentile bootstrap.

The voxels of a volume are not independent of each other, but the volumes of different patients are. So the bootstrap
draws whole cases with replacement. :func:`mean_interval` and :func:`pooled_interval` sort the cases first, and every
sum is over integers or over a sorted axis. So an interval is the same, bit for bit, for any order of the cases. To
compare methods on the same draws, use :func:`case_weights`.

Source: Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from calseg import checks as check
from calseg.calibration import CalibrationBins

NUM_RESAMPLES = 2000
BLOCK_BYTES = 1 << 25

Sums = TypeVar("Sums", bound=tuple[Tensor, ...])
"""Named tuple of int64 sums, such as ``CalibrationBins``, whose first axis is the cases."""


class Interval(NamedTuple):
    """A value and the ends of its interval, float64.

    The value is NaN if there is no case. The ends are NaN if there are fewer than two cases.
    """

    value: Tensor
    lower: Tensor
    upper: Tensor


def check_options(confidence_level: float, num_resamples: int, seed: int) -> None:
    """Check the options that all intervals share."""
    check.check_number("confidence_level", confidence_level, 0.0, 1.0, "between 0 and 1", open_low=True)
    if confidence_level == 1:
        raise ValueError("confidence_level: got 1, wanted a number below 1")
    check.check_integer("num_resamples", num_resamples, 1)
    check.check_integer("seed", seed, 0)


def mean_interval(
    values: Tensor, *, confidence_level: float = 0.95, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean of ``values``, float ``[cases]``, and its interval.

    A NaN stands for a case without a value. Such cases are left out before cases are drawn.
    """
    check_options(confidence_level, num_resamples, seed)
    present = values.detach().double().cpu()
    present = present[~present.isnan()].sort().values
    blocks = _draws(len(present), num_resamples, seed, 8 * len(present))
    drawn = [present[index].mean(1) for index in blocks]
    return _interval(present.mean(), drawn, len(present), confidence_level)


def pooled_interval(
    cases: CalibrationBins,
    statistic: Callable[[CalibrationBins], Tensor],
    *,
    confidence_level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return a statistic of the sums over all cases, and its interval.

    Args:
        cases: the sums, with one item per case.
        statistic: a function of sums ``[items, ...]`` that returns ``[items]`` or ``[items, K]``.
        confidence_level: the probability that the interval should cover.
        num_resamples: how often the cases are drawn with replacement.
        seed: seed of the draws.

    Cases without a voxel are left out before cases are drawn.
    """
    check_options(confidence_level, num_resamples, seed)
    rows = _as_rows(cases)[cases.num_voxels > 0]
    rows = rows[torch.from_numpy(np.lexsort(rows.numpy().T[::-1]).copy())]
    in_order = _from_rows(cases, rows)
    blocks = _draws(len(rows), num_resamples, seed, 8 * rows.shape[1])
    drawn = [statistic(weighted_sums(in_order, _times_drawn(index))).double() for index in blocks]
    whole = statistic(_from_rows(cases, rows.sum(0, keepdim=True))).double()
    return _interval(whole[0], drawn, len(rows), confidence_level)


def case_weights(cases: int, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Tensor:
    """Return how often each case is drawn in each resample, int64 ``[num_resamples, cases]``.

    Every row sums to ``cases``. The weights depend on the arguments alone, so they are the same for every method that
    is compared.
    """
    check.check_integer("cases", cases, 1)
    check.check_integer("num_resamples", num_resamples, 1)
    check.check_integer("seed", seed, 0)
    return _times_drawn(_case_numbers(cases, num_resamples, seed))


def weighted_sums(cases: Sums, weights: Tensor) -> Sums:
    """Return the sums over cases, each multiplied by its weight. Row b of int64 ``weights[B, cases]`` makes item b."""
    return _from_rows(cases, weights @ _as_rows(cases))


def percentile_interval(drawn: Tensor, confidence_level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return the ends of the interval of a value, of which ``drawn`` ``[num_resamples, ...]`` holds the resamples."""
    tail = (1 - confidence_level) / 2
    # Take values that were drawn as ends. A point between two of them would be undefined if one is infinite.
    lower = torch.quantile(drawn, tail, dim=0, interpolation="lower")
    upper = torch.quantile(drawn, 1 - tail, dim=0, interpolation="higher")
    return lower, upper


def _as_rows(cases: tuple[Tensor, ...]) -> Tensor:
    """Return all sums of a case in one row, ``[cases, numbers]``."""
    return torch.cat([field.reshape(len(field), -1) for field in cases], 1)


def _from_rows(like: Sums, rows: Tensor) -> Sums:
    """Return sums with the type and the shapes of ``like``: the inverse of :func:`_as_rows`."""
    shapes = [field.shape[1:] for field in like]
    parts = rows.split([shape.numel() for shape in shapes], 1)
    make: Any = type(like)
    sums: Sums = make(*(part.reshape(len(rows), *shape) for part, shape in zip(parts, shapes, strict=True)))
    return sums


def _times_drawn(index: Tensor) -> Tensor:
    """Return how often each case number occurs in each row of ``index[B, cases]``, int64 of the same shape."""
    return torch.zeros_like(index).scatter_add_(1, index, torch.ones_like(index))


def _case_numbers(cases: int, num_resamples: int, seed: int) -> Tensor:
    """Draw case numbers with replacement, int64 ``[num_resamples, cases]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(cases, (num_resamples, cases), generator=generator, device="cpu")


def _draws(cases: int, num_resamples: int, seed: int, bytes_each: int) -> list[Tensor]:
    """Draw case numbers in blocks of resamples, which bound the memory in use. Fewer than two cases give no block."""
    if cases < 2:
        return []
    index = _case_numbers(cases, num_resamples, seed)
    return list(index.split(max(1, BLOCK_BYTES // max(bytes_each, 1))))


def _interval(value: Tensor, drawn: list[Tensor], cases: int, confidence_level: float) -> Interval:
    """Return the interval of a value from its resamples, which are absent for fewer than two cases."""
    if cases < 2:
        return Interval(value, torch.full_like(value, torch.nan), torch.full_like(value, torch.nan))
    return Interval(value, *percentile_interval(torch.cat(drawn), confidence_level))
