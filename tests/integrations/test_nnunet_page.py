"""Test of docs/nnunet.md: its commands run one after another, with nnU-Net's own programs, on a tiny data set."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nnunetv2")
pytest.importorskip("nibabel")

import short_nnunet

from calseg.simulation import CLASS_NAMES, DemoConfig, make_dataset

PAGE = Path(__file__).parents[2] / "docs" / "nnunet.md"
CASES, TEST_CASES = 7, 2


def commands() -> str:
    """All commands of the page but that which installs."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return "\n".join(block for block in blocks if not block.startswith("pip install"))


def make_raw(folder: Path) -> None:
    """A simulated data set in nnU-Net's raw layout; the last cases are test cases."""
    make_dataset(folder / "msd", DemoConfig(cases=CASES, raters=2, side=16))
    for number, image in enumerate(sorted((folder / "msd" / "imagesTr").glob("*.nii.gz"))):
        part = "Tr" if number < CASES - TEST_CASES else "Ts"
        for kind, name in (("images", image.name.replace(".nii", "_0000.nii")), ("labels", image.name)):
            target = folder / f"{kind}{part}" / name
            target.parent.mkdir(exist_ok=True)
            shutil.copy(folder / "msd" / f"{kind}Tr" / image.name, target)
    shutil.rmtree(folder / "msd")
    content = {
        "channel_names": {"0": "simulated"},
        "labels": {name: number for number, name in enumerate(CLASS_NAMES)},
        "numTraining": CASES - TEST_CASES,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.mark.nnunet
def test_the_page(tmp_path: Path) -> None:
    raw = tmp_path / "nnUNet_raw" / "Dataset001_Demo"
    raw.mkdir(parents=True)
    for name in ("nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
    make_raw(raw)
    script = commands()
    assert script.count("nnUNetv2_train") == 4
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    variables = {
        **os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with short_nnunet.commands(tmp_path / "bin", variables):
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", script],
            cwd=tmp_path, env=variables, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "soft labels of 5 cases, alpha 0.4" in done.stdout
    for trainer in ("nnUNetTrainer", "nnUNetTrainerSoftLabels"):
        report = json.loads((tmp_path / "reports" / trainer / "report.json").read_text())
        assert report["cases"] == TEST_CASES
        assert 0 < report["near"]["ece"]["pooled"]["value"] < 1
    assert done.stdout.count("ECE") > 4  # the tables
