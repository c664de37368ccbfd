"""Allocation by loss: steps with the smallest loss per saved cost are taken first."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from job.slimming.planning.loss_curves import SMALLEST_LOSS
from job.slimming.planning.search import check_reachable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from job.slimming.planning.planner import Planner
    from job.slimming.planning.target import Budget

CHUNKS = 32  # smallest number of steps from all units of a group to none


class _Step(NamedTuple):
    """Reduction of one group to fewer units, sorted by its loss per saved cost (``rate``)."""

    rate: float
    group: int
    units: int


def counts_by_loss(planner: Planner, budget: Budget, limit: float) -> list[int]:
    """Return the counts (groups,) of units that meet ``limit`` at a small sum of losses.

    The saving of a step is computed when it is taken, with the counts of the other groups at that
    time. A removable group keeps no unit if this is the cheapest step, and if the sum of the losses
    is not larger than with some units of every group. Raises UsageError if the limit is out of
    reach.
    """
    removals = {
        number: frozenset(planner.removed_with(r))
        for number, r in enumerate(planner.groups)
        if r.removable
    }
    allowed = [removals, {}] if removals else [{}]
    searches = [_Search(planner, budget.metric, each) for each in allowed]
    check_reachable(planner, budget, limit, searches[0].floors)
    met = [search for search in searches if search.meet(limit)]
    noise = SMALLEST_LOSS * len(planner.groups)  # of equals, the one with removals
    return min(met, key=lambda search: search.loss() - noise * bool(search.removals)).counts


class _Search:
    """Search for counts of units; ``removals`` maps removable groups to all removed with them."""

    def __init__(self, planner: Planner, metric: str, removals: dict[int, frozenset[int]]) -> None:
        self.planner, self.metric, self.removals = planner, metric, removals
        self.losses = [planner.losses_of(r) for r in planner.groups]
        self.allowed = [_allowed_counts(r.floor, r.step, len(r.units)) for r in planner.groups]
        self.floors = [0 if n in removals else int(a[0]) for n, a in enumerate(self.allowed)]
        self.counts = [len(r.units) for r in planner.groups]
        self.cost = planner.metric(metric, self.counts)
        # groups that are removed together have the same loss, measured after the last of them
        self.removal_losses = {
            number: min(self.losses[n][0] for n, other in removals.items() if other == removed)
            for number, removed in removals.items()
        }

    def meet(self, limit: float) -> bool:
        """Take the cheapest steps to ``limit`` and restore what fits; return whether it is met."""
        self.cut(limit)
        self.restore(limit)
        return self.cost <= limit

    def cut(self, limit: float) -> None:
        """Take the steps with the lowest rates until the cost is within ``limit``.

        The saving of a step only shrinks when other groups are cut. Therefore the rate of the first
        step in the queue is computed again, and the step is taken if its rate is still the lowest.
        Groups that can be removed together are queued again when one of them is cut.
        """
        queue: list[_Step] = []
        latest: dict[int, _Step] = {}  # by group; earlier ones in the queue are skipped

        def push(steps: Iterable[_Step]) -> None:
            for step in steps:
                latest[step.group] = step
                heapq.heappush(queue, step)

        push(self._steps(range(len(self.counts))))
        while self.cost > limit and queue:
            first = heapq.heappop(queue)
            step = self._next_step(first.group) if latest[first.group] is first else None
            if step is None:
                continue
            if queue and step.rate > queue[0].rate * (1 + 1e-9):
                push([step])
                continue
            self._take(step)
            push(self._steps({step.group, *self.removals.get(step.group, ())}))

    def restore(self, limit: float) -> None:
        """Restore units while the cost is within ``limit``, those with the largest losses first."""
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

    def loss(self) -> float:
        """Return the sum of the losses of all groups; groups removed together count once."""
        removed = {n: self.removals[n] for n, count in enumerate(self.counts) if not count}
        largest = {
            groups: self.removal_losses[n]
            for n, groups in removed.items()
            if not any(groups < other for other in removed.values())
        }
        kept = (float(loss[n]) for loss, n in zip(self.losses, self.counts, strict=True) if n)
        return float(sum(kept) + sum(largest.values()))

    def _steps(self, groups: Iterable[int]) -> Iterable[_Step]:
        for group in sorted(groups):
            step = self._next_step(group)
            if step:
                yield step

    def _take(self, step: _Step) -> None:
        self.counts[step.group] = step.units
        if not step.units:
            for group in self.removals[step.group] & self.removals.keys():
                self.counts[group] = 0
        self.cost = self.planner.metric(self.metric, self.counts)

    def _next_step(self, group: int) -> _Step | None:
        """Return the step of ``group`` with the lowest rate; None for a removed group."""
        if not self.counts[group]:
            return None
        steps = [self._narrower(group), self._removal(group)]
        return min((step for step in steps if step), default=None)

    def _removal(self, group: int) -> _Step | None:
        """Return the step to no unit of ``group``, and of the groups removed with it."""
        removed = self.removals.get(group)
        if removed is None:
            return None
        lost = self.removal_losses[group] - sum(
            float(self.losses[n][self.counts[n]]) for n in removed if self.counts[n]
        )
        return self._step(max(0.0, lost - SMALLEST_LOSS), group, 0)

    def _narrower(self, group: int) -> _Step | None:
        """Return the step of ``group`` along the lower convex hull of its losses, of one chunk."""
        count, losses, allowed = self.counts[group], self.losses[group], self.allowed[group]
        fewer = allowed[allowed < count]
        if not len(fewer):
            return None
        slopes = (losses[fewer] - losses[count]) / (count - fewer)
        lowest = float(slopes.min())
        corner = int(fewer[np.flatnonzero(slopes <= lowest)[-1]])  # the nearest among equal slopes
        chunk = max(1, len(losses) // CHUNKS)
        near = fewer[fewer >= max(corner, count - chunk)]
        target = int(near[0]) if len(near) else int(fewer[-1])
        return self._step(lowest * (count - target), group, target)

    def _step(self, lost: float, group: int, target: int) -> _Step:
        saved = self.cost - self._cost_with(group, target)
        return _Step(lost / saved if saved > 0 else np.inf, group, target)

    def _next_restored(self, group: int) -> _Step | None:
        count, losses, allowed = self.counts[group], self.losses[group], self.allowed[group]
        more = allowed[allowed > count]
        if not len(more) or not count:
            return None
        return _Step(-float(losses[count] - losses[more[0]]), group, int(more[0]))

    def _cost_with(self, group: int, count: int) -> float:
        counts = [*self.counts[:group], count, *self.counts[group + 1 :]]
        return self.planner.metric(self.metric, counts)


def _allowed_counts(
    floor: int, step: int, units: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the numbers of units that a group may keep, rising: multiples of ``step``, or all."""
    first = -(-floor // step) * step
    return np.unique(np.minimum(np.arange(first, units + step, step), units))
