"""Tests of the Gaussian KL term against torch.distributions in float64."""

from __future__ import annotations

import torch
from cases import assert_accurate, evaluate

import calseg


def test_extremes(backend):
    """Variances from 0 to infinity, and NaN, give the result of the formula."""
    mu = torch.tensor([[0.0], [1e4], [0.0], [0.0], [torch.nan], [torch.inf], [0.0]], dtype=torch.float64)
    logvar = torch.tensor([[0.0], [0.0], [-1e4], [80.0], [0.0], [0.0], [torch.nan]], dtype=torch.float64)
    wanted = 0.5 * (logvar.exp() + mu**2 - 1 - logvar)[:, 0]
    got = calseg.gaussian_kl(mu, logvar, reduction="none", backend=backend)
    torch.testing.assert_close(got, wanted, rtol=1e-15, atol=0, equal_nan=True)
    narrow = calseg.gaussian_kl(mu.float(), logvar.float(), reduction="none", backend=backend)
    torch.testing.assert_close(narrow.double(), wanted, rtol=1e-6, atol=0, equal_nan=True)


def test_zero_at_the_prior(backend):
    mu, logvar = torch.full((2, 3, 100), 0.25), torch.full((2, 3, 100), -0.5)
    kl = evaluate(
        lambda mu, logvar: calseg.gaussian_kl(mu, logvar, 0.25, -0.5, backend=backend), {"mu": mu, "logvar": logvar}
    )
    assert_accurate(kl.value, torch.tensor(0.0), ulps=8, scale=1.0)
    assert torch.count_nonzero(kl.gradients["mu"]) == 0
    assert_accurate(kl.gradients["logvar"], torch.zeros(2, 3, 100), ulps=4, scale=1 / 200)
