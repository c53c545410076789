"""Tests of autograd for particular operations: Hessians, saved inputs, and reuse_logits."""

from __future__ import annotations

import pytest
import torch
from cases import REDUCTIONS, assert_accurate, class_weights, labels, scores

import calseg

SHAPE = (2, 3, 4, 5)
TARGET = labels(SHAPE, ignore_index=-100)
WEIGHT = class_weights(3)


def soft_target() -> torch.Tensor:
    return torch.softmax(scores(*SHAPE, seed=9), 1)


def mu_logvar() -> dict[str, torch.Tensor]:
    return {"mu": scores(*SHAPE, seed=1), "logvar": scores(*SHAPE, seed=2, scale=0.8)}


def test_hessian_is_refused_not_zero(cpu):
    """Differentiating the gradient with respect to the input raises an error, and does not give zero."""
    logits, target = torch.randn(2, 3, 5), torch.tensor([[0, 1, 2, 0, 1]] * 2)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.functional.hessian(lambda x: calseg.vls_cross_entropy(x, target, backend=cpu), logits)


def test_inputs_saved_for_later_are_guarded():
    """reduction="none" reads its inputs again in backward: PyTorch's error where they were changed meanwhile."""
    x = scores(*SHAPE).requires_grad_()
    hidden = x * 1.0
    value = calseg.vls_cross_entropy(hidden, TARGET, reduction="none", backend="cpu")
    hidden += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


# ---- reuse_logits ----


def reusing(name, reuse_logits=True):
    options = {"reuse_logits": reuse_logits, "backend": "cpu"}
    mu, logvar = mu_logvar().values()
    return {
        "hard": lambda x: calseg.vls_cross_entropy(x, TARGET, WEIGHT, **options),
        "none": lambda x: calseg.vls_cross_entropy(x, TARGET, reduction="none", **options).sum(),
        "probabilities": lambda x: calseg.vls_cross_entropy(x, soft_target(), **options),
        "given": lambda x: calseg.vls_cross_entropy(x, TARGET, soft_labels=soft_target(), **options),
        "vls": lambda x: calseg.vls_cross_entropy(x, TARGET, mu=mu, logvar=logvar, seed=1, **options),
    }[name]


every_reuse = pytest.mark.parametrize("name", ["hard", "none", "probabilities", "given", "vls"])


def hidden_layer(x):
    """Return logits that are not a leaf, made by an operation that saves neither input nor output."""
    return x + 0.0


@every_reuse
@pytest.mark.parametrize("channels_last", [False, True])
def test_reuse_writes_the_gradient_over_the_logits(name, channels_last):
    x = scores(*SHAPE)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    logits, seen = hidden_layer(x), []
    logits.register_hook(seen.append)
    (2 * reusing(name)(logits)).backward()
    assert seen[0].data_ptr() == logits.data_ptr()
    assert seen[0].stride() == logits.stride()
    assert torch.equal(seen[0], logits.detach())
    wanted = torch.autograd.grad(2 * reusing(name, reuse_logits=False)(x), x)[0]
    assert_accurate(x.grad, wanted, ulps=4)


@every_reuse
def test_reuse_keeps_the_logits_while_the_graph_is_kept(name):
    x = scores(*SHAPE).requires_grad_()
    logits = hidden_layer(x)
    before = logits.detach().clone()
    loss = reusing(name)(logits)
    loss.backward(retain_graph=True)
    assert torch.equal(logits.detach(), before)
    first = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * first)
    assert not torch.equal(logits.detach(), before)


@every_reuse
def test_reuse_is_refused_where_somebody_could_see_it(name):
    loss = reusing(name)
    x = scores(*SHAPE).requires_grad_()
    base = hidden_layer(scores(2, 6, 4, 5).requires_grad_())
    for logits, why in (
        (x, "leaf"),
        (scores(*SHAPE), "leaf"),
        (base[:, :3], "shares its storage"),
        (base.view(4, 3, 4, 5)[:2], "shares its storage"),
        (hidden_layer(x).view(SHAPE), "shares its storage"),
        (hidden_layer(x.transpose(2, 3).contiguous()).transpose(2, 3), "shares its storage"),
        (x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() * 1.0, "memory layout"),
    ):
        with pytest.raises(ValueError, match=f"reuse_logits: .*{why}"):
            loss(logits)
    with pytest.raises(ValueError, match="reuse_logits: it needs the CPU or Triton backend, in eager mode"):
        calseg.vls_cross_entropy(hidden_layer(x), TARGET, reuse_logits=True, backend="reference")


@every_reuse
def test_reuse_is_seen_by_another_consumer_of_the_logits(name):
    """Who saved the logits for its own backward gets PyTorch's in-place error, not a wrong gradient."""
    x = scores(*SHAPE).requires_grad_()
    logits = torch.sigmoid(x)  # saves its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        reusing(name)(logits).backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sampled", [False, True])
def test_reuse_writes_nothing_where_a_label_is_bad(cpu, sampled, reduction):
    x, target = scores(*SHAPE).requires_grad_(), labels(SHAPE)
    target[1, 3, 4] = 3
    given, logits, options = target.clone(), hidden_layer(x), {**mu_logvar(), "seed": 1} if sampled else {}
    with pytest.raises(IndexError, match=r"target\[1, 3, 4\] is 3"):
        calseg.vls_cross_entropy(logits, target, reduction=reduction, reuse_logits=True, backend=cpu, **options)
    assert torch.equal(logits, scores(*SHAPE))
    assert torch.equal(target, given)
    assert x.grad is None


def test_reuse_saves_the_gradient_s_memory(peak_growth):
    shape = (1, 8, 64, 64, 64)  # 8 MiB each in float32
    x = scores(*shape, dtype=torch.float32).requires_grad_()
    target = labels(shape, dtype=torch.uint8)
    grown = {}
    for reuse in (False, True):
        logits = hidden_layer(x)
        loss = calseg.vls_cross_entropy(logits, target, reuse_logits=reuse, backend="cpu")
        grown[reuse] = peak_growth(lambda loss=loss, logits=logits: torch.autograd.grad(loss, logits))
    assert grown[True] < 2 * 2**20


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("changed", ["soft_labels", "mu", "logvar", "logits"])
def test_a_change_before_backward_is_seen(backend, reduction, changed):
    """An error where PyTorch's own operations raise one. The logits may change, as those of F.cross_entropy may."""
    given = {"soft_labels": soft_target()} if changed == "soft_labels" else mu_logvar()
    leaves = {"logits": scores(*SHAPE), **given}
    tensors = {name: t.requires_grad_().mul(1) for name, t in leaves.items()}
    logits, *_ = tensors.values()
    options = {"backend": backend, "reduction": reduction, "seed": 1}
    loss = calseg.vls_cross_entropy(logits, TARGET, **{name: tensors[name] for name in given}, **options)
    with torch.no_grad():
        tensors[changed].add_(1)
    if changed == "logits" and reduction != "none":
        loss.sum().backward()
    elif changed != "logits":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()
