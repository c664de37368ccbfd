"""Code that passes on, compares, or splits by the sizes that it reads from a tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from support.masked import masked_network
from support.transformer import zeroed_outputs

IMAGE = torch.rand(1, 3, 16, 16)


def attend(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> torch.Tensor:
    """A function that all kinds of attention share, as in transformers."""
    assert isinstance(module, nn.Module)
    return F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)


class PassedOn(nn.Module):
    """Attention whose scale is an attribute, passed to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 8
        self.scaling = self.head_dim**-0.5
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        heads = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.o(attend(self, *heads, scaling=self.scaling).reshape(*x.shape[:-1], -1))


class Compared(nn.Module):
    """A width that is compared with an attribute, which no op takes."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 24
        self.layer = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.width:
            raise ValueError("another width")
        return self.layer(x).relu()


class SplitBySizes(nn.Module):
    """Query, context and gates, by the width of the stream as in FocalNet (Yang et al. 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.level = 2
        self.first, self.last = nn.Linear(24, 2 * 24 + self.level), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        query, context, gates = self.first(x).split((width, width, self.level), -1)
        return self.last(query * context * gates[..., :1] * gates[..., 1:]) + x


class Patches(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Conv2d(3, 24, 4, 4), block(), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(x).flatten(2).mT).mean(1))


@pytest.mark.parametrize("block", [PassedOn, Compared, SplitBySizes])
def test_half_of_the_channels_are_cut(block: type[nn.Module]) -> None:
    torch.manual_seed(0)
    wide = Patches(block).double().eval()
    narrow, plan = job.slim(wide, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    assert {b.layer for b in plan.blocked} <= {"head", "block.first"}  # its gates stay
    assert narrow.embed.out_channels == 12
    inner = {"head_dim": 4, "width": 12}
    for name, value in inner.items():
        assert getattr(narrow.block, name, value) == value
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    without = masked_network(zeroed_outputs(wide, plan), plan.layers)
    torch.testing.assert_close(narrow(images), without(images))
