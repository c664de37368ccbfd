"""Channel labels of activations.

The labels of an activation are an int64 tensor that broadcasts to its shape. They give the element,
i.e. the number of the channel, that each value comes from. Labels have size 1 along every axis on
which they do not depend.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from job.slimming.graph.trace import Op
    from job.slimming.graph.union import Ids

    LabelsOf = Callable[[torch.Tensor], torch.Tensor | None]

MAX_ENTRIES = 1 << 25  # of labels expanded to the full shape


def label_axes(labels: torch.Tensor) -> list[int]:
    """Return the axes on which ``labels`` depend."""
    return [axis for axis, size in enumerate(labels.shape) if size > 1]


def flat_ids(labels: torch.Tensor) -> Ids:
    """Return ``labels`` as a flat array of elements."""
    ids: Ids = labels.reshape(-1).numpy()
    return ids


def labels_along(ids: Ids, axis: int, dims: int) -> torch.Tensor:
    """Return labels with ``dims`` axes that are ``ids`` along ``axis``."""
    shape = [1] * dims
    shape[axis] = len(ids)
    return torch.from_numpy(np.ascontiguousarray(ids)).reshape(shape)


def compact(labels: torch.Tensor) -> torch.Tensor:
    """Reduce labels to size 1 along every axis on which they do not depend."""
    for axis in label_axes(labels):
        first, last = labels.narrow(axis, 0, 1), labels.narrow(axis, -1, 1)
        if labels.stride(axis) == 0 or (
            torch.equal(first, last) and bool((labels == first).all())  # usually only the first
        ):
            labels = first
    return labels


def reshape_labels(
    labels: torch.Tensor, before: torch.Size, after: torch.Size
) -> tuple[torch.Tensor, bool] | None:
    """Return the labels of an activation that is reshaped from ``before`` to ``after``.

    Also returns whether an axis of channels is split. Returns None if channels are mixed.
    """
    channel_axes = label_axes(labels)
    if not channel_axes:
        return labels.reshape([1] * len(after)), False
    first, last = channel_axes[0], channel_axes[-1] + 1
    if any(before[axis] != labels.shape[axis] for axis in range(first, last)):
        labels = labels.expand(*labels.shape[:first], *before[first:last], *labels.shape[last:])
    start = _leading_axes(after, math.prod(before[:first]))
    if start is None:
        return _merged_with_earlier(labels, before, after, last)
    size = math.prod(before[first:last])
    rest = len(after) - start
    width = _leading_axes(after[start:], size)
    if width is not None:
        shape = [1] * start + list(after[start : start + width]) + [1] * (rest - width)
        outcome = compact(labels.reshape(shape))
        return outcome, len(label_axes(outcome)) > len(channel_axes)
    if rest and after[start] % size == 0:  # channels are merged with the axes after them
        repeated = labels.reshape(-1).repeat_interleave(after[start] // size)
        return repeated.reshape([1] * start + [-1] + [1] * (rest - 1)), False
    return _moved_with_samples(labels, before, after)


def _merged_with_earlier(
    labels: torch.Tensor, before: torch.Size, after: torch.Size, last: int
) -> tuple[torch.Tensor, bool] | None:
    """Return the labels where channels are merged with axes before them, as in Swin's merging."""
    end, flat = _leading_axes(after, math.prod(before[:last])), labels.reshape(-1)
    if not end or after[end - 1] % len(flat):
        return _moved_with_samples(labels, before, after)
    tiled = flat.repeat(after[end - 1] // len(flat))
    return tiled.reshape([1] * (end - 1) + [-1] + [1] * (len(after) - end)), False


def _moved_with_samples(
    labels: torch.Tensor, before: torch.Size, after: torch.Size
) -> tuple[torch.Tensor, bool] | None:
    """Return the labels of every value, e.g. where samples and heads become one axis."""
    if math.prod(before) > MAX_ENTRIES:
        return None
    return compact(labels.expand(before).reshape(after)), False


def _leading_axes(shape: torch.Size, product: int) -> int | None:
    """Return how many leading axes of ``shape`` multiply to ``product``, or None."""
    size_so_far = 1
    for number, size in enumerate(shape):
        if size_so_far == product:
            return number
        size_so_far *= size
    return len(shape) if size_so_far == product else None


# ops of complex numbers, as they move labels
OF_COMPLEX: dict[str, Callable[..., Any]] = {
    "view_as_complex": lambda pairs: pairs.select(-1, 0),
    "view_as_real": lambda numbers: numbers[..., None].expand(*numbers.shape, 2),
}


def run_on_labels(
    op: Op,
    labels_of: LabelsOf,
    function: Callable[..., Any] | None = None,
    *,
    any_index: bool = False,
) -> list[torch.Tensor] | None:
    """Return the labels of the results of an op that only moves data, by running it on labels.

    ``function`` replaces the function of the op, with the same arguments. With ``any_index``, the
    first entry stands for those that an index without values selects. Returns None on failure.
    """

    def expanded(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            labels = labels_of(value)
            if labels is None and not value.is_floating_point():
                if not value.is_meta:
                    return value
                if not any_index:
                    raise TypeError("an index without values")
                return torch.zeros(value.shape, dtype=value.dtype)
            if labels is None:
                labels = torch.zeros([1] * value.dim(), dtype=torch.int64)
            return labels.expand(value.shape)
        if isinstance(value, (tuple, list)):
            return type(value)(map(expanded, value))
        return value

    if sum(result.numel() for result in op.results) > MAX_ENTRIES:
        return None
    try:
        kwargs = {key: expanded(value) for key, value in op.kwargs.items()}
        function = function or OF_COMPLEX.get(op.name, op.function)
        outcome = function(*expanded(op.args), **kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError):
        return None
    outcomes = [outcome] if isinstance(outcome, torch.Tensor) else list(outcome)
    return [compact(labels) for labels in outcomes]


def cat_labels(parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor | None:
    """Return the labels of a concatenation along ``axis``.

    Returns None if parts have labels along other axes, unless all have them along ``axis`` too, as
    the halves of heads do.
    """
    axes = {frozenset(label_axes(part)) for part in parts}
    halves = len(axes) == 1 and all(axis in part and parts[0].stride(axis) for part in axes)
    plain = {part - {axis} for part in axes} == {frozenset()}
    return torch.cat(list(parts), axis) if halves or plain else None
