"""Clocks of devices: marks in the stream of work, and the seconds between them."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Clock(Protocol):
    """Clock of one device. Marks are cheap; ``spans`` waits for the device."""

    def mark(self) -> Any:
        """Return a mark at this point in the work of the device."""

    def spans(self, marks: Sequence[Any]) -> list[float]:
        """Return the seconds between consecutive ``marks`` (M,), as (M - 1,)."""

    def now(self) -> float:
        """Return the wall-clock time in seconds, for time limits."""


class HostClock:
    """Clock of the CPU, whose calls are synchronous."""

    def mark(self) -> float:
        """Return the time in seconds."""
        return time.perf_counter()

    def spans(self, marks: Sequence[float]) -> list[float]:
        """Return the differences of consecutive times."""
        return [after - before for before, after in pairwise(marks)]

    def now(self) -> float:
        """Return the time in seconds."""
        return time.perf_counter()


class CudaClock(HostClock):
    """Clock of a GPU: events in its stream, which runs asynchronously.

    The time between two events includes the time in which the GPU waits for the CPU, e.g. at small
    batch sizes.
    """

    def mark(self) -> Any:
        """Record an event in the current stream."""
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def spans(self, marks: Sequence[Any]) -> list[float]:
        """Wait for the last event, and return the seconds between consecutive events."""
        marks[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(marks)]


def clock_of(device: torch.device) -> Clock:
    """Return the clock of ``device``."""
    return CudaClock() if device.type == "cuda" else HostClock()


def time_call(clock: Clock, call: Callable[[], object]) -> float:
    """Return the seconds that one ``call`` takes on the device."""
    before = clock.mark()
    call()
    return clock.spans([before, clock.mark()])[0]
