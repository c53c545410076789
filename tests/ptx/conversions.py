"""Instructions that move values, and convert them to other types."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.arithmetic import computed
from ptx.machine import Machine, Step, opcode
from ptx.operands import Mask, dtype_of, narrowed, reader, unsigned, writer
from ptx.parser import Instruction, Kernel, PtxError, bits_of


@opcode("mov")
def _move(instruction: Instruction, kernel: Kernel) -> Step:
    """Copy a value, put parts together into a word, or take a word apart."""
    to, source = instruction.operands
    bits = bits_of(instruction.type)
    raw = "pred" if bits == 1 else f"b{bits}"
    if not to.startswith("{") and not source.startswith("{"):
        return computed(instruction, kernel, lambda x: x, raw)
    parts = [name.strip() for name in (to if to.startswith("{") else source).strip("{} ").split(",")]
    part, word = f"b{bits // len(parts)}", unsigned(bits)
    shifts = [word.type(bits // len(parts) * i) for i in range(len(parts))]
    if to.startswith("{"):
        read, writes = reader(kernel, source, raw), [writer(kernel, name, part) for name in parts]

        def take_apart(m: Machine, mask: Mask) -> None:
            value = read(m)
            for write, shift in zip(writes, shifts, strict=True):
                write(m, (value >> shift).astype(dtype_of(part)), mask)

        return take_apart
    reads, write = [reader(kernel, name, part) for name in parts], writer(kernel, to, raw)

    def put_together(m: Machine, mask: Mask) -> None:
        value = word.type(0)
        for read, shift in zip(reads, shifts, strict=True):
            value = value | read(m).astype(word) << shift
        write(m, value, mask)

    return put_together


@opcode("cvta")
def _convert_address(instruction: Instruction, kernel: Kernel) -> Step:
    return computed(instruction, kernel, lambda x: x, f"b{bits_of(instruction.type)}")


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@opcode("cvt")
def _convert(instruction: Instruction, kernel: Kernel) -> Step:
    *how, to, source = instruction.modifiers
    rounding = next((ROUNDINGS[name] for name in how if name in ROUNDINGS), None)
    if unknown := set(how) - {*ROUNDINGS, "rn", "ftz", "sat"}:
        raise PtxError(f"cvt with {unknown}")
    if to in ("bf16x2", "f16x2"):
        return _convert_pair(instruction, kernel, to.removesuffix("x2"))
    is_float, from_float = to[0] in "f" or to == "bf16", source[0] == "f" or source == "bf16"

    def function(x: Any) -> Any:
        if from_float and rounding is not None:
            x = rounding(x)
        result = x.astype(dtype_of(to)) if is_float or not from_float else _saturated(x, dtype_of(to))
        return np.clip(result, 0, 1).astype(result.dtype) if "sat" in how and is_float else result

    if "sat" in how and not is_float and not from_float:
        raise PtxError("saturated integers")
    return computed(instruction, kernel, function, source, to)


def _saturated(x: Any, dtype: np.dtype) -> Any:
    """Return whole numbers of floating point as integers: the nearest of their type, and 0 for NaN."""
    limits = np.iinfo(dtype)
    wide = np.nan_to_num(x.astype(np.float64), nan=0.0)
    inside = np.where((wide < float(limits.max)) & (wide > float(limits.min)), wide, 0.0).astype(dtype)
    beyond = np.where(wide >= float(limits.max), dtype.type(limits.max), inside)
    return np.where(wide <= float(limits.min), dtype.type(limits.min), beyond)


def _convert_pair(instruction: Instruction, kernel: Kernel, part: str) -> Step:
    """Return the step that converts two float32 numbers into halves of a word, the first one into the upper half."""
    reads = [reader(kernel, name, "f32") for name in instruction.operands[1:]]
    write = writer(kernel, instruction.operands[0], "b32")
    convert = narrowed if part == "bf16" else lambda x: x.astype(np.float16).view(np.uint16)

    def step(m: Machine, mask: Mask) -> None:
        high, low = (convert(read(m)).astype(np.uint32) for read in reads)
        write(m, high << np.uint32(16) | low, mask)

    return step
