"""The table of operations: for each public one how it is called, its formula, its options and its tolerances.

``test_operations.py`` runs every property over the table. A new operation needs an entry here, a formula in
``naive.py`` and a ``test_<operation>.py`` for what no other operation has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import naive
import torch
import torch.nn.functional as F
from cases import FLOATS, REDUCTIONS, Result, assert_accurate, class_weights, evaluate, labels, scores
from torch import Tensor

import calseg

Options = Mapping[str, Any]


class Tolerance(NamedTuple):
    """Bounds of :func:`cases.assert_accurate`, for the value and for the gradients."""

    ulps: float
    scale: float = 0.0
    grad_ulps: float | None = None
    grad_scale: float = 0.0


class Sizes(NamedTuple):
    """Arguments of ``test_every_size``: longest size for a number of classes, options, and tolerance."""

    longest: Mapping[int, int]
    tolerance: Callable[[int], Tolerance]
    options: tuple[Options, ...] = ({},)
    float64: bool = False


@dataclass(frozen=True, eq=False)
class Operation:
    """A public operation as its tests see it.

    Attributes:
        name: the name in the tests' ids.
        function: takes the tensors and every other argument by name, and returns one tensor.
        oracle: the same arguments, without ``backend``; the formula in float64, with nothing of calseg in it.
        tensors: the arguments that get gradients, with how they are made for a shape and a dtype.
        result: ``"loss"`` (reduced, or a value per voxel), ``"map"`` (the shape of the input), ``"items"`` (a value per
            item and class, reduced), ``"total"`` (one value) or ``"bins"`` (sums of integers, without gradients).
        labels: the argument that says what is ignored: ``"target"`` (class indices), ``"ignore_mask"`` or None.
        options: sets of options that the values are tested with; ``weighted`` stands for class weights.
        tolerance: of values and gradients.
        typical: options with which every term counts, for autograd, compilation and memory layouts.
        sizes: what the test of sizes takes, where there is one.
        classes: numbers of classes that every option is tested with.
        ignored: the values of ``ignore_index`` that every option is tested with; None is the default, without such
            voxels.
        defaults: arguments of every call that says nothing else.
        held_fixed: tensors through which a part of the result has no gradient, though it depends on them.
        takes_weight: whether there are class weights.
        noise: whether there are random numbers, at addresses that depend on the shape.
        classes_of_shapes: numbers of classes that every shape is tested with.
        dtypes_of_values: dtypes in which values can be compared with the oracle's.
    """

    name: str
    function: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    tensors: Mapping[str, Callable[..., Tensor]]
    tolerance: Tolerance
    result: str = "loss"
    labels: str | None = "target"
    options: tuple[Options, ...] = ({},)
    typical: Options = field(default_factory=dict)
    sizes: Sizes | None = None
    classes: tuple[int, ...] = (1, 2, 3, 4, 5, 14)
    ignored: tuple[int | None, ...] = (-100, 0)
    defaults: Options = field(default_factory=dict)
    held_fixed: tuple[str, ...] = ()
    takes_weight: bool = True
    noise: bool = False
    classes_of_shapes: tuple[int, ...] = (5,)
    dtypes_of_values: tuple[torch.dtype, ...] = FLOATS

    @property
    def reductions(self) -> tuple[str, ...]:
        """The reductions of a loss. An operation without reductions has a single entry."""
        return REDUCTIONS if self.result in ("loss", "items") else ("none",)

    @property
    def differentiable(self) -> bool:
        return self.result != "bins"

    @property
    def has_ignore_index(self) -> bool:
        return self.labels == "target"

    @property
    def ignored_values(self) -> tuple[int | None, ...]:
        return self.ignored if self.has_ignore_index else (-100,)

    @property
    def per_voxel(self) -> bool:
        """Whether a voxel's result depends on that voxel alone."""
        return self.result in ("loss", "map")

    @property
    def variants(self) -> tuple[Options, ...]:
        """The default options, and the typical ones."""
        return ({}, self.typical) if self.typical else ({},)

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """The tensors that get gradients."""
        return {name: make(*shape, dtype=dtype) for name, make in self.tensors.items()}

    def target(self, shape: tuple[int, ...], ignore_index: int | None = -100, dtype: torch.dtype = torch.int64):
        """Return labels, a fifth of which is ignored, or the mask of that fifth.

        The voxel of a shape ``[C]`` counts.
        """
        made = labels(shape, ignore_index=-1 if self.labels == "ignore_mask" else ignore_index, dtype=dtype)
        if len(shape) == 1:
            made = torch.zeros_like(made) if ignore_index != 0 else torch.ones_like(made)
        return made < 0 if self.labels == "ignore_mask" else made

    def arguments(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, *, ignore_index: int | None = -100,
        weighted: bool = False, **options: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Every other argument for scores of ``shape``."""
        if self.labels is not None and self.labels not in options:
            options[self.labels] = self.target(shape, ignore_index)
        if self.has_ignore_index and ignore_index is not None:
            options["ignore_index"] = ignore_index
        if weighted:
            options["weight"] = class_weights(shape[1 if len(shape) > 1 else 0], dtype)
        if self.result in ("loss", "items"):
            options.setdefault("reduction", "none")
        return {**self.defaults, **options}

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the result for inputs of ``dtype``."""
        if self.result == "bins":
            return torch.float64
        return torch.promote_types(dtype, torch.float32) if "map0" in self.tensors else dtype

    def bind(self, backend: str | None, arguments: Options) -> Callable[..., Tensor]:
        """The operation as a function of its tensors by name."""
        return functools.partial(self.function, backend=backend, **arguments)

    def bind_oracle(self, arguments: Options) -> Callable[..., Tensor]:
        wide = dict(arguments)
        if wide.get("weight") is not None:
            wide["weight"] = wide["weight"].double()
        return functools.partial(self.oracle, **wide)

    def __repr__(self) -> str:
        return self.name


def run(operation: Operation, function: Callable[..., Tensor], tensors: Mapping[str, Tensor]) -> Result:
    """Return the value, and the gradients if there are any."""
    return evaluate(function, tensors) if operation.differentiable else Result(function(**tensors), {})


@functools.cache
def truth(operation: Operation, shape: tuple[int, ...], dtype: torch.dtype, options: frozenset[tuple[str, Any]]):
    """Return the result of the oracle for inputs rounded to ``dtype``. It is computed once for all backends."""
    wide = {name: t.double() for name, t in operation.inputs(shape, dtype).items()}
    function = operation.bind_oracle(operation.arguments(shape, dtype, **dict(options)))
    return run(operation, function, wide)


def assert_result(
    operation: Operation, got: Result, wanted: Result, tolerance: Tolerance | None = None, what: str = ""
) -> None:
    """Value and gradients to the operation's tolerance."""
    ulps, scale, grad_ulps, grad_scale = tolerance or operation.tolerance
    # The sums of bins are given in float64, and their parts are rounded to 2^-24.
    value = got.value if operation.differentiable else got.value.float()
    assert_accurate(value, wanted.value, ulps=ulps, scale=scale, what=f"{what} value")
    for name, gradient in got.gradients.items():
        assert_accurate(
            gradient, wanted.gradients[name], ulps=ulps if grad_ulps is None else grad_ulps, scale=grad_scale,
            what=f"{what} gradient of {name}",
        )  # fmt: skip


def assert_right(
    operation: Operation, backend: str | None, shape: tuple[int, ...], dtype: torch.dtype, **options: Any
) -> None:
    """The operation gives what its oracle gives, each gradient in its input's dtype."""
    tensors, arguments = operation.inputs(shape, dtype), operation.arguments(shape, dtype, **options)
    got = run(operation, operation.bind(backend, arguments), tensors)
    assert got.value.dtype == operation.result_dtype(dtype)
    assert all(gradient.dtype == tensors[name].dtype for name, gradient in got.gradients.items())
    wanted = truth(operation, shape, dtype, frozenset(options.items()))
    assert_result(operation, got, wanted, what=f"{list(shape)} {dtype} {options}:")


# ---- inputs ----


def logits(*shape: int, dtype: torch.dtype) -> Tensor:
    return scores(*shape, dtype=dtype)


def means(*shape: int, dtype: torch.dtype) -> Tensor:
    return scores(*shape, dtype=dtype, seed=1, scale=1.5)


def log_variances(*shape: int, dtype: torch.dtype) -> Tensor:
    return scores(*shape, dtype=dtype, seed=2, scale=0.8)


def masses(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return numbers in place of soft labels, which are not negative and have any sum."""
    return scores(*shape, dtype=dtype, seed=9).abs()


def probabilities(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.softmax(scores(*shape, seed=3), 1 if len(shape) > 1 else 0).to(dtype)


def another_map(seed: int) -> Callable[..., Tensor]:
    return lambda *shape, dtype: scores(*shape, dtype=dtype, seed=seed)


GAUSSIAN = {"mu": means, "logvar": log_variances}


# ---- functions that differ from the public ones ----


def _accumulate(*, target=None, backend=None, map0, map1, **options):
    return calseg.accumulate_soft_labels(iter((map0, map1)), target, backend=backend, **options)


def _naive_accumulate(*, target=None, map0, map1, **options):
    return naive.accumulate_soft_labels([map0, map1], target, **options)


def _cross_entropy(*, input, target, **options):
    return F.cross_entropy(input, target if target.shape == input.shape else target.long(), **options)


def _bins(**arguments):
    """The sums as one tensor of numbers that float64 holds exactly."""
    bins = calseg.calibration_bins(**arguments)
    assert all(sums.dtype == torch.int64 for sums in bins)
    assert int(bins.num_nan.sum()) == int(bins.num_infinite.sum()) == 0
    nll = bins.nll[..., 0] + bins.nll[..., 1] / naive.UNIT
    parts = (bins.count, bins.confidence / naive.UNIT, bins.hits, nll, bins.brier / naive.UNIT, bins.num_voxels)
    return torch.cat([part.double().flatten() for part in parts])


# ---- tolerances and options ----

# In float32 the noise is good to 1e-6 (8 ulp of 1); a softmax and a sum over samples follow.
NOISE = Tolerance(48)
# In float32 a confidence rounds by up to 2^-25, and its place between two of n_bins centres by n_bins times that. The
# gradient divides by the mass of a bin, so bins of little mass are left out where float32 is judged.
ACE_ULPS = {"hard": 8, "soft": 64}
EMPTY_WEIGHT = 0.5

WEIGHTS_AND_SMOOTHING = tuple(
    {**({"weighted": True} if weighted else {}), "label_smoothing": smoothing}
    for weighted, smoothing in product((False, True), (0.0, 0.3, 1.0))
)
SAMPLING = (
    {},
    {"alpha": 0.6, "temperature": 0.5, "num_samples": 1},
    {"alpha": 1.0, "temperature": 2.0, "num_samples": 3, "beta": 0.2, "prior_mu": 0.5, "prior_logvar": -1.0},
    {"alpha": 0.3, "label_smoothing": 0.2, "beta": 0.0, "num_samples": 5, "seed": -9},
    {"alpha": 0.0, "beta": 2.0},
    {"alpha": 0.5, "weighted": True, "num_samples": 2, "beta": -0.5},
    {"alpha": 0.0, "beta": 0.0, "weighted": True},
)
DICE = (
    {},
    {"batch_dice": True, "include_background": True, "smooth": 1.0},
    {"weighted": True, "label_smoothing": 0.2, "dice_weight": 0.5, "ce_weight": 2.0, "scale": 0.25},
    {"ce_weight": 0.0, "smooth": 0.0},
    {"weighted": True, "reduction": "sum", "smooth": (0.0, 1e-3)},
)
SOFT_LABELS = (
    {},
    {"alpha": 0.5, "num_samples": 1, "temperature": 0.5},
    {"alpha": 1.0, "num_samples": 3, "seed": -1},
    {"alpha": 0.0},
    {"temperature": 4.0, "num_samples": 9, "alpha": 0.25},
)
ELBO = (
    {},
    {"num_samples": 1, "beta": 0.0},
    {"num_samples": 3, "prior_mu": -0.5, "prior_logvar": 0.7, "beta": 0.3},
    {"weighted": True, "seed": -4},
)
PRIORS = ({}, {"prior_mu": 0.5, "prior_logvar": -1.0}, {"prior_mu": -2, "prior_logvar": 3})
ACCUMULATED = ({}, {"temperature": 2.0}, {"alpha": 0.7}, {"temperature": 0.5})
ACE = tuple(
    {"n_bins": bins, "empty_weight": EMPTY_WEIGHT, "include_background": background, **rest}
    for bins, background, rest in (
        (6, True, {"weighted": True}), (6, False, {"weighted": True}), (1, True, {}),
        (20, True, {"ignore_empty_classes": False}), (4, False, {"ignore_empty_classes": False, "weighted": True}),
    )
)  # fmt: skip
# One class has a gradient of 0, to which an error cannot be relative. test_every_size covers it.
TWO_OR_MORE = (2, 5, 14)
BINS = ({}, {"n_bins": 1}, {"n_bins": 10}, {"n_bins": 64})
# Around the widths of vectors, tiles and unrolled class loops: cases.CLASSES.
ALL_CLASSES = {C: 2049 if C < 33 else 300 for C in (1, 2, 3, 4, 5, 7, 8, 9, 14, 16, 17, 32, 33, 117)}


def _up_to(longest: int, wide: int = 129) -> Callable[..., dict[int, int]]:
    return lambda *classes: {C: longest if C < 8 else wide for C in classes}


def _ace(binning: str, **typical: Any) -> Operation:
    ulps = ACE_ULPS[binning]
    return Operation(
        f"ace-{binning}", calseg.ace_loss, naive.ace_loss, {"input": logits},
        Tolerance(ulps, 4.0, 4 * ulps, 0.1), "items", typical={"n_bins": 7, **typical}, options=ACE,
        classes=(2, 3, 5, 14), classes_of_shapes=(2, 5), defaults={"binning": binning},
        sizes=Sizes(dict.fromkeys((2, 3, 8, 33), 1031), lambda C: Tolerance(ulps, 1.0, 4 * ulps, 0.02),
                    ({"n_bins": 5, "empty_weight": EMPTY_WEIGHT, "reduction": "mean"},)),
    )  # fmt: skip


def _bins_of(name: str, *, from_logits: bool, **kind: Any) -> Operation:
    return Operation(
        f"bins-{name}", _bins, naive.calibration_bins, {"input": logits if from_logits else probabilities},
        Tolerance(16, 8.0), "bins", options=BINS, classes=(2, 3, 5, 14), ignored=(None, -100, 99), takes_weight=False,
        defaults={"from_logits": from_logits, **kind},
        # Logits rounded to float32 may fall on the other side of an edge: test_calibration.py.
        dtypes_of_values=(torch.float64,) if from_logits else (torch.float32, torch.float64),
    )  # fmt: skip


_TABLE = [
    Operation(
        "cross_entropy", calseg.vls_cross_entropy, _cross_entropy, {"input": logits}, Tolerance(8),
        typical={"weighted": True, "label_smoothing": 0.1},
        options=WEIGHTS_AND_SMOOTHING, classes=TWO_OR_MORE, ignored=(None, -100, 2, 255),
        sizes=Sizes(ALL_CLASSES, lambda C: Tolerance(8 + C / 4, 8.0, None, 2.0),
                    ({}, {"weighted": True, "label_smoothing": 0.1}), float64=True),
    ),
    Operation(
        "class_probabilities", calseg.vls_cross_entropy, _cross_entropy, {"input": logits, "target": masses},
        Tolerance(16), labels=None, typical={"weighted": True, "label_smoothing": 0.1},
        options=WEIGHTS_AND_SMOOTHING, classes=TWO_OR_MORE,
        sizes=Sizes(ALL_CLASSES, lambda C: Tolerance(8 + C / 4, 8.0, None, 8.0), float64=True),
    ),
    Operation(
        "soft_cross_entropy", calseg.soft_cross_entropy, naive.soft_cross_entropy,
        {"input": logits, "soft_target": masses}, Tolerance(16), labels=None, typical={"weighted": True},
        options=WEIGHTS_AND_SMOOTHING, classes=TWO_OR_MORE,
    ),
    Operation(
        "masked", calseg.soft_cross_entropy, naive.soft_cross_entropy, {"input": logits, "soft_target": masses},
        Tolerance(16), labels="ignore_mask", options=WEIGHTS_AND_SMOOTHING, classes=TWO_OR_MORE,
        sizes=Sizes(_up_to(1031)(2, 5), lambda C: Tolerance(16, 8.0, None, 8.0)),
    ),
    Operation(
        "given_soft_labels", calseg.vls_cross_entropy, naive.vls_cross_entropy,
        {"input": logits, "soft_labels": masses}, Tolerance(16), options=WEIGHTS_AND_SMOOTHING, classes=TWO_OR_MORE,
        ignored=(-100, 3),
        sizes=Sizes(_up_to(1031)(2, 5), lambda C: Tolerance(16, 8.0, None, 8.0)),
    ),
    Operation(
        "vls_cross_entropy", calseg.vls_cross_entropy, naive.vls_cross_entropy, {"input": logits, **GAUSSIAN},
        Tolerance(48, 2.0), typical={"alpha": 0.6, "temperature": 0.7, "num_samples": 3},
        options=SAMPLING, defaults={"seed": 11}, noise=True, classes_of_shapes=(4,),
        sizes=Sizes(_up_to(2049)(2, 3, 4, 7, 8, 16, 17, 33), lambda C: Tolerance(48, 8.0, None, 8.0),
                    ({"alpha": 0.7, "num_samples": 3},)),
    ),
    Operation(
        "dice", calseg.vls_dice_cross_entropy, naive.vls_dice_cross_entropy, {"input": logits}, Tolerance(16, 1.0, 32),
        "total", typical={"weighted": True, "label_smoothing": 0.1, "batch_dice": True},
        options=DICE, classes=TWO_OR_MORE, ignored=(None, -100, 2, 255), classes_of_shapes=(2, 5),
        sizes=Sizes(_up_to(1031)(2, 3, 4, 5, 8, 17, 33, 117), lambda C: Tolerance(16, 1.0, 32, 0.05)),
    ),
    Operation(
        "dice_of_probabilities", calseg.vls_dice_cross_entropy, naive.vls_dice_cross_entropy,
        {"input": logits, "target": probabilities}, Tolerance(16, 1.0, 32), "total", labels=None,
        held_fixed=("target",),
        options=DICE, classes=TWO_OR_MORE, classes_of_shapes=(2, 5),
    ),
    Operation(
        "dice_of_soft_labels", calseg.vls_dice_cross_entropy, naive.vls_dice_cross_entropy,
        {"input": logits, "soft_labels": probabilities}, Tolerance(16, 1.0, 32), "total",
        typical={"weighted": True, "label_smoothing": 0.1}, options=DICE, classes=TWO_OR_MORE, ignored=(-100, 1),
        classes_of_shapes=(2, 5), held_fixed=("soft_labels",),
        sizes=Sizes(_up_to(1031)(2, 5, 33), lambda C: Tolerance(16, 1.0, 32)),
    ),
    Operation(
        "dice_of_samples", calseg.vls_dice_cross_entropy, naive.vls_dice_cross_entropy, {"input": logits, **GAUSSIAN},
        Tolerance(48, 2.0, 48), "total", typical={"alpha": 0.6, "temperature": 0.7, "num_samples": 3},
        options=(*SAMPLING, {"batch_dice": True, "alpha": 0.5, "include_background": True}), classes=TWO_OR_MORE,
        defaults={"seed": 11}, noise=True, classes_of_shapes=(4,), held_fixed=("mu", "logvar"),
        # The labels of 16 bits wait as multiples of 1 / 65535: test_vls_dice_cross_entropy.py.
        dtypes_of_values=(torch.float32, torch.float64),
        sizes=Sizes(_up_to(1031)(2, 4, 8, 17), lambda C: Tolerance(48, 2.0, 48), ({"alpha": 0.7, "num_samples": 3},)),
    ),
    Operation(
        "vls_elbo", calseg.vls_elbo, naive.vls_elbo, dict(GAUSSIAN), NOISE, typical={"num_samples": 3},
        options=ELBO, ignored=(-100, 1),
        defaults={"seed": 3}, noise=True, classes_of_shapes=(4,),
        sizes=Sizes(dict.fromkeys((2, 5, 9), 1031), lambda C: Tolerance(48, 8.0, None, 8.0)),
    ),
    Operation(
        "gaussian_kl", calseg.gaussian_kl, naive.gaussian_kl, dict(GAUSSIAN), Tolerance(16), labels=None,
        typical={"prior_mu": 0.2, "prior_logvar": -0.3},
        options=PRIORS, classes=(1, 5, 14), classes_of_shapes=(1, 5), takes_weight=False,
        sizes=Sizes(dict.fromkeys((1, 3, 8, 33), 1031), lambda C: Tolerance(16 + C / 4, 4.0, None, 4.0)),
    ),
    Operation(
        "sample_soft_labels", calseg.sample_soft_labels, naive.sample_soft_labels, dict(GAUSSIAN),
        Tolerance(48, 1.0, None, 1.0), "map", typical={"num_samples": 3, "alpha": 0.4},
        options=SOFT_LABELS, defaults={"seed": 21}, noise=True, classes_of_shapes=(4,),
        takes_weight=False,
        sizes=Sizes(_up_to(1031)(2, 3, 8, 33), lambda C: Tolerance(48, 1.0, None, 1.0), ({"alpha": 0.5},)),
    ),
    Operation(
        "estimate", calseg.sample_soft_labels, naive.sample_soft_labels, dict(GAUSSIAN),
        Tolerance(48, 1.0, None, 1.0), "map", labels=None, typical={"num_samples": 3},
        options=SOFT_LABELS, defaults={"seed": 21}, noise=True, classes_of_shapes=(4,),
        takes_weight=False,
    ),
    Operation(
        "accumulate_soft_labels", _accumulate, _naive_accumulate, {"map0": logits, "map1": another_map(1)},
        Tolerance(16, 1.0, None, 1.0), "map", typical={"temperature": 2.0, "alpha": 0.4},
        options=ACCUMULATED, takes_weight=False,
        sizes=Sizes(_up_to(1031)(2, 5), lambda C: Tolerance(16, 1.0, None, 1.0)),
    ),
    Operation(
        "accumulated_estimate", _accumulate, _naive_accumulate, {"map0": logits, "map1": another_map(1)},
        Tolerance(16, 1.0, None, 1.0), "map", labels=None, typical={"temperature": 2.0},
        options=ACCUMULATED, takes_weight=False,
    ),
    _ace("hard"),
    _ace("soft", include_background=False, weighted=True),
    _bins_of("top", from_logits=True),
    _bins_of("classes", from_logits=True, class_wise=True),
    _bins_of("top-foreground", from_logits=True, include_background=False),
    _bins_of("classes-foreground", from_logits=True, class_wise=True, include_background=False),
    _bins_of("probabilities", from_logits=False),
    _bins_of("class-probabilities", from_logits=False, class_wise=True),
]  # fmt: skip

OPERATIONS = {operation.name: operation for operation in _TABLE}
DIFFERENTIABLE = {name: operation for name, operation in OPERATIONS.items() if operation.differentiable}
# An operation under one of its reductions.
REDUCED = {
    f"{name}-{reduction}" if len(operation.reductions) > 1 else name: (operation, reduction)
    for name, operation in DIFFERENTIABLE.items()
    for reduction in operation.reductions
}
