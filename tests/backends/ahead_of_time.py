"""Compiles what the Triton engine would launch, without a GPU: ``python ahead_of_time.py`` prints a JSON row a kernel.

The engine runs as it is, on CPU tensors whose memory nobody touches; only the launch is replaced by a compilation for
a GPU of each architecture, through the same just-in-time path, with a driver that is not there. Registers, stack (what
the compiler could not keep in registers) and shared memory are read from the machine code's resource report.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from calseg import ops
from calseg.kernels import engine

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
EDGES = {1: 128, 2: 128, 4: 128, 8: 128, 14: 128, 33: 96, 64: 64, 117: 64, 600: 32, 3000: 16}


class Driver:
    """What the just-in-time path asks of one, for a GPU that is not there."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # its own cache of compiled kernels

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        answer = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", answer.stdout)
    assert found, answer.stdout
    return dict(zip(("registers", "stack", "shared", "local"), map(int, found.groups()), strict=True))


def compiled(architectures: tuple[int, ...], run: Any) -> list[dict[str, Any]]:
    """A row for every kernel that ``run`` launches, on every architecture."""
    rows = []

    def launch(kernel: Any, programs: int, like: Any, arguments: Any, num_warps: int) -> None:
        for architecture in architectures:
            triton.runtime.driver.set_active(Driver(architecture))
            binary = kernel.warmup(*arguments, grid=(programs,), num_warps=num_warps, enable_fp_fusion=True)
            vectors = set(re.findall(r"(?:ld|st)\.global\S*", binary.asm["ptx"]))
            rows.append(
                {"kernel": kernel.fn.__name__, "architecture": architecture, "programs": programs,
                 "num_warps": num_warps, "tile": str(arguments[-1]), "memory": sorted(vectors),
                 **resources(binary.asm["cubin"])}
            )  # fmt: skip

    engine.launch = launch
    run()
    return rows


def scores(C: int, dtype: torch.dtype, edge: int, layout: str) -> torch.Tensor:
    """Logits of ``[2, C, edge, edge, edge]``, or of an odd number of voxels; memory that nobody touches."""
    space = (edge - 1, edge - 1, edge - 1) if layout == "odd" else (edge, edge, edge)
    if layout == "channels_last":
        return torch.empty((2, *space, C), dtype=dtype).movedim(-1, 1)
    return torch.empty((2, C, *space), dtype=dtype)


def call(
    operation: str, C: int, dtype: str = "float32", layout: str = "channel_first", gradient: bool = True,
    ignore_index: int = 255,
) -> None:  # fmt: skip
    """One operation as training calls it: mean, uint8 labels, gradients to all inputs."""
    x = scores(C, getattr(torch, dtype), EDGES[C], layout)
    labels = ops.Labels(torch.empty(ops.voxel_shape(x), dtype=torch.uint8), ignore_index)
    sampling = ops.Sampling(4, 1.0, 1.0, 0.0, 0.0, 7)
    spec = ops.Loss(labels, None, "mean", x.dtype, backend="triton")
    g = x if gradient else None
    if operation == "cross_entropy":
        engine.loss(spec, x, None, None, None, (g, None, None, None))
    elif operation == "weighted_cross_entropy":
        weighted = spec._replace(weight=torch.empty(C), label_smoothing=0.1)
        engine.loss(weighted, x, None, None, None, (g, None, None, None))
    elif operation == "soft_cross_entropy":
        engine.loss(spec, x, x, None, None, (g, g, None, None))
    elif operation == "vls_cross_entropy":
        engine.loss(spec._replace(alpha=0.1, sampling=sampling), x, None, x, x, (g, None, g, g))
    elif operation == "vls_elbo":
        engine.loss(spec._replace(sampling=sampling), None, None, x, x, (None, None, g, g))
    elif operation == "gaussian_kl":
        engine.loss(spec._replace(labels=None, sampling=sampling), None, None, x, x, (None, None, g, g))
    elif operation == "sample_soft_labels":
        engine.sample_soft_labels(x, x, labels, sampling, 0.1)
        if gradient:
            engine.sample_soft_labels_backward(x, x, labels, sampling, 0.1, x, (x, x))
    elif operation == "accumulate_soft_labels":
        engine.accumulate_softmax(x, x, 1.0)
        engine.accumulate_softmax_backward(x, x, 1.0)
        engine.blend_soft_labels(x, labels, 0.1, 0.5)
    elif operation == "calibration_bins":
        for first_class, n_bins, from_logits in ((None, 15, True), (None, 15, False), (0, 15, True), (0, 4096, True)):
            engine.calibration_bins(
                x, labels, None, n_bins=n_bins, from_logits=from_logits, first_class=first_class,
                skip_background=False, per_item=False, right_closed=False,
            )  # fmt: skip
    elif operation == "scale_gradients":
        engine.scale_gradients([x], torch.empty(()))


if __name__ == "__main__":
    for line in sys.stdin:
        case = json.loads(line)
        architectures = tuple(case.pop("architectures", (80, 90)))
        for row in compiled(architectures, lambda case=case: call(**case)):
            print(json.dumps({**case, **row}), flush=True)
