"""Policies: how many channels of each group stay. All fill in the same kind of plan."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from job.errors import UsageError
from job.slimming.planning.plan import Plan, everything, groups_of, layers_of, sizes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from job.slimming.graph.groups import ChannelGraph, ChannelGroup
    from job.slimming.graph.union import Ids
    from job.slimming.importance.criteria import Scores
    from job.slimming.planning.cost import Cost, Costs
    from job.slimming.planning.target import Budget

T = TypeVar("T")
OUTPUT, UNRANKED = "the network's output", "no BatchNorm ranks them"
NOTHING = "no channel of this network is ranked by a BatchNorm and can be cut"


@dataclass(frozen=True)
class Ranked:
    """A group's channels in falling importance: ``units`` (n, B), cut a row at a time."""

    group: ChannelGroup
    units: Ids
    scores: Scores
    floor: int
    step: int

    def rounded(self, count: int) -> int:
        """At least ``count`` units: no less than the floor, a multiple of the step, or all."""
        count = max(count, self.floor)
        return min(-(-count // self.step) * self.step, len(self.units))


def ranked(
    graph: ChannelGraph,
    scores: Scores,
    *,
    least: Mapping[str, int] | None = None,
    round_to: int = 1,
) -> list[Ranked]:
    """The groups that ``scores`` (count,) rank, their channels sorted; ties by lower index.

    ``least`` channels of each stay, one by default; their number is a multiple of ``round_to``
    where the group is large enough.
    """
    found = []
    for group in graph.groups:
        rows = group.channels[None] if group.blocks is None else group.blocks
        falling = -scores[rows]
        if np.isnan(falling).any():
            continue
        order = np.argsort(falling, axis=1, kind="stable")
        parts = len(rows)
        units = rows[np.arange(parts)[:, None], order].T
        floor = max(1, -(-(least or {}).get(group.name, 1) // parts))
        step = round_to // math.gcd(round_to, parts)
        values = scores[units].mean(1) if parts > 1 else scores[units[:, 0]]
        found.append(Ranked(group, units, values, min(floor, len(units)), step))
    return found


class Choice:
    """Which channels (count,) bool stay, of as many units of each of ``groups`` as are called for.

    They are the first, most important ones; channels of no such group stay.
    """

    def __init__(self, graph: ChannelGraph, groups: Sequence[Ranked]) -> None:
        self.owner = np.full(graph.count, len(groups))
        self.place = np.zeros(graph.count, np.int64)
        for number, group in enumerate(groups):
            self.owner[group.units] = number
            self.place[group.units] = np.arange(len(group.units))[:, None]

    def __call__(self, counts: Sequence[int]) -> Ids:
        """For ``counts`` (groups,) of units."""
        stays: Ids = self.place < np.array([*counts, 1])[self.owner]
        return stays


class Planner:
    """Turns counts of kept units into plans with their exact costs.

    ``whole`` is the cost that targets are fractions of; by default the network's own.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        costs: Costs,
        groups: Sequence[Ranked],
        whole: Cost | None = None,
    ) -> None:
        self.graph, self.costs, self.groups = graph, costs, groups
        self.choice = Choice(graph, groups)
        self.base = costs.cost(everything(graph))
        self.whole = whole or self.base

    def plan(self, policy: str, counts: Sequence[int], width: float) -> Plan:
        """The plan, layer by layer."""
        keep = self.choice(counts)
        return Plan(
            policy, width, groups_of(self.graph, keep), layers_of(self.graph, keep),
            self.base, self.costs.cost(keep), self.graph.blocked, sizes_of(self.graph),
        )  # fmt: skip

    def counts_at(self, widths: Mapping[str, int], width: float) -> list[int]:
        """Uniform: the fraction ``width`` of each group, whose full sizes are ``widths``."""
        return [
            r.rounded(int(widths[r.group.name] * width * len(r.units) / r.group.size + 1e-9))
            for r in self.groups
        ]

    def in_order(self) -> Callable[[int], list[int]]:
        """Global: how many of each group are among the first so many of all units.

        They are sorted by falling score; equal ones by their place within their group, so that it
        is not one group that loses them all.
        """
        lengths = [len(r.units) for r in self.groups]
        scores = np.concatenate([np.zeros(0), *(r.scores for r in self.groups)])
        places = np.concatenate([np.zeros(0), *(np.arange(n) / n for n in lengths)])
        floors, steps = (np.array([getattr(r, n) for r in self.groups]) for n in ("floor", "step"))
        owners = np.repeat(np.arange(len(lengths)), lengths)[np.lexsort((places, -scores))]

        def counts(first: int) -> list[int]:
            found = np.maximum(np.bincount(owners[:first], minlength=len(lengths)), floors)
            return list(np.minimum(-(-found // steps) * steps, lengths).tolist())

        return counts


def solve(
    planner: Planner,
    budget: Budget,
    limit: float,
    steps: Sequence[T],
    counts_at: Callable[[T], list[int]],
) -> T:
    """The first of ``steps``, which cut ever more, whose counts meet ``limit``.

    Raises UsageError, with what is reachable, when none does.
    """
    if not planner.groups:
        raise UsageError(f"{budget} cannot be reached: {NOTHING}{_most_blocked(planner.graph)}")
    low, high = 0, len(steps) - 1
    least = _left(planner, budget, counts_at(steps[high]))
    if least > limit:
        raise UsageError(budget.unreachable(least, planner.whole))
    while low < high:
        middle = (low + high) // 2
        if _left(planner, budget, counts_at(steps[middle])) <= limit:
            high = middle
        else:
            low = middle + 1
    return steps[low]


def given_back(planner: Planner, counts: Sequence[int], budget: Budget, limit: float) -> list[int]:
    """Fill what a last, large step left of the budget, the most important channels first.

    What does not fit once never fits again, since there is ever less room.
    """
    counts = list(counts)
    costs = planner.costs
    standing = costs.counts(planner.choice(counts))

    def candidate(i: int) -> list[tuple[float, int]]:
        scores = planner.groups[i].scores
        return [(-float(scores[counts[i]]), i)] if counts[i] < len(scores) else []

    queue = [entry for i in range(len(counts)) for entry in candidate(i)]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        more = planner.groups[i].rounded(counts[i] + 1)
        back = planner.groups[i].units[counts[i] : more].reshape(-1)
        then = standing + costs.places(back)
        if costs.measure(budget.metric, then) <= limit:
            counts[i], standing = more, then
            for entry in candidate(i):
                heapq.heappush(queue, entry)
    return counts


def _most_blocked(graph: ChannelGraph) -> str:
    """Why most channels are not cut, but for those that never are."""
    count: Counter[str] = Counter()
    for blocked in graph.blocked:
        count[blocked.reason] += blocked.channels * (blocked.reason != OUTPUT)
    reason = next((reason for reason, channels in count.most_common(1) if channels), None)
    if reason is None:
        return ""
    hint = "; --importance l2 ranks them" if reason == UNRANKED else ""
    return f"; why most are not: {reason}{hint}"


def _left(planner: Planner, budget: Budget, counts: Sequence[int]) -> float:
    standing = planner.costs.counts(planner.choice(counts))
    return float(planner.costs.measure(budget.metric, standing))
