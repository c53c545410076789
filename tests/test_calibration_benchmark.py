"""Tests of the calibration experiment: its scores, its choice of settings, its result and its tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nibabel")
pytest.importorskip("monai")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parents[1] / "benchmarks" / "calibration"
if not FOLDER.is_dir():
    pytest.skip("needs the checkout's benchmarks", allow_module_level=True)
sys.path.insert(0, str(FOLDER))
import contenders  # noqa: E402
import datasets  # noqa: E402
import experiment  # noqa: E402
import figures  # noqa: E402
import markdown_tables as tables  # noqa: E402
import perfect_forecaster  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import scores  # noqa: E402

sys.path.remove(str(FOLDER))
import calseg  # noqa: E402
from calseg.bootstrap import case_weights  # noqa: E402
from calseg.calibration import UNIT  # noqa: E402
from calseg.files import read_json  # noqa: E402
from calseg.methods import METHODS  # noqa: E402
from calseg.scores import CaseScores, ClassCounts  # noqa: E402
from calseg.simulation import DemoConfig  # noqa: E402
from calseg.training.config import TrainConfig  # noqa: E402
from calseg.volumes.datasets import IGNORE_INDEX  # noqa: E402

REFERENCE = contenders.REFERENCE


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
    near = torch.cat([calseg.near_foreground(label[None], ignore_index=IGNORE_INDEX) for _, label, _ in made], -1)
    for prefix, mask in (("near_", near), ("", None), ("foreground_", y > 0)):
        bins = calseg.calibration_bins(x, y, mask=mask)
        error = calseg.calibration_error(x, y, mask=mask)
        assert result[f"{prefix}ece"] == pytest.approx(float(error), rel=1e-6)
        if prefix != "foreground_":
            assert result[f"{prefix}nll"] == pytest.approx(float(bins.mean_nll()), rel=1e-6)
            assert result[f"{prefix}brier"] == pytest.approx(float(bins.mean_brier()), rel=1e-6)
    dice = []
    for a, b, _ in made:
        for number in (1, 2):
            mine, true = (a.argmax(0) == number) & (b != IGNORE_INDEX), b == number
            dice.append(2 * int((mine & true).sum()) / int(mine.sum() + true.sum()))
    assert result["dice"] == pytest.approx(np.mean(dice))
    # Against the truth, voxel by voxel.
    gaps, disputed, error = np.zeros(15), 0, 0.0
    for p, t in zip(torch.softmax(logits, 0).T[label != IGNORE_INDEX], truth.T[label != IGNORE_INDEX], strict=True):
        if float(t[0]) < 0.99:
            gaps[min(int(float(p.max()) * 15), 14)] += float(p.max() - t[p.argmax()])
            disputed += 1
            error += float((p - t).abs().mean())
    assert result["truth_ece"] == pytest.approx(np.abs(gaps).sum() / disputed, rel=1e-4)
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


def test_the_curve_near_the_foreground_pools_what_the_error_sums() -> None:
    seeds = [sums()] * 2
    curve = scores.near_curve(seeds)
    assert sum(curve["voxels"]) == 2 * sum(int(case.bins["near"].num_voxels) for case in seeds[0])
    gaps = [count * abs(mean - share) for count, mean, share in zip(*curve.values(), strict=True) if count]
    assert sum(gaps) / sum(curve["voxels"]) == pytest.approx(scores.summarise(seeds[0])["near_ece"], rel=1e-6)


# ------------------------------------------------------------------------------------------ contenders


def test_every_contender_has_settings_that_its_method_takes() -> None:
    assert next(iter(contenders.CONTENDERS)) == REFERENCE
    for contender in contenders.CONTENDERS.values():
        taken = {"dice_weight", *METHODS[contender.method].settings}
        for settings in contender.settings:
            assert set(settings) | set(contender.first_stage) <= taken
            TrainConfig(method=contender.method, **settings)
    assert set(METHODS) == {contender.method for contender in contenders.CONTENDERS.values()}
    assert set(figures.STYLES) == set(contenders.CONTENDERS)
    assert len(set(figures.STYLES.values())) == len(figures.STYLES)
    assert len({contender.title for contender in contenders.CONTENDERS.values()}) == len(contenders.CONTENDERS)
    assert {*figures.CURVES, *tables.FRONT} <= set(contenders.CONTENDERS)


@pytest.mark.parametrize("name", contenders.OTHERS)
def test_other_methods_are_trained_alone_and_with_dice(name: str) -> None:
    alone, with_dice = (contenders.CONTENDERS[f"{name}{ending}"] for ending in ("", "_dice"))
    for plain, beside in zip(alone.settings, with_dice.settings, strict=True):
        assert TrainConfig(method=name, **plain).dice_weight == 0
        assert dict(beside) == {**plain, "dice_weight": 1.0}
    published = TrainConfig(method=name)
    assert all(getattr(published, key) == value for key, value in alone.settings[0].items())


class Untrained(experiment.Experiment):
    """An experiment whose runs are named by their settings, and whose scores are given."""

    def __init__(self, given: dict[str, tuple[float, float]]) -> None:
        self.given, self.jobs = given, 0

    def trained(self, contender: contenders.Contender, settings: contenders.Settings, seed: int) -> Path:
        return Path(f"{contender.method}{contenders.words(settings)}")

    def scores(self, run: Path, part: str, scaled: str | None = None) -> Any:
        assert part == "tuning"
        return self.given[run.name]


def test_the_lowest_nll_near_the_foreground_wins_among_those_that_keep_the_dice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(experiment, "summarise", lambda pair: {"dice": pair[0], "near_nll": pair[1]})
    given = {
        "dice_cross_entropy": (0.8, 0.2),
        "focalgamma3": (0.7949, 0.1), "focalgamma2": (0.7951, 0.18), "focalgamma1": (0.81, 0.19),
        "nneither": (0.0, 0.0),
        "naclalpha0.1": (0.7, 0.15), "naclalpha0.05": (0.75, 0.16), "naclalpha0.2": (0.6, 0.14),
    }  # fmt: skip
    chosen = Untrained(given).tune([REFERENCE, "focal", "nacl"])
    assert chosen["focal"]["settings"] == {"gamma": 2.0}
    assert chosen["focal"]["keeps_dice"]
    assert [each["keeps_dice"] for each in chosen["focal"]["tried"]] == [False, True, True]
    assert chosen["nacl"]["settings"] == {"alpha": 0.2}  # none keeps the Dice
    assert not chosen["nacl"]["keeps_dice"]


# --------------------------------------------------------------------------------- differences and tables


def with_dice(case: CaseScores, dice: Sequence[float]) -> CaseScores:
    """Return the case with counts that give this Dice."""
    total = torch.full((len(dice),), 1000)
    hits = torch.tensor([round(1000 * value) for value in dice])
    return case._replace(counts=ClassCounts(hits, total, total))


def test_differences_from_the_reference_are_paired_over_cases_and_seeds(tmp_path: Path) -> None:
    """A method that is better by the same amount in every case has an interval without width."""
    base = [[with_dice(case, (0.0, 0.7, 0.4 + 0.1 * number)) for number, case in enumerate(sums())] for _ in range(2)]
    base[1][0] = with_dice(base[1][0], (0.0, 0.9, 0.1))

    def better(case: CaseScores) -> CaseScores:
        bins = case.bins["near"]
        lower = torch.stack([bins.nll[0], bins.nll[1] - round(0.1 * UNIT) * bins.num_voxels])
        changed = case._replace(bins={**case.bins, "near": bins._replace(nll=lower)})
        return with_dice(changed, [value + 0.05 for value in case.counts.dice().tolist()])

    seconds = {"first_stage": 40.2, "second_stage": 10.0}
    tested = {
        REFERENCE: experiment.Tested({}, base, [], {"second_stage": 9.0}),
        "calseg": experiment.Tested(
            {"dice_weight": 1.0}, [[better(case) for case in seed] for seed in base], [1.25, 1.5], seconds
        ),
    }
    result = report.report(tested, perfect=base[0])
    assert "minus_reference" not in result[REFERENCE]["scores"]["dice"]
    for key, wanted in (("dice", 0.05), ("near_nll", -0.1), ("near_ece", 0.0)):
        mine, theirs = (result[name]["scores"][key] for name in ("calseg", REFERENCE))
        assert mine["mean"] - theirs["mean"] == pytest.approx(wanted)
        assert mine["minus_reference"]["mean"] == pytest.approx(wanted)
        assert mine["minus_reference"]["interval"] == pytest.approx([wanted, wanted])
        assert theirs["interval"][1] > theirs["interval"][0]  # the score itself varies with the cases
        assert theirs["mean"] == pytest.approx(np.mean(theirs["seeds"]))
    content = {
        "format": report.FORMAT, "plan": {"test": 3}, "seeds": [0, 1],
        "tuning": {"calseg": {"keeps_dice": False}}, "test": result,
    }  # fmt: skip
    rows = tables.table(content).splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert rows[3].startswith("| CALSeg | fitted temperatures 1.25, 1.50; less Dice on the tuning cases |")
    assert "| +.050 (+.050 to +.050) | +.0000 (+.0000 to +.0000) | -.1000 (-.1000 to -.1000) | 40 + 10 |" in rows[3]
    assert rows[4].startswith("| the truth itself | - | ")
    front = tables.front_table({"a": content}).splitlines()
    assert front[2].startswith("| a | Dice + CE | ")
    assert front[3].startswith("|  | CALSeg | ")
    (tmp_path / "calibration-synthetic.json").write_text(json.dumps(content))
    (tmp_path / "calibration-multirater.json").write_text(json.dumps({"test": {"cross_entropy": {}}}))
    (tmp_path / "calibration-hippocampus.json").write_text("{}")
    contents, missing = figures.read_results(tmp_path)
    assert list(contents) == ["synthetic"]
    assert sum("there is no result yet" in sentence for sentence in missing) == len(datasets.PLANS) - 2
    assert sum("multirater" in sentence and "older format" in sentence for sentence in missing) == 1
    assert "no data set of this experiment" in missing[-1]
    figures.main(["--results", str(tmp_path)])
    assert (tmp_path / "calibration.png").stat().st_size > 10_000


def test_without_a_result_no_figure_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "calibration-synthetic.json").write_text("{}")
    with pytest.raises(SystemExit, match="no result to draw"):
        figures.main(["--results", str(tmp_path)])
    assert "older format" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["calibration-synthetic.json"]


# ---------------------------------------------------------------------------------------- whole experiments


def test_a_quick_experiment_runs_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The contenders share networks, also of two processes. Nothing is trained again. Another plan is refused."""
    names = ["dice_cross_entropy_near", "calseg_dice_second", "calseg_prior"]
    call = ["synthetic", "--out", str(tmp_path), "--quick", "--seeds", "1", "--contenders", *names]
    run.main(call)
    path = tmp_path / "calibration-synthetic.json"
    content = read_json(path)
    assert list(content["test"]) == [REFERENCE, *names, "truth"]
    assert content["versions"]["torch"] == torch.__version__
    assert content["plan"]["iterations"] == 2
    scaled, plain = (content["test"][name]["scores"] for name in (names[0], REFERENCE))
    assert scaled["dice"]["mean"] == plain["dice"]["mean"]
    assert scaled["near_nll"]["mean"] != plain["near_nll"]["mean"]
    assert content["test"]["calseg_dice_second"]["first_stage"] == {"dice_weight": 0.0}
    assert set(content["test"]["calseg_prior"]["seconds"]) == {"first_stage", "second_stage"}
    truth = content["test"]["truth"]["scores"]
    assert truth["truth_ece"]["mean"] == truth["truth_error"]["mean"] == 0
    assert truth["near_ece"]["mean"] < truth["foreground_ece"]["mean"]  # a perfect forecaster fails there
    root = tmp_path / "synthetic-quick"
    assert len(list((root / "first_stage").iterdir())) == 2  # with and without the Dice loss
    assert len(list((root / "runs").iterdir())) == 3
    capsys.readouterr()
    (root / "runs" / "dice_cross_entropy-seed0" / "scores-test.json").unlink()
    monkeypatch.setattr("calseg.training.loop._step", lambda *arguments: pytest.fail("trained again"))
    run.main([*call, "--jobs", "0"])  # in this process, where training fails
    assert read_json(path) == content
    with pytest.raises(SystemExit, match="its runs are of another plan"):
        datasets.prepare(None, root, datasets.PLANS["synthetic"])


def test_test_cases_are_the_same_for_every_number_of_training_cases(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    entries = [{"image": f"i{number}.nii.gz", "label": f"l{number}.nii.gz"} for number in range(160)]
    (source / "dataset.json").write_text(json.dumps({"labels": {"0": "a", "1": "b"}, "training": entries}))
    tests = []
    for name in ("hippocampus-20", "hippocampus-100"):
        plan = datasets.PLANS[name]
        datasets.prepare(source, tmp_path / name, plan)
        test, development = (
            {case["label"] for case in read_json(tmp_path / name / part / "dataset.json")["training"]}
            for part in ("test", "development")
        )
        assert (len(test), len(development)) == (40, plan.training + 20)
        assert not test & development
        tests.append(test)
    assert tests[0] == tests[1]


def test_the_perfect_forecaster_fails_in_the_foreground_and_who_denies_the_background_does_not() -> None:
    content = perfect_forecaster.report(DemoConfig(cases=4, side=24))
    assert (content["shares"][0], content["shares"][-1]) == (0, 0.999)  # the truth, and hardly any background
    drawn = content["result"]["drawn"]
    assert drawn["foreground"]["ece"][0] > 5 * drawn["near"]["ece"][0]
    assert drawn["foreground"]["ece"][-1] < drawn["foreground"]["ece"][0] / 2
    for found in content["result"].values():
        assert found["all"]["ece"][-1] > 0.5
        assert found["dice"][-1] < found["dice"][0] - 0.2
        for score in ("nll", "brier"):
            assert found["near"][score] == sorted(found["near"][score])
        truth = found["near"]["reliability_of_the_truth"]
        gaps = np.abs(np.subtract(truth["confidence"], truth["accuracy"])) * truth["voxels"]
        assert gaps.sum() / sum(truth["voxels"]) == pytest.approx(found["near"]["ece"][0], rel=1e-6)


def test_a_denial_takes_a_share_of_background() -> None:
    truth = torch.tensor([[1.0, 0.9, 0.2], [0.0, 0.1, 0.2], [0.0, 0.0, 0.6]], dtype=torch.float64)
    wanted = torch.tensor([[0.5, 0.45, 0.1], [0.25, 0.55, 0.225], [0.25, 0.0, 0.675]], dtype=torch.float64)
    torch.testing.assert_close(perfect_forecaster.denial(truth, 0.5), wanted, atol=1e-9, rtol=0)
    torch.testing.assert_close(perfect_forecaster.denial(truth, 0.0), truth, atol=1e-9, rtol=0)
