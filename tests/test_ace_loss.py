"""Tests of the average-calibration-error losses against their formulas, and of the engine against the reference."""

from __future__ import annotations

import pytest
import torch
from cases import (
    FLOATS,
    assert_accurate,
    assert_matches,
    class_weights,
    evaluate,
    id_of,
    labels,
    scores,
)
from internals import needs_native
from naive import average_calibration_error, softmax

import calseg

BINNINGS = ("hard", "soft")
every_binning = pytest.mark.parametrize("binning", BINNINGS)


# In float32 a confidence has a rounding error of up to 2^-25, and its place between two centres one of n_bins times
# that. The gradient divides by the mass of a bin, so bins of little mass are left out of tests of float32.
ULPS = {"hard": 8, "soft": 64}
EMPTY_WEIGHT = 0.5


def oracle(target, weight=None, **options):
    weight = None if weight is None else weight.double()
    return lambda x: calseg.ace_loss(x, target, weight, backend="reference", **options)


@every_binning
@pytest.mark.parametrize("ignore_empty_classes", [True, False])
@pytest.mark.parametrize("n_bins", [1, 4, 20])
def test_naive(backend, binning, n_bins, ignore_empty_classes):
    """Compare the values per item and class with the formulas in plain Python.

    Class 3 has no label in the second item.
    """
    x, target = scores(2, 4, 5, 7), labels((2, 4, 5, 7), ignore_index=-1)
    target[1][target[1] == 3] = 0
    wanted = []
    for n in range(2):
        counted = target[n] >= 0
        rows = [softmax(row) for row in x[n].movedim(0, -1)[counted].tolist()]
        wanted.append(
            average_calibration_error(
                rows, target[n][counted].tolist(), n_bins, soft=binning == "soft",
                ignore_empty_classes=ignore_empty_classes,
            )
        )  # fmt: skip
    options = {"n_bins": n_bins, "binning": binning, "ignore_index": -1, "ignore_empty_classes": ignore_empty_classes}
    got = calseg.ace_loss(x, target, reduction="none", backend=backend, **options)
    wanted = torch.tensor(wanted, dtype=torch.float64)
    assert_accurate(got, wanted, ulps=64, scale=1.0)
    for reduction in ("mean", "sum"):
        got = calseg.ace_loss(x, target, reduction=reduction, backend=backend, **options)
        assert_accurate(got, getattr(wanted, reduction)(), ulps=64, scale=8.0)
    no_background = calseg.ace_loss(x, target, include_background=False, backend=backend, **options)
    assert_accurate(no_background, wanted[:, 1:].mean(), ulps=64, scale=1.0)


@every_binning
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=id_of)
def test_several_chunks_and_spills(cpu, binning, dtype):
    """Sum more voxels in a bin than a packed word can hold, over several chunks per item, with many classes."""
    for shape in ((2, 2, 150000), (1, 117, 6000)):
        x, target = scores(*shape, scale=6.0, dtype=dtype), labels(shape, ignore_index=-100)
        x[:, 0] += 3.0
        got = calseg.ace_loss(x, target, binning=binning, reduction="none", backend=cpu)
        wanted = oracle(target, binning=binning, reduction="none")(x.double())
        # A float32 confidence may be on the other side of an edge, so a bin of hundreds may have one voxel more.
        assert_accurate(got, wanted, ulps=ULPS[binning], scale=1.0 if dtype == torch.float64 else 50.0)


def test_is_the_class_wise_calibration_error(backend):
    x, target = scores(3, 4, 9, 11), labels((3, 4, 9, 11))
    got = calseg.ace_loss(x, target, n_bins=15, backend=backend)
    wanted = calseg.calibration_error(x, target, n_bins=15, class_wise=True, per_item=True, norm="average")
    torch.testing.assert_close(got, wanted.mean(), rtol=0, atol=1e-7)


@every_binning
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_nan_reaches_the_loss(backend, binning, bad):
    """NaN reaches the loss of its item, in every class that has labels. Other items do not change."""
    x, target = scores(3, 4, 30, dtype=torch.float32), labels((3, 4, 30)) % 3  # no label of class 3
    clean = calseg.ace_loss(x, target, binning=binning, reduction="none", backend=backend)
    x[1, 2, 17] = bad
    got = evaluate(lambda x: calseg.ace_loss(x, target, binning=binning, reduction="none", backend=backend), {"x": x})
    assert bool(got.value[1, :3].isnan().all())
    assert torch.equal(got.value[[0, 2]], clean[[0, 2]])
    assert got.value[1, 3] == 0
    assert bool(got.gradients["x"][[0, 2]].isfinite().all())


@every_binning
@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
def test_extreme_logits(backend, binning, dtype):
    """Compute the loss for probabilities of 0 and 1, and for logits of -inf and of the largest numbers of the dtype."""
    big = torch.finfo(dtype).max
    x = torch.tensor([[big, -big, 0.0, -torch.inf, 1000.0], [-big, big, -torch.inf, 0.0, 0.0]], dtype=dtype)[None]
    target = torch.tensor([[0, 0, 1, 1, 1]])
    got = evaluate(lambda x: calseg.ace_loss(x, target, binning=binning, reduction="none", backend=backend), {"x": x})
    # The probabilities are 0 and 1. The last bin of class 0 has one hit of three voxels, the first bin one of two.
    wanted = torch.tensor([[(2 / 3 + 1 / 2) / 2, (1 / 2 + 2 / 3) / 2]], dtype=torch.float64)
    assert_accurate(got.value, wanted, ulps=8)
    assert torch.count_nonzero(got.gradients["x"]) == 0


@every_binning
@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
def test_low_precision(cpu, binning, dtype):
    """Compare low precision with float64.

    Gradients are rounded once to the dtype. Under autocast the loss is float32.
    """
    x, target = scores(1, 4, 9, 10, 11, dtype=dtype, seed=4), labels((1, 4, 9, 10, 11))
    got = assert_matches(
        lambda x: calseg.ace_loss(x, target, binning=binning, backend=cpu), oracle(target, binning=binning), {"x": x},
        ulps=ULPS[binning], scale=1.0, grad_ulps=8 * ULPS[binning], grad_scale=1e-2,
    )  # fmt: skip
    assert got.value.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        value = calseg.ace_loss(x, target, binning=binning, backend=cpu)
    assert value.dtype == (dtype if dtype == torch.float64 else torch.float32)


@needs_native
@every_binning
def test_memory(peak_growth, binning):
    """The gradient is the only allocation of the volume's size."""
    x = scores(1, 4, 128, 128, 64, dtype=torch.float32).requires_grad_()  # 16 MiB
    target = labels((1, 4, 128, 128, 64), dtype=torch.uint8)
    loss = calseg.ace_loss(x, target, binning=binning)
    torch.autograd.grad(loss, x)
    calseg.empty_cache()
    grown = peak_growth(lambda: torch.autograd.grad(calseg.ace_loss(x, target, binning=binning), x))
    assert grown < x.nbytes + 3 * 2**20


@every_binning
def test_training_lowers_it(backend, binning):
    """Train a single temperature on overconfident logits. The calibration error falls."""
    x, target = scores(1, 3, 2000, scale=1.0), labels((1, 3, 2000))
    target = torch.distributions.Categorical(probs=torch.softmax(x, 1).movedim(1, -1)).sample()
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([scale], lr=0.1)
    start = float(calseg.ace_loss(4 * x, target, binning=binning, backend=backend))
    for _ in range(60):
        optimizer.zero_grad()
        loss = calseg.ace_loss(scale * x, target, binning=binning, backend=backend)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < start / 3
    assert 0.6 < float(scale.detach()) < 1.6


def test_module():
    x, target, weight = scores(2, 3, 8), labels((2, 3, 8)), class_weights(3)
    module = calseg.ACELoss(weight, binning="soft", n_bins=9, reduction="sum")
    assert torch.equal(module(x, target), calseg.ace_loss(x, target, weight, binning="soft", n_bins=9, reduction="sum"))
    assert "binning='soft'" in repr(module)
    with pytest.raises(TypeError, match="ACELoss: unknown option 'num_bins', wanted some of n_bins"):
        calseg.ACELoss(num_bins=3)
