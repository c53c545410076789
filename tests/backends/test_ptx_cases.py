"""A choice of the Triton tests, on kernels as compiled for a GPU: what ``pytest -m ptx`` runs, in about a minute.

They run in a process of their own, because Triton compiles only where it was imported without TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from calseg.backends import choice

pytestmark = [
    pytest.mark.skipif(choice.TRITON_ERROR is not None, reason=str(choice.TRITON_ERROR)),
    pytest.mark.timeout(900),
]

CHOSEN = {
    "test_triton.py": [
        "test_cross_entropy[NCHW-mean]", "test_classes_and_odd_sizes[2]", "test_classes_and_odd_sizes[33]",
        "test_label_types[uint8]", "test_low_precision[hard-2-bfloat16]", "test_layouts[channels_last]",
        "test_extreme_logits[hard]", "test_vls[3-0]", "test_sampled_soft_labels[3]",
        "test_a_label_that_is_no_whole_number_makes_the_loss_nan[bfloat16]", "test_overlap[3-hard_overlap]",
        "test_philox_known_answers", "test_normals[False]", "test_voxels_past_two_to_the_32",
        "test_offsets_past_two_to_the_31[all]", "test_programs_may_end_in_any_order[plain]",
        "test_few_programs_and_many[elbo-0.2]", "test_programs_take_several_tiles[14-1540-contiguous-plain]",
        "test_programs_take_several_tiles[33-1028-contiguous-plain]", "test_overlap[117-hard_overlap]",
    ],
    "test_compiled.py": [
        "test_every_stride[cross_entropy-float32]", "test_every_stride[gaussian_kl-float32]",
        "test_the_mask_of_calibration_may_have_any_stride[16]", "test_a_scalar_upstream_gradient[False-float32]",
        "test_the_error_of_the_hardware[cross_entropy]", "test_a_hint_that_is_too_wide", "test_a_mask_that_is_missing",
        "test_a_fault_in_our_kernels[without barriers]", "test_a_fault_in_our_kernels[without masks]",
    ],
}  # fmt: skip
CASES = [f"{file}::{name}" for file, names in CHOSEN.items() for name in names]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the error of each case, or an empty text."""
    here, report = Path(__file__).parent, tmp_path_factory.mktemp("ptx") / "report.xml"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "ptx", "-p", "no:cacheprovider", f"--junitxml={report}",
         *(str(here / case) for case in CASES)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert report.exists(), done.stdout + done.stderr
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname", "").rpartition(".")[2] + ".py"
        found[f"{file}::{case.get('name')}"] = "\n".join(each.text or each.tag for each in case)
    return found


@pytest.mark.parametrize("case", CASES)
def test_on_ptx(outcomes: dict[str, str], case: str):
    assert case in outcomes, "it did not run"
    assert not outcomes[case], outcomes[case]
