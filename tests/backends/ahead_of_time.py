"""Compile the kernels of the Triton backend without a GPU: ``python ahead_of_time.py`` prints a JSON row a kernel.

The backend runs unchanged, on CPU tensors whose memory is never touched. Only the launch is replaced: by a compilation
for a GPU of each architecture, through the same just-in-time path, with a driver that is not there. Registers, stack
(the values that did not fit into registers) and shared memory are read from the machine code's resource report.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from calseg.kernels import launch
from triton.backends.compiler import GPUTarget

from calseg.backends import triton as engine
from calseg.checks import probability_tolerance
from calseg.dice import DiceOptions
from calseg.operations import (
    AccumulateSpec,
    BinsSpec,
    BlendSpec,
    GaussianTensors,
    Labels,
    LossSpec,
    LossTensors,
    SampleSpec,
    Sampling,
)
from calseg.tensors import voxel_shape

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
EDGES = {1: 128, 2: 128, 3: 128, 4: 128, 5: 128, 8: 128, 14: 128, 32: 96, 33: 96, 64: 64, 117: 64, 600: 32, 3000: 16}


class Driver:
    """Driver for an absent GPU, with the functions that the just-in-time path calls."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # its own cache of compiled kernels

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def resources(cubin: bytes, kernel: str = "") -> dict[str, int]:
    """Return the resources of the kernel whose name contains ``kernel``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        answer = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    name = rf"Function \S*{kernel}\S*:\s*"
    found = re.search(name + r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", answer.stdout)
    assert found, answer.stdout
    return dict(zip(("registers", "stack", "shared", "local"), map(int, found.groups()), strict=True))


def compiled(architectures: tuple[int, ...], run: Any) -> list[dict[str, Any]]:
    """Return a row for every kernel that ``run`` launches, on every architecture."""
    rows = []

    def compile_kernel(kernel: Any, programs: int, like: Any, arguments: Any, num_warps: int) -> None:
        for architecture in architectures:
            triton.runtime.driver.set_active(Driver(architecture))
            binary = kernel.warmup(*arguments, grid=(programs,), num_warps=num_warps, enable_fp_fusion=True)
            accesses = Counter(re.findall(r"(?:ld|st)\.global\S*", binary.asm["ptx"]))
            rows.append(
                {"kernel": kernel.fn.__name__, "architecture": architecture, "programs": programs,
                 "num_warps": num_warps, "tile": str(arguments[-1]), "memory": accesses,
                 **resources(binary.asm["cubin"])}
            )  # fmt: skip

    launch.launch_kernel = compile_kernel
    run()
    return rows


def scores(C: int, dtype: torch.dtype, edge: int, layout: str) -> torch.Tensor:
    """Return logits of ``[2, C, edge, edge, edge]``, or of an odd number of voxels, in memory that is never touched."""
    space = (edge - 1, edge - 1, edge - 1) if layout == "odd" else (edge, edge, edge)
    if layout == "channels_last":
        return torch.empty((2, *space, C), dtype=dtype).movedim(-1, 1)
    return torch.empty((2, C, *space), dtype=dtype)


def per_voxel(shape: tuple[int, ...], dtype: torch.dtype, stride: int) -> torch.Tensor:
    """Return a tensor without class axis whose voxels are ``stride`` elements apart."""
    if stride == 0:  # expanded along each item
        return torch.empty((shape[0], *(1 for _ in shape[1:])), dtype=dtype).expand(shape)
    return torch.empty((*shape, stride), dtype=dtype)[..., 0]


def call(
    operation: str, C: int, dtype: str = "float32", layout: str = "channel_first", gradient: bool = True,
    ignore_index: int = 255, label_stride: int = 1, upstream_stride: int | None = None,
) -> None:  # fmt: skip
    """Call an operation as training does: mean, uint8 labels, gradients of all inputs.

    With ``upstream_stride``, the gradients of a loss per voxel are computed, from an upstream gradient of that stride.
    """
    x = scores(C, getattr(torch, dtype), EDGES[C], layout)
    labels = Labels(per_voxel(voxel_shape(x), torch.uint8, label_stride), ignore_index)
    sampling = Sampling(num_samples=4, beta=1.0, seed=7)
    spec = LossSpec(operation, labels, None, "mean", x.dtype)
    g = x if gradient else None
    if upstream_stride is not None:
        upstream = per_voxel(voxel_shape(x), torch.float32, upstream_stride)
        engine.loss(spec._replace(reduction="none"), LossTensors(x), LossTensors(x), upstream)
    elif operation == "cross_entropy":
        engine.loss(spec, LossTensors(x), LossTensors(g))
    elif operation == "masked_cross_entropy":
        masked = spec._replace(operation="cross_entropy", labels=labels._replace(ignore_index=1, is_mask=True))
        engine.loss(masked, LossTensors(x, x), LossTensors(x, x))
    elif operation == "weighted_cross_entropy":
        weighted = spec._replace(operation="cross_entropy", weight=torch.empty(C), label_smoothing=0.1)
        engine.loss(weighted, LossTensors(x), LossTensors(g))
    elif operation == "soft_cross_entropy":
        engine.loss(spec._replace(operation="cross_entropy"), LossTensors(x, x), LossTensors(g, g))
    elif operation == "vls_cross_entropy":
        spec = spec._replace(alpha=0.1, sampling=sampling)
        engine.loss(spec, LossTensors(x, mu=x, logvar=x), LossTensors(g, mu=g, logvar=g))
    elif operation.endswith("_overlap"):
        overlap(operation, x, spec, sampling)
    elif operation in ("vls_elbo", "gaussian_kl"):
        spec = spec._replace(labels=labels if operation == "vls_elbo" else None, sampling=sampling)
        engine.loss(spec, LossTensors(mu=x, logvar=x), LossTensors(mu=g, logvar=g))
    elif operation == "sample_soft_labels":
        sample, tensors = SampleSpec(labels, 0.1, sampling), GaussianTensors(x, x)
        engine.sample_soft_labels(sample, tensors)
        if gradient:
            engine.sample_soft_labels_backward(sample, tensors, x, tensors)
    elif operation == "accumulate_soft_labels":
        engine.accumulate_softmax(AccumulateSpec(None, 1.0), x, x)
        engine.accumulate_softmax_backward(AccumulateSpec(None, 1.0), x, x)
        engine.blend_soft_labels(BlendSpec(labels, 0.1, 2), x)
    elif operation in ("calibration_bins", "top_label_bins"):
        kinds = (False, 15, True), (False, 15, False), (True, 15, True), (True, 4096, True)
        for class_wise, n_bins, from_logits in kinds if operation == "calibration_bins" else kinds[:1]:
            bins = BinsSpec(
                labels, None, n_bins=n_bins, first_class=0, from_logits=from_logits, class_wise=class_wise,
                skip_background=False, per_item=False, right_closed=False, tolerance=probability_tolerance(x.dtype),
            )  # fmt: skip
            engine.calibration_bins(bins, x)
    elif operation == "scale_gradients":
        engine.scale_gradients([x], torch.empty(()), torch.empty(1))


def overlap(operation: str, x: torch.Tensor, spec: LossSpec, sampling: Sampling) -> None:
    """Call both passes of a loss with an overlap term, with hard, soft or sampled labels."""
    forward = spec._replace(operation="cross_entropy")
    backward = forward._replace(reduction="sum", scale=torch.empty((), dtype=torch.float64))
    grad_sums = torch.empty(*x.shape[:2], 2, dtype=torch.float64)
    options = DiceOptions(1.0, 1.0, False, False, (1e-5, 1e-5), None, "mean", 1.0, x.dtype, None)
    if operation == "sampled_overlap":
        forward = spec._replace(operation="vls_cross_entropy", alpha=0.1, sampling=sampling)
        labels = x.view(torch.uint16) if x.element_size() == 2 else x
        engine.dice_loss(forward, options, LossTensors(x, mu=x, logvar=x), LossTensors(labels, mu=x, logvar=x))
        engine.overlap_backward(backward, LossTensors(x, labels), LossTensors(x), grad_sums)
    else:
        tensors = LossTensors(x, x if operation == "soft_overlap" else None)
        engine.dice_loss(forward, options, tensors, LossTensors())
        engine.overlap_backward(backward, tensors, tensors, grad_sums)


if __name__ == "__main__":
    for line in sys.stdin:
        case = json.loads(line)
        architectures = tuple(case.pop("architectures", (80, 90)))
        for row in compiled(architectures, lambda case=case: call(**case)):
            print(json.dumps({**case, **row}), flush=True)
