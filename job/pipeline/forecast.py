"""Forecast the remaining time of a run from its epochs and cuts so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from job.console import span

if TYPE_CHECKING:
    from collections.abc import Callable

TIMED = 0.5  # least fraction of an epoch that its duration is estimated from


@dataclass(frozen=True)
class Forecast:
    """The state of a forecast; methods that record progress return the next state.

    Without ``rounds`` it covers only the round in progress. ``clock`` returns seconds.
    """

    base_epochs: int
    epochs: int  # of each round
    rounds: int | None
    clock: Callable[[], float] = time.monotonic
    round: int = 0
    epoch: int = 0
    share: float = 0.0  # fraction of the epoch that is done
    cutting: bool = False
    began: float = 0.0  # start of the epoch or cut in progress
    share_before: float = 0.0  # fraction of the epoch done at that time
    epoch_seconds: float | None = None  # of a whole epoch, its evaluation included
    cut_seconds: float | None = None

    def name(self) -> str:
        """Return the name of the round in progress."""
        if not self.round:
            return "base"
        return f"round {self.round}" + ("" if self.rounds is None else f" of {self.rounds}")

    def begin(self, round_index: int) -> Forecast:
        """Return the forecast as a round begins, with its cut unless it is the base."""
        return replace(
            self, round=round_index, epoch=0, share=0.0, cutting=round_index > 0, began=self.clock()
        )

    def train(self, epoch: int, share: float) -> Forecast:
        """Return the forecast when the fraction ``share`` of ``epoch`` is done, after any cut."""
        now, following = self.clock(), replace(self, epoch=epoch, share=share)
        if self.cutting:
            took = now - self.began
            following = replace(following, cutting=False, cut_seconds=took)
        if self.cutting or epoch != self.epoch:
            following = replace(following, began=now, share_before=share)
        return following

    def trained(self) -> Forecast:
        """Return the forecast when the epoch in progress is done, with its evaluation."""
        now, part, seconds = self.clock(), 1 - self.share_before, self.epoch_seconds
        if part > TIMED:
            seconds = (now - self.began) / part
        return replace(
            self,
            epoch=self.epoch + 1,
            share=0.0,
            began=now,
            share_before=0.0,
            epoch_seconds=seconds,
        )

    def round_left(self) -> float | None:
        """Return the seconds left in the round in progress; None while that is unknown."""
        return replace(self, rounds=None).left()

    def left(self) -> float | None:
        """Return the seconds left; None until part of an epoch is timed."""
        elapsed = self.clock() - self.began
        seconds = self.epoch_seconds
        if seconds is None and not self.cutting and self.share - self.share_before > 0:
            seconds = elapsed / (self.share - self.share_before)
        if seconds is None:
            return None
        round_epochs = self.epochs if self.round else self.base_epochs
        rounds = 0 if self.rounds is None else self.rounds - self.round
        cut = seconds if self.cut_seconds is None else self.cut_seconds
        whole = (
            round_epochs - self.epoch - self.share + rounds * self.epochs
        ) * seconds + rounds * cut
        return max(0.0, whole + (max(0.0, cut - elapsed) if self.cutting else 0.0))

    def text(self) -> str:
        """Return ``about 12 min left``, or "" while that is unknown."""
        remaining = self.left()
        if remaining is None:
            return ""
        return f"about {span(remaining)} left" + (" in this round" if self.rounds is None else "")
