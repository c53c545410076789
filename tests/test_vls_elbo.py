"""The stage-1 objective against the reference in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cases import (
    FLOATS,
    LAYOUTS,
    SHAPES,
    SIZES,
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

REDUCTIONS = ("none", "mean", "sum")
OPTIONS = [{}, {"num_samples": 1, "beta": 0.0}, {"num_samples": 3, "prior_mu": -0.5, "prior_logvar": 0.7, "beta": 0.3},
           {"weighted": True, "seed": -4}]  # fmt: skip
ULPS = 48


def gaussian(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {"mu": scores(*shape, dtype=dtype), "logvar": scores(*shape, dtype=dtype, seed=2, scale=0.8)}


def elbo(target, backend, *, weighted=False, **options):
    options = {"seed": 3, **options}

    def function(mu, logvar):
        weight = class_weights(mu.shape[1 if mu.dim() > 1 else 0], mu.dtype) if weighted else None
        return calseg.vls_elbo(mu, logvar, target, weight, backend=backend, **options)

    return function


def against_reference(target, backend, tensors, **options):
    return assert_matches(elbo(target, backend, **options), elbo(target, "reference", **options), tensors, ulps=ULPS)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("C", [1, 2, 3, 4, 5, 14])
def test_every_option(backend, C, options, reduction):
    shape = (2, C, 6, 7)
    for dtype, ignore_index in product((torch.float32, torch.float64), (-100, 1)):
        target = labels(shape, ignore_index=ignore_index)
        against_reference(
            target, backend, gaussian(*shape, dtype=dtype), reduction=reduction, ignore_index=ignore_index, **options
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_and_dtype(backend, shape, dtype):
    shape = shape(4)
    for reduction in REDUCTIONS:
        against_reference(labels(shape), backend, gaussian(*shape, dtype=dtype), reduction=reduction)


@pytest.mark.parametrize("C", [2, 5, 9])
def test_every_size(cpu, C):
    tensors, target = gaussian(1, C, 1031), labels((1, C, 1031), ignore_index=-100)
    truth = evaluate(elbo(target, "reference", reduction="none"), tensors)
    upstream = upstream_of(truth.value)
    for size in (s for s in SIZES if s <= 1031):
        leaves = {k: t[..., :size].float().contiguous().requires_grad_() for k, t in tensors.items()}
        value = elbo(target[..., :size].contiguous(), cpu, reduction="none")(**leaves)
        gradients = torch.autograd.grad(value, list(leaves.values()), upstream[..., :size].float())
        assert_accurate(value, truth.value[..., :size], ulps=ULPS, scale=8.0, what=f"S={size}")
        for name, gradient in zip(leaves, gradients, strict=True):
            assert_accurate(gradient, truth.gradients[name][..., :size], ulps=ULPS, scale=8.0, what=f"S={size}, {name}")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(cpu, layout):
    shape = (2, 5, 6, 7)
    tensors, target = gaussian(*shape, dtype=torch.float32), labels(shape, ignore_index=-100)
    function = elbo(target, cpu, reduction="none")
    wanted = evaluate(function, tensors)
    for names in (("mu",), ("logvar",), ("mu", "logvar")):
        got = evaluate(function, {k: layout(t) if k in names else t for k, t in tensors.items()})
        assert torch.equal(got.value, wanted.value)
        for name in tensors:
            assert torch.equal(got.gradients[name], wanted.gradients[name]), name


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nothing_of_an_ignored_voxel_counts(backend, reduction, bad):
    shape = (2, 4, 7, 9)
    tensors, target = gaussian(*shape, dtype=torch.float32), labels(shape, ignore_index=-100)
    hole = (target == -100)[:, None].expand(shape)
    function = elbo(target, backend, reduction=reduction)
    clean = evaluate(function, tensors)
    soiled = evaluate(function, {k: t.masked_fill(hole, bad) for k, t in tensors.items()})
    assert torch.equal(clean.value, soiled.value)
    for name, gradient in soiled.gradients.items():
        assert torch.count_nonzero(gradient[hole]) == 0, name
        assert torch.equal(gradient, clean.gradients[name]), name


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_ignored(backend, reduction):
    got = evaluate(elbo(torch.full((2, 5), -100), backend, reduction=reduction), gaussian(2, 3, 5))
    assert bool(got.value.isnan().all()) == (reduction == "mean")
    assert torch.count_nonzero(got.value.nan_to_num()) == 0
    for gradient in got.gradients.values():
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("place", ["mu", "logvar"])
def test_a_bad_number_reaches_the_loss(backend, place):
    tensors, target = gaussian(1, 3, 40, dtype=torch.float32), labels((1, 3, 40))
    tensors[place][0, 1, 17] = torch.nan
    value = elbo(target, backend, reduction="none")(**tensors)
    assert value[0, 17].isnan()
    assert value.isfinite().sum() == 39


def test_small_variance_is_cross_entropy_of_the_mean(backend):
    """sigma -> 0: the expectation is the cross-entropy of mu, whatever the noise."""
    shape = (2, 3, 50)
    mu, target = scores(*shape), labels(shape)
    got = calseg.vls_elbo(mu, torch.full(shape, -80.0, dtype=torch.float64), target, beta=0.0, backend=backend)
    assert_accurate(got, torch.nn.functional.cross_entropy(mu, target), ulps=16)


def test_it_bounds_the_evidence(backend):
    """With beta = 1 the objective is at least -log of the label's marginal probability under the prior."""
    mu, logvar = torch.full((1, 2, 4000), 0.7, dtype=torch.float64), torch.full((1, 2, 4000), -0.5, dtype=torch.float64)
    target = torch.zeros(1, 4000, dtype=torch.int64)
    assert float(calseg.vls_elbo(mu, logvar, target, seed=0, num_samples=16, backend=backend)) > 0.6931471805599453
