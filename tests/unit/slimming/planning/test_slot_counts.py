"""Numbers of channels in slots by numbers of units, against the mask of all channels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from job.slimming.analysis import analyse
from job.slimming.planning.cost_model import CostModel
from job.slimming.planning.ranked_groups import KeptChannels, rank_groups
from job.slimming.planning.slot_counts import SlotCounts
from job.slimming.surgery.removable import removable_groups
from support import networks

IMAGE = torch.rand(1, 3, 64, 64)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "shufflenet": torchvision.models.shufflenet_v2_x0_5,  # blocks
    "vgg11_bn": torchvision.models.vgg11_bn,  # several columns a channel
    "Residual": networks.Residual,
    "Grouped": networks.Grouped,
    "Dense": networks.Dense,
    "PreActivation": networks.PreActivation,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_they_are_those_of_the_mask(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    graph = analyse(network, IMAGE)
    random = np.random.default_rng(0)
    groups = rank_groups(
        graph, random.random(graph.count), removable=removable_groups(network, graph, IMAGE)
    )
    some = groups[1:]  # the channels of the first group are all kept
    for ranked in (groups, some, []):
        costs, kept = CostModel(network, graph), KeptChannels(graph, ranked)
        slot_counts = SlotCounts(costs, kept)
        for trial in range(40):
            counts = [int(random.integers(1, len(r.units) + 1)) for r in ranked]
            for number, r in enumerate(ranked):
                if trial % 2 and r.removable and random.random() < 0.3:
                    counts[number] = 0
            np.testing.assert_array_equal(slot_counts(counts), costs.slot_counts(kept(counts)))
    assert any(r.removable for r in groups) or name not in ("resnet18", "mobilenet_v2")
