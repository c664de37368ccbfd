"""Print the options of ``prune`` as a Markdown table: ``python -m job.cli.option_table``."""

from __future__ import annotations

from typing import Any, get_type_hints

import click

from job.cli.click_options import flag_of, metavar_of, type_of
from job.config import SECTIONS
from job.options import Option, options_of


def option_table() -> str:
    """Return a row for each option, under the sections of the help page."""
    lines = ["| option | value | default | description |", "|---|---|---|---|"]
    for title, record in SECTIONS.items():
        lines.append(f"| **{title}** | | | |")
        hints = get_type_hints(record)
        for name, declared in options_of(record).items():
            value = _value(name, hints[name], declared)
            default = _default(getattr(record, name), declared)
            cells = (f"`{flag_of(name)}`", value, default, declared.help)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _value(name: str, hint: Any, declared: Option) -> str:
    """Return the choices, or the metavar and the bounds; "" for a flag."""
    if hint is bool:
        return ""
    kind = type_of(name, hint, declared)
    if isinstance(kind, click.Choice):
        return ", ".join(f"`{choice}`" for choice in kind.choices)
    limits = {"≥": declared.at_least, ">": declared.above, "≤": declared.at_most}
    bounds = [f"{sign} {limit:g}" for sign, limit in limits.items() if _is_shown(limit)]
    return f"`{metavar_of(name, hint, declared)}` {', '.join(bounds)}".rstrip()


def _is_shown(limit: float | None) -> bool:
    return limit is not None and limit < 2**53  # a larger one is that of the type


def _default(value: Any, declared: Option) -> str:
    if declared.default_text:
        return declared.default_text
    if value is None or value is False or value == ():
        return ""
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value)
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    print(option_table(), end="")
