"""Conversion of specs to the types that a ``torch.library`` operator takes, and back.

An operator takes lists of tensors, integers and floats, and a string. :func:`pack` writes the fields of several
structures into these, and :func:`unpack` restores the structures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from calseg import operations


class Packed(NamedTuple):
    """The fields of several structures, sorted by type."""

    tensors: list[Tensor | None]
    integers: list[int]
    numbers: list[float]
    words: str  # separated by spaces


def pack(*structures: Any) -> Packed:
    """Return the fields of structures. Before the fields of a nested structure, a mark says whether it is None."""
    lists: Lists = ([], [], [], [])
    for structure in structures:
        _pack(type(structure), structure, lists)
    tensors, integers, numbers, words = lists
    return Packed(tensors, integers, numbers, " ".join(words))


def unpack(kinds: tuple[type, ...], packed: Packed) -> Any:
    """Return the structures of these types that :func:`pack` was given."""
    tensors, integers, numbers, words = packed
    rest = (iter(tensors), iter(integers), iter(numbers), iter(words.split()))
    return tuple(_unpack(kind, rest) for kind in kinds)


Lists = tuple[list[Tensor | None], list[int], list[float], list[str]]


def _pack(kind: type, structure: Any, lists: Lists) -> None:
    """Append the fields of a structure of type ``kind`` to the lists."""
    tensors, integers, numbers, words = lists
    for form, value in zip(_FORMS[kind], structure, strict=True):
        if isinstance(form, type):
            integers.append(0 if value is None else 1)
            if value is not None:
                _pack(form, value, lists)
        elif form == "tensor":
            tensors.append(value)
        elif form == "seed":
            is_tensor = isinstance(value, Tensor)
            tensors.append(value if is_tensor else None)
            integers.append(0 if is_tensor else value if value < 2**63 else value - 2**64)  # as a signed number
        elif form == "factor":
            is_tensor = isinstance(value, Tensor)
            tensors.append(value if is_tensor else None)
            numbers.append(1.0 if is_tensor else value)
        elif form == "integer":
            integers.append(value)
        elif form == "flag":
            integers.append(1 if value else 0)
        elif form == "number":
            numbers.append(value)
        else:
            words.append(str(value).removeprefix("torch."))


def _unpack(kind: type, rest: tuple[Iterator[Any], ...]) -> Any:
    """Take the fields of a structure of type ``kind`` from the rest of the lists, and return the structure."""
    tensors, integers, numbers, words = rest
    values: list[Any] = []
    for form in _FORMS[kind]:
        if isinstance(form, type):
            values.append(_unpack(form, rest) if next(integers) else None)
        elif form == "tensor":
            values.append(next(tensors))
        elif form == "seed":
            tensor, integer = next(tensors), next(integers)
            values.append(integer if tensor is None else tensor)
        elif form == "factor":
            tensor, number = next(tensors), next(numbers)
            values.append(number if tensor is None else tensor)
        elif form in ("integer", "flag"):
            values.append(next(integers))
        elif form == "number":
            values.append(next(numbers))
        else:
            word = next(words)
            values.append(getattr(torch, word) if form == "dtype" else word)
    return kind(*values)


def _form(hint: Any) -> Any:
    """Return the form in which a field of this type is packed: a word, or the type itself for a structure."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if len(kinds) > 1:
        return "seed" if int in kinds else "factor"
    (kind,) = kinds
    forms = {Tensor: "tensor", int: "integer", bool: "flag", float: "number", str: "word", torch.dtype: "dtype"}
    return forms.get(kind, kind)


_FORMS: dict[type, list[Any]] = {
    structure: [_form(hint) for hint in get_type_hints(structure).values()]
    for structure in vars(operations).values()
    if isinstance(structure, type) and hasattr(structure, "_fields")
}
