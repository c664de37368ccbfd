"""Channel groups: which slots of which layers must be cut together."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from job.slimming.graph.layers import LAYER_TYPES, modules_of
from job.slimming.graph.propagation import follow
from job.slimming.graph.selection import batchnorms
from job.slimming.graph.snapshot import preserve_state
from job.slimming.graph.trace import same_ops, trace_with_snapshot
from job.slimming.graph.trace_summary import NOTHING_TRACED, TraceSummary, summarise_trace
from job.slimming.graph.union import FIXED, ChannelSlot, Flow, Ids

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    from job.slimming.graph.trace import Trace
    from job.slimming.graph.union import LayerCall
    from job.slimming.inputs import Example


DOUBT = "an op that is not understood"


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that one or several layers write, each cut from all of them together.

    ``channels`` (C,) are their numbers in the graph. ``norms`` are the BatchNorms that rank them.
    With ``blocks`` (B, C / B), of a grouped convolution or a chunk, as many channels of each row
    stay.
    """

    name: str
    channels: Ids
    layers: tuple[str, ...]
    norms: tuple[str, ...]
    slots: tuple[tuple[str, str], ...]
    blocks: Ids | None = None

    @property
    def size(self) -> int:
        """How many channels there are."""
        return len(self.channels)


@dataclass(frozen=True)
class BlockedChannels:
    """Output channels of ``layer`` that are not cut, and why."""

    layer: str
    channels: int
    reason: str


@dataclass(frozen=True)
class ChannelGraph:
    """All groups of a network, in the order of the data flow, and what cannot be cut.

    Channels are numbered from 1 to ``count`` - 1; the ``ids`` of ``slots`` are these numbers,
    0 where a channel is never cut.
    """

    groups: tuple[ChannelGroup, ...]
    blocked: tuple[BlockedChannels, ...]
    slots: tuple[ChannelSlot, ...]
    count: int
    calls: tuple[LayerCall, ...]
    suspects: tuple[tuple[str, str], ...] = ()  # groups moved by fixed numbers, maybe; by what
    auxiliary: bool = False  # there are layers that only run in train mode
    forward: TraceSummary = NOTHING_TRACED
    odd: bool = False  # what is done is not all understood, or another thing in train mode

    def without(self, names: Iterable[str], reason: str) -> ChannelGraph:
        """The graph with the groups ``names`` left alone."""
        gone = [group for group in self.groups if group.name in set(names)]
        if not gone:
            return self
        numbers = np.arange(self.count)
        numbers[np.concatenate([group.channels for group in gone])] = FIXED
        blocked = tuple(
            BlockedChannels(p.layer, int(np.isin(p.ids, group.channels).sum()), reason)
            for group in gone
            for p in self.slots
            if p.layer in group.layers and p.side in ("out", "select")
        )
        return replace(
            self,
            groups=tuple(group for group in self.groups if group not in gone),
            blocked=self.blocked + blocked,
            slots=_numbered(self.slots, numbers),
            suspects=tuple(s for s in self.suspects if s[0] not in {g.name for g in gone}),
        )


def channel_graph(network: nn.Module, example: Example, ignore: Iterable[str] = ()) -> ChannelGraph:
    """The channel groups of ``network`` on inputs like ``example``.

    Neither inputs nor outputs of the layers in ``ignore``, by their names or those of the modules
    that they are in, are cut. Raises whatever the network's forward pass raises.
    """
    with preserve_state(network, values=False) as snapshot:
        traces = [trace_with_snapshot(network, example, snapshot, training=False)]
        with suppress(Exception):  # as for pictures too small for an auxiliary head
            traces.append(trace_with_snapshot(network, example, snapshot, training=True))
    unseen = _unseen(network, traces[0])
    auxiliary = bool(unseen) and len(traces) == 1
    if len(traces) > 1:
        auxiliary = bool(unseen) and bool(unseen - _unseen(network, traces[1]))
        if not auxiliary and same_ops(*traces):
            traces.pop()
    flow = follow(network, traces)
    if auxiliary and len(traces) == 1:
        reason = f"{min(unseen)} reads some of them in train mode, which fails"
        flow.fix(np.arange(flow.count), reason)
    odd = len(traces) > 1
    flow.doubtful |= snapshot.custom or (odd and not unseen)
    graph = replace(
        _graph(network, flow),
        auxiliary=auxiliary,
        odd=odd or flow.doubtful,
        forward=summarise_trace(traces[0]),
    )
    prefixes = tuple(ignore)
    asked = [
        group.name
        for group in graph.groups
        if any(_within(layer, prefixes) for layer, _ in group.slots)
    ]
    return graph.without(asked, "asked to be ignored")


def _within(layer: str, names: tuple[str, ...]) -> bool:
    return any(layer == name or layer.startswith(f"{name}.") for name in names)


def _unseen(network: nn.Module, trace: Trace) -> set[str]:
    """Layers that the pass did not use."""
    used = {id(tensor) for op in trace.ops for tensor in op.inputs()}
    names = {name for key, name in trace.names.items() if key in used}
    return {
        name
        for name, layer in modules_of(network, once=True).items()
        if isinstance(layer, LAYER_TYPES)
        and not any(f"{name}.{own}" in names for own in ("weight", "running_mean"))
    }


def _graph(network: nn.Module, flow: Flow) -> ChannelGraph:
    classes = flow.classes()
    blocks = _blocks(flow, classes)
    fixed = _fixed(flow, classes)
    written = np.zeros(flow.count, bool)
    written[classes[1:]] = True  # all elements but FIXED are born somewhere
    free = np.flatnonzero(written & ~fixed)
    numbers = np.zeros(flow.count, np.int64)
    numbers[free] = np.arange(1, len(free) + 1)
    numbers = numbers[classes]
    slots = _numbered(flow.slots, numbers)
    blocks = [numbers[block] for block in blocks if numbers[block].any()]
    count = len(free) + 1
    found = _groups(network, flow, numbers, slots, blocks, count)
    groups = tuple(group for group, _ in found)
    names = np.zeros(count, object)
    for group in groups:
        names[group.channels] = group.name
    # what is not understood may have taken the number of any channels
    suspects = dict.fromkeys((g.name, DOUBT) for g in groups if flow.doubtful)
    suspects |= dict.fromkeys(
        (str(name), what)
        for what, ids in flow.suspects
        for name in np.unique(names[numbers[ids][numbers[ids] != FIXED]].astype(str))
    )
    graph = ChannelGraph(
        groups, _blocked(flow, classes), slots, count, tuple(flow.calls), tuple(suspects)
    )
    unbalanced = [group.name for group, balanced in found if not balanced]
    graph = graph.without(unbalanced, "only some of them must stay equally many in each part")
    single = [group.name for group in groups if group.size == 1]
    return graph.without(single, "all of its channels are tied together")


def _numbered(slots: Iterable[ChannelSlot], numbers: Ids) -> tuple[ChannelSlot, ...]:
    """Positions with ``numbers`` of their ids, equal ones one array; none that are all FIXED."""
    found: dict[int, Ids] = {}
    arrays: dict[bytes, Ids] = {}
    renumbered = []
    for p in slots:
        if id(p.ids) not in found:
            ids = numbers[p.ids]
            found[id(p.ids)] = arrays.setdefault(ids.tobytes(), ids)
        renumbered.append(ChannelSlot(p.layer, p.side, found[id(p.ids)], p.times))
    some = {id(ids) for ids in arrays.values() if ids.any()}
    return tuple(p for p in renumbered if id(p.ids) in some)


def _fixed(flow: Flow, classes: Ids) -> Ids:
    """(count,) bool: the classes of elements that are never cut."""
    fixed = np.zeros(flow.count, bool)
    for ids in (np.array([FIXED]), *(ids for _, ids in flow.reasons)):
        fixed[classes[ids]] = True
    return fixed


def _blocks(flow: Flow, classes: Ids) -> list[Ids]:
    """Which rows must keep as many channels as each other; what is too entangled is fixed."""
    kept: list[Ids] = []
    for block in flow.blocks:
        rows = classes[block]
        ordered = np.sort(rows, axis=1)
        if (ordered == ordered[0]).all():
            continue  # whatever goes, goes from each row
        known = [other for other in kept if np.isin(rows, other).any()]
        if any(np.array_equal(ordered, np.sort(other, axis=1)) for other in known):
            continue
        flat = rows.reshape(-1)
        if known or len(np.unique(flat)) < len(flat):
            flow.fix(block.reshape(-1), "parts that must stay equally large overlap")
            for other in known:
                flow.fix(other.reshape(-1), "parts that must stay equally large overlap")
        elif (rows == classes[FIXED]).any():
            flow.fix(block.reshape(-1), "parts that must stay equally large have fixed channels")
        else:
            kept.append(rows)
    fixed = _fixed(flow, classes)
    for rows in kept:  # one that is fixed for another reason would unbalance them
        if fixed[rows].any():
            flow.fix(rows.reshape(-1), "parts that must stay equally large have fixed channels")
    return kept


def _groups(
    network: nn.Module,
    flow: Flow,
    numbers: Ids,
    slots: Sequence[ChannelSlot],
    blocks: Sequence[Ids],
    count: int,
) -> list[tuple[ChannelGroup, bool]]:
    """Channels that stand in one layer's outputs, or in one block, make one group.

    With each, whether its blocks, if it has any, are a single one of all its channels.
    """
    ties = Flow(count=count)
    born = [(layer, numbers[ids]) for layer, ids in flow.births]
    written = [(layer, ids[ids != FIXED]) for layer, ids in born]
    for ids in [ids for _, ids in written if len(ids)] + [block.reshape(-1) for block in blocks]:
        ties.tie(np.full(len(ids), ids[0]), ids)
    members = ties.classes()
    writers, within = defaultdict(list), defaultdict(list)
    for layer, ids in written:
        if len(ids):
            writers[members[ids[0]]].append(layer)
    arrays = {id(p.ids): p.ids for p in slots}  # some share one
    firsts = {key: _distinct(members[ids]) for key, ids in arrays.items()}
    for position in slots:
        for first in firsts[id(position.ids)]:
            within[first].append(position)
    rank = {name for name, norm in batchnorms(network).items() if norm.weight is not None}
    order = np.argsort(members, kind="stable")
    ends = np.searchsorted(members[order], np.arange(count + 1))
    groups = []
    for first in sorted(writers):
        channels, layers = order[ends[first] : ends[first + 1]], tuple(writers[first])
        own = within[first]
        norms = tuple(p.layer for p in own if p.side in ("through", "select") and p.layer in rank)
        rows = [block for block in blocks if members[block[0, 0]] == first]
        places = tuple((p.layer, p.side) for p in own)
        found = ChannelGroup(layers[0], channels, layers, norms, places, rows[0] if rows else None)
        balanced = not rows or (len(rows) == 1 and rows[0].size == len(channels))
        groups.append((found, balanced))
    return groups


def _distinct(numbers: Ids) -> set[int]:
    """The numbers among these, of which most are the same."""
    first = int(numbers[0])
    return {first, *numbers[numbers != first].tolist()}


def _blocked(flow: Flow, classes: Ids) -> tuple[BlockedChannels, ...]:
    """Layers whose output channels are fixed, with the first reason found."""
    names = dict.fromkeys(reason for reason, _ in flow.reasons)
    names["added to channels that are always there"] = None
    why = np.zeros(flow.count, np.int64)  # of a class of elements: number of its first reason
    why[classes[FIXED]] = len(names)
    order = {reason: number for number, reason in enumerate(names, 1)}
    for reason, ids in reversed(flow.reasons):
        why[classes[ids]] = order[reason]
    found = []
    of = why[classes]
    for layer, ids in flow.births:
        own = of[ids[0] : ids[-1] + 1]
        if not own.any():
            continue
        numbers = np.bincount(own, minlength=len(names) + 1)
        found += [
            BlockedChannels(layer, int(numbers[number]), reason)
            for reason, number in order.items()
            if numbers[number]
        ]
    return tuple(found)
