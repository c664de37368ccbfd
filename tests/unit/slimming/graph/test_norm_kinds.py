"""Norms over channels, and parameters a channel: cut, with statistics of what is kept."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import job
from job.slimming.analysis import analyse
from job.slimming.planning.layer_channels import LayerChannels
from job.slimming.surgery.surgery import apply_plan
from support.cuts import randomise
from support.masked import assert_equal_to_masked, halve
from support.networks import Net, block

if TYPE_CHECKING:
    from collections.abc import Callable

IMAGE = torch.rand(1, 3, 20, 28)


class Normed(Net):
    """Two convolutions, each with a norm after it."""

    width = out = 16

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        self.kind = norm
        super().__init__()

    def build(self) -> None:
        self.one, self.two = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 1)
        self.norms = nn.ModuleList([self.kind(32), self.kind(16)])

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norms[0](self.one(x)))
        return F.relu(self.norms[1](self.two(x)))


def scramble(network: nn.Module) -> nn.Module:
    """Random weights for all norms."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "norm" in name:
            parameter.data = torch.rand(parameter.shape, generator=generator) + 0.3
    return randomise(network)


NORMS = {
    "group": lambda channels: nn.GroupNorm(4, channels),
    "one group": lambda channels: nn.GroupNorm(1, channels),
    "plain group": lambda channels: nn.GroupNorm(2, channels, affine=False),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "tracked instance": lambda channels: nn.InstanceNorm2d(channels, track_running_stats=True),
    "plain instance": nn.InstanceNorm2d,
    "frozen": torchvision.ops.FrozenBatchNorm2d,
    "plain batch": lambda channels: nn.BatchNorm2d(
        channels, affine=False, track_running_stats=False
    ),
}


@pytest.mark.parametrize("kind", NORMS)
def test_channels_before_a_norm_are_cut(kind: str) -> None:
    torch.manual_seed(0)
    network = scramble(Normed(NORMS[kind]))
    narrow, plan = halve(network, IMAGE)
    assert (narrow.one.out_channels, narrow.two.out_channels) == (16, 8)
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    for norm, channels in zip(narrow.norms, (16, 8), strict=True):
        size = getattr(norm, "num_channels", getattr(norm, "num_features", channels))
        assert size == channels


def test_equally_many_channels_leave_each_group_and_small_groups_leave_whole() -> None:
    torch.manual_seed(0)
    narrow, _ = halve(scramble(Normed(lambda channels: nn.GroupNorm(4, channels))), IMAGE)
    assert [norm.num_groups for norm in narrow.norms] == [4, 4]
    torch.manual_seed(0)
    network = scramble(Normed(lambda channels: nn.GroupNorm(channels // 2, channels)))
    narrow, _ = halve(network, IMAGE)
    assert [norm.num_groups for norm in narrow.norms] == [8, 4]
    # whole groups do not change the statistics of the others: the inputs alone are zeroed
    narrow, plan = job.slim(
        network, IMAGE, policy="uniform", target="width=0.5", importance="random"
    )
    assert_equal_to_masked(network, narrow, plan.layers, IMAGE)


class Scattered(nn.Module):
    """Applies ``inner`` to the channels ``kept``; the others are zero."""

    def __init__(self, inner: Callable[[torch.Tensor], torch.Tensor], kept: list[int]) -> None:
        super().__init__()
        self.inner, self.kept = inner, kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        full = torch.zeros_like(x)
        full[:, self.kept] = self.inner(x[:, self.kept])
        return full


def test_neighbours_of_a_local_response_norm_are_those_that_are_kept() -> None:
    torch.manual_seed(0)
    network = scramble(Normed(lambda _: nn.LocalResponseNorm(3)))
    narrow, plan = job.slim(network, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    assert (narrow.one.out_channels, narrow.two.out_channels) == (16, 8)
    wide = copy.deepcopy(network)
    for number, layer in enumerate(("one", "two")):
        norm = Scattered(nn.LocalResponseNorm(3), list(plan.layers[layer].out))
        wide.set_submodule(f"norms.{number}", norm)
    assert_equal_to_masked(wide, narrow, plan.layers, IMAGE)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of images (B, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.movedim(1, -1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).movedim(
            -1, 1
        )


class ConvNext(Net):
    """A stem with LayerNorm, blocks with a hidden layer and a scale a channel, as ConvNeXt's."""

    width = out = 16

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        self.kind = norm
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), LayerNorm2d(16))

    def build(self) -> None:
        self.deep = nn.ModuleList(nn.Conv2d(16, 16, 3, 1, 1, groups=16) for _ in range(2))
        self.norms = nn.ModuleList(self.kind(16) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(16, 32) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(32, 16) for _ in range(2))
        self.scale = nn.ParameterList(torch.rand(16) for _ in range(2))
        self.last = LayerNorm2d(16)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for deep, norm, up, down, scale in zip(
            self.deep, self.norms, self.up, self.down, self.scale, strict=True
        ):
            y = norm(deep(x).permute(0, 2, 3, 1))
            x = x + (down(F.gelu(up(y))).permute(0, 3, 1, 2)) * scale.view(1, -1, 1, 1)
        return self.last(x)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_layer_norms_in_both_layouts_are_cut_with_their_stream(norm: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = scramble(ConvNext(lambda channels: norm(channels, eps=1e-5)))
    narrow, plan = halve(network, torch.rand(2, 3, 24, 32))
    assert plan.after.params < 0.36 * plan.before.params
    assert narrow.norms[0].normalized_shape == (8,)
    assert [scale.shape for scale in narrow.scale] == [(8,), (8,)]
    assert {blocked.layer for blocked in plan.blocked} == {"head"}


def test_a_layer_norm_without_weights_is_cut() -> None:
    torch.manual_seed(0)
    network = ConvNext(lambda channels: nn.LayerNorm(channels, elementwise_affine=False))
    narrow, plan = halve(scramble(network), torch.rand(2, 3, 24, 32))
    assert narrow.norms[0].normalized_shape == (8,)
    assert plan.layers["norms.0"].out == plan.layers["deep.0"].out


class Unit(nn.Module):
    """Divides by the norm over channels, times a scale a channel (Liu et al. 2016)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.scale = how, nn.Parameter(torch.rand(12) + 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "sum":
            x = x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
        elif self.how == "normalize":
            x = F.normalize(x, dim=1)
        elif self.how == "norm":
            x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
        else:
            x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
        return self.scale.unsqueeze(0).unsqueeze(2)[..., None].expand_as(x) * x


class Scaled(Net):
    def __init__(self, how: str) -> None:
        self.how = how
        super().__init__()

    def build(self) -> None:
        self.one, self.unit, self.two = block(12, 12), Unit(self.how), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.unit(self.one(x)))


@pytest.mark.parametrize("how", ["sum", "normalize", "norm", "mean"])
def test_statistics_across_channels_are_those_of_the_kept_ones(how: str) -> None:
    torch.manual_seed(0)
    network = randomise(Scaled(how))
    narrow, plan = job.slim(network, IMAGE, policy="uniform", target="width=0.5")
    assert plan.proof.error <= 1e-9
    assert narrow.unit.scale.shape == (6,)
    wide = copy.deepcopy(network)
    kept = list(plan.layers["one.0"].out)
    unit = Unit(how)
    unit.scale.data = network.unit.scale.data[kept].clone()
    wide.unit = Scattered(unit, kept)
    assert_equal_to_masked(wide, narrow, plan.layers, IMAGE)


class Spatial(Net):
    """A map of weights from the mean and the largest of all channels (Woo et al. 2018)."""

    def build(self) -> None:
        self.map, self.after = nn.Conv2d(2, 1, 3, padding=1), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        return self.after(x * self.map(both).sigmoid())


def test_spatial_attention_looks_at_the_kept_channels() -> None:
    torch.manual_seed(0)
    narrow, plan = job.slim(randomise(Spatial()), IMAGE, policy="uniform", target="width=0.5")
    assert narrow.after[0].in_channels == 6
    assert plan.proof.error <= 1e-9


class Arg(Net):
    """The number of the largest channel is used: it would be another one."""

    def build(self) -> None:
        self.after = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(x) * x.max(1, keepdim=True).indices


def test_channels_whose_number_is_used_are_not_cut() -> None:
    graph = analyse(randomise(Arg()), IMAGE)
    assert {b.layer: b.reason for b in graph.blocked}["stem.0"].startswith("max across channels")


class Tokens(nn.Module):
    """Tokens with a class token and a table of positions, and layers on them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
        self.token = nn.Parameter(torch.rand(1, 1, 16))
        self.places = nn.Parameter(torch.rand(1, 13, 16))
        self.norm, self.last = nn.LayerNorm(16), nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def table(self, count: int) -> torch.Tensor:
        """The positions of ``count`` tokens."""
        assert count == self.places.shape[1]
        return self.places

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + self.table(x.shape[1])
        x = x + self.mlp(self.norm(x))
        return self.head(self.last(x)[:, 0])


def test_tokens_and_tables_of_positions_are_cut_with_the_stream() -> None:
    torch.manual_seed(0)
    network = Tokens().eval()
    narrow, plan = halve(network, torch.rand(2, 3, 12, 16))
    assert narrow.token.shape == (1, 1, 8)
    assert narrow.places.shape == (1, 13, 8)
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    record = {name: channels.to_dict() for name, channels in plan.layers.items()}
    assert record["places"]["axis"] == 2
    read = {name: LayerChannels.from_dict(values) for name, values in record.items()}
    again = apply_plan(network, read)
    assert torch.equal(again.places, narrow.places)


class Resampled(Tokens):
    """Positions for another number of patches than the table has, as in vision transformers."""

    def table(self, count: int) -> torch.Tensor:
        places = self.places[:, 1:].float().reshape(1, 3, 4, -1).permute(0, 3, 1, 2)
        places = F.interpolate(places, (count // 6, 6), mode="bicubic", antialias=True)
        places = places.permute(0, 2, 3, 1).reshape(1, -1, self.places.shape[-1])
        return torch.cat([self.places[:, :1], places], 1)


def test_a_resampled_table_of_positions_is_cut_with_the_stream() -> None:
    torch.manual_seed(0)
    network = Resampled().eval()
    narrow, plan = halve(network, torch.rand(2, 3, 20, 24))
    assert narrow.places.shape == (1, 13, 8)
    assert {blocked.layer for blocked in plan.blocked} == {"head"}


class Stretched(Tokens):
    """Positions that are mixed along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.rand(1, 13, 8))

    def table(self, count: int) -> torch.Tensor:
        return F.interpolate(self.places, 16, mode="linear")


def test_a_table_that_mixes_channels_keeps_them() -> None:
    torch.manual_seed(0)
    network = Stretched().eval()
    narrow, plan = halve(network, torch.rand(2, 3, 12, 16))
    assert narrow.places.shape == (1, 13, 8)
    assert narrow.mlp[0].out_features == 16
    assert {blocked.layer for blocked in plan.blocked} == {"head", "embed", "mlp.2"}


def test_channels_are_those_of_all_layers_where_a_norm_is_no_batchnorm() -> None:
    torch.manual_seed(0)
    network = Tokens().eval()
    image = torch.rand(2, 3, 12, 16)
    narrow, plan = job.slim(network, image, target="channels=0.75", ignore=["embed"])
    assert plan.before.channels == 16 + 32 + 16 + 5
    assert plan.after.channels == 51
    assert narrow.mlp[0].out_features == 32 - (69 - 51)
