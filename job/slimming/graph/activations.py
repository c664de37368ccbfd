"""Activations of one pass and the elements in them, and where elements stand in layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from job.slimming.graph.channel_labels import along, axes, plain
from job.slimming.graph.layers import BATCHNORM, LAYER_TYPES, modules_of
from job.slimming.graph.union import ChannelSlot, Flow, Ids, Side

if TYPE_CHECKING:
    from job.slimming.graph.trace import Op, Trace


class Activations:
    """Labels of the activations of ``trace``; what is found out goes into ``flow``."""

    trace: Trace
    counting: bool  # it is the main pass
    often: bool  # the op's result is used more than once
    wide: bool  # so is what it comes from

    def __init__(self, network: nn.Module) -> None:
        self.network, self.flow = network, Flow()
        self.modules = modules_of(network)
        self.twins = _twins(network)
        self.slots: dict[tuple[str, Side], ChannelSlot] = {}
        self.labels: dict[int, torch.Tensor] = {}  # by id of the activation
        self.bounds: dict[bytes, tuple[Ids, set[int]]] = {}  # of slices, by the channels sliced
        self.shared: set[int] = set()  # activations whose elements go more than one way
        self.known: dict[int, torch.Tensor] = {}  # labels of which not all are FIXED, by their id
        self.lines: dict[int, tuple[int, Ids]] = {}  # the axis and the elements of some of those

    def of(self, tensor: Any) -> torch.Tensor | None:
        """The labels of an activation; None where nothing in it can be cut."""
        return self.labels.get(id(tensor)) if isinstance(tensor, torch.Tensor) else None

    def ids(self, tensor: torch.Tensor, axis: int) -> Ids | None:
        """Elements along ``axis``; None when they depend on another one too."""
        axis %= tensor.dim()
        found = self.of(tensor)
        if found is None:
            return np.zeros(tensor.shape[axis], np.int64)
        if id(found) in self.lines and self.lines[id(found)][0] == axis:
            return self.lines[id(found)][1]
        if set(axes(found)) - {axis}:
            return None
        ids: Ids = found.reshape(-1).expand(tensor.shape[axis]).numpy()
        self.lines[id(found)] = axis, ids
        return ids

    def set(self, tensor: torch.Tensor, labels: torch.Tensor, *, shared: bool) -> None:
        """Give a result its labels."""
        self.labels.pop(id(tensor), None)
        self.shared.discard(id(tensor))
        if id(labels) in self.known or bool(labels.any()):  # other than FIXED
            self.labels[id(tensor)] = self.known[id(labels)] = labels
            if shared:
                self.shared.add(id(tensor))

    def lay(self, tensor: torch.Tensor, ids: Ids, axis: int, *, shared: bool) -> None:
        """Give a result the elements ``ids`` along ``axis``."""
        labels = along(ids, axis, tensor.dim())
        if ids.any():
            self.known[id(labels)] = labels
            self.lines[id(labels)] = axis, ids
        self.set(tensor, labels, shared=shared)

    def fix(self, tensor: torch.Tensor, reason: str) -> None:
        """Never cut what an activation comes from."""
        found = self.of(tensor)
        if found is not None:
            self.flow.fix(plain(found), reason if self.counting else f"{reason} (in train mode)")

    def forget(self, op: Op) -> None:
        """Results that nothing can be cut from."""
        for result in op.results():
            self.labels.pop(id(result), None)

    def give_up(self, op: Op, reason: str) -> None:
        """Leave alone all that an op touches."""
        self.flow.doubtful = True
        for tensor in op.inputs():
            self.fix(tensor, reason)
        self.forget(op)

    def note(self, name: str, side: Side, ids: Ids, times: int = 0) -> None:
        """A position of the parameter ``name``; of what is used twice they are tied."""
        layer, _, parameter = name.rpartition(".")
        bare = not (isinstance(self.modules[layer], LAYER_TYPES) and parameter == "weight")
        where = name if bare else layer
        if (where, side) in self.slots:
            return self.flow.tie(self.slots[where, side].ids, ids)
        for alike in (where, *self.twins.get(where, ())):
            position = ChannelSlot(alike, side, ids, times)
            self.slots[alike, side] = position
            self.flow.slots.append(position)
        if bare:
            self.flow.suspects.append((f"the parameter {where}", ids))
        return None


def _twins(network: nn.Module) -> dict[str, list[str]]:
    """By the first layer that has a weight: other convolutions and linear layers that share it."""
    first: dict[int, str] = {}
    twins: dict[str, list[str]] = {}
    for name, layer in modules_of(network, once=True).items():
        if isinstance(layer, LAYER_TYPES) and not isinstance(layer, BATCHNORM):
            known = first.setdefault(id(layer.weight), name)
            if known != name:
                twins.setdefault(known, []).append(name)
    return twins
