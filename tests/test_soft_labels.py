"""Soft labels, sampled from a dense Gaussian and accumulated from logit maps."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from cases import (
    FLOATS,
    LABELS,
    LAYOUTS,
    SHAPES,
    SIZES,
    assert_accurate,
    assert_matches,
    evaluate,
    id_of,
    labels,
    scores,
    upstream_of,
)

import calseg
from calseg.tensors import compute_dtype

ULPS = 48
OPTIONS = [{}, {"alpha": 0.5, "num_samples": 1, "temperature": 0.5}, {"alpha": 1.0, "num_samples": 3, "seed": -1},
           {"alpha": 0.0}, {"temperature": 4.0, "num_samples": 9, "alpha": 0.25}]  # fmt: skip


def gaussian(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {"mu": scores(*shape, dtype=dtype), "logvar": scores(*shape, dtype=dtype, seed=2, scale=0.8)}


def sampler(target, backend, **options):
    options = {"seed": 21, **options}
    return lambda mu, logvar: calseg.sample_soft_labels(mu, logvar, target, backend=backend, **options)


# ---- sampled ----


@pytest.mark.parametrize("C", [1, 2, 3, 4, 5, 14])
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_sampled_with_every_option(backend, C, options):
    shape = (2, C, 6, 7)
    for dtype, ignore_index, blended in product((torch.float32, torch.float64), (-100, 0), (False, True)):
        target = labels(shape, ignore_index=ignore_index) if blended else None
        given = {**options, "ignore_index": ignore_index}
        assert_matches(
            sampler(target, backend, **given), sampler(target, "reference", **given), gaussian(*shape, dtype=dtype),
            ulps=ULPS, scale=1.0, grad_scale=1.0,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sampled_in_every_shape_and_dtype(backend, shape, dtype):
    shape = shape(4)
    for target in (None, labels(shape, dtype=torch.int16)):
        got = assert_matches(
            sampler(target, backend), sampler(target, "reference"), gaussian(*shape, dtype=dtype), ulps=ULPS,
            scale=1.0, grad_scale=1.0,
        )  # fmt: skip
        # one rounding per class
        total = got.value.double().sum(1 if len(shape) > 1 else 0)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("C", [2, 3, 8, 33])
def test_sampled_in_every_size(cpu, C):
    longest = 1031 if C < 8 else 129
    tensors, target = gaussian(1, C, longest), labels((1, C, longest), ignore_index=-100)
    truth = evaluate(sampler(target, "reference", alpha=0.5), tensors)
    upstream = upstream_of(truth.value)
    for size in (s for s in SIZES if s <= longest):
        leaves = {k: t[..., :size].float().contiguous().requires_grad_() for k, t in tensors.items()}
        value = sampler(target[..., :size].contiguous(), cpu, alpha=0.5)(**leaves)
        gradients = torch.autograd.grad(value, list(leaves.values()), upstream[..., :size].float())
        assert_accurate(value, truth.value[..., :size], ulps=ULPS, scale=1.0, what=f"S={size}")
        for name, gradient in zip(leaves, gradients, strict=True):
            assert_accurate(gradient, truth.gradients[name][..., :size], ulps=ULPS, scale=1.0, what=f"S={size}, {name}")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(cpu, layout):
    shape = (2, 5, 6, 7)
    tensors, target = gaussian(*shape, dtype=torch.float32), labels(shape, ignore_index=-100)
    for function in (
        sampler(target, cpu),
        lambda mu, logvar: calseg.accumulate_soft_labels((mu, logvar), target, backend=cpu),
    ):
        wanted = evaluate(function, tensors)
        for names in (("mu",), ("logvar",), ("mu", "logvar")):
            got = evaluate(function, {k: layout(t) if k in names else t for k, t in tensors.items()})
            assert torch.equal(got.value, wanted.value)
            for name in tensors:
                assert torch.equal(got.gradients[name], wanted.gradients[name]), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_ignored_voxel_has_no_mass_and_no_gradient(backend, bad):
    shape = (2, 4, 7, 9)
    tensors, target = gaussian(*shape, dtype=torch.float32), labels(shape, ignore_index=-100)
    hole = (target == -100)[:, None].expand(shape)
    soiled = {k: t.masked_fill(hole, bad) for k, t in tensors.items()}
    for function in (
        sampler(target, backend, alpha=0.5),
        lambda mu, logvar: calseg.accumulate_soft_labels((mu, mu + logvar), target, alpha=0.5, backend=backend),
    ):
        got, clean = evaluate(function, soiled), evaluate(function, tensors)
        assert torch.count_nonzero(got.value[hole]) == 0
        assert torch.equal(got.value, clean.value)
        for name, gradient in got.gradients.items():
            assert torch.count_nonzero(gradient[hole]) == 0, name
            assert torch.equal(gradient, clean.gradients[name]), name


def test_nan_reaches_the_soft_label(backend):
    tensors = gaussian(1, 3, 40, dtype=torch.float32)
    tensors["mu"][0, 1, 17] = torch.nan
    soft = sampler(None, backend)(**tensors)
    assert bool(soft[0, :, 17].isnan().all())
    assert soft.isfinite().sum() == 3 * 39


def test_the_estimate_is_the_expected_softmax(backend):
    """Two classes: the mean over many voxels is E[sigmoid(d)], d ~ N(mu1 - mu0, s0^2 + s1^2), by quadrature."""
    voxels, mu, logvar = 2**16, (0.3, -0.8), (0.5, -0.4)
    spread = math.sqrt(sum(math.exp(v) for v in logvar))
    t = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = torch.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    sigmoid = torch.sigmoid((mu[1] - mu[0] + spread * t) / 1.7)
    mean = torch.trapezoid(density * sigmoid, t)
    deviation = float(torch.trapezoid(density * (sigmoid - mean) ** 2, t).sqrt())
    full = lambda values: torch.tensor(values).view(1, 2, 1).expand(1, 2, voxels)  # noqa: E731
    soft = calseg.sample_soft_labels(full(mu), full(logvar), num_samples=4, temperature=1.7, seed=5, backend=backend)
    assert abs(float(soft[0, 1].double().mean()) - float(mean)) < 5 * deviation / math.sqrt(4 * voxels)
    assert abs(float(soft[0, 1].double().std()) - deviation / 2) < 0.02 * deviation


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


def naive_accumulate(maps, target, *, temperature=1.0, alpha=0.1, ignore_index=-100):
    axis = 1 if maps[0].dim() > 1 else 0
    estimate = torch.stack([torch.softmax(m / temperature, axis) for m in maps]).mean(0)
    if target is None:
        return estimate
    hot = torch.nn.functional.one_hot(target.long().clamp(0, maps[0].shape[axis] - 1), maps[0].shape[axis])
    hot = hot.movedim(-1, axis).to(estimate.dtype)
    return ((1 - alpha) * hot + alpha * estimate).where((target.long() != ignore_index).unsqueeze(axis), 0.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_accumulated(backend, shape, dtype, count):
    """The mean of the softmaxes, in float32 at least, blended with the labels; gradients to every map."""
    shape = shape(4)
    maps = {f"map{k}": scores(*shape, dtype=dtype, seed=k) for k in range(count)}
    for target, options in (
        (None, {"temperature": 2.0}),
        (labels(shape, dtype=torch.uint8), {"alpha": 0.7}),
        (labels(shape, ignore_index=-100), {"temperature": 0.5}),
    ):
        got = assert_matches(
            lambda *, target=target, options=options, **maps: calseg.accumulate_soft_labels(
                maps.values(), target, backend=backend, **options
            ),
            lambda *, target=target, options=options, **maps: naive_accumulate(list(maps.values()), target, **options),
            maps, ulps=16, scale=1.0, grad_scale=1.0,
        )  # fmt: skip
        assert got.value.dtype == compute_dtype(dtype)


@pytest.mark.parametrize("dtype", LABELS, ids=id_of)
def test_label_dtypes(backend, dtype):
    shape = (2, 3, 5, 5)
    target, maps = labels(shape, ignore_index=100), [scores(*shape, seed=k) for k in range(2)]
    options = {"ignore_index": 100, "alpha": 0.3}
    for given in (target.to(dtype), target.to(dtype)[:, None]):
        assert_matches(
            lambda *, given=given, **maps: calseg.accumulate_soft_labels(
                maps.values(), given, backend=backend, **options
            ),
            lambda **maps: naive_accumulate(list(maps.values()), target, **options),
            {f"map{k}": m for k, m in enumerate(maps)}, grad_scale=1.0,
        )  # fmt: skip


def test_maps_come_one_at_a_time_and_stay_as_they_are(backend):
    alive, maps = [], [scores(2, 3, 40, seed=k) for k in range(4)]
    before = [m.clone() for m in maps]

    def decoder():
        for m in maps:
            alive.append(len(alive))
            yield m

    got = calseg.accumulate_soft_labels(decoder(), backend=backend)
    assert_accurate(got, naive_accumulate(maps, None), ulps=8)
    assert len(alive) == 4
    assert all(torch.equal(m, b) for m, b in zip(maps, before, strict=True))


@pytest.mark.parametrize("needing", [(0,), (2,), (0, 1, 2), (1,)], ids=str)
def test_gradients_of_some_maps(backend, needing):
    """Maps with and without gradients in any order."""
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
        zip(got, gradients(lambda m: naive_accumulate(m, target, alpha=0.6)), strict=True)
    ):
        assert (ours is None) == (k not in needing)
        if ours is not None:
            assert_accurate(ours, wanted, ulps=8)


def test_maps_of_several_dtypes(backend):
    maps = [scores(2, 3, 40, dtype=d, seed=k) for k, d in enumerate((torch.float32, torch.bfloat16, torch.float16))]
    got = calseg.accumulate_soft_labels(maps, backend=backend)
    assert got.dtype == torch.float32
    assert_accurate(got, naive_accumulate([m.double() for m in maps], None), ulps=8)


def test_memory_does_not_grow_with_the_maps(peak_growth):
    """32 maps of 8 MiB, made one at a time: the sum, one map and its making."""
    noise = scores(1, 4, 128, 64, 64, dtype=torch.float32)
    run = lambda: calseg.accumulate_soft_labels((noise + k for k in range(32)), backend="cpu")  # noqa: E731
    run()
    assert peak_growth(run) < 48 * 2**20
