"""Tests of calibration bins that several backends of a GPU go through, in their interpreter or emulation."""

from __future__ import annotations

from typing import Any

import test_calibration as calibration
import torch
from cases import SHAPES


def check_voxels_that_count(backend: str, kind: dict[str, Any], from_logits: bool) -> None:
    calibration.test_mask(backend, kind, from_logits)
    calibration.test_nan(backend, kind)
    calibration.test_nothing_counts(backend, kind)


def check_extremes(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        calibration.test_impossible_labels(backend, dtype)
        calibration.test_ties(backend, dtype, True)
        calibration.test_ties(backend, dtype, False)
    calibration.test_zero_and_one(backend)
    calibration.test_slightly_beyond_zero_and_one(backend)
    calibration.test_likelihoods_of_every_size(backend)


def check_shapes(backend: str) -> None:
    for shape in SHAPES.values():
        calibration.test_shapes(backend, shape)
    for shape in ((0, 3, 4), (2, 3, 0), (0, 3)):
        calibration.test_empty(backend, shape)
    calibration.test_foreground(backend)
    calibration.test_per_item(backend)
    calibration.test_errors_name_the_argument(backend)
