"""The CUDA backend: operations whose kernels are written in CUDA C++ (kernels/*.cu), called through the extension."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from calseg import native
from calseg.checks import label_error, probabilities_at
from calseg.operations import BinsSpec, Labels, num_kinds
from calseg.tensors import as_integers, shape_of

DEVICES = ("cuda",)
CAPABILITY = (8, 0)  # the lowest compute capability that CMakeLists.txt compiles for
NO_FAULT = 2**63 - 1


def error(scores: Tensor) -> str | None:
    """Return the reason why this backend cannot run on the device of a tensor, or None if it can."""
    if native.extension is None:
        return f"the native engine is not available ({native.ERROR})"
    if not native.extension.CUDA_ARCHITECTURES:
        return "calseg was built without CUDA: reinstall with nvcc at hand, pip install --no-binary calseg calseg"
    if torch.version.hip is not None:
        return "this PyTorch is for ROCm, wanted one for CUDA"
    if scores.is_cuda and (capability := torch.cuda.get_device_capability(scores.device)) < CAPABILITY:
        return f"{scores.device} has compute capability {capability[0]}.{capability[1]}, wanted 8.0 or more"
    return refusal(scores.device) if scores.is_cuda else None


@cache
def refusal(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device, or None. The driver may be older than the runtime linked in."""
    try:
        run_on_nothing(device)
    except RuntimeError as error:
        return f"{device}: {error}"
    return None


def run_on_nothing(device: torch.device) -> None:
    """Call the extension without voxels: it asks the driver for the device and loads a kernel, but launches none."""
    scores, voxels = torch.empty((1, 1, 0), device=device), torch.empty((1, 0), dtype=torch.uint8, device=device)
    spec = BinsSpec(
        Labels(voxels, -100), None, n_bins=1, first_class=0, from_logits=True, class_wise=False, skip_background=False,
        per_item=False, right_closed=False, tolerance=0.0,
    )  # fmt: skip
    sums, totals, faults = torch.empty(11, dtype=torch.int64, device=device).split([3, 6, 2])
    native.extension.cuda_calibration_bins(scores, spec, sums, totals, faults, *_device_and_stream(scores))


def calibration_bins(spec: BinsSpec, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Do as :func:`calseg.backends.cpu.calibration_bins` on a GPU. The host waits for the GPU once."""
    N, C, _ = shape_of(scores)
    items, kinds = N if spec.per_item else 1, num_kinds(spec, C)
    results = torch.zeros(2 + items * (6 + kinds * spec.n_bins * 3), dtype=torch.int64, device=scores.device)
    sizes = [2, items * 6, items * kinds * spec.n_bins * 3]
    faults, totals, sums = results.split(sizes)
    faults.fill_(NO_FAULT)
    if spec.labels.tensor.is_floating_point():
        spec = spec._replace(labels=spec.labels._replace(tensor=as_integers(spec.labels.tensor)))
    native.extension.cuda_calibration_bins(scores, spec, sums, totals, faults, *_device_and_stream(scores))
    faults, totals, sums = results.cpu().split(sizes)
    label_position, score_position = faults.tolist()
    if label_position != NO_FAULT:
        raise label_error(label_position, spec.labels, C)
    if score_position != NO_FAULT:
        raise probabilities_at(score_position, scores)
    return sums.view(items, kinds, spec.n_bins, 3), totals.view(items, 6)


def _device_and_stream(tensor: Tensor) -> tuple[int, int]:
    """Return the CUDA device of a tensor and its current stream, as integers."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
