"""Tests of patches, which are functions of seed and iteration, and of the cache of cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel")

from folders import make_msd  # noqa: E402

from calseg.volumes.datasets import IGNORE_INDEX, Dataset, find_cases  # noqa: E402
from calseg.volumes.patches import CaseCache, LoadedCase, PatchSampler, normalise  # noqa: E402


def test_normalise() -> None:
    rng = np.random.default_rng(0)
    image = np.stack([rng.normal(500, 20, (6, 7, 8)), np.full((6, 7, 8), 1e6 + 0.1)]).astype(np.float32)
    result = normalise(image)
    assert result.dtype == np.float32
    assert result[0].mean(dtype=np.float64) == pytest.approx(0, abs=1e-6)
    assert result[0].std(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(result[1], 0)
    np.testing.assert_allclose(normalise(image * 20), result, atol=1e-5)  # a case 20 times brighter
    assert np.isfinite(normalise(np.array([-3e38, 0, 3e38], np.float32).reshape(1, 3, 1, 1))).all()


def ramp_case(shape: tuple[int, int, int], label: np.ndarray | None = None) -> LoadedCase:
    """Return a case whose channel 0 holds the flat index of every voxel, which shows the place of a patch."""
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape)
    label = np.zeros(shape, np.int16) if label is None else label
    return LoadedCase("ramp", image, label, np.flatnonzero(label > 0), np.flatnonzero(label != IGNORE_INDEX))


class FixedCache(CaseCache):
    def __init__(self, *cases: LoadedCase) -> None:
        super().__init__(Dataset("", Path(), "msd", ("b", "a"), ("c",), ()))
        self._kept.update({f"case_{index}": case for index, case in enumerate(cases)})


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable random intensities."""
    monkeypatch.setattr("calseg.volumes.patches._vary", lambda image, rng: image)


@pytest.mark.usefixtures("plain")
def test_patches_are_crops_with_ignored_padding() -> None:
    shape = (10, 30, 8)
    cache = FixedCache(ramp_case(shape))
    starts = set()
    sampler = PatchSampler(("case_0",), (16, 16, 8), 2, seed=3, foreground=0)
    for iteration in range(20):
        images, labels, _ = sampler.batch(cache, iteration)
        assert images.dtype == np.float32
        assert labels.dtype == np.int16
        assert images.shape == (2, 1, 16, 16, 8)
        assert labels.shape == (2, 16, 16, 8)
        for image, label in zip(images[:, 0], labels, strict=True):
            inside = label != IGNORE_INDEX
            assert inside.sum() == 10 * 16 * 8
            np.testing.assert_array_equal(image[~inside], 0)
            at = int(np.argmax(inside[:, 0, 0]))
            assert 0 <= at <= 6
            first = int(image[at, 0, 0]) // 8
            expected = np.arange(np.prod(shape)).reshape(shape)[:, first : first + 16]
            np.testing.assert_array_equal(image[at : at + 10], expected)
            starts.add((at, first))
    assert len({at for at, _ in starts}) > 3
    assert len({first for _, first in starts}) > 5


def test_patches_are_a_function_of_seed_and_iteration() -> None:
    cache = FixedCache(*(ramp_case((12, 12, 12)) for _ in range(3)))
    names = ("case_0", "case_1", "case_2")
    sampler = PatchSampler(names, (8, 8, 8), 2, seed=0, flip_axes=(0, 2))
    forward = [sampler.batch(cache, iteration) for iteration in range(4)]
    for iteration in reversed(range(4)):
        image, label, _ = PatchSampler(names, (8, 8, 8), 2, seed=0, flip_axes=(0, 2)).batch(cache, iteration)
        np.testing.assert_array_equal(image, forward[iteration][0])
        np.testing.assert_array_equal(label, forward[iteration][1])
    assert not np.array_equal(forward[0][0], forward[1][0])
    other = PatchSampler(names, (8, 8, 8), 2, seed=1, flip_axes=(0, 2)).batch(cache, 0)
    assert not np.array_equal(other[0], forward[0][0])


@pytest.mark.usefixtures("plain")
def test_every_case_once_per_epoch() -> None:
    cache = FixedCache(*(ramp_case((8, 8, 8), np.full((8, 8, 8), index, np.int16)) for index in range(5)))
    sampler = PatchSampler(tuple(f"case_{index}" for index in range(5)), (8, 8, 8), 5, seed=0)
    orders = [tuple(sampler.batch(cache, epoch)[1][:, 0, 0, 0]) for epoch in range(6)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len(set(orders)) > 3


@pytest.mark.usefixtures("plain")
def test_foreground_share_and_labelled_voxels() -> None:
    label = np.zeros((64, 8, 8), np.int16)
    label[60, 4, 4] = 1
    cache = FixedCache(ramp_case(label.shape, label))
    always = PatchSampler(("case_0",), (8, 8, 8), 1, seed=0, foreground=1)
    assert all((always.batch(cache, i)[1] == 1).any() for i in range(10))
    never = PatchSampler(("case_0",), (8, 8, 8), 1, seed=0, foreground=0)
    assert not all((never.batch(cache, i)[1] == 1).any() for i in range(10))
    sparse = np.full((64, 8, 8), IGNORE_INDEX, np.int16)
    sparse[3, 3, 3] = 0
    cache = FixedCache(ramp_case(sparse.shape, sparse))
    assert all((never.batch(cache, i)[1] == 0).sum() == 1 for i in range(10))


@pytest.mark.usefixtures("plain")
def test_flips_move_image_and_label_together() -> None:
    label = (np.arange(8)[:, None, None] + np.zeros((8, 8, 8))).astype(np.int16)
    cache = FixedCache(ramp_case((8, 8, 8), label))
    sampler = PatchSampler(("case_0",), (8, 8, 8), 1, seed=0, flip_axes=(0,))
    first = []
    for iteration in range(12):
        image, flipped, _ = sampler.batch(cache, iteration)
        np.testing.assert_array_equal(image[0, 0] // 64, flipped[0])
        first.append(int(flipped[0, 0, 0, 0]))
    assert set(first) == {0, 7}


def test_intensity_changes_leave_the_padding_alone() -> None:
    cache = FixedCache(ramp_case((4, 8, 8)))
    image, label, _ = PatchSampler(("case_0",), (8, 8, 8), 1, seed=0).batch(cache, 0)
    np.testing.assert_array_equal(image[:, 0][label == IGNORE_INDEX], 0)
    inside = image[:, 0][label != IGNORE_INDEX]
    original = np.arange(256, dtype=np.float32)
    assert not np.array_equal(inside, original)
    slope, offset = np.polyfit(original, inside, 1)
    assert 0.9 <= slope <= 1.1
    assert abs(offset) < 0.2


def test_cache_keeps_within_its_bytes(tmp_path: Path) -> None:
    dataset = find_cases(make_msd(tmp_path))
    cache = CaseCache(dataset, max_bytes=12_000)  # a case takes 720 to 936 voxels of 6 bytes
    first = cache.get("case_0")
    assert cache.get("case_0") is first
    cache.get("case_1")
    cache.get("case_2")
    assert list(cache._kept) == ["case_1", "case_2"]
    again = cache.get("case_0")
    assert again is not first
    np.testing.assert_array_equal(again.image, first.image)
    assert first.image.std() == pytest.approx(1, abs=1e-6)
