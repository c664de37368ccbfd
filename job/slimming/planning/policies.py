"""Policies, which distribute a cut over the channel groups. ``POLICIES`` is their table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from job.errors import UsageError
from job.slimming.planning.loss_allocation import counts_by_loss
from job.slimming.planning.search import first_within_budget, restore_within_budget

if TYPE_CHECKING:
    from collections.abc import Callable

    from job.slimming.planning.plan import Plan
    from job.slimming.planning.planner import Planner
    from job.slimming.planning.target import Budget


@dataclass(frozen=True)
class Policy:
    """Policy of allocation: an entry of the table ``POLICIES``.

    ``allocate`` returns the plan that meets a budget, and raises UsageError if it is out of reach.
    If ``min_keep``, groups keep the fraction that --min-keep sets. If ``by_width``, the cut is a
    width: in a network with a width argument only the groups that it scales are cut, and --rate is
    a fraction of the width instead of all channels. If ``compares_groups``, groups lose different
    fractions of their channels, by importance or by the loss of the outputs.
    """

    allocate: Callable[[Planner, Budget], Plan]
    help: str
    min_keep: bool = True
    by_width: bool = False
    compares_groups: bool = False


def allocate_uniform(planner: Planner, budget: Budget) -> Plan:
    """Keep the same fraction of every group."""
    if budget.metric == "width":
        _check_width(planner, budget)
        return planner.plan(planner.uniform_counts(budget.value), budget.value)
    fractions = {
        count / planner.full_sizes[r.group.name]
        for r in planner.groups
        for count in range(1, r.group.size + 1)
    }
    width = first_within_budget(
        planner,
        budget,
        budget.limit(planner.base),
        sorted(fractions, reverse=True),
        planner.uniform_counts,
    )
    return planner.plan(planner.uniform_counts(width), width)


def _check_width(planner: Planner, budget: Budget) -> None:
    """Raise UsageError if a group would grow, or keep no channel at an exact width."""
    width, sizes = budget.value, planner.full_sizes
    for r in planner.groups:
        kept = int(sizes[r.group.name] * width + 1e-9)
        if kept > r.group.size:
            widest = max(g.group.size / sizes[g.group.name] for g in planner.groups)
            raise UsageError(
                f"{budget}: width {width:g} is not below the network's own, about {widest:.4g}"
            )
        if planner.exact_widths and kept < 1:
            least = 1 / min(sizes[g.group.name] for g in planner.groups)
            raise UsageError(
                f"{budget}: width {width:g} leaves no channel of {r.group.name}; the smallest "
                f"width is {least:g}"
            )


def allocate_global(planner: Planner, budget: Budget) -> Plan:
    """Keep the most important channels of all groups.

    With loss curves the counts of the groups minimise the loss of the outputs, else one threshold
    applies to the importance of all channels (Liu et al. 2017).
    """
    if budget.metric == "width":
        budget = replace(budget, metric="channels")
    limit = budget.limit(planner.base)
    if planner.curves:
        counts = counts_by_loss(planner, budget, limit)
    else:
        counts_at, units = planner.global_counts(), sum(len(r.units) for r in planner.groups)
        kept = first_within_budget(planner, budget, limit, range(units, -1, -1), counts_at)
        counts = restore_within_budget(planner, counts_at(kept), budget, limit)
    plan = planner.plan(counts, 1.0)
    base = planner.base.channels
    # fractions differ between groups: the width is the fraction of all channels
    return replace(plan, width=plan.after.channels / base if plan.after and base else 1.0)


POLICIES: dict[str, Policy] = {
    "uniform": Policy(
        allocate_uniform, "the same fraction of each channel group", min_keep=False, by_width=True
    ),
    "global": Policy(
        allocate_global,
        "channel groups compared by the loss of the outputs, or by one threshold on importance",
        compares_groups=True,
    ),
}
