"""The binned reduction, and the calibration errors made of it."""

from __future__ import annotations

import pytest
import torch
from cases import labels, scores
from naive import calibration_sums, softmax
from torchmetrics.functional.classification import multiclass_calibration_error

import calseg
from calseg.reference import CONFIDENCE_UNIT

NORMS = ("l1", "l2", "max", "average")


@pytest.mark.parametrize("class_wise", [False, True])
@pytest.mark.parametrize("right_closed", [False, True])
def test_naive(backend, class_wise, right_closed):
    """float64, against the formulas voxel by voxel: counts exactly, sums to their unit."""
    shape, n_bins = (2, 4, 7, 9), 10
    x, target = scores(*shape), labels(shape)
    rows, truth = x.movedim(1, -1).reshape(-1, 4).tolist(), target.flatten().tolist()
    sums, nll, brier = calibration_sums(
        [softmax(row) for row in rows], truth, n_bins, class_wise=class_wise, right_closed=right_closed
    )
    bins = calseg.calibration_bins(
        x, target, n_bins=n_bins, class_wise=class_wise, right_closed=right_closed, backend=backend
    )
    wanted = torch.tensor(sums if class_wise else sums[0])
    assert torch.equal(bins.count, wanted[..., 0].long())
    assert torch.equal(bins.hits, wanted[..., 2].long())
    torch.testing.assert_close(bins.confidence / CONFIDENCE_UNIT, wanted[..., 1].float(), rtol=0, atol=126 * 2**-24)
    assert abs(float(bins.mean_nll()) - nll / len(rows)) < 2**-27
    assert abs(float(bins.mean_brier()) - brier / len(rows)) < 2**-27


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("C", [2, 5])
def test_torchmetrics(backend, norm, C):
    """Where torchmetrics is right, and defines the same: pooled, top-label, small."""
    x, target = scores(2, C, 11, 13, dtype=torch.float32), labels((2, C, 11, 13), ignore_index=-1)
    for n_bins in (1, 10, 15, 20):
        wanted = multiclass_calibration_error(x, target, C, n_bins=n_bins, norm=norm, ignore_index=-1)
        got = calseg.calibration_error(x, target, n_bins=n_bins, norm=norm, ignore_index=-1, backend=backend)
        torch.testing.assert_close(got, wanted.double(), rtol=1e-5, atol=1e-6)
