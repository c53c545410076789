"""The CUDA backend: operations whose kernels are written in CUDA C++ (kernels/*.cu), called through the extension."""

from __future__ import annotations

import torch
from torch import Tensor

from calseg import native
from calseg.checks import label_error, probabilities_at
from calseg.operations import BinsSpec, num_kinds
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
    return None


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
