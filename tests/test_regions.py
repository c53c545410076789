"""Tests of the voxels near the foreground, and of the regions of calibration errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import LABELS, id_of
from torch import Tensor

import calseg
from calseg import near_foreground

RADII = (0, 1, 1.5, 2, 3, 4.2, 7, 12)
SPACINGS = ((1.0, 2.0, 0.7), (0.8, 0.8, 3.0), (5.0, 1.0, 1.0))


def sparse(*shape: int, seed: int = 0, share: float = 0.004) -> Tensor:
    """Return labels of which few are foreground."""
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share).long()


def by_all_distances(target: Tensor, radius: float, spacing: tuple[float, ...]) -> Tensor:
    """Compare every voxel of an item with every foreground voxel of it."""
    steps = torch.tensor(spacing, dtype=torch.float64)
    near = []
    for item in target:
        places, seeds = (voxels.nonzero() * steps for voxels in (torch.ones_like(item), item))
        distances = (places[:, None] - seeds).square().sum(-1).sqrt()
        near.append((distances <= radius * (1 + 1e-9)).any(1).view(item.shape))
    return torch.stack(near)


@pytest.mark.parametrize("seed", range(4))
def test_distances_in_voxels(seed):
    target = sparse(3, 9, 11, 13, seed=seed)
    assert target.any()
    for radius in RADII:
        assert torch.equal(near_foreground(target, radius), by_all_distances(target, radius, (1, 1, 1)))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_distances_with_spacing(spacing):
    target = sparse(2, 9, 11, 13, seed=5)
    for radius in (1, 2.4, 3, 7):
        got = near_foreground(target, radius, spacing=spacing)
        assert torch.equal(got, by_all_distances(target, radius, spacing))
        assert torch.equal(near_foreground(target[:, None], radius, spacing=spacing), got[:, None])
        assert torch.equal(near_foreground(target, radius, spacing=np.float32(spacing)), got)  # as nibabel gives it
    assert torch.equal(near_foreground(target, 6, spacing=2.0), near_foreground(target, 3))


@pytest.mark.parametrize("shape", [(2, 40), (2, 9, 14), (1, 3, 4, 5, 6), (2, 0, 4), (0, 4)])
def test_any_number_of_axes(shape):
    target = sparse(*shape, share=0.05)
    got = near_foreground(target, 2)
    assert got.shape == shape
    if target.numel():
        assert torch.equal(got, by_all_distances(target, 2, (1,) * (len(shape) - 1)))


def test_a_distance_that_equals_the_radius_is_within_it():
    target = torch.zeros(1, 30, dtype=torch.int64)
    target[0, 0] = 1
    for voxels in range(1, 30):
        assert int(near_foreground(target, voxels).sum()) == voxels + 1
        for spacing in (0.1, 0.3, 0.7, 1 / 3):
            assert int(near_foreground(target, voxels * spacing, spacing=spacing).sum()) == voxels + 1


@pytest.mark.parametrize("dtype", [torch.bool, *LABELS], ids=id_of)
def test_ignored_voxels_are_neither_foreground_nor_near(dtype):
    """A label of 8 bits is never -100, but 156 is one."""
    target = torch.tensor([[0, 0, 0, 3, 0, 0, 0, 0, 100, 0]]).to(dtype)
    assert near_foreground(target, 1).int().tolist() == [[0, 0, 1, 1, 1, 0, 0, 1, 1, 1]]
    if dtype != torch.bool:
        assert near_foreground(target, 1, ignore_index=100).int().tolist() == [[0, 0, 1, 1, 1, 0, 0, 0, 0, 0]]
        assert near_foreground(target, 6, ignore_index=100).int().tolist() == [[1] * 8 + [0, 1]]
    if dtype == torch.uint8:
        assert near_foreground(torch.tensor([[156, 0]], dtype=dtype), 1).all()


def test_bins_of_a_region(backend):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 12, 10, 9, generator=generator)
    target = sparse(2, 12, 10, 9, share=0.01) * torch.randint(1, 3, (2, 12, 10, 9), generator=generator)
    target[:, ::3, 4] = -100
    mask = torch.rand(target.shape, generator=generator) < 0.7
    thick = near_foreground(target, 4, spacing=(2, 1, 3))
    regions: dict[str, tuple[dict[str, Any], Tensor]] = {
        "default": ({"region": "near"}, near_foreground(target)),
        "radius": ({"region": "near", "radius": 1.5}, near_foreground(target, 1.5)),
        "spacing": ({"region": "near", "radius": 4, "spacing": (2, 1, 3)}, thick),
        "foreground": ({"region": "foreground"}, target != 0),
        "all": ({"region": "all"}, torch.ones_like(mask)),
    }  # fmt: skip
    numbers = set()
    for options, inside in regions.values():
        for class_wise in (False, True):
            more = {"class_wise": class_wise, "backend": backend}
            got = calseg.calibration_bins(x, target[:, None], mask=mask[:, None], **options, **more)
            wanted = calseg.calibration_bins(x, target, mask=mask & inside, **more)
            assert all(map(torch.equal, got, wanted))
            error = calseg.calibration_error(x, target, **options, **more)
            assert torch.equal(error, calseg.calibration_error(x, target, mask=inside, **more))
        numbers.add(int(got.num_voxels))
    assert len(numbers) == len(regions)


def test_near_one_class():
    target = sparse(1, 12, 10, 9, share=0.01) * torch.randint(1, 3, (1, 12, 10, 9))
    inside = near_foreground(target == 2, 2)
    assert torch.equal(inside, by_all_distances((target == 2).long(), 2, (1, 1, 1)))
    assert int(inside.sum()) < int(near_foreground(target, 2).sum())


Y = torch.zeros(1, 4, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"target": Y.to(torch.complex64)}, TypeError, "target: got a complex64 tensor.*wanted class indices"),
        ({"target": Y[0, 0]}, ValueError, r"target: .*wanted shape \[N, \*S\] with a spatial axis"),
        ({"radius": -1}, ValueError, "radius: got -1, wanted a number from 0 to 1e\\+09"),
        ({"radius": float("nan")}, ValueError, "radius: got nan"),
        ({"radius": "3"}, TypeError, "radius: got '3'"),
        ({"spacing": True}, TypeError, "spacing: got True"),
        ({"spacing": 0}, ValueError, "spacing: got 0.0, wanted a number above 0"),
        ({"spacing": (1, -1)}, ValueError, "spacing: got -1"),
        ({"spacing": "mm"}, TypeError, "spacing: got 'mm'"),
        ({"spacing": (1, 1, 1)}, ValueError, r"spacing: got \(1, 1, 1\), wanted one for each of 2 spatial axes"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index: got 0.5"),
    ],
)
def test_wrong_arguments(options, error, match):
    with pytest.raises(error, match=match):
        near_foreground(**{"target": Y, **options})


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"region": "border"}, ValueError, "region: got 'border', wanted one of 'near', 'all', 'foreground'"),
        ({"region": "near", "radius": -1}, ValueError, "radius: got -1"),
        ({"spacing": 2.0}, ValueError, "spacing: got 2.0 with region='all', wanted it with 'near' only"),
        ({"region": "near", "preds": torch.zeros(3, 2), "target": torch.zeros(3).long()}, ValueError,
         r"region: got 'near' for labels of shape \[3\], wanted \[N, \*S\]"),
    ],
)  # fmt: skip
def test_wrong_regions(options, error, match):
    with pytest.raises(error, match=match):
        calseg.calibration_bins(**{"preds": torch.zeros(1, 2, 4, 4), "target": Y, **options})
