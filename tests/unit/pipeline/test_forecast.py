"""The time left is that of a run as it goes."""

from __future__ import annotations

from typing import Any

import pytest

from job.pipeline.forecast import Forecast


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def run_through(
    forecast: Forecast, clock: Clock, epoch: float, cut: float
) -> tuple[Forecast, list[Any]]:
    """A base of 2 epochs, 3 rounds of 2: at each batch the time, and the forecast time left."""
    said = []
    for round_ in range(4):
        forecast = forecast.begin(round_)
        if round_:
            clock.now += cut / 2
            said.append((clock.now, forecast.left()))
            clock.now += cut / 2
        for number in range(2):
            for batch in range(10):
                forecast = forecast.train(number, batch / 10)
                said.append((clock.now, forecast.left()))
                clock.now += epoch / 10
            forecast = forecast.trained()
    return forecast, said


def test_the_time_left_is_that_of_the_whole_run() -> None:
    clock = Clock()
    forecast = Forecast(2, 2, 3, clock)
    forecast, said = run_through(forecast, clock, epoch=10, cut=10)
    assert said[0][1] is None  # nothing is known yet
    for now, left in said[1:]:
        assert left == pytest.approx(clock.now - now, abs=1e-6)
    assert forecast.text() == "about 5 s left"
    clock, slow = Clock(), []
    _, slow = run_through(Forecast(2, 2, 3, clock), clock, epoch=10, cut=100)
    for now, left in slow[40:]:  # once a cut has been timed
        assert left == pytest.approx(clock.now - now, abs=1e-6)


def test_of_an_unknown_number_of_rounds_the_time_left_is_the_present_ones() -> None:
    clock = Clock()
    forecast = Forecast(2, 2, None, clock)
    forecast = forecast.begin(0)
    forecast = forecast.train(0, 0.0)
    clock.now = 300
    forecast = forecast.train(0, 0.5)
    assert forecast.name() == "base"
    assert forecast.text() == "about 15 min left in this round"


def test_a_resumed_epoch_does_not_pass_for_a_whole_one() -> None:
    clock = Clock()
    forecast = Forecast(1, 2, 2, clock)
    forecast = forecast.begin(1)
    forecast = forecast.train(1, 0.8)  # where it was saved: there was no cut
    clock.now = 10
    forecast = forecast.train(1, 0.9)
    assert forecast.left() == pytest.approx(10 + 2 * 100 + forecast.cut_seconds)
