"""Tests of calibration errors of binary predictions and against soft labels."""

from __future__ import annotations

import math

import pytest
import torch
from cases import FLOATS, assert_same_bins, id_of, labels, scores
from test_calibration import NORMS, every_kind, probabilities
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

import calseg
from calseg import calibration_bins, calibration_error

UNIT = 2**24


def soft_labels(*shape: int, raters: int = 3, seed: int = 1) -> Tensor:
    """Return the shares of raters, float64 ``[N, C, *S]``."""
    maps = torch.randint(0, shape[1], (raters, shape[0], *shape[2:]), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.one_hot(maps, shape[1]).double().mean(0).movedim(-1, 1)


def same(first: calseg.CalibrationBins, second: calseg.CalibrationBins) -> bool:
    return all(map(torch.equal, first, second))


def test_keywords_are_those_of_torchmetrics():
    x, target = scores(2, 3, 40), labels((2, 3, 40))
    wanted = calibration_error(x, target)
    assert torch.equal(calibration_error(preds=x, target=target), wanted)
    assert torch.equal(calibration_error(input=x, target=target), wanted)
    assert same(calibration_bins(preds=x, target=target), calibration_bins(input=x, target=target))
    with pytest.raises(TypeError, match="input"):
        calibration_bins(preds=x, input=x, target=target)


# ---- binary predictions ----


@every_kind
@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
def test_binary_predictions_are_those_of_two_classes(backend, dtype, kind):
    x, target = scores(2, 7, 9).to(dtype), labels((2, 2, 7, 9), ignore_index=-100)
    two, options = torch.stack([torch.zeros_like(x), x], 1), {"backend": backend, "per_item": True, **kind}
    wanted = calibration_bins(two, target, **options)
    assert same(calibration_bins(x, target, **options), wanted)
    assert same(calibration_bins(x[:, None], target[:, None], **options), wanted)
    assert int(wanted.num_voxels.sum()) < target.numel()
    wide = torch.sigmoid(x.double()).to(dtype).to(torch.promote_types(dtype, torch.float32))
    wanted = calibration_bins(torch.stack([1 - wide, wide], 1), target, from_logits=False, **options)
    assert same(calibration_bins(wide.to(dtype), target, from_logits=False, **options), wanted)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_binary_error_of_torchmetrics(backend, norm):
    p, target = torch.sigmoid(scores(2, 11, 13, dtype=torch.float32)), labels((2, 2, 11, 13))
    wanted = binary_calibration_error(p, target, n_bins=15, norm=norm)
    got = calibration_error(
        p, target, norm=norm, from_logits=False, class_wise=True, include_background=False, backend=backend
    )
    torch.testing.assert_close(got, wanted.double(), rtol=1e-5, atol=1e-6)


def test_rows_of_binary_predictions():
    p, target = torch.tensor([0.9, 0.2, 0.7]), torch.tensor([1, 1, 0])
    bins = calibration_bins(p, target, n_bins=10, from_logits=False)
    assert bins.count.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert bins.hits.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert float(bins.mean_nll()) == pytest.approx(-(math.log(0.9) + math.log(0.2) + math.log(0.3)) / 3, abs=1e-6)
    assert same(calibration_bins(p[:, None], target[:, None], n_bins=10, from_logits=False), bins)


def test_wrong_binary_labels(backend):
    p = torch.full((2, 3, 4), 0.5)
    target = torch.zeros(2, 3, 4, dtype=torch.int64)
    target[1, 2, 3] = 2
    with pytest.raises(IndexError, match=r"target\[1, 2, 3\] is 2: wanted a class in \[0, 2\)"):
        calibration_bins(p, target, from_logits=False, backend=backend)
    with pytest.raises(ValueError, match=r"preds\[0, :, 0, 1\] sums to 1, its smallest is -0.5: wanted probabilities"):
        calibration_bins(torch.full((2, 3, 4), 1.5), torch.where(target == 0, target, 1), from_logits=False,
                         mask=torch.arange(4).expand(2, 3, 4) > 0, backend=backend)  # fmt: skip
    one_hot = torch.nn.functional.one_hot(torch.zeros(2, 4, dtype=torch.int64), 3).movedim(-1, 1)
    with pytest.raises(ValueError, match=r"target: got one-hot labels.*wanted class indices"):
        calibration_bins(p, one_hot, from_logits=False, backend=backend)
    calibration_bins(p[:, None], one_hot[:, None], from_logits=False, backend=backend)


# ---- soft labels ----


@every_kind
@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("region", ["all", "near", "foreground"])
def test_one_hot_soft_labels_give_the_numbers_of_the_labels(kind, from_logits, region):
    shape = (2, 4, 7, 9)
    x, target = (scores(*shape) if from_logits else probabilities(*shape, dtype=torch.float64)), labels(shape)
    target = target * (torch.rand(target.shape, generator=torch.Generator().manual_seed(0)) < 0.03)
    hot = torch.nn.functional.one_hot(target, 4).movedim(-1, 1)
    mask = torch.rand(target.shape, generator=torch.Generator().manual_seed(2)) < 0.8
    options = {"from_logits": from_logits, "mask": mask, "per_item": True, "region": region, "radius": 1, **kind}
    wanted = calibration_bins(x, target, backend="reference", **options)
    for dtype in FLOATS:
        got = calibration_bins(x, hot.to(dtype), **options)
        assert same(got, wanted)
        assert not got.partial_hits.any()
    assert_same_bins(calibration_bins(x, target, **options), wanted, units=8)


@pytest.mark.parametrize("right_closed", [False, True])
@pytest.mark.parametrize("class_wise", [False, True])
def test_soft_labels_by_the_formulas(class_wise, right_closed):
    """Go through the voxels one by one. A hit is the share of the raters who chose the class."""
    shape, n_bins = (2, 3, 5, 7), 6
    p, soft = probabilities(*shape, dtype=torch.float64), soft_labels(*shape)
    bins = calibration_bins(p, soft, n_bins=n_bins, from_logits=False, class_wise=class_wise, right_closed=right_closed)
    kinds = range(3) if class_wise else range(1)
    count, confidence, hits = ([[0.0] * n_bins for _ in kinds] for _ in range(3))
    nll = brier = 0.0
    for row, shares in zip(
        p.movedim(1, -1).reshape(-1, 3).tolist(), soft.movedim(1, -1).reshape(-1, 3).tolist(), strict=True
    ):
        for kind in kinds:
            c = kind if class_wise else row.index(max(row))
            b = math.ceil(row[c] * n_bins) - 1 if right_closed else math.floor(row[c] * n_bins)
            count[kind][b] += 1
            confidence[kind][b] += row[c]
            hits[kind][b] += shares[c]
        nll -= sum(y * math.log(q) for q, y in zip(row, shares, strict=True))
        brier += sum((q - y) ** 2 for q, y in zip(row, shares, strict=True))
    pick = (lambda sums: torch.tensor(sums)) if class_wise else (lambda sums: torch.tensor(sums[0]))  # fmt: skip
    assert torch.equal(bins.count.float(), pick(count))
    torch.testing.assert_close(bins.all_hits().float(), pick(hits), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(bins.confidence.double() / UNIT, pick(confidence).double(), rtol=1e-6, atol=1e-5)
    voxels = int(bins.num_voxels)
    assert float(bins.mean_nll()) == pytest.approx(nll / voxels, abs=1e-7)
    assert float(bins.mean_brier()) == pytest.approx(brier / voxels, abs=1e-7)
    wanted = [
        sum(abs(c - h) for c, h in zip(*sums, strict=True)) / voxels for sums in zip(confidence, hits, strict=True)
    ]
    got = calibration_error(p, soft, n_bins=n_bins, from_logits=False, class_wise=class_wise, right_closed=right_closed)
    assert float(got) == pytest.approx(sum(wanted) / len(wanted), abs=1e-7)


@pytest.mark.parametrize("norm", NORMS)
@every_kind
def test_the_error_to_the_shares_is_that_of_all_raters_together(norm, kind):
    """Every confidence meets the same raters, so the bins of all of their maps have the same means.

    Without the background, the majority decides what is counted.
    """
    if kind == {"include_background": False}:
        return
    shape, generator = (2, 3, 6, 8), torch.Generator().manual_seed(0)
    x = scores(*shape)
    maps = torch.randint(0, 3, (4, 2, 6, 8), generator=generator)
    soft = torch.nn.functional.one_hot(maps, 3).float().mean(0).movedim(-1, 1)
    together = calibration_bins(x, maps[0], **kind)
    for one in maps[1:]:
        together = together.merge(calibration_bins(x, one, **kind))
    wanted = calseg.calibration_error_from_bins(together, norm)
    bins = calibration_bins(x, soft, **kind)
    torch.testing.assert_close(calseg.calibration_error_from_bins(bins, norm), wanted, rtol=0, atol=1e-7)
    torch.testing.assert_close(bins.mean_nll(), together.mean_nll(), rtol=0, atol=1e-6)
    error = calibration_error(x, soft, norm=norm, **kind)
    torch.testing.assert_close(error, wanted.mean() if kind.get("class_wise") else wanted, rtol=0, atol=1e-7)


def test_shares_of_the_foreground():
    """One channel of floats is the share of the raters who chose the foreground."""
    p, share = probabilities(2, 2, 5, 6)[:, :1], soft_labels(2, 2, 5, 6)[:, :1]
    wanted = calibration_bins(torch.cat([1 - p, p], 1), torch.cat([1 - share, share], 1), from_logits=False)
    assert same(calibration_bins(p, share, from_logits=False), wanted)
    assert wanted.partial_hits.any()


def test_soft_labels_merge_and_split():
    x, soft = scores(4, 3, 5, 6), soft_labels(4, 3, 5, 6)
    whole = calibration_bins(x, soft)
    items = calibration_bins(x, soft, per_item=True)
    parts = [calibration_bins(x[part], soft[part]) for part in (slice(0, 1), slice(1, 4))]
    assert same(parts[0] + parts[1], whole)
    assert same(items.pool(), whole)
    hard = calibration_bins(x, labels((4, 3, 5, 6)))
    assert torch.equal((whole + hard).all_hits(), whole.all_hits() + hard.all_hits())


def test_a_class_without_share_costs_nothing():
    """The product of the share 0 and the logarithm of 0 is 0. A share above 0 of a class of probability 0 is not."""
    p = torch.tensor([[0.5, 0.5, 0.0]])
    bins = calibration_bins(p, torch.tensor([[0.5, 0.5, 0.0]]), from_logits=False)
    assert float(bins.mean_nll()) == pytest.approx(math.log(2), abs=1e-7)
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert float(calibration_bins(logits, torch.tensor([[0.5, 0.5, 0.0]])).mean_nll()) == pytest.approx(
        math.log(2), abs=1e-7
    )
    bins = calibration_bins(p, torch.tensor([[0.5, 0.25, 0.25]]), from_logits=False)
    assert int(bins.num_infinite) == 1


def test_wrong_soft_labels():
    x, soft = scores(2, 3, 4, 5, dtype=torch.float32), soft_labels(2, 3, 4, 5).float()
    wrong = soft.clone()
    wrong[1, 0, 3, 4] += 0.01
    with pytest.raises(ValueError, match=r"target\[1, :, 3, 4\] sums to 1.01, .*wanted soft labels.*sum to 1"):
        calibration_bins(x, wrong)
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    mask[1, 3, 4] = False
    calibration_bins(x, wrong, mask=mask)  # what does not count is not checked
    wrong = torch.tensor([[1.1, -0.1]])
    with pytest.raises(ValueError, match=r"target\[0, :\] sums to 1, its smallest is -0.1"):
        calibration_bins(torch.zeros(1, 2), wrong)
    with pytest.raises(ValueError, match=r"target\[0, :\] sums to nan"):
        calibration_bins(torch.zeros(1, 2), torch.full((1, 2), torch.nan))
    with pytest.raises(ValueError, match=r"target: got a float32 tensor.*wanted shape \[2, 4, 5\]"):
        calibration_bins(x, soft[:, :2])
    with pytest.raises(ValueError, match="backend: got 'gpu'"):
        calibration_bins(x, soft, backend="gpu")
