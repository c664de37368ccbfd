"""Channel groups of a network: channels of layers that must be cut together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from job.slimming.graph.reasons import explain
from job.slimming.graph.trace_summary import NOTHING_TRACED, TraceSummary
from job.slimming.graph.union import FIXED, ChannelSlot

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from job.slimming.graph.reasons import Reason
    from job.slimming.graph.union import AttributeSize, ChannelRead, Ids, LayerCall, ScaledRows


@dataclass(frozen=True)
class ChannelGroup:
    """Channel group: channels of one or several layers, each cut from all of them together.

    ``channels`` (C,) are their numbers in the graph, ``layers`` the layers that produce them, and
    ``norms`` the BatchNorms that rank them. ``slots`` are pairs of a layer and a side. The same
    number of channels is kept in each row of ``blocks`` (B, C / B), which come from grouped
    convolutions and chunks.
    """

    name: str
    channels: Ids
    layers: tuple[str, ...]
    norms: tuple[str, ...]
    slots: tuple[tuple[str, str], ...]
    blocks: Ids | None = None

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.channels)


@dataclass(frozen=True)
class BlockedChannels:
    """Output channels of ``layer`` that are not cut, the reason, and the line of code, if known.

    ``remedy`` is the change of the code that would free them; empty where there is none.
    """

    layer: str
    channels: int
    reason: str
    place: str
    remedy: str = field(repr=False)

    @classmethod
    def by(cls, layer: str, channels: int, reason: Reason, place: str = "") -> BlockedChannels:
        """Return channels that are not cut for a ``reason`` of the table of reasons."""
        return cls(layer, channels, reason.text, place, reason.remedy)

    @property
    def explanation(self) -> str:
        """The reason, the line of code, and the change that would free them."""
        return explain(self.reason, self.place, self.remedy)


@dataclass(frozen=True)
class ChannelGraph:
    """Channel groups of a network, in the order of the data flow, and channels that are not cut.

    Channels are numbered from 1 to ``count`` - 1. The ``ids`` of ``slots`` are these numbers, or 0
    for channels that are never cut; slots with equal ``ids`` share one array. ``suspects`` are
    groups that may be misinterpreted, with the reason if they are and its line of code.
    ``auxiliary`` tells that some layers run only in train mode, ``odd`` that some op is not
    supported or that train mode runs other ops. ``forward`` summarises a forward pass in eval mode.
    ``reads`` are ops that compute over channels without a weight, ``sizes`` attributes that count
    channels. ``scaled`` are the weights that make up for the scale of attention, ``computed`` the
    layers that compute their weight in each forward pass.
    """

    groups: tuple[ChannelGroup, ...]
    blocked: tuple[BlockedChannels, ...]
    slots: tuple[ChannelSlot, ...]
    count: int
    calls: tuple[LayerCall, ...]
    suspects: tuple[tuple[str, Reason, str], ...] = ()
    auxiliary: bool = False
    odd: bool = False
    forward: TraceSummary = NOTHING_TRACED
    reads: tuple[ChannelRead, ...] = ()
    sizes: tuple[AttributeSize, ...] = ()
    scaled: tuple[ScaledRows, ...] = ()
    computed: frozenset[str] = frozenset()

    @property
    def channel_count(self) -> int:
        """The number of channels of all groups."""
        return sum(group.size for group in self.groups)

    def without(self, names: Iterable[str], reason: Reason, place: str = "") -> ChannelGraph:
        """Return the graph with the groups ``names`` blocked for ``reason``, at a line of code."""
        removed_names = set(names)
        removed = [group for group in self.groups if group.name in removed_names]
        if not removed:
            return self
        numbers = np.arange(self.count)
        numbers[np.concatenate([group.channels for group in removed])] = FIXED
        blocked = tuple(
            BlockedChannels.by(
                slot.layer, int(np.isin(slot.ids, group.channels).sum()), reason, place
            )
            for group in removed
            for slot in self.slots
            if slot.layer in group.layers and slot.side in ("out", "select")
        )
        return replace(
            self,
            groups=tuple(group for group in self.groups if group.name not in removed_names),
            blocked=self.blocked + blocked,
            slots=renumber_slots(self.slots, numbers),
            suspects=tuple(s for s in self.suspects if s[0] not in removed_names),
            reads=renumber_reads(self.reads, numbers),
            sizes=tuple(replace(size, ids=numbers[size.ids]) for size in self.sizes),
            scaled=tuple(replace(rows, ids=numbers[rows.ids]) for rows in self.scaled),
        )


def renumber_reads(reads: Sequence[ChannelRead], numbers: Ids) -> tuple[ChannelRead, ...]:
    """Replace the ids of ``reads`` by ``numbers``; reads without a channel to cut are left out."""
    renumbered = (
        replace(read, operands=tuple(replace(o, ids=numbers[o.ids]) for o in read.operands))
        for read in reads
    )
    return tuple(r for r in renumbered if any(o.ids.any() for o in r.operands))


def renumber_slots(slots: Sequence[ChannelSlot], numbers: Ids) -> tuple[ChannelSlot, ...]:
    """Replace the ids of ``slots`` by ``numbers``; slots without a channel to cut are left out.

    Slots with equal ids share one array. Most of the hundreds of slots of a large network do, and
    analysis and planning process each array once (0.1 s of the analysis of DenseNet-121).
    """
    by_array: dict[int, Ids] = {}
    by_content: dict[bytes, Ids] = {}
    renumbered = []
    for slot in slots:
        if id(slot.ids) not in by_array:
            ids = numbers[slot.ids]
            by_array[id(slot.ids)] = by_content.setdefault(ids.tobytes(), ids)
        renumbered.append(replace(slot, ids=by_array[id(slot.ids)]))
    cuttable = {id(ids) for ids in by_content.values() if ids.any()}
    return tuple(slot for slot in renumbered if id(slot.ids) in cuttable)
