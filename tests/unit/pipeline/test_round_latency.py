"""The latency of a round next to the base's, and what measuring it leaves as it was."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from job.artifacts.records import RoundRecord
from job.models.student import StudentNet
from job.pipeline import round_latency
from job.pipeline.round_latency import measure_round
from job.report.latency import latency_cautions
from job.report.tables import rounds_table
from support.clocks import FakeClock

CPU = torch.device("cpu")
COSTS: dict[str, Any] = {"width": 1, "channels": 1, "params": 1, "macs": 1, "bytes": 1,
                         "valid_acc": 0.5, "valid_loss": 1.0, "step": 1}  # fmt: skip
AS_USERS = round_latency.QUICK, round_latency.MOST_REPEATS  # before tests are made brief


@pytest.fixture(autouse=True)
def _measured_as_for_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("QUICK", "MOST_REPEATS"), AS_USERS, strict=True):
        monkeypatch.setattr(round_latency, name, value)


class Slow(nn.Module):
    """Takes a stated time for each image."""

    def __init__(self, clock: FakeClock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds, self.head = clock, seconds, nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.clock.work(self.seconds * len(images))
        return self.head(images.mean((2, 3)))


class Counting(nn.Module):
    """Changes its buffer and draws random numbers in each pass, and refuses some images."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.head = size, nn.Linear(3, 2)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[-1] != self.size:
            raise ValueError("another size")
        self.passes += torch.rand(())
        return self.head(images.mean((2, 3)))


def test_a_round_is_as_many_times_as_fast_as_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(lambda now: 1 + 20 * now)
    monkeypatch.setattr(round_latency, "clock_of", lambda _device: clock)
    base, slim = Slow(clock, 0.002), Slow(clock, 0.001)
    latency, gain = measure_round(slim, base, 8, CPU)
    assert gain is not None
    assert gain.value == pytest.approx(2, rel=0.1)
    assert latency is not None
    assert latency >= 0.001
    assert measure_round(base, None, 8, CPU)[1] is None


def test_a_disturbed_measurement_goes_on_and_an_uncertain_one_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed, chance = mock.Mock(wraps=round_latency.time_alternately), random.Random(0)
    monkeypatch.setattr(round_latency, "time_alternately", timed)
    for clock, repeats in (FakeClock(), 1), (FakeClock(lambda _: 1 + 4 * chance.random()), 11):
        monkeypatch.setattr(round_latency, "clock_of", lambda _device, clock=clock: clock)
        timed.reset_mock()
        measure_round(Slow(clock, 0.001), Slow(clock, 0.002), 8, CPU)
        assert timed.call_count == repeats
    entry = RoundRecord(round=2, speedup=1.5, speedup_low=1.0, speedup_high=2.4, **COSTS)
    (caution,) = latency_cautions([entry], "runs/my run")
    assert "(round 2: 1.00x to 2.40x): gammaslim bench 'runs/my run' measures" in caution
    assert latency_cautions([replace(entry, speedup_low=1.4, speedup_high=1.6)], "a") == []


def test_measuring_changes_neither_networks_nor_random_numbers() -> None:
    network, base = Counting(32).train(), StudentNet(4, num_classes=3).eval()
    before = {name: t.clone() for name, t in (network.state_dict() | base.state_dict()).items()}
    state = torch.random.get_rng_state()
    latency, gain = measure_round(network, base, 32, CPU)
    assert latency
    assert gain
    assert torch.equal(state, torch.random.get_rng_state())
    after = network.state_dict() | base.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (network.training, base.training) == (True, False)


def test_a_network_that_cannot_be_measured_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert measure_round(Counting(32), None, 16, CPU) == (None, None)
    assert "the latency is not measured, the job continues: another size" in capsys.readouterr().err


def test_the_table_has_latencies_where_there_are_any() -> None:
    more = COSTS
    old = [RoundRecord(round=0, **more), RoundRecord(round=1, **more)]
    assert "latency" not in rounds_table(old)
    new = [RoundRecord(round=0, latency=0.0042, **more), old[1],
           RoundRecord(round=2, latency=0.003, speedup=1.4, **more)]  # fmt: skip
    cells = [line.split("  ") for line in rounds_table(new).splitlines()]
    assert [" 4.2 ms" in "  ".join(row) for row in cells] == [False, True, False, False]
    assert "3 ms" in "  ".join(cells[3])
    assert "1.40x" in "  ".join(cells[3])
