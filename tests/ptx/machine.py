"""The machine: the registers of all threads, and the order in which threads execute instructions.

All threads at the same instruction form a group, and execute it together. The group at the lowest place of the code
goes first, so groups that a branch divided meet again at the place where their paths join. Instructions that threads
execute together (shuffles, votes, barriers) wait until all of their threads are there, as GPUs since Volta do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.memory import GlobalMemory, SharedMemory
from ptx.operands import Mask, reader
from ptx.parser import Instruction, Kernel, PtxError

WARP = 32
NOBODY = np.zeros((1, 1), bool)

Groups = list[tuple[int, Mask]]
Step = Callable[["Machine", Mask], "Groups | None"]
"""An instruction that is ready to run. It returns the groups that go on elsewhere, or None if all go on to the next."""

Build = Callable[[Instruction, Kernel], Step]
BUILDERS: dict[str, Build] = {}


def opcode(*names: str) -> Callable[[Build], Build]:
    """Register a function that makes the step of an instruction with one of these opcodes."""

    def register(build: Build) -> Build:
        BUILDERS.update(dict.fromkeys(names, build))
        return build

    return register


def steps_of(kernel: Kernel) -> list[Step]:
    """Return the steps of a kernel. An instruction that nothing here knows makes a step that raises."""
    return [_step(instruction, kernel) for instruction in kernel.code]


def _step(instruction: Instruction, kernel: Kernel) -> Step:
    """Return the step of one instruction, for those threads whose guard holds."""
    build = BUILDERS.get(instruction.opcode)
    if build is None:
        raise PtxError(f"{kernel.name}: unknown opcode {instruction.opcode}: {instruction}")
    try:
        step = build(instruction, kernel)
    except (PtxError, KeyError, ValueError, IndexError, AttributeError) as error:
        raise PtxError(f"{kernel.name}: unknown form of {instruction.opcode}: {instruction}: {error}") from error
    if instruction.guard is None:
        return step
    guard, negated = reader(kernel, instruction.guard, "pred"), instruction.guard_is_negated

    def guarded(m: Machine, mask: Mask) -> Groups | None:
        holds = guard(m)
        taken, rest = split(mask, ~holds if negated else holds)
        if taken is NOBODY:
            return None
        groups = step(m, taken)
        return groups if groups is None or rest is NOBODY else [*groups, (m.place + 1, rest)]

    return guarded


def split(mask: Mask, condition: np.ndarray) -> tuple[Mask, Mask]:
    """Divide a group into those threads where the condition holds and the rest. Either may be NOBODY."""
    taken = condition if mask is None else mask & condition
    if not taken.any():
        return NOBODY, mask
    rest = ~condition if mask is None else mask & ~condition
    return (taken, rest) if rest.any() else (mask, NOBODY)


class Machine:
    """A batch of programs of a launch.

    Args:
        kernel: the kernel.
        steps: the steps of the kernel.
        parameters: the bytes of the parameters.
        programs: the numbers of the programs of this batch.
        grid: the number of programs of the launch.
        shared_bytes: the bytes of shared memory of a program.
        memory: the global memory.
        error: the part of the error that the hardware's approximations may have that they do have here, 0 to 1.

    Attributes:
        registers: the value of every register that was written.
        place: the index of the instruction that is executed.
        exited: the threads that have ended.
        copies: the copies to shared memory that were begun: programs, threads, addresses there, and the numbers.
    """

    def __init__(
        self,
        kernel: Kernel,
        steps: list[Step],
        parameters: bytes,
        programs: np.ndarray,
        grid: int,
        shared_bytes: int,
        memory: GlobalMemory,
        error: float = 0.0,
    ) -> None:
        self.kernel, self.steps, self.parameters, self.memory, self.error = kernel, steps, parameters, memory, error
        threads = kernel.threads
        self.shape = (len(programs), threads)
        self.shared = SharedMemory(*self.shape, shared_bytes + kernel.shared_bytes)
        self.registers: dict[str, Any] = {}
        self.place = 0
        self.exited: np.ndarray = NOBODY
        self.random = np.random.default_rng(0)
        self.copies: list[tuple[np.ndarray, ...]] = []
        self._waiting: dict[int, Mask] = {}
        thread = np.arange(threads, dtype=np.uint32)[None]
        zero, one = np.uint32([[0]]), np.uint32([[1]])
        self.special = {
            "%tid.x": thread, "%tid.y": zero, "%tid.z": zero,
            "%ntid.x": np.uint32([[threads]]), "%ntid.y": one, "%ntid.z": one,
            "%ctaid.x": programs.astype(np.uint32)[:, None], "%ctaid.y": zero, "%ctaid.z": zero,
            "%nctaid.x": np.uint32([[grid]]), "%nctaid.y": one, "%nctaid.z": one,
            "%laneid": thread % WARP, "%warpid": thread // WARP, "WARP_SZ": np.uint32([[WARP]]),
        }  # fmt: skip

    def write(self, name: str, bits: np.ndarray, mask: Mask) -> None:
        """Write a register of the threads of a group."""
        if mask is not None:
            old = self.registers.get(name)
            bits = np.where(mask, bits, np.zeros((), bits.dtype) if old is None else old)
        self.registers[name] = bits

    def full(self, value: Any) -> np.ndarray:
        """Return a value as an array ``[programs, threads]``."""
        return np.broadcast_to(value, self.shape)

    def everyone(self, mask: Mask) -> np.ndarray:
        """Return the threads of a group as an array ``[programs, threads]``."""
        return np.broadcast_to(True if mask is None else mask, self.shape)

    def arrived(self, mask: Mask) -> Mask:
        """Return a group together with the threads that wait at this instruction already."""
        return _union(mask, self._waiting.pop(self.place)) if self.place in self._waiting else mask

    def wait(self, mask: np.ndarray) -> None:
        """Let threads wait at this instruction until others arrive."""
        self._waiting[self.place] = mask

    def run(self) -> None:
        """Run all threads to their end.

        Raises:
            PtxError: the kernel does what it must not, or threads wait for others that never come.
        """
        groups: dict[int, Mask] = {0: None}
        try:
            with np.errstate(all="ignore"):
                while groups:
                    self.place = min(groups)
                    moved = self._advance(groups.pop(self.place), groups)
                    for place, mask in moved:
                        groups[place] = _union(mask, groups[place]) if place in groups else mask
        except KeyError as error:
            raise PtxError(f"{self._where()}: register {error} is read before it is written") from error
        except PtxError as error:
            raise PtxError(f"{self._where()}: {error}") from error
        if self._waiting:
            self.place = min(self._waiting)
            raise PtxError(f"{self._where()}: threads wait here for others that never come")

    def _advance(self, mask: Mask, groups: dict[int, Mask]) -> Groups:
        """Execute instructions until one of them sends the group elsewhere. Groups on the way join it."""
        place, steps = self.place, self.steps
        while True:
            if place in groups:
                mask = _union(mask, groups.pop(place))
            self.place = place
            moved = steps[place](self, mask)
            if moved is not None:
                return moved
            place += 1

    def _where(self) -> str:
        return f"{self.kernel.name}: {self.kernel.code[self.place]}"


def _union(a: Mask, b: Mask) -> Mask:
    """Return the threads of two groups."""
    if a is None or b is None:
        return None
    both = a | b
    return None if both.all() else both


@opcode("bra")
def _branch(instruction: Instruction, kernel: Kernel) -> Step:
    target = kernel.labels[instruction.operands[0]]
    return lambda m, mask: [(target, mask)]


@opcode("ret", "exit")
def _exit(instruction: Instruction, kernel: Kernel) -> Step:
    def step(m: Machine, mask: Mask) -> Groups:
        m.exited = m.exited | m.everyone(mask)
        return []

    return step
