"""nn.MultiheadAttention with one packed weight, and with separate weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import job
from job.slimming.graph.grouping import channel_graph
from job.slimming.planning.base import Base, full_group_sizes, layer_widths
from job.slimming.planning.cost import network_cost
from job.slimming.surgery.surgery import apply_plan
from support.transformer import DIM, Transformer

IMAGE = torch.rand(1, 3, 16, 16)


def drawn(network: nn.Module) -> Any:
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network.double().eval()


class TorchBlock(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attention = nn.MultiheadAttention(DIM, 3, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


def test_multihead_attention_is_as_wide_as_its_stream() -> None:
    network = drawn(Transformer(TorchBlock))
    narrow, plan = job.slim(
        network, IMAGE.double(), policy="uniform", target="width=0.5", importance="l2", min_keep=0
    )
    assert plan.proof.error <= 1e-12
    assert plan.after.params == sum(p.numel() for p in narrow.parameters())
    attention = narrow.blocks[0].attention
    assert (attention.embed_dim, attention.head_dim, attention.num_heads) == (12, 4, 3)
    assert attention.in_proj_weight.shape == (36, 12)
    assert attention.out_proj.weight.shape == (12, 12)
    assert plan.layers["blocks.0.attention"].scaled[0][1:] == (12, 24)
    narrow.train()(torch.rand(4, 3, 16, 16, dtype=torch.float64)).sum().backward()
    images = torch.rand(64, 3, 16, 16)
    _, plan = job.slim(
        network.float(), IMAGE, target="channels=0.8", calibration=[images], compensate="regress"
    )
    assert plan.proof.error <= 1e-9


def test_a_key_and_a_value_that_are_parameters_are_cut() -> None:
    network = drawn(Transformer(lambda: TorchBlock(add_bias_kv=True)))
    narrow, plan = job.slim(network, IMAGE.double(), policy="uniform", target="width=0.5")
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    assert plan.proof.error <= 1e-12
    attention = narrow.blocks[0].attention
    assert attention.bias_k.shape == attention.bias_v.shape == (1, 1, 12)
    assert plan.after.params == sum(p.numel() for p in narrow.parameters())


class OneHead(nn.Module):
    """Attention of one head to fewer places, as in the first stage of SegFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.fewer = nn.Conv2d(3, DIM, 4, 4), nn.Conv2d(DIM, DIM, 2, 2)
        self.attention = nn.MultiheadAttention(DIM, 1, batch_first=True)
        self.head = nn.Linear(DIM, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.enter(image)
        queries, others = (each.flatten(2).mT for each in (x, self.fewer(x)))
        x = queries + self.attention(queries, others, others, need_weights=False)[0]
        return self.head(x.mean(1))


def test_multihead_attention_may_have_one_head() -> None:
    torch.manual_seed(0)
    network = OneHead().eval()
    base = Base(layer_widths(network), network_cost(network, 16))
    assert base.widths["attention"] == 3 * DIM
    narrow, plan = job.slim(network, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    assert narrow.attention.in_proj_weight.shape == (3 * DIM // 2, DIM // 2)
    assert plan.proof.error <= 1e-12
    sizes = full_group_sizes(narrow, channel_graph(narrow, IMAGE), base)
    assert set(sizes.values()) == {DIM, 2 * DIM}  # the stream with the values; queries and keys


class TwoStreams(nn.Module):
    """Queries of one stream, keys and values of another of other width, or of an input."""

    def __init__(self, *, context: int = 16, heads: int = 3, **options: Any) -> None:
        super().__init__()
        self.enter, self.other = nn.Linear(8, DIM), nn.Linear(6, context)
        self.attention = nn.MultiheadAttention(
            DIM, heads, kdim=context, vdim=context, batch_first=True, **options
        )
        self.head = nn.Linear(DIM, 5)

    def forward(self, tokens: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        x = self.enter(tokens)
        context = self.other(others) if self.other is not None else others
        return self.head((x + self.attention(x, context, context)[0]).mean(1))


TOKENS = torch.rand(2, 7, 8), torch.rand(2, 4, 6)


def by_hand(network: TwoStreams, plan: job.SlimPlan) -> torch.Tensor:
    """Return the outputs (2, 5) of the wide attention, computed from the kept channels."""
    wide, stream, context = network.attention, *(plan.layers[n].out for n in ("enter", "other"))
    sources = {"q": (network.enter, 0, stream)} | dict.fromkeys("kv", (network.other, 1, context))
    biases, parts = dict(zip("qkv", wide.in_proj_bias.view(3, -1), strict=True)), {}
    for name, (layer, number, columns) in sources.items():
        rows = plan.layers[f"attention.{name}_proj_weight"].out
        weight = getattr(wide, f"{name}_proj_weight")[list(rows)][:, list(columns)]
        part = layer(TOKENS[number].double())[..., list(columns)] @ weight.mT
        part += biases[name][list(rows)]
        parts[name] = part.unflatten(-1, (wide.num_heads, -1)).transpose(1, 2)
    weights = (parts["q"] @ parts["k"].mT / (DIM // wide.num_heads) ** 0.5).softmax(-1)
    values = (weights @ parts["v"]).transpose(1, 2).flatten(2)
    out, rows = wide.out_proj, list(plan.layers["attention.v_proj_weight"].out)
    values = values @ out.weight[list(stream)][:, rows].mT + out.bias[list(stream)]
    x = network.enter(TOKENS[0].double())[..., list(stream)]
    return (x + values).mean(1) @ network.head.weight[:, list(stream)].mT + network.head.bias


@pytest.mark.parametrize("heads", [1, 3])
def test_separate_weights_are_cut_with_their_own_inputs(heads: int) -> None:
    network = drawn(TwoStreams(heads=heads))
    tokens = tuple(tensor.double() for tensor in TOKENS)
    narrow, plan = job.slim(
        network, tokens, policy="uniform", target="width=0.5", importance="l2", compensate="none"
    )
    attention = narrow.attention
    assert (attention.embed_dim, attention.kdim, attention.vdim) == (DIM // 2, 8, 8)
    assert attention.q_proj_weight.shape == (DIM // 2, DIM // 2)
    assert attention.k_proj_weight.shape == attention.v_proj_weight.shape == (DIM // 2, 8)
    assert attention.in_proj_bias.shape == (3 * DIM // 2,)
    assert attention.head_dim == DIM // 2 // heads
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    assert plan.proof.error <= 1e-12
    torch.testing.assert_close(narrow(*tokens), by_hand(network, plan), rtol=0, atol=1e-12)
    assert apply_plan(network, plan.layers)(*tokens).equal(narrow(*tokens))
    assert plan.after.params == sum(p.numel() for p in narrow.parameters())
    narrow.train()(*tokens).sum().backward()


OPTIONS: list[dict[str, Any]] = [{"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}]


@pytest.mark.parametrize("options", OPTIONS)
def test_separate_weights_with_options(options: dict[str, Any]) -> None:
    network = drawn(TwoStreams(**options))
    tokens = tuple(tensor.double() for tensor in TOKENS)
    narrow, plan = job.slim(network, tokens, policy="uniform", target="width=0.5", importance="l2")
    assert narrow.attention.k_proj_weight.shape == (DIM // 2, 8)
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    assert plan.proof.error <= 1e-12


def test_keys_and_values_of_an_input_keep_its_channels() -> None:
    network = TwoStreams(context=6)
    network.other = None
    tokens = tuple(tensor.double() for tensor in TOKENS)
    narrow, plan = job.slim(
        drawn(network), tokens, policy="uniform", target="width=0.5", importance="l2"
    )
    assert narrow.attention.k_proj_weight.shape == narrow.attention.v_proj_weight.shape
    assert narrow.attention.k_proj_weight.shape == (DIM // 2, 6)
    assert plan.proof.error <= 1e-12


@pytest.mark.parametrize("packed", [True, False])
def test_queries_of_an_input_keep_the_width_of_the_attention(packed: bool) -> None:
    network, kinds = TwoStreams(), {} if packed else {"kdim": 16, "vdim": 16}
    network.enter = nn.Identity()
    network.other = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 8 if packed else 16))
    network.attention = nn.MultiheadAttention(8, 2, batch_first=True, **kinds)
    network.head = nn.Linear(8, 5)
    tokens = tuple(tensor.double() for tensor in TOKENS)
    narrow, plan = job.slim(
        drawn(network), tokens, policy="uniform", target="width=0.5", importance="l2"
    )
    assert narrow.other[0].out_features == 12
    assert narrow.other[2].out_features == 8
    assert narrow.attention.embed_dim == 8
    assert plan.proof.error <= 1e-12
    reasons = {blocked.layer: blocked.reason for blocked in plan.blocked}
    blocked = reasons["other.2" if packed else "attention.q_proj_weight"]
    assert blocked == "multi_head_attention_forward of inputs that are never cut"


@pytest.mark.parametrize("packed", [True, False])
def test_multiply_adds_count_the_tokens_of_queries_and_of_keys(packed: bool) -> None:
    network = TwoStreams(context=DIM)
    if packed:
        network.attention = nn.MultiheadAttention(DIM, 3, batch_first=True)
    _, plan = job.slim(network.eval(), TOKENS, target="channels=0.9", importance="l2")
    linear = 7 * 8 * DIM + 4 * 6 * DIM + 5 * DIM
    assert plan.before.macs == linear + DIM * DIM * (2 * 7 + 2 * 4)


class Probe(nn.Module):
    """Pooling by attention whose query is a parameter, as in SigLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.probe = nn.Linear(8, DIM), nn.Parameter(torch.randn(1, 1, DIM))
        self.attention = nn.MultiheadAttention(DIM, 3, batch_first=True)
        self.head = nn.Linear(DIM, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.enter(tokens)
        probe = self.probe.repeat(len(x), 1, 1)
        return self.head(self.attention(probe, x, x)[0][:, 0])


def test_a_query_that_is_a_parameter_is_cut() -> None:
    narrow, plan = job.slim(
        drawn(Probe()), TOKENS[0].double(), policy="uniform", target="width=0.5", importance="l2"
    )
    assert narrow.probe.shape == (1, 1, DIM // 2)
    assert narrow.attention.embed_dim == DIM // 2
    assert plan.proof.error <= 1e-12


class Pool(nn.Module):
    """Pooling by attention whose weights are those of four layers, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, DIM)
        self.query, self.key, self.value = (nn.Linear(DIM, DIM) for _ in range(3))
        self.out = nn.Linear(DIM, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.enter(tokens).transpose(0, 1)
        biases = torch.cat([self.query.bias, self.key.bias, self.value.bias])
        return nn.functional.multi_head_attention_forward(
            query=x[:1],
            key=x,
            value=x,
            embed_dim_to_check=x.shape[-1],
            num_heads=3,
            in_proj_weight=None,
            in_proj_bias=biases,
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.out.weight,
            out_proj_bias=self.out.bias,
            use_separate_proj_weight=True,
            q_proj_weight=self.query.weight,
            k_proj_weight=self.key.weight,
            v_proj_weight=self.value.weight,
        )[0].squeeze(0)


def test_attention_by_the_weights_of_layers_is_cut() -> None:
    narrow, plan = job.slim(
        drawn(Pool()), TOKENS[0].double(), policy="uniform", target="width=0.5", importance="l2"
    )
    half = DIM // 2
    assert (narrow.query.in_features, narrow.query.out_features) == (half, half)
    assert (narrow.value.out_features, narrow.out.in_features) == (half, half)
    assert narrow.query.bias.shape == (half,)
    assert {blocked.layer for blocked in plan.blocked} == {"out"}
    assert plan.proof.error <= 1e-12
