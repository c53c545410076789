"""Tests of soft labels beside labels in MONAI's transforms: they stay aligned, and a shifted map is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("nibabel")

import nibabel
import numpy as np
from monai import transforms as mt
from monai.data import CacheDataset, DataLoader
from monai.data.meta_tensor import MetaTensor

from calseg.integrations.monai import DiceVLSLoss, EnsureSoftLabeld
from calseg.volumes.probabilities import soft_labels_file

KEYS = ("image", "label", "soft_label")
BOTH = KEYS[1:]
SHAPE, CLASSES = (14, 11, 9), 3
# Axes to the left, to the front and downwards, of unequal sizes, as scanners store them.
AFFINE = np.array([[-1.5, 0, 0, 20], [0, 1.0, 0, -30], [0, 0, -2.5, 7], [0, 0, 0, 1]])
ALPHA = 0.2


def lesion() -> np.ndarray:
    """Return a label map that no mirroring or turning leaves as it is."""
    label = np.zeros(SHAPE, np.uint8)
    label[2:8, 3:9, 1:6] = 1
    label[2:5, 3:5, 1:3] = 2
    label[9, 9, 7] = 1
    return label


def one_hot(label: np.ndarray) -> np.ndarray:
    return np.eye(CLASSES, dtype=np.float32)[label].transpose(3, 0, 1, 2)


@pytest.fixture
def case(tmp_path: Path) -> dict[str, Any]:
    """Files of an image, its label map, and one-hot soft labels as ``calseg soft-labels`` writes them."""
    label = lesion()
    image = label + np.random.default_rng(0).random(SHAPE, np.float32)
    files = {key: tmp_path / f"{key}.nii.gz" for key in KEYS}
    for key, voxels in (("image", image), ("label", label)):
        nibabel.save(nibabel.Nifti1Image(voxels, AFFINE), files[key])
    files["soft_label"].write_bytes(soft_labels_file(one_hot(label), files["image"]))
    return files


def loading(*more: Any, **options: Any) -> mt.Compose:
    check = EnsureSoftLabeld("soft_label", **options)
    return mt.Compose(
        [mt.LoadImaged(KEYS), mt.EnsureChannelFirstd(KEYS), mt.Orientationd(KEYS, "RAS", labels=None), check, *more]
    )


def is_aligned(case: dict[str, Any]) -> bool:
    """Return whether one-hot soft labels are those of the label, in every voxel."""
    soft, label = torch.Tensor(case["soft_label"]), torch.Tensor(case["label"])[0].long()
    return bool(torch.allclose(soft, torch.nn.functional.one_hot(label, CLASSES).movedim(-1, 0).float(), atol=1e-6))


def augmentations(keys: tuple[str, ...] = KEYS) -> list[Any]:
    return [
        mt.RandFlipd(keys, 0.5, 0),
        mt.RandFlipd(keys, 0.5, 2),
        mt.RandRotate90d(keys, 0.5, spatial_axes=(0, 1)),
        mt.RandSpatialCropd(keys, (8, 8, 6), random_size=False),
        mt.SpatialPadd(keys, (12, 10, 9), mode="edge"),
    ]


def test_cropped_mirrored_and_turned_soft_labels_are_those_of_the_label(case):
    transform = loading(*augmentations(), alpha=0.0, num_classes=CLASSES).set_random_state(0)
    results = [transform(case) for _ in range(12)]
    assert all(map(is_aligned, results))
    assert all(result["soft_label"].shape == (3, 12, 10, 9) for result in results)
    assert len({float(result["label"].sum()) for result in results}) > 4  # the crops differ


@pytest.mark.parametrize("forgotten", ["flip", "crop"])
def test_a_transform_without_the_key_is_found(case, forgotten):
    """The test above fails where a transform moves the label alone."""
    of_label = {"flip": mt.Flipd("label", 0), "crop": mt.Compose([
        mt.SpatialCropd("label", roi_start=(1, 0, 0), roi_end=(9, 8, 6)),
        mt.SpatialCropd(("image", "soft_label"), roi_start=(0, 0, 0), roi_end=(8, 8, 6)),
    ])}  # fmt: skip
    assert not is_aligned(loading(of_label[forgotten])(case))


def test_interpolated_soft_labels_are_near_the_label(case):
    """Labels take the nearest voxel, soft labels the mean of the eight around. Away from borders both are the same."""
    mode = {"image": "bilinear", "label": "nearest", "soft_label": "bilinear"}
    space = mt.Spacingd(KEYS, (1.0, 1.0, 1.0), mode=tuple(mode.values()))
    turn = mt.RandAffined(
        KEYS,
        prob=1.0,
        rotate_range=(0.3, 0.3, 0.3),
        scale_range=(0.1, 0.1, 0.1),
        mode=tuple(mode.values()),
        padding_mode="border",
    )
    for transform in (loading(space), loading(turn).set_random_state(1), loading(space, turn).set_random_state(2)):
        result = transform(case)
        soft, label = torch.Tensor(result["soft_label"]), torch.Tensor(result["label"])[0].long()
        torch.testing.assert_close(soft.sum(0), torch.ones(soft.shape[1:]))
        largest = soft.max(0)
        sure = largest.values > 0.999
        assert torch.equal(largest.indices[sure], label[sure])
        assert float(sure.float().mean()) > 0.5
        of_label = soft.gather(0, label[None])[0]
        assert float(of_label.min()) > 0.1
        mean = float(of_label[label > 0].mean())
        assert mean > 0.8
        moved = soft.roll(3, 1).gather(0, label[None])[0]
        assert float(moved[label > 0].mean()) < mean - 0.15


def write_soft(case: dict[str, Any], soft: np.ndarray, like: str = "image") -> None:
    case["soft_label"].write_bytes(soft_labels_file(soft.astype(np.float32), case[like]))


def blended() -> np.ndarray:
    """Return soft labels of the form of ``calseg soft-labels``."""
    other = np.random.default_rng(1).dirichlet(np.ones(CLASSES), SHAPE).transpose(3, 0, 1, 2)
    return (1 - ALPHA) * one_hot(lesion()) + ALPHA * other


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("shift", [1, -1, 3])
def test_a_shifted_map_is_found(case, axis, shift):
    write_soft(case, blended())
    result = loading(alpha=ALPHA)(case)
    soft = result["soft_label"]
    assert soft.dtype == torch.float32
    assert torch.equal(soft.affine, result["label"].affine)
    np.testing.assert_allclose(soft.numpy()[:, ::-1, :, ::-1], blended(), atol=4e-5)  # turned to RAS
    write_soft(case, np.roll(blended(), shift, axis))
    with pytest.raises(RuntimeError) as caught:
        loading(alpha=ALPHA)(case)
    message = str(caught.value.__cause__)
    assert message.startswith(f"soft_label ({case['soft_label']}): gives the label of ")
    assert "less than 1 - alpha = 0.8" in message


@pytest.mark.parametrize("fault", ["mirrored", "turned", "of another case", "empty"])
def test_coarse_faults_are_found_without_alpha(case, fault):
    soft = {
        "mirrored": blended()[:, ::-1], "turned": np.rot90(blended(), 2, (1, 2)),
        "of another case": np.roll(blended(), 6, (1, 2)),
        "empty": np.stack([np.ones(SHAPE), np.zeros(SHAPE), np.zeros(SHAPE)]),
    }[fault]  # fmt: skip
    write_soft(case, soft)
    with pytest.raises(RuntimeError) as caught:
        loading()(case)
    assert "gives the foreground of the label a share of" in str(caught.value.__cause__)


def test_a_map_that_lies_elsewhere_is_found(case):
    elsewhere = AFFINE.copy()
    elsewhere[:3, 3] += (0, 1, 0)
    nibabel.save(nibabel.Nifti1Image(lesion(), elsewhere), case["label"])
    with pytest.raises(RuntimeError) as caught:
        loading()(case)
    assert "wanted that of the label" in str(caught.value.__cause__)


def test_a_map_that_says_no_place_is_compared_by_its_numbers(case):
    result = mt.Compose([mt.LoadImaged(BOTH), mt.EnsureChannelFirstd(BOTH)])(case)
    result["soft_label"] = MetaTensor(torch.Tensor(result["soft_label"]))
    assert is_aligned(EnsureSoftLabeld("soft_label", alpha=0.0)(result))
    result["soft_label"] = result["soft_label"].flip(1)
    with pytest.raises(ValueError, match="less than 1 - alpha = 1"):
        EnsureSoftLabeld("soft_label", alpha=0.0)(result)


def test_a_map_with_other_axes_is_turned(case):
    """Maps have the axes of the image. Those of the label may be others."""
    turned = nibabel.load(case["label"]).as_reoriented([[2, 1], [0, -1], [1, 1]])
    nibabel.save(turned, case["label"])
    result = loading(alpha=0.0)(case)
    assert is_aligned(result)
    with pytest.raises(RuntimeError) as caught:
        mt.Compose([mt.LoadImaged(BOTH), mt.EnsureChannelFirstd(BOTH), EnsureSoftLabeld("soft_label")])(case)
    assert "Orientationd belongs before" in str(caught.value.__cause__)


def test_a_cached_data_set_and_the_loss(case):
    data = CacheDataset([case] * 2, loading(*augmentations(), alpha=0.0), progress=False)
    batch = next(iter(DataLoader(data, batch_size=2)))
    logits = torch.zeros(2, 3, 12, 10, 9, requires_grad=True)
    loss = DiceVLSLoss(to_onehot_y=True, softmax=True)
    torch.testing.assert_close(loss(logits, batch["soft_label"]), loss(logits, batch["label"]))
    loss(logits, batch["label"], soft_labels=batch["soft_label"]).backward()
    assert logits.grad.abs().max() > 0


# ---- tensors ----

LABEL = torch.tensor([[[0, 0, 1, 1], [0, 1, 2, 2]]])
SOFT = torch.nn.functional.one_hot(LABEL[0], 3).movedim(-1, 0).float() * 0.7 + 0.1


def checked(soft: Any = SOFT, label: Any = LABEL, **options: Any) -> Any:
    return EnsureSoftLabeld("soft_label", **options)({"label": label, "soft_label": soft})["soft_label"]


def test_rounded_soft_labels_are_divided_by_their_sum():
    steps = (SOFT * 255).round()
    for soft in (steps.to(torch.uint8), (SOFT * 65535).round().to(torch.uint16), SOFT.half(), steps / 254.5):
        made = checked(soft)
        assert made.dtype == torch.float32
        torch.testing.assert_close(made, SOFT, atol=4e-3, rtol=0)
        torch.testing.assert_close(made.sum(0), torch.ones(2, 4))
    assert checked(label=LABEL.float()).shape == SOFT.shape
    assert checked(label=LABEL * 0, soft=torch.stack([torch.ones(2, 4), torch.zeros(2, 4)])).shape == (2, 2, 4)


def test_ignored_voxels_are_not_checked():
    label = LABEL.clone()
    label[0, 0, :2] = 9
    soft = SOFT.clone()
    soft[:, 0, :2] = torch.nan
    made = checked(soft, label, ignore_index=9, alpha=0.2)
    assert torch.count_nonzero(made[:, 0, :2]) == 0
    torch.testing.assert_close(made[:, 1], SOFT[:, 1])
    assert torch.count_nonzero(checked(soft, label * 0 + 9, ignore_index=9)) == 0


def test_cases_without_soft_labels():
    transform = EnsureSoftLabeld("soft_label", allow_missing_keys=True)
    assert transform({"label": LABEL}) == {"label": LABEL}
    with pytest.raises(KeyError, match="soft_label"):
        EnsureSoftLabeld("soft_label")({"label": LABEL})
    with pytest.raises(KeyError, match="truth: not in the case"):
        EnsureSoftLabeld("soft_label", "truth")({"label": LABEL, "soft_label": SOFT})


@pytest.mark.parametrize(
    ("soft", "label", "options", "message"),
    [
        (SOFT[:, :1], LABEL, {}, r"soft_label: got .*, wanted shape \[3, 2, 4\] for a label of shape \[1, 2, 4\]"),
        (SOFT, LABEL[0], {}, "soft_label: got .*for a label of shape"),
        (SOFT, LABEL, {"num_classes": 4}, r"wanted shape \[4, 2, 4\]"),
        (SOFT[:2], LABEL, {}, "got 2 classes, but the label label holds 2"),
        (SOFT, LABEL - 1, {}, "got 3 classes, but the label label holds -1"),
        (SOFT * 2, LABEL, {}, r"soft_label: sums to 2 in \(0, 0\), wanted probabilities"),
        (SOFT * 65535, LABEL, {}, r"soft_label: sums to 6.\d*e\+04 in \(0, 0\)"),
        (SOFT - 0.2, LABEL, {}, "wanted probabilities"),
        (SOFT * torch.nan, LABEL, {}, "sums to nan"),
        (SOFT.tolist(), LABEL, {}, "soft_label: got .*list.*, wanted a tensor with the channels first"),
        (SOFT, None, {}, "label: got None"),
        (SOFT, LABEL, {"alpha": 0.1}, r"label of 8 of 8 voxels less than 1 - alpha = 0.9, at \(0, 0\) 0.8"),
    ],
    ids=str,
)
def test_bad_soft_labels(soft, label, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        checked(soft, label, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha: got 1.5"),
        ({"num_classes": 1}, "num_classes: got 1"),
        ({"ignore_index": 0.5}, "ignore_index: got 0.5"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        EnsureSoftLabeld("soft_label", **options)
