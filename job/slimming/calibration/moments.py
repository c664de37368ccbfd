"""Means and covariances of what each layer that sums over channels reads, over calibration batches.

They are all that least squares needs to know: see job.slimming.compensation.folding and
job.slimming.importance.refit.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from job.distributed.collectives import total
from job.errors import DataError
from job.slimming.graph.layers import CONVOLUTIONS, modules_of
from job.slimming.graph.trace import eval_with_hooks
from job.slimming.inputs import call_network

if TYPE_CHECKING:
    from collections.abc import Iterable

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.inputs import Example

    # images (B, C, H, W), or a pair of what the network takes and labels (B,), or None for those
    Batch = torch.Tensor | tuple[Example, torch.Tensor | None]

MOST, LEAST = 4096, 512  # samples that moments are measured on: more change little
PIXELS = MOST * 64**2  # of them, those of a channel: of large ones fewer tell as much
RIDGE = 1e-3  # added to the covariances of a least-squares fit, relative to the mean variance
MOST_VALUES = 2**24  # of one batch in front of one layer: 128 MiB in float64
MOST_PRODUCTS = 2**33  # of one batch in front of one layer: a second or so


@dataclass(frozen=True)
class Reader:
    """A convolution or linear layer that sums over ``channels`` (C,), by their numbers.

    Each is ``places`` consecutive columns of a linear layer behind a flatten, else one. Only those
    in the same one of ``groups`` meet.
    """

    layer: str
    channels: Ids
    places: int
    groups: int

    def weight(self, network: nn.Module) -> torch.Tensor:
        """Its weight as (outputs, C / groups, kernel or places) float64 on the CPU."""
        weight = network.get_submodule(self.layer).get_parameter("weight").detach()
        wide: torch.Tensor = weight.cpu().double()
        return wide.reshape(len(wide), len(self.channels) // self.groups, -1)


@dataclass(frozen=True)
class Moments:
    """``mean`` (C,) and ``covariance`` (C, C) float64 on the CPU of ``count`` readings."""

    count: int
    mean: torch.Tensor
    covariance: torch.Tensor


def samples_at(size: int) -> int:
    """How many images of ``size`` pixels are measured, if there are as many."""
    return max(LEAST, min(MOST, PIXELS // max(1, size) ** 2))


def readers(network: nn.Module, graph: ChannelGraph) -> list[Reader]:
    """The layers that sum over channels which may be cut.

    Bare parameters are left out, and weights that several layers share.
    """
    layers = modules_of(network, once=True).values()
    often = Counter(id(m.weight) for m in layers if isinstance(m, (*CONVOLUTIONS, nn.Linear)))
    found = []
    for position in graph.slots:
        if position.side != "in" or not position.ids.any():
            continue
        try:
            layer = network.get_submodule(position.layer)
        except AttributeError:  # a parameter that no known layer owns: its inputs are not seen
            continue
        if often[id(layer.weight)] > 1:
            continue
        places = _places(position.ids) if isinstance(layer, nn.Linear) else 1
        groups = int(getattr(layer, "groups", 1))
        found.append(Reader(position.layer, position.ids[::places], places, groups))
    return found


def _places(ids: Ids) -> int:
    """The largest length of consecutive columns that never belong to two channels."""
    bounds = np.flatnonzero(np.diff(ids)) + 1
    return math.gcd(len(ids), *bounds.tolist())


def inputs_of(batch: Batch) -> Example:
    """What the network takes of a batch, with or without labels."""
    return batch if isinstance(batch, torch.Tensor) else batch[0]


def collect(
    network: nn.Module, graph: ChannelGraph, batches: Iterable[Batch]
) -> dict[str, Moments]:
    """The moments in front of every reader that ran, by layer, over the batches of all processes.

    Each process brings its own batches, maybe none. Of large feature maps evenly spread places
    count, else all. Raises DataError when activations are not finite.
    """
    sums = {reader.layer: (reader, _sums(network, reader)) for reader in readers(network, graph)}

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], name: str) -> None:
        reader, own = sums[name]
        own.add(rows_of(values_of(layer, inputs[0], reader), len(reader.channels)))

    hooks = [(network.get_submodule(name), partial(hook, name=name)) for name in sums]
    with eval_with_hooks(network, hooks):
        for batch in batches:
            call_network(network, inputs_of(batch))
    found = {name: own.result(name) for name, (_, own) in sums.items()}
    return {name: moments for name, moments in found.items() if moments.count}


def _sums(network: nn.Module, reader: Reader) -> Sums:
    weight = network.get_submodule(reader.layer).get_parameter("weight")
    size = len(reader.channels)
    return Sums(size, size, weight.device)


class Sums:
    """Running moments of ``size`` columns in float64, around the mean so far.

    Covariances are those of the first ``left`` columns with all.
    """

    def __init__(self, left: int, size: int, device: torch.device) -> None:
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.scatter = self.mean.new_zeros(left, size)
        self.left, self.count = left, 0

    def add(self, rows: torch.Tensor) -> None:
        """Add readings (N, size)."""
        rows = rows.double()
        if not len(rows):
            return
        mean = rows.mean(0)
        centred, apart = rows - mean, mean - self.mean
        count = self.count + len(rows)
        self.scatter.addmm_(centred[:, : self.left].T, centred)
        self.scatter.addr_(apart[: self.left], apart, alpha=self.count * len(rows) / count)
        self.mean.add_(apart, alpha=len(rows) / count)
        self.count = count

    def result(self, name: str) -> Moments:
        """The moments over all processes (Chan et al. 1982); raises DataError if not finite."""
        count = int(total(self.mean.new_tensor(float(self.count))))
        mean = total(self.mean * self.count) / max(1, count)
        apart = self.mean - mean
        scatter = total(self.scatter.addr(apart[: self.left], apart, alpha=self.count))
        if not bool(scatter.isfinite().all()):
            raise DataError(f"what {name} reads of the calibration images is not finite")
        return Moments(count, mean.cpu(), (scatter / max(1, count)).cpu())


def values_of(layer: nn.Module, values: torch.Tensor, reader: Reader) -> torch.Tensor:
    """What ``layer`` reads, as (B, C, places of each channel)."""
    if isinstance(layer, nn.Linear):
        return values.reshape(-1, values.shape[-1] // reader.places, reader.places)
    return _read(layer, values).flatten(2)


def _read(layer: Any, values: torch.Tensor) -> torch.Tensor:
    """(B, C, …) without the places that a strided 1 x 1 convolution steps over."""
    if set(layer.kernel_size) != {1} or layer.padding not in ("valid", (0,) * (values.dim() - 2)):
        return values
    for axis, stride in enumerate(layer.stride, 2):
        places = torch.arange(0, values.shape[axis], stride, device=values.device)
        values = values.index_select(axis, places) if stride > 1 else values
    return values


def rows_of(values: torch.Tensor, width: int) -> torch.Tensor:
    """(B, C, P) -> (N, C): all B * P places, or as many as are cheap, each of the P as often.

    Cheap for ``width`` columns.
    """
    size, channels, places = values.shape
    most = max(1, min(MOST_VALUES // width, MOST_PRODUCTS // width**2))
    step = -(-size * places // most)
    rows = values.transpose(1, 2)
    if step <= 1:
        return rows.reshape(-1, channels)
    while math.gcd(step, places) > 1:  # else it would only ever see some columns of the pictures
        step += 1
    chosen = torch.arange(0, size * places, step, device=values.device)
    return rows[chosen // places, chosen % places]
