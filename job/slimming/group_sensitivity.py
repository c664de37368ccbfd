"""Sensitivity of a network: the measurements of a cut, without the cut."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from job.distributed.collectives import on_main
from job.errors import UsageError
from job.slimming.calibration.progress import no_progress
from job.slimming.cut import Method, measure_importance, measure_losses, plan_cut
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
    *,
    output_loss: str | None = None,
    progress: Progress = no_progress,
) -> Sensitivity:
    """Return the losses of all channel groups at ``TABLE_FRACTIONS``, and what a cut would keep.

    With an ``allocation`` of the policy ``global`` a cut is planned, relative to ``base``, by
    default the network itself. ``batches`` returns the calibration batches of this process;
    measurements are over all processes. A cut with the same images measures the same losses.

    Raises UsageError without images or for a budget that is out of reach, and DataError for values
    that are not finite.
    """
    if allocation and allocation.budget.metric == "latency":
        raise UsageError(
            f"{allocation.budget}: sensitivity does not measure latency; give e.g. macs=0.5"
        )
    method = replace(METHOD, output_loss=output_loss)
    scores, data = measure_importance(network, graph, method, batches, progress)
    parts = network, graph, scores, method, data, example, progress
    curves = measure_losses(*parts, more=TABLE_FRACTIONS)
    plan = target = None
    if allocation:
        plan = on_main(lambda: plan_cut(network, graph, scores, allocation, method, base, curves))
        target = f"{allocation.budget.metric}={allocation.budget.value:g}"
    return summarise_losses(network, graph, curves, TABLE_FRACTIONS, plan, target)
