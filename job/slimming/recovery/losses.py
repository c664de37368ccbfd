"""Losses of a narrow network relative to the wide one: of its outputs, and of its features."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from job.distributed.collectives import total
from job.slimming.calibration.consumers import consumers_of
from job.slimming.inputs import call_network, tensors_in
from job.slimming.sensitivity.output_loss import are_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.inputs import Example

MIN_VARIANCE = 1e-12


class Values(NamedTuple):
    """Values that a network computes from a batch: its outputs, and its features.

    A feature is None if the pass does not call its layer, e.g. one of a head for train mode.
    """

    outputs: list[torch.Tensor]
    features: list[torch.Tensor | None]


class Losses(NamedTuple):
    """Loss of the outputs, and mean loss of the features."""

    outputs: torch.Tensor
    features: torch.Tensor


@dataclass(frozen=True)
class Feature:
    """Input of ``layer``, a tensor with its channels along ``axis``.

    ``channels`` are the indices of the wide network's channels that the narrow one keeps; None
    stands for all of them.
    """

    layer: str
    axis: int
    channels: torch.Tensor | None

    def select_kept(self, values: torch.Tensor) -> torch.Tensor:
        """Return the kept channels of the wide network's ``values``."""
        if self.channels is None:
            return values
        return values.index_select(self.axis, self.channels.to(values.device))


def features_of(
    wide: nn.Module, narrow: nn.Module, graph: ChannelGraph, keep: Ids
) -> list[Feature]:
    """Return the features: the inputs, in both networks, of the layers that sum over channels.

    ``keep`` (count,) is the mask of the kept channels of ``graph``, the graph of the wide network.
    """
    features, layers = [], dict(narrow.named_modules())
    for consumer in consumers_of(wide, graph):
        mask = keep[consumer.channels]
        if consumer.layer not in layers or consumer.columns > 1 or not mask.any():
            continue
        channels = None if mask.all() else torch.from_numpy(mask.nonzero()[0])
        axis = -1 if isinstance(layers[consumer.layer], nn.Linear) else 1
        features.append(Feature(consumer.layer, axis, channels))
    return features


class Comparison:
    """Comparison of the outputs and features of a narrow network with those of the wide one.

    Errors are relative to the variances of the wide network's values, which ``measure`` sets.
    """

    def __init__(self, wide: nn.Module, narrow: nn.Module, features: Sequence[Feature]) -> None:
        self.wide, self.narrow, self.features = wide, narrow, features
        self.variances = [1.0] * (len(features) + 1)  # of each feature, and of the outputs

    def measure(self, batches: Iterable[Example], device: torch.device) -> None:
        """Set the variances over the samples of all processes; collective."""
        sums = torch.zeros(len(self.variances), 3, dtype=torch.float64, device=device)
        for inputs in batches:
            values = self.targets(inputs)
            groups = [*([] if v is None else [v] for v in values.features), values.outputs]
            for row, tensors in zip(sums, groups, strict=True):
                for tensor in tensors:
                    double = tensor.double()
                    row += torch.stack(
                        [double.new_tensor(double.numel()), double.sum(), double.square().sum()]
                    )
        counts, first, second = total(sums).unbind(1)
        counts = counts.clamp_min(1)
        variances = second / counts - (first / counts).square()
        self.variances = variances.clamp_min(MIN_VARIANCE).tolist()

    def targets(self, inputs: Example) -> Values:
        """Return the outputs and the kept features of the wide network."""
        with torch.no_grad():
            values = self._run(self.wide, inputs)
        pairs = zip(self.features, values.features, strict=True)
        kept = [None if v is None else feature.select_kept(v) for feature, v in pairs]
        return Values(values.outputs, kept)

    def losses(self, inputs: Example) -> Losses:
        """Return the losses of the narrow network, as means over the samples of ``inputs``."""
        targets = self.targets(inputs)
        values = self._run(self.narrow, inputs)
        *variances, of_outputs = self.variances
        outputs = list(zip(values.outputs, targets.outputs, strict=True))
        loss = torch.stack([F.mse_loss(a, b) for a, b in outputs]).sum() / (
            len(outputs) * of_outputs
        )
        if are_logits(targets.outputs):
            loss = loss + torch.stack([_divergence(a, b) for a, b in outputs]).mean()
        features = [
            F.mse_loss(a, b) / variance
            for a, b, variance in zip(values.features, targets.features, variances, strict=True)
            if a is not None and b is not None
        ]
        return Losses(loss, torch.stack(features).mean() if features else torch.zeros_like(loss))

    def _run(self, network: nn.Module, inputs: Example) -> Values:
        with _record_inputs(network, self.features) as layer_inputs:
            outputs = call_network(network, inputs)
        floats = [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]
        return Values(floats, [layer_inputs.get(feature.layer) for feature in self.features])


def _divergence(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean KL(wide || narrow) of the softmax of logits (B, C)."""
    narrow, wide = F.log_softmax(logits, 1), F.log_softmax(targets, 1)
    return F.kl_div(narrow, wide, log_target=True, reduction="batchmean")


@contextmanager
def _record_inputs(
    network: nn.Module, features: Sequence[Feature]
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a dict that records the input of the layer of each feature, by its name."""
    layer_inputs: dict[str, torch.Tensor] = {}

    def record_as(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            layer_inputs[name] = inputs[0]

        return hook

    hooks = [
        network.get_submodule(feature.layer).register_forward_pre_hook(record_as(feature.layer))
        for feature in features
    ]
    try:
        yield layer_inputs
    finally:
        for hook in hooks:
            hook.remove()
