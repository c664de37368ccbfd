"""A stream that more layers read than BatchNorms select from is cut itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from support.cuts import randomise
from support.masked import assert_equal_to_masked, halve
from support.networks import PreActivation, block

IMAGES = torch.rand(2, 3, 16, 16)


class NormAtTheEnd(nn.Module):
    """Blocks that read the stream, and one BatchNorm of their sum (StarNet, EfficientViT)."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(*block(12, 16), nn.Conv2d(16, 12, 1)) for _ in range(blocks)
        )
        self.norm, self.head = nn.BatchNorm2d(12), nn.Linear(12, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        for layer in self.blocks:
            x = x + layer(x)
        return self.head(self.norm(x).mean((2, 3)))


@pytest.mark.parametrize(("blocks", "inputs"), [(3, 6), (1, 12)])
def test_a_norm_at_the_end_does_not_keep_the_stream_of_several_blocks(
    blocks: int, inputs: int
) -> None:
    torch.manual_seed(0)
    network = randomise(NormAtTheEnd(blocks))
    narrow, plan = job.slim(network, IMAGES[:1], policy="uniform", target="width=0.5")
    assert narrow.get_submodule("blocks.0.0").in_channels == inputs
    assert_equal_to_masked(network, narrow, plan.layers, IMAGES)


def test_pre_activation_still_selects() -> None:
    torch.manual_seed(0)
    network = randomise(PreActivation())
    narrow, plan = job.slim(network, IMAGES[:1], policy="uniform", target="width=0.5")
    assert plan.layers["n1"].select is None or len(plan.layers["n1"].select) == 6
    assert narrow.get_submodule("stem.0").out_channels == 12
    assert_equal_to_masked(network, narrow, plan.layers, IMAGES)


class Shuffled(nn.Module):
    """A unit of ShuffleNet v1 (Zhang et al. 2018); with a stride, its inputs are concatenated."""

    def __init__(self, inputs: int, outputs: int, groups: int, stride: int, first: int) -> None:
        super().__init__()
        width, own = outputs // 4, outputs - inputs * (stride == 2)
        self.one, self.norm = nn.Conv2d(inputs, width, 1, groups=first), nn.BatchNorm2d(width)
        self.two = nn.Conv2d(width, width, 3, stride, 1, groups=width)
        self.three = nn.Conv2d(width, own, 1, groups=groups)
        self.shuffle, self.stride = nn.ChannelShuffle(groups), stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.three(self.two(self.shuffle(self.norm(self.one(x)).relu())))
        if self.stride == 1:
            return (x + y).relu()
        return torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1).relu()


@pytest.mark.parametrize(("groups", "widths"), [(3, (240, 480)), (4, (272, 544))])
def test_groups_of_several_sizes_in_one_stream_lose_channels_evenly(
    groups: int, widths: tuple[int, int]
) -> None:
    """Parts of 24 + 3 x 72 channels are groups of 3 x 80, and the shuffled ones end within thirds.

    Half of the former leave; of the latter those that are in one group alone.
    """
    torch.manual_seed(0)
    units, inputs = [], 24
    for stage, width in enumerate(widths):
        first = groups if stage else 1  # in the first unit
        units += [
            Shuffled(inputs, width, groups, 2, first),
            Shuffled(width, width, groups, 1, groups),
        ]
        inputs = width
    stem = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 5))
    network = randomise(nn.Sequential(stem, *units, head))
    narrow, _ = halve(network, torch.rand(2, 3, 16, 16), min_keep=0)
    assert narrow[1].three.out_channels == network[1].three.out_channels // 2
    assert narrow[2].one.out_channels <= 0.6 * network[2].one.out_channels
    left = sum(p.numel() for p in narrow.parameters())
    assert left < 0.31 * sum(p.numel() for p in network.parameters())
