"""Tests of the README and the pages in docs: their code runs from top to bottom, in a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = {page.stem: page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
WITH_CODE = [name for name, page in PAGES.items() if "```python\n" in page.read_text()]
PACKAGES = {
    "commands": ("monai", "nibabel", "typer"),
    "lightning": ("lightning", "tensorboard", "torchmetrics", "matplotlib"),
    "measure": ("torchmetrics", "matplotlib", "nibabel", "typer"),
    "monai": ("monai", "ignite", "torchmetrics", "nibabel", "typer"),
}
"""The packages that a page needs beside PyTorch."""
MEASURED = ("lightning", "monai")
"""The pages that print scores near the foreground."""


COMMAND = """
def command(*arguments):
    from calseg.cli.main import main

    try:
        main([*arguments])
    except SystemExit as end:
        assert not end.code, arguments
"""
"""Runs a command of calseg within the program, as each new process would import PyTorch again."""


def program(page: str) -> str:
    """Return the blocks of a page as one program, with commands of calseg. Those that install are left out."""
    parts = [COMMAND]
    for language, block in BLOCK.findall(page):
        if language == "python":
            parts.append(block)
            continue
        for line in block.splitlines():
            name, *arguments = line.split()
            assert name in ("calseg", "pip"), line
            if name == "calseg":
                parts.append(f"command(*{arguments!r})")
    return "\n\n".join(parts)


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_code_of_a_page_runs(name: str, tmp_path: Path) -> None:
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package)
    (tmp_path / "page.py").write_text(program(PAGES[name].read_text()))
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-c", "import page"],  # as processes that it starts run the main module again
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    for number in re.findall(r": ([\d.]+|nan)[,}]", run.stdout):
        assert 0 <= float(number) < 10
    assert name not in MEASURED or re.search(r"ece_near_foreground['\"]: ", run.stdout)


def test_the_pages_with_code() -> None:
    assert {*PACKAGES, "README", "index", "swap", "raters", "noise", "regions", "counts"} <= {*WITH_CODE}


def test_links_between_pages_lead_to_files() -> None:
    for page in [*PAGES.values(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#:]+\.(?:md|png|cff))[)#]", page.read_text()):
            if target != "calibration.png":  # MkDocs takes it from the results
                assert (page.parent / target).is_file(), f"{page.name}: {target}"
