"""Tests of soft labels, sampled from a Gaussian and accumulated from maps of logits."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
from cases import (
    FLOATS,
    SHAPES,
    assert_accurate,
    assert_matches,
    labels,
    scores,
    upstream_of,
)
from naive import accumulate_soft_labels

import calseg


def gaussian(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {"mu": scores(*shape, dtype=dtype), "logvar": scores(*shape, dtype=dtype, seed=2, scale=0.8)}


def sampler(target, backend, **options):
    options = {"seed": 21, **options}
    return lambda mu, logvar: calseg.sample_soft_labels(mu, logvar, target, backend=backend, **options)


# ---- sampled ----


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_soft_labels_are_a_distribution(backend, shape):
    """The sum over classes is 1 to one rounding per class, with and without a target."""
    for dtype, target in product(FLOATS, (None, labels(shape(4)))):
        soft = sampler(target, backend)(**gaussian(*shape(4), dtype=dtype)).double()
        total = soft.sum(1 if soft.dim() > 1 else 0)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("num_samples", [1, 3, 4])
def test_the_estimate_is_the_expected_softmax(backend, num_samples):
    """Compare mean and deviation over many voxels with quadrature, for two classes.

    The estimate is that of sigmoid(d) with d ~ N(mu1 - mu0, s0^2 + s1^2). A pair of samples has the deviation of
    (sigmoid(d) + sigmoid(2 E[d] - d)) / 2, and an odd number of samples leaves one without a partner.
    """
    voxels, mu, logvar = 2**16, (0.3, -0.8), (0.5, -0.4)
    spread = math.sqrt(sum(math.exp(v) for v in logvar))
    t = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = torch.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    sigmoid = torch.sigmoid((mu[1] - mu[0] + spread * t) / 1.7)
    mean = torch.trapezoid(density * sigmoid, t)
    of_one, of_pair = (
        torch.trapezoid(density * (f - mean) ** 2, t) for f in (sigmoid, (sigmoid + sigmoid.flip(0)) / 2)
    )
    pairs, alone = divmod(num_samples, 2)
    deviation = float((4 * pairs * of_pair + alone * of_one).sqrt()) / num_samples
    full = lambda values: torch.tensor(values).view(1, 2, 1).expand(1, 2, voxels)  # noqa: E731
    options = {"num_samples": num_samples, "temperature": 1.7, "seed": 5, "backend": backend}
    soft = calseg.sample_soft_labels(full(mu), full(logvar), **options)[0, 1].double()
    assert abs(float(soft.mean()) - float(mean)) < 5 * deviation / math.sqrt(voxels)
    assert abs(float(soft.std()) - deviation) < 0.02 * deviation


def test_seeds(backend):
    tensors = gaussian(2, 3, 50, dtype=torch.float32)
    draw = lambda seed: sampler(None, backend, seed=seed)(**tensors)  # noqa: E731
    assert torch.equal(draw(4), draw(torch.tensor(4)))
    assert not torch.equal(draw(4), draw(5))
    torch.manual_seed(1)
    first, second = draw(None), draw(None)
    torch.manual_seed(1)
    assert torch.equal(draw(None), first)
    assert not torch.equal(first, second)


# ---- accumulated ----


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("count", [1, 5])
def test_number_of_maps(backend, shape, count):
    """Any number of maps works, and each map gets its gradient. The table of operations has two maps."""
    for dtype, (target, options) in product(
        FLOATS,
        (
            (None, {"temperature": 2.0}),
            (labels(shape(4), dtype=torch.uint8), {"alpha": 0.7}),
            (labels(shape(4), ignore_index=-100), {"temperature": 0.5}),
        ),
    ):
        accumulate, naive = (
            lambda f=f, o=options, y=target, **maps: f(list(maps.values()), y, **o)
            for f in (partial(calseg.accumulate_soft_labels, backend=backend), accumulate_soft_labels)
        )
        maps = {f"map{k}": scores(*shape(4), dtype=dtype, seed=k) for k in range(count)}
        assert_matches(accumulate, naive, maps, ulps=16, scale=1.0, grad_scale=1.0)


def test_maps_come_one_at_a_time_and_stay_as_they_are(backend):
    alive, maps = [], [scores(2, 3, 40, seed=k) for k in range(4)]
    before = [m.clone() for m in maps]

    def decoder():
        for m in maps:
            alive.append(len(alive))
            yield m

    got = calseg.accumulate_soft_labels(decoder(), backend=backend)
    assert_accurate(got, accumulate_soft_labels(maps, None), ulps=8)
    assert len(alive) == 4
    assert all(torch.equal(m, b) for m, b in zip(maps, before, strict=True))


@pytest.mark.parametrize("needing", [(0,), (2,), (0, 1, 2), (1,)], ids=str)
def test_gradients_of_some_maps(backend, needing):
    """Maps with and without gradients may come in any order."""
    shape = (2, 3, 40)
    maps = [scores(*shape, seed=k) for k in range(3)]
    target = labels(shape, ignore_index=-100)

    def gradients(function):
        leaves = [m.clone().requires_grad_(k in needing) for k, m in enumerate(maps)]
        value = function(leaves)
        value.backward(upstream_of(value))
        return [m.grad for m in leaves]

    got = gradients(lambda maps: calseg.accumulate_soft_labels(maps, target, alpha=0.6, backend=backend))
    for k, (ours, wanted) in enumerate(
        zip(got, gradients(lambda m: accumulate_soft_labels(m, target, alpha=0.6)), strict=True)
    ):
        assert (ours is None) == (k not in needing)
        if ours is not None:
            assert_accurate(ours, wanted, ulps=8)


def test_maps_of_several_dtypes(backend):
    maps = [scores(2, 3, 40, dtype=d, seed=k) for k, d in enumerate((torch.float32, torch.bfloat16, torch.float16))]
    got = calseg.accumulate_soft_labels(maps, backend=backend)
    assert got.dtype == torch.float32
    assert_accurate(got, accumulate_soft_labels([m.double() for m in maps], None), ulps=8)


def test_memory_does_not_grow_with_the_maps(peak_growth):
    """32 maps of 8 MiB need memory for the sum, for one map, and for making that map."""
    noise = scores(1, 4, 128, 64, 64, dtype=torch.float32)
    run = lambda: calseg.accumulate_soft_labels((noise + k for k in range(32)), backend="cpu")  # noqa: E731
    run()
    assert peak_growth(run) < 48 * 2**20
