"""Launches of Triton kernels: each is compiled for sm_90, and its PTX runs on the tensors of the CPU."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from ahead_of_time import Driver
from calseg.kernels import launch
from triton.backends.nvidia.compiler import CUDABackend

from calseg.backends import choice
from ptx.execution import ready, run, span_of
from ptx.parser import Kernel, PtxError

ARCHITECTURE = 90
FORMATS = {"i1": "i", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "I", "u8": "B", "u16": "H", "u32": "I",
           "u64": "Q", "fp32": "f", "fp64": "d"}  # fmt: skip

error = 0.0
"""The part of the error of the hardware's approximations that kernels get, 0 to 1."""


def install() -> None:
    """Let the Triton backend run PTX on CPU tensors. TRITON_INTERPRET must not be set when Triton is imported."""
    choice.is_interpreted = lambda scores: scores.device.type == "cpu"
    # Machine code takes most of the time of a compilation, and is not needed. Kernels without it have their own cache.
    CUDABackend.make_cubin = lambda self, source, metadata, *_: b""
    triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir) / "ptx")
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
    binary = kernel.warmup(*arguments, grid=(programs,), num_warps=num_warps, enable_fp_fusion=True)
    bound = dict(zip(kernel.arg_names, arguments, strict=True))
    given = [each for name, kind in binary.src.signature.items() for each in flattened(kind, bound[name])]
    spans = [span_of(value) for kind, value in given if kind.startswith("*")]
    text = binary.asm["ptx"]
    parameters = packed(ready(text)[0], given)
    run(text, parameters, programs, spans, shared_bytes=binary.metadata.shared, only=only, error=error)


def flattened(signature: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the arguments of a launch that reach the kernel, with their types. Tuples are taken apart."""
    if isinstance(signature, (tuple, list)):
        for of_field, field in zip(signature, value, strict=True):
            yield from flattened(of_field, field)
    elif signature != "constexpr":
        yield signature, value


def packed(kernel: Kernel, given: Sequence[tuple[str, Any]]) -> bytes:
    """Return the bytes of the parameters of a kernel. Those that Triton adds, for its scratch memory, are null."""
    result = bytearray()
    for i, parameter in enumerate(kernel.parameters):
        signature, value = given[i] if i < len(given) else ("*", None)
        if signature.startswith("*"):
            bits = struct.pack("<Q", 0 if value is None else value.data_ptr())
        else:
            bits = struct.pack("<" + FORMATS[signature], value)
        if len(bits) != parameter.size:
            raise PtxError(f"{kernel.name}: parameter {i} is {parameter.type}, got {signature}")
        result += bytes(parameter.offset - len(result)) + bits
    return bytes(result)
