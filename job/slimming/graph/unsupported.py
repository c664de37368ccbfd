"""Layers of kinds without a rule, listed so that each layer that is not cut has a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from job.slimming.graph.convolution_rules import computed_weight
from job.slimming.graph.groups import BlockedChannels
from job.slimming.graph.layer_rules import is_layer
from job.slimming.graph.layers import (
    BATCHNORM,
    SUMMING,
    is_depthwise,
    modules_of,
    owner_of,
    weight_rows,
)
from job.slimming.graph.reasons import (
    COMPUTED_OR_SHARED,
    HIDDEN,
    NO_CHANNELS_OF_ITS_OWN,
    NOT_USED,
    UNKNOWN_LAYER,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

    from job.slimming.graph.groups import ChannelGraph


def unsupported_layers(
    network: nn.Module, graph: ChannelGraph, unused: Collection[str]
) -> tuple[BlockedChannels, ...]:
    """Return the layers with a weight of two axes or more that no rule of a layer covers.

    These include layers whose weight is computed in a way that no rule covers, those that no pass
    in eval mode uses (``unused``, also BatchNorms), and recurrent layers, whose hidden states are
    not cut. Parameters that are cut by their name, and containers of other modules, are left out.
    """
    covered = {name for slot in graph.slots for name in (slot.layer, owner_of(slot.layer))}
    named = {layer for group in graph.groups for layer in group.layers}
    named |= {name for b in graph.blocked for name in (b.layer, owner_of(b.layer))}
    called = {call.weight for call in graph.calls}
    found = []
    for name, module in modules_of(network, once=True).items():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase) and name not in unused:
            found.append(BlockedChannels.by(name, module.hidden_size, HIDDEN()))
            continue
        if name in unused and name not in covered and isinstance(module, BATCHNORM):
            found.append(BlockedChannels.by(name, module.num_features, NOT_USED()))
            continue
        shape = _weight_shape(module)
        if shape is None or name in covered:
            continue
        table = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        if table and name in named:
            continue
        reason = NO_CHANNELS_OF_ITS_OWN() if table else UNKNOWN_LAYER(type(module).__name__)
        if is_layer(module):
            if not isinstance(module, SUMMING) or is_depthwise(module) or name in named:
                continue
            other = NOT_USED() if name in unused else COMPUTED_OR_SHARED()
            reason = computed_weight(module) or other
            if f"{name}.weight" in called:
                reason = NO_CHANNELS_OF_ITS_OWN()
        found.append(BlockedChannels.by(name or "the network", shape[table], reason))
    return tuple(found)


def _weight_shape(module: nn.Module) -> torch.Size | None:
    """Return the shape of the weight of a module; None for containers, and for one axis."""
    if any(child != "parametrizations" for child, _ in module.named_children()):
        return None
    shapes = [p.shape for p in module._parameters.values() if p is not None and p.dim() > 1]
    if not shapes and is_layer(module) and computed_weight(module):
        shapes = [weight_rows(module).shape]
    return shapes[0] if shapes else None
