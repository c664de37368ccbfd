"""Values computed over all axes, and features that become maps by attributes of the module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job

Values = Callable[[torch.Tensor], torch.Tensor]


def not_nan(x: torch.Tensor) -> torch.Tensor:
    if torch.isnan(x).any():
        raise ValueError
    return x


def finite(x: torch.Tensor) -> torch.Tensor:
    torch._assert(bool(torch.isfinite(x).all()), "not finite")
    return x


def bounded(x: torch.Tensor) -> torch.Tensor:
    return x if x.abs().max().item() < 1e9 else x / 2


WHOLE: dict[str, Values] = {
    "mean": lambda x: x / x.abs().mean(),
    "standardised": lambda x: (x - x.mean()) / x.std(),
    "sum": lambda x: x / x.square().sum().sqrt(),
    "norm": lambda x: x / x.norm(),
    "maximum": lambda x: x / x.max(),
    "no NaN": not_nan,
    "finite": finite,
    "bounded": bounded,
    "of channels": lambda x: x * (x > 0).any(1, keepdim=True),
}


class Between(nn.Module):
    """Two convolutions with 12 channels between them."""

    def __init__(self, between: Values) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 3)
        self.between = between

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(F.leaky_relu(self.first(images))))


@pytest.mark.parametrize("kind", WHOLE)
def test_values_over_all_axes_do_not_block_channels(kind: str) -> None:
    network = Between(WHOLE[kind]).eval()
    narrow, plan = job.slim(network, torch.rand(1, 3, 9, 9), policy="uniform", target="width=0.5")
    assert narrow.get_submodule("first").out_channels == 6
    assert plan.proof is not None
    assert plan.proof.error < 1e-12


class Generator(nn.Module):
    """A linear layer whose features become maps of 12 channels."""

    def __init__(self, view: str) -> None:
        super().__init__()
        self.by, self.channels, self.side = view, 12, 4
        self.shape, self.widths = (1, 12, 4, 4), [16, 12]
        self.linear = nn.Linear(6, 192)
        self.unflatten = nn.Unflatten(1, (12, 4, 4))
        self.layers = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), nn.ConvTranspose2d(12, 3, 2, 2))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.layers(getattr(self, self.by)(self.linear(codes)))

    def attribute(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, self.channels, self.side, self.side)

    def element(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), self.widths[-1], 4, 4)

    def copied(self, x: torch.Tensor) -> torch.Tensor:
        shape = list(self.shape)
        shape[0] = len(x)
        return x.reshape(shape)

    def literal(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, 12, 4, 4)


VIEWS = {"attribute": 6, "element": 6, "copied": 6, "unflatten": 6, "literal": 12}


@pytest.mark.parametrize("view", VIEWS)
def test_features_become_as_many_maps_as_attributes_say(view: str) -> None:
    network = Generator(view).eval()
    example = torch.rand(1, 6)
    if VIEWS[view] == 12:
        with pytest.raises(job.UsageError, match="view works only for the current number"):
            job.slim(network, example, policy="uniform", target="width=0.5")
        return
    narrow, _ = job.slim(network, example, policy="uniform", target="width=0.5")
    assert narrow.get_submodule("layers.0").num_features == VIEWS[view]
    assert narrow.get_submodule("linear").out_features == VIEWS[view] * 16
    assert narrow(torch.rand(2, 6)).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("norm", [False, True])
def test_features_become_signals_by_an_attribute(norm: bool) -> None:
    """Three axes are those of a signal where a layer of signals reads them, not heads."""

    class Signals(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.one = nn.Linear(8, 16 * 12), nn.ConvTranspose1d(16, 8, 4, 2)
            self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
            self.last, self.channels = nn.Conv1d(8, 2, 3), 16

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.enter(x).view(-1, self.channels, 12).relu()
            return self.last(self.one(self.norm(x)))

    torch.manual_seed(0)
    wide, example = Signals().double().eval(), torch.rand(2, 8, dtype=torch.float64)
    narrow, plan = job.slim(wide, example, policy="uniform", target="width=0.5", importance="l2")
    assert (narrow.enter.out_features, narrow.channels, narrow.one.in_channels) == (96, 8, 8)
    assert {blocked.layer for blocked in plan.blocked} == {"last"}
    assert plan.proof.error <= 1e-12
