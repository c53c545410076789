"""Tests of atomic files, and of the rule by which a run starts or continues in a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from calseg.runs import RunError, RunFolder, as_json, read_json, write_atomic, write_json


def test_write_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"ece": float(np.nan)})
    assert not list(tmp_path.iterdir())


def test_files_are_read_as_written_and_errors_name_them(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"sides": (1, 2)})
    assert read_json(tmp_path / "a.json") == as_json({"sides": (1, 2)}) == {"sides": [1, 2]}
    write_atomic(tmp_path / "b.json", b"{")
    for name in ("b.json", "c.json"):
        with pytest.raises(RunError, match=rf"{name}: not readable as JSON"):
            read_json(tmp_path / name)
    with pytest.raises(RunError, match=r"a.txt: cannot be written \(No such file or directory\)$"):
        write_atomic(tmp_path / "none" / "a.txt", "text")


def folder(path: Path, **options: str) -> RunFolder:
    return RunFolder(path, "state.json", ("maps/*.gz", "report.json"), ("maps",), **options)


def started(path: Path) -> RunFolder:
    """Return a folder with a run, a temporary file of a killed process, and another file."""
    run = folder(path)
    assert not run.open()
    for name in ("state.json", "report.json", "maps/a.gz", "maps/.a.gz.123.tmp", "notes.txt", ".notes.txt.1.tmp"):
        (path / name).write_text("{}")
    return run


def content(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def test_a_new_run_makes_its_folders(tmp_path: Path) -> None:
    run = folder(tmp_path / "a" / "b")
    with pytest.raises(RunError, match=r"state.json: not found; there is no run to resume in .*b$"):
        run.open(resume=True)
    assert not run.path.exists()
    assert not run.open(overwrite=True)
    assert (run.path / "maps").is_dir()
    assert not run.holds_run


def test_a_run_goes_on_and_leftovers_go(tmp_path: Path) -> None:
    run = started(tmp_path)
    with pytest.raises(RunError, match="not empty; give --resume to continue the run in it, or --overwrite"):
        run.open()
    assert "maps/.a.gz.123.tmp" in content(tmp_path)
    assert run.open(resume=True)
    assert content(tmp_path) == {"state.json", "report.json", "maps/a.gz", "notes.txt", ".notes.txt.1.tmp"}
    with pytest.raises(RunError, match="--resume and --overwrite exclude each other"):
        run.open(resume=True, overwrite=True)


def test_overwriting_leaves_foreign_files(tmp_path: Path) -> None:
    run = started(tmp_path)
    assert not run.open(overwrite=True)
    assert content(tmp_path) == {"notes.txt", ".notes.txt.1.tmp"}
    with pytest.raises(RunError, match="no run to resume"):
        run.open(resume=True)
    with pytest.raises(RunError, match="not empty"):
        run.open()
    with pytest.raises(RunError, match=r"notes.txt: exists and is not a folder"):
        folder(tmp_path / "notes.txt").open(overwrite=True)


def test_what_differs_is_named(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.check_same_settings({"a": 1, "b": [2], "old": 0}, {"a": 1, "b": [2]})
    message = r"state.json: cannot be resumed with other settings: a is 3 but was 1; c is 4 but was None$"
    with pytest.raises(RunError, match=message):
        run.check_same_settings({"a": 1, "b": 2}, {"a": 3, "b": 2, "c": 4})
    run.check_same_data({"split": [1]}, {"split": [1]}, {"split": "the split of DATA"})
    with pytest.raises(RunError, match=r"cannot be resumed on other data: the split of DATA changed since$"):
        run.check_same_data({}, {"split": [1]}, {"split": "the split of DATA"})


def test_a_command_that_continues_by_itself(tmp_path: Path) -> None:
    started(tmp_path)
    run = folder(tmp_path, continued_by="calseg demo")
    assert run.open()
    with pytest.raises(RunError, match=r"holds a demo with other settings \(a is 2 but was 1\); give --overwrite or"):
        run.check_same_settings({"a": 1}, {"a": 2})
    assert not run.open(overwrite=True)
    with pytest.raises(RunError, match="not empty and not made by calseg demo; give --overwrite or another --out"):
        run.open()


def test_it_imports_nothing_else() -> None:
    code = "import sys; import calseg; before = set(sys.modules); import calseg.runs, calseg.settings"
    code += "; print(sorted(name for name in set(sys.modules) - before if name.startswith(('calseg', 'monai'))))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['calseg.runs', 'calseg.settings']"
