"""Plan of a cut for a target: the channels to keep and new biases."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from job.slimming.calibration.progress import no_progress
from job.slimming.compensation.constants import add_biases, layers_without_constant
from job.slimming.compensation.methods import COMPENSATIONS
from job.slimming.latency_target import meet_latency
from job.slimming.planning.allocation import make_plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from job.slimming.calibration.progress import Progress
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.importance.scores import Scores
    from job.slimming.inputs import Example
    from job.slimming.latency.network_latency import NetworkLatency
    from job.slimming.method import Method
    from job.slimming.planning.allocation import Allocation
    from job.slimming.planning.base import Base
    from job.slimming.planning.loss_curves import LossCurve
    from job.slimming.planning.plan import Plan


def plan_cut(
    network: nn.Module,
    graph: ChannelGraph,
    scores: Scores,
    allocation: Allocation,
    method: Method,
    example: Example,
    base: Base | None = None,
    curves: Mapping[str, LossCurve] | None = None,
    timed_base: nn.Module | None = None,
    progress: Progress = no_progress,
) -> Plan:
    """Return the plan of a cut: the channels to keep, by ``scores`` (count,), and new biases.

    With ``curves`` the policy ``global`` compares groups by their losses. Fractions are relative to
    ``base``, by default the network itself; a latency is measured, and relative to that of
    ``timed_base``, by default the network itself. Raises UsageError for a budget that is out of
    reach.
    """
    gains_bias: frozenset[str] = frozenset()
    if COMPENSATIONS[method.compensate].apply:
        gains_bias = layers_without_constant(network, graph)

    def plan_with(each: Allocation, latency: NetworkLatency | None = None) -> Plan:
        plan = make_plan(network, graph, scores, each, base, gains_bias, curves, latency)
        return replace(plan, layers=add_biases(plan.layers, gains_bias), method=str(method))

    if allocation.budget.metric != "latency":
        return plan_with(allocation)
    return meet_latency(network, graph, example, allocation, plan_with, timed_base, progress)
