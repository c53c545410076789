"""Checks of arguments, which all operations share. An error names the argument, what was given and what is wanted."""

from __future__ import annotations

import math
import os
import reprlib
import sys
from typing import Any

import torch
from torch import Tensor

from calseg.errors import brief
from calseg.operations import Labels
from calseg.tensors import (
    FLOAT_DTYPES,
    LABEL_DTYPES,
    SOFT_LABEL_DTYPES,
    as_fractions,
    as_integers,
    class_axis,
    flat,
    voxel_shape,
)

REDUCTIONS = ("none", "mean", "sum")
MAX_BINS = 1 << 16
MAX = sys.float_info.max
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-30, 1e30  # float32 has their reciprocals
CHECK_LABELS = os.environ.get("CALSEG_CHECK_LABELS", "0") not in ("", "0")


_abbreviating = reprlib.Repr()
_abbreviating.maxstring = _abbreviating.maxother = 100


def shown(value: Any) -> str:
    """Return ``repr(value)`` for an error message, in one line of at most 200 characters."""
    return brief(_abbreviating.repr(value))


def describe(value: Any) -> str:
    """Describe a value for an error message. A tensor is described by dtype, shape and device."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {brief(list(value.shape), 100)} on {value.device}"
    return f"{shown(value)} ({type(value).__name__})"


def check_scores(name: str, value: Any) -> None:
    """Check that a value is a floating tensor ``[C]``, ``[N, C]`` or ``[N, C, *S]``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {describe(value)}, wanted a tensor [C], [N, C] or [N, C, *S]")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got {describe(value)}, wanted float32, float64, bfloat16 or float16")
    sizes = value.shape
    if not sizes or sizes[1 if len(sizes) > 1 else 0] == 0:
        raise ValueError(f"{name}: got {describe(value)}, wanted [C], [N, C] or [N, C, *S] with at least one class")


def check_like(
    name: str, value: Any, other_name: str, other: Tensor, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
) -> None:
    """Check that a value is a tensor with the shape and the device of ``other``, and has one of the dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {describe(value)}, wanted a tensor like {other_name}")
    if value.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: got {describe(value)}, wanted one of {known}")
    if value.shape != other.shape:
        raise ValueError(f"{name}: got {describe(value)}, wanted the shape of {other_name}, {list(other.shape)}")
    if value.device != other.device:
        raise ValueError(f"{name}: got {describe(value)}, wanted it on {other.device}, where {other_name} is")


def check_labels(name: str, value: Any, scores: Tensor, ignore_index: int) -> Labels:
    """Check that a value is labels ``[N, *S]`` or ``[N, 1, *S]`` for these scores, and return those of ``[N, *S]``."""
    return Labels(_voxels(name, value, scores), ignore_index, has_channel=value.dim() == scores.dim() > 1)


def _voxels(name: str, value: Any, scores: Tensor) -> Tensor:
    """Check that a value has a number for every voxel, and return it as ``[N, *S]``. bool becomes uint8."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {describe(value)}, wanted a tensor of class indices")
    if value.dtype not in LABEL_DTYPES:
        raise TypeError(f"{name}: got {describe(value)}, wanted class indices")
    of_scores, given = scores.shape, value
    wanted = of_scores[:1] + of_scores[2:] if len(of_scores) > 1 else of_scores[:0]
    if value.dim() == len(of_scores) > 1 and value.shape[1] == 1:
        value = value.squeeze(1)
    if value.shape != wanted:
        why = ""
        if value.shape == of_scores:
            why = ": it looks one-hot or like regions that overlap, and classes exclude each other; "
            why += f"{name}.argmax(1) for one-hot, soft_labels={name}.float() for probabilities"
        raise ValueError(
            f"{name}: got {describe(given)}, wanted shape {list(wanted)} for scores of shape {list(scores.shape)}{why}"
        )
    if value.device != scores.device:
        raise ValueError(f"{name}: got {describe(value)}, wanted it on {scores.device}")
    voxels: Tensor = value
    if value.dtype == torch.bool:
        voxels = value.byte() if torch._C._get_tracing_state() else value.view(torch.uint8)
    return voxels


def check_mask(name: str, value: Any, scores: Tensor) -> Tensor:
    """Check that a value is a bool tensor ``[N, *S]`` or ``[N, 1, *S]``, and return it as uint8 ``[N, *S]``."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise TypeError(f"{name}: got {describe(value)}, wanted a bool tensor")
    return _voxels(name, value, scores)


def check_soft_labels(name: str, value: Any, scores: Tensor) -> None:
    """Check that a value is soft labels for these scores. With CALSEG_CHECK_LABELS=1, check the numbers too."""
    check_like(name, value, "input", scores, SOFT_LABEL_DTYPES)
    if CHECK_LABELS and not torch.compiler.is_compiling():
        check_probabilities(name, value)


def check_probabilities(name: str, soft_labels: Tensor, counted: Tensor | None = None) -> None:
    """Raise ValueError at the first voxel whose soft labels are no probabilities.

    ``counted`` says which voxels count, ``[N, S]``. If it is None, those count that have any mass.
    """
    wide = flat(as_fractions(soft_labels.detach())).float()
    total, least, tolerance = wide.sum(1), wide.amin(1), probability_tolerance(soft_labels.dtype)
    counted = total != 0 if counted is None else counted
    bad = counted & ~(((total - 1).abs() <= tolerance) & (least >= -tolerance))
    if bool(bad.any()):
        at = int(bad.flatten().nonzero()[0])
        raise probability_error(
            float(total.flatten()[at]), float(least.flatten()[at]), at, voxel_shape(soft_labels), name,
            "soft labels, which sum to 1 over the classes and are not negative (class indices: an integer dtype; "
            "regions that overlap need a loss of their own)",
        )  # fmt: skip


def check_scale(scale: Any, scores: Tensor) -> float | Tensor:
    """Check that a value is a finite number, or a 0-d floating tensor on the device of the scores, and return it."""
    if isinstance(scale, Tensor):
        if scale.dim() != 0 or scale.dtype not in FLOAT_DTYPES or scale.device != scores.device:
            raise ValueError(f"scale: got {describe(scale)}, wanted a number or a 0-d tensor on {scores.device}")
        if scale.requires_grad:
            raise ValueError("scale: got a tensor that requires a gradient, wanted a constant")
        return scale
    check_finite("scale", scale)
    return float(scale)


def check_weight(weight: Any, scores: Tensor, name: str = "weight") -> None:
    """Check that a value is class weights ``[C]`` or None."""
    if weight is None:
        return
    classes = scores.shape[1 if scores.dim() > 1 else 0]
    if not isinstance(weight, Tensor) or weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got {describe(weight)}, wanted a floating tensor of shape [{classes}]")
    if weight.dim() != 1 or weight.shape[0] != classes:
        raise ValueError(f"{name}: got {describe(weight)}, wanted shape [{classes}]: one value per class")
    if weight.device != scores.device:
        raise ValueError(f"{name}: got {describe(weight)}, wanted it on {scores.device}")
    if weight.requires_grad:
        raise ValueError(f"{name}: got a tensor that requires a gradient, wanted a constant")


def check_reduction(reduction: Any) -> None:
    """Check that a value is the name of a reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {describe(reduction)}, wanted 'none', 'mean' or 'sum'")


def check_number(name: str, value: Any, low: float, high: float, wanted: str, *, open_low: bool = False) -> None:
    """Check that a value is a number from ``low`` to ``high``. With ``open_low``, ``low`` itself is excluded.

    ``wanted`` is the range in words, for the error message.
    """
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"{name}: got {describe(value)}, wanted a number {wanted}")
    if not (low <= value <= high) or (open_low and value == low) or MAX < value != math.inf:  # NaN is not in a range
        raise ValueError(f"{name}: got {shown(value)}, wanted a number {wanted}")


def check_pair(name: str, value: Any) -> tuple[float, float]:
    """Check that a value is a number of at least 0, or a tuple of two, and return two."""
    pair = value if isinstance(value, tuple) and len(value) == 2 else (value, value)
    for number in pair:
        check_number(name, number, 0.0, MAX, "of at least 0")
    return pair


def check_finite(name: str, value: Any) -> None:
    """Check that a value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {describe(value)}, wanted a finite number")
    if not -MAX <= value <= MAX:  # not math.isfinite, which torch.compile refuses for a number that changes
        raise ValueError(f"{name}: got {shown(value)}, wanted a finite number")


def check_flag(name: str, value: Any) -> None:
    """Check that a value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {describe(value)}, wanted True or False")


def check_integer(name: str, value: Any, low: int | None = None) -> None:
    """Check that a value is an integer of 64 bits, and that it is at least ``low`` if that is given."""
    _check_type_of_integer(name, value)
    if low is not None and value < low:
        raise ValueError(f"{name}: got {shown(value)}, wanted at least {low}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: got {shown(value)}, wanted an integer of 64 bits")


def _check_type_of_integer(name: str, value: Any) -> None:
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{name}: got {describe(value)}, wanted an integer")


def check_bins(n_bins: Any) -> None:
    """Check that a value is a number of bins."""
    check_integer("n_bins", n_bins, 1)
    if n_bins > MAX_BINS:
        raise ValueError(f"n_bins: got {n_bins}, wanted at most {MAX_BINS}")


def check_sampling(num_samples: Any, temperature: Any) -> None:
    """Check the number of samples and the temperature of their softmax."""
    check_integer("num_samples", num_samples, 1)
    check_number("temperature", temperature, MIN_TEMPERATURE, MAX_TEMPERATURE, "above 0, from 1e-30 to 1e30")


def check_prior(beta: Any, prior_mu: Any, prior_logvar: Any) -> None:
    """Check the factor of the KL term and the parameters of its prior."""
    check_finite("beta", beta)
    check_finite("prior_mu", prior_mu)
    check_finite("prior_logvar", prior_logvar)


def check_seed(seed: Any, device: torch.device) -> int | Tensor:
    """Check that a value is a 64-bit int or a 0-d int64 tensor on the device, and return it."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0 or seed.device != device:
            raise ValueError(f"seed: got {describe(seed)}, wanted a 0-d int64 tensor on {device}")
        return seed
    _check_type_of_integer("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: got {shown(seed)}, wanted a 64-bit number")
    return int(seed)


# ---- values of tensors ----


def check_classes(labels: Labels, num_classes: int) -> None:
    """Raise IndexError at the first label that is neither a class nor ``ignore_index``."""
    wide = as_integers(labels.tensor)
    bad = ((wide < 0) | (wide >= num_classes)) & (wide != labels.ignore_index)
    if bool(bad.any()):
        raise label_error(int(bad.flatten().nonzero()[0]), labels, num_classes)


def label_error(position: int, labels: Labels, num_classes: int) -> IndexError:
    """Return the error for the label at linear index ``position``, which is neither a class nor ignored."""
    place = place_of(position, tuple(labels.tensor.shape))
    value = labels.tensor[tuple(place)].item()
    if labels.has_channel:
        place.insert(1, 0)
    return IndexError(
        f"target[{', '.join(map(str, place))}] is {shown(value)}: wanted a class in [0, {num_classes}) "
        f"or ignore_index={labels.ignore_index}"
    )


def place_of(position: int, shape: tuple[int, ...]) -> list[int]:
    """Return the index per axis of linear index ``position`` of ``shape``."""
    where: list[int] = []
    for size in reversed(shape):
        position, index = divmod(position, size)
        where.insert(0, index)
    return where


def probability_tolerance(dtype: torch.dtype) -> float:
    """Return the tolerance for probabilities: how far their sum may be from 1, and how far one may lie below 0."""
    return 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-3


def probability_error(
    total: float,
    least: float,
    position: int,
    shape: tuple[int, ...],
    name: str = "preds",
    hint: str = "probabilities, which sum to 1 and are not negative (logits: from_logits=True)",
) -> ValueError:
    """Return the error for the voxel at linear index ``position`` of ``shape``, whose scores are no probabilities."""
    where: list[object] = [*place_of(position, shape)]
    where.insert(1 if shape else 0, ":")
    return ValueError(
        f"{name}[{', '.join(map(str, where))}] sums to {total:.4g}, its smallest is {least:.4g}: wanted {hint}"
    )


def probabilities_at(position: int, scores: Tensor) -> ValueError:
    """Return the error for the voxel at linear index ``position``, whose scores are no probabilities."""
    shape = voxel_shape(scores)
    probabilities = scores.movedim(class_axis(scores), -1)[tuple(place_of(position, shape))]
    return probability_error(float(probabilities.float().sum()), float(probabilities.min()), position, shape)
