"""Times of layers within a network, and which of them explain that it is no faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from job.slimming.latency.explanation import bottlenecks, compare_profiles
from job.slimming.latency.profile import LayerTime, Profile, profile_alternately, random_images
from support.clocks import FakeClock


class Timed(nn.Module):
    """Takes a stated time; ``inner`` modules take theirs within it."""

    def __init__(self, clock: FakeClock, seconds: float, *inner: nn.Module) -> None:
        super().__init__()
        self.clock, self.seconds, self.inner = clock, seconds, nn.ModuleList(inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.work(self.seconds / 2)
        for module in self.inner:
            x = module(x)
        self.clock.work(self.seconds / 2)
        return x


def test_a_module_has_the_time_that_its_own_code_takes() -> None:
    clock = FakeClock()
    shared = Timed(clock, 0.25)
    block = Timed(clock, 1.0, shared, Timed(clock, 4.0), shared)
    network = Timed(clock, 2.0, block)
    (profile,) = profile_alternately([(network, torch.zeros(2, 3))], clock, 0)
    times = {name: layer.seconds for name, layer in profile.layers.items()}
    assert times == pytest.approx(
        {"": 2.0, "inner.0": 1.0, "inner.0.inner.0": 0.5, "inner.0.inner.1": 4.0}
    )
    assert profile.seconds == pytest.approx(7.5)
    assert profile.layers["inner.0.inner.1"].elements == 3
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_networks_are_profiled_in_turn_and_interrupted_passes_do_not_count() -> None:
    clock = FakeClock(lambda now: 1000.0 if 20 < now < 22 else 1.0)
    networks = [(Timed(clock, seconds), torch.zeros(1, 3)) for seconds in (1.0, 0.5)]
    wide, slim = profile_alternately(networks, clock, 10)
    assert (wide.seconds, slim.seconds) == pytest.approx((1.0, 0.5))


def test_random_images_use_a_generator_of_their_own() -> None:
    before = torch.random.get_rng_state()
    images = random_images((2, 3, 8, 8), torch.device("cpu"), torch.float32)
    assert torch.equal(before, torch.random.get_rng_state())
    assert images.std() > 0.5


def profile(*layers: tuple[str, float, int]) -> Profile:
    return Profile({name: LayerTime(name, "Conv2d", s, n) for name, s, n in layers}, {}, {})


def test_the_layers_whose_time_did_not_fall_are_named_the_worst_first() -> None:
    before = profile(("stem", 1.0, 64), ("deep", 6.0, 64), ("act", 2.0, 64), ("head", 1.0, 10))
    after = profile(("stem", 0.9, 64), ("deep", 5.8, 32), ("act", 1.0, 32), ("head", 1.0, 10))
    macs = {"stem": 100, "deep": 600, "head": 5}, {"stem": 90, "deep": 150, "head": 5}
    changes = compare_profiles(before, after, *macs)
    by_name = {change.layer: change for change in changes}
    assert by_name["deep"].work == 0.25
    assert by_name["act"].work == 0.5  # by its outputs: it has no multiply-adds
    assert by_name["deep"].share_before == pytest.approx(0.6)
    assert by_name["deep"].share_after == pytest.approx(5.8 / 8.7)
    assert [change.layer for change in bottlenecks(changes)] == ["deep"]
    assert str(by_name["deep"]) == "deep (Conv2d, 67% of the time: 1.03x for 4.00x less work)"


def test_a_layer_that_is_gone_takes_no_time() -> None:
    one, other = profile(("a", 1.0, 8), ("b", 1.0, 8)), profile(("a", 1.0, 8))
    gone = compare_profiles(one, other, {}, {})[1]
    assert (gone.after, gone.work, gone.excess) == (0, None, 0)
    assert bottlenecks([gone]) == []
