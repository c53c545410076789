"""Scores of a prediction: the sums of a case, and the table of statistics that follow from them.

:class:`CaseScores` holds integer sums over the voxels of a case. Sums of slabs and of cases just add, and nothing is
rounded when they do. :data:`STATISTICS` is the one table of the figures of merit: the report of ``calseg evaluate``,
the metrics of a training run, the demo and the calibration benchmark take names, titles and values from it.
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

N_BINS = 15
BLOCK_BYTES = 1 << 22
"""Bytes of probabilities in a block: small enough to stay in a processor's cache while all its sums are made."""

BinsOf = Callable[[Tensor, Tensor], CalibrationBins]
"""Bins by another convention, of scores ``[1, C, *S]`` and labels ``[1, *S]``; see :meth:`CaseScores.of`."""


# ------------------------------------------------------------------------------------- the table of statistics


def quiet_calibration_error(bins: CalibrationBins, norm: str = "l1", *, equal_mass: int | None = None) -> Tensor:
    """:func:`calseg.calibration_error_from_bins` without its warning, for callers that report NaN themselves."""
    silent = bins._replace(num_nan=torch.zeros_like(bins.num_nan))
    return calibration_error_from_bins(silent, norm, equal_mass=equal_mass)


class Statistic(NamedTuple):
    """A figure of merit of a region of voxels.

    Args:
        title: how tables and diagrams name it.
        function: its value from bins of any number of cases at once: ``[*P, ...]`` to float64 ``[*P]``; NaN where no
            voxel counts.
        class_wise: whether ``function`` takes class-wise bins; else it takes top-label bins.
    """

    title: str
    function: Callable[[CalibrationBins], Tensor]
    class_wise: bool = False

    def key(self, region: str) -> str:
        """The entry of :attr:`CaseScores.bins` that :attr:`function` takes for ``region``."""
        return f"{region}_classes" if self.class_wise else region


REGIONS = {"all": "all voxels", "foreground": "foreground (label not 0)"}
"""The regions over which every statistic is taken, with their titles."""

STATISTICS: dict[str, Statistic] = {
    "nll": Statistic("NLL", CalibrationBins.mean_nll),
    "brier": Statistic("Brier", CalibrationBins.mean_brier),
    "ece": Statistic("ECE", quiet_calibration_error),
    "ace": Statistic("ACE", lambda bins: quiet_calibration_error(bins, "average")),
    "mce": Statistic("MCE", lambda bins: quiet_calibration_error(bins, "max")),
    "class_wise_ece": Statistic("class-wise ECE", lambda bins: quiet_calibration_error(bins).mean(-1), class_wise=True),
}
"""Every figure of merit of a prediction against labels, by its name in JSON and CSV."""

MAIN_STATISTICS = ("nll", "brier", "ece")
"""The statistics that are computed after every training run. They need no class-wise bins."""


class TruthBins(NamedTuple):
    """Integer sums of a prediction against a known true probability of every class. All tensors are int64 on the CPU.

    ``*P`` is empty, or ``[N]`` for the sums of N cases.

    Args:
        count: voxels in a bin of top-label confidence, ``[*P, n_bins]``.
        confidence: their summed confidences in units of 2^-24, ``[*P, n_bins]``.
        truth: the summed true probabilities of their predicted classes, in the same units, ``[*P, n_bins]``.
        squared_error: squared differences of the probabilities, summed over classes, in the same units, ``[*P]``.
        absolute_error: absolute differences, their mean over the classes, in the same units, ``[*P]``.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    confidence: Tensor
    truth: Tensor
    squared_error: Tensor
    absolute_error: Tensor

    def __add__(self, other: Any) -> TruthBins:
        """Add the sums of both; this is not the concatenation of two tuples."""
        return TruthBins(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def num_voxels(self) -> Tensor:
        """Voxels in all bins, ``[*P]``."""
        return self.count.sum(-1)

    def calibration_error(self) -> Tensor:
        """Expected calibration error with true probabilities instead of hits, float64 ``[*P]``."""
        return (self.confidence - self.truth).abs().sum(-1).double() / UNIT / self.num_voxels()

    def mean_squared_error(self) -> Tensor:
        """Squared distance to the true probabilities, summed over the classes, float64 ``[*P]``."""
        return self.squared_error.double() / UNIT / self.num_voxels()

    def mean_absolute_error(self) -> Tensor:
        """Absolute error of a class's probability, float64 ``[*P]``."""
        return self.absolute_error.double() / UNIT / self.num_voxels()


class TruthStatistic(NamedTuple):
    """A figure of merit against known true probabilities; the counterpart of :class:`Statistic`."""

    title: str
    function: Callable[[TruthBins], Tensor]


CERTAIN_BACKGROUND = 0.99
TRUTH_REGIONS = {
    "all": "all voxels",
    "disputed": f"voxels whose true probability of background is under {CERTAIN_BACKGROUND}",
}
"""The regions over which every statistic of :data:`TRUTH_STATISTICS` is taken, with their titles."""

TRUTH_STATISTICS: dict[str, TruthStatistic] = {
    "ece": TruthStatistic("ECE to the truth", TruthBins.calibration_error),
    "brier": TruthStatistic("squared error", TruthBins.mean_squared_error),
    "absolute_error": TruthStatistic("distance to the truth", TruthBins.mean_absolute_error),
}
"""Every figure of merit of a prediction against true probabilities, by its name."""


# ------------------------------------------------------------------------------------------------- Dice


class ClassCounts(NamedTuple):
    """Voxels of each class, int64 ``[*P, C]`` on the CPU: in both maps, in the prediction, in the label map."""

    hits: Tensor
    predicted: Tensor
    labelled: Tensor

    def __add__(self, other: Any) -> ClassCounts:
        """Add the counts of both; this is not the concatenation of two tuples."""
        return ClassCounts(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def dice(self) -> Tensor:
        """Dice of each class, float64 ``[*P, C]``; NaN where neither map holds the class."""
        return 2.0 * self.hits.double() / (self.predicted + self.labelled)


def count_classes(prediction: Tensor, label: Tensor, classes: int, *, ignore_index: int = -100) -> ClassCounts:
    """Count the voxels of ``prediction`` and ``label``, class indices of one shape; ignored voxels count nowhere."""
    wide = label.long()
    return _count(prediction, wide, wide != ignore_index, classes)


def _count(prediction: Tensor, label: Tensor, counted: Tensor, classes: int) -> ClassCounts:
    """Count the voxels where ``counted`` is True; all three arguments have one shape, ``label`` is int64."""
    pairs = torch.bincount(label[counted] * classes + prediction[counted], minlength=classes**2)
    table = pairs.cpu().view(classes, classes)
    return ClassCounts(table.diagonal().clone(), table.sum(0), table.sum(1))


# ------------------------------------------------------------------------------------------ sums of a case


class CaseScores(NamedTuple):
    """Sums of a case, or of a slab of it. ``+`` merges slabs and cases.

    Args:
        bins: :class:`calseg.CalibrationBins` of each region of :data:`REGIONS` by the region's name: top-label, and
            under ``NAME_classes`` class-wise. Further entries hold bins by other conventions.
        counts: voxels of each class in prediction and label map. A voxel with a NaN probability is in no count.
        truth: :class:`TruthBins` of each region of :data:`TRUTH_REGIONS`; empty where no true probability is known.
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
        truth: Tensor | None = None,
        conventions: Mapping[str, BinsOf] | None = None,
        ignore_index: int = -100,
    ) -> CaseScores:
        """Add up a volume or a slab, block by block.

        A block of :data:`BLOCK_BYTES` is read from memory once and stays in the cache while all its sums are made.
        Sums are integers, so the result has the same bits whatever the blocks.

        Args:
            scores: logits or probabilities, float ``[C, *S]``.
            label: class indices ``[*S]``.
            from_logits: whether ``scores`` are logits. Default True.
            n_bins: bins of confidence, of equal width. Default 15.
            class_wise: whether class-wise bins are made, too. Default True.
            truth: the true probability of every class, ``[C, *S]``, where it is known.
            conventions: functions that make bins by another convention, by the name of their entry in ``bins``.
            ignore_index: label of voxels that count nowhere. Default -100.
        """
        total: CaseScores | None = None
        for part in _blocks(scores):
            x, y = scores[:, part][None], label[part][None]
            bins = _region_bins(x, y, from_logits, n_bins, class_wise, ignore_index)
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
        assert total is not None  # an empty volume is one block
        return total

    def __add__(self, other: Any) -> CaseScores:
        """Add the sums of both; this is not the concatenation of two tuples."""
        return CaseScores(
            {name: bins + other.bins[name] for name, bins in self.bins.items()},
            self.counts + other.counts,
            {name: bins + other.truth[name] for name, bins in self.truth.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Nested lists of integers."""
        content = {"bins": {name: lists_of(bins) for name, bins in self.bins.items()}, **lists_of(self.counts)}
        if self.truth:
            content["truth"] = {name: lists_of(bins) for name, bins in self.truth.items()}
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CaseScores:
        """The inverse of :meth:`to_json`; entries of other names are left alone."""
        return cls(
            {name: CalibrationBins(**_tensors(bins)) for name, bins in content["bins"].items()},
            ClassCounts(**_tensors({name: content[name] for name in ClassCounts._fields})),
            {name: TruthBins(**_tensors(bins)) for name, bins in content.get("truth", {}).items()},
        )


def lists_of(sums: CalibrationBins | TruthBins | ClassCounts) -> dict[str, Any]:
    """The sums by name, as nested lists of integers."""
    return {name: each.tolist() for name, each in sums._asdict().items()}


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(sums, dtype=torch.int64, device="cpu") for name, sums in content.items()}


def stack(cases: Sequence[CaseScores]) -> CaseScores:
    """All cases in one object, whose tensors have a first axis ``[cases]``."""
    return CaseScores(
        {name: CalibrationBins(*_stacked([case.bins[name] for case in cases])) for name in cases[0].bins},
        ClassCounts(*_stacked([case.counts for case in cases])),
        {name: TruthBins(*_stacked([case.truth[name] for case in cases])) for name in cases[0].truth},
    )


def _stacked(parts: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    return [torch.stack(sums) for sums in zip(*parts, strict=True)]


def _blocks(scores: Tensor) -> Iterator[slice]:
    """Cut the first axis of space of ``[C, *S]`` into slices; on a GPU, whose memory is fast, into one."""
    length = scores.shape[1]
    rows = length
    if scores.device.type == "cpu" and length:
        rows = BLOCK_BYTES // (scores[:, 0].numel() * scores.element_size() or 1)
    for start in range(0, max(length, 1), max(rows, 1)):
        yield slice(start, start + max(rows, 1))


def _region_bins(
    scores: Tensor, label: Tensor, from_logits: bool, n_bins: int, class_wise: bool, ignore_index: int
) -> dict[str, CalibrationBins]:
    """The entries of :attr:`CaseScores.bins` for scores ``[1, C, *S]`` and labels ``[1, *S]``."""
    masks = {"all": None, "foreground": label > 0}
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
    """Sums of ``scores`` against the true probabilities ``truth``, both float ``[C, *S]``, by region.

    Args:
        scores: logits or probabilities.
        truth: the true probability of every class.
        counted: bool ``[*S]``: where False, a voxel counts nowhere, and it may then be NaN. Default: all count.
        from_logits: whether ``scores`` are logits. Default True.
        n_bins: bins of top-label confidence, of equal width. Default 15.
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
    """Warn of how many voxels are left out because a probability is NaN."""
    if num_nan := int(bins.num_nan.sum()):
        total = int(bins.num_voxels.sum())
        message = f"{num_nan} of {total} voxels have a NaN probability and are left out"
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)


def values_of(bins: Mapping[str, CalibrationBins], names: Sequence[str] = tuple(STATISTICS)) -> dict[str, Any]:
    """``{region: {statistic: value}}`` of the sums over all cases; None where a region has no voxel."""
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
    """Summary of the validation cases of a training run: Dice, and :data:`MAIN_STATISTICS`.

    Returns:
        ``dice``: ``{class: mean over the cases that hold it}``, from class 1 on; ``dice_mean``: the mean over these
        classes; ``voxels``: ``{region: count}``; for each region ``{statistic: value over the voxels of all cases}``;
        ``cases``: ``{case: {class: Dice}}``. None stands where there is no value.
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
    """The mean of the values that there are."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
