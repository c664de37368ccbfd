"""Options of runs: changed ones, all of them in sections, and ones that differ between runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from job.config import OPTION_DEFAULTS, SECTIONS, PruneConfig
from job.errors import printable
from job.options import options_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from job.artifacts.history import History

OPTION_TABLE = "prune"


def changed_options(history: History) -> list[tuple[str, str, str]]:
    """Return the flag, value and default of each option that differs from its default."""
    return [
        (_flag(key), value_text(value), value_text(OPTION_DEFAULTS.get(key)))
        for key, value in history.settings.get(OPTION_TABLE, {}).items()
        if _plain(value) != _plain(OPTION_DEFAULTS.get(key))
    ]


def grouped_options(history: History) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return sections with the flags and values of all options; unknown options are the last."""
    values = dict(history.settings.get(OPTION_TABLE, {}))
    groups = []
    for title, record in SECTIONS.items():
        names = [name for name in options_of(record) if name in values]
        groups.append((title, [(_flag(name), value_text(values.pop(name))) for name in names]))
    groups.append(("Other", [(key, value_text(value)) for key, value in values.items()]))
    return [(title, rows) for title, rows in groups if rows]


def differing_options(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """Return the flag and the values, by run, of each option that differs between runs.

    Options that do not change a result, e.g. ``--workers``, are left out. A run without the option
    has its default.
    """
    tables: list[Mapping[str, Any]] = [h.settings.get(OPTION_TABLE, {}) for h in histories]
    names = dict.fromkeys(name for table in tables for name in table if _matters(name))
    options = []
    for name in names:
        values = [table.get(name, OPTION_DEFAULTS.get(name)) for table in tables]
        if len({repr(_plain(value)) for value in values}) > 1:
            options.append((_flag(name), [value_text(value) for value in values]))
    return options


def value_text(value: Any) -> str:
    """Return the value of an option as it is written on a command line."""
    if value is None or value in ([], ()):
        return "not set"
    if isinstance(value, list | tuple):
        return " ".join(value_text(item) for item in value)
    return printable(f"{value:g}" if isinstance(value, float) else str(value))


def _matters(name: str) -> bool:
    option = options_of(PruneConfig).get(name)
    return name == "data" or option is None or option.changes_result


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _flag(name: str) -> str:
    return "--" + printable(name).replace("_", "-")
