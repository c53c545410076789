"""Settings of a configuration dataclass, each declared once: default, help sentence, bound.

A dataclass declares its fields by :func:`setting` and calls :func:`check_settings` in ``__post_init__``::

    @dataclass(frozen=True)
    class EvaluateConfig:
        n_bins: int = setting(15, "Number of confidence bins of equal width.", whole(1, 1000))
        presets: tuple[str, ...] = setting((), "Another package's definition ...", option="--preset")

        def __post_init__(self) -> None:
            check_settings(self)

The command line makes its options from the same fields (:mod:`calseg.cli.options`): ``n_bins`` becomes ``--n-bins``
with that help and default, and a field of the type ``tuple[X, ...]`` becomes an option that may be repeated. The
order of the fields is the order of the options. This module imports neither typer nor PyTorch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import field, fields
from numbers import Integral, Real
from typing import Any, NamedTuple

from calseg.errors import RunError, brief


class Bound(NamedTuple):
    """What a setting may be. ``wanted`` completes the sentence "NAME must ..."."""

    wanted: str
    holds: Callable[[Any], bool]


POSITIVE = Bound("be positive and finite", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Bound("be finite and not negative", lambda value: 0 <= value < math.inf)
SEED = Bound("lie in 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
FRACTION = Bound("lie in [0, 1]", lambda value: 0 <= value <= 1)
PROPER_FRACTION = Bound("lie strictly between 0 and 1", lambda value: 0 < value < 1)


def at_least(least: int) -> Bound:
    """A whole number of ``least`` or more."""
    return Bound(f"be at least {least}", lambda value: value >= least)


def whole(low: int, high: int) -> Bound:
    """A whole number from ``low`` to ``high``, both included."""
    return Bound(f"lie in {low} to {high}", lambda value: low <= value <= high)


def one_of(choices: Collection[str]) -> Bound:
    """One of some words."""
    return Bound(f"be one of {', '.join(choices)}", lambda value: value in choices)


def setting(default: Any, help: str, bound: Bound | None = None, *, option: str | Sequence[str] = ()) -> Any:
    """A dataclass field with what the command line and the checks need.

    Args:
        default: The field's default.
        help: A sentence for a reader who has not seen the source: capital first, full stop last.
        bound: What the value must fulfil; None where anything goes. A default of None is not checked.
        option: Name or names of the option where it is not ``--`` and the field's name.
    """
    names = (option,) if isinstance(option, str) else tuple(option)
    return field(default=default, metadata={"help": help, "bound": bound, "option": names})


def check_settings(config: Any) -> None:
    """Raise a :class:`~calseg.runs.RunError` for the first field of ``config`` that is out of its type or bound.

    The type of a field is a string: the module of the dataclass has its annotations from ``__future__``.
    """
    for item in fields(config):
        bound, value = item.metadata.get("bound"), getattr(config, item.name)
        if value is None and item.default is None:
            continue
        is_tuple = str(item.type).startswith("tuple[")
        wanted, kind = KINDS[re.findall(r"\w+", str(item.type))[is_tuple]]
        values = value if is_tuple and isinstance(value, tuple) else (value,)
        if is_tuple != isinstance(value, tuple) or not all(isinstance(each, kind) for each in values):
            raise RunError(f"{item.name} must be {'a tuple, each ' * is_tuple}{wanted}; got {brief(repr(value))}")
        if bound is not None and not bound.holds(value):
            raise RunError(f"{item.name} must {bound.wanted}; got {brief(repr(value))}")


KINDS = {"int": ("a whole number", Integral), "float": ("a number", Real), "str": ("a text", str)}
"""For each type of a field the words of a message, and what its values are."""
