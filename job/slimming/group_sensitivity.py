"""Sensitivity of a network: the measurements of a cut, without the cut."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from job.distributed.collectives import on_main
from job.slimming.calibration.progress import no_progress
from job.slimming.cut import measure_importance, measure_losses
from job.slimming.method import Method
from job.slimming.planned_cut import plan_cut
from job.slimming.sensitivity.summary import summarise_losses

if TYPE_CHECKING:
    from torch import nn

    from job.slimming.calibration.batch import Batches
    from job.slimming.calibration.progress import Progress
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.inputs import Example
    from job.slimming.planning.allocation import Allocation
    from job.slimming.planning.base import Base
    from job.slimming.sensitivity.record import Sensitivity

TABLE_FRACTIONS = (0.9, 0.75, 0.5, 0.25, 0.0)  # kept fractions of a group's channels
# the default with calibration images
METHOD = Method("refit", "regress", allocate="outputs", depth="auto")


def measure_sensitivity(
    network: nn.Module,
    graph: ChannelGraph,
    batches: Batches,
    example: Example,
    allocation: Allocation | None = None,
    base: Base | None = None,
    timed_base: nn.Module | None = None,
    *,
    output_loss: str | None = None,
    progress: Progress = no_progress,
) -> Sensitivity:
    """Return the losses of all channel groups at ``TABLE_FRACTIONS``, and what a cut would keep.

    With an ``allocation`` a cut is planned, relative to ``base``, by default the network itself; a
    latency target is relative to the latency of ``timed_base``, by default the network itself.
    ``batches`` returns the calibration batches of this process; measurements are over all
    processes. A cut with the same images measures the same losses.

    Raises UsageError without images or for a budget that is out of reach, and DataError for values
    that are not finite.
    """
    method = replace(METHOD, output_loss=output_loss)
    scores, data = measure_importance(network, graph, method, batches, progress)
    parts = network, graph, scores, method, data, example, progress
    curves = measure_losses(*parts, more=TABLE_FRACTIONS)
    plan = target = None
    if allocation:
        cut = network, graph, scores, allocation, method, example, base, curves
        plan = on_main(partial(plan_cut, *cut, timed_base, progress), interrupt=True)
        target = allocation.budget.target
    return summarise_losses(network, graph, curves, TABLE_FRACTIONS, plan, target)
