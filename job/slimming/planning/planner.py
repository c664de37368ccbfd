"""Planner: plans and exact costs for numbers of kept channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from job.slimming.planning.plan import Plan, groups_of, keep_all, layers_of, sizes_of
from job.slimming.planning.ranked_groups import KeptChannels
from job.slimming.planning.slot_counts import SlotCounts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.importance.scores import Scores
    from job.slimming.planning.cost import Cost
    from job.slimming.planning.cost_model import CostModel
    from job.slimming.planning.loss_curves import LossCurve
    from job.slimming.planning.ranked_groups import RankedGroup

UNMEASURED_LOSS = 1e6  # of removing all units of a group; far above any measured loss


class Planner:
    """Planner of cuts: plans and exact costs for counts of kept units (groups,).

    ``full_sizes`` is the number of channels of each group at width 1, by name. ``base`` is the cost
    that targets are fractions of, by default the cost of the network. ``curves`` are the loss
    curves of the groups, by name, if any. With ``exact_widths`` a uniform width must leave at least
    one channel of every group without rounding up, as in a network with a width argument.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        costs: CostModel,
        groups: Sequence[RankedGroup],
        full_sizes: Mapping[str, int],
        base: Cost | None = None,
        *,
        curves: Mapping[str, LossCurve] | None = None,
        exact_widths: bool = False,
    ) -> None:
        self.graph, self.costs, self.groups, self.full_sizes = graph, costs, groups, full_sizes
        self.curves, self.exact_widths = curves or {}, exact_widths
        self.kept_channels = KeptChannels(graph, groups)
        self.slot_counts = SlotCounts(costs, self.kept_channels)
        self.before = costs.cost(keep_all(graph))
        self.base = base or self.before

    def plan(self, counts: Sequence[int], width: float) -> Plan:
        """Return the plan that keeps ``counts`` (groups,) units, which is ``width`` of the base."""
        keep = self.kept_channels(counts)
        return Plan(
            "", width, groups_of(self.graph, keep), layers_of(self.graph, keep),
            self.before, self.costs.cost(keep), self.graph.blocked, sizes_of(self.graph),
        )  # fmt: skip

    def metric(self, metric: str, counts: Sequence[int]) -> float:
        """Return one metric of the network that keeps ``counts`` (groups,) units."""
        return self.costs.metric(metric, self.slot_counts(counts))

    def removed_with(self, ranked: RankedGroup) -> list[int]:
        """Return the numbers of the ranked groups removed with a group, itself included."""
        removed = self.kept_channels.flow.closure([ranked.group.name])
        return [n for n, other in enumerate(self.groups) if other.group.name in removed]

    def losses_of(self, ranked: RankedGroup) -> Scores:
        """Return the loss of the outputs with 0, 1, … units of a group kept, as (units + 1,).

        The losses of a group without a curve are so large that it is cut after all others.
        """
        curve = self.curves.get(ranked.group.name)
        if curve is not None:
            return curve.by_count
        units = len(ranked.units)
        return UNMEASURED_LOSS * (1 - np.arange(units + 1) / units)

    def uniform_counts(self, width: float) -> list[int]:
        """Return the counts that keep the fraction ``width`` of each group's full size."""
        return [
            r.allowed_count(
                int(self.full_sizes[r.group.name] * width * len(r.units) / r.group.size + 1e-9)
            )
            for r in self.groups
        ]

    def global_counts(self) -> Callable[[int], list[int]]:
        """Return a function from a total number of units to the counts (groups,) of the best units.

        Units of all groups are sorted by falling score. Equal scores are sorted by the relative
        rank within the group, so that the cut is distributed over the groups.
        """
        lengths = [len(r.units) for r in self.groups]
        scores = np.concatenate([np.zeros(0), *(r.scores for r in self.groups)])
        ranks = np.concatenate([np.zeros(0), *(np.arange(n) / n for n in lengths)])
        floors, steps = (np.array([getattr(r, n) for r in self.groups]) for n in ("floor", "step"))
        owners = np.repeat(np.arange(len(lengths)), lengths)[np.lexsort((ranks, -scores))]

        def counts(units: int) -> list[int]:
            kept = np.maximum(np.bincount(owners[:units], minlength=len(lengths)), floors)
            return list(np.minimum(-(-kept // steps) * steps, lengths).tolist())

        return counts
