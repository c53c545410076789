"""Variational label smoothing for calibrated segmentation: fused losses for PyTorch."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from calseg._version import __version__ as __version__

if TYPE_CHECKING:
    from calseg.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Import a module of calseg, or all public names and with them PyTorch, when one is used first.

    ``calseg info`` uses none, so that it does not wait for PyTorch.
    """
    if find_spec(f"calseg.{name}") is not None:
        return import_module(f"calseg.{name}")
    api = import_module("calseg.api")
    globals().update({each: getattr(api, each) for each in ("__all__", *api.__all__)})
    if name not in globals():
        raise AttributeError(f"module 'calseg' has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("calseg.api").__all__})
