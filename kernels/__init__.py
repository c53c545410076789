"""GPU kernels: one file per operation, in Triton, and what :mod:`calseg.ops` calls of them.

``engine`` is the host's side, ``launch`` cuts work into tiles; ``common``, ``noise`` and ``gaussian`` are what kernels
share. Importing this imports Triton. ``calibration.cu``, in CUDA C++, is called through the native module instead.
"""

from calseg.kernels.engine import (
    accumulate_softmax,
    accumulate_softmax_backward,
    blend_soft_labels,
    calibration_bins,
    loss,
    sample_soft_labels,
    sample_soft_labels_backward,
    scale_gradients,
)

__all__ = [
    "accumulate_softmax",
    "accumulate_softmax_backward",
    "blend_soft_labels",
    "calibration_bins",
    "loss",
    "sample_soft_labels",
    "sample_soft_labels_backward",
    "scale_gradients",
]
