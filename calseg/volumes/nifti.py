"""NIfTI files: reading voxels and headers, and making files. A problem with a file raises :class:`DataError`.

Axes are those of nibabel, ``(x, y, z)``, and channels or classes come last on disk.
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
from pathlib import Path
from typing import IO, Any, cast

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.imageglobals import LoggingOutputSuppressor
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
        yield ArrayProxy(file, header)


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


def read_volume(path: Path) -> NDArray[Any]:
    """The voxels of a NIfTI file, scaled as it says. Gzip is read to its end: the checksum is verified."""
    with open_volume(path) as voxels, naming(path):
        return np.asanyarray(voxels)


# ----------------------------------------------------------------------------------------------- writing


def volume_file(voxels: NDArray[Any], like: Path, *, slope: float | None = None) -> bytes:
    """Return a gzipped NIfTI file of ``voxels[x, y, z]`` or ``[x, y, z, C]`` with the affine of the file ``like``.

    A reader of the file multiplies its numbers by ``slope``, if that is given.
    """
    image = nibabel.Nifti1Image(voxels, nibabel.load(like).affine)  # type: ignore[attr-defined]
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    return gzip.compress(image.to_bytes(), 3, mtime=0)
