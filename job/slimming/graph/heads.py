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
import torch

from job.slimming.graph.channel_labels import flat_ids, label_axes
from job.slimming.graph.reasons import SCALE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from job.slimming.graph.trace import Op
    from job.slimming.graph.union import ChannelUnion, Ids

SUMS = frozenset("add add_ __add__ __iadd__ __radd__ sub sub_ __sub__ __isub__".split())
REAL = frozenset({torch.float32, torch.float64})
SCALINGS = frozenset(
    """mul mul_ multiply __mul__ __imul__ __rmul__ div div_ true_divide __truediv__
    __itruediv__""".split()
)


@dataclass
class HeadSplit:
    """Lines (R, D) of channels.

    If a view leaves their number open, ``whole`` lines are cut, unless their width is ``held`` by
    an attribute and attention uses them. ``streams`` are lines, or the same part of each, and other
    channels that the size of a view of theirs counts. ``normed`` lines are reduced one by one, as
    in norms of queries and keys.
    """

    lines: Ids
    whole: bool = False
    held: bool = False
    attended: bool = False
    mixed: bool = False
    normed: bool = False
    streams: list[tuple[Ids, Ids]] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Number of channels of a line."""
        return int(self.lines.shape[1])

    @property
    def key(self) -> bytes:
        """The lines as bytes."""
        return self.lines.tobytes() + bytes([self.width % 251])

    def count_with(self, stream: Ids, viewed: Ids, *, merged: bool) -> None:
        """Keep as many of the channels ``stream`` as of the channels ``viewed`` of the lines.

        They are those of one line or, if they are ``merged``, of several.
        """
        inside = np.isin(self.lines, viewed)
        alike = (inside == inside[0]).all()  # e.g. values in lines of queries, keys, and values
        lines = self.lines[:, inside[0]] if alike else self.lines
        width = lines.shape[1]
        fits = len(stream) % width == 0 and lines.size % len(stream) == 0
        if merged or (width < self.width and len(lines) > 1):
            fits = fits and len(stream) > width
        own = np.isin(stream, self.lines).any()
        if fits and not own and not any(np.array_equal(stream, s) for _, s in self.streams):
            self.streams.append((lines, stream))

    @property
    def narrows(self) -> bool:
        """Whether each line may lose different channels."""
        return self.attended and not self.mixed and (self.held or not self.whole)


class Heads:
    """Views that split channels, and the scales of attention that depend on their widths."""

    def __init__(self, normed: Collection[bytes]) -> None:
        self.normed = normed  # keys of lines that attention uses, and that are reduced
        self.splits: dict[bytes, HeadSplit] = {}
        self._numbers: list[Ids] = []  # arrays of the number of a split by element, -1 for none
        self._scores: dict[int, Ids] = {}  # queries by id of their products with keys
        self.scaled: list[Ids] = []  # queries or keys whose scale depends on their number
        self.keys: dict[bytes, Ids] = {}  # keys by their queries
        self.tables: list[Ids] = []  # channels that are summed over with those of a table
        self.biases: dict[str, list[str]] = {}  # parameters outside a layer that are its bias
        self.added: set[str] = set()  # parameters that are added to activations
        self.norms: list[tuple[Ids, list[str]]] = []  # channels and slots of LayerNorm, RMSNorm

    def begin_trace(self) -> None:
        """Forget the activations of another trace."""
        self._scores.clear()

    def add(self, lines: Ids, *, whole: bool = False, held: bool = False) -> HeadSplit:
        """Record the lines (R, D) of a view."""
        split = HeadSplit(lines, whole, held)
        if split.key not in self.splits:
            self._number(lines, len(self.splits))
            self.splits[split.key] = split
        return self.splits[split.key]

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

    def reduce_within(self, labels: torch.Tensor, axes: set[int]) -> bool:
        """Record a reduction over the channels of single lines.

        Returns whether attention is known to use them. Their number in each line then decreases,
        whereas the channels of other groups are only cut together.
        """
        channel_axes = label_axes(labels)
        if len(channel_axes) < 2 or axes & set(channel_axes) != {channel_axes[-1]}:
            return False
        if not self.keep_their_number(labels):
            return False
        splits = list(self.of(flat_ids(labels)))
        for split in splits:
            split.normed = True
        return all(split.key in self.normed for split in splits)

    def newly_normed(self) -> set[bytes]:
        """Return the keys of reduced lines that attention uses and ``normed`` does not contain."""
        found = {split.key for split in self.splits.values() if split.normed and split.attended}
        return found - set(self.normed)

    def are_cut_whole(self, labels: torch.Tensor) -> bool:
        """Return whether the channels of ``labels`` are cut as whole heads."""
        return any(split.whole and not split.held for split in self.of(flat_ids(labels)))

    def keep_their_number(self, labels: torch.Tensor) -> bool:
        """Return whether ``labels`` are of several heads of a view, none of which is cut whole."""
        splits = list(self.of(flat_ids(labels))) if len(label_axes(labels)) > 1 else []
        return bool(splits) and not self.are_cut_whole(labels)

    def check(self, labels: torch.Tensor) -> None:
        """Record the views whose lines are not whole and in order in the inputs of an op."""
        for split in self.of(flat_ids(labels)) if self.splits else ():
            if not split.whole or split.held:
                split.mixed = split.mixed or not _is_whole(labels, split.lines)

    def note_scores(self, result: torch.Tensor, queries: torch.Tensor) -> None:
        """Record that ``result`` has the products of ``queries`` with keys."""
        self._scores[id(result)] = flat_ids(queries)

    def follow_scores(self, op: Op) -> None:
        """Record that the result of an op on products of queries with keys has them too."""
        for tensor in op.inputs if self._scores else ():
            if (queries := self._scores.get(id(tensor))) is not None:
                self._scores.update((id(result), queries) for result in op.results)

    def note_norm(self, ids: Ids, slots: list[str]) -> None:
        """Record a norm over the channels ``ids`` (n,) whose parameters have the ``slots``."""
        self.norms.append((ids, list(dict.fromkeys(slots))))

    def note_scale(self, op: Op, labels: torch.Tensor | None) -> None:
        """Record a scale 1/sqrt(D) that is computed from the width D in each pass.

        ``labels`` are the labels of the scaled tensor.
        """
        number = next((arg for arg in op.args if type(arg) is float), None)
        if number is None:  # torch.sqrt(torch.tensor(width))
            values = (t for t in op.inputs[1:] if not t.dim() and t.dtype in REAL and not t.is_meta)
            number = next(map(float, values), None)
        if number is None or not op.inputs:
            return
        ids = self._scores.get(id(op.inputs[0])) if labels is None else flat_ids(labels)
        if ids is not None and self.is_computed(op, number, ids):
            self.scaled.append(ids)

    def is_computed(self, op: Op, scale: float, ids: Ids) -> bool:
        """Return whether ``scale`` is computed from a width rather than read from an attribute."""
        widths = {int(np.isin(split.lines, ids).sum(1).max()) for split in self.of(ids)}
        widths = widths or {len(np.unique(ids))}  # one head, without a view
        roots = [root for width in widths for root in (width**0.5, width**-0.5)]
        if not any(math.isclose(scale, root, rel_tol=1e-6) for root in roots):
            return False
        return not any(
            type(value) is float and value == scale for value in op.caller.numbers.values()
        )

    def end(self, union: ChannelUnion) -> None:
        """Add the lines to ``union``."""
        for split in self.splits.values():
            if split.narrows:
                union.heads.append(split.lines)
                union.heads += [_stacked(lines, stream) for lines, stream in split.streams]
            else:
                together = split.lines.T if split.whole else split.lines
                for line in together[1:]:
                    union.unite(together[0], line)
                if split.attended and not split.whole:
                    union.heads += [_stacked(lines[:1], stream) for lines, stream in split.streams]
        self._tie_by_attributes(union)
        for ids in {ids.tobytes(): ids for ids in self.scaled}.values():
            if all(split.narrows or not split.whole for split in self.of(ids)):
                # the width of whole heads does not change
                self._add_scale(union, self._scalable(union, ids))

    def _scalable(self, union: ChannelUnion, queries: Ids) -> Ids:
        """Return the queries, or their keys if layers or tables read the queries too."""
        read = [slot.ids for slot in union.slots if slot.side == "in"] + self.tables
        keys = self.keys.get(queries.tobytes())
        return queries if keys is None or not any(np.isin(queries, r).any() for r in read) else keys

    def _add_scale(self, union: ChannelUnion, ids: Ids) -> None:
        """Record the rows of the layer that produces ``ids``, whose weights make up for a scale.

        Where a norm follows, which cancels any scale, they are those of its parameters.
        """
        slots = [s for s in union.slots if s.side == "through" and np.isin(ids, s.ids).any()]
        after = [names for others, names in self.norms if np.isin(ids, others).any()]
        if after:
            last = set(after[-1])
            alone = sum(bool(last & set(names)) for _, names in self.norms) == 1
            rows = [
                (slot.layer, slot.ids) for slot in slots if slot.layer in last and not slot.axis
            ]
            if not rows or not alone or after.count(after[-1]) > 1:
                return union.fix(ids, SCALE())
        else:
            rows = [(layer, made) for layer, made in union.producers if np.isin(ids, made).any()]
            if len(rows) != 1 or not np.isin(ids, rows[0][1]).all():
                return union.fix(ids, SCALE())
            added = self.added.union(self.biases.get(rows[0][0], ()))
            biases = [slot for slot in slots if slot.layer in added]
            if any(slot.axis is None and slot not in biases for slot in slots):  # not in a table
                return union.fix(ids, SCALE())
            rows += [(slot.layer, slot.ids) for slot in biases]
        ids = np.unique(ids)
        for layer, made in rows:
            union.scaled.append((layer, np.flatnonzero(np.isin(made, ids)), ids))
        return None

    def _tie_by_attributes(self, union: ChannelUnion) -> None:
        """Keep the same number of channels in the lines whose width is one attribute."""
        lines: dict[tuple[str, str], dict[bytes, Ids]] = {}
        for size in union.sizes:
            for split in self.of(size.ids) if size.place is None else ():
                fits = split.attended and (split.held or not split.whole)
                if fits and split.width == len(size.ids):
                    of_attribute = lines.setdefault((size.module, size.attribute), {})
                    of_attribute[split.lines.tobytes()] = split.lines[0]
        union.heads += [np.stack(list(same.values())) for same in lines.values() if len(same) > 1]


def _stacked(lines: Ids, stream: Ids) -> Ids:
    return np.concatenate([lines, stream.reshape(-1, lines.shape[1])])


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


def fixed_size(op: Op, result_axis: int, dims: int, *, splits: bool) -> int | None:
    """Return the number that a view gives an axis; None if it is open or an attribute.

    If the view ``splits`` channels, it may also be two or three times an attribute.
    """
    sizes = op.view_sizes
    if len(sizes) != dims or op.module is None:
        return None
    size = sizes[result_axis]
    numbers = [value for value in op.caller.numbers.values() if type(value) is int]
    held = size in numbers or (splits and any(is_part_of(n, size, sizes) for n in numbers))
    return None if size == -1 or held else int(size)


def is_part_of(value: int, size: int, sizes: Sequence[Any]) -> bool:
    """Return whether ``value`` may be the width of queries in a view to its double or triple."""
    return value > 1 and size in (2 * value, 3 * value) and value not in sizes
