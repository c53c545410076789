"""The compiled extension as PyTorch uses it, and the memory of results."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from calseg.installation import NATIVE_ERROR
from calseg.installation import extension as extension
from calseg.tensors import PLAIN_TYPES, layout_like, voxel_shape

Unreadable: type[ValueError] = ValueError if extension is None else extension.Unreadable
if extension is None:
    warnings.warn(
        f"calseg: no native CPU engine for this platform ({NATIVE_ERROR}); the slow reference backend is used. "
        "Reinstall with a C++17 compiler at hand: pip install --force-reinstall --no-binary calseg calseg",
        RuntimeWarning,
        stacklevel=2,
    )

POOLED_BYTES = 0 if extension is None else extension.POOLED_BYTES


def empty_like(scores: Tensor) -> Tensor:
    """Return ``torch.empty_like`` in the layout of :func:`calseg.tensors.layout_like`, on pooled memory if large."""
    large = extension is not None and scores.nbytes >= POOLED_BYTES and scores.device.type == "cpu"
    if not large and scores.is_contiguous():
        return torch.empty_like(scores)
    layout = layout_like(scores)
    if large and type(scores) in PLAIN_TYPES:
        strides = torch.empty_like(scores, device="meta", memory_format=layout).stride()
        capsule = extension.empty_pooled(scores.dtype, tuple(scores.shape), strides)
        if capsule is not None:
            pooled: Tensor = from_dlpack(capsule)
            return pooled
    return torch.empty_like(scores, memory_format=layout)


def empty_voxels(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory for a number per voxel, ``[N, *S]``, where ``like`` is ``[N, C, *S]``."""
    return like.new_empty(voxel_shape(like), dtype=dtype)


def empty_cache() -> None:
    """Return the memory that is kept for the gradients of the next step to the system.

    The CPU engine keeps the memory of large results (4 MiB and more) after they are freed, because the next training
    step asks for the same sizes again. The pool never holds more than was in use at once.

    Example:
        >>> import calseg
        >>> calseg.empty_cache()
    """
    if extension is not None:
        extension.pool_trim()
