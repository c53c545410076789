"""Execution of a launch of a kernel that is given as PTX text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch

from ptx import accesses, arithmetic, bits, conversions, warps  # noqa: F401  # they register their instructions
from ptx.machine import Machine, Step, steps_of
from ptx.memory import GlobalMemory
from ptx.parser import Kernel, names_of, parse

THREADS_AT_ONCE = 1 << 14  # of a batch of programs: with more, values leave the cache


@cache
def ready(text: str, name: str | None = None) -> tuple[Kernel, list[Step]]:
    """Return a kernel of a PTX text, and its steps. The default is the first one."""
    kernel = parse(text, name or names_of(text)[0])
    return kernel, steps_of(kernel)


def run(
    text: str,
    parameters: bytes,
    programs: int,
    spans: Sequence[tuple[int, int]],
    *,
    name: str | None = None,
    shared_bytes: int = 0,
    only: Iterable[int] | None = None,
    error: float = 0.0,
) -> None:
    """Run a launch.

    Args:
        text: the PTX.
        parameters: the bytes of the parameters.
        programs: the number of programs.
        spans: the addresses of the first byte and past the last byte of each tensor.
        name: the name of the kernel. The default is the first one of the text.
        shared_bytes: the bytes of dynamic shared memory of a program.
        only: the programs that are run. The default is all.
        error: the part of the error of the hardware's approximations that they get, 0 to 1.

    Raises:
        PtxError: the kernel does what it must not, or has an instruction that is not known.
    """
    kernel, steps = ready(text, name)
    memory = GlobalMemory(spans, kernel.constants)
    numbers = np.arange(programs) if only is None else np.array(list(only))
    batch = max(1, THREADS_AT_ONCE // kernel.threads)
    for first in range(0, len(numbers), batch):
        chosen = numbers[first : first + batch]
        Machine(kernel, steps, parameters, chosen, programs, shared_bytes, memory, error).run()


def span_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte and past the last byte of the elements of a tensor."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
