"""Reading cases, the errors that name a file, the split and the patches."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel")

from calseg.data import (  # noqa: E402
    IGNORE_INDEX,
    Case,
    CaseCache,
    DataError,
    Dataset,
    LoadedCase,
    PatchSampler,
    find_cases,
    load_case,
    normalise,
    split_cases,
)


def save(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)


def make_msd(folder: Path, count: int = 4, **changes: Any) -> Path:
    """A Decathlon folder: image ``i`` is ``100 * i + x``, label 1 where ``x >= 5``, shapes differ."""
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


def load_first(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    dataset = find_cases(folder)
    return load_case(dataset.cases[0], dataset)


def test_decathlon(tmp_path: Path) -> None:
    dataset = find_cases(make_msd(tmp_path))
    assert dataset.layout == "msd"
    assert dataset.name == "toy"
    assert dataset.class_names == ("background", "organ")
    assert dataset.channel_names == ("MRI",)
    assert [case.name for case in dataset.cases] == ["case_0", "case_1", "case_2", "case_3"]
    image, label = load_case(dataset.cases[2], dataset)
    assert image.dtype == np.float32
    assert image.shape == (1, 12, 9, 8)
    np.testing.assert_array_equal(image[0, :, 3, 4], 200 + np.arange(12))
    assert label.dtype == np.int16
    np.testing.assert_array_equal(label[:, 0, 0], [0] * 5 + [1] * 7)


def test_decathlon_channels_are_the_last_axis(tmp_path: Path) -> None:
    make_msd(tmp_path, 1, modality={"1": "T2", "0": "T1"})
    voxels = np.arange(10 * 9 * 8 * 2, dtype=np.int16).reshape(10, 9, 8, 2)
    save(tmp_path / "imagesTr/case_0.nii.gz", voxels)
    assert find_cases(tmp_path).channel_names == ("T1", "T2")
    image, _ = load_first(tmp_path)
    np.testing.assert_array_equal(image, np.moveaxis(voxels, -1, 0))


def test_nnunet_with_ignore(tmp_path: Path) -> None:
    voxels = np.arange(6 * 5 * 4, dtype=np.uint8).reshape(6, 5, 4) % 4
    folder = make_nnunet(tmp_path, {"background": 0, "edema": 1, "core": 2, "ignore": 3}, voxels)
    dataset = find_cases(folder)
    assert dataset.layout == "nnunet"
    assert dataset.class_names == ("background", "edema", "core")
    assert dataset.ignore_label == 3
    assert dataset.cases == (
        Case(
            "a",
            (folder / "imagesTr/a_0000.nii.gz", folder / "imagesTr/a_0001.nii.gz"),
            folder / "labelsTr/a.nii.gz",
        ),
    )
    image, label = load_case(dataset.cases[0], dataset)
    np.testing.assert_array_equal(image[:, 0, 0, 0], [1, 2])
    np.testing.assert_array_equal(label, np.where(voxels == 3, IGNORE_INDEX, voxels.astype(np.int16)))


def test_nnunet_dataset_entry_lists_the_files(tmp_path: Path) -> None:
    make_nnunet(tmp_path, {"background": 0, "a": 1}, np.ones((4, 4, 4), np.uint8))
    listed = {"b": {"images": ["imagesTr/a_0001.nii.gz", "imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"}}
    edit_json(tmp_path, dataset=listed)
    image, _ = load_first(tmp_path)
    np.testing.assert_array_equal(image[:, 0, 0, 0], [2, 1])


def test_scaled_uncompressed_nifti2(tmp_path: Path) -> None:
    make_msd(tmp_path, 1)
    nifti = nibabel.Nifti2Image(np.arange(720, dtype=np.int16).reshape(10, 9, 8), np.eye(4))
    nifti.header.set_slope_inter(0.5, 3)
    nibabel.save(nifti, tmp_path / "imagesTr/case_0.nii")
    edit_json(tmp_path, training=[{"image": "imagesTr/case_0.nii", "label": "labelsTr/case_0.nii.gz"}])
    image, _ = load_first(tmp_path)
    np.testing.assert_array_equal(image.ravel(), np.arange(720) * 0.5 + 3)


def test_float_labels_are_cast_when_whole(tmp_path: Path) -> None:
    make_msd(tmp_path, 1)
    whole = np.zeros((10, 9, 8), np.float32)
    whole[4:] = 1
    save(tmp_path / "labelsTr/case_0.nii.gz", whole)
    _, label = load_first(tmp_path)
    np.testing.assert_array_equal(label, whole)
    whole[0, 0, 0] = 0.25
    save(tmp_path / "labelsTr/case_0.nii.gz", whole)
    with pytest.raises(DataError, match=r"labelsTr/case_0.nii.gz: labels must be whole numbers; found 0.25"):
        load_first(tmp_path)


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"0": "background", "2": "organ"}}, r"must number the classes 0, 1, 2.*\[0, 2\]"),
        ({"labels": {"background": 0, "organ": [1, 2]}}, "region-based labels"),
        ({"labels": {"background": 0, "other": 0}}, "the number 0 twice"),
        ({"labels": {"0": "background"}}, "at least two classes"),
        ({"labels": {"zero": "background"}}, "holds no whole number"),
        ({"labels": []}, "must map numbers to names"),
        ({"modality": None}, "must name the channels"),
        ({"modality": {"first": "MRI"}}, "channels must be numbered"),
        ({"training": []}, "lists no training case"),
        ({"training": ["imagesTr/case_0.nii.gz"]}, "entries must be"),
        (
            {"training": [{"image": "imagesTr/case_0.nii.gz", "label": "labelsTr/case_0.nii.gz"}] * 2},
            "more than once",
        ),
    ],
)
def test_dataset_json_errors_name_the_file(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_msd(tmp_path, 1, **changes)
    with pytest.raises(DataError, match=rf"dataset.json: .*{message}"):
        find_cases(tmp_path)


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        find_cases(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"dataset.json: not found"):
        find_cases(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset.json: not readable as JSON"):
        find_cases(tmp_path)
    write_json(tmp_path, [])
    with pytest.raises(DataError, match=r"dataset.json: a JSON object is wanted"):
        find_cases(tmp_path)
    make_msd(tmp_path)
    (tmp_path / "labelsTr/case_1.nii.gz").unlink()
    with pytest.raises(DataError, match=r"labelsTr/case_1.nii.gz: not found"):
        find_cases(tmp_path)


def test_nnunet_counts_and_endings(tmp_path: Path) -> None:
    make_nnunet(tmp_path, {"background": 0, "a": 1}, np.ones((4, 4, 4), np.uint8), numTraining=7)
    with pytest.raises(DataError, match=r'"numTraining" is 7, but .*labelsTr holds 1'):
        find_cases(tmp_path)
    (tmp_path / "labelsTr/a.png").touch()
    for channel in (0, 1):
        (tmp_path / f"imagesTr/a_{channel:04d}.png").touch()
    edit_json(tmp_path, numTraining=1, file_ending=".png")
    with pytest.raises(DataError, match=r"a_0000.png: only NIfTI"):
        find_cases(tmp_path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flipped(path: Path) -> None:
    data = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), 0))  # only the checksum tells
    data[500] ^= 1
    path.write_bytes(bytes(data))


def not_gzip(path: Path) -> None:
    path.write_bytes(b"not a volume")


def not_nifti(path: Path) -> None:
    path.write_bytes(gzip.compress(b"x" * 400))


def short_inside(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-20]))


@pytest.mark.parametrize("damage", [truncated, flipped, not_gzip, not_nifti, short_inside])
@pytest.mark.parametrize("part", ["imagesTr", "labelsTr"])
def test_corrupt_files_are_named(tmp_path: Path, damage: Any, part: str) -> None:
    make_msd(tmp_path, 1)
    damage(tmp_path / part / "case_0.nii.gz")
    with pytest.raises(DataError, match=rf"{part}/case_0.nii.gz: (cannot be read|not a readable NIfTI)"):
        load_first(tmp_path)


@pytest.mark.parametrize(
    ("part", "voxels", "message"),
    [
        (
            "labelsTr",
            np.full((10, 9, 8), 2, np.uint8),
            "outside the classes 0 to 1 of dataset.json: 2",
        ),
        (
            "labelsTr",
            np.full((10, 9, 8), -1, np.int16),
            "outside the classes 0 to 1 of dataset.json: -1",
        ),
        ("labelsTr", np.full((10, 9, 8), np.nan, np.float32), "labels must be whole numbers; found nan"),
        (
            "labelsTr",
            np.zeros((10, 9, 7), np.uint8),
            r"shape \(10, 9, 7\), but .*has \(10, 9, 8\)",
        ),
        ("labelsTr", np.zeros((10, 9, 8, 2), np.uint8), "a 3-D label map"),
        ("labelsTr", np.zeros((10, 9), np.uint8), "a 3-D label map"),
        ("imagesTr", np.full((10, 9, 8), np.inf, np.float32), "720 voxels are NaN or infinite"),
        ("imagesTr", np.full((10, 9, 8), 1e300), "720 voxels are NaN or infinite"),
        ("imagesTr", np.zeros((10, 9, 8, 3), np.float32), r"3 channels, but dataset.json names 1 \(MRI\)"),
        ("imagesTr", np.zeros((10, 9), np.float32), "a 3-D volume, or 4-D"),
        ("imagesTr", np.zeros((10, 9, 8), np.complex64), "real numbers are wanted"),
    ],
)
def test_wrong_volumes_are_named(tmp_path: Path, part: str, voxels: np.ndarray, message: str) -> None:
    make_msd(tmp_path, 1)
    save(tmp_path / part / "case_0.nii.gz", voxels)
    with pytest.raises(DataError, match=rf"{part}/case_0.nii.gz: .*{message}"):
        load_first(tmp_path)


def test_channels_of_different_shapes(tmp_path: Path) -> None:
    make_nnunet(tmp_path, {"background": 0, "a": 1}, np.ones((4, 4, 4), np.uint8))
    save(tmp_path / "imagesTr/a_0001.nii.gz", np.ones((4, 4, 5), np.int16))
    with pytest.raises(DataError, match=r"a_0001.nii.gz: shape \(4, 4, 5\) differs from \(4, 4, 4\)"):
        load_first(tmp_path)


def test_fully_ignored_label_map(tmp_path: Path) -> None:
    make_nnunet(tmp_path, {"background": 0, "a": 1, "ignore": 2}, np.full((4, 4, 4), 2, np.uint8))
    with pytest.raises(DataError, match=r"labelsTr/a.nii.gz: every voxel is marked as ignored"):
        load_first(tmp_path)


# ------------------------------------------------------------------------------------ normalise, split


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


def test_split_depends_on_names_and_seed_only() -> None:
    names = [f"case_{index}" for index in range(20)]
    training, validation = split_cases(names, 0.2, seed=0)
    assert len(validation) == 4
    assert sorted(training + validation) == sorted(names)
    assert split_cases(names[::-1], 0.2, seed=0) == (training, validation)
    assert split_cases(names, 0.2, seed=1)[1] != validation
    assert validation == ["case_1", "case_10", "case_11", "case_5"]  # the same on every machine
    assert [len(part) for part in split_cases(["a", "b"], 0.01)] == [1, 1]
    with pytest.raises(DataError, match="at least two cases"):
        split_cases(["a"], 0.5)


# --------------------------------------------------------------------------------------------- patches


def ramp_case(shape: tuple[int, int, int], label: np.ndarray | None = None) -> LoadedCase:
    """Channel 0 holds every voxel's flat index, so that a patch tells where it was taken."""
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape)
    label = np.zeros(shape, np.int16) if label is None else label
    return LoadedCase("ramp", image, label, np.flatnonzero(label > 0), np.flatnonzero(label != IGNORE_INDEX))


class FixedCache(CaseCache):
    def __init__(self, *cases: LoadedCase) -> None:
        super().__init__(Dataset("", Path(), "msd", ("b", "a"), ("c",), ()))
        self._kept.update({f"case_{index}": case for index, case in enumerate(cases)})


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No random intensities."""
    monkeypatch.setattr("calseg.data._vary", lambda image, rng: image)


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
