"""Tests of cross-entropy with hard and soft labels against F.cross_entropy, in value and gradient."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import (
    FLOATS,
    REDUCTIONS,
    assert_accurate,
    assert_matches,
    class_weights,
    evaluate,
    id_of,
    labels,
    scores,
    upstream_of,
)

import calseg


def pair(target, backend, **options):
    """Return the loss of the backend and F.cross_entropy, as functions of the logits."""
    wide = dict(options)
    if options.get("weight") is not None:
        wide["weight"] = options["weight"].double()
    return (
        lambda input: calseg.vls_cross_entropy(input, target, backend=backend, **options),
        lambda input: F.cross_entropy(input, target if target.shape == input.shape else target.long(), **wide),
    )


# ---- hard labels ----


EXTREMES = [
    [1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, -torch.inf], [-torch.inf, 0.0, 1.0], [0.0, -torch.inf, -torch.inf],
    [torch.inf, 0.0, 1.0], [torch.nan, 0.0, 1.0], [0.0, torch.nan, torch.inf], [-torch.inf] * 3, [0.0] * 3,
    [88.0, -88.0, 0.0], [-104.0, 0.0, -87.4], [6e4, -6e4, 1e-7],
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_extreme_logits(backend, dtype, weighted, kind):
    """Logits of -inf, inf and NaN give the loss and gradient of F.cross_entropy."""
    x = torch.tensor(EXTREMES, dtype=torch.float64).to(dtype).repeat(3, 1)
    target = torch.arange(3).repeat_interleave(len(EXTREMES))
    if kind == "soft":
        target = (0.2 * torch.ones(len(x), 3) + 0.4 * F.one_hot(target, 3)).to(dtype)
    weight = class_weights(3).to(dtype) if weighted else None
    assert_matches(*pair(target, backend, reduction="none", weight=weight), {"input": x}, grad_scale=2.0)
    finite = x.isfinite().all(1)
    assert_matches(*pair(target[finite], backend, weight=weight), {"input": x[finite]})


@pytest.mark.parametrize("C", [2, 5, 17])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("place", [1, 60_000, -2])
@pytest.mark.parametrize("reuse_logits", [False, True])
def test_one_ignored_voxel(C, reduction, place, reuse_logits):
    """A single ignored voxel, which only the kernel finds, changes the divisor of the mean.

    float64 shows an error in it.
    """
    shape = (2, C, 40, 40, 40)
    x, target = scores(*shape).requires_grad_(), labels(shape)
    target.view(-1)[place] = -100
    value = calseg.vls_cross_entropy(x * 1, target, reduction=reduction, reuse_logits=reuse_logits, backend="cpu")
    truth = F.cross_entropy(x, target, reduction=reduction)
    upstream = upstream_of(truth)
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad(value, x, upstream)
    (expected,) = torch.autograd.grad(truth, x, upstream)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-18)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_the_first_bad_label_is_named(reduction, needs_gradient):
    """The error names the first bad label, even if another thread finds a later one before."""
    shape = (2, 3, 50, 50, 50)
    x, target = scores(*shape, dtype=torch.float32).requires_grad_(needs_gradient), labels(shape)
    for place, label in ((60_001, -100), (160_001, 77), (240_001, 78)):
        target.view(-1)[place] = label
    with pytest.raises(IndexError, match=r"target\[1, 14, 0, 1\] is 77"):
        calseg.vls_cross_entropy(x, target, reduction=reduction, backend="cpu")


@pytest.mark.parametrize("flags", list(product((None, True, False), (None, True, False))), ids=str)
def test_legacy_reduction_arguments(backend, flags):
    shape = (2, 3, 5)
    options = {"size_average": flags[0], "reduce": flags[1], "reduction": "sum"}
    with pytest.warns(UserWarning, match="reduction") if flags != (None, None) else nullcontext():
        assert_matches(*pair(labels(shape), backend, **options), {"input": scores(*shape)})


# ---- memory layouts ----


# ---- low precision ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=id_of)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("kind", "C"), [("hard", 2), ("weighted", 5), ("smoothed", 5), ("soft", 3), ("hard", 33)])
def test_low_precision_is_no_worse_than_pytorch(backend, dtype, reduction, kind, C):
    """The error is at most that of PyTorch in the same dtype, plus one rounding of the result."""
    shape = (2, C, 17, 19)
    x, target, options = scores(*shape, dtype=dtype, scale=3.0), labels(shape), {"reduction": reduction}
    if kind == "weighted":
        options["weight"] = class_weights(C).to(dtype)
    if kind == "smoothed":
        options["label_smoothing"] = 0.1
    if kind == "soft":
        target = torch.softmax(scores(*shape, seed=4), 1).to(dtype)
    function, _ = pair(target, backend, **options)
    truth = evaluate(pair(target.double() if kind == "soft" else target, backend, **options)[1], {"input": x.double()})
    got = evaluate(function, {"input": x})
    stock = evaluate(lambda input: F.cross_entropy(input, target, **options), {"input": x})
    for name, ours, theirs, exact in (
        ("value", got.value, stock.value, truth.value),
        ("gradient", got.gradients["input"], stock.gradients["input"], truth.gradients["input"]),
    ):
        assert ours.dtype == dtype, name
        rounding = torch.finfo(dtype).eps / 2 * exact.abs().clamp(min=torch.finfo(dtype).smallest_normal)
        error, stock_error = (ours.double() - exact).abs(), (theirs.double() - exact).abs()
        assert bool((error <= stock_error.max() + 1.01 * rounding).all()), (
            f"{name}: {error.max()} and {stock_error.max()}"
        )
        # and the arithmetic inside is float32's: nothing but that rounding of the result
        assert_accurate(ours, exact, ulps=8, what=name)


# ---- soft labels ----


def test_impossible_class_without_mass(backend):
    """Where Y is 0 and log p is -inf, the loss and both gradients are finite, although F.cross_entropy gives NaN."""
    x = torch.tensor([[0.5, -torch.inf, 1.0]], dtype=torch.float64)
    soft = torch.tensor([[0.25, 0.0, 0.75]], dtype=torch.float64)
    got = evaluate(lambda x, y: calseg.soft_cross_entropy(x, y, backend=backend), {"x": x, "y": soft})
    kept = evaluate(F.cross_entropy, {"input": x[:, ::2], "target": soft[:, ::2]})
    assert_accurate(got.value, kept.value, ulps=4)
    assert_accurate(got.gradients["x"][:, ::2], kept.gradients["input"], ulps=4)
    assert_accurate(got.gradients["y"][:, ::2], kept.gradients["target"], ulps=4)
    assert float(got.gradients["x"][0, 1]) == float(got.gradients["y"][0, 1]) == 0.0


# ---- the argument space ----


# ---- weights of classes that do not occur ----


@pytest.mark.parametrize("weight", [torch.inf, torch.nan])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (40, 7), (2, 14, 70)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weight_that_is_not_finite(backend, weight, shape, reduction):
    """A class that does not occur, with a weight from 1 / bincount, changes neither loss nor gradient."""
    weights = class_weights(shape[1]).clone()
    weights[1] = weight
    target = labels(shape)
    target[target == 1] = 0
    options = {"weight": weights, "reduction": reduction}
    assert_matches(*pair(target, backend, **options), {"input": scores(*shape)})


@pytest.mark.parametrize("weight", [torch.inf, torch.nan])
def test_weight_that_is_not_finite_with_soft_labels(backend, weight):
    """A class without mass does not count in any of the losses."""
    x, mu, logvar = (scores(2, 3, 4, 5, seed=seed).requires_grad_() for seed in range(3))
    target = labels((2, 3, 4, 5))
    target[target == 1] = 0
    soft = F.one_hot(target, 3).movedim(-1, 1).to(x.dtype)
    finite = torch.tensor([0.5, 1.0, 2.0], dtype=x.dtype)
    other = torch.tensor([0.5, weight, 2.0], dtype=x.dtype)

    def results(weights):
        options = {"weight": weights, "backend": backend}
        given = calseg.vls_cross_entropy(x, target, soft_labels=soft, **options)
        none_sampled = calseg.vls_cross_entropy(x, target, mu=mu, logvar=logvar, alpha=0.0, seed=1, **options)
        elbo = calseg.vls_elbo(mu, logvar, target, seed=1, **options)
        losses = (given, none_sampled, elbo)
        return *losses, *torch.autograd.grad(sum(losses), (x, mu, logvar))

    for got, wanted in zip(results(other), results(finite), strict=True):
        assert wanted.isfinite().all()
        torch.testing.assert_close(got, wanted)


def test_weights_of_all_labels_are_0(backend):
    """The mean is 0 / 0, as in PyTorch."""
    x, target = scores(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)
    options = {"weight": torch.tensor([0.0, 1.0, 1.0]).to(x.dtype)}
    assert F.cross_entropy(x, target, **options).isnan()
    assert calseg.vls_cross_entropy(x, target, backend=backend, **options).isnan()
