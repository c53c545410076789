"""The scores of the calibration experiment, which are statistics of calseg over weighted cases.

A case is a :class:`calseg.scores.CaseScores`. :func:`summarise` adds up cases, each multiplied by its weight, for one
or for many sets of weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calseg.bootstrap import weighted_sums
from calseg.calibration import UNIT, CalibrationBins
from calseg.regions import REGIONS
from calseg.scores import STATISTICS, TRUTH_REGIONS, TRUTH_STATISTICS, CaseScores, TruthBins, stack


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
        if self.region == "all":
            return title
        return f"{title}, {self.region} voxels" if self.needs_truth else f"{self.region} {title}"

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
        key = STATISTICS[self.statistic].key(self.region)
        return STATISTICS[self.statistic].function(weighted_sums(together.bins[key], weights))


SCORES = {
    "ece": Score("ece", "all"),
    "fg_ece": Score("ece", "foreground"),
    "cw_ece": Score("class_wise_ece", "all"),
    "nll": Score("nll", "all"),
    "brier": Score("brier", "all"),
    "fg_nll": Score("nll", "foreground"),
    "fg_brier": Score("brier", "foreground"),
    "truth_ece": Score("ece", "all", needs_truth=True),
    "disputed_ece": Score("ece", "disputed", needs_truth=True),
    "truth_error": Score("absolute_error", "disputed", needs_truth=True),
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


def curves(seeds: Sequence[Sequence[CaseScores]]) -> dict[str, Any]:
    """Return reliability diagrams over the predictions of all seeds: voxels, mean confidence and frequency of each bin.

    The frequency is the share of correct top labels or, against the truth, the mean true probability of the top label.
    It is None for an empty bin.
    """
    together = stack([case for cases in seeds for case in cases])
    result = {"fg_curve": _curve(_pooled(together.bins["foreground"]))}
    if "disputed" in together.truth:
        result["disputed_curve"] = _curve(_pooled(together.truth["disputed"]))
    return result


def _pooled(bins: CalibrationBins | TruthBins) -> Mapping[str, Tensor]:
    """Return the sums over all cases."""
    return {name: sums.sum(0).double() for name, sums in bins._asdict().items()}


def _curve(sums: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a reliability diagram as lists."""
    count = sums["count"]
    right = sums["truth"] / UNIT if "truth" in sums else sums["hits"]
    means = [
        [None if not voxels else value / voxels for value, voxels in zip(total.tolist(), count.tolist(), strict=True)]
        for total in (sums["confidence"] / UNIT, right)
    ]
    return {"voxels": [int(voxels) for voxels in count], "confidence": means[0], "frequency": means[1]}
