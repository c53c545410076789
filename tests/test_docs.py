"""Tests of public docstrings: examples give the printed results, and every argument is described."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest

import calseg

MODULES = {"calseg": calseg}
for extra, packages in {
    "metrics": ("torchmetrics",),
    "plots": ("matplotlib",),
    "integrations.monai": ("monai", "ignite", "torchmetrics"),
    "integrations.lightning": ("lightning", "matplotlib"),
}.items():
    if all(map(importlib.util.find_spec, packages)):
        MODULES[f"calseg.{extra}"] = importlib.import_module(f"calseg.{extra}")
PUBLIC = [
    pytest.param(module, name, id=f"{path}.{name}")
    for path, module in MODULES.items()
    for name in module.__all__
    if name not in ("__version__", "PRESETS")
]


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_docstring(module, name):
    thing = getattr(module, name)
    examples = doctest.DocTestFinder(recurse=False).find(thing, name, globs={})
    assert examples, f"{name} has no docstring"
    assert examples[0].examples, f"{name} has no example"
    report: list[str] = []
    outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples[0], out=report.append)
    assert outcome.failed == 0, "".join(report)


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_every_argument_is_described(module, name):
    """Every parameter has a line under Args, and there are sections on results and exceptions."""
    thing = getattr(module, name)
    documentation = inspect.getdoc(thing) or ""
    parameters = [p for p in inspect.signature(thing).parameters if p not in ("self", "args", "kwargs")]
    for parameter in parameters:
        assert f"\n    {parameter}: " in documentation, f"{name}: {parameter}"
    if not inspect.isclass(thing) and parameters:
        assert "Returns:" in documentation
        assert "Raises:" in documentation


def test_names():
    assert sorted(calseg.__all__) == list(calseg.__all__)
    assert calseg.__version__ == calseg.info()["calseg"]
