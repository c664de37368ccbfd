"""Channel groups of a network: which channels of which layers must be cut together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from job.slimming.graph.trace_summary import NOTHING_TRACED, TraceSummary
from job.slimming.graph.union import FIXED, ChannelSlot

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from job.slimming.graph.union import Ids, LayerCall


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that one or several layers produce, each cut from all of these layers together.

    ``channels`` (C,) are their numbers in the graph. ``norms`` are the BatchNorms that rank them.
    ``slots`` are pairs of a layer and a side. Of each row of ``blocks`` (B, C / B), which come from
    grouped convolutions and chunks, equally many channels stay.
    """

    name: str
    channels: Ids
    layers: tuple[str, ...]
    norms: tuple[str, ...]
    slots: tuple[tuple[str, str], ...]
    blocks: Ids | None = None

    @property
    def size(self) -> int:
        """The number of channels."""
        return len(self.channels)


@dataclass(frozen=True)
class BlockedChannels:
    """Output channels of ``layer`` that are not cut, and the reason."""

    layer: str
    channels: int
    reason: str


@dataclass(frozen=True)
class ChannelGraph:
    """All channel groups of a network, in the order of the data flow, and what cannot be cut.

    Channels are numbers from 1 to ``count`` - 1. The ``ids`` of ``slots`` are these numbers, and 0
    for channels that are never cut; slots with equal ``ids`` share one array. ``suspects`` are
    groups that may be misunderstood, with what moves them. ``auxiliary`` says that some layers run
    in train mode only, ``odd`` that some op is not understood or that train mode does something
    else. ``forward`` holds facts of a forward pass in eval mode.
    """

    groups: tuple[ChannelGroup, ...]
    blocked: tuple[BlockedChannels, ...]
    slots: tuple[ChannelSlot, ...]
    count: int
    calls: tuple[LayerCall, ...]
    suspects: tuple[tuple[str, str], ...] = ()
    auxiliary: bool = False
    odd: bool = False
    forward: TraceSummary = NOTHING_TRACED

    def without(self, names: Iterable[str], reason: str) -> ChannelGraph:
        """The graph with the groups ``names`` blocked for ``reason``."""
        removed_names = set(names)
        removed = [group for group in self.groups if group.name in removed_names]
        if not removed:
            return self
        numbers = np.arange(self.count)
        numbers[np.concatenate([group.channels for group in removed])] = FIXED
        blocked = tuple(
            BlockedChannels(slot.layer, int(np.isin(slot.ids, group.channels).sum()), reason)
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
        )


def renumber_slots(slots: Sequence[ChannelSlot], numbers: Ids) -> tuple[ChannelSlot, ...]:
    """Slots with ``numbers`` of their ids; those with no channel to cut are left out.

    Equal ids become one array: of the hundreds of slots of a large network most share one, and
    analysis and planning look at each array once (0.1 s of DenseNet-121's analysis).
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
