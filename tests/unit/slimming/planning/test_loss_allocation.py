"""Allocation by loss curves: which groups are cut, and which branches are removed whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from job.errors import UsageError
from job.slimming.analysis import analyse
from job.slimming.graph.groups import ChannelGraph
from job.slimming.planning.allocation import Allocation, make_plan
from job.slimming.planning.loss_curves import LossCurve, fit_curve
from job.slimming.planning.plan import Plan
from job.slimming.planning.target import Budget
from job.slimming.surgery.removable import removable_groups
from support.cuts import randomise
from support.networks import Net, block

IMAGE = torch.rand(1, 3, 16, 16)


class Branches(Net):
    """Two bottlenecks of equal cost on a stream of 12 channels."""

    def build(self) -> None:
        self.one, self.two = (
            nn.Sequential(block(12, 16, 1), block(16, 16), nn.Conv2d(16, 12, 1)) for _ in range(2)
        )

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.one(x)
        return x + self.two(x)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Branches())


@pytest.fixture(scope="module")
def graph(network: nn.Module) -> ChannelGraph:
    return analyse(network, IMAGE)


def curves(
    network: nn.Module, graph: ChannelGraph, losses: Mapping[str, float], steep: float = 0.2
) -> dict[str, LossCurve]:
    """Curves of equal shape, and the ``losses`` of groups without any unit, by name."""
    removable = removable_groups(network, graph, IMAGE)
    assert removable == {"one.0.0", "one.1.0", "two.0.0", "two.1.0"}
    result = {}
    for group in graph.groups:
        half, lost = group.size // 2, losses.get(group.name, 9.0)
        curve = fit_curve([0, half], [max(lost, steep), steep], group.size)
        removed = group.name in removable
        result[group.name] = curve.with_removal(lost) if removed else curve
    return result


def allocate(
    network: nn.Module, found: Mapping[str, LossCurve], target: str, min_keep: float = 0.1
) -> Plan:
    graph = analyse(network, IMAGE)
    scores = np.random.default_rng(0).random(graph.count)
    allocation = Allocation("global", Budget.parse(target), min_keep=min_keep)
    return make_plan(network, graph, scores, allocation, curves=found)


def removed(plan: Plan) -> set[str]:
    return {name for name, kept in plan.groups.items() if not kept}


def test_a_branch_that_loses_least_is_removed_with_its_whole_bottleneck(
    network: nn.Module, graph: ChannelGraph
) -> None:
    # what is measured behind the last group of a bottleneck holds for the first one too
    found = curves(network, graph, {"two.1.0": 0.01})
    plan = allocate(network, found, "macs=0.7")
    assert removed(plan) == {"two.0.0", "two.1.0"}
    assert plan.after.macs <= 0.7 * plan.before.macs
    rest = [kept for name, kept in plan.groups.items() if name not in removed(plan)]
    assert all(rest)


@pytest.mark.parametrize("target", ["macs=0.7", "params=0.6", "channels=0.5", "bytes=0.7"])
def test_a_branch_that_loses_much_stays(
    network: nn.Module, graph: ChannelGraph, target: str
) -> None:
    plan = allocate(network, curves(network, graph, {}), target)
    assert not removed(plan)
    kept = {name: replace(c, removable=False) for name, c in curves(network, graph, {}).items()}
    assert allocate(network, kept, target).groups == plan.groups


def test_removal_is_weighed_with_what_the_group_has_lost_already(
    network: nn.Module, graph: ChannelGraph
) -> None:
    # at a mild target the curves are cheaper; at a harsh one a branch is, whose width is lost then
    found = curves(network, graph, {"one.1.0": 0.3}, steep=0.1)
    assert not removed(allocate(network, found, "macs=0.4"))
    assert removed(allocate(network, found, "macs=0.3")) == {"one.0.0", "one.1.0"}


def test_removal_reaches_targets_that_widths_do_not(
    network: nn.Module, graph: ChannelGraph
) -> None:
    found = curves(network, graph, {})
    narrow = {name: replace(curve, removable=False) for name, curve in found.items()}
    with pytest.raises(UsageError, match="cannot be reached"):
        allocate(network, narrow, "params=0.25", 0.6)
    assert removed(allocate(network, found, "params=0.25", 0.6))
