"""Run every operation with both backends of a GPU on small, odd sizes. test_gpu.py runs it under compute-sanitizer.

An argument is the number of sizes and layouts that are run. The default is all.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from itertools import islice, product

import torch
from cases import LAYOUTS
from test_calibration import KINDS
from test_gpu import ENGINES, OPERATIONS, inputs, value_and_gradients

import calseg

SHAPES = ((2, 3, 5, 7), (1, 14, 9, 13), (1, 117, 3, 37))
most = int(sys.argv[1]) if len(sys.argv) > 1 else None
for layout, wrong, shape in islice(product(("contiguous", "channels_last"), (False, True), SHAPES), most):
    tensors, target = inputs(("x", "mu", "logvar"), shape)  # a fifth of the labels are ignored
    tensors = {name: LAYOUTS[layout](t) for name, t in tensors.items()}
    if wrong:
        target[0, -1] = 200
    for function, names in OPERATIONS.values():
        value_and_gradients(function, {name: tensors[name] for name in names}, target, "triton")
    for backend, n_bins, kind in product(ENGINES, (15, 200, 4096), KINDS):
        with suppress(IndexError):  # that a label is out of range
            calseg.calibration_bins(tensors["x"], target, backend=backend, n_bins=n_bins, ignore_index=255, **kind)
torch.cuda.synchronize()
print("every kernel ran")
