"""Attention of newer transformers: norms of queries and keys, rotary embeddings, shared keys."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from support.masked import masked_network
from support.transformer import DIM, Transformer, zeroed_outputs

HEADS, WIDTH, TOKENS = 4, 8, 9
IMAGE = torch.rand(1, 3, 12, 12, dtype=torch.float64)


class Hand(nn.Module):
    """RMSNorm as it is written in public code."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class OwnShape(nn.Module):
    """RMSNorm with its shape in an attribute, as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.weight = (WIDTH,), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.shape, self.weight)


NORMS: dict[str, Any] = {
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "rms norm": lambda: nn.RMSNorm(WIDTH),
    "shape in an attribute": OwnShape,
    "by hand": Hand,
}


class Attention(nn.Module):
    """Attention with ``keys`` heads of keys and values, and ``how`` for the details."""

    def __init__(self, how: str, keys: int) -> None:
        super().__init__()
        self.how, self.heads, self.keys, self.width = how, HEADS, keys, WIDTH
        self.scale = 0.3
        self.query = nn.Linear(DIM, HEADS * WIDTH)
        self.key, self.value = (nn.Linear(DIM, keys * WIDTH) for _ in range(2))
        self.proj = nn.Linear(HEADS * WIDTH, DIM)
        self.norms = nn.ModuleList(NORMS[how]() for _ in range(2)) if how in NORMS else None
        angles = torch.outer(torch.arange(TOKENS), 10.0 ** -torch.arange(0, 1, 2 / WIDTH))
        if how in ("halves", "sines next to cosines"):
            angles = torch.cat([angles, angles], 1)
        if how == "pairs":
            angles = angles.repeat_interleave(2, 1)
        if how == "frequencies":
            self.register_buffer("frequencies", 10.0 ** -torch.arange(0, 1, 2 / WIDTH))
        else:
            self.register_buffer("table", torch.cat([angles.sin(), angles.cos()], 1))

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "frequencies":
            angles = torch.outer(torch.arange(TOKENS, dtype=x.dtype), self.frequencies)
            sin, cos = (f(torch.cat([angles, angles], 1)) for f in (torch.sin, torch.cos))
        else:
            sin, cos = self.table.chunk(2, 1)
        if self.how == "pairs":
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
        else:
            one, other = x.chunk(2, -1)
            turned = torch.cat([-other, one], -1)
        return x * cos + turned * sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.query(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
        k, v = (
            f(x).view(*x.shape[:2], self.keys, -1).transpose(1, 2) for f in (self.key, self.value)
        )
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        if self.how in ("halves", "pairs", "frequencies"):
            q, k = self.rotated(q), self.rotated(k)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shared, width = self.heads // self.keys, v.shape[-1]
        if self.how == "repeated":
            k, v = (t.repeat_interleave(shared, 1) for t in (k, v))
        if self.how == "expanded":
            k, v = (
                t[:, :, None].expand(-1, -1, shared, -1, -1).reshape(*q.shape[:3], -1)
                for t in (k, v)
            )
        if self.how == "by hand":
            return F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        if self.how == "cosine":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            return (q @ k.mT * 5).softmax(-1) @ v
        if self.how == "one key":
            return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        if self.how == "samples and heads":
            q, k, v = (t.reshape(-1, TOKENS, t.shape[-1]) for t in (q, k, v))
            y = torch.bmm((q * self.scale), k.mT).softmax(-1) @ v
            return y.view(-1, self.heads, TOKENS, width)
        gqa = self.how == "grouped"
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)


def transformer(how: str, keys: int = HEADS) -> nn.Module:
    torch.manual_seed(0)
    network = Transformer(lambda: Attention(how, keys)).eval().double()
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, float("norm" in name), std=0.4)
    return network


def cut(network: nn.Module) -> tuple[nn.Module, Any]:
    options: dict[str, Any] = {"policy": "uniform", "importance": "l2", "min_keep": 0}
    narrow, plan = job.slim(network, IMAGE, target="width=0.5", **options)
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    assert plan.proof.error <= 1e-12
    assert plan.after.params == sum(p.numel() for p in narrow.parameters())
    narrow.train()(IMAGE.repeat(3, 1, 1, 1)).sum().backward()
    return narrow.eval(), plan


def widths(plan: Any, layer: str) -> set[int]:
    """The numbers of channels that the heads of a layer keep."""
    kept = plan.layers[f"blocks.0.{layer}"].out
    return {sum(c // WIDTH == head for c in kept) for head in {c // WIDTH for c in kept}}


@pytest.mark.parametrize("how", NORMS)
def test_norms_of_queries_and_keys_are_cut_with_them(how: str) -> None:
    network = transformer(how)
    narrow, plan = cut(network)
    assert widths(plan, "query") == widths(plan, "key") == widths(plan, "value") == {4}
    kept = [c for c in plan.layers["blocks.0.query"].out if c < WIDTH]
    norm = network.blocks[0].norms[0].weight.detach()[kept]
    # the norm's weights make up for the scale of attention, unless the scale is an attribute
    norm = norm if how == "by hand" else norm * 0.5**0.5
    torch.testing.assert_close(narrow.blocks[0].norms[0].weight.detach(), norm)


def test_a_scale_after_a_norm_without_a_weight_is_blocked() -> None:
    network = transformer("layer norm")
    for block in network.blocks:
        block.norms = nn.ModuleList(nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
    _, plan = job.slim(network, IMAGE, policy="uniform", target="width=0.5")
    (blocked,) = {b for b in plan.blocked if b.layer == "blocks.0.query"}
    assert "the scale of attention" in blocked.reason
    assert "scale=self.scale" in blocked.remedy
    assert widths(plan, "value") == {4}


def without_outputs(network: nn.Module, plan: Any) -> nn.Module:
    """The wide network in which layers produce zeros for the removed channels."""
    masked = copy.deepcopy(network)
    with torch.no_grad():
        for name, channels in plan.layers.items():
            layer = dict(masked.named_modules()).get(name)
            if channels.out is not None and layer is not None:
                removed = sorted(set(range(len(layer.weight))) - set(channels.out))
                layer.weight[removed] = 0
                layer.bias[removed] = 0
    return masked


SHARED = [("repeated", 2), ("expanded", 2), ("grouped", 2), ("one key", 1)]
ROTARY = [("halves", 4), ("pairs", 4), ("frequencies", 4)]


@pytest.mark.parametrize(("how", "keys"), [*ROTARY, *SHARED, ("samples and heads", 4)])
def test_a_cut_equals_queries_that_are_zero(how: str, keys: int) -> None:
    network = transformer(how, keys)
    narrow, plan = cut(network)
    assert widths(plan, "query") == widths(plan, "key") == {4}
    images = torch.rand(4, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = without_outputs(network, plan)(images)
        torch.testing.assert_close(narrow(images), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", ["halves", "pairs", "frequencies"])
def test_channels_that_are_rotated_together_leave_together(how: str) -> None:
    _, plan = cut(transformer(how))
    kept = {c % WIDTH for c in plan.layers["blocks.0.query"].out}
    partner = {c ^ 1 for c in kept} if how == "pairs" else {(c + WIDTH // 2) % WIDTH for c in kept}
    assert kept == partner
    assert kept == {c % WIDTH for c in plan.layers["blocks.0.key"].out}


def test_cosine_attention_is_cut() -> None:
    _, plan = cut(transformer("cosine"))
    assert widths(plan, "query") == widths(plan, "value") == {4}


class WidthAttribute(Attention):
    """Attention whose views have the width of heads, one of three, as an attribute."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], self.heads)
        q = self.query(x).view(*shape, self.width).transpose(1, 2)
        k = self.key(x).view(*shape, self.width).transpose(1, 2)
        v = self.value(x).view(*shape, self.width).transpose(1, 2)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_heads_whose_width_is_one_attribute_keep_the_same_number() -> None:
    network = transformer("plain")
    network.blocks = nn.ModuleList(WidthAttribute("plain", HEADS) for _ in range(2)).double()
    for block in network.blocks:
        block.value.weight.data *= 9  # a global threshold would keep more of the values
    narrow, plan = job.slim(network, IMAGE, target="channels=0.6", importance="l2")
    assert narrow.blocks[0].width in widths(plan, "value") & widths(plan, "query")
    assert plan.proof.error <= 1e-12


class TalkingHeads(Attention):
    """Heads that are mixed before and after the softmax, as in CaiT."""

    def __init__(self, view: tuple[int, int]) -> None:
        super().__init__("plain", HEADS)
        self.view = view
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], *self.view)
        q, k, v = (
            each(x).view(shape).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        weights = self.before((q * self.scale @ k.mT).permute(0, 2, 3, 1))
        weights = self.after(weights.softmax(2)).permute(0, 3, 1, 2)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("view", "left"), [((HEADS, -1), {4}), ((-1, WIDTH), {WIDTH})])
def test_heads_that_are_mixed_lose_channels_or_leave_whole(
    view: tuple[int, int], left: set[int]
) -> None:
    network = transformer("plain")
    network.blocks = nn.ModuleList(TalkingHeads(view) for _ in range(2)).double()
    narrow, plan = job.slim(network, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    assert widths(plan, "query") == widths(plan, "key") == widths(plan, "value") == left
    assert narrow.blocks[0].value.out_features == HEADS * WIDTH // 2
    wide = masked_network(network, plan.layers)
    with torch.no_grad():
        for block, name in itertools.product((0, 1), ("query", "key")):
            layer = wide.blocks[block].get_submodule(name)
            gone = sorted({*range(HEADS * WIDTH)} - {*plan.layers[f"blocks.{block}.{name}"].out})
            layer.weight[gone], layer.bias[gone] = 0, 0
        images = torch.rand(4, 3, 12, 12, dtype=torch.float64)
        torch.testing.assert_close(narrow(images), wide(images), rtol=1e-10, atol=1e-12)
    blocked = {b.layer: b.explanation for b in plan.blocked}
    assert ("heads whose number stays" in blocked.get("blocks.0.after", "")) == (left == {4})


class Fused(Attention):
    """Queries, keys and values of one layer, whose bias is three parameters, as in BEiT."""

    def __init__(self) -> None:
        super().__init__("plain", HEADS)
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.biases = nn.ParameterList(torch.rand(DIM) for _ in range(3))
        self.proj = nn.Linear(DIM, DIM)
        del self.query, self.key, self.value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, channels = x.shape
        bias = torch.cat((self.biases[0], self.biases[1], self.biases[2]))
        x = F.linear(x, self.qkv.weight, bias)
        q, k, v = x.reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, channels))


def test_a_bias_of_several_parameters_is_cut_and_scaled() -> None:
    network = transformer("plain")
    network.blocks = nn.ModuleList(Fused() for _ in range(2)).double()
    narrow, plan = cut(network)
    kept = plan.layers["blocks.0.biases.0"].out
    expected = network.blocks[0].biases[0].detach()[list(kept)] * 0.5**0.5
    torch.testing.assert_close(narrow.blocks[0].biases[0].detach(), expected)


class Reduced(nn.Module):
    """One head over keys of a strided convolution, as in PVT."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.norm = nn.Conv2d(DIM, DIM, 3, 3), nn.LayerNorm(DIM)
        self.query, self.proj = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.keys = nn.Linear(DIM, 2 * DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, channels = x.shape
        q = self.query(x).reshape(batch, tokens, 1, -1).transpose(1, 2)
        x = self.reduce(x.transpose(1, 2).reshape(batch, channels, 3, 3))
        x = self.norm(x.reshape(batch, channels, -1).transpose(1, 2))
        k, v = self.keys(x).reshape(batch, -1, 2, 1, q.shape[-1]).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, channels))


def test_views_to_the_size_of_a_stream_keep_as_many_channels() -> None:
    network = transformer("plain")
    network.blocks = nn.ModuleList(Reduced() for _ in range(2)).double()
    for block in network.blocks:
        block.reduce.weight.data *= 9
        block.keys.weight.data *= 3
    _, plan = job.slim(network, IMAGE, target="channels=0.6", importance="l2")
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    assert plan.proof.error <= 1e-12


class Patches(nn.Module):
    """Tokens of the same place in each patch attend to each other, as in MobileViT."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Conv2d(3, DIM, 3, padding=1), nn.Conv2d(DIM, 5, 1)
        self.attention = Attention("plain", HEADS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images)
        batch, channels, *_ = x.shape
        x = x.reshape(batch * channels * 4, 3, 4, 3).transpose(1, 2)
        x = x.reshape(batch, channels, 16, TOKENS).transpose(1, 3).reshape(batch * TOKENS, 16, -1)
        x = x + self.attention(x)
        x = x.reshape(batch, TOKENS, 16, -1).transpose(1, 3).reshape(batch * channels * 4, 4, 3, 3)
        return self.out(x.transpose(1, 2).reshape(batch, channels, 12, 12))


def test_channels_that_views_merge_with_samples_are_cut() -> None:
    torch.manual_seed(0)
    network = Patches().eval().double()
    narrow, plan = job.slim(network, IMAGE, policy="uniform", target="width=0.5")
    assert {blocked.layer for blocked in plan.blocked} == {"out"}
    assert (narrow.embed.out_channels, plan.proof.error <= 1e-12) == (DIM // 2, True)


class Mixed(nn.Module):
    """A stream that a BatchNorm and a LayerNorm use, as in MaxViT and CoAtNet."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, DIM, 4, 4), nn.BatchNorm2d(DIM)
        self.conv, self.head = nn.Conv2d(DIM, DIM, 1), nn.Linear(DIM, 5)
        self.tokens, self.attention = nn.LayerNorm(DIM), Attention("plain", HEADS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images)
        x = x + self.conv(self.norm(x))
        x = x.flatten(2).transpose(1, 2)
        x = x + self.attention(self.tokens(x))
        return self.head(x.mean(1))


def test_a_stream_with_both_kinds_of_norms_is_cut() -> None:
    torch.manual_seed(0)
    narrow, plan = job.slim(Mixed().double().eval(), IMAGE, policy="uniform", target="width=0.5")
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    assert narrow.embed.out_channels == narrow.norm.num_features == DIM // 2


class NormedLinear(nn.Module):
    """A linear layer and its BatchNorm, whose result has the shape of what the layer returned."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class Uneven(nn.Module):
    """Attention whose values are wider than its keys, split by attributes (LeViT)."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.heads, self.width, self.value_width, self.first = HEADS, WIDTH, 2 * WIDTH, first
        self.values, self.scale = HEADS * 2 * WIDTH, WIDTH**-0.5
        self.qkv = NormedLinear(DIM, HEADS * 4 * WIDTH)
        self.proj = NormedLinear(self.values, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        sizes = [self.width, self.width, self.value_width]
        if self.first:  # channels before positions, as after a convolution
            x = self.qkv(x).mT.reshape(batch, self.heads, -1, tokens)
            q, k, v = (part.mT for part in x.split(sizes, dim=2))
        else:
            x = self.qkv(x).view(batch, tokens, self.heads, -1)
            q, k, v = (part.transpose(1, 2) for part in x.split(sizes, dim=3))
        x = (q @ k.mT * self.scale).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, self.values))


@pytest.mark.parametrize("first", [False, True])
def test_values_wider_than_keys_are_split_by_attributes(first: bool) -> None:
    torch.manual_seed(0)
    network = Transformer(lambda: Uneven(first=first)).eval().double()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm1d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.running_mean)
    narrow, plan = job.slim(network, IMAGE, policy="uniform", target="width=0.5")
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    block = narrow.blocks[0]
    assert block.qkv.linear.out_features == HEADS * (2 * block.width + block.value_width)
    assert 1 <= block.width < WIDTH < block.value_width + block.width < 2 * WIDTH
    assert block.values == HEADS * block.value_width
    assert plan.proof.error <= 1e-12
    torch.testing.assert_close(narrow(IMAGE), zeroed_outputs(network, plan)(IMAGE))
