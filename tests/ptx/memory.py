"""Global memory and shared memory, with every access checked.

An access that is out of bounds or misaligned is an error. So is a race in shared memory: two threads use the same byte,
at least one of them writes it, and no barrier lies between. Threads may write copies of a value, as Triton's do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ptx.parser import PtxError

ALIGN = 16  # the widest access
WARP = 32


Change = Callable[[np.ndarray, np.ndarray, "slice | np.ndarray"], None]
"""Atomic change ``(numbers, indices, chosen)`` of ``numbers[indices]``, for the chosen ones of all threads."""


class Region(NamedTuple):
    """Bytes of memory that kernels may use: their addresses, and the memory from a multiple of ALIGN on."""

    start: int
    end: int
    memory: np.ndarray

    @classmethod
    def of(cls, start: int, end: int) -> Region:
        """Return the region of the process's own memory between two addresses."""
        first = start // ALIGN * ALIGN
        size = -(-(end - first) // ALIGN) * ALIGN
        return cls(start, end, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(first)))


def merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the union of spans of addresses, in order. Adjacent ones become one only if they overlap."""
    union: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if union and start < union[-1][1]:
            union[-1] = union[-1][0], max(end, union[-1][1])
        elif start < end:
            union.append((start, end))
    return union


class GlobalMemory:
    """The memory of the tensors that a launch may use.

    Args:
        spans: the addresses of the first byte and past the last byte of each tensor.
        constants: arrays that the kernel brings along, by name.
    """

    def __init__(self, spans: Iterable[tuple[int, int]], constants: dict[str, bytes] | None = None) -> None:
        self._constants = {name: np.frombuffer(data, np.uint8) for name, data in (constants or {}).items()}
        own = ((self.address_of(name), self.address_of(name) + len(self._constants[name])) for name in self._constants)
        self._regions = [Region.of(start, end) for start, end in merged([*spans, *own])]
        self._starts = np.array([region.start for region in self._regions], np.uint64)

    def address_of(self, constant: str) -> int:
        """Return the address of an array that the kernel brings along."""
        return self._constants[constant].ctypes.data

    def load(self, addresses: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
        """Return ``count`` adjacent numbers at each address, ``[count, addresses]``."""
        result = np.empty((count, len(addresses)), dtype)
        for region, chosen in self._places(addresses, dtype.itemsize * count):
            view, at = _numbers(region, dtype, count, addresses[chosen])
            result[:, chosen] = view[at].T
        return result

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Store ``values[:, i]`` from address ``i`` on."""
        count = len(values)
        for region, chosen in self._places(addresses, values.itemsize * count):
            view, at = _numbers(region, values.dtype, count, addresses[chosen])
            view[at] = values[:, chosen].T
            if (view[at] != values[:, chosen].T).any():
                raise PtxError("two threads store different numbers at one address")

    def update(self, addresses: np.ndarray, dtype: np.dtype, change: Change) -> None:
        """Let an atomic instruction change the numbers at the addresses."""
        for region, chosen in self._places(addresses, dtype.itemsize):
            view, at = _numbers(region, dtype, 1, addresses[chosen])
            change(view[:, 0], at, chosen)

    def _places(self, addresses: np.ndarray, size: int) -> Iterable[tuple[Region, slice | np.ndarray]]:
        """Return the regions of the addresses, each with the indices of its addresses. Check all of them."""
        if (addresses % np.uint64(size)).any():
            wrong = int(addresses[(addresses % np.uint64(size)) != 0][0])
            raise PtxError(f"address {wrong:#x} is misaligned: wanted a multiple of {size} bytes")
        numbers = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        if len(numbers) == 0:
            return
        if numbers.min() < 0:
            raise PtxError(f"{size} bytes at {int(addresses.min()):#x}, before all tensors")
        for number in np.unique(numbers):
            region = self._regions[number]
            chosen = slice(None) if (numbers == number).all() else np.flatnonzero(numbers == number)
            past = int(addresses[chosen].max()) + size - region.end
            if past > 0:
                raise PtxError(
                    f"{size} bytes, {past} of them past the end of a tensor of {region.end - region.start} bytes"
                )
            yield region, chosen


def _numbers(region: Region, dtype: np.dtype, count: int, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the memory of a region as ``[places, count]`` numbers, and the places of the addresses."""
    first = region.start // ALIGN * ALIGN
    at = (addresses - np.uint64(first)).astype(np.int64) // (dtype.itemsize * count)
    return region.memory.view(dtype).reshape(-1, count), at


ATOMIC = 1 << 14
"""Number that stands for all atomic instructions in place of a thread."""
NEVER = 1 << 15
SMALLEST_NORMAL = 0x00800000  # the bits of the smallest normal float32
COPY_UNITS = 16  # units in the last place by which copies of a float32 may differ


class Accesses(NamedTuple):
    """Accesses of one instruction to shared memory: ``width`` bytes each, at place ``at`` of that width."""

    rows: np.ndarray  # the program of each access
    at: np.ndarray
    width: int
    threads: np.ndarray  # the thread of each access
    syncs: np.ndarray  # the barriers of its warp so far


class Uses:
    """The threads that have used each byte since the last barrier: the first and the last by number.

    A warp may have barriers of its own. ``time`` counts those of the warp that used the byte last.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.first = np.full(shape, NEVER, np.int32)
        self.last = np.full(shape, -1, np.int32)
        self.time = np.zeros(shape, np.int32)

    def forget(self, programs: np.ndarray) -> None:
        """Forget the uses of programs, ``[programs]`` of bool."""
        self.first[programs] = NEVER
        self.last[programs] = -1

    def conflicts(self, accesses: Accesses) -> np.ndarray:
        """Return for each access whether another thread has used a byte of it, and no barrier lies between."""
        first, last, thread = self._of(self.first, accesses), self._of(self.last, accesses), accesses.threads[:, None]
        other = (last >= 0) & ((first != thread) | (last != thread))
        return (other & ~self._is_before(accesses)).any(1) if other.any() else np.zeros(len(other), bool)

    def note(self, accesses: Accesses) -> None:
        """Note accesses, in place of those that a barrier of the warp separates from them."""
        gone = self._is_before(accesses)
        rows, at = (index[:, None] for index in (accesses.rows, accesses.at))
        key = rows, at * accesses.width + np.arange(accesses.width)
        self.first[key] = np.where(gone, NEVER, self.first[key])
        self.last[key] = np.where(gone, -1, self.last[key])
        np.minimum.at(self.first, key, accesses.threads[:, None])
        np.maximum.at(self.last, key, accesses.threads[:, None])
        self.time[key] = accesses.syncs[:, None]

    def _is_before(self, accesses: Accesses) -> np.ndarray:
        """Return for each byte whether only the warp of the access has used it, and has had a barrier since."""
        warp = accesses.threads[:, None] // WARP
        of_warp = (self._of(self.first, accesses) // WARP == warp) & (self._of(self.last, accesses) // WARP == warp)
        return of_warp & (self._of(self.time, accesses) < accesses.syncs[:, None])

    @staticmethod
    def _of(numbers: np.ndarray, accesses: Accesses) -> np.ndarray:
        """Return the numbers of the bytes of each access, ``[accesses, width]``."""
        return numbers.reshape(len(numbers), -1, accesses.width)[accesses.rows, accesses.at]


class SharedMemory:
    """The shared memory of the programs of a batch.

    Args:
        programs: the number of programs.
        threads: the number of threads of a program.
        size: the bytes of a program.
    """

    def __init__(self, programs: int, threads: int, size: int) -> None:
        self._size = size
        self._bytes = np.zeros((programs, -(-size // ALIGN) * ALIGN), np.uint8)
        self._reads, self._writes = Uses(self._bytes.shape), Uses(self._bytes.shape)
        self._syncs = np.zeros((programs, -(-threads // WARP)), np.int32)

    def barrier(self, programs: np.ndarray) -> None:
        """Order all accesses of programs, ``[programs]`` of bool, before those that follow."""
        if self._size:
            self._reads.forget(programs)
            self._writes.forget(programs)

    def sync_warps(self, warps: np.ndarray) -> None:
        """Order all accesses within warps, ``[programs, warps]`` of bool, before those that follow."""
        self._syncs += warps

    def load(
        self, rows: np.ndarray, threads: np.ndarray, addresses: np.ndarray, dtype: np.dtype, count: int
    ) -> np.ndarray:
        """Return ``count`` adjacent numbers at each address, ``[count, addresses]``.

        Access ``i`` is that of thread ``threads[i]`` of program ``rows[i]``.
        """
        accesses = self._accesses(rows, threads, addresses, dtype.itemsize * count)
        _raise_race(accesses, self._writes.conflicts(accesses), "reads what another one writes")
        self._reads.note(accesses)
        return self._numbers(dtype, count)[rows, accesses.at].T

    def store(self, rows: np.ndarray, threads: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        """Store ``values[:, i]`` from address ``i`` on, as thread ``threads[i]`` of program ``rows[i]``."""
        accesses = self._accesses(rows, threads, addresses, values.itemsize * len(values))
        numbers, key = self._numbers(values.dtype, len(values)), (rows, accesses.at)
        _raise_race(accesses, self._reads.conflicts(accesses), "writes what another one reads")
        changes = (numbers[key] != values.T).any(1)
        _raise_race(accesses, self._writes.conflicts(accesses) & changes, "writes what another one writes")
        numbers[key] = values.T
        _raise_race(accesses, _differ(numbers[key], values.T).any(1), "writes what another one writes")
        self._writes.note(accesses)

    def update(
        self, rows: np.ndarray, threads: np.ndarray, addresses: np.ndarray, dtype: np.dtype, change: Change
    ) -> None:
        """Let an atomic instruction change the numbers at the addresses. It races only with other instructions."""
        accesses = self._accesses(rows, np.full_like(threads, ATOMIC), addresses, dtype.itemsize)
        for uses in (self._reads, self._writes):
            _raise_race(accesses, uses.conflicts(accesses), "changes what another one uses")
        numbers = self._numbers(dtype, 1)
        change(numbers.reshape(-1), rows * numbers.shape[1] + accesses.at, slice(None))
        self._writes.note(accesses)

    def _numbers(self, dtype: np.dtype, count: int) -> np.ndarray:
        """Return the memory as numbers, ``[programs, places, count]``."""
        return self._bytes.view(dtype).reshape(len(self._bytes), -1, count)

    def _accesses(self, rows: np.ndarray, threads: np.ndarray, addresses: np.ndarray, width: int) -> Accesses:
        """Return accesses of ``width`` bytes. Check their bounds and alignment."""
        at = addresses.astype(np.int64)
        if (at % width).any():
            raise PtxError(
                f"address {int(at[at % width != 0][0])} in shared memory: wanted a multiple of {width} bytes"
            )
        if len(at) and (at.min() < 0 or at.max() + width > self._size):
            raise PtxError(f"{width} bytes at address {int(at.max())} in shared memory of {self._size} bytes")
        warps = np.minimum(threads // WARP, self._syncs.shape[1] - 1)
        return Accesses(rows, at // width, width, threads, self._syncs[rows, warps])


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return which numbers of two threads differ, ``[accesses, words]``, by more than the rounding of a copy.

    Triton lets all lanes that hold a copy of a number store it. Where a sum over lanes is fused with a product, each
    lane adds its own product unrounded to the rounded ones of others, so copies differ in their last bits.
    """
    a, b = (np.ascontiguousarray(x).view(f"u{min(x.itemsize, 4)}").astype(np.int64) for x in (a, b))
    is_normal = np.minimum(a, b) >= SMALLEST_NORMAL
    return (a != b) & ~(is_normal & (np.abs(a - b) <= COPY_UNITS))


def _raise_race(accesses: Accesses, races: np.ndarray, what: str) -> None:
    """Raise a fault that names the first access that races."""
    if races.any():
        first = int(np.flatnonzero(races)[0])
        thread = int(accesses.threads[first])
        name = "an atomic instruction" if thread == ATOMIC else f"thread {thread}"
        raise PtxError(f"race in shared memory at byte {int(accesses.at[first]) * accesses.width}: {name} {what}")
