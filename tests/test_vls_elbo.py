"""Tests of the objective of stage 1 against the reference in float64."""

from __future__ import annotations

import torch
from cases import (
    assert_accurate,
    class_weights,
    labels,
    scores,
)

import calseg


def elbo(target, backend, *, weighted=False, **options):
    options = {"seed": 3, **options}

    def function(mu, logvar):
        weight = class_weights(mu.shape[1 if mu.dim() > 1 else 0], mu.dtype) if weighted else None
        return calseg.vls_elbo(mu, logvar, target, weight, backend=backend, **options)

    return function


def test_small_variance_is_cross_entropy_of_the_mean(backend):
    """For sigma -> 0, the expectation is the cross-entropy of mu."""
    shape = (2, 3, 50)
    mu, target = scores(*shape), labels(shape)
    got = calseg.vls_elbo(mu, torch.full(shape, -80.0, dtype=torch.float64), target, beta=0.0, backend=backend)
    assert_accurate(got, torch.nn.functional.cross_entropy(mu, target), ulps=16)


def test_it_bounds_the_evidence(backend):
    """With beta = 1 the objective is at least -log of the label's marginal probability under the prior."""
    mu, logvar = torch.full((1, 2, 4000), 0.7, dtype=torch.float64), torch.full((1, 2, 4000), -0.5, dtype=torch.float64)
    target = torch.zeros(1, 4000, dtype=torch.int64)
    assert float(calseg.vls_elbo(mu, logvar, target, seed=0, num_samples=16, backend=backend)) > 0.6931471805599453
