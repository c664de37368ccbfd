"""A plan: which channels of which layers stay. Made on the main process, applied on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from job.errors import DataError, UsageError
from job.slimming.graph import channel_graph
from job.slimming.importance import gamma_importance, strongest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from job.slimming.graph import ChannelGraph


@dataclass(frozen=True)
class LayerChannels:
    """Indices that stay on a layer's two sides; None: all of them.

    For layers that pass channels one by one (BatchNorm, depthwise) both sides are the same.
    """

    out: tuple[int, ...] | None = None
    in_: tuple[int, ...] | None = None

    def after(self, later: LayerChannels) -> LayerChannels:
        """The indices, into what this one started from, that stay when ``later`` is cut too."""
        return LayerChannels(_chain(self.out, later.out), _chain(self.in_, later.in_))

    def to_dict(self) -> dict[str, list[int]]:
        """As stored in model.json."""
        sides = {"out": self.out, "in": self.in_}
        return {side: list(kept) for side, kept in sides.items() if kept is not None}

    @classmethod
    def from_dict(cls, values: Any) -> LayerChannels:
        """Read back what ``to_dict`` gave; raises DataError."""
        sides: list[Any] = [0]
        if isinstance(values, dict):
            sides = [values.get("out"), values.get("in")]
        for kept in sides:
            if kept is not None and not (
                isinstance(kept, list)
                and kept
                and all(type(i) is int and 0 <= i < 2**31 for i in kept)
                and all(before < i for before, i in pairwise(kept))
            ):
                raise DataError("a layer's kept channels are not lists of rising indices")
        return cls(*(None if kept is None else tuple(kept) for kept in sides))


Layers = dict[str, LayerChannels]


@dataclass(frozen=True)
class Plan:
    """What one cut keeps: ``groups`` by name and the ``layers`` they stand in."""

    policy: str
    width: float
    groups: Mapping[str, tuple[int, ...]]
    layers: Layers = field(default_factory=dict)


def uniform_plan(network: nn.Module, width: float) -> Plan:
    """Keep the same fraction of every group: ``int(nominal * width)`` strongest by γ.

    ``width`` is relative to the network at width 1, not to ``network``: the homework's rule. Raises
    UsageError when a group would be left empty or would have to grow.
    """
    graph = channel_graph(network)
    groups = {}
    for group in graph.groups:
        count = int(group.nominal * width)
        if count < 1:
            least = 1 / min(g.nominal for g in graph.groups)
            raise UsageError(
                f"width {width:g} leaves no channel of {group.name}: the least is {least:g}"
            )
        if count > group.size:
            now = max(g.size / g.nominal for g in graph.groups)
            raise UsageError(f"width {width:g} is not below the network's own, about {now:.4g}")
        groups[group.name] = strongest(gamma_importance(network, group), count)
    return Plan("uniform", width, groups, layers_of(graph, groups))


def layers_of(graph: ChannelGraph, groups: Mapping[str, tuple[int, ...]]) -> Layers:
    """Where the kept channels of each group stand, layer by layer."""
    layers: Layers = {}
    for group in graph.groups:
        kept = groups[group.name]
        for position in group.positions:
            had = layers.get(position.layer, LayerChannels())
            layers[position.layer] = LayerChannels(
                had.out if position.side == "in" else kept,
                had.in_ if position.side == "out" else kept,
            )
    return layers


def compose(first: Layers, then: Layers) -> Layers:
    """The layers of two cuts, one after the other, as one cut of what the first started from."""
    whole = LayerChannels()
    return {
        name: first.get(name, whole).after(then.get(name, whole))
        for name in dict.fromkeys([*first, *then])
    }


def _chain(first: tuple[int, ...] | None, then: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if first is None or then is None:
        return then if first is None else first
    return tuple(first[i] for i in then)
