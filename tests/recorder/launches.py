"""Call operations with the recording driver: prints a JSON row for each launch of Triton's real launcher.

Run in the environment of :func:`recorder.driver.environment`, with the operations' names as arguments.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from calseg.kernels import launch
from cases import evaluate
from operations import OPERATIONS
from ptx.compilation import compiled_launch

from recorder.driver import Recorder


def checked(recorder: Recorder, row: dict[str, str], real_launch: Callable[..., None]) -> Callable[..., None]:
    """Return a launch that prints what the driver got beside what the kernel declares."""

    def launch_kernel(kernel: Any, programs: int, like: torch.Tensor, arguments: Sequence[Any], num_warps: int) -> None:
        wanted = compiled_launch(kernel, programs, arguments, num_warps)
        declared = wanted.kernel.parameters
        recorder.expect([parameter.size for parameter in declared])
        before = recorder.launches
        real_launch(kernel, programs, like, arguments, num_warps)
        packed = b"".join(wanted.parameters[p.offset : p.offset + p.size] for p in declared)
        got = recorder.last(len(packed))
        print(
            json.dumps({
                **row, "kernel": kernel.fn.__name__, "launches": recorder.launches - before, "grid": got.grid,
                "block": got.block, "shared_bytes": got.shared_bytes, "programs": programs, "threads": 32 * num_warps,
                "wanted_shared_bytes": wanted.shared_bytes, "threads_of_kernel": wanted.kernel.threads,
                "parameters": got.parameters.hex(), "wanted_parameters": packed.hex(),
            })
        )  # fmt: skip

    return launch_kernel


def main(names: Sequence[str]) -> None:
    """Call each operation with each of its reductions, forward and backward."""
    recorder, shape, row = Recorder(), (2, 4, 6, 8), {"operation": "", "reduction": ""}
    launch.launch_kernel = checked(recorder, row, launch.launch_kernel)
    for operation in map(OPERATIONS.__getitem__, names):
        for reduction in operation.reductions:
            row.update(operation=operation.name, reduction=reduction)
            options = {**operation.typical, **({"reduction": reduction} if len(operation.reductions) > 1 else {})}
            function = operation.bind("triton", operation.arguments(shape, torch.float32, **options))
            tensors = operation.inputs(shape, torch.float32)
            if operation.differentiable:
                evaluate(function, tensors)
            else:
                function(**tensors)


if __name__ == "__main__":
    main(sys.argv[1:])
