"""The base: what a network was before its first cut. Fractions are relative to it."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003  (the types are read to load a model card)
from dataclasses import dataclass
from typing import TYPE_CHECKING

from job.slimming.graph.layer_rules import is_layer, layer_sizes
from job.slimming.graph.layers import modules_of
from job.slimming.graph.selection import SelectedChannels
from job.slimming.planning.cost import Cost  # noqa: TC001

if TYPE_CHECKING:
    from torch import nn

    from job.slimming.graph.groups import ChannelGraph


@dataclass(frozen=True)
class Base:
    """A network before any cut.

    ``widths`` is the number of channels that each layer writes, by name. ``cost`` is None where it
    is the cost of the network at hand. ``slim`` says that the base is itself the result of a cut:
    then fractions are not relative to width 1 of the network's own width argument.
    """

    widths: Mapping[str, int]
    cost: Cost | None
    slim: bool = False


def layer_widths(network: nn.Module) -> dict[str, int]:
    """Return how many channels each convolution, linear layer and BatchNorm writes, by name."""
    widths = {}
    for name, layer in modules_of(network, once=True).items():
        if isinstance(layer, SelectedChannels):
            widths[name] = len(layer.indices)
        elif is_layer(layer):
            widths[name] = layer_sizes(layer)[1]
    return widths


def full_group_sizes(
    network: nn.Module, graph: ChannelGraph, base: Base | None = None
) -> dict[str, int]:
    """Return how many channels each group has in the base, by name.

    Groups that the network's own width argument scales have the size of its width 1.
    """
    now, sizes = layer_widths(network), {}
    own = {} if base and base.slim else getattr(network, "uniform_widths", {})
    widths = {**(base.widths if base else now), **own}
    for group in graph.groups:
        layer = next((layer for layer in group.layers if layer in widths), None)
        ratio = widths[layer] / now[layer] if layer in now and layer else 1.0
        sizes[group.name] = round(group.size * ratio)
    return sizes
