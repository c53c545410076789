"""Instructions that several threads execute together: barriers, shuffles, votes and reductions of a warp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.machine import WARP, Groups, Machine, Step, opcode, split
from ptx.operands import Mask, Read, dtype_of, reader, writer
from ptx.parser import Instruction, Kernel, PtxError

LANES = np.arange(WARP, dtype=np.uint32)
ALL_LANES = np.uint32(0xFFFFFFFF)
Action = Callable[[Machine, Mask], None]


def by_warp(m: Machine, value: Any) -> np.ndarray:
    """Return a value as an array ``[programs, warps, lanes]``."""
    return m.full(value).reshape(m.shape[0], -1, WARP)


def bits_of_warps(m: Machine, holds: Any) -> np.ndarray:
    """Return one word for each warp, ``[programs, warps, 1]``, with a bit for each lane where a condition holds."""
    bits = by_warp(m, holds).astype(np.uint32) << LANES
    return np.bitwise_or.reduce(bits, axis=2, keepdims=True)


def together(members: Read | None, act: Action) -> Step:
    """Return the step of an instruction that the lanes ``members`` of a warp execute together.

    Args:
        members: the lanes that each thread waits for, a bit each. None stands for the whole warp.
        act: what the threads do once they have arrived.
    """

    def step(m: Machine, group: Mask) -> Groups | None:
        mask = m.arrived(group)
        wanted = ALL_LANES if members is None else members(m)
        if mask is None and (wanted == ALL_LANES).all():
            act(m, None)
            return None if group is None else [(m.place + 1, None)]
        wanted, here = by_warp(m, wanted), by_warp(m, m.everyone(mask))
        if (here & (wanted >> LANES & np.uint32(1) == 0)).any():
            raise PtxError("a thread is not among the lanes that it names")
        complete = here & (bits_of_warps(m, m.everyone(mask)) & wanted == wanted)
        return released(m, mask, complete.reshape(m.shape), act)

    return step


def released(m: Machine, mask: Mask, complete: np.ndarray, act: Action) -> Groups:
    """Let those threads go on whose others have all arrived, and the rest of the group wait."""
    ready, rest = split(mask, complete)
    if rest is None or rest.any():
        m.wait(m.everyone(rest))
    if not complete.any():
        return []
    act(m, ready)
    return [(m.place + 1, ready)]


# ---- barriers ----


@opcode("bar", "barrier")
def _barrier(instruction: Instruction, kernel: Kernel) -> Step:
    """Wait for all threads of the program that have not ended, or for the lanes of a warp."""
    if "warp" in instruction.modifiers:
        return together(reader(kernel, instruction.operands[0], "b32"), _sync_warps)
    if "sync" not in instruction.modifiers:
        raise PtxError("a barrier that does not wait")
    count = reader(kernel, instruction.operands[1], "u32") if len(instruction.operands) > 1 else None

    def act(m: Machine, mask: Mask) -> None:
        m.shared.barrier(m.everyone(mask).any(1))

    def step(m: Machine, group: Mask) -> Groups | None:
        if count is not None and (count(m) != m.shape[1]).any():
            raise PtxError("a barrier for some of the threads")
        mask = m.arrived(group)
        if mask is None:
            act(m, None)
            return None if group is None else [(m.place + 1, None)]
        here = m.everyone(mask)
        return released(m, mask, here & (here | m.exited).all(1, keepdims=True), act)

    return step


def _sync_warps(m: Machine, mask: Mask) -> None:
    m.shared.sync_warps(by_warp(m, m.everyone(mask)).any(2))


# ---- the exchange of values ----


def _source_lanes(mode: str, by: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lane that each lane reads from, and whether that is inside of its segment, as the PTX manual says."""
    by, clamp, segment = (x.astype(np.int64) for x in (by & 31, limits & 31, limits >> 8 & 31))
    lane = np.arange(WARP)
    first, last = lane & segment, (lane & segment) | (clamp & ~segment)
    lanes = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | (by & ~segment)}[mode]
    inside = lanes >= last if mode == "up" else lanes <= last
    return np.where(inside, lanes, lane), inside


@opcode("shfl")
def _shuffle(instruction: Instruction, kernel: Kernel) -> Step:
    to, value, by, limits, members = instruction.operands
    mode = instruction.modifiers[1]
    targets = to.split("|")
    write = writer(kernel, targets[0].strip(), "b32")
    note = writer(kernel, targets[1].strip(), "pred") if len(targets) > 1 else None
    read, lane, limit = (reader(kernel, name, "b32") for name in (value, by, limits))

    def act(m: Machine, mask: Mask) -> None:
        source, inside = _source_lanes(mode, by_warp(m, lane(m)), by_warp(m, limit(m)))
        moved = read(m)
        if np.shape(moved)[-1:] not in ((), (1,)):  # it may differ between threads
            values = by_warp(m, moved)
            moved = np.take_along_axis(values, np.broadcast_to(source, values.shape), 2).reshape(m.shape)
        write(m, moved, mask)
        if note is not None:
            note(m, np.broadcast_to(inside, by_warp(m, 0).shape).reshape(m.shape), mask)

    return together(reader(kernel, members, "b32"), act)


# ---- votes and reductions ----


def _spread(m: Machine, of_warps: np.ndarray) -> np.ndarray:
    """Return numbers ``[programs, warps, 1]`` as an array ``[programs, threads]``."""
    return np.broadcast_to(of_warps, (*of_warps.shape[:2], WARP)).reshape(m.shape)


@opcode("vote")
def _vote(instruction: Instruction, kernel: Kernel) -> Step:
    mode, result = instruction.modifiers[1:3]
    to, condition, members = instruction.operands
    read, lanes = reader(kernel, condition, "pred"), reader(kernel, members, "b32")
    write = writer(kernel, to, result)

    def act(m: Machine, mask: Mask) -> None:
        holds, wanted = read(m), by_warp(m, lanes(m))
        yes, no = (bits_of_warps(m, x) & wanted for x in (holds, ~holds))
        answers = {"ballot": yes, "any": yes != 0, "all": no == 0, "uni": (yes == 0) | (no == 0)}
        write(m, answers[mode].reshape(m.shape), mask)

    return together(lanes, act)


@opcode("match")
def _match(instruction: Instruction, kernel: Kernel) -> Step:
    """Find the lanes that have the same value."""
    mode, type_name = instruction.modifiers[0], instruction.type
    if mode != "any":
        raise PtxError(f"match.{mode}")
    to, value, members = instruction.operands
    read, lanes, write = reader(kernel, value, type_name), reader(kernel, members, "b32"), writer(kernel, to, "b32")

    def act(m: Machine, mask: Mask) -> None:
        values = by_warp(m, read(m))
        same = (values[..., :, None] == values[..., None, :]).astype(np.uint32) << LANES
        write(m, (np.bitwise_or.reduce(same, axis=3) & by_warp(m, lanes(m))).reshape(m.shape), mask)

    return together(lanes, act)


REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
              "xor": np.bitwise_xor}  # fmt: skip


@opcode("redux")
def _reduce(instruction: Instruction, kernel: Kernel) -> Step:
    kind, type_name = instruction.modifiers[1], instruction.type
    to, value, members = instruction.operands
    read, lanes, write = reader(kernel, value, type_name), reader(kernel, members, "b32"), writer(kernel, to, type_name)
    reduce, dtype = REDUCTIONS[kind].reduce, dtype_of(type_name)

    def act(m: Machine, mask: Mask) -> None:
        if (m.everyone(mask) & (lanes(m) != ALL_LANES)).any():
            raise PtxError("a reduction of some lanes")
        write(m, _spread(m, reduce(by_warp(m, read(m)), axis=2, keepdims=True, dtype=dtype)), mask)

    return together(lanes, act)


@opcode("activemask")
def _active_mask(instruction: Instruction, kernel: Kernel) -> Step:
    write = writer(kernel, instruction.operands[0], "b32")
    return lambda m, mask: write(m, _spread(m, bits_of_warps(m, m.everyone(mask))), mask)
