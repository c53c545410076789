"""Tests of the import rules between the parts of calseg, which are read from the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

# A part -> the other parts of calseg that it may import. Parts without an entry may import any.
BASE = ("operations", "tensors", "checks")
ALLOWED = {
    "operations": (), "tensors": (), "dice": (), "checks": ("errors", "operations", "tensors"),
    "installation": ("_version",), "native": ("installation", "tensors"), "cli.info": ("installation", "environment"),
    "kernels": ("installation",),
    "packing": ("operations",),
    "backends": (*BASE, "dice", "installation", "native", "kernels"),
    "autograd": (*BASE, "dice", "native", "packing", "backends"),
    "functional": (*BASE, "dice", "native", "autograd", "backends.choice"),
    "regions": ("tensors", "checks"), "calibration": (*BASE, "backends.choice", "regions"),
    "errors": (), "files": ("errors",), "runs": ("errors", "files"), "volumes": ("errors", "files"),
    "integrations.monai": ("checks", "functional", "tensors"),
    "integrations.nnunet": ("errors", "files", "autograd", "backends.rng", "functional", "methods", "regions", "runs",
                            "settings", "volumes"),  # no MONAI
}  # fmt: skip
# A package from elsewhere -> the only parts that may import it.
IMPORTERS = {
    "monai": ("training", "integrations.monai"), "ignite": ("integrations.monai",),
    "lightning": ("integrations.lightning",), "typer": ("cli",), "rich": ("cli",),
    **dict.fromkeys(("nnunetv2", "batchgenerators", "batchgeneratorsv2", "blosc2"), ("integrations.nnunet",)),
}  # fmt: skip

ROOT = Path(__file__).parent.parent
MODULES = {}  # name -> tree; the kernels lie beside the package and are installed into it
for path in (*ROOT.glob("calseg/**/*.py"), *ROOT.glob("kernels/*.py")):
    parts = path.relative_to(ROOT / "calseg" if ROOT / "calseg" in path.parents else ROOT).with_suffix("").parts
    MODULES[".".join(("calseg", *parts)).removesuffix(".__init__")] = ast.parse(path.read_text(), str(path))


def imports(tree: ast.Module, *, on_load: bool = False) -> Iterator[str]:
    """The modules that a module imports; with ``on_load`` when it is loaded, by lines that are not indented."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = (f"{node.module}.{alias.name}" for alias in node.names)
            names = [name if name in MODULES else node.module for name in full]
        else:
            continue
        if not (on_load and node.col_offset):
            yield from names


def inside(name: str, *parts: str) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


@pytest.mark.parametrize("part", ALLOWED)
def test_what_a_part_imports(part):
    imported = {name for module in MODULES if inside(module, f"calseg.{part}") for name in imports(MODULES[module])}
    assert imported
    allowed = [f"calseg.{each}" for each in (part, *ALLOWED[part])]
    assert not {name for name in imported if inside(name, "calseg") and not inside(name, *allowed)}
    if part == "kernels":
        assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == {"torch", "triton", "calseg"}


@pytest.mark.parametrize("package", IMPORTERS)
def test_who_imports_a_package(package):
    importers = {module for module, tree in MODULES.items() if any(inside(name, package) for name in imports(tree))}
    assert all(inside(module, *(f"calseg.{part}" for part in IMPORTERS[package])) for module in importers)


def test_no_circle():
    graph = {module: set(imports(tree, on_load=True)) & MODULES.keys() - {module} for module, tree in MODULES.items()}
    del graph["calseg"]
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle
