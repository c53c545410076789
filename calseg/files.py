"""Files that are written whole or not at all, JSON, and fingerprints of files that are read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calseg.errors import RunError, brief


@contextmanager
def failing(path: Path, done: str) -> Iterator[None]:
    """Turns a failure of the operating system into a :class:`RunError`: ``path`` cannot be ``done``."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be {done} ({error.strerror or error})") from error


TEMPORARY = re.compile(r"\.calseg\.\d+\.tmp")
"""Names of temporary files. They are no longer for a longer file name; a process that was killed leaves one."""


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a whole file or leave the old one as it was: temporary file, flush to disk, rename."""
    temporary = path.with_name(f".calseg.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # "x" does not follow a link that has the temporary file's name
            file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        kept = "; the previous one is kept" if path.exists() else ""
        raise RunError(f"{path}: cannot be written ({error.strerror or error}){kept}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, atomically. NaN and infinity, which JSON lacks, raise ``ValueError``."""
    write_atomic(path, _json(content))


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Read a JSON file. A :class:`RunError` that names the file is raised if that fails."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: not readable as JSON ({brief(error)})") from error


def as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` after a trip through JSON: tuples become lists, so that it compares with what a file holds."""
    return dict(json.loads(json.dumps(content)))


@dataclass(frozen=True)
class InputFile:
    """A file that a run reads.

    Attributes:
        path: The file.
        key: Its name within the run's inputs, which stays when the folder of inputs is moved.
        fingerprint: Text that is another one when the file's content has changed.
    """

    path: Path
    key: str
    fingerprint: str


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with failing(path, "read"), open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"sha256 {digest.hexdigest()}"


def file_stamp(path: Path) -> str:
    """The size of a file and the time of its last change, for files that are too large to read for a comparison."""
    with failing(path, "read"):
        status = path.stat()
    return f"{status.st_size} bytes, changed at {status.st_mtime_ns} ns"
