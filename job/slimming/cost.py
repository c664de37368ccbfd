"""What a network costs: parameters, multiply-adds, bytes, channels, layer by layer."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn


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


def layer_costs(network: nn.Module, size: int) -> list[LayerCost]:
    """The cost of every layer with parameters, for a picture of (3, size, size).

    Shapes are propagated on torch's ``meta`` device: nothing is computed.
    """
    shadow = copy.deepcopy(network).to("meta").eval()
    rows: list[LayerCost] = []

    def record(name: str) -> Any:
        def hook(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
            rows.append(_layer_cost(name, layer, output))

        return hook

    for name, layer in shadow.named_modules():
        if any(True for _ in layer.parameters(recurse=False)):
            layer.register_forward_hook(record(name))
    with torch.no_grad():
        shadow(torch.empty(1, 3, size, size, device="meta"))
    return rows


def _layer_cost(name: str, layer: nn.Module, output: torch.Tensor) -> LayerCost:
    params = sum(p.numel() for p in layer.parameters(recurse=False))
    macs = 0
    if isinstance(layer, nn.Conv2d):
        macs = output.numel() * layer.weight[0].numel()
        ends = layer.in_channels, layer.out_channels
    elif isinstance(layer, nn.Linear):
        macs = output.numel() * layer.in_features
        ends = layer.in_features, layer.out_features
    else:
        ends = output.shape[1], output.shape[1]
    return LayerCost(name, type(layer).__name__, *ends, params, macs)


def network_cost(network: nn.Module, size: int) -> Cost:
    """The cost of the whole network for a picture of (3, size, size)."""
    return Cost(
        channels=sum(
            layer.num_features
            for layer in network.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        ),
        params=sum(p.numel() for p in network.parameters()),
        macs=sum(row.macs for row in layer_costs(network, size)),
        bytes=sum(t.numel() * t.element_size() for t in network.state_dict().values()),
    )
