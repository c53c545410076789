"""Probability maps on disk beside label maps, read in slabs; files of soft labels.

Three forms are read, each case by the name of its label map:

- ``case.nii.gz`` (or ``.nii``), 4-D ``[x, y, z, C]``;
- ``case_0000.nii.gz``, ``case_0001.nii.gz``, ...: a 3-D file per class;
- ``case.npz`` with the key ``probabilities`` ``[C, z, y, x]``, which nnU-Net's ``--save_probabilities`` writes, its
  axes in the reverse order of nibabel's. The segmentation ``case.nii.gz`` that nnU-Net puts beside it is not read.

In memory everything is ``[C, z, y, x]``, the order of all three files on disk. A slab is a range of ``z``, the slowest
axis of space. Every problem with the user's files is a :class:`~calseg.volumes.nifti.DataError` that names the file.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nibabel.fileslice import fileslice
from numpy.typing import NDArray

from calseg.runs import listing
from calseg.volumes.datasets import IGNORE_INDEX, LabelMap, Volume, check_label, read_class_names
from calseg.volumes.nifti import (
    DataError,
    naming,
    open_volume,
    read_header,
    read_volume,
    unpack,
    volume_file,
)

NIFTI = re.compile(r"\.nii(\.gz)?$")
CHANNEL = re.compile(r"_(\d{4})$")
KEY = "probabilities"
MEMORY = 1 << 29


@dataclass(frozen=True)
class MapCase:
    """The probabilities of a case (one 4-D NIfTI file or ``.npz``, or a 3-D NIfTI file per class) and its label map."""

    name: str
    maps: tuple[Path, ...]
    label: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the case."""
        return (*self.maps, self.label)


# ------------------------------------------------------------------------------------------------- folders


def find_map_cases(probabilities: Path, labels: Path) -> tuple[list[MapCase], list[str]]:
    """Every case of the folder ``probabilities``, sorted by name, and the names of label maps without one."""
    for folder in (probabilities, labels):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
    truth = _nifti_files(labels)
    whole = _nifti_files(probabilities)
    packed = {file.stem: file for file in sorted(probabilities.glob("[!.]*.npz"))}
    channels: dict[str, dict[int, Path]] = {}
    for name in list(whole):
        number = CHANNEL.search(name)
        if number and name not in truth:
            channels.setdefault(name[: number.start()], {})[int(number[1])] = whole.pop(name)
    for name in set(packed) & set(whole):
        if len(_read_header(whole[name]).shape) == 3:  # nnU-Net's segmentation
            del whole[name]
    found: dict[str, tuple[Path, ...]] = {}
    for name in sorted({*whole, *packed, *channels}):
        if sum(name in form for form in (whole, packed, channels)) > 1:
            raise DataError(f"{probabilities}: holds the case {name!r} in more than one form; keep one of them")
        if name in channels:
            numbers = channels[name]
            missing = next(number for number in range(len(numbers) + 1) if number not in numbers)
            if missing < len(numbers):
                raise DataError(f"{numbers[max(numbers)]}: found, but no file {name}_{missing:04d} for class {missing}")
            found[name] = tuple(numbers[number] for number in range(len(numbers)))
        else:
            found[name] = (packed[name] if name in packed else whole[name],)
    if not found:
        raise DataError(f"{probabilities}: holds no probability map (.nii.gz, .nii or .npz)")
    for name, maps in found.items():
        if name not in truth:
            raise DataError(f"{maps[0]}: no label map {name}.nii.gz (or .nii) in {labels}")
    cases = [MapCase(name, maps, truth[name]) for name, maps in found.items()]
    return cases, [name for name in truth if name not in found]


def _nifti_files(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("[!.]*.nii*")):
        if not NIFTI.search(file.name):
            continue
        name = NIFTI.sub("", file.name)
        if name in files:
            raise DataError(f"{file}: the case {name!r} is also in {files[name].name}")
        files[name] = file
    return files


# ------------------------------------------------------------------------------------------------- headers


class _Header(NamedTuple):
    shape: tuple[int, ...]  # [C, z, y, x]
    affine: NDArray[np.float64] | None  # None: .npz has none


def check_headers(case: MapCase) -> tuple[int, list[str]]:
    """The number of classes of a case, from the files' headers alone, and what is odd about it.

    Raises :class:`~calseg.volumes.nifti.DataError` where shapes do not fit.
    """
    first = case.maps[0]
    headers = [_read_header(file) for file in case.maps]
    for file, header in zip(case.maps, headers, strict=True):
        wanted = (3, "a 3-D file per class") if len(case.maps) > 1 else (4, "4-D [x, y, z, classes], or .npz,")
        if len(header.shape) != wanted[0] or 0 in header.shape:
            raise DataError(f"{file}: shape {header.shape[::-1]}; probabilities are wanted as {wanted[1]}")
        if header.shape != headers[0].shape:
            raise DataError(f"{file}: shape {header.shape[::-1]} differs from {headers[0].shape[::-1]} of {first}")
    classes = len(case.maps) if len(case.maps) > 1 else headers[0].shape[0]
    if classes < 2:
        raise DataError(f"{first}: {classes} class; the probabilities of all classes, background included, are wanted")
    space = headers[0].shape[-3:]
    label = _read_header(case.label)
    shape = label.shape[1:] if len(label.shape) == 4 and label.shape[0] == 1 else label.shape
    if shape != space:
        hint = " (reversed: are the axes of the .npz [C, z, y, x]?)" if shape == space[::-1] else ""
        raise DataError(f"{case.label}: label of shape {shape[::-1]}, but {first} has {space[::-1]}{hint}")
    notes = []
    for file, header in zip(case.maps, headers, strict=True):
        if header.affine is not None and label.affine is not None and not _same_place(header.affine, label.affine):
            notes.append(f"{file}: its affine differs from that of {case.label}; voxels are matched as stored")
            break
    return classes, notes


def _same_place(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    """Equal to a thousandth of a voxel's size; the corner of the grid to a hundredth of a millimetre."""
    size = float(np.abs(second[:3, :3]).max())
    return bool(
        np.allclose(first[:3, :3], second[:3, :3], rtol=0, atol=1e-3 * size)
        and np.allclose(first[:3, 3], second[:3, 3], rtol=0, atol=1e-2)
    )


def _read_header(path: Path) -> _Header:
    if path.suffix == ".npz":
        with naming(path), _open_member(path) as member:
            return _Header(_read_npy_header(path, member)[0], None)
    header = read_header(path)
    return _Header(tuple(int(size) for size in header.get_data_shape()[::-1]), header.get_best_affine())


@contextmanager
def _open_member(path: Path) -> Iterator[Any]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if f"{KEY}.npy" not in names:
            keys = listing([name.removesuffix(".npy") for name in names]) or "nothing"
            raise DataError(f"{path}: has no key {KEY!r}, but {keys}")
        if archive.getinfo(f"{KEY}.npy").compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{path}: compressed in a way that NumPy does not write")  # and that unpacks without bounds
        with archive.open(f"{KEY}.npy") as member:
            yield member


def _read_npy_header(path: Path, member: Any) -> tuple[tuple[int, ...], str, np.dtype[Any]]:
    """Shape, order and type of the array whose bytes follow in ``member``."""
    version = np.lib.format.read_magic(member)
    if version != (1, 0):  # others are for types of another kind, and their headers for any length
        raise DataError(f"{path}: {KEY!r} in version {version[0]}.{version[1]} of NumPy's format; 1.0 is wanted")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype.kind != "f":
        raise DataError(f"{path}: {KEY!r} of type {dtype}; floating-point numbers are wanted")
    if len(shape) != 4:
        raise DataError(f"{path}: {KEY!r} of shape {shape}; [classes, z, y, x] is wanted")
    return shape, "F" if is_fortran else "C", dtype


# --------------------------------------------------------------------------------------------------- slabs


class Slab(NamedTuple):
    """Probabilities float ``[C, dz, y, x]`` and labels int16 ``[dz, y, x]`` of the slices from ``start``."""

    start: int
    probabilities: NDArray[Any]
    label: LabelMap


def read_slabs(case: MapCase, classes: int, ignore_label: int | None, memory: int = MEMORY) -> Iterator[Slab]:
    """The case in slabs of a 32nd of ``memory``, in bytes, from ``z = 0`` on: what is made of a slab may be large.

    ``.nii`` is read slab by slab. What is compressed has no random access: each file is unpacked once, from its
    start to its end, into memory up to a quarter of ``memory``, else into a temporary file (in ``TMPDIR``).
    """
    with ExitStack() as stack:
        budget = memory // 4 // len(case.maps)
        if case.maps[0].suffix == ".npz":
            depth, read = _open_npz(case.maps[0], budget, stack)
        else:
            depth, read = _open_nifti(case.maps, budget, stack)
        truth = stack.enter_context(open_volume(case.label, memory // 8))
        slice_bytes = 4 * classes * int(np.prod(truth.shape[:2]))
        thickness = max(1, memory // 32 // slice_bytes)
        for start in range(0, depth, thickness):
            stop = min(start + thickness, depth)
            with naming(case.label):
                voxels = np.asanyarray(truth[:, :, start:stop]).T.reshape(stop - start, *truth.shape[1::-1])
            label = check_label(voxels, case.label, classes, ignore_label)
            yield Slab(start, _as_float(read(start, stop), case.maps[0]), label)


Read = Callable[[int, int], NDArray[Any]]


def _open_nifti(maps: tuple[Path, ...], budget: int, stack: ExitStack) -> tuple[int, Read]:
    volumes = [stack.enter_context(open_volume(path, budget)) for path in maps]

    def read(start: int, stop: int) -> NDArray[Any]:
        parts = []
        for path, volume in zip(maps, volumes, strict=True):
            with naming(path):
                parts.append(np.asanyarray(volume[:, :, start:stop]).T)
        return parts[0] if len(parts) == 1 else np.stack(parts)

    return int(volumes[0].shape[2]), read


def _open_npz(path: Path, budget: int, stack: ExitStack) -> tuple[int, Read]:
    with naming(path), _open_member(path) as member:
        shape, order, dtype = _read_npy_header(path, member)
        file = stack.enter_context(unpack(member, dtype.itemsize * math.prod(shape), budget))

    def read(start: int, stop: int) -> NDArray[Any]:
        with naming(path):
            return np.asarray(fileslice(file, (slice(None), slice(start, stop)), shape, dtype, order=order))

    return shape[1], read


def _as_float(voxels: NDArray[Any], path: Path) -> NDArray[Any]:
    """float16, float32 and float64 as they are, in the machine's byte order; scaled integers as float32."""
    if voxels.dtype.kind not in "iuf":
        raise DataError(f"{path}: voxels of type {voxels.dtype}; probabilities are wanted")
    name = voxels.dtype.newbyteorder("=").name
    dtype = name if name in ("float16", "float32", "float64") else np.float32
    return np.require(voxels, dtype=dtype, requirements=["C", "W"])  # what a file's buffer gives is not writeable


def explain(error: ValueError, slab: Slab, case: MapCase) -> DataError:
    """What is wrong with the first voxel whose values are no probabilities, in the terms of the file."""
    p = slab.probabilities.astype(np.float64)
    total, least = p.sum(0), p.min(0)
    with np.errstate(invalid="ignore"):
        bad = ~np.isnan(total) & ~((np.abs(total - 1) <= 1e-3) & (least >= -1e-3))
    if not bad.any():
        return DataError(f"{case.maps[0]}: {error}")
    z, y, x = (int(index[0]) for index in np.nonzero(bad))
    return DataError(
        f"{case.maps[0]}: the {len(p)} probabilities of voxel (x, y, z) = ({x}, {y}, {slab.start + z}) sum to"
        f" {total[z, y, x]:.4g}, the smallest is {least[z, y, x]:.4g}; probabilities that sum to 1 are wanted"
        " (not logits, not independent regions)"
    )


def class_names_of(
    dataset_json: Path | None, probabilities: Path, labels: Path
) -> tuple[tuple[str, ...], int | None] | None:
    """Class names and ignore label of the ``dataset.json`` given or found beside the maps; None without one."""
    places = (labels / "dataset.json", labels.parent / "dataset.json", probabilities / "dataset.json")
    for path in places if dataset_json is None else (dataset_json,):
        if dataset_json is not None or path.is_file():
            return read_class_names(path)
    return None


# ------------------------------------------------------------------------------------------- soft labels

SOFT_LABEL_STEPS = 65535
"""Soft labels are written as uint16 of this many steps; the NIfTI header's slope makes them probabilities."""


def soft_labels_path(folder: Path, name: str) -> Path:
    """The soft labels of the case of that name."""
    return folder / f"{name}.nii.gz"


def soft_labels_file(soft_labels: Volume, like: Path) -> bytes:
    """A gzipped 4-D NIfTI file, ``[x, y, z, classes]`` in uint16, placed in space as the file ``like``."""
    steps = np.rint(np.moveaxis(soft_labels, 0, -1).astype(np.float64) * SOFT_LABEL_STEPS).astype(np.uint16)
    return volume_file(steps, like, slope=1 / SOFT_LABEL_STEPS)


def probabilities_file(probabilities: Volume, like: Path) -> bytes:
    """A gzipped 4-D NIfTI file of float32 ``[classes, x, y, z]``, unrounded, placed in space as the file ``like``."""
    return volume_file(np.moveaxis(probabilities, 0, -1), like)


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
