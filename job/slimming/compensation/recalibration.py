"""BatchNorm running statistics measured anew: after a cut they are those of another network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from job.distributed.collectives import total
from job.slimming.calibration.moments import inputs_of
from job.slimming.graph.layers import BATCHNORM
from job.slimming.graph.trace import eval_with_hooks
from job.slimming.inputs import call_network

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from job.slimming.calibration.moments import Batch


def recalibrate(network: nn.Module, batches: Iterable[Batch]) -> None:
    """Set the running statistics of every BatchNorm to those over the batches of all processes.

    As in training each layer normalises a batch by that batch's own statistics, and hands it on;
    nothing else is as in training, and nothing else changes. Each process brings its own batches,
    maybe none. A BatchNorm that does not run, or keeps no statistics, is left alone.
    """
    norms = [
        _Statistics(layer)
        for layer in network.modules()
        if isinstance(layer, BATCHNORM) and layer.running_mean is not None
    ]
    with eval_with_hooks(network, [(own.layer, own.hook) for own in norms]):
        for batch in batches:
            call_network(network, inputs_of(batch))
    for own in norms:
        own.finish()


class _Statistics:
    """Mean and scatter of all that one BatchNorm has seen, in float64."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.mean = torch.zeros_like(layer.running_mean, dtype=torch.float64)
        self.scatter = torch.zeros_like(self.mean)
        self.count = 0

    def hook(self, layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        """Add what ``layer`` is about to normalise, and let it do so by these statistics."""
        values = inputs[0]
        values = values if values.dtype == torch.float64 else values.float()
        count = values.numel() // max(1, values.shape[1])
        if not count:
            return
        axes = [axis for axis in range(values.dim()) if axis != 1]
        variance, mean = torch.var_mean(values, axes, correction=0)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
        apart = mean.double() - self.mean
        after = self.count + count
        self.scatter += variance.double() * count + apart.square() * (self.count * count / after)
        self.mean += apart * (count / after)
        self.count = after

    def finish(self) -> None:
        """Set those over all processes; the variance is the unbiased one, as in training."""
        count = float(total(self.mean.new_tensor(float(self.count))))
        if not count:
            return
        mean = total(self.mean * self.count) / count
        scatter = total(self.scatter + (self.mean - mean).square() * self.count)
        self.layer.running_mean.copy_(mean)
        self.layer.running_var.copy_(scatter / max(1.0, count - 1))
