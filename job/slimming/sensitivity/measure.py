"""Loss curves of channel groups, measured on calibration images without labels.

One group at a time keeps some of its units, and its consumers are fitted by least squares to their
previous outputs. The fit follows from the statistics of their inputs, so that a point of a curve
costs one pass over some images, from the first consumer on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from job.slimming.calibration.batch import inputs_of, join_batches
from job.slimming.calibration.consumers import consumers_of
from job.slimming.calibration.moments import is_held_out, overall_index
from job.slimming.calibration.progress import no_progress
from job.slimming.inputs import map_batched, sample_count
from job.slimming.planning.loss_curves import fit_curve
from job.slimming.sensitivity.trial_network import TrialNetwork

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from job.slimming.calibration.batch import CalibrationBatch
    from job.slimming.calibration.consumers import Consumer
    from job.slimming.calibration.input_statistics import CalibrationData, InputStatistics
    from job.slimming.calibration.progress import Progress
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.inputs import Example
    from job.slimming.planning.loss_curves import LossCurve
    from job.slimming.planning.ranked_groups import RankedGroup

FRACTIONS = (0.75, 0.5, 0.25)  # kept fractions of a group's units, the points of its curve
PASSES = 1.3  # cost of the measurement, in passes over all images
MIN_MEASURED_IMAGES, MAX_MEASURED_IMAGES = 16, 256


def measure_curves(
    network: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[RankedGroup],
    calibration: CalibrationData,
    example: Example,
    *,
    accumulated: bool = False,
    more: Sequence[float] = (),
    removable: Collection[str] = (),
    output_loss: str | None = None,
    progress: Progress = no_progress,
) -> dict[str, LossCurve]:
    """Return the loss curve of each of ``groups`` that has a measured consumer, by name.

    ``calibration`` contains batches, and statistics of layer inputs over them. Only the first
    images, over all processes, are used, to limit the cost. With ``accumulated``, the scores of a
    group are accumulated losses, as in ``refit``. Curves pass through the points at
    ``FRACTIONS``. Losses at ``more`` fractions are measured on the same images, and do not change
    the curves. The groups ``removable``, by name, are also measured without any unit; this loss
    bounds the curve, and does not change it elsewhere. ``output_loss`` is one of OUTPUT_LOSSES, by
    default that of the shape of the outputs.
    """
    consumers = _measured_consumers(network, graph, groups, calibration.statistics)
    chosen = [r for r in groups if r.group.name in consumers]
    fitted = [_points(len(r.units), FRACTIONS) for r in chosen]
    evaluations = sum(map(len, fitted))
    if not evaluations:
        return {}
    count = round(PASSES * calibration.count / (evaluations * 0.5))
    images = _measured_images(
        min(max(count, MIN_MEASURED_IMAGES), MAX_MEASURED_IMAGES), calibration.count
    )
    points = [
        _points(len(r.units), (*FRACTIONS, *more, *([0.0] if r.group.name in removable else [])))
        for r in chosen
    ]
    trial = TrialNetwork(network, graph, example, calibration.statistics, output_loss)
    batches = list(_measured_batches(calibration.images(), images))
    losses = iter(trial.losses(chosen, points, batches, consumers, progress).tolist())
    kind = "kl" if trial.logits else "squared_error"
    curves = {}
    for r, through, counts in zip(chosen, fitted, points, strict=True):
        local = r.scores if accumulated else None
        loss_at = {number: next(losses) for number in counts}
        curve = fit_curve(through, [loss_at[n] for n in through], len(r.units), local)
        if r.group.name in removable:
            curve = curve.with_removal(loss_at[0])
        numbers, measured = tuple(loss_at), tuple(loss_at.values())
        curves[r.group.name] = replace(
            curve, counts=numbers, losses=measured, images=len(images), kind=kind
        )
    return curves


def _measured_consumers(
    network: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[RankedGroup],
    statistics: Mapping[str, InputStatistics],
) -> dict[str, list[Consumer]]:
    """Return the measured consumers of each group by its name; groups without any are left out."""
    measured = [c for c in consumers_of(network, graph) if c.layer in statistics]
    consumers = {
        r.group.name: [c for c in measured if np.isin(c.channels, r.group.channels).any()]
        for r in groups
    }
    recurrent = {
        name
        for name, of_group in consumers.items()
        for consumer in of_group
        if isinstance(network.get_submodule(consumer.layer), nn.RNNBase)  # not fitted
    }
    return {name: of for name, of in consumers.items() if of and name not in recurrent}


def _points(units: int, fractions: Sequence[float]) -> list[int]:
    """Return the numbers of kept units at which a group is measured, rising, below ``units``."""
    return sorted({units_at(units, fraction) for fraction in fractions})


def units_at(units: int, fraction: float) -> int:
    """Return how many of ``units`` are kept where ``fraction`` of them is measured."""
    return min(int(fraction * units), units - 1)


def _measured_images(count: int, overall: int) -> torch.Tensor:
    """Return the indices, rising, of up to ``count`` of the ``overall`` images.

    They are held out of the fits, unless so few images have no held-out one among them.
    """
    images = torch.arange(overall)
    held_out = images[is_held_out(images)]
    return (held_out if len(held_out) else images)[:count]


def _measured_batches(
    batches: Iterable[CalibrationBatch], images: torch.Tensor
) -> Iterator[Example]:
    """Yield the inputs of this process among ``images``, indices over all processes."""
    seen = size = 0
    parts: list[Example] = []
    for batch in batches:
        inputs = inputs_of(batch)
        indices = overall_index(torch.arange(seen, seen + sample_count(inputs)))
        wanted = torch.isin(indices, images)
        if wanted.any():
            parts.append(map_batched(inputs, lambda t: t[wanted]))  # noqa: B023
        seen, size = seen + len(indices), max(size, len(indices))
        if overall_index(torch.tensor(seen)) > images[-1]:
            break
    for joined in join_batches(parts, size):
        yield joined.inputs
