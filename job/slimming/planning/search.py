"""Search for the largest network that meets a budget."""

from __future__ import annotations

import heapq
from collections import Counter
from typing import TYPE_CHECKING, TypeVar

from job.errors import UsageError
from job.slimming.graph.reasons import OUTPUT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.planning.planner import Planner
    from job.slimming.planning.target import Budget

Step = TypeVar("Step")
NOTHING = "no channel of this network can be cut"


class OutOfReachError(UsageError):
    """Error of a budget that no cut meets; ``least`` is the lowest cost, in the metric's unit."""

    least = 0.0


def first_within_budget(
    planner: Planner,
    budget: Budget,
    limit: float,
    steps: Sequence[Step],
    counts_at: Callable[[Step], list[int]],
) -> Step:
    """Return the first of ``steps``, in the order of falling cost, that costs at most ``limit``.

    Raises UsageError with the smallest reachable cost if there is none.
    """
    low, high = 0, len(steps) - 1
    check_reachable(planner, budget, limit, counts_at(steps[high]))
    while low < high:
        middle = (low + high) // 2
        if planner.metric(budget.metric, counts_at(steps[middle])) <= limit:
            high = middle
        else:
            low = middle + 1
    return steps[low]


FEWER_OUTPUTS = (
    "If you use only some of them, pass forward= with a function that calls the network and "
    "returns those"
)
NO_COUNTED_LAYER = (
    "the network has no layers whose channels are counted; give a target in params or macs. Are "
    "its layers in a list? An nn.ModuleList registers them"
)
OTHER_METRICS = (
    "; parameters outside layers can be cut, whose channels are not counted: give a target in "
    "params or macs"
)


def check_any_group(planner: Planner, budget: Budget) -> None:
    """Raise UsageError with the main reason if no group can be cut."""
    if not planner.groups:
        why = _main_obstacle(planner.graph)
        if planner.graph.blocked and not why:
            why = f"; all of them are {OUTPUT.text}. {FEWER_OUTPUTS}"
        raise UsageError(f"{budget} cannot be reached: {NOTHING}{why}")
    if budget.metric == "channels" and not planner.base.channels:
        raise UsageError(f"{budget} cannot be reached: {NO_COUNTED_LAYER}")


def check_reachable(planner: Planner, budget: Budget, limit: float, floors: Sequence[int]) -> None:
    """Raise UsageError if ``floors`` (groups,), the fewest units, cost more than ``limit``."""
    least = planner.metric(budget.metric, floors)
    if least > limit:
        latency = budget.metric == "latency"
        error = OutOfReachError(str(budget) if latency else _message(planner, budget, limit, least))
        error.least = least
        raise error


def _message(planner: Planner, budget: Budget, limit: float, least: float) -> str:
    """Return what hinders a budget: the fewest units that are kept, or what is not cut."""
    lowest = planner.metric(budget.metric, [1] * len(planner.groups))
    advice = "; lower --min-keep or --round-to to go further" if lowest < least else ""
    if lowest > limit:
        advice += _main_obstacle(planner.graph)
    if budget.metric == "channels" and lowest == planner.base.channels:
        advice += OTHER_METRICS
    return budget.unreachable(least, planner.base, advice)


def restore_within_budget(
    planner: Planner, counts: Sequence[int], budget: Budget, limit: float
) -> list[int]:
    """Return ``counts`` with units restored while the cost is within ``limit``.

    The most important units are restored first. A group is finished when its next unit does not
    fit, since the remaining budget only shrinks.
    """
    counts = list(counts)

    def next_unit(i: int) -> list[tuple[float, int]]:
        scores = planner.groups[i].scores
        return [(-float(scores[counts[i]]), i)] if counts[i] < len(scores) else []

    queue = [entry for i in range(len(counts)) for entry in next_unit(i)]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        more = planner.groups[i].allowed_count(counts[i] + 1)
        restored = [*counts[:i], more, *counts[i + 1 :]]
        if planner.metric(budget.metric, restored) <= limit:
            counts = restored
            for entry in next_unit(i):
                heapq.heappush(queue, entry)
    return counts


def _main_obstacle(graph: ChannelGraph) -> str:
    """Describe why most channels are blocked, apart from the output, for a message."""
    if not graph.blocked:
        return "; it has no layers with channels"
    count: Counter[str] = Counter()
    for blocked in graph.blocked:
        count[blocked.reason] += blocked.channels * (blocked.reason != OUTPUT.text)
    ((reason, channels),) = count.most_common(1)
    if not channels:
        return ""
    first = next(each for each in graph.blocked if each.reason == reason)
    return f"; the main reason ({first.layer}): {first.explanation}"
