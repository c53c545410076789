"""The CUDA backend: operations whose kernels are written in CUDA C++ (kernels/*.cu), called through the extension."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from calseg import native
from calseg.checks import label_error, probabilities_at
from calseg.installation import NATIVE_ERROR
from calseg.operations import BinsSpec, Labels, LossSpec, LossTensors, num_kinds
from calseg.tensors import as_integers, class_axis, shape_of

DEVICES = ("cuda",)
CAPABILITY = (8, 0)  # the lowest compute capability that CMakeLists.txt compiles for
NO_FAULT = 2**63 - 1


def error(scores: Tensor) -> str | None:
    """Return the reason why this backend cannot run on the device of a tensor, or None if it can."""
    if native.extension is None:
        return f"the native engine is not available ({NATIVE_ERROR})"
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


# ---- cross-entropy: main kernels of the Triton backend, which calls them ----

LOSS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGN = 16  # bytes that a thread reads or copies at once

# of rows: the classes of a voxel are adjacent, and each voxel is a row
ROW_VOXELS = 128  # of a block, as in csrc/cuda/plan.h
MOST_ROW_BYTES = 64 * 1024  # of a tile, as in csrc/cuda/plan.h
FEWEST_ROWS = 2**15  # with fewer, a call is over before the next launch. Triton's kernel needs no launch beside it

# of few classes, in rows or with the voxels of a class adjacent
FEW_THREADS = 128  # of a block, as in csrc/cuda/plan.h
FEW_CLASSES = (2, 3, 4)
FEW_GROUPS = {2: 4, 3: 3, 4: 2}  # of ALIGN bytes of each class, that a thread adds up, as in csrc/cuda/plan.h
AT_ONCE_VOXELS = 2**21  # up to as many, Triton's kernels need a launch less

# of tiles, beside an overlap, with the voxels of a class adjacent
TILE_VOXELS, TILE_THREADS = 1024, 128  # of a block, as in csrc/cuda/plan.h
TILE_CLASSES = range(5, 129)
FEWEST_IN_TILES = 2**19  # with fewer, a GPU has too few blocks. Triton's kernels take smaller tiles


def kernel_of(
    tensors: LossTensors, gradients: LossTensors, spec: LossSpec, voxels: Sequence[Tensor | None] = ()
) -> str | None:
    """Return the kernel that may compute a loss, "few" or "rows", by all but the geometry: see :func:`block_voxels`.

    Args:
        tensors: the tensors of the loss.
        gradients: the tensors that receive the gradients.
        spec: the loss and its options. It is no first argument, as that is how operations of a backend are known.
        voxels: the tensors with a number for each voxel but the labels. An absent one is None.

    Returns:
        None if no kernel can compute it.
    """
    given = _one_hot_given(tensors, spec)
    if given is None or not _are_readable(*given, gradients.logits):
        return None
    logits, labels = given
    axis = class_axis(logits)
    is_plain = _is_plain(spec) and all(each is None for each in voxels)
    if is_plain and logits.shape[axis] in FEW_CLASSES and _begins_aligned(labels):
        return "few"
    return "rows" if logits.stride(axis) == 1 else None


def _is_plain(spec: LossSpec) -> bool:
    """Return whether a loss has neither class weights nor label smoothing."""
    return spec.weight is None and not spec.label_smoothing


def _one_hot_given(tensors: LossTensors, spec: LossSpec) -> tuple[Tensor, Tensor] | None:
    """Return the logits and the labels of a cross-entropy with one-hot labels, or None if the loss is another one."""
    if spec.operation != "cross_entropy" or tensors.soft_labels is not None:
        return None
    return None if tensors.logits is None or spec.labels is None else (tensors.logits, spec.labels.tensor)


def _are_readable(logits: Tensor, labels: Tensor, gradient: Tensor | None) -> bool:
    """Return whether the kernels have the dtypes and the device, and can read 16 bytes of the logits at once."""
    if logits.dtype not in LOSS_DTYPES or logits.device.type not in DEVICES or logits.data_ptr() % ALIGN:
        return False
    if gradient is not None and (gradient.dtype != logits.dtype or gradient.data_ptr() % ALIGN):
        return False
    return not (labels.dtype.is_floating_point or labels.dtype == torch.bool) and error(logits) is None


def overlap_kernel_of(tensors: LossTensors, gradients: LossTensors, spec: LossSpec) -> str | None:
    """Do as :func:`kernel_of` for a pass of a loss with an overlap.

    Returns:
        "overlap" with few classes, or "overlap_tiles" with more. Where a gradient is written, "overlap_gradient" or
        "overlap_gradient_tiles".
    """
    name = "overlap" if gradients.logits is None else "overlap_gradient"
    if kernel_of(tensors, gradients, spec) == "few":
        return name
    given = _one_hot_given(tensors, spec)
    if given is None or not (_is_plain(spec) and _begins_aligned(given[1]) and _are_readable(*given, gradients.logits)):
        return None
    logits = given[0]
    return name + "_tiles" if logits.element_size() == 2 and logits.shape[class_axis(logits)] in TILE_CLASSES else None


def _begins_aligned(tensor: Tensor) -> bool:
    """Return whether a tensor begins at a multiple of 16 bytes."""
    return tensor.data_ptr() % ALIGN == 0


def block_voxels(kernel: str, geometry: Any, itemsize: int, label_itemsize: int) -> int | None:
    """Return the number of voxels of a block, or None if the kernel should not take tensors of this geometry.

    Args:
        kernel: a result of :func:`kernel_of` or :func:`overlap_kernel_of`.
        geometry: the shape and the strides, :class:`calseg.kernels.launch.Geometry`.
        itemsize: the bytes of a logit.
        label_itemsize: the bytes of a label.
    """
    N, C, S, scores, _ = geometry
    if kernel.endswith("_tiles"):
        fits = _has_vectors(geometry, itemsize, label_itemsize) and _are_planes(geometry, itemsize)
        return TILE_VOXELS if fits and N * S >= FEWEST_IN_TILES else None
    is_dense = _are_planes(geometry, itemsize) or _are_rows(geometry, itemsize)
    if kernel != "rows" and is_dense and _has_vectors(geometry, itemsize, label_itemsize):
        enough = N * S >= FEWEST_ROWS if C == 3 and scores[0][1] == 1 else N * S > AT_ONCE_VOXELS
        groups = FEW_GROUPS[C] if kernel == "overlap" else 1
        return FEW_THREADS * ALIGN // itemsize * groups if enough else None
    if kernel not in ("few", "rows"):
        return None
    if not _is_faster_in_rows(C, itemsize) or C * ROW_VOXELS * itemsize > MOST_ROW_BYTES or N * S < FEWEST_ROWS:
        return None
    return ROW_VOXELS if _are_rows(geometry, itemsize) else None


def _are_rows(geometry: Any, itemsize: int) -> bool:
    """Return whether each item is rows of classes that follow one another, from a multiple of 16 bytes on."""
    _, C, _, scores, _ = geometry
    return all(c == 1 and s == C and n * itemsize % ALIGN == 0 for n, c, s in scores)


def _are_planes(geometry: Any, itemsize: int) -> bool:
    """Return whether each class of each item is dense, from a multiple of 16 bytes on."""
    return all(s == 1 and n * itemsize % ALIGN == c * itemsize % ALIGN == 0 for n, c, s in geometry.scores)


def _has_vectors(geometry: Any, itemsize: int, label_itemsize: int) -> bool:
    """Return whether the voxels of an item are whole vectors of 16 bytes of a class, with dense and aligned labels."""
    _, _, S, _, ((n, _, s), *_) = geometry
    are_whole: bool = S % (ALIGN // itemsize) == 0
    return are_whole and s == 1 and n * label_itemsize % ALIGN == 0


def _is_faster_in_rows(num_classes: int, itemsize: int) -> bool:
    """Return whether Triton's kernel takes more time by the count of benchmarks/instructions.py."""
    return num_classes > 2 and num_classes != 4 and (num_classes != 8 or itemsize == 4)


def cross_entropy(blocks: int, spec: LossSpec, given: Any) -> None:
    """Launch a kernel in place of that of ``calseg.kernels.cross_entropy``, with the same arguments.

    Args:
        blocks: the number of partial sums.
        spec: the loss and its options.
        given: the arguments, :class:`calseg.kernels.reductions.LossArguments`.
    """
    upstream, partials, logits = given.upstream, given.partials, given.tensors.logits.ptr
    given_or_none = lambda view: None if view is None else view.ptr  # noqa: E731
    native.extension.cuda_cross_entropy(
        LossTensors(logits), spec._replace(scale=upstream.scale), LossTensors(given_or_none(given.gradients.logits)),
        upstream.ptr, given_or_none(given.loss), None if upstream.factor is None else upstream.factor.float(),
        upstream.sums, partials.ptr, None if partials.voxels is None else partials.ptr[blocks : 2 * blocks],
        given.overlap, given.grad_overlap, blocks, *_device_and_stream(logits),
    )  # fmt: skip


def _device_and_stream(tensor: Tensor) -> tuple[int, int]:
    """Return the CUDA device of a tensor and its current stream, as integers."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
