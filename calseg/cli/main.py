"""The entry of the command line: one command, one exit code.

Exit codes: 0; 2 for what the user can mend, with one line on stderr; 130 and 143 after SIGINT and SIGTERM. Without the
extra ``calseg[train]`` only ``calseg info`` runs.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from calseg.errors import CalsegError
from calseg.runs import RunInterruptedError

EXTRA = ("typer", "rich", "monai", "nibabel")
"""The packages of the extra ``calseg[train]`` whose absence is reported in one line."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = "calseg" if arguments[0].startswith("-") else f"calseg {arguments[0]}"
    if arguments in (["info"], ["info", "--json"]):  # as fast as can be, and without the extra
        from calseg.cli.tables import print_info

        print_info(as_json="--json" in arguments)
        raise SystemExit(0)
    try:
        _run(arguments, command)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA:
            raise
        _fail(command, f"needs {error.name}: pip install 'calseg[train]'")


def _run(arguments: Sequence[str], command: str) -> NoReturn:
    """Run the command; every failure that the user can mend becomes one line and an exit code."""
    import typer

    from calseg.cli.commands import RESUMABLE, build_app

    click_error: Any = typer.BadParameter.__mro__[2]  # ClickException, which newer typer ships as its own
    try:
        code = build_app(arguments[0])(args=list(arguments), prog_name="calseg", standalone_mode=False)
    except CalsegError as error:
        _fail(command, str(error))
    except RunInterruptedError as error:
        again = [word for word in arguments if word not in ("--overwrite", "--resume")]
        again += ["--resume"] if arguments[0] in RESUMABLE else []
        _fail(command, f"{error}; continue with: {shlex.join(['calseg', *again])}", error.code)
    except (KeyboardInterrupt, typer.Abort):
        _fail(command, "interrupted", 130)
    except click_error as error:
        _fail(command, f"{error.format_message()} (see {command} --help)")
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(command: str, message: str, code: int = 2) -> NoReturn:
    """One line on stderr, and out."""
    print(f"{command}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
