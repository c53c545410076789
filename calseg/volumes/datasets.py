"""Folders of segmentation cases: reading ``dataset.json``, finding the cases, and reading a case.

Two folder layouts are supported, both with NIfTI volumes:

- The layout of the Medical Segmentation Decathlon. ``dataset.json`` has a list ``training``, a 4-D image holds all
  channels, and ``labels`` maps numbers to names.
- The raw layout of nnU-Net, version 2. Every channel has a file such as ``imagesTr/case_0000.nii.gz``, and ``labels``
  maps names to numbers. One of the names may be ``"ignore"``.

Axes are those of nibabel, ``(x, y, z)``. If a file is wrong, a :class:`~calseg.volumes.nifti.DataError` is raised,
which names the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calseg.errors import brief
from calseg.files import InputFile, file_digest
from calseg.volumes.nifti import DataError, read_volume

IGNORE_INDEX = -100
"""Label of voxels that do not count: padding, and voxels with nnU-Net's label ``ignore``."""

Volume = NDArray[np.float32]
LabelMap = NDArray[np.int16]


@dataclass(frozen=True)
class Case:
    """The files of an image and its label map. An image is one 3-D file per channel, or one 4-D file for all."""

    name: str
    images: tuple[Path, ...]
    label: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the case."""
        return (*self.images, self.label)


@dataclass(frozen=True)
class Dataset:
    """The content of ``dataset.json``. All files of the cases exist.

    ``class_names[c]`` is the name of class ``c``. ``ignore_label`` is the number on disk that becomes
    :data:`IGNORE_INDEX`, or None.
    """

    name: str
    folder: Path
    layout: str
    class_names: tuple[str, ...]
    channel_names: tuple[str, ...]
    cases: tuple[Case, ...]
    ignore_label: int | None = None

    @property
    def files(self) -> list[Path]:
        """All files of all cases."""
        return [file for case in self.cases for file in case.files]


# ----------------------------------------------------------------------------------------- dataset.json


def find_cases(folder: str | Path) -> Dataset:
    """Read ``folder/dataset.json``, and find its training cases, sorted by name."""
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    path = root / "dataset.json"
    if not path.is_file():
        raise DataError(f"{path}: not found; DATA must be a folder in the Decathlon's or nnU-Net's raw layout")
    meta = _read_meta(path)

    is_msd = isinstance(meta.get("training"), list)
    class_names, ignore_label = _read_labels(meta.get("labels"), path)
    channel_names = _read_channels(meta.get("modality" if is_msd else "channel_names"), path)
    cases = _msd_cases(meta["training"], root, path) if is_msd else _nnunet_cases(meta, root, path, channel_names)
    if not cases:
        raise DataError(f"{path}: lists no training case")
    seen: set[str] = set()
    for case in cases:
        _check_name(case.name, path)
        if case.name in seen:
            raise DataError(f"{path}: case {case.name!r} is listed more than once")
        seen.add(case.name)
        for file in case.files:
            if not file.is_file():
                raise DataError(f"{file}: not found (case {case.name!r} of {path})")
            if not file.name.endswith((".nii", ".nii.gz")):
                raise DataError(f"{file}: only NIfTI files (.nii, .nii.gz) are read")
    return Dataset(
        name=str(meta.get("name", root.resolve().name)),
        folder=root,
        layout="msd" if is_msd else "nnunet",
        class_names=class_names,
        channel_names=channel_names,
        cases=tuple(sorted(cases, key=lambda case: case.name)),
        ignore_label=ignore_label,
    )


NAME_BYTES = 255 - len(".nii.gz")
"""The longest case name: a file system takes 255 bytes, and results are written to NAME.nii.gz."""


def _check_name(name: str, path: Path) -> None:
    """Refuse a case name that cannot name a file within a folder of results."""
    faults = {
        "is empty": not name,
        "begins with a dot": name.startswith("."),
        "holds a slash, a backslash or a control character": re.search(r"[/\\\x00-\x1f\x7f]", name),
        "is no text": re.search(r"[\ud800-\udc7f\udd00-\udfff]", name),  # what is neither, nor a byte of a file's name
        f"is longer than {NAME_BYTES} bytes": len(name.encode(errors="surrogatepass")) > NAME_BYTES,
    }
    for fault, is_found in faults.items():
        if is_found:
            raise DataError(f"{path}: the case name {brief(repr(name), 100)} cannot name a file: it {fault}")


def _read_meta(path: Path) -> dict[str, Any]:
    """Read a ``dataset.json``."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(meta, dict):
        raise DataError(f"{path}: a JSON object is wanted, not a {type(meta).__name__}")
    return meta


def read_class_names(path: Path) -> tuple[tuple[str, ...], int | None]:
    """Return the names of the classes in a ``dataset.json`` of either layout, and the ignore label or None."""
    return _read_labels(_read_meta(path).get("labels"), path)


def _read_labels(labels: Any, path: Path) -> tuple[tuple[str, ...], int | None]:
    """Return the class names in order and the ignore label, from ``{"0": name}`` or ``{name: 0}``."""
    if not isinstance(labels, Mapping) or not labels:
        raise DataError(f'{path}: "labels" must map numbers to names or names to numbers')
    by_number: dict[int, str] = {}
    ignore: int | None = None
    for key, value in labels.items():
        if isinstance(value, list):
            raise DataError(f'{path}: "labels" gives {key!r} several numbers; region-based labels are not supported')
        number, name = (value, key) if isinstance(value, int) else (key, value)
        try:
            number = int(number)
        except (TypeError, ValueError):
            raise DataError(f'{path}: "labels" entry {key!r}: {value!r} holds no whole number') from None
        if number in by_number or number == ignore:
            raise DataError(f'{path}: "labels" gives the number {number} twice')
        if str(name).lower() == "ignore":
            ignore = number
        else:
            by_number[number] = str(name)
    if sorted(by_number) != list(range(len(by_number))):
        raise DataError(f'{path}: "labels" must number the classes 0, 1, 2, ...; got {sorted(by_number)}')
    if len(by_number) < 2:
        raise DataError(f'{path}: "labels" must name at least two classes (background is 0)')
    return tuple(by_number[number] for number in sorted(by_number)), ignore


def _read_channels(channels: Any, path: Path) -> tuple[str, ...]:
    """Return the names of the channels in order."""
    if not isinstance(channels, Mapping) or not channels:
        raise DataError(f'{path}: "modality" (Decathlon) or "channel_names" (nnU-Net) must name the channels')
    try:
        return tuple(str(channels[key]) for key in sorted(channels, key=int))
    except ValueError:
        raise DataError(f"{path}: channels must be numbered; got {sorted(channels)}") from None


def _case_name(file: str) -> str:
    """Return the name of a case from that of its label map."""
    return re.sub(r"\.nii(\.gz)?$", "", Path(file).name)


def _msd_cases(training: Sequence[Any], root: Path, path: Path) -> list[Case]:
    """Return the cases of a folder in the layout of the Decathlon."""
    cases = []
    for entry in training:
        if not (isinstance(entry, Mapping) and all(isinstance(entry.get(k), str) for k in ("image", "label"))):
            raise DataError(f'{path}: "training" entries must be {{"image": ..., "label": ...}}; got {entry!r}')
        cases.append(Case(_case_name(entry["label"]), (root / entry["image"],), root / entry["label"]))
    return cases


def _nnunet_cases(meta: Mapping[str, Any], root: Path, path: Path, channels: Sequence[str]) -> list[Case]:
    """Return the cases of a folder in the layout of nnU-Net."""
    listed = meta.get("dataset")
    if isinstance(listed, Mapping):
        try:
            return [
                Case(str(name), tuple(root / image for image in entry["images"]), root / entry["label"])
                for name, entry in listed.items()
            ]
        except (KeyError, TypeError):
            raise DataError(f'{path}: "dataset" entries must be {{"images": [...], "label": ...}}') from None
    ending = str(meta.get("file_ending", ".nii.gz"))
    labels = sorted(file for file in (root / "labelsTr").glob(f"*{ending}") if not file.name.startswith("."))
    wanted = meta.get("numTraining")
    if isinstance(wanted, int) and wanted != len(labels):
        raise DataError(f'{path}: "numTraining" is {wanted}, but {root / "labelsTr"} holds {len(labels)} label maps')
    cases = []
    for label in labels:
        name = label.name[: -len(ending)]
        images = tuple(root / "imagesTr" / f"{name}_{channel:04d}{ending}" for channel in range(len(channels)))
        cases.append(Case(name, images, label))
    return cases


# ---------------------------------------------------------------------------------------------- one case


def load_case(case: Case, dataset: Dataset) -> tuple[Volume, LabelMap]:
    """Read and check a case.

    Returns:
        The image as stored, float32 ``[channels, x, y, z]``, and the label map, int16 ``[x, y, z]``. A label is a
        class, ``0`` to ``len(class_names) - 1``, or :data:`IGNORE_INDEX`.
    """
    channels = [_read_image(file) for file in case.images]
    for file, channel in zip(case.images[1:], channels[1:], strict=True):
        if channel.shape != channels[0].shape:
            raise DataError(
                f"{file}: shape {channel.shape[1:]} differs from {channels[0].shape[1:]} of {case.images[0]}"
            )
    image = np.concatenate(channels)
    if len(image) != len(dataset.channel_names):
        raise DataError(
            f"{case.images[0]}: {len(image)} channels, but dataset.json names {len(dataset.channel_names)}"
            f" ({', '.join(dataset.channel_names)})"
        )
    label = _read_label(case.label, dataset)
    if label.shape != image.shape[1:]:
        raise DataError(f"{case.label}: label of shape {label.shape}, but image {case.images[0]} has {image.shape[1:]}")
    if not (label != IGNORE_INDEX).any():
        raise DataError(f"{case.label}: every voxel is marked as ignored")
    return image, label


def case_inputs(case: Case, dataset: Dataset) -> list[InputFile]:
    """The files of a case by their content, named relative to the folder of the data set if they lie in it."""
    names = [
        file.relative_to(dataset.folder) if file.is_relative_to(dataset.folder) else file.resolve()
        for file in case.files
    ]
    return [InputFile(file, name.as_posix(), file_digest(file)) for file, name in zip(case.files, names, strict=True)]


def _read_image(path: Path) -> Volume:
    """Read an image, float32 ``[channels, x, y, z]``, from a 3-D file or a 4-D file with the channels last."""
    voxels = read_volume(path)
    if voxels.dtype.kind not in "biuf":
        raise DataError(f"{path}: voxels of type {voxels.dtype}; real numbers are wanted")
    if voxels.ndim not in (3, 4) or 0 in voxels.shape:
        raise DataError(f"{path}: shape {voxels.shape}; a 3-D volume, or 4-D with the channels last, is wanted")
    if voxels.ndim == 3:
        voxels = voxels[..., None]
    with np.errstate(over="ignore"):  # numbers that float32 cannot hold become infinite, and raise below
        image = np.ascontiguousarray(np.moveaxis(voxels, -1, 0), dtype=np.float32)
    bad = image.size - int(np.isfinite(image).sum())
    if bad:
        raise DataError(f"{path}: {bad} voxels are NaN or infinite")
    return image


def _read_label(path: Path, dataset: Dataset) -> LabelMap:
    """Read and check a label map."""
    voxels = read_volume(path)
    if voxels.ndim == 4 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3 or 0 in voxels.shape:
        raise DataError(f"{path}: shape {voxels.shape}; a 3-D label map with one class number per voxel is wanted")
    return check_label(voxels, path, len(dataset.class_names), dataset.ignore_label)


def check_label(voxels: NDArray[Any], path: Path, classes: int, ignore_label: int | None) -> LabelMap:
    """Check the voxels of the label map ``path``, and return classes or :data:`IGNORE_INDEX`."""
    if voxels.dtype.kind not in "biuf":
        raise DataError(f"{path}: labels of type {voxels.dtype}; whole numbers are wanted")
    if voxels.dtype.kind == "f" and not np.array_equal(voxels, np.floor(voxels)):
        odd = voxels[voxels != np.floor(voxels)].flat[0]
        raise DataError(f"{path}: labels must be whole numbers; found {odd}")
    ignored = np.zeros(voxels.shape, bool) if ignore_label is None else voxels == ignore_label
    outside = ~ignored & ((voxels < 0) | (voxels >= classes))
    if outside.any():
        found = ", ".join(f"{value:g}" for value in np.unique(voxels[outside])[:5])
        raise DataError(f"{path}: labels outside the classes 0 to {classes - 1} of dataset.json: {found}")
    label = np.where(ignored, 0, voxels).astype(np.int16)
    label[ignored] = IGNORE_INDEX  # after the cast, because uint8 cannot hold -100
    return label


# ------------------------------------------------------------------------------------------------- split


def split_cases(names: Sequence[str], fraction: float, seed: int = 0) -> tuple[list[str], list[str]]:
    """Split cases into training and validation. The split depends on the names, the fraction and the seed only."""
    if len(names) < 2:
        raise DataError(f"at least two cases are needed, one to train and one to validate; got {len(names)}")
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    count = min(max(round(fraction * len(names)), 1), len(names) - 1)
    return sorted(order[count:]), sorted(order[:count])
