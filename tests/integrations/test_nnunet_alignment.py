"""Tests that soft labels lie where the label lies: through nnU-Net's preprocessing, patches and augmentation.

One-hot maps of the labels serve as soft labels. So the label that nnU-Net makes says what they must be.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("nnunetv2")

import nnunet_data as data
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform

from calseg.integrations.nnunet.config import SoftLabelConfig
from calseg.integrations.nnunet.data import BlendSoftLabels
from calseg.integrations.nnunet.soft_labels import make_soft_labels
from calseg.integrations.nnunet.store import STEPS, opened
from calseg.integrations.nnunet.trainers import nnUNetTrainerSoftLabels

pytestmark = pytest.mark.usefixtures("nnunet_folders")
CONFIGURATIONS = ("3d_fullres", "flat", "2d")
TRANSPOSES = ((0, 1, 2), (2, 0, 1), (1, 2, 0))
Levels = tuple[list[Tensor], list[Tensor]]
RESAMPLED = (2.0, 1.3, 0.9)


def write_maps(root: Path, transpose: tuple[int, int, int], shift: int = 0) -> Path:
    """One-hot maps of all labels, moved by ``shift`` voxels along the last axis."""
    folder = root / f"maps{shift}"
    folder.mkdir()
    for number, name in enumerate(data.CASES):
        label = np.roll(data.make_case(number, False)[1], shift, -1)
        data.save(data.onehot(label), folder / f"{name}.nii.gz", transpose)
    return folder


def transforms_of(transform: BasicTransform) -> Iterator[Any]:
    """All transforms that a transform is composed of."""
    yield transform
    for part in getattr(transform, "transforms", []):
        yield from transforms_of(part)


def batches(
    folder: Path, configuration: str, *, rotate: bool, count: int = 4
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Labels and soft labels of training batches, for every level of deep supervision."""
    trainer = data.make_trainer(nnUNetTrainerSoftLabels, folder, configuration)
    trainer.initialize()
    loader = trainer.get_dataloaders()[0]
    used = list(transforms_of(loader.data_loader.transforms))
    assert any(isinstance(transform, MirrorTransform) for transform in used)
    for transform in used:
        if isinstance(transform, SpatialTransform):
            transform.p_rotation = transform.p_scaling = float(rotate)
    result = []
    for _ in range(count):
        target = next(loader)["target"]
        result.append((target[: len(target) // 2], target[len(target) // 2 :]))
    return result


def shares(soft: Tensor) -> Tensor:
    return soft.double() / 65535


def mismatch(label: Tensor, soft: Tensor) -> float:
    """The fraction of the voxels whose largest share is another class than the label, ties left out."""
    top = shares(soft).topk(2, 1).values
    clear = top[:, 0] - top[:, 1] > 0.02  # nnU-Net compares the shares of two classes in float16
    assert clear.double().mean() > 0.8
    return float((soft.int().argmax(1) != label[:, 0])[clear].double().mean())


@pytest.mark.parametrize("transpose", TRANSPOSES, ids=str)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_mirroring_and_cropping_keep_every_voxel(
    tmp_path: Path, configuration: str, transpose: tuple[int, int, int]
) -> None:
    """Exactly, in every batch, with anisotropic voxels and with the axes in another order."""
    folder = data.make_dataset(tmp_path, transpose=transpose)
    make_soft_labels("1", configuration, SoftLabelConfig(), maps=write_maps(tmp_path, transpose))
    for labels, soft in batches(folder, configuration, rotate=False):
        assert labels[0].dtype == torch.int16
        assert labels[0].any()
        onehot = data_onehot(labels[0])
        assert torch.equal(shares(soft[0]), onehot)
        for level in soft[1:]:
            torch.testing.assert_close(shares(level), means(onehot, level.shape[2:]), rtol=0, atol=1e-5)


def means(values: Tensor, size: torch.Size) -> Tensor:
    """Means over the voxels of a lower resolution, each of which has a whole number of voxels along each axis."""
    for axis, count in enumerate(size, start=2):
        values = values.unflatten(axis, (count, -1)).mean(axis + 1)
    return values


def data_onehot(label: Tensor) -> Tensor:
    classes = torch.arange(len(data.LABELS)).view(-1, *(1,) * (label.dim() - 2))
    return (label == classes).double()


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_rotation_and_scaling_interpolate_as_those_of_the_label(tmp_path: Path, configuration: str) -> None:
    folder = data.make_dataset(tmp_path, transpose=(2, 0, 1))
    make_soft_labels("1", configuration, SoftLabelConfig(), maps=write_maps(tmp_path, (2, 0, 1)))
    fractions = []
    for labels, soft in batches(folder, configuration, rotate=True, count=8):
        assert mismatch(labels[0], soft[0]) == 0
        torch.testing.assert_close(shares(soft[0]).sum(1), torch.ones_like(labels[0][:, 0]).double(), rtol=0, atol=1e-4)
        fractions.append(float((shares(soft[0]).amax(1) < 0.99).double().mean()))
    assert max(fractions) > 0.02  # something was interpolated


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_shift_is_found(tmp_path: Path, configuration: str, rotate: bool) -> None:
    """The tests above see maps that are one voxel off."""
    folder = data.make_dataset(tmp_path)
    make_soft_labels("1", configuration, SoftLabelConfig(), maps=write_maps(tmp_path, (0, 1, 2), shift=1))
    assert max(mismatch(labels[0], soft[0]) for labels, soft in batches(folder, configuration, rotate=rotate)) > 0.005


@pytest.mark.parametrize("transpose", TRANSPOSES, ids=str)
@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_resampling_interpolates_as_that_of_the_label(
    tmp_path: Path, configuration: str, transpose: tuple[int, int, int]
) -> None:
    folder = data.make_dataset(tmp_path, transpose=transpose, spacing=RESAMPLED)
    make_soft_labels("1", configuration, SoftLabelConfig(), maps=write_maps(tmp_path, transpose))
    for name in data.CASES:
        soft = opened(folder / f"calseg_soft_labels_nnUNetPlans_{configuration}" / f"{name}.b2nd")[:]
        label = opened(folder / f"nnUNetPlans_{configuration}" / f"{name}_seg.b2nd")[0]
        assert soft.shape == (3, *label.shape)
        assert soft.dtype == np.int16
        clear = soft.max(0) > 0.51 * STEPS
        assert clear.mean() > 0.9
        assert (soft.argmax(0) == label.clip(0))[clear].all()
        assert np.abs(soft.astype(int).sum(0) - STEPS).max() <= 3  # half a step of rounding for every class
        assert (soft.max(0) < 0.99 * STEPS).mean() > 0.01


def test_blended_labels() -> None:
    """Shares of the label and of the estimate; what the estimate lacks is the label's; ignored voxels have none."""
    label = torch.tensor([[0, 1, 1, 2]], dtype=torch.int16)
    estimate = torch.tensor([[0.9, 0.2, 0.0, 0.4], [0.1, 0.3, 0.0, 0.6]])
    soft = BlendSoftLabels(0.5).blended(label, estimate)
    torch.testing.assert_close(soft, torch.tensor([[0.95, 0.1, 0.0, 0.0], [0.05, 0.9, 1.0, 0.0]]))
    assert torch.equal(BlendSoftLabels(0.0).blended(label, estimate)[:, :3], torch.eye(2)[label[0, :3].long()].T)


@pytest.mark.parametrize("shape", [(8, 12), (4, 8, 12)], ids=str)
def test_lower_levels_are_means_over_the_voxels_that_have_a_label(shape: tuple[int, ...]) -> None:
    """Their labels are nnU-Net's. Where none of the voxels has a label, soft labels are 0."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 4, (1, *shape), generator=generator).to(torch.int16)  # 3: no class, as an ignored voxel
    label[..., :4] = 3
    scales = [[1.0, 1.0], [0.5, 0.5], [0.5, 0.25]] if len(shape) == 2 else [[1.0] * 3, [0.5] * 3, [0.5, 0.25, 0.5]]
    labels = DownsampleSegForDSTransform(scales)(segmentation=label)["segmentation"]
    estimate = torch.rand(3, *shape, generator=generator).softmax(0)
    result = BlendSoftLabels(0.4).apply({"segmentation": list(labels), "regression_target": estimate})["segmentation"]
    assert [mine is theirs for mine, theirs in zip(result[:3], labels, strict=True)] == [True] * 3
    assert [level.dtype for level in result[3:]] == [torch.uint16] * 3
    kept = label[0] != 3
    blended = (0.4 * estimate + 0.6 * torch.eye(4)[label[0].long()].movedim(-1, 0)[:3]).double() * kept
    for level in result[3:]:
        total = means(kept[None, None].double(), level.shape[1:])[0]
        wanted = torch.where(total > 0, means(blended[None], level.shape[1:])[0] / total, 0.0)
        torch.testing.assert_close(shares(level), wanted, rtol=0, atol=1e-5)
        assert not level[..., 0].any()
        torch.testing.assert_close(shares(level).sum(0), (total[0] > 0).double(), rtol=0, atol=3e-5)
