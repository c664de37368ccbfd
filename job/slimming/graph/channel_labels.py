"""Labels of activations: int64 tensors of size 1 along every axis that they do not depend on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from job.slimming.graph.op_kinds import AXIS_AT

if TYPE_CHECKING:
    from collections.abc import Callable

    from job.slimming.graph.trace import Op
    from job.slimming.graph.union import Ids

MOST_ENTRIES = 1 << 25  # of labels that are laid out in full


def axes(labels: torch.Tensor) -> list[int]:
    """The axes that labels depend on."""
    return [axis for axis, size in enumerate(labels.shape) if size > 1]


def plain(labels: torch.Tensor) -> Ids:
    """Labels one after another."""
    ids: Ids = labels.reshape(-1).numpy()
    return ids


def along(ids: Ids, axis: int, dims: int) -> torch.Tensor:
    """Labels that depend on one axis of ``dims``."""
    shape = [1] * dims
    shape[axis] = len(ids)
    return torch.from_numpy(np.ascontiguousarray(ids)).reshape(shape)


def compact(labels: torch.Tensor) -> torch.Tensor:
    """Labels with size 1 along every axis that they do not depend on."""
    for axis in axes(labels):
        first = labels.narrow(axis, 0, 1)
        if labels.stride(axis) == 0 or bool((labels == first).all()):
            labels = first
    return labels


def axes_given(op: Op) -> set[int] | None:
    """The axes that a reduction, a softmax or the like works along; None where it does not say."""
    given = op.argument(AXIS_AT[op.name], "dim", op.kwargs.get("axis"))
    given = [given] if type(given) is int else given
    if not isinstance(given, (list, tuple)) or not given:
        return None
    dims = next(op.inputs()).dim()
    return {axis % dims for axis in given}


def reshaped(
    labels: torch.Tensor, before: torch.Size, after: torch.Size
) -> tuple[torch.Tensor, bool] | None:
    """Labels of a reshaped activation, and whether an axis of channels was split; None: mixed."""
    own = axes(labels)
    if not own:
        return labels.reshape([1] * len(after)), False
    first, last = own[0], own[-1] + 1
    if any(before[axis] != labels.shape[axis] for axis in range(first, last)):
        labels = labels.expand(*labels.shape[:first], *before[first:last], *labels.shape[last:])
    start = _prefix(after, math.prod(before[:first]))
    if start is None:
        return None
    size = math.prod(before[first:last])
    rest = len(after) - start
    width = _prefix(after[start:], size)
    if width is not None:
        shape = [1] * start + list(after[start : start + width]) + [1] * (rest - width)
        return labels.reshape(shape), width > last - first
    if rest and after[start] % size == 0:  # channels and what follows them become one axis
        repeated = labels.reshape(-1).repeat_interleave(after[start] // size)
        return repeated.reshape([1] * start + [-1] + [1] * (rest - 1)), False
    return None


def _prefix(shape: torch.Size, product: int) -> int | None:
    """How many leading axes of ``shape`` multiply to ``product``."""
    reached = 1
    for number, size in enumerate(shape):
        if reached == product:
            return number
        reached *= size
    return len(shape) if reached == product else None


def moved(op: Op, of: Callable[[torch.Tensor], torch.Tensor | None]) -> list[torch.Tensor] | None:
    """Labels of the results of an op that moves data: it is run on the labels."""

    def laid_out(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            found = of(value)
            if found is None and not value.is_floating_point():
                if value.is_meta:
                    raise TypeError("an index without values")
                return value
            if found is None:
                found = torch.zeros([1] * value.dim(), dtype=torch.int64)
            return found.expand(value.shape)
        if isinstance(value, (tuple, list)):
            return type(value)(map(laid_out, value))
        return value

    if op.name == "pad" and (unchanged := _padded_elsewhere(op, of)) is not None:
        return [unchanged]
    if sum(result.numel() for result in op.results()) > MOST_ENTRIES:
        return None
    try:
        if op.name == "pad":
            source = laid_out(op.argument(0, "input"))
            outcome = F.pad(source, op.argument(1, "pad"))
        else:
            kwargs = {key: laid_out(value) for key, value in op.kwargs.items()}
            outcome = op.function(*laid_out(op.args), **kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError):
        return None
    outcomes = [outcome] if isinstance(outcome, torch.Tensor) else list(outcome)
    return [compact(labels) for labels in outcomes]


def _padded_elsewhere(
    op: Op, of: Callable[[torch.Tensor], torch.Tensor | None]
) -> torch.Tensor | None:
    """Labels of what is padded along other axes than those of its channels."""
    image, pads = op.argument(0, "input"), op.argument(1, "pad")
    labels = of(image)
    touched = {image.dim() - 1 - place // 2 for place, size in enumerate(pads) if size}
    return None if labels is None or touched & set(axes(labels)) else labels


def joined(parts: list[torch.Tensor], axis: int) -> torch.Tensor | None:
    """Labels of a concatenation along ``axis``; None where the parts differ along other axes."""
    others = {frozenset(axes(part)) - {axis} for part in parts}
    return torch.cat(parts, axis) if others == {frozenset()} else None
