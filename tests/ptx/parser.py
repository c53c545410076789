"""Parser of PTX text: the parameters, registers, shared memory and instructions of a kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{};]*)\n\{\n(.*?)\n\}", re.S)
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,]*?\b(\w+)(?:\[(\d+)\])?\s*$", re.S)
LABEL = re.compile(r"([\w$]+):(?!:)\s*(.*)", re.S)
INSTRUCTION = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z]\w*)((?:[.:][\w:]+)*)\s*(.*)", re.S)
ARRAY = re.compile(r"\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\](?:\s*=\s*\{([^}]*)\})?")
SOURCE = re.compile(r"^\s*\.loc\b.*//\s*(\S+)\s*$")
BRACES = re.compile(r"[{}\[\]]")


class PtxError(Exception):
    """Error of a kernel, or an instruction that the interpreter does not know."""


class Parameter(NamedTuple):
    """A parameter of a kernel: its place in the bytes of all parameters, and its type (``b8`` for a structure)."""

    name: str
    type: str
    offset: int
    size: int


class Instruction(NamedTuple):
    """An instruction: ``@guard opcode.modifiers operands``, with its text and its place in the source."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None
    guard_is_negated: bool
    text: str
    source: str

    @property
    def type(self) -> str:
        """The last modifier, which is the type of the operands for most instructions."""
        return self.modifiers[-1]

    def __str__(self) -> str:
        return f"{self.text} ({self.source})" if self.source else self.text


@dataclass
class Kernel:
    """A kernel.

    Attributes:
        name: the name of the entry.
        parameters: the parameters in their order.
        threads: the number of threads of a program that the kernel requires or allows.
        registers: the type of every register.
        code: the instructions.
        labels: the index of the instruction that follows each label.
        symbols: the offset of every array in shared memory, and of every parameter.
        shared_bytes: the size of the arrays in shared memory whose size the kernel states.
        constants: the bytes of every initialised array in global memory.
    """

    name: str
    parameters: list[Parameter]
    threads: int
    registers: dict[str, str] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    symbols: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    constants: dict[str, bytes] = field(default_factory=dict)


@cache
def bits_of(type_name: str) -> int:
    """Return the bits of a type such as ``u32``, ``bf16``, ``f16x2`` or ``pred``."""
    if type_name == "pred":
        return 1
    return {"f16x2": 32, "bf16x2": 32}.get(type_name) or int(re.sub(r"^[a-z]+", "", type_name))


def names_of(text: str) -> list[str]:
    """Return the names of the kernels of a PTX file."""
    return re.findall(r"\.entry\s+([\w$]+)", text)


def parse(text: str, name: str) -> Kernel:
    """Return a kernel of a PTX file."""
    entry = ENTRY.search(text, text.index(f".entry {name}("))
    if entry is None:
        raise PtxError(f"no kernel {name}")
    _, parameters, directives, body = entry.groups()
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", directives)
    kernel = Kernel(name, _parameters(parameters), int(threads[1]) if threads else 0)
    kernel.symbols.update((parameter.name, parameter.offset) for parameter in kernel.parameters)
    for line in ENTRY.sub("", text).splitlines():
        _parse_array(kernel, line)
    _parse_body(kernel, body)
    return kernel


def split_operands(text: str) -> list[str]:
    """Split at the commas that are outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    rest = text[start:].strip()
    return [*parts, rest] if rest else parts


def _parameters(text: str) -> list[Parameter]:
    """Return the parameters of an entry, each at the next offset that its alignment allows."""
    parameters: list[Parameter] = []
    end = 0
    for declaration in filter(None, map(str.strip, text.split(","))):
        found = PARAMETER.match(declaration)
        if found is None:
            raise PtxError(f"unknown parameter: {declaration}")
        type_name, name, length = found.groups()
        size = bits_of(type_name) // 8 * int(length or 1)
        stated = re.match(r"\.param\s+\.align\s+(\d+)", declaration)
        align = int(stated[1]) if stated else size
        offset = -(-end // align) * align
        parameters.append(Parameter(name, type_name, offset, size))
        end = offset + size
    return parameters


def _parse_body(kernel: Kernel, body: str) -> None:
    """Read the instructions, labels and registers of a kernel."""
    source, pending = "", ""
    for line in body.splitlines():
        if stated := SOURCE.match(line):
            source = stated[1]
        code = re.sub(r"//.*", "", line).strip()
        if code.startswith((".loc", ".pragma", ".file")):
            continue
        while code and not pending and (label := LABEL.fullmatch(code)):
            kernel.labels[label[1]] = len(kernel.code)
            code = label[2].strip()
        *statements, pending = (pending + " " + code).split(";")
        pending = _without_scope(pending)
        for statement in statements:
            _parse_statement(kernel, _without_scope(statement), source)
    if pending:
        raise PtxError(f"unfinished statement: {pending}")


def _without_scope(statement: str) -> str:
    """Strip the braces of a scope, whose registers have names of their own here too."""
    return (
        statement.strip().lstrip("{").strip() if statement.strip()[:1] == "{" else statement.strip().lstrip("}").strip()
    )


def _parse_statement(kernel: Kernel, statement: str, source: str) -> None:
    """Read one instruction, or the declaration of registers or of shared memory."""
    if not statement or _parse_array(kernel, statement):
        return
    if statement.startswith(".reg"):
        type_name, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
        for name in map(str.strip, names.split(",")):
            many = re.fullmatch(r"(.*)<(\d+)>", name)
            for each in (f"{many[1]}{i}" for i in range(int(many[2]))) if many else (name,):
                if kernel.registers.setdefault(each, type_name) != type_name:
                    raise PtxError(f"register {each} is declared with two types: {statement}")
        return
    found = INSTRUCTION.fullmatch(statement)
    if found is None:
        raise PtxError(f"no instruction: {statement}")
    negated, guard, opcode, modifiers, operands = found.groups()
    kernel.code.append(
        Instruction(
            opcode, tuple(modifiers.split(".")[1:]), tuple(split_operands(operands)), guard, negated == "!",
            re.sub(r"\s+", " ", statement), source,
        )
    )  # fmt: skip


def _parse_array(kernel: Kernel, statement: str) -> bool:
    """Read the declaration of an array in shared memory, or of a constant one. Return whether it is one."""
    found = ARRAY.search(statement)
    if found is None:
        return False
    align, name, size, values = found.groups()
    if ".shared" in statement:
        kernel.symbols[name] = -(-kernel.shared_bytes // int(align)) * int(align)
        kernel.shared_bytes = kernel.symbols[name] + int(size or 0)
    elif values is not None:
        given = bytes(int(value) for value in values.split(","))
        kernel.constants[name] = given.ljust(int(size), b"\0")
    return True
