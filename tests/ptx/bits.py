"""Instructions of logic, and those that move or count the bits of a word."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.arithmetic import LOGIC, computed
from ptx.machine import Step, opcode
from ptx.operands import dtype_of, unsigned
from ptx.parser import Instruction, Kernel, PtxError, bits_of


@opcode(*LOGIC)
def _logic(instruction: Instruction, kernel: Kernel) -> Step:
    return computed(instruction, kernel, LOGIC[instruction.opcode], instruction.type)


@opcode("not")
def _not(instruction: Instruction, kernel: Kernel) -> Step:
    return computed(instruction, kernel, np.invert, instruction.type)


@opcode("shl", "shr")
def _shift(instruction: Instruction, kernel: Kernel) -> Step:
    """Shift. One by the width or more leaves nothing but the sign."""
    is_left, dtype, bits = instruction.opcode == "shl", dtype_of(instruction.type), bits_of(instruction.type)
    move, keeps_sign = (np.left_shift if is_left else np.right_shift), dtype.kind == "i" and not is_left

    def function(x: Any, by: Any) -> Any:
        shifted = move(x, np.minimum(by, np.uint32(bits - 1)).astype(dtype))
        return shifted if keeps_sign or not (by >= bits).any() else np.where(by >= bits, dtype.type(0), shifted)

    return computed(instruction, kernel, function, [instruction.type, "u32"])


@opcode("shf")
def _funnel_shift(instruction: Instruction, kernel: Kernel) -> Step:
    side, mode, _ = instruction.modifiers

    def function(low: Any, high: Any, by: Any) -> Any:
        by = (by & np.uint32(31) if mode == "wrap" else np.minimum(by, np.uint32(32))).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        return (both << by >> np.uint64(32) if side == "l" else both >> by).astype(np.uint32)

    return computed(instruction, kernel, function, "b32")


@opcode("prmt")
def _permute(instruction: Instruction, kernel: Kernel) -> Step:
    """Choose four of eight bytes, or their signs."""
    if instruction.modifiers != ("b32",):
        raise PtxError("a mode of prmt")

    def function(a: Any, b: Any, selector: Any) -> Any:
        both, result = b.astype(np.uint64) << np.uint64(32) | a, np.uint64(0)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i) & np.uint32(15)).astype(np.uint64)
            byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            result = result | np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
        return result.astype(np.uint32)

    return computed(instruction, kernel, function, "b32")


@opcode("lop3")
def _lookup(instruction: Instruction, kernel: Kernel) -> Step:
    """Any logic of three words: bit ``4a + 2b + c`` of the table is the result of a, b and c."""

    def function(a: Any, b: Any, c: Any, table: Any) -> Any:
        result = np.uint32(0)
        for i in range(8):
            if int(np.ravel(table)[0]) >> i & 1:
                result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return result

    return computed(instruction, kernel, function, "b32")


def _field(position: Any, length: Any, bits: int, dtype: np.dtype) -> tuple[Any, Any]:
    """Return the first bit of a field of a word, and the mask of its length."""
    position, length = (np.minimum(x & np.uint32(255), np.uint32(bits)).astype(dtype) for x in (position, length))
    one = dtype.type(1)
    return position, np.where(length >= bits, ~dtype.type(0), (one << np.minimum(length, dtype.type(bits - 1))) - one)


def _shifted(x: Any, by: Any, bits: int, *, left: bool) -> Any:
    """Shift by up to ``bits``, which leaves nothing."""
    most = np.minimum(by, by.dtype.type(bits - 1))
    return np.where(by >= bits, x.dtype.type(0), x << most if left else x >> most)


@opcode("bfe")
def _extract_field(instruction: Instruction, kernel: Kernel) -> Step:
    """Take a field of a word. A signed one is extended by the highest of its bits that lie in the word."""
    bits, dtype = bits_of(instruction.type), unsigned(bits_of(instruction.type))
    is_signed = instruction.type[0] == "s"

    def function(x: Any, position: Any, length: Any) -> Any:
        position, mask = _field(position, length, bits, dtype)
        field = _shifted(x, position, bits, left=False) & mask
        if not is_signed:
            return field
        inside = mask & _shifted(~dtype.type(0), position, bits, left=False)
        is_negative = field & (inside ^ inside >> dtype.type(1)) != 0
        return np.where(is_negative, field | ~inside, field)

    return computed(instruction, kernel, function, [f"u{bits}", "u32", "u32"])


@opcode("bfi")
def _insert_field(instruction: Instruction, kernel: Kernel) -> Step:
    bits, dtype = bits_of(instruction.type), dtype_of(instruction.type)

    def function(x: Any, into: Any, position: Any, length: Any) -> Any:
        position, mask = _field(position, length, bits, dtype)
        place = _shifted(mask, position, bits, left=True)
        return (into & ~place) | (_shifted(x, position, bits, left=True) & place)

    return computed(instruction, kernel, function, [instruction.type, instruction.type, "u32", "u32"])


@opcode("popc")
def _count_ones(instruction: Instruction, kernel: Kernel) -> Step:
    return computed(instruction, kernel, lambda x: np.bitwise_count(x).astype(np.uint32), instruction.type, "u32")


@opcode("brev")
def _reverse(instruction: Instruction, kernel: Kernel) -> Step:
    dtype, bits = dtype_of(instruction.type), bits_of(instruction.type)

    def function(x: Any) -> Any:
        step = bits // 2
        while step:  # exchange halves of halves
            kept = dtype.type(sum(1 << i for i in range(bits) if i // step % 2 == 0))
            x = (x & kept) << dtype.type(step) | x >> dtype.type(step) & kept
            step //= 2
        return x

    return computed(instruction, kernel, function, instruction.type)


def _top_bit(x: Any) -> Any:
    """Return the number of the highest bit that is 1, or -1."""
    bits = 8 * x.dtype.itemsize
    place, value = np.zeros(np.shape(x), np.int64), x
    step = bits // 2
    while step:
        is_above = value >> x.dtype.type(step) != 0
        place, value = place + step * is_above, np.where(is_above, value >> x.dtype.type(step), value)
        step //= 2
    return np.where(x == 0, -1, place)


@opcode("clz")
def _leading_zeros(instruction: Instruction, kernel: Kernel) -> Step:
    bits = bits_of(instruction.type)
    return computed(instruction, kernel, lambda x: (bits - 1 - _top_bit(x)).astype(np.uint32), instruction.type, "u32")


@opcode("bfind")
def _find_leading(instruction: Instruction, kernel: Kernel) -> Step:
    """Find the highest bit that differs from the sign, or with ``shiftamt`` by how much to shift it to the top."""
    dtype, bits = dtype_of(instruction.type), bits_of(instruction.type)

    def function(x: Any) -> Any:
        place = _top_bit(np.where(x < 0, ~x, x).view(unsigned(bits)))
        if "shiftamt" in instruction.modifiers:
            place = np.where(place < 0, -1, bits - 1 - place)
        return place.astype(np.int32).view(np.uint32)

    return computed(instruction, kernel, function, f"{'s' if dtype.kind == 'i' else 'u'}{bits}", "u32")
