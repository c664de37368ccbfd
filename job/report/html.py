"""Rendering of HTML templates, with tables, charts, and escaped text."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from job.errors import printable
from job.report.svg import to_svg

STYLE_SHEET, SCRIPT = "style.css.j2", "script.js.j2"


@dataclass(frozen=True)
class NumberCell:
    """Text of a cell, and the exact ``value`` by which the table is sorted; None if empty."""

    text: str
    value: float | None

    @property
    def parts(self) -> list[str]:
        """Parts of the text between which a line can break: before a share in parentheses."""
        return self.text.replace(" (", "\n(").splitlines()


@dataclass(frozen=True)
class HtmlTable:
    """Table whose first ``left`` columns are left-aligned and whose row ``best`` is highlighted.

    On a narrow screen a table with ``cards`` shows each row as a card.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str | NumberCell, ...], ...]
    title: str = ""
    left: int = 1
    best: int | None = None
    cards: bool = False
    sortable: bool = False


def render(template: str, **content: Any) -> bytes:
    """Return the page of ``template`` with ``content``, in UTF-8."""
    return _environment().get_template(template).render(**content).encode()


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_show_controls,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = to_svg
    style, script = (
        (Path(__file__).parent / name).read_text("utf-8") for name in (STYLE_SHEET, SCRIPT)
    )
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "style": Markup(style), "script": Markup(script), "script_sha256": digest,
    }  # fmt: skip
    return environment


def _show_controls(value: Any) -> Any:
    """Escape control characters in text; markup of the template is not changed."""
    return value if isinstance(value, Markup) else printable(str(value))
