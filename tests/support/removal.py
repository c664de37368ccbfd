"""Cuts that remove whole branches of a network, whatever an allocation would choose."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import torch

from job.slimming.analysis import analyse
from job.slimming.calibration.input_statistics import CalibrationData, measure_inputs
from job.slimming.compensation.constants import add_biases, layers_without_constant
from job.slimming.cut import make_cut
from job.slimming.inputs import strip_values
from job.slimming.planning.cost_model import CostModel
from job.slimming.planning.plan import Plan
from job.slimming.planning.planner import Planner
from job.slimming.planning.ranked_groups import rank_groups
from job.slimming.proven_plan import prove_plan
from job.slimming.surgery.removable import removable_groups


def removable(network: torch.nn.Module, example: torch.Tensor) -> frozenset[str]:
    return removable_groups(network, analyse(network, example), example)


def remove(
    network: torch.nn.Module,
    example: torch.Tensor,
    names: Collection[str],
    *,
    compensate: str = "none",
    batches: list[torch.Tensor] | None = None,
    keep: float = 1.0,
) -> tuple[torch.nn.Module, Plan]:
    """The proven network without the channel groups ``names``; others keep a fraction ``keep``."""
    graph = analyse(network, example)
    groups = rank_groups(
        graph, np.random.default_rng(0).random(graph.count), removable=frozenset(names)
    )
    counts = [0 if r.group.name in names else max(1, round(keep * len(r.units))) for r in groups]
    biases = frozenset() if compensate == "none" else layers_without_constant(network, graph)
    costs = CostModel(network, graph, biases)
    plan = Planner(graph, costs, groups, {}).plan(counts, 1.0)
    plan = replace(plan, layers=add_biases(plan.layers, biases), example=strip_values(example))
    data = CalibrationData()
    if batches is not None:
        pairs = [(batch, None) for batch in batches]
        data = CalibrationData(lambda: pairs, measure_inputs(network, graph, pairs))
    proven = prove_plan(lambda _: plan, network, graph, example)
    return make_cut(proven, network, example, compensate, data), proven.plan
