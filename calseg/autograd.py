"""The ``torch.autograd.Function``s of the native engines.

A reduced loss makes its gradients in the forward pass, while each tile is in cache; backward hands them out. Where the
upstream gradient differs per voxel (``reduction="none"``), or the gradient is to go where the logits are, backward runs
the kernel again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from calseg import ops
from calseg.ops import Labels, Sampling


class _OnceDifferentiable(Function):
    """``(gradient, *what it depends on) -> gradient``, whose own gradient is an error: second derivatives are refused,
    not silently missing.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "calseg: the fused kernels have no second derivative (double backward); pass backend='reference'"
        )


def _guarded(gradients: Sequence[Tensor | None], *inputs: Tensor) -> tuple[Tensor | None, ...]:
    """In a pass with ``create_graph=True``, gradients that refuse to be differentiated again."""
    if not torch.is_grad_enabled():
        return tuple(gradients)
    return tuple(None if g is None else _OnceDifferentiable.apply(g.detach(), *inputs) for g in gradients)


_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph


class Loss(Function):
    """``((loss, gradients, backend), *tensors) -> loss``, of a loss that has its gradients with respect to ``tensors``
    already: backward hands them out.

    They come in a tuple, as every argument of a Function costs time, and small losses have none to spare.
    """

    @staticmethod
    def forward(ctx: Any, made: tuple[Tensor, tuple[Tensor | None, ...], str], *tensors: Tensor) -> Tensor:
        loss, ctx.gradients, ctx.backend = made
        # Not saved, which takes time and would copy gradients in backward: nobody else sees these, so they are handed
        # over; and of the inputs only their place in the graph is wanted, for create_graph.
        ctx.inputs = tensors
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        gradients, inputs = ctx.gradients, ctx.inputs
        if not gradients:
            raise RuntimeError(
                "Trying to backward through the graph a second time (or directly access saved tensors after they have "
                "already been freed). Specify retain_graph=True if you need to backward through the graph a second "
                "time."
            )
        if _graph_is_kept():
            gradients = [None if g is None else g.mul(grad_output) for g in gradients]
        else:
            ctx.gradients = ctx.inputs = ()
            ops.scale_gradients(gradients, grad_output, ctx.backend)  # in place: nobody wants the unscaled ones again
        if torch.is_grad_enabled():
            gradients = _guarded(gradients, grad_output, *inputs)
        return None, *gradients


class LossInBackward(Function):
    """``((spec, reuse_logits, places), *tensors) -> loss``, whose gradients are made in backward.

    ``tensors`` are those of logits, soft labels, mu and logvar that there are, ``places`` which of the four they are.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[ops.Loss, bool, tuple[int, ...]], *tensors: Tensor) -> Tensor:
        ctx.spec, ctx.reuse_logits, ctx.places = call
        labels = ctx.spec.labels
        ctx.save_for_backward(None if labels is None else labels.tensor, ctx.spec.weight, *tensors)
        return ops.loss(ctx.spec, *_placed(ctx.places, tensors))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        label_tensor, weight, *tensors = ctx.saved_tensors
        spec = ctx.spec
        if label_tensor is not None:
            spec = spec._replace(labels=spec.labels._replace(tensor=label_tensor), weight=weight)
        in_place = ctx.reuse_logits and not _graph_is_kept()
        gradients: list[Tensor | None] = []
        for i, tensor in enumerate(tensors):
            if in_place and i == 0:
                gradients.append(tensor.detach())
            else:
                gradients.append(ops.empty_like(tensor) if ctx.needs_input_grad[1 + i] else None)
        upstream = grad_output.expand(ops.voxel_shape(tensors[0]))
        ops.loss(spec, *_placed(ctx.places, tensors), _placed(ctx.places, gradients), upstream)
        if in_place:  # whoever saved the logits for its own backward is told, as by any in-place operation
            torch.autograd.graph.increment_version(tensors[0])
        return None, *_guarded(gradients, grad_output, *tensors)


# Function.apply less its detour for torch.func, whose calls never come here: it takes 2 of a small loss's 35 us.
_attach, _attach_later = super(Function, Loss).apply, super(Function, LossInBackward).apply


def small_cross_entropy(logits: Tensor, target: Tensor, *options: Any) -> Tensor | None:
    """:func:`calseg.ops.small_cross_entropy` with autograd."""
    if ops.small_cross_entropy is None:
        return None
    outcome = ops.small_cross_entropy(logits, target, *options, torch.is_grad_enabled(), torch.get_num_threads())
    if outcome is None:
        return None
    value, gradient = outcome
    loss = torch.scalar_tensor(value, dtype=logits.dtype, device="cpu")
    if gradient is None:
        return loss
    attached: Tensor = _attach((loss, (gradient,), "cpu"), logits)
    return attached


def loss(spec: ops.Loss, inputs: ops.Gradients, reuse_logits: bool) -> Tensor:
    """:func:`calseg.ops.loss` of logits, soft labels, mu and logvar, those of them that there are, with autograd."""
    places = tuple(i for i, tensor in enumerate(inputs) if tensor is not None)
    tensors = [tensor for tensor in inputs if tensor is not None]
    if reuse_logits or ops.needs_upstream_first(spec, tensors):
        later: Tensor = _attach_later((spec, reuse_logits, places), *tensors)
        return later
    gradients = tuple(ops.empty_like(tensor) if tensor.requires_grad else None for tensor in tensors)
    with torch.no_grad():
        made = ops.loss(spec, *inputs, _placed(places, gradients)), gradients, spec.backend
    now: Tensor = _attach(made, *tensors)
    return now


def _placed(places: tuple[int, ...], tensors: Sequence[Tensor | None]) -> ops.Gradients:
    """(logits, soft labels, mu, logvar), None where there is none."""
    placed: list[Tensor | None] = [None] * 4
    for place, tensor in zip(places, tensors, strict=True):
        placed[place] = tensor
    return placed[0], placed[1], placed[2], placed[3]


class AceMoments(Function):
    """``(labels, n_bins, soft, first_class, logits) -> moments``; backward reads the logits again."""

    @staticmethod
    def forward(ctx: Any, labels: Labels, n_bins: int, soft: bool, first_class: int, logits: Tensor) -> Tensor:
        ctx.labels, ctx.n_bins, ctx.soft, ctx.first_class = labels, n_bins, soft, first_class
        ctx.save_for_backward(logits, labels.tensor)
        return ops.ace_moments(logits, labels, n_bins, soft, first_class)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_moments,) = grad_outputs
        logits, label_tensor = ctx.saved_tensors
        gradient = ops.empty_like(logits)
        labels = ctx.labels._replace(tensor=label_tensor)
        ops.ace_moments_backward(logits, labels, ctx.n_bins, ctx.soft, ctx.first_class, grad_moments.detach(), gradient)
        return None, None, None, None, *_guarded((gradient,), grad_moments, logits)


class SampleSoftLabels(Function):
    """``(labels, sampling, alpha, backend, mu, logvar) -> soft labels``; backward draws the same noise again."""

    @staticmethod
    def forward(
        ctx: Any, labels: Labels | None, sampling: Sampling, alpha: float, backend: str, mu: Tensor, logvar: Tensor
    ) -> Tensor:
        ctx.labels, ctx.sampling, ctx.alpha, ctx.backend = labels, sampling, alpha, backend
        ctx.save_for_backward(mu, logvar, None if labels is None else labels.tensor)
        return ops.sample_soft_labels(mu, logvar, labels, sampling, alpha, backend)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        mu, logvar, label_tensor = ctx.saved_tensors
        labels = None if label_tensor is None else ctx.labels._replace(tensor=label_tensor)
        _, _, _, _, *needed = ctx.needs_input_grad
        grad_mu, grad_logvar = (
            ops.empty_like(t) if need else None for t, need in zip((mu, logvar), needed, strict=True)
        )
        ops.sample_soft_labels_backward(
            mu, logvar, labels, ctx.sampling, ctx.alpha, grad_output, (grad_mu, grad_logvar), ctx.backend
        )
        return None, None, None, None, *_guarded((grad_mu, grad_logvar), grad_output, mu, logvar)


class AccumulateSoftmax(Function):
    """``(total, logits, labels, temperature, backend) -> total``, which is updated in place."""

    @staticmethod
    def forward(
        ctx: Any, total: Tensor, logits: Tensor, labels: Labels | None, temperature: float, backend: str
    ) -> Tensor:
        ctx.mark_dirty(total)
        ctx.save_for_backward(logits, None if labels is None else labels.tensor)
        ctx.labels, ctx.temperature, ctx.backend = labels, temperature, backend
        ops.accumulate_softmax(total, logits, temperature, backend)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        logits, label_tensor = ctx.saved_tensors
        gradient = None
        if ctx.needs_input_grad[1]:
            gradient = ops.accumulate_softmax_backward(logits, grad_output, ctx.temperature, ctx.backend)
            if label_tensor is not None:  # NaN under an ignored voxel must not come back as its gradient
                gradient.masked_fill_(_ignored(ctx.labels._replace(tensor=label_tensor), gradient), 0.0)
        return grad_output, *_guarded((gradient,), grad_output, logits), None, None, None


class BlendSoftLabels(Function):
    """``(estimate, labels, alpha, scale, backend) -> soft labels``, in place of the estimate."""

    @staticmethod
    def forward(ctx: Any, estimate: Tensor, labels: Labels | None, alpha: float, scale: float, backend: str) -> Tensor:
        ctx.mark_dirty(estimate)
        ctx.labels, ctx.alpha, ctx.scale = labels, alpha, scale
        ctx.save_for_backward(None if labels is None else labels.tensor)
        ops.blend_soft_labels(estimate, labels, alpha, scale, backend)
        return estimate

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        (label_tensor,) = ctx.saved_tensors
        labels = None if label_tensor is None else ctx.labels._replace(tensor=label_tensor)
        return blend_gradient(grad_output, labels, ctx.alpha, ctx.scale), None, None, None, None


def blend_gradient(grad_output: Tensor, labels: Labels | None, alpha: float, scale: float) -> Tensor:
    """The gradient of :func:`calseg.ops.blend_soft_labels` with respect to the estimate."""
    if labels is None:
        return grad_output * scale
    return (grad_output * (alpha * scale)).masked_fill(_ignored(labels, grad_output), 0.0)


def _ignored(labels: Labels, like: Tensor) -> Tensor:
    """Where the label is ignored, ``[N, 1, *S]``."""
    return (labels.tensor == labels.ignore_index).unsqueeze(1 if like.dim() > 1 else 0)
