"""Tests of calseg demo: simulated cases, interruption, and other settings."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nibabel")
pytest.importorskip("monai")

from calseg.demo import run_demo
from calseg.errors import RunError
from calseg.runs import RunInterruptedError
from calseg.simulation import DemoConfig, make_case
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


def test_demo_runs_resumes_and_refuses(tmp_path: Path) -> None:
    settings = DemoConfig(cases=4, raters=2, side=16, iterations=2)
    out = tmp_path / "demo"
    with pytest.raises(RunInterruptedError):
        run_demo(out, settings, progress=stop_after_one_update)
    results = run_demo(out, settings)
    assert list(results) == ["cross_entropy", "calseg"]
    for metrics in results.values():
        assert metrics["iterations"] == 2
        assert 0 < metrics["raters"]["all"]["ece"] < 1
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
