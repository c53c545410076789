"""Errors that the user can fix, and the text of their messages. Any part of calseg may import this module."""

from __future__ import annotations

from collections.abc import Sequence


def brief(content: object, limit: int = 200) -> str:
    """Return ``content`` as one line of at most ``limit`` characters. The middle of a longer text is left out.

    Characters that no terminal shows are written as Python writes them.
    """
    text = " ".join(str(content).split())
    if not text.isprintable():
        text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    half = (limit - 5) // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"


def listing(names: Sequence[object], count: int = 3) -> str:
    """Return the first few of ``names`` for a message, and the number of the others."""
    shown = ", ".join(brief(name) for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


class CalsegError(ValueError):
    """An error that the user can fix. The command line prints its message in one line and exits with code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(brief(message, 600))


class RunError(CalsegError):
    """A run cannot start or continue, because a setting is out of range or the folder does not allow it."""
