"""Launches of Triton kernels: each is compiled for sm_90, and its PTX runs on the tensors of the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from ahead_of_time import Driver
from calseg.kernels import launch

from ptx.compilation import compiled_launch, without_machine_code
from ptx.execution import run

ARCHITECTURE = 90
error = 0.0
"""The part of the error of the hardware's approximations that kernels get, 0 to 1."""


def install() -> None:
    """Let the Triton backend run PTX on CPU tensors."""
    without_machine_code()
    triton.runtime.driver.set_active(Driver(ARCHITECTURE))
    launch.launch_kernel = launch_kernel


def launch_kernel(kernel: Any, programs: int, like: torch.Tensor, arguments: Sequence[Any], num_warps: int) -> None:
    """Do as :func:`calseg.kernels.launch.launch_kernel`, in the interpreter of PTX."""
    _run(kernel, programs, arguments, num_warps)


def run_program(kernel: Any, programs: int, program: int, arguments: Sequence[Any], num_warps: int) -> None:
    """Run one program of a launch."""
    _run(kernel, programs, arguments, num_warps, only=[program])


def _run(
    kernel: Any, programs: int, arguments: Sequence[Any], num_warps: int, only: Sequence[int] | None = None
) -> None:
    """Compile a kernel for these arguments, and run its PTX."""
    if programs == 0:
        return
    text, _, parameters, shared_bytes, spans = compiled_launch(kernel, programs, arguments, num_warps)
    run(text, parameters, programs, spans, shared_bytes=shared_bytes, only=only, error=error)
