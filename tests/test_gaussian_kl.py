"""The Gaussian KL term against torch.distributions in float64."""

from __future__ import annotations

import pytest
import torch
from cases import FLOATS, LAYOUTS, SHAPES, SIZES, assert_accurate, assert_matches, evaluate, scores
from torch.distributions import Normal, kl_divergence

import calseg

REDUCTIONS = ("none", "mean", "sum")


def oracle(mu, logvar, prior_mu=0.0, prior_logvar=0.0, reduction="mean"):
    prior = Normal(torch.full_like(mu, prior_mu), torch.full_like(mu, prior_logvar / 2).exp())
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), prior).sum(1 if mu.dim() > 1 else 0)
    return {"none": kl, "sum": kl.sum(), "mean": kl.mean()}[reduction]


def tensors(*shape, dtype=torch.float64):
    return {"mu": scores(*shape, dtype=dtype), "logvar": scores(*shape, dtype=dtype, seed=1, scale=1.0)}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("prior", [(0.0, 0.0), (0.5, -1.0), (-2, 3)], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_argument(backend, shape, prior, reduction):
    for dtype, C in ((d, C) for d in FLOATS for C in (1, 5)):
        given = tensors(*shape(C), dtype=dtype)
        assert_matches(
            lambda mu, logvar: calseg.gaussian_kl(mu, logvar, *prior, reduction, backend=backend),
            lambda mu, logvar: oracle(mu, logvar, *prior, reduction), given, ulps=16,
        )  # fmt: skip


@pytest.mark.parametrize("C", [1, 3, 8, 33])
def test_every_size(cpu, C):
    given = tensors(1, C, 1031)
    for size in (s for s in SIZES if s <= 1031):
        part = {k: t[..., :size].float().contiguous() for k, t in given.items()}
        assert_matches(
            lambda mu, logvar: calseg.gaussian_kl(mu, logvar, reduction="none", backend=cpu),
            lambda mu, logvar: oracle(mu, logvar, reduction="none"), part, ulps=16 + C / 4, scale=4.0, grad_scale=4.0,
        )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(cpu, layout):
    given = tensors(2, 5, 6, 7, dtype=torch.float32)
    function = lambda mu, logvar: calseg.gaussian_kl(mu, logvar, reduction="none", backend=cpu)  # noqa: E731
    wanted = evaluate(function, given)
    got = evaluate(function, {"mu": layout(given["mu"]), "logvar": given["logvar"]})
    swapped = evaluate(function, {"mu": given["mu"], "logvar": layout(given["logvar"])})
    for result in (got, swapped):
        assert torch.equal(result.value, wanted.value)
        for name in given:
            assert torch.equal(result.gradients[name], wanted.gradients[name])


def test_extremes(backend):
    """Variances from 0 to infinity and NaN mean what the formula says."""
    mu = torch.tensor([[0.0], [1e4], [0.0], [0.0], [torch.nan], [torch.inf], [0.0]], dtype=torch.float64)
    logvar = torch.tensor([[0.0], [0.0], [-1e4], [80.0], [0.0], [0.0], [torch.nan]], dtype=torch.float64)
    wanted = 0.5 * (logvar.exp() + mu**2 - 1 - logvar)[:, 0]
    got = calseg.gaussian_kl(mu, logvar, reduction="none", backend=backend)
    torch.testing.assert_close(got, wanted, rtol=1e-15, atol=0, equal_nan=True)
    narrow = calseg.gaussian_kl(mu.float(), logvar.float(), reduction="none", backend=backend)
    torch.testing.assert_close(narrow.double(), wanted, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0)], ids=str)
def test_empty(backend, shape):
    given = tensors(*shape)
    for reduction in REDUCTIONS:
        got = calseg.gaussian_kl(**given, reduction=reduction, backend=backend)
        torch.testing.assert_close(got, oracle(**given, reduction=reduction), equal_nan=True, rtol=0, atol=0)


def test_zero_at_the_prior(backend):
    mu, logvar = torch.full((2, 3, 100), 0.25), torch.full((2, 3, 100), -0.5)
    kl = evaluate(
        lambda mu, logvar: calseg.gaussian_kl(mu, logvar, 0.25, -0.5, backend=backend), {"mu": mu, "logvar": logvar}
    )
    assert_accurate(kl.value, torch.tensor(0.0), ulps=8, scale=1.0)
    assert torch.count_nonzero(kl.gradients["mu"]) == 0
    assert_accurate(kl.gradients["logvar"], torch.zeros(2, 3, 100), ulps=4, scale=1 / 200)
