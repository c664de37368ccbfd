"""Biases for the constants of removed channels, in layers that have none."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from job.slimming.calibration.consumers import consumers_of
from job.slimming.planning.layer_channels import LayerChannels

if TYPE_CHECKING:
    from torch import nn

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.planning.layer_channels import Layers


def layers_without_constant(network: nn.Module, graph: ChannelGraph) -> frozenset[str]:
    """Return the consumers without a bias and without a BatchNorm after them."""
    layers = {consumer.layer for consumer in consumers_of(network, graph)}
    layers -= graph.forward.norms_after.keys()
    return frozenset(name for name in layers if network.get_submodule(name).bias is None)


def add_biases(layers: Layers, without_constant: frozenset[str]) -> Layers:
    """Add a bias to those of ``layers`` that are in ``without_constant`` and lose an input."""
    with_biases = dict(layers)
    for name in sorted(without_constant):
        kept = layers.get(name, LayerChannels())
        if kept.in_ is not None:
            with_biases[name] = replace(kept, bias=True)
    return with_biases
