"""Tests of the table of what was run inside other packages: what it counts, and what its check finds."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("needs the checkout's benchmarks", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
import integrations_table as table  # noqa: E402

sys.path.remove(str(BENCHMARKS))


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two packages that are installed, and a place for the results."""
    packages = {
        "Lightning": table.Package("lightning", "the losses", ("test_lightning.",)),
        "MONAI": table.Package("monai", "the page", ("test_monai_loss.", "test_pages.test_code[monai]")),
    }
    monkeypatch.setattr(table, "PACKAGES", packages)
    monkeypatch.setattr(table, "RESULTS", tmp_path / "integrations.json")
    monkeypatch.setattr(table.tables, "RESULTS", tmp_path)
    monkeypatch.setattr(table.metadata, "version", {"lightning": "2.6", "monai": "1.6", "torch": "2.13"}.__getitem__)
    table.tables.load.cache_clear()
    yield
    table.tables.load.cache_clear()


def record(folder: Path, *, without: str = "", **more: str) -> Path:
    """Write a record of four tests, without those of a name, and with more tests of Lightning."""
    tests = {
        "tests.integrations.test_monai_loss.test_value": "",
        "tests.integrations.test_monai_loss.test_of_newer": "<skipped/>",
        "tests.integrations.test_pages.test_code[monai]": "<system-out/>",
        "tests.integrations.test_lightning.test_values": "",
        **{f"tests.integrations.test_lightning.{name}": inner for name, inner in more.items()},
    }
    cases = "".join(
        f'<testcase classname="{name.rpartition(".")[0]}" name="{name.rpartition(".")[2]}">{inner}</testcase>'
        for name, inner in tests.items()
        if not (without and without in name)
    )
    path = folder / "record.xml"
    path.write_text(f'<testsuites><testsuite name="pytest">{cases}</testsuite></testsuites>')
    return path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["integrations_table.py", *map(str, arguments)])
    table.main()


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch, record(tmp_path))
    shown = capsys.readouterr().out
    assert "| Lightning | 2.6 | the losses | 1 passed |" in shown
    assert "| MONAI | 1.6 | the page | 2 passed, 1 skipped |" in shown
    assert "and PyTorch 2.13," in shown
    content = json.loads(table.RESULTS.read_text())
    assert content["packages"]["MONAI"] == {
        "version": "1.6", "what": "the page", "passed": 2, "skipped": 1, "failed": 0
    }  # fmt: skip
    call(monkeypatch, "--check", record(tmp_path))
    assert json.loads(table.RESULTS.read_text()) == content


@pytest.mark.parametrize("element", ["failure", "error"])
def test_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], element: str
) -> None:
    """The table shows it, and the check does not let it pass."""
    path = record(tmp_path, test_other=f"<{element}/>")
    call(monkeypatch, path)
    assert "| Lightning | 2.6 | the losses | 1 passed, 1 failed |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^tests\.integrations\.test_lightning\.test_other: failed$"):
        call(monkeypatch, "--check", path)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("[monai]", r"^MONAI 1\.6: not run, as no test of test_pages\.test_code\[monai\] has passed$"),
        ("loss.test_value", r"^MONAI 1\.6: not run, as no test of test_monai_loss\. has passed$"),
        ("lightning", r"^Lightning 2\.6: not run, as no test of test_lightning\. has passed$"),
    ],
)
def test_what_was_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str, message: str) -> None:
    """A part whose tests were all skipped was not run either. No table is written then."""
    path = record(tmp_path, without=without)
    with pytest.raises(SystemExit, match=message):
        call(monkeypatch, path)
    assert not table.RESULTS.exists()


def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "monai":
            raise table.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(table.metadata, "version", version)
    with pytest.raises(SystemExit, match=r"^MONAI: not installed; pip install monai$"):
        call(monkeypatch, record(tmp_path))


def test_rows_that_are_missing_or_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, record(tmp_path))
    content = json.loads(table.RESULTS.read_text())
    content["packages"]["Ignite"] = content["packages"].pop("MONAI")
    table.RESULTS.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, "--check", record(tmp_path))
    assert str(caught.value).splitlines() == [
        "MONAI: has no row in the table; write integrations.json anew",
        "Ignite: has a row in the table, but no tests; write integrations.json anew",
    ]


def test_a_record_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path / "record.xml")
    assert "record.xml: no such file; pytest writes it with --junitxml" in capsys.readouterr().err
