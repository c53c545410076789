"""Streaming metrics of calibration for torchmetrics (the extra ``calseg[metrics]``).

The state of a metric is the integer sums of :class:`calseg.CalibrationBins`, a few kilobytes for a data set of any
size. Nothing is rounded when sums are added. So the value is the same, bit for bit, for any order of updates and
merges, and for any distribution of the volumes over ranks. Metrics with the same settings have the same state. A
``torchmetrics.MetricCollection`` then makes one pass over each volume for all of them (``compute_groups``, its
default).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

try:
    from torchmetrics import Metric
except ModuleNotFoundError as error:
    if error.name != "torchmetrics":
        raise
    raise ModuleNotFoundError(
        "calseg.metrics needs torchmetrics: pip install 'calseg[metrics]'", name="torchmetrics"
    ) from None

from calseg import checks as check
from calseg.bootstrap import NUM_RESAMPLES, check_options, mean_interval, pooled_interval
from calseg.calibration import (
    BINNED,
    EQUAL_MASS_CELLS,
    NORMS,
    CalibrationBins,
    calibration_bins,
    read_pair,
    with_input,
)
from calseg.regions import NEAR_RADIUS, REGIONS, Spacing, check_region, sizes_of
from calseg.scores import quiet_calibration_error, warn_of_nan
from calseg.tensors import compute_dtype

__all__ = ["PRESETS", "BrierScore", "CalibrationError", "NegativeLogLikelihood", "PerCase", "preset_metric"]

Plot = tuple[Any, Any]
"""The figure, which is None if the caller gave the axes, and the axes."""


def _as_integer(number: float) -> int:
    """Return the bits of a float64 as an integer."""
    return int(torch.tensor(number, dtype=torch.float64, device="cpu").view(torch.int64))


class _ExactMetric(Metric):
    """Base class of the metrics of this module. Their states are integers, which are never cast to another dtype."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_legend_name = "Class"

    settings: Tensor

    def _add_settings(self, *values: int) -> None:
        # Keep the settings as a state. A collection then does not group metrics with different settings whose first
        # sums happen to be equal. Also, a state with other settings is rejected when it is merged or loaded.
        self.add_state("settings", torch.tensor(values, dtype=torch.int64), dist_reduce_fx="max")

    def _differs(self, settings: Any) -> bool:
        """Return whether these settings are not those of this metric."""
        mine = cast(Tensor, self._defaults["settings"]).cpu()
        return not (isinstance(settings, Tensor) and torch.equal(settings.cpu(), mine))

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the sums of another metric of this kind with the same settings, or of its ``metric_state``."""
        state = incoming_state.metric_state if isinstance(incoming_state, Metric) else incoming_state
        if isinstance(state, dict) and self._differs(state.get("settings")):
            raise ValueError("incoming_state: got the state of a metric with other settings, wanted the same")
        super().merge_state(incoming_state)
        self._update_count += 1  # the merged state counts as an update
        self._computed = None

    def set_dtype(self, dst_type: str | torch.dtype) -> Metric:
        """Do nothing, so that the state stays exact integers."""
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}settings")
        if saved is not None and self._differs(saved):
            args[-1].append(f"{prefix}settings: got the state of a metric with other settings, wanted the same")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


class _BinMetric(_ExactMetric):
    """Base class of the metrics that are computed from the sums of :class:`calseg.CalibrationBins`."""

    count: Tensor

    def __init__(
        self,
        *,
        n_bins: int = 15,
        from_logits: bool = True,
        class_wise: bool = False,
        num_classes: int | None = None,
        include_background: bool = True,
        foreground_only: bool = False,
        region: str = "all",
        radius: float = NEAR_RADIUS,
        spacing: Spacing = None,
        ignore_index: int = -100,
        right_closed: bool = False,
        separate_one: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check.check_integer("n_bins", n_bins, 1)
        check.check_integer("ignore_index", ignore_index)
        for name, flag in (
            ("from_logits", from_logits), ("class_wise", class_wise), ("include_background", include_background),
            ("foreground_only", foreground_only), ("right_closed", right_closed), ("separate_one", separate_one),
        ):  # fmt: skip
            check.check_flag(name, flag)
        check_region(region, radius, spacing)
        if foreground_only and region != "all":
            raise ValueError(f"foreground_only: got True with region={region!r}, wanted one of the two")
        if class_wise != (num_classes is not None):
            raise ValueError(
                f"num_classes: got {check.shown(num_classes)}, wanted the number of classes with class_wise=True only"
            )
        if num_classes is not None:
            check.check_integer("num_classes", num_classes, 1 if include_background else 2)
        if separate_one and (class_wise or right_closed):
            raise ValueError("separate_one: got True, wanted False with class_wise or right_closed")
        self.class_wise = class_wise
        self.num_classes = num_classes
        self.separate_one = separate_one
        self.options: dict[str, Any] = {
            "n_bins": n_bins,
            "from_logits": from_logits,
            "class_wise": class_wise,
            "include_background": include_background,
            "ignore_index": ignore_index,
            "right_closed": right_closed,
        }
        region = "foreground" if foreground_only else region
        flags = [*map(int, self.options.values()), separate_one, list(REGIONS).index(region)]
        distances = [radius, *([] if spacing is None else sizes_of(spacing))]
        self.options |= {"region": region, "radius": radius, "spacing": spacing}
        kinds = () if num_classes is None else (num_classes - (not include_background),)
        binned = torch.zeros(*kinds, self.options["n_bins"] + separate_one, dtype=torch.int64)
        scalar = torch.zeros((), dtype=torch.int64)
        shapes = {**dict.fromkeys(BINNED, binned), "nll": torch.zeros(2, dtype=torch.int64)}
        for name in CalibrationBins._fields:
            self.add_state(name, shapes.get(name, scalar).clone(), dist_reduce_fx="sum")
        self._add_settings(
            *flags, separate_one, list(REGIONS).index(self.options["region"]), *map(_as_integer, distances)
        )

    @property
    def bins(self) -> CalibrationBins:
        """Sums of all updates in this process, on the CPU."""
        return CalibrationBins(*(getattr(self, name).cpu() for name in CalibrationBins._fields))

    @with_input
    def update(self, preds: Tensor | CalibrationBins, target: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Add a volume, a batch of volumes, or a slab of a volume.

        Args:
            preds: predictions, as :func:`calseg.calibration_bins` takes them. Or its result for such a tensor with the
                same settings.
            target: class indices or soft labels, as :func:`calseg.calibration_bins` takes them.
            mask: bool ``[N, *S]`` or ``[N, 1, *S]``. A voxel does not count where it is False. It replaces a region
                that differs between volumes, such as :func:`calseg.near_foreground` with their own spacing.
        """
        for name, sums in self.item_bins(preds, target, mask).pool()._asdict().items():
            setattr(self, name, getattr(self, name) + sums.to(self.device))

    @with_input
    def item_bins(
        self, preds: Tensor | CalibrationBins, target: Tensor | None = None, mask: Tensor | None = None
    ) -> CalibrationBins:
        """Return the sums that :meth:`update` adds, with one item per batch item of ``preds``."""
        if isinstance(preds, CalibrationBins):
            bins = preds if preds.num_voxels.dim() else CalibrationBins(*(sums[None] for sums in preds))
        elif target is None:
            raise TypeError("target: got None, wanted a tensor of class indices")
        else:
            bins = self._item_bins(preds, target, mask)
        if bins.count.shape[1:] != self.count.shape:
            raise ValueError(f"preds: got bins {list(bins.count.shape[1:])}, wanted {list(self.count.shape)}")
        return bins

    def _item_bins(self, preds: Tensor, target: Tensor, mask: Tensor | None) -> CalibrationBins:
        """Do as :meth:`item_bins` for a tensor."""
        if not self.separate_one:
            return calibration_bins(preds, target, mask=mask, per_item=True, **self.options)
        scores = read_pair(preds, target, self.options["ignore_index"], from_logits=self.options["from_logits"]).scores
        dtype = compute_dtype(scores.dtype)
        p = torch.softmax(scores, 1, dtype=dtype) if self.options["from_logits"] else scores.to(dtype)
        is_one = p.amax(1).float() == 1
        counted = torch.ones_like(is_one) if mask is None else check.check_mask("mask", mask, scores).bool()
        below, one = (
            calibration_bins(preds, target, mask=part, per_item=True, **self.options)
            for part in (counted & ~is_one, counted & is_one)
        )
        binned = {name: torch.cat([getattr(below, name), getattr(one, name)[..., -1:]], -1) for name in BINNED}
        return (below + one)._replace(**binned)

    def value_of(self, bins: CalibrationBins) -> Tensor:
        """Return the metric of every item of sums ``[items, ...]``, float64 ``[items]`` or ``[items, K]``."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """Return the value over all updates of all ranks, float64 0-d, or ``[K]`` with ``average="none"``."""
        bins = self.bins
        warn_of_nan(bins, stacklevel=4)
        return self.value_of(bins)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Plot:
        """Draw the value or values ``val``, by default the current one, as torchmetrics does.

        Returns:
            The figure and the axes.
        """
        return cast(Plot, self._plot(val, ax))


class CalibrationError(_BinMetric):
    r"""Expected, average, maximum or root-mean-square calibration error over a stream of volumes.

    Args:
        norm: ``"l1"`` (ECE), ``"l2"`` (RMSCE), ``"max"`` (MCE) or ``"average"`` (ACE).
            :func:`calseg.calibration_error_from_bins` has the formulas. Default ``"l1"``.
        n_bins: number of bins. Default 15.
        from_logits: True if inputs are logits, False if they are probabilities. Default True.
        class_wise: True for the error of each class's own probability, which needs ``num_classes``. False for the error
            of the top label. Default False.
        num_classes: number of classes C. Give it only with ``class_wise=True``.
        average: ``"macro"`` for the mean over the classes, ``"none"`` for one value per class. It matters only with
            ``class_wise=True``. Default ``"macro"``.
        include_background: False leaves out the background: for the top label, voxels whose label is 0, and class-wise,
            class 0. Default True.
        foreground_only: True does as ``region="foreground"``. Default False.
        region: ``"all"`` voxels, those of the ``"foreground"`` (label not 0), or those ``"near"`` the foreground, as in
            :func:`calseg.calibration_bins`. Default ``"all"``.
        radius: largest distance from the foreground with ``region="near"``, in voxels or in the unit of ``spacing``.
            Default 3.
        spacing: distance of neighbouring voxels, as in :func:`calseg.near_foreground`. Default: distances are in
            voxels.
        ignore_index: label of voxels that do not count. Default -100.
        right_closed: True for bins :math:`(lo, hi]`, False for :math:`[lo, hi)`. Default False.
        equal_mass: True for bins of equal mass (adaptive bins), made from 4096 cells. Default False.
        separate_one: True if confidences that are exactly 1 get a bin of their own, as in torchmetrics. This needs
            temporary memory of the size of a volume. Default False.
        kwargs: arguments of ``torchmetrics.Metric``.

    ``compute`` returns float64. A voxel with a NaN probability is in no bin. If there are such voxels, ``compute``
    warns and says how many.

    Example:
        >>> import torch
        >>> from calseg.metrics import CalibrationError
        >>> metric = CalibrationError(n_bins=4)
        >>> for volume in range(3):
        ...     logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 3.0, 0.1]]])
        ...     metric.update(logits, torch.tensor([[0, 1, 0]]))
        >>> round(float(metric.compute()), 4)
        0.2305
    """

    plot_upper_bound = 1.0

    def __init__(
        self,
        *,
        norm: str = "l1",
        n_bins: int = 15,
        average: str = "macro",
        equal_mass: bool = False,
        **kwargs: Any,
    ) -> None:
        check.check_flag("equal_mass", equal_mass)
        check.check_integer("n_bins", n_bins, 1)
        super().__init__(n_bins=EQUAL_MASS_CELLS if equal_mass else n_bins, **kwargs)
        if norm not in NORMS:
            raise ValueError(f"norm: got {check.shown(norm)}, wanted one of {', '.join(map(repr, NORMS))}")
        if average not in ("macro", "none"):
            raise ValueError(f"average: got {check.shown(average)}, wanted 'macro' or 'none'")
        self.norm = norm
        self.n_bins = n_bins
        self.average = average
        self.equal_mass = equal_mass

    def value_of(self, bins: CalibrationBins) -> Tensor:  # noqa: D102
        # Give no warning of NaN here: compute() does.
        error = quiet_calibration_error(bins, self.norm, equal_mass=self.n_bins if self.equal_mass else None)
        return error.mean(-1) if self.class_wise and self.average == "macro" else error

    def diagram_bins(self, bins: CalibrationBins) -> CalibrationBins:
        """Return bins of equal width, which a diagram can show.

        With ``equal_mass``, every 16 cells become one bin. With ``separate_one``, the bin of the confidence 1 is added
        to the last one.
        """
        if not (self.equal_mass or self.separate_one):
            return bins
        binned = {name: getattr(bins, name) for name in BINNED}
        for name, sums in binned.items():
            if self.separate_one:
                sums = torch.cat([sums[..., :-2], sums[..., -2:].sum(-1, keepdim=True)], -1)
            if self.equal_mass:
                sums = sums.unflatten(-1, (16, -1)).sum(-1)
            binned[name] = sums
        return bins._replace(**binned)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Plot:
        """Draw the reliability diagram of all updates, or given values.

        Args:
            val: a result of ``compute`` or ``forward``, or a sequence of results. If it is given, these values are
            drawn
                as torchmetrics draws values.
            ax: axes to draw the diagram into, without its histogram. Must be None with ``class_wise``.

        Returns:
            The figure, which is None if ``ax`` is given, and the axes.
        """
        if val is not None:
            return super().plot(val, ax)
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            bins = self.bins
        return _draw(self, bins, None, ax)


class NegativeLogLikelihood(_BinMetric):
    """Mean negative log-likelihood of the labels, in nats, from the same state as :class:`CalibrationError`.

    The arguments have the names and the defaults of :class:`CalibrationError`.

    Args:
        from_logits: True if inputs are logits, False if they are probabilities.
        include_background: False leaves out voxels whose label is 0, if ``class_wise`` is False.
        foreground_only: True does as ``region="foreground"``.
        region: ``"all"`` voxels, those of the ``"foreground"``, or those ``"near"`` it.
        radius: largest distance from the foreground with ``region="near"``.
        spacing: distance of neighbouring voxels. Default: distances are in voxels.
        ignore_index: label of voxels that do not count.
        n_bins: as for :class:`CalibrationError`. This argument and those below do not change the value. A collection
            reads a volume only once for all metrics in which they are equal too.
        class_wise: see ``n_bins``.
        num_classes: see ``n_bins``.
        right_closed: see ``n_bins``.
        separate_one: see ``n_bins``.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from torchmetrics import MetricCollection
        >>> from calseg.metrics import BrierScore, CalibrationError, NegativeLogLikelihood
        >>> metrics = MetricCollection([CalibrationError(), NegativeLogLikelihood(), BrierScore()])
        >>> metrics.update(torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.1]]), torch.tensor([0, 1, 0]))
        >>> {name: round(float(value), 4) for name, value in metrics.compute().items()}
        {'CalibrationError': 0.2305, 'NegativeLogLikelihood': 0.3066, 'BrierScore': 0.1947}
        >>> metrics.compute_groups
        {0: ['CalibrationError', 'NegativeLogLikelihood', 'BrierScore']}
    """

    def value_of(self, bins: CalibrationBins) -> Tensor:  # noqa: D102
        return bins.mean_nll()


class BrierScore(_BinMetric):
    """Brier score: squared error of the probabilities, summed over classes (0 to 2 per voxel), mean over voxels.

    The arguments have the names and the defaults of :class:`CalibrationError`.

    Args:
        from_logits: True if inputs are logits, False if they are probabilities.
        include_background: False leaves out voxels whose label is 0, if ``class_wise`` is False.
        foreground_only: True does as ``region="foreground"``.
        region: ``"all"`` voxels, those of the ``"foreground"``, or those ``"near"`` it.
        radius: largest distance from the foreground with ``region="near"``.
        spacing: distance of neighbouring voxels. Default: distances are in voxels.
        ignore_index: label of voxels that do not count.
        n_bins: as for :class:`CalibrationError`. This argument and those below do not change the value. A collection
            reads a volume only once for all metrics in which they are equal too.
        class_wise: see ``n_bins``.
        num_classes: see ``n_bins``.
        right_closed: see ``n_bins``.
        separate_one: see ``n_bins``.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from calseg.metrics import BrierScore
        >>> metric = BrierScore(from_logits=False)
        >>> metric.update(torch.tensor([[0.8, 0.2], [0.4, 0.6]]), torch.tensor([0, 0]))
        >>> round(float(metric.compute()), 4)
        0.4
    """

    plot_upper_bound = 2.0

    def value_of(self, bins: CalibrationBins) -> Tensor:  # noqa: D102
        return bins.mean_brier()


class PerCase(_ExactMetric):
    """Mean over cases of a metric, and its bootstrap interval.

    Every batch item of an ``update`` is a case. The state is the sums of each case, a few kilobytes per case. Only the
    order of :attr:`values` depends on the order of the updates and on the ranks.

    Args:
        metric: metric of one case. Its settings are used, and its state is not.
        pooled: True for the value of all cases together, which is that of ``metric`` over the stream. False for the
            mean of the values of the cases. Default False.
        confidence_level: probability that the interval should cover. Default 0.95.
        num_resamples: how many times the cases are drawn with replacement. Default 2000.
        seed: seed of these draws. Default 0.
        kwargs: arguments of ``torchmetrics.Metric``.

    ``compute`` returns ``{"value", "lower", "upper"}``, each float64, 0-d or ``[K]`` if ``metric`` gives a value per
    class. Cases where no voxel counts are left out before cases are drawn. ``lower`` and ``upper`` are NaN if there are
    fewer than two cases.

    Example:
        >>> import torch
        >>> from calseg.metrics import CalibrationError, PerCase
        >>> metric = PerCase(CalibrationError(n_bins=4))
        >>> logits = torch.randn(8, 3, 6, 6, 6, generator=torch.Generator().manual_seed(0))
        >>> metric.update(logits, logits.argmax(1))
        >>> {name: round(float(value), 3) for name, value in metric.compute().items()}
        {'value': 0.407, 'lower': 0.402, 'upper': 0.41}
    """

    def __init__(
        self,
        metric: _BinMetric,
        *,
        pooled: bool = False,
        confidence_level: float = 0.95,
        num_resamples: int = NUM_RESAMPLES,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(metric, _BinMetric):
            raise TypeError(f"metric: got {check.describe(metric)}, wanted a metric of calseg.metrics")
        check.check_flag("pooled", pooled)
        check_options(confidence_level, num_resamples, seed)
        self.metric = metric
        self.pooled = pooled
        self.confidence_level = confidence_level
        self.num_resamples = num_resamples
        self.seed = seed
        for name in CalibrationBins._fields:
            self.add_state(name, [], dist_reduce_fx="cat")
        self._add_settings(*metric.settings.tolist())

    @property
    def cases(self) -> CalibrationBins:
        """Sums of all cases of this process, with one item per case, on the CPU."""
        empty = CalibrationBins(*(sums[None][:0] for sums in self.metric.bins))
        state = {name: getattr(self, name) for name in CalibrationBins._fields}
        parts = {name: [sums] if isinstance(sums, Tensor) else sums for name, sums in state.items()}
        return CalibrationBins(*(torch.cat([getattr(empty, name), *(p.cpu() for p in parts[name])]) for name in parts))

    @property
    def values(self) -> Tensor:
        """Metric of each case of this process, float64 ``[cases]`` or ``[cases, K]``, in the order of the updates."""
        return self.metric.value_of(self.cases)

    @with_input
    def update(self, preds: Tensor | CalibrationBins, target: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Add every batch item as a case.

        For a case that comes in slabs, give the sum of their :func:`calseg.calibration_bins`.

        Args:
            preds: as for :meth:`CalibrationError.update`.
            target: as for :meth:`CalibrationError.update`.
            mask: as for :meth:`CalibrationError.update`.
        """
        for name, sums in self.metric.item_bins(preds, target, mask)._asdict().items():
            getattr(self, name).append(sums.to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """Return ``{"value", "lower", "upper"}`` over the cases of all ranks."""
        options: dict[str, Any] = {name: getattr(self, name) for name in ("confidence_level", "num_resamples", "seed")}
        cases = self.cases
        warn_of_nan(cases, stacklevel=4)
        if self.pooled:
            return pooled_interval(cases, self.metric.value_of, **options)._asdict()
        values = self.metric.value_of(cases)
        columns = values[:, None] if values.dim() == 1 else values
        intervals = [mean_interval(column, **options) for column in columns.unbind(1)]
        shape = values.shape[1:]
        return {
            name: torch.stack([getattr(interval, name) for interval in intervals]).reshape(shape)
            for name in ("value", "lower", "upper")
        }

    def plot(self, val: Any = None, ax: Any = None) -> Plot:
        """Draw as :meth:`CalibrationError.plot`. The diagram shows all cases pooled, and the spread over the cases."""
        if val is not None or not isinstance(self.metric, CalibrationError):
            return cast(Plot, self._plot(val, ax))
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            cases = self.cases
        return _draw(self.metric, cases.pool(), cases, ax)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # Replace the state of a rank without a case by empty sums. torchmetrics would make a float tensor of one axis
        # of it.
        for name, sums in self.cases._asdict().items():
            setattr(self, name, [sums.to(self.device)])
        super()._sync_dist(*args, **kwargs)


def _draw(metric: CalibrationError, bins: CalibrationBins, cases: CalibrationBins | None, ax: Any) -> Plot:
    """Draw the reliability diagram of these bins, and the spread over cases if they are given."""
    from calseg import plots

    if metric.class_wise and ax is not None:
        raise ValueError(f"ax: got {type(ax).__name__}, wanted None: a class-wise diagram makes a figure of its own")
    bins, cases = metric.diagram_bins(bins), None if cases is None else metric.diagram_bins(cases)
    if not metric.class_wise:
        return plots.reliability_diagram(bins, cases=cases, ax=ax)
    first = 0 if metric.options["include_background"] else 1
    names = [f"class {number}" for number in range(first, first + bins.count.shape[-2])]
    return plots.class_reliability_diagrams(bins, names, cases=cases)


PRESETS: dict[str, dict[str, Any]] = {
    "torchmetrics": {"n_bins": 15, "separate_one": True},
    "monai": {"n_bins": 20, "class_wise": True, "right_closed": True},
    "marginloss": {"n_bins": 15, "foreground_only": True, "right_closed": True},
}
"""Settings of :class:`CalibrationError` that give the values of other packages; see :func:`preset_metric`."""


def preset_metric(name: str, **settings: Any) -> CalibrationError | PerCase:
    """Return a metric that computes the calibration error as another package defines it.

    - ``"torchmetrics"``: as ``MulticlassCalibrationError``. The error is top-label and pooled over all voxels, with 15
      bins ``[lo, hi)``. A confidence of exactly 1 has a bin of its own. Norms are ``"l1"``, ``"l2"`` and ``"max"``.
    - ``"monai"``: as ``CalibrationErrorMetric``. There is one error per image and class, with 20 bins, and the value is
      the mean over classes and images. The bins are ``(lo, hi]``, as in MONAI's code, although its documentation says
      ``[lo, hi)``. MONAI's "expected", "average" and "maximum" are the norms ``"l1"``, ``"average"`` and ``"max"``.
      This preset needs ``num_classes``.
    - ``"marginloss"``: as in MarginLoss, and after it CRaC and NACL. There is one top-label error per
      volume, over the voxels whose label is not 0, with 15 bins ``(lo, hi]``. The value is the mean over the volumes.
      With ``class_wise=True`` and ``num_classes`` it is MarginLoss's CECE. MarginLoss also rounds the error of each
      volume to 4 digits, which is not done here.

    Args:
        name: ``"torchmetrics"``, ``"monai"`` or ``"marginloss"``.
        settings: arguments of :class:`CalibrationError` that are added to the preset or replace those of the preset.

    Returns:
        A :class:`CalibrationError` for ``"torchmetrics"``. For the other presets a :class:`PerCase`, in whose result
        ``"value"`` is the value of that package.

    Raises:
        TypeError, ValueError: the name is unknown, or :class:`CalibrationError` raises.

    Example:
        >>> import torch
        >>> from calseg.metrics import preset_metric
        >>> metric = preset_metric("marginloss", from_logits=False)
        >>> metric.update(torch.tensor([[[0.9, 0.2], [0.1, 0.8]]]), torch.tensor([[0, 1]]))
        >>> round(float(metric.compute()["value"]), 4)
        0.2
    """
    if name not in PRESETS:
        raise ValueError(f"name: got {check.shown(name)}, wanted one of {', '.join(map(repr, PRESETS))}")
    metric = CalibrationError(**{**PRESETS[name], **settings})
    return metric if name == "torchmetrics" else PerCase(metric)
