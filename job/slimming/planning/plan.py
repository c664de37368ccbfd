"""Plan: which channels of each layer a cut keeps.

The main process makes the plan, and all processes apply it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from job.errors import UsageError
from job.slimming.planning.layer_channels import (
    SIDES,
    AttributeSizes,
    Kept,
    LayerChannels,
    Layers,
    compose,
)
from job.slimming.planning.overview import plan_text
from job.slimming.planning.plan_file import read_plan, write_plan

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from job.slimming.graph.groups import BlockedChannels, ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.planning.cost import Cost
    from job.slimming.planning.measurements import PlannedLatency, Proof
    from job.slimming.planning.overview import Sizes


@dataclass(frozen=True, repr=False)
class Plan:
    """Plan of a cut: the channels to keep, and the costs; ``print(plan)`` shows a table.

    Attributes:
        policy: name of the policy that distributes the cut over the channel groups
        width: number of kept channels relative to the base
        groups: indices of the kept channels of each channel group
        layers: indices of the kept channels on the sides of each layer that is cut
        before, after: costs of the network before and after the cut
        blocked: channels that cannot be cut, and why
        sizes: inputs and outputs of each convolution or linear layer before the cut
        method: importance and compensation
        example: a batch of inputs without values
        proof: exactness of the cut before compensation
        latency: measured latency, for a target of latency
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
    latency: PlannedLatency | None = None

    def __repr__(self) -> str:
        costs = ""
        if self.before and self.after:
            costs = f": {self.before.params:,} -> {self.after.params:,} params"
            costs += f", {self.before.macs:,} -> {self.after.macs:,} MACs"
        by = f", {self.method}" if self.method else ""
        return f"<Plan: policy {self.policy}{by}{costs}>"

    def __str__(self) -> str:
        return plan_text(repr(self), self.sizes, self.layers, self.before, self.after, self.blocked)

    def save(self, path: str | Path) -> None:
        """Write the plan to a new file ``path``, as JSON.

        Raises OutputError if ``path`` already exists, StorageError if it cannot be written.
        """
        write_plan(path, vars(self))

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that ``save`` wrote; raises InputNotFound, or DataError for other files."""
        return Plan(**read_plan(path))

    def then(self, later: Plan) -> Plan:
        """Return one plan for this cut and a ``later`` one of the resulting network.

        The result applies to the network before this cut, and has no proof until ``apply`` proves
        it. Raises UsageError if ``later`` is a plan of another network.
        """
        if why := mismatch(self, later):
            raise UsageError(f"later is not a plan of the network that this plan makes: {why}")
        groups = dict(self.groups)
        for name, kept in later.groups.items():
            groups[name] = tuple(groups[name][i] for i in kept) if name in groups else kept
        methods = dict.fromkeys(filter(None, (self.method, later.method)))
        return replace(
            later,
            policy=self.policy if self.policy == later.policy else f"{self.policy}, {later.policy}",
            width=self.width * later.width,
            groups=groups,
            layers=compose(self.layers, later.layers),
            before=self.before,
            sizes={**later.sizes, **self.sizes},
            method=", then ".join(methods),
            proof=None,
            latency=None,
        )


def mismatch(first: Plan, later: Plan) -> str | None:
    """Return why ``later`` is not a plan of the network that ``first`` makes; None if it is."""
    for name, sizes in later.sizes.items():
        channels, before = first.layers.get(name, LayerChannels()), first.sizes.get(name)
        inputs = channels.in_ if channels.select is None else channels.select
        for what, kept, size, old in zip(
            ("inputs", "outputs"), (inputs, channels.out), sizes, before or sizes, strict=True
        ):
            remaining = old if kept is None else len(kept)
            if None not in (size, remaining) and size != remaining:
                return f"{name} has {remaining} {what} and not {size}"
    for name, kept in later.groups.items():
        if kept and name in first.groups and kept[-1] >= len(first.groups[name]):
            return f"the channel group {name} has {len(first.groups[name])} channels"
    return None


def keep_of(graph: ChannelGraph, groups: Mapping[str, Kept]) -> Ids:
    """Return the mask (count,) of kept channels, given their indices in ``groups``, by name.

    A group that is not in ``groups`` keeps all of its channels.
    """
    keep = keep_all(graph)
    for group in graph.groups:
        if group.name in groups:
            keep[group.channels] = False
            keep[group.channels[list(groups[group.name])]] = True
    return keep


def keep_in(graph: ChannelGraph, layers: Layers) -> Ids:
    """Return the mask (count,) of the channels that remain where ``layers`` is applied."""
    keep = keep_all(graph)
    for slot in graph.slots:
        channels = layers.get(slot.layer)
        name = SIDES.get(slot.side, "out")
        kept = None if channels is None else getattr(channels, name)
        if kept is not None:
            keep[np.delete(slot.ids, list(kept))] = False
    return keep


def keep_all(graph: ChannelGraph) -> Ids:
    """Return the mask (count,) that keeps all channels; entry 0 is for channels never cut."""
    return np.ones(graph.count, bool)


def layers_of(graph: ChannelGraph, keep: Ids) -> Layers:
    """Return the indices that each layer keeps, by name, for the channel mask ``keep`` (count,).

    Layers that keep all of their channels are left out.
    """
    layers: dict[str, dict[str, Kept]] = {}
    axes = {slot.layer: slot.axis for slot in graph.slots if slot.axis is not None}
    placed = [slot for slot in graph.slots if slot.side == "places" and slot.axis is not None]
    lines = {slot.layer: len(slot.ids) for slot in placed}
    for slot in graph.slots:
        kept = keep[slot.ids]
        if kept.all():
            continue
        sides = layers.setdefault(slot.layer, {})
        if slot.side == "through":
            sides["out"] = _indices(kept)
            if slot.times:
                sides["in_"] = _indices(kept[:: slot.times])
        else:
            sides[SIDES[slot.side]] = _indices(kept)
    plan = {
        layer: LayerChannels(
            sides.get("out"),
            sides.get("in_"),
            sides.get("select"),
            axis=axes.get(layer),
            places=sides.get("places"),
            line=lines.get(layer),
        )
        for layer, sides in layers.items()
    }
    for layer, channels in plan.items():
        if channels.is_constant and (norm := folded_norm(graph, layer)):
            plan[layer] = replace(channels, norm=norm)
    _add_scales(graph, keep, plan)
    for module, sizes in _sizes_of_modules(graph, keep).items():
        plan[module] = replace(plan.get(module, LayerChannels()), sizes=sizes)
    return plan


def _add_scales(graph: ChannelGraph, keep: Ids, plan: Layers) -> None:
    """Add to ``plan`` the outputs whose weights make up for the scale of attention."""
    for scaled in graph.scaled:
        kept = keep[scaled.ids]
        channels = plan.get(scaled.layer, LayerChannels())
        if kept.all() or not kept.any() or channels.out is None:
            continue
        rows = tuple(np.flatnonzero(np.isin(channels.out, scaled.rows)).tolist())
        ratio = int(kept.sum()), len(kept)
        plan[scaled.layer] = replace(channels, scaled=(*channels.scaled, (rows, *ratio)))


def _sizes_of_modules(graph: ChannelGraph, keep: Ids) -> dict[str, AttributeSizes]:
    """Return the attributes of modules that count channels, where some of these are removed."""
    counts: dict[tuple[str, str], dict[int | None, int]] = {}
    changed = set()
    for size in graph.sizes:
        key, kept = (size.module, size.attribute), keep[size.ids]
        counts.setdefault(key, {})[size.place] = int(kept.sum())
        if not kept.all():
            changed.add(key)
    sizes: dict[str, AttributeSizes] = {}
    for module, attribute in sorted(changed):
        by_place = counts[module, attribute]
        places = sorted(place for place in by_place if place is not None)
        value = by_place[None] if None in by_place else tuple(by_place[n] for n in places)
        sizes[module] = (*sizes.get(module, ()), (attribute, value))
    return sizes


def folded_norm(graph: ChannelGraph, layer: str) -> str | None:
    """Return the BatchNorm that is folded into ``layer`` when it has no input; None for none."""
    norms = graph.forward.norms_after.get(layer, ())
    selecting = (slot.layer for slot in graph.slots if slot.side == "select")
    return norms[0] if len(norms) == 1 and norms[0] not in selecting else None


def groups_of(graph: ChannelGraph, keep: Ids) -> dict[str, Kept]:
    """Return the indices of the kept channels of each group, by name."""
    return {group.name: _indices(keep[group.channels]) for group in graph.groups}


def sizes_of(graph: ChannelGraph) -> dict[str, Sizes]:
    """Return the inputs and outputs of every layer that sums over or selects channels, by name."""
    sizes: dict[str, Sizes] = {}
    for slot in graph.slots:
        number = len(slot.ids)
        inputs, outputs = sizes.get(slot.layer, (None, None))
        if slot.side in ("in", "select"):
            sizes[slot.layer] = number, outputs
        elif slot.side == "out":
            sizes[slot.layer] = inputs, number
        elif slot.times:  # depthwise; a BatchNorm has the size of the layer before it
            sizes[slot.layer] = number // slot.times, number
    return sizes


def _indices(mask: Ids) -> Kept:
    return tuple(np.flatnonzero(mask).tolist())
