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
from calseg.ops import Gaussian, Labels
from calseg.rng import draw_seed as _draw_seed

_NONE = torch.float32  # dtype of the empty tensor that stands for "no gradient": operators return no None


def _absent(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=_NONE, device=like.device)


def _gradient_of(tensor: Tensor | None, needed: bool, like: Tensor) -> Tensor:
    return ops.empty_like(tensor) if needed and tensor is not None else _absent(like)


def _fake_gradient_of(tensor: Tensor | None, needed: bool, like: Tensor) -> Tensor:
    return _fake_like(tensor) if needed and tensor is not None else _absent(like)


def _fake_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=ops.layout_like(tensor))


def _present(tensor: Tensor, needed: bool) -> Tensor | None:
    return tensor if needed else None


def _labels(tensor: Tensor | None, ignore_index: int, is_mask: bool) -> Labels | None:
    return None if tensor is None else Labels(tensor, ignore_index, is_mask)


def _fake_loss(like: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    return like.new_empty(ops.voxel_shape(like) if reduction == "none" else (), dtype=dtype)


def _fake_gradient_loss(like: Tensor) -> Tensor:
    return like.new_empty(())


@custom_op("calseg::draw_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_seed() -> Tensor:
    """One seed from the default generator; opaque, so that a compiled call draws what an eager one does."""
    return _draw_seed()


@draw_seed.register_fake
def _() -> Tensor:
    return torch.empty((), dtype=torch.int64)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradients with respect to logits, soft labels, mu and logvar."""
    inputs = (logits, soft_labels, mu, logvar)
    like = logits if logits is not None else mu
    assert like is not None
    gradients = tuple(_gradient_of(t, need, like) for t, need in zip(inputs, needed, strict=True))
    grad_logits, grad_soft, grad_mu, grad_logvar = (_present(g, n) for g, n in zip(gradients, needed, strict=True))
    label_arg = _labels(labels, ignore_index, is_mask)
    common: dict[str, Any] = {"reduction": reduction, "loss_dtype": loss_dtype, "grad_output": grad_output}
    if mu is None or logvar is None:
        assert logits is not None
        loss = ops.cross_entropy(
            logits, soft_labels, label_arg, weight, label_smoothing=label_smoothing, grad_logits=grad_logits,
            grad_soft_labels=grad_soft, **common,
        )  # fmt: skip
        return (loss, *gradients)
    gaussian = Gaussian(
        mu, logvar, num_samples, temperature, beta, prior_mu, prior_logvar, 0 if seed is None else seed
    )
    if logits is None:
        loss = ops.elbo_or_kl(gaussian, label_arg, weight, grad_mu=grad_mu, grad_logvar=grad_logvar, **common)
    else:
        assert label_arg is not None
        loss = ops.vls_cross_entropy(
            logits, gaussian, label_arg, weight, label_smoothing=label_smoothing, alpha=alpha, grad_logits=grad_logits,
            grad_mu=grad_mu, grad_logvar=grad_logvar, **common,
        )  # fmt: skip
    return (loss, *gradients)


@loss_operator.register_fake
def _(
    logits, soft_labels, mu, logvar, labels, weight, seed, grad_output, needed, ignore_index, is_mask, reduction,
    loss_dtype, *_options,
):  # type: ignore[no-untyped-def]  # fmt: skip
    like = logits if logits is not None else mu
    gradients = (_fake_gradient_of(t, n, like) for t, n in zip((logits, soft_labels, mu, logvar), needed, strict=True))
    if grad_output is not None:
        return (torch.empty((), dtype=loss_dtype, device=like.device), *gradients)
    return (_fake_loss(like, reduction, loss_dtype), *gradients)


def _setup_loss(ctx: Any, inputs: Any, output: Any) -> None:
    (*tensors, _grad_output, needed) = inputs[:9]
    ctx.needed, ctx.rest, ctx.later = needed, inputs[9:], inputs[11] == "none"
    ctx.present = [t is not None for t in tensors]
    saved = [t for t in tensors if t is not None] if ctx.later else [g for g, n in zip(output[1:], needed, strict=True) if n]
    ctx.save_for_backward(*saved)


def _loss_backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
    saved = iter(ctx.saved_tensors)
    if ctx.later:
        tensors = [next(saved) if here else None for here in ctx.present]
        # the forward of "none" made no gradients: the same operator, with the upstream gradient of every voxel
        wanted = [bool(n) for n in ctx.needs_input_grad[:4]]
        _, *gradients = loss_operator(*tensors, grad_output, wanted, *ctx.rest)
        result = [g if n else None for g, n in zip(gradients, wanted, strict=True)]
    else:
        result = [next(saved) * grad_output if n else None for n in ctx.needed]
    return (*result, *([None] * 16))


loss_operator.register_autograd(_loss_backward, setup_context=_setup_loss)


def _needed(reduction: str, *tensors: Tensor | None) -> list[bool]:
    wanted = torch.is_grad_enabled() and reduction != "none"
    return [wanted and t is not None and t.requires_grad for t in tensors]


def _seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def cross_entropy(
    logits: Tensor, soft_labels: Tensor | None, labels: Labels | None, weight: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """:func:`calseg.ops.cross_entropy` with autograd."""
    tensor, ignore_index, is_mask = labels if labels is not None else (None, 0, False)
    needed = _needed(options["reduction"], logits, soft_labels, None, None)
    loss: Tensor = loss_operator(
        logits, soft_labels, None, None, tensor, weight, None, None, needed, ignore_index, is_mask,
        options["reduction"], options["loss_dtype"], options["label_smoothing"], 0.0, 1, 1.0, 0.0, 0.0, 0.0,
    )[0]  # fmt: skip
    return loss


def vls_cross_entropy(
    logits: Tensor,
    mu: Tensor,
    logvar: Tensor,
    labels: Labels,
    weight: Tensor | None,
    sampling: tuple[Any, ...],
    options: dict[str, Any],
) -> Tensor:
    """:func:`calseg.ops.vls_cross_entropy` with autograd."""
    num_samples, temperature, beta, prior_mu, prior_logvar, seed = sampling
    needed = _needed(options["reduction"], logits, None, mu, logvar)
    loss: Tensor = loss_operator(
        logits, None, mu, logvar, labels.tensor, weight, _seed_tensor(seed, mu.device), None, needed,
        labels.ignore_index, False, options["reduction"], options["loss_dtype"], options["label_smoothing"],
        options["alpha"], num_samples, float(temperature), float(beta), float(prior_mu), float(prior_logvar),
    )[0]  # fmt: skip
    return loss


def elbo_or_kl(
    mu: Tensor,
    logvar: Tensor,
    labels: Labels | None,
    weight: Tensor | None,
    sampling: tuple[Any, ...],
    options: dict[str, Any],
) -> Tensor:
    """:func:`calseg.ops.elbo_or_kl` with autograd."""
    num_samples, temperature, beta, prior_mu, prior_logvar, seed = sampling
    tensor, ignore_index, _ = labels if labels is not None else (None, 0, False)
    needed = _needed(options["reduction"], None, None, mu, logvar)
    loss: Tensor = loss_operator(
        None, None, mu, logvar, tensor, weight, _seed_tensor(seed, mu.device), None, needed, ignore_index, False,
        options["reduction"], options["loss_dtype"], 0.0, 0.0, num_samples, float(temperature), float(beta),
        float(prior_mu), float(prior_logvar),
    )[0]  # fmt: skip
    return loss


# ---- soft labels ----


@custom_op("calseg::sample_soft_labels", mutates_args=())
def sample_operator(
    mu: Tensor, logvar: Tensor, labels: Tensor | None, seed: Tensor, ignore_index: int, num_samples: int,
    temperature: float, alpha: float,
) -> Tensor:  # fmt: skip
    """Sampled soft labels."""
    gaussian = Gaussian(mu, logvar, num_samples, temperature, 0.0, 0.0, 0.0, seed)
    return ops.sample_soft_labels(gaussian, _labels(labels, ignore_index, False), alpha=alpha)


@sample_operator.register_fake
def _(mu, *_options):  # type: ignore[no-untyped-def]
    return _fake_like(mu)


@custom_op("calseg::sample_soft_labels_backward", mutates_args=())
def sample_backward_operator(
    mu: Tensor, logvar: Tensor, labels: Tensor | None, seed: Tensor, ignore_index: int, num_samples: int,
    temperature: float, alpha: float, grad_output: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of sampled soft labels with respect to mu and logvar."""
    gaussian = Gaussian(mu, logvar, num_samples, temperature, 0.0, 0.0, 0.0, seed)
    grad_mu, grad_logvar = ops.empty_like(mu), ops.empty_like(logvar)
    ops.sample_soft_labels_backward(
        gaussian, _labels(labels, ignore_index, False), grad_output, alpha=alpha, grad_mu=grad_mu, grad_logvar=grad_logvar
    )
    return grad_mu, grad_logvar


@sample_backward_operator.register_fake
def _(mu, logvar, *_options):  # type: ignore[no-untyped-def]
    return _fake_like(mu), _fake_like(logvar)


def _setup_sample(ctx: Any, inputs: Any, output: Any) -> None:
    mu, logvar, labels, seed, *ctx.rest = inputs
    ctx.has_labels = labels is not None
    ctx.save_for_backward(mu, logvar, seed, *(() if labels is None else (labels,)))


def _sample_backward(ctx: Any, grad_output: Tensor) -> Any:
    mu, logvar, seed, *labels = ctx.saved_tensors
    gradients = sample_backward_operator(mu, logvar, labels[0] if labels else None, seed, *ctx.rest, grad_output)
    return (*gradients, *([None] * 6))


sample_operator.register_autograd(_sample_backward, setup_context=_setup_sample)


def sample_soft_labels(
    mu: Tensor, logvar: Tensor, labels: Labels | None, sampling: tuple[Any, ...], alpha: float
) -> Tensor:
    """:func:`calseg.ops.sample_soft_labels` with autograd."""
    num_samples, temperature, *_, seed = sampling
    tensor, ignore_index, _ = labels if labels is not None else (None, 0, False)
    soft: Tensor = sample_operator(
        mu, logvar, tensor, _seed_tensor(seed, mu.device), ignore_index, num_samples, float(temperature), alpha
    )
    return soft


@custom_op("calseg::blend_soft_labels", mutates_args=())
def blend_operator(
    estimate: Tensor, labels: Tensor | None, ignore_index: int, alpha: float, scale: float
) -> Tensor:
    """``(1 - alpha) * onehot(labels) + alpha * scale * estimate``, 0 where ignored."""
    blended = estimate.clone(memory_format=ops.layout_like(estimate))
    ops.blend_soft_labels(blended, _labels(labels, ignore_index, False), alpha=alpha, scale=scale)
    return blended


@blend_operator.register_fake
def _(estimate, *_options):  # type: ignore[no-untyped-def]
    return _fake_like(estimate)


def _setup_blend(ctx: Any, inputs: Any, output: Any) -> None:
    _, labels, ctx.ignore_index, alpha, scale = inputs
    ctx.factor = scale if labels is None else alpha * scale
    ctx.save_for_backward(*(() if labels is None else (labels,)))


def _blend_backward(ctx: Any, grad_output: Tensor) -> Any:
    gradient = grad_output * ctx.factor
    if ctx.saved_tensors:
        ignored = ctx.saved_tensors[0] == ctx.ignore_index
        gradient = gradient.masked_fill(ignored.unsqueeze(1 if gradient.dim() > 1 else 0), 0.0)
    return gradient, None, None, None, None


blend_operator.register_autograd(_blend_backward, setup_context=_setup_blend)


def blend_soft_labels(total: Tensor, labels: Labels | None, alpha: float, scale: float) -> Tensor:
    """:func:`calseg.ops.blend_soft_labels` with autograd."""
    tensor, ignore_index, _ = labels if labels is not None else (None, 0, False)
    blended: Tensor = blend_operator(total, tensor, ignore_index, alpha, scale)
    return blended


def accumulate_softmax(total: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """In the compiler's own operations, which it fuses."""
    return total + torch.softmax(logits.to(total.dtype) / temperature, 1 if logits.dim() > 1 else 0)
