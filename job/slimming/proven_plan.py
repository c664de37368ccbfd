"""A plan with its proof, made by the main process before every process applies it.

If the cut proves wrong, the channel groups that are wrong are blocked and it is planned again. This
happens where code branches on its sizes, and trial cuts of other sizes took another branch. Where
planning is cheap, it comes before the trial cuts: a proof makes them unnecessary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from job.errors import WrongCutError
from job.processes import world_size
from job.slimming.analysis import readings, try_suspects
from job.slimming.calibration.progress import no_progress
from job.slimming.graph.trace import trace_network
from job.slimming.surgery.surgery import apply_plan
from job.slimming.surgery.trial_cuts import catching_wrong_cut, without_wrong_groups
from job.slimming.surgery.verification import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from job.slimming.calibration.progress import Progress
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.inputs import Example
    from job.slimming.planning.plan import Plan

MAX_PLANS = 3  # until a wrong cut is an error


class ProvenPlan(NamedTuple):
    """Plan of a graph, with its proof, and the narrow network that was proven.

    This is None if there are several processes, each of which makes the cut.
    """

    plan: Plan
    graph: ChannelGraph
    narrow: nn.Module | None


def prove_plan(
    plan_of: Callable[[ChannelGraph], Plan],
    network: nn.Module,
    graph: ChannelGraph,
    example: Example,
    progress: Progress = no_progress,
    *,
    tried: bool = True,
) -> ProvenPlan:
    """Return the plan that ``plan_of`` makes of a graph, with its proof.

    The graph is ``graph``, or that of fewer groups if a cut is wrong. Suspects that were not
    ``tried`` yet get trial cuts if the first plan of all of them is wrong. Raises WrongCutError if
    there is no group that makes a cut wrong, and whatever ``plan_of`` raises.
    """
    if not tried and graph.suspects:
        progress("proving the cut", 0, 0)
        for each in readings(graph):
            if proven := _try_plan(plan_of(each), network, each, example):
                return proven
        graph = try_suspects(network, graph, example)
    for left in reversed(range(MAX_PLANS)):
        plan = plan_of(graph)
        progress("proving the cut", 0, 0)
        try:
            return _prove(plan, network, apply_plan(network, plan.layers), graph, example)
        except WrongCutError as error:
            last = readings(graph)[-1]
            if graph.scaled and (proven := _try_plan(plan_of(last), network, last, example)):
                return proven
            fewer = without_wrong_groups(network, graph, example, plan.groups, error)
            if fewer is graph or not left:
                raise
            graph = fewer
    raise AssertionError


def _try_plan(
    plan: Plan, network: nn.Module, graph: ChannelGraph, example: Example
) -> ProvenPlan | None:
    """Return ``plan`` with its proof; None if the cut is wrong or does not run."""
    with catching_wrong_cut() as errors:
        narrow = apply_plan(network, plan.layers)
        trace_network(narrow, example)  # faster than the forward pass of the wide network
        proven = _prove(plan, network, narrow, graph, example)
    return None if errors else proven


def _prove(
    plan: Plan, network: nn.Module, narrow: nn.Module, graph: ChannelGraph, example: Example
) -> ProvenPlan:
    """Return ``plan`` with the proof of its ``narrow`` network; raises WrongCutError."""
    plan = replace(plan, proof=verify(network, narrow, plan.layers, example, graph))
    return ProvenPlan(plan, graph, narrow if world_size() == 1 else None)
