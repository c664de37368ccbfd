"""A line for the console from code that does not print: which choice was made for the user."""

from __future__ import annotations

from collections.abc import Callable

Note = Callable[[str], None]


def quiet(_line: str) -> None:
    """Tell nobody: the same was said before."""
