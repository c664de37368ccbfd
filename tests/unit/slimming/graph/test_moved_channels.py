"""Ops that move channels: each kind is cut, and equals the masked wide network."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from unit.slimming.graph.test_layer_kinds import halve

from support.cuts import randomise
from support.networks import Net, block

IMAGE = torch.rand(1, 3, 20, 28)


class Shuffled(Net):
    """Pixels of groups of channels, and back (Shi et al. 2016)."""

    out = 16

    def build(self) -> None:
        self.up, self.one = nn.Conv2d(12, 32, 3, padding=1), block(8, 8)
        self.two = block(32, 16)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(F.pixel_shuffle(self.up(x), 2))
        return self.two(F.pixel_unshuffle(x, 2))


def test_channels_that_become_pixels_of_one_are_cut_together() -> None:
    torch.manual_seed(0)
    narrow, plan = halve(randomise(Shuffled()), IMAGE)
    assert (narrow.up.out_channels, narrow.one[0].in_channels) == (16, 4)
    assert narrow.two[0].in_channels == 16
    assert {b.layer for b in plan.blocked} == {"head"}


class Larger(Net):
    """The larger of two halves (Wu et al. 2018)."""

    def __init__(self, how: str) -> None:
        self.how = how
        super().__init__()

    def build(self) -> None:
        self.one = nn.Sequential(nn.Conv2d(12, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24))
        self.two = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        if self.how == "view":
            x = x.view(len(x), x.shape[1] // 2, 2, *x.shape[2:]).amax(2)
        elif self.how == "open view":
            x = x.view(len(x), -1, 2, *x.shape[2:]).amin(2)
        else:
            x = torch.max(*x.chunk(2, 1))
        return self.two(x)


@pytest.mark.parametrize("how", ["max", "view", "open view"])
def test_the_larger_of_two_channels_is_cut_with_both(how: str) -> None:
    torch.manual_seed(0)
    narrow, _ = halve(randomise(Larger(how)), IMAGE)
    assert (narrow.one[0].out_channels, narrow.two[0].in_channels) == (12, 6)


class Nested(Net):
    """Halves, of which one is halved again (CSP), and a sum of quarters across them."""

    out = 16

    def build(self) -> None:
        self.one, self.left = block(12, 32), block(16, 8)
        self.quarters = nn.ModuleList([block(8, 4), block(8, 4)])

    def body(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.one(x).chunk(2, 1)
        high, low = right.chunk(2, 1)
        return torch.cat([self.left(left), self.quarters[0](high), self.quarters[1](low)], 1)


class NestedNorm(Nested):
    """The same after a GroupNorm, whose groups overlap with the halves."""

    def build(self) -> None:
        super().build()
        self.one = nn.Sequential(nn.Conv2d(12, 32, 1), nn.GroupNorm(8, 32), nn.ReLU())


@pytest.mark.parametrize("kind", [Nested, NestedNorm])
def test_nested_parts_stay_equally_large(kind: type[Net]) -> None:
    torch.manual_seed(0)
    narrow, plan = halve(randomise(kind()), IMAGE)
    assert (narrow.one[0].out_channels, narrow.left[0].in_channels) == (16, 8)
    assert [part[0].in_channels for part in narrow.quarters] == [4, 4]
    assert {b.layer for b in plan.blocked} == {"head"}
