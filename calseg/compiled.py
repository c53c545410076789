"""The same operations under ``torch.compile``: opaque ``torch.library`` operators with fake kernels and gradients.

Dynamo cannot trace a native call inside an autograd.Function; in eager mode the Functions are faster (a registered
operator costs three times as much per call). A reduced loss returns its gradients beside it, as in eager mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from calseg import ops
from calseg.autograd import blend_gradient
from calseg.ops import Labels, Sampling
from calseg.rng import draw_seed as _draw_seed


def _gradient_of(tensor: Tensor | None, needed: bool, like: Tensor) -> Tensor:
    """Memory for a gradient; an empty tensor stands for none, for operators return no None."""
    return _empty_like(tensor) if needed and tensor is not None else torch.empty(0, device=like.device)


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=ops.layout_like(tensor))


def _labels(tensor: Tensor | None, ignore_index: int, is_mask: bool = False) -> Labels | None:
    return None if tensor is None else Labels(tensor, ignore_index, is_mask)


@custom_op("calseg::draw_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_seed() -> Tensor:
    """One seed from the default generator; opaque, so that a compiled call draws what an eager one does."""
    return _draw_seed()


@draw_seed.register_fake
def _() -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


# ---- every loss is one operator: logits, soft labels, mu and logvar are there or not ----


@custom_op("calseg::loss", mutates_args=())
def loss_operator(
    logits: Tensor | None,
    soft_labels: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    grad_output: Tensor | None,
    needed: list[bool],
    ignore_index: int,
    is_mask: bool,
    reduction: str,
    loss_dtype: torch.dtype,
    label_smoothing: float,
    alpha: float,
    num_samples: int,
    temperature: float,
    beta: float,
    prior_mu: float,
    prior_logvar: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradients with respect to logits, soft labels, mu and logvar."""
    inputs = (logits, soft_labels, mu, logvar)
    like = logits if logits is not None else mu
    assert like is not None
    gradients = [_gradient_of(t, need, like) for t, need in zip(inputs, needed, strict=True)]
    sampling = Sampling(num_samples, temperature, beta, prior_mu, prior_logvar, 0 if seed is None else seed)
    spec = ops.Loss(
        _labels(labels, ignore_index, is_mask), weight, reduction, loss_dtype, label_smoothing, alpha, sampling, backend
    )
    to = [g if need else None for g, need in zip(gradients, needed, strict=True)]
    upstream = None if grad_output is None else grad_output.expand(ops.voxel_shape(like))
    value = ops.loss(spec, *inputs, (to[0], to[1], to[2], to[3]), upstream)
    return value, gradients[0], gradients[1], gradients[2], gradients[3]


@loss_operator.register_fake
def _(logits, soft_labels, mu, logvar, labels, weight, seed, grad_output, needed, *options):  # type: ignore[no-untyped-def]
    _ignore_index, _is_mask, reduction, loss_dtype, *_ = options
    like = logits if logits is not None else mu
    per_voxel = reduction == "none" and grad_output is None
    gradients = (_gradient_of(t, n, like) for t, n in zip((logits, soft_labels, mu, logvar), needed, strict=True))
    return (like.new_empty(ops.voxel_shape(like) if per_voxel else (), dtype=loss_dtype), *gradients)


def _setup_loss(ctx: Any, inputs: Any, output: Any) -> None:
    (*tensors, _grad_output, needed) = inputs[:9]
    ctx.needed, ctx.rest, ctx.later = needed, inputs[9:], not any(needed)
    ctx.present = [t is not None for t in tensors]
    saved = (
        [t for t in tensors if t is not None]
        if ctx.later
        else [g for g, n in zip(output[1:], needed, strict=True) if n]
    )
    ctx.save_for_backward(*saved)


def _loss_backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
    saved = iter(ctx.saved_tensors)
    if ctx.later:
        tensors = [next(saved) if here else None for here in ctx.present]
        # the forward made no gradients: the same operator, with the upstream gradient of every voxel
        wanted = [bool(n) for n in ctx.needs_input_grad[:4]]
        _, *gradients = loss_operator(*tensors, grad_output, wanted, *ctx.rest)
        result = [g if n else None for g, n in zip(gradients, wanted, strict=True)]
    else:
        result = [next(saved) * grad_output if n else None for n in ctx.needed]
    return (*result, *([None] * 17))


loss_operator.register_autograd(_loss_backward, setup_context=_setup_loss)


def _seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def loss(
    spec: ops.Loss, logits: Tensor | None, soft_labels: Tensor | None, mu: Tensor | None, logvar: Tensor | None
) -> Tensor:
    """:func:`calseg.ops.loss` with autograd."""
    tensor, ignore_index, is_mask = spec.labels if spec.labels is not None else (None, 0, False)
    inputs = (logits, soft_labels, mu, logvar)
    now = torch.is_grad_enabled() and not ops.needs_upstream_first(spec, inputs)
    needed = [now and t is not None and t.requires_grad for t in inputs]
    num_samples, temperature, beta, prior_mu, prior_logvar, seed = spec.sampling
    seed_tensor = None if mu is None else _seed_tensor(seed, mu.device)
    value: Tensor = loss_operator(
        logits, soft_labels, mu, logvar, tensor, spec.weight, seed_tensor, None, needed, ignore_index, is_mask,
        spec.reduction, spec.dtype, spec.label_smoothing, spec.alpha, num_samples, temperature, beta, prior_mu,
        prior_logvar, spec.backend,
    )[0]  # fmt: skip
    return value


# ---- soft labels ----


@custom_op("calseg::sample_soft_labels", mutates_args=())
def sample_operator(
    mu: Tensor, logvar: Tensor, labels: Tensor | None, seed: Tensor, ignore_index: int, num_samples: int,
    temperature: float, alpha: float, backend: str,
) -> Tensor:  # fmt: skip
    """Sampled soft labels."""
    return ops.sample_soft_labels(
        mu, logvar, _labels(labels, ignore_index), Sampling(num_samples, temperature, seed=seed), alpha, backend
    )


@sample_operator.register_fake
def _(mu, *_options):  # type: ignore[no-untyped-def]
    return _empty_like(mu)


@custom_op("calseg::sample_soft_labels_backward", mutates_args=())
def sample_backward_operator(
    mu: Tensor, logvar: Tensor, labels: Tensor | None, seed: Tensor, ignore_index: int, num_samples: int,
    temperature: float, alpha: float, backend: str, grad_output: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of sampled soft labels with respect to mu and logvar."""
    gradients = _empty_like(mu), _empty_like(logvar)
    sampling = Sampling(num_samples, temperature, seed=seed)
    ops.sample_soft_labels_backward(
        mu, logvar, _labels(labels, ignore_index), sampling, alpha, grad_output, gradients, backend
    )
    return gradients


@sample_backward_operator.register_fake
def _(mu, logvar, *_options):  # type: ignore[no-untyped-def]
    return _empty_like(mu), _empty_like(logvar)


def _setup_sample(ctx: Any, inputs: Any, output: Any) -> None:
    mu, logvar, labels, seed, *ctx.rest = inputs
    ctx.save_for_backward(mu, logvar, seed, *(() if labels is None else (labels,)))


def _sample_backward(ctx: Any, grad_output: Tensor) -> Any:
    mu, logvar, seed, *labels = ctx.saved_tensors
    gradients = sample_backward_operator(mu, logvar, labels[0] if labels else None, seed, *ctx.rest, grad_output)
    return (*gradients, *([None] * 7))


sample_operator.register_autograd(_sample_backward, setup_context=_setup_sample)


def sample_soft_labels(
    mu: Tensor, logvar: Tensor, labels: Labels | None, sampling: Sampling, alpha: float, backend: str
) -> Tensor:
    """:func:`calseg.ops.sample_soft_labels` with autograd."""
    tensor, ignore_index, _ = labels if labels is not None else (None, 0, False)
    soft: Tensor = sample_operator(
        mu, logvar, tensor, _seed_tensor(sampling.seed, mu.device), ignore_index, sampling.num_samples,
        sampling.temperature, alpha, backend,
    )  # fmt: skip
    return soft


@custom_op("calseg::blend_soft_labels", mutates_args=())
def blend_operator(
    estimate: Tensor, labels: Tensor | None, ignore_index: int, alpha: float, scale: float, backend: str
) -> Tensor:
    """``(1 - alpha) * onehot(labels) + alpha * scale * estimate``, 0 where ignored."""
    blended = estimate.clone(memory_format=ops.layout_like(estimate))
    ops.blend_soft_labels(blended, _labels(labels, ignore_index), alpha, scale, backend)
    return blended


@blend_operator.register_fake
def _(estimate, *_options):  # type: ignore[no-untyped-def]
    return _empty_like(estimate)


def _setup_blend(ctx: Any, inputs: Any, output: Any) -> None:
    _, labels, ctx.ignore_index, ctx.alpha, ctx.scale, _ = inputs
    ctx.save_for_backward(*(() if labels is None else (labels,)))


def _blend_backward(ctx: Any, grad_output: Tensor) -> Any:
    labels = _labels(ctx.saved_tensors[0], ctx.ignore_index) if ctx.saved_tensors else None
    return blend_gradient(grad_output, labels, ctx.alpha, ctx.scale), *([None] * 5)


blend_operator.register_autograd(_blend_backward, setup_context=_setup_blend)


def blend_soft_labels(total: Tensor, labels: Labels | None, alpha: float, scale: float, backend: str) -> Tensor:
    """:func:`calseg.ops.blend_soft_labels` with autograd."""
    tensor, ignore_index, _ = labels if labels is not None else (None, 0, False)
    blended: Tensor = blend_operator(total, tensor, ignore_index, alpha, scale, backend)
    return blended


def accumulate_softmax(total: Tensor, logits: Tensor, labels: Labels | None, temperature: float) -> Tensor:
    """In the compiler's own operations, which it fuses."""
    axis = 1 if logits.dim() > 1 else 0
    if labels is not None:  # nothing of an ignored voxel counts, NaN included
        logits = logits.masked_fill((labels.tensor == labels.ignore_index).unsqueeze(axis), 0.0)
    return total + torch.softmax(logits.to(total.dtype) / temperature, axis)


# ---- average calibration error ----


@custom_op("calseg::ace_moments", mutates_args=())
def ace_moments_operator(
    logits: Tensor, labels: Tensor, ignore_index: int, n_bins: int, soft: bool, first_class: int
) -> Tensor:
    """:func:`calseg.ops.ace_moments`."""
    return ops.ace_moments(logits, Labels(labels, ignore_index), n_bins, soft, first_class)


@ace_moments_operator.register_fake
def _(logits, labels, ignore_index, n_bins, soft, first_class):  # type: ignore[no-untyped-def]
    N, C, _ = ops.shape_of(logits)
    return logits.new_empty(N, C - first_class, n_bins + soft, 5, dtype=torch.float64)


@custom_op("calseg::ace_moments_backward", mutates_args=())
def ace_moments_backward_operator(
    logits: Tensor, labels: Tensor, ignore_index: int, n_bins: int, soft: bool, first_class: int, grad_moments: Tensor
) -> Tensor:
    """:func:`calseg.ops.ace_moments_backward`."""
    gradient = _empty_like(logits)
    ops.ace_moments_backward(logits, Labels(labels, ignore_index), n_bins, soft, first_class, grad_moments, gradient)
    return gradient


@ace_moments_backward_operator.register_fake
def _(logits, *_options):  # type: ignore[no-untyped-def]
    return _empty_like(logits)


def _setup_ace(ctx: Any, inputs: Any, output: Any) -> None:
    logits, labels, *ctx.rest = inputs
    ctx.save_for_backward(logits, labels)


def _ace_backward(ctx: Any, grad_moments: Tensor) -> Any:
    logits, labels = ctx.saved_tensors
    return (ace_moments_backward_operator(logits, labels, *ctx.rest, grad_moments), *([None] * 5))


ace_moments_operator.register_autograd(_ace_backward, setup_context=_setup_ace)


def ace_moments(logits: Tensor, labels: Labels, n_bins: int, soft: bool, first_class: int) -> Tensor:
    """:func:`calseg.ops.ace_moments` with autograd."""
    moments: Tensor = ace_moments_operator(logits, labels.tensor, labels.ignore_index, n_bins, soft, first_class)
    return moments
