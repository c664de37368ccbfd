"""Consumers: the layers that sum over channels, and their input values."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from job.slimming.graph.layers import FEATURES_LAST, SUMMING, TRANSPOSED, modules_of, weight_rows

if TYPE_CHECKING:
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids

MAX_VALUES = 2**24  # in one batch of a layer's inputs: 128 MiB in float64
MAX_PRODUCTS = 2**33  # for one batch of a layer's inputs: about a second
SPARSE_ROWS, SPARSE_PRODUCTS = 49, 2**24  # for one image and layer, if sparse


@dataclass(frozen=True)
class Consumer:
    """Convolution or linear layer that sums over ``channels`` (C,), given by number.

    Each channel has ``columns`` consecutive columns of the weight, more than one only in a linear
    layer after a flatten. The sum is over the channels of each of ``groups``.
    """

    layer: str
    channels: Ids
    columns: int
    groups: int

    def weight(self, network: nn.Module) -> torch.Tensor:
        """Return the weight as (outputs, C / groups, kernel or columns), float64 on the CPU."""
        rows = weight_rows(network.get_submodule(self.layer)).detach().cpu().double()
        return rows.reshape(len(rows), len(self.channels) // self.groups, -1)


def consumers_of(network: nn.Module, graph: ChannelGraph) -> list[Consumer]:
    """Return the consumers of channels that can be cut, in the order of the data flow.

    Parameters outside of known layers, weights that several layers share, the packed weights of
    nn.MultiheadAttention and deformable convolutions are left out, as are layers that compute their
    weight from a parameter.
    """
    layers = modules_of(network, once=True).values()
    uses = Counter(id(m.weight) for m in layers if isinstance(m, SUMMING))
    consumers = []
    for slot in graph.slots:
        if slot.side != "in" or not slot.ids.any():
            continue
        try:
            layer = network.get_submodule(slot.layer)
        except AttributeError:  # a parameter without a known layer: hooks do not see its inputs
            continue
        if not isinstance(layer, (*SUMMING, nn.RNNBase)) or slot.layer in graph.computed:
            continue
        if isinstance(layer, SUMMING) and uses[id(layer.weight)] > 1:
            continue
        columns = _columns_per_channel(slot.ids) if isinstance(layer, FEATURES_LAST) else 1
        groups = int(getattr(layer, "groups", 1))
        consumers.append(Consumer(slot.layer, slot.ids[::columns], columns, groups))
    return consumers


def _columns_per_channel(ids: Ids) -> int:
    """Return the largest run length that divides ``ids`` into runs of one channel each."""
    bounds = np.flatnonzero(np.diff(ids)) + 1
    return math.gcd(len(ids), *bounds.tolist())


def input_values(layer: nn.Module, values: torch.Tensor, consumer: Consumer) -> torch.Tensor:
    """Return the input of a consumer as (B, C, P): P values of each channel."""
    if isinstance(layer, FEATURES_LAST):
        return values.reshape(-1, values.shape[-1] // consumer.columns, consumer.columns)
    return _without_skipped(layer, values).flatten(2)


def _without_skipped(layer: Any, values: torch.Tensor) -> torch.Tensor:
    """Return ``values`` (B, C, …) without the positions that a strided 1x1 convolution skips."""
    if (
        isinstance(layer, TRANSPOSED)
        or set(layer.kernel_size) != {1}
        or layer.padding not in ("valid", (0,) * (values.dim() - 2))
    ):
        return values
    for axis, stride in enumerate(layer.stride, 2):
        positions = torch.arange(0, values.shape[axis], stride, device=values.device)
        values = values.index_select(axis, positions) if stride > 1 else values
    return values


def sample_rows(
    values: torch.Tensor, width: int, *, sparse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows (N, C) of ``values`` (B, C, P), and the index (N,) of each row's batch item.

    The rows are all B * P rows or an even sample of them, which covers each of the P positions
    equally often. The sample is limited so that the products of ``width`` columns are cheap, and if
    ``sparse``, cheap compared with a forward pass.
    """
    size, channels, positions = values.shape
    most = max(1, min(MAX_VALUES // width, MAX_PRODUCTS // width**2))
    if sparse:
        most = min(most, size * max(SPARSE_ROWS, SPARSE_PRODUCTS // width**2))
    step = max(1, -(-size * positions // most))
    while step > 1 and math.gcd(step, positions) > 1:  # else it would cover only some columns
        step += 1
    chosen = torch.arange(0, size * positions, step, device=values.device)
    places, rows = chosen // positions, values.transpose(1, 2)
    if step == 1:
        return rows.reshape(-1, channels), places
    return rows[places, chosen % positions], places
