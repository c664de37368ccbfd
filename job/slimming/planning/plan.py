"""A plan: which channels of which layers stay. Made on the main process, applied on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from job.slimming.planning.layer_channels import SIDES, Kept, LayerChannels, Layers
from job.slimming.planning.overview import plan_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from job.slimming.graph.groups import BlockedChannels, ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.planning.cost import Cost
    from job.slimming.planning.overview import Sizes


@dataclass(frozen=True)
class Proof:
    """Largest ``error`` of a narrow network's outputs, relative to the largest output of each.

    Computed in ``precision``: float64, or the network's own where it does not run in that. Then
    ``tolerance`` is what rounding does to the wide network, many times over.
    """

    error: float
    precision: str
    tolerance: float

    def __str__(self) -> str:
        return f"{self.error:.1e} in {self.precision}, where {self.tolerance:.0e} is allowed"


@dataclass(frozen=True, repr=False)
class Plan:
    """What one cut keeps: of each group by name, of each layer; the costs before and after.

    ``groups`` are indices into each group's channels, ``layers`` into each layer's. ``blocked``
    says which channels could not be cut and why, ``method`` what ranked and compensated. ``sizes``
    are the inputs and outputs that each convolution or linear layer had, ``example`` what the
    network takes, without values, ``proof`` says how exact the cut is. ``print`` shows a table.
    """

    policy: str
    width: float
    groups: Mapping[str, Kept]
    layers: Layers = field(default_factory=dict)
    before: Cost | None = None
    after: Cost | None = None
    blocked: tuple[BlockedChannels, ...] = ()
    sizes: Mapping[str, Sizes] = field(default_factory=dict)
    method: str = ""
    example: Any = None
    proof: Proof | None = None

    def __repr__(self) -> str:
        costs = ""
        if self.before and self.after:
            costs = f": {self.before.params:,} -> {self.after.params:,} params"
            costs += f", {self.before.macs:,} -> {self.after.macs:,} MACs"
        by = f", {self.method}" if self.method else ""
        return f"<Plan: policy {self.policy}{by}{costs}>"

    def __str__(self) -> str:
        return plan_text(repr(self), self.sizes, self.layers, self.before, self.after, self.blocked)


def keep_of(graph: ChannelGraph, groups: Mapping[str, Kept]) -> Ids:
    """The channels (count,) bool that stay where of each group its indices ``groups`` do."""
    keep = keep_all(graph)
    for group in graph.groups:
        keep[group.channels] = False
        keep[group.channels[list(groups[group.name])]] = True
    return keep


def keep_all(graph: ChannelGraph) -> Ids:
    """All channels of a graph as ``keep`` (count,) bool; number 0, of those never cut, is true."""
    return np.ones(graph.count, bool)


def layers_of(graph: ChannelGraph, keep: Ids) -> Layers:
    """Where the channels of ``keep`` (count,) bool stand, layer by layer; whole layers left out."""
    layers: dict[str, dict[str, Any]] = {}
    found: dict[tuple[int, int], Kept | None] = {}  # by array, of which slots share some
    for position in graph.slots:
        kept = _staying(keep, position.ids, 1, found)
        if kept is None:
            continue
        sides = layers.setdefault(position.layer, {})
        if position.side == "through":
            sides["out"] = kept
            if position.times:
                sides["in_"] = _staying(keep, position.ids, position.times, found)
        else:
            sides[SIDES[position.side]] = kept
    return {layer: LayerChannels(**sides) for layer, sides in layers.items()}


def groups_of(graph: ChannelGraph, keep: Ids) -> dict[str, Kept]:
    """Which of each group's channels stay."""
    return {group.name: _indices(keep[group.channels]) for group in graph.groups}


def sizes_of(graph: ChannelGraph) -> dict[str, Sizes]:
    """Inputs and outputs of every layer that sums over channels or picks some, in order."""
    sizes: dict[str, Sizes] = {}
    for position in graph.slots:
        number = len(position.ids)
        inputs, outputs = sizes.get(position.layer, (None, None))
        if position.side in ("in", "select"):
            sizes[position.layer] = number, outputs
        elif position.side == "out":
            sizes[position.layer] = inputs, number
        elif position.times:  # depthwise; a BatchNorm is as wide as what it follows
            sizes[position.layer] = number // position.times, number
    return sizes


def _staying(
    keep: Ids, ids: Ids, times: int, found: dict[tuple[int, int], Kept | None]
) -> Kept | None:
    """Which of ``ids`` stay, each ``times`` in a row; None if all do. ``found`` is filled in."""
    if (id(ids), times) not in found:
        stays = keep[ids[::times]]
        found[id(ids), times] = None if stays.all() else _indices(stays)
    return found[id(ids), times]


def _indices(stays: Ids) -> Kept:
    return tuple(np.flatnonzero(stays).tolist())
