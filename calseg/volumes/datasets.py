"""Folders of segmentation cases: reading ``dataset.json``, finding the cases, and reading a case.

Two folder layouts are supported, both with NIfTI volumes:

- the Medical Segmentation Decathlon's (``dataset.json`` with a ``training`` list; several channels in one
  4-D image, or as in nnU-Net's version 1 in a file per channel; ``labels`` maps numbers to names);
- nnU-Net's raw layout, version 2 (``imagesTr/case_0000.nii.gz``, one file per channel; ``labels`` maps names
  to numbers, perhaps with ``"ignore"``).

Axes are those of nibabel, ``(x, y, z)``. If a file is wrong, a :class:`~calseg.volumes.nifti.DataError` is raised,
which names the file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from calseg.errors import RunError, brief
from calseg.files import InputFile, file_digest, read_json
from calseg.volumes.nifti import DataError, match, read_grid, read_header, read_volume, step_of, turned

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
    channels = next((meta[key] for key in ("channel_names", "modality") if meta.get(key)), None)
    channel_names = _read_channels(channels, path)
    if is_msd:
        cases = _msd_cases(meta["training"], root, path, len(channel_names))
    else:
        cases = _nnunet_cases(meta, root, path, channel_names)
    if not cases:
        raise DataError(f"{path}: lists no training case")
    seen: set[str] = set()
    for case in cases:
        _check_name(case.name, path)
        if case.name in seen:
            raise DataError(f"{path}: case {case.name!r} is listed more than once")
        seen.add(case.name)
        for file in case.files:
            if not _is_file(file):
                raise DataError(f"{file}: not found (case {case.name!r} of {path})")
            if not file.name.endswith((".nii", ".nii.gz")):
                raise DataError(f"{file}: only NIfTI files (.nii, .nii.gz) are read")
    return Dataset(
        name=brief(meta.get("name", root.resolve().name), 100),
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
        meta = read_json(path)
    except RunError as error:
        raise DataError(str(error)) from error
    if not isinstance(meta, dict):
        raise DataError(f"{path}: a JSON object is wanted, not a {type(meta).__name__}")
    return meta


def read_class_names(path: Path) -> tuple[tuple[str, ...] | None, int | None]:
    """The names of the classes 0, 1, ... in a ``dataset.json`` of either layout, and its ignore label or None.

    The names are None where the labels are nnU-Net's regions, several numbers to a name.
    """
    labels = _read_meta(path).get("labels")
    if isinstance(labels, Mapping) and any(isinstance(value, list) for value in labels.values()):
        ignore = labels.get("ignore")
        return None, ignore if isinstance(ignore, int) else None
    return _read_labels(labels, path)


def _read_labels(labels: Any, path: Path) -> tuple[tuple[str, ...], int | None]:
    """``{"0": name}`` (Decathlon), ``{name: 0}`` (nnU-Net) or ``[name]`` -> class names in order, the ignore label."""
    if isinstance(labels, list):
        labels = dict(enumerate(labels))
    if not isinstance(labels, Mapping) or not labels:
        raise DataError(f'{path}: "labels" must map numbers to names or names to numbers')
    for key, value in labels.items():
        if isinstance(value, list):
            raise DataError(
                f'{path}: "labels" gives {brief(repr(key), 80)} several numbers; region-based labels are not supported'
            )
    if all(isinstance(value, int) for value in labels.values()) or None in map(_whole, labels):
        pairs = [(_whole(value), key) for key, value in labels.items()]  # names to numbers
    else:
        pairs = [(_whole(key), value) for key, value in labels.items()]
    by_number: dict[int, str] = {}
    for number, name in pairs:
        if number is None or not isinstance(name, str):
            raise DataError(f'{path}: "labels" must map numbers to names or names to numbers; got {brief(labels, 100)}')
        if number in by_number:
            raise DataError(f'{path}: "labels" gives the number {number} twice')
        if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", name):
            raise DataError(f'{path}: "labels" holds the name {brief(repr(name), 80)}, which is no text')
        by_number[number] = name
    ignored = [number for number, name in by_number.items() if name.lower() == "ignore"]
    for number in ignored[:1]:
        del by_number[number]
    names = list(by_number.values())
    if len(set(names)) < len(names):
        raise DataError(f'{path}: "labels" gives a name twice; got {brief(labels, 100)}')
    if sorted(by_number) != list(range(len(by_number))):
        raise DataError(f'{path}: "labels" must number the classes 0, 1, 2, ...; got {brief(sorted(by_number), 100)}')
    if len(by_number) < 2:
        raise DataError(f'{path}: "labels" must name at least two classes (background is 0)')
    return tuple(by_number[number] for number in sorted(by_number)), next(iter(ignored), None)


def _whole(value: Any) -> int | None:
    """The whole number that ``value`` is, or that it spells."""
    if isinstance(value, str) and re.fullmatch(r"[ ]*-?[0-9]{1,9}[ ]*", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _read_channels(channels: Any, path: Path) -> tuple[str, ...]:
    """``{"0": name}``, ``[name]`` or one name -> the names of the channels in order."""
    if isinstance(channels, str):
        channels = [channels]
    if isinstance(channels, list):
        channels = dict(enumerate(channels))
    if not isinstance(channels, Mapping) or not channels:
        raise DataError(f'{path}: "modality" (Decathlon) or "channel_names" (nnU-Net) must name the channels')
    numbered = {_whole(key): str(name) for key, name in channels.items()}
    if None in numbered or len(numbered) < len(channels):
        raise DataError(f"{path}: channels must be numbered; got {brief(list(channels), 100)}")
    return tuple(name for _, name in sorted(numbered.items(), key=lambda item: item[0] or 0))


def _case_name(file: str) -> str:
    """Return the name of a case from that of its label map."""
    return re.sub(r"\.nii(\.gz)?$", "", Path(file).name)


def _msd_cases(training: Sequence[Any], root: Path, path: Path, channels: int) -> list[Case]:
    """The cases of a list of ``{"image": file or files, "label": file}`` or ``[image, label]``."""
    cases = []
    for entry in training:
        if isinstance(entry, list) and len(entry) == 2:
            entry = dict(zip(("image", "label"), entry, strict=True))
        images = entry.get("image") if isinstance(entry, Mapping) else None
        images = [images] if isinstance(images, str) else images
        if not _are_texts(images) or not isinstance(entry.get("label"), str):
            raise DataError(
                f'{path}: "training" entries must be {{"image": ..., "label": ...}}; got {brief(repr(entry), 100)}'
            )
        files = tuple(root / image for image in images)
        if len(files) == 1 and not _is_file(files[0]):  # version 1 of nnU-Net leaves the channel's number out
            files = _with_channels(files[0], channels) or files
        cases.append(Case(_case_name(entry["label"]), files, root / entry["label"]))
    return cases


def _with_channels(image: Path, channels: int) -> tuple[Path, ...]:
    """The files ``NAME_0000.nii.gz``, ... of the image ``NAME.nii.gz``; none if the first is not there."""
    name = _case_name(image.name)
    files = tuple(image.with_name(f"{name}_{channel:04d}{image.name[len(name) :]}") for channel in range(channels))
    return files if _is_file(files[0]) else ()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _nnunet_cases(meta: Mapping[str, Any], root: Path, path: Path, channels: Sequence[str]) -> list[Case]:
    """Return the cases of a folder in the layout of nnU-Net."""
    listed = meta.get("dataset")
    if isinstance(listed, Mapping):
        cases = []
        for name, entry in listed.items():
            images = entry.get("images") if isinstance(entry, Mapping) else None
            images = [images] if isinstance(images, str) else images
            if not _are_texts(images) or not isinstance(entry.get("label"), str):
                raise DataError(
                    f'{path}: "dataset" entries must be {{"images": [...], "label": ...}}; got'
                    f" {brief(repr({name: entry}), 100)}"
                )
            cases.append(Case(name, tuple(root / image for image in images), root / entry["label"]))
        return cases
    ending = f".{str(meta.get('file_ending', '.nii.gz')).lstrip('.')}"
    if not (root / "labelsTr").is_dir():
        raise DataError(f'{path}: lists no cases ("training" or "dataset"), and there is no folder labelsTr beside it')
    labels = sorted(
        file for file in (root / "labelsTr").iterdir() if file.name.endswith(ending) and not file.name.startswith(".")
    )
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
    """Read and check one case: image float32 ``[channels, x, y, z]``, label int16 ``[x, y, z]``.

    Labels are classes ``0 .. len(class_names) - 1`` or :data:`IGNORE_INDEX`. The axes are those of the first image, to
    which a file that is stored in another orientation is turned (:func:`~calseg.volumes.nifti.match`).
    """
    reference = case.images[0]
    channels = [_read_image(file, reference) for file in case.images]
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
    label = _read_label(case.label, dataset, reference)
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


def _read_image(path: Path, reference: Path) -> Volume:
    """float32 ``[channels, x, y, z]`` from a 3-D or a 4-D (channels last) file, with the axes of ``reference``."""
    voxels = read_volume(path, reference)
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


def _read_label(path: Path, dataset: Dataset, reference: Path) -> LabelMap:
    voxels = read_volume(path)
    if voxels.ndim == 4 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3 or 0 in voxels.shape:
        raise DataError(f"{path}: shape {voxels.shape}; a 3-D label map with one class number per voxel is wanted")
    label = check_label(voxels, path, len(dataset.class_names), dataset.ignore_label, step_of(read_header(path)))
    return turned(label, match(read_grid(path), read_grid(reference)).turn)


def check_label(
    voxels: NDArray[Any],
    path: Path,
    classes: int,
    ignore_label: int | None,
    step: float = 0.0,
    offset: tuple[int, ...] = (0, 0, 0),
) -> LabelMap:
    """Voxels ``[x, y, z]`` of the label map ``path`` as classes ``0 .. classes - 1`` or :data:`IGNORE_INDEX`.

    The voxels are a part of the map as it is stored, which begins at the voxel ``offset``. A label may miss a whole
    number by a thousandth, which covers what rounding in float32 does to a scaled number, or by half of ``step``, the
    distance between the numbers that the file can hold, if that is below 1.
    """
    if voxels.dtype.kind not in "biuf":
        raise DataError(f"{path}: labels of type {voxels.dtype}; whole numbers are wanted")
    if voxels.dtype.kind == "f":
        whole = np.rint(voxels)
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            fits = np.abs(voxels - whole) <= (max(1e-3, 0.501 * step) if step < 1 else 1e-3)
        if not fits.all():
            place = _first(~fits, offset)
            raise DataError(f"{path}: labels must be whole numbers; found {voxels[~fits].flat[0]} at voxel {place}")
        voxels = whole
    ignored = np.zeros(voxels.shape, bool) if ignore_label is None else voxels == ignore_label
    outside = ~ignored & ((voxels < 0) | (voxels >= classes))
    if outside.any():
        found = ", ".join(f"{value:g}" for value in np.unique(voxels[outside])[:5])
        place = _first(outside, offset)
        raise DataError(
            f"{path}: labels outside the classes 0 to {classes - 1}: {found}; the first is at voxel {place}"
        )
    label = np.where(ignored, 0, voxels).astype(np.int16)
    label[ignored] = IGNORE_INDEX  # after the cast, because uint8 cannot hold -100
    return label


def _first(is_bad: NDArray[np.bool_], offset: tuple[int, ...]) -> str:
    """The first voxel where ``is_bad`` is true."""
    index = np.argwhere(is_bad)[0] + offset
    return f"(x, y, z) = {tuple(index.tolist())}"


# ------------------------------------------------------------------------------------------------- split


def split_cases(names: Sequence[str], fraction: float, seed: int = 0) -> tuple[list[str], list[str]]:
    """Split cases into training and validation. The split depends on the names, the fraction and the seed only."""
    if len(names) < 2:
        raise DataError(f"at least two cases are needed, one to train and one to validate; got {len(names)}")
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode(errors="surrogateescape")).digest())
    count = min(max(round(fraction * len(names)), 1), len(names) - 1)
    return sorted(order[count:]), sorted(order[:count])
