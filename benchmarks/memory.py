"""Peak memory of one step of calseg and of its eager peer: ``python memory.py MODULE CASE FLOOR``.

The script makes the inputs, resets the peak of the resident memory (VmHWM), makes one step and reads the peak. The
figure is the anonymous memory beyond inputs, result and gradients, in percent of the logits. Before that, a step with
another number of classes initialises libraries and thread pools. This works on Linux only. On other systems every
figure is null.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from harness import Case, Problem, Step

import calseg

CONTENDERS = ("calseg", "eager")


def _status() -> dict[str, int]:
    """Return the resident memory in bytes, by the names of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.startswith(("VmHWM", "Rss")))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in fields}


def _settle() -> None:
    """Return free memory to the system, so that a step that takes it again shows."""
    gc.collect()
    calseg.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def extra_bytes(problem: Problem, step: Step) -> int:
    """Return the peak anonymous memory of a step beyond inputs, result and gradients."""
    _settle()
    before = _status()["RssAnon"]
    Path("/proc/self/clear_refs").write_text("5")
    result = step()
    after = _status()
    peak = after["VmHWM"] - after["RssFile"] - after["RssShmem"]
    gradients = sum(tensor.nbytes for tensor in problem.inputs) if problem.backward else 0
    return peak - before - gradients - (result.nbytes if result.dim() else 0)


def measure(build: Callable[[Case], Problem], case: Case, floor: int) -> dict[str, float | None]:
    """Return the peak in percent of the logits, with a batch so large that these have at least ``floor`` bytes."""
    if not Path("/proc/self/clear_refs").exists():
        return dict.fromkeys(CONTENDERS)
    warm = build(replace(case, classes=case.classes + 1, edge=4)).steps()
    for name in CONTENDERS:
        warm[name]()
    logits = torch.Size(case.shape).numel() * case.torch_dtype.itemsize
    problem = build(replace(case, batch=case.batch * max(1, math.ceil(floor / logits))))
    logits = problem.inputs[0].nbytes
    percent: dict[str, float | None] = {}
    for name in CONTENDERS:
        percent[name] = 100 * extra_bytes(problem, problem.steps()[name]) / logits
    return percent


if __name__ == "__main__":
    module, case, floor = sys.argv[1:]
    print(json.dumps(measure(importlib.import_module(module).build, Case(**json.loads(case)), int(floor))))
