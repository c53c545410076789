"""Dtypes, shapes and layouts of tensors, as every backend sees them."""

from __future__ import annotations

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a value of ``dtype`` is computed: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
