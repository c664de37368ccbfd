"""How long a run still takes, by what its epochs and cuts have taken so far."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from job.console import span

if TYPE_CHECKING:
    from collections.abc import Callable


class Forecast:
    """Follows a run: ``epochs`` are those of its base and of each of its ``rounds``.

    ``rounds`` None: nobody knows how many, and the time left is that of the present round.
    ``clock`` gives seconds.
    """

    def __init__(
        self,
        base_epochs: int,
        epochs: int,
        rounds: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.base_epochs, self.epochs, self.rounds, self.clock = base_epochs, epochs, rounds, clock
        self.round, self.epoch, self.share = 0, 0, 0.0
        self.cutting = False
        self.epoch_seconds: float | None = None  # of a whole one, its evaluation included
        self.cut_seconds: float | None = None
        self._began, self._first = clock(), 0.0  # of the present epoch or cut; the share then

    def name(self) -> str:
        """What to call the present round."""
        if not self.round:
            return "base"
        return f"round {self.round}" + ("" if self.rounds is None else f" of {self.rounds}")

    def begin(self, round_: int) -> None:
        """A round begins, with its cut if it is not the base."""
        self.round, self.epoch, self.share, self.cutting = round_, 0, 0.0, round_ > 0
        self._began = self.clock()

    def train(self, epoch: int, share: float) -> None:
        """``share`` of ``epoch`` is done; the cut is, then."""
        now = self.clock()
        if self.cutting:
            self.cut_seconds, self.cutting = now - self._began, False
            self._began, self._first = now, share
        elif epoch != self.epoch:
            self._began, self._first = now, share
        self.epoch, self.share = epoch, share

    def trained(self) -> None:
        """The present epoch is done, with its evaluation."""
        now, part = self.clock(), 1 - self._first
        if part > 0.5:
            self.epoch_seconds = (now - self._began) / part
        self.epoch, self.share = self.epoch + 1, 0.0
        self._began, self._first = now, 0.0

    def left(self) -> float | None:
        """Seconds; None while no epoch has got anywhere yet."""
        taken = self.clock() - self._began
        seconds = self.epoch_seconds
        if seconds is None and not self.cutting and self.share - self._first > 0:
            seconds = taken / (self.share - self._first)
        if seconds is None:
            return None
        own = self.epochs if self.round else self.base_epochs
        rounds = 0 if self.rounds is None else self.rounds - self.round
        cut = seconds if self.cut_seconds is None else self.cut_seconds
        whole = (own - self.epoch - self.share + rounds * self.epochs) * seconds + rounds * cut
        return max(0.0, whole + (max(0.0, cut - taken) if self.cutting else 0.0))

    def text(self) -> str:
        """``about 12 min left``, or nothing."""
        left = self.left()
        if left is None:
            return ""
        return f"about {span(left)} left" + (" in this round" if self.rounds is None else "")
