"""The ``torch.autograd.Function``s, one per operation of the native engines.

A reduced loss makes its gradients in the forward pass, while each tile is in cache; backward hands them out. With
``reduction="none"`` the upstream gradient differs per voxel: backward runs the kernel again, with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from calseg import ops
from calseg.ops import Gaussian, Labels

Gradients = tuple[Tensor | None, ...]


class _OnceDifferentiable(Function):
    """Identity whose gradient is an error: second derivatives are refused, not silently missing."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "calseg: the fused kernels have no second derivative (double backward); pass backend='reference'"
        )


def _guarded(gradients: Gradients) -> Gradients:
    """In a pass with ``create_graph=True``, gradients that refuse to be differentiated again."""
    if not torch.is_grad_enabled():
        return gradients
    return tuple(None if g is None else _OnceDifferentiable.apply(g.detach().requires_grad_()) for g in gradients)


def _graph_is_kept() -> bool:
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _scaled(gradients: tuple[Tensor, ...], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Saved gradients times the scalar upstream gradient; in place where nobody will want them again."""
    factor = grad_output.item()
    if factor == 1.0:
        return gradients
    if _graph_is_kept():
        return tuple(gradient * factor for gradient in gradients)
    return tuple(gradient.mul_(factor) for gradient in gradients)


def _empties(tensors: tuple[Tensor | None, ...], needed: tuple[bool, ...]) -> Gradients:
    return tuple(
        ops.empty_like(tensor) if need and tensor is not None else None
        for tensor, need in zip(tensors, needed, strict=True)
    )


def _spread(values: tuple[Tensor, ...], present: tuple[bool, ...]) -> Gradients:
    """Puts saved tensors back to the places they came from."""
    it = iter(values)
    return tuple(next(it) if here else None for here in present)


class CrossEntropy(Function):
    """``(logits, soft_labels, labels, weight, options, reuse_logits) -> loss``."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        soft_labels: Tensor | None,
        labels: Labels | None,
        weight: Tensor | None,
        options: dict[str, Any],
        reuse_logits: bool,
    ) -> Tensor:
        ctx.options, ctx.labels_meta, ctx.reuse_logits = options, None if labels is None else labels[1:], reuse_logits
        ctx.later = options["reduction"] == "none" or reuse_logits
        if ctx.later:
            saved = (logits, soft_labels, None if labels is None else labels.tensor, weight)
            ctx.present = tuple(t is not None for t in saved)
            ctx.save_for_backward(*(t for t in saved if t is not None))
            return ops.cross_entropy(logits, soft_labels, labels, weight, **options)
        needed = ctx.needs_input_grad[:2]
        gradients = _empties((logits, soft_labels), needed)
        loss = ops.cross_entropy(
            logits, soft_labels, labels, weight, grad_logits=gradients[0], grad_soft_labels=gradients[1], **options
        )
        ctx.present = tuple(g is not None for g in gradients)
        ctx.save_for_backward(*(g for g in gradients if g is not None))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        if not ctx.later:
            gradients = _spread(_scaled(ctx.saved_tensors, grad_output), ctx.present)
            return (*_guarded(gradients), None, None, None, None)
        logits, soft_labels, label_tensor, weight = _spread(ctx.saved_tensors, ctx.present)
        assert logits is not None
        labels = None if label_tensor is None else Labels(label_tensor, *ctx.labels_meta)
        in_place = ctx.reuse_logits and not _graph_is_kept()
        grad_logits, grad_soft = _empties((logits, soft_labels), (ctx.needs_input_grad[0] and not in_place, ctx.needs_input_grad[1]))
        if in_place:
            grad_logits = logits.detach()
        ops.cross_entropy(
            logits, soft_labels, labels, weight, grad_output=grad_output.expand(ops.voxel_shape(logits)),
            grad_logits=grad_logits, grad_soft_labels=grad_soft, **ctx.options,
        )  # fmt: skip
        if in_place:  # whoever saved the logits for its own backward is told, as by any in-place operation
            torch.autograd.graph.increment_version(logits)
        return (*_guarded((grad_logits, grad_soft)), None, None, None, None)


class VLSCrossEntropy(Function):
    """``(logits, mu, logvar, labels, weight, sampling, options, reuse_logits) -> loss``."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        mu: Tensor,
        logvar: Tensor,
        labels: Labels,
        weight: Tensor | None,
        sampling: tuple[Any, ...],
        options: dict[str, Any],
        reuse_logits: bool,
    ) -> Tensor:
        gaussian = Gaussian(mu, logvar, *sampling)
        ctx.options, ctx.labels_meta, ctx.reuse_logits = options, labels[1:], reuse_logits
        ctx.sampling = sampling
        ctx.later = options["reduction"] == "none" or reuse_logits
        if ctx.later:
            saved = (logits, mu, logvar, labels.tensor, weight)
            ctx.present = tuple(t is not None for t in saved)
            ctx.save_for_backward(*(t for t in saved if t is not None))
            return ops.vls_cross_entropy(logits, gaussian, labels, weight, **options)
        gradients = _empties((logits, mu, logvar), ctx.needs_input_grad[:3])
        loss = ops.vls_cross_entropy(
            logits, gaussian, labels, weight, grad_logits=gradients[0], grad_mu=gradients[1], grad_logvar=gradients[2],
            **options,
        )  # fmt: skip
        ctx.present = tuple(g is not None for g in gradients)
        ctx.save_for_backward(*(g for g in gradients if g is not None))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        if not ctx.later:
            gradients = _spread(_scaled(ctx.saved_tensors, grad_output), ctx.present)
            return (*_guarded(gradients), None, None, None, None, None)
        logits, mu, logvar, label_tensor, weight = _spread(ctx.saved_tensors, ctx.present)
        assert logits is not None and mu is not None and logvar is not None and label_tensor is not None
        in_place = ctx.reuse_logits and not _graph_is_kept()
        needs_logits, needs_mu, needs_logvar = ctx.needs_input_grad[:3]
        grad_logits, grad_mu, grad_logvar = _empties(
            (logits, mu, logvar), (needs_logits and not in_place, needs_mu, needs_logvar)
        )
        if in_place:
            grad_logits = logits.detach()
        ops.vls_cross_entropy(
            logits, Gaussian(mu, logvar, *ctx.sampling), Labels(label_tensor, *ctx.labels_meta), weight,
            grad_output=grad_output.expand(ops.voxel_shape(logits)), grad_logits=grad_logits, grad_mu=grad_mu,
            grad_logvar=grad_logvar, **ctx.options,
        )  # fmt: skip
        if in_place:
            torch.autograd.graph.increment_version(logits)
        return (*_guarded((grad_logits, grad_mu, grad_logvar)), None, None, None, None, None)


class VLSElbo(Function):
    """``(mu, logvar, labels, weight, sampling, options) -> loss``; ``labels`` None: the KL term alone."""

    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        logvar: Tensor,
        labels: Labels | None,
        weight: Tensor | None,
        sampling: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Tensor:
        ctx.options, ctx.labels_meta, ctx.sampling = options, None if labels is None else labels[1:], sampling
        ctx.later = options["reduction"] == "none"
        if ctx.later:
            saved = (mu, logvar, None if labels is None else labels.tensor, weight)
            ctx.present = tuple(t is not None for t in saved)
            ctx.save_for_backward(*(t for t in saved if t is not None))
            return ops.elbo_or_kl(Gaussian(mu, logvar, *sampling), labels, weight, **options)
        gradients = _empties((mu, logvar), ctx.needs_input_grad[:2])
        loss = ops.elbo_or_kl(
            Gaussian(mu, logvar, *sampling), labels, weight, grad_mu=gradients[0], grad_logvar=gradients[1], **options
        )
        ctx.present = tuple(g is not None for g in gradients)
        ctx.save_for_backward(*(g for g in gradients if g is not None))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        if not ctx.later:
            gradients = _spread(_scaled(ctx.saved_tensors, grad_output), ctx.present)
            return (*_guarded(gradients), None, None, None, None)
        mu, logvar, label_tensor, weight = _spread(ctx.saved_tensors, ctx.present)
        assert mu is not None and logvar is not None
        labels = None if label_tensor is None else Labels(label_tensor, *ctx.labels_meta)
        grad_mu, grad_logvar = _empties((mu, logvar), ctx.needs_input_grad[:2])
        ops.elbo_or_kl(
            Gaussian(mu, logvar, *ctx.sampling), labels, weight, grad_output=grad_output, grad_mu=grad_mu,
            grad_logvar=grad_logvar, **ctx.options,
        )  # fmt: skip
        return (*_guarded((grad_mu, grad_logvar)), None, None, None, None)


class SampleSoftLabels(Function):
    """``(mu, logvar, labels, sampling, alpha) -> soft labels``; backward draws the same noise again."""

    @staticmethod
    def forward(
        ctx: Any, mu: Tensor, logvar: Tensor, labels: Labels | None, sampling: tuple[Any, ...], alpha: float
    ) -> Tensor:
        ctx.labels_meta, ctx.sampling, ctx.alpha = None if labels is None else labels[1:], sampling, alpha
        ctx.save_for_backward(mu, logvar, *(() if labels is None else (labels.tensor,)))
        return ops.sample_soft_labels(Gaussian(mu, logvar, *sampling), labels, alpha=alpha)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        mu, logvar, *rest = ctx.saved_tensors
        labels = Labels(rest[0], *ctx.labels_meta) if rest else None
        grad_mu, grad_logvar = _empties((mu, logvar), ctx.needs_input_grad[:2])
        ops.sample_soft_labels_backward(
            Gaussian(mu, logvar, *ctx.sampling), labels, grad_output, alpha=ctx.alpha, grad_mu=grad_mu,
            grad_logvar=grad_logvar,
        )  # fmt: skip
        return (*_guarded((grad_mu, grad_logvar)), None, None, None)


class AccumulateSoftmax(Function):
    """``(total, logits, temperature) -> total``, which is updated in place."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, logits: Tensor, temperature: float) -> Tensor:
        ctx.mark_dirty(total)
        ctx.save_for_backward(logits)
        ctx.temperature = temperature
        ops.accumulate_softmax(total, logits, temperature=temperature)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        (logits,) = ctx.saved_tensors
        gradient = None
        if ctx.needs_input_grad[1]:
            gradient = ops.accumulate_softmax_backward(logits, grad_output, temperature=ctx.temperature)
        return grad_output, *_guarded((gradient,)), None


class BlendSoftLabels(Function):
    """``(estimate, labels, alpha, scale) -> soft labels``, in place of the estimate."""

    @staticmethod
    def forward(ctx: Any, estimate: Tensor, labels: Labels | None, alpha: float, scale: float) -> Tensor:
        ctx.mark_dirty(estimate)
        ctx.labels_meta, ctx.factor = None if labels is None else labels[1:], scale if labels is None else alpha * scale
        ctx.save_for_backward(*(() if labels is None else (labels.tensor,)))
        ops.blend_soft_labels(estimate, labels, alpha=alpha, scale=scale)
        return estimate

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        gradient = grad_output * ctx.factor
        if ctx.saved_tensors:
            ignored = ctx.saved_tensors[0] == ctx.labels_meta[0]
            gradient = gradient.masked_fill(ignored.unsqueeze(1 if gradient.dim() > 1 else 0), 0.0)
        return gradient, None, None, None
