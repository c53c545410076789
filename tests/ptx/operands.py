"""Operands of instructions: how their values are read from the registers of a machine, and written to them.

A value is an array that broadcasts to ``[programs, threads]``. One that is the same for all threads of a program, or
for all programs, has a size of 1 there, so addresses and loop counters cost little. A register holds bits: an unsigned
integer of its width, or a bool. Arrays in registers are never changed in place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.parser import Kernel, PtxError, bits_of

if TYPE_CHECKING:
    from ptx.machine import Machine

Mask = np.ndarray | None
"""Threads that execute an instruction, ``[programs, threads]`` of bool. None stands for all of them."""

Read = Callable[["Machine"], Any]
Write = Callable[["Machine", Any, Mask], None]

KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}
TINY = np.float32(2.0**-126)
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%warpid|WARP_SZ")
ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]")


@cache
def unsigned(bits: int) -> np.dtype:
    """Return the dtype of a register of this width."""
    return np.dtype(bool) if bits == 1 else np.dtype(f"u{bits // 8}")


@cache
def dtype_of(type_name: str) -> np.dtype:
    """Return the dtype in which numbers of a PTX type are computed. That of bf16 is float32."""
    if type_name == "bf16":
        return np.dtype(np.float32)
    bits = bits_of(type_name)
    return unsigned(bits) if bits == 1 or "x2" in type_name else np.dtype(f"{KINDS[type_name[0]]}{bits // 8}")


def flushed(x: Any) -> Any:
    """Return float32 numbers with subnormal ones replaced by zeros of their sign."""
    small = np.abs(x) < TINY
    return np.where(small, np.copysign(np.float32(0), x), x) if np.count_nonzero(small) else x


def narrowed(x: Any) -> Any:
    """Return the bits of float32 numbers rounded to bfloat16, as uint16."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def widened(bits: Any) -> Any:
    """Return the float32 numbers of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def immediate(text: str, bits: int) -> int:
    """Return the bits of a constant."""
    if text[:2].lower() in ("0f", "0d"):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0) & ((1 << bits) - 1)


def reader(kernel: Kernel, operand: str, type_name: str) -> Read:
    """Return the function that reads an operand as numbers of a type.

    The operand is a register, a constant, a special register, or the name of an array or parameter, which stands for
    its address.
    """
    if operand.startswith("!"):
        read = reader(kernel, operand[1:], type_name)
        return lambda m: ~read(m)
    if type_name == "bf16":
        read = reader(kernel, operand, "b16")
        return lambda m: widened(read(m))
    dtype, bits = dtype_of(type_name), bits_of(type_name)
    declared = kernel.registers.get(operand)
    if declared is not None:
        return _register_reader(operand, unsigned(bits_of(declared)), unsigned(bits), dtype)
    if operand[0] in "-0123456789":
        number = immediate(operand, bits)
    elif operand in kernel.symbols:
        number = kernel.symbols[operand]
    elif operand in kernel.constants:
        return lambda m: dtype.type(m.memory.address_of(operand))
    elif SPECIAL.fullmatch(operand):
        return lambda m: m.special[operand].astype(unsigned(bits)).view(dtype)
    else:
        raise PtxError(f"unknown operand {operand}")
    constant = np.bool_(number) if bits == 1 else unsigned(bits).type(number).view(dtype)
    return lambda m: constant


def _register_reader(name: str, declared: np.dtype, raw: np.dtype, dtype: np.dtype) -> Read:
    """Return the function that reads a register. A narrower number lies in its lowest bits."""
    if declared == dtype:
        return lambda m: m.registers[name]
    if declared == raw:
        return lambda m: m.registers[name].view(dtype)
    return lambda m: m.registers[name].astype(raw).view(dtype)


def writer(kernel: Kernel, operand: str, type_name: str) -> Write:
    """Return the function that writes numbers of a type to a register. ``_`` takes nothing.

    A wider register gets the number extended by its sign, or by zeros.
    """
    if operand == "_":
        return lambda m, value, mask: None
    declared = kernel.registers.get(operand)
    if declared is None:
        raise PtxError(f"unknown register {operand}")
    register = unsigned(bits_of(declared))
    if type_name == "bf16":
        return lambda m, value, mask: m.write(operand, narrowed(value), mask)
    dtype = dtype_of(type_name)
    if dtype.kind == "b" or dtype.itemsize == register.itemsize:
        return lambda m, value, mask: m.write(operand, value.view(register), mask)
    wide = np.dtype(f"i{register.itemsize}") if dtype.kind == "i" else register
    raw = dtype if dtype.kind == "i" else unsigned(8 * dtype.itemsize)
    return lambda m, value, mask: m.write(operand, value.view(raw).astype(wide).view(register), mask)


def address_reader(kernel: Kernel, operand: str) -> Read:
    """Return the function that reads the address ``[register or name + offset]`` as unsigned 64-bit integers."""
    found = ADDRESS.fullmatch(operand)
    if found is None:
        raise PtxError(f"unknown address {operand}")
    base, offset = found.groups()
    declared = kernel.registers.get(base, "b64")
    read, shift = reader(kernel, base, f"b{bits_of(declared)}"), np.uint64(immediate(offset or "0", 64))
    return lambda m: read(m).astype(np.uint64) + shift


def registers_of(operand: str) -> list[str]:
    """Return the registers of a vector ``{a, b}``, or the only one of another operand."""
    return [name.strip() for name in operand.strip("{} ").split(",")]
