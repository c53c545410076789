"""Options made from the fields of a configuration dataclass (:mod:`calseg.settings`), so that each is named once."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, NamedTuple

import typer


class Given(NamedTuple):
    """What the user gave of the settings of a configuration.

    Args:
        values: every setting that has an option, by its field's name.
        typed: the fields that stand on the command line; the others have their defaults.
    """

    values: dict[str, Any]
    typed: frozenset[str]


def with_options(command: Callable[..., None], config: type, leave_out: Collection[str] = ()) -> Callable[..., None]:
    """The command for typer, with options in place of the parameters that stand for several.

    Args:
        command: a function with the parameter ``given``, a :class:`Given`. A parameter whose type is a dataclass stands
            for the fields of it, whose annotations are typer's, as those of the other parameters are.
        config: the dataclass of :mod:`calseg.settings` whose fields become options in place of ``given``.
        leave_out: fields of ``config`` that do not.
    """
    types = typing.get_type_hints(config)
    chosen = [item for item in fields(config) if item.name not in leave_out]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [context]
    groups: dict[str, type] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if name == "given":
            parameters += [_option(item, types[item.name]) for item in chosen]
        elif isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            parameters += _options_of(parameter.annotation)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(context: typer.Context, **arguments: Any) -> None:
        values = {item.name: arguments.pop(item.name) for item in chosen}
        for item in chosen:
            if isinstance(item.default, tuple):
                values[item.name] = tuple(values[item.name] or ())
        sources = {name: context.get_parameter_source(name) for name in values}
        typed = frozenset(name for name, source in sources.items() if source and source.name == "COMMANDLINE")
        for name, group in groups.items():
            arguments[name] = group(**{item.name: arguments.pop(item.name) for item in fields(group)})
        command(given=Given(values, typed), **arguments)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options_of(group: type) -> list[inspect.Parameter]:
    """The parameters from which typer makes the options of a dataclass whose fields have typer's annotations."""
    types = typing.get_type_hints(group, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(item.name, keyword, default=item.default, annotation=types[item.name])
        for item in fields(group)
    ]


def _option(item: Field[Any], kind: Any) -> inspect.Parameter:
    """The parameter from which typer makes the option of one field."""
    assert item.default is not MISSING, f"{item.name}: a setting needs a default"
    default = item.default
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and arguments[-1] is Ellipsis:
        kind, default = list[arguments[0]] | None, list(default) or None  # type: ignore[valid-type]
    elif default is None:
        kind = kind | None
    option = typer.Option(*item.metadata["option"], help=item.metadata["help"])
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )
