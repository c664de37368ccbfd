"""A stream that more layers read than BatchNorms select from is cut itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import job
from support.cuts import randomise
from support.masked import assert_equal_to_masked
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
