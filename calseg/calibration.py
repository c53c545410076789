"""Calibration error, which measures how far confidences are from accuracies.

It is computed from integer sums per bin, which are exact for any number of voxels.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from calseg import checks as check
from calseg.backends.choice import choose, engine
from calseg.operations import UNIT, BinsSpec, Labels
from calseg.regions import NEAR_RADIUS, Spacing, check_region, region_mask
from calseg.tensors import class_axis, compute_dtype, plain, shape_of

NORMS = ("l1", "l2", "max", "average")
EQUAL_MASS_CELLS = 4096  # number of cells of equal width, from which bins of equal mass are made
BINNED = ("count", "confidence", "hits", "partial_hits")  # the fields of CalibrationBins that have an axis of bins

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def with_input(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function take the keyword ``input``, the former name of ``preds``, too."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Result:
        if "input" in options and "preds" not in options:
            options["preds"] = options.pop("input")
        return function(*args, **options)

    return call


class CalibrationBins(NamedTuple):
    """Integer sums over voxels, from which calibration errors, negative log-likelihood and Brier score follow.

    The sums of two volumes, slabs or ranks can be added. All tensors are int64 on the CPU. ``*P`` is ``N`` if the sums
    are per batch item, and empty otherwise. ``*K`` is the number of classes for class-wise bins, and empty for
    top-label bins. Nothing is rounded when sums are added. So the sums are the same, bit for bit, for any number of
    threads, any order of updates and any number of ranks.

    Args:
        count: number of voxels in each bin, ``[*P, *K, n_bins]``.
        confidence: sum of the confidences in each bin, in units of 2^-24, ``[*P, *K, n_bins]``. Each confidence is
            rounded to a multiple of the unit, which is exact for a float32 confidence of 1/2 or more.
        hits: number of voxels in each bin for which the class of the confidence is the label, ``[*P, *K, n_bins]``.
        nll: sum of the negative log-likelihoods of the labels, ``[*P, 2]``: whole nats, and the rest in units of 2^-24.
        brier: sum of the squared errors of the probabilities, in units of 2^-24, ``[*P]``. The squared error of a voxel
            is summed over all classes and lies in [0, 2].
        num_voxels: number of voxels that count, ``[*P]``.
        num_nan: number of those with a NaN among their probabilities, ``[*P]``. They are in no bin, and in neither
            ``nll`` nor ``brier``.
        num_infinite: number of those whose label has probability 0, or a negative log-likelihood above 2^25, ``[*P]``.
            They are in the bins and in ``brier``, but not in ``nll``.
        partial_hits: sum of the shares above 0 and below 1 that soft labels give to the class of the confidence, in
            units of 2^-24, ``[*P, *K, n_bins]``. It is added to ``hits``, which has the voxels with a share of 1.

    No sum can overflow with fewer than 2^38 voxels.

    Example:
        >>> import torch, calseg
        >>> probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
        >>> bins = calseg.calibration_bins(probabilities, torch.tensor([0, 1, 1]), n_bins=2, from_logits=False)
        >>> bins.count, bins.hits
        (tensor([0, 3]), tensor([0, 2]))
        >>> bins.merge(bins).count
        tensor([0, 6])
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    confidence: Tensor
    hits: Tensor
    nll: Tensor
    brier: Tensor
    num_voxels: Tensor
    num_nan: Tensor
    num_infinite: Tensor
    partial_hits: Tensor

    def merge(self, other: CalibrationBins) -> CalibrationBins:
        """Return the sums over the voxels of both."""
        if not isinstance(other, CalibrationBins):
            raise TypeError(f"other: got {check.describe(other)}, wanted CalibrationBins")
        if self.count.shape != other.count.shape or self.num_voxels.shape != other.num_voxels.shape:
            raise ValueError(f"other: got bins {list(other.count.shape)}, wanted {list(self.count.shape)}")
        return CalibrationBins(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def __add__(self, other: Any) -> CalibrationBins:
        """Do as :meth:`merge`. The fields are added, and not concatenated as those of a tuple would be."""
        return self.merge(other)

    def pool(self) -> CalibrationBins:
        """Return the sums over all batch items, if they are per item."""
        return CalibrationBins(*(sums.sum(0) for sums in self)) if self.num_voxels.dim() else self

    def mean_confidence(self) -> Tensor:
        """Return the mean confidence of each bin, float64 ``[*P, *K, n_bins]``. It is NaN where a bin is empty."""
        return self.confidence.double() / UNIT / self.count

    def all_hits(self) -> Tensor:
        """Return the sum of whole and partial hits in each bin, float64 ``[*P, *K, n_bins]``."""
        return self.hits.double() + self.partial_hits.double() / UNIT

    def accuracy(self) -> Tensor:
        """Return the share of hits in each bin, float64 ``[*P, *K, n_bins]``. It is NaN where a bin is empty."""
        return self.all_hits() / self.count

    def mean_nll(self) -> Tensor:
        """Return the mean negative log-likelihood in nats, float64 ``[*P]``.

        It is Inf if ``num_infinite`` is above 0, and NaN if no voxel counts.
        """
        whole, rest = self.nll.double().unbind(-1)
        mean = (whole + rest / UNIT) / (self.num_voxels - self.num_nan)
        return torch.where(self.num_infinite > 0, torch.inf, mean)

    def mean_brier(self) -> Tensor:
        """Return the mean Brier score, summed over classes, float64 ``[*P]``. It is NaN if no voxel counts."""
        return self.brier.double() / UNIT / (self.num_voxels - self.num_nan)


@with_input
def calibration_bins(
    preds: Tensor,
    target: Tensor,
    *,
    n_bins: int = 15,
    from_logits: bool = True,
    class_wise: bool = False,
    include_background: bool = True,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    region: str = "all",
    radius: float = NEAR_RADIUS,
    spacing: Spacing = None,
    per_item: bool = False,
    right_closed: bool = False,
    backend: str | None = None,
) -> CalibrationBins:
    r"""Compute the sums of :class:`CalibrationBins` in one pass over the volume.

    A confidence :math:`p` falls into bin :math:`b` if :math:`b / n \le p < (b + 1) / n`. A confidence of 1 falls into
    the last bin. The edges are :math:`b / n` rounded to the dtype of the arithmetic: float64 for float64, else float32.

    Binary predictions have the shape of their integer labels. They stand for the two classes background and foreground,
    with all that the arguments say about classes. ``class_wise=True, include_background=False`` gives torchmetrics'
    binary calibration error, which bins the probability of the foreground.

    Soft labels have the shape of ``preds`` too, and a floating dtype. A hit is then the share of the raters who chose
    the class. The NLL of a voxel is :math:`-\sum_c Y_c \log p_c`, and its Brier score :math:`\sum_c (p_c - Y_c)^2`.
    Plain PyTorch computes them, whatever the backend. One-hot soft labels give the numbers of the class indices.

    Args:
        preds: logits, or probabilities if ``from_logits=False``, of shape ``[C]``, ``[N, C]`` or ``[N, C, *S]`` and
            dtype float32, float64, bfloat16 or float16. ``[N, C]`` is one batch item of N voxels. Or binary
            predictions of the foreground, ``[N, *S]`` or ``[N, 1, *S]`` as ``target``: logits, whose sigmoid is
            computed, or probabilities. ``input`` is the former name of this argument, and is taken too.
        target: class indices ``[N, *S]`` or ``[N, 1, *S]`` of any integer dtype. Or soft labels, floats of the shape of
            ``preds``, which sum to 1 over the classes. With one channel, they are the share of the foreground. The
            class of a soft label is the first one with the largest share, for the arguments that ask for the label.
        n_bins: number of bins of equal width over [0, 1], 1 to 65536. Default 15.
        from_logits: True if ``preds`` holds logits, whose softmax is computed, False if it holds probabilities.
            Default True.
        class_wise: False for top-label bins: the confidence of a voxel is its largest probability, and it is a hit if
            the first class with that probability is the label. True for class-wise bins: every class has its own bins,
            a confidence is the probability of the class, and it is a hit if that class is the label. Default False.
        include_background: False leaves out the background, in the way that is usual for either kind of bins.
            Top-label: voxels whose *label* is 0 do not count, neither in the bins nor in NLL and Brier score.
            Class-wise: class 0 has no bins, and all voxels count for the other classes. For class-wise bins over
            the voxels of the foreground, use ``region="foreground"``. Default True.
        ignore_index: label of voxels that do not count. Default -100.
        mask: bool ``[N, *S]`` or ``[N, 1, *S]``. A voxel does not count where it is False, whatever its label.
            Default: all voxels count.
        region: ``"all"`` voxels, those of the ``"foreground"`` (label not 0), or those ``"near"`` the foreground, as
            :func:`near_foreground` finds them. The label itself chooses the foreground, so the true probabilities have
            a calibration error there. Both outcomes lie near the foreground. For the voxels near one class, use
            ``mask=calseg.near_foreground(target == number)``. Default ``"all"``.
        radius: largest distance from the foreground with ``region="near"``, in voxels or in the unit of ``spacing``.
            Default 3.
        spacing: distance of neighbouring voxels, as in :func:`near_foreground`. Default: distances are in voxels.
        per_item: True for separate sums of every batch item. Default False.
        right_closed: True for bins :math:`b / n < p \le (b + 1) / n`, with 0 in the first bin. Default False.
        backend: ``"cpu"`` (native), ``"cuda"`` or ``"triton"`` (on a GPU) or ``"reference"`` (plain PyTorch).
            Default: the fastest one that is available.

    Returns:
        :class:`CalibrationBins`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or range. Or the probabilities of a
            voxel that counts do not sum to 1, or one of them lies below 0, by more than 0.001 (0.01 for bfloat16 and
            float16).
        IndexError: the label of a voxel that counts is not a class.

    Example:
        >>> import torch, calseg
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.1]])
        >>> bins = calseg.calibration_bins(logits, torch.tensor([0, 1, 0], dtype=torch.uint8), n_bins=4)
        >>> bins.count, bins.hits
        (tensor([0, 0, 1, 2]), tensor([0, 0, 0, 2]))
        >>> round(float(bins.mean_brier()), 4)
        0.1947

    Source: Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017; Nixon et al., *Measuring Calibration in
    Deep Learning*, 2019 (class-wise).
    """
    check.check_bins(n_bins)
    check.check_integer("ignore_index", ignore_index)
    check_region(region, radius, spacing)
    for name, flag in (
        ("from_logits", from_logits), ("class_wise", class_wise), ("include_background", include_background),
        ("per_item", per_item), ("right_closed", right_closed),
    ):  # fmt: skip
        check.check_flag(name, flag)
    pair = read_pair(preds, target, ignore_index, from_logits=from_logits)
    scores, labels = pair.scores, pair.labels
    counted = None if mask is None else check.check_mask("mask", plain(mask), scores)
    inside = region_mask(region, labels.tensor, radius, spacing, ignore_index)
    if inside is not None:
        counted = inside.view(torch.uint8) if counted is None else inside & counted
    if class_wise and not include_background and shape_of(scores)[1] == 1:
        raise ValueError(f"include_background: got False for one class ({check.describe(preds)}), wanted 2 or more")
    spec = BinsSpec(
        labels, counted, n_bins,
        first_class=int(class_wise and not include_background),
        from_logits=from_logits,
        class_wise=class_wise,
        skip_background=not (class_wise or include_background),
        per_item=per_item,
        right_closed=right_closed,
        tolerance=check.probability_tolerance(preds.dtype),
    )  # fmt: skip
    backend = choose(scores, backend, "calibration_bins")
    if pair.soft_labels is None:
        sums, totals = engine(backend).calibration_bins(spec, scores)
        sums = torch.nn.functional.pad(sums, (0, 1))  # no partial hits
    else:
        sums, totals = engine("reference").soft_calibration_bins(spec, scores, pair.soft_labels)
    if not class_wise:
        sums = sums[:, 0]
    if not per_item:
        sums, totals = sums[0], totals[0]
    nll, (brier, *numbers) = totals[..., :2], totals[..., 2:].unbind(-1)
    *binned, partial_hits = sums.unbind(-1)
    parts = (*binned, nll, brier, *numbers, partial_hits)
    return CalibrationBins(*(each.contiguous() for each in parts))


class Pair(NamedTuple):
    """Predictions and labels in the one form that the bins are computed from.

    Args:
        scores: logits or probabilities of all classes, ``[C]``, ``[N, C]`` or ``[N, C, *S]``.
        labels: class indices, ``[]``, ``[N]`` or ``[N, *S]``, of the most frequent class if they are soft.
        soft_labels: shares of the classes, with the shape of ``scores``, or None if the labels are hard.
    """

    scores: Tensor
    labels: Labels
    soft_labels: Tensor | None = None


def read_pair(preds: Any, target: Any, ignore_index: int, *, from_logits: bool) -> Pair:
    """Check predictions and labels, and return binary ones as those of two classes."""
    preds, target = plain(preds), plain(target)
    check.check_scores("preds", preds)
    preds = preds.detach()
    if not isinstance(target, Tensor) or target.shape != preds.shape:
        return Pair(preds, check.check_labels("target", target, preds, ignore_index))
    if not target.is_floating_point():
        _refuse_one_hot(target)
        scores = _two_classes(preds, from_logits)
        return Pair(scores, check.check_labels("target", _without_channel(target), scores, ignore_index))
    check.check_like("target", target, "preds", preds)
    if preds.shape[class_axis(preds)] == 1:
        preds, target = _two_classes(preds, from_logits), _two_classes(target.detach(), False)
    return Pair(preds, Labels(target.argmax(class_axis(target)), ignore_index), target.detach())


def _two_classes(foreground: Tensor, is_logits: bool) -> Tensor:
    """Return logits or probabilities of background and foreground, ``[N, 2, *S]``."""
    x = _without_channel(foreground)
    if is_logits:  # the softmax of (0, x) is the sigmoid of x
        return torch.stack([torch.zeros_like(x), x], 1)
    x = x.to(compute_dtype(x.dtype))
    return torch.stack([1 - x, x], 1)


def _without_channel(binary: Tensor) -> Tensor:
    """Return ``[N, 1, *S]`` as ``[N, *S]``."""
    return binary.squeeze(1) if binary.dim() > 1 else binary


def _refuse_one_hot(target: Tensor) -> None:
    """Raise ValueError if integer labels of the shape of the predictions are one-hot along axis 1."""
    if target.dim() > 2 and target.shape[1] > 1 and target.numel() and bool((target.bool().sum(1) == 1).all()):
        raise ValueError(
            f"target: got one-hot labels ({check.describe(target)}), wanted class indices (target.argmax(1)); binary "
            "labels of this kind are told apart by one channel, [N, 1, *S], as those of preds"
        )


def calibration_error_from_bins(bins: CalibrationBins, norm: str = "l1", *, equal_mass: int | None = None) -> Tensor:
    r"""Compute a calibration error from sums per bin.

    Let bin :math:`b` have :math:`n_b` voxels, mean confidence :math:`c_b` and accuracy :math:`a_b`, and let
    :math:`n = \sum_b n_b`. The norms are:

    - ``"l1"``: :math:`\sum_b \frac{n_b}{n} |c_b - a_b|`, the expected calibration error (ECE)
    - ``"l2"``: :math:`\sqrt{\sum_b \frac{n_b}{n} (c_b - a_b)^2}` (RMSCE)
    - ``"max"``: the largest :math:`|c_b - a_b|` (MCE)
    - ``"average"``: the mean of :math:`|c_b - a_b|` over the bins that are not empty (ACE)

    Voxels with NaN are in no bin. They are left out, and a warning says how many there are.

    Args:
        bins: from :func:`calibration_bins`.
        norm: ``"l1"``, ``"l2"``, ``"max"`` or ``"average"``. Default ``"l1"``.
        equal_mass: number :math:`G` of bins of equal mass. The fine bins that ``bins`` holds, called cells, are then
            regrouped: group :math:`g` takes the voxels of ranks :math:`n g / G` to :math:`n (g + 1) / G` in order of
            confidence. A cell across the boundary of two groups is divided between them in proportion, and its
            confidences and hits too. The result is the equal-mass error after the confidence and accuracy of every
            voxel are replaced by the means of its cell, so a confidence changes by less than the width of a cell.
            Default None: the bins are used as they are.

    Returns:
        A float64 tensor with the shape of ``bins.count`` without its last axis, so per item and per class if ``bins``
        are. It is NaN where no voxel counts.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range.

    Example:
        >>> import torch, calseg
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.1]])
        >>> bins = calseg.calibration_bins(logits, torch.tensor([0, 1, 0]))
        >>> [round(float(calseg.calibration_error_from_bins(bins, norm)), 3) for norm in ("l1", "l2", "max", "average")]
        [0.231, 0.312, 0.525, 0.231]
    """
    if not isinstance(bins, CalibrationBins):
        raise TypeError(f"bins: got {check.describe(bins)}, wanted CalibrationBins")
    if norm not in NORMS:
        raise ValueError(f"norm: got {check.shown(norm)}, wanted one of {', '.join(map(repr, NORMS))}")
    if equal_mass is not None:
        check.check_integer("equal_mass", equal_mass, 1)
    if num_nan := int(bins.num_nan.sum()):
        warnings.warn(
            f"calibration error: {num_nan} of {int(bins.num_voxels.sum())} voxels have a NaN probability and are left "
            "out",
            RuntimeWarning,
            stacklevel=2,
        )
    count, confidence, hits = bins.count.double(), bins.confidence.double() / UNIT, bins.all_hits()
    if equal_mass is not None:
        count, confidence, hits = _equal_mass(count, confidence, hits, equal_mass)
    total, filled = count.sum(-1), count > 0
    excess = (confidence - hits).abs()
    gap = torch.where(filled, excess / count, 0.0)
    if norm == "l1":
        return excess.sum(-1) / total
    if norm == "l2":
        return ((gap * excess).sum(-1) / total).sqrt()
    if norm == "max":
        return torch.where(total > 0, gap.amax(-1), torch.nan)
    return gap.sum(-1) / filled.sum(-1)


def _equal_mass(count: Tensor, confidence: Tensor, hits: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of cells ``[..., cells]`` as sums of groups with equal counts ``[..., groups]``.

    A cell across the boundary of two groups is divided between them in proportion.
    """
    upper = count.cumsum(-1)
    edges = upper[..., -1:] * torch.arange(groups + 1, dtype=torch.float64, device=upper.device) / groups
    cell = torch.searchsorted(upper, edges, right=False).clamp(max=count.shape[-1] - 1)
    before = upper - count
    share = ((edges - before.gather(-1, cell)) / count.gather(-1, cell)).nan_to_num(0.0).clamp(0.0, 1.0)

    def regroup(sums: Tensor) -> Tensor:
        below = (sums.cumsum(-1) - sums).gather(-1, cell) + share * sums.gather(-1, cell)
        return below.diff(dim=-1)

    return regroup(count), regroup(confidence), regroup(hits)


@with_input
def calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    n_bins: int = 15,
    norm: str = "l1",
    from_logits: bool = True,
    class_wise: bool = False,
    include_background: bool = True,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    region: str = "all",
    radius: float = NEAR_RADIUS,
    spacing: Spacing = None,
    per_item: bool = False,
    right_closed: bool = False,
    equal_mass: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Compute a calibration error: ECE, ACE, MCE or RMSCE.

    The fused engine reads the volume once and allocates nothing of its size. Counts are integers, so they stay exact in
    bins of more than 2^24 voxels, and the value does not depend on the number of threads.

    Args:
        preds: logits, or probabilities if ``from_logits=False``, ``[C]``, ``[N, C]`` or ``[N, C, *S]``, or binary
            predictions of the shape of ``target``, as in :func:`calibration_bins`.
        target: class indices ``[N, *S]`` or ``[N, 1, *S]``, or soft labels, as in :func:`calibration_bins`.
        n_bins: number of bins. Default 15.
        norm: ``"l1"`` (ECE), ``"l2"`` (RMSCE), ``"max"`` (MCE) or ``"average"`` (ACE).
            :func:`calibration_error_from_bins` has the formulas. Default ``"l1"``.
        from_logits: as in :func:`calibration_bins`. Default True.
        class_wise: True for the mean over classes of the error of each class's own probability. False for the error of
            the top label. Default False.
        include_background: as in :func:`calibration_bins`. If False, top-label errors are over the voxels whose label
            is not 0, and class-wise errors are over the classes from 1 on. Default True.
        ignore_index: as in :func:`calibration_bins`. Default -100.
        mask: as in :func:`calibration_bins`.
        region: as in :func:`calibration_bins`. Default ``"all"``.
        radius: as in :func:`calibration_bins`. Default 3.
        spacing: as in :func:`calibration_bins`.
        per_item: True for one value per batch item, False for one value over all. Default False.
        right_closed: as in :func:`calibration_bins`. Default False.
        equal_mass: True for bins of equal mass (adaptive bins): ``n_bins`` groups made from 4096 cells, as in
            :func:`calibration_error_from_bins`. False for bins of equal width. Default False.
        backend: as in :func:`calibration_bins`.

    Returns:
        A float64 tensor on the CPU, 0-d, or ``[N]`` if ``per_item``. It is NaN where no voxel counts.

    Raises:
        TypeError, ValueError, IndexError: as :func:`calibration_bins`.

    Example:
        >>> import torch, calseg
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.1]])
        >>> target = torch.tensor([0, 1, 0])
        >>> round(float(calseg.calibration_error(logits, target)), 3)
        0.231
        >>> round(float(calseg.calibration_error(logits, target, class_wise=True, norm="average")), 3)
        0.231
        >>> round(float(calseg.calibration_error(preds=torch.tensor([0.9, 0.2]), target=torch.tensor([1, 1]),
        ...                                      from_logits=False)), 3)  # binary
        0.45
        >>> shares = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.5, 0.5]])  # of the raters
        >>> round(float(calseg.calibration_error(logits, shares)), 3)
        0.132

    Source: Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017.
    """
    if norm not in NORMS:
        raise ValueError(f"norm: got {check.shown(norm)}, wanted one of {', '.join(map(repr, NORMS))}")
    check.check_flag("equal_mass", equal_mass)
    check.check_integer("n_bins", n_bins, 1)
    bins = calibration_bins(
        preds, target, n_bins=EQUAL_MASS_CELLS if equal_mass else n_bins, from_logits=from_logits,
        class_wise=class_wise, include_background=include_background, ignore_index=ignore_index, mask=mask,
        region=region, radius=radius, spacing=spacing, per_item=per_item, right_closed=right_closed, backend=backend,
    )  # fmt: skip
    error = calibration_error_from_bins(bins, norm, equal_mass=n_bins if equal_mass else None)
    return error.mean(-1) if class_wise else error
