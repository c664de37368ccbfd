"""Numbers of channels in the slots of a network, from the numbers of kept units of its groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.slimming.graph.union import Ids
    from job.slimming.planning.cost_model import CostModel
    from job.slimming.planning.ranked_groups import KeptChannels


class SlotCounts:
    """Count channels as ``CostModel.slot_counts`` does for ``KeptChannels``, without their mask.

    A search for the best counts computes thousands of costs. For each *pair* of a group and a slot
    that contains channels of it, ``table`` has the number of entries of the slot with 0, 1, …
    units kept, from ``starts`` on.
    """

    def __init__(self, costs: CostModel, kept_channels: KeptChannels) -> None:
        self.costs, self.kept_channels = costs, kept_channels
        groups, slots = len(kept_channels.groups), len(costs.lengths)
        slot_of = np.repeat(np.arange(slots), costs.lengths)
        owners, ranks = kept_channels.group_of[costs.ids], kept_channels.rank_of[costs.ids]
        ranked = owners < groups
        pairs, pair_of = np.unique(owners[ranked] * slots + slot_of[ranked], return_inverse=True)
        self.groups, self.slots = pairs // slots, pairs % slots
        units = np.array([len(r.units) for r in kept_channels.groups], np.int64)
        sizes = units[self.groups] + 1
        self.starts = np.cumsum(sizes) - sizes
        added = np.zeros(int(sizes.sum()), np.int64)
        np.add.at(added, self.starts[pair_of] + ranks[ranked] + 1, 1)
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(added)])
        self.table = before[1:] - np.repeat(before[self.starts], sizes)
        self.unranked = costs.ids[~ranked], slot_of[~ranked]
        self.removals: dict[bytes, tuple[Ids, Ids] | None] = {}

    def __call__(self, counts: Sequence[int]) -> Ids:
        """Return the number of channels of each slot, as (slots,), for ``counts`` (groups,)."""
        kept = np.array(counts, np.int64)
        removal = self._removal(kept == 0)
        if removal is None:
            return self.costs.slot_counts(self.kept_channels(counts))
        gone, others = removal
        kept[gone] = 0
        values = self.table[self.starts + kept[self.groups]]
        found: Ids = others.copy()
        np.add.at(found, self.slots, values)
        return found

    def _removal(self, empty: Ids) -> tuple[Ids, Ids] | None:
        """Return the groups that are removed with those that are ``empty`` (groups,), as a mask.

        Also returns the number of entries of each slot that are in no ranked group. None where only
        a part of a group is removed.
        """
        key = empty.tobytes()
        if key not in self.removals:
            keep = self.kept_channels([0 if each else 1 << 40 for each in empty])
            stays = [keep[r.units.reshape(-1)] for r in self.kept_channels.groups]
            gone = np.array([not channels.any() for channels in stays], bool)
            ids, slots = self.unranked
            others = np.bincount(slots[keep[ids]], minlength=len(self.costs.lengths))
            whole = all(channels.all() for channels, g in zip(stays, gone, strict=True) if not g)
            self.removals[key] = (gone, others) if whole else None
        return self.removals[key]
