"""Base: the network before its first cut, which fractions are relative to."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003  (the types are read to load a model card)
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from job.slimming.graph.layer_rules import is_layer, layer_sizes
from job.slimming.graph.layers import modules_of
from job.slimming.graph.selection import SelectedChannels
from job.slimming.planning.cost import Cost  # noqa: TC001

if TYPE_CHECKING:
    from job.slimming.graph.groups import ChannelGraph


@dataclass(frozen=True)
class Base:
    """Widths and cost of a network before any cut.

    ``widths`` is the number of output channels of each layer, by name. ``cost`` is None if it is
    the cost of the current network. If ``slim``, the base is itself the result of a cut, and
    fractions are not relative to width 1 of a network's width argument.
    """

    widths: Mapping[str, int]
    cost: Cost | None
    slim: bool = False


def layer_widths(network: nn.Module) -> dict[str, int]:
    """Return the output channels of each convolution, linear layer and BatchNorm, by name.

    Those of a MultiheadAttention are its queries, keys, and values.
    """
    widths = {}
    for name, layer in modules_of(network, once=True).items():
        if isinstance(layer, SelectedChannels):
            widths[name] = len(layer.indices)
        elif isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
            widths[name] = len(layer.in_proj_weight)
        elif is_layer(layer):
            widths[name] = layer_sizes(layer)[1]
    return widths


def full_group_sizes(
    network: nn.Module, graph: ChannelGraph, base: Base | None = None
) -> dict[str, int]:
    """Return the number of channels of each group in the base, by name.

    Groups that the network's width argument scales have their size at width 1.
    """
    now, sizes = layer_widths(network), {}
    uniform_widths = {} if base and base.slim else getattr(network, "uniform_widths", {})
    widths = {**(base.widths if base else now), **uniform_widths}
    for group in graph.groups:
        layer = next((name for name in group.layers if widths.get(name) and now.get(name)), None)
        ratio = widths[layer] / now[layer] if layer else 1.0
        sizes[group.name] = round(group.size * ratio)
    return sizes
