"""A cut to a latency, on a clock that the layers themselves move."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import job
from job.errors import UsageError
from job.slimming import latency_target
from job.slimming.analysis import analyse
from job.slimming.cut import cut_network
from job.slimming.latency import network_latency
from job.slimming.latency.alternation import TimeLimits
from job.slimming.method import Method
from job.slimming.planning.allocation import Allocation
from job.slimming.planning.target import Budget
from support.clocks import FakeClock
from support.networks import Net, block


class Chain(Net):
    width, out = 64, 64

    def build(self) -> None:
        self.layers = nn.Sequential(block(64, 96), block(96, 64))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def seconds_of(layer: nn.Conv2d) -> float:
    """Time of a convolution on the machine of these tests: tiles of 8, and a constant."""
    whole = [math.ceil(n / 8) * 8 for n in layer.weight.shape[:2]]
    return 1e-5 + 1e-7 * whole[0] * whole[1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeClock:
    """Convolutions take a stated time; within a network less than they do alone when narrow."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clock, forward, network = FakeClock(), nn.Conv2d.forward, Net.forward
    inside = False

    def timed(self: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
        clock.work(seconds_of(self) ** (1.2 if inside else 1.0))
        return forward(self, images)

    def whole(self: Net, images: torch.Tensor) -> torch.Tensor:
        nonlocal inside
        inside = True
        try:
            return network(self, images)
        finally:
            inside = False

    monkeypatch.setattr(nn.Conv2d, "forward", timed)
    monkeypatch.setattr(Net, "forward", whole)
    monkeypatch.setattr(latency_target, "clock_of", lambda _device: clock)
    # nothing varies, so that few calls are enough
    monkeypatch.setattr(latency_target, "LIMITS", TimeLimits(0, 0, 0, min_rounds=1))
    monkeypatch.setattr(network_latency, "PROFILE_SECONDS", 0)
    return clock


def time_of(network: nn.Module) -> float:
    return sum(seconds_of(m) ** 1.2 for m in network.modules() if isinstance(m, nn.Conv2d))


def slim(network: nn.Module, target: str, **more: Any) -> tuple[nn.Module, Any]:
    images = torch.zeros(1, 3, 16, 16)
    return job.slim(network, images, target=target, importance="l2", compensate="none", **more)


@pytest.mark.parametrize("policy", ["global", "uniform"])
@pytest.mark.parametrize("target", [0.8, 0.5, 0.35])
def test_the_whole_network_meets_the_target(clock: FakeClock, target: float, policy: str) -> None:
    torch.manual_seed(0)
    network = Chain().eval()
    narrow, plan = slim(network, f"latency={target}", policy=policy)
    fraction = time_of(narrow) / time_of(network)
    assert plan.latency.fraction == pytest.approx(fraction, rel=1e-3)
    assert fraction <= target * 1.03
    assert fraction >= target * (0.93 if policy == "global" else 0.75)  # steps of 8 channels


def test_a_target_in_seconds(clock: FakeClock) -> None:
    network = Chain().eval()
    wanted = 0.6 * time_of(network)
    narrow, plan = slim(network, f"latency={1000 * wanted:.6f}ms")
    assert time_of(narrow) == pytest.approx(wanted, rel=0.07)
    assert plan.latency.after == pytest.approx(wanted, rel=0.07)
    assert str(plan.latency).startswith("latency: ")


def test_a_fraction_is_of_the_network_before_all_cuts(clock: FakeClock) -> None:
    """``gammaslim slim`` passes it for a model that is slim already."""
    base, image = Chain().eval(), torch.zeros(1, 3, 16, 16)
    slim_once, _ = slim(base, "latency=0.7")
    allocation = Allocation("global", Budget.parse("latency=0.5"))
    narrow, plan = cut_network(
        slim_once, analyse(slim_once, image), image, allocation, Method("l2"), timed_base=base
    )
    assert time_of(narrow) / time_of(base) == pytest.approx(0.5, rel=0.07)
    assert plan.latency
    assert plan.latency.fraction == pytest.approx(time_of(narrow) / time_of(base), rel=1e-3)


def test_what_is_out_of_reach_is_named_with_what_is_not(clock: FakeClock) -> None:
    with pytest.raises(UsageError, match=r"cannot be reached here: the minimum is latency=0\.\d+"):
        slim(Chain().eval(), "latency=0.01", min_keep=0.3)


def test_layers_are_measured_once(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Chain().eval()
    slim(network, "latency=0.6")

    def again(*_args: object) -> None:
        raise AssertionError("it is in the cache")

    monkeypatch.setattr(network_latency, "measure_table", again)
    slim(network, "latency=0.7")
    assert not any(m._forward_hooks for m in network.modules())


def test_the_network_is_left_as_it_was(clock: FakeClock) -> None:
    network = Chain().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.random.get_rng_state()
    slim(network, "latency=0.6")
    assert network.training
    assert torch.equal(state, torch.random.get_rng_state())
    after = network.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("text", "value", "absolute"),
    [
        ("latency=0.6", 0.6, False), ("latency=5ms", 0.005, True), ("latency=0.2s", 0.2, True),
        ("latency=80us", 80e-6, True), ("latency=2", 2.0, True), ("macs=0.5", 0.5, False),
    ],
)  # fmt: skip
def test_a_latency_is_a_fraction_or_has_a_unit(text: str, value: float, absolute: bool) -> None:
    budget = Budget.parse(text)
    assert budget.value == pytest.approx(value)
    assert budget.absolute == absolute


@pytest.mark.parametrize("text", ["latency=fast", "latency=0ms", "macs=5ms", "latency=ms"])
def test_a_latency_that_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a target"):
        Budget.parse(text)


@pytest.mark.parametrize("target", ["latency=0.6", "latency=0.2ms"])
def test_a_sensitivity_shows_what_a_cut_to_the_latency_keeps(clock: FakeClock, target: str) -> None:
    torch.manual_seed(0)
    network, images = Chain().eval(), torch.rand(20, 3, 16, 16)
    measured = job.sensitivity(network, images[:1], calibration=[images], target=target)
    assert measured.target == target.replace("0.2ms", "0.0002s")
    narrow, plan = job.slim(network, images[:1], calibration=[images], target=target)
    assert {row.group: row.kept for row in measured.rows} == {
        name: len(kept) for name, kept in plan.groups.items()
    }
    assert time_of(narrow) < 0.8 * time_of(network)


def test_a_sensitivity_says_which_latency_can_be_reached(clock: FakeClock) -> None:
    images = torch.rand(4, 3, 16, 16)
    with pytest.raises(UsageError, match=r"cannot be reached here: the minimum is latency=0\.\d+"):
        job.sensitivity(Chain().eval(), images, calibration=[images], target="latency=0.01")
