"""Inputs, memory layouts, error bounds and comparisons for the tests of all operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from naive import UNIT
from torch import Tensor

from calseg import CalibrationBins

REDUCTIONS = ("none", "mean", "sum")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
LABELS = (*INTEGERS, *FLOATS)
# Numbers around the widths of vectors, tiles and unrolled loops over classes.
CLASSES = (1, 2, 3, 4, 5, 7, 8, 9, 14, 16, 17, 32, 33, 117)
SIZES = (*range(1, 71), 127, 128, 129, 255, 256, 257, 511, 513, 1000, 1023, 1024, 1025, 1031, 2049)
# Shapes [C], [N, C] and with one to four spatial axes, as functions of the number of classes.
SHAPES: dict[str, Callable[[int], tuple[int, ...]]] = {
    "C": lambda C: (C,),
    "NC": lambda C: (19, C),
    "NCW": lambda C: (2, C, 37),
    "NCHW": lambda C: (3, C, 5, 7),
    "NCDHW": lambda C: (2, C, 4, 3, 5),
    "NCTDHW": lambda C: (2, C, 2, 3, 2, 3),
}


def id_of(value: object) -> str | None:
    """Return a readable test name for a dtype."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def scores(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def voxels_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def labels(
    shape: tuple[int, ...], *, dtype: torch.dtype = torch.int64, ignore_index: int | None = None, seed: int = 1
) -> Tensor:
    """Return labels for scores of ``shape``. If ``ignore_index`` is given, a fifth of them is ignored."""
    generator = torch.Generator().manual_seed(seed)
    classes, voxels = shape[1 if len(shape) > 1 else 0], voxels_of(shape)
    target = torch.randint(0, classes, voxels, generator=generator)
    if ignore_index is not None:
        target = torch.where(torch.rand(voxels, generator=generator) < 0.2, ignore_index, target)
    return target.to(dtype)


def class_weights(classes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.arange(classes) % 5 * 0.5 + 0.25).to(dtype)


# ---- memory layouts: same values, different strides ----


def _padded(t: Tensor, axis: int) -> Tensor:
    """Return the tensor as a slice of one that is longer along ``axis``."""
    sizes = list(t.shape)
    sizes[axis] += 3
    return torch.full(sizes, torch.nan, dtype=t.dtype).narrow(axis, 1, t.shape[axis]).copy_(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced_channels": lambda t: _padded(t, 1),
    "sliced_channels_last": lambda t: _padded(t.movedim(1, -1).contiguous(), -1).movedim(-1, 1),
    "sliced_batch": lambda t: _padded(t, 0),
    "every_second": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
    "transposed_space": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced_space": lambda t: _padded(t, -1),
    "batch_inside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "odd_offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "negative_bit": lambda t: torch._neg_view(-t.contiguous()),
}


# ---- comparison ----


class Result(NamedTuple):
    value: Tensor
    gradients: dict[str, Tensor]


def upstream_of(value: Tensor) -> Tensor:
    """Return an upstream gradient: 1 for a scalar, else multiples of 1/8 in [-2, 2], exact in every dtype."""
    if value.dim() == 0:
        return torch.ones_like(value)
    generator = torch.Generator().manual_seed(5)
    return (torch.randint(-16, 17, value.shape, generator=generator) / 8).to(value.dtype)


def evaluate(function: Callable[..., Tensor], tensors: Mapping[str, Tensor]) -> Result:
    """Return the value, and its gradients with respect to all ``tensors``, which are zero without dependence."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    value = function(**leaves)
    gradients = torch.autograd.grad(
        value, list(leaves.values()), upstream_of(value), allow_unused=True, materialize_grads=True
    )
    return Result(value.detach(), dict(zip(leaves, gradients, strict=True)))


def _rounding(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Return half a unit in the last place of ``dtype``, also for subnormal numbers."""
    info = torch.finfo(dtype)
    return 0.5 * info.eps * truth.abs().clamp(min=info.smallest_normal)


def assert_accurate(actual: Tensor, truth: Tensor, *, ulps: float, scale: float = 0.0, what: str = "") -> None:
    """Check ``actual`` against ``truth`` in float64.

    The error may be ``ulps`` units in the last place of the arithmetic's dtype, plus one rounding to the dtype of
    ``actual``. A unit is that of the largest number in ``truth``, or of ``scale`` if that is larger. Numbers that are
    not finite must be equal.
    """
    assert actual.shape == truth.shape, f"{what}: shape {list(actual.shape)}, wanted {list(truth.shape)}"
    dtype, got, truth = actual.dtype, actual.detach().double(), truth.detach().double()
    finite = truth.to(dtype).isfinite()
    if not finite.all():
        different = got[~finite].nan_to_num(7e300, 8e300, 9e300) != truth[~finite].to(dtype).double().nan_to_num(
            7e300, 8e300, 9e300
        )
        assert not different.any(), f"{what}: {got[~finite][different][0]}, wanted {truth[~finite][different][0]}"
        got, truth = got[finite], truth[finite]
    if not truth.numel():
        return
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = ulps * eps * max(scale, float(truth.abs().max())) + _rounding(truth, dtype)
    error = (got - truth).abs()
    if bool((error <= bound).all()):
        return
    got, truth, error, bound = (each.flatten() for each in (got, truth, error, bound))
    worst = int((error / bound).nan_to_num(torch.inf).argmax())
    raise AssertionError(
        f"{what}: {got[worst]}, wanted {truth[worst]}: error {error[worst]:.3g}, bound {bound[worst]:.3g} ({dtype})"
    )


def assert_matches(
    function: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    tensors: Mapping[str, Tensor],
    *,
    ulps: float = 8,
    grad_ulps: float | None = None,
    scale: float = 0.0,
    grad_scale: float = 0.0,
) -> Result:
    """Check value and gradients of ``function`` against ``oracle`` in float64.

    A gradient has the dtype of its input.
    """
    got, truth = evaluate(function, tensors), evaluate(oracle, {name: t.double() for name, t in tensors.items()})
    assert_accurate(got.value, truth.value, ulps=ulps, scale=scale, what="value")
    for name, gradient in got.gradients.items():
        assert gradient.dtype == tensors[name].dtype
        assert_accurate(
            gradient, truth.gradients[name], ulps=ulps if grad_ulps is None else grad_ulps, scale=grad_scale,
            what=f"gradient of {name}",
        )  # fmt: skip
    return got


def assert_same_bins(got: CalibrationBins, wanted: CalibrationBins, *, units: int = 0) -> None:
    """Every integer; NLL and Brier to ``units`` a voxel (their arithmetic may round otherwise)."""
    for name, mine, theirs in zip(got._fields, got, wanted, strict=True):
        assert mine.dtype == torch.int64
        if not units or name not in ("nll", "brier"):
            assert torch.equal(mine, theirs), f"{name}: {mine.tolist()}, wanted {theirs.tolist()}"
    _assert_near_scores(got, wanted, units)


def assert_near_bins(got: CalibrationBins, wanted: CalibrationBins, *, units: int) -> None:
    """Bins of logits, whose confidences may round otherwise: at every edge one voxel may be on the other side."""
    assert int((got.count.cumsum(-1) - wanted.count.cumsum(-1)).abs().max()) <= 1
    assert torch.equal(got.hits.sum(-1), wanted.hits.sum(-1))
    for name in ("num_voxels", "num_nan", "num_infinite"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    _assert_near_scores(got, wanted, units)


def assert_near_confidences(got: CalibrationBins, wanted: CalibrationBins, num_classes: int) -> None:
    """Confidences of the same float32 exponentials, which were added up in different orders.

    A sum of C positive numbers has a relative error below (C - 1) 2^-24, the sum's reciprocal, the product with an
    exponential and the rounding to a unit of 2^-24 add 3 units at most. So two confidences, at most 1, differ by less
    than 2 (C + 2) units. Sums from the lowest bin on are compared where both hold equally many voxels, as a voxel at
    an edge may be on the other side.
    """
    count, mine, theirs = (t.cumsum(-1) for t in (wanted.count, got.confidence, wanted.confidence))
    same = got.count.cumsum(-1) == count
    assert bool(((mine - theirs).abs() <= 2 * (num_classes + 2) * count)[same].all()), mine - theirs


def _assert_near_scores(got: CalibrationBins, wanted: CalibrationBins, units: int) -> None:
    whole = (got.nll - wanted.nll).double() @ torch.tensor([UNIT, 1.0], dtype=torch.float64)
    bound = units * wanted.num_voxels
    assert bool((whole.abs() <= bound).all()), f"nll: off by {whole} units of {wanted.nll}"
    assert bool(((got.brier - wanted.brier).abs() <= bound).all()), f"brier: {got.brier}, wanted {wanted.brier}"
