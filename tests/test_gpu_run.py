"""Tests of the one command that measures everything on a GPU, on a machine without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("needs the checkout's benchmarks", allow_module_level=True)
pytest.importorskip("pytest_benchmark")
sys.path.insert(0, str(BENCHMARKS))
import gpu_run  # noqa: E402

sys.path.remove(str(BENCHMARKS))


def test_a_run(tmp_path):
    """The files of a run without a GPU: the log, status and seconds of each step, the figures, the predictions."""
    chosen = ["machine", "bench_gaussian_kl", "memcheck"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_run.py"), "--out", str(tmp_path), "--device", "cpu", "--steps", *chosen],
        env={"PATH": str(tmp_path), "PYTHONPATH": str(BENCHMARKS.parent)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    machine, benchmark, memcheck = json.loads((tmp_path / "run.json").read_text())
    assert json.loads((tmp_path / "machine.log").read_text())["torch"]
    assert [machine["rc"], benchmark["rc"]] == [0, 0], (tmp_path / "bench_gaussian_kl.log").read_text()
    assert not benchmark["timed_out"]
    assert 0 < benchmark["seconds"] < benchmark["limit"]
    assert {row["operation"] for row in json.loads((tmp_path / "bench_gaussian_kl.json").read_text())["rows"]}
    assert memcheck["left_out"] == "compute-sanitizer is not on PATH"
    assert (tmp_path / "predictions.md").read_text().startswith("| prediction |")


def test_the_time_of_a_run_has_an_end(tmp_path):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_run.py"), "--out", str(tmp_path), "--device", "cpu", "--seconds", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "run.json").read_text())
    assert [entry["left_out"] for entry in entries] == ["the time was over"] * len(entries)
    assert [entry["name"] for entry in entries] == [step.name for step in gpu_run.steps(tmp_path, "cpu")]


def test_a_step_that_hangs_is_ended(tmp_path, monkeypatch):
    """It is interrupted first, so that it can say what it has, and then ended, with what it started."""
    monkeypatch.setattr(gpu_run, "GRACE_SECONDS", 1.0)
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: print('interrupted', flush=True))\n"
        "print('begun', flush=True)\n"
        "while True: time.sleep(60)\n"
    )
    entry = gpu_run.run_step(gpu_run.Step("hanging", [sys.executable, "-c", code], 60.0), tmp_path, 2.0)
    assert entry["timed_out"]
    assert entry["rc"] == -9
    assert entry["seconds"] < 30
    assert (tmp_path / "hanging.log").read_text().split() == ["begun", "interrupted"]


def test_every_file_of_the_benchmarks_has_a_step():
    """Except the one of the antithetic pairs, whose figures are of the noise, and that of small sizes, of the CPU."""
    files = {file.stem for file in BENCHMARKS.glob("bench_*.py")} - {"bench_antithetic", "bench_small"}
    assert files == {f"bench_{name}" for name in gpu_run.BENCHMARKS}


def test_predictions_stand_beside_measurements():
    """Each share of a copy and each time of notes.md is found, and compared with the largest or with its own size."""
    found = gpu_run.predictions(gpu_run.NOTES.read_text())
    assert len({p.what for p in found}) == len(found) == 5 + 5 + 5 + 4 + 5

    def row(operation, classes, edge, copy):
        shape = [1, classes, edge, edge, edge]
        return {"operation": operation, "shape": shape, "dtype": "float32", "metrics": {"copy": copy},
                "seconds": {"calseg": {"median": copy * 1e-5}}}  # fmt: skip

    rows = [row("cross_entropy", 4, 256, 1.25), row("cross_entropy", 4, 128, 2.0), row("calibration_bins", 2, 128, 3.0),
            row("calibration_bins", 2, 256, 20.0)]  # fmt: skip
    texts = {p.what: (p.text, gpu_run.measured(p, rows)) for p in found}
    assert texts["cross-entropy, C = 4: share of 1 copies"] == ("94 / 92 % (86 / 82)", "80% (1 x 256^3)")
    assert texts["calibration bins, C = 2, 128^3, top label, 15 bins: time"][1] == "30 us (1 x 128^3)"
    assert texts["VLS, m = 4, C = 33: share of 3 copies"][1] == "-"
