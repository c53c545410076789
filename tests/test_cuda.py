"""The CUDA kernels without a GPU: their numbers in an emulation on the CPU, their launches, and the machine code."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import test_calibration as calibration
import torch
from cases import FLOATS, LABELS, LAYOUTS, SHAPES, labels, scores
from hypothesis import given, settings
from hypothesis import strategies as st

import calseg
from calseg import ops

HERE = Path(__file__).parent
ROOT = HERE.parent
KINDS, every_kind = calibration.KINDS, calibration.every_kind
LOW = (torch.bfloat16, torch.float16)


# ---- the kernels as plain C++ ----


class Launch(NamedTuple):
    """What the last launch was."""

    blocks: int
    shared_bytes: int
    device: int
    current_device: int


class Limits(NamedTuple):
    """What the emulated GPU has; of a grid, the blocks that run."""

    current_device: int = 0
    multiprocessors: int = 4
    shared_per_multiprocessor: int = 228 * 1024
    shared_per_block: int = 227 * 1024
    first_block: int = 0
    last_block: int = 2**32 - 1


class OnHost:
    """kernels/calibration.cu as :mod:`calseg._native` offers it, run on the CPU."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.calibration_bins.restype = ctypes.c_char_p

    def cuda_calibration_bins(
        self, shape, scores, labels, mask, n_bins, first_class, from_logits, class_wise, skip_background, per_item,
        right_closed, tolerance, sums, totals, faults, device, stream,
    ):  # fmt: skip
        integers = lambda values: None if values is None else (ctypes.c_int64 * len(values))(*values)  # noqa: E731
        flags = (from_logits, class_wise, skip_background, per_item, right_closed)
        problem = self.library.calibration_bins(
            integers(shape), integers(scores), integers(labels[0]), integers(mask),
            integers((n_bins, first_class, labels[1])), integers(flags), ctypes.c_double(tolerance),
            *(ctypes.c_void_p(each[0]) for each in (sums, totals, faults)), device, ctypes.c_void_p(stream),
        )  # fmt: skip
        if problem is not None:
            raise RuntimeError(problem.decode())

    def set_limits(self, limits: Limits) -> None:
        self.library.set_device(*map(ctypes.c_uint, limits))

    def last_launch(self) -> Launch:
        numbers = (ctypes.c_int64 * 4)()
        self.library.last_launch(numbers)
        return Launch(*numbers)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> OnHost:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    built = tmp_path_factory.mktemp("cuda_on_host") / "calibration.so"
    # a library under AddressSanitizer loads only into a process that started with it
    sanitizers = "address,undefined" if "libasan" in os.environ.get("LD_PRELOAD", "") else "undefined"
    done = subprocess.run(
        [compiler, "-std=c++17", "-O1", "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-Wall",
         "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared", f"-I{HERE / 'cuda_on_host'}",
         f"-I{ROOT / 'csrc'}", str(HERE / "cuda_on_host" / "calibration.cpp"), "-o", str(built)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return OnHost(built)


@pytest.fixture
def on_host(library: OnHost, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnHost]:
    """``backend="cuda"`` takes CPU tensors to the emulation."""
    library.set_limits(Limits())
    monkeypatch.setattr(
        ops, "_native",
        SimpleNamespace(cuda_calibration_bins=library.cuda_calibration_bins, CUDA_ARCHITECTURES=["on a CPU"]),
    )  # fmt: skip
    monkeypatch.setattr(ops, "CUDA_DEVICES", ("cpu",))
    monkeypatch.setattr(ops, "_device_and_stream", lambda tensor: (0, 0))
    return library


# ---- the tests of the other backends ----


@every_kind
@pytest.mark.parametrize("from_logits", [True, False])
def test_masks_nan_and_nothing(on_host, kind, from_logits):
    calibration.test_mask("cuda", kind, from_logits)
    calibration.test_nan("cuda", kind)
    calibration.test_nothing_counts("cuda", kind)


@every_kind
@pytest.mark.parametrize("C", [1, 2, 3, 4, 5, 14, 16, 17, 33, 117])
def test_logits(on_host, C, kind):
    for dtype in (torch.float32, *LOW):
        calibration.test_logits_against_float64("cuda", dtype, C, kind)


@pytest.mark.parametrize("right_closed", [False, True])
@pytest.mark.parametrize("n_bins", [1, 2, 7, 15, 20, 100, 4096, 65536])
def test_edges(on_host, n_bins, right_closed):
    calibration.test_edges("cuda", n_bins, torch.float32, right_closed)


def test_extremes(on_host):
    for dtype in (torch.float32, *LOW):
        calibration.test_impossible_labels("cuda", dtype)
        calibration.test_ties("cuda", dtype, True)
        calibration.test_ties("cuda", dtype, False)
    calibration.test_zero_and_one("cuda")
    calibration.test_slightly_beyond_zero_and_one("cuda")
    calibration.test_likelihoods_of_every_size("cuda")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(on_host, name):
    calibration.test_layouts("cuda", name, 2)


def test_labels_and_shapes(on_host):
    for form in ("[N, *S]", "strided", "transposed", "expanded"):
        for dtype in LABELS:
            calibration.test_label_types_and_forms("cuda", dtype, form)
    for shape in SHAPES.values():
        calibration.test_shapes("cuda", shape)
    for shape in ((0, 3, 4), (2, 3, 0), (0, 3)):
        calibration.test_empty("cuda", shape)
    calibration.test_foreground("cuda")
    calibration.test_per_item("cuda")
    calibration.test_low_precision_is_widened("cuda")
    calibration.test_merge_is_not_concatenation("cuda")
    calibration.test_errors_name_the_argument("cuda")
