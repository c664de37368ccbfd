"""Allocation by loss: the steps that lose least for what they save are taken first."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from job.slimming.planning.search import check_reachable

if TYPE_CHECKING:
    from job.slimming.planning.planner import Planner
    from job.slimming.planning.target import Budget

CHUNKS = 32  # steps from a whole group to none, at least


class _Step(NamedTuple):
    """A step of one group to fewer units, by rising loss for each unit of cost that it saves."""

    rate: float
    group: int
    units: int


def counts_by_loss(planner: Planner, budget: Budget, limit: float) -> list[int]:
    """Return the numbers of units that meet ``limit`` at the least sum of the groups' losses.

    The cost of a step is what it saves when it is taken, with the other groups as they are then.
    Raises UsageError where the limit is out of reach.
    """
    search = _Search(planner, budget.metric)
    check_reachable(planner, budget, limit, search.floors)
    search.cut(limit)
    search.restore(limit)
    return search.counts


class _Search:
    def __init__(self, planner: Planner, metric: str) -> None:
        self.planner, self.metric = planner, metric
        self.losses = [planner.losses_of(r) for r in planner.groups]
        self.allowed = [_allowed_counts(r.floor, r.step, len(r.units)) for r in planner.groups]
        self.floors = [int(allowed[0]) for allowed in self.allowed]
        self.counts = [len(r.units) for r in planner.groups]
        self.cost = planner.metric(metric, self.counts)

    def cut(self, limit: float) -> None:
        """Take the cheapest steps until the cost is within ``limit``.

        The saving of a step only shrinks while other groups are cut: the rate of the first step in
        the queue is computed again, and it is taken if it is still the lowest.
        """
        queue = [step for step in map(self._next_step, range(len(self.counts))) if step]
        heapq.heapify(queue)
        while self.cost > limit and queue:
            step = self._next_step(heapq.heappop(queue).group)
            if step is None:
                continue
            if queue and step.rate > queue[0].rate * (1 + 1e-9):
                heapq.heappush(queue, step)
                continue
            self.counts[step.group] = step.units
            self.cost = self.planner.metric(self.metric, self.counts)
            following = self._next_step(step.group)
            if following:
                heapq.heappush(queue, following)

    def restore(self, limit: float) -> None:
        """Restore units that fit into ``limit``: those that lose most first."""
        queue = [step for step in map(self._next_restored, range(len(self.counts))) if step]
        heapq.heapify(queue)
        while queue:
            step = heapq.heappop(queue)
            if self._cost_with(step.group, step.units) > limit:
                continue  # the remaining budget only shrinks
            self.counts[step.group] = step.units
            following = self._next_restored(step.group)
            if following:
                heapq.heappush(queue, following)

    def _next_step(self, group: int) -> _Step | None:
        """The step of ``group`` along the lower convex hull of its losses, at most one chunk."""
        count, losses, allowed = self.counts[group], self.losses[group], self.allowed[group]
        fewer = allowed[allowed < count]
        if not len(fewer):
            return None
        slopes = (losses[fewer] - losses[count]) / (count - fewer)
        lowest = float(slopes.min())
        corner = int(fewer[np.flatnonzero(slopes <= lowest)[-1]])  # the nearest of equals
        chunk = max(1, len(losses) // CHUNKS)
        near = fewer[fewer >= max(corner, count - chunk)]
        target = int(near[0]) if len(near) else int(fewer[-1])
        saved = self.cost - self._cost_with(group, target)
        lost = lowest * (count - target)
        return _Step(lost / saved if saved > 0 else np.inf, group, target)

    def _next_restored(self, group: int) -> _Step | None:
        count, losses, allowed = self.counts[group], self.losses[group], self.allowed[group]
        more = allowed[allowed > count]
        if not len(more):
            return None
        return _Step(-float(losses[count] - losses[more[0]]), group, int(more[0]))

    def _cost_with(self, group: int, count: int) -> int:
        counts = [*self.counts[:group], count, *self.counts[group + 1 :]]
        return self.planner.metric(self.metric, counts)


def _allowed_counts(
    floor: int, step: int, units: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The rising numbers of units that a group may keep: multiples of ``step``, or all."""
    first = -(-floor // step) * step
    return np.unique(np.minimum(np.arange(first, units + step, step), units))
