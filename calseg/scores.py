"""Scores of a prediction: the sums of a case, and the table of statistics that follow from them.

:class:`CaseScores` holds integer sums over the voxels of a case. The sums of slabs and of cases can be added without
rounding. :data:`STATISTICS` is the only table of figures of merit. The report of ``calseg evaluate``, the metrics of a
training run, the demo and the calibration benchmark take names, titles and values from it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calseg.calibration import CalibrationBins, calibration_bins, calibration_error_from_bins
from calseg.operations import UNIT
from calseg.regions import REGIONS, near_foreground

N_BINS = 15
BLOCK_BYTES = 1 << 22
"""Size in bytes of a block of probabilities. A block stays in the cache while all of its sums are computed."""

BinsOf = Callable[[Tensor, Tensor], CalibrationBins]
"""Function that makes bins by another convention from scores ``[1, C, *S]`` and labels ``[1, *S]``."""


# ------------------------------------------------------------------------------------- the table of statistics


def quiet_calibration_error(bins: CalibrationBins, norm: str = "l1", *, equal_mass: int | None = None) -> Tensor:
    """Do as :func:`calseg.calibration_error_from_bins`, but give no warning of NaN."""
    silent = bins._replace(num_nan=torch.zeros_like(bins.num_nan))
    return calibration_error_from_bins(silent, norm, equal_mass=equal_mass)


class Statistic(NamedTuple):
    """A figure of merit over the voxels of a region.

    Args:
        title: name in tables and diagrams.
        function: function of bins ``[*P, ...]`` that returns values, float64 ``[*P]``. A value is NaN if no voxel
            counts.
        class_wise: True if ``function`` takes class-wise bins, False if it takes top-label bins.
    """

    title: str
    function: Callable[[CalibrationBins], Tensor]
    class_wise: bool = False

    def key(self, region: str) -> str:
        """Return the name of the entry of :attr:`CaseScores.bins` that :attr:`function` takes for a region."""
        return f"{region}_classes" if self.class_wise else region


STATISTICS: dict[str, Statistic] = {
    "ece": Statistic("ECE", quiet_calibration_error),
    "nll": Statistic("NLL", CalibrationBins.mean_nll),
    "brier": Statistic("Brier", CalibrationBins.mean_brier),
    "ace": Statistic("ACE", lambda bins: quiet_calibration_error(bins, "average")),
    "mce": Statistic("MCE", lambda bins: quiet_calibration_error(bins, "max")),
    "class_wise_ece": Statistic("class-wise ECE", lambda bins: quiet_calibration_error(bins).mean(-1), class_wise=True),
}
"""All figures of merit of predictions against labels, by their names in JSON and CSV files."""

MAIN_STATISTICS = ("ece", "nll", "brier")
"""The statistics that are computed after every training run. They need no class-wise bins."""


class TruthBins(NamedTuple):
    """Integer sums of a prediction against known true probabilities. All tensors are int64 on the CPU.

    ``*P`` is ``N`` for the sums of N cases, and empty for those of one case. Units are 2^-24.

    Args:
        count: number of voxels in each bin of top-label confidence, ``[*P, n_bins]``.
        confidence: sum of the confidences in each bin, in units, ``[*P, n_bins]``.
        truth: sum of the true probabilities of the predicted classes in each bin, in units, ``[*P, n_bins]``.
        squared_error: sum over voxels and classes of the squared errors of the probabilities, in units, ``[*P]``.
        absolute_error: sum over voxels of the mean absolute error over classes, in units, ``[*P]``.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    confidence: Tensor
    truth: Tensor
    squared_error: Tensor
    absolute_error: Tensor

    def __add__(self, other: Any) -> TruthBins:
        """Return the sums over the voxels of both. The fields are added, not concatenated as those of a tuple."""
        return TruthBins(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def num_voxels(self) -> Tensor:
        """Return the number of voxels in all bins, ``[*P]``."""
        return self.count.sum(-1)

    def calibration_error(self) -> Tensor:
        """Return the expected calibration error with true probabilities instead of hits, float64 ``[*P]``."""
        return (self.confidence - self.truth).abs().sum(-1).double() / UNIT / self.num_voxels()

    def mean_squared_error(self) -> Tensor:
        """Return the mean squared distance to the true probabilities, summed over classes, float64 ``[*P]``."""
        return self.squared_error.double() / UNIT / self.num_voxels()

    def mean_absolute_error(self) -> Tensor:
        """Return the mean absolute error of the probability of a class, float64 ``[*P]``."""
        return self.absolute_error.double() / UNIT / self.num_voxels()


class TruthStatistic(NamedTuple):
    """A figure of merit against known true probabilities. It corresponds to :class:`Statistic`."""

    title: str
    function: Callable[[TruthBins], Tensor]


CERTAIN_BACKGROUND = 0.99
TRUTH_REGIONS = {
    "all": "all voxels",
    "disputed": f"voxels whose true probability of background is under {CERTAIN_BACKGROUND}",
}
"""The regions over which every statistic of :data:`TRUTH_STATISTICS` is computed, with their titles."""

TRUTH_STATISTICS: dict[str, TruthStatistic] = {
    "ece": TruthStatistic("ECE to the truth", TruthBins.calibration_error),
    "brier": TruthStatistic("squared error", TruthBins.mean_squared_error),
    "absolute_error": TruthStatistic("distance to the truth", TruthBins.mean_absolute_error),
}
"""All figures of merit of predictions against true probabilities, by their names."""


# ------------------------------------------------------------------------------------------------- Dice


class ClassCounts(NamedTuple):
    """Numbers of voxels of each class, int64 ``[*P, C]`` on the CPU.

    Args:
        hits: voxels that have the class in the prediction and in the label map.
        predicted: voxels that have it in the prediction.
        labelled: voxels that have it in the label map.
    """

    hits: Tensor
    predicted: Tensor
    labelled: Tensor

    def __add__(self, other: Any) -> ClassCounts:
        """Return the counts over the voxels of both. The fields are added, not concatenated as those of a tuple."""
        return ClassCounts(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def dice(self) -> Tensor:
        """Return the Dice of each class, float64 ``[*P, C]``. It is NaN if neither map holds the class."""
        return 2.0 * self.hits.double() / (self.predicted + self.labelled)


def count_classes(prediction: Tensor, label: Tensor, classes: int, *, ignore_index: int = -100) -> ClassCounts:
    """Count the voxels of each class in two maps of class indices with the same shape, without ignored voxels."""
    wide = label.long()
    return _count(prediction, wide, wide != ignore_index, classes)


def _count(prediction: Tensor, label: Tensor, counted: Tensor, classes: int) -> ClassCounts:
    """Count the voxels where ``counted`` is True. The three tensors have the same shape, and ``label`` is int64."""
    pairs = torch.bincount(label[counted] * classes + prediction[counted], minlength=classes**2)
    table = pairs.cpu().view(classes, classes)
    return ClassCounts(table.diagonal().clone(), table.sum(0), table.sum(1))


# ------------------------------------------------------------------------------------------ sums of a case


class CaseScores(NamedTuple):
    """Sums over the voxels of a case, or of a slab of a case. The operator ``+`` adds slabs and cases.

    Args:
        bins: :class:`calseg.CalibrationBins` by name. Every region of :data:`calseg.regions.REGIONS` has top-label bins
            under its name, and class-wise bins under ``NAME_classes``. Further entries hold bins by other conventions.
        counts: numbers of voxels of each class, without voxels that have a NaN probability.
        truth: :class:`TruthBins` of each region of :data:`TRUTH_REGIONS`. Empty if no true probabilities are known.
    """

    bins: dict[str, CalibrationBins]
    counts: ClassCounts
    truth: dict[str, TruthBins] = {}  # noqa: RUF012  # no code writes to it

    @classmethod
    def of(
        cls,
        scores: Tensor,
        label: Tensor,
        *,
        from_logits: bool = True,
        n_bins: int = N_BINS,
        class_wise: bool = True,
        near: Tensor | None = None,
        truth: Tensor | None = None,
        conventions: Mapping[str, BinsOf] | None = None,
        ignore_index: int = -100,
    ) -> CaseScores:
        """Compute the sums of a volume or a slab, block by block.

        A block of :data:`BLOCK_BYTES` is read from memory once, and stays in the cache while all of its sums are
        computed. Sums are integers, so the result does not depend on the blocks.

        Args:
            scores: logits or probabilities, float ``[C, *S]``.
            label: class indices ``[*S]``.
            from_logits: True if ``scores`` are logits, False if they are probabilities. Default True.
            n_bins: number of bins of confidence, of equal width. Default 15.
            class_wise: True to compute class-wise bins too. Default True.
            near: bool ``[*S]``, True near the foreground. A slab needs it, because slices beyond its ends decide too.
                Default: :func:`calseg.near_foreground` of ``label``.
            truth: true probability of every class, ``[C, *S]``, or None.
            conventions: functions that make bins by other conventions, by the names of their entries in ``bins``.
            ignore_index: label of voxels that do not count. Default -100.
        """
        total: CaseScores | None = None
        if near is None:
            near = near_foreground(label[None], ignore_index=ignore_index)[0]
        for part in _blocks(scores):
            x, y = scores[:, part][None], label[part][None]
            bins = _region_bins(x, y, near[part][None], from_logits, n_bins, class_wise, ignore_index)
            for name, bins_of in (conventions or {}).items():
                bins[name] = bins_of(x, y).pool()
            wide = y.long()
            counted = wide != ignore_index
            if int(bins["all"].num_nan):
                counted &= ~(x.softmax(1) if from_logits else x).isnan().any(1)
            counts = _count(x.argmax(1), wide, counted, len(scores))
            known = {}
            if truth is not None:
                known = truth_bins(x[0], truth[:, part], counted[0], from_logits=from_logits, n_bins=n_bins)
            block = cls(bins, counts, known)
            total = block if total is None else total + block
        assert total is not None  # even an empty volume has one block
        return total

    def __add__(self, other: Any) -> CaseScores:
        """Return the sums over the voxels of both. The fields are added, not concatenated as those of a tuple."""
        return CaseScores(
            {name: bins + other.bins[name] for name, bins in self.bins.items()},
            self.counts + other.counts,
            {name: bins + other.truth[name] for name, bins in self.truth.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the sums as nested lists of integers, which JSON can hold."""
        content = {"bins": {name: lists_of(bins) for name, bins in self.bins.items()}, **lists_of(self.counts)}
        if self.truth:
            content["truth"] = {name: lists_of(bins) for name, bins in self.truth.items()}
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CaseScores:
        """Return the sums from the result of :meth:`to_json`. Entries with other names are ignored."""
        return cls(
            {name: CalibrationBins(**_tensors(bins)) for name, bins in content["bins"].items()},
            ClassCounts(**_tensors({name: content[name] for name in ClassCounts._fields})),
            {name: TruthBins(**_tensors(bins)) for name, bins in content.get("truth", {}).items()},
        )


def lists_of(sums: CalibrationBins | TruthBins | ClassCounts) -> dict[str, Any]:
    """Return the fields by name, as nested lists of integers."""
    return {name: each.tolist() for name, each in sums._asdict().items()}


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return int64 tensors from nested lists."""
    return {name: torch.tensor(sums, dtype=torch.int64, device="cpu") for name, sums in content.items()}


def stack(cases: Sequence[CaseScores]) -> CaseScores:
    """Return all cases in one object, whose tensors have the cases as first axis."""
    return CaseScores(
        {name: CalibrationBins(*_stacked([case.bins[name] for case in cases])) for name in cases[0].bins},
        ClassCounts(*_stacked([case.counts for case in cases])),
        {name: TruthBins(*_stacked([case.truth[name] for case in cases])) for name in cases[0].truth},
    )


def _stacked(parts: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Stack each field of several tuples."""
    return [torch.stack(sums) for sums in zip(*parts, strict=True)]


def _blocks(scores: Tensor) -> Iterator[slice]:
    """Cut the first spatial axis of ``[C, *S]`` into slices. A GPU gets a single one, because its memory is fast."""
    length = scores.shape[1]
    rows = length
    if scores.device.type == "cpu" and length:
        rows = BLOCK_BYTES // (scores[:, 0].numel() * scores.element_size() or 1)
    for start in range(0, max(length, 1), max(rows, 1)):
        yield slice(start, start + max(rows, 1))


def _region_bins(
    scores: Tensor, label: Tensor, near: Tensor, from_logits: bool, n_bins: int, class_wise: bool, ignore_index: int
) -> dict[str, CalibrationBins]:
    """Return the entries of :attr:`CaseScores.bins` for scores ``[1, C, *S]`` and labels ``[1, *S]``."""
    masks = {"near": near, "all": None, "foreground": label > 0}
    kinds = {"": False, "_classes": True} if class_wise else {"": False}
    return {
        f"{region}{ending}": calibration_bins(
            scores, label, n_bins=n_bins, from_logits=from_logits, class_wise=by_class, mask=mask,
            ignore_index=ignore_index,
        )
        for ending, by_class in kinds.items()
        for region, mask in masks.items()
    }  # fmt: skip


def truth_bins(
    scores: Tensor, truth: Tensor, counted: Tensor | None = None, *, from_logits: bool = True, n_bins: int = N_BINS
) -> dict[str, TruthBins]:
    """Return the sums of a prediction against true probabilities, by region.

    Args:
        scores: logits or probabilities, float ``[C, *S]``.
        truth: true probability of every class, float ``[C, *S]``.
        counted: bool ``[*S]``. A voxel does not count where it is False, and may be NaN there. Default: all voxels
            count.
        from_logits: True if ``scores`` are logits, False if they are probabilities. Default True.
        n_bins: number of bins of top-label confidence, of equal width. Default 15.
    """
    p = (torch.softmax(scores.double(), 0) if from_logits else scores.double()).flatten(1)
    t = truth.to(p).flatten(1)
    if counted is not None:
        p, t = p[:, counted.flatten()], t[:, counted.flatten()]
    confidence, top = p.max(0)
    edges = torch.arange(1, n_bins, dtype=torch.float64, device=p.device) / n_bins
    index = torch.bucketize(confidence, edges, right=True)
    share, error = t.gather(0, top[None])[0], p - t
    inside_of = {"all": torch.ones_like(index, dtype=torch.bool), "disputed": t[0] < CERTAIN_BACKGROUND}

    def binned(units: Tensor, inside: Tensor) -> Tensor:
        return torch.zeros(n_bins, dtype=torch.int64, device=p.device).index_add_(0, index[inside], units[inside]).cpu()

    def units_of(values: Tensor) -> Tensor:
        return (values * UNIT).round().long()

    return {
        region: TruthBins(
            binned(torch.ones_like(index), inside),
            binned(units_of(confidence), inside),
            binned(units_of(share), inside),
            units_of(error.square().sum(0))[inside].sum().cpu(),
            units_of(error.abs().mean(0))[inside].sum().cpu(),
        )
        for region, inside in inside_of.items()
    }


# ------------------------------------------------------------------------------------------------ summaries


def warn_of_nan(bins: CalibrationBins, stacklevel: int = 3) -> None:
    """Warn if voxels are left out because a probability is NaN, and say how many."""
    if num_nan := int(bins.num_nan.sum()):
        total = int(bins.num_voxels.sum())
        message = f"{num_nan} of {total} voxels have a NaN probability and are left out"
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)


def values_of(bins: Mapping[str, CalibrationBins], names: Sequence[str] = tuple(STATISTICS)) -> dict[str, Any]:
    """Return ``{region: {statistic: value}}`` from the sums over all cases, with None for regions without voxels."""
    return {
        region: {
            name: float(STATISTICS[name].function(bins[STATISTICS[name].key(region)]))
            if int(bins[region].num_voxels)
            else None
            for name in names
        }
        for region in REGIONS
    }


def summarise(cases: Mapping[str, CaseScores], class_names: Sequence[str]) -> dict[str, Any]:
    """Summarise the validation cases of a training run: Dice, and :data:`MAIN_STATISTICS`.

    Returns:
        A dictionary, in which None stands for a value that does not exist:

        - ``dice``: ``{class: mean over the cases that hold it}``, from class 1 on
        - ``dice_mean``: the mean over these classes
        - ``voxels``: ``{region: number of voxels}``
        - the name of each region: ``{statistic: value over the voxels of all cases}``
        - ``cases``: ``{case: {class: Dice}}``
    """
    dice: dict[str, dict[str, float | None]] = {}
    for case, scores in cases.items():
        values = [None if math.isnan(value) else value for value in scores.counts.dice().tolist()]
        dice[case] = dict(zip(class_names[1:], values[1:], strict=True))
    by_class = {name: mean_of([row[name] for row in dice.values()]) for name in class_names[1:]}
    total = stack(list(cases.values()))
    bins = {name: each.pool() for name, each in total.bins.items()}
    warn_of_nan(bins["all"])
    return {
        "dice": by_class,
        "dice_mean": mean_of(list(by_class.values())),
        "voxels": {region: int(bins[region].num_voxels) for region in REGIONS},
        **values_of(bins, MAIN_STATISTICS),
        "cases": dice,
    }


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None if there is none."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
