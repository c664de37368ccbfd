"""Ops between layers: those on each channel alone are cut, those across channels are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from job.slimming.analysis import analyse
from support.cuts import randomise
from support.masked import halve
from support.networks import Net, block

IMAGES = torch.rand(2, 3, 20, 16, generator=torch.Generator().manual_seed(1))
Body = Callable[[torch.Tensor], torch.Tensor]


class Between(Net):
    """A function of the channels between two blocks."""

    def __init__(self, function: Body) -> None:
        super().__init__()
        self.function = function

    def build(self) -> None:
        self.after = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.function(x))


def sknet(x: torch.Tensor) -> torch.Tensor:
    branches = [x.mul(k).unsqueeze_(1) for k in (1, 2)]
    return torch.cat(branches, 1).sum(1)


def in_place(x: torch.Tensor) -> torch.Tensor:
    x = x * 3
    x.unsqueeze_(2)
    x = x * 2
    x.transpose_(3, 4).squeeze_(2)
    return x.transpose(2, 3)


def unpooled(x: torch.Tensor) -> torch.Tensor:
    pooled, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(pooled, places, 2)


def standardised(x: torch.Tensor) -> torch.Tensor:
    variance, mean = torch.var_mean(x, (2, 3), keepdim=True)
    return (x - mean) / (variance + 1).sqrt()


ALONE: dict[str, Body] = {
    "mish by hand": lambda x: x * torch.tanh(torch.log1p(x.exp())),
    "signed root": lambda x: x.sign() * x.abs().sqrt(),
    "angle": lambda x: torch.atan2(x, x + 1) + torch.hypot(x, x) + torch.fmax(x, -x),
    "finite": lambda x: torch.where(torch.isfinite(x), x, 0).nan_to_num(),
    "to another": lambda x: x + torch.linspace(0, 1, 16).to(x)[None, None, None],
    "var_mean": standardised,
    "sorted": lambda x: x.sort(dim=3)[0] + x.median(dim=2, keepdim=True)[0],
    "largest": lambda x: x.flatten(2).topk(5, dim=2)[0].mean(2)[:, :, None, None] * x,
    "cummax": lambda x: x.cummax(2)[0] + x.diff(dim=3).mean(3, keepdim=True),
    "unpooled": unpooled,
    "SKNet": sknet,
    "in place": in_place,
    "a number over them": lambda x: 2 / (x.square() + 1),
}


@pytest.mark.parametrize("name", ALONE)
def test_an_op_on_each_channel_alone_is_cut(name: str) -> None:
    torch.manual_seed(0)
    _, plan = halve(randomise(Between(ALONE[name])), IMAGES)
    assert [blocked.layer for blocked in plan.blocked] == ["head"]


ACROSS: dict[str, Body] = {
    "max_pool3d": lambda x: F.max_pool3d(x[:, None], (3, 1, 1), 1, (1, 0, 0)).squeeze(1),
    "avg_pool1d": lambda x: (
        F.avg_pool1d(x.flatten(2).transpose(1, 2), 3, 1, 1).transpose(1, 2).reshape(x.shape)
    ),
    "sort": lambda x: x.sort(dim=1)[0],
}


@pytest.mark.parametrize("name", ACROSS)
def test_an_op_across_channels_is_refused_with_its_name_and_line(name: str) -> None:
    network = randomise(Between(ACROSS[name]))
    blocked = {each.layer: each for each in analyse(network, IMAGES[:1]).blocked}
    assert blocked["stem.0"].reason == f"{name} across channels is not supported"
    assert blocked["stem.0"].place.startswith("test_ops.py:")
    narrow, _ = job.slim(network, IMAGES[:1], policy="uniform", target="width=0.5")
    assert (narrow.stem[0].out_channels, narrow.after[0].out_channels) == (12, 6)


class Counted(Net):
    """Code that compares the number of channels with a constant."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, _, _ = x.shape
        assert channels == 12, "twelve channels"
        return x * batch


def test_code_that_compares_the_number_of_channels_is_named_by_its_line() -> None:
    blocked = {each.layer: each for each in analyse(randomise(Counted()), IMAGES[:1]).blocked}
    assert blocked["stem.0"].reason.startswith("code that reads their number")
    assert blocked["stem.0"].place == f"test_ops.py:{Counted.body.__code__.co_firstlineno + 2}"


class Mixer(Net):
    """A layer along positions, as in MLP-Mixer."""

    def build(self) -> None:
        self.tokens = nn.Linear(20 * 16, 20 * 16)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.tokens(x.flatten(2)).view_as(x)


def test_a_layer_along_positions_is_named_as_such() -> None:
    network = randomise(Mixer())
    _, plan = halve(network, IMAGES)
    blocked = {each.layer: each.reason for each in plan.blocked}
    assert blocked.keys() == {"head", "tokens"}
    assert blocked["tokens"] == "neither its inputs nor its outputs are channels that can be cut"


def test_a_layer_with_weight_norm_names_the_call_that_removes_it() -> None:
    network = randomise(Between(lambda x: x))
    nn.utils.weight_norm(network.after[0])
    blocked = {each.layer: each for each in analyse(network, IMAGES[:1]).blocked}
    assert "remove_weight_norm(layer)" in blocked["stem.0"].remedy
    assert "remove_weight_norm(layer)" in blocked["after.0"].remedy
