"""Instructions that use memory: loads, stores, atomic changes, and the exchange of matrices through shared memory."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ptx.machine import WARP, Machine, Step, opcode
from ptx.operands import Mask, address_reader, dtype_of, reader, registers_of, writer
from ptx.parser import Instruction, Kernel, PtxError, bits_of
from ptx.warps import together


def _space_of(instruction: Instruction) -> str:
    """Return the state space that an instruction names. ``shared::cta`` is ``shared``."""
    for modifier in instruction.modifiers:
        if modifier.split("::")[0] in ("global", "shared", "param"):
            return modifier.split("::")[0]
    raise PtxError("generic addresses, or an unknown state space")


def _count_of(instruction: Instruction) -> int:
    """Return the size of a vector."""
    return next((int(m[1:]) for m in instruction.modifiers if re.fullmatch(r"v\d", m)), 1)


def _chosen(m: Machine, value: Any, mask: Mask) -> np.ndarray:
    """Return the values of the threads of a group."""
    return m.full(value).ravel() if mask is None else m.full(value)[m.everyone(mask)]


def _threads(m: Machine, mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """Return the program and the number of each thread of a group."""
    return np.nonzero(m.everyone(mask))


def _spread(m: Machine, values: np.ndarray, mask: Mask) -> np.ndarray:
    """Return the values of the threads of a group as an array ``[programs, threads]``, with zeros for the others."""
    if mask is None:
        return values.reshape(m.shape)
    result = np.zeros(m.shape, values.dtype)
    result[m.everyone(mask)] = values
    return result


# ---- loads and stores ----


@opcode("ld")
def _load(instruction: Instruction, kernel: Kernel) -> Step:
    space, count, type_name = _space_of(instruction), _count_of(instruction), instruction.type
    if space == "param":
        return _load_parameter(instruction, kernel)
    writes = [writer(kernel, name, type_name) for name in registers_of(instruction.operands[0])]
    address, dtype = address_reader(kernel, instruction.operands[1]), _stored(type_name)

    def step(m: Machine, mask: Mask) -> None:
        addresses = address(m)
        if space == "global" and mask is None and addresses.size < m.shape[0] * m.shape[1]:
            values = m.memory.load(addresses.ravel(), dtype, count)  # once for all threads that have the same address
            values = values.reshape(count, *addresses.shape)
        else:
            at = _chosen(m, addresses, mask)
            if space == "global":
                loaded = m.memory.load(at, dtype, count)
            else:
                loaded = m.shared.load(*_threads(m, mask), at, dtype, count)
            values = [_spread(m, each, mask) for each in loaded]
        for write, each in zip(writes, values, strict=True):
            write(m, each, mask)

    return step


def _stored(type_name: str) -> np.dtype:
    """Return the dtype of a number in memory. Bits have no other meaning there."""
    return dtype_of(f"b{bits_of(type_name)}" if type_name[0] in "bf" else type_name)


def _load_parameter(instruction: Instruction, kernel: Kernel) -> Step:
    type_name = instruction.type
    names = registers_of(instruction.operands[0])
    writes, address = (
        [writer(kernel, name, type_name) for name in names],
        address_reader(kernel, instruction.operands[1]),
    )
    dtype = _stored(type_name)

    def step(m: Machine, mask: Mask) -> None:
        addresses = address(m)
        at = np.unique(addresses if addresses.size == 1 else _chosen(m, addresses, mask))
        if len(at) != 1:
            raise PtxError("threads read different parameters")
        for i, write in enumerate(writes):
            write(m, np.frombuffer(m.parameters, dtype, 1, int(at[0]) + i * dtype.itemsize)[0], mask)

    return step


@opcode("st")
def _store(instruction: Instruction, kernel: Kernel) -> Step:
    space, dtype = _space_of(instruction), _stored(instruction.type)
    address = address_reader(kernel, instruction.operands[0])
    reads = [reader(kernel, name, f"b{8 * dtype.itemsize}") for name in registers_of(instruction.operands[1])]

    def step(m: Machine, mask: Mask) -> None:
        at, values = _chosen(m, address(m), mask), np.stack([_chosen(m, read(m), mask) for read in reads])
        if space == "global":
            m.memory.store(at, values)
        else:
            m.shared.store(*_threads(m, mask), at, values)

    return step


# ---- copies that are done later ----

COPY = np.dtype(np.uint32)  # of which a copy has four


@opcode("cp")
def _copy(instruction: Instruction, kernel: Kernel) -> Step:
    """Begin to copy 16 bytes from global to shared memory, or wait: only then are the copies of the threads made."""
    if instruction.modifiers == ("async", "wait_all"):
        return _finish_copies
    if instruction.modifiers != ("async", "cg", "shared", "global") or instruction.operands[2:] != ("16",):
        raise PtxError("another copy")
    to, source = (address_reader(kernel, operand) for operand in instruction.operands[:2])

    def step(m: Machine, mask: Mask) -> None:
        values = m.memory.load(_chosen(m, source(m), mask), COPY, 4)
        m.copies.append((*_threads(m, mask), _chosen(m, to(m), mask), values))

    return step


def _finish_copies(m: Machine, mask: Mask) -> None:
    here, begun, m.copies = m.everyone(mask), m.copies, []
    for programs, threads, at, values in begun:
        done = here[programs, threads]
        m.shared.store(programs[done], threads[done], at[done], values[:, done])
        if not done.all():
            m.copies.append((programs[~done], threads[~done], at[~done], values[:, ~done]))


# ---- atomic changes ----

ATOMICS: dict[str, np.ufunc] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


@opcode("atom", "red")
def _atomic(instruction: Instruction, kernel: Kernel) -> Step:
    """Change a number in memory. Threads come in their order."""
    kind, type_name = instruction.modifiers[-2:]
    space, dtype = _space_of(instruction), dtype_of(type_name)
    place, *values = instruction.operands[instruction.opcode == "atom" :]
    address, reads = address_reader(kernel, place), [reader(kernel, value, type_name) for value in values]
    write = writer(kernel, instruction.operands[0], type_name) if instruction.opcode == "atom" else None
    if kind not in (*ATOMICS, "exch", "cas"):
        raise PtxError(f"atomic {kind}")

    def step(m: Machine, mask: Mask) -> None:
        at, given = _chosen(m, address(m), mask), [_chosen(m, read(m), mask) for read in reads]
        before = np.zeros(len(at), dtype)

        def change(numbers: np.ndarray, places: np.ndarray, chosen: Any) -> None:
            before[chosen] = changed(kind, numbers, places, *(value[chosen] for value in given))

        if space == "global":
            m.memory.update(at, dtype, change)
        else:
            m.shared.update(*_threads(m, mask), at, dtype, change)
        if write is not None:
            write(m, _spread(m, before, mask), mask)

    return step


def changed(kind: str, numbers: np.ndarray, places: np.ndarray, *values: np.ndarray) -> np.ndarray:
    """Change ``numbers[places]`` one after the other, and return what each was before."""
    before = np.empty(len(places), numbers.dtype)
    order = np.argsort(places, kind="stable")
    at = places[order]
    is_first = np.concatenate([np.ones(min(1, len(at)), bool), at[1:] != at[:-1]])
    # The rank of each change among those of its place. Those of one rank have different places.
    rank = np.arange(len(at)) - np.maximum.accumulate(np.where(is_first, np.arange(len(at)), 0))
    for turn in range(int(rank.max(initial=-1)) + 1):
        now = order[rank == turn]
        old = numbers[places[now]]
        before[now] = old
        given = [value[now] for value in values]
        if kind == "cas":
            numbers[places[now]] = np.where(old == given[0], given[1], old)
        else:
            numbers[places[now]] = given[0] if kind == "exch" else ATOMICS[kind](old, given[0])
    return before


# ---- matrices ----


@opcode("ldmatrix", "stmatrix")
def _matrix(instruction: Instruction, kernel: Kernel) -> Step:
    """Exchange matrices of 8 x 8 halves: lane ``8 i + r`` has the address of row r of matrix i."""
    loads = instruction.opcode == "ldmatrix"
    vector, place = instruction.operands if loads else reversed(instruction.operands)
    address, names = address_reader(kernel, place), registers_of(vector)
    if "m8n8" not in instruction.modifiers or instruction.type != "b16":
        raise PtxError("another shape of matrices")
    transposed = "trans" in instruction.modifiers
    writes, reads = ([make(kernel, name, "b32") for name in names if loads is wanted]
                     for make, wanted in ((writer, True), (reader, False)))  # fmt: skip

    def act(m: Machine, mask: Mask) -> None:
        rows_at = m.full(address(m))
        thread, half = np.divmod(np.arange(2 * m.shape[1]), 2)
        lane, first = thread % WARP, thread // WARP * WARP
        # A lane holds two adjacent numbers of a row, or of a column if transposed.
        row, column = (lane % 4 * 2 + half, lane // 4) if transposed else (lane // 4, lane % 4 * 2 + half)
        everyone = np.repeat(m.everyone(mask), 2, axis=1)
        program, slot = np.nonzero(everyone)
        for i in range(len(names)):
            at = (rows_at[:, first + 8 * i + row] + (2 * column).astype(np.uint64))[everyone]
            if loads:
                halves = np.zeros(everyone.shape, np.uint16)
                halves[everyone] = m.shared.load(program, thread[slot], at, np.dtype(np.uint16), 1)[0]
                writes[i](m, halves.view(np.uint32), mask)
            else:
                halves = np.ascontiguousarray(m.full(reads[i](m))).view(np.uint16)
                m.shared.store(program, thread[slot], at, halves[everyone][None])

    return together(None, act)


# ---- nothing to do here ----


@opcode("membar", "fence", "griddepcontrol", "prefetch", "nanosleep")
def _nothing(instruction: Instruction, kernel: Kernel) -> Step:
    """Do nothing: all threads see every change at once."""
    return lambda m, mask: None


@opcode("createpolicy")
def _policy(instruction: Instruction, kernel: Kernel) -> Step:
    """Make a policy of the cache, which changes no value."""
    write = writer(kernel, instruction.operands[0], "b64")
    return lambda m, mask: write(m, np.uint64(0), mask)
