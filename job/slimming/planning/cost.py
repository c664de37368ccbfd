"""What a network costs: parameters, multiply-adds, bytes, channels, built or only planned."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from job.slimming.graph.layers import BATCHNORM, CONVOLUTIONS, owner_of, tensors_of
from job.slimming.graph.selection import batchnorms
from job.slimming.graph.trace import trace_network

if TYPE_CHECKING:
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.trace import Op, Trace
    from job.slimming.graph.union import Ids

METRICS = ("channels", "params", "macs", "bytes")
_CALLS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
Sides = dict[tuple[str, str], int]  # numbers of channel slots by layer and side
INDEX_BYTES = 8  # of a channel that a BatchNorm selects


@dataclass(frozen=True)
class LayerCost:
    """One layer: channels in and out, parameters, and multiply-adds for one picture."""

    name: str
    kind: str
    channels_in: int
    channels_out: int
    params: int
    macs: int


@dataclass(frozen=True)
class Cost:
    """A network: ``channels`` counts those under a BatchNorm, ``bytes`` its whole state dict.

    ``macs`` are the multiply-adds of convolutions and linear layers for one picture.
    """

    channels: int
    params: int
    macs: int
    bytes: int

    def to_dict(self) -> dict[str, int]:
        """Field by field."""
        return asdict(self)


def picture(size: int) -> torch.Tensor:
    """A stand-in for one picture of ``size`` pixels, (1, 3, size, size), that takes no memory."""
    return torch.zeros(1, 3, 1, 1).expand(1, 3, size, size)


def layer_costs(network: nn.Module, size: int) -> list[LayerCost]:
    """The cost of every layer with parameters as it is used on a picture of (3, size, size)."""
    trace = trace_network(network, picture(size))
    return [
        _layer_cost(network, layer, op, trace)
        for op in trace.ops
        for layer in dict.fromkeys(owner_of(name) for name in map(trace.name, op.inputs()) if name)
    ]


def _layer_cost(network: nn.Module, name: str, op: Op, trace: Trace) -> LayerCost:
    layer = network.get_submodule(name)
    output = next(op.results())
    axis = 1 if output.dim() > 1 else 0
    inputs = outputs = output.shape[axis]
    if isinstance(layer, CONVOLUTIONS):
        inputs, outputs = layer.in_channels, layer.out_channels
    elif isinstance(layer, nn.Linear):
        inputs, outputs = layer.in_features, layer.out_features
    params = sum(p.numel() for p in layer.parameters(recurse=False))
    return LayerCost(name, type(layer).__name__, inputs, outputs, params, _macs(op, trace))


def _macs(op: Op, trace: Trace) -> int:
    if op.name not in _CALLS:
        return 0
    weight = op.argument(1, "weight")
    return int(op.result.numel() // trace.sample_count * weight[0].numel())


def network_cost(network: nn.Module, size: int) -> Cost:
    """The cost of the whole network for a picture of (3, size, size)."""
    trace = trace_network(network, picture(size))
    return Cost(
        channels=sum(m.num_features for m in network.modules() if isinstance(m, BATCHNORM)),
        params=sum(p.numel() for p in network.parameters()),
        macs=sum(_macs(op, trace) for op in trace.ops),
        bytes=sum(t.numel() * t.element_size() for t in network.state_dict().values()),
    )


class Costs:
    """What a network costs with some of its channels, without building it: exact integers.

    Every tensor's size is ``unit`` times the channels on its two sides, over its groups. Layers in
    ``unbiased`` get a bias as soon as they read fewer channels.
    """

    def __init__(
        self, network: nn.Module, graph: ChannelGraph, unbiased: frozenset[str] = frozenset()
    ) -> None:
        arrays = {id(p.ids): p.ids for p in graph.slots}  # slots share some
        number_of = {key: number for number, key in enumerate(arrays)}
        sides: Sides = {(p.layer, p.side): number_of[id(p.ids)] for p in graph.slots}
        self.ids = np.concatenate([[0], *arrays.values()])
        lengths = [1, *map(len, arrays.values())]
        self.starts = np.cumsum([0, *lengths[:-1]])
        self.lengths = np.array(lengths)
        order_of = np.argsort(self.ids, kind="stable")
        self.position = np.repeat(np.arange(len(lengths)), lengths)[order_of]
        self.first_of = np.searchsorted(self.ids[order_of], np.arange(graph.count + 1))
        tensors, keys = _tensors(network)
        cut = {layer for layer, _ in sides}
        between = [_sides(name, tensor, sides, cut) for name, tensor in tensors.items()]
        order = {name: number for number, name in enumerate(tensors)}
        self.first, self.second = np.array(between, np.int64).reshape(-1, 2).T
        full = self.lengths[self.first] * self.lengths[self.second]
        self.numel = np.array([tensor.numel() for tensor in tensors.values()], np.int64)
        self.full = full
        is_param = [isinstance(tensor, nn.Parameter) for tensor in tensors.values()]
        self.is_param = np.array(is_param, np.int64)
        self.bytes = np.zeros(len(tensors), np.int64)
        for name in keys.values():
            self.bytes[order[name]] += tensors[name].element_size()
        self.macs = np.zeros(len(tensors), np.int64)
        self.other_macs = sum(call.places for call in graph.calls if call.weight is None)
        for call in graph.calls:
            if call.weight is not None:
                self.macs[order[call.weight]] += call.places
        self._channels(network, graph, sides)
        self._biases(network, unbiased, sides)

    def _channels(self, network: nn.Module, graph: ChannelGraph, sides: Sides) -> None:
        cut = [(s, n + 1) for s, n in sides.items() if s[1] in ("through", "select")]
        known = batchnorms(network)
        norms = {name: n for (name, _), n in cut if name in known}
        self.norms = np.array(sorted(norms.values()), np.int64)
        total = sum({id(norm): norm.num_features for norm in known.values()}.values())
        self.other_channels = total - int(self.lengths[self.norms].sum())
        fresh = [n for (name, side), n in cut if side == "select" and f"{name}.norm" not in known]
        self.selecting = np.array(fresh, np.int64)

    def _biases(self, network: nn.Module, unbiased: frozenset[str], sides: Sides) -> None:
        layers = [layer for layer in sorted(unbiased) if (layer, "in") in sides]
        weights = [network.get_submodule(layer).get_parameter("weight") for layer in layers]
        self.readers = np.array([sides[layer, "in"] + 1 for layer in layers], np.int64)
        outs = [sides.get((layer, "out"), -1) + 1 for layer in layers]
        self.writers = np.array(outs, np.int64)
        rows = [1 if out else len(w) for out, w in zip(outs, weights, strict=True)]
        self.bias_rows = np.array(rows, np.int64)
        self.bias_bytes = np.array([w.element_size() for w in weights], np.int64)

    def cost(self, keep: Ids) -> Cost:
        """The cost with the channels where ``keep`` (channels,) bool is true; keep[0] is true."""
        return self.cost_at(self.counts(keep))

    def counts(self, keep: Ids) -> Ids:
        """How many channels of ``keep`` (channels,) bool stand in each channel slot (slots,)."""
        counts: Ids = np.add.reduceat(keep[self.ids].astype(np.int64), self.starts)
        return counts

    def places(self, channels: Ids) -> Ids:
        """How often some channels (n,) stand in each channel slot (slots,)."""
        found = [self.position[self.first_of[c] : self.first_of[c + 1]] for c in channels]
        counts: Ids = np.bincount(np.concatenate(found), minlength=len(self.starts))
        return counts

    def cost_at(self, counts: Ids) -> Cost:
        """The cost with so many channels in each channel slot (slots,), as ``counts`` has them."""
        return Cost(**{metric: self.measure(metric, counts) for metric in METRICS})

    def measure(self, metric: str, counts: Ids) -> int:
        """One of ``METRICS`` with so many channels in each channel slot (slots,)."""
        if metric == "channels":
            return self.other_channels + int(counts[self.norms].sum())
        numel = self.numel * (counts[self.first] * counts[self.second]) // self.full
        if metric == "macs":
            return int(numel @ self.macs) + self.other_macs
        fewer = counts[self.readers] < self.lengths[self.readers]
        biases = self.bias_rows * counts[self.writers] * fewer
        if metric == "params":
            return int(numel @ self.is_param + biases.sum())
        chosen = counts[self.selecting]
        index = int(chosen[chosen < self.lengths[self.selecting]].sum()) * INDEX_BYTES
        return int(numel @ self.bytes + biases @ self.bias_bytes) + index


def _tensors(network: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Parameters and buffers by name, shared ones once; and for each state-dict key, which."""
    known: dict[int, str] = {}
    tensors = {
        name: tensor
        for name, _, _, tensor in tensors_of(network)
        if known.setdefault(id(tensor), name) == name
    }
    state: dict[str, Any] = network.state_dict(keep_vars=True)
    return tensors, {key: known[id(value)] for key, value in state.items() if id(value) in known}


def _sides(name: str, tensor: torch.Tensor, sides: Sides, cut: set[str]) -> tuple[int, int]:
    """Numbers (from 1; 0: none) of the channel slots that a tensor's size is proportional to."""
    layer, _, own = name.rpartition(".")
    if own == "num_batches_tracked":
        return 0, 0
    if (layer.removesuffix(".norm"), "select") in sides:
        layer = layer.removesuffix(".norm")
    at = layer
    if layer not in cut:
        if name not in cut:
            return 0, 0
        at, own = name, "weight"
    through = next((sides[at, s] + 1 for s in ("through", "select") if (at, s) in sides), 0)
    if through:
        return through, 0
    out = sides.get((at, "out"), -1) + 1
    weighs = own == "weight" and isinstance(tensor, nn.Parameter)
    read = sides.get((at, "in"), -1) + 1 if weighs else 0
    return out, read
