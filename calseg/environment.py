"""The versions, backends and devices that calseg runs with."""

from __future__ import annotations

from typing import Any

import torch

from calseg.backends import choice, cuda
from calseg.installation import TRITON_ERROR, extension, installed


def info() -> dict[str, Any]:
    """Return versions, backends, instruction set, threads and GPU.

    The command ``calseg info`` prints the part that is known without importing PyTorch, which takes seconds;
    ``calseg info --runtime`` prints everything. Only PyTorch, once loaded, can say how many threads it uses, which
    OpenMP runtime it brings, and which GPU it sees.

    Returns:
        A flat dictionary of strings, numbers, lists and None, ready for JSON.

    Example:
        >>> import calseg
        >>> "cpu" in calseg.info()["backends"] or calseg.info()["native_error"] is not None
        True
    """
    gpu = torch.cuda.is_available() or torch.xpu.is_available()
    runs = {
        "reference": True,
        "cpu": extension is not None,
        "triton": TRITON_ERROR is None and (gpu or choice.is_interpreted(torch.empty(0))),
        "cuda": torch.cuda.is_available() and cuda.error(torch.empty(0, device="cuda")) is None,
    }
    return {
        **installed(),
        "backends": [name for name in choice.BACKENDS if runs[name]],
        "threading_layer": None if extension is None else extension.threading_layer(),
        "num_threads": torch.get_num_threads(),
        "pool_held_bytes": 0 if extension is None else extension.pool_held_bytes(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
