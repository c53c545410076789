"""Segmentation cases on disk, and the patches that training draws from them.

Two folder layouts are read, both with NIfTI volumes:

- the Medical Segmentation Decathlon's (``dataset.json`` with a ``training`` list; several channels in one
  4-D image; ``labels`` maps numbers to names);
- nnU-Net's raw layout, version 2 (``imagesTr/case_0000.nii.gz``, one file per channel; ``labels`` maps names
  to numbers, perhaps with ``"ignore"``).

Axes are nibabel's, ``(x, y, z)``. Every problem with the user's files is a :class:`DataError` that names the
file. Needs the extra ``calseg[train]`` (nibabel).
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import math
import os
import re
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import nibabel
import numpy as np
from numpy.typing import NDArray

IGNORE_INDEX = -100
"""The label of voxels that count nowhere: padding, and nnU-Net's ``ignore``."""

Volume = NDArray[np.float32]
LabelMap = NDArray[np.int16]


class DataError(ValueError):
    """A file or folder of the user's is missing, unreadable or not what it should be."""


@dataclass(frozen=True)
class Case:
    """One image with its label map: one 3-D file per channel, or one 4-D file with all of them."""

    name: str
    images: tuple[Path, ...]
    label: Path


@dataclass(frozen=True)
class Dataset:
    """What ``dataset.json`` says, with every file it implies known to exist.

    ``class_names[c]`` names class ``c``; ``ignore_label`` is the number on disk that becomes
    :data:`IGNORE_INDEX`, or None.
    """

    name: str
    folder: Path
    layout: str
    class_names: tuple[str, ...]
    channel_names: tuple[str, ...]
    cases: tuple[Case, ...]
    ignore_label: int | None = None


# ----------------------------------------------------------------------------------------- dataset.json


def find_cases(folder: str | Path) -> Dataset:
    """Read ``folder/dataset.json`` and list its training cases, sorted by name."""
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
        if case.name in seen:
            raise DataError(f"{path}: case {case.name!r} is listed more than once")
        seen.add(case.name)
        for file in (*case.images, case.label):
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


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(meta, dict):
        raise DataError(f"{path}: a JSON object is wanted, not a {type(meta).__name__}")
    return meta


def read_class_names(path: Path) -> tuple[tuple[str, ...], int | None]:
    """The names of the classes 0, 1, ... in a ``dataset.json`` of either layout, and its ignore label or None."""
    return _read_labels(_read_meta(path).get("labels"), path)


def _read_labels(labels: Any, path: Path) -> tuple[tuple[str, ...], int | None]:
    """``{"0": name}`` (Decathlon) or ``{name: 0}`` (nnU-Net) -> class names in order, the ignore label."""
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
    if not isinstance(channels, Mapping) or not channels:
        raise DataError(f'{path}: "modality" (Decathlon) or "channel_names" (nnU-Net) must name the channels')
    try:
        return tuple(str(channels[key]) for key in sorted(channels, key=int))
    except ValueError:
        raise DataError(f"{path}: channels must be numbered; got {sorted(channels)}") from None


def _case_name(file: str) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", Path(file).name)


def _msd_cases(training: Sequence[Any], root: Path, path: Path) -> list[Case]:
    cases = []
    for entry in training:
        if not (isinstance(entry, Mapping) and all(isinstance(entry.get(k), str) for k in ("image", "label"))):
            raise DataError(f'{path}: "training" entries must be {{"image": ..., "label": ...}}; got {entry!r}')
        cases.append(Case(_case_name(entry["label"]), (root / entry["image"],), root / entry["label"]))
    return cases


def _nnunet_cases(meta: Mapping[str, Any], root: Path, path: Path, channels: Sequence[str]) -> list[Case]:
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
    """Read and check one case: image float32 ``[channels, x, y, z]`` as stored, label int16 ``[x, y, z]``.

    Labels are classes ``0 .. len(class_names) - 1`` or :data:`IGNORE_INDEX`.
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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns whatever reading a file raises into a :class:`DataError` that names it."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found") from error
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            folder = tempfile.gettempdir()
            raise DataError(f"{path}: no space to unpack it in {folder}; TMPDIR names another") from error
        raise DataError(f"{path}: cannot be read; the file is corrupt or truncated ({error})") from error
    except Exception as error:  # nibabel meets a broken header with many kinds of exception
        kind = "NumPy .npz" if path.name.endswith(".npz") else "NIfTI"
        raise DataError(f"{path}: not a readable {kind} file ({type(error).__name__}: {error})") from error


@contextmanager
def open_volume(path: Path, max_bytes: int | None = None) -> Iterator[Any]:
    """A nibabel image whose voxels are read when its ``dataobj`` is sliced.

    gzip has no random access: a ``.nii.gz`` is unpacked once, to its end, so that its checksum is verified. It
    is kept in memory; one of more than ``max_bytes`` goes to a temporary file, which is gone at the end.
    """
    with ExitStack() as stack:
        with naming(path):
            if path.name.endswith(".gz"):
                with gzip.open(path) as packed:
                    file = stack.enter_context(unpack(packed, max_bytes))
            else:
                file = stack.enter_context(open(path, "rb"))
            kind = _kind_of(file.read(4))
            file.seek(0)
            nifti: Any = kind.from_stream(file)
            wanted = nifti.dataobj.offset + nifti.dataobj.dtype.itemsize * math.prod(nifti.shape)
            size = file.seek(0, os.SEEK_END)
            if size < wanted:
                raise EOFError(f"{size} of {wanted} bytes")
        yield nifti


def read_header(path: Path) -> Any:
    """The header of a NIfTI file; of the voxels nothing is read."""
    with naming(path), (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
        start = file.read(540)
        return _kind_of(start).header_class.from_fileobj(io.BytesIO(start))


def _kind_of(start: bytes) -> Any:
    """The class of the image that begins with ``start``: its header's size, 348 for version 1 and 540 for version 2."""
    is_nifti2 = start[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")
    return nibabel.Nifti2Image if is_nifti2 else nibabel.Nifti1Image


def unpack(packed: Any, max_bytes: int | None = None) -> IO[bytes]:
    """The content of a compressed stream: in memory, or in a temporary file if it is more than ``max_bytes``."""
    file: Any = io.BytesIO()
    while chunk := packed.read(1 << 20):
        if isinstance(file, io.BytesIO) and max_bytes is not None and file.tell() + len(chunk) > max_bytes:
            memory, file = file, tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
            file.write(memory.getbuffer())
        file.write(chunk)
    file.seek(0)
    return cast("IO[bytes]", file)


def read_volume(path: Path) -> NDArray[Any]:
    """The voxels of a NIfTI file, scaled as it says. Gzip is read to its end: the checksum is verified."""
    with open_volume(path) as nifti, naming(path):
        return np.asanyarray(nifti.dataobj)


def _read_image(path: Path) -> Volume:
    """float32 ``[channels, x, y, z]`` from a 3-D or a 4-D (channels last) file."""
    voxels = read_volume(path)
    if voxels.dtype.kind not in "biuf":
        raise DataError(f"{path}: voxels of type {voxels.dtype}; real numbers are wanted")
    if voxels.ndim not in (3, 4) or 0 in voxels.shape:
        raise DataError(f"{path}: shape {voxels.shape}; a 3-D volume, or 4-D with the channels last, is wanted")
    if voxels.ndim == 3:
        voxels = voxels[..., None]
    with np.errstate(over="ignore"):  # what float32 cannot hold turns infinite, and is reported below
        image = np.ascontiguousarray(np.moveaxis(voxels, -1, 0), dtype=np.float32)
    bad = image.size - int(np.isfinite(image).sum())
    if bad:
        raise DataError(f"{path}: {bad} voxels are NaN or infinite")
    return image


def _read_label(path: Path, dataset: Dataset) -> LabelMap:
    voxels = read_volume(path)
    if voxels.ndim == 4 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3 or 0 in voxels.shape:
        raise DataError(f"{path}: shape {voxels.shape}; a 3-D label map with one class number per voxel is wanted")
    return check_label(voxels, path, len(dataset.class_names), dataset.ignore_label)


def check_label(voxels: NDArray[Any], path: Path, classes: int, ignore_label: int | None) -> LabelMap:
    """Voxels of the label map ``path`` as classes ``0 .. classes - 1`` or :data:`IGNORE_INDEX`."""
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
    label[ignored] = IGNORE_INDEX  # after the cast, for uint8 would wrap it around
    return label


def normalise(image: Volume) -> Volume:
    """Zero mean and unit variance for every channel ``image[c]``; a constant channel becomes 0."""
    result = np.zeros_like(image)
    for channel, out in zip(image, result, strict=True):
        low, high = float(channel.min()), float(channel.max())
        if low < high:
            # Scaling first keeps float64 sums of squares safe for any finite float32 input.
            scaled = (channel.astype(np.float64) - low) / (high - low)
            out[...] = (scaled - scaled.mean()) / scaled.std()
    return result


# ------------------------------------------------------------------------------------------- soft labels

SOFT_LABEL_STEPS = 65535
"""Soft labels are written as uint16 of this many steps; the NIfTI header's slope makes them probabilities."""


def soft_labels_path(folder: Path, name: str) -> Path:
    """The soft labels of the case of that name."""
    return folder / f"{name}.nii.gz"


def soft_labels_file(soft_labels: Volume, like: Path) -> bytes:
    """A gzipped 4-D NIfTI file, ``[x, y, z, classes]`` in uint16, placed in space as the file ``like``."""
    steps = np.rint(np.moveaxis(soft_labels, 0, -1).astype(np.float64) * SOFT_LABEL_STEPS).astype(np.uint16)
    image = nibabel.Nifti1Image(steps, nibabel.load(like).affine)  # type: ignore[attr-defined]
    image.header.set_slope_inter(1 / SOFT_LABEL_STEPS, 0)
    return gzip.compress(image.to_bytes(), 3, mtime=0)


def probabilities_file(probabilities: Volume, like: Path) -> bytes:
    """The same of float32 ``[classes, x, y, z]``, for what must not be rounded: a small probability is no 0."""
    image = nibabel.Nifti1Image(np.moveaxis(probabilities, 0, -1), nibabel.load(like).affine)  # type: ignore[attr-defined]
    return gzip.compress(image.to_bytes(), 3, mtime=0)


def read_soft_labels(path: Path, label: LabelMap, classes: int) -> Volume:
    """float32 ``[classes, x, y, z]`` that sum to 1 where ``label`` is not ignored, and are 0 where it is."""
    voxels = read_volume(path)
    wanted = (*label.shape, classes)
    if voxels.shape != wanted or voxels.dtype.kind not in "iuf":
        raise DataError(f"{path}: soft labels of shape {voxels.shape} and type {voxels.dtype}; {wanted} is wanted")
    soft = np.ascontiguousarray(np.moveaxis(voxels, -1, 0), dtype=np.float32)
    total = soft.sum(0)
    counts = label != IGNORE_INDEX
    # NaN fails both comparisons. Rounding to 8 bits may take half a step off every class.
    if not ((soft >= 0).all() and (np.abs(total[counts] - 1) < classes / 256).all()):
        raise DataError(f"{path}: soft labels must be probabilities that sum to 1 in every labelled voxel")
    return np.asarray(soft * np.where(counts, 1 / np.where(counts, total, 1), 0).astype(np.float32))


# ------------------------------------------------------------------------------------------------- split


def split_cases(names: Sequence[str], fraction: float, seed: int = 0) -> tuple[list[str], list[str]]:
    """A fixed split (training, validation): it depends on the names, the fraction and the seed only."""
    if len(names) < 2:
        raise DataError(f"at least two cases are needed, one to train and one to validate; got {len(names)}")
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    count = min(max(round(fraction * len(names)), 1), len(names) - 1)
    return sorted(order[count:]), sorted(order[:count])


# ----------------------------------------------------------------------------------------------- patches


@dataclass(frozen=True)
class LoadedCase:
    """A case in memory: normalised image float32 ``[channels, x, y, z]``, label int16 ``[x, y, z]``.

    ``foreground`` and ``labelled`` are up to 4096 flat voxel indices each, spread evenly over the voxels with
    a label above 0, and over those that are not ignored: enough to centre patches on. ``soft_labels`` is float32
    ``[classes, x, y, z]``, or None where the cases have none.
    """

    name: str
    image: Volume
    label: LabelMap
    foreground: NDArray[np.int64]
    labelled: NDArray[np.int64]
    soft_labels: Volume | None = None


def _spread(indices: NDArray[np.int64], count: int = 4096) -> NDArray[np.int64]:
    if len(indices) <= count:
        return indices
    return indices[np.linspace(0, len(indices) - 1, count).astype(np.int64)]


@dataclass
class CaseCache:
    """Cases read on demand and kept, the least recently used leaving once ``max_bytes`` is passed.

    ``soft_labels`` gives the file of soft labels of the cases that have one.
    """

    dataset: Dataset
    max_bytes: int = 2 << 30
    soft_labels: Mapping[str, Path] = field(default_factory=dict)
    _kept: OrderedDict[str, LoadedCase] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def __post_init__(self) -> None:
        self._cases = {case.name: case for case in self.dataset.cases}

    def get(self, name: str) -> LoadedCase:
        """The case of that name, read, checked and normalised."""
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        image, label = load_case(self._cases[name], self.dataset)
        soft = None
        if name in self.soft_labels:
            soft = read_soft_labels(self.soft_labels[name], label, len(self.dataset.class_names))
        loaded = LoadedCase(
            name=name,
            image=normalise(image),
            label=label,
            foreground=_spread(np.flatnonzero(label > 0)),
            labelled=_spread(np.flatnonzero(label != IGNORE_INDEX)),
            soft_labels=soft,
        )
        self._kept[name] = loaded
        self._bytes += _bytes_of(loaded)
        while self._bytes > self.max_bytes and len(self._kept) > 1:
            _, gone = self._kept.popitem(last=False)
            self._bytes -= _bytes_of(gone)
        return loaded


def _bytes_of(case: LoadedCase) -> int:
    return case.image.nbytes + case.label.nbytes + (0 if case.soft_labels is None else case.soft_labels.nbytes)


class Batch(NamedTuple):
    """``image[batch, channels, x, y, z]``, ``label[batch, x, y, z]``, ``soft_labels[batch, classes, x, y, z]``."""

    image: Volume
    label: LabelMap
    soft_labels: Volume | None


@dataclass(frozen=True)
class PatchSampler:
    """Training patches as a pure function of (seed, iteration): a resumed run sees what it would have seen.

    Every case appears once per epoch, in an order shuffled anew. A share ``foreground`` of the patches is
    centred on a voxel of a class above 0. Where a volume is smaller than the patch it lies at a random place
    in it, the rest being 0 in the image (its mean) and :data:`IGNORE_INDEX` in the label. Images get a random
    gain, offset and noise; ``flip_axes`` lists the axes (0 to 2) that are mirrored half of the time.
    """

    names: tuple[str, ...]
    patch_size: tuple[int, int, int]
    batch_size: int
    seed: int
    foreground: float = 1 / 3
    flip_axes: tuple[int, ...] = ()

    def batch(self, cache: CaseCache, iteration: int) -> Batch:
        """The patches of one iteration."""
        patches = []
        for number in range(iteration * self.batch_size, (iteration + 1) * self.batch_size):
            epoch, position = divmod(number, len(self.names))
            order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.names))
            case = cache.get(self.names[order[position]])
            patches.append(self._patch(case, np.random.default_rng((self.seed, 1, number))))
        images, labels, soft = zip(*patches, strict=True)
        return Batch(np.stack(images), np.stack(labels), None if soft[0] is None else np.stack(soft))

    def _patch(self, case: LoadedCase, rng: np.random.Generator) -> tuple[Volume, LabelMap, Volume | None]:
        wants_foreground = rng.random() < self.foreground
        start = self._start(case, rng, case.foreground if wants_foreground and len(case.foreground) else None)
        label = _crop(case.label[None], start, self.patch_size, IGNORE_INDEX)[0]
        if not (label != IGNORE_INDEX).any():  # a patch without a label would teach nothing
            start = self._start(case, rng, case.labelled)
            label = _crop(case.label[None], start, self.patch_size, IGNORE_INDEX)[0]
        image = _crop(case.image, start, self.patch_size, 0, lambda inside: _vary(inside, rng))
        axes = tuple(axis + 1 for axis in self.flip_axes if rng.random() < 0.5)
        soft = None
        if case.soft_labels is not None:
            soft = np.flip(_crop(case.soft_labels, start, self.patch_size, 0), axes)
        return np.flip(image, axes), np.flip(label[None], axes)[0], soft

    def _start(self, case: LoadedCase, rng: np.random.Generator, centres: NDArray[np.int64] | None) -> tuple[int, ...]:
        """The first voxel of the patch on every axis; negative where the volume is smaller than the patch."""
        slack = [size - patch for size, patch in zip(case.label.shape, self.patch_size, strict=True)]
        start = [int(rng.integers(min(s, 0), max(s, 0) + 1)) for s in slack]
        if centres is not None:
            centre = np.unravel_index(int(rng.choice(centres)), case.label.shape)
            for axis, s in enumerate(slack):
                if s > 0:
                    start[axis] = min(max(int(centre[axis]) - self.patch_size[axis] // 2, 0), s)
        return tuple(start)


def _crop(
    volume: NDArray[Any], start: Sequence[int], size: Sequence[int], fill: float, change: Any = None
) -> NDArray[Any]:
    """``volume[:, start : start + size]``, ``fill`` outside; ``change`` is applied to what lies inside."""
    inside, target = [slice(None)], [slice(None)]
    for first, length, extent in zip(start, size, volume.shape[1:], strict=True):
        low, high = max(first, 0), min(first + length, extent)
        inside.append(slice(low, high))
        target.append(slice(low - first, high - first))
    result = np.full((len(volume), *size), fill, dtype=volume.dtype)
    part = volume[tuple(inside)]
    result[tuple(target)] = part if change is None else change(part)
    return result


def _vary(image: Volume, rng: np.random.Generator) -> Volume:
    """Random gain, offset and white noise, small against the unit variance of a normalised image."""
    shape = (len(image), 1, 1, 1)
    gain = rng.uniform(0.9, 1.1, shape).astype(np.float32)
    offset = rng.uniform(-0.1, 0.1, shape).astype(np.float32)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0, 0.1))
    varied: Volume = image * gain + offset + noise
    return varied
