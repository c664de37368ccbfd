"""Progress of a cut: one callback that is called before each step."""

from __future__ import annotations

from collections.abc import Callable

# called with the name of the step that begins, its number, and the number of such steps (0 and 0 if
# there is only one); it may raise to stop, since all processes call it at the same steps
Progress = Callable[[str, int, int], None]


def no_progress(_step: str, _number: int, _count: int) -> None:
    """Do nothing: the default for calls from Python."""
