"""The entry of the command line: one command, one exit code.

Exit codes: 0; 2 for what the user can mend, with one line on stderr; 129, 130 and 143 after SIGHUP, SIGINT and SIGTERM;
141 where the reader of the output went away. Without the extra ``calseg[train]`` only ``calseg info`` runs.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from calseg.errors import CalsegError, brief
from calseg.runs import RunInterruptedError

EXTRA = ("typer", "rich", "monai", "nibabel")
"""The packages of the extra ``calseg[train]`` whose absence is reported in one line."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = "calseg" if arguments[0].startswith("-") else f"calseg {arguments[0]}"
    _open_streams()
    try:
        code = _run(arguments, command)
        sys.stdout.flush()
    except OSError as error:
        _discard_output()
        what = "the output cannot be written" if error.filename is None else str(error.filename)
        _fail(command, f"{what} ({error.strerror or error})", 141 if error.errno == errno.EPIPE else 2)
    raise SystemExit(code)


def _run(arguments: Sequence[str], command: str) -> int:
    """Run the command and return its exit code; every failure that the user can mend becomes one line."""
    if arguments[0] == "info" and {*arguments[1:]} <= {"--json", "--runtime"}:  # fast, and without the extra
        from calseg.cli.info import print_info

        print_info(as_json="--json" in arguments, runtime="--runtime" in arguments)
        return 0
    try:
        return _run_typer(arguments, command)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA:
            raise
        _fail(command, f"needs {error.name}: pip install 'calseg[train]'")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(r"out of memory|allocate memory", str(error)):
            raise
        _fail(command, f"not enough memory ({brief(error)})")


def _run_typer(arguments: Sequence[str], command: str) -> int:
    import typer

    from calseg.cli.commands import RESUMABLE, build_app, name_of

    name = name_of(arguments)
    command = command if name == arguments[0] else f"calseg {name}"
    click_error: Any = typer.BadParameter.__mro__[2]  # ClickException, which newer typer ships as its own
    try:
        code = build_app(name)(args=list(arguments), prog_name="calseg", standalone_mode=False)
    except CalsegError as error:
        _fail(command, str(error))
    except RunInterruptedError as error:
        again = [word for word in arguments if word not in ("--overwrite", "--resume")]
        again += ["--resume"] if name in RESUMABLE else []
        _fail(command, f"{error}; continue with: {shlex.join(['calseg', *again])}", error.code)
    except (KeyboardInterrupt, typer.Abort):
        _fail(command, "interrupted", 130)
    except click_error as error:
        _fail(command, f"{error.format_message()} (see {command} --help)")
    return code if isinstance(code, int) else 0


def _open_streams() -> None:
    """Give the program streams where its caller closed them, and let both show names that are not UTF-8."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # as long as the program runs
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Let what is left in the buffer of stdout go nowhere, or Python fails to write it once more when it exits."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(command: str, message: str, code: int = 2) -> NoReturn:
    """One line on stderr, and out."""
    with suppress(OSError):
        print(f"{brief(command, 80)}: {brief(message, 700)}", file=sys.stderr)
    raise SystemExit(code)
