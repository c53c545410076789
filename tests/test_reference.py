"""Tests of the reference backend against the formulas for single numbers."""

from __future__ import annotations

import naive
import pytest
import torch
from cases import REDUCTIONS, class_weights, labels, scores

import calseg

N, S = 2, 3


OPTIONS = [
    {},
    {"alpha": 0.7, "temperature": 0.5, "num_samples": 3, "seed": 77},
    {"alpha": 1.0, "temperature": 3.0, "num_samples": 5, "beta": 0.3, "prior_mu": 0.5, "prior_logvar": -1.0},
    {"alpha": 0.4, "label_smoothing": 0.2, "beta": 0.0, "seed": -5, "num_samples": 1},
]


def inputs(C: int):
    shape = (N, C, S)
    target = labels(shape, ignore_index=-100, seed=8)
    target[0, 0], target[1, 1] = 0, -100  # some of both
    return (*(scores(*shape, seed=seed, scale=scale) for seed, scale in ((1, 2.0), (2, 1.5), (3, 0.8))), target)


def voxels(C: int, weight, **options):
    """Return ``{(n, s): Voxel}`` for the voxels that count."""
    x, mu, logvar, target = inputs(C)
    return {
        (n, s): naive.Voxel(
            x[n, :, s].tolist(), int(target[n, s]), mu[n, :, s].tolist(), logvar[n, :, s].tolist(), n * S + s,
            weight=None if weight is None else weight.tolist(), **options,
        )
        for n in range(N) for s in range(S) if target[n, s] != -100
    }  # fmt: skip


def reduced(per_voxel: dict, reduction: str, divisor: float):
    if reduction == "none":
        wanted = torch.zeros(N, S, dtype=torch.float64)
        for place, value in per_voxel.items():
            wanted[place] = value
        return wanted
    return torch.tensor(sum(per_voxel.values()) / (divisor if reduction == "mean" else 1.0), dtype=torch.float64)


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("C", [1, 2, 3, 5])
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_vls_cross_entropy_and_elbo(C, weighted, options, reduction):
    options = {"seed": 3, **options}
    weight = class_weights(C) if weighted else None
    x, mu, logvar, target = inputs(C)
    truth = voxels(C, weight, **options)
    beta, count = options.get("beta", 1.0), len(truth)
    divisor = count if weight is None else sum(float(weight[target[place]]) for place in truth)
    kl = beta * reduced({place: v.kl for place, v in truth.items()}, reduction, count)
    loss = reduced({place: v.loss for place, v in truth.items()}, reduction, divisor)
    common = {"weight": weight, "reduction": reduction, "backend": "reference"}
    close(calseg.vls_cross_entropy(x, target, mu=mu, logvar=logvar, **common, **options), loss + kl)

    if not {"alpha", "label_smoothing"} <= set(options):
        elbo_options = {k: v for k, v in options.items() if k not in ("alpha", "temperature", "label_smoothing")}
        truth = voxels(C, weight, **elbo_options)
        elbo = reduced({place: v.elbo for place, v in truth.items()}, reduction, divisor)
        close(calseg.vls_elbo(mu, logvar, target, **common, **elbo_options), elbo + kl)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_vls_cross_entropy_gradients(weighted, options):
    """Autograd through the reference gives the gradients of the formulas."""
    C, options = 3, {"seed": 3, **options}
    weight = class_weights(C) if weighted else None
    x, mu, logvar, target = inputs(C)
    leaves = [t.requires_grad_() for t in (x, mu, logvar)]
    loss = calseg.vls_cross_entropy(
        x, target, weight, mu=mu, logvar=logvar, reduction="sum", backend="reference", **options
    )
    gradients = torch.autograd.grad(loss, leaves)
    truth = voxels(C, weight, **options)
    for gradient, name in zip(gradients, ("grad_x", "grad_mu", "grad_logvar"), strict=True):
        wanted = torch.zeros(N, C, S, dtype=torch.float64)
        for (n, s), voxel in truth.items():
            wanted[n, :, s] = torch.tensor(getattr(voxel, name), dtype=torch.float64)
        close(gradient, wanted)


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("C", [1, 2, 3, 5])
def test_soft_labels_and_kl(C, options):
    options = {"seed": 3, **options}
    _, mu, logvar, target = inputs(C)
    truth = voxels(C, None, **options)
    sampling = {k: options[k] for k in ("alpha", "temperature", "num_samples", "seed") if k in options}
    soft = calseg.sample_soft_labels(mu, logvar, target, backend="reference", **sampling)
    estimate = calseg.sample_soft_labels(mu, logvar, backend="reference", **sampling)
    prior = {k: options[k] for k in ("prior_mu", "prior_logvar") if k in options}
    kl = calseg.gaussian_kl(mu, logvar, reduction="none", backend="reference", **prior)
    wanted = torch.zeros_like(mu)
    for (n, s), voxel in truth.items():
        wanted[n, :, s] = torch.tensor(voxel.soft, dtype=torch.float64)
        close(estimate[n, :, s], torch.tensor(voxel.estimate, dtype=torch.float64))
        close(kl[n, s], torch.tensor(voxel.kl, dtype=torch.float64))
    close(soft, wanted)
