"""What is installed: the compiled extension, Triton and PyTorch. PyTorch, which takes seconds, is not imported here."""

from __future__ import annotations

import platform
import runpy
from contextlib import suppress
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any

from calseg._version import __version__

MIN_TRITON = (3, 6)  # the oldest version that the kernels are tested with

extension: Any = None
NATIVE_ERROR: str | None = None
try:
    extension = import_module("calseg._native")
except ImportError as error:
    NATIVE_ERROR = str(error).splitlines()[0]


def triton_version() -> str | None:
    """Return the version of Triton, which packages of several names contain, or None."""
    for name in ("triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu", "pytorch-triton-xpu", "triton-windows"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def _triton_error() -> str | None:
    """Return the reason why the Triton backend cannot run, or None. Triton itself is not imported here."""
    version = triton_version()
    if version is None:
        return "Triton is not installed: pip install triton"
    if tuple(map(int, version.split(".")[:2])) < MIN_TRITON:
        return f"Triton {version} is too old: pip install 'triton>={'.'.join(map(str, MIN_TRITON))}'"
    return None


TRITON_ERROR = _triton_error()


def torch_versions() -> dict[str, Any]:
    """Return what torch/version.py says: ``__version__``, ``cuda``, ``hip`` and more. Without PyTorch, nothing."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))


def installed() -> dict[str, Any]:
    """Return versions and what was compiled: the part of :func:`calseg.info` that does not take ``import torch``."""
    torch = torch_versions()
    return {
        "calseg": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.get("__version__"),
        "cuda": torch.get("cuda"),
        "triton": triton_version() if TRITON_ERROR is None else None,
        "triton_error": TRITON_ERROR,
        "native_error": NATIVE_ERROR,
        "isa": None if extension is None else extension.isa(),
        "available_isas": [] if extension is None else extension.available_isas(),
        "cuda_architectures": [] if extension is None else list(extension.CUDA_ARCHITECTURES),
    }
