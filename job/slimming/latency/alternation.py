"""Alternation: several calls timed in turn, so that a slower machine slows down all of them.

A round times each call a few times, after one call that is not timed and that brings its weights
back into the caches. The next round takes the calls in the opposite order. Speed-ups compare the
calls within each round, so that neither the drift of a clock nor other programs change them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from job.slimming.latency.clock import time_call
from job.slimming.latency.statistics import Series

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from job.slimming.latency.clock import Clock

SETTLED = 0.05  # of the time of a call: a warm-up ends when its calls vary less
MAX_WARMUPS = 5  # times the warm-up may be longer than planned until calls settle


@dataclass(frozen=True)
class TimeLimits:
    """Time limits of a measurement: ``seconds`` for each call after a warm-up, and of rounds.

    A round of one call lasts about ``burst`` seconds and times it at most ``most_calls`` times.
    """

    seconds: float = 2.0
    warmup: float = 0.3
    burst: float = 0.02
    most_calls: int = 10
    least_rounds: int = 8
    most_rounds: int = 1000


def time_alternately(
    calls: Sequence[Callable[[], object]], clock: Clock, limits: TimeLimits
) -> list[Series]:
    """Return the times of each of ``calls``, measured in turn, after a warm-up."""
    typical = [warm_up(call, clock, limits) for call in calls]
    counts = [
        max(1, min(limits.most_calls, round(limits.burst / max(seconds, 1e-9))))
        for seconds in typical
    ]
    bursts: list[list[tuple[float, ...]]] = [[] for _ in calls]
    order = list(range(len(calls)))
    end = clock.now() + limits.seconds * len(calls)
    for number in range(limits.most_rounds):
        if number >= limits.least_rounds and clock.now() >= end:
            break
        for place in order:
            bursts[place].append(_burst(calls[place], counts[place], clock))
        order.reverse()
    return [Series(tuple(own)) for own in bursts]


def _burst(call: Callable[[], object], count: int, clock: Clock) -> tuple[float, ...]:
    """Return the times of ``count`` calls, after one that is not timed.

    A call that fills a burst alone brings its weights into the caches itself.
    """
    if count > 1:
        call()
    return tuple(time_call(clock, call) for _ in range(count))


def warm_up(call: Callable[[], object], clock: Clock, limits: TimeLimits) -> float:
    """Repeat ``call`` until its time is stable; return that time in seconds."""
    times = [time_call(clock, call)]  # the first call allocates memory and chooses kernels
    begin = clock.now()
    while True:
        times.append(time_call(clock, call))
        elapsed = clock.now() - begin
        half = max(1, len(times) // 2)
        now, before = np.median(times[half:]), np.median(times[half // 2 : half])
        settled = len(times) >= 4 and abs(now - before) <= SETTLED * before
        if elapsed >= (limits.warmup if settled else MAX_WARMUPS * limits.warmup):
            return float(now)
