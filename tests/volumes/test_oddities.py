"""Files as people have them: a table of oddities, each with what calseg does with it.

A row writes the files of one case that holds, in the end, always the same voxels (or not, and then it is refused with a
message). The tables: pairs of image and label as training reads them, pairs of probability map and label as evaluation
reads them, and ``dataset.json``.
"""

from __future__ import annotations

import gzip
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel")

from nibabel.orientations import apply_orientation, inv_ornt_aff  # noqa: E402

from calseg.volumes.datasets import find_cases, load_case, read_class_names  # noqa: E402
from calseg.volumes.nifti import DataError  # noqa: E402
from calseg.volumes.probabilities import (  # noqa: E402
    MapCase,
    check_headers,
    explain,
    find_map_cases,
    normalised,
    read_slabs,
    read_soft_labels,
)

SHAPE = (6, 5, 4)
IMAGE = np.arange(120, dtype=np.float32).reshape(SHAPE)
LABEL = (np.arange(120).reshape(SHAPE) * 7 % 11 % 3).astype(np.uint8)
AFFINE = np.array([[1.5, 0, 0, -40], [0, 0.9, 0.1, 12], [0, -0.1, 2, 7], [0, 0, 0, 1.0]])
MAP = np.random.default_rng(0).dirichlet(np.ones(3), SHAPE).astype(np.float32)

File = tuple[np.ndarray, np.ndarray]
"""Voxels and affine."""


def turned(voxels: np.ndarray, axes: str) -> File:
    """The same anatomy stored otherwise: ``axes`` names which axis comes where, a capital one mirrored."""
    order = ["xyz".index(axis.lower()) for axis in axes]
    turn = np.array([[order.index(axis), -1 if "XYZ"[axis] in axes else 1] for axis in range(3)])
    return apply_orientation(voxels, turn), AFFINE @ inv_ornt_aff(turn, voxels.shape[:3])


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE, kind: Any = None, **header: Any) -> None:
    """Write a NIfTI file; ``header`` are fields of it, a ``slope`` and an ``extension`` of so many bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = (kind or nibabel.Nifti1Image)(voxels, affine)
    if "slope" in header:
        image.header.set_slope_inter(header.pop("slope"), 0)
    if "extension" in header:
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"x" * header.pop("extension")))
    for field, value in header.items():
        image.header[field] = value
    nibabel.save(image, path)


def change(path: Path, edit: Callable[[bytearray], Any]) -> None:
    """Edit the unpacked bytes of a file."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    edit(content)
    path.write_bytes(gzip.compress(bytes(content)))


# --------------------------------------------------------------------------------------- image and label


class Pair:
    """The files of a case in the Decathlon's layout, as a row of the table writes them over ordinary ones."""

    def __init__(self, folder: Path) -> None:
        self.image, self.label = folder / "imagesTr" / "a.nii.gz", folder / "labelsTr" / "a.nii.gz"
        save(self.image, IMAGE)
        save(self.label, LABEL)


def no_coordinates(path: Path, voxels: np.ndarray) -> None:
    save(path, voxels)
    change(path, lambda content: struct.pack_into("<2h", content, 252, 0, 0))


def in_parts(path: Path) -> None:
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(b"".join(gzip.compress(part) for part in (content[:9], content[9:400], content[400:])))


PAIRS: dict[str, tuple[Callable[[Pair], Any], str]] = {
    "ordinary files": (lambda pair: None, ""),
    "a header extension of 5000 bytes": (
        lambda pair: (save(pair.image, IMAGE, extension=5000), save(pair.label, LABEL, extension=5000)),
        "",
    ),
    "a header extension in NIfTI-2": (
        lambda pair: (save(pair.image, IMAGE, AFFINE, nibabel.Nifti2Image, extension=9), None),
        "",
    ),
    "an extension that is no extension": (
        lambda pair: (
            save(pair.label, LABEL, extension=5000),
            change(pair.label, lambda content: struct.pack_into("<i", content, 352, 7)),
        ),
        "",
    ),
    "no offset of the voxels in the header": (
        lambda pair: change(pair.label, lambda content: struct.pack_into("<f", content, 108, 0)),
        "",
    ),
    "bytes in the other order": (
        lambda pair: nibabel.save(
            nibabel.Nifti1Image(IMAGE.astype(">f4"), AFFINE, nibabel.Nifti1Header(endianness=">")), pair.image
        ),
        "",
    ),
    "gzip in many parts, as bgzip writes": (lambda pair: in_parts(pair.label), ""),
    "the header alone, voxels in another file": (
        lambda pair: change(pair.label, lambda content: content.__setitem__(slice(344, 348), b"ni1\0")),
        "labelsTr.a.nii.gz: a header alone, whose voxels are in another file",
    ),
    "a negative size": (
        lambda pair: change(pair.label, lambda content: struct.pack_into("<h", content, 44, -5)),
        r"labelsTr.a.nii.gz: shape \(6, -5, 4\)",
    ),
    "an offset that is no number": (
        lambda pair: change(pair.label, lambda content: struct.pack_into("<f", content, 108, float("nan"))),
        "labelsTr.a.nii.gz: not a readable NIfTI file",
    ),
    "an empty file": (lambda pair: pair.label.write_bytes(b""), "labelsTr.a.nii.gz: not a readable NIfTI file"),
    # Orientation.
    "a label stored from the left to the right": (lambda pair: save(pair.label, *turned(LABEL, "Xyz")), ""),
    "a label mirrored along two axes, as DICOM's": (lambda pair: save(pair.label, *turned(LABEL, "XYz")), ""),
    "a label with its axes permuted": (lambda pair: save(pair.label, *turned(LABEL, "zxy")), ""),
    "a label with its axes permuted and mirrored": (lambda pair: save(pair.label, *turned(LABEL, "YzX")), ""),
    "an affine that was rounded": (lambda pair: save(pair.label, LABEL, AFFINE + 4e-4 * np.eye(4)), ""),
    "a label moved by a voxel": (lambda pair: save(pair.label, LABEL, AFFINE + np.eye(4, k=3)), ""),
    "a label without coordinates": (lambda pair: no_coordinates(pair.label, LABEL), ""),
    "a label with the identity for want of coordinates": (lambda pair: save(pair.label, LABEL, np.eye(4)), ""),
    "a label mirrored and on another grid": (
        lambda pair: save(pair.label, LABEL[::-1], turned(LABEL, "Xyz")[1] + 0.3 * np.eye(4, k=3)),
        "labelsTr.a.nii.gz: stored with the axes LAS, where .*imagesTr.a.nii.gz has RAS, and not on the same grid",
    ),
    "a label permuted, of another size": (
        lambda pair: save(pair.label, *turned(LABEL[:, :, 1:], "zxy")),
        "labelsTr.a.nii.gz: stored with the axes SRA, where .*imagesTr.a.nii.gz has RAS, and not on the same grid",
    ),
    # Numbers.
    "whole labels with a scale factor of 1": (lambda pair: save(pair.label, LABEL.astype(np.int16), slope=1), ""),
    "labels in 8 bits scaled to the largest, as SPM writes": (
        lambda pair: save(pair.label, np.rint(LABEL * 127.5).astype(np.uint8), slope=2 / 255),
        "",
    ),
    "labels in steps of a half": (
        lambda pair: save(pair.label, 2 * LABEL, slope=0.5),
        "",
    ),
    "labels in steps of a half that are halves": (
        lambda pair: save(pair.label, LABEL, slope=0.5),
        "labelsTr.a.nii.gz: labels must be whole numbers; found 0.5",
    ),
    "labels in float64 after a scaling in float32": (
        lambda pair: save(pair.label, LABEL * float(np.float32(1 / 3)) * 3),
        "",
    ),
    "labels that were interpolated": (
        lambda pair: save(pair.label, np.where(IMAGE == 7, np.float32(0.4), LABEL)),
        r"labelsTr.a.nii.gz: labels must be whole numbers; found 0.4",
    ),
    "labels that are infinite": (
        lambda pair: save(pair.label, np.where(IMAGE == 7, np.float32(np.inf), LABEL)),
        r"labelsTr.a.nii.gz: labels must be whole numbers; found inf",
    ),
    "labels in 64 bits": (
        lambda pair: nibabel.save(nibabel.Nifti1Image(LABEL.astype(np.uint64), AFFINE, dtype=np.uint64), pair.label),
        "",
    ),
    "an image in 8 bits with a scale factor": (
        lambda pair: save(pair.image, (2 * IMAGE).astype(np.uint8), slope=0.5),
        "",
    ),
    "an image in colours": (
        lambda pair: save(pair.image, np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "imagesTr.a.nii.gz: voxels of type .*; real numbers are wanted",
    ),
    # Axes.
    "a label with a fourth axis": (lambda pair: save(pair.label, LABEL[..., None]), ""),
    "a label with a fifth axis, as ITK's vectors": (lambda pair: save(pair.label, LABEL[..., None, None]), ""),
    "an image with a fifth axis, as ITK's vectors": (lambda pair: save(pair.image, IMAGE[..., None, None]), ""),
    "a label with two values per voxel": (
        lambda pair: save(pair.label, np.stack([LABEL, LABEL], -1)),
        r"labelsTr.a.nii.gz: shape \(6, 5, 4, 2\); a 3-D label map with one class number per voxel is wanted",
    ),
    "an image of two dimensions": (
        lambda pair: save(pair.image, IMAGE[:, :, 0]),
        r"labelsTr.a.nii.gz: label of shape \(6, 5, 4\), but image .*imagesTr.a.nii.gz has \(6, 5, 1\)",
    ),
    "an image without voxels": (
        lambda pair: change(pair.image, lambda content: struct.pack_into("<h", content, 44, 0)),
        r"imagesTr.a.nii.gz: ",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_image_and_label(tmp_path: Path, name: str) -> None:
    write, message = PAIRS[name]
    write(Pair(tmp_path))
    meta = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "one", "2": "two"}}
    entry = {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps({**meta, "training": [entry]}))
    dataset = find_cases(tmp_path)
    if message:
        with pytest.raises(DataError, match=message) as caught:
            load_case(dataset.cases[0], dataset)
        assert len(str(caught.value)) <= 600
        return
    image, label = load_case(dataset.cases[0], dataset)
    assert image.shape == (1, *SHAPE)
    np.testing.assert_array_equal(image[0], IMAGE)
    np.testing.assert_array_equal(label, LABEL)


def test_a_case_of_two_dimensions(tmp_path: Path) -> None:
    """It is one slice."""
    save(tmp_path / "imagesTr" / "a.nii.gz", IMAGE[:, :, 1])
    save(tmp_path / "labelsTr" / "a.nii.gz", LABEL[:, :, 1])
    meta = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "one", "2": "two"}}
    entry = {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps({**meta, "training": [entry]}))
    dataset = find_cases(tmp_path)
    image, label = load_case(dataset.cases[0], dataset)
    np.testing.assert_array_equal(image[0, :, :, 0], IMAGE[:, :, 1])
    np.testing.assert_array_equal(label[:, :, 0], LABEL[:, :, 1])


@pytest.mark.parametrize("axes", ["xyz", "Xyz", "zYx"])
def test_channels_and_soft_labels_are_turned_to_the_first_image(tmp_path: Path, axes: str) -> None:
    save(tmp_path / "imagesTr" / "a_0000.nii.gz", IMAGE)
    save(tmp_path / "imagesTr" / "a_0001.nii.gz", *turned(IMAGE + 1000, axes))
    save(tmp_path / "labelsTr" / "a.nii.gz", LABEL)
    save(tmp_path / "soft" / "a.nii.gz", *turned(MAP, axes))
    meta = {"channel_names": ["T1", "T2"], "labels": {"background": 0, "one": 1, "two": 2}}
    (tmp_path / "dataset.json").write_text(json.dumps(meta))
    dataset = find_cases(tmp_path)
    image, label = load_case(dataset.cases[0], dataset)
    np.testing.assert_array_equal(image, np.stack([IMAGE, IMAGE + 1000]))
    soft = read_soft_labels(tmp_path / "soft" / "a.nii.gz", label, 3, dataset.cases[0].images[0])
    np.testing.assert_allclose(np.moveaxis(soft, 0, -1), MAP, rtol=1e-6)


# ---------------------------------------------------------------------------------- probability maps


class Maps:
    """A probability map and its label, as a row of the table writes them over ordinary ones."""

    def __init__(self, folder: Path) -> None:
        self.map, self.label = folder / "maps" / "a.nii.gz", folder / "labels" / "a.nii.gz"
        save(self.map, MAP)
        save(self.label, LABEL)


MAPS: dict[str, tuple[Callable[[Maps], Any], str]] = {
    "ordinary files": (lambda maps: None, ""),
    "a header extension of 5000 bytes": (
        lambda maps: (save(maps.map, MAP, extension=5000), save(maps.label, LABEL, extension=5000)),
        "",
    ),
    "a map of ITK's vectors": (lambda maps: save(maps.map, MAP[:, :, :, None]), ""),
    "a label with a fourth axis": (lambda maps: save(maps.label, LABEL[..., None]), ""),
    "a label in 8 bits scaled to the largest": (
        lambda maps: save(maps.label, np.rint(LABEL * 127.5).astype(np.uint8), slope=2 / 255),
        "",
    ),
    "a label stored from the left to the right": (lambda maps: save(maps.label, *turned(LABEL, "Xyz")), ""),
    "a label stored from the top down": (lambda maps: save(maps.label, *turned(LABEL, "xyZ")), ""),
    "a label with its axes permuted": (lambda maps: save(maps.label, *turned(LABEL, "zxy")), ""),
    "a label with its axes permuted and mirrored": (lambda maps: save(maps.label, *turned(LABEL, "ZyX")), ""),
    "a label with a fourth axis, permuted": (lambda maps: save(maps.label, *turned(LABEL[..., None], "yZx")), ""),
    "a label mirrored and on another grid": (
        lambda maps: save(maps.label, LABEL[::-1], turned(LABEL, "Xyz")[1] + 0.3 * np.eye(4, k=3)),
        "labels.a.nii.gz: stored with the axes LAS, where .*maps.a.nii.gz has RAS, and not on the same grid",
    ),
    "a map without coordinates": (lambda maps: no_coordinates(maps.map, MAP), ""),
    "a map of two axes and classes": (
        lambda maps: save(maps.map, MAP[:, :, 0]),
        r"maps.a.nii.gz: shape \(6, 5, 3\); probabilities are wanted as 4-D \[x, y, z, classes\]",
    ),
}


@pytest.mark.parametrize("memory", [1, 1 << 29])
@pytest.mark.parametrize("name", MAPS)
def test_map_and_label(tmp_path: Path, name: str, memory: int) -> None:
    write, message = MAPS[name]
    write(Maps(tmp_path))
    cases, _ = find_map_cases(tmp_path / "maps", tmp_path / "labels")
    if message:
        with pytest.raises(DataError, match=message):
            check_headers(cases[0])
        return
    assert check_headers(cases[0])[0] == 3
    slabs = list(read_slabs(cases[0], 3, None, memory))
    assert len(slabs) == (4 if memory == 1 else 1)
    np.testing.assert_array_equal(np.concatenate([slab.probabilities for slab in slabs], 1), MAP.T)
    np.testing.assert_array_equal(np.concatenate([slab.label for slab in slabs]), LABEL.T)


@pytest.mark.parametrize("label", [LABEL[:, :, 0], LABEL[:, :, :1], LABEL[:, :, :1, None]])
@pytest.mark.parametrize("form", ["[x, y, C]", "[x, y, 1, C]", "[x, y, 1, 1, C]", "npz [C, y, x]", "a file per class"])
def test_a_map_of_two_dimensions(tmp_path: Path, form: str, label: np.ndarray) -> None:
    """It is one slice."""
    maps, path = tmp_path / "maps", tmp_path / "maps" / "a.nii.gz"
    save(tmp_path / "labels" / "a.nii.gz", label)
    if form == "npz [C, y, x]":
        maps.mkdir()
        np.savez(maps / "a.npz", probabilities=MAP[:, :, 0].T)
    elif form == "a file per class":
        for number in range(3):
            save(maps / f"a_{number:04d}.nii.gz", MAP[:, :, 0, number])
    else:
        save(path, MAP[:, :, 0].reshape(6, 5, *[1] * form.count("1"), 3))
    (case,), _ = find_map_cases(maps, tmp_path / "labels")
    assert check_headers(case)[0] == 3
    (slab,) = read_slabs(case, 3, None)
    np.testing.assert_array_equal(slab.probabilities, MAP[:, :, :1].T)
    np.testing.assert_array_equal(slab.label, LABEL[:, :, :1].T)
    if form.startswith("["):
        soft = read_soft_labels(path, slab.label.T, 3, tmp_path / "labels" / "a.nii.gz")
        np.testing.assert_allclose(np.moveaxis(soft, 0, -1), MAP[:, :, :1], rtol=1e-6)


@pytest.mark.parametrize("axes", ["xyz", "Xyz", "zxy", "ZyX"])
@pytest.mark.parametrize(("value", "fault"), [(7, "outside the classes 0 to 2: 7; the first is"), (0.5, "found 0.5")])
def test_a_bad_label_is_placed_in_its_file(tmp_path: Path, axes: str, value: float, fault: str) -> None:
    """The position is that in the file as it is stored, whatever is turned and in whatever slab it is read."""
    label = LABEL.astype(np.float32)
    label[4, 1, 2] = value
    stored, affine = turned(label, axes)
    x, y, z = (int(index[0]) for index in np.nonzero(stored == value))
    pair, maps = Pair(tmp_path), Maps(tmp_path)
    save(pair.label, stored, affine)
    save(maps.label, stored, affine)
    meta = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "one", "2": "two"}}
    entry = {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps({**meta, "training": [entry]}))
    dataset, (case,) = find_cases(tmp_path), find_map_cases(maps.map.parent, maps.label.parent)[0]
    for read in (
        lambda: load_case(dataset.cases[0], dataset),
        lambda: list(read_slabs(case, 3, None, 1)),
        lambda: list(read_slabs(case, 3, None)),
    ):
        with pytest.raises(DataError, match=f"{fault} at voxel " + re.escape(f"(x, y, z) = ({x}, {y}, {z})")):
            read()


@pytest.mark.parametrize("names", [["a_0012"], ["a_0000", "a_0001"]])
def test_a_map_without_a_label_says_so(tmp_path: Path, names: list[str]) -> None:
    """Also where its name ends as that of a file per class does."""
    for name in names:
        save(tmp_path / "maps" / f"{name}.nii.gz", MAP)
    save(tmp_path / "labels" / "b.nii.gz", LABEL)
    message = f"maps.{names[0]}.nii.gz: no label map {names[0]}.nii.gz in .*labels, nor a.nii.gz for a file per class"
    with pytest.raises(DataError, match=message):
        find_map_cases(tmp_path / "maps", tmp_path / "labels")


def test_what_was_turned_or_differs_is_noted(tmp_path: Path) -> None:
    maps = Maps(tmp_path)
    case = MapCase("a", (maps.map,), maps.label)
    save(maps.label, *turned(LABEL, "Xyz"))
    assert check_headers(case)[1] == ["a: the label map is turned to the axes RAS of the probability map"]
    for affine in (np.eye(4), AFFINE + np.eye(4, k=3)):
        save(maps.label, LABEL, affine)
        odd = "the affine of the label map differs from that of the probability map; voxels are matched as stored"
        assert check_headers(case)[1] == [f"a: {odd}"]
    files = tuple(tmp_path / "channels" / f"a_{number:04d}.nii.gz" for number in range(2))
    save(files[0], MAP[..., 0])
    save(files[1], *turned(MAP[..., 1], "Xyz"))
    with pytest.raises(DataError, match=r"a_0001.nii.gz: stored with other axes than .*a_0000.nii.gz"):
        check_headers(MapCase("a", files, maps.label))


@pytest.mark.parametrize("classes", [2, 3, 14, 118])
@pytest.mark.parametrize("spread", [0.02, 1.0, 100.0])
@pytest.mark.parametrize("form", ["8 bits", "8 bits, rounded down", "three decimals", "float16"])
def test_probabilities_that_were_rounded(tmp_path: Path, classes: int, spread: float, form: str) -> None:
    """They are taken, whatever the number of classes, and sum to 1 afterwards; soft labels as well."""
    rng = np.random.default_rng(classes)
    p = rng.dirichlet(np.full(classes, spread), SHAPE)
    path, label = tmp_path / "a.nii.gz", rng.integers(0, classes, SHAPE).astype(np.uint8)
    save(tmp_path / "label.nii.gz", label)
    if form.startswith("8 bits"):
        round_ = np.floor if "down" in form else np.rint
        save(path, round_(p * 255).astype(np.uint8), slope=1 / 255)
    elif form == "float16":
        path = tmp_path / "a.npz"
        np.savez(path, probabilities=p.astype(np.float16).T)
    else:
        save(path, np.round(p, 3).astype(np.float32))
    (slab,) = read_slabs(MapCase("a", (path,), tmp_path / "label.nii.gz"), classes, None)
    fixed = normalised(slab)
    assert fixed is not None
    total = fixed.probabilities.sum(0)
    assert np.abs(total - 1).max() <= 1e-3
    assert np.abs(fixed.probabilities - p.T).max() < (0.03 if "down" in form else 0.012)
    if path.suffix != ".npz":
        soft = read_soft_labels(path, label.astype(np.int16), classes)
        np.testing.assert_allclose(soft.sum(0), 1, atol=1e-5)


def test_probabilities_that_are_wrong_are_not_mended(tmp_path: Path) -> None:
    save(tmp_path / "label.nii.gz", np.where(IMAGE == 8, 9, LABEL).astype(np.uint8))
    for voxel, value, message in (
        (7, (0.4, 0.3, 0.2), r"voxel \(x, y, z\) = \(0, 1, 3\) sum to 0.9, the smallest is 0.2"),
        (7, (0.6, 0.41, -0.005), r"\(0, 1, 3\) sum to 1.005, the smallest is -0.005"),
        (8, (5, 5, 5), None),  # a voxel that is ignored
    ):
        p = MAP.copy()
        p[voxel == IMAGE] = value
        save(tmp_path / "a.nii.gz", p)
        case = MapCase("a", (tmp_path / "a.nii.gz",), tmp_path / "label.nii.gz")
        (slab,) = read_slabs(case, 3, 9)
        if message is None:
            assert normalised(slab) is not None
            continue
        assert normalised(slab) is None
        with pytest.raises(DataError, match=message):
            raise explain(ValueError(), slab, case)


# --------------------------------------------------------------------------------------- dataset.json

ENTRY = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
NAMES = ("background", "one", "two")
MSD: dict[str, Any] = {
    "modality": {"0": "MRI"},
    "labels": {"0": "background", "1": "one", "2": "two"},
    "training": [ENTRY],
}
NNUNET: dict[str, Any] = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "one": 1, "two": 2},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}
CHANNELS = {"imagesTr/a.nii.gz": "imagesTr/a_0000.nii.gz"}
"""Files that a row renames before the data set is read."""
LISTS: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "the Decathlon": (MSD, {}, ""),
    "nnU-Net, version 2": (NNUNET, CHANNELS, ""),
    "nnU-Net, version 1, whose list leaves the channels out": (MSD, CHANNELS, ""),
    "entries as lists": ({**MSD, "training": [[ENTRY["image"], ENTRY["label"]]]}, {}, ""),
    "an entry with a list of channels": (
        {**MSD, "training": [{**ENTRY, "image": ["imagesTr/a_0000.nii.gz"]}]},
        CHANNELS,
        "",
    ),
    "names of the Decathlon's channels as nnU-Net gives them": (
        {"channel_names": MSD["modality"], "labels": MSD["labels"], "training": MSD["training"]},
        {},
        "",
    ),
    "channels as a list": ({**MSD, "modality": ["MRI"]}, {}, ""),
    "one channel by its name": ({**MSD, "modality": "MRI"}, {}, ""),
    "labels as a list": ({**MSD, "labels": list(NAMES)}, {}, ""),
    "labels as strings": ({**NNUNET, "labels": {"background": "0", "one": "1", "two": "2"}}, CHANNELS, ""),
    "labels named by numbers": ({**NNUNET, "labels": {"0": 0, "1": 1, "2": 2}}, CHANNELS, ""),
    "an ending without the dot": ({**NNUNET, "file_ending": "nii.gz"}, CHANNELS, ""),
    "one image, not a list": (
        {**NNUNET, "dataset": {"a": {"images": "imagesTr/a_0000.nii.gz", "label": "labelsTr/a.nii.gz"}}},
        CHANNELS,
        "",
    ),
    "regions": (
        {**NNUNET, "labels": {"background": 0, "all": [1, 2], "core": [2]}, "regions_class_order": [1, 2]},
        CHANNELS,
        "region-based labels are not supported",
    ),
    "two classes of one name": ({**NNUNET, "labels": {"a": 0, "b": 1, "c": 1}}, CHANNELS, "gives the number 1 twice"),
    "two numbers of one class": ({**MSD, "labels": {"0": "a", "1": "b", "2": "b"}}, {}, "gives a name twice"),
    "a name that is no text": ({**MSD, "labels": {"0": "a", "1": "b\n"}}, {}, r"the name 'b\\n', which is no text"),
    "labels without names": ({**MSD, "labels": {"0": None, "1": 5}}, {}, "must map numbers to names or names"),
    "labels that are true or false": ({**MSD, "labels": {"a": False, "b": True}}, {}, "must map numbers to names"),
    "neither a list nor a folder of labels": (
        {"channel_names": ["MRI"], "labels": NNUNET["labels"]},
        {"labelsTr/a.nii.gz": "elsewhere.nii.gz", "labelsTr": "other"},
        "lists no cases",
    ),
    "an entry that is a name": ({**MSD, "training": ["a"]}, {}, r'"training" entries must be .* got \'a\''),
    "an entry without a label": ({**MSD, "training": [{"image": "a"}]}, {}, '"training" entries must be'),
    "an entry with numbers": ({**MSD, "training": [{"image": 1, "label": 2}]}, {}, '"training" entries must be'),
    "an entry of nothing": ({**MSD, "training": [None]}, {}, '"training" entries must be'),
    "a case of nothing": ({**NNUNET, "dataset": {"a": None}}, CHANNELS, '"dataset" entries must be'),
    "a path that is too long": ({**MSD, "training": [{**ENTRY, "image": "x" * 5000}]}, {}, "not found"),
    "a path with a null character": ({**MSD, "training": [{**ENTRY, "image": "\0"}]}, {}, "not found"),
}


@pytest.mark.parametrize("name", LISTS)
def test_dataset_json(tmp_path: Path, name: str) -> None:
    content, renamed, message = LISTS[name]
    Pair(tmp_path)
    for old, new in renamed.items():
        (tmp_path / old).rename(tmp_path / new)
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    if message:
        with pytest.raises(DataError, match=message) as caught:
            find_cases(tmp_path)
        assert len(str(caught.value)) <= 600
        return
    dataset = find_cases(tmp_path)
    assert dataset.class_names in (NAMES, ("0", "1", "2"))
    assert dataset.channel_names == ("MRI",)
    assert [case.name for case in dataset.cases] == ["a"]
    image, label = load_case(dataset.cases[0], dataset)
    np.testing.assert_array_equal(image[0], IMAGE)
    np.testing.assert_array_equal(label, LABEL)


def test_class_names_of_regions(tmp_path: Path) -> None:
    """Evaluation then counts the classes; the label that is ignored is known."""
    path = tmp_path / "dataset.json"
    for labels, expected in (
        ({"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, (None, 3)),
        ({"background": 0, "whole": [1, 2]}, (None, None)),
        (NNUNET["labels"], (NAMES, None)),
        ({"background": 0, "one": 1, "ignore": 2}, (("background", "one"), 2)),
    ):
        path.write_text(json.dumps({"labels": labels}))
        assert read_class_names(path) == expected


@pytest.mark.parametrize(
    "text",
    ["", "[" * 100_000, "{", "null", "[]", '"a"', "1e999", "NaN", "{}", '{"training": {}}', '{"labels": 3}', "\xff"],
)
def test_any_nonsense_is_one_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_bytes(text.encode("latin1"))
    for read in (lambda: find_cases(tmp_path), lambda: read_class_names(tmp_path / "dataset.json")):
        with pytest.raises(DataError, match=r"dataset.json: ") as caught:
            read()
        assert len(str(caught.value)) <= 600
