"""One ``torch.autograd.Function`` for each operation, in eager and in compiled code.

A reduced loss computes its gradients in the forward pass, while each tile is in the cache. The backward pass returns
them. It runs the kernel again in two cases: the upstream gradient differs per voxel (``reduction="none"``), or the
gradient overwrites the logits.

In eager code a Function calls the engine itself. Under a compiler, with fake tensors or while PyTorch traces, it calls
a ``torch.library`` operator, which calls the engine and stays in the graph as one node. The reference needs no
Function, since PyTorch differentiates it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import custom_op

from calseg import native
from calseg.backends import cpu, reference, rng
from calseg.backends.choice import TRITON_DEVICES, engine, is_traced
from calseg.dice import DiceOptions, dice_cross_entropy, over_processes
from calseg.operations import (
    AccumulateSpec,
    AceSpec,
    BlendSpec,
    GaussianTensors,
    Labels,
    LossSpec,
    LossTensors,
    SampleSpec,
)
from calseg.packing import Packed, pack, unpack
from calseg.tensors import class_axis, layout_like, shape_of, voxel_shape

_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph


_is_vmapped, _is_vmapped_in_autograd = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor


def _is_batched(grad_output: Tensor) -> bool:
    """Return whether PyTorch batches the gradient: ``is_grads_batched``, ``jacobian(vectorize=True)``."""
    return _is_vmapped(grad_output) or _is_vmapped_in_autograd(grad_output)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether any of the tensors needs a gradient, and gradients are enabled."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class _OnceDifferentiable(Function):
    """``(gradient, *inputs) -> gradient``, where the gradient depends on the inputs. Differentiating it is an error, so
    that second derivatives are not silently missing.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "calseg: the fused kernels have no second derivative (double backward); pass backend='reference'"
        )


def _guarded(gradients: Sequence[Tensor | None], *inputs: Tensor | None) -> Sequence[Tensor | None]:
    """Return gradients that, in a pass with ``create_graph=True``, refuse to be differentiated again."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    given = [tensor for tensor in inputs if tensor is not None]
    return [None if g is None else _OnceDifferentiable.apply(g.detach(), *given) for g in gradients]


def _save(ctx: Any, *structures: Any) -> None:
    """Save structures for backward. Autograd raises an error if one of their tensors is changed until then."""
    packed = pack(*structures)
    ctx.save_for_backward(*packed.tensors)
    ctx.kinds, ctx.rest = tuple(type(structure) for structure in structures), tuple(packed[1:])


def _saved(ctx: Any) -> Any:
    """Return the structures that :func:`_save` saved."""
    return unpack(ctx.kinds, Packed(list(ctx.saved_tensors), *ctx.rest))


def _empty_if(needed: Sequence[bool], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return memory for the gradients that are needed."""
    return [None if t is None or not need else native.empty_like(t) for need, t in zip(needed, tensors)]  # noqa: B905


def _fake_if(needed: Sequence[bool], tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return fake tensors for the gradients that are needed."""
    return [_fake_like(t) for need, t in zip(needed, tensors, strict=True) if need and t is not None]


def _fake_like(scores: Tensor) -> Tensor:
    return torch.empty_like(scores, memory_format=layout_like(scores))


def _placed(needed: Sequence[bool], present: Sequence[Tensor]) -> list[Tensor | None]:
    """Return a list with the tensors at the places where they are needed, and None elsewhere."""
    rest = iter(present)
    return [next(rest) if need else None for need in needed]


# ---- losses ----

NO_GRADIENTS = LossTensors()
NONE_NEEDED = (False,) * len(NO_GRADIENTS)


@custom_op("calseg::loss", mutates_args=())
def loss_operator(
    backend: str, tensors: list[Tensor | None], integers: list[int], numbers: list[float], words: str,
    needed: list[bool], grad_output: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Compute the loss of a packed :class:`LossSpec` and its tensors, and the gradients that are needed."""
    spec, inputs = unpack((LossSpec, LossTensors), Packed(tensors, integers, numbers, words))
    gradients = LossTensors(*_empty_if(needed, inputs))
    value = engine(backend).loss(spec, inputs, gradients, grad_output)
    return [value, *(gradient for gradient in gradients if gradient is not None)]


@loss_operator.register_fake
def _(backend, tensors, integers, numbers, words, needed, grad_output):  # type: ignore[no-untyped-def]
    spec, inputs = unpack((LossSpec, LossTensors), Packed(tensors, integers, numbers, words))
    like = inputs.like()
    per_voxel = spec.reduction == "none" and grad_output is None
    value = like.new_empty(voxel_shape(like) if per_voxel else (), dtype=spec.dtype)
    return [value, *_fake_if(needed, inputs)]


def _run_loss(
    backend: str, spec: LossSpec, tensors: LossTensors, needed: Sequence[bool], traced: bool,
    grad_output: Tensor | None = None,
) -> tuple[Tensor, LossTensors]:  # fmt: skip
    """Compute the loss and the gradients that are needed, by the operator if ``traced``, else by the engine."""
    if traced:
        value, *present = loss_operator(backend, *pack(spec, tensors), list(needed), grad_output)
        return value, LossTensors(*_placed(needed, present))
    if grad_output is None and True not in needed:
        return engine(backend).loss_and_corrections(spec, tensors)[0], NO_GRADIENTS
    gradients = LossTensors._make(_empty_if(needed, tensors))
    return engine(backend).loss(spec, tensors, gradients, grad_output), gradients


def _needs_upstream_first(spec: LossSpec, tensors: LossTensors, traced: bool) -> bool:
    """Return whether the gradients are computed in backward.

    This must be so if the upstream gradient differs per voxel. It is so for float16 too: the gradients of a mean
    underflow unless the factor of the gradient scaler, which backward brings, is in them. In compiled code, another
    read of the logits takes less time than to multiply their gradient by the upstream gradient, unless noise is drawn.
    """
    draws_noise = spec.operation in ("vls_cross_entropy", "vls_elbo")
    return spec.reduction == "none" or _is_float16(tensors) or (traced and not draws_noise)


def _is_float16(tensors: LossTensors) -> bool:
    return any(t is not None and t.dtype == torch.float16 for t in tensors)


class Loss(Function):
    """``(made, call, *tensors) -> loss``. One of ``made`` and ``call`` is None.

    ``made`` is ``(loss, backend, gradients, corrections, versions)``: the engine has computed the loss of the tensors
    already, with its gradients and what they lack. ``versions`` are those of soft labels, mu and logvar, which must not
    change until backward. ``call`` is ``(backend, spec, reuse_logits, traced)``: the Function computes the loss of the
    four tensors of :class:`LossTensors`, by the operator if ``traced``. Both are tuples, since every argument of a
    Function takes time.
    """

    @staticmethod
    def forward(
        ctx: Any, made: tuple[Tensor, str, list[Tensor | None], Tensor | None, list[int] | None] | None,
        call: tuple[str, LossSpec, bool, bool], *given: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if made is not None:
            # The gradients are not saved, as that takes time and copies them in backward. Nobody else sees them. The
            # inputs are kept for create_graph, which needs their place in the graph.
            ctx.gradients_for, ctx.made, ctx.inputs = _gradients_made, made, given
            return made[0]
        backend, spec, reuse_logits, traced = call
        tensors = LossTensors(*given)
        if reuse_logits or _needs_upstream_first(spec, tensors, traced):
            _save(ctx, spec, tensors)
            ctx.gradients_for, ctx.backend, ctx.reuse_logits = _gradients_in_backward, backend, reuse_logits
            return _run_loss(backend, spec, tensors, NONE_NEEDED, traced)[0]
        value, gradients = _run_loss(backend, spec, tensors, ctx.needs_input_grad[2:], traced)
        ctx.gradients_for = _gradients_of_operator
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return None, None, *ctx.gradients_for(ctx, grad_output)


def _gradients_of_operator(ctx: Any, grad_output: Tensor) -> Sequence[Tensor | None]:
    """Multiply the operator's gradients by the upstream gradient, in operations that a compiler sees."""
    return [None if g is None else g * grad_output for g in ctx.saved_tensors]


def _versions(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return how often PyTorch has seen the tensors change, the logits left out, which PyTorch's loss does not save."""
    return [t._version for t in tensors[1:] if t is not None and not t.is_inference()]


def _gradients_made(ctx: Any, grad_output: Tensor) -> Sequence[Tensor | None]:
    """Multiply the engine's gradients by the upstream gradient, in place if nobody needs them again."""
    if ctx.made is None:
        raise RuntimeError(
            "Trying to backward through the graph a second time (or directly access saved tensors after they have "
            "already been freed). Specify retain_graph=True if you need to backward through the graph a second "
            "time."
        )
    _, backend, gradients, corrections, versions = ctx.made
    if versions is not None and versions != _versions(ctx.inputs):
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            "soft labels, mu or logvar of the loss"
        )
    if _graph_is_kept() or _is_batched(grad_output):
        factor = grad_output if corrections is None else grad_output * corrections[-1]
        gradients = [None if g is None else g.mul(factor) for g in gradients]
    else:
        ctx.made = None
        engine(backend).scale_gradients(gradients, grad_output, corrections)
    return _guarded(gradients, grad_output, *ctx.inputs) if torch.is_grad_enabled() else gradients


def _gradients_in_backward(ctx: Any, grad_output: Tensor) -> Sequence[Tensor | None]:
    """Run the kernel again, with the upstream gradient."""
    spec, inputs = _saved(ctx)
    needed, logits, traced = ctx.needs_input_grad[2:], inputs.logits, is_traced(*inputs)
    if not traced and _is_batched(grad_output):
        again = lambda *t: reference.loss(spec, LossTensors(*t))  # noqa: E731
        return _guarded(reference.gradients(again, inputs, needed, grad_output), grad_output, *inputs)
    upstream = grad_output.expand(voxel_shape(inputs.like()))
    if ctx.reuse_logits and not _graph_is_kept():
        to = LossTensors(logits.detach(), *_empty_if(needed[1:], inputs[1:]))
        engine(ctx.backend).loss(spec, inputs, to, upstream)
        # Tell autograd, as any in-place operation does, that the logits have changed.
        torch.autograd.graph.increment_version(logits)
        return _guarded(to, grad_output, *inputs)
    return _guarded(_run_loss(ctx.backend, spec, inputs, needed, traced, upstream)[1], grad_output, *inputs)


# Function.apply without its support of torch.func, whose calls do not come here. It saves 2 of a small loss's 37 us.
_attach_loss = super(Function, Loss).apply


def loss(
    backend: str, spec: LossSpec, tensors: LossTensors, reuse_logits: bool = False, traced: bool | None = None
) -> Tensor:
    """Compute the loss of a spec and its tensors by a backend, attached to autograd's graph if needed.

    ``traced`` is the result of :func:`calseg.backends.choice.is_traced` for the tensors, if it is known already.
    """
    value: Tensor
    if backend == "reference":
        return reference.loss(spec, tensors)
    traced = is_traced(*tensors) if traced is None else traced
    only_logits = tensors.soft_labels is tensors.mu is tensors.logvar is None
    given = tensors[:1] if only_logits else tensors
    if not needs_gradient(*given):
        return _run_loss(backend, spec, tensors, NONE_NEEDED, traced)[0]
    if traced:
        value = Loss.apply(None, (backend, spec, reuse_logits, True), *tensors)
    elif reuse_logits or _needs_upstream_first(spec, tensors, traced):
        value = _attach_loss(None, (backend, spec, reuse_logits, False), *tensors)
    else:
        gradients = [None if t is None or not t.requires_grad else native.empty_like(t) for t in given]
        value, corrections = engine(backend).loss_and_corrections(spec, tensors, LossTensors(*gradients))
        versions = None if only_logits else _versions(given)
        value = _attach_loss((value, backend, gradients, corrections, versions), None, *given)
    return value


# ---- losses with an overlap term ----
#
# The overlap needs the probabilities of all voxels before the first gradient. So the forward pass computes the loss and
# the sums of the overlap, and the backward pass reads the logits again and writes their gradient. Between the two,
# sampled labels wait in the memory of that gradient. The gradients of mu and logvar are made in the forward pass.


def _overlap_made(tensors: LossTensors, needed: Sequence[bool]) -> list[bool]:
    """Return which tensors the forward pass makes: sampled labels in place of the logits, gradients of mu, logvar."""
    is_sampled = tensors.mu is not None
    now = is_sampled and not _is_float16(tensors)
    return [is_sampled and needed[0], False, now and needed[2], now and needed[3]]


def _as_labels(memory: Tensor) -> Tensor:
    """Return memory of a gradient as memory of soft labels. 16 bits hold a fraction better as an integer."""
    return memory.view(torch.uint16) if memory.element_size() == 2 else memory


def _with_labels_made(made: LossTensors) -> LossTensors:
    """Return what the forward pass makes, with the memory of the gradient of the logits as that of soft labels."""
    return made if made.logits is None else made._replace(logits=_as_labels(made.logits))


def _backward_of(
    spec: LossSpec, tensors: LossTensors, made: LossTensors, of_voxel: Tensor
) -> tuple[LossSpec, LossTensors]:  # fmt: skip
    """Return spec and tensors of the backward pass, with the labels that the forward pass made in place of ``mu``.

    ``of_voxel`` is the slope of the sum of all voxels' losses.
    """
    spec = spec._replace(operation="cross_entropy", reduction="sum", scale=of_voxel)
    return spec, LossTensors(tensors.logits, tensors.soft_labels, made.logits)


def _with_labels(tensors: LossTensors) -> LossTensors:
    """Return logits and soft labels, where a gradient's memory may hold the soft labels in place of ``mu``."""
    if tensors.mu is None:
        return tensors
    return LossTensors(tensors.logits, _as_labels(tensors.mu))


@custom_op("calseg::loss_and_overlap", mutates_args=())
def overlap_operator(
    backend: str, tensors: list[Tensor | None], integers: list[int], numbers: list[float], words: str,
    making: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Compute the loss, the sums of the overlap and the divisor of the loss, and what is made beside them."""
    spec, inputs = unpack((LossSpec, LossTensors), Packed(tensors, integers, numbers, words))
    made = LossTensors(*_empty_if(making, inputs))
    results = engine(backend).loss_and_overlap(spec, inputs, _with_labels_made(made))
    return [*results, *(each for each in made if each is not None)]


@overlap_operator.register_fake
def _(backend, tensors, integers, numbers, words, making):  # type: ignore[no-untyped-def]
    spec, inputs = unpack((LossSpec, LossTensors), Packed(tensors, integers, numbers, words))
    N, C, _ = shape_of(inputs.logits)
    wide = inputs.logits.new_empty
    divisor = wide((), dtype=torch.float64)
    return [wide((), dtype=spec.dtype), wide((N, C, 2), dtype=torch.float64), divisor, *_fake_if(making, inputs)]


@custom_op("calseg::overlap_backward", mutates_args=())
def overlap_backward_operator(
    backend: str, tensors: list[Tensor | None], integers: list[int], numbers: list[float], words: str,
    needed: list[bool], grad_sums: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Compute the gradients that are needed, by ``overlap_backward`` of the backend."""
    spec, inputs = unpack((LossSpec, LossTensors), Packed(tensors, integers, numbers, words))
    gradients = LossTensors(*_empty_if(needed, inputs))
    engine(backend).overlap_backward(spec, _with_labels(inputs), gradients, grad_sums)
    return [gradient for gradient in gradients if gradient is not None]


@overlap_backward_operator.register_fake
def _(backend, tensors, integers, numbers, words, needed, grad_sums):  # type: ignore[no-untyped-def]
    _, inputs = unpack((LossSpec, LossTensors), Packed(tensors, integers, numbers, words))
    return _fake_if(needed, inputs)


class DiceLoss(Function):
    """``(backend, spec, options, *tensors) -> loss`` in eager code: Dice plus cross-entropy."""

    @staticmethod
    def forward(ctx: Any, backend: str, spec: LossSpec, options: DiceOptions, *given: Tensor | None) -> Tensor:
        tensors = LossTensors(*given)
        # What is made is not saved by autograd, which would copy it.
        ctx.made = LossTensors(*_empty_if(_overlap_made(tensors, ctx.needs_input_grad[3:]), tensors))
        value: Tensor
        value, slopes = engine(backend).dice_loss(spec, options, tensors, _with_labels_made(ctx.made))
        labels = None if spec.labels is None else spec.labels.tensor  # saved, so that a change of them is an error
        ctx.save_for_backward(slopes, labels, spec.weight, *given)
        ctx.call = backend, spec, options
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        slopes, _, _, *given = ctx.saved_tensors
        (backend, spec, options), needed, tensors = ctx.call, ctx.needs_input_grad[3:], LossTensors(*given)
        if _is_batched(grad_output):
            again = lambda *t: reference.dice_loss(spec, options, LossTensors(*t))  # noqa: E731
            gradients = reference.gradients(again, tensors, needed, grad_output)
            return None, None, None, *_guarded(gradients, grad_output, *tensors)
        kept, made = _graph_is_kept(), ctx.made
        if not kept:
            ctx.made = ctx.call = None
        slopes = slopes * grad_output.detach()
        of_sums, of_loss, of_voxel = slopes[:-2], slopes[-2], slopes[-1]
        if options.process_group is not None:
            torch.distributed.all_reduce(of_sums, group=options.process_group)
        over = needed[0] and made.logits is not None and not kept  # write the gradient over the labels in its memory
        if needed[0] or needed[1]:
            grad_logits, grad_soft = _empty_if((needed[0] and not over, needed[1]), tensors[:2])
            to = LossTensors(made.logits if over else grad_logits, grad_soft)
            of_logits, inputs = _backward_of(spec, tensors, made, of_voxel)
            engine(backend).overlap_backward(of_logits, _with_labels(inputs), to, of_sums)
        else:
            to = NO_GRADIENTS
        gradients = [*to[:2], *_gradients_of_gaussian(backend, spec, tensors, made, of_loss, needed, kept)]
        return None, None, None, *_guarded(gradients, grad_output, *tensors)


def _gradients_of_gaussian(
    backend: str, spec: LossSpec, tensors: LossTensors, made: LossTensors, of_loss: Tensor, needed: Sequence[bool],
    kept: bool,
) -> Sequence[Tensor | None]:  # fmt: skip
    """Return the gradients of mu and logvar: those that the forward pass made, or new ones for float16."""
    if True in needed[2:] and _is_float16(tensors):
        upstream = of_loss.expand(voxel_shape(tensors.like()))
        return _run_loss(backend, spec, tensors, (False, False, *needed[2:]), is_traced(*tensors), upstream)[1][2:]
    if kept:
        return [None if g is None else g * of_loss for g in made[2:]]
    if made.mu is not None or made.logvar is not None:
        engine(backend).scale_gradients(made[2:], of_loss, None)
    return made[2:]


class LossAndOverlap(Function):
    """``(backend, spec, *tensors) -> (loss, sums of the overlap)`` in traced code, by operators."""

    @staticmethod
    def forward(ctx: Any, backend: str, spec: LossSpec, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        tensors = LossTensors(*given)
        making = _overlap_made(tensors, ctx.needs_input_grad[2:])
        value, sums, divisor, *rest = overlap_operator(backend, *pack(spec, tensors), making)
        _save(ctx, spec, tensors, LossTensors(divisor), LossTensors(*_placed(making, rest)))
        ctx.backend = backend
        return value, sums

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_loss, grad_sums = grad_outputs
        spec, tensors, (divisor, *_), made = _saved(ctx)
        needed = ctx.needs_input_grad[2:]
        gradients: list[Tensor | None] = [None, None]
        if needed[0] or needed[1]:
            packed = pack(*_backward_of(spec, tensors, made, (grad_loss / divisor).detach()))
            of_sums = grad_sums.detach().contiguous()
            present = overlap_backward_operator(ctx.backend, *packed, [*needed[:2], False, False], of_sums)
            gradients = _placed(needed[:2], present)
        gradients += _gradients_of_gaussian(ctx.backend, spec, tensors, made, grad_loss, needed, kept=True)
        return None, None, *_guarded(gradients, *grad_outputs, *tensors)


def dice_loss(backend: str, spec: LossSpec, options: DiceOptions, tensors: LossTensors) -> Tensor:
    """Compute Dice plus cross-entropy by a backend, attached to autograd's graph if needed."""
    if backend == "reference":
        return reference.dice_loss(spec, options, tensors)
    traced, needed = is_traced(*tensors), needs_gradient(*tensors)
    if needed and not traced:
        value: Tensor = DiceLoss.apply(backend, spec, options, *tensors)
        return value
    if needed:
        loss, sums = LossAndOverlap.apply(backend, spec, *tensors)
    elif traced:
        loss, sums, _ = overlap_operator(backend, *pack(spec, tensors), list(NONE_NEEDED))
    else:
        loss, sums, _ = engine(backend).loss_and_overlap(spec, tensors, NO_GRADIENTS)
    return dice_cross_entropy(options, loss, sums, over_processes(options, sums))


# ---- soft labels ----


@custom_op("calseg::sample_soft_labels", mutates_args=())
def sample_operator(
    backend: str, tensors: list[Tensor | None], integers: list[int], numbers: list[float], words: str
) -> Tensor:
    """Sample the soft labels of a packed :class:`SampleSpec` and its tensors."""
    spec, inputs = unpack((SampleSpec, GaussianTensors), Packed(tensors, integers, numbers, words))
    soft_labels: Tensor = engine(backend).sample_soft_labels(spec, inputs)
    return soft_labels


@sample_operator.register_fake
def _(backend, tensors, integers, numbers, words):  # type: ignore[no-untyped-def]
    _, inputs = unpack((SampleSpec, GaussianTensors), Packed(tensors, integers, numbers, words))
    return _fake_like(inputs.mu)


@custom_op("calseg::sample_soft_labels_backward", mutates_args=())
def sample_backward_operator(
    backend: str, tensors: list[Tensor | None], integers: list[int], numbers: list[float], words: str,
    grad_output: Tensor, needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Compute the gradients of :func:`sample_operator` that are needed."""
    spec, inputs = unpack((SampleSpec, GaussianTensors), Packed(tensors, integers, numbers, words))
    gradients = GaussianTensors(*_empty_if(needed, inputs))
    engine(backend).sample_soft_labels_backward(spec, inputs, grad_output, gradients)
    return [gradient for gradient in gradients if gradient is not None]


@sample_backward_operator.register_fake
def _(backend, tensors, integers, numbers, words, grad_output, needed):  # type: ignore[no-untyped-def]
    _, inputs = unpack((SampleSpec, GaussianTensors), Packed(tensors, integers, numbers, words))
    return _fake_if(needed, inputs)


class SampleSoftLabels(Function):
    """``(backend, spec, mu, logvar) -> soft labels``; backward draws the same noise again."""

    @staticmethod
    def forward(ctx: Any, backend: str, spec: SampleSpec, mu: Tensor, logvar: Tensor) -> Tensor:
        tensors = GaussianTensors(mu, logvar)
        _save(ctx, spec, tensors)
        ctx.backend = backend
        return _run_sample(backend, spec, tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        spec, tensors = _saved(ctx)
        needed = ctx.needs_input_grad[2:]
        gradients: Sequence[Tensor | None]
        if is_traced(*tensors):
            present = sample_backward_operator(ctx.backend, *pack(spec, tensors), grad_output, list(needed))
            gradients = _placed(needed, present)
        elif _is_batched(grad_output):
            sample = lambda *t: reference.sample_soft_labels(spec, GaussianTensors(*t))  # noqa: E731
            gradients = reference.gradients(sample, tensors, needed, grad_output)
        else:
            gradients = GaussianTensors(*_empty_if(needed, tensors))
            engine(ctx.backend).sample_soft_labels_backward(spec, tensors, grad_output, gradients)
        return None, None, *_guarded(gradients, grad_output, *tensors)


def _run_sample(backend: str, spec: SampleSpec, tensors: GaussianTensors) -> Tensor:
    soft_labels: Tensor
    if is_traced(*tensors):
        soft_labels = sample_operator(backend, *pack(spec, tensors))
    else:
        soft_labels = engine(backend).sample_soft_labels(spec, tensors)
    return soft_labels


def sample_soft_labels(backend: str, spec: SampleSpec, tensors: GaussianTensors) -> Tensor:
    """Sample the soft labels of a spec and its tensors by a backend, attached to autograd's graph if needed."""
    if backend == "reference":
        return reference.sample_soft_labels(spec, tensors)
    if needs_gradient(*tensors):
        soft_labels: Tensor = SampleSoftLabels.apply(backend, spec, *tensors)
        return soft_labels
    return _run_sample(backend, spec, tensors)


class AccumulateSoftmax(Function):
    """``(backend, spec, total, logits) -> total``, which is updated in place."""

    @staticmethod
    def forward(ctx: Any, backend: str, spec: AccumulateSpec, total: Tensor, logits: Tensor) -> Tensor:
        ctx.mark_dirty(total)
        _save(ctx, spec, LossTensors(logits))
        ctx.backend = backend
        result: Tensor = engine(backend).accumulate_softmax(spec, total, logits)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        spec, (logits, *_) = _saved(ctx)
        gradient: Tensor | None = None
        if ctx.needs_input_grad[3] and _is_batched(grad_output):
            start = torch.zeros_like(logits, dtype=grad_output.dtype)
            again = lambda x: reference.accumulate_softmax(spec, start, x)  # noqa: E731
            (gradient,) = reference.gradients(again, (logits,), (True,), grad_output)
        elif ctx.needs_input_grad[3]:
            gradient = engine(ctx.backend).accumulate_softmax_backward(spec, logits, grad_output)
            assert gradient is not None
            if spec.labels is not None:  # NaN under an ignored voxel must not come back as its gradient
                gradient.masked_fill_(_ignored(spec.labels, gradient), 0.0)
        return None, None, grad_output, *_guarded((gradient,), grad_output, logits)


def accumulate_softmax(backend: str, spec: AccumulateSpec, total: Tensor, logits: Tensor) -> Tensor:
    """Add the softmax of another map of logits to the total."""
    if backend == "reference" or is_traced(total, logits):  # a compiler fuses the reference's operations
        return reference.accumulate_softmax(spec, total, logits)
    result: Tensor
    if needs_gradient(total, logits):
        result = AccumulateSoftmax.apply(backend, spec, total, logits)
    else:
        result = engine(backend).accumulate_softmax(spec, total, logits)
    return result


@custom_op("calseg::blend_soft_labels", mutates_args=())
def blend_operator(
    backend: str, tensors: list[Tensor | None], integers: list[int], numbers: list[float], words: str,
    total: Tensor,
) -> Tensor:  # fmt: skip
    """Compute the soft labels of a packed :class:`BlendSpec` and the total."""
    (spec,) = unpack((BlendSpec,), Packed(tensors, integers, numbers, words))
    blended: Tensor = engine(backend).blend_soft_labels(spec, total.clone(memory_format=layout_like(total)))
    return blended


@blend_operator.register_fake
def _(backend, tensors, integers, numbers, words, total):  # type: ignore[no-untyped-def]
    return _fake_like(total)


class BlendSoftLabels(Function):
    """``(backend, spec, total) -> soft labels``, in place of the total."""

    @staticmethod
    def forward(ctx: Any, backend: str, spec: BlendSpec, total: Tensor) -> Tensor:
        _save(ctx, spec)
        if not is_traced(total):
            ctx.mark_dirty(total)
        return _run_blend(backend, spec, total)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        (spec,) = _saved(ctx)
        if spec.labels is None:
            return None, None, grad_output * (1 / spec.num_maps)
        gradient = grad_output * (spec.alpha * (1 / spec.num_maps))
        return None, None, gradient.masked_fill(_ignored(spec.labels, grad_output), 0.0)


def _run_blend(backend: str, spec: BlendSpec, total: Tensor) -> Tensor:
    blended: Tensor
    if is_traced(total):
        blended = blend_operator(backend, *pack(spec), total)
    else:
        blended = engine(backend).blend_soft_labels(spec, total)
    return blended


def blend_soft_labels(backend: str, spec: BlendSpec, total: Tensor) -> Tensor:
    """Compute soft labels from a total. The total is overwritten in eager code."""
    if backend == "reference":
        return reference.blend_soft_labels(spec, total)
    if needs_gradient(total):
        blended: Tensor = BlendSoftLabels.apply(backend, spec, total)
        return blended
    return _run_blend(backend, spec, total)


def _ignored(labels: Labels, like: Tensor) -> Tensor:
    """Return a mask of the voxels whose label is ignored, ``[N, 1, *S]``."""
    return labels.ignored().unsqueeze(class_axis(like))


# ---- average calibration error ----


@custom_op("calseg::ace_moments", mutates_args=())
def ace_moments_operator(
    backend: str, tensors: list[Tensor | None], integers: list[int], numbers: list[float], words: str,
    logits: Tensor,
) -> Tensor:  # fmt: skip
    """Compute the moments of a packed :class:`AceSpec` and the logits."""
    (spec,) = unpack((AceSpec,), Packed(tensors, integers, numbers, words))
    moments: Tensor = engine(backend).ace_moments(spec, logits)
    return moments


@ace_moments_operator.register_fake
def _(backend, tensors, integers, numbers, words, logits):  # type: ignore[no-untyped-def]
    (spec,) = unpack((AceSpec,), Packed(tensors, integers, numbers, words))
    N, C, _ = shape_of(logits)
    return logits.new_empty(N, C - spec.first_class, spec.n_bins + spec.soft, 5, dtype=torch.float64)


@custom_op("calseg::ace_moments_backward", mutates_args=())
def ace_moments_backward_operator(
    backend: str, tensors: list[Tensor | None], integers: list[int], numbers: list[float], words: str,
    logits: Tensor, grad_moments: Tensor,
) -> Tensor:  # fmt: skip
    """Compute the gradient of :func:`ace_moments_operator`."""
    (spec,) = unpack((AceSpec,), Packed(tensors, integers, numbers, words))
    gradient: Tensor = engine(backend).ace_moments_backward(spec, logits, grad_moments)
    return gradient


@ace_moments_backward_operator.register_fake
def _(backend, tensors, integers, numbers, words, logits, grad_moments):  # type: ignore[no-untyped-def]
    return _fake_like(logits)


class AceMoments(Function):
    """``(backend, spec, logits) -> moments``; backward reads the logits again."""

    @staticmethod
    def forward(ctx: Any, backend: str, spec: AceSpec, logits: Tensor) -> Tensor:
        _save(ctx, spec, LossTensors(logits))
        ctx.backend = backend
        return _run_ace(backend, spec, logits)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_moments,) = grad_outputs
        spec, (logits, *_) = _saved(ctx)
        if is_traced(logits) or _is_batched(grad_moments):
            return None, None, ace_moments_backward_operator(ctx.backend, *pack(spec), logits, grad_moments)
        gradient = engine(ctx.backend).ace_moments_backward(spec, logits, grad_moments.detach())
        return None, None, *_guarded((gradient,), grad_moments, logits)


def _run_ace(backend: str, spec: AceSpec, logits: Tensor) -> Tensor:
    moments: Tensor
    if is_traced(logits):
        moments = ace_moments_operator(backend, *pack(spec), logits)
    else:
        moments = engine(backend).ace_moments(spec, logits)
    return moments


def ace_bins(backend: str, spec: AceSpec, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mass, confidences and hits of every bin, attached to autograd's graph if needed."""
    if backend == "reference":
        return reference.ace_bins(spec, logits)
    moments = AceMoments.apply(backend, spec, logits) if needs_gradient(logits) else _run_ace(backend, spec, logits)
    return cpu.bins_of_moments(spec, moments)


# ---- seeds ----


@custom_op("calseg::draw_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_seed_operator(device: torch.device) -> Tensor:
    """Draw a seed on a device. As an operator, it is drawn anew in every run of a graph."""
    return rng.draw_seed(device)


@draw_seed_operator.register_fake
def _(device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


def draw_seed(device: torch.device) -> Tensor:
    """Draw the seed of a call on a device.

    Eager code draws it on the CPU, and kernels get it as a number. A graph would keep that number for all replays. So
    code that is compiled or captured for a GPU draws on the GPU, and kernels read the seed from its memory.
    """
    if is_traced():
        drawn: Tensor = draw_seed_operator(device if device.type in TRITON_DEVICES else torch.device("cpu"))
        return drawn
    return rng.draw_seed(device if rng.is_captured(device) else torch.device("cpu"))
