"""Which backend runs a call, and why another one cannot."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from functools import cache
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from calseg import native
from calseg.backends import cuda

BACKENDS = ("reference", "cpu", "triton", "cuda")
NOT_ON_GPU = ("ace_loss",)  # operations that no GPU backend has
IN_CUDA = ("calibration_bins",)  # operations that are written in CUDA C++

MIN_TRITON = (3, 6)  # the oldest that the kernels are tested with
TRITON_DEVICES = ("cuda", "xpu")  # "cuda" is ROCm too


@cache
def engine(backend: str) -> Any:
    """The module of a backend, imported when it is first used."""
    return import_module(f"calseg.backends.{backend}")


# ---- how the call is made ----

_is_compiling = torch.compiler.is_compiling
_functorch_level = torch._C._functorch.peek_interpreter_stack
_num_dispatch_modes = torch._C._len_torch_dispatch_stack


def is_transformed() -> bool:
    """Whether the call is inside torch.func.grad, vmap and the like, or a level of forward-mode differentiation."""
    # Dynamo, which has its own way through transforms, sees an object here in any case.
    return not _is_compiling() and (_functorch_level() is not None or forward_ad._current_level >= 0)


def is_plain() -> bool:
    """Whether nothing but eager PyTorch sees the call: no compiler, transform or dispatch mode."""
    return not (
        _is_compiling() or _functorch_level() is not None or forward_ad._current_level >= 0 or _num_dispatch_modes()
    )


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether the call must be an operator that PyTorch can see: under a compiler or a dispatch mode (fake tensors,
    tracing), or with tensors whose memory is not their own.
    """
    if _is_compiling() or _num_dispatch_modes():
        return True
    for tensor in tensors:  # noqa: SIM110  # a generator takes longer than a small loss can spare
        if tensor is not None and (type(tensor) not in native.PLAIN_TYPES or tensor.is_meta):
            return True
    return False


# ---- why not ----


def triton_version() -> str | None:
    """The version of Triton, by whatever name it is installed."""
    for name in ("triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu", "pytorch-triton-xpu", "triton-windows"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def _triton_error() -> str | None:
    """Why the Triton engine cannot run, or None. Triton itself is imported when it is first used."""
    version = triton_version()
    if version is None:
        return "Triton is not installed: pip install triton"
    if tuple(map(int, version.split(".")[:2])) < MIN_TRITON:
        return f"Triton {version} is too old: pip install 'triton>={'.'.join(map(str, MIN_TRITON))}'"
    return None


TRITON_ERROR = _triton_error()


def is_interpreted(scores: Tensor) -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU: for tests."""
    return scores.device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


# ---- the choice ----


def choose(scores: Tensor, backend: str | None, operation: str = "") -> str:
    """The backend of a call whose main argument is ``scores``: the one asked for, or the fastest that there is."""
    return _fastest(scores, operation) if backend is None else _asked_for(scores, backend, operation)


def _fastest(scores: Tensor, operation: str) -> str:
    device = scores.device.type
    if is_transformed():  # the reference is differentiable and batched to any depth
        return "reference"
    if device in ("cpu", "meta"):
        return "cpu" if native.extension is not None else "reference"
    if device not in TRITON_DEVICES or scores.dtype == torch.float64 or operation in NOT_ON_GPU:
        return "reference"
    if operation in IN_CUDA and device in cuda.DEVICES and cuda.error(scores) is None:
        return "cuda"
    if TRITON_ERROR is None:
        return "triton"
    if not _is_compiling():
        _warn_once(f"calseg: {TRITON_ERROR}; on {device} the slow reference backend is used")
    return "reference"


def _asked_for(scores: Tensor, backend: str, operation: str) -> str:
    device = scores.device.type
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted None or one of {', '.join(map(repr, BACKENDS))}")
    if backend == "cpu":
        if native.extension is None:
            raise RuntimeError(f"backend='cpu': the native engine is not available ({native.ERROR})")
        if device != "cpu":
            raise ValueError(f"backend='cpu': got a tensor on {scores.device}, wanted one on the CPU")
    if backend == "triton":
        if TRITON_ERROR is not None:
            raise RuntimeError(f"backend='triton': {TRITON_ERROR}")
        if device not in TRITON_DEVICES and not is_interpreted(scores):
            wanted = "one on a GPU (or TRITON_INTERPRET=1 set before Triton is imported)"
            raise ValueError(f"backend='triton': got a tensor on {scores.device}, wanted {wanted}")
    if backend == "cuda":
        if operation not in IN_CUDA:
            raise ValueError(f"backend='cuda': only {', '.join(IN_CUDA)} has a CUDA kernel; 'triton' has all")
        if (error := cuda.error(scores)) is not None:
            raise RuntimeError(f"backend='cuda': {error}")
        if device not in cuda.DEVICES:
            raise ValueError(f"backend='cuda': got a tensor on {scores.device}, wanted one on a CUDA device")
    if backend in ("triton", "cuda") and (scores.dtype == torch.float64 or operation in NOT_ON_GPU):
        return "reference"
    if backend != "reference" and is_transformed():
        raise RuntimeError(
            f"backend={backend!r}: the engine has no rule for torch.func and forward-mode differentiation; "
            "leave the backend out, or pass backend='reference'"
        )
    return backend
