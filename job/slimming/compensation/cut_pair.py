"""A network before and after a cut, and the fit of a narrow layer to the wide one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from job.slimming.calibration.consumers import Consumer, consumers_of
from job.slimming.graph.selection import unwrap_selection
from job.slimming.planning.layer_channels import LayerChannels, Layers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.inputs import Example

# slope M (C, K) and constant b (C,): the wide input is M · narrow input + b
Fit = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class CutPair:
    """The network before (``wide``) and after (``narrow``) a cut of the channels not kept.

    ``graph`` is the channel graph of the wide network, ``keep`` (count,) the mask of channels,
    ``layers`` the plan that the narrow network was built by. ``example`` is a batch of inputs;
    only its shape matters.
    """

    wide: nn.Module
    narrow: nn.Module
    graph: ChannelGraph
    keep: Ids
    layers: Layers
    example: Example

    def consumers(self) -> list[Consumer]:
        """Return the consumers of the wide network in the order of the data flow."""
        return consumers_of(self.wide, self.graph)

    def kept_columns(self, consumer: Consumer) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield, for each group of a consumer, its channels and the mask (C,) of the kept ones."""
        size = len(consumer.channels) // consumer.groups
        for group in range(consumer.groups):
            part = slice(group * size, (group + 1) * size)
            yield part, torch.from_numpy(self.keep[consumer.channels[part]])

    def apply_fits(self, consumer: Consumer, fits: Sequence[Fit]) -> None:
        """Set the weights of a narrow consumer so that it computes what the wide one does.

        ``fits``, one for each group, express its wide inputs by its narrow ones. The constant goes
        into the bias, or into the running means of the BatchNorms after the layer.
        """
        weight, kept = consumer.weight(self.wide), self._kept(consumer.layer).out
        rows = torch.arange(len(weight)) if kept is None else torch.tensor(kept)
        outputs = len(weight) // consumer.groups
        weights, constants = [], []
        for group, (slope, constant) in enumerate(fits):
            group_rows = weight[rows[rows // outputs == group]]
            weights.append(torch.einsum("ocp,ck->okp", group_rows, slope))
            constants.append(group_rows.sum(2) @ constant)
        with torch.no_grad():
            layer: Any = self.narrow.get_submodule(consumer.layer)
            layer.weight.copy_(torch.cat(weights).view(layer.weight.shape))
            self._add_constant(consumer.layer, torch.cat(constants), rows)

    def _add_constant(self, name: str, constant: torch.Tensor, rows: torch.Tensor) -> None:
        layer: Any = self.narrow.get_submodule(name)
        if layer.bias is not None:
            bias = getattr(self.wide.get_submodule(name), "bias", None)
            wide_bias = 0 if bias is None else bias.detach().cpu().double()[rows]
            layer.bias.copy_(wide_bias + constant)
            return
        for norm in self._norms_after(name):
            narrow: Any = unwrap_selection(self.narrow.get_submodule(norm))
            wide: Any = unwrap_selection(self.wide.get_submodule(norm))
            if narrow.running_mean is not None:  # else each batch cancels any constant
                narrow.running_mean.copy_(wide.running_mean.cpu().double()[rows] - constant)

    def _norms_after(self, name: str) -> tuple[str, ...]:
        """The BatchNorms that alone read a layer; none where one of them selects its channels."""
        norms = self.graph.forward.norms_after.get(name, ())
        return () if any(self._kept(norm).select for norm in norms) else norms

    def _kept(self, name: str) -> LayerChannels:
        return self.layers.get(name, LayerChannels())
