"""NIfTI files: reading voxels and headers, and making files. A problem with a file raises :class:`DataError`.

Axes are nibabel's, ``(x, y, z)``, and channels or classes come last on disk. An image of two dimensions is one slice.
The fifth axis, where ITK puts the components of vectors, is the fourth here.
"""

from __future__ import annotations

import errno
import gzip
import io
import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from numpy.typing import NDArray

from calseg.errors import CalsegError


class DataError(CalsegError):
    """A file or folder of the user is missing, cannot be read, or has the wrong content."""


# ----------------------------------------------------------------------------------------------- reading


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn any exception from reading a file into a :class:`DataError` that names the file."""
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
    except Exception as error:  # nibabel raises many kinds of exceptions for a broken header
        kind = "NumPy .npz" if path.name.endswith(".npz") else "NIfTI"
        raise DataError(f"{path}: not a readable {kind} file ({type(error).__name__}: {error})") from error


@contextmanager
def open_volume(path: Path, max_bytes: int | None = None) -> Iterator[ArrayProxy]:
    """The voxels of a NIfTI file, scaled as its header says, which are read when the result is sliced.

    gzip has no random access: a ``.nii.gz`` is unpacked once, so that its checksum is verified. It is kept in memory;
    one of more than ``max_bytes`` goes to a temporary file, which is gone at the end.
    """
    with ExitStack() as stack:
        with naming(path):
            if path.name.endswith(".gz"):
                with gzip.open(path) as packed:
                    start = packed.read(HEADER_BYTES)
                    header = _parse(start, path)
                    file = stack.enter_context(unpack(packed, _size_of(header), max_bytes, start))
            else:
                file = stack.enter_context(open(path, "rb"))
                header = _parse(file.read(HEADER_BYTES), path)
                size, wanted = file.seek(0, os.SEEK_END), _size_of(header)
                if size < wanted:
                    raise EOFError(f"{size} of {wanted} bytes")
        proxy = ArrayProxy(file, header)
        shape = shape_of(header)
        yield proxy if proxy.shape == shape else proxy.reshape(shape)


def read_header(path: Path) -> Any:
    """The header of a NIfTI file without its extensions; of the voxels nothing is read."""
    with naming(path), (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
        return _parse(file.read(HEADER_BYTES), path)


HEADER_BYTES = 540
"""Size of the header of NIfTI-2; that of NIfTI-1 has 348 bytes."""


def _parse(start: bytes, path: Path) -> Any:
    """The header of the file that begins with ``start``; its first number is its size."""
    is_nifti2 = start[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")
    kind = nibabel.Nifti2Header if is_nifti2 else nibabel.Nifti1Header
    with LoggingOutputSuppressor():  # of remarks on fields that are not used
        header: Any = kind(start[: kind.sizeof_hdr])
    if header["magic"].item() == kind.pair_magic:
        raise DataError(f"{path}: a header alone, whose voxels are in another file; wanted is a single file")
    if header["vox_offset"] == 0:  # left out, as some programs do
        header["vox_offset"] = kind.single_vox_offset
    shape = header.get_data_shape()
    if min(shape, default=0) < 0:
        raise DataError(f"{path}: shape {shape}")
    return header


def shape_of(header: Any) -> tuple[int, ...]:
    """The shape of a volume: ``(x, y, z)``, or ``(x, y, z, values)``."""
    shape = tuple(int(size) for size in header.get_data_shape())
    if len(shape) == 2:
        return (*shape, 1)
    return (*shape[:3], *shape[4:]) if len(shape) == 5 and shape[3] == 1 else shape


def step_of(header: Any) -> float:
    """The distance between neighbouring values of whole numbers that the header scales; 0 where nothing is scaled."""
    slope, _ = header.get_slope_inter()
    return abs(float(slope)) if slope is not None and header.get_data_dtype().kind in "iu" else 0.0


def _size_of(header: Any) -> int:
    """The bytes of a file with that header."""
    return int(header.get_data_offset() + header.get_data_dtype().itemsize * math.prod(header.get_data_shape()))


def unpack(packed: Any, size: int, max_bytes: int | None = None, start: bytes = b"") -> IO[bytes]:
    """The content of a compressed stream of ``size`` bytes, of which ``start`` has been read already.

    A stream that holds more is refused, and unpacked no further. What is unpacked lies in memory, or in a temporary
    file if it is more than ``max_bytes``.
    """
    is_small = max_bytes is None or size <= max_bytes
    file: Any = io.BytesIO() if is_small else tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
    try:
        file.write(start)
        while file.tell() < size and (chunk := packed.read(min(size - file.tell(), 1 << 20))):
            file.write(chunk)
        if file.tell() < size:
            raise EOFError(f"{file.tell()} of {size} bytes")
        if file.tell() > size or packed.read(1):  # at its end the stream's checksum is verified
            raise OSError(f"it unpacks to more than the {size} bytes that its header says")
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return cast("IO[bytes]", file)


def read_volume(path: Path, like: Path | None = None) -> NDArray[Any]:
    """The voxels of a NIfTI file, scaled as it says. Gzip is read to its end: the checksum is verified.

    Where ``like`` is given, the axes are turned to those of that file (:func:`match`).
    """
    with open_volume(path) as proxy, naming(path):
        voxels = np.asanyarray(proxy)
    return voxels if like is None else turned(voxels, match(read_grid(path), read_grid(like)).turn)


# ----------------------------------------------------------------------------------------------- orientation


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a file lie.

    Attributes:
        path: The file.
        shape: Its axes, ``(x, y, z)`` first.
        affine: From voxel indices to millimetres; None where the file does not say.
        is_placed: Whether the affine tells of the body: not where the header gives no coordinates, and not for the
            identity, which programs write that know of no coordinates.
    """

    path: Path
    shape: tuple[int, ...]
    affine: NDArray[np.float64] | None = None
    is_placed: bool = False


Turn = NDArray[np.float64]
"""For each axis of an array the axis that it becomes, and -1 where it is mirrored: an orientation of nibabel's."""


class Match(NamedTuple):
    """How the voxels of one file are matched with those of another: after ``turn``, and whether affines differ then."""

    turn: Turn | None = None
    is_odd: bool = False


def read_grid(path: Path) -> Grid:
    """The grid of a NIfTI file."""
    header = read_header(path)
    affine = np.asarray(header.get_best_affine(), np.float64)
    is_placed = bool(header["sform_code"] or header["qform_code"]) and not np.array_equal(affine, np.eye(4))
    is_placed = is_placed and bool(np.isfinite(affine).all()) and abs(float(np.linalg.det(affine[:3, :3]))) > 1e-12
    return Grid(path, shape_of(header), affine, is_placed)


def match(own: Grid, other: Grid) -> Match:
    """The turn that puts the voxels of ``own`` onto the grid ``other``, without any loss.

    Affines are the same to a thousandth of a voxel's size, and the corner of the grid to a hundredth of a millimetre.
    Where they differ otherwise, voxels are matched as they are stored, which is odd. A file that is stored in another
    orientation, but not on the same grid, is refused: to match its voxels as stored would be to mirror them.
    """
    if own.affine is None or other.affine is None or _same_place(own.affine, other.affine):
        return Match()
    if not (own.is_placed and other.is_placed):
        return Match(is_odd=True)
    turn = io_orientation(np.linalg.inv(other.affine) @ own.affine)
    if np.isnan(turn).any() or np.array_equal(turn, NOT_TURNED):
        return Match(is_odd=True)
    shape = tuple(int(own.shape[axis]) for axis in np.argsort(turn[:, 0]))
    if shape != other.shape[:3] or not _same_place(own.affine @ inv_ornt_aff(turn, own.shape[:3]), other.affine):
        raise DataError(
            f"{own.path}: stored with the axes {axes(own)}, where {other.path} has {axes(other)}, and not on the same"
            " grid; resample one to the other, or mend the header that is wrong"
        )
    return Match(turn)


NOT_TURNED = np.array([[0, 1], [1, 1], [2, 1]])


def axes(grid: Grid) -> str:
    """The directions of the axes, as in RAS: to the right, to the front, upwards."""
    assert grid.affine is not None
    return "".join(nibabel.aff2axcodes(grid.affine))


def _same_place(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    size = float(np.abs(second[:3, :3]).max())
    return bool(
        np.allclose(first[:3, :3], second[:3, :3], rtol=0, atol=1e-3 * size)
        and np.allclose(first[:3, 3], second[:3, 3], rtol=0, atol=1e-2)
    )


def turned(voxels: NDArray[Any], turn: Turn | None) -> NDArray[Any]:
    """``voxels[x, y, z, ...]`` after a turn."""
    return voxels if turn is None else np.asarray(apply_orientation(voxels, turn))


def part_of(shape: tuple[int, ...], turn: Turn | None, start: int, stop: int) -> tuple[slice, ...]:
    """The part of a volume of that shape that becomes the slices from ``start`` to ``stop`` along z after a turn."""
    axis = 2 if turn is None else int(np.flatnonzero(turn[:, 0] == 2)[0])
    if turn is not None and turn[axis, 1] < 0:
        start, stop = shape[axis] - stop, shape[axis] - start
    part = [slice(0, size) for size in shape]
    part[axis] = slice(start, stop)
    return tuple(part)


# ----------------------------------------------------------------------------------------------- writing


def volume_file(voxels: NDArray[Any], like: Path, *, slope: float | None = None) -> bytes:
    """Return a gzipped NIfTI file of ``voxels[x, y, z]`` or ``[x, y, z, C]`` with the affine of the file ``like``.

    A reader of the file multiplies its numbers by ``slope``, if that is given.
    """
    image = nibabel.Nifti1Image(voxels, read_grid(like).affine)
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    return gzip.compress(image.to_bytes(), 3, mtime=0)
