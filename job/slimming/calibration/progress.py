"""Progress of a cut: one callback that is called before each step."""

from __future__ import annotations

from collections.abc import Callable

# name of the step that begins, its number and how many such steps there are (0, 0: just one); every
# process calls it at the same steps, so it may raise on all of them to stop
Progress = Callable[[str, int, int], None]


def no_progress(_step: str, _number: int, _count: int) -> None:
    """Show nothing: a library prints nothing."""
