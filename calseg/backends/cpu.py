"""The native CPU engine. The extension takes specs and tensors, and reads them by the names of their fields."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calseg import native
from calseg.checks import label_error, probability_error
from calseg.dice import DiceOptions, dice_and_slopes
from calseg.operations import (
    AccumulateSpec,
    AceSpec,
    BinsSpec,
    BlendSpec,
    GaussianTensors,
    Labels,
    LossSpec,
    LossTensors,
    SampleSpec,
    num_kinds,
)
from calseg.tensors import FLOAT_DTYPES, compute_dtype, shape_of, voxel_shape

NO_GRADIENTS = LossTensors()
# A 0-d tensor of the type in which a loss of each dtype is computed: empty_like takes half the time of other factories.
NUMBERS = {dtype: torch.zeros((), dtype=compute_dtype(dtype), device="cpu") for dtype in FLOAT_DTYPES}


def _fault(outcome: tuple[int, int], labels: Labels | None) -> IndexError:
    """Return the error for a label that is no class, from ``(position, number of classes)``."""
    assert labels is not None
    position, num_classes = outcome
    return label_error(position, labels, num_classes)


def loss(
    spec: LossSpec, tensors: LossTensors, gradients: LossTensors = NO_GRADIENTS, grad_output: Tensor | None = None
) -> Tensor:
    """Return the loss, and write the gradients into the tensors that are given for them.

    ``grad_output`` is the upstream gradient ``[N, *S]``, or None for 1. With it the function returns 0 for the loss.
    """
    loss = None
    if grad_output is None:
        per_voxel = spec.reduction == "none"
        loss = native.empty_voxels(tensors.like(), spec.dtype) if per_voxel else torch.empty_like(NUMBERS[spec.dtype])
    fault = getattr(native.extension, spec.operation)(tensors, spec, gradients, grad_output, loss)
    if fault is not None:
        raise _fault(fault, spec.labels)
    if loss is None:
        return torch.zeros((), dtype=spec.dtype, device="cpu")
    return loss if loss.dtype is spec.dtype else loss.to(spec.dtype)


def loss_and_corrections(
    spec: LossSpec, tensors: LossTensors, gradients: LossTensors = NO_GRADIENTS
) -> tuple[Tensor, None]:
    """Do as :func:`loss`, and return that the gradients lack no correction, as those of the Triton backend may."""
    return loss(spec, tensors, gradients), None


def loss_and_overlap(spec: LossSpec, tensors: LossTensors, made: LossTensors) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the sums of the overlap, and the divisor of the loss.

    The sums are those of :func:`calseg.backends.reference.loss_and_overlap`. ``made`` has memory for what is made
    beside them: the sampled labels, in place of the logits, and the gradients of mu and logvar.
    """
    N, C, _ = shape_of(tensors.like())
    loss = torch.empty_like(NUMBERS[spec.dtype])
    sums = torch.empty(N, C, 2, dtype=torch.float64, device="cpu")
    divisor = torch.empty((), dtype=torch.float64, device="cpu")
    fault = native.extension.loss_and_overlap(tensors, spec, made, loss, sums, divisor)
    if fault is not None:
        raise _fault(fault, spec.labels)
    return loss.to(spec.dtype), sums, divisor


def dice_loss(spec: LossSpec, options: DiceOptions, tensors: LossTensors, made: LossTensors) -> tuple[Tensor, Tensor]:
    """Return Dice plus cross-entropy, and the slopes of :func:`calseg.dice.dice_and_slopes`.

    ``made`` is that of :func:`loss_and_overlap`.
    """
    return dice_and_slopes(options, *loss_and_overlap(spec, tensors, made))


def overlap_backward(spec: LossSpec, tensors: LossTensors, gradients: LossTensors, grad_sums: Tensor) -> None:
    """Write the gradients of logits and soft labels of :func:`loss_and_overlap`, for labels that are not sampled.

    ``spec`` is a sum over voxels. ``grad_sums`` is the gradient of the sums, which only reaches the logits.
    """
    native.extension.overlap_backward(tensors, spec, gradients, grad_sums)


def scale_gradients(gradients: Sequence[Tensor | None], factor: Tensor, _: None) -> None:
    """Multiply the gradients by a 0-d tensor, in place. They lack no correction."""
    value = factor.item()
    if value != 1.0:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(value)


def sample_soft_labels(spec: SampleSpec, tensors: GaussianTensors) -> Tensor:
    """Return sampled soft labels in the dtype of mu, blended with the labels if they are given."""
    mu, _ = tensors.both()
    soft_labels = native.empty_like(mu)
    if (fault := native.extension.sample_soft_labels(tensors, spec, soft_labels)) is not None:
        raise _fault(fault, spec.labels)
    return soft_labels


def sample_soft_labels_backward(
    spec: SampleSpec, tensors: GaussianTensors, grad_output: Tensor, gradients: GaussianTensors
) -> None:
    """Write the gradients of :func:`sample_soft_labels`."""
    native.extension.sample_soft_labels_backward(tensors, spec, grad_output, gradients)


def accumulate_softmax(spec: AccumulateSpec, total: Tensor, logits: Tensor) -> Tensor:
    """Add ``softmax(logits / temperature)`` to the total, in place."""
    native.extension.accumulate_softmax(logits, spec, total)
    return total


def accumulate_softmax_backward(spec: AccumulateSpec, logits: Tensor, grad_output: Tensor) -> Tensor:
    """Return the gradient of :func:`accumulate_softmax` with respect to the logits."""
    gradient = native.empty_like(logits)
    native.extension.accumulate_softmax_backward(logits, spec, grad_output, gradient)
    return gradient


def blend_soft_labels(spec: BlendSpec, total: Tensor) -> Tensor:
    """Replace the total by ``(1 - alpha) * onehot(labels) + alpha * total / num_maps``, or 0 where ignored."""
    if (fault := native.extension.blend_soft_labels(total, spec)) is not None:
        raise _fault(fault, spec.labels)
    return total


def calibration_bins(spec: BinsSpec, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return int64 sums per bin ``[items, kinds, n_bins, 3]`` and totals ``[items, 6]``: see csrc/host/arguments.h."""
    N, C, _ = shape_of(scores)
    items, labels = N if spec.per_item else 1, spec.labels
    sums = torch.zeros(items, num_kinds(spec, C), spec.n_bins, 3, dtype=torch.int64, device="cpu")
    totals = torch.zeros(items, 6, dtype=torch.int64, device="cpu")
    label_position, score_position, total, least = native.extension.calibration_bins(scores, spec, sums, totals)
    if label_position >= 0:
        raise label_error(label_position, labels, C)
    if score_position >= 0:
        raise probability_error(total, least, score_position, voxel_shape(scores))
    return sums, totals


# ---- average calibration error ----


def ace_moments(spec: AceSpec, logits: Tensor) -> Tensor:
    """Return count, sum of f, sum of f^2, hits, and sum of f where hit, per item, class and cell of confidence.

    The result is float64 ``[N, kinds, cells, 5]``. csrc/cpu/ace_moments.cpp defines cells and f. If an item has a NaN
    among its logits, its sums of f are NaN.
    """
    N, C, _ = shape_of(logits)
    sums = torch.zeros(N, C - spec.first_class, spec.n_bins + spec.soft, 8, dtype=torch.int64, device="cpu")
    nans = torch.zeros(N, dtype=torch.int64, device="cpu")
    if (fault := native.extension.ace_moments(logits, spec, sums, nans)) is not None:
        raise _fault(fault, spec.labels)
    count, hits, *fractions = sums.double().unbind(-1)
    f, f_squared, f_hits = (
        whole * 2.0**-20 + rest * 2.0**-50 for whole, rest in zip(fractions[::2], fractions[1::2], strict=True)
    )
    f = torch.where((nans > 0)[:, None, None], torch.nan, f)
    return torch.stack([count, f, f_squared, hits, f_hits], -1)


def ace_moments_backward(spec: AceSpec, logits: Tensor, grad_moments: Tensor) -> Tensor:
    """Return the gradient of the logits, given that of the moments."""
    _, by_f, by_f_squared, _, by_f_hits = grad_moments.unbind(-1)
    # The gradient of f is by_f + 2 f by_f_squared, plus by_f_hits where hit. The derivative of f by the confidence is
    # n_bins for soft bins and 1 for hard ones.
    slopes = torch.stack([by_f, 2 * by_f_squared, by_f_hits], 2) * (spec.n_bins if spec.soft else 1)
    gradient = native.empty_like(logits)
    slopes = slopes.to(compute_dtype(logits.dtype)).contiguous()
    native.extension.ace_moments_backward(logits, spec, slopes, gradient)
    return gradient


def bins_of_moments(spec: AceSpec, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`calseg.backends.reference.ace_bins` from :func:`ace_moments`, in differentiable operations."""
    count, f, f_squared, hits, f_hits = moments.unbind(-1)
    if not spec.soft:
        return count, f, hits
    # Cell j lies between the centres of bins j - 1 and j, which get shares 1 - f and f of its voxels. The outermost
    # cells have one neighbour, which gets both shares. A confidence is (f + j - 1/2) / n_bins.
    offset = torch.arange(spec.n_bins + 1, dtype=f.dtype, device=f.device) - 0.5
    upper = f, (f_squared + offset * f) / spec.n_bins, f_hits
    both = count, (f + offset * count) / spec.n_bins, hits
    mass, confidence, hits = (_neighbours(whole - high, high) for whole, high in zip(both, upper, strict=True))
    return mass, confidence, hits


def _neighbours(lower: Tensor, upper: Tensor) -> Tensor:
    """Return the sums that n + 1 cells give to the n bins below and above them."""
    n_bins = lower.shape[-1] - 1
    bins = lower[..., 1:] + upper[..., :n_bins]
    ends = torch.zeros_like(bins)
    return bins + torch.cat([lower[..., :1], ends[..., 1:]], -1) + torch.cat([ends[..., 1:], upper[..., n_bins:]], -1)
