"""Tests of the pages in docs: their code runs from top to bottom, in a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = Path(__file__).parent.parent.parent / "docs"
PACKAGES = {
    "monai": ("monai", "ignite", "torchmetrics", "nibabel", "typer"),
    "lightning": ("lightning", "tensorboard", "torchmetrics", "matplotlib"),
}
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def program(page: str) -> str:
    """Return the blocks of a page as one program. Commands of calseg run in place; those that install are left out."""
    parts = ["import subprocess, sys"]
    for language, block in BLOCK.findall(page):
        if language == "python":
            parts.append(block)
            continue
        for line in block.splitlines():
            name, *arguments = line.split()
            assert name in ("calseg", "pip"), line
            if name == "calseg":
                call = "from calseg.cli.main import main; main()"
                parts.append(f"subprocess.run([sys.executable, '-c', {call!r}, *{arguments!r}], check=True)")
    return "\n\n".join(parts)


@pytest.mark.parametrize("name", PACKAGES)
def test_the_code_of_a_page_runs(name: str, tmp_path: Path) -> None:
    for package in PACKAGES[name]:
        pytest.importorskip(package)
    script = tmp_path / "page.py"
    script.write_text(program((PAGES / f"{name}.md").read_text()))
    root = str(PAGES.parent)
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    for number in re.findall(r": ([\d.]+|nan)[,}]", run.stdout):
        assert 0 <= float(number) < 10
    assert re.search(r"ece_near_foreground['\"]: ", run.stdout)


def test_every_page_is_tested_and_linked() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} >= set(PACKAGES)
    readme = (PAGES.parent / "README.md").read_text()
    for name in PACKAGES:
        assert f"(docs/{name}.md)" in readme
