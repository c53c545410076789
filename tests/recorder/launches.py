"""Call operations with the recording driver: prints a JSON row for each launch of Triton's real launcher.

Run in the environment of :func:`recorder.driver.environment`, with the operations' names as arguments. Each launch is
done twice: by Triton, which looks for the kernel that suits the arguments, and by the kernel that is kept for launches
of its kind, from an earlier call if there was one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from calseg.kernels import launch
from cases import LAYOUTS, evaluate
from operations import OPERATIONS
from ptx.compilation import compiled_launch

from recorder.driver import Launch, Recorder

USUAL = ((2, 4, 6, 8), "contiguous")
# Strides that are multiples of 16 or not, tensors that are aligned or not, with the compiled kernels of all kept.
OTHERS = (((2, 4, 6, 8), "odd_offset"), ((2, 4, 6, 10), "contiguous"), ((2, 4, 6, 16), "contiguous"))
MANY_KINDS = ("cross_entropy",)  # operations that are called with all of these


def checked(recorder: Recorder, row: dict[str, Any], real_launch: Callable[..., None]) -> Callable[..., None]:
    """Return a launch that prints what the driver got beside what the kernel declares."""

    def launch_kernel(kernel: Any, programs: int, like: torch.Tensor, arguments: Sequence[Any], num_warps: int) -> None:
        wanted = compiled_launch(kernel, programs, arguments, num_warps)
        declared = wanted.kernel.parameters
        packed = b"".join(wanted.parameters[p.offset : p.offset + p.size] for p in declared)

        def launched() -> Launch:
            recorder.expect([parameter.size for parameter in declared])
            real_launch(kernel, programs, like, arguments, num_warps)
            return recorder.last(len(packed))

        kept = dict(launch._kept)
        launch._kept.clear()
        before = recorder.launches
        got = launched()
        launch._kept.update(kept)
        again = launched()
        print(
            json.dumps({
                **row, "kernel": kernel.fn.__name__, "launches": recorder.launches - before, "grid": got.grid,
                "block": got.block, "shared_bytes": got.shared_bytes, "programs": programs, "threads": 32 * num_warps,
                "wanted_shared_bytes": wanted.shared_bytes, "threads_of_kernel": wanted.kernel.threads,
                "parameters": got.parameters.hex(), "wanted_parameters": packed.hex(), "same_again": got == again,
            })
        )  # fmt: skip

    return launch_kernel


def main(names: Sequence[str]) -> None:
    """Call each operation with each of its reductions, forward and backward."""
    recorder = Recorder()
    row: dict[str, Any] = {}
    launch.launch_kernel = checked(recorder, row, launch.launch_kernel)
    for operation in map(OPERATIONS.__getitem__, names):
        forms = (USUAL, *OTHERS) if operation.name in MANY_KINDS else (USUAL,)
        for reduction, (shape, layout) in product(operation.reductions, forms):
            row.update(operation=operation.name, reduction=reduction, shape=shape, layout=layout)
            options = {**operation.typical, **({"reduction": reduction} if len(operation.reductions) > 1 else {})}
            function = operation.bind("triton", operation.arguments(shape, torch.float32, **options))
            tensors = {k: LAYOUTS[layout](t) for k, t in operation.inputs(shape, torch.float32).items()}
            if operation.differentiable:
                evaluate(function, tensors)
            else:
                function(**tensors)


if __name__ == "__main__":
    main(sys.argv[1:])
