"""Tests of folders of cases: both layouts, reading a case, errors that name the file, and the split."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel")

from folders import edit_json, make_msd, make_nnunet, save, write_json  # noqa: E402

from calseg.volumes.datasets import IGNORE_INDEX, Case, find_cases, load_case, split_cases  # noqa: E402
from calseg.volumes.nifti import DataError  # noqa: E402


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
        ({"labels": {"zero": "background"}}, "must map numbers to names"),
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
            "outside the classes 0 to 1: 2; the first is at voxel",
        ),
        (
            "labelsTr",
            np.full((10, 9, 8), -1, np.int16),
            "outside the classes 0 to 1: -1; the first is at voxel",
        ),
        ("labelsTr", np.full((10, 9, 8), np.nan, np.float32), "labels must be whole numbers; found nan"),
        (
            "labelsTr",
            np.zeros((10, 9, 7), np.uint8),
            r"shape \(10, 9, 7\), but .*has \(10, 9, 8\)",
        ),
        ("labelsTr", np.zeros((10, 9, 8, 2), np.uint8), "a 3-D label map"),
        ("labelsTr", np.zeros((10, 9), np.uint8), r"shape \(10, 9, 1\), but .*has \(10, 9, 8\)"),
        ("imagesTr", np.full((10, 9, 8), np.inf, np.float32), "720 voxels are NaN or infinite"),
        ("imagesTr", np.full((10, 9, 8), 1e300), "720 voxels are NaN or infinite"),
        ("imagesTr", np.zeros((10, 9, 8, 3), np.float32), r"3 channels, but dataset.json names 1 \(MRI\)"),
        ("imagesTr", np.zeros((10, 9, 8, 2, 2), np.float32), "a 3-D volume, or 4-D"),
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


# ------------------------------------------------------------------------------------------ case names


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("../../x", "holds a slash|begins with a dot"),
        ("/tmp/x", "holds a slash"),
        ("a/b", "holds a slash"),
        ("a\\b", "holds a slash, a backslash"),
        ("C:\\x", "backslash"),
        ("", "is empty"),
        (".", "begins with a dot"),
        ("..", "begins with a dot"),
        (".hidden", "begins with a dot"),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        ("\ud800", "is no text"),
        ("x" * 249, "is longer than 248 bytes"),
        ("é" * 125, "is longer than 248 bytes"),
    ],
)
def test_names_that_would_lead_elsewhere_are_refused(tmp_path: Path, name: str, fault: str) -> None:
    make_nnunet(tmp_path, {"background": 0, "a": 1}, np.ones((4, 4, 4), np.uint8))
    entry = {"images": ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz"], "label": "labelsTr/a.nii.gz"}
    edit_json(tmp_path, dataset={"good": entry, name: entry})
    with pytest.raises(
        DataError, match=rf"dataset.json: the case name .* cannot name a file: it .*({fault})"
    ) as caught:
        find_cases(tmp_path)
    assert len(str(caught.value)) < 400
    edit_json(tmp_path, dataset={"x" * 248: entry, "é" * 124: entry, "a b=ü[1]": entry})
    assert [len(case.name) for case in find_cases(tmp_path).cases] == [8, 248, 124]


@pytest.mark.parametrize("file", ["..nii.gz", "...nii.gz", "a\\b.nii.gz", ".nii.gz"])
def test_names_of_files_are_held_to_the_same(tmp_path: Path, file: str) -> None:
    """In the Decathlon's layout a case is named after its label map."""
    make_msd(tmp_path, 1, training=[{"image": "imagesTr/case_0.nii.gz", "label": f"labelsTr/{file}"}])
    (tmp_path / "labelsTr/case_0.nii.gz").rename(tmp_path / "labelsTr" / file)
    with pytest.raises(DataError, match=r"dataset.json: the case name .* cannot name a file"):
        find_cases(tmp_path)


# ------------------------------------------------------------------------------------------------ split


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
