"""Cut pair: a network before and after a cut, and the weights of fitted layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from job.slimming.calibration.consumers import Consumer, consumers_of
from job.slimming.graph.layers import (
    BATCHNORM,
    modules_of,
    taps_of_output,
    weight_from_rows,
    weight_rows,
)
from job.slimming.graph.removed_layers import ConstantOutput, NoOutput
from job.slimming.graph.selection import unwrap_selection
from job.slimming.planning.layer_channels import LayerChannels, Layers
from job.slimming.surgery.removal import constant_of
from job.slimming.surgery.scales import row_scales

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.inputs import Example

# slope M (C, K) and constant b (C,): the wide input is M · narrow input + b
Fit = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class CutPair:
    """Network before (``wide``) and after (``narrow``) a cut.

    ``graph`` is the channel graph of the wide network, ``keep`` (count,) the mask of kept
    channels, and ``layers`` the plan of the cut. ``example`` is a batch of inputs; only its shape
    matters.
    """

    wide: nn.Module
    narrow: nn.Module
    graph: ChannelGraph
    keep: Ids
    layers: Layers
    example: Example

    def consumers(self) -> list[Consumer]:
        """Return the consumers of the wide network that can be fitted, in the order of the data."""
        return [
            consumer
            for consumer in consumers_of(self.wide, self.graph)
            if not isinstance(self.wide.get_submodule(consumer.layer), nn.RNNBase)
        ]

    def kept_columns(self, consumer: Consumer) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield, for each group of a consumer, its channels and the mask (C,) of the kept ones."""
        size = len(consumer.channels) // consumer.groups
        for group in range(consumer.groups):
            part = slice(group * size, (group + 1) * size)
            yield part, torch.from_numpy(self.keep[consumer.channels[part]])

    def apply_fits(self, consumer: Consumer, fits: Iterable[Fit]) -> None:
        """Set the weights of a narrow consumer so that it computes what the wide one does.

        ``fits``, one for each group, express its wide inputs by its narrow ones. The constant goes
        into the bias, or into the running means of the BatchNorms after the layer.
        """
        layer: Any = self.narrow.get_submodule(consumer.layer)
        if isinstance(layer, NoOutput):
            return
        weight, rows = consumer.weight(self.wide), self.kept_rows(consumer.layer)
        outputs = len(weight) // consumer.groups
        weights, constants = [], []
        taps = taps_of_output(self.wide.get_submodule(consumer.layer))
        for group, (slope, constant) in enumerate(fits):
            group_rows = weight[rows[rows // outputs == group]]
            weights.append(torch.einsum("ocp,ck->okp", group_rows, slope))
            constants.append(group_rows.sum(2) @ constant * taps)
        scales = self.row_scales(consumer.layer)
        weights = [torch.cat(weights) * scales[:, None, None]]
        constants = [torch.cat(constants) * scales]
        with torch.no_grad():
            if not isinstance(layer, ConstantOutput):
                layer.weight.copy_(weight_from_rows(layer, torch.cat(weights)))
            self.add_constant(consumer.layer, torch.cat(constants))

    def kept_rows(self, layer: str) -> torch.Tensor:
        """Return the indices of the outputs that a layer keeps."""
        kept = self._kept(layer).out
        rows = len(weight_rows(self.wide.get_submodule(layer)))
        return torch.arange(rows) if kept is None else torch.tensor(kept)

    def row_scales(self, layer: str) -> torch.Tensor:
        """Return the factors (O,) of the outputs of a narrow layer relative to the wide one."""
        return row_scales(self._kept(layer), len(self.kept_rows(layer)))

    def summand(self, layer: str) -> str | None:
        """Return the module whose output is only added to another, so that ``layer`` fits a sum.

        Returns None if there is no such addition, or if the scale is unknown because a BatchNorm
        selects channels or uses the statistics of each batch.
        """
        name = self.graph.forward.pause_points[layer].summand
        if name is None or name == layer:
            return name
        norm: Any = self.narrow.get_submodule(name)
        known = isinstance(norm, BATCHNORM) and norm.running_var is not None
        return name if known else None

    def holds_constant(self, layer: str) -> bool:
        """Return whether a constant can be added to the outputs of a narrow layer."""
        narrow: Any = self.narrow.get_submodule(layer)
        return narrow.bias is not None or bool(self._norms_after(layer))

    def add_constant(self, name: str, constant: torch.Tensor) -> None:
        """Add ``constant`` (O,) to the outputs that a narrow layer has after the plain cut."""
        rows = self.kept_rows(name)
        layer: Any = self.narrow.get_submodule(name)
        if isinstance(layer, ConstantOutput):
            modules = modules_of(self.wide)
            layer.bias.copy_(constant_of(modules, name, self._kept(name), constant))
            return
        if layer.bias is not None:
            bias = getattr(self.wide.get_submodule(name), "bias", None)
            wide_bias = 0 if bias is None else bias.detach().cpu().double()[rows]
            wide_bias = wide_bias * self.row_scales(name)
            layer.bias.copy_(wide_bias + constant)
            return
        for norm in self._norms_after(name):
            narrow: Any = unwrap_selection(self.narrow.get_submodule(norm))
            wide: Any = unwrap_selection(self.wide.get_submodule(norm))
            if narrow.running_mean is not None:  # else each batch cancels any constant
                narrow.running_mean.copy_(wide.running_mean.cpu().double()[rows] - constant)

    def _norms_after(self, name: str) -> tuple[str, ...]:
        """Return the BatchNorms that are the only consumers of a layer; () if one selects."""
        norms = self.graph.forward.norms_after.get(name, ())
        return () if any(self._kept(norm).select for norm in norms) else norms

    def _kept(self, name: str) -> LayerChannels:
        return self.layers.get(name, LayerChannels())
