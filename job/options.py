"""Options of commands: each is declared once, as a field of the frozen dataclass that holds it.

The annotation gives its type and choices, the field's metadata (``Option``) the rest: bounds, help,
how its value is called. The command line, the keys of TOML files, environment variables and the
table of options in the documents follow from these.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class Option:
    """What is known of an option besides its name, type and default."""

    help: str
    metavar: str | None = None  # by default it follows from the type
    default_text: str | None = None  # what the default amounts to, where the value says too little
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    changes_result: bool = True  # whether a run can only be resumed with the same value


def option(default: Any, help: str, **known: Any) -> Any:
    """Declare a field of a dataclass as an option; ``known`` are further fields of ``Option``."""
    return field(default=default, metadata={"option": Option(help, **known)})


def shared(record: type, name: str, **changes: Any) -> Any:
    """Declare the option ``name`` of ``record`` in another dataclass, with ``changes``.

    ``changes`` are fields of ``Option``, or a new ``default``.
    """
    (other,) = (each for each in fields(record) if each.name == name)
    default = changes.pop("default", other.default)
    return field(default=default, metadata={"option": replace(other.metadata["option"], **changes)})


def options_of(record: type) -> dict[str, Option]:
    """The options that ``record`` declares or inherits, by field name, in order."""
    return {
        each.name: each.metadata["option"] for each in fields(record) if "option" in each.metadata
    }
