"""Attention with relative positions: tables, matrices and layers that all heads share.

Shaw et al. 2018; decomposed into rows and columns in MViTv2 (Li et al. 2022) and SAM.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from job.slimming.analysis import analyse
from support.transformer import DIM, Transformer, zeroed_outputs

HEADS, WIDTH, SIDE = 4, 8, 3
TOKENS = SIDE * SIDE
IMAGE = torch.rand(1, 3, 4 * SIDE, 4 * SIDE, dtype=torch.float64)


class Attention(nn.Module):
    """Attention whose bias is computed from the queries, by ``how``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.heads = how, HEADS
        self.qkv, self.proj = nn.Linear(DIM, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, DIM)
        places = torch.arange(SIDE)[:, None] - torch.arange(SIDE) + SIDE - 1
        if how == "of a buffer":  # whose values the analysis does not have
            self.register_buffer("places", places)
        else:
            self.places = places
        if how == "pooled":
            self.pool = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=False)
        if how in ("decomposed", "of a buffer", "pooled"):
            self.rows = nn.Parameter(torch.randn(2 * SIDE - 1, WIDTH))
            self.columns = nn.Parameter(torch.randn(2 * SIDE - 1, WIDTH))
        elif how == "layer":
            self.bias = nn.Linear(WIDTH, TOKENS)
        else:
            shapes = {"matrix": (WIDTH, TOKENS), "pairs": (TOKENS, TOKENS, WIDTH)}
            self.table = nn.Parameter(torch.randn(shapes[how]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count, tokens = x.shape[:2]
        qkv = self.qkv(x).view(count, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, count * self.heads, tokens, -1).unbind(0)
        if self.how == "pooled":
            q, k, v = (self.pooled(t) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.positions(q))
        x = x.view(count, self.heads, tokens, -1).transpose(1, 2)
        return self.proj(x.reshape(count, tokens, -1))

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """One depthwise kernel for all heads, as in MViT."""
        grid = self.pool(x.reshape(-1, SIDE, SIDE, x.shape[-1]).permute(0, 3, 1, 2))
        return grid.flatten(2).mT

    def positions(self, q: torch.Tensor) -> torch.Tensor:
        if self.how == "layer":
            return self.bias(q)
        if self.how == "matrix":
            return q @ self.table
        if self.how == "pairs":
            return torch.einsum("b i d, i j d -> b i j", q, self.table)
        grid = q.reshape(q.shape[0], SIDE, SIDE, q.shape[-1])
        rows = torch.einsum("bhwc,hkc->bhwk", grid, self.rows[self.places])
        columns = torch.einsum("wkc,bhwc->bhwk", self.columns[self.places], grid)
        bias = rows[..., :, None] + columns[..., None, :]
        return bias.reshape(-1, TOKENS, TOKENS)


def transformer(how: str) -> nn.Module:
    torch.manual_seed(0)
    return Transformer(lambda: Attention(how)).double().eval()


KINDS = ["decomposed", "of a buffer", "pooled", "layer", "matrix", "pairs"]


@pytest.mark.parametrize("how", KINDS)
def test_heads_lose_the_channels_of_the_table(how: str) -> None:
    """The keys make up for the scale of attention, since queries go to the table as well."""
    network: Any = transformer(how)
    narrow, plan = job.slim(
        network, IMAGE, policy="uniform", target="width=0.5", importance="l2", ignore=["embed"]
    )
    for attention in narrow.blocks:
        assert attention.qkv.out_features == 3 * HEADS * WIDTH // 2
        for name, parameter in attention.named_parameters():
            if name.partition(".")[0] in ("rows", "columns", "table", "pool"):
                assert WIDTH // 2 in parameter.shape
                assert WIDTH not in parameter.shape
    images = torch.rand(3, *IMAGE.shape[1:], dtype=torch.float64)
    torch.testing.assert_close(narrow(images), zeroed_outputs(network, plan)(images))


@pytest.mark.parametrize("how", KINDS)
def test_the_stream_is_cut_apart_from_the_heads(how: str) -> None:
    narrow, plan = job.slim(
        transformer(how), IMAGE, target="channels=0.6", importance="l2", min_keep=0.2
    )
    assert plan.proof is not None
    assert narrow.embed.out_channels < DIM
    assert {b.layer.rpartition(".")[2] for b in plan.blocked} <= {"head", "bias", "table"}


@pytest.mark.parametrize("how", ["a row", "the order of the channels", "the order of the rows"])
def test_a_table_is_cut_where_a_buffer_chooses_its_rows(how: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
            self.table = nn.Parameter(torch.rand(16, 16) + 0.5)
            self.register_buffer("row", torch.tensor([3]))
            self.register_buffer("order", torch.randperm(16))
            self.last = nn.Conv2d(16, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = {
                "a row": lambda: self.table[self.row],
                "the order of the channels": lambda: self.table[:, self.order][3],
                "the order of the rows": lambda: self.table[self.order][:, 3],
            }
            x = self.norm(self.first(x)).relu() * rows[how]().view(1, -1, 1, 1)
            return self.last(x).flatten(1)

    torch.manual_seed(0)
    graph = analyse(Scaled().eval(), torch.rand(1, 3, 12, 12))
    assert [group.name for group in graph.groups] == (["first"] if how == "a row" else [])


class Shifted(nn.Module):
    """Relative positions of Transformer-XL and Conformer: biases of heads, added to the queries."""

    def __init__(self, shape: tuple[int, ...], scale: str) -> None:
        super().__init__()
        inner = HEADS * WIDTH
        self.query, self.key, self.value = (nn.Linear(DIM, inner) for _ in range(3))
        self.places, self.proj = nn.Linear(DIM, inner, bias=False), nn.Linear(inner, DIM)
        self.one, self.other = (nn.Parameter(torch.randn(shape)) for _ in range(2))
        self.heads, self.width, self.how, self.scale = HEADS, WIDTH, scale, WIDTH**-0.5
        self.register_buffer("table", torch.randn(1, 2 * TOKENS - 1, DIM))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1, self.heads, self.width).transpose(1, 2)

    def shifted(self, x: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([x.new_zeros(*x.shape[:3], 1), x], dim=-1)
        padded = padded.view(*x.shape[:2], x.shape[3] + 1, x.shape[2])
        return padded[:, :, 1:].view_as(x)[..., : x.shape[2]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        p = self.split(self.places(self.table))
        one, other = (b if b.dim() == 4 else b[:, None] for b in (self.one, self.other))
        scores = (q + one) @ k.mT + self.shifted((q + other) @ p.mT)
        scores = scores / math.sqrt(self.width) if self.how == "computed" else scores * self.scale
        y = (scores.softmax(-1) @ v).transpose(1, 2)
        return self.proj(y.reshape(len(x), -1, self.heads * self.width))


@pytest.mark.parametrize("scale", ["computed", "attribute"])
@pytest.mark.parametrize("shape", [(HEADS, WIDTH), (1, HEADS, 1, WIDTH)])
def test_heads_lose_the_channels_of_biases_that_are_added(shape: Any, scale: str) -> None:
    torch.manual_seed(0)
    network: Any = Transformer(lambda: Shifted(shape, scale)).double().eval()
    narrow, plan = job.slim(network, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    for attention in narrow.blocks:
        assert attention.query.out_features == HEADS * WIDTH // 2
        assert attention.one.shape == (*shape[:-1], WIDTH // 2)
        assert attention.width == WIDTH // 2
    assert plan.proof.error <= 1e-12
    made = [plan.layers[f"blocks.0.{name}"].scaled for name in ("query", "one", "other")]
    assert [bool(rows) for rows in made] == [scale == "computed"] * 3
