"""Allocation: the number of channels that each group keeps, and the resulting plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from job.slimming.graph.groups import BlockedChannels
from job.slimming.graph.reasons import UNRANKED
from job.slimming.planning.base import full_group_sizes
from job.slimming.planning.cost_model import CostModel
from job.slimming.planning.planner import Planner
from job.slimming.planning.policies import POLICIES
from job.slimming.planning.ranked_groups import rank_groups
from job.slimming.planning.search import check_any_group

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.importance.scores import Scores
    from job.slimming.latency.network_latency import NetworkLatency
    from job.slimming.planning.base import Base
    from job.slimming.planning.loss_curves import LossCurve
    from job.slimming.planning.plan import Plan
    from job.slimming.planning.ranked_groups import RankedGroup
    from job.slimming.planning.target import Budget


@dataclass(frozen=True)
class Allocation:
    """Allocation of a cut: a ``policy`` of ``POLICIES``, the ``budget``, and bounds for each group.

    A group keeps at least the fraction ``min_keep`` of its channels, and a multiple of ``round_to``
    channels if it is large enough. A group whose curve is ``removable`` may also keep none.

    ``latency_batch`` is the batch size at which a latency is measured. For one of several rounds,
    a latency target is raised to the power ``share``, as a fraction of the latency of the base.
    """

    policy: str
    budget: Budget
    round_to: int = 1
    min_keep: float = 0.1
    latency_batch: int = 1
    share: float = 1.0


def make_plan(
    network: nn.Module,
    graph: ChannelGraph,
    scores: Scores,
    allocation: Allocation,
    base: Base | None = None,
    gains_bias: frozenset[str] = frozenset(),
    curves: Mapping[str, LossCurve] | None = None,
    latency: NetworkLatency | None = None,
) -> Plan:
    """Return the plan that keeps the channels with the highest ``scores`` (count,).

    Fractions are relative to ``base``, by default the network itself. Layers in ``gains_bias`` get
    a bias when one of their inputs is cut, which the costs include. ``curves`` are the loss curves
    of the groups, by name, if they were measured. ``latency`` predicts the seconds that a budget of
    latency limits. Raises UsageError for a budget that is out of reach or above the base.
    """
    policy, sizes = POLICIES[allocation.policy], full_group_sizes(network, graph, base)
    floors = {n: _ceil(allocation.min_keep * size) for n, size in sizes.items()}
    groups = rank_groups(
        graph,
        scores,
        floors=floors if policy.min_keep else None,
        round_to=allocation.round_to,
        removable=[name for name, curve in (curves or {}).items() if curve.removable],
    )
    graph = _block_unranked(graph, groups)
    uniform_widths: Mapping[str, int] | None = None
    if policy.by_width:
        uniform_widths = getattr(network, "uniform_widths", None)
    if uniform_widths is not None:
        groups = [r for r in groups if r.group.name in uniform_widths]
    costs = CostModel(network, graph, gains_bias, latency=latency)
    cost = base.cost if base else None
    exact = uniform_widths is not None
    planner = Planner(graph, costs, groups, sizes, cost, curves=curves, exact_widths=exact)
    allocation.budget.fraction(planner.base)  # raises UsageError above the base
    check_any_group(planner, allocation.budget)
    return replace(policy.allocate(planner, allocation.budget), policy=allocation.policy)


def _ceil(value: float) -> int:
    return -int(-(value - 1e-9) // 1)


def _block_unranked(graph: ChannelGraph, groups: Sequence[RankedGroup]) -> ChannelGraph:
    """Return ``graph`` with the channels of unranked groups listed as blocked."""
    names = {r.group.name for r in groups}
    unranked = tuple(
        BlockedChannels.by(layer, group.size, UNRANKED())
        for group in graph.groups
        if group.name not in names
        for layer in group.layers
    )
    return replace(graph, blocked=graph.blocked + unranked)
