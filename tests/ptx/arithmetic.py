"""Instructions that compute: arithmetic, comparisons, logic, bits and conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.machine import Machine, Step, opcode
from ptx.operands import Mask, dtype_of, flushed, narrowed, reader, unsigned, writer
from ptx.parser import Instruction, Kernel, PtxError, bits_of

Function = Callable[..., Any]
NAN = np.uint32(0x7FFFFFFF)


def computed(
    instruction: Instruction, kernel: Kernel, function: Function, types: str | list[str], result: str | None = None
) -> Step:
    """Return the step ``first operand = function(other operands)``.

    Args:
        instruction: the instruction.
        kernel: its kernel.
        function: the function of the values.
        types: the type of all operands, or of each.
        result: the type of the result. The default is that of the first value.
    """
    names = instruction.operands[1:]
    types = [types] * len(names) if isinstance(types, str) else types
    reads = [reader(kernel, name, type_name) for name, type_name in zip(names, types, strict=True)]
    write = writer(kernel, instruction.operands[0], result or types[0])
    if "ftz" in instruction.modifiers:
        plain = function
        function = lambda *values: _flushed(plain(*map(_flushed, values)))  # noqa: E731
    if len(reads) == 1:
        (read,) = reads
        return lambda m, mask: write(m, function(read(m)), mask)
    if len(reads) == 2:
        first, second = reads
        return lambda m, mask: write(m, function(first(m), second(m)), mask)
    return lambda m, mask: write(m, function(*[read(m) for read in reads]), mask)


def _flushed(x: Any) -> Any:
    return flushed(x) if x.dtype == np.float32 else x


def _canonical(x: Any) -> Any:
    """Return numbers whose NaN are all the same, as a GPU's are."""
    nan = np.isnan(x)
    return np.where(nan, NAN.view(np.float32).astype(x.dtype), x) if np.count_nonzero(nan) else x


# ---- arithmetic ----


def _fused(a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c``. That of float32 is rounded once, but for rare cases between two float64."""
    if a.dtype != np.float32:
        return a * b + c
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _divided(a: Any, b: Any) -> Any:
    """Return a quotient, that of integers rounded towards 0."""
    if a.dtype.kind == "f":
        return a / b
    by = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // by
    return quotient + ((quotient < 0) & (quotient * by != a)).astype(a.dtype) if a.dtype.kind == "i" else quotient


def _remainder(a: Any, b: Any) -> Any:
    return a - _divided(a, b) * np.where(b == 0, b.dtype.type(1), b)


ARITHMETIC: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divided, "rem": _remainder, "fma": _fused,
    "mad": _fused, "neg": np.negative, "abs": np.abs, "min": np.fmin, "max": np.fmax,
}  # fmt: skip
PLAIN = {"rn", "ftz", "lo", "NaN", "sat", "full", "approx"}  # modifiers that ARITHMETIC computes


@opcode(*ARITHMETIC)
def _arithmetic(instruction: Instruction, kernel: Kernel) -> Step:
    type_name, modifiers = instruction.type, set(instruction.modifiers[:-1])
    function = ARITHMETIC[instruction.opcode]
    if type_name[0] in "us" and modifiers & {"wide", "hi"}:
        return _of_double_width(instruction, kernel, wide="wide" in modifiers)
    if unknown := modifiers - PLAIN or type_name.endswith("x2"):
        raise PtxError(f"{instruction.opcode} with {unknown}")
    if "NaN" in modifiers:
        function = {"min": np.minimum, "max": np.maximum}[instruction.opcode]
    if "sat" in modifiers:
        if type_name[0] != "f":
            raise PtxError("saturated integers")
        plain = function
        function = lambda *values: np.fmin(np.fmax(plain(*values), np.float32(0)), np.float32(1))  # noqa: E731
    if instruction.opcode == "div" and modifiers & {"approx", "full"}:
        return approximate(instruction, kernel, np.divide, 2.0**-22)
    if dtype_of(type_name).kind != "f":
        return computed(instruction, kernel, function, type_name)
    return computed(instruction, kernel, lambda *values: _canonical(function(*values)), type_name)


def _of_double_width(instruction: Instruction, kernel: Kernel, *, wide: bool) -> Step:
    """Return the step of a product of twice the width of its factors, or of the upper half of one."""
    type_name = instruction.type
    bits = bits_of(type_name)
    result = f"{type_name[0]}{2 * bits}" if wide else type_name
    if bits == 64:
        raise PtxError("128 bits")
    large, own = dtype_of(f"{type_name[0]}{2 * bits}"), dtype_of(result)

    def function(a: Any, b: Any, *c: Any) -> Any:
        product = a.astype(large) * b.astype(large)
        if not wide:
            product = (product >> large.type(bits)).astype(own)
        return product + c[0] if c else product

    types = [type_name, type_name, result][: len(instruction.operands) - 1]
    return computed(instruction, kernel, function, types, result)


@opcode("copysign")
def _copysign(instruction: Instruction, kernel: Kernel) -> Step:
    return computed(instruction, kernel, lambda sign, value: np.copysign(value, sign), instruction.type)


# ---- functions of the hardware ----

# opcode -> function in float64, the largest error that the PTX manual states, and whether that is absolute.
FUNCTIONS: dict[str, tuple[Function, float, bool]] = {
    "ex2": (np.exp2, 2.0**-22.5, False),
    "lg2": (np.log2, 2.0**-22, True),
    "sin": (np.sin, 2.0**-20.5, True),
    "cos": (np.cos, 2.0**-20.5, True),
    "tanh": (np.tanh, 2.0**-11, False),
    "rcp": (np.reciprocal, 2.0**-23, False),
    "sqrt": (np.sqrt, 2.0**-23, False),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2.0**-22.9, False),
}


@opcode(*FUNCTIONS)
def _function(instruction: Instruction, kernel: Kernel) -> Step:
    function, bound, is_absolute = FUNCTIONS[instruction.opcode]
    if instruction.type != "f32":
        raise PtxError(f"{instruction.opcode} of {instruction.type}")
    if "approx" not in instruction.modifiers:
        return computed(
            instruction, kernel, lambda x: _canonical(function(x.astype(np.float64)).astype(np.float32)), "f32"
        )
    return approximate(instruction, kernel, function, bound, is_absolute=is_absolute)


def approximate(
    instruction: Instruction, kernel: Kernel, function: Function, bound: float, *, is_absolute: bool = False
) -> Step:
    """Return the step of a function of the hardware, with a random error up to the machine's part of its bound.

    An absolute bound holds for results of up to 1, and is relative to larger ones.
    """
    reads = [reader(kernel, name, "f32") for name in instruction.operands[1:]]
    write = writer(kernel, instruction.operands[0], "f32")
    flush = _flushed if "ftz" in instruction.modifiers else lambda x: x

    def step(m: Machine, mask: Mask) -> None:
        value = function(*(flush(read(m)).astype(np.float64) for read in reads))
        if m.error:
            size = np.maximum(np.abs(value), 1.0) if is_absolute else np.abs(value)
            value = value + m.error * bound * m.random.uniform(-1, 1, np.shape(value)) * np.where(value == 0, 0.0, size)
        write(m, _canonical(flush(np.asarray(value, np.float32))), mask)

    return step


# ---- comparisons ----

COMPARISONS: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
LOGIC: dict[str, Function] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def comparison(name: str, type_name: str) -> Function:
    """Return a comparison. Of NaN only those whose name ends in ``u`` are true."""
    is_float = type_name[0] == "f" or type_name == "bf16"
    if is_float and name.endswith("u") and name[:-1] in COMPARISONS:
        ordered = COMPARISONS[name[:-1]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    if is_float and name == "ne":
        return lambda a, b: (a < b) | (a > b)
    return COMPARISONS[name]


@opcode("setp")
def _setp(instruction: Instruction, kernel: Kernel) -> Step:
    name, *others, type_name = instruction.modifiers
    compare, logic = comparison(name, type_name), next((LOGIC[m] for m in others if m in LOGIC), None)
    first, second, *third = instruction.operands[1:]
    a, b = reader(kernel, first, type_name), reader(kernel, second, type_name)
    p = reader(kernel, third[0], "pred") if third else None
    targets = [writer(kernel, name.strip(), "pred") for name in instruction.operands[0].split("|")]
    flush = _flushed if "ftz" in others else lambda x: x

    def step(m: Machine, mask: Mask) -> None:
        holds = compare(flush(a(m)), flush(b(m)))
        for write, each in zip(targets, (holds, ~holds), strict=False):
            write(m, each if p is None else logic(each, p(m)), mask)

    return step


@opcode("selp")
def _selp(instruction: Instruction, kernel: Kernel) -> Step:
    raw = f"b{bits_of(instruction.type)}"
    return computed(instruction, kernel, lambda a, b, p: np.where(p, a, b), [raw, raw, "pred"])


@opcode("testp")
def _testp(instruction: Instruction, kernel: Kernel) -> Step:
    test = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan}[instruction.modifiers[0]]
    return computed(instruction, kernel, test, instruction.type, "pred")


# ---- logic and bits ----


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


# ---- moves and conversions ----


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
