"""calseg predict, then calseg evaluate, with an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

for package in ("typer", "rich", "monai", "nibabel", "matplotlib", "torchmetrics"):
    pytest.importorskip(package)

from command_line import run  # noqa: E402

from calseg import evaluate as module  # noqa: E402
from calseg.evaluate import FOLDER_FILES  # noqa: E402


def test_commands(
    capsys: pytest.CaptureFixture[str],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maps, labels, out = tmp_path / "maps", trained / "data" / "labelsTr", tmp_path / "report"
    code, text, err = run(capsys, "predict", trained / "run", trained / "data", "--out", maps, "--cases", "all")
    assert code == 0, err
    assert f"6 probability maps are in {maps}" in text
    score = module.score_case

    def interrupted(case: Any, *rest: Any) -> Any:
        if case.name.endswith("3"):
            raise KeyboardInterrupt
        return score(case, *rest)

    monkeypatch.setattr(module, "score_case", interrupted)
    options = ["--preset", "monai", "--n-bins", "10", "--num-resamples", "50", "--memory", "1"]
    code, _, err = run(capsys, "evaluate", maps, labels, "--out", out, "--overwrite", *options)
    assert code == 130
    assert "interrupted after 3 of 6 cases" in err
    assert err.rstrip().endswith(f"calseg evaluate {maps} {labels} --out {out} {' '.join(options)} --resume")
    monkeypatch.undo()
    code, text, err = run(capsys, "evaluate", maps, labels, "--out", out, *options, "--resume")
    assert code == 0, err
    report = json.loads((out / "report.json").read_text())
    assert report["cases"] == 6
    assert f"{report['voxels']['near']:,} of them near the foreground" in text
    assert text.index("near voxels") < text.index("all voxels") < text.index("foreground voxels")
    assert "the outcome itself chooses this region" in text
    pooled = report["near"]["ece"]["pooled"]
    low, high = pooled["interval"]
    assert f"{pooled['value']:.4f} [{low:.4f}, {high:.4f}]" in text
    assert "ECE, monai" in text
    assert all((out / name).stat().st_size for name in FOLDER_FILES)
    code, _, err = run(capsys, "evaluate", maps, labels, "--out", out)
    assert code == 2
    assert "not empty" in err
    assert len(err.strip().splitlines()) == 1
