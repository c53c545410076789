"""Probability maps on disk, which are read in slabs together with their label maps, and files of soft labels.

A case has the name of its label map. Its probability map has one of three forms:

- ``case.nii.gz`` or ``case.nii``: a 4-D file ``[x, y, z, C]``, or ``[x, y, C]`` for a label of one slice.
- ``case_0000.nii.gz``, ``case_0001.nii.gz``, ...: a 3-D file per class.
- ``case.npz`` with the key ``probabilities``: an array ``[C, z, y, x]``, as nnU-Net's ``--save_probabilities`` writes
  it. Its axes are in reverse order to those of nibabel. nnU-Net also writes the segmentation ``case.nii.gz`` beside it,
  which is not read.

In memory, arrays are ``[C, z, y, x]``, which is the order of all three forms on disk. A slab is a range of ``z``, the
slowest spatial axis. If a file is wrong, a :class:`~calseg.volumes.nifti.DataError` is raised, which names the file.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nibabel.fileslice import fileslice
from numpy.typing import NDArray

from calseg.errors import listing
from calseg.volumes.datasets import IGNORE_INDEX, LabelMap, Volume, check_label, read_class_names
from calseg.volumes.nifti import (
    DataError,
    Grid,
    axes,
    match,
    naming,
    open_volume,
    part_of,
    read_grid,
    read_header,
    read_volume,
    step_of,
    turned,
    unpack,
    volume_file,
)

NIFTI = re.compile(r"\.nii(\.gz)?$")
CHANNEL = re.compile(r"_(\d{4})$")
KEY = "probabilities"
MEMORY = 1 << 29


@dataclass(frozen=True)
class MapCase:
    """The files of a probability map and its label map."""

    name: str
    maps: tuple[Path, ...]
    label: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the case."""
        return (*self.maps, self.label)


# ------------------------------------------------------------------------------------------------- folders


def find_map_cases(probabilities: Path, labels: Path) -> tuple[list[MapCase], list[str]]:
    """Return the cases of the folder ``probabilities``, and the names of label maps without a case, sorted by name."""
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
        if len(read_grid(whole[name]).shape) == 3:  # nnU-Net's segmentation
            del whole[name]
    found: dict[str, tuple[Path, ...]] = {}
    for name in sorted({*whole, *packed, *channels}):
        if sum(name in form for form in (whole, packed, channels)) > 1:
            raise DataError(f"{probabilities}: holds the case {name!r} in more than one form; keep one of them")
        if name in channels:
            numbers = channels[name]
            if name not in truth:
                file = numbers[min(numbers)]
                label = NIFTI.sub("", file.name)
                raise DataError(
                    f"{file}: no label map {label}.nii.gz in {labels}, nor {name}.nii.gz for a file per class"
                )
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
    return cases, sorted(name for name in truth if name not in found)


def _nifti_files(folder: Path) -> dict[str, Path]:
    """Return the NIfTI files of a folder by their names without ending."""
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


def check_headers(case: MapCase) -> tuple[int, list[str]]:
    """Return the number of classes of a case, and notes on what is unusual. Only the headers of its files are read.

    Raises :class:`~calseg.volumes.nifti.DataError` where shapes or orientations do not fit.
    """
    grids, label = _grids(case)
    first, notes = grids[0], []
    for grid in grids:
        if len(grid.shape) != (3 if len(grids) > 1 else 4) or 0 in grid.shape:
            if grid.path.suffix == ".npz":
                raise DataError(f"{grid.path}: {KEY!r} of shape {grid.shape[::-1]}; [classes, z, y, x] is wanted")
            wanted = "a 3-D file per class" if len(grids) > 1 else "4-D [x, y, z, classes]"
            raise DataError(f"{grid.path}: shape {grid.shape}; probabilities are wanted as {wanted}")
        if grid.shape != first.shape:
            raise DataError(f"{grid.path}: shape {grid.shape} differs from {first.shape} of {first.path}")
        if match(grid, first).turn is not None:
            raise DataError(f"{grid.path}: stored with other axes than {first.path}; the classes are wanted alike")
    classes = len(grids) if len(grids) > 1 else first.shape[3]
    if classes < 2:
        raise DataError(
            f"{first.path}: {classes} class; the probabilities of all classes, background included, are wanted"
        )
    turn, is_odd = match(label, first)
    shape = label.shape if turn is None else tuple(label.shape[int(axis)] for axis in np.argsort(turn[:, 0]))
    if shape != first.shape[:3]:
        hint = " (reversed: are the axes of the .npz [C, z, y, x]?)" if shape == first.shape[2::-1] else ""
        raise DataError(f"{case.label}: label of shape {shape}, but {first.path} has {first.shape[:3]}{hint}")
    if turn is not None:
        notes.append(f"{case.name}: the label map is turned to the axes {axes(first)} of the probability map")
    if is_odd:
        notes.append(
            f"{case.name}: the affine of the label map differs from that of the probability map; voxels are matched as"
            " stored"
        )
    return classes, notes


def _read_grid(path: Path) -> Grid:
    if path.suffix == ".npz":
        with naming(path), _open_member(path) as member:
            return Grid(path, _read_npy_header(path, member)[0][::-1])
    return read_grid(path)


def _grids(case: MapCase) -> tuple[list[Grid], Grid]:
    """The grids of the maps and of the label of a case.

    The fourth axis of a label is left out if there is one value per voxel. Where the label is a single slice, a map
    ``[x, y, C]`` is that of one.
    """
    maps, label = [_read_grid(file) for file in case.maps], read_grid(case.label)
    if label.shape[3:] == (1,):
        label = replace(label, shape=label.shape[:3])
    shape = maps[0].shape
    if len(maps) == 1 and len(shape) == 3 and shape[2] > 1 and label.shape == (*shape[:2], 1):
        maps = [replace(maps[0], shape=(*label.shape, shape[2]))]
    return maps, label


@contextmanager
def _open_member(path: Path) -> Iterator[Any]:
    """Open the array of probabilities within a ``.npz`` file."""
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
    """Return shape, memory order and dtype of an array, and leave ``member`` at its first byte."""
    version = np.lib.format.read_magic(member)
    if version != (1, 0):  # others are for types of another kind, and their headers for any length
        raise DataError(f"{path}: {KEY!r} in version {version[0]}.{version[1]} of NumPy's format; 1.0 is wanted")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype.kind != "f":
        raise DataError(f"{path}: {KEY!r} of type {dtype}; floating-point numbers are wanted")
    return shape, "F" if is_fortran else "C", dtype


# --------------------------------------------------------------------------------------------------- slabs


class Slab(NamedTuple):
    """Probabilities, float ``[C, dz, y, x]``, of the slices from ``start`` on, and their labels.

    ``around`` is the labels, int16 ``[dz + margins, y, x]``, with some slices on either side, ``margin`` before.
    """

    start: int
    probabilities: NDArray[Any]
    around: LabelMap
    margin: int

    @property
    def label(self) -> LabelMap:
        """The labels of the slab, ``[dz, y, x]``."""
        return self.around[self.margin : self.margin + self.probabilities.shape[1]]


def read_slabs(
    case: MapCase, classes: int, ignore_label: int | None, memory: int = MEMORY, *, margin: int = 0
) -> Iterator[Slab]:
    """Read a case in slabs, from ``z = 0`` on, with the labels of up to ``margin`` slices on either side of each.

    A slab has 1/32 of ``memory``, in bytes, because the caller may need much more memory to process it. A ``.nii`` file
    is read slab by slab. A compressed file has no random access. It is unpacked once, into memory if its size is at
    most a quarter of ``memory``, else into a temporary file (in ``TMPDIR``).
    """
    grids, label_grid = _grids(case)
    with ExitStack() as stack:
        budget = memory // 4 // len(case.maps)
        if case.maps[0].suffix == ".npz":
            depth, read = _open_npz(case.maps[0], grids[0].shape, budget, stack)
        else:
            depth, read = _open_nifti(case.maps, grids[0].shape, budget, stack)
        truth = stack.enter_context(open_volume(case.label, memory // 8))
        truth = truth.reshape(truth.shape[:3])
        turn = match(label_grid, grids[0]).turn
        step = step_of(read_header(case.label))
        slice_bytes = 4 * classes * math.prod(truth.shape) // depth
        thickness = max(1, memory // 32 // slice_bytes)
        for start in range(0, depth, thickness):
            stop = min(start + thickness, depth)
            before, after = max(start - margin, 0), min(stop + margin, depth)
            part = part_of(truth.shape, turn, before, after)
            with naming(case.label):
                voxels = np.asanyarray(truth[part])
            first = tuple(each.start for each in part)
            around = turned(check_label(voxels, case.label, classes, ignore_label, step, first), turn).T
            yield Slab(start, _as_float(read(start, stop), case.maps[0]), around, start - before)


Read = Callable[[int, int], NDArray[Any]]


def _open_nifti(maps: tuple[Path, ...], shape: tuple[int, ...], budget: int, stack: ExitStack) -> tuple[int, Read]:
    """Open NIfTI files, and return the number of slices and a function that reads a range of them."""
    volumes = [stack.enter_context(open_volume(path, budget)).reshape(shape) for path in maps]

    def read(start: int, stop: int) -> NDArray[Any]:
        parts = []
        for path, volume in zip(maps, volumes, strict=True):
            with naming(path):
                parts.append(np.asanyarray(volume[:, :, start:stop]).T)
        return parts[0] if len(parts) == 1 else np.stack(parts)

    return shape[2], read


def _open_npz(path: Path, shape: tuple[int, ...], budget: int, stack: ExitStack) -> tuple[int, Read]:
    """Do as :func:`_open_nifti` for a ``.npz`` file."""
    with naming(path), _open_member(path) as member:
        _, order, dtype = _read_npy_header(path, member)
        file = stack.enter_context(unpack(member, dtype.itemsize * math.prod(shape), budget))

    def read(start: int, stop: int) -> NDArray[Any]:
        with naming(path):
            return np.asarray(fileslice(file, (slice(None), slice(start, stop)), shape[::-1], dtype, order=order))

    return shape[2], read


def _as_float(voxels: NDArray[Any], path: Path) -> NDArray[Any]:
    """Return probabilities in the byte order of the machine. Floats keep their dtype, and integers become float32."""
    if voxels.dtype.kind not in "iuf":
        raise DataError(f"{path}: voxels of type {voxels.dtype}; probabilities are wanted")
    name = voxels.dtype.newbyteorder("=").name
    dtype = name if name in ("float16", "float32", "float64") else np.float32
    return np.require(voxels, dtype=dtype, requirements=["C", "W"])  # "W": the buffer of a file is read-only


def sum_tolerance(classes: int) -> float:
    """By how much the probabilities of a voxel may miss 1 in sum where a file holds rounded ones.

    One step of 8 bits for every class: rounding down takes as much off a class, and rounding to 8 bits or to three
    decimals half of it. The probabilities are then divided by their sum.
    """
    return classes / 255


def normalised(slab: Slab) -> Slab | None:
    """The slab with probabilities that were rounded divided by their sums; None where more is wrong with one."""
    p = slab.probabilities.astype(np.float32)
    total = p.sum(0)
    with np.errstate(invalid="ignore"):
        is_off = (np.abs(total - 1) > 1e-3) & (slab.label != IGNORE_INDEX)
    if not (p[:, is_off] >= 0).all() or not (np.abs(total[is_off] - 1) <= sum_tolerance(len(p))).all():
        return None
    p[:, is_off] /= total[is_off]
    return slab._replace(probabilities=p)


def explain(error: ValueError, slab: Slab, case: MapCase) -> DataError:
    """Return an error that names the file and the first voxel whose values are no probabilities."""
    p = slab.probabilities.astype(np.float64)
    total, least = p.sum(0), p.min(0)
    with np.errstate(invalid="ignore"):
        bad = ~((np.abs(total - 1) <= sum_tolerance(len(p))) & (least >= -1e-3))
    bad &= ~np.isnan(total) & (slab.label != IGNORE_INDEX)
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
) -> tuple[tuple[str, ...] | None, int | None]:
    """Class names and ignore label of the ``dataset.json`` given or found beside the maps; None where it has none."""
    places = (labels / "dataset.json", labels.parent / "dataset.json", probabilities / "dataset.json")
    for path in places if dataset_json is None else (dataset_json,):
        if dataset_json is not None or path.is_file():
            return read_class_names(path)
    return None, None


# ------------------------------------------------------------------------------------------- soft labels

SOFT_LABEL_STEPS = 65535
"""Number of steps from 0 to 1 in files of soft labels, which hold uint16. The slope in the header is its inverse."""


def soft_labels_path(folder: Path, name: str) -> Path:
    """Return the path of the soft labels of a case."""
    return folder / f"{name}.nii.gz"


def soft_labels_file(soft_labels: Volume, like: Path) -> bytes:
    """Return a gzipped 4-D NIfTI file, uint16 ``[x, y, z, classes]``, with the affine of the file ``like``."""
    steps = np.rint(np.moveaxis(soft_labels, 0, -1).astype(np.float64) * SOFT_LABEL_STEPS).astype(np.uint16)
    return volume_file(steps, like, slope=1 / SOFT_LABEL_STEPS)


def probabilities_file(probabilities: Volume, like: Path) -> bytes:
    """Return a gzipped 4-D NIfTI file, float32 ``[x, y, z, classes]``, with the affine of the file ``like``."""
    return volume_file(np.moveaxis(probabilities, 0, -1), like)


def read_soft_labels(path: Path, label: LabelMap, classes: int, like: Path | None = None) -> Volume:
    """float32 ``[classes, x, y, z]`` that sum to 1 where ``label`` is not ignored, and are 0 where it is.

    Where ``like`` is given, the axes are turned to those of that file.
    """
    voxels = read_volume(path, like)
    if voxels.ndim == 3 and label.shape[2] == 1:
        voxels = voxels[:, :, None]
    wanted = (*label.shape, classes)
    if voxels.shape != wanted or voxels.dtype.kind not in "iuf":
        raise DataError(f"{path}: soft labels of shape {voxels.shape} and type {voxels.dtype}; {wanted} is wanted")
    soft = np.ascontiguousarray(np.moveaxis(voxels, -1, 0), dtype=np.float32)
    total = soft.sum(0)
    counts = label != IGNORE_INDEX
    # NaN fails both comparisons.
    if not ((soft >= 0).all() and (np.abs(total[counts] - 1) <= sum_tolerance(classes)).all()):
        raise DataError(f"{path}: soft labels must be probabilities that sum to 1 in every labelled voxel")
    return np.asarray(soft * np.where(counts, 1 / np.where(counts, total, 1), 0).astype(np.float32))
