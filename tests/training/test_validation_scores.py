"""Tests of the scores of validation cases in a run, against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from calseg.scores import MAIN_STATISTICS, CaseScores, count_classes, values_of
from calseg.volumes.datasets import IGNORE_INDEX


def test_scores_against_a_loop_over_voxels() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 2, (4, 7, 8, 9)).astype(np.float32))
    label = torch.from_numpy(rng.integers(0, 4, (7, 8, 9)).astype(np.int16))
    label[rng.random((7, 8, 9)) < 0.2] = IGNORE_INDEX
    parts = [CaseScores.of(logits[:, part], label[part], class_wise=False) for part in (slice(3), slice(3, None))]
    scores = parts[0] + parts[1]
    result = values_of(scores.bins, MAIN_STATISTICS)

    p = np.exp(logits.double().numpy().reshape(4, -1).T)
    p /= p.sum(1, keepdims=True)
    for region, wanted in (("all", lambda y: y >= 0), ("foreground", lambda y: y > 0)):
        nll, brier, gaps, count = 0.0, 0.0, np.zeros(15), 0
        for voxel, y in zip(p, label.numpy().ravel(), strict=True):
            if wanted(y):
                count += 1
                nll -= math.log(voxel[y])
                brier += sum((voxel[c] - (c == y)) ** 2 for c in range(4))
                gaps[min(int(voxel.max() * 15), 14)] += voxel.max() - (voxel.argmax() == y)
        assert scores.bins[region].num_voxels == count
        expected = {"nll": nll / count, "brier": brier / count, "ece": np.abs(gaps).sum() / count}
        assert result[region] == pytest.approx(expected, rel=1e-6)  # float32 probabilities


def test_scores_of_certain_and_of_no_predictions() -> None:
    def of(logits: torch.Tensor, label: torch.Tensor) -> dict[str, dict[str, float | None]]:
        return values_of(CaseScores.of(logits, label, n_bins=10, class_wise=False).bins, MAIN_STATISTICS)

    logits = torch.tensor([[200.0, 200.0], [-200.0, -200.0]])  # confidence 1: the last bin
    assert of(logits, torch.tensor([0, 0]))["foreground"] == {"nll": None, "brier": None, "ece": None}
    scores = of(logits, torch.tensor([0, 1]))
    assert scores["all"] == {"nll": 200.0, "brier": 1.0, "ece": 0.5}
    assert scores["foreground"] == {"nll": 400.0, "brier": 2.0, "ece": 1.0}


def test_dice_per_class() -> None:
    label = torch.tensor([0, 1, 1, 1, IGNORE_INDEX, 0], dtype=torch.int16)
    prediction = torch.tensor([1, 1, 1, 0, 1, 2])
    dice = count_classes(prediction, label, 4, ignore_index=IGNORE_INDEX).dice().tolist()
    assert dice[1:3] == [2 * 2 / (3 + 3), 0.0]
    assert math.isnan(dice[3])
