"""Docstrings for MkDocs: the roles and directives that they hold become Markdown."""

from __future__ import annotations

import ast
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


def _settings(cls: griffe.Class) -> list[str]:
    """Return a line for each setting of a configuration, and leave its default alone in the signature.

    Settings are made by :func:`calseg.settings.setting`, or by a function for those whose default is that of the
    method, which is shown as None.
    """
    lines = []
    for name, attribute in cls.attributes.items():
        call = attribute.value
        if isinstance(call, griffe.ExprCall) and str(call.function) in ("setting", "_of_method", "_of_every_method"):
            default, text = map(str, call.arguments[:2])
            attribute.value = default if str(call.function) == "setting" else "None"
            try:
                lines.append(f"    {name}: {ast.literal_eval(text)}")
            except ValueError:  # a text that is made from other values
                lines.append(f"    {name}: See the command's ``--help``.")
    return lines


class Docstrings(griffe.Extension):
    """Turn every docstring into Markdown when its object has been read."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Add the settings of a configuration to its docstring."""
        lines = _settings(cls)
        if lines and cls.docstring is not None:
            cls.docstring.value = "\n".join([cls.docstring.value, "", "Args:", *lines])

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
