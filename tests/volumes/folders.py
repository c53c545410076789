"""Small folders of cases in both layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np


def save(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)


def make_msd(folder: Path, count: int = 4, **changes: Any) -> Path:
    """Make a Decathlon folder. Image ``i`` is ``100 * i + x``, the label is 1 where ``x >= 5``, and shapes differ."""
    training = []
    for index in range(count):
        shape = (10 + index, 9, 8)
        ramp = np.broadcast_to(np.arange(shape[0])[:, None, None], shape)
        save(folder / f"imagesTr/case_{index}.nii.gz", (100 * index + ramp).astype(np.float32))
        save(folder / f"labelsTr/case_{index}.nii.gz", (ramp >= 5).astype(np.uint8))
        training.append({"image": f"./imagesTr/case_{index}.nii.gz", "label": f"./labelsTr/case_{index}.nii.gz"})
    write_json(
        folder,
        {
            "name": "toy",
            "modality": {"0": "MRI"},
            "labels": {"0": "background", "1": "organ"},
            "training": training[::-1],
            "test": [],
            **changes,
        },
    )
    return folder


def make_nnunet(folder: Path, labels: dict[str, Any], voxels: np.ndarray, **changes: Any) -> Path:
    for channel in (0, 1):
        save(folder / f"imagesTr/a_{channel:04d}.nii.gz", np.full(voxels.shape, channel + 1, np.int16))
    save(folder / "labelsTr/a.nii.gz", voxels)
    (folder / "labelsTr" / "._a.nii.gz").write_bytes(b"left by another system")
    write_json(
        folder,
        {
            "channel_names": {"0": "T1", "1": "T2"},
            "labels": labels,
            "numTraining": 1,
            "file_ending": ".nii.gz",
            **changes,
        },
    )
    return folder


def write_json(folder: Path, content: Any) -> None:
    (folder / "dataset.json").write_text(json.dumps(content))


def edit_json(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    write_json(folder, {**content, **changes})
