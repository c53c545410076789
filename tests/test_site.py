"""Tests of the documentation: every public name, every page in the navigation, and tables made from the results."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = "\n".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))
DOCUMENTED = re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)
NOT_DOCUMENTED = {
    "calseg": {"__version__"},
    "calseg.losses": {"ACELoss", "GaussianKLLoss", "SoftCrossEntropyLoss", "VLSCrossEntropyLoss", "VLSElboLoss"},
    "calseg.training": {"TrainingError"},  # the old name of calseg.errors.RunError
    "calseg.evaluate": {"FOLDER_FILES"},
}
"""Names that need no entry: constants for other parts of calseg, and old names of what has one."""


def public_names() -> dict[str, list[str]]:
    """Return the public names of every module that lists them, read from the source, so that no package is needed."""
    names = {}
    for path in sorted((ROOT / "calseg").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names[".".join(parts).removesuffix(".__init__").removesuffix(".api")] = ast.literal_eval(node.value)
    return names


PUBLIC = public_names()


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    part = module.split(".")[:2]  # a name may be documented where it is defined, in another module of the same part
    for name in set(PUBLIC[module]) - NOT_DOCUMENTED.get(module, set()):
        entries = [entry.split(".") for entry in DOCUMENTED if entry.endswith(f".{name}")]
        found = f"{module}.{name}" in DOCUMENTED or any(entry[:2] == part != ["calseg"] for entry in entries)
        assert found, f"{module}.{name}"


def test_no_name_is_documented_twice() -> None:
    assert len(DOCUMENTED) == len(set(DOCUMENTED))
    assert set(NOT_DOCUMENTED) <= set(PUBLIC)
    for module, names in NOT_DOCUMENTED.items():
        assert names <= set(PUBLIC[module])


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


# ---- tables ----


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """Return benchmarks/tables.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_of_a_page_can_be_made(tables: ModuleType) -> None:
    used = set()
    for page in DOCS.rglob("*.md"):
        text = page.read_text()
        used |= {place[2] for place in tables.PLACE.finditer(text)}
        assert text.count("<!-- table: ") == len(tables.PLACE.findall(text)), page
        assert not re.search(r"<!-- end -->", tables.PLACE.sub("", text)), page
    assert used == set(tables.TABLES)
    for name in used:
        assert len(tables.TABLES[name]()) > 50, name


def test_the_readme_has_the_tables_of_the_results(tables: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    assert tables.fill(text) == text, "run: python benchmarks/tables.py README.md"


def test_a_row_has_the_figures_of_its_result(tables: ModuleType) -> None:
    rows = json.loads((tables.RESULTS / tables.TIMES).read_text())["rows"]
    wanted = ("cross_entropy", [1, 4, 128, 128, 128], "float32", "int64")
    (row,) = [row for row in rows if (row["operation"], row["shape"], row["dtype"], row["labels"]) == wanted]
    lines = tables.TABLES["cross-entropy"]().splitlines()
    (line,) = [line for line in lines if line.startswith("| 4 |")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1] == "128³"
    shown = [float(cell) for cell in cells[2:]]
    exact = [1e3 * row["seconds"]["calseg"]["median"], *(row["metrics"][name] for name in ("copy", "eager", "compile")),
             *(row["memory"][name] for name in ("calseg", "eager"))]  # fmt: skip
    assert shown == pytest.approx(exact, rel=0.05)


def test_the_tables_of_pairs_have_their_figures(tables: ModuleType) -> None:
    """Means, differences and their spread, computed anew from the scores of every pair."""
    content = json.loads((tables.RESULTS / "nnunet_pairs.json").read_text())
    means, differences = (
        [
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in tables.TABLES[name]().splitlines()[2:]
            if line.startswith("|")
        ]
        for name in ("nnunet-pairs", "nnunet-differences")
    )
    groups = content["starts"]
    assert [row[0] for row in means] == [row[0] for row in differences] == [start for start in groups for _ in range(3)]
    assert [row[2] for row in means] == len(groups) * content["targets"]
    for start, updates, targets, *cells in means:
        pairs = groups[start]["pairs"]
        assert int(updates) == groups[start]["updates"]
        for score, cell in zip(content["scores"], cells, strict=True):
            wanted = statistics.mean(pair[targets][score] for pair in pairs)
            assert float(cell) == pytest.approx(wanted, abs=6e-4 if score == "dice" else 6e-5)
    for start, title, *cells in differences:
        one, other = title.split(" against ")
        for score, cell in zip(content["scores"], cells, strict=True):
            values = [pair[one][score] - pair[other][score] for pair in groups[start]["pairs"]]
            numbers = [float(number) for number in re.findall(r"[-+]?\.?\d[.\d]*", cell)]
            exact = [statistics.mean(values), statistics.stdev(values)]
            assert numbers[:2] == pytest.approx(exact, abs=6e-4 if score == "dice" else 6e-5)
            gains = sum(value > 0 if score == "dice" else value < 0 for value in values)
            assert numbers[2:] == [gains, len(values)]


def test_names_of_tables_are_checked(tables: ModuleType) -> None:
    with pytest.raises(KeyError, match="'nothing', wanted one of front"):
        tables.fill("<!-- table: nothing -->\n<!-- end -->")
    with pytest.raises(ValueError, match="no rows"):
        tables.markdown(["a"], [])


# ---- docstrings ----


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe")
    sys.path.insert(0, str(DOCS / "site"))
    try:
        from docstrings import as_markdown
    finally:
        del sys.path[0]
    text = "See :func:`vls_elbo` and :class:`torch.Tensor`; :math:`a_b`.\n\n.. math::\n    x = 1\n\n"
    text += "Example:\n    >>> 1\n"
    assert as_markdown(text) == (
        "See [`vls_elbo`][calseg.vls_elbo] and `torch.Tensor`; $a_b$.\n\n\n$$\nx = 1\n$$\n\n\nExamples:\n    >>> 1"
    )
