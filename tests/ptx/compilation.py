"""Compilation of Triton kernels for a GPU that is not there."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.nvidia.compiler import CUDABackend

from calseg.backends import choice
from ptx.execution import ready, span_of
from ptx.parser import Kernel, PtxError

FORMATS = {"i1": "i", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "I", "u8": "B", "u16": "H", "u32": "I",
           "u64": "Q", "fp32": "f", "fp64": "d"}  # fmt: skip


def without_machine_code() -> None:
    """Let the Triton backend take CPU tensors, and compile kernels to PTX only.

    Machine code takes most of the time of a compilation. Kernels without it have a cache of their own. TRITON_INTERPRET
    must not be set when Triton is imported.
    """
    choice.is_interpreted = lambda scores: scores.device.type == "cpu"
    CUDABackend.make_cubin = lambda self, source, metadata, *_: b""
    triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir) / "ptx")


class CompiledLaunch(NamedTuple):
    """A launch of a kernel that was compiled for its arguments."""

    text: str  # the PTX
    kernel: Kernel
    parameters: bytes
    shared_bytes: int
    spans: list[tuple[int, int]]  # the addresses of its tensors


def compiled_launch(kernel: Any, programs: int, arguments: Sequence[Any], num_warps: int) -> CompiledLaunch:
    """Compile a kernel for the arguments of a launch."""
    binary = kernel.warmup(*arguments, grid=(programs,), num_warps=num_warps, enable_fp_fusion=True)
    bound = dict(zip(kernel.arg_names, arguments, strict=True))
    given = [each for name, kind in binary.src.signature.items() for each in flattened(kind, bound[name])]
    spans = [span_of(value) for kind, value in given if kind.startswith("*")]
    text = binary.asm["ptx"]
    compiled, _ = ready(text)
    return CompiledLaunch(text, compiled, packed(compiled, given), binary.metadata.shared, spans)


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
