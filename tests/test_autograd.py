"""The native engine under autograd: what PyTorch promises for a differentiable function, for every operation."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cases import assert_accurate, class_weights, evaluate, labels, scores

import calseg
from calseg import native

SHAPE = (2, 3, 4, 5)
TARGET = labels(SHAPE, ignore_index=-100)
WEIGHT = class_weights(3)
SAMPLED = {"seed": 1, "num_samples": 3}


def soft_target() -> torch.Tensor:
    return torch.softmax(scores(*SHAPE, seed=9), 1)


def mu_logvar() -> dict[str, torch.Tensor]:
    return {"mu": scores(*SHAPE, seed=1), "logvar": scores(*SHAPE, seed=2, scale=0.8)}


# name -> (function of (backend, reduction, tensors), tensors)
LOSSES = {
    "hard": (lambda b, r, x: calseg.vls_cross_entropy(x, TARGET, WEIGHT.to(x.dtype), reduction=r, backend=b,
                                                      label_smoothing=0.1), {"x": scores(*SHAPE)}),
    "soft": (lambda b, r, x, y: calseg.soft_cross_entropy(x, y, WEIGHT.to(x.dtype), reduction=r, backend=b),
             {"x": scores(*SHAPE), "y": soft_target()}),
    "masked": (lambda b, r, x, y: calseg.soft_cross_entropy(x, y, ignore_mask=TARGET < 0, reduction=r, backend=b),
               {"x": scores(*SHAPE), "y": soft_target()}),
    "given": (lambda b, r, x, y: calseg.vls_cross_entropy(x, TARGET, soft_labels=y, reduction=r, backend=b),
              {"x": scores(*SHAPE), "y": soft_target()}),
    "vls": (lambda b, r, x, mu, logvar: calseg.vls_cross_entropy(
        x, TARGET, mu=mu, logvar=logvar, alpha=0.6, temperature=0.7, reduction=r, backend=b, **SAMPLED),
        {"x": scores(*SHAPE), **mu_logvar()}),
    "elbo": (lambda b, r, mu, logvar: calseg.vls_elbo(mu, logvar, TARGET, reduction=r, backend=b, **SAMPLED),
             mu_logvar()),
    "kl": (lambda b, r, mu, logvar: calseg.gaussian_kl(mu, logvar, 0.2, -0.3, r, backend=b), mu_logvar()),
}  # fmt: skip
MAPS = {
    "sample": (lambda b, mu, logvar: calseg.sample_soft_labels(mu, logvar, TARGET, backend=b, **SAMPLED), mu_logvar()),
    "estimate": (lambda b, mu, logvar: calseg.sample_soft_labels(mu, logvar, backend=b, **SAMPLED), mu_logvar()),
    "accumulate": (lambda b, mu, logvar: calseg.accumulate_soft_labels(
        (mu, logvar), TARGET, alpha=0.4, temperature=2.0, backend=b), mu_logvar()),
    "ace-hard": (lambda b, x: calseg.ace_loss(x, TARGET, n_bins=7, reduction="none", backend=b), {"x": scores(*SHAPE)}),
    "ace-soft": (lambda b, x: calseg.ace_loss(x, TARGET, WEIGHT.to(x.dtype), n_bins=7, binning="soft", backend=b,
                                              include_background=False, reduction="none"), {"x": scores(*SHAPE)}),
}  # fmt: skip
# every operation as (function of (backend, tensors), tensors)
OPERATIONS = {
    **{f"{name}-{r}": (lambda b, f=f, r=r, **t: f(b, r, **t), tensors)
       for (name, (f, tensors)), r in product(LOSSES.items(), ("none", "mean", "sum"))},
    **MAPS,
}  # fmt: skip
every_operation = pytest.mark.parametrize(("function", "tensors"), OPERATIONS.values(), ids=OPERATIONS)


def weighted_sum(value):
    """A scalar whose gradient differs from voxel to voxel (a plain sum over classes of soft labels is constant)."""
    return (value * (torch.arange(value.numel()) % 7 - 2.5).view(value.shape)).sum()


def leaves_of(tensors):
    return {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}


@every_operation
def test_gradcheck(cpu, function, tensors):
    leaves = leaves_of(tensors)
    call = lambda *values: function(cpu, **dict(zip(leaves, values, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True)


@every_operation
@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0])
def test_upstream_gradient(backend, function, tensors, factor):
    """Scaled, in a longer graph, and twice through a kept graph: the same gradients each time, added up."""
    base = evaluate(lambda **t: weighted_sum(function(backend, **t)), tensors)
    leaves = leaves_of(tensors)
    loss = weighted_sum(function(backend, **leaves)) * factor
    loss.backward(retain_graph=True)
    first = {name: t.grad.clone() for name, t in leaves.items()}
    loss.backward(retain_graph=True)
    loss.backward()
    for name, t in leaves.items():
        assert_accurate(first[name], factor * base.gradients[name], ulps=8, what=name)
        assert_accurate(t.grad, 3 * factor * base.gradients[name], ulps=32, what=name)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@every_operation
def test_only_some_inputs_need_gradients(backend, function, tensors):
    base = evaluate(lambda **t: weighted_sum(function(backend, **t)), tensors)
    for needing in product((False, True), repeat=len(tensors)):
        leaves = {k: t.detach().clone().requires_grad_(n) for (k, t), n in zip(tensors.items(), needing, strict=True)}
        value = weighted_sum(function(backend, **leaves))
        assert value.requires_grad == any(needing)
        if any(needing):
            value.backward()
        for (name, t), need in zip(leaves.items(), needing, strict=True):
            assert (t.grad is not None) == need
            if need:
                assert_accurate(t.grad, base.gradients[name], ulps=2, what=name)


@every_operation
def test_no_gradient_buffers_without_gradients(cpu, function, tensors, monkeypatch):
    """Under no_grad, and for inputs that need none, the engine asks for no memory but the soft labels' own."""
    asked, empty_like = [], native.empty_like
    monkeypatch.setattr(native, "empty_like", lambda tensor: asked.append(tensor) or empty_like(tensor))
    with torch.no_grad():
        value = function(cpu, **leaves_of(tensors))
    assert not value.requires_grad
    function(cpu, **tensors)
    assert len(asked) == (2 if function in (MAPS["sample"][0], MAPS["estimate"][0]) else 0)


@every_operation
def test_double_backward(function, tensors):
    """Refused with a way out by the engine; right, to the second derivative, in the reference."""
    leaves = leaves_of(tensors)
    gradients = torch.autograd.grad((function("cpu", **leaves) ** 2).sum(), list(leaves.values()), create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match=r"double backward.*backend='reference'"):
            (gradient**2).sum().backward(retain_graph=True)
    call = lambda *values: function("reference", **dict(zip(leaves, values, strict=True)))  # noqa: E731
    assert torch.autograd.gradgradcheck(call, tuple(leaves.values()), fast_mode=True)


def test_hessian_is_refused_not_zero(cpu):
    """Differentiating the gradient with respect to the input itself: the graph must lead to the error."""
    logits, target = torch.randn(2, 3, 5), torch.tensor([[0, 1, 2, 0, 1]] * 2)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.functional.hessian(lambda x: calseg.vls_cross_entropy(x, target, backend=cpu), logits)


@every_operation
def test_create_graph_gives_the_right_first_derivative(cpu, function, tensors):
    leaves = leaves_of(tensors)
    gradients = torch.autograd.grad(weighted_sum(function(cpu, **leaves)), list(leaves.values()), create_graph=True)
    wanted = evaluate(lambda **t: weighted_sum(function("reference", **t)), tensors).gradients
    for gradient, name in zip(gradients, leaves, strict=True):
        assert_accurate(gradient, wanted[name], ulps=64, scale=0.1, what=name)


@pytest.mark.parametrize(
    ("function", "tensors"), [v for k, v in OPERATIONS.items() if not k.endswith(("-mean", "-sum"))]
)
def test_non_contiguous_upstream_gradient(cpu, function, tensors):
    """Expanded (a sum), transposed and strided upstream gradients."""
    leaves = leaves_of(tensors)
    value = function(cpu, **leaves)
    upstream = scores(*value.shape, seed=3)
    wanted = torch.autograd.grad(value, list(leaves.values()), upstream, retain_graph=True)
    forms = [
        upstream.transpose(-1, -2).contiguous().transpose(-1, -2),
        upstream.movedim(0, -1).contiguous().movedim(-1, 0),
        upstream.repeat_interleave(2, -1)[..., ::2],
        torch._neg_view(-upstream),
    ]
    for form in forms:
        got = torch.autograd.grad(value, list(leaves.values()), form, retain_graph=True)
        assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))
    ones = torch.ones((), dtype=value.dtype).expand(value.shape)
    got = torch.autograd.grad(value, list(leaves.values()), ones, retain_graph=True)
    wanted = torch.autograd.grad(value, list(leaves.values()), torch.ones_like(value))
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@every_operation
def test_function_transforms(function, tensors):
    """torch.func.grad and vmap, which take the reference by themselves, give the numbers of autograd and of a loop."""
    names = list(tensors)
    call = lambda *values: weighted_sum(function(None, **dict(zip(names, values, strict=True))))  # noqa: E731
    got = torch.func.grad(call, argnums=tuple(range(len(names))))(*tensors.values())
    wanted = evaluate(lambda **t: weighted_sum(function("cpu", **t)), tensors).gradients
    for gradient, name in zip(got, names, strict=True):
        assert_accurate(gradient, wanted[name], ulps=64, scale=0.1, what=name)
    batch = [torch.stack([t, t.flip(0), 2 * t]) for t in tensors.values()]
    looped = torch.stack([call(*(t[i] for t in batch)) for i in range(3)])
    if function is not MAPS["sample"][0]:
        assert_accurate(torch.func.vmap(call)(*batch), looped, ulps=64)


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
    """Logits that are no leaf, and whose maker needs neither of them in its backward."""
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
