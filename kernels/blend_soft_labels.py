"""Soft labels from the total of several softmax maps, blended with one-hot labels in place.

Least memory traffic: one read and one write of the total.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from calseg.kernels.labels import Labels, blend_with_labels, load_labels_or_none
from calseg.kernels.launch import Call
from calseg.kernels.tile import View, classes, load, locate, store


@triton.jit
def blend_soft_labels(
    estimate,  # in and out [N, C, S]
    labels,  # [N, S] or none
    S,
    alpha,  # 1 if there are no labels
    scale,
    C: tl.constexpr,
    tile: tl.constexpr,
):
    """Compute ``estimate = (1 - alpha) * onehot(labels) + scale * estimate``. Ignored voxels get 0."""
    n, first, inside = locate(tl.program_id(0), S, tile)
    label, ok, bad = load_labels_or_none(labels, n, first, inside, C, tile)
    for start in range(0, C, tile.BLOCK_C):
        c = classes(start, tile)
        x = load(estimate, n, first, inside, None, c, C, tile)
        store(estimate, n, first, inside, c, blend_with_labels(x, scale, label, ok, bad, alpha, c), C, tile)


def launch(call: Call, spec: Any, labels: Labels, estimate: View) -> None:
    """Launch the kernel."""
    alpha = 1.0 if spec.labels is None else spec.alpha
    call.launch(blend_soft_labels, estimate, labels, call.S, alpha, alpha * (1 / spec.num_maps), call.C)
