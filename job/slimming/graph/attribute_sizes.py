"""Attributes of modules that count channels, and that their code passes to ops.

``x.split((self.c, self.c), 1)`` is valid for the current number of channels only, unless the
attribute ``c`` of the narrow network is set to the number of kept channels. Candidates are the
attributes that the calling method names and that equal the number in the op.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from job.slimming.graph.channel_labels import flat_ids, label_axes
from job.slimming.graph.heads import is_part_of
from job.slimming.graph.union import FIXED, AttributeSize

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    import torch
    from torch import nn

    from job.slimming.graph.trace import Op, SizeRead
    from job.slimming.graph.union import Ids

# names of numbers of heads, unlike those of their widths: head_dim, dim_head, head_size
COUNTS_HEADS = re.compile(r"heads|^(n|num|nb)?_?head$|^h$")
MANY = 2**20  # no layer has so many channels
Sized = tuple[Any, "Ids"]  # an argument of an op, and the elements that it may count


def attribute_sizes(
    op: Op,
    module: str,
    named: Mapping[str, Any],
    before: torch.Tensor,
    after: Sequence[torch.Tensor],
) -> Iterator[AttributeSize]:
    """Yield the attributes of a module, named ``module``, that count channels in ``op``.

    ``named`` are the numbers among them that the calling method names. ``before`` are the labels of
    the input, ``after`` those of the results.
    """
    numbers = [(n, ids) for n, ids in _numbers(op, before, after) if n == len(ids) and n > 1]
    whole, sizes = flat_ids(before), op.view_sizes
    heads = [n for n, _ in numbers if list(sizes).count(n) > 1]  # as many as each has channels
    named = {a: n for a, n in named.items() if n not in heads or not COUNTS_HEADS.search(a)}
    counted = any(type(value) is int and value == n for value in named.values() for n, _ in numbers)
    for attribute, value in named.items():
        if type(value) is int and value == len(whole):  # e.g. halves of this number
            yield AttributeSize(module, attribute, None, whole)
        elif type(value) is int:
            yield from (
                AttributeSize(module, attribute, None, ids) for n, ids in numbers if n == value
            )
            if not counted and len(label_axes(after[0])) > 1:
                yield from (
                    AttributeSize(module, attribute, None, ids[:value])
                    for n, ids in numbers
                    if is_part_of(value, n, sizes)
                )
        elif isinstance(value, (tuple, list)) and list(value) == [n for n, _ in numbers]:
            for place, (_, ids) in enumerate(numbers):
                yield AttributeSize(module, attribute, place, ids)
        elif _are_counts(value):
            for n, ids in numbers:  # e.g. self.widths[stage]
                if value.count(n) == 1:
                    yield AttributeSize(module, attribute, value.index(n), ids)


def sliced_by_attributes(op: Op, parts: Sequence[Ids]) -> bool:
    """Return whether attributes that its caller names are the sizes of all ``parts`` of a split.

    For a slice, they are its bounds.
    """
    sizes = [len(part) for part in parts]
    if op.name == "__getitem__":
        sizes = [bound for bound in _bounds(op) if bound]
    values = op.caller.numbers.values()
    lists = [list(value) for value in values if isinstance(value, (tuple, list))]
    return sizes in lists or (bool(sizes) and all(n in values for n in sizes))


def compared_sizes(
    read: SizeRead, module: str, ids: Ids, known: Collection[tuple[str, str]]
) -> Iterator[AttributeSize]:
    """Yield the attributes that equal a size that the code of ``module`` reads, but no op takes.

    ``ids`` are the channels that are read, ``known`` the modules and attributes that ops take.
    """
    for attribute, value in read.caller.numbers.items():
        if type(value) is int and value == len(ids) and (module, attribute) not in known:
            yield AttributeSize(module, attribute, None, ids, compared=True)


def compared_lists(reads: Sequence[tuple[SizeRead, Ids]], module: str) -> Iterator[AttributeSize]:
    """Yield the elements of lists that equal the sizes which a method of ``module`` reads in order.

    ``reads`` has one read of each tensor, with its channels; none if it has no axis of channels.
    """
    for attribute, value in reads[0][0].caller.numbers.items():
        if not _are_counts(value) or len(value) != len(reads):
            continue
        sizes = [(len(ids), n) for (_, ids), n in zip(reads, value, strict=True)]
        if any(size for size, _ in sizes) and all(size in (0, n) for size, n in sizes):
            for place, (_, ids) in enumerate(reads):
                ids = ids if len(ids) else np.full(value[place], FIXED, np.intp)
                yield AttributeSize(module, attribute, place, ids, compared=True)


def missing_elements(
    sizes: Iterable[AttributeSize], modules: Mapping[str, nn.Module]
) -> Iterator[AttributeSize]:
    """Yield the elements that keep their number, of lists of which ``sizes`` has some elements."""
    known: dict[tuple[str, str, bool], set[int]] = {}
    for size in sizes:
        if size.place is not None:
            known.setdefault((size.module, size.attribute, size.compared), set()).add(size.place)
    for (module, attribute, compared), places in known.items():
        for place, value in enumerate(vars(modules[module])[attribute]):
            if place not in places:
                fixed = np.full(value, FIXED, np.intp)
                yield AttributeSize(module, attribute, place, fixed, compared=compared)


def _are_counts(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(type(n) is int and 0 <= n < MANY for n in value)


def _numbers(op: Op, before: torch.Tensor, after: Sequence[torch.Tensor]) -> Iterator[Sized]:
    if op.name in ("split", "split_with_sizes"):
        sections = op.argument(1, "split_size_or_sections", op.kwargs.get("split_size"))
        axis = op.argument(2, "dim", 0) % before.dim()
        parts = [_along(labels, axis) for labels in after]  # of one head, if there are several
        each = [sections] * len(parts) if isinstance(sections, int) else list(sections or ())
        yield from zip(each, parts, strict=False)
    elif op.name == "narrow":
        yield op.argument(3, "length"), flat_ids(after[0])
        yield op.argument(2, "start"), flat_ids(before)[: op.argument(2, "start")]
    elif op.name in ("__getitem__", "__setitem__"):
        for bound in _bounds(op, label_axes(before)):
            yield bound, flat_ids(before)[:bound]
    elif op.name in ("layer_norm", "rms_norm"):
        yield op.argument(1, "normalized_shape")[0], flat_ids(after[0])
    else:
        sizes = op.view_sizes
        if len(sizes) == after[0].dim():
            for axis in _cut_axes(after[0]):
                yield sizes[axis], _along(after[0], axis)


def _bounds(op: Op, axes: Collection[int] | None = None) -> Iterator[int]:
    """Yield the bounds of the slices of an index, by default along all axes."""
    index = op.args[1] if isinstance(op.args[1], tuple) else (op.args[1],)
    axis, rest = 0, sum(part is not None and part is not Ellipsis for part in index)
    for part in index:
        if part is Ellipsis:
            axis = op.args[0].dim() - rest
            continue
        along = part is not None and (axes is None or axis in axes)
        for bound in (part.start, part.stop) if along and isinstance(part, slice) else ():
            if isinstance(bound, int):
                yield bound
        if part is not None:
            axis, rest = axis + 1, rest - 1


def _cut_axes(labels: torch.Tensor) -> list[int]:
    """Return the axes of a view that lose channels: the size of groups, or the number of pairs."""
    axes = label_axes(labels)
    if len(axes) == 2 and labels.shape[axes[1]] == 2 < labels.shape[axes[0]]:
        return axes
    return axes[-1:]


def _along(labels: torch.Tensor, axis: int) -> Ids:
    """Return the labels along one axis, at index 0 of the other axes."""
    lines = labels.movedim(axis, -1).reshape(-1, labels.shape[axis])
    return np.ascontiguousarray(lines[0].numpy())
