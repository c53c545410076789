"""Files of soft labels: written in 16 bits, read and checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel")

from calseg.volumes.datasets import IGNORE_INDEX  # noqa: E402
from calseg.volumes.nifti import DataError  # noqa: E402
from calseg.volumes.probabilities import read_soft_labels, soft_labels_file  # noqa: E402


def test_soft_labels_on_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    soft = rng.dirichlet(np.ones(4), (5, 6, 7)).astype(np.float32)
    soft = np.moveaxis(soft, -1, 0)
    label = np.zeros((5, 6, 7), np.int16)
    label[0] = IGNORE_INDEX
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(label, affine), tmp_path / "label.nii.gz")
    path = tmp_path / "soft.nii.gz"
    path.write_bytes(soft_labels_file(soft, tmp_path / "label.nii.gz"))
    image = nibabel.load(path)
    assert image.shape == (5, 6, 7, 4)
    assert image.get_data_dtype() == np.uint16
    np.testing.assert_array_equal(image.affine, affine)
    np.testing.assert_allclose(np.moveaxis(image.get_fdata(), -1, 0), soft, atol=0.51 / 65535)
    read = read_soft_labels(path, label, 4)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read[:, 1:].sum(0), 1, atol=1e-6)
    assert not read[:, 0].any()
    np.testing.assert_allclose(read[:, 1:], soft[:, 1:], atol=4 / 65535)

    for voxels, message in (
        (soft[:3], r"soft.nii.gz: soft labels of shape \(5, 6, 7, 3\)"),
        (soft * 0.5, "probabilities that sum to 1"),
        (soft - 0.3, "probabilities that sum to 1"),
        (np.where(soft > 0.5, np.nan, soft), "probabilities that sum to 1"),
    ):
        nibabel.save(nibabel.Nifti1Image(np.moveaxis(voxels, 0, -1).astype(np.float32), affine), path)
        with pytest.raises(DataError, match=message):
            read_soft_labels(path, label, 4)
