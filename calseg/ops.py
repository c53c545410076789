"""Operation -> backend: which engine runs a call, and the calls into the native CPU engine.

Tensors travel as ``(data_ptr, dtype, stride_n, stride_c, stride_s)``: every tensor is seen as ``[N, C, S]``, spatial
axes collapsed to one stride, so channel-first, channels-last and slices of either need no copy. Everything here is
without autograd; :mod:`calseg.autograd` adds it.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module, metadata
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from calseg.checks import label_error, place_of, probability_error, probability_tolerance
from calseg.tensors import compute_dtype

try:
    from calseg import _native

    NATIVE_ERROR: str | None = None
except ImportError as error:
    _native = None  # type: ignore[assignment]
    NATIVE_ERROR = str(error).splitlines()[0]
    warnings.warn(
        f"calseg: no native CPU engine for this platform ({NATIVE_ERROR}); the slow reference backend is used. "
        "Reinstall with a C++17 compiler at hand: pip install --force-reinstall --no-binary calseg calseg",
        RuntimeWarning,
        stacklevel=2,
    )

# A faster way for small inputs, where there is one: csrc/small_cross_entropy.h.
small_cross_entropy: Callable[..., Any] | None = None if _native is None else _native.small_cross_entropy

BACKENDS = ("reference", "cpu", "triton", "cuda")
CUDA_OPERATIONS = ("calibration_bins",)  # those with a kernel in CUDA C++

MIN_TRITON = (3, 6)  # the oldest that the kernels are tested with
TRITON_DEVICES = ("cuda", "xpu")  # "cuda" is ROCm too


def _triton_version() -> str | None:
    for name in ("triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu", "pytorch-triton-xpu", "triton-windows"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def _triton_error() -> str | None:
    """Why the Triton engine cannot run, or None. Triton itself is imported when it is first used."""
    version = _triton_version()
    if version is None:
        return "Triton is not installed: pip install triton"
    if tuple(map(int, version.split(".")[:2])) < MIN_TRITON:
        return f"Triton {version} is too old: pip install 'triton>={'.'.join(map(str, MIN_TRITON))}'"
    return None


TRITON_ERROR = _triton_error()

CUDA_DEVICES = ("cuda",)
CUDA_CAPABILITY = (8, 0)  # the oldest that CMakeLists.txt compiles for


def _cuda_error(tensor: Tensor) -> str | None:
    """Why the CUDA engine cannot run on a tensor's device, or None."""
    if _native is None:
        return f"the native engine is not available ({NATIVE_ERROR})"
    if not _native.CUDA_ARCHITECTURES:
        return "calseg was built without CUDA: reinstall with nvcc at hand, pip install --no-binary calseg calseg"
    if torch.version.hip is not None:
        return "this PyTorch is for ROCm, wanted one for CUDA"
    if tensor.is_cuda and (capability := torch.cuda.get_device_capability(tensor.device)) < CUDA_CAPABILITY:
        return f"{tensor.device} has compute capability {capability[0]}.{capability[1]}, wanted 8.0 or more"
    return None


# The order of DType in csrc/kernels.h.
_DTYPES = {
    dtype: code
    for code, dtype in enumerate(
        (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.int16,
         torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.bool)
    )
}  # fmt: skip
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LABEL_DTYPES = tuple(dtype for dtype in _DTYPES if dtype not in (*FLOAT_DTYPES, torch.bool))

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

View = tuple[int, int, int, int, int]


class Sampling(NamedTuple):
    """How the Gaussian over the logits is sampled, and its KL term."""

    num_samples: int = 1
    temperature: float = 1.0
    beta: float = 0.0
    prior_mu: float = 0.0
    prior_logvar: float = 0.0
    seed: int | Tensor = 0


class Labels(NamedTuple):
    """Class indices, or (``is_mask``) a mask that equals ``ignore_index`` where a voxel is ignored; ``[N, *S]``."""

    tensor: Tensor
    ignore_index: int
    is_mask: bool = False


class Loss(NamedTuple):
    """What a loss is made of, beside the tensors that get gradients: logits, soft labels, mu and logvar.

    Logits without the others: cross-entropy on ``labels``; with soft labels: on those; with mu and logvar: on sampled
    ones. mu and logvar alone: the ELBO of ``labels``; and without those, the KL term alone.
    """

    labels: Labels | None
    weight: Tensor | None
    reduction: str
    dtype: torch.dtype
    label_smoothing: float = 0.0
    alpha: float = 0.0
    sampling: Sampling = Sampling()
    backend: str = "cpu"


def choose_backend(tensor: Tensor, backend: str | None, operation: str | None = None) -> str:
    """The backend of a call whose main argument is ``tensor``; ``operation`` may be one of CUDA_OPERATIONS."""
    if backend is None:
        device = tensor.device.type
        if device == "cpu":
            return "cpu" if _native is not None else "reference"
        if device not in TRITON_DEVICES or tensor.dtype == torch.float64:
            return "reference"
        if operation in CUDA_OPERATIONS and device in CUDA_DEVICES and _cuda_error(tensor) is None:
            return "cuda"
        if TRITON_ERROR is None:
            return "triton"
        if not torch.compiler.is_compiling():
            _warn_once(f"calseg: {TRITON_ERROR}; on {device} the slow reference backend is used")
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted None or one of {', '.join(map(repr, BACKENDS))}")
    if backend == "cpu":
        if _native is None:
            raise RuntimeError(f"backend='cpu': the native engine is not available ({NATIVE_ERROR})")
        if tensor.device.type != "cpu":
            raise ValueError(f"backend='cpu': got a tensor on {tensor.device}, wanted one on the CPU")
    if backend == "triton":
        if TRITON_ERROR is not None:
            raise RuntimeError(f"backend='triton': {TRITON_ERROR}")
        if tensor.device.type not in TRITON_DEVICES and not _interpreted(tensor):
            wanted = "one on a GPU (or TRITON_INTERPRET=1 set before Triton is imported)"
            raise ValueError(f"backend='triton': got a tensor on {tensor.device}, wanted {wanted}")
    if backend == "cuda":
        if operation not in CUDA_OPERATIONS:
            raise ValueError(f"backend='cuda': only {', '.join(CUDA_OPERATIONS)} has a CUDA kernel; 'triton' has all")
        if (error := _cuda_error(tensor)) is not None:
            raise RuntimeError(f"backend='cuda': {error}")
        if tensor.device.type not in CUDA_DEVICES:
            raise ValueError(f"backend='cuda': got a tensor on {tensor.device}, wanted one on a CUDA device")
    if backend in ("triton", "cuda") and tensor.dtype == torch.float64:
        return "reference"
    return backend


def _interpreted(tensor: Tensor) -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU: for tests."""
    return tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _triton() -> ModuleType:
    """The Triton engine."""
    return import_module("calseg.kernels")


# ---- views ----


def _one_stride(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The stride with which all these axes are walked in row-major order, if there is one."""
    step, extent = 1, None
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if extent is None:
            step = stride
        elif stride != extent:
            return None
        extent = stride * size
    return step


def shape_of(tensor: Tensor) -> tuple[int, int, int]:
    """``(N, C, S)`` of ``[C]``, ``[N, C]`` or ``[N, C, *S]``; rows of ``[N, C]`` count as one item's voxels."""
    sizes = tensor.shape
    if len(sizes) == 1:
        return 1, sizes[0], 1
    if len(sizes) == 2:
        return 1, sizes[1], sizes[0]
    return sizes[0], sizes[1], tensor.numel() // (sizes[0] * sizes[1]) if sizes[0] * sizes[1] else 0


def is_walked_in_place(tensor: Tensor) -> bool:
    """Whether the kernels see this tensor itself, not a copy: one stride walks its spatial axes."""
    if tensor.dim() < 4 or tensor.is_contiguous():
        return True
    return _one_stride(tensor.shape[2:], tensor.stride()[2:]) is not None


def layout_like(tensor: Tensor) -> torch.memory_format:
    """The layout of a result like ``tensor``: its own, if the kernels can write that in place, else contiguous."""
    if tensor.is_contiguous() or is_walked_in_place(torch.empty_like(tensor, device="meta")):
        return torch.preserve_format
    return torch.contiguous_format


def _kept(tensor: Tensor) -> Tensor:
    """The tensor as the kernels can read it: itself, or a copy where it must be one."""
    tensor = tensor.resolve_neg()
    return tensor if is_walked_in_place(tensor) else tensor.contiguous()


def _view(tensor: Tensor | None) -> View | None:
    """How the kernels see a tensor with a class axis (one that :func:`_kept` leaves as it is)."""
    if tensor is None:
        return None
    code, strides, rank = _DTYPES[tensor.dtype], tensor.stride(), tensor.dim()
    if rank == 2:
        return tensor.data_ptr(), code, 0, strides[1], strides[0]
    if rank == 1:
        return tensor.data_ptr(), code, 0, strides[0], 1
    step = strides[2] if rank == 3 else 1 if tensor.is_contiguous() else _one_stride(tensor.shape[2:], strides[2:])
    assert step is not None
    return tensor.data_ptr(), code, strides[0], strides[1], step


def _kept_labels(labels: Labels | None) -> Labels | None:
    if labels is None:
        return None
    tensor = labels.tensor.resolve_neg()
    if not tensor.is_contiguous() and _one_stride(tensor.shape[1:], tensor.stride()[1:]) is None:
        tensor = tensor.contiguous()
    return labels if tensor is labels.tensor else labels._replace(tensor=tensor)


def _label_view(labels: Labels | None) -> tuple[View, int, bool] | None:
    if labels is None:
        return None
    tensor, ignore_index, is_mask = labels
    strides, rank = tensor.stride(), tensor.dim()
    step: int | None = 1
    if rank == 1:
        step = strides[0]
    elif rank > 1 and not tensor.is_contiguous():
        step = _one_stride(tensor.shape[1:], strides[1:])
    assert step is not None
    stride_n = strides[0] if rank > 1 else 0
    return (tensor.data_ptr(), _DTYPES[tensor.dtype], stride_n, 0, step), ignore_index, is_mask


def _voxel_view(tensor: Tensor | None) -> View | None:
    """A contiguous or expanded float tensor without class axis, ``[N, *S]``."""
    if tensor is None:
        return None
    return _view(tensor[None] if tensor.dim() == 0 else tensor.unsqueeze(1))


def empty_like(tensor: Tensor) -> Tensor:
    """``torch.empty_like`` in the layout of :func:`layout_like`, a large one on pooled memory."""
    large = (
        _native is not None
        and tensor.numel() * tensor.element_size() >= _native.POOLED_BYTES
        and tensor.device.type == "cpu"
    )
    if not large and tensor.is_contiguous():
        return torch.empty_like(tensor)
    layout = layout_like(tensor)
    if large:
        strides = torch.empty_like(tensor, device="meta", memory_format=layout).stride()
        capsule = _native.empty_pooled(_DTYPES[tensor.dtype], tuple(tensor.shape), strides)
        if capsule is not None:
            pooled: Tensor = from_dlpack(capsule)
            return pooled
    return torch.empty_like(tensor, memory_format=layout)


def empty_cache() -> None:
    """Give the memory that is kept for the next step's gradients back to the system.

    Large results (4 MiB and more) of the CPU engine live in memory that is kept after they are freed, because the next
    training step asks for the same sizes again. The pool never holds more than was in use at once.

    Example:
        >>> import calseg
        >>> calseg.empty_cache()
    """
    if _native is not None:
        _native.pool_trim()


def voxel_shape(tensor: Tensor) -> tuple[int, ...]:
    """``[N, *S]`` of ``[N, C, *S]``."""
    sizes = tuple(tensor.shape)
    return sizes[:1] + sizes[2:] if len(sizes) > 1 else ()


# ---- native calls ----

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NO_GRADIENTS: Gradients = (None, None, None, None)


def _gaussian(mu: Tensor, logvar: Tensor, sampling: Sampling) -> tuple[Any, ...]:
    num_samples, temperature, beta, prior_mu, prior_logvar, seed = sampling
    return _view(mu), _view(logvar), temperature, beta, prior_mu, prior_logvar, num_samples, int(seed)


def _check(outcome: tuple[float, int, int], labels: Labels | None, num_classes: int) -> float:
    value, bad_position, bad_value = outcome
    if bad_position >= 0:
        assert labels is not None
        raise label_error(bad_value, bad_position, tuple(labels.tensor.shape), num_classes, labels.ignore_index)
    return value


def empty_loss(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for a loss per voxel, ``[N, *S]``."""
    return like.new_empty(voxel_shape(like), dtype=dtype)


def loss(
    spec: Loss,
    logits: Tensor | None,
    soft_labels: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    gradients: Gradients = NO_GRADIENTS,
    grad_output: Tensor | None = None,
) -> Tensor:
    """The loss; the gradients are written into the tensors that are given for them.

    Args:
        spec: which loss.
        logits, soft_labels, mu, logvar: ``[N, C, *S]``, see :class:`Loss`.
        gradients: for each of the four, the tensor to write to, or None.
        grad_output: the upstream gradient ``[N, *S]``, where it is not 1; then no loss is written.
    """
    labels, weight, reduction, dtype, label_smoothing, alpha, sampling, backend = spec
    if backend == "triton":
        on_gpu: Tensor = _triton().loss(spec, logits, soft_labels, mu, logvar, gradients, grad_output)
        return on_gpu
    like = logits if logits is not None else mu
    assert like is not None
    shape, reduction_code, threads = shape_of(like), _REDUCTIONS[reduction], torch.get_num_threads()
    per_voxel = upstream = None
    if grad_output is not None:
        upstream = _kept(grad_output.unsqueeze(1) if grad_output.dim() else grad_output[None])
    elif reduction == "none":
        per_voxel = empty_loss(like, dtype)
    weights = None if weight is None else weight.detach().resolve_neg().to(torch.float64).contiguous()
    labels = _kept_labels(labels)
    common = (_label_view(labels), None if weights is None else (weights.data_ptr(), 1, 0, 0, 0))
    if logits is not None:
        logits = _kept(logits)
    if mu is None or logvar is None:
        soft_labels = None if soft_labels is None else _kept(soft_labels)
        outcome = _native.cross_entropy(
            shape, _view(logits), _view(soft_labels), *common, label_smoothing, _view(upstream), _voxel_view(per_voxel),
            _view(gradients[0]), _view(gradients[1]), reduction_code, threads,
        )  # fmt: skip
    else:
        mu, logvar = _kept(mu), _kept(logvar)
        gaussian = _gaussian(mu, logvar, sampling)
        outputs = _view(upstream), _voxel_view(per_voxel)
        to_mu, to_logvar = _view(gradients[2]), _view(gradients[3])
        if logits is not None:
            outcome = _native.vls_cross_entropy(
                shape, _view(logits), gaussian, *common, label_smoothing, alpha, *outputs, _view(gradients[0]),
                to_mu, to_logvar, reduction_code, threads,
            )  # fmt: skip
        elif labels is not None:
            outcome = _native.vls_elbo(shape, gaussian, *common, *outputs, to_mu, to_logvar, reduction_code, threads)
        else:
            outcome = _native.gaussian_kl(shape, gaussian, *outputs, to_mu, to_logvar, reduction_code, threads)
    value = _check(outcome, labels, shape[1])
    return torch.scalar_tensor(value, dtype=dtype, device="cpu") if per_voxel is None else per_voxel


def needs_upstream_first(spec: Loss, tensors: Sequence[Tensor | None]) -> bool:
    """Whether gradients can only be made in backward: where the upstream gradient differs per voxel, and on a GPU where
    they are float16, which a mean's gradients underflow before backward brings the factor of the gradient scaler.
    """
    if spec.reduction == "none":
        return True
    return spec.backend == "triton" and any(t is not None and t.dtype == torch.float16 for t in tensors)


def scale_gradients(gradients: Sequence[Tensor | None], factor: Tensor, backend: str) -> None:
    """Multiply in place by a 0-d tensor."""
    if backend == "triton":
        _triton().scale_gradients(gradients, factor)
        return
    value = factor.item()
    if value != 1.0:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(value)


def sample_soft_labels(
    mu: Tensor, logvar: Tensor, labels: Labels | None, sampling: Sampling, alpha: float, backend: str = "cpu"
) -> Tensor:
    """Sampled soft labels, blended with ``labels`` where they are given; the dtype of ``mu``."""
    if backend == "triton":
        on_gpu: Tensor = _triton().sample_soft_labels(mu, logvar, labels, sampling, alpha)
        return on_gpu
    soft_labels = empty_like(mu)
    mu, logvar, labels = _kept(mu), _kept(logvar), _kept_labels(labels)
    shape = shape_of(mu)
    outcome = _native.sample_soft_labels(
        shape, _gaussian(mu, logvar, sampling), _label_view(labels), alpha, _view(soft_labels), torch.get_num_threads()
    )
    _check(outcome, labels, shape[1])
    return soft_labels


def sample_soft_labels_backward(
    mu: Tensor,
    logvar: Tensor,
    labels: Labels | None,
    sampling: Sampling,
    alpha: float,
    grad_output: Tensor,
    gradients: tuple[Tensor | None, Tensor | None],
    backend: str = "cpu",
) -> None:
    """Writes the gradients of :func:`sample_soft_labels` with respect to mu and logvar."""
    if backend == "triton":
        _triton().sample_soft_labels_backward(mu, logvar, labels, sampling, alpha, grad_output, gradients)
        return
    mu, logvar, labels, grad_output = _kept(mu), _kept(logvar), _kept_labels(labels), _kept(grad_output)
    _native.sample_soft_labels_backward(
        shape_of(mu), _gaussian(mu, logvar, sampling), _label_view(labels), alpha, _view(grad_output),
        _view(gradients[0]), _view(gradients[1]), torch.get_num_threads(),
    )  # fmt: skip


def accumulate_softmax(total: Tensor, logits: Tensor, temperature: float, backend: str = "cpu") -> None:
    """``total += softmax(logits / temperature)``."""
    if backend == "triton":
        _triton().accumulate_softmax(total, logits, temperature)
        return
    logits = _kept(logits)
    _native.accumulate_softmax(shape_of(logits), _view(logits), temperature, _view(total), torch.get_num_threads())


def accumulate_softmax_backward(
    logits: Tensor, grad_output: Tensor, temperature: float, backend: str = "cpu"
) -> Tensor:
    """The gradient of :func:`accumulate_softmax` with respect to the logits."""
    if backend == "triton":
        on_gpu: Tensor = _triton().accumulate_softmax_backward(logits, grad_output, temperature)
        return on_gpu
    grad_logits = empty_like(logits)
    logits, grad_output = _kept(logits), _kept(grad_output)
    _native.accumulate_softmax_backward(
        shape_of(logits), _view(logits), temperature, _view(grad_output), _view(grad_logits), torch.get_num_threads()
    )
    return grad_logits


def blend_soft_labels(
    estimate: Tensor, labels: Labels | None, alpha: float, scale: float, backend: str = "cpu"
) -> None:
    """``estimate = (1 - alpha) * onehot(labels) + alpha * scale * estimate``, 0 where ignored, in place."""
    if backend == "triton":
        _triton().blend_soft_labels(estimate, labels, alpha, scale)
        return
    labels, view, shape = _kept_labels(labels), _view(estimate), shape_of(estimate)
    outcome = _native.blend_soft_labels(shape, view, _label_view(labels), alpha, scale, view, torch.get_num_threads())
    _check(outcome, labels, shape[1])


def calibration_bins(
    scores: Tensor,
    labels: Labels,
    mask: Tensor | None,
    *,
    n_bins: int,
    from_logits: bool,
    first_class: int | None,
    skip_background: bool,
    per_item: bool,
    right_closed: bool,
    backend: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Sums per bin and totals, int64 ``[items, kinds, n_bins, 3]`` and ``[items, 6]``: see csrc/kernels.h.

    ``first_class`` is the first class with bins of its own, None for top-label bins; ``mask`` is uint8.
    """
    N, C, _ = shape_of(scores)
    options: dict[str, Any] = {
        "n_bins": n_bins, "from_logits": from_logits, "first_class": first_class, "skip_background": skip_background,
        "per_item": per_item, "right_closed": right_closed,
    }  # fmt: skip
    if backend in ("triton", "cuda"):
        engine = _triton().calibration_bins if backend == "triton" else _cuda_calibration_bins
        sums, totals, label_position, score_position = engine(scores, labels, mask, **options)
        if label_position >= 0:
            place = tuple(place_of(label_position, tuple(labels.tensor.shape)))
            label = int(labels.tensor[place])
            raise label_error(label, label_position, tuple(labels.tensor.shape), C, labels.ignore_index)
        if score_position >= 0:
            place = tuple(place_of(score_position, voxel_shape(scores)))
            probabilities = scores.movedim(min(1, scores.dim() - 1), -1)[place]
            total, least = float(probabilities.float().sum()), float(probabilities.min())
            raise probability_error(total, least, score_position, voxel_shape(scores))
        return sums, totals
    items, kinds = N if per_item else 1, 1 if first_class is None else C - first_class
    sums = torch.zeros(items, kinds, n_bins, 3, dtype=torch.int64, device="cpu")
    totals = torch.zeros(items, 6, dtype=torch.int64, device="cpu")
    label_position, label, score_position, total, least = _native_calibration_bins(
        _native.calibration_bins, scores, labels, mask, sums, totals, torch.get_num_threads(), **options
    )
    if label_position >= 0:
        raise label_error(label, label_position, tuple(labels.tensor.shape), C, labels.ignore_index)
    if score_position >= 0:
        raise probability_error(total, least, score_position, voxel_shape(scores))
    return sums, totals


def _native_calibration_bins(
    kernel: Callable[..., Any],
    scores: Tensor,
    labels: Labels,
    mask: Tensor | None,
    sums: Tensor,
    totals: Tensor,
    *rest: object,
    n_bins: int,
    from_logits: bool,
    first_class: int | None,
    skip_background: bool,
    per_item: bool,
    right_closed: bool,
) -> Any:
    """A native kernel of :func:`calibration_bins`; what it reads is held until it has been called."""
    scores, kept_labels = _kept(scores), _kept_labels(labels)
    counted = None if mask is None else _kept_labels(Labels(mask, 0))
    mask_view = _label_view(counted)
    return kernel(
        shape_of(scores), _view(scores), _label_view(kept_labels), None if mask_view is None else mask_view[0], n_bins,
        first_class or 0, from_logits, first_class is not None, skip_background, per_item, right_closed,
        probability_tolerance(scores.dtype), (sums.data_ptr(), 0, 0, 0, 0), (totals.data_ptr(), 0, 0, 0, 0), *rest,
    )  # fmt: skip


NO_FAULT = 2**63 - 1


def _cuda_calibration_bins(
    scores: Tensor, labels: Labels, mask: Tensor | None, *, n_bins: int, first_class: int | None, per_item: bool,
    **options: bool,
) -> tuple[Tensor, Tensor, int, int]:  # fmt: skip
    """:func:`calibration_bins`, and where the first label that is no class and the first scores that are no
    probabilities are, -1 if nowhere. Waits for the GPU once.
    """
    N, C, _ = shape_of(scores)
    items, kinds = N if per_item else 1, 1 if first_class is None else C - first_class
    results = torch.zeros(2 + items * (6 + kinds * n_bins * 3), dtype=torch.int64, device=scores.device)
    faults, totals, sums = results.split([2, items * 6, items * kinds * n_bins * 3])
    faults.fill_(NO_FAULT)
    _native_calibration_bins(
        _native.cuda_calibration_bins, scores, labels, mask, sums, totals, (faults.data_ptr(), 0, 0, 0, 0),
        *_device_and_stream(scores), n_bins=n_bins, first_class=first_class, per_item=per_item, **options,
    )  # fmt: skip
    faults, totals, sums = results.cpu().split([2, items * 6, items * kinds * n_bins * 3])
    label_position, score_position = (-1 if place == NO_FAULT else place for place in faults.tolist())
    return sums.view(items, kinds, n_bins, 3), totals.view(items, 6), label_position, score_position


def _device_and_stream(tensor: Tensor) -> tuple[int, int]:
    """The CUDA device of a tensor and the stream that is current on it, as integers."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def ace_moments(logits: Tensor, labels: Labels, n_bins: int, soft: bool, first_class: int) -> Tensor:
    """Per item, class and cell of confidence: count, sum of f, of f^2, hits, and sum of f where hit.

    float64 ``[N, kinds, cells, 5]``; what cells and f are, csrc/cpu/ace_moments.cpp says. NaN in the sums of f of an
    item with a NaN among its logits.
    """
    shape = N, C, _ = shape_of(logits)
    sums = torch.zeros(N, C - first_class, n_bins + soft, 8, dtype=torch.int64, device="cpu")
    nans = torch.zeros(N, dtype=torch.int64, device="cpu")
    kept, kept_labels = _kept(logits), _kept_labels(labels)
    outcome = _native.ace_moments(
        shape, _view(kept), _label_view(kept_labels), n_bins, first_class, soft, (sums.data_ptr(), 0, 0, 0, 0),
        (nans.data_ptr(), 0, 0, 0, 0), torch.get_num_threads(),
    )  # fmt: skip
    _check(outcome, labels, C)
    count, hits, *fractions = sums.double().unbind(-1)
    f, f_squared, f_hits = (
        whole * 2.0**-20 + rest * 2.0**-50 for whole, rest in zip(fractions[::2], fractions[1::2], strict=True)
    )
    f = torch.where((nans > 0)[:, None, None], torch.nan, f)
    return torch.stack([count, f, f_squared, hits, f_hits], -1)


def ace_moments_backward(
    logits: Tensor, labels: Labels, n_bins: int, soft: bool, first_class: int, grad_moments: Tensor, grad_logits: Tensor
) -> None:
    """Writes the gradient of the logits, given that of the moments."""
    _, by_f, by_f_squared, _, by_f_hits = grad_moments.unbind(-1)
    # of f it is by_f + 2 f by_f_squared + by_f_hits where hit; f grows by n_bins (hard bins: 1) with the confidence
    slopes = torch.stack([by_f, 2 * by_f_squared, by_f_hits], 2) * (n_bins if soft else 1)
    slopes = slopes.to(compute_dtype(logits.dtype)).contiguous()
    logits, labels = _kept(logits), _kept_labels(labels) or labels
    _native.ace_moments_backward(
        shape_of(logits), _view(logits), _label_view(labels), n_bins, first_class, soft,
        (slopes.data_ptr(), 0, 0, 0, 0), _view(grad_logits), torch.get_num_threads(),
    )  # fmt: skip


def bins_of_moments(moments: Tensor, n_bins: int, soft: bool) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`calseg.reference.ace_bins` from :func:`ace_moments`."""
    count, f, f_squared, hits, f_hits = moments.unbind(-1)
    if not soft:
        return count, f, hits
    # cell j lies between the centres of bins j - 1 and j, which get shares 1 - f and f of its voxels; the outermost
    # cells have one neighbour, which gets both; a confidence is (f + j - 1/2) / n_bins
    offset = torch.arange(n_bins + 1, dtype=f.dtype, device=f.device) - 0.5
    upper = f, (f_squared + offset * f) / n_bins, f_hits
    both = count, (f + offset * count) / n_bins, hits
    mass, confidence, hits = (_neighbours(whole - high, high) for whole, high in zip(both, upper, strict=True))
    return mass, confidence, hits


def _neighbours(lower: Tensor, upper: Tensor) -> Tensor:
    """What n + 1 cells give to the n bins below and above them."""
    n_bins = lower.shape[-1] - 1
    bins = lower[..., 1:] + upper[..., :n_bins]
    ends = torch.zeros_like(bins)
    return bins + torch.cat([lower[..., :1], ends[..., 1:]], -1) + torch.cat([ends[..., 1:], upper[..., n_bins:]], -1)


# ---- what a bug report needs ----


def info() -> dict[str, Any]:
    """Versions, backends, instruction set, threads and GPU.

    Returns:
        A flat dictionary of strings, numbers, lists and None, ready for JSON.

    Example:
        >>> import calseg
        >>> "cpu" in calseg.info()["backends"] or calseg.info()["native_error"] is not None
        True
    """
    from calseg._version import __version__

    native = _native is not None
    gpu = torch.cuda.is_available() or torch.xpu.is_available()
    architectures = list(_native.CUDA_ARCHITECTURES) if native else []
    runs = {
        "reference": True,
        "cpu": native,
        "triton": TRITON_ERROR is None and (gpu or _interpreted(torch.empty(0))),
        "cuda": torch.cuda.is_available() and _cuda_error(torch.empty(0, device="cuda")) is None,
    }
    return {
        "calseg": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "backends": [name for name in BACKENDS if runs[name]],
        "native_error": NATIVE_ERROR,
        "isa": _native.isa() if native else None,
        "available_isas": _native.available_isas() if native else [],
        "threading_layer": _native.threading_layer() if native else None,
        "num_threads": torch.get_num_threads(),
        "pool_held_bytes": _native.pool_held_bytes() if native else 0,
        "triton": _triton_version() if TRITON_ERROR is None else None,
        "triton_error": TRITON_ERROR,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "cuda_architectures": architectures,
    }
