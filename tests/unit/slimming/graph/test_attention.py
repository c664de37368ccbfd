"""Attention: channels leave the heads, and the scale of the products stays as it was."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from job.errors import DataError
from job.slimming.planning.layer_channels import LayerChannels, compose
from job.slimming.surgery.surgery import apply_plan
from support.transformer import DIM, Transformer, zeroed_outputs

HEADS, WIDTH = 3, 8
IMAGE = torch.rand(1, 3, 16, 16)


class Attention(nn.Module):
    """Attention as it is written in public code, with ``how`` for the details."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.heads, self.width = how, HEADS, WIDTH
        self.inner = HEADS * WIDTH
        self.scale = WIDTH**-0.5
        self.qkv = nn.Linear(DIM, 3 * self.inner)
        self.query, self.key, self.value = (nn.Linear(DIM, self.inner) for _ in range(3))
        self.proj = nn.Linear(self.inner, DIM)
        if how == "separate":
            del self.qkv
        else:
            del self.query, self.key, self.value

    def split(self, x: torch.Tensor) -> Any:
        if self.how == "separate":  # Hugging Face
            shape = (*x.shape[:2], -1, self.width)
            return (f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        if self.how == "chunks":
            parts = self.qkv(x).chunk(3, dim=-1)
            return (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        batch, tokens, channels = x.shape
        own = self.how in ("fused", "attribute", "einsum", "literal")
        width = self.width if own else channels // self.heads
        return self.qkv(x).reshape(batch, tokens, 3, self.heads, width).permute(2, 0, 3, 1, 4)

    def products(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        if self.how == "attribute":
            return self.scaled(q) @ k.transpose(-2, -1)
        if self.how == "separate":
            return torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.width)
        if self.how == "literal":  # 1/sqrt(8), which the narrow network has too
            return q * 0.35355339059327373 @ k.mT
        return q * q.shape[-1] ** -0.5 @ k.mT

    def scaled(self, q: torch.Tensor) -> torch.Tensor:
        return q * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape
        q, k, v = self.split(x)
        if self.how == "fused":
            x = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "einsum":
            x = torch.einsum("b h i d, b h j d -> b h i j", self.scaled(q), k).softmax(-1)
            x = torch.einsum("b h i j, b h j d -> b h i d", x, v)
        else:
            x = self.products(q, k).softmax(-1) @ v
        if self.how == "stream":
            return self.proj(x.transpose(1, 2).reshape(shape))
        return self.proj(x.transpose(1, 2).flatten(2))


def transformer(how: str) -> nn.Module:
    torch.manual_seed(0)
    network = Transformer(lambda: Attention(how)).eval().double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network


@pytest.mark.parametrize(
    "how", ["fused", "attribute", "separate", "chunks", "stream", "einsum", "literal"]
)
def test_heads_lose_width_or_leave_and_the_scale_stays(how: str) -> None:
    network, example = transformer(how), IMAGE.double()
    narrow, plan = job.slim(
        network, example, policy="uniform", target="width=0.5", importance="l2", min_keep=0
    )
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    assert plan.proof.error <= 1e-12
    assert plan.after.params == sum(p.numel() for p in narrow.parameters())
    if how == "separate":  # the view leaves the number of heads open
        kept = plan.layers["blocks.0.query"].out
        assert plan.layers["blocks.0.value"].out == kept
        assert {c // WIDTH for c in kept} == {c // WIDTH for c in kept if c % WIDTH == 0}
        assert len(kept) in (WIDTH, 2 * WIDTH)
    else:
        if how == "stream":  # C // heads: the width of heads is that of the stream
            assert narrow.embed.out_channels == narrow.blocks[0].proj.in_features == 12
        kept = plan.layers["blocks.0.qkv"].out
        of_heads = [[c % WIDTH for c in kept if c // WIDTH == head] for head in range(9)]
        assert len({len(channels) for channels in of_heads}) == 1  # equally many of each head
        assert len(set(map(tuple, of_heads))) > 1  # each its own
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            narrow(images), zeroed_outputs(network, plan)(images), rtol=1e-10, atol=1e-12
        )
    narrow.train()(images).sum().backward()


def test_a_scale_that_is_written_down_is_found_with_images_too() -> None:
    network = transformer("literal").float()
    images = torch.rand(64, 3, 16, 16)
    _, plan = job.slim(
        network, IMAGE, target="channels=0.8", calibration=[images], compensate="regress"
    )
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    assert not any(channels.scaled for channels in plan.layers.values())


def test_a_scale_by_the_number_of_channels_is_part_of_the_plan() -> None:
    network = transformer("fused")
    _, plan = job.slim(network, IMAGE.double(), policy="uniform", target="width=0.5")
    channels = plan.layers["blocks.0.qkv"]
    ((rows, kept, before),) = channels.scaled
    assert (len(rows), kept / before) == (len(channels.out) // 3, len(channels.out) / 72)
    assert LayerChannels.from_dict(json.loads(json.dumps(channels.to_dict()))) == channels
    again = LayerChannels(out=tuple(range(1, len(channels.out))), scaled=((rows[1:], 3, 4),))
    both = compose({"a": channels}, {"a": again})["a"].scaled
    assert [rows for rows, *_ in both] == [tuple(r - 1 for r in rows[1:]), rows[1:]]
    with pytest.raises(DataError, match="scaled outputs"):
        LayerChannels.from_dict({"scaled": [[[2, 1], 1, 2]]})
    with pytest.raises(DataError, match="fraction of two numbers"):
        LayerChannels.from_dict({"scaled": [[[1, 2], 0, 2]]})


@pytest.mark.parametrize("compensate", ["mean", "regress"])
def test_compensation_keeps_the_scale(compensate: str) -> None:
    network = transformer("fused").float()
    images = torch.rand(256, 3, 16, 16)
    options: dict[str, Any] = {"policy": "uniform", "target": "width=0.9", "calibration": [images]}
    with torch.no_grad():
        wide = network(images)
        errors = {}
        for how in ("none", compensate):
            narrow, _ = job.slim(network, IMAGE, importance="l2", compensate=how, **options)
            errors[how] = (narrow(images) - wide).square().mean()
    assert errors[compensate] < errors["none"] / 2


def test_a_plan_cuts_another_network_with_the_same_scale() -> None:
    network = transformer("fused")
    narrow, plan = job.slim(network, IMAGE.double(), policy="uniform", target="width=0.5")
    for one, other in zip(
        apply_plan(network, plan.layers).parameters(), narrow.parameters(), strict=True
    ):
        assert one.equal(other)


class PositionSensitive(nn.Module):
    """Attention over the places of a map: one convolution gives queries, keys and wider values."""

    def __init__(self, heads: int, stream: int) -> None:
        super().__init__()
        self.heads, self.key, self.value = heads, 8, 16
        inner = heads * self.value
        self.measured = stream == inner
        self.enter = nn.Conv2d(3, stream, 3)
        self.qkv = nn.Conv2d(stream, inner + 2 * heads * self.key, 1)
        self.place = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.proj = nn.Conv2d(inner, stream, 1)
        self.head = nn.Linear(stream, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.enter(image))
        batch, channels, height, width = x.shape
        shape = (batch, channels if self.measured else -1, height, width)
        lines = self.qkv(x).view(batch, self.heads, 2 * self.key + self.value, height * width)
        q, k, v = lines.split([self.key, self.key, self.value], 2)
        weights = (q.transpose(-2, -1) @ k * self.key**-0.5).softmax(-1)
        y = (v @ weights.transpose(-2, -1)).view(shape) + self.place(v.reshape(shape))
        return self.head(F.relu(self.proj(y)).mean((2, 3)))


@pytest.mark.parametrize(("heads", "stream"), [(2, 32), (4, 64), (2, 24)])
def test_heads_of_queries_keys_and_wider_values_are_cut(heads: int, stream: int) -> None:
    torch.manual_seed(0)
    network = PositionSensitive(heads, stream).double().eval()
    example = IMAGE.double()
    narrow, plan = job.slim(network, example, policy="uniform", target="width=0.5", importance="l2")
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    assert narrow.key + narrow.value == 12  # each head loses the same channels
    assert narrow.qkv.out_channels == heads * (2 * narrow.key + narrow.value)
    assert plan.proof.error <= 1e-12
    with torch.no_grad():
        torch.testing.assert_close(
            narrow(example), zeroed_outputs(network, plan)(example), rtol=1e-10, atol=1e-12
        )
    narrow.train()(example).sum().backward()
