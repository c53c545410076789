"""The base of the errors that the user can mend. Any part of calseg may import this module; it imports none."""

from __future__ import annotations


class CalsegError(ValueError):
    """Something that the user can mend; the command line prints its message in one line and exits with code 2."""
