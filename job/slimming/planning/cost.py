"""Costs of a network: channels, parameters, multiply-adds (MACs) and bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from job.models.input_size import InputSize, input_shape
from job.slimming.graph.layer_rules import is_layer, layer_sizes
from job.slimming.graph.layers import NORMS, SUMMING, modules_of, owner_of
from job.slimming.graph.pause_points import CONSUMERS, multiplied_values
from job.slimming.graph.removed_layers import ConstantOutput
from job.slimming.graph.selection import batchnorms
from job.slimming.graph.spaced import SpacedConvolution
from job.slimming.graph.trace import trace_network

if TYPE_CHECKING:
    from job.slimming.graph.trace import Op, Trace

COST_METRICS = ("channels", "params", "macs", "bytes")


@dataclass(frozen=True)
class LayerCost:
    """Costs of one call of a layer; ``macs`` are its multiply-adds for one image."""

    name: str
    kind: str
    channels_in: int
    channels_out: int
    params: int
    macs: int


@dataclass(frozen=True)
class Cost:
    """Costs of a network.

    ``channels`` counts the channels of all BatchNorms. In a network with other norms, or with none,
    it counts the outputs of all convolutions and linear layers instead. ``macs`` are the
    multiply-adds of all convolutions and linear layers for one image. ``bytes`` is the size of the
    state dict.
    """

    channels: int
    params: int
    macs: int
    bytes: int

    def to_dict(self) -> dict[str, int]:
        """Return the metrics by name."""
        return asdict(self)


def example_image(size: InputSize) -> torch.Tensor:
    """Return zeros (1, *shape) of one element of memory, in place of an image."""
    shape = input_shape(size)
    return torch.zeros(1, *[1] * len(shape)).expand(1, *shape)


def layer_costs(network: nn.Module, size: InputSize) -> list[LayerCost]:
    """Return the costs of all calls of layers with parameters, for an input of ``size``."""
    trace = trace_network(network, example_image(size))
    return [
        _layer_cost(network, layer, op, trace)
        for op in trace.ops
        for layer in dict.fromkeys(owner_of(name) for name in map(trace.name, op.inputs) if name)
    ]


def _layer_cost(network: nn.Module, name: str, op: Op, trace: Trace) -> LayerCost:
    layer = network.get_submodule(name)
    output = op.results[0]
    axis = 1 if output.dim() > 1 else 0
    inputs = outputs = output.shape[axis]
    if is_layer(layer):
        inputs, outputs = layer_sizes(layer)
    params = sum(p.numel() for p in layer._parameters.values() if p is not None)
    return LayerCost(name, type(layer).__name__, inputs, outputs, params, _macs(op, trace))


def _macs(op: Op, trace: Trace) -> int:
    if op.name not in (*CONSUMERS, "spaced_convolution"):
        return 0
    weight = op.argument(1, "weight")
    return int(multiplied_values(op) // trace.sample_count * weight[0].numel())


def counted_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose channels are counted, by name.

    These are all BatchNorms if the network has no other norms. Otherwise they are all convolutions
    and linear layers: a LayerNorm normalises the channels of a residual stream, and most layers of
    a transformer have no norm.
    """
    modules = modules_of(network)
    norms: dict[str, nn.Module] = dict(batchnorms(network))
    if norms and not any(isinstance(module, NORMS) for module in modules.values()):
        return norms
    kinds = (*SUMMING, ConstantOutput, SpacedConvolution)
    return {name: module for name, module in modules.items() if isinstance(module, kinds)}


def count_channels(network: nn.Module) -> int:
    """Return the number of channels of a network."""
    return sum(layer_sizes(layer)[1] for layer in set(counted_layers(network).values()))


def network_cost(network: nn.Module, size: InputSize) -> Cost:
    """Return the costs of the whole network for an input of ``size``."""
    trace = trace_network(network, example_image(size))
    return Cost(
        channels=count_channels(network),
        params=sum(p.numel() for p in network.parameters()),
        macs=sum(_macs(op, trace) for op in trace.ops),
        bytes=sum(t.numel() * t.element_size() for t in network.state_dict().values()),
    )
