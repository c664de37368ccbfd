"""A cut from end to end: importance, loss curves, plan, surgery, verification, compensation.

``measure_importance`` -> scores -> ``measure_losses`` -> loss curves -> ``plan_cut`` -> plan ->
``make_cut`` -> narrow network. ``cut_network`` runs all of these steps, for ``job.slim`` and the
command ``slim``. The main job runs the same steps one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from job.console import warn
from job.distributed.collectives import check_same, digest, on_main, total
from job.distributed.memory import trim_heap
from job.errors import UsageError
from job.processes import rank
from job.slimming.calibration.batch import inputs_of
from job.slimming.calibration.consumers import consumers_of
from job.slimming.calibration.input_statistics import CalibrationData, measure_inputs
from job.slimming.calibration.memory_format import in_image_format
from job.slimming.calibration.progress import no_progress
from job.slimming.compensation.cut_pair import CutPair
from job.slimming.compensation.methods import COMPENSATIONS, compensate_cut, data_of_compensation
from job.slimming.graph.layers import fixed_modules
from job.slimming.importance.criteria import CRITERIA, score_channels
from job.slimming.inputs import sample_count
from job.slimming.method import Method, options_needing_images
from job.slimming.planned_cut import plan_cut
from job.slimming.planning.plan import keep_of
from job.slimming.planning.ranked_groups import rank_groups
from job.slimming.proven_plan import prove_plan
from job.slimming.sensitivity.measure import measure_curves
from job.slimming.surgery.comparison import check_finite_weights
from job.slimming.surgery.removable import removable_groups
from job.slimming.surgery.surgery import apply_plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from job.slimming.calibration.batch import Batches, CalibrationBatch
    from job.slimming.calibration.progress import Progress
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.importance.scores import Scores
    from job.slimming.inputs import Example
    from job.slimming.planning.allocation import Allocation
    from job.slimming.planning.base import Base
    from job.slimming.planning.loss_curves import LossCurve
    from job.slimming.planning.plan import Plan
    from job.slimming.proven_plan import ProvenPlan


def measure_importance(
    network: nn.Module,
    graph: ChannelGraph,
    method: Method,
    batches: Batches | None = None,
    progress: Progress = no_progress,
) -> tuple[Scores, CalibrationData]:
    """Return the importance (count,) of every channel, and the calibration data.

    ``batches`` returns the calibration batches of this process; measurements are over all
    processes. Raises UsageError if required images or labels are missing, and DataError for weights
    or layer inputs that are not finite.
    """
    check_finite_weights(network)
    progress("measuring channels", 0, 0)
    batches = None if batches is None else in_image_format(network, batches)
    calibration = _calibrate(network, graph, method, batches)
    scores = score_channels(method.importance, network, graph, calibration, method.seed)
    return scores, calibration


def _calibrate(
    network: nn.Module, graph: ChannelGraph, method: Method, batches: Batches | None
) -> CalibrationData:
    """Return the calibration data that a method needs; raises UsageError without images."""
    criterion, compensation = CRITERIA[method.importance], COMPENSATIONS[method.compensate]
    calibration, missing = CalibrationData(batches), batches is None
    outputs = method.allocate == "outputs"
    if batches is not None and (criterion.statistics or compensation.statistics or outputs):
        # exact statistics are not needed if the layers are fitted to the images afterwards
        fitted = compensation.images and not compensation.statistics
        calibration = _measure_inputs(network, graph, batches, sparse=fitted)
        # statistics are empty if no process has an image
        missing = not calibration.statistics and bool(consumers_of(network, graph))
    importance = None if criterion.labels else method.importance  # it reports missing labels itself
    options = options_needing_images(importance, method.compensate, method.allocate)
    if missing and options:
        needed = "calibration images are needed, but there are none"
        raise UsageError(f"{' and '.join(options)}: {needed}")
    return calibration


def _measure_inputs(
    network: nn.Module, graph: ChannelGraph, batches: Batches, *, sparse: bool
) -> CalibrationData:
    """Return calibration data with the statistics of layer inputs, from a sample if ``sparse``."""
    samples = 0

    def counted() -> Iterator[CalibrationBatch]:
        nonlocal samples
        for batch in batches():
            samples += sample_count(inputs_of(batch))
            yield batch

    statistics = measure_inputs(network, graph, counted(), sparse=sparse)
    device = next(network.parameters()).device
    count = total(torch.tensor(float(samples), dtype=torch.float64, device=device))
    trim_heap()  # the sums of wide layers took as much as the statistics
    return CalibrationData(batches, statistics, int(count))


def measure_losses(
    network: nn.Module,
    graph: ChannelGraph,
    scores: Scores,
    method: Method,
    calibration: CalibrationData,
    example: Example,
    progress: Progress = no_progress,
    more: Sequence[float] = (),
) -> dict[str, LossCurve]:
    """Return the loss curve of each channel group, by its name.

    A loss curve is the loss of the outputs by the number of channels that the group keeps; losses
    at ``more`` fractions are measured too, and change no curve. Without ``allocate`` outputs there
    are none. Measurements are over all processes.
    """
    if method.allocate != "outputs":
        return {}
    removable: frozenset[str] = frozenset()
    if method.depth == "auto":
        removable = on_main(lambda: removable_groups(network, graph, example), interrupt=True)
    return measure_curves(
        network,
        graph,
        rank_groups(graph, scores),
        calibration,
        example,
        accumulated=CRITERIA[method.importance].accumulated,
        more=more,
        removable=removable,
        output_loss=method.output_loss,
        progress=progress,
    )


def make_cut(
    proven: ProvenPlan,
    network: nn.Module,
    example: Example,
    compensate: str,
    calibration: CalibrationData,
    progress: Progress = no_progress,
) -> nn.Module:
    """Return the narrow network of a ``proven`` plan, compensated.

    ``example`` is a batch of inputs; only its shape matters. Every process makes the cut. Raises
    UsageError if the compensation needs images and no process has any.
    """
    plan, graph, narrow = proven
    if narrow is None:
        narrow = apply_plan(network, plan.layers)
        check_same(digest(narrow.state_dict()), "the slimmed network")
    if plan.proof and plan.proof.precision != "float64" and rank() == 0:
        warn(f"the network does not run in float64: the cut is exact to {plan.proof}")
    keep = keep_of(graph, plan.groups)
    pair = CutPair(network, narrow, graph, keep, plan.layers, example)
    compensate_cut(compensate, pair, calibration, progress)
    return narrow


def cut_network(
    network: nn.Module,
    graph: ChannelGraph,
    example: Example,
    allocation: Allocation,
    method: Method,
    batches: Batches | None = None,
    base: Base | None = None,
    progress: Progress = no_progress,
    timed_base: nn.Module | None = None,
    *,
    tried: bool = True,
) -> tuple[nn.Module, Plan]:
    """Return the narrow network of ``allocation`` and the plan with its proof: all steps of a cut.

    A latency target is a fraction of the latency of ``timed_base``, by default ``network``. The
    graph's suspects get trial cuts now if they were not ``tried`` and their cut is wrong.
    """
    scores, data = measure_importance(network, graph, method, batches, progress)
    curves = measure_losses(network, graph, scores, method, data, example, progress)
    data = data_of_compensation(method.compensate, data)

    def plan_of(own: ChannelGraph) -> Plan:
        parts = network, own, scores, allocation, method, example
        return plan_cut(*parts, base, curves, timed_base, progress)

    def planned() -> ProvenPlan:
        with fixed_modules(network):
            return prove_plan(plan_of, network, graph, example, progress, tried=tried)

    proven = on_main(planned, interrupt=True)
    return make_cut(proven, network, example, method.compensate, data, progress), proven.plan
