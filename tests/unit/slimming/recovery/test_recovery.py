"""Recovery: a narrow network learns from the wide one, on images without labels."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import job
from job.distributed.collectives import digest
from job.slimming.analysis import analyse
from job.slimming.planning.plan import keep_of
from job.slimming.recovery import recovery
from job.slimming.recovery.losses import features_of
from job.slimming.recovery.recovery import Recovered, recover
from job.slimming.recovery.samples import Samples, Share, augmented
from support.cuts import randomise
from support.networks import PreActivation, Residual

if TYPE_CHECKING:
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids

BATCHES = [torch.rand(32, 3, 24, 24, generator=torch.Generator().manual_seed(n)) for n in range(6)]
EXAMPLE = BATCHES[0][:1]


def cut(network: nn.Module) -> tuple[nn.Module, ChannelGraph, Ids]:
    narrow, plan = job.slim(network, EXAMPLE, target="macs=0.6")
    graph = analyse(network, EXAMPLE)
    return narrow, graph, keep_of(graph, plan.groups)


def networks(kind: type[nn.Module] = Residual) -> tuple[nn.Module, nn.Module, ChannelGraph, Ids]:
    torch.manual_seed(0)
    wide = randomise(kind())
    return wide, *cut(wide)


def state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


@pytest.mark.parametrize("kind", [Residual, PreActivation])
def test_the_narrow_network_comes_closer_to_the_wide_one_on_images_it_has_not_seen(
    kind: type[nn.Module],
) -> None:
    wide, narrow, graph, keep = networks(kind)
    before = copy.deepcopy(narrow)
    recovered = recover(wide, narrow, graph, keep, lambda: BATCHES, 8)
    assert 0 < recovered.epoch <= 8
    assert recovered.after < recovered.before
    images = torch.rand(64, 3, 24, 24, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        target = wide.eval()(images)
        errors = [(net.eval()(images) - target).square().mean() for net in (narrow, before)]
    assert errors[0] < 0.95 * errors[1]


def test_nothing_but_the_weights_of_the_narrow_network_changes() -> None:
    wide, narrow, graph, keep = networks()
    wide.train()
    narrow.get_parameter("stem.0.weight").requires_grad_(False)
    narrow.get_submodule("one").train()
    before, modes = state(wide), [m.training for m in narrow.modules()]
    random = torch.get_rng_state()
    buffers = {key: value.clone() for key, value in narrow.named_buffers()}
    recover(wide, narrow, graph, keep, lambda: BATCHES, 1)
    assert all(torch.equal(value, before[key]) for key, value in wide.state_dict().items())
    assert all(torch.equal(value, buffers[key]) for key, value in narrow.named_buffers())
    assert [m.training for m in narrow.modules()] == modes
    assert all(m.training for m in wide.modules())
    assert all(p.grad is None for net in (wide, narrow) for p in net.parameters())
    frozen = [name for name, p in narrow.named_parameters() if not p.requires_grad]
    assert frozen == ["stem.0.weight"]
    assert not any(m._forward_pre_hooks for net in (wide, narrow) for m in net.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_same_images_give_the_same_bytes() -> None:
    wide, narrow, graph, keep = networks()
    again = copy.deepcopy(narrow)
    for network in (narrow, again):
        torch.manual_seed(id(network) % 1000)
        recover(wide, network, graph, keep, lambda: BATCHES, 2)
    assert digest(narrow.state_dict()) == digest(again.state_dict())


@pytest.mark.parametrize("rate", [1e3, float("nan")])
def test_where_nothing_is_won_the_network_stays_as_it_was(
    monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    monkeypatch.setattr(recovery, "LEARNING_RATE", rate)
    monkeypatch.setattr(recovery, "RATE_FACTOR", 1)
    wide, narrow, graph, keep = networks()
    before = digest(narrow.state_dict())
    recovered = recover(wide, narrow, graph, keep, lambda: BATCHES, 2)
    assert recovered.epoch == 0
    assert recovered.after == recovered.before
    assert digest(narrow.state_dict()) == before


@pytest.mark.parametrize("batches", [[], [EXAMPLE]], ids=["none", "one"])
def test_too_few_images_change_nothing(batches: list[torch.Tensor]) -> None:
    wide, narrow, graph, keep = networks()
    before = digest(narrow.state_dict())
    assert recover(wide, narrow, graph, keep, lambda: batches, 2).epoch == 0
    assert digest(narrow.state_dict()) == before


def test_features_are_the_same_channels_of_both_networks() -> None:
    """Where nothing is lost, the narrow network has the kept channels of the wide one."""
    wide, narrow, graph, keep = networks()
    features = features_of(wide, narrow, graph, keep)
    assert {f.layer for f in features} >= {"head"}
    for feature in features:
        layer = narrow.get_submodule(feature.layer)
        inputs = getattr(layer, "in_channels", None) or layer.in_features
        if feature.channels is not None:
            assert len(feature.channels) == inputs


def test_images_are_shifted_and_flipped_and_other_inputs_are_not() -> None:
    images = torch.arange(32.0).expand(40, 3, 32, 32).contiguous()
    numbers = np.arange(40)
    one = augmented(Share(numbers, images), 40, 1, 0)
    assert isinstance(one, torch.Tensor)
    assert one.shape == images.shape
    rows = {tuple(image[0, 16, 12:20].tolist()) for image in one}
    assert len(rows) > 10
    rising = [row[0] < row[-1] for row in rows]
    assert any(rising)
    assert not all(rising)
    assert all(abs(a - b) == 1 for row in rows for a, b in pairwise(row))
    assert not torch.equal(one, augmented(Share(numbers, images), 40, 2, 0))
    part = augmented(Share(numbers[7:9], images[7:9]), 40, 1, 0)
    assert torch.equal(part, one[7:9])
    for other in (torch.rand(4, 3), torch.rand(4, 64, 32, 32), {"x": images}):
        assert augmented(Share(np.arange(4), other), 4, 1, 0) is other


def test_batches_that_cannot_be_separated_are_one_sample_each() -> None:
    device = torch.device("cpu")
    inputs = [(torch.rand(3, 8, 8), torch.rand(3, 9, 9)), (torch.rand(3, 7, 7),)]
    assert Samples([(([*p],), None) for p in inputs], device).count == 2
    pairs = [((torch.rand(5, 3), torch.rand(5, 2)), None)]
    samples = Samples(pairs, device)
    assert (samples.count, len(samples.held_out)) == (5, 1)
    (share,) = samples.shares(np.array([3, 1]), 8)
    assert torch.equal(share.inputs[1], pairs[0][0][1][[3, 1]])


def test_held_out_samples_are_spread_over_images_in_the_order_of_their_classes() -> None:
    samples = Samples([(torch.rand(400, 3), None)], torch.device("cpu"))
    classes = np.repeat(np.arange(10), 40)
    assert set(classes[samples.held_out]) == set(range(10))
    assert len(samples.held_out) == 40
    assert sorted([*samples.held_out, *samples.learned]) == list(range(400))
    assert sorted(samples.order(1, 0)) == samples.learned.tolist()


def test_it_can_be_interrupted_at_every_step() -> None:
    wide, narrow, graph, keep = networks()
    names: list[str] = []

    def progress(name: str, number: int, count: int) -> None:
        names.append(name)
        if len(names) == 5:
            raise KeyboardInterrupt

    before = [m.training for m in narrow.modules()]
    with pytest.raises(KeyboardInterrupt):
        recover(wide, narrow, graph, keep, lambda: BATCHES, 2, progress=progress)
    assert names[-1] == "recovering, epoch 1 of 2, step"
    assert [m.training for m in narrow.modules()] == before
    assert not any(m._forward_pre_hooks for net in (wide, narrow) for m in net.modules())


def test_slim_recovers_and_needs_images_for_it() -> None:
    torch.manual_seed(0)
    wide = randomise(Residual())
    options: dict[str, Any] = {
        "target": "macs=0.6", "importance": "gamma", "compensate": "none", "calibration": BATCHES,
    }  # fmt: skip
    plain, _ = job.slim(wide, EXAMPLE, **options)
    better, plan = job.slim(wide, EXAMPLE, **options, recover=4)
    assert plan.proof
    assert digest(plain.state_dict()) != digest(better.state_dict())
    with torch.no_grad():
        target = wide.eval()(BATCHES[0])
        errors = [(net.eval()(BATCHES[0]) - target).square().mean() for net in (better, plain)]
    assert errors[0] < errors[1]


class Auxiliary(Residual):
    """A head that runs in train mode alone, whose inputs no pass in eval mode computes."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Conv2d(12, 5, 1)

    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return (y, self.auxiliary(self.stem(x)).mean((2, 3))) if self.training else y


def test_heads_that_run_in_train_mode_alone_are_not_compared() -> None:
    torch.manual_seed(0)
    wide = randomise(Auxiliary())
    narrow, _ = job.slim(wide, EXAMPLE, target="macs=0.6", calibration=BATCHES[:2], recover=1)
    assert len(narrow.train()(BATCHES[0])) == 2


def test_a_result_says_what_was_won() -> None:
    assert Recovered(1.0, 0.5, 2) == Recovered(before=1.0, after=0.5, epoch=2)
