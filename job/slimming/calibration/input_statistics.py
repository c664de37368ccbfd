"""Means and covariances of layer inputs over the calibration images.

These are all that least squares needs: see job.slimming.importance.refit and
job.slimming.compensation.reconstruction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from job.distributed.collectives import total
from job.errors import DataError
from job.slimming.calibration.batch import inputs_of
from job.slimming.calibration.consumers import consumers_of, input_values, sample_rows
from job.slimming.graph.modes import eval_with_hooks
from job.slimming.inputs import call_network

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from job.slimming.calibration.batch import Batches, CalibrationBatch
    from job.slimming.calibration.consumers import Consumer
    from job.slimming.graph.groups import ChannelGraph

RIDGE = 1e-3  # added to the diagonal of covariances, as a fraction of the mean variance


@dataclass(frozen=True)
class InputStatistics:
    """Mean (C,) and covariance (C, C) of ``count`` input rows, float64 on the CPU."""

    count: int
    mean: torch.Tensor
    covariance: torch.Tensor


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
    products = torch.float32 if sparse else torch.float64
    running = {name: _running(network, consumer, products) for name, consumer in consumers.items()}

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], name: str) -> None:
        consumer = consumers[name]
        values = input_values(layer, inputs[0], consumer)
        running[name].add(sample_rows(values, len(consumer.channels), sparse=sparse))

    hooks = [(network.get_submodule(name), partial(hook, name=name)) for name in consumers]
    with eval_with_hooks(network, hooks):
        for batch in batches:
            call_network(network, inputs_of(batch))
    statistics = {name: sums.result(name) for name, sums in running.items()}
    return {name: measured for name, measured in statistics.items() if measured.count}


def _running(network: nn.Module, consumer: Consumer, products: torch.dtype) -> RunningStatistics:
    weight = next(network.get_submodule(consumer.layer).parameters())
    size = len(consumer.channels)
    return RunningStatistics(size, size, weight.device, products)


class RunningStatistics:
    """Mean and covariance of rows of ``size`` columns, accumulated in float64.

    The covariances of the first ``leading`` columns with all columns are accumulated. Sums are
    relative to the running mean, for accuracy. ``products`` is the dtype of the products within one
    batch: in float32 the error of a covariance is about 1e-6 of the variances.
    """

    def __init__(
        self,
        leading: int,
        size: int,
        device: torch.device,
        products: torch.dtype = torch.float64,
    ) -> None:
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.scatter = self.mean.new_zeros(leading, size)
        self.leading, self.count, self.products = leading, 0, products

    def add(self, rows: torch.Tensor) -> None:
        """Add ``rows`` (N, size)."""
        rows = rows.double()
        if not len(rows):
            return
        mean = rows.mean(0)
        centred, shift = rows - mean, mean - self.mean
        count = self.count + len(rows)
        if self.products == torch.float64:
            self.scatter.addmm_(centred[:, : self.leading].T, centred)
        else:
            narrow = centred.to(self.products)
            self.scatter += narrow[:, : self.leading].T @ narrow
        self.scatter.addr_(shift[: self.leading], shift, alpha=self.count * len(rows) / count)
        self.mean.add_(shift, alpha=len(rows) / count)
        self.count = count

    def result(self, name: str) -> InputStatistics:
        """Return the statistics over all processes (Chan et al. 1982).

        Raises DataError, with the ``name`` of the layer, if they are not finite.
        """
        count = int(total(self.mean.new_tensor(float(self.count))))
        mean = total(self.mean * self.count) / max(1, count)
        shift = self.mean - mean
        scatter = total(self.scatter.addr(shift[: self.leading], shift, alpha=self.count))
        if not bool(scatter.isfinite().all()):
            raise DataError(f"the inputs of {name} on the calibration images are not finite")
        return InputStatistics(count, mean.cpu(), (scatter / max(1, count)).cpu())
