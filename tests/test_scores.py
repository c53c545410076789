"""Tests of calseg.scores: sums of slabs and blocks, JSON, Dice, and the table of statistics."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from calseg import calibration_error, near_foreground, scores
from calseg.bootstrap import case_weights, weighted_sums
from calseg.calibration import calibration_bins
from calseg.regions import REGIONS
from calseg.scores import (
    MAIN_STATISTICS,
    STATISTICS,
    TRUTH_REGIONS,
    TRUTH_STATISTICS,
    CaseScores,
    ClassCounts,
    count_classes,
    stack,
    summarise,
    truth_bins,
    values_of,
)

IGNORE = -100


def volume(seed: int = 0, shape: tuple[int, ...] = (13, 6, 5), classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits and true probabilities ``[C, *S]``, and labels ``[*S]``, some of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.softmax(3 * torch.randn(classes, *shape, generator=generator), 0)
    label = torch.multinomial(truth.flatten(1).T, 1, generator=generator).reshape(shape).to(torch.int16)
    label.view(-1)[::4] = IGNORE
    logits = 1.3 * truth.log() + 0.5 * torch.randn(truth.shape, generator=generator)
    return logits, label, truth


def assert_same(mine: CaseScores, theirs: CaseScores) -> None:
    assert mine.to_json() == theirs.to_json()


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("shape", [(13, 6, 5), (40, 7, 1), (97,)])
def test_blocks_and_slabs_add_up_to_the_whole(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], from_logits: bool
) -> None:
    x, y, t = volume(shape=shape)
    x = x if from_logits else torch.softmax(x, 0)
    x[:, 5] = math.nan
    options: dict[str, Any] = {"from_logits": from_logits, "n_bins": 7}
    whole = CaseScores.of(x, y, truth=t, **options)
    assert int(whole.bins["all"].num_nan) > 0
    for size in (1, 500, 1 << 30):
        monkeypatch.setattr(scores, "BLOCK_BYTES", size)
        assert_same(CaseScores.of(x, y, truth=t, **options), whole)
    near = near_foreground(y[None])[0]
    parts = [
        CaseScores.of(x[:, part], y[part], near=near[part], truth=t[:, part], **options)
        for part in (slice(0, 4), slice(4, None))
    ]
    assert_same(parts[0] + parts[1], whole)
    # Axes in another order in memory, as files have them.
    turned = CaseScores.of(x.transpose(0, -1).contiguous().transpose(0, -1), y, truth=t, **options)
    assert_same(turned, whole)


def test_a_block_is_read_once_for_all_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, _ = volume()
    seen: list[tuple[int, int]] = []

    def bins(scores: Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append((scores.data_ptr(), scores.shape[2]))
        return calibration_bins(scores, *arguments, **options)

    monkeypatch.setattr(scores, "calibration_bins", bins)
    monkeypatch.setattr(scores, "BLOCK_BYTES", 3 * x[:, 0].numel() * x.element_size())
    CaseScores.of(x, y)
    starts = [start for start, _ in seen]
    assert [size for _, size in seen] == [3] * 24 + [1] * 6  # six kinds of bins of a block before the next block
    assert starts == sorted(starts)
    seen.clear()
    CaseScores.of(x, y, class_wise=False)
    assert len(seen) == 15


def test_sums_are_those_of_the_operations() -> None:
    x, y, _ = volume()
    y[:6] = 0
    case = CaseScores.of(x, y, n_bins=9)
    assert (
        int(case.bins["foreground"].num_voxels) < int(case.bins["near"].num_voxels) < int(case.bins["all"].num_voxels)
    )
    batch = x[None], y[None]
    for name, options in {
        "near": {"region": "near"},
        "all": {},
        "foreground": {"region": "foreground"},
        "near_classes": {"class_wise": True, "region": "near"},
        "all_classes": {"class_wise": True},
        "foreground_classes": {"class_wise": True, "mask": y[None] > 0},
    }.items():
        wanted = calibration_bins(*batch, n_bins=9, **options)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(case.bins[name], wanted, strict=True))
    assert list(case.bins) == [*REGIONS, *(f"{region}_classes" for region in REGIONS)]
    assert case.truth == {}


def test_other_conventions_are_added_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, _ = volume()

    def fine(scores: Tensor, label: Tensor) -> Any:
        return calibration_bins(scores, label, n_bins=40, per_item=True)

    monkeypatch.setattr(scores, "BLOCK_BYTES", 1)
    case = CaseScores.of(x, y, conventions={"fine": fine})
    assert all(torch.equal(a, b[0]) for a, b in zip(case.bins["fine"], fine(x[None], y[None]), strict=True))


def test_json_round_trip() -> None:
    x, y, t = volume()
    for truth in (None, t):
        case = CaseScores.of(x, y, truth=truth)
        content = json.loads(json.dumps(case.to_json()))
        again = CaseScores.from_json({"case": "another entry", **content})
        assert_same(again, case)
        assert_same(again + again, case + case)
        assert again.bins["all"].count.dtype == torch.int64
        assert ("truth" in content) == (truth is not None)


def test_an_empty_volume() -> None:
    case = CaseScores.of(torch.zeros(3, 0, 4), torch.zeros(0, 4, dtype=torch.int64), truth=torch.zeros(3, 0, 4))
    assert int(case.bins["all"].num_voxels) == int(case.truth["all"].num_voxels()) == 0
    assert values_of(case.bins) == {region: dict.fromkeys(STATISTICS) for region in REGIONS}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_dice_is_the_plain_formula(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    prediction, label = (torch.randint(0, 4, (11, 9), generator=generator) for _ in range(2))
    label[0] = 255
    counts = count_classes(prediction, label.to(dtype), 5, ignore_index=255)
    counted = label != 255
    for number, value in enumerate(counts.dice().tolist()):
        mine, true = (prediction == number) & counted, (label == number) & counted
        total = int(mine.sum()) + int(true.sum())
        assert value == 2 * int((mine & true).sum()) / total if total else math.isnan(value)
    assert math.isnan(counts.dice()[4])
    assert torch.equal((counts + counts).dice()[:4], counts.dice()[:4])
    assert ClassCounts(*(torch.stack([each, each]) for each in counts)).dice().shape == (2, 5)


def test_a_voxel_with_nan_is_in_no_count() -> None:
    x, y, t = volume()
    case = CaseScores.of(x, y, truth=t)
    spoilt = x.clone()
    spoilt[1, 2] = math.nan
    without = y.clone()
    without[2] = IGNORE
    mine, theirs = CaseScores.of(spoilt, y, truth=t), CaseScores.of(x, without, truth=t)
    assert mine.counts.dice().tolist() == theirs.counts.dice().tolist() != case.counts.dice().tolist()
    assert mine.to_json()["truth"] == theirs.to_json()["truth"]


def test_truth_is_the_arithmetic_of_the_voxels() -> None:
    x, y, t = volume()
    t[:, :3] = torch.tensor([1.0, 0.0, 0.0])[:, None, None, None]
    case = CaseScores.of(x, y, truth=t)
    counted = (y != IGNORE).flatten()
    p, q = torch.softmax(x.double(), 0).flatten(1)[:, counted], t.double().flatten(1)[:, counted]
    for region, inside in {"all": torch.ones_like(q[0], dtype=torch.bool), "disputed": q[0] < 0.99}.items():
        mine, true = p[:, inside], q[:, inside]
        gaps = [0.0] * 15
        for confidence, share in zip(mine.amax(0), true.gather(0, mine.argmax(0)[None])[0], strict=True):
            gaps[min(int(confidence * 15), 14)] += float(confidence - share)
        wanted = {
            "ece": sum(map(abs, gaps)) / mine.shape[1],
            "brier": (mine - true).square().sum(0).mean(),
            "absolute_error": (mine - true).abs().mean(),
        }
        assert set(wanted) == set(TRUTH_STATISTICS)
        for name, value in wanted.items():
            assert float(TRUTH_STATISTICS[name].function(case.truth[region])) == pytest.approx(float(value), abs=1e-7)
    assert int(case.truth["all"].num_voxels()) == int(counted.sum()) > int(case.truth["disputed"].num_voxels()) > 0
    alone = truth_bins(torch.softmax(x, 0), t, y != IGNORE, from_logits=False)
    assert torch.equal(alone["all"].count, case.truth["all"].count)
    assert list(alone) == list(case.truth) == list(TRUTH_REGIONS)


def test_a_perfect_prediction_has_no_distance_to_the_truth() -> None:
    _, _, t = volume()
    for bins in truth_bins(t.log(), t).values():
        for statistic in TRUTH_STATISTICS.values():
            assert float(statistic.function(bins)) == pytest.approx(0, abs=1e-6)


def test_statistics_are_named_and_take_many_cases_at_once() -> None:
    cases = [CaseScores.of(*volume(seed)[:2]) for seed in range(3)]
    together = stack(cases)
    titles = [statistic.title for statistic in STATISTICS.values()]
    assert all(titles)
    assert len(set(titles)) == len(titles)
    for region in REGIONS:
        for statistic in STATISTICS.values():
            values = statistic.function(together.bins[statistic.key(region)])
            assert values.shape == (3,)
            alone = [float(statistic.function(case.bins[statistic.key(region)])) for case in cases]
            assert values.tolist() == alone
    x, y, _ = volume(0)
    every = values_of(cases[0].bins)
    for name, norm in (("ece", "l1"), ("ace", "average"), ("mce", "max")):
        assert every["all"][name] == float(calibration_error(x[None], y[None], norm=norm))
    assert every["all"]["class_wise_ece"] == float(calibration_error(x[None], y[None], class_wise=True).mean())


def test_summary_of_a_training_run() -> None:
    names = ("background", "liver", "tumour", "cyst")
    cases = {}
    for seed in range(3):
        logits, label, _ = volume(seed)
        logits = torch.cat([logits, torch.full_like(logits[:1], -50.0)])
        cases[f"case_{seed}"] = CaseScores.of(logits, label, class_wise=False)
    result = summarise(cases, names)
    assert list(result) == ["dice", "dice_mean", "voxels", *REGIONS, "cases"]
    assert result["dice"]["cyst"] is None
    assert list(result["dice"]) == list(names[1:])
    per_case = [row["liver"] for row in result["cases"].values()]
    assert result["dice"]["liver"] == sum(per_case) / 3
    assert result["dice_mean"] == (result["dice"]["liver"] + result["dice"]["tumour"]) / 2
    total = cases["case_0"] + cases["case_1"] + cases["case_2"]
    for region in REGIONS:
        assert list(result[region]) == list(MAIN_STATISTICS)
        assert result["voxels"][region] == int(total.bins[region].num_voxels)
        for name, value in result[region].items():
            assert value == float(STATISTICS[name].function(total.bins[region]))
    json.dumps(result, allow_nan=False)


def test_a_summary_warns_of_nan() -> None:
    logits, label, _ = volume()
    logits[:, 1, 1] = math.nan
    with pytest.warns(RuntimeWarning, match="4 of .* voxels have a NaN probability and are left out"):
        summarise({"case": CaseScores.of(logits, label, class_wise=False)}, ("a", "b", "c"))


def test_weights_count_cases() -> None:
    cases = [CaseScores.of(*volume(seed)[:2]) for seed in range(3)]
    weights = torch.tensor([[1, 1, 1], [2, 0, 1]])
    bins = weighted_sums(stack(cases).bins["foreground"], weights)
    for row, members in ((0, (0, 1, 2)), (1, (0, 0, 2))):
        total = cases[members[0]] + cases[members[1]] + cases[members[2]]
        assert all(torch.equal(a[row], b) for a, b in zip(bins, total.bins["foreground"], strict=True))
    drawn = case_weights(3, 50)
    assert drawn.shape == (50, 3)
    assert drawn.dtype == torch.int64
    assert (drawn.sum(1) == 3).all()
    assert torch.equal(drawn, case_weights(3, 50))
    assert not torch.equal(drawn, case_weights(3, 50, seed=1))
    with pytest.raises(ValueError, match="cases: got 0"):
        case_weights(0)


def test_it_needs_nothing_of_the_extras() -> None:
    blocked = ("monai", "typer", "rich", "matplotlib", "nibabel", "torchmetrics")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import calseg.scores, calseg.bootstrap"
    code += "; assert not {'calseg.nets', 'calseg.training'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
