"""Tests of the import rules between the parts of calseg, which are read from the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Syntax trees by module. The kernels are in a folder beside the package, and are installed into it.
MODULES = {
    ".".join(("calseg", *path.relative_to(start).with_suffix("").parts)).removesuffix(".__init__"): ast.parse(
        path.read_text(), str(path)
    )
    for start, folder in ((ROOT / "calseg", "calseg"), (ROOT, "kernels"))
    for path in sorted((ROOT / folder).rglob("*.py"))
    if start == ROOT or "kernels" not in path.relative_to(start).parts
}
# Parts of calseg that a part may import, beside itself.
ENGINE = ("operations", "tensors", "native", "checks")
ALLOWED = {
    "kernels": (),
    "backends": (*ENGINE, "kernels", "_version"),
    "functional": (*ENGINE, "autograd", "backends.choice"),
    "calibration": (*ENGINE, "autograd", "backends.choice"),
    "volumes": ("runs",),
    "runs": (),
}
# Parts of calseg that may import another package.
IMPORTERS = {
    "monai": ("training", "integrations"),
    "lightning": ("training", "integrations"),
    "nnunetv2": ("training", "integrations"),
    "typer": ("cli",),
    "rich": ("cli",),
}


def needs_folder(folder: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (ROOT / "calseg" / folder).is_dir(), reason=f"calseg/{folder} is not there yet")


def imports(tree: ast.AST) -> Iterator[str]:
    """Return the full names of all imports: modules of calseg, or packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES or name == "calseg._native" else node.module


def inside(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


@pytest.mark.parametrize(
    ("part", "allowed"),
    [pytest.param(*rule, id=rule[0], marks=needs_folder("volumes" if rule[0] in ("volumes", "runs") else "backends"))
     for rule in ALLOWED.items()],
)  # fmt: skip
def test_what_a_part_imports(part, allowed):
    parts = [f"calseg.{name}" for name in (part, *allowed)]
    modules = {name: tree for name, tree in MODULES.items() if inside(name, parts[0])}
    assert modules
    wrong = [
        (module, name)
        for module, tree in modules.items()
        for name in imports(tree)
        if inside(name, "calseg") and not any(inside(name, allowed) for allowed in parts)
    ]
    assert not wrong


@needs_folder("backends")
def test_kernels_import_torch_and_triton_alone():
    known = {"torch", "triton", "calseg", *sys.stdlib_module_names}
    kernels = {name: tree for name, tree in MODULES.items() if inside(name, "calseg.kernels")}
    assert not [(m, name) for m, tree in kernels.items() for name in imports(tree) if name.split(".")[0] not in known]


@pytest.mark.parametrize(
    ("package", "parts"), [pytest.param(*rule, marks=needs_folder(rule[1][0])) for rule in IMPORTERS.items()]
)
def test_who_imports_a_package(package, parts):
    importers = {module for module, tree in MODULES.items() if any(inside(name, package) for name in imports(tree))}
    assert {m for m in importers if not any(inside(m, f"calseg.{part}") for part in parts)} == set()


def at_module_level(tree: ast.Module) -> ast.Module:
    """Yield the statements that run on import, without bodies of functions and imports for type checkers."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

        def visit_If(self, node):
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Strip().visit(ast.parse(ast.unparse(tree)))


def test_no_circle():
    graph = {
        module: {name for name in imports(at_module_level(tree)) if name in MODULES} - {module}
        for module, tree in MODULES.items()
        if module != "calseg"
    }
    assert sum(map(len, graph.values())) > 10
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle
