"""Triton's real launcher over a driver that only records: parameters, grids, and how many launches a call takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from operations import OPERATIONS
from recorder import driver

from calseg.backends import choice

pytestmark = [
    pytest.mark.skipif(choice.TRITON_ERROR is not None, reason=str(choice.TRITON_ERROR)),
    pytest.mark.skipif(driver.compiler() is None, reason="needs gcc on Linux"),
    pytest.mark.timeout(300),
]

# The launches of a call with the gradients of all its tensors, by reduction: none, mean, sum. A loss has labels that
# are ignored, class weights where it takes them, and an upstream gradient.
LAUNCHES = {
    "cross_entropy": (2, 3, 2),
    "soft_cross_entropy": (2, 2, 2),
    "vls_cross_entropy": (2, 3, 2),
    "gaussian_kl": (2, 2, 2),
    "sample_soft_labels": (2,),
    "dice": (4,),
    "bins-top": (1,),
}


def rows_of(script: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Return the rows that a script of the recorder prints."""
    driver.build(folder)
    done = subprocess.run(
        [sys.executable, str(Path(driver.__file__).with_name(script)), *arguments],
        env=driver.environment(folder), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return rows_of("launches.py", tmp_path_factory.mktemp("recorder"), *LAUNCHES)


def test_the_driver_gets_what_kernels_declare(launches):
    """Each launch reaches the driver once, with the parameters, the grid and the shared memory of the kernel.

    The kernel that is kept for launches of its kind is the one that Triton finds, and gets the same.
    """
    assert len(launches) > 40
    for launch in launches:
        assert launch["launches"] == 2
        assert launch["same_again"], launch
        assert launch["parameters"] == launch["wanted_parameters"], launch
        assert launch["grid"] == [launch["programs"], 1, 1]
        assert launch["block"] == [launch["threads"], 1, 1]
        assert launch["threads"] == launch["threads_of_kernel"]
        assert launch["shared_bytes"] == launch["wanted_shared_bytes"]


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_launches_of_a_call(launches, name):
    """A call takes no more launches than stated."""
    for reduction, most in zip(OPERATIONS[name].reductions, LAUNCHES[name], strict=True):
        calls = Counter(
            (tuple(launch["shape"]), launch["layout"])
            for launch in launches if (launch["operation"], launch["reduction"]) == (name, reduction)
        )  # fmt: skip
        assert calls
        assert max(calls.values()) <= most, (reduction, calls)


def test_devices_and_streams(tmp_path):
    """A launch is on the device of its tensor and on the current stream. Each device has kernels of its own, and each
    stream a counter of programs. What is kept is found again.
    """
    (got,) = rows_of("devices.py", tmp_path)
    assert got["entered"] == [1, 1], "the device is changed only where it is another one"
    first, second, *again = got["devices"]
    assert first["function"] != second["function"]
    assert again == [first, second]
    assert {row["current_after"] for row in got["devices"]} == {0}
    assert got["searches_on_devices"] == 2, "one for each device"
    assert [row["launched_on"] for row in got["streams"]] == [5, 6, 5, 6]
    first, second, *again = got["streams"]
    assert first["counter"] != second["counter"]
    assert again == [first, second]
    assert got["searches_on_streams"] == 1
