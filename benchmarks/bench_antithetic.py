"""Benchmark of the error of sampled soft labels against their time: samples in antithetic pairs, and independent ones.

The peer draws as many independent samples in plain PyTorch. The truth is the mean of 1024 samples with another seed.
The Gaussian has means of standard deviation 2 and sigma = 0.5, with which a dense head begins to train. Byte model of
the forward pass: one read of mu and logvar, and one write of the estimate, ``3 * N * C * S * itemsize``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import eager as peers
import pytest
import torch
from harness import Case, Problem, on_gpu
from torch import Tensor

import calseg

SAMPLES = (2, 4, 8)
TRUTH = 1024
CPU_CASES = [
    Case(f"pairs_{samples}", classes, edge, labels="", targets={"equal_error": 100})
    for classes, edge in {2: 48, 4: 48, 14: 32}.items() for samples in SAMPLES
]  # fmt: skip
CASES = [] if on_gpu() else CPU_CASES


def build(case: Case) -> Problem:
    """Return the problem of a case, with the errors of both contenders."""
    samples = int(case.operation.removeprefix("pairs_"))
    mu, logvar = 2 * case.scores(), torch.full(case.shape, 2 * math.log(0.5))

    def ours(mu: Tensor, logvar: Tensor) -> Tensor:
        return calseg.sample_soft_labels(mu, logvar, num_samples=samples, seed=1)

    def eager(mu: Tensor, logvar: Tensor) -> Tensor:
        return peers.estimate(mu, logvar, samples)

    truth = calseg.sample_soft_labels(mu, logvar, num_samples=TRUTH, seed=2)
    errors = {
        name: float((estimate(mu, logvar) - truth).square().mean().sqrt())
        for name, estimate in (("calseg", ours), ("eager", eager))
    }
    count = samples * mu.numel()
    return Problem(ours, eager, (mu, logvar), case.traffic(3, 0), count, backward=False, errors=errors)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_antithetic(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
