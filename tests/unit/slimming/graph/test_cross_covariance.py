"""Cross-covariance attention, whose weights are products of channels with channels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from support.masked import masked_network
from support.transformer import DIM, Transformer

HEADS = 4
IMAGE = torch.rand(1, 3, 12, 12, dtype=torch.float64)


class CrossCovariance(nn.Module):
    """Each query channel is a mean of value channels (El-Nouby et al. 2021).

    ``allowed`` (heads, channels) are the columns of the weights that take part, all by default.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.allowed = how, None
        inner = DIM if how == "stream" else HEADS * 8
        self.query, self.key, self.value = (nn.Linear(DIM, inner) for _ in range(3))
        self.temperature = nn.Parameter(torch.full((HEADS, 1, 1), 3.0))
        self.proj = nn.Linear(inner, DIM)

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        linear = self.how == "linear"
        if self.allowed is not None:
            scores = scores.masked_fill(~self.allowed[:, None], 0 if linear else -torch.inf)
        if linear:
            return scores
        return scores.softmax(-2 if self.how == "softmax of rows" else -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples, tokens, channels = x.shape
        width = channels // HEADS if self.how == "stream" else -1
        layers = self.query, self.key, self.value
        q, k, v = (
            layer(x).view(samples, tokens, HEADS, width).permute(0, 2, 3, 1) for layer in layers
        )
        if self.how == "rows of keys":
            q, k, v = k, v, q
        if self.how == "one call":
            q, k = F.normalize(q, dim=-1) * self.temperature, F.normalize(k, dim=-1)
            mask = None if self.allowed is None else self.allowed[:, None]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
            return self.proj(y.permute(0, 3, 1, 2).reshape(samples, tokens, -1))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature
        weights = self.weights(scores)
        y = (weights.mT if self.how == "transposed" else weights) @ v
        y = y.permute(0, 3, 1, 2).reshape(samples, tokens, -1)
        return self.proj(y)


def cut(how: str) -> tuple[nn.Module, nn.Module, Any]:
    torch.manual_seed(0)
    network = Transformer(lambda: CrossCovariance(how)).eval().double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    options: dict[str, Any] = {"policy": "uniform", "importance": "l2", "min_keep": 0}
    narrow, plan = job.slim(network, IMAGE, target="width=0.5", **options)
    assert plan.proof.error <= 1e-12
    narrow.train()(IMAGE.repeat(3, 1, 1, 1)).sum().backward()
    return network, narrow.eval(), plan


def of_kept_columns(network: nn.Module, plan: Any, rows: str, columns: str) -> nn.Module:
    """The wide network whose weights have the kept columns, and whose sums the kept channels."""
    masked = copy.deepcopy(network)

    def kept(layer: str, count: int) -> torch.Tensor:
        mask = torch.zeros(count, dtype=torch.bool)
        out = plan.layers[layer].out if layer in plan.layers else None
        mask[list(range(count) if out is None else out)] = True
        return mask

    stream = kept("embed", DIM)
    with torch.no_grad():
        masked.head.weight[:, ~stream] = 0
        for number, block in enumerate(masked.blocks):
            inner = len(block.query.weight)
            for layer in (block.query, block.key, block.value):
                layer.weight[:, ~stream] = 0
            block.proj.weight[:, ~kept(f"blocks.{number}.{rows}", inner)] = 0
            block.allowed = kept(f"blocks.{number}.{columns}", inner).view(HEADS, -1)
    return masked


@pytest.mark.parametrize("how", ["stream", "open", "linear", "rows of keys", "one call"])
def test_rows_and_columns_of_the_weights_are_cut(how: str) -> None:
    network, narrow, plan = cut(how)
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    rows, columns = ("key", "value") if how == "rows of keys" else ("query", "key")
    other = "query" if how == "rows of keys" else "value"  # summed over with the columns
    layers = {name: plan.layers[f"blocks.0.{name}"].out for name in (rows, columns, other)}
    width = len(network.blocks[0].query.weight) // HEADS
    for channels in layers.values():
        assert [sum(c // width == head for c in channels) for head in range(HEADS)] == [
            width // 2
        ] * HEADS
    assert layers[columns] == layers[other] != layers[rows]
    images = torch.rand(4, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = of_kept_columns(network, plan, rows, columns)(images)
        torch.testing.assert_close(narrow(images), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("how", "names"), [("softmax of rows", "query"), ("transposed", "query key value")]
)
def test_weights_that_are_used_in_another_way_are_blocked(how: str, names: str) -> None:
    _, _, plan = cut(how)
    blocked = {b.layer: b.reason for b in plan.blocked}
    expected = {f"blocks.{number}.{name}" for name in names.split() for number in range(2)}
    assert blocked.keys() == {"head"} | expected
    assert "matmul" in blocked["blocks.0.query"]


class LinearAttention(nn.Module):
    """Queries times the products of keys and values (Shen et al. 2021), as in CoaT."""

    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.softmax = softmax
        self.query, self.key, self.value = (nn.Linear(DIM, HEADS * 8) for _ in range(3))
        self.proj = nn.Linear(HEADS * 8, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples, tokens, _ = x.shape
        q, k, v = (
            layer(x).view(samples, tokens, HEADS, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        context = k.softmax(2).mT @ v
        y = q @ (context.softmax(-2) if self.softmax else context * 0.3)
        return self.proj(y.transpose(1, 2).flatten(2))


def test_the_channels_of_linear_attention_are_cut() -> None:
    torch.manual_seed(0)
    network = Transformer(lambda: LinearAttention(softmax=False)).eval().double()
    narrow, plan = job.slim(network, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    query, key, value = (plan.layers[f"blocks.0.{n}"].out for n in ("query", "key", "value"))
    assert query == key != value
    assert len(value) == HEADS * 4
    wide = masked_network(network, plan.layers)
    with torch.no_grad():
        for number, block in enumerate(wide.blocks):
            gone = sorted({*range(HEADS * 8)} - {*plan.layers[f"blocks.{number}.query"].out})
            block.query.weight[gone], block.query.bias[gone] = 0, 0
        images = torch.rand(4, 3, 12, 12, dtype=torch.float64)
        torch.testing.assert_close(narrow(images), wide(images), rtol=1e-10, atol=1e-12)


def test_a_softmax_over_the_channels_of_keys_is_blocked() -> None:
    network = Transformer(lambda: LinearAttention(softmax=True)).eval().double()
    _, plan = job.slim(network, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    blocked = {b.layer: b.explanation for b in plan.blocked}
    assert {"blocks.0.query", "blocks.0.key"} <= blocked.keys()
    assert "test_cross_covariance.py" in blocked["blocks.0.key"]
    assert plan.proof is not None


class ChannelAttention(nn.Module):
    """Sums of channels, weighted by their products with one another, as in DANet (Fu et al. 2019).

    Only the channels ``kept`` take part, all by default.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 5, 1)
        self.kept = list(range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)[:, self.kept] if len(self.kept) < 12 else self.first(x)
        flat = x.flatten(2)
        y = (flat.mT @ (flat @ flat.mT).softmax(-1)).mT
        return F.conv2d(y.view_as(x), self.last.weight[:, self.kept], self.last.bias)


class Whole(ChannelAttention):
    """The same by the last layer itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        flat = x.flatten(2)
        return self.last((flat.mT @ (flat @ flat.mT).softmax(-1)).mT.view_as(x))


def test_attention_of_channels_to_one_another_is_cut() -> None:
    torch.manual_seed(0)
    network, image = Whole().double(), torch.rand(2, 3, 9, 9, dtype=torch.float64)
    narrow, plan = job.slim(network, image, policy="uniform", target="width=0.5", importance="l2")
    kept = plan.layers["first"].out
    assert len(kept) == narrow.first.out_channels == 6
    wide = ChannelAttention().double()
    wide.load_state_dict(network.state_dict())
    wide.kept = list(kept)
    torch.testing.assert_close(narrow(image), wide(image), rtol=1e-10, atol=1e-12)
