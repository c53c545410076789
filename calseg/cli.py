"""The command line: ``calseg info``, ``calseg demo``, ``calseg train``.

Only ``info`` runs without the extra ``calseg[train]``; nothing of that extra is imported before it is needed.
Exit codes: 0, 2 for what the user can mend (one line on stderr), 130 and 143 after SIGINT and SIGTERM.
"""

# Annotations stay objects here (no "from __future__ import annotations"): typer reads those of functions that
# are defined inside a function, where it could not resolve names from strings.

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

EXTRA = ("typer", "rich", "monai", "nibabel")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = " ".join(["calseg", *[word for word in arguments[:1] if not word.startswith("-")]])
    try:
        try:
            app = build_app()
        except ModuleNotFoundError:
            if command != "calseg info":
                raise
            print_info(as_json="--json" in arguments)  # works without the extra
            raise SystemExit(0) from None
        app(args=arguments, prog_name="calseg")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA:
            raise
        fail(f"{command} needs {error.name}: pip install 'calseg[train]'")
    raise SystemExit(0)


def fail(message: str, code: int = 2) -> NoReturn:
    """One line on stderr, and out."""
    print(message if message.startswith("calseg ") else f"calseg: {message}", file=sys.stderr)
    raise SystemExit(code)


def build_app() -> Any:
    """The typer application with its three commands."""
    import typer

    # The defaults shown in the help are those of the two configurations; both modules import without MONAI.
    from calseg.config import DemoConfig, TrainConfig
