"""A data set of boxes, settings of a tiny run, and functions that the tests of runs share."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from calseg.training.config import TrainConfig

TINY = TrainConfig(iterations=6, batch_size=2, patch_size=(16, 16, 8), val_fraction=0.4, num_samples=2)


def make_boxes(folder: Path) -> Path:
    """Five volumes with a bright box of class 1 or 2; class 3 never occurs."""
    rng = np.random.default_rng(0)
    training_list = []
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir()
    for index in range(5):
        shape = (14 + index, 18, 12)
        label = np.zeros(shape, np.uint8)
        label[3:10, 4:12, 3:9] = 1
        label[3:10, 12:15, 3:9] = 2
        image = (label * 2 + 0.3 * rng.standard_normal(shape)).astype(np.float32) * (index + 1) * 50
        for part, voxels in (("imagesTr", image), ("labelsTr", label)):
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), folder / part / f"box_{index}.nii.gz")
        training_list.append({key: f"./{key}sTr/box_{index}.nii.gz" for key in ("image", "label")})
    labels = {"0": "background", "1": "low", "2": "high", "3": "absent"}
    (folder / "dataset.json").write_text(
        json.dumps({"name": "boxes", "modality": {"0": "MRI"}, "labels": labels, "training": training_list})
    )
    return folder


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**TINY.__dict__, **changes})


def stop_after(iteration: int, number: int = signal.SIGINT) -> Any:
    def progress(stage: str, done: int, total: int, loss: float | None) -> None:
        if stage == "train" and done == iteration:
            os.kill(os.getpid(), number)

    return progress


def assert_same(left: Any, right: Any) -> None:
    """Check that two structures are equal, with the same bits in tensors."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            if key != "seconds":
                assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right
