"""Operation -> backend: which engine runs a call, and the calls into the native CPU engine.

Tensors travel as ``(data_ptr, dtype, stride_n, stride_c, stride_s)``: every tensor is seen as ``[N, C, S]``, spatial axes
collapsed to one stride, so channel-first, channels-last and slices of either need no copy. Everything here is without
autograd; :mod:`calseg.autograd` adds it.
"""

from __future__ import annotations

import multiprocessing
import platform
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from calseg.reference import label_error

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

BACKENDS = ("reference", "cpu")

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


class Gaussian(NamedTuple):
    """The Gaussian over the logits and how it is sampled; ``mu`` and ``logvar`` have the logits' shape."""

    mu: Tensor
    logvar: Tensor
    num_samples: int
    temperature: float
    beta: float
    prior_mu: float
    prior_logvar: float
    seed: int | Tensor


class Labels(NamedTuple):
    """Class indices, or (``is_mask``) a mask that equals ``ignore_index`` where a voxel is ignored; ``[N, *S]``."""

    tensor: Tensor
    ignore_index: int
    is_mask: bool = False


def choose_backend(tensor: Tensor, backend: str | None) -> str:
    """The backend of a call whose main argument is ``tensor``."""
    if backend is None:
        return "cpu" if _native is not None and tensor.device.type == "cpu" else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted None or one of {', '.join(map(repr, BACKENDS))}")
    if backend == "cpu":
        if _native is None:
            raise RuntimeError(f"backend='cpu': the native engine is not available ({NATIVE_ERROR})")
        if tensor.device.type != "cpu":
            raise ValueError(f"backend='cpu': got a tensor on {tensor.device}, wanted one on the CPU")
    return backend


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


def _view(tensor: Tensor | None) -> tuple[View | None, Tensor | None]:
    """How the kernels see a tensor with a class axis, and the tensor that must stay alive meanwhile."""
    if tensor is None:
        return None, None
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    code, sizes = _DTYPES[tensor.dtype], tensor.shape
    if len(sizes) == 1:
        return (tensor.data_ptr(), code, 0, tensor.stride(0), 1), tensor
    if len(sizes) == 2:
        return (tensor.data_ptr(), code, 0, tensor.stride(1), tensor.stride(0)), tensor
    strides = tensor.stride()
    step = 1 if tensor.is_contiguous() else _one_stride(sizes[2:], strides[2:])
    if step is None:
        return _view(tensor.contiguous())
    return (tensor.data_ptr(), code, strides[0], strides[1], step), tensor


def _out_view(tensor: Tensor | None) -> View | None:
    """How the kernels see a tensor they write: never a copy, which would be lost."""
    view, seen = _view(tensor)
    assert seen is tensor, "the kernels cannot write this layout"
    return view


def _label_view(labels: Labels | None) -> tuple[tuple[View, int, bool] | None, Tensor | None]:
    if labels is None:
        return None, None
    tensor, ignore_index, is_mask = labels
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    code, sizes = _DTYPES[tensor.dtype], tensor.shape
    stride_n, step = 0, 1
    if len(sizes) == 1:
        step = tensor.stride(0)
    elif len(sizes) > 1:
        stride_n = tensor.stride(0)
        if not tensor.is_contiguous():
            collapsed = _one_stride(sizes[1:], tensor.stride()[1:])
            if collapsed is None:
                return _label_view(Labels(tensor.contiguous(), ignore_index, is_mask))
            step = collapsed
    return ((tensor.data_ptr(), code, stride_n, 0, step), ignore_index, is_mask), tensor


def _voxel_view(tensor: Tensor | None) -> tuple[View | None, Tensor | None]:
    """A float tensor without class axis, ``[N, *S]``."""
    if tensor is None:
        return None, None
    return _view(tensor[None]) if tensor.dim() == 0 else _view(tensor.unsqueeze(1))


def _weight_view(weight: Tensor | None) -> tuple[View | None, Tensor | None]:
    return _view(None if weight is None else weight.detach().to(torch.float64).contiguous())


def is_walked_in_place(tensor: Tensor) -> bool:
    """Whether the kernels see this tensor itself, not a copy."""
    if tensor.dim() < 4 or tensor.is_contiguous():
        return True
    return _one_stride(tuple(tensor.shape[2:]), tensor.stride()[2:]) is not None


def layout_like(tensor: Tensor) -> torch.memory_format:
    """The layout of a result like ``tensor``: its own, if the kernels can write that in place, else contiguous."""
    if tensor.is_contiguous() or is_walked_in_place(torch.empty_like(tensor, device="meta")):
        return torch.preserve_format
    return torch.contiguous_format


def empty_like(tensor: Tensor) -> Tensor:
    """``torch.empty_like`` in the layout of :func:`layout_like`, a large one on pooled memory."""
    layout = layout_like(tensor)
    if _native is not None and tensor.numel() * tensor.element_size() >= _native.POOLED_BYTES:
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


# ---- native calls: (loss, gradients) ----


def _gaussian_args(gaussian: Gaussian) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    mu, keep_mu = _view(gaussian.mu)
    logvar, keep_logvar = _view(gaussian.logvar)
    _, _, num_samples, temperature, beta, prior_mu, prior_logvar, seed = gaussian
    args = (mu, logvar, float(temperature), float(beta), float(prior_mu), float(prior_logvar), num_samples, int(seed))
    return args, (keep_mu, keep_logvar)


def _check(outcome: tuple[float, int, int], labels: Labels | None, num_classes: int) -> float:
    loss, bad_position, bad_value = outcome
    if bad_position >= 0:
        assert labels is not None
        raise label_error(bad_value, bad_position, tuple(labels.tensor.shape), num_classes, labels.ignore_index)
    return loss


def _loss_out(like: Tensor, dtype: torch.dtype, reduction: str) -> Tensor | None:
    return like.new_empty(voxel_shape(like), dtype=dtype) if reduction == "none" else None


def _loss_tensor(value: float, per_voxel: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype) if per_voxel is None else per_voxel


def cross_entropy(
    logits: Tensor,
    soft_labels: Tensor | None,
    labels: Labels | None,
    weight: Tensor | None,
    *,
    label_smoothing: float,
    reduction: str,
    loss_dtype: torch.dtype,
    grad_output: Tensor | None = None,
    grad_logits: Tensor | None = None,
    grad_soft_labels: Tensor | None = None,
) -> Tensor:
    """The loss; the gradients are written into the tensors given for them (``grad_output``: per voxel, else 1)."""
    shape = shape_of(logits)
    (scores, _logits), (soft, _soft) = _view(logits), _view(soft_labels)
    label_view, _labels = _label_view(labels)
    weight_view, _weight = _weight_view(weight)
    upstream, _upstream = _voxel_view(grad_output)
    loss = None if grad_output is not None else _loss_out(logits, loss_dtype, reduction)
    outcome = _native.cross_entropy(
        shape, scores, soft, label_view, weight_view, label_smoothing, upstream, _voxel_view(loss)[0],
        _out_view(grad_logits), _out_view(grad_soft_labels), _REDUCTIONS[reduction], torch.get_num_threads(),
    )  # fmt: skip
    return _loss_tensor(_check(outcome, labels, shape[1]), loss, loss_dtype)


def vls_cross_entropy(
    logits: Tensor,
    gaussian: Gaussian,
    labels: Labels,
    weight: Tensor | None,
    *,
    label_smoothing: float,
    alpha: float,
    reduction: str,
    loss_dtype: torch.dtype,
    grad_output: Tensor | None = None,
    grad_logits: Tensor | None = None,
    grad_mu: Tensor | None = None,
    grad_logvar: Tensor | None = None,
) -> Tensor:
    """The loss on sampled soft labels plus KL; gradients as in :func:`cross_entropy`."""
    shape = shape_of(logits)
    scores, _logits = _view(logits)
    gaussian_args, _gaussian = _gaussian_args(gaussian)
    label_view, _labels = _label_view(labels)
    weight_view, _weight = _weight_view(weight)
    upstream, _upstream = _voxel_view(grad_output)
    loss = None if grad_output is not None else _loss_out(logits, loss_dtype, reduction)
    outcome = _native.vls_cross_entropy(
        shape, scores, gaussian_args, label_view, weight_view, label_smoothing, alpha, upstream, _voxel_view(loss)[0],
        _out_view(grad_logits), _out_view(grad_mu), _out_view(grad_logvar), _REDUCTIONS[reduction],
        torch.get_num_threads(),
    )  # fmt: skip
    return _loss_tensor(_check(outcome, labels, shape[1]), loss, loss_dtype)


def vls_elbo(
    gaussian: Gaussian,
    labels: Labels,
    weight: Tensor | None,
    *,
    reduction: str,
    loss_dtype: torch.dtype,
    grad_output: Tensor | None = None,
    grad_mu: Tensor | None = None,
    grad_logvar: Tensor | None = None,
) -> Tensor:
    """The stage-1 objective; gradients as in :func:`cross_entropy`."""
    shape = shape_of(gaussian.mu)
    gaussian_args, _gaussian = _gaussian_args(gaussian)
    label_view, _labels = _label_view(labels)
    weight_view, _weight = _weight_view(weight)
    upstream, _upstream = _voxel_view(grad_output)
    loss = None if grad_output is not None else _loss_out(gaussian.mu, loss_dtype, reduction)
    outcome = _native.vls_elbo(
        shape, gaussian_args, label_view, weight_view, upstream, _voxel_view(loss)[0], _out_view(grad_mu),
        _out_view(grad_logvar), _REDUCTIONS[reduction], torch.get_num_threads(),
    )  # fmt: skip
    return _loss_tensor(_check(outcome, labels, shape[1]), loss, loss_dtype)


def gaussian_kl(
    gaussian: Gaussian,
    *,
    reduction: str,
    loss_dtype: torch.dtype,
    grad_output: Tensor | None = None,
    grad_mu: Tensor | None = None,
    grad_logvar: Tensor | None = None,
) -> Tensor:
    """The KL term; gradients as in :func:`cross_entropy`."""
    gaussian_args, _gaussian = _gaussian_args(gaussian)
    upstream, _upstream = _voxel_view(grad_output)
    loss = None if grad_output is not None else _loss_out(gaussian.mu, loss_dtype, reduction)
    value, _, _ = _native.gaussian_kl(
        shape_of(gaussian.mu), gaussian_args, upstream, _voxel_view(loss)[0], _out_view(grad_mu),
        _out_view(grad_logvar), _REDUCTIONS[reduction], torch.get_num_threads(),
    )  # fmt: skip
    return _loss_tensor(value, loss, loss_dtype)


def elbo_or_kl(gaussian: Gaussian, labels: Labels | None, weight: Tensor | None, **options: Any) -> Tensor:
    """:func:`vls_elbo`; without labels :func:`gaussian_kl`, the same without its first term."""
    return gaussian_kl(gaussian, **options) if labels is None else vls_elbo(gaussian, labels, weight, **options)


def sample_soft_labels(gaussian: Gaussian, labels: Labels | None, *, alpha: float) -> Tensor:
    """Sampled soft labels, blended with ``labels`` where they are given; the dtype of ``mu``."""
    shape = shape_of(gaussian.mu)
    gaussian_args, _gaussian = _gaussian_args(gaussian)
    label_view, _labels = _label_view(labels)
    soft_labels = empty_like(gaussian.mu)
    outcome = _native.sample_soft_labels(
        shape, gaussian_args, label_view, alpha, _out_view(soft_labels), torch.get_num_threads()
    )
    _check(outcome, labels, shape[1])
    return soft_labels


def sample_soft_labels_backward(
    gaussian: Gaussian,
    labels: Labels | None,
    grad_output: Tensor,
    *,
    alpha: float,
    grad_mu: Tensor | None,
    grad_logvar: Tensor | None,
) -> None:
    """Writes the gradients of :func:`sample_soft_labels`."""
    gaussian_args, _gaussian = _gaussian_args(gaussian)
    label_view, _labels = _label_view(labels)
    upstream, _upstream = _view(grad_output)
    _native.sample_soft_labels_backward(
        shape_of(gaussian.mu), gaussian_args, label_view, alpha, upstream, _out_view(grad_mu), _out_view(grad_logvar),
        torch.get_num_threads(),
    )  # fmt: skip


def accumulate_softmax(total: Tensor, logits: Tensor, *, temperature: float) -> None:
    """``total += softmax(logits / temperature)``."""
    view, _logits = _view(logits)
    _native.accumulate_softmax(shape_of(logits), view, temperature, _out_view(total), torch.get_num_threads())


def accumulate_softmax_backward(logits: Tensor, grad_output: Tensor, *, temperature: float) -> Tensor:
    """The gradient of :func:`accumulate_softmax` with respect to the logits."""
    grad_logits = empty_like(logits)
    (view, _logits), (upstream, _upstream) = _view(logits), _view(grad_output)
    _native.accumulate_softmax_backward(
        shape_of(logits), view, temperature, upstream, _out_view(grad_logits), torch.get_num_threads()
    )
    return grad_logits


def blend_soft_labels(estimate: Tensor, labels: Labels | None, *, alpha: float, scale: float) -> None:
    """``estimate = (1 - alpha) * onehot(labels) + alpha * scale * estimate``, 0 where ignored, in place."""
    view = _out_view(estimate)
    label_view, _labels = _label_view(labels)
    shape = shape_of(estimate)
    outcome = _native.blend_soft_labels(shape, view, label_view, alpha, scale, view, torch.get_num_threads())
    _check(outcome, labels, shape[1])


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
    return {
        "calseg": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "backends": [name for name in BACKENDS if name != "cpu" or native],
        "native_error": NATIVE_ERROR,
        "isa": _native.isa() if native else None,
        "available_isas": _native.available_isas() if native else [],
        "threading_layer": _native.threading_layer() if native else None,
        "num_threads": torch.get_num_threads(),
        "pool_held_bytes": _native.pool_held_bytes() if native else 0,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
    }
