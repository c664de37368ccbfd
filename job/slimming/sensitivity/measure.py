"""Loss curves of channel groups, measured on calibration images without labels.

One group at a time keeps some of its units, and its consumers are fitted by least squares to their
outputs before. The fit follows from the statistics of their inputs, so that a point of a curve
costs one pass over some images, from the first consumer on.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from job.distributed.collectives import total
from job.processes import rank, world_size
from job.slimming.calibration.batch import inputs_of, join_batches
from job.slimming.calibration.consumers import consumers_of
from job.slimming.calibration.moments import Moments, is_held_out, overall_index
from job.slimming.calibration.progress import no_progress
from job.slimming.compensation.constants import layers_without_constant
from job.slimming.compensation.cut_pair import CutPair
from job.slimming.compensation.normal_equations import RIDGE, fit_held_out
from job.slimming.graph.modes import eval_with_hooks
from job.slimming.graph.selection import unwrap_selection
from job.slimming.inputs import map_batched, sample_count
from job.slimming.planning.layer_channels import LayerChannels
from job.slimming.planning.loss_curves import fit_curve
from job.slimming.planning.plan import keep_all
from job.slimming.sensitivity.output_loss import (
    are_logits,
    loss_terms,
    mean_loss,
    reference_outputs,
)
from job.slimming.sensitivity.replay import Replay
from job.slimming.surgery.surgery import apply_plan

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from job.slimming.calibration.batch import CalibrationBatch
    from job.slimming.calibration.consumers import Consumer
    from job.slimming.calibration.input_statistics import CalibrationData, InputStatistics
    from job.slimming.calibration.progress import Progress
    from job.slimming.compensation.cut_pair import Fit
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.inputs import Example
    from job.slimming.planning.loss_curves import LossCurve
    from job.slimming.planning.ranked_groups import RankedGroup

FRACTIONS = (0.75, 0.5, 0.25)  # kept fractions of a group's units, the points of its curve
PASSES = 1.3  # cost of the measurement, in passes over all images
MIN_MEASURED, MAX_MEASURED = 16, 256  # images


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
    progress: Progress = no_progress,
) -> dict[str, LossCurve]:
    """Return the loss curve of each of ``groups`` that has a measured consumer, by name.

    ``calibration`` contains batches, and statistics of layer inputs over them. Only the first
    images, over all processes, are used, to limit the cost. ``accumulated`` tells that the scores
    of a group are accumulated losses, as those of refit. Curves pass through the points at
    ``FRACTIONS``. Losses at ``more`` fractions are measured on the same images, and do not change
    the curves. The groups ``removable``, by name, are also measured without any unit; this loss
    bounds the curve, and does not change it elsewhere.
    """
    consumers = _measured_consumers(network, graph, groups, calibration.statistics)
    chosen = [r for r in groups if r.group.name in consumers]
    fitted = [_points(len(r.units), FRACTIONS) for r in chosen]
    evaluations = sum(map(len, fitted))
    if not evaluations:
        return {}
    count = round(PASSES * calibration.count / (evaluations * 0.5))
    images = _measured_images(min(max(count, MIN_MEASURED), MAX_MEASURED), calibration.count)
    points = [
        _points(len(r.units), (*FRACTIONS, *more, *([0.0] if r.group.name in removable else [])))
        for r in chosen
    ]
    trial = _TrialNetwork(network, graph, example, calibration.statistics)
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
        if isinstance(network.get_submodule(consumer.layer), nn.RNNBase)  # which is not fitted
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


class _TrialNetwork:
    """Copy of a network in which one channel group at a time is reduced."""

    def __init__(
        self,
        network: nn.Module,
        graph: ChannelGraph,
        example: Example,
        statistics: Mapping[str, InputStatistics],
    ) -> None:
        self.graph, self.statistics = graph, statistics
        self.logits = False  # whether the outputs of the last batch were logits
        biases = {
            layer: LayerChannels(bias=True) for layer in layers_without_constant(network, graph)
        }
        self.network = apply_plan(network, biases)
        self.pair = CutPair(network, self.network, graph, keep_all(graph), biases, example)

    def losses(
        self,
        groups: Sequence[RankedGroup],
        points: Sequence[Sequence[int]],
        batches: Sequence[Example],
        consumers: Mapping[str, Sequence[Consumer]],
        progress: Progress,
    ) -> torch.Tensor:
        """Return the losses (points,) of all groups, one group after the other, over all processes.

        Every process calls ``progress`` at the same steps.
        """
        device = next(self.network.parameters()).device
        most = torch.zeros(world_size(), dtype=torch.float64, device=device)
        most[rank()] = len(batches)
        rounds = int(total(most).max())
        evaluations = sum(map(len, points))
        terms: torch.Tensor | None = None
        with eval_with_hooks(self.network, []):
            for number in range(rounds):
                replay, reference, parts = None, list[torch.Tensor](), list[torch.Tensor]()
                if number < len(batches):
                    replay = Replay(self.network, batches[number])
                    reference = reference_outputs(replay.outputs)
                    self.logits = are_logits(reference)
                for place, (ranked, counts) in enumerate(zip(groups, points, strict=True)):
                    progress(
                        "measuring output losses",
                        number * len(groups) + place + 1,
                        rounds * len(groups),
                    )
                    if replay:
                        of_group = consumers[ranked.group.name]
                        parts += self._terms(replay, reference, ranked, counts, of_group)
                if replay:
                    stacked = torch.stack(parts)
                    terms = stacked if terms is None else terms + stacked
        tensors = torch.zeros(3, dtype=torch.float64, device=device)
        if terms is not None:
            tensors = tensors.new_tensor([terms.shape[1], 1.0, float(self.logits)])
        shape = total(tensors)
        if not shape[1]:
            return torch.zeros(evaluations, dtype=torch.float64)
        self.logits = bool(shape[2])
        if terms is None:
            size = int(shape[0] / shape[1])
            terms = torch.zeros(evaluations, size, 2, dtype=torch.float64, device=device)
        return mean_loss(total(terms)).cpu()

    def _terms(
        self,
        replay: Replay,
        reference: Sequence[torch.Tensor],
        ranked: RankedGroup,
        counts: Sequence[int],
        consumers: Sequence[Consumer],
    ) -> Iterator[torch.Tensor]:
        """Yield the terms (tensors, 2) of the loss of one batch at each point of one group."""
        place = replay.first_call({consumer.layer for consumer in consumers})
        for count in counts:
            keep = keep_all(self.graph)
            keep[ranked.units[count:].reshape(-1)] = False
            with self._reduced(consumers, keep):
                yield loss_terms(reference, replay.run_from(place))

    @contextmanager
    def _reduced(self, consumers: Sequence[Consumer], keep: Ids) -> Iterator[None]:
        """Fit ``consumers`` to the channels of the mask ``keep`` within the context."""
        changed = [t for consumer in consumers for t in self._tensors(consumer.layer)]
        saved = [tensor.detach().clone() for tensor in changed]
        try:
            for consumer in consumers:
                self.pair.apply_fits(consumer, self._fits(consumer, keep))
            yield
        finally:
            with torch.no_grad():
                for tensor, values in zip(changed, saved, strict=True):
                    tensor.copy_(values)

    def _fits(self, consumer: Consumer, keep: Ids) -> Iterator[Fit]:
        """Yield, for each group, the fit of all inputs by the kept ones: (C, C) and (C,)."""
        measured = self.statistics[consumer.layer]
        for part, stays in replace(self.pair, keep=keep).kept_columns(consumer):
            missing = (~stays).nonzero()[:, 0]
            fitted, held_out = (
                _of_missing(moments, part, stays)
                for moments in (measured.fitted, measured.held_out)
            )
            _, (change, constant) = fit_held_out(fitted, held_out, RIDGE)
            slope, constants = torch.diag(stays.double()), torch.zeros(len(stays)).double()
            slope[:, stays] = slope[:, stays].index_copy(0, missing, change[0].T)
            constants[missing] = constant[0]
            yield slope, constants

    def _tensors(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the tensors that a fit of the layer ``name`` may change."""
        layer = self.network.get_submodule(name)
        yield layer.get_parameter("weight")
        if layer.bias is not None:
            yield layer.get_parameter("bias")
        for norm in self.graph.forward.norms_after.get(name, ()):
            module = unwrap_selection(self.network.get_submodule(norm))
            if module.running_mean is not None:
                yield module.get_buffer("running_mean")


def _of_missing(moments: Moments, part: slice, stays: torch.Tensor) -> Moments:
    """Return the moments that predict the missing inputs among ``part`` by those that stay."""
    mean, scatter = moments.mean[:, part], moments.scatter[:, part, part]
    order = torch.cat([stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]])
    return Moments(moments.count, mean[:, order], scatter[:, stays][:, :, order])
