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
def open_volume(path: Path, max_bytes: int | None = None) -> Iterator[Any]:
    """Open a NIfTI file as a nibabel image whose voxels are read when its ``dataobj`` is sliced.

    gzip has no random access. So a ``.nii.gz`` is unpacked once, to its end, which also verifies its checksum. It is
    kept in memory, or in a temporary file if it has more than ``max_bytes`` bytes. That file is removed at the end.
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
    """Return the header of a NIfTI file, without reading voxels."""
    with naming(path), (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
        start = file.read(540)
        return _kind_of(start).header_class.from_fileobj(io.BytesIO(start))


def _kind_of(start: bytes) -> Any:
    """Return the nibabel class of a file that begins with ``start``, the size of its header.

    The size is 348 for NIfTI version 1 and 540 for version 2.
    """
    is_nifti2 = start[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")
    return nibabel.Nifti2Image if is_nifti2 else nibabel.Nifti1Image


def unpack(packed: Any, max_bytes: int | None = None) -> IO[bytes]:
    """Unpack a compressed stream into memory, or into a temporary file if it has more than ``max_bytes`` bytes."""
    file: Any = io.BytesIO()
    while chunk := packed.read(1 << 20):
        if isinstance(file, io.BytesIO) and max_bytes is not None and file.tell() + len(chunk) > max_bytes:
            memory, file = file, tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
            file.write(memory.getbuffer())
        file.write(chunk)
    file.seek(0)
    return cast("IO[bytes]", file)


def read_volume(path: Path) -> NDArray[Any]:
    """Return the voxels of a NIfTI file, scaled as its header says. The checksum of a gzip file is verified."""
    with open_volume(path) as nifti, naming(path):
        return np.asanyarray(nifti.dataobj)


# ----------------------------------------------------------------------------------------------- writing


def volume_file(voxels: NDArray[Any], like: Path, *, slope: float | None = None) -> bytes:
    """Return a gzipped NIfTI file of ``voxels[x, y, z]`` or ``[x, y, z, C]`` with the affine of the file ``like``.

    A reader of the file multiplies its numbers by ``slope``, if that is given.
    """
    image = nibabel.Nifti1Image(voxels, nibabel.load(like).affine)  # type: ignore[attr-defined]
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    return gzip.compress(image.to_bytes(), 3, mtime=0)
