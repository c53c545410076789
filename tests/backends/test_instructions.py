"""Instructions of the GPU kernels, bounded for every configuration of benchmarks/instructions.py: no GPU is needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from calseg.installation import TRITON_ERROR, triton_version

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "instructions.py"
COUNTED_WITH = "3.9"  # the version of Triton, on which counts depend
MARGIN = 1.03

pytestmark = [
    pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the checkout's benchmarks"),
    pytest.mark.skipif(
        TRITON_ERROR is not None or not (triton_version() or "").startswith(COUNTED_WITH + "."),
        reason=f"the counts are those of Triton {COUNTED_WITH}",
    ),
    pytest.mark.timeout(900),
]

# Instructions a voxel on sm_90, of all kernels over voxels together.
INSTRUCTIONS = {
    "cross_entropy C=2 float32": 79,
    "cross_entropy C=4 float32": 103,
    "cross_entropy C=14 float32": 280,
    "cross_entropy C=33 float32": 763,
    "cross_entropy C=117 float32": 3048,
    "cross_entropy C=2 bfloat16": 77,
    "cross_entropy C=4 bfloat16": 106,
    "cross_entropy C=14 bfloat16": 299,
    "cross_entropy C=33 bfloat16": 803,
    "cross_entropy C=117 bfloat16": 3208,
    "cross_entropy C=2 float32, CUDA C++": 64,
    "cross_entropy C=4 float32, CUDA C++": 89,
    "cross_entropy C=2 bfloat16, CUDA C++": 48,
    "cross_entropy C=4 bfloat16, CUDA C++": 74,
    "cross_entropy C=2 float32 channels-last": 118,
    "cross_entropy C=4 float32 channels-last": 157,
    "cross_entropy C=14 float32 channels-last": 1007,
    "cross_entropy C=32 float32 channels-last": 1326,
    "cross_entropy C=33 float32 channels-last": 4264,
    "cross_entropy C=117 float32 channels-last": 5336,
    "cross_entropy C=2 bfloat16 channels-last": 125,
    "cross_entropy C=4 bfloat16 channels-last": 162,
    "cross_entropy C=14 bfloat16 channels-last": 1029,
    "cross_entropy C=32 bfloat16 channels-last": 1048,
    "cross_entropy C=33 bfloat16 channels-last": 4396,
    "cross_entropy C=117 bfloat16 channels-last": 5608,
    "cross_entropy C=2 float32 channels-last, CUDA C++": 80,
    "cross_entropy C=4 float32 channels-last, CUDA C++": 108,
    "cross_entropy C=14 float32 channels-last, CUDA C++": 491,
    "cross_entropy C=32 float32 channels-last, CUDA C++": 805,
    "cross_entropy C=33 float32 channels-last, CUDA C++": 779,
    "cross_entropy C=117 float32 channels-last, CUDA C++": 2098,
    "cross_entropy C=2 bfloat16 channels-last, CUDA C++": 54,
    "cross_entropy C=4 bfloat16 channels-last, CUDA C++": 79,
    "cross_entropy C=14 bfloat16 channels-last, CUDA C++": 571,
    "cross_entropy C=32 bfloat16 channels-last, CUDA C++": 852,
    "cross_entropy C=33 bfloat16 channels-last, CUDA C++": 950,
    "cross_entropy C=117 bfloat16 channels-last, CUDA C++": 2701,
    "dice C=2": 124,
    "dice C=4": 219,
    "dice C=14": 631,
    "dice C=33": 2123,
    "dice C=117": 6138,
    "dice C=2 float32, CUDA C++": 81,
    "dice C=2 float32 channels-last": 170,
    "dice C=2 float32 channels-last, CUDA C++": 91,
    "dice C=2 bfloat16": 126,
    "dice C=2 bfloat16, CUDA C++": 66,
    "dice C=2 bfloat16 channels-last": 176,
    "dice C=2 bfloat16 channels-last, CUDA C++": 71,
    "dice C=3 float32, CUDA C++": 125,
    "dice C=3 float32 channels-last, CUDA C++": 131,
    "dice C=3 bfloat16, CUDA C++": 105,
    "dice C=3 bfloat16 channels-last, CUDA C++": 106,
    "dice C=4 float32, CUDA C++": 157,
    "dice C=4 float32 channels-last": 266,
    "dice C=4 float32 channels-last, CUDA C++": 165,
    "dice C=4 bfloat16": 210,
    "dice C=4 bfloat16, CUDA C++": 134,
    "dice C=4 bfloat16 channels-last": 277,
    "dice C=4 bfloat16 channels-last, CUDA C++": 137,
    "dice C=5 bfloat16": 301,
    "dice C=5 bfloat16, CUDA C++": 302,
    "dice C=8 bfloat16": 390,
    "dice C=8 bfloat16, CUDA C++": 369,
    "dice C=14 bfloat16": 673,
    "dice C=14 bfloat16, CUDA C++": 539,
    "dice C=33 bfloat16": 2205,
    "dice C=33 bfloat16, CUDA C++": 1180,
    "dice C=117 bfloat16": 6438,
    "dice C=117 bfloat16, CUDA C++": 3465,
    "vls C=2": 537,
    "vls C=4": 887,
    "vls C=14": 2903,
    "vls C=33": 10668,
    "vls C=117": 38312,
    "bins C=2": 358,
    "bins C=4": 450,
    "bins C=14": 608,
    "bins C=117": 5224,
}


@pytest.fixture(scope="module")
def counted():
    """Return the rows of the script by name, from a process in which Triton compiles. In this one it interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


def test_every_configuration_has_a_bound(counted):
    assert counted.keys() == {name for name in INSTRUCTIONS if shutil.which("nvcc") or "CUDA C++" not in name}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions(counted, name):
    """A change that costs more than 3 % shows. A bound far above the count is out of date, and shows too."""
    if name not in counted:
        pytest.skip("needs nvcc")
    rows = counted[name]["rows"]
    total = sum(row["instructions"] for row in rows)
    assert INSTRUCTIONS[name] / 1.1 < total < INSTRUCTIONS[name] * MARGIN, total
    for row in rows:
        assert row["stack"] == 0, row["kernel"]


IN_CUDA = [name for name in INSTRUCTIONS if "CUDA C++" in name]


@pytest.mark.parametrize("name", [name for name in IN_CUDA if name.startswith("cross_entropy")])
def test_loops_run_as_often_as_assumed(counted, name):
    """A thread computes an exponential for each class, twice where memory cannot hold it, and little beside them."""
    if name not in counted:
        pytest.skip("needs nvcc")
    C = int(re.search(r"C=(\d+)", name)[1])
    kernel = "cross_entropy_rows" if C > 4 else "cross_entropy_few"
    (row,) = (row for row in counted[name]["rows"] if row["kernel"] == kernel)
    beside = row["xu"] / 8 - C * (2 if C > 4 and "bfloat16" in name else 1)
    assert 2 <= beside <= 5 if C > 4 else 1 <= beside <= 1.25


@pytest.mark.parametrize("name", [name for name in IN_CUDA if name.startswith("dice")])
def test_passes_of_dice_compute_what_is_assumed(counted, name):
    """A thread computes an exponential for each class and a reciprocal, and with three and more the label's again.

    Of more classes, it computes the exponentials twice. If their number is odd, the sums have one class more.
    """
    if name not in counted:
        pytest.skip("needs nvcc")
    C, rows = int(re.search(r"C=(\d+)", name)[1]), {row["kernel"]: row for row in counted[name]["rows"]}
    if C > 4:
        assert rows.keys() == {"overlap_tiles", "overlap_gradient_tiles"}
        for kernel, row in rows.items():
            assert 2 <= row["xu"] / 8 - 2 * C - (C % 2 and kernel == "overlap_tiles") <= 2.5
        return
    assert rows.keys() == {"overlap_few", "overlap_gradient_few"}  # and no scan of the labels
    for kernel, most in (("overlap_few", 0.1), ("overlap_gradient_few", 0.8)):
        beside = rows[kernel]["xu"] / 8 - C - 1 - (C > 2 and kernel == "overlap_few")
        assert 0 <= beside <= most


@pytest.mark.parametrize("name", [name for name in INSTRUCTIONS if name.startswith("dice") and name not in IN_CUDA])
def test_passes_of_dice_in_triton(counted, name):
    """No kernel scans the labels. Forward, a thread computes an exponential for each class, and little beside them."""
    C, rows = int(re.search(r"C=(\d+)", name)[1]), {row["kernel"]: row for row in counted[name]["rows"]}
    assert rows.keys() == {"hard_overlap", "hard_cross_entropy"}
    assert C <= rows["hard_overlap"]["xu"] / 8 <= 1.15 * C + 3
