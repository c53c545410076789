"""The base of the errors that the user can fix. Any part of calseg may import this module. It imports none."""

from __future__ import annotations


class CalsegError(ValueError):
    """An error that the user can fix. The command line prints its message in one line and exits with code 2."""
