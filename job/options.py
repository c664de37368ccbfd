"""Declaration of command options: each option is one field of a frozen dataclass.

The annotation of the field gives the type and the choices. Its metadata, an ``Option``, gives the
help, the bounds and the metavar. The command line, the TOML keys, the environment variables and
the table of options in the documents follow from the declaration.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class Option:
    """Metadata of an option: everything except its name, type and default."""

    help: str
    metavar: str | None = None  # by default it follows from the type
    default_text: str | None = None  # describes a default whose value alone is not clear
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    changes_result: bool = True  # whether a run can only be resumed with the same value


def option(default: Any, help: str, **more: Any) -> Any:
    """Declare a field of a dataclass as an option; ``more`` holds further fields of ``Option``."""
    return field(default=default, metadata={"option": Option(help, **more)})


def shared(record: type, name: str, **changes: Any) -> Any:
    """Declare the option ``name`` of ``record`` again in another dataclass.

    ``changes`` replaces fields of its ``Option``, or the ``default``.
    """
    (other,) = (each for each in fields(record) if each.name == name)
    default = changes.pop("default", other.default)
    return field(default=default, metadata={"option": replace(other.metadata["option"], **changes)})


def options_of(record: type) -> dict[str, Option]:
    """Return the options that ``record`` declares or inherits, by field name, in order."""
    return {
        each.name: each.metadata["option"] for each in fields(record) if "option" in each.metadata
    }
