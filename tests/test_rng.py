"""Tests of the noise contract: known answers, addresses, distribution, and equal normals from every backend."""

from __future__ import annotations

import math
from itertools import product

import naive
import pytest
import torch
from cases import id_of

import calseg
from calseg import autograd
from calseg.backends import rng

CPU = torch.device("cpu")
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    as_tensors = [tuple(torch.tensor(word) for word in part) for part in (counter, key)]
    assert tuple(int(word) for word in rng.philox4x32(*as_tensors)) == words
    assert naive.philox(counter, key) == words


@pytest.mark.parametrize("C", [1, 2, 3, 4, 5, 14])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 + 12345, 2**64 - 1])
def test_address_of_every_normal(C, seed):
    """Seed, voxel, class and sample give the normal of the naive implementation."""
    for first, k in product((0, 10**6, 2**32 - 2, 2**40 + 7), (0, 1, 2, 3, 7)):
        eps = rng.standard_normal(seed, 4, C, k, first_voxel=first, device=CPU)
        wanted = [[naive.normal(seed, first + v, c, k, C) for v in range(4)] for c in range(C)]
        torch.testing.assert_close(eps, torch.tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("C", [1, 2, 3, 14])
def test_independent_of_tiling(C):
    whole = rng.standard_normal(9, 257, C, 2, device=CPU)
    tiles = [rng.standard_normal(9, min(100, 257 - v), C, 2, first_voxel=v, device=CPU) for v in range(0, 257, 100)]
    assert torch.equal(torch.cat(tiles, 1), whole)


@pytest.mark.parametrize("seed", [0, 5, -1, -(2**63), 2**63 - 1])
def test_seed_forms(seed):
    """A negative seed equals its two's complement, and a tensor equals the number that it holds."""
    wanted = rng.standard_normal(seed % 2**64, 10, 3, 0, device=CPU)
    assert torch.equal(rng.standard_normal(seed, 10, 3, 0, device=CPU), wanted)
    assert torch.equal(rng.standard_normal(torch.tensor(seed), 10, 3, 0, device=CPU), wanted)


@pytest.mark.parametrize("C", [1, 2, 3, 4])
def test_distribution(C):
    """Moments to five standard errors, and the Kolmogorov-Smirnov distance at p = 1e-4, over a million normals."""
    eps = torch.stack([rng.standard_normal(2024, 2**18 // C, C, k, device=CPU) for k in (0, 2, 4, 7)])
    flat = eps.flatten()
    n = flat.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((flat**power).mean()) - mean) < 5 * math.sqrt(variance / n), f"moment {power}"
    ordered = flat.sort().values
    cdf = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    distance = (cdf - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max()
    assert float(distance) < 2.23 / math.sqrt(n)


def test_no_correlation_between_addresses():
    """Classes, pairs of samples, neighbouring voxels and neighbouring seeds are uncorrelated, squares included."""
    n = 2**16
    rows = torch.stack(
        [rng.standard_normal(s, n, 5, k, first_voxel=v, device=CPU) for s, k, v in
         ((3, 0, 0), (3, 2, 0), (3, 5, 0), (3, 0, n), (4, 0, 0), (3 + 2**32, 0, 0))]
    ).flatten(0, 1)  # fmt: skip
    rows = torch.cat([rows, rows[:5].roll(1, 1)])  # the next voxel
    for values in (rows, rows**2 - 1):
        off_diagonal = torch.corrcoef(values) - torch.eye(len(values), dtype=torch.float64)
        assert float(off_diagonal.abs().max()) < 5 / math.sqrt(n)


@pytest.mark.parametrize("C", [1, 2, 3, 14])
def test_samples_come_in_antithetic_pairs(C):
    for k in (0, 2, 6):
        pair = [rng.standard_normal(5, 1000, C, k + half, first_voxel=77, device=CPU) for half in (0, 1)]
        assert torch.equal(pair[1], -pair[0])


def test_pairs_reduce_the_error():
    """Four samples in two pairs have less than half the variance of four independent samples."""
    options = {"mu": torch.randn(1, 4, 20000), "logvar": torch.zeros(1, 4, 20000), "backend": "reference"}
    truth = calseg.sample_soft_labels(**options, num_samples=400, seed=9)
    paired = calseg.sample_soft_labels(**options, num_samples=4, seed=1)
    independent = sum(calseg.sample_soft_labels(**options, num_samples=1, seed=seed) for seed in range(2, 6)) / 4
    assert float((paired - truth).square().mean()) < 0.4 * float((independent - truth).square().mean())


def test_the_device_of_a_drawn_seed(monkeypatch):
    """A call draws on the CPU, except while a GPU captures a graph: there it draws on that GPU."""
    drawn, capturing = [], [False]
    monkeypatch.setattr(rng, "draw_seed", drawn.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    devices = [torch.device(name) for name in ("cuda:1", "cpu", "mps")]
    for capturing[0] in (False, True):
        for device in devices:
            autograd.draw_seed(device)
    assert [device.type for device in drawn] == ["cpu"] * 3 + ["cuda", "cpu", "cpu"]
    assert drawn[3] == devices[0]


def test_draw_seed_follows_the_default_generator():
    torch.manual_seed(1)
    first = [int(rng.draw_seed(torch.device("cpu"))) for _ in range(64)]
    torch.manual_seed(1)
    assert [int(rng.draw_seed(torch.device("cpu"))) for _ in range(64)] == first
    assert len(set(first)) == 64
    used = 0
    for seed in first:
        used |= seed % 2**64
    assert used == 2**64 - 1, "bits that no seed sets"


def normals_of(backend: str, shape: tuple[int, ...], dtype: torch.dtype, k: int, seed: int) -> torch.Tensor:
    """Return the normals of a backend.

    With variance 1, dl/dlogvar = dl/dnu * eps / 2 and dl/dmu = dl/dnu for a sample.
    """
    grad_output = torch.arange(shape[1], dtype=dtype).view(-1, *[1] * (len(shape) - 2)).expand(shape)

    def gradients(num_samples: int) -> list[torch.Tensor]:
        if num_samples == 0:
            return [torch.zeros(shape, dtype=dtype)] * 2
        mu, logvar = (torch.zeros(shape, dtype=dtype, requires_grad=True) for _ in range(2))
        soft = calseg.sample_soft_labels(
            mu, logvar, num_samples=num_samples, temperature=8.0, seed=seed, backend=backend
        )
        return [num_samples * g for g in torch.autograd.grad(soft, (mu, logvar), grad_output)]

    (mu_with, logvar_with), (mu_without, logvar_without) = gradients(k + 1), gradients(k)
    return 2 * (logvar_with - logvar_without) / (mu_with - mu_without)


@pytest.mark.parametrize("shape", [(1, 1031), (2, 65, 17), (3, 2500)], ids=str)
@pytest.mark.parametrize("C", [2, 3, 4, 5, 14])
@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 0), *((torch.float64, k) for k in (0, 1, 5))], ids=id_of)
def test_native_normals(cpu, C, shape, dtype, k):
    """Normals equal those of the reference over many tiles and items, to 1e-6 in float32 and 1e-12 in float64."""
    seed, shape = 0x0123456789ABCDEF, (shape[0], C, *shape[1:])
    got = normals_of(cpu, shape, dtype, k, seed).double().flatten(2).transpose(0, 1).flatten(1)
    wanted = rng.standard_normal(seed, got.shape[1], C, k, device=CPU)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    # For k > 0 it is the difference of two rounded sums of up to k + 1 terms, divided by its size.
    torch.testing.assert_close(got, wanted, rtol=tolerance if k == 0 else 1e-10, atol=tolerance)
