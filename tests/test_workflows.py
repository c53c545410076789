"""Tests of the workflows and of the files that a person or a program outside reads: they parse, and say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from calseg import __version__

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
FILES = [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_is_yaml(path: Path) -> None:
    assert yaml.safe_load(path.read_text())


def test_workflows_have_jobs_with_a_limit() -> None:
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert {path.stem for path in workflows} == {"docs", "test", "wheels"}
    for path in workflows:
        content = yaml.safe_load(path.read_text())
        assert content[True]  # YAML reads the key "on" as a boolean
        assert content["permissions"] == {"contents": "read"}
        for job in content["jobs"].values():
            assert job["timeout-minutes"] > 0
            assert job["steps"]
            needed = job.get("needs", [])
            assert {*([needed] if isinstance(needed, str) else needed)} <= content["jobs"].keys()
    publish = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())["jobs"]["publish"]
    assert publish["permissions"]["id-token"] == "write"
    assert publish["if"].startswith("startsWith(github.ref, 'refs/tags/v')")


def test_forms_ask_for_calseg_info() -> None:
    for name in ("bug", "idea"):
        form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
        assert any("calseg info" in part["attributes"]["label"] for part in form["body"])


def test_the_changes_name_the_version() -> None:
    assert re.search(rf"^## {re.escape(__version__)}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_citation_is_the_paper_of_the_docstrings() -> None:
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    assert f"doi {paper['doi']}" in (ROOT / "calseg" / "functional.py").read_text()
    assert paper["title"] in " ".join((ROOT / "README.md").read_text().replace("*", "").split())
