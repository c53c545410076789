"""Triton's real launcher over a driver that only records: parameters, grids, and how many launches a call takes."""

from __future__ import annotations

import json
import subprocess
import sys
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
    "cross_entropy": (2, 4, 3),
    "soft_cross_entropy": (2, 4, 4),
    "vls_cross_entropy": (2, 6, 5),
    "gaussian_kl": (2, 4, 4),
    "sample_soft_labels": (2,),
    "dice": (4,),
    "bins-top": (1,),
}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("recorder")
    driver.build(folder)
    done = subprocess.run(
        [sys.executable, str(Path(driver.__file__).with_name("launches.py")), *LAUNCHES],
        env=driver.environment(folder), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_driver_gets_what_kernels_declare(launches):
    """Each launch reaches the driver once, with the parameters, the grid and the shared memory of the kernel."""
    assert len(launches) > 30
    for launch in launches:
        assert launch["launches"] == 1
        assert launch["parameters"] == launch["wanted_parameters"], launch
        assert launch["grid"] == [launch["programs"], 1, 1]
        assert launch["block"] == [launch["threads"], 1, 1]
        assert launch["threads"] == launch["threads_of_kernel"]
        assert launch["shared_bytes"] == launch["wanted_shared_bytes"]


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_launches_of_a_call(launches, name):
    """A call takes no more launches than stated."""
    for reduction, most in zip(OPERATIONS[name].reductions, LAUNCHES[name], strict=True):
        kernels = [launch["kernel"] for launch in launches
                   if (launch["operation"], launch["reduction"]) == (name, reduction)]  # fmt: skip
        assert 0 < len(kernels) <= most, (reduction, kernels)
