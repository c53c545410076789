"""Run folders: atomic writing of files, the rule by which a run is resumed, progress, and errors.

Training, soft labels, prediction, evaluation and the demo each write their results to one folder, and all follow the
rule of :class:`RunFolder`.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calseg.errors import CalsegError

Progress = Callable[[str, int, int, float | None], None]
"""Called as ``progress(stage, done, total, loss)``; ``stage`` is a word such as "read", "train" or "evaluate"."""


def no_progress(stage: str, done: int, total: int, loss: float | None) -> None:
    """Report nothing. This is the default of every argument ``progress``."""


# ------------------------------------------------------------------------------------------------ errors


class RunError(CalsegError):
    """A run cannot start or continue, because a setting is out of range or the folder does not allow it."""


class RunInterruptedError(Exception):
    """A signal stopped a run, and the results so far are kept on disk. ``code`` is the exit code of a shell for it."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = 128 + signal_number


class CasesInterruptedError(RunInterruptedError):
    """Ctrl-C stopped a run that goes case by case. The finished cases are kept in ``place``."""

    def __init__(self, place: Path, done: int, total: int) -> None:
        super().__init__(f"interrupted after {done} of {total} cases, which are kept in {place}", signal.SIGINT)


# ------------------------------------------------------------------------------------------------- files


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file completely, or leave an existing one unchanged.

    The content goes to a temporary file, which is flushed to disk and then renamed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        kept = "; the previous one is kept" if path.exists() else ""
        raise RunError(f"{path}: cannot be written ({error.strerror or error}){kept}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, atomically. NaN and infinity raise ``ValueError``, because JSON has neither."""
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. A :class:`RunError` that names the file is raised if that fails."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not readable as JSON ({error})") from error


# ------------------------------------------------------------------------------------------- resume rule


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, and the rule by which a run starts or continues in it.

    ========================== ================================= ======================================
    the folder                 ``resume``                        neither ``resume`` nor ``overwrite``
    ========================== ================================= ======================================
    is missing or empty        refused: there is no run          a new run starts
    holds the file ``state``   the run goes on, if its settings  refused: not empty
                               are the same
    holds other files          refused: there is no run          refused: not empty
    ========================== ================================= ======================================

    With ``overwrite``, the files of the earlier run are removed and a new run starts. Other files in the folder stay.

    Call :meth:`open` first. If it returns True, compare the settings of the earlier run by :meth:`check_same_settings`,
    and its data by :meth:`check_same_data`.

    Attributes:
        path: The folder.
        state: Name of the file whose presence says that a run was started here.
        files: Patterns (of ``Path.glob``, relative to ``path``) of every file that belongs to the run.
        folders: Folders within ``path`` that the run needs. :meth:`open` makes them.
        continued_by: Name of the command, if it continues its run whenever it is started again, as "calseg demo" does.
            Empty if the user has to ask for that with ``--resume``.
    """

    path: Path
    state: str
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    continued_by: str = ""

    @property
    def state_path(self) -> Path:
        """Path of the file whose presence says that a run was started here."""
        return self.path / self.state

    @property
    def holds_run(self) -> bool:
        """Whether the folder holds a run that can be resumed."""
        return self.state_path.is_file()

    def open(self, *, resume: bool = False, overwrite: bool = False) -> bool:
        """Prepare the folder by the rule above, and return whether an earlier run continues.

        Raises:
            RunError: the rule does not allow the run.
        """
        if resume and overwrite:
            raise RunError("--resume and --overwrite exclude each other")
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: exists and is not a folder")
        resume = resume or (bool(self.continued_by) and self.holds_run and not overwrite)
        if resume and not self.holds_run:
            raise RunError(f"{self.state_path}: not found; there is no run to resume in {self.path}")
        if not (resume or overwrite) and self.path.is_dir() and any(self.path.iterdir()):
            raise RunError(f"{self.path}: {self._not_empty()}")
        try:
            for folder in (".", *self.folders):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            self._clear(leftovers_only=resume)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be made ready ({error.strerror or error})") from error
        return resume

    def _not_empty(self) -> str:
        """Return the message for a folder that is not empty."""
        if self.continued_by:
            return f"not empty and not made by {self.continued_by}; give --overwrite or another --out"
        return "not empty; give --resume to continue the run in it, or --overwrite to start anew"

    def _clear(self, *, leftovers_only: bool) -> None:
        """Remove the files of the run, or only the temporary files that a killed process left."""
        for pattern in {self.state, *self.files}:
            folder, _, name = pattern.rpartition("/")
            beside = f"{folder}/" if folder else ""
            for wanted in (f"{beside}.{name}.*.tmp",) if leftovers_only else (f"{beside}.{name}.*.tmp", pattern):
                for file in self.path.glob(wanted):
                    file.unlink()

    def check_same_settings(self, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """Raise :class:`RunError` if settings differ from those of the saved run. The message names each difference.

        Args:
            saved: settings that were read from the files of the run.
            wanted: settings that the run would write now, in the types of JSON (:func:`as_json`).
        """
        changed = "; ".join(
            f"{name} is {value!r} but was {saved.get(name)!r}"
            for name, value in wanted.items()
            if value != saved.get(name)
        )
        if changed and self.continued_by:
            what = self.continued_by.removeprefix("calseg ")
            raise RunError(
                f"{self.path}: holds a {what} with other settings ({changed}); give --overwrite or another --out"
            )
        if changed:
            raise RunError(f"{self.state_path}: cannot be resumed with other settings: {changed}")

    def check_same_data(self, saved: Mapping[str, Any], wanted: Mapping[str, Any], names: Mapping[str, str]) -> None:
        """Raise :class:`RunError` if data differ from those of the saved run.

        Args:
            saved: content of the files of the run.
            wanted: content that the run would write now.
            names: the entries that must be equal, with words for the message, as in ``{"split": "the split of DATA"}``.
        """
        for key, words in names.items():
            if saved.get(key) != wanted[key]:
                raise RunError(f"{self.state_path}: cannot be resumed on other data: {words} changed since")


def as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``content`` as it would be read from a JSON file, with lists instead of tuples."""
    return dict(json.loads(json.dumps(content)))
