"""Choice of the backend of a call, and the reasons why a backend cannot run."""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from calseg import native
from calseg.backends import cuda
from calseg.checks import shown
from calseg.installation import NATIVE_ERROR, TRITON_ERROR
from calseg.tensors import PLAIN_TYPES

BACKENDS = ("reference", "cpu", "triton", "cuda")
NOT_ON_GPU = ("ace_loss",)  # operations that no GPU backend has
IN_CUDA = ("calibration_bins",)  # operations that have a kernel in CUDA C++

TRITON_DEVICES = ("cuda", "xpu")  # "cuda" includes ROCm


@cache
def engine(backend: str) -> Any:
    """Return the module of a backend. It is imported when it is first used."""
    return import_module(f"calseg.backends.{backend}")


# ---- the context of a call ----

_is_compiling = torch.compiler.is_compiling
_functorch_level = torch._C._functorch.peek_interpreter_stack
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_jit_tracing_state = torch._C._get_tracing_state


def is_transformed() -> bool:
    """Return whether the call is inside torch.func.grad, vmap and the like, forward mode or torch.jit.trace."""
    # Exclude Dynamo, which handles transforms itself and always sees an interpreter stack here.
    return not _is_compiling() and (
        _functorch_level() is not None or forward_ad._current_level >= 0 or _jit_tracing_state() is not None
    )


def is_plain() -> bool:
    """Return whether the call is plain eager PyTorch, without compiler, transform or dispatch mode."""
    if _is_compiling() or _num_dispatch_modes() or _functorch_level() is not None:
        return False
    return forward_ad._current_level < 0 and _jit_tracing_state() is None


def is_traced(*tensors: Tensor | None) -> bool:
    """Return whether the call must be an operator that PyTorch can see.

    That is so under a compiler, in a dispatch mode (fake tensors, tracing), and for tensors without memory of their
    own.
    """
    if _is_compiling() or _num_dispatch_modes():
        return True
    for tensor in tensors:  # noqa: SIM110  # any() with a generator is slow for a small loss
        if tensor is not None and (type(tensor) not in PLAIN_TYPES or tensor.is_meta):
            return True
    return False


# ---- the choice ----


def is_interpreted(scores: Tensor) -> bool:
    """Return whether Triton's interpreter runs the kernels on the CPU, as in tests."""
    return scores.device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    """Give a warning the first time that it occurs in this process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def choose(scores: Tensor, backend: str | None, operation: str = "") -> str:
    """Return the backend of a call whose main argument is ``scores``.

    It is ``backend`` if that is given and can run the call, else the fastest one that can.
    """
    return _fastest(scores, operation) if backend is None else _asked_for(scores, backend, operation)


def _fastest(scores: Tensor, operation: str) -> str:
    """Return the fastest backend that can run the call."""
    device = scores.device.type
    if is_transformed():  # only the reference supports transforms
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
    """Return ``backend``, or the reference if the backend lacks the dtype or the operation. Raise if it cannot run."""
    device = scores.device.type
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {shown(backend)}, wanted None or one of {', '.join(map(repr, BACKENDS))}")
    if backend == "cpu":
        if native.extension is None:
            raise RuntimeError(f"backend='cpu': the native engine is not available ({NATIVE_ERROR})")
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
            f"backend={backend!r}: the engine has no rule for torch.func, forward mode and torch.jit.trace; "
            "leave the backend out, or pass backend='reference'"
        )
    return backend
