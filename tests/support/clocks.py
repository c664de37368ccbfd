"""A clock that only the measured code moves, so that no test depends on the speed of a machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise


class FakeClock:
    """A clock of a machine whose ``slowness`` at a time stretches all work."""

    def __init__(self, slowness: Callable[[float], float] = lambda _: 1.0) -> None:
        self.time = 0.0
        self.slowness = slowness

    def work(self, seconds: float) -> None:
        """Take ``seconds`` of a machine that is not slow."""
        self.time += seconds * self.slowness(self.time)

    def call(self, seconds: float) -> Callable[[], None]:
        """A call that takes ``seconds``."""
        return lambda: self.work(seconds)

    def mark(self) -> float:
        return self.time

    def spans(self, marks: Sequence[float]) -> list[float]:
        return [after - before for before, after in pairwise(marks)]

    def now(self) -> float:
        return self.time
