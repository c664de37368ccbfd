"""Recalibration: measurement of BatchNorm running statistics after a cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from job.distributed.collectives import total
from job.slimming.calibration.batch import inputs_of
from job.slimming.graph.layers import BATCHNORM
from job.slimming.graph.modes import eval_with_hooks
from job.slimming.inputs import call_network

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from job.slimming.calibration.batch import CalibrationBatch


def recalibrate_batchnorms(network: nn.Module, batches: Iterable[CalibrationBatch]) -> None:
    """Set the running statistics of every BatchNorm to those over the batches of all processes.

    Each BatchNorm normalises a batch by the statistics of that batch, as in training. Other modules
    are in eval mode, and nothing else changes. A process may have no batches. A BatchNorm that does
    not run, or has no running statistics, is not changed.
    """
    norms = [
        _NormStatistics(layer)
        for layer in network.modules()
        if isinstance(layer, BATCHNORM) and layer.running_mean is not None
    ]
    with eval_with_hooks(network, [(norm.layer, norm.hook) for norm in norms]):
        for batch in batches:
            call_network(network, inputs_of(batch))
    for norm in norms:
        norm.set_running_statistics()


class _NormStatistics:
    """Mean and sum of squared deviations (C,) of the inputs of one BatchNorm, in float64."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.mean = torch.zeros_like(layer.running_mean, dtype=torch.float64)
        self.scatter = torch.zeros_like(self.mean)
        self.count = 0

    def hook(self, layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        """Add a batch of inputs, and set ``layer`` to normalise by the statistics of the batch."""
        values = inputs[0]
        values = values if values.dtype == torch.float64 else values.float()
        count = values.numel() // max(1, values.shape[1])
        if not count:
            return
        axes = [axis for axis in range(values.dim()) if axis != 1]
        variance, mean = torch.var_mean(values, axes, correction=0)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
        shift = mean.double() - self.mean
        after = self.count + count
        self.scatter += variance.double() * count + shift.square() * (self.count * count / after)
        self.mean += shift * (count / after)
        self.count = after

    def set_running_statistics(self) -> None:
        """Set the statistics over all processes; the variance is unbiased, as in training."""
        count = float(total(self.mean.new_tensor(float(self.count))))
        if not count:
            return
        mean = total(self.mean * self.count) / count
        scatter = total(self.scatter + (self.mean - mean).square() * self.count)
        self.layer.running_mean.copy_(mean)
        self.layer.running_var.copy_(scatter / max(1.0, count - 1))
