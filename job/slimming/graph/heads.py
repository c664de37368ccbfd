"""Heads of attention: views that split channels into heads, which keep the same number each.

In ``x.view(B, N, heads, width)`` the channels of one head are a *line*. If attention uses the
view, each line may lose different channels, provided that all keep the same number and that no op
combines channels at the same index of different lines. Other views keep the same indices in all
lines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from job.slimming.graph.channel_labels import flat_ids, label_axes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from job.slimming.graph.trace import Op
    from job.slimming.graph.union import ChannelUnion, Ids

SCALINGS = frozenset(
    """mul mul_ multiply __mul__ __imul__ __rmul__ div div_ true_divide __truediv__
    __itruediv__""".split()
)
NOT_LINEAR = "the scale of attention depends on the number of channels after a norm"


@dataclass
class HeadSplit:
    """Lines (R, D) of channels.

    If a view leaves their number open, ``whole`` lines are cut, unless their width is ``held`` by
    an attribute and attention uses them. ``streams`` are other channels that the size of the view
    counts.
    """

    lines: Ids
    whole: bool = False
    held: bool = False
    attended: bool = False
    mixed: bool = False
    streams: list[Ids] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Number of channels of a line."""
        return int(self.lines.shape[1])

    def count_with(self, stream: Ids, *, whole: bool) -> None:
        """Keep as many of the channels ``stream`` as of all lines, or of a part of them."""
        fits = len(stream) % self.width == 0 and self.lines.size % len(stream) == 0
        if whole:
            fits = fits and len(stream) > self.width
        own = np.isin(stream, self.lines).any()
        if fits and not own and not any(np.array_equal(stream, s) for s in self.streams):
            self.streams.append(stream)

    @property
    def narrows(self) -> bool:
        """Whether each line may lose different channels."""
        return self.attended and not self.mixed and (self.held or not self.whole)


class Heads:
    """Views that split channels, and the scales of attention that depend on their widths."""

    def __init__(self) -> None:
        self.splits: dict[bytes, HeadSplit] = {}
        self._numbers: list[Ids] = []  # arrays of the number of a split by element, -1 for none
        self._scores: dict[int, Ids] = {}  # queries by id of their products with keys
        self.scaled: list[Ids] = []  # queries or keys whose scale depends on their number

    def begin_trace(self) -> None:
        """Forget the activations of another trace."""
        self._scores.clear()

    def add(self, lines: Ids, *, whole: bool = False, held: bool = False) -> HeadSplit:
        """Record the lines (R, D) of a view."""
        key = lines.tobytes() + bytes([lines.shape[1] % 251])
        if key not in self.splits:
            self._number(lines, len(self.splits))
            self.splits[key] = HeadSplit(lines, whole, held)
        return self.splits[key]

    def _number(self, lines: Ids, number: int) -> None:
        size = int(lines.max()) + 1
        for place, numbers in enumerate(self._numbers):
            if len(numbers) < size:
                more = np.full(size - len(numbers), -1)
                numbers = self._numbers[place] = np.concatenate([numbers, more])
            if (numbers[lines] < 0).all():
                numbers[lines] = number
                return
        self._numbers.append(np.full(size, -1))
        self._numbers[-1][lines] = number

    def of(self, ids: Ids) -> Iterator[HeadSplit]:
        """Yield the views that split some of the elements ``ids``."""
        splits = list(self.splits.values())
        for numbers in self._numbers:
            known = ids[ids < len(numbers)]
            yield from (splits[n] for n in np.unique(numbers[known]) if n >= 0)

    def attend(self, labels: torch.Tensor) -> None:
        """Record that attention uses the channels of ``labels``."""
        for split in self.of(flat_ids(labels)):
            split.attended = True

    def are_cut_whole(self, labels: torch.Tensor) -> bool:
        """Return whether the channels of ``labels`` are cut as whole heads."""
        return any(split.whole and not split.held for split in self.of(flat_ids(labels)))

    def check(self, labels: torch.Tensor) -> None:
        """Record the views whose lines are not whole and in order in the inputs of an op."""
        for split in self.of(flat_ids(labels)) if self.splits else ():
            if not split.whole or split.held:
                split.mixed = split.mixed or not _is_whole(labels, split.lines)

    def note_scores(self, result: torch.Tensor, queries: torch.Tensor) -> None:
        """Record that ``result`` has the products of ``queries`` with keys."""
        self._scores[id(result)] = flat_ids(queries)

    def note_scale(self, op: Op, labels: torch.Tensor | None) -> None:
        """Record a scale 1/sqrt(D) that is computed from the width D in each pass.

        ``labels`` are the labels of the scaled tensor.
        """
        number = next((arg for arg in op.args if type(arg) is float), None)
        if number is None or not op.inputs:
            return
        ids = self._scores.get(id(op.inputs[0])) if labels is None else flat_ids(labels)
        if ids is not None and self.is_computed(op, number, ids):
            self.scaled.append(ids)

    def is_computed(self, op: Op, scale: float, ids: Ids) -> bool:
        """Return whether ``scale`` is computed from a width rather than read from an attribute."""
        widths = {split.width for split in self.of(ids)}
        roots = [root for width in widths for root in (width**0.5, width**-0.5)]
        if not any(math.isclose(scale, root, rel_tol=1e-6) for root in roots):
            return False
        values = [vars(op.module).get(name) for name in op.names_used] if op.module else []
        return not any(type(value) is float and value == scale for value in values)

    def end(self, union: ChannelUnion) -> None:
        """Add the lines to ``union``."""
        for split in self.splits.values():
            if split.narrows:
                streams = [stream.reshape(-1, split.width) for stream in split.streams]
                union.heads.append(np.concatenate([split.lines, *streams]))
            else:
                together = split.lines.T if split.whole else split.lines
                for line in together[1:]:
                    union.unite(together[0], line)
        for ids in {ids.tobytes(): ids for ids in self.scaled}.values():
            if all(split.narrows or not split.whole for split in self.of(ids)):
                _add_scale(union, ids)  # the width of whole heads does not change


def _add_scale(union: ChannelUnion, ids: Ids) -> None:
    """Record the rows of the layer that produces ``ids``, whose weights make up for a scale."""
    passing = (s for s in union.slots if s.side == "through" and np.isin(ids, s.ids).any())
    layers = [(layer, made) for layer, made in union.producers if np.isin(ids, made).any()]
    if next(passing, None) is not None or len(layers) != 1 or not np.isin(ids, layers[0][1]).all():
        return union.fix(ids, NOT_LINEAR)
    layer, made = layers[0]
    ids = np.unique(ids)
    union.scaled.append((layer, np.flatnonzero(np.isin(made, ids)), ids))
    return None


def _is_whole(labels: torch.Tensor, lines: Ids) -> bool:
    """Return whether ``labels`` have whole lines, in order, along one axis."""
    width = lines.shape[1]
    if width == 1:
        return True
    row, column = (np.full(int(max(lines.max(), labels.max())) + 1, -1) for _ in range(2))
    row[lines], column[lines] = np.arange(len(lines))[:, None], np.arange(width)
    for axis in label_axes(labels):
        if labels.shape[axis] % width:
            continue
        parts = labels.movedim(axis, -1).reshape(-1, width).numpy()
        parts = parts[(row[parts] >= 0).any(1)]
        if (column[parts] == np.arange(width)).all() and (row[parts] == row[parts[:, :1]]).all():
            return True
    return False


def fixed_size(op: Op, result_axis: int, dims: int) -> int | None:
    """Return the number that a view gives an axis; None if it is open or an attribute."""
    sizes: Any = op.args[1:]
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    if op.name not in ("view", "reshape") or len(sizes) != dims or op.module is None:
        return None
    size = sizes[result_axis]
    held = any(vars(op.module).get(name) == size for name in op.names_used)
    return None if size == -1 or held else int(size)
