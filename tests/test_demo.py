"""Tests of calseg demo: simulated cases, interruption, and other settings."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nibabel")
pytest.importorskip("monai")

from calseg.demo import run_demo
from calseg.errors import RunError
from calseg.methods import METHODS
from calseg.runs import RunInterruptedError
from calseg.scores import MAIN_STATISTICS, CaseScores, values_of
from calseg.simulation import DemoConfig, make_case, training_rater
from calseg.volumes.datasets import find_cases


def stop_after_one_update(stage: str, done: int, total: int, loss: float | None) -> None:
    if stage == "train" and done == 1:
        os.kill(os.getpid(), signal.SIGINT)


def without_seconds(content: dict) -> dict:
    """Return the results of a demo without its times."""
    return {method: {key: value for key, value in each.items() if key != "seconds"} for method, each in content.items()}


def test_demo_truth_is_what_its_raters_draw() -> None:
    image, raters, truth = make_case(0, 1, DemoConfig(raters=200, side=20))
    assert image.dtype == np.float32
    assert truth.shape == (3, *image.shape)
    np.testing.assert_allclose(truth.sum(0), 1, atol=1e-6)
    assert truth.min() >= 0
    drawn = np.stack([(raters == number).mean(0) for number in range(3)])
    # The raters are independent: the standard error of a share of 200 is at most 0.036.
    assert np.abs(drawn - truth).mean() < 0.02
    assert np.abs(drawn - truth).max() < 0.2
    disputed = (truth.max(0) < 0.9).mean()
    assert 0.02 < disputed < 0.6


def test_near_the_foreground_the_truth_is_calibrated_and_in_the_foreground_it_is_not() -> None:
    """The label chooses the foreground, and there even the true probabilities have an error of 5 %."""
    config = DemoConfig(cases=8)
    total: dict[str, CaseScores] = {}
    for index in range(config.cases):
        _, raters, truth = make_case(config.seed, index, config)
        p = torch.from_numpy(truth)
        voxels = torch.multinomial(p.flatten(1).T, 1, generator=torch.Generator().manual_seed(index))
        labels = {"drawn": voxels.view(p.shape[1:]), "rater": torch.from_numpy(raters[training_rater(index, config)])}
        for name, label in labels.items():
            scores = CaseScores.of(p, label, from_logits=False, class_wise=False)
            total[name] = total[name] + scores if name in total else scores
    ece = {name: {region: values["ece"] for region, values in values_of(scores.bins, MAIN_STATISTICS).items()}
           for name, scores in total.items()}  # fmt: skip
    assert ece["drawn"] == pytest.approx({"near": 0.0017, "all": 0.0006, "foreground": 0.0483}, abs=2e-4)
    assert ece["rater"] == pytest.approx({"near": 0.0076, "all": 0.0015, "foreground": 0.0473}, abs=2e-4)


def test_demo_runs_resumes_and_refuses(tmp_path: Path) -> None:
    settings = DemoConfig(cases=4, raters=2, side=16, iterations=2)
    out = tmp_path / "demo"
    with pytest.raises(RunInterruptedError):
        run_demo(out, settings, progress=stop_after_one_update)
    results = run_demo(out, settings)
    assert list(results) == ["dice_cross_entropy", "calseg"]
    for method, metrics in results.items():
        assert metrics["iterations"] == 2
        assert metrics["config"]["dice_weight"] == METHODS[method].dice_weight > 0
        assert 0 < metrics["raters"]["near"]["ece"] < 1
        assert metrics["raters"]["near"]["nll"] > metrics["raters"]["all"]["nll"] > 0
        assert 0 < metrics["truth"]["brier"] < 2
    stored = json.loads((out / "demo.json").read_text())
    assert stored["results"]["calseg"]["all"] == results["calseg"]["all"]
    assert without_seconds(run_demo(out, settings)) == without_seconds(results)  # a finished demo
    whole = run_demo(tmp_path / "whole", settings)
    assert without_seconds(whole) == without_seconds(results)
    dataset = find_cases(out / "data")
    assert len(dataset.cases) == 4
    assert dataset.class_names == ("background", "lesion", "core")
    with pytest.raises(RunError, match="holds a demo with other settings"):
        run_demo(out, DemoConfig(cases=5, raters=2, side=16, iterations=2))
    with pytest.raises(RunError, match="not empty and not made by calseg demo"):
        run_demo(tmp_path, settings)
    with pytest.raises(RunError, match="raters must be at least 2"):
        DemoConfig(raters=1)
