"""The scores of the calibration experiment: they add up over cases, and are calseg's own on the pooled voxels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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
from calseg.data import IGNORE_INDEX  # noqa: E402


def cases() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for size in (300, 500, 200):
        truth = torch.softmax(2 * torch.randn(3, size, generator=generator), 0)
        label = torch.multinomial(truth.T, 1, generator=generator)[:, 0].to(torch.int16)
        label[::7] = IGNORE_INDEX
        made.append((1.5 * truth.log(), label, truth))
    return made


def test_scores_are_those_of_the_pooled_voxels() -> None:
    made = cases()
    result = scores.summarise([scores.score_case(*case) for case in made])
    logits, label, truth = (torch.cat(parts, -1) for parts in zip(*made, strict=True))
    x, y = logits[None].double(), label[None]
    for prefix, options in (("", {}), ("fg_", {"include_background": False})):
        bins = calseg.calibration_bins(x, y, **options)
        assert result[f"{prefix}nll"] == pytest.approx(float(bins.mean_nll()), rel=1e-6)
        assert result[f"{prefix}brier"] == pytest.approx(float(bins.mean_brier()), rel=1e-6)
        assert result[f"{prefix}ece"] == pytest.approx(float(calseg.calibration_error(x, y, **options)), rel=1e-6)
    classes = float(calseg.calibration_error(x, y, class_wise=True).mean())
    assert result["cw_ece"] == pytest.approx(classes, rel=1e-6)
    dice = [calseg.training.dice_per_class(a.argmax(0), b, 3) for a, b, _ in made]
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
    sums = [scores.score_case(*case) for case in cases()]
    weights = np.array([[1.0, 1, 1], [2, 0, 1]])
    result = scores.summarise(sums, weights)
    for row, members in ((0, sums), (1, [sums[0], sums[0], sums[2]])):
        for key, value in scores.summarise(members).items():
            assert result[key][row] == pytest.approx(value, rel=1e-12)
    drawn = scores.resamples(3, 50)
    assert drawn.shape == (50, 3)
    assert (drawn.sum(1) == 3).all()


def test_differences_from_cross_entropy_are_paired_over_cases_and_seeds() -> None:
    """A method that is better by the same amount in every case has an interval without width."""
    base = [[scores.score_case(*case) for case in cases()] for _ in range(2)]
    base[1][0] = {**base[1][0], "dice": [0.9, 0.1]}

    def better(sums: dict[str, Any]) -> dict[str, Any]:
        return {**sums, "dice": [value + 0.05 for value in sums["dice"]], "nll": sums["nll"] - 0.1 * sums["voxels"]}

    tested = {"cross_entropy": base, "calseg": [[better(sums) for sums in seed] for seed in base]}
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
    seeds = [[scores.score_case(*case) for case in cases()]] * 2
    result = scores.summarise(seeds[0])
    for name, error, voxels in (
        ("fg_curve", "fg_ece", sum(case["fg_voxels"] for case in seeds[0])),
        ("disputed_curve", "disputed_ece", sum(case["disputed_voxels"] for case in seeds[0])),
    ):
        curve = scores.curves(seeds)[name]
        assert sum(curve["voxels"]) == 2 * voxels
        gaps = [
            count * abs(confidence - frequency)
            for count, confidence, frequency in zip(*curve.values(), strict=True)
            if count
        ]
        assert sum(gaps) / sum(curve["voxels"]) == pytest.approx(result[error], rel=1e-6)
