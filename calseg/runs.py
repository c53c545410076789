"""Folders of results: the files that a run owns, its lock, the rule by which it is resumed; progress and errors.

Training, soft labels, prediction, evaluation and the demo each write one folder, and all follow the rule of
:class:`RunFolder`. Every file is written whole or not at all. This module imports nothing else of calseg.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from calseg.errors import RunError, brief, listing
from calseg.files import (
    TEMPORARY,
    InputFile,
    _json,
    as_json,
    failing,
    read_json,
    write_atomic,
)

Progress = Callable[[str, int, int, float | None], None]
"""Called as ``progress(stage, done, total, loss)``; ``stage`` is a word such as "read", "train" or "evaluate"."""


def no_progress(stage: str, done: int, total: int, loss: float | None) -> None:
    """Report nothing. This is the default of every argument ``progress``."""


# ------------------------------------------------------------------------------------------------ errors


class RunInterruptedError(Exception):
    """A signal stopped a run, and the results so far are kept on disk. ``code`` is the exit code of a shell for it."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = 128 + signal_number


class CasesInterruptedError(RunInterruptedError):
    """Ctrl-C stopped a run that goes case by case. The finished cases are kept in ``place``."""

    def __init__(self, place: Path, done: int, total: int) -> None:
        super().__init__(f"interrupted after {done} of {total} cases, which are kept in {place}", signal.SIGINT)


# ------------------------------------------------------------------------------------------------ inputs


def check_apart(out: Path, *inputs: str | Path, files: Iterable[Path] = ()) -> None:
    """Refuse a folder of results ``out`` that is one of ``inputs``, lies in one of them or contains one.

    Of ``files`` the same holds for their folders, and for what they are links to. Places are compared by what the file
    system says they are, so that links, relative paths and the case of letters do not matter. An input that does not
    exist is no obstacle.
    """
    files = list(files)
    for given in (*inputs, *{file.parent for file in files}, *(file for file in files if file.is_symlink())):
        for inner, outer, relation in ((out, given, "lies in"), (given, out, "contains")):
            if _lies_in(inner, outer):
                relation = "is" if _lies_in(outer, inner) else relation
                raise RunError(f"{out}: the folder of the results {relation} the input {given}; give another --out")


def _lies_in(inner: str | Path, outer: str | Path) -> bool:
    """Whether ``inner`` is ``outer`` or below it."""
    wanted = _identity(outer)
    path = Path(os.path.realpath(inner))
    return wanted is not None and any(_identity(place) == wanted for place in (path, *path.parents))


def _identity(path: str | Path) -> tuple[int, int] | None:
    """The number that the file system gives a file or folder; None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null character
        return None
    return status.st_dev, status.st_ino


# -------------------------------------------------------------------------------------------------- lock

LOCK = ".calseg.lock"
LOCK_START = "calseg: "

if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # a byte beyond the text, which others may read
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            return error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # a file system without locks
        return True


@contextmanager
def _locked(folder: Path, elsewhere: str = "") -> Iterator[None]:
    """Hold the lock of a folder, or raise a :class:`RunError` that names the process that holds it.

    The operating system frees the lock when the process ends, in whatever way; the file that is left does no harm.
    ``elsewhere`` ends the advice of the message.
    """
    path = folder / LOCK
    with failing(folder, "made ready"):
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            is_held = _try_lock(descriptor)
            os.lseek(descriptor, 0, os.SEEK_SET)
            text = os.read(descriptor, 1000).decode(errors="replace")
            if not is_held or not text.startswith(LOCK_START[: len(text)]):
                os.close(descriptor)
                raise RunError(
                    f"{path}: is no lock of calseg; move it{elsewhere}"
                    if is_held
                    else f"{folder}: {text.removeprefix(LOCK_START) or 'another process'} is at work in this folder;"
                    f" wait until it has ended{elsewhere}"
                )
            if _identity(path) == _descriptor_identity(descriptor):
                break
            os.close(descriptor)  # the process that held the lock has just removed this file
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"{LOCK_START}process {os.getpid()} on {platform.node()}".encode())
    try:
        yield
    finally:
        with ExitStack() as stack:
            stack.enter_context(suppress(OSError))
            if sys.platform == "win32":  # Windows removes no open file; elsewhere another process may hold a new one
                stack.callback(path.unlink)
                stack.callback(os.close, descriptor)
            else:
                stack.callback(os.close, descriptor)
                stack.callback(path.unlink)


def _descriptor_identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


# ----------------------------------------------------------------------------------------- state of a run

STATE = "calseg.json"
STATE_FORMAT = 1


@dataclass
class RunState:
    """What the file ``calseg.json`` says of the run in its folder.

    Attributes:
        command: The command that made the run, as in "train".
        settings: What a resumed run must share, by the names of the options.
        data: What else it must share, by words for it, as in ``{"the split of DATA": ...}``.
        files: Names, relative to the folder, of the files that the run has written or was about to write.
        inputs: For each case, or each other part of the inputs, key and fingerprint of its files.
        is_clearing: Whether ``files`` are those of an earlier run that are being removed.
    """

    command: str
    settings: dict[str, Any]
    data: dict[str, Any]
    files: list[str] = field(default_factory=list)
    inputs: dict[str, list[list[str]]] = field(default_factory=dict)
    is_clearing: bool = False

    def save(self, folder: Path) -> None:
        """Write the state."""
        write_atomic(folder / STATE, json.dumps({"format": STATE_FORMAT, **vars(self)}))  # often, and for many cases


_KINDS = {
    "format": int,
    "command": str,
    "settings": dict,
    "data": dict,
    "files": list,
    "inputs": dict,
    "is_clearing": bool,
}


def read_state(folder: Path) -> RunState | None:
    """The state of the run in ``folder``; None where there is no run. A file that is no state is an error."""
    path = folder / STATE
    if path.is_symlink() or not path.is_file():
        return None
    content = read_json(path)
    if not (
        isinstance(content, dict)
        and content.keys() == _KINDS.keys()
        and all(isinstance(content[name], kind) for name, kind in _KINDS.items())
        and all(isinstance(name, str) and _is_inside(name) for name in content["files"])
        and all(isinstance(files, list) for files in content["inputs"].values())
    ):
        raise RunError(f"{path}: not the state of a run of this version of calseg; move it away")
    if content.pop("format") != STATE_FORMAT:
        raise RunError(f"{path}: the run is of another version of calseg; move it away")
    return RunState(**content)


def _is_inside(name: str) -> bool:
    """Whether a relative path leads to a place in its folder."""
    path = PurePath(name)
    return bool(path.parts) and not path.anchor and ".." not in path.parts and "\0" not in name


# ------------------------------------------------------------------------------------------- resume rule


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, and the rule by which a run starts or continues in it.

    ============================ ================================= ======================= =========================
    the folder                   ``resume``                        neither                 ``overwrite``
    ============================ ================================= ======================= =========================
    is missing or empty          refused: there is no run          a new run starts        a new run starts
    holds a run of this command  it goes on, or starts again; its  refused: not empty      the files that it wrote
                                 settings must be the same                                 are removed, a new run
                                                                                           starts
    holds another command's run  refused                           refused                 refused
    holds other files            refused: there is no run          refused: not empty      a new run starts, if none
                                                                                           of its files is there
    ============================ ================================= ======================= =========================

    A run is known by its file ``calseg.json`` (:class:`RunState`), which lists every file that the run has written. No
    other file is ever replaced or removed.

    Attributes:
        path: The folder.
        command: Name of the command, as in "train".
        files: Names, relative to ``path``, of all files that the run may write.
        continues: Whether the command continues its run by itself when it is started again, as "demo" does. Otherwise
            the user has to ask for it with ``--resume``.
        parts: The folders of runs within this folder. They are replaced with this run.
        has_out: Whether the user chooses ``path`` with ``--out``. Messages name no option that a command lacks.
        has_resume: Whether the command has the option ``--resume``.
    """

    path: Path
    command: str
    files: tuple[str, ...] = ()
    continues: bool = False
    parts: tuple[RunFolder, ...] = ()
    has_out: bool = True
    has_resume: bool = True

    @property
    def elsewhere(self) -> str:
        """The end of an advice: another folder, if the user may choose one."""
        return ", or give another --out" if self.has_out else ""

    @contextmanager
    def open(
        self,
        settings: Mapping[str, Any],
        data: Mapping[str, Any] | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Iterator[Run]:
        """Start a run by the rule above, or go on with one; the folder is locked until the block ends.

        ``settings`` and ``data`` are what a resumed run must share with the run that it continues (:class:`RunState`).
        Raises :class:`RunError` where the rule refuses.
        """
        if resume and overwrite:
            raise RunError("--resume and --overwrite exclude each other")
        if read_state(self.path) is None:
            self._decide(None, resume, overwrite)  # before anything is made
        self._check_lengths()
        with failing(self.path, "made ready"):
            self.path.mkdir(parents=True, exist_ok=True)
        wanted = RunState(self.command, as_json(settings), as_json(data or {}))
        with _locked(self.path, self.elsewhere):
            state = read_state(self.path)
            goes_on = self._decide(state, resume, overwrite)
            if goes_on:
                assert state is not None
                if self.continues and (changed := differences(state.settings, wanted.settings)):
                    raise RunError(
                        f"{self.path}: holds a {self.command} with other settings ({changed}); give --overwrite or"
                        " another --out"
                    )
                check_same_settings(self.path, state.settings, wanted.settings)
                check_same_data(self.path, state.data, wanted.data)
            yield Run(self.path, *self._begin(state, wanted, goes_on), self.elsewhere)

    def _decide(self, state: RunState | None, resume: bool, overwrite: bool) -> bool:
        """Whether the run ``state`` goes on; refused by the rule above."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: exists and is not a folder")
        if state is not None and state.command != self.command:
            raise RunError(f"{self.path}: holds a run of calseg {state.command}; move it{self.elsewhere}")
        goes_on = resume or (self.continues and state is not None and not overwrite)
        if goes_on and state is None:
            raise RunError(f"{self.path / STATE}: not found; there is no run to resume in {self.path}")
        if not (goes_on or overwrite) and (state is not None or self._holds_files()):
            if state is not None:
                resume_or = "--resume to continue the run in it, or " if self.has_resume else ""
                raise RunError(f"{self.path}: not empty; give {resume_or}--overwrite to start anew")
            by = f"and not made by calseg {self.command}" if self.continues else "and without a run"
            raise RunError(f"{self.path}: not empty {by}; give --overwrite to add to its files{self.elsewhere}")
        own = {} if state is None else dict.fromkeys((STATE, *state.files))
        for name in dict.fromkeys((STATE, *self.files, *own)):
            check_own(self.path, name, own, self.elsewhere)
        for part in self.parts:
            part_state = read_state(part.path)
            if state is None and part_state is not None:
                raise RunError(f"{part.path}: holds a run that this one did not make; give another --out")
            part._decide(part_state, resume=False, overwrite=True)
        return goes_on

    def _holds_files(self) -> bool:
        """Whether the folder holds more than what a process leaves that was killed before its run began."""
        return any(name != LOCK and not TEMPORARY.fullmatch(name) for name in _names_in(self.path))

    def _check_lengths(self) -> None:
        """Refuse file names that are longer than the file system takes."""
        place = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if folder.exists())
        limit = 255
        with suppress(AttributeError, OSError, ValueError):  # Windows and some file systems do not tell
            limit = os.pathconf(place, "PC_NAME_MAX")
        for name in self.files:
            length = len(os.fsencode(PurePath(name).name))
            if length > limit:
                raise RunError(f"{brief(name)}: a file name of {length} bytes; {place} takes up to {limit}")

    def _begin(self, state: RunState | None, wanted: RunState, goes_on: bool) -> tuple[RunState, bool]:
        """Remove what has to go; the state of the run that begins, and whether it is an earlier one."""
        files = [] if state is None else state.files
        for folder in {self.path, *((self.path / name).parent for name in files)}:
            _remove(*(folder / name for name in _names_in(folder) if TEMPORARY.fullmatch(name)))
        if state is not None and goes_on and not state.is_clearing:
            return state, True
        if state is not None:
            wanted.files, wanted.is_clearing = files, True  # so that a process killed from here on can be followed
            wanted.save(self.path)
            for part in self.parts:
                part.remove()
            _remove(*(self.path / name for name in files))
            wanted.files, wanted.is_clearing = [], False
        wanted.save(self.path)
        return wanted, False

    def remove(self) -> None:
        """Remove the files of the run in the folder, if there is a run."""
        if self.path.is_dir():
            with _locked(self.path, self.elsewhere):
                state = read_state(self.path)
                if state is not None:
                    self._decide(state, resume=False, overwrite=True)
                    _remove(*(self.path / name for name in (*state.files, STATE)))


def _names_in(folder: Path) -> list[str]:
    """The names of what a folder holds; none if there is no folder."""
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _remove(*paths: Path) -> None:
    for path in paths:
        with failing(path, "removed"):
            path.unlink(missing_ok=True)


def check_same_settings(place: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with settings that are not the ``saved`` ones; the message names each difference."""
    if changed := differences(saved, wanted):
        raise RunError(f"{place}: cannot be resumed with other settings: {changed}")


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The settings that are not the ``saved`` ones, with both values; empty if there is none."""
    return "; ".join(
        f"{name} is {brief(repr(value), 80)} but was {brief(repr(saved.get(name)), 80)}"
        for name, value in wanted.items()
        if value != saved.get(name)
    )


def check_same_data(place: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with data that are not the ``saved`` ones; both are named by words for the message."""
    for words, value in wanted.items():
        if value != saved.get(words):
            raise RunError(f"{place}: cannot be resumed on other data: {words} changed since")


def check_own(folder: Path, name: str, own: Iterable[str], elsewhere: str) -> None:
    """Refuse a file of ``folder`` that is there and not among the files ``own`` of its run, and every link to a file.

    A folder below ``folder`` may not be a link either, for it could lead to files of others. ``elsewhere`` ends the
    advice of the message.
    """
    path = folder / name
    for place in (path, *(folder / parent for parent in PurePath(name).parents if parent.parts)):
        if place.is_symlink():
            raise RunError(f"{place}: is a symbolic link, which no run writes to; move it{elsewhere}")
    if os.path.lexists(path) and (name not in own or not path.is_file()):
        raise RunError(f"{path}: was not written by this run, and is not replaced; move it{elsewhere}")


class Run:
    """A run at work in its folder, which is locked meanwhile: :meth:`RunFolder.open` makes it.

    Attributes:
        path: The folder.
        is_resumed: Whether an earlier run goes on.
    """

    def __init__(self, path: Path, state: RunState, is_resumed: bool, elsewhere: str) -> None:
        self.path, self.is_resumed, self._state, self._elsewhere = path, is_resumed, state, elsewhere
        self._files = set(state.files)

    def claim(self, *names: str) -> None:
        """Make files, named relative to the folder, the run's own, before it writes them."""
        for name in names:
            check_own(self.path, name, self._files, self._elsewhere)
        new = [name for name in names if name not in self._files]
        if new:
            self._files.update(new)
            self._state.files += new
            self._state.save(self.path)
        for folder in {(self.path / name).parent for name in names}:
            with failing(folder, "made"):
                folder.mkdir(parents=True, exist_ok=True)

    def holds(self, name: str) -> bool:
        """Whether the run has written this file."""
        return name in self._files and (self.path / name).is_file()

    def write(self, name: str, content: bytes | str) -> None:
        """Write a file of the run, atomically."""
        self.claim(name)
        write_atomic(self.path / name, content)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file of the run, atomically."""
        self.write(name, _json(content))

    def remember(self, inputs: Mapping[str, Sequence[InputFile]]) -> None:
        """Keep which files the run has read for each case, for :meth:`check_inputs`."""
        entries = {case: [[file.key, file.fingerprint] for file in files] for case, files in inputs.items()}
        if any(self._state.inputs.get(case) != files for case, files in entries.items()):
            self._state.inputs.update(entries)
            self._state.save(self.path)

    def check_inputs(self, inputs: Mapping[str, Sequence[InputFile]]) -> None:
        """Refuse to go on where files differ from those that the run has read; the message names them."""
        changed = changed_files(self._state, inputs)
        if changed:
            raise RunError(f"{self.path}: cannot be resumed; {listing(changed)} changed since")


def changed_files(state: RunState, inputs: Mapping[str, Sequence[InputFile]]) -> list[Path]:
    """The files of ``inputs`` that are not those that the run ``state`` has read for the same cases."""
    changed: list[Path] = []
    for case, files in inputs.items():
        saved = state.inputs.get(case)
        now = [[file.key, file.fingerprint] for file in files]
        if saved is not None and saved != now:
            other = [file.path for file, entry in zip(files, now, strict=True) if entry not in saved]
            changed += other or [file.path for file in files]  # the same files in another order
    return changed
