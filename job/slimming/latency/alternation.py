"""Measurement of several calls in turn, so that a slower machine slows down all of them.

A round times each call a few times, after an untimed call that loads its weights into the caches.
The next round takes the calls in the opposite order. Speed-ups compare the calls of one round, so
that they depend neither on clock drift nor on other programs.
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

STABLE = 0.05  # relative change of the median below which a warm-up ends
MAX_WARMUP_FACTOR = 5  # longest warm-up relative to the planned one


@dataclass(frozen=True)
class TimeLimits:
    """Limits of a measurement: ``seconds`` for each call after a warm-up, and rounds.

    A round of one call lasts about ``burst`` seconds and times it at most ``max_calls`` times.
    """

    seconds: float = 2.0
    warmup: float = 0.3
    burst: float = 0.02
    max_calls: int = 10
    min_rounds: int = 8
    max_rounds: int = 1000


def time_alternately(
    calls: Sequence[Callable[[], object]], clock: Clock, limits: TimeLimits
) -> list[Series]:
    """Return the times of each of ``calls``, measured in turn, after a warm-up."""
    typical = [warm_up(call, clock, limits) for call in calls]
    counts = [
        max(1, min(limits.max_calls, round(limits.burst / max(seconds, 1e-9))))
        for seconds in typical
    ]
    bursts: list[list[tuple[float, ...]]] = [[] for _ in calls]
    order = list(range(len(calls)))
    end = clock.now() + limits.seconds * len(calls)
    for number in range(limits.max_rounds):
        if number >= limits.min_rounds and clock.now() >= end:
            break
        for place in order:
            bursts[place].append(_burst(calls[place], counts[place], clock))
        order.reverse()
    return [Series(tuple(rounds)) for rounds in bursts]


def _burst(call: Callable[[], object], count: int, clock: Clock) -> tuple[float, ...]:
    """Return the times of ``count`` calls, after an untimed call.

    A single long call needs no untimed one: it loads its weights into the caches itself.
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
        settled = len(times) >= 4 and abs(now - before) <= STABLE * before
        if elapsed >= (limits.warmup if settled else MAX_WARMUP_FACTOR * limits.warmup):
            return float(now)
