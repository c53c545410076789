"""The versions, backends and devices that calseg runs with."""

from __future__ import annotations

import platform
from typing import Any

import torch

from calseg import native
from calseg._version import __version__
from calseg.backends import choice, cuda


def info() -> dict[str, Any]:
    """Return versions, backends, instruction set, threads and GPU.

    The command ``calseg info`` takes as long as ``import torch``: only PyTorch, once loaded, can say how many threads
    it uses, which OpenMP runtime it brings, and which GPU it sees.

    Returns:
        A flat dictionary of strings, numbers, lists and None, ready for JSON.

    Example:
        >>> import calseg
        >>> "cpu" in calseg.info()["backends"] or calseg.info()["native_error"] is not None
        True
    """
    extension = native.extension
    gpu = torch.cuda.is_available() or torch.xpu.is_available()
    runs = {
        "reference": True,
        "cpu": extension is not None,
        "triton": choice.TRITON_ERROR is None and (gpu or choice.is_interpreted(torch.empty(0))),
        "cuda": torch.cuda.is_available() and cuda.error(torch.empty(0, device="cuda")) is None,
    }
    return {
        "calseg": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "backends": [name for name in choice.BACKENDS if runs[name]],
        "native_error": native.ERROR,
        "isa": None if extension is None else extension.isa(),
        "available_isas": [] if extension is None else extension.available_isas(),
        "threading_layer": None if extension is None else extension.threading_layer(),
        "num_threads": torch.get_num_threads(),
        "pool_held_bytes": 0 if extension is None else extension.pool_held_bytes(),
        "triton": choice.triton_version() if choice.TRITON_ERROR is None else None,
        "triton_error": choice.TRITON_ERROR,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "cuda_architectures": [] if extension is None else list(extension.CUDA_ARCHITECTURES),
    }
