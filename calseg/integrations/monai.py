"""Loss, metrics and soft labels for those who train with MONAI (the extra ``calseg[monai]``).

- :class:`DiceVLSLoss` takes the arguments of ``monai.losses.DiceCELoss`` and gives its values and gradients.
- :class:`CalibrationHandler` computes metrics of :mod:`calseg.metrics` in an evaluator.
- :class:`EnsureSoftLabeld` checks soft labels that MONAI's transforms have loaded beside the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

try:
    from monai.config.type_definitions import KeysCollection
    from monai.data.meta_tensor import MetaTensor
    from monai.handlers.utils import from_engine
    from monai.transforms.transform import MapTransform
    from monai.utils.type_conversion import convert_to_dst_type
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "monai":
        raise
    raise ModuleNotFoundError(
        "calseg.integrations.monai needs MONAI: pip install 'calseg[monai]'", name="monai"
    ) from None

from calseg import checks as check
from calseg.functional import vls_dice_cross_entropy
from calseg.tensors import as_fractions, as_integers, plain

__all__ = ["CalibrationHandler", "DiceVLSLoss", "EnsureSoftLabeld"]

OPTIONS = (
    "ignore_index", "alpha", "temperature", "num_samples", "beta", "prior_mu", "prior_logvar", "seed", "backend",
    "scale", "process_group",
)  # fmt: skip
"""Arguments of :func:`calseg.vls_dice_cross_entropy` that MONAI does not have."""


class DiceVLSLoss(_Loss):
    r"""Dice plus cross-entropy on variational soft labels, in place of ``monai.losses.DiceCELoss``.

    It is :func:`calseg.vls_dice_cross_entropy` with the arguments of ``DiceCELoss``, in their order. On hard labels it
    equals ``DiceCELoss`` in value and gradient. On soft labels the Dice term is the semimetric of that function, which
    is least where the probabilities are the soft labels (MONAI's ``DiceLoss(soft_label=True)``), and not the Dice of
    ``DiceCELoss``, which is least where they are 0 or 1.

    Args:
        include_background: False leaves class 0 out of the Dice term. Default True.
        to_onehot_y: True if the target holds class indices ``[B, 1, *S]``. Default False: it is one-hot,
            ``[B, C, *S]``. Soft labels, floats ``[B, C, *S]``, are taken with either.
        sigmoid: must be False: classes exclude each other.
        softmax: must be True: the input is logits. Default False, as in MONAI.
        other_act: must be None.
        squared_pred: must be False.
        jaccard: must be False.
        reduction: ``"mean"`` or ``"sum"``, of the Dice term over items and classes, and of the cross-entropy over
            voxels. Default ``"mean"``.
        smooth_nr: number added to the numerator of the Dice term, at least 0. Default 1e-5.
        smooth_dr: number added to its denominator, at least 0. Default 1e-5.
        batch: True for one Dice ratio per class over the whole batch. Default False.
        weight: factor of each class in both terms, ``[C]``, at least 0. The Dice term is a plain mean of the
            weighted values of the classes, and has no weights if only one class counts there. Default ones.
        lambda_dice: factor of the Dice term, at least 0. Default 1.
        lambda_ce: factor of the cross-entropy and the KL term, at least 0. Default 1.
        label_smoothing: uniform smoothing in the cross-entropy, in [0, 1]. Default 0.
        options: arguments of :func:`calseg.vls_dice_cross_entropy` that MONAI does not have: ``alpha``,
            ``temperature``, ``num_samples``, ``beta``, ``prior_mu``, ``prior_logvar``, ``seed``, ``ignore_index``,
            ``backend``, ``scale`` and ``process_group``.

    A call takes logits ``[B, C, *S]`` with C of at least 2, and a target of any dtype that
    :func:`calseg.vls_cross_entropy` takes, on the same device. It may also take ``mu`` and ``logvar``, or
    ``soft_labels``, each of the shape of the logits. It returns a 0-d tensor.

    A ``MetaTensor`` is read as the plain tensor that it holds, so it takes no longer.

    Raises:
        TypeError, ValueError: an argument has a value for which this loss is not that of MONAI, or a tensor has the
            wrong type or shape.
        IndexError: a label is neither a class nor ``ignore_index``.

    Example:
        >>> import torch
        >>> from calseg.integrations.monai import DiceVLSLoss
        >>> loss = DiceVLSLoss(to_onehot_y=True, softmax=True, include_background=False, alpha=0.3)
        >>> logits = torch.zeros(2, 3, 8, 8, 8)
        >>> label = torch.zeros(2, 1, 8, 8, 8)  # float32, as MONAI's data sets give it
        >>> loss(logits, label)
        tensor(2.0986)
        >>> mu, logvar = torch.zeros(2, 3, 8, 8, 8), torch.full((2, 3, 8, 8, 8), -4.0)
        >>> loss(logits, label, mu=mu, logvar=logvar).shape
        torch.Size([])
    """

    weight: Tensor | None

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Any] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Tensor | Sequence[float] | None = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        reduction = getattr(reduction, "value", reduction)  # MONAI has an enumeration, too
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: got {check.shown(reduction)}, wanted 'mean' or 'sum'")
        super().__init__(reduction=reduction)
        for name, given, wanted, why in (
            ("sigmoid", sigmoid, False, "classes exclude each other"),
            ("other_act", other_act, None, "the probabilities are the softmax of the logits"),
            ("squared_pred", squared_pred, False, "the Dice term has no squares"),
            ("jaccard", jaccard, False, "the overlap term is Dice"),
            ("softmax", softmax, True, "the input is logits"),
        ):
            if given is not wanted:
                raise ValueError(f"{name}: got {check.shown(given)}, wanted {wanted}: {why}")
        for name, flag in (("include_background", include_background), ("to_onehot_y", to_onehot_y), ("batch", batch)):
            check.check_flag(name, flag)
        for name, factor in (
            ("lambda_dice", lambda_dice), ("lambda_ce", lambda_ce), ("smooth_nr", smooth_nr), ("smooth_dr", smooth_dr),
        ):  # fmt: skip
            check.check_number(name, factor, 0.0, check.MAX, "of at least 0")
        check.check_number("label_smoothing", label_smoothing, 0.0, 1.0, "in [0, 1]")
        for name in options:
            if name not in OPTIONS:
                raise TypeError(f"DiceVLSLoss: unknown option {name!r}, wanted some of {', '.join(OPTIONS)}")
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.options: dict[str, Any] = {
            "dice_weight": float(lambda_dice),
            "ce_weight": float(lambda_ce),
            "include_background": include_background,
            "batch_dice": batch,
            "smooth": (float(smooth_nr), float(smooth_dr)),
            "reduction": reduction,
            "label_smoothing": float(label_smoothing),
            **options,
        }
        self.register_buffer("weight", None if weight is None else _class_weights(weight), persistent=False)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        soft_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch."""
        input, target = plain(input), plain(target)
        if isinstance(input, (list, tuple)):
            raise TypeError(
                f"input: got a {type(input).__name__} of {len(input)}, wanted a tensor [B, C, *S]; for the outputs of "
                "deep supervision, monai.losses.DeepSupervisionLoss(DiceVLSLoss(...))"
            )
        check.check_scores("input", input)
        classes = input.shape[1] if input.dim() > 1 else 0
        if input.dim() < 3 or classes < 2:
            why = ": for a single channel, give the background one of its own" if classes == 1 else ""
            raise ValueError(f"input: got {check.describe(input)}, wanted [B, C, *S] with at least 2 classes{why}")
        target = self._labels(target, classes)
        counted = classes - int(not self.include_background)
        return vls_dice_cross_entropy(
            input, target, self.weight, mu=mu, logvar=logvar, soft_labels=soft_labels,
            dice_class_weight=self.weight if counted > 1 else None, **self.options,
        )  # fmt: skip

    def _labels(self, target: Tensor, classes: int) -> Tensor:
        """Return the target as class indices or floating-point soft labels, according to its number of channels."""
        if not isinstance(target, Tensor):
            raise TypeError(f"target: got {check.describe(target)}, wanted a tensor [B, 1, *S] or [B, C, *S]")
        channels = target.shape[1] if target.dim() > 1 else 0
        if channels == 1 and self.to_onehot_y:
            return target
        if channels == classes and (target.is_floating_point() or not self.to_onehot_y):
            return target if target.is_floating_point() else target.float()
        wanted = "class indices [B, 1, *S] or floating-point soft labels" if self.to_onehot_y else "one-hot labels"
        why = "" if channels != 1 else "; for class indices, to_onehot_y=True"
        raise ValueError(f"target: got {check.describe(target)}, wanted {wanted} [B, {classes}, *S]{why}")

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _class_weights(weight: Any) -> Tensor:
    """Return class weights as a floating tensor ``[C]``."""
    try:
        weights: Tensor = plain(torch.as_tensor(weight))
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"weight: got {check.describe(weight)}, wanted a tensor or a sequence of numbers") from None
    weights = weights.detach() if weights.is_floating_point() else weights.float()
    if weights.dim() != 1 or not bool((weights >= 0).all()):
        raise ValueError(f"weight: got {check.shown(weights.tolist())}, wanted a number of at least 0 for each class")
    return weights


class CalibrationHandler:
    """Metrics of :mod:`calseg.metrics` over an epoch of an evaluator, for ``engine.state.metrics``.

    It is attached as a metric (``key_val_metric={"ece": CalibrationHandler(...)}``, or ``additional_metrics``), or as
    a handler (``val_handlers=[CalibrationHandler(...)]``). All metrics with the same settings read a volume once. In
    several processes of ``torch.distributed``, all of them get the value over the volumes of all, exactly.

    Args:
        metrics: a metric, or metrics by name, of torchmetrics, whose ``update`` takes predictions and target.
        output_transform: function from ``engine.state.output`` to predictions and target: tensors with a batch axis,
            or lists of tensors without one, as MONAI makes them by decollating. Predictions are logits, or
            probabilities for metrics with ``from_logits=False``. Targets are class indices ``[1, *S]``, or one-hot or
            soft labels ``[C, *S]``, floats. Default: the entries ``"pred"`` and ``"label"``.

    A metric that returns one number gives a float. A dictionary, as of :class:`calseg.metrics.PerCase`, gives its
    entry ``"value"`` under the name of the metric, and the others as ``NAME_lower`` and so on.

    A lower calibration error is better, so an evaluator needs ``metric_cmp_fn=operator.lt`` to find the best one.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: in the run, predictions are probabilities, and a metric of calseg takes logits; or what the metrics
            raise.

    Example:
        >>> import torch
        >>> from ignite.engine import Engine
        >>> from calseg.integrations.monai import CalibrationHandler
        >>> from calseg.metrics import BrierScore, CalibrationError
        >>> evaluator = Engine(lambda engine, batch: {"pred": batch[0], "label": batch[1]})
        >>> CalibrationHandler({"ece": CalibrationError(), "brier": BrierScore()}).attach(evaluator)
        >>> logits, label = torch.tensor([[[2.0], [0.0]]]), torch.tensor([[[0]]])
        >>> {name: round(value, 4) for name, value in evaluator.run([(logits, label)]).metrics.items()}
        {'brier': 0.0284, 'ece': 0.1192}
    """

    def __init__(
        self,
        metrics: Any,
        output_transform: Callable[[Any], Any] = from_engine(["pred", "label"]),  # noqa: B008
    ) -> None:
        try:
            from torchmetrics import Metric, MetricCollection
        except ModuleNotFoundError as error:
            if error.name != "torchmetrics":
                raise
            raise ModuleNotFoundError(
                "CalibrationHandler needs torchmetrics: pip install 'calseg[monai]'", name="torchmetrics"
            ) from None
        if not callable(output_transform):
            raise TypeError(f"output_transform: got {check.describe(output_transform)}, wanted a function")
        self.is_single = isinstance(metrics, Metric)
        if self.is_single:
            metrics = {type(metrics).__name__: metrics}
        if isinstance(metrics, Mapping) and not isinstance(metrics, MetricCollection):
            wrong = [name for name, metric in metrics.items() if not isinstance(metric, Metric)]
            if not metrics or wrong:
                what = f"{wrong[0]!r}: {check.describe(metrics[wrong[0]])}" if wrong else "none"
                raise TypeError(f"metrics: got {what}, wanted metrics of torchmetrics by name")
            metrics = MetricCollection(dict(metrics))
        if not isinstance(metrics, MetricCollection):
            raise TypeError(f"metrics: got {check.describe(metrics)}, wanted a metric, or metrics by name")
        self.metrics = metrics
        self.output_transform = output_transform
        self._is_first = True

    def attach(self, engine: Any, name: str | None = None) -> None:
        """Compute the metrics in every epoch of an engine.

        Args:
            engine: engine of ignite, such as MONAI's ``SupervisedEvaluator``.
            name: name of the value of a single metric, or prefix of the names of several. Default: the name of the
                class of a single metric, and no prefix.
        """
        from ignite.engine import Events

        if name is not None and not self.is_single and getattr(engine.state, "key_metric_name", None) == name:
            raise ValueError(f"{name}: got {len(self.metrics)} metrics by name, wanted one metric as the key metric")
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish, name)

    def _start(self, engine: Any) -> None:
        self.metrics.reset()
        self._is_first = True
        device = getattr(engine.state, "device", None)
        if device is not None:  # a process group for GPUs gathers tensors on them
            self.metrics.to(device)

    def _add(self, engine: Any) -> None:
        output = self.output_transform(engine.state.output)
        if not isinstance(output, (tuple, list)) or len(output) != 2:
            raise ValueError(f"output_transform: got {check.describe(output)}, wanted predictions and target")
        preds, target = output
        if isinstance(preds, Tensor):
            pairs = [(preds, target)]
        elif isinstance(preds, (tuple, list)) and isinstance(target, (tuple, list)) and len(preds) == len(target):
            pairs = [(item[None], label[None]) for item, label in zip(preds, target, strict=True)]
        else:
            raise TypeError(
                f"output_transform: got predictions {_kind(preds)} and target {_kind(target)}, wanted two tensors, or "
                "two lists of tensors of the same length"
            )
        for item, label in pairs:
            self._refuse_probabilities(item)
            self.metrics.update(item, label)

    def _refuse_probabilities(self, preds: Any) -> None:
        """Raise ValueError if the first predictions of an epoch are probabilities, and a metric takes logits."""
        if not self._is_first or not isinstance(preds, Tensor) or preds.dim() < 2 or preds.shape[1] < 2:
            return
        self._is_first = False
        some = plain(preds).detach().movedim(1, 0).flatten(1)[:, :4096].float()
        looks = some.numel() and bool((some >= 0).all()) and bool(((some.sum(0) - 1).abs() < 1e-3).all())
        taking = [name for name, metric in self.metrics.items(copy_state=False) if _takes_logits(metric)]
        if looks and taking:
            raise ValueError(
                f"{taking[0]}: got predictions that are probabilities, wanted logits; give the metric "
                "from_logits=False, or leave the softmax out"
            )

    def _finish(self, engine: Any, name: str | None) -> None:
        for key, metric in self.metrics.items():
            full_name = key if name is None else name if self.is_single else f"{name}_{key}"
            result = metric.compute()
            values = result if isinstance(result, Mapping) else {"value": result}
            for part, value in values.items():
                value = value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
                engine.state.metrics[full_name if part == "value" else f"{full_name}_{part}"] = value


def _takes_logits(metric: Any) -> bool:
    """Return whether a metric is one of calseg for logits. One over cases has the metric of a case."""
    options = getattr(getattr(metric, "metric", metric), "options", {})
    return isinstance(options, dict) and options.get("from_logits", False) is True


def _kind(value: Any) -> str:
    """Return the type of predictions or targets, with its length."""
    return f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else type(value).__name__


class EnsureSoftLabeld(MapTransform):
    """Dictionary transform that checks soft labels against the label of the same case, and makes them float32.

    Soft labels are loaded by MONAI's own transforms: the maps of ``calseg soft-labels`` are NIfTI files of four axes,
    whose numbers ``LoadImaged`` scales to probabilities. Give the key of the soft labels to every spatial transform
    beside that of the label, with the mode ``"bilinear"`` where one interpolates. This transform belongs behind
    ``LoadImaged``, ``EnsureChannelFirstd`` and ``Orientationd``, before anything random. It finds maps of another case,
    maps that are shifted, mirrored or turned against the label, and numbers that are no probabilities.

    Args:
        keys: keys of the soft labels, ``[C, *S]``.
        label_key: key of the label, class indices ``[1, *S]``. Default ``"label"``.
        num_classes: number C of classes. Default: any.
        alpha: that of ``calseg soft-labels``, if the maps come from there (0.4 unless it was given another). Then every
            voxel must give its own label a share of at least 1 - alpha, so that a shift by a single voxel is found.
            Default None: the mean of these shares over the foreground must be at least 1/2, which finds coarse faults.
        ignore_index: label of voxels whose soft labels are not checked, and become 0. Default -100.
        allow_missing_keys: True if a case may lack the keys. Default False.

    Raises:
        ValueError: soft labels do not fit their label, or are no probabilities. The message names the file.

    Example:
        >>> import torch
        >>> from calseg.integrations.monai import EnsureSoftLabeld
        >>> label = torch.tensor([[[0, 0, 1, 1]]])
        >>> soft = torch.tensor([[[0.9, 0.8, 0.1, 0.0]], [[0.1, 0.2, 0.9, 1.0]]])
        >>> check = EnsureSoftLabeld("soft_label", alpha=0.2)
        >>> check({"label": label, "soft_label": soft})["soft_label"].shape
        torch.Size([2, 1, 4])
        >>> check({"label": label, "soft_label": soft.roll(1, -1)})
        Traceback (most recent call last):
        ValueError: soft_label: gives the label of 2 of 4 voxels less than 1 - alpha = 0.8, at (0, 0) 0: is it ...
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_key: Hashable = "label",
        *,
        num_classes: int | None = None,
        alpha: float | None = None,
        ignore_index: int = -100,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if num_classes is not None:
            check.check_integer("num_classes", num_classes, 2)
        if alpha is not None:
            check.check_number("alpha", alpha, 0.0, 1.0, "in [0, 1]")
        check.check_integer("ignore_index", ignore_index)
        self.label_key = label_key
        self.num_classes = num_classes
        self.alpha = alpha
        self.ignore_index = ignore_index

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a case with its soft labels checked."""
        case = dict(data)
        for key in self.key_iterator(case):
            if self.label_key not in case:
                raise KeyError(f"{self.label_key}: not in the case, wanted the label of {key}")
            soft_labels, label = case[key], case[self.label_key]
            values = self._checked(_name_of(key, soft_labels), soft_labels, label)
            case[key] = convert_to_dst_type(values, soft_labels, dtype=torch.float32)[0]
        return case

    def _checked(self, name: str, soft_labels: Any, label: Any) -> Tensor:
        """Return soft labels that sum to 1 where the label counts, and are 0 elsewhere."""
        for what, value in ((name, soft_labels), (str(self.label_key), label)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{what}: got {check.describe(value)}, wanted a tensor with the channels first")
        _check_same_place(name, soft_labels, label)
        values, labels = plain(soft_labels), plain(label)
        classes = values.shape[0] if self.num_classes is None else self.num_classes
        if labels.shape[:1] != (1,) or values.shape != (classes, *labels.shape[1:]):
            raise ValueError(
                f"{name}: got {check.describe(values)}, wanted shape {[classes, *labels.shape[1:]]} for a label of "
                f"shape {list(labels.shape)}"
            )
        values, labels = as_fractions(values).float(), as_integers(labels[0])
        counted = labels != self.ignore_index
        is_class = (labels >= 0) & (labels < classes)
        if bool((counted & ~is_class).any()):
            wrong = labels[counted & ~is_class][0]
            raise ValueError(f"{name}: got {classes} classes, but the label {self.label_key} holds {int(wrong)}")
        total = values.sum(0)
        bad = counted & ~(((total - 1).abs() <= classes / 255) & (values.amin(0) >= 0))
        if bool(bad.any()):
            raise ValueError(f"{name}: sums to {float(total[bad][0]):.4g} in {_place(bad)}, wanted probabilities")
        values = torch.where(counted, values / torch.where(counted, total, 1.0), 0.0)
        self._check_agreement(name, values.gather(0, labels.clamp(0, classes - 1)[None])[0], labels, counted)
        return values

    def _check_agreement(self, name: str, share: Tensor, labels: Tensor, counted: Tensor) -> None:
        """Check the share that the soft labels of each voxel give to its own label."""
        if self.alpha is not None:
            low = counted & (share < 1 - self.alpha - 1e-3)
            if bool(low.any()):
                raise ValueError(
                    f"{name}: gives the label of {int(low.sum())} of {int(counted.sum())} voxels less than 1 - alpha = "
                    f"{1 - self.alpha:.4g}, at {_place(low)} {float(share[low][0]):.3g}: is it shifted, or "
                    "made with another alpha?"
                )
            return
        foreground = counted & (labels > 0)
        region = foreground if bool(foreground.any()) else counted
        mean = float(share[region].mean()) if bool(region.any()) else 1.0
        if mean < 0.5:
            raise ValueError(
                f"{name}: gives the foreground of the label a share of {mean:.2g} in the mean, wanted at least 0.5: is "
                "it of another case, or turned?"
            )


def _name_of(key: Hashable, value: Any) -> str:
    """Return a key, and the file that it was read from if it is known."""
    file = value.meta.get("filename_or_obj") if isinstance(value, MetaTensor) else None
    return f"{key} ({file})" if file else str(key)


def _check_same_place(name: str, soft_labels: Tensor, label: Tensor) -> None:
    """Check that soft labels and label, if they say where they lie, lie in the same place.

    The identity is what tensors have that know of no place.
    """
    if not (isinstance(soft_labels, MetaTensor) and isinstance(label, MetaTensor)):
        return
    first, second = (plain(each.affine).double().cpu() for each in (soft_labels, label))
    if any(torch.equal(affine, torch.eye(len(affine), dtype=torch.float64)) for affine in (first, second)):
        return
    size = float(second[:-1, :-1].abs().max())
    if first.shape != second.shape or bool(((first - second).abs() > 1e-2 * size).any()):
        raise ValueError(
            f"{name}: got the affine {first.tolist()}, wanted that of the label, {second.tolist()}; if their axes "
            "differ, Orientationd belongs before this transform"
        )


def _place(where: Tensor) -> str:
    """Return the place of the first voxel that is True."""
    return str(tuple(where.nonzero()[0].tolist()))
