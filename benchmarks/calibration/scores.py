"""The scores of the calibration experiment, which are statistics of calseg over weighted cases.

A case is a :class:`calseg.scores.CaseScores`. :func:`summarise` adds up cases, each multiplied by its weight, for one
or for many sets of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calseg.bootstrap import weighted_sums
from calseg.operations import UNIT
from calseg.regions import REGIONS
from calseg.scores import STATISTICS, TRUTH_REGIONS, TRUTH_STATISTICS, CaseScores, stack


class Score(NamedTuple):
    """One score of the experiment: a statistic over the voxels of a region in all cases.

    Args:
        statistic: name in ``STATISTICS``, or in ``TRUTH_STATISTICS`` for a score against true probabilities.
        region: name in ``REGIONS``, or in ``TRUTH_REGIONS``.
        needs_truth: True if it is a score against true probabilities.
    """

    statistic: str
    region: str
    needs_truth: bool = False

    @property
    def title(self) -> str:
        """Short name for tables."""
        title = (TRUTH_STATISTICS if self.needs_truth else STATISTICS)[self.statistic].title
        return f"{title}, {self.region} voxels" if self.needs_truth else f"{title} {self.region}"

    @property
    def description(self) -> str:
        """Statistic and region in words."""
        if self.needs_truth:
            return f"{TRUTH_STATISTICS[self.statistic].title}, {TRUTH_REGIONS[self.region]}, pooled"
        return f"{STATISTICS[self.statistic].title}, {REGIONS[self.region]}, pooled"

    def value(self, together: CaseScores, weights: Tensor) -> Tensor | None:
        """Return values float64 ``[B]`` for int64 ``weights[B, cases]``, or None if a needed truth is not known."""
        if self.needs_truth:
            known = together.truth.get(self.region)
            statistic = TRUTH_STATISTICS[self.statistic]
            return None if known is None else statistic.function(weighted_sums(known, weights))
        return STATISTICS[self.statistic].function(weighted_sums(together.bins[self.region], weights))


SCORES = {
    **{f"near_{name}": Score(name, "near") for name in ("ece", "nll", "brier")},
    **{name: Score(name, "all") for name in ("ece", "nll", "brier")},
    "truth_ece": Score("ece", "disputed", needs_truth=True),
    "truth_error": Score("absolute_error", "disputed", needs_truth=True),
    "foreground_ece": Score("ece", "foreground"),
}
TITLES = {"dice": "Dice", **{name: score.title for name, score in SCORES.items()}}
DESCRIPTIONS = {
    "dice": "mean over the foreground classes of the mean over the cases",
    **{name: score.description for name, score in SCORES.items()},
}


def summarise(cases: Sequence[CaseScores], weights: Tensor | None = None) -> dict[str, Any]:
    """Return Dice and :data:`SCORES`, float64 ``[B]`` for int64 ``weights[B, cases]``, or floats without weights."""
    together = stack(cases)
    counted = torch.ones(1, len(cases), dtype=torch.int64) if weights is None else weights
    values = {"dice": _mean_dice(together, counted)}
    for name, score in SCORES.items():
        value = score.value(together, counted)
        if value is not None:
            values[name] = value
    return {name: float(value[0]) if weights is None else value for name, value in values.items()}


def _mean_dice(together: CaseScores, weights: Tensor) -> Tensor:
    """Return the mean over foreground classes of the weighted mean over the cases in which a map holds the class."""
    dice = together.counts.dice()[:, 1:]
    total = weights.double() @ dice.nan_to_num(0.0)
    cases = weights.double() @ (~dice.isnan()).double()
    return (total / cases).nan_to_num(0.0).mean(-1)


def near_curve(seeds: Sequence[Sequence[CaseScores]]) -> dict[str, Any]:
    """Return the reliability diagram near the foreground, over the predictions of all seeds, as lists.

    It holds the voxels, the mean confidence and the share of correct top labels of each bin. The means of an empty bin
    are None.
    """
    bins = stack([case for cases in seeds for case in cases]).bins["near"]
    count = bins.count.sum(0).tolist()
    sums = {"confidence": bins.confidence.sum(0).double() / UNIT, "accuracy": bins.hits.sum(0).double()}

    def means(total: Sequence[float]) -> list[float | None]:
        return [value / voxels if voxels else None for value, voxels in zip(total, count, strict=True)]

    return {"voxels": count, **{name: means(total.tolist()) for name, total in sums.items()}}
