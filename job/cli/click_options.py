"""Click options for the options that a dataclass declares; see ``job.options``."""

from __future__ import annotations

from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import click

from job.cli.option_types import OPTION_TYPES, Finite, KeyValue, TrackerChoice
from job.options import Option, options_of

if TYPE_CHECKING:
    from collections.abc import Callable

METAVARS = {int: "N", float: "X", str: "NAME"}


def click_options(record: type) -> Callable[[Any], Any]:
    """Return a decorator that adds the options of ``record`` to a command, in order."""
    hints, declared = get_type_hints(record), options_of(record)

    def decorate(function: Any) -> Any:
        for name in reversed(declared):
            default = getattr(record, name)
            function = _click_option(name, hints[name], declared[name], default)(function)
        return function

    return decorate


def flag_of(name: str) -> str:
    """Return the flag of a field: ``--base-epochs``."""
    return "--" + name.replace("_", "-")


def help_of(declared: Option) -> str:
    """Return the help text, with the description of the default if there is one."""
    text = declared.default_text
    return f"{declared.help} Default: {text}." if text else declared.help


def _click_option(name: str, hint: Any, declared: Option, default: Any) -> Callable[[Any], Any]:
    if hint is bool:
        return click.option(flag_of(name), is_flag=True, help=declared.help)
    kind = type_of(name, hint, declared)
    return click.option(
        flag_of(name),
        type=kind,
        default=default or (None if default == () else default),
        multiple=isinstance(kind, (KeyValue, TrackerChoice)),
        callback=TrackerChoice.joined if isinstance(kind, TrackerChoice) else None,
        metavar=metavar_of(name, hint, declared),
        show_default=True,
        help=help_of(declared),
    )


def type_of(name: str, hint: Any, declared: Option) -> click.ParamType[Any]:
    """Return the type that checks the values of an option."""
    if name in OPTION_TYPES:
        return OPTION_TYPES[name]
    plain = _required(hint)
    if get_origin(plain) is Literal:
        return click.Choice(get_args(plain))
    least = declared.at_least if declared.above is None else declared.above
    if plain is int:
        return click.IntRange(_whole(least), _whole(declared.at_most))
    if plain is float:
        return Finite(least, declared.at_most, min_open=declared.above is not None)
    assert plain is str, f"{name}: an option of type {hint} needs an entry in OPTION_TYPES"
    return click.STRING


def _required(hint: Any) -> Any:
    """Return the type of ``hint`` without None."""
    members = [member for member in get_args(hint) if member is not NoneType]
    return members[0] if NoneType in get_args(hint) and len(members) == 1 else hint


def _whole(bound: float | None) -> int | None:
    return None if bound is None else int(bound)


def metavar_of(name: str, hint: Any, declared: Option) -> str | None:
    """Return the metavar of an option in the help; None for a choice."""
    if declared.metavar:
        return declared.metavar
    kind = type_of(name, hint, declared)
    if isinstance(kind, click.Choice):
        return None
    return kind.name if name in OPTION_TYPES else METAVARS[_required(hint)]
