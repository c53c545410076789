"""Tests of the scores of the calibration experiment: their sums over cases, and their values on pooled voxels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nibabel")
pytest.importorskip("monai")

FOLDER = Path(__file__).parents[1] / "benchmarks" / "calibration"
if not FOLDER.is_dir():
    pytest.skip("needs the checkout's benchmarks", allow_module_level=True)
sys.path.insert(0, str(FOLDER))
import figures  # noqa: E402
import run  # noqa: E402
import scores  # noqa: E402

sys.path.remove(str(FOLDER))
import calseg  # noqa: E402
from calseg.bootstrap import case_weights  # noqa: E402
from calseg.calibration import UNIT  # noqa: E402
from calseg.scores import CaseScores, ClassCounts  # noqa: E402
from calseg.volumes.datasets import IGNORE_INDEX  # noqa: E402


def cases() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for size in (300, 500, 200):
        truth = torch.softmax(2 * torch.randn(3, size, generator=generator), 0)
        label = torch.multinomial(truth.T, 1, generator=generator)[:, 0].to(torch.int16)
        label[::7] = IGNORE_INDEX
        made.append((1.5 * truth.log(), label, truth))
    return made


def sums() -> list[CaseScores]:
    return [CaseScores.of(logits.double(), label, truth=truth) for logits, label, truth in cases()]


def test_scores_are_those_of_the_pooled_voxels() -> None:
    made = cases()
    result = scores.summarise(sums())
    assert list(result) == list(scores.TITLES) == list(scores.DESCRIPTIONS)
    logits, label, truth = (torch.cat(parts, -1) for parts in zip(*made, strict=True))
    x, y = logits[None].double(), label[None]
    for prefix, options in (("", {}), ("fg_", {"include_background": False})):
        bins = calseg.calibration_bins(x, y, **options)
        assert result[f"{prefix}nll"] == pytest.approx(float(bins.mean_nll()), rel=1e-6)
        assert result[f"{prefix}brier"] == pytest.approx(float(bins.mean_brier()), rel=1e-6)
        assert result[f"{prefix}ece"] == pytest.approx(float(calseg.calibration_error(x, y, **options)), rel=1e-6)
    classes = float(calseg.calibration_error(x, y, class_wise=True).mean())
    assert result["cw_ece"] == pytest.approx(classes, rel=1e-6)
    dice = []
    for a, b, _ in made:
        for number in (1, 2):
            mine, true = (a.argmax(0) == number) & (b != IGNORE_INDEX), b == number
            dice.append(2 * int((mine & true).sum()) / int(mine.sum() + true.sum()))
    assert result["dice"] == pytest.approx(np.mean(dice))
    # Against the truth, voxel by voxel.
    gaps, disputed, error = np.zeros(15), 0, 0.0
    for p, t in zip(torch.softmax(logits, 0).T[label != IGNORE_INDEX], truth.T[label != IGNORE_INDEX], strict=True):
        gaps[min(int(float(p.max()) * 15), 14)] += float(p.max() - t[p.argmax()])
        disputed += float(t[0]) < 0.99
        error += float((p - t).abs().mean()) * (float(t[0]) < 0.99)
    assert result["truth_ece"] == pytest.approx(np.abs(gaps).sum() / int((label != IGNORE_INDEX).sum()), rel=1e-4)
    assert result["truth_error"] == pytest.approx(error / disputed, rel=1e-4)


def test_weights_count_cases() -> None:
    made = sums()
    weights = torch.tensor([[1, 1, 1], [2, 0, 1]])
    result = scores.summarise(made, weights)
    for row, members in ((0, made), (1, [made[0], made[0], made[2]])):
        for key, value in scores.summarise(members).items():
            assert float(result[key][row]) == pytest.approx(value, rel=1e-12)
    drawn = case_weights(3, 50)
    assert drawn.shape == (50, 3)
    assert (drawn.sum(1) == 3).all()


def with_dice(case: CaseScores, dice: Sequence[float]) -> CaseScores:
    """Return the case with counts that give this Dice."""
    total = torch.full((len(dice),), 1000)
    hits = torch.tensor([round(1000 * value) for value in dice])
    return case._replace(counts=ClassCounts(hits, total, total))


def test_differences_from_cross_entropy_are_paired_over_cases_and_seeds() -> None:
    """A method that is better by the same amount in every case has an interval without width."""
    base = [[with_dice(case, (0.0, 0.7, 0.4 + 0.1 * number)) for number, case in enumerate(sums())] for _ in range(2)]
    base[1][0] = with_dice(base[1][0], (0.0, 0.9, 0.1))

    def better(case: CaseScores) -> CaseScores:
        bins = case.bins["all"]
        lower = torch.stack([bins.nll[0], bins.nll[1] - round(0.1 * UNIT) * bins.num_voxels])
        changed = case._replace(bins={**case.bins, "all": bins._replace(nll=lower)})
        return with_dice(changed, [value + 0.05 for value in case.counts.dice().tolist()])

    tested = {"cross_entropy": base, "calseg": [[better(case) for case in seed] for seed in base]}
    result = run.report({"calseg": {"settings": {"alpha": 0.5}}}, tested, {"calseg": [1.25, 1.5]})
    assert "minus_cross_entropy" not in result["cross_entropy"]["scores"]["dice"]
    for key, wanted in (("dice", 0.05), ("nll", -0.1), ("fg_ece", 0.0)):
        mine, theirs = (result[method]["scores"][key] for method in ("calseg", "cross_entropy"))
        assert mine["mean"] - theirs["mean"] == pytest.approx(wanted)
        assert mine["minus_cross_entropy"]["mean"] == pytest.approx(wanted)
        assert mine["minus_cross_entropy"]["interval"] == pytest.approx([wanted, wanted])
        assert theirs["interval"][1] > theirs["interval"][0]  # the score itself varies with the cases
        assert theirs["mean"] == pytest.approx(np.mean(theirs["seeds"]))
    row = figures.table({"test": result}).splitlines()[-1]
    assert row.startswith("| CALSeg, chosen | alpha 0.5; fitted temperatures 1.25, 1.50 |")
    assert "| +.050 (+.050 to +.050) | -.1000 (-.1000 to -.1000) |" in row


def test_curves_pool_what_the_error_sums() -> None:
    seeds = [sums()] * 2
    result = scores.summarise(seeds[0])
    for name, error, voxels in (
        ("fg_curve", "fg_ece", sum(int(case.bins["foreground"].num_voxels) for case in seeds[0])),
        ("disputed_curve", "disputed_ece", sum(int(case.truth["disputed"].num_voxels()) for case in seeds[0])),
    ):
        curve = scores.curves(seeds)[name]
        assert sum(curve["voxels"]) == 2 * voxels
        gaps = [
            count * abs(confidence - frequency)
            for count, confidence, frequency in zip(*curve.values(), strict=True)
            if count
        ]
        assert sum(gaps) / sum(curve["voxels"]) == pytest.approx(result[error], rel=1e-6)
