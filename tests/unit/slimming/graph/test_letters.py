"""Products by letters: weighted sums, graphs, products of two activations, as einsum and matmul."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from support.transformer import zeroed_outputs

TOKENS = torch.rand(2, 7, 6, dtype=torch.float64)
MAPS = torch.rand(2, 3, 7, 9, dtype=torch.float64)


class Written(nn.Module):
    """Layers by name, and a forward pass written as a function of them."""

    def __init__(self, run: Callable[..., torch.Tensor], **layers: Any) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            if isinstance(layer, torch.Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.run(self, *inputs)


def halved(network: nn.Module, *inputs: torch.Tensor) -> Any:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    network = network.double().eval()
    narrow, plan = job.slim(
        network, inputs, policy="uniform", target="width=0.5", importance="l2", min_keep=0
    )
    assert plan.proof.error <= 1e-12
    return network, narrow, plan


def experts(weigh: Callable[..., torch.Tensor]) -> nn.Module:
    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.enter(x).relu()
        parts = torch.stack([expert(x) for expert in net.experts], 2)
        return net.head(weigh(net.gate(x).softmax(-1), parts).mean(1))

    layers = nn.ModuleList(nn.Linear(32, 24) for _ in range(3))
    return Written(
        run, enter=nn.Linear(6, 32), experts=layers, gate=nn.Linear(32, 3), head=nn.Linear(24, 5)
    )


WEIGHTED: dict[str, Callable[..., torch.Tensor]] = {
    "sum": lambda w, parts: (w[..., None] * parts).sum(2),
    "einsum": lambda w, parts: torch.einsum("bte,bted->btd", w, parts),
    "matmul": lambda w, parts: (w.unsqueeze(2) @ parts).squeeze(2),
    "columns": lambda w, parts: torch.matmul(parts.mT, w[..., None]).squeeze(-1),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_experts_whose_results_are_added_lose_the_same_channels(name: str) -> None:
    network, narrow, plan = halved(experts(WEIGHTED[name]), TOKENS)
    assert {blocked.layer for blocked in plan.blocked} == {"gate", "head"}
    kept = {plan.layers[f"experts.{number}"].out for number in range(3)}
    assert len(kept) == 1
    assert narrow.head.in_features == 12
    torch.testing.assert_close(narrow(TOKENS), zeroed_outputs(network, plan)(TOKENS))


POOLED: dict[str, Callable[..., torch.Tensor]] = {
    "bmm": lambda weights, x: torch.bmm(weights.mT, x),
    "einsum": lambda weights, x: torch.einsum("bhl,bhd->bld", weights, x),
}


@pytest.mark.parametrize("name", POOLED)
def test_places_are_pooled_by_weights_of_a_layer_which_keeps_its_channels(name: str) -> None:
    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.enter(x).tanh()
        return net.head(POOLED[name](net.gate(x).softmax(1), net.value(x)).mean(1))

    layers = {"enter": nn.Linear(6, 32), "gate": nn.Linear(32, 4), "value": nn.Linear(32, 24)}
    network, narrow, plan = halved(Written(run, **layers, head=nn.Linear(24, 5)), TOKENS)
    assert (narrow.value.out_features, narrow.gate.out_features) == (12, 4)
    torch.testing.assert_close(narrow(TOKENS), zeroed_outputs(network, plan)(TOKENS))


GRAPHS: dict[str, Callable[..., torch.Tensor]] = {
    "einsum of a buffer": lambda net, x: torch.einsum("ncvl,vw->ncwl", x, net.buffer),
    "einsum of a parameter": lambda net, x: torch.einsum("ncvl,vw->ncwl", x, net.places),
    "matmul of a softmax": lambda net, x: torch.matmul(F.softmax(net.places, 1), x),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_sums_over_the_nodes_of_a_graph_pass_channels(name: str) -> None:
    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = GRAPHS[name](net, net.enter(x))
        return net.head(net.one(x).relu().mean((2, 3)))

    layers = {"enter": nn.Conv2d(3, 16, 1), "one": nn.Conv2d(16, 24, 1), "head": nn.Linear(24, 5)}
    places = {"buffer": torch.rand(7, 7), "places": nn.Parameter(torch.rand(7, 7))}
    network, narrow, plan = halved(Written(run, **layers, **places), MAPS)
    assert {blocked.layer for blocked in plan.blocked} <= {"head", "the network"}
    assert (narrow.enter.out_channels, narrow.one.out_channels) == (8, 12)
    torch.testing.assert_close(narrow(MAPS), zeroed_outputs(network, plan)(MAPS))


def test_graph_convolutions_of_the_inputs_are_cut() -> None:
    """Kipf and Welling 2017: a matrix that is a parameter, applied to the network's input."""

    def run(net: Any, x: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
        x = (torch.matmul(nodes, torch.matmul(x, net.first)) + net.bias).relu()
        return net.head(torch.einsum("bnm,bmc->bnc", nodes, x @ net.second).relu().mean(1))

    sizes = {"first": (6, 32), "bias": (32,), "second": (32, 24)}
    parameters = {name: nn.Parameter(torch.rand(size)) for name, size in sizes.items()}
    nodes = torch.rand(2, 7, 7, dtype=torch.float64)
    network = Written(run, **parameters, head=nn.Linear(24, 5))
    _, narrow, plan = halved(network, TOKENS, nodes)
    assert (narrow.first.shape, narrow.bias.shape) == ((6, 16), (16,))
    assert narrow.second.shape == (16, 12)
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    with pytest.raises(job.UsageError, match="give a target in params or macs"):
        job.slim(network, (TOKENS, nodes), target="channels=0.5", importance="l2")


@pytest.mark.parametrize("two", [False, True])
def test_similarities_of_two_layers_are_summed_over_the_same_channels(two: bool) -> None:
    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        one, other = net.one(x), net.other(x)
        if two:  # without an axis of samples, as in CLIP
            return one.mean(1) @ other.mean(1).t()
        return torch.einsum("bqd,bkd->bqk", one, other)

    network = Written(run, one=nn.Linear(6, 16), other=nn.Linear(6, 16))
    _, narrow, plan = halved(network, TOKENS)
    assert narrow.one.out_features == narrow.other.out_features == 8
    assert plan.layers["one"].out == plan.layers["other"].out


def test_attention_by_letters_with_tokens_before_heads() -> None:
    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).view(*x.shape[:2], 4, -1) for f in (net.query, net.key, net.value))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.35
        return net.head(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2).mean(1))

    layers = {name: nn.Linear(6, 32) for name in ("query", "key", "value")}
    network, narrow, plan = halved(Written(run, **layers, head=nn.Linear(32, 5)), TOKENS)
    assert {getattr(narrow, name).out_features for name in layers} == {16}
    torch.testing.assert_close(narrow(TOKENS), zeroed_outputs(network, plan)(TOKENS))


def test_a_selective_scan_is_cut() -> None:
    """Mamba (Gu and Dao 2023), as it is written in Python: states (B, D, N) of D channels."""

    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        u = F.silu(net.enter(x))
        b, c = net.states(u).split((8, 8), -1)
        step = F.softplus(u)
        decay = torch.exp(torch.einsum("bld,dn->bldn", step, -net.decay.exp()))
        drive = torch.einsum("bld,bln,bld->bldn", step, b, u)
        state = torch.zeros(u.shape[0], u.shape[2], 8, dtype=u.dtype)
        outputs = []
        for place in range(u.shape[1]):
            state = decay[:, place] * state + drive[:, place]
            outputs.append(torch.einsum("bdn,bn->bd", state, c[:, place]))
        return net.head((torch.stack(outputs, 1) + u * net.skip).mean(1))

    own = {"decay": nn.Parameter(torch.rand(32, 8)), "skip": nn.Parameter(torch.rand(32))}
    layers = {"enter": nn.Linear(6, 32), "states": nn.Linear(32, 16), "head": nn.Linear(32, 5)}
    _, narrow, _ = halved(Written(run, **own, **layers), TOKENS)
    assert (narrow.enter.out_features, narrow.states.out_features) == (16, 16)
    assert (narrow.decay.shape, narrow.skip.shape) == ((16, 8), (16,))


SCALES: dict[str, Callable[..., torch.Tensor]] = {
    "root": lambda q, k: (q @ k) / math.sqrt(q.shape[-1]),
    "power": lambda q, k: torch.bmm(q, k) * int(q.size(-1)) ** -0.5,
    "of queries": lambda q, k: (q * q.shape[-1] ** -0.5) @ k,
}


@pytest.mark.parametrize("name", SCALES)
def test_the_scale_of_one_head_is_that_of_its_width(name: str) -> None:
    """The attention of diffusion models and autoencoders, which has no view into heads."""

    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.enter(x)
        q, k, v = (layer(x).flatten(2) for layer in (net.query, net.key, net.value))
        weights = SCALES[name](q.mT, k).softmax(2)
        return net.head((x + net.out((v @ weights.mT).reshape(x.shape))).mean((2, 3)))

    layers = {name: nn.Conv2d(16, 16, 1) for name in ("query", "key", "value", "out")}
    network = Written(run, enter=nn.Conv2d(3, 16, 1), **layers, head=nn.Linear(16, 5))
    _, narrow, plan = halved(network, MAPS)
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    assert narrow.query.out_channels == narrow.value.out_channels == 8
    assert plan.layers["query"].scaled[0][1:] == (8, 16)


def test_the_values_of_a_split_before_a_norm_are_cut_with_it() -> None:
    """One BatchNorm reads them alone (BoTNet), though one convolution makes all parts."""

    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.enter(x).relu()
        parts = (part.reshape(len(x), 4, -1, 63).mT for part in net.qkv(x).chunk(3, 1))
        q, k, v = parts
        y = ((q @ k.mT * 0.35).softmax(-1) @ v).mT.reshape(len(x), -1, *x.shape[2:])
        return net.head(net.norm(y).relu().mean((2, 3)))

    layers = {"enter": nn.Conv2d(3, 16, 1), "qkv": nn.Conv2d(16, 96, 1), "norm": nn.BatchNorm2d(32)}
    _, narrow, plan = halved(Written(run, **layers, head=nn.Linear(32, 5)), MAPS)
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    assert (narrow.qkv.out_channels, narrow.norm.num_features) == (48, 16)


def test_a_width_that_is_read_does_not_tie_a_split_by_a_list() -> None:
    """HorNet (Rao et al. 2022) reads the shape of its input, which equals one of the widths."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.both = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 40, 1)
            self.gate, self.widths = nn.Conv2d(8, 32, 1), [8, 32]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.enter(x)
            _, _, height, width = x.shape
            one, other = torch.split(self.both(x), self.widths, 1)
            return (self.gate(one) * other).reshape(len(x), -1, height, width)

    network = nn.Sequential(Gated(), nn.Conv2d(32, 5, 1))
    _, narrow, plan = halved(network, MAPS)
    assert {blocked.layer for blocked in plan.blocked} == {"1"}
    assert narrow[0].widths == [4, 16]


def test_a_bias_of_queries_along_the_axis_of_maps_is_scaled_with_them() -> None:
    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.enter(x)
        q, k, v = (layer(x).flatten(2) for layer in (net.query, net.key, net.value))
        q = q + net.bias
        weights = ((q.mT @ k) / math.sqrt(q.shape[1])).softmax(2)
        return net.head((x + (v @ weights.mT).reshape(x.shape)).mean((2, 3)))

    layers = {name: nn.Conv2d(16, 16, 1) for name in ("query", "key", "value")}
    bias = nn.Parameter(torch.rand(1, 16, 1))
    network = Written(run, enter=nn.Conv2d(3, 16, 1), **layers, bias=bias, head=nn.Linear(16, 5))
    _, narrow, plan = halved(network, MAPS)
    assert (narrow.query.out_channels, narrow.bias.shape) == (8, (1, 8, 1))
    assert plan.layers["bias"].scaled == plan.layers["query"].scaled != ()


def test_weights_of_windows_from_a_layer_of_the_values_stream() -> None:
    """Outlook attention: a layer gives the weights of all pairs in a window (Yuan et al. 2021)."""

    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.enter(x)
        count, width, height, columns = x.shape
        v = F.unfold(net.value(x), 3, padding=1)
        v = v.reshape(count, 4, width // 4, 9, -1).permute(0, 1, 4, 3, 2)
        weights = net.weights(x).flatten(2).mT.reshape(count, -1, 4, 9, 9)
        y = (weights.permute(0, 2, 1, 3, 4).softmax(-1) @ v).permute(0, 1, 4, 3, 2)
        y = F.fold(y.reshape(count, width * 9, -1), (height, columns), 3, padding=1)
        return net.head((x + net.last(y)).mean((2, 3)))

    layers = {
        "enter": nn.Conv2d(3, 32, 1),
        "value": nn.Conv2d(32, 32, 1),
        "weights": nn.Conv2d(32, 4 * 81, 1),
        "last": nn.Conv2d(32, 32, 1),
        "head": nn.Linear(32, 5),
    }
    _, narrow, plan = halved(Written(run, **layers), MAPS)
    assert {blocked.layer for blocked in plan.blocked} == {"weights", "head"}
    assert (narrow.enter.out_channels, narrow.value.out_channels) == (16, 16)


@pytest.mark.parametrize("name", ["n_head", "num_heads", "h"])
def test_as_many_heads_as_each_has_channels(name: str) -> None:
    """The attribute that equals both numbers is that of the heads, which stays."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, 4)
            self.width = 16
            self.qkv, self.last = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            count, tokens, width = x.shape
            if name == "n_head":
                heads = self.n_head
            else:
                heads = self.num_heads if name == "num_heads" else self.h
            parts = (
                t.view(count, tokens, heads, width // heads)
                for t in self.qkv(x).split(self.width, 2)
            )
            q, k, v = (part.transpose(1, 2) for part in parts)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return x + self.last(y.reshape(count, tokens, width))

    network = nn.Sequential(nn.Linear(6, 16), Attention(), Attention(), nn.Linear(16, 5))
    _, narrow, plan = halved(network, TOKENS)
    assert {blocked.layer for blocked in plan.blocked} == {"3"}
    assert (getattr(narrow[1], name), narrow[1].width) == (4, 8)
    assert narrow[1].qkv.out_features == 24
