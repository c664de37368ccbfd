"""Calls timed in turn: drift, outliers and warm-up do not move what is reported."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from job.slimming.latency.alternation import TimeLimits, time_alternately
from job.slimming.latency.clock import clock_of, time_call
from job.slimming.latency.statistics import Series, latency_of, speedup
from support.clocks import FakeClock


def test_a_machine_that_slows_down_does_not_change_the_speed_up() -> None:
    clock = FakeClock(lambda now: 1.0 + now)  # after two seconds a third of the speed
    wide, slim = clock.call(0.010), clock.call(0.005)
    one, other = time_alternately([wide, slim], clock, TimeLimits(seconds=2, warmup=0.01))
    gain = speedup(one, other)
    assert gain.value == pytest.approx(2, rel=0.03)
    assert gain.low <= 2 <= gain.high
    assert gain.faster
    assert latency_of(one, 1).drift > 0.5
    first, last = (np.array(s.rounds[0]).mean() / np.array(o.rounds[-1]).mean()
                   for s, o in ((one, other), (other, one)))  # fmt: skip
    assert first != pytest.approx(2, rel=0.3)  # one after the other it would
    assert 1 / last != pytest.approx(2, rel=0.3)


def test_calls_that_other_programs_interrupt_are_counted_and_move_no_median() -> None:
    clock, number = FakeClock(), 0

    def interrupted() -> None:
        nonlocal number
        number += 1
        clock.work(0.5 if number % 12 == 0 else 0.004)

    one, other = time_alternately([interrupted, clock.call(0.004)], clock, TimeLimits(seconds=5))
    latency = latency_of(one, 8)
    assert latency.median == pytest.approx(0.004)
    assert latency.images_per_second == pytest.approx(2000)
    assert latency.p99 == pytest.approx(0.5)  # what happened is told
    assert 0.05 < latency.outliers / latency.samples < 0.12
    gain = speedup(one, other)
    assert gain.value == pytest.approx(1)
    assert not gain.faster


def test_slow_first_calls_are_no_samples() -> None:
    clock, number = FakeClock(), 0

    def compiling() -> None:
        nonlocal number
        number += 1
        clock.work(max(0.001, 0.2 / 2**number))

    (series,) = time_alternately([compiling], clock, TimeLimits(seconds=0.1, warmup=0.05))
    assert latency_of(series, 1).p99 == pytest.approx(0.001)


def test_the_limits_hold_for_short_and_long_calls() -> None:
    clock = FakeClock()
    limits = TimeLimits(seconds=1, warmup=0.1)
    short, long = time_alternately([clock.call(1e-4), clock.call(1.5)], clock, limits)
    assert len(short.rounds) == len(long.rounds) == limits.min_rounds
    assert {len(times) for times in short.rounds} == {limits.max_calls}
    assert {len(times) for times in long.rounds} == {1}
    before = clock.now()
    time_alternately([clock.call(1e-4)], clock, limits)
    assert clock.now() - before < 1.5


def test_the_order_of_the_calls_is_reversed_each_round() -> None:
    clock, calls = FakeClock(), ""

    def named(name: str) -> None:
        nonlocal calls
        calls += name
        clock.work(0.03)

    limits = TimeLimits(seconds=0, warmup=0, min_rounds=3)
    time_alternately([lambda: named("a"), lambda: named("b"), lambda: named("c")], clock, limits)
    assert calls.endswith("abccbaabc")


@pytest.mark.parametrize("ratio", [1.0, 1.015, 0.5])
def test_no_or_little_gain_is_not_called_faster(ratio: float) -> None:
    rng = np.random.default_rng(0)
    noise = rng.uniform(0.9, 1.1, (2, 100))
    one = Series(tuple((0.01 * n,) for n in noise[0]))
    other = Series(tuple((0.01 / ratio * n,) for n in noise[1]))
    assert not speedup(one, other).faster
    assert speedup(one, Series(tuple((0.005 * n,) for n in noise[1]))).faster


def test_the_clock_of_the_cpu_measures_the_call() -> None:
    seconds = time_call(clock_of(torch.device("cpu")), lambda: time.sleep(0.02))
    assert 0.02 <= seconds < 5
