"""Docstrings for MkDocs: the roles and directives that they hold become Markdown."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import griffe

REFERENCE = Path(__file__).parents[1] / "reference"
ENTRY = re.compile(r"^::: (\S+)", re.MULTILINE)
DOCUMENTED = {name for page in REFERENCE.glob("*.md") for name in ENTRY.findall(page.read_text())}
DIRECTIVE = re.compile(
    r"^(\ *)\.\.\ (math|code-block)::\ ?(\S*)\n\n?"  # its name, and the language of code
    r"((?:\1\ +\S.*\n?|\ *\n(?=\1\ +\S))+)",  # lines that are further indented, and empty ones between them
    re.MULTILINE,
)
ROLE = re.compile(r":(?:py:)?(func|class|meth|mod|data|attr):`~?([^`]+)`")


def _block(found: re.Match[str]) -> str:
    """Return a formula or a piece of code as Markdown."""
    indent, kind, language, body = found.groups()
    body = textwrap.dedent(body).strip("\n")
    inside = f"$$\n{body}\n$$" if kind == "math" else f"```{language}\n{body}\n```"
    return "\n" + textwrap.indent(inside, indent) + "\n\n"


def _reference(found: re.Match[str]) -> str:
    """Return a name as a link, if it is on a page of the reference, else as code."""
    name = found[2]
    shown = f"`{name.removeprefix('calseg.')}`"
    for full in (name, f"calseg.{name}", f"calseg.metrics.{name}", f"calseg.methods.{name}"):
        if full in DOCUMENTED:
            return f"[{shown}][{full}]"
    return shown


def as_markdown(text: str) -> str:
    """Return a docstring in the Markdown of the pages."""
    text = DIRECTIVE.sub(_block, text + "\n")
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = ROLE.sub(_reference, text)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE).rstrip()


class Docstrings(griffe.Extension):
    """Turn every docstring into Markdown when its object has been read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
