"""Ops that move channels: each kind is cut, and equals the masked wide network."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from job.errors import DataError, GammaslimError
from job.slimming.planning.layer_channels import LayerChannels, compose
from job.slimming.surgery.surgery import apply_plan
from support.cuts import randomise
from support.masked import halve, masked_network
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


class Mixed(nn.Module):
    """Depthwise kernels of several sizes for equal parts (Tan and Le 2019)."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        size = 24 // parts
        self.each = [size] * parts
        self.kernels = nn.ModuleList(
            nn.Conv2d(size, size, 3 + 2 * part, padding=1 + part, groups=size)
            for part in range(parts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.split(self.each, 1)
        return torch.cat([conv(part) for conv, part in zip(self.kernels, parts, strict=True)], 1)


class MixedHalves(Net):
    """Parts of one size, and halves of their results, as in MixNet."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        super().__init__()

    def build(self) -> None:
        self.wide, self.mixed = block(12, 24, 1), Mixed(self.parts)
        self.halves = nn.ModuleList([block(12, 8, 1), block(12, 4, 1)])

    def body(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.mixed(self.wide(x)).chunk(2, 1)
        return torch.cat([self.halves[0](left), self.halves[1](right)], 1)


@pytest.mark.parametrize("parts", [3, 4])
def test_parts_of_two_sizes_stay_equally_large(parts: int) -> None:
    torch.manual_seed(0)
    narrow, plan = halve(randomise(MixedHalves(parts)), IMAGE)
    assert [conv.in_channels for conv in narrow.mixed.kernels] == [12 // parts] * parts
    assert [half[0].in_channels for half in narrow.halves] == [6, 6]
    assert {b.layer for b in plan.blocked} == {"head"}


class Steps(nn.Module):
    """Halves of an expansion; each step adds to the last part, and all are concatenated (C2f)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.hidden, self.parts, self.whole = how, 8, [8, 8], 16
        self.expand, self.join = block(12, 16, 1), block(32, 12, 1)
        self.steps = nn.ModuleList(nn.Sequential(block(8, 8), block(8, 8)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.expand(x)
        if self.how == "numbers":
            parts = list(x.split((self.hidden, self.hidden), 1))
        elif self.how == "list":
            parts = list(torch.split(x, self.parts, dim=1))
        elif self.how == "slices":
            parts = [x[:, : self.hidden], x[:, self.hidden :]]
        elif self.how == "half":
            parts = list(x.split(self.whole // 2, 1))
        else:
            parts = [x.narrow(1, 0, self.hidden), x.narrow(1, self.hidden, self.hidden)]
        for step in self.steps:
            parts.append(parts[-1] + step(parts[-1]))
        return self.join(torch.cat(parts, 1))


class Partial(Net):
    def __init__(self, how: str) -> None:
        self.how = how
        super().__init__()

    def build(self) -> None:
        self.csp = Steps(self.how)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.csp(x)


@pytest.mark.parametrize("how", ["numbers", "list", "slices", "half", "narrow"])
def test_attributes_that_count_channels_are_those_of_the_narrow_network(how: str) -> None:
    torch.manual_seed(0)
    network = randomise(Partial(how))
    narrow, plan = halve(network, IMAGE)
    assert {b.layer for b in plan.blocked} == {"head"}
    assert narrow.csp.expand[0].out_channels == 8
    numbers = {"list": [4, 4], "half": 8}.get(how, 4)
    name = {"list": "parts", "half": "whole"}.get(how, "hidden")
    assert getattr(narrow.csp, name) == numbers
    assert (network.csp.hidden, network.csp.parts, network.csp.whole) == (8, [8, 8], 16)
    record = {layer: channels.to_dict() for layer, channels in plan.layers.items()}
    assert record["csp"]["sizes"][name] == numbers
    read = {layer: LayerChannels.from_dict(values) for layer, values in record.items()}
    assert read == plan.layers
    assert getattr(apply_plan(network, read).csp, name) == numbers
    # a second cut of the narrow network composes with the first
    narrower, later = job.slim(
        apply_plan(network, plan.layers), IMAGE, policy="uniform", target="width=0.5"
    )
    whole = apply_plan(network, compose(plan.layers, later.layers))
    torch.testing.assert_close(whole(IMAGE), narrower(IMAGE))


@pytest.mark.parametrize("sizes", [{"hidden": "8"}, {"hidden": -1}, {"not a name": 8}, [8]])
def test_sizes_that_are_no_numbers_are_refused(sizes: object) -> None:
    with pytest.raises(DataError, match="sizes of a module"):
        LayerChannels.from_dict({"sizes": sizes})


def test_an_attribute_that_is_no_number_is_never_set() -> None:
    layers = {"csp": LayerChannels(sizes=(("how", 4),))}
    with pytest.raises(GammaslimError, match="no number of channels 'how'"):
        apply_plan(Partial("list"), layers)


class Unequal(nn.Module):
    """Parts as large as the next layers' inputs, two of which share a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = block(3, 40)
        self.small, self.large, self.head = block(10, 10), block(20, 10), nn.Linear(30, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        few, many = self.small[0].in_channels, self.large[0].in_channels
        one, two, rest = torch.split(self.one(images), [few, few, many], 1)
        parts = [self.small(one), self.small(two), self.large(rest)]
        return self.head(torch.cat(parts, 1).mean((2, 3)))


def test_parts_of_unequal_sizes_are_cut_with_the_layers_that_give_them() -> None:
    torch.manual_seed(0)
    narrow, plan = halve(randomise(Unequal()), IMAGE)
    assert narrow.small[0].in_channels == 5
    assert narrow.large[0].in_channels == 10
    assert {b.layer for b in plan.blocked} == {"head"}


class Generator(nn.Module):
    """Features become a map."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(10, 192), nn.BatchNorm1d(192), nn.ReLU())
        self.one, self.out = block(12, 8), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        return self.out(self.one(self.fc(noise).view(-1, self.one[0].in_channels, 4, 4)))


def test_features_that_become_a_map_are_cut_by_channels() -> None:
    torch.manual_seed(0)
    narrow, plan = halve(randomise(Generator()), torch.rand(2, 10))
    assert (narrow.fc[0].out_features, narrow.one[0].in_channels) == (96, 6)
    assert {b.layer for b in plan.blocked} == {"out"}


class ByName(nn.Module):
    """Sizes of views by name, as in the CRNN of docTR."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16 * 8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        count, channels, height, width = x.shape
        x = torch.reshape(input=x, shape=(count, channels * height, width)).transpose(1, 2)
        x = self.last(x).view(size=(count, width * 5))
        return x.reshape(shape=(count, width, 5))


def test_the_sizes_of_a_view_may_be_passed_by_name() -> None:
    torch.manual_seed(0)
    wide, image = ByName().double().eval(), torch.rand(1, 3, 8, 12)
    narrow, plan = job.slim(wide, image, policy="uniform", target="width=0.5", importance="l2")
    assert (narrow.first.out_channels, narrow.last.in_features) == (8, 8 * 8)
    images = torch.rand(3, 3, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(narrow(images), masked_network(wide, plan.layers)(images))


class Merging(Net):
    """Patches of 2 x 2 places become one, channels last (Liu et al. 2021)."""

    def build(self) -> None:
        self.merge = nn.Linear(48, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.merge(x).permute(0, 3, 1, 2)


def test_channels_of_merged_patches_are_cut() -> None:
    torch.manual_seed(0)
    narrow, plan = halve(randomise(Merging()), IMAGE)
    assert (narrow.stem[0].out_channels, narrow.merge.in_features) == (6, 24)
    assert {b.layer for b in plan.blocked} == {"head"}


class NothingMore(Net):
    """Samples put together with no samples at all, e.g. of an expert that none was sent to."""

    def build(self) -> None:
        self.one, self.two = block(12, 12), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        nothing = torch.cat([x[:0], x[:0]])
        return self.two(torch.cat([torch.empty(0), x, nothing]))


def test_concatenated_parts_may_be_empty() -> None:
    torch.manual_seed(0)
    narrow, plan = halve(randomise(NothingMore()), IMAGE)
    assert (narrow.one[0].out_channels, narrow.two[0].in_channels) == (6, 6)
    assert {b.layer for b in plan.blocked} == {"head"}
