"""The Triton engine's side of :mod:`calseg.ops`: the same functions, on a GPU (or in Triton's interpreter).

Nothing waits for the host: the mean's divisor is made by a kernel and read by the next, a loss is a tensor, an upstream
factor and a seed tensor are read where they are. So every call can be captured into a CUDA graph.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from calseg import checks, ops
from calseg.kernels import launch as host
from calseg.kernels.calibration import NO_FAULT
from calseg.kernels.calibration import calibration_bins as calibration_bins_kernel
from calseg.kernels.common import Labels, Tile, Upstream, View
from calseg.kernels.cross_entropy import hard_cross_entropy, soft_cross_entropy
from calseg.kernels.gaussian import Gaussian, Statistics
from calseg.kernels.gaussian_kl import gaussian_kl
from calseg.kernels.launch import BINS, HARD, SAMPLED, SOFT, WEIGHTED, Geometry, Kind, launch
from calseg.kernels.reductions import finish_loss, scale_gradient, scan_labels
from calseg.kernels.sample_statistics import sample_statistics
from calseg.kernels.soft_labels import accumulate_softmax as accumulate_softmax_kernel
from calseg.kernels.soft_labels import blend_soft_labels as blend_soft_labels_kernel
from calseg.kernels.soft_labels import sample_soft_labels as sample_soft_labels_kernel
from calseg.kernels.vls_cross_entropy import vls_cross_entropy
from calseg.kernels.vls_elbo import vls_elbo

CHECK_LABELS = os.environ.get("CALSEG_CHECK_LABELS", "0") not in ("", "0")
SCAN_TILE = Tile(1, 1024)
MAX_SUMS = 256
ELEMENTWISE = 4096
BINS_AT_ONCE = 16  # of the top label; class-wise 1, as a thread holds sums of many classes
MOST_BINS_AT_ONCE = 64  # with more, voxels are added one by one


class _Call:
    """The tensors of a call as the kernels take them, and the tile they are cut into."""

    def __init__(self, kind: Kind, scores: Sequence[Tensor | None], voxels: Sequence[Tensor | None]) -> None:
        present = [tensor for tensor in scores if tensor is not None]
        self.like = present[0]
        flat = [None if t is None else t[None] if t.dim() == 0 else t.unsqueeze(1) for t in voxels]
        geometry = Geometry(
            *ops.shape_of(self.like), [ops._view(t)[2:] for t in present],
            [(n, 0, s) for n, _, s in (ops._view(t)[2:] for t in flat if t is not None)],
        )  # fmt: skip
        self.geometry = host.merge_items(geometry)
        self.C, self.S = self.geometry.C, self.geometry.S
        self.tile, self.num_warps = host.choose_tile(
            kind, self.geometry, min(tensor.element_size() for tensor in present)
        )
        self.programs = host.num_programs(self.geometry, self.tile)
        strides = iter(self.geometry.scores)
        self.scores = [None if t is None else View(t, *next(strides)) for t in scores]
        strides = iter(self.geometry.voxels)
        self.voxels = [None if t is None else View(t, *next(strides)) for t in voxels]

    def run(self, kernel: object, *arguments: object) -> None:
        launch(kernel, self.programs, self.like, (*arguments, self.tile), self.num_warps)


def _ignore(labels: ops.Labels) -> int | None:
    """``ignore_index``, unless no label of this type can be equal to it: then no label is ignored."""
    info = torch.iinfo(labels.tensor.dtype)
    if not info.min <= labels.ignore_index <= info.max:
        return None
    return labels.ignore_index if labels.ignore_index < 2**63 else labels.ignore_index - 2**64


def _labels(view: View | None, labels: ops.Labels | None) -> Labels:
    """Labels, or none, as the kernels take them."""
    if view is None or labels is None:
        return Labels(None, None, None, None)
    return Labels(view.ptr, view.stride_n, view.stride_s, _ignore(labels))


def _check_labels(labels: ops.Labels, num_classes: int) -> None:
    """With CALSEG_CHECK_LABELS=1: wait for the GPU, and raise IndexError at the first label that is no class."""
    if CHECK_LABELS and not labels.is_mask:
        checks.check_classes(labels.tensor.long(), num_classes, labels.ignore_index)


def _gaussian(sampling: ops.Sampling, device: torch.device) -> tuple[Gaussian, int]:
    """How the Gaussian is sampled, with a seed tensor of the device; else the seed, as a signed number."""
    _, temperature, beta, prior_mu, prior_logvar, seed = sampling
    tensor = seed if isinstance(seed, Tensor) and seed.device == device else None
    gaussian = Gaussian(temperature, beta, prior_mu, prior_logvar, math.exp(-prior_logvar), tensor)
    return gaussian, 0 if tensor is not None else (int(seed) + 2**63) % 2**64 - 2**63


def _statistics(
    call: _Call, x: View | None, m: View, v: View, grad_output: View | None, gaussian: Gaussian, seed: int,
    num_samples: int, labels: Labels, weight: Tensor | None, smoothing: float, alpha: float,
) -> Statistics | None:  # fmt: skip
    """What blocks of classes must know of each other, where there is more than one."""
    if call.C <= call.tile.BLOCK_C:
        return None
    voxels = call.geometry.N * call.S
    rows = torch.empty((3 + 3 * num_samples, voxels), dtype=torch.float32, device=call.like.device)
    statistics = Statistics(rows, voxels)
    call.run(
        sample_statistics, x, m, v, grad_output, gaussian, seed, num_samples, labels, weight, statistics, call.S,
        smoothing, alpha, call.C,
    )  # fmt: skip
    return statistics


def _sums(call: _Call, labels: Labels, is_mask: bool, weight: Tensor | None) -> tuple[Tensor, int]:
    """The mean's divisors, ``[2, NUM_SUMS]``: of the loss and of the KL term."""
    geometry, like = call.geometry, call.like
    steps = geometry.N * triton.cdiv(geometry.S, SCAN_TILE.TILE)
    num_sums = host.power_of_two(min(steps, MAX_SUMS))
    sums = torch.empty((2, num_sums), dtype=torch.float32, device=like.device)
    arguments = (labels, weight, sums, geometry.N, geometry.S, geometry.C, num_sums, is_mask, SCAN_TILE)
    launch(scan_labels, num_sums, like, arguments, 4)
    return sums, num_sums


def loss(
    spec: ops.Loss,
    logits: Tensor | None,
    soft_labels: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    gradients: ops.Gradients = ops.NO_GRADIENTS,
    grad_output: Tensor | None = None,
) -> Tensor:
    """:func:`calseg.ops.loss`."""
    labels, weight, reduction, dtype, label_smoothing, alpha, sampling = spec[:7]
    inputs = [None if t is None else ops._kept(t) for t in (logits, soft_labels, mu, logvar)]
    like = inputs[0] if inputs[0] is not None else inputs[2]
    assert like is not None
    weight = None if weight is None else weight.detach().resolve_neg().contiguous()
    labels = ops._kept_labels(labels)
    per_voxel = None
    if grad_output is None and reduction == "none":
        per_voxel = ops.empty_loss(like, dtype)
    upstream = grad_output
    if upstream is not None and upstream.dim():
        upstream = ops._kept(upstream.unsqueeze(1)).squeeze(1)
    sampled = inputs[2] is not None
    if sampled:
        kind = SOFT if labels is None else SAMPLED
    elif inputs[1] is not None:
        kind = SOFT
    else:
        kind = WEIGHTED if weight is not None and label_smoothing else HARD
    call = _Call(kind, (*inputs, *gradients), (None if labels is None else labels.tensor, upstream, per_voxel))
    voxels = call.geometry.N * call.S
    if voxels == 0:
        value = math.nan if reduction == "mean" else 0.0
        return per_voxel if per_voxel is not None else torch.full((), value, dtype=dtype, device=like.device)
    x, y, m, v, *to = call.scores
    label_view, upstream_view, loss_view = call.voxels

    given, is_mask = _labels(label_view, labels), False
    if labels is not None:
        _check_labels(labels, call.C)
        is_mask = labels.is_mask
    sums, num_sums, scale = None, 1, 1.0
    if reduction == "mean":
        if labels is None or (given.ignore is None and (weight is None or is_mask)):
            scale = 1.0 / voxels
        else:
            sums, num_sums = _sums(call, given, is_mask, None if is_mask else weight)
    up = Upstream(scale, sums, None, None, None)
    if upstream_view is not None:
        up = Upstream(scale, sums, upstream_view.ptr, upstream_view.stride_n, upstream_view.stride_s)
    with_kl = sampled and labels is not None and sampling.beta != 0
    partials = None
    if grad_output is None and per_voxel is None:
        partials = torch.empty((1 + with_kl, call.programs), dtype=torch.float32, device=like.device)
    outputs = up, loss_view, partials

    smoothing = float(label_smoothing)
    if not sampled and y is None:
        call.run(
            hard_cross_entropy, x, given, weight, *outputs, to[0], call.S, smoothing or None, call.C, num_sums
        )  # fmt: skip
    elif not sampled:
        call.run(
            soft_cross_entropy, x, y, given, weight, *outputs, to[0], to[1], call.S, smoothing, call.C, num_sums,
            is_mask,
        )  # fmt: skip
    else:
        gaussian, seed = _gaussian(sampling, like.device)
        if labels is None:
            call.run(gaussian_kl, m, v, gaussian, *outputs, to[2], to[3], call.S, call.C)
            return _finish(call, up, num_sums, per_voxel, partials, dtype, 0.0)
        draws = gaussian, seed, sampling.num_samples
        statistics = _statistics(call, x, m, v, None, *draws, given, weight, smoothing, alpha)
        if x is None:
            call.run(
                vls_elbo, m, v, *draws, statistics, given, weight, *outputs, to[2], to[3], call.S, with_kl, call.C,
                num_sums,
            )  # fmt: skip
        else:
            call.run(
                vls_cross_entropy, x, m, v, *draws, statistics, given, weight, *outputs, to[0], to[2], to[3], call.S,
                smoothing, alpha, alpha != 0, with_kl, call.C, num_sums,
            )  # fmt: skip

    return _finish(call, up, num_sums, per_voxel, partials, dtype, sampling.beta if with_kl else 0.0)


def _finish(
    call: _Call, up: Upstream, num_sums: int, per_voxel: Tensor | None, partials: Tensor | None, dtype: torch.dtype,
    beta: float,
) -> Tensor:  # fmt: skip
    """The loss, of its partial sums where it is reduced."""
    if per_voxel is not None:
        return per_voxel
    if partials is None:  # backward: nobody asks for it
        return torch.zeros((), dtype=dtype, device=call.like.device)
    value = torch.empty((), dtype=dtype, device=call.like.device)
    block = min(ELEMENTWISE, host.power_of_two(call.programs))
    arguments = (partials, up.sums, value, call.programs, up.scale, beta, partials.shape[0] == 2, num_sums, block)
    launch(finish_loss, 1, call.like, arguments, 8)
    return value


def scale_gradients(gradients: Sequence[Tensor | None], factor: Tensor) -> None:
    """Multiply in place by a 0-d tensor; where that is 1, no memory is touched."""
    for gradient in gradients:
        if gradient is not None:
            programs = min(triton.cdiv(gradient.numel(), ELEMENTWISE), 2048)
            launch(scale_gradient, programs, gradient, (gradient, factor, gradient.numel(), ELEMENTWISE), 8)


def sample_soft_labels(
    mu: Tensor, logvar: Tensor, labels: ops.Labels | None, sampling: ops.Sampling, alpha: float
) -> Tensor:
    """:func:`calseg.ops.sample_soft_labels`."""
    soft_labels = ops.empty_like(mu)
    _sample(mu, logvar, labels, sampling, alpha, soft_labels, None, (None, None))
    return soft_labels


def sample_soft_labels_backward(
    mu: Tensor,
    logvar: Tensor,
    labels: ops.Labels | None,
    sampling: ops.Sampling,
    alpha: float,
    grad_output: Tensor,
    gradients: tuple[Tensor | None, Tensor | None],
) -> None:
    """:func:`calseg.ops.sample_soft_labels_backward`."""
    _sample(mu, logvar, labels, sampling, alpha, None, ops._kept(grad_output), gradients)


def _sample(
    mu: Tensor,
    logvar: Tensor,
    labels: ops.Labels | None,
    sampling: ops.Sampling,
    alpha: float,
    soft_labels: Tensor | None,
    grad_output: Tensor | None,
    gradients: tuple[Tensor | None, Tensor | None],
) -> None:
    labels = ops._kept_labels(labels)
    scores = (ops._kept(mu), ops._kept(logvar), soft_labels, grad_output, *gradients)
    call = _Call(SAMPLED, scores, (None if labels is None else labels.tensor,))
    if labels is not None:
        _check_labels(labels, call.C)
    m, v, *rest = call.scores
    given = _labels(call.voxels[0], labels)
    draws = (*_gaussian(sampling, mu.device), sampling.num_samples)
    statistics = _statistics(call, None, m, v, rest[1], *draws, given, None, 0.0, alpha)
    alpha = 1.0 if labels is None else alpha
    call.run(sample_soft_labels_kernel, m, v, *draws, statistics, given, *rest, call.S, alpha, call.C)


def accumulate_softmax(total: Tensor, logits: Tensor, temperature: float) -> None:
    """:func:`calseg.ops.accumulate_softmax`."""
    _accumulate(logits, total, total, temperature, backward=False)


def accumulate_softmax_backward(logits: Tensor, grad_output: Tensor, temperature: float) -> Tensor:
    """:func:`calseg.ops.accumulate_softmax_backward`."""
    grad_logits = ops.empty_like(logits)
    _accumulate(logits, ops._kept(grad_output), grad_logits, temperature, backward=True)
    return grad_logits


def _accumulate(logits: Tensor, other: Tensor, out: Tensor, temperature: float, *, backward: bool) -> None:
    call = _Call(SOFT, (ops._kept(logits), other, out), ())
    call.run(accumulate_softmax_kernel, *call.scores, call.S, 1.0 / temperature, backward, call.C)


def blend_soft_labels(estimate: Tensor, labels: ops.Labels | None, alpha: float, scale: float) -> None:
    """:func:`calseg.ops.blend_soft_labels`."""
    labels = ops._kept_labels(labels)
    call = _Call(SOFT, (estimate,), (None if labels is None else labels.tensor,))
    if labels is not None:
        _check_labels(labels, call.C)
    given = _labels(call.voxels[0], labels)
    alpha = 1.0 if labels is None else alpha
    call.run(blend_soft_labels_kernel, call.scores[0], given, call.S, alpha, alpha * scale, call.C)


def calibration_bins(
    scores: Tensor,
    labels: ops.Labels,
    mask: Tensor | None,
    *,
    n_bins: int,
    from_logits: bool,
    first_class: int | None,
    skip_background: bool,
    per_item: bool,
    right_closed: bool,
) -> tuple[Tensor, Tensor, int, int]:
    """:func:`calseg.ops.calibration_bins`, and where the first label that is no class and the first scores that are no
    probabilities are, -1 if nowhere. Waits for the GPU once.
    """
    N, C, S = ops.shape_of(scores)
    items, kinds = N if per_item else 1, 1 if first_class is None else C - first_class
    results = torch.zeros(items, 2 + 6 + kinds * n_bins * 3, dtype=torch.int64, device=scores.device)
    results[:, :2] = NO_FAULT.value
    at_once = 0 if n_bins > MOST_BINS_AT_ONCE else BINS_AT_ONCE if first_class is None else 1
    scores, labels = ops._kept(scores), ops._kept_labels(labels)
    counted = None if mask is None else ops._kept_labels(ops.Labels(mask, 0)).tensor
    of_item = lambda t, n: t if t is None or items == 1 else t[n : n + 1]  # noqa: E731
    for item, result in enumerate(results):
        call = _Call(BINS, (of_item(scores, item),), (of_item(labels.tensor, item), of_item(counted, item)))
        call.run(
            calibration_bins_kernel, call.scores[0], _labels(call.voxels[0], labels), call.voxels[1],
            result[8:], result[2:8], result[:2], call.S, n_bins, first_class or 0,
            checks.probability_tolerance(scores.dtype), from_logits, first_class is not None, skip_background,
            right_closed, at_once, C,
        )  # fmt: skip
    results = results.cpu()
    places = results[:, :2] + torch.arange(items, device="cpu")[:, None] * S
    label_position, score_position = (
        int(places[found, k].min()) if bool((found := results[:, k] != NO_FAULT.value).any()) else -1 for k in range(2)
    )
    return results[:, 8:].view(items, kinds, n_bins, 3), results[:, 2:8], label_position, score_position
