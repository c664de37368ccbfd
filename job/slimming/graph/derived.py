"""Tensors that are computed from parameters and buffers, such as ``scale.view(1, -1, 1, 1)``.

The *sources* of such a tensor are the parameters that it is computed from, each with indices: an
int64 tensor that broadcasts to its shape, with the flat index of the parameter value that each of
its values comes from, or -1. Where pooling or interpolation combines several values, the index is
that of one of them. Where the tensor is combined with channels, its sources give the axis of the
parameter that the channels are along.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from job.slimming.graph.channel_labels import compact, flat_ids, label_axes, run_on_labels

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from job.slimming.graph.trace import Op, Trace
    from job.slimming.graph.union import Ids

ElementPairs = tuple["Ids", "Ids"]
OUTER = frozenset("outer ger".split())  # products of all values of two vectors
MAX_FOLLOWED_VALUES = 1 << 23  # of a parameter


@dataclass(frozen=True)
class Source:
    """Parameter ``name`` of ``shape``, and the flat ``indices`` of its values in a tensor.

    If ``reduced``, the values are statistics; each has the index of one of the values in it.
    """

    name: str
    shape: torch.Size
    indices: torch.Tensor
    reduced: bool = False

    def ids_on_axis(
        self, labels: torch.Tensor, last: bool = False
    ) -> tuple[int, Ids, ElementPairs] | None:
        """Return the axis of the parameter that ``labels`` are along, and the channels (N,) on it.

        If they are along several, as in a table (heads, width), the first counts, or the ``last``.

        The channel is -1 where the tensor does not use the parameter. Channels that use the same
        index, such as those of the two halves of a rotary embedding, are returned as pairs to
        unite. Returns None if the labels do not follow one axis.
        """
        sizes = labels.shape, self.indices.shape
        shape = torch.broadcast_shapes(*sizes)  # type: ignore[no-untyped-call]
        elements, indices = flat_ids(labels.expand(shape)), flat_ids(self.indices.expand(shape))
        elements, indices = elements[indices >= 0], indices[indices >= 0]
        found = []
        for axis in range(len(self.shape)):
            coordinates = self.along(indices, axis)
            ids = np.full(self.shape[axis], -1, np.int64)
            ids[coordinates] = elements
            others = ids[coordinates] != elements
            together = ids[coordinates][others], elements[others]
            if len(ids) > 1 and (not others.any() or _is_function(elements, coordinates)):
                found.append((bool((ids < 0).any()), bool(others.any()), axis, ids, together))
        if not found:
            return None
        turn = -1 if last else 1
        *_, axis, ids, together = min(found, key=lambda each: (*each[:2], turn * each[2]))
        return axis, ids, together

    def equals(self, other: Source) -> bool:
        """Return whether both are of the same parameter, with the same indices."""
        same = (self.name, self.reduced) == (other.name, other.reduced)
        return same and torch.equal(self.indices, other.indices)

    def along(self, indices: Ids, axis: int) -> Ids:
        """Return the index along ``axis`` of the parameter for each of its flat ``indices``."""
        later = math.prod(self.shape[axis + 1 :])
        rows: Ids = indices // later if later > 1 else indices
        return rows % self.shape[axis] if axis else rows  # NumPy divides faster than torch

    def labels(self, axis: int, ids: Ids) -> torch.Tensor:
        """Return the labels of the tensor, if ``ids`` (N,) are along ``axis`` of the parameter."""
        coordinates = self.along(self.indices.numpy(), axis)
        return compact(torch.from_numpy(np.where(self.indices < 0, 0, ids[coordinates])))


class ParameterView(NamedTuple):
    """An op that moves values of a parameter, which come from ``before`` and go to ``after``."""

    op: Op
    before: Source
    after: tuple[Source, ...]


@dataclass(frozen=True)
class RowStatistics:
    """Call number ``call`` of an op that takes statistics of ``source`` over ``axes``."""

    name: str
    call: int
    source: Source
    axes: tuple[int, ...]
    result_axis: bool


class DerivedValues:
    """Sources of the tensors in one trace that are computed from parameters alone.

    ``moving`` and ``pointwise`` are the names of the ops that move values, and of those that
    compute each value from the values at the same position.
    """

    def __init__(self, trace: Trace, moving: Collection[str], pointwise: Collection[str]) -> None:
        self.trace, self.moving, self.pointwise = trace, moving, pointwise
        self.row_statistics: dict[str, list[RowStatistics]] = {}  # of weights, until their use
        self.blanks: Mapping[int, Any] = {}  # ``Blank`` by id: tensors alike along some axes
        self._sources: dict[int, tuple[Source, ...]] = {}

    def sources(self, tensor: torch.Tensor) -> tuple[Source, ...]:
        """Return the sources of a tensor; empty if it is not computed from parameters alone."""
        sources = self._sources.get(id(tensor))
        name = self.trace.name(tensor)
        if sources is None and name is not None and 0 < tensor.numel() <= MAX_FOLLOWED_VALUES:
            indices = torch.arange(tensor.numel()).reshape(tensor.shape)
            return (Source(name, tensor.shape, indices),)
        return sources or ()

    def set_sources(self, tensor: torch.Tensor, sources: tuple[Source, ...]) -> None:
        """Record the sources of a tensor that another rule has followed."""
        self._sources[id(tensor)] = sources

    def drop(self, name: str) -> None:
        """Forget the tensors that are computed from a parameter; large ones take memory."""
        kept = {k: v for k, v in self._sources.items() if all(s.name != name for s in v)}
        self._sources = kept

    def derive(self, op: Op, inputs: tuple[torch.Tensor, ...]) -> bool:
        """Record the sources of the results of an op; return whether all have sources."""
        sources: list[list[Source]] = []
        if op.name in self.moving:
            sources = self._moved(op, inputs)
        elif op.name in OUTER or (op.name in self.pointwise and len(op.results) == 1):
            sources = [self._pointwise(op, inputs)]
        for result in op.results:  # which may be an input
            self._sources.pop(id(result), None)
        if not all(sources) or len(sources) != len(op.results):
            return False
        self._sources.update(zip(map(id, op.results), map(tuple, sources), strict=True))
        return True

    def _moved(self, op: Op, inputs: tuple[torch.Tensor, ...]) -> list[list[Source]]:
        inputs = tuple(t for t in inputs if t.is_floating_point() or t.is_complex())
        if not inputs or not all(map(self.sources, inputs)):
            return []
        moved: list[list[Source]] = [[] for _ in op.results]
        of_tensors = {id(t): _numbered(self.sources(t)) for t in inputs}
        kinds = {kind: source for of in of_tensors.values() for kind, source in of.items()}
        for kind, first in kinds.items():
            # from 1, since 0 stands for tensors without a value of this parameter
            indices = {k: of[kind].indices + 1 for k, of in of_tensors.items() if kind in of}
            outcomes = run_on_labels(
                op,
                lambda t, of=indices: of.get(id(t)),  # type: ignore[misc]
                any_index=True,
            )
            if outcomes is None:
                return []
            for part, outcome in zip(moved, outcomes, strict=True):
                part.append(replace(first, indices=outcome - 1))
        return moved

    def _pointwise(self, op: Op, inputs: tuple[torch.Tensor, ...]) -> list[Source]:
        dims = op.results[0].dim()
        columns = inputs[:1] if op.name in OUTER else ()
        sources: list[Source] = []
        others = []
        for tensor in inputs:
            column = any(tensor is each for each in columns)
            for source in self.sources(tensor):
                indices = source.indices[:, None] if column else source.indices
                if indices.dim() <= dims:
                    indices = _with_axes(indices, dims)
                    for axis in _resampled_axes(op):
                        indices = indices.narrow(axis, 0, 1)
                    of_result = replace(source, indices=compact(indices))
                    if not any(map(of_result.equals, sources)):
                        sources.append(of_result)
            if tensor.numel() > 1 and not self.sources(tensor):
                shape = self._shape(tensor) + (1,) * column
                others.append((1,) * (dims - len(shape)) + shape)
        axes = {axis for source in sources for axis in label_axes(source.indices)}
        alike = all(shape[axis] == 1 for shape in others for axis in axes)
        return sources if alike else []  # the other tensors may depend on the number of channels

    def _shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Return the shape of a tensor, with 1 for axes along which its values are alike."""
        blank = self.blanks.get(id(tensor))
        axes = blank.axes if blank else ()
        return tuple(1 if axis in axes else size for axis, size in enumerate(tensor.shape))


def _numbered(sources: tuple[Source, ...]) -> dict[tuple[str, bool, int], Source]:
    """Return the sources by parameter, whether they are reduced, and their number among these."""
    numbers: Counter[tuple[str, bool]] = Counter()
    numbered = {}
    for source in sources:
        kind = source.name, source.reduced
        numbered[*kind, numbers[kind]] = source
        numbers[kind] += 1
    return numbered


def _is_function(elements: Ids, coordinates: Ids) -> bool:
    """Return whether each of ``elements`` (n,), all to cut, is at one of the ``coordinates``."""
    place = np.zeros(int(elements.max()) + 1, np.int64)
    place[elements] = coordinates
    return bool(elements.all()) and bool((place[elements] == coordinates).all())


def _resampled_axes(op: Op) -> range:
    """Return the axes along which an op combines values; the first index stands for all."""
    dims = op.inputs[0].dim()
    if op.name in ("interpolate", "upsample"):
        return range(2, dims)
    pooling = re.search(r"pool(\d)d", op.name)
    return range(dims - int(pooling[1]), dims) if pooling else range(0)


def _with_axes(indices: torch.Tensor, dims: int) -> torch.Tensor:
    return indices.reshape([1] * (dims - indices.dim()) + list(indices.shape))
