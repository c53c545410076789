"""The Triton backend: operations on a GPU, or in Triton's interpreter.

Only :func:`calibration_bins` makes the host wait for the GPU. In every other call, all numbers that depend on the data
stay on the device: the divisor of the mean, the loss, the upstream factor, and a seed given as a tensor. So these calls
can be captured into a CUDA graph.

Where the extension has it, the main kernel of cross-entropy with one-hot labels is one in CUDA C++, if the classes are
few, or those of a voxel adjacent: see :func:`calseg.backends.cuda.kernel_of` and
:func:`calseg.backends.cuda.block_voxels`. With few classes, or logits of 16 bits, so are those of Dice beside it: see
:func:`calseg.backends.cuda.overlap_kernel_of`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from calseg.kernels.accumulate_softmax import launch as launch_accumulate_softmax
from calseg.kernels.blend_soft_labels import launch as launch_blend_soft_labels
from calseg.kernels.calibration_bins import NO_FAULT
from calseg.kernels.calibration_bins import launch as launch_calibration_bins
from calseg.kernels.dice import launch as launch_finish_dice
from calseg.kernels.labels import labels_argument
from calseg.kernels.launch import BINS, MAX_KEPT, SAMPLED, SOFT, TOP_LABEL, Call, Geometry, Plan, TileDemands, plan
from calseg.kernels.overlap import empty_overlap, finished_overlap
from calseg.kernels.overlap import tile_demands as overlap_demands
from calseg.kernels.reductions import (
    FEW_PROGRAMS,
    LossArguments,
    Partials,
    Upstream,
    launch_finish_loss,
    mean_divisors,
    partials_of,
)
from calseg.kernels.sample_soft_labels import launch as launch_sample_soft_labels
from calseg.kernels.scale_gradients import launch as launch_scale_gradients
from torch import Tensor

from calseg import checks, native
from calseg.backends import cuda
from calseg.dice import DiceOptions, dice_and_slopes, over_processes
from calseg.operations import (
    AccumulateSpec,
    BinsSpec,
    BlendSpec,
    GaussianTensors,
    Labels,
    LossSpec,
    LossTensors,
    SampleSpec,
    num_kinds,
)
from calseg.tensors import is_walkable, one_stride, shape_of

NO_GRADIENTS = LossTensors()


# ---- losses ----


@cache
def _operation(name: str) -> Any:
    """Return the module of ``calseg.kernels`` that has the kernel of a loss."""
    return import_module(f"calseg.kernels.{name}")


def loss(
    spec: LossSpec,
    tensors: LossTensors,
    gradients: LossTensors = NO_GRADIENTS,
    grad_output: Tensor | None = None,
) -> Tensor:
    """Compute a loss, and write the gradients that are wanted.

    The kernel is in the module of ``calseg.kernels`` that has the name of the operation.

    Args:
        spec: the loss and its options.
        tensors: the tensors of the loss.
        gradients: for each tensor, the tensor to write its gradient to, or None.
        grad_output: the upstream gradient ``[N, *S]``, or None if it is 1. If it is given, only gradients are computed.

    Returns:
        The loss, ``[N, *S]`` or a 0-d tensor by the reduction. It is 0 if ``grad_output`` is given.
    """
    return _loss(spec, tensors, gradients, grad_output, at_once=False)[0]


def loss_and_corrections(
    spec: LossSpec, tensors: LossTensors, gradients: LossTensors = NO_GRADIENTS
) -> tuple[Tensor, Tensor | None]:
    """Do as :func:`loss` for eager code, with as few launches as possible.

    Also return the corrections: None, or a tensor whose last number is a factor that the gradients still lack.
    """
    return _loss(spec, tensors, gradients, None, at_once=True)


def _loss(
    spec: LossSpec, tensors: LossTensors, gradients: LossTensors, grad_output: Tensor | None, *, at_once: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute a loss and its gradients.

    With ``at_once``, a call of few programs is one launch, whose gradients may lack the correction that is returned.
    """
    operation = _operation(spec.operation)
    spec, tensors = _readable_loss(spec, tensors)
    like = tensors.like()
    per_voxel = None
    if grad_output is None and spec.reduction == "none":
        per_voxel = native.empty_voxels(like, spec.dtype)
    upstream, factor = _upstream(spec, grad_output)
    label_tensor = None if spec.labels is None else spec.labels.tensor
    call = _call(
        operation.tile_demands(spec, tensors), (*tensors, *gradients), (label_tensor, upstream, per_voxel),
        cuda.kernel_of(tensors, gradients, spec, (upstream, per_voxel)),
    )  # fmt: skip
    if call.programs == 0:
        value = math.nan if spec.reduction == "mean" else 0.0
        nothing = torch.full((), value, dtype=spec.dtype, device=like.device)
        return per_voxel if per_voxel is not None else nothing, None
    _check_labels(spec.labels, call.C)
    reduced = grad_output is None and per_voxel is None
    given = _loss_arguments(call, spec, factor, reduced=reduced, at_once=at_once and not call.in_cuda)
    _launch(operation, call, spec, given)
    if per_voxel is not None:
        return per_voxel, None
    partials = given.partials
    if partials.ptr is None:  # only gradients are computed
        return torch.zeros((), dtype=spec.dtype, device=like.device), None
    if partials.counter is None:
        launch_finish_loss(call, spec, given)
    return partials.loss, None if partials.voxels is None else partials.ptr


def _launch(operation: Any, call: Call, spec: LossSpec, given: LossArguments) -> None:
    """Launch the main kernel of a loss."""
    if call.in_cuda:
        cuda.cross_entropy(call.programs, spec, given)
    else:
        operation.launch(call, spec, given)


def loss_and_overlap(spec: LossSpec, tensors: LossTensors, made: LossTensors) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the sums of the overlap, and the divisor of the loss.

    The sums are those of :func:`calseg.backends.reference.loss_and_overlap`. ``made`` has memory for what is made
    beside them: the sampled labels, in place of the logits, and the gradients of mu and logvar.
    """
    N, C, S = shape_of(tensors.like())
    if N * S == 0:
        nothing = tensors.like().new_zeros((N, C, 2), dtype=torch.float64)
        return nothing.new_full((), math.nan, dtype=spec.dtype), nothing, nothing.sum()
    call, given = _launch_overlap(spec, tensors, made)
    launch_finish_loss(call, spec, given)
    if given.partials.voxels is not None:
        divisor = given.partials.ptr[call.programs : 2 * call.programs].sum(dtype=torch.float64)
    elif given.upstream.sums is None:
        divisor = given.overlap.new_full((), 1 if spec.reduction == "sum" else N * S, dtype=torch.float64)
    else:
        divisor = given.upstream.sums[0].sum(dtype=torch.float64)
    return given.partials.loss, finished_overlap(call, given.overlap), divisor


def dice_loss(spec: LossSpec, options: DiceOptions, tensors: LossTensors, made: LossTensors) -> tuple[Tensor, Tensor]:
    """Return Dice plus cross-entropy, and the slopes of :func:`calseg.dice.dice_and_slopes`.

    ``made`` is that of :func:`loss_and_overlap`.
    """
    N, _, S = shape_of(tensors.like())
    if N * S == 0:
        return dice_and_slopes(options, *loss_and_overlap(spec, tensors, made))
    call, given = _launch_overlap(spec, tensors, made)
    sums = finished_overlap(call, given.overlap)
    result: tuple[Tensor, Tensor]
    result = launch_finish_dice(call, spec, options, given, sums, over_processes(options, sums))
    return result


def _launch_overlap(spec: LossSpec, tensors: LossTensors, made: LossTensors) -> tuple[Call, LossArguments]:
    """Launch the main kernel of a loss with an overlap, and return the call and its arguments."""
    operation = _operation(spec.operation)
    spec, tensors = _readable_loss(spec, tensors)
    label_tensor = None if spec.labels is None else spec.labels.tensor
    call = _call(
        overlap_demands(tensors, backward=False), (*tensors, *made), (label_tensor, None, None),
        cuda.overlap_kernel_of(tensors, made, spec), items=True,
    )  # fmt: skip
    _check_labels(spec.labels, call.C)
    without_gradients = made.mu is made.logvar is None
    given = _loss_arguments(call, spec, _factor(spec), reduced=True, at_once=False, counted=without_gradients)
    given = given._replace(overlap=empty_overlap(call))
    _launch(operation, call, spec, given)
    return call, given


def overlap_backward(spec: LossSpec, tensors: LossTensors, gradients: LossTensors, grad_sums: Tensor) -> None:
    """Write the gradients of logits and soft labels of :func:`loss_and_overlap`, for labels that are not sampled.

    ``spec`` is a sum over voxels. ``grad_sums`` is the gradient of the sums, which only reaches the logits. The
    gradient of the logits may lie in the memory of the soft labels.
    """
    operation = _operation(spec.operation)
    spec, tensors = _readable_loss(spec, tensors)
    if tensors.like().numel() == 0:
        return
    label_tensor = None if spec.labels is None else spec.labels.tensor
    call = _call(
        overlap_demands(tensors, backward=True), (*tensors, *gradients), (label_tensor, None, None),
        cuda.overlap_kernel_of(tensors, gradients, spec), items=True,
    )  # fmt: skip
    grad_overlap = None if gradients.logits is None else grad_sums
    given = _loss_arguments(call, spec, _factor(spec), reduced=False, at_once=False)
    given = given._replace(grad_overlap=grad_overlap)
    _launch(operation, call, spec, given)


def _factor(spec: LossSpec) -> Tensor | None:
    """Return the scale of a loss if it is a tensor."""
    return spec.scale.detach().resolve_neg() if isinstance(spec.scale, Tensor) else None


def _upstream(spec: LossSpec, grad_output: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the upstream gradient ``[N, *S]`` or None, and the factor of all voxels, a 0-d tensor or None.

    One number for all voxels, which is expanded memory, becomes the factor. A kernel reads it once.
    """
    factor = _factor(spec)
    if grad_output is None:
        return None, factor
    if factor is None and grad_output.numel() > 0 and not any(grad_output.stride()):
        return None, grad_output.resolve_neg().as_strided((), ())
    return _readable_voxels(grad_output), factor


def _takes_correction(call: Call) -> bool:
    """Return whether all gradients are float32. A correction would round those of 16 bits again."""
    gradients = call.scores[len(LossTensors._fields) :]
    return all(view is None or view.ptr.dtype == torch.float32 for view in gradients)


def _loss_arguments(
    call: Call, spec: LossSpec, factor: Tensor | None, *, reduced: bool, at_once: bool, counted: bool = False
) -> LossArguments:
    """Return the arguments of the launch of any loss.

    ``factor`` multiplies loss and gradients. ``reduced`` says whether the sum over voxels is wanted, and ``at_once``
    whether the main kernel may compute it, if there are few programs. ``counted`` says that the kernel counts the
    voxels of the mean beside the loss, as it computes no gradient that needs them first.

    If the divisors of the mean depend on the labels, and are needed before the main kernel is done, a kernel that sums
    them is launched first.
    """
    tensors = LossTensors._make(call.scores[: len(LossTensors._fields)])
    gradients = LossTensors._make(call.scores[len(LossTensors._fields) :])
    label_view, upstream_view, loss_view = call.voxels
    labels = labels_argument(label_view, spec.labels)
    at_once = at_once and reduced and call.programs <= FEW_PROGRAMS and not call.like.is_xpu
    sums, num_sums, voxels = None, 1, None
    scale = 1.0 if isinstance(spec.scale, Tensor) else spec.scale
    if spec.reduction == "mean":
        weight = None if spec.labels is None or spec.labels.is_mask else spec.weight
        if (at_once or counted) and labels.ignore is not None and weight is None and _takes_correction(call):
            voxels = float(call.geometry.N * call.S)
        if voxels is not None or spec.labels is None or (labels.ignore is None and weight is None):
            scale /= call.geometry.N * call.S
        else:
            sums, num_sums = mean_divisors(call, labels, spec.labels.is_mask, weight)
    upstream = Upstream(scale, factor, sums)
    if upstream_view is not None:
        ptr, stride_n, _, stride_s = upstream_view
        upstream = upstream._replace(ptr=ptr, stride_n=stride_n, stride_s=stride_s)
    with_kl = tensors.mu is not None and spec.labels is not None and spec.sampling.beta != 0
    partials = Partials()
    if reduced:
        partials = partials_of(call, spec.dtype, 1 + with_kl + (voxels is not None), voxels, at_once)
    return LossArguments(tensors, gradients, labels, upstream, loss_view, partials, num_sums, with_kl)


def scale_gradients(gradients: Sequence[Tensor | None], factor: Tensor, corrections: Tensor | None) -> None:
    """Multiply gradients in place by a 0-d tensor, and by their corrections. A product of 1 leaves memory untouched."""
    launch_scale_gradients([gradient for gradient in gradients if gradient is not None], factor, corrections)


# ---- soft labels ----


def sample_soft_labels(spec: SampleSpec, tensors: GaussianTensors) -> Tensor:
    """Return soft labels sampled from a Gaussian, in the dtype of ``mu``. Labels, if given, are blended in."""
    mu, _ = tensors.both()
    soft_labels = native.empty_like(mu)
    _sample_soft_labels(spec, tensors, soft_labels, None, GaussianTensors())
    return soft_labels


def sample_soft_labels_backward(
    spec: SampleSpec, tensors: GaussianTensors, grad_output: Tensor, gradients: GaussianTensors
) -> None:
    """Write the gradients of :func:`sample_soft_labels` that are wanted."""
    _sample_soft_labels(spec, tensors, None, _readable(grad_output), gradients)


def _sample_soft_labels(
    spec: SampleSpec,
    tensors: GaussianTensors,
    soft_labels: Tensor | None,
    grad_output: Tensor | None,
    gradients: GaussianTensors,
) -> None:
    """Compute ``soft_labels``, or the gradients if ``grad_output`` is given."""
    spec = spec._replace(labels=_readable_labels(spec.labels))
    readable = map(_readable_or_none, tensors)
    label_tensor = None if spec.labels is None else spec.labels.tensor
    call = _call(SAMPLED, (*readable, soft_labels, grad_output, *gradients), (label_tensor,))
    _check_labels(spec.labels, call.C)
    mu, logvar, to, upstream, *to_gradients = call.scores
    launch_sample_soft_labels(
        call, spec, labels_argument(call.voxels[0], spec.labels), GaussianTensors._make((mu, logvar)),
        GaussianTensors._make(to_gradients), soft_labels=to, grad_output=upstream,
    )  # fmt: skip


def accumulate_softmax(spec: AccumulateSpec, total: Tensor, logits: Tensor) -> Tensor:
    """Compute ``total += softmax(logits / temperature)``, in place."""
    call = _call(SOFT, (_readable(logits), total, total))
    launch_accumulate_softmax(call, spec, *call.scores, backward=False)
    return total


def accumulate_softmax_backward(spec: AccumulateSpec, logits: Tensor, grad_output: Tensor) -> Tensor:
    """Return the gradient of the logits of :func:`accumulate_softmax`."""
    grad_logits = native.empty_like(logits)
    call = _call(SOFT, (_readable(logits), _readable(grad_output), grad_logits))
    launch_accumulate_softmax(call, spec, *call.scores, backward=True)
    return grad_logits


def blend_soft_labels(spec: BlendSpec, total: Tensor) -> Tensor:
    """Compute ``(1 - alpha) * onehot(labels) + alpha * total / num_maps`` in place of ``total``, 0 where ignored."""
    spec = spec._replace(labels=_readable_labels(spec.labels))
    call = _call(SOFT, (total,), (None if spec.labels is None else spec.labels.tensor,))
    _check_labels(spec.labels, call.C)
    launch_blend_soft_labels(call, spec, labels_argument(call.voxels[0], spec.labels), call.scores[0])
    return total


# ---- calibration ----


def calibration_bins(spec: BinsSpec, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums per bin and the totals, int64 ``[items, kinds, n_bins, 3]`` and ``[items, 6]`` on the CPU.

    The host waits for the GPU once.

    Raises:
        IndexError: a label is neither a class nor ignored. The error names the first one.
        ValueError: the scores of a voxel are not probabilities. The error names the first one.
    """
    N, C, S = shape_of(scores)
    items, kinds = N if spec.per_item else 1, num_kinds(spec, C)
    sizes = [2, 6, kinds * spec.n_bins * 3]
    results = torch.zeros(items, sum(sizes), dtype=torch.int64, device=scores.device)
    results[:, :2] = NO_FAULT.value
    readable, labels = _readable(scores), _readable_voxels(spec.labels.tensor)
    mask = None if spec.mask is None else _readable_voxels(spec.mask)
    of_item = lambda t, n: t if t is None or items == 1 else t[n : n + 1]  # noqa: E731
    for item, result in enumerate(results):
        demands = BINS if spec.class_wise else TOP_LABEL
        call = _call(demands, (of_item(readable, item),), (of_item(labels, item), of_item(mask, item)))
        faults, totals, sums = result.split(sizes)
        label_view, mask_view = call.voxels
        launch_calibration_bins(
            call, spec, call.scores[0], labels_argument(label_view, spec.labels), mask_view, sums, totals, faults
        )
    faults, totals, sums = results.cpu().split(sizes, 1)
    positions = faults + torch.arange(items, device="cpu")[:, None] * S
    nowhere = torch.full((1, 2), NO_FAULT.value, dtype=torch.int64, device="cpu")
    first = torch.cat([torch.where(faults == nowhere, nowhere, positions), nowhere]).amin(0).tolist()
    if first[0] != NO_FAULT.value:
        raise checks.label_error(first[0], spec.labels, C)
    if first[1] != NO_FAULT.value:
        raise checks.probabilities_at(first[1], scores)
    return sums.view(items, kinds, spec.n_bins, 3), totals


# ---- layouts that kernels can read ----


def _readable(scores: Tensor) -> Tensor:
    """Return ``scores`` if kernels can read their layout, else a contiguous copy."""
    scores = scores.resolve_neg()
    return scores if is_walkable(scores) else scores.contiguous()


def _readable_or_none(scores: Tensor | None) -> Tensor | None:
    """Do as :func:`_readable`, and return None for None."""
    return None if scores is None else _readable(scores)


def _readable_loss(spec: LossSpec, tensors: LossTensors) -> tuple[LossSpec, LossTensors]:
    """Do as :func:`_readable` for all tensors of a loss."""
    labels = None if spec.labels is None else spec.labels.tensor
    for tensor in (labels, spec.weight, *tensors):
        if tensor is not None and (not tensor.is_contiguous() or tensor.is_neg()):
            break
    else:
        return spec, tensors
    weight = None if spec.weight is None else spec.weight.resolve_neg().contiguous()
    spec = spec._replace(labels=_readable_labels(spec.labels), weight=weight)
    return spec, LossTensors._make(_readable_or_none(tensor) for tensor in tensors)


def _readable_voxels(voxels: Tensor) -> Tensor:
    """Do as :func:`_readable` for a tensor without class axis."""
    voxels = voxels.resolve_neg()
    walkable = voxels.is_contiguous() or one_stride(voxels.shape[1:], voxels.stride()[1:]) is not None
    return voxels if walkable else voxels.contiguous()


def _readable_labels(labels: Labels | None) -> Labels | None:
    """Do as :func:`_readable` for labels, and return None for None."""
    return None if labels is None else labels._replace(tensor=_readable_voxels(labels.tensor))


def _check_labels(labels: Labels | None, num_classes: int) -> None:
    """Raise IndexError at the first label that is not a class, if CALSEG_CHECK_LABELS=1. The host waits for the GPU."""
    if checks.CHECK_LABELS and labels is not None and not labels.is_mask:
        checks.check_classes(labels, num_classes)


_plans: dict[tuple[Any, ...], Plan] = {}


def _call(
    demands: TileDemands, scores: Sequence[Tensor | None], voxels: Sequence[Tensor | None] = (),
    kernel: str | None = None, *, items: bool = False,
) -> Call:  # fmt: skip
    """Return the call of a kernel on these tensors. With ``items``, batch items are never merged.

    ``kernel`` is one in CUDA C++, which takes the tensors if their geometry suits it: see
    :func:`calseg.backends.cuda.block_voxels`. The plan is kept for tensors of the same shapes, strides and dtypes.
    """
    key = (
        demands, items, kernel, len(scores),
        *[None if t is None else (t.shape, t.stride(), t.dtype) for t in (*scores, *voxels)],
    )  # fmt: skip
    kept = _plans.get(key)
    if kept is None:
        if len(_plans) >= MAX_KEPT:
            _plans.clear()
        geometry = geometry_of_items(scores, voxels) if items else geometry_of(scores, voxels)
        itemsize = max(t.element_size() for t in scores if t is not None)
        block_voxels = None
        if kernel is not None:
            label_itemsize = next(t.element_size() for t in voxels if t is not None)  # the labels come first
            block_voxels = cuda.block_voxels(kernel, geometry, itemsize, label_itemsize)
        kept = _plans[key] = plan(demands, geometry, scores, block_voxels)
    return Call(kept, scores, voxels)


def geometry_of_items(scores: Sequence[Tensor | None], voxels: Sequence[Tensor | None]) -> Geometry:
    """Do as :func:`geometry_of`, and never merge batch items."""
    first = lambda t: None if t is None else t[:1]  # noqa: E731
    stride = lambda tensors: [t.stride(0) for t in tensors if t is not None]  # noqa: E731
    like = next(t for t in scores if t is not None)
    if like.dim() < 3 or len(like) == 1:  # there is a single item, whose stride may be any
        return geometry_of(scores, voxels)
    _, C, S, of_scores, of_voxels = geometry_of(list(map(first, scores)), list(map(first, voxels)))
    return Geometry(
        len(like), C, S, [(n, c, s) for n, (_, c, s) in zip(stride(scores), of_scores, strict=True)],
        [(n, c, s) for n, (_, c, s) in zip(stride(voxels), of_voxels, strict=True)],
    )  # fmt: skip


def geometry_of(scores: Sequence[Tensor | None], voxels: Sequence[Tensor | None]) -> Geometry:
    """Return the shape and the strides of the tensors of a call, with batch items merged into one if possible.

    Args:
        scores: the tensors with a class axis, in layouts that kernels can read. An absent one is None.
        voxels: the tensors without a class axis, in the same form.
    """
    given_scores = [tensor for tensor in scores if tensor is not None]
    given_voxels = [tensor for tensor in voxels if tensor is not None]
    return Geometry(*native.extension.geometry(given_scores, given_voxels))
