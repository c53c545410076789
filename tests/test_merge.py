"""Tests of calseg evaluate with several processes, and of the union of reports: the same bytes, and errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("nibabel", "matplotlib"):
    pytest.importorskip(package)

from interruption import stop_after  # noqa: E402
from test_evaluate import QUICK, arrays, quick_diagrams, save, write_labels, write_nifti  # noqa: E402, F401

from calseg.errors import CalsegError  # noqa: E402
from calseg.evaluate import FOLDER_FILES, EvaluateConfig, evaluate_folders  # noqa: E402
from calseg.merge import merge_reports  # noqa: E402
from calseg.runs import CasesInterruptedError  # noqa: E402


def contents(report: Path) -> dict[str, bytes]:
    return {name: (report / name).read_bytes() for name in FOLDER_FILES}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with five cases in ``maps`` and ``labelsTr``, one of them with another affine, and two labels more."""
    cases = arrays(7)
    write_labels(tmp_path, cases)
    write_nifti(tmp_path / "maps", {name: case for name, case in cases.items() if name not in ("case_2", "case_6")})
    save(tmp_path / "maps" / "case_1.nii.gz", cases["case_1"][0], np.diag([1, 1, 2, 1.0]))
    return tmp_path


def evaluate(data: Path, out: str, maps: str = "maps", config: EvaluateConfig = QUICK, **options: Any) -> Path:
    evaluate_folders(data / maps, data / "labelsTr", data / out, config, **options)
    return data / out


def part(data: Path, out: str, *numbers: int, config: EvaluateConfig = QUICK) -> Path:
    """Evaluate some of the cases, in a folder of their own."""
    (data / f"{out}_maps").mkdir()
    for number in numbers:
        shutil.copy(data / "maps" / f"case_{number}.nii.gz", data / f"{out}_maps")
    return evaluate(data, out, f"{out}_maps", config)


# ---- several processes ----


def test_several_processes_write_the_same_bytes(data: Path) -> None:
    pytest.importorskip("torchmetrics")
    config = EvaluateConfig(num_resamples=50, presets=("monai", "torchmetrics"))
    whole = evaluate(data, "whole", config=config)
    done = []
    options = {"workers": 3, "memory": 3, "progress": lambda stage, *counts: done.append(counts)}
    assert contents(evaluate(data, "shared", config=config, **options)) == contents(whole)
    assert done == [(number, 5, None) for number in range(6)]
    with pytest.raises(CalsegError, match="workers must be at least 1; got 0"):
        evaluate(data, "none", workers=0)


def test_an_interrupted_evaluation_of_several_processes_goes_on(data: Path) -> None:
    with pytest.raises(CasesInterruptedError, match=r"interrupted after 2 of 5 cases, which are kept in .*jsonl"):
        evaluate(data, "part", workers=2, progress=stop_after(2))
    assert len((data / "part" / "cases.jsonl").read_text().splitlines()) == 2
    assert contents(evaluate(data, "part", resume=True)) == contents(evaluate(data, "whole"))


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_ctrl_c_reaches_all_processes_and_keeps_what_is_done(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    rng = np.random.default_rng(0)
    p = rng.random((48, 48, 48, 4), np.float32)
    save(tmp_path / "maps" / "case_00.nii", p / p.sum(-1, keepdims=True))
    save(tmp_path / "labels" / "case_00.nii", rng.integers(0, 4, p.shape[:3]).astype(np.uint8))
    for number in range(1, 40):
        for folder in ("maps", "labels"):
            os.link(tmp_path / folder / "case_00.nii", tmp_path / folder / f"case_{number:02d}.nii")
    words = ["evaluate", "maps", "labels", "--out", "out", "--num-resamples", "5", "--workers", "2"]
    command = [sys.executable, "-c", "from calseg.cli.main import main; main()", *words]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths}
    store = tmp_path / "out" / "cases.jsonl"
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        while process.poll() is None and not (store.is_file() and store.read_bytes().count(b"\n")):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    kept = store.read_bytes().count(b"\n")
    assert f"interrupted after {kept} of 40 cases" in err.splitlines()[-1]
    assert err.rstrip().endswith(f"calseg {' '.join(words)} --resume")
    assert 0 < kept < 40


# ---- the union of reports ----


def test_the_union_is_the_report_of_all(data: Path) -> None:
    """Byte for byte, in any order of the reports, of a single one, and of a union and another."""
    whole = evaluate(data, "whole")
    parts = [part(data, "a", 4, 0), part(data, "b", 1), part(data, "c", 5, 3)]
    report = merge_reports(parts, data / "union")
    assert json.loads(json.dumps(report)) == json.loads((whole / "report.json").read_text())
    assert contents(data / "union") == contents(whole)
    merge_reports([parts[2], parts[0]], data / "half")
    merge_reports([parts[1], data / "half"], data / "again")
    assert contents(data / "again") == contents(whole)
    merge_reports([whole], data / "alone")
    assert contents(data / "alone") == contents(whole)
    with pytest.raises(CalsegError, match=r"again: not empty; give --overwrite to start anew$"):
        merge_reports(parts, data / "again")
    merge_reports([parts[1]], data / "again", overwrite=True)
    assert contents(data / "again") == contents(parts[1])
    with pytest.raises(CalsegError, match="holds a run of calseg evaluate merge; move it, or give another --out"):
        evaluate(data, "union", resume=True)


def test_what_cannot_be_merged(data: Path) -> None:
    good = part(data, "good", 0)
    other_bins = part(data, "bins", 1, config=EvaluateConfig(n_bins=10, num_resamples=50))
    both = part(data, "both", 0, 3)
    with pytest.raises(CasesInterruptedError):
        evaluate(data, "stopped", progress=stop_after(2))
    resumed = part(data, "resumed", 3)
    shutil.copy(data / "maps" / "case_4.nii.gz", data / "resumed_maps")
    shutil.copy(data / "maps" / "case_5.nii.gz", data / "resumed_maps")
    with pytest.raises(CasesInterruptedError):
        evaluate(data, "resumed", "resumed_maps", resume=True, progress=stop_after(2))

    def changed(name: str, file: str, change: Any) -> Path:
        shutil.copytree(good, data / name)
        content = json.loads((good / file).read_text())
        (data / name / file).write_text(json.dumps(change(content)))
        return data / name

    def run(folder: Path) -> Path:
        (data / folder / "config.json").write_text('{"iterations": 5}')
        return folder

    (data / "empty").mkdir()
    (data / "run").mkdir()
    for reports, message in (
        ([], "reports: got none"),
        ([data / "nowhere"], "nowhere: not a report of calseg evaluate; it has no config.json"),
        ([data / "empty"], "empty: not a report of calseg evaluate; it has no config.json"),
        ([run(data / "run")], "config.json: not that of a report of calseg evaluate"),
        ([good, other_bins], "bins: cannot be merged with .*good: n_bins is 10 but was 15 there"),
        ([good, changed("classes", "config.json", lambda old: old | {"classes": ["a", "b", "c"]})],
         r"classes: cannot be merged with .*good: classes is \['a', 'b', 'c'\] but was"),
        ([changed("format", "config.json", lambda old: old | {"format": 2})],
         "format: a report of format 2, wanted is 3; evaluate it again"),
        ([changed("setting", "config.json", lambda old: old | {"n_bins": "x"})], "config.json: not that of a report"),
        ([changed("names", "config.json", lambda old: old | {"classes": 3})], "config.json: not that of a report"),
        ([changed("list", "report.json", lambda old: [old])], "report.json: not a report of calseg evaluate"),
        ([changed("line", "cases.jsonl", lambda old: {"case": "case_0"})], "cases.jsonl: line 1 is corrupt"),
        ([changed("shape", "config.json", lambda old: old | {"n_bins": 10})], "cases.jsonl: line 1 is corrupt"),
        ([data / "stopped"], "stopped: an unfinished report; end it first, with --resume"),
        ([resumed], "resumed: an unfinished report; end it first, with --resume"),
        ([good, both], "both: holds the case 'case_0', which .*good holds too"),
        ([good, good], "good: holds the case 'case_0', which .*good holds too"),
    ):  # fmt: skip
        with pytest.raises(CalsegError, match=message) as caught:
            merge_reports(reports, data / "out")
        assert "\n" not in str(caught.value)
    for out in (good, good / "union", data):
        with pytest.raises(CalsegError, match=r"the folder of the results .* the input"):
            merge_reports([good], out)
    assert not (data / "out").exists()


def test_the_command(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer")
    from calseg.cli.main import main

    def run(*words: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        return caught.value.code, *capsys.readouterr()

    quick = ("--num-resamples", 50, "--threads", 1)
    whole = evaluate(data, "whole")
    code, text, err = run("evaluate", data / "maps", data / "labelsTr", "--out", data / "one", *quick)
    assert (code, contents(data / "one")) == (0, contents(whole)), err
    first, second = part(data, "a", 0, 1), part(data, "b", 3, 4, 5)
    code, merged, err = run("evaluate", "merge", first, second, "--out", data / "union")
    assert (code, contents(data / "union")) == (0, contents(whole)), err
    assert merged.replace("union", "one") == text
    code, _, err = run("evaluate", "merge", first, first, "--out", data / "twice")
    assert code == 2
    assert err.startswith("calseg evaluate merge: ")
    assert len(err.splitlines()) == 1
