"""Means and covariances of layer inputs over the calibration images.

These are all that least squares needs: see job.slimming.importance.refit and
job.slimming.compensation.reconstruction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch

from job.errors import DataError
from job.slimming.calibration.batch import inputs_of
from job.slimming.calibration.consumers import consumers_of, input_values, sample_rows
from job.slimming.calibration.moments import AnyMoments, SplitSums
from job.slimming.graph.modes import eval_with_hooks
from job.slimming.inputs import call_network, sample_count

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from job.slimming.calibration.batch import Batches, CalibrationBatch
    from job.slimming.calibration.consumers import Consumer
    from job.slimming.graph.groups import ChannelGraph


@dataclass(frozen=True)
class InputStatistics:
    """Moments of the inputs of one layer, of fitted and of held-out images, in one group."""

    fitted: AnyMoments
    held_out: AnyMoments

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.fitted.count + self.held_out.count

    @cached_property
    def mean(self) -> torch.Tensor:
        """Mean (C,), float64 on the CPU."""
        return self.overall().mean[0]

    def overall(self) -> AnyMoments:
        """Return the moments over all images."""
        return self.fitted.merged(self.held_out)


@dataclass(frozen=True)
class CalibrationData:
    """Calibration images of a cut, and statistics of layer inputs over them.

    ``batches`` is None without images. ``statistics`` describe the inputs of each consumer, by
    layer, over ``count`` images of all processes. They are empty, and ``count`` is 0, if nothing
    needs them.
    """

    batches: Batches | None = None
    statistics: Mapping[str, InputStatistics] = field(default_factory=dict)
    count: int = 0

    def images(self) -> Iterable[CalibrationBatch]:
        """Return an iterable over the calibration batches of this process, possibly empty."""
        return self.batches() if self.batches else ()


def measure_inputs(
    network: nn.Module,
    graph: ChannelGraph,
    batches: Iterable[CalibrationBatch],
    *,
    sparse: bool = False,
) -> dict[str, InputStatistics]:
    """Return the statistics of the inputs of every consumer that runs, by layer.

    Statistics are over the batches of all processes; a process may have none. Large feature maps
    are sampled evenly; if ``sparse``, the sample is so small that the statistics cost less than the
    forward passes. Raises DataError if an input is not finite.
    """
    consumers = {consumer.layer: consumer for consumer in consumers_of(network, graph)}
    dtype = torch.float32 if sparse else torch.float64
    sums = {name: _sums(network, consumer, dtype) for name, consumer in consumers.items()}
    earlier = size = 0  # images

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], name: str) -> None:
        consumer = consumers[name]
        values = input_values(layer, inputs[0], consumer)
        rows, places = sample_rows(values, len(consumer.channels), sparse=sparse)
        sums[name].add(rows[:, None].to(dtype), earlier + places * size // max(1, len(values)))

    hooks = [(network.get_submodule(name), partial(hook, name=name)) for name in consumers]
    with eval_with_hooks(network, hooks):
        for batch in batches:
            size = sample_count(inputs_of(batch))
            call_network(network, inputs_of(batch))
            earlier += size
    statistics = {name: _result(name, sums.pop(name)) for name in consumers}
    return {name: measured for name, measured in statistics.items() if measured.count}


def _sums(network: nn.Module, consumer: Consumer, held_out: torch.dtype) -> SplitSums:
    weight = next(network.get_submodule(consumer.layer).parameters())
    columns = len(consumer.channels)
    return SplitSums(1, columns, columns, weight.device, held_out)


def _result(name: str, sums: SplitSums) -> InputStatistics:
    statistics = InputStatistics(*sums.moments())
    parts = statistics.fitted, statistics.held_out
    if not all(moments.is_finite() for moments in parts):
        raise DataError(f"the inputs of {name} on the calibration images are not finite")
    return statistics
