"""Instructions that compute numbers, and compare them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.machine import Machine, Step, opcode
from ptx.operands import Mask, dtype_of, flushed, reader, writer
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
    if instruction.opcode == "max" and type_name in ("f16x2", "bf16x2") and not modifiers:
        return _larger_of_pairs(instruction, kernel, type_name.removesuffix("x2"))
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


def _larger_of_pairs(instruction: Instruction, kernel: Kernel, part: str) -> Step:
    """Return the step that computes the larger halves of two words. If one is NaN, it is the other."""

    def widened(bits: Any) -> Any:
        return (bits << np.uint32(16)).view(np.float32) if part == "bf16" else bits.astype(np.uint16).view(np.float16)

    def function(a: Any, b: Any) -> Any:
        word = np.zeros_like(a)
        for shift in map(np.uint32, (0, 16)):
            x, y = (number >> shift & np.uint32(0xFFFF) for number in (a, b))
            takes_first = np.isnan(widened(y)) | (widened(x) > widened(y))
            word |= np.where(takes_first, x, y) << shift
        return word

    return computed(instruction, kernel, function, "b32")


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
