"""Activations of one pass and the elements in them, and where elements stand in layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from job.slimming.flow import Flow, Ids, Position, Side
from job.slimming.labels import axes, plain

if TYPE_CHECKING:
    from job.slimming.record import Operation, Recording

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCHNORM = nn.modules.batchnorm._BatchNorm
LAYERS = (*CONVOLUTIONS, nn.Linear, BATCHNORM)


def owner(parameter: str) -> str:
    """The module that a parameter or module belongs to."""
    return parameter.rpartition(".")[0]


class Activations:
    """Labels of the activations of ``recording``; what is found out goes into ``flow``."""

    recording: Recording
    often: bool  # the operation's result is used more than once
    wide: bool  # so is what it comes from

    def __init__(self, network: nn.Module) -> None:
        self.network, self.flow = network, Flow()
        self.modules = dict(network.named_modules(remove_duplicate=False))
        self.positions: dict[tuple[str, Side], Position] = {}
        self.labels: dict[int, torch.Tensor] = {}  # by id of the activation
        self.shared: set[int] = set()  # activations whose elements go more than one way

    def of(self, tensor: Any) -> torch.Tensor | None:
        """The labels of an activation; None where nothing in it can be cut."""
        return self.labels.get(id(tensor)) if isinstance(tensor, torch.Tensor) else None

    def ids(self, tensor: torch.Tensor, axis: int) -> Ids | None:
        """Elements along ``axis``; None when they depend on another one too."""
        axis %= tensor.dim()
        found = self.of(tensor)
        if found is None:
            return np.zeros(tensor.shape[axis], np.int64)
        if set(axes(found)) - {axis}:
            return None
        ids: Ids = found.reshape(-1).expand(tensor.shape[axis]).numpy()
        return ids

    def set(self, tensor: torch.Tensor, labels: torch.Tensor, *, shared: bool) -> None:
        """Give a result its labels."""
        self.labels.pop(id(tensor), None)
        self.shared.discard(id(tensor))
        if bool(labels.any()):  # other than FIXED
            self.labels[id(tensor)] = labels
            if shared:
                self.shared.add(id(tensor))

    def fix(self, tensor: torch.Tensor, reason: str) -> None:
        """Never cut what an activation comes from."""
        found = self.of(tensor)
        if found is not None:
            self.flow.fix(plain(found), reason)

    def forget(self, op: Operation) -> None:
        """Results that nothing can be cut from."""
        for result in op.results():
            self.labels.pop(id(result), None)

    def give_up(self, op: Operation, reason: str) -> None:
        """Leave alone all that an operation touches."""
        self.flow.doubtful = True
        for tensor in op.inputs():
            self.fix(tensor, reason)
        self.forget(op)

    def note(self, op: Operation, name: str, side: Side, ids: Ids, times: int = 0) -> None:
        """A position, and that of the bias; of a layer that is used twice they are tied."""
        layer, _, parameter = name.rpartition(".")
        bare = not (isinstance(self.modules[layer], LAYERS) and parameter == "weight")
        key = (name if bare else layer), side
        if key in self.positions:
            return self.flow.tie(self.positions[key].ids, ids)
        names = [key[0]]
        bias = self.recording.name(op.argument(2, "bias")) if bare and side != "in" else None
        for where in [*names, *([bias] if bias else [])]:
            position = Position(where, side, ids, times)
            self.positions[where, side] = position
            self.flow.positions.append(position)
            if bare:
                self.flow.suspects.append((f"the parameter {where}", ids))
        return None
