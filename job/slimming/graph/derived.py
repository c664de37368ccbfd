"""Tensors that are computed from parameters and buffers, such as ``scale.view(1, -1, 1, 1)``.

The *sources* of such a tensor are the parameters that it is computed from, each with indices: an
int64 tensor that broadcasts to its shape, with the flat index of the parameter value that each of
its values comes from. Where the tensor is combined with channels, its sources give the axis of the
parameter that the channels are along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from job.slimming.graph.channel_labels import compact, flat_ids, run_on_labels

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from job.slimming.graph.trace import Op, Trace
    from job.slimming.graph.union import Ids

MAX_FOLLOWED_VALUES = 1 << 20  # of a parameter


@dataclass(frozen=True)
class Source:
    """Parameter ``name`` of ``shape``, and the flat ``indices`` of its values in a tensor."""

    name: str
    shape: torch.Size
    indices: torch.Tensor

    def ids_on_axis(self, labels: torch.Tensor) -> tuple[int, Ids] | None:
        """Return the axis of the parameter that ``labels`` are along, and the channels (N,) on it.

        None if the labels do not follow exactly one axis.
        """
        sizes = labels.shape, self.indices.shape
        shape = torch.broadcast_shapes(*sizes)  # type: ignore[no-untyped-call]
        elements, indices = flat_ids(labels.expand(shape)), flat_ids(self.indices.expand(shape))
        for axis, coordinates in enumerate(np.unravel_index(indices, tuple(self.shape))):
            ids = np.full(self.shape[axis], -1, np.int64)
            ids[coordinates] = elements
            if self.shape[axis] > 1 and (ids >= 0).all() and (ids[coordinates] == elements).all():
                return axis, ids
        return None


class DerivedValues:
    """Sources of the tensors in one trace that are computed from parameters alone.

    ``moving`` and ``pointwise`` are the names of the ops that move values, and of those that
    compute each value from the values at the same position.
    """

    def __init__(self, trace: Trace, moving: Collection[str], pointwise: Collection[str]) -> None:
        self.trace, self.moving, self.pointwise = trace, moving, pointwise
        self._sources: dict[int, tuple[Source, ...]] = {}

    def sources(self, tensor: torch.Tensor) -> tuple[Source, ...]:
        """Return the sources of a tensor; empty if it is not computed from parameters alone."""
        sources = self._sources.get(id(tensor))
        name = self.trace.name(tensor)
        if sources is None and name is not None and 0 < tensor.numel() <= MAX_FOLLOWED_VALUES:
            indices = torch.arange(tensor.numel()).reshape(tensor.shape)
            return (Source(name, tensor.shape, indices),)
        return sources or ()

    def derive(self, op: Op, inputs: tuple[torch.Tensor, ...]) -> bool:
        """Record the sources of the results of an op; return whether all have sources."""
        for result in op.results:
            self._sources.pop(id(result), None)
        if op.name in self.moving:
            sources = self._moved(op, inputs)
        elif op.name in self.pointwise and len(op.results) == 1:
            sources = [self._pointwise(op.results[0], inputs)]
        else:
            return False
        if not all(sources) or len(sources) != len(op.results):
            return False
        self._sources.update(zip(map(id, op.results), map(tuple, sources), strict=True))
        return True

    def _moved(self, op: Op, inputs: tuple[torch.Tensor, ...]) -> list[list[Source]]:
        if not inputs:
            return []
        moved: list[list[Source]] = [[] for _ in op.results]
        for source in self.sources(inputs[0]):
            indices: Mapping[int, torch.Tensor] = {id(inputs[0]): source.indices}
            outcomes = run_on_labels(op, lambda t, of=indices: of.get(id(t)))  # type: ignore[misc]
            if outcomes is None:
                return []
            for part, outcome in zip(moved, outcomes, strict=True):
                part.append(Source(source.name, source.shape, outcome))
        return moved

    def _pointwise(self, result: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> list[Source]:
        if sum(tensor.numel() > 1 and not self.sources(tensor) for tensor in inputs):
            return []
        return [
            Source(source.name, source.shape, compact(_with_axes(source.indices, result.dim())))
            for tensor in inputs
            for source in self.sources(tensor)
            if source.indices.dim() <= result.dim()
        ]


def _with_axes(indices: torch.Tensor, dims: int) -> torch.Tensor:
    return indices.reshape([1] * (dims - indices.dim()) + list(indices.shape))
