"""Ranked groups: channel groups sorted by importance, and their kept channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from job.slimming.graph.data_flow import DataFlow

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from job.slimming.graph.groups import ChannelGraph, ChannelGroup
    from job.slimming.graph.union import Ids
    from job.slimming.importance.scores import Scores


@dataclass(frozen=True)
class RankedGroup:
    """Channel group whose units are sorted by falling importance.

    A unit is the smallest part to cut: one channel, or one channel of each of B blocks. ``units``
    (n, B) holds channel numbers, ``scores`` (n,) their mean importance. At least ``floor`` units
    are kept, in multiples of ``step``, or none of a ``removable`` group.
    """

    group: ChannelGroup
    units: Ids
    scores: Scores
    floor: int
    step: int
    removable: bool = False

    def allowed_count(self, count: int) -> int:
        """Return the smallest allowed number of kept units that is at least ``count``."""
        if self.removable and count <= 0:
            return 0
        count = max(count, self.floor)
        return min(-(-count // self.step) * self.step, len(self.units))


def rank_groups(
    graph: ChannelGraph,
    scores: Scores,
    *,
    floors: Mapping[str, int] | None = None,
    round_to: int = 1,
    removable: Collection[str] = (),
) -> list[RankedGroup]:
    """Sort the channels of each group by ``scores`` (count,); ties go to the lower index.

    Groups with a channel whose score is nan are left out. ``floors`` is the smallest number of
    channels that each group keeps, by name (default 1). The number of kept channels is a multiple
    of ``round_to`` if the group is large enough. The groups ``removable``, by name, may keep none.
    """
    ranked = []
    for group in graph.groups:
        rows = group.channels[None] if group.blocks is None else group.blocks
        falling = -scores[rows]
        if np.isnan(falling).any():
            continue
        order = np.argsort(falling, axis=1, kind="stable")
        blocks = len(rows)
        units = rows[np.arange(blocks)[:, None], order].T
        floor = max(1, -(-(floors or {}).get(group.name, 1) // blocks))
        step = round_to // math.gcd(round_to, blocks)
        means = scores[units].mean(1) if blocks > 1 else scores[units[:, 0]]
        floor = min(floor, len(units))
        ranked.append(RankedGroup(group, units, means, floor, step, group.name in removable))
    return ranked


class KeptChannels:
    """Turn numbers of kept units into a mask of channels (count,) bool.

    Each of ``groups`` keeps its most important units. Channels of other groups are all kept, unless
    they are removed with a group that keeps no unit.
    """

    def __init__(self, graph: ChannelGraph, groups: Sequence[RankedGroup]) -> None:
        self.flow = DataFlow(graph)
        self.groups = groups
        self.group_of = np.full(graph.count, len(groups))
        self.rank_of = np.zeros(graph.count, np.int64)
        for number, group in enumerate(groups):
            self.group_of[group.units] = number
            self.rank_of[group.units] = np.arange(len(group.units))[:, None]

    def __call__(self, counts: Sequence[int]) -> Ids:
        """Return the mask for ``counts`` (groups,) of units."""
        keep: Ids = self.rank_of < np.array([*counts, 1])[self.group_of]
        if 0 in counts:
            empty = (r.group.name for r, n in zip(self.groups, counts, strict=True) if not n)
            keep &= ~self.flow.channels_of(self.flow.closure(empty))
        return keep
