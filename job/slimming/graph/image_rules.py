"""Rules of ops on images: shuffles of pixels and channels, windows, values sampled at points."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from job.slimming.graph.channel_labels import labels_along
from job.slimming.graph.move_rules import rearrange
from job.slimming.graph.reasons import COMPUTED_PLACES, MIXED

if TYPE_CHECKING:
    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.trace import Op
    from job.slimming.graph.union import Ids


def pixel_shuffle(state: PropagationState, op: Op) -> None:
    """Unite the channels that become one channel."""
    axis = op.inputs[0].dim() - 3
    ids = state.ids_along(op.inputs[0], axis)
    return rearrange(state, op) if ids is None else _merge(state, op, ids, axis)


def channel_shuffle(state: PropagationState, op: Op) -> None:
    """Shuffle channels, of which all groups lose those at the same index, as by a view."""
    image, groups = op.inputs[0], int(op.argument(1, "groups"))
    ids = state.ids_along(image, 1)
    if ids is not None and len(ids) % groups == 0:
        lines = ids.reshape(groups, -1)
        state.union.unite(np.repeat(lines[:1], groups - 1, 0).reshape(-1), lines[1:].reshape(-1))
    rearrange(state, op)


def unfold(state: PropagationState, op: Op) -> None:
    """Repeat the channels for the places of a window: F.unfold; Tensor.unfold adds an axis."""
    image, result = op.inputs[0], op.result
    axis = image.dim() - 3
    if result.dim() > image.dim():
        return rearrange(state, op)
    ids = state.ids_along(image, axis)
    if ids is None:
        return state.give_up(op, MIXED(op.name))
    repeated = np.repeat(ids, result.shape[axis] // len(ids))
    return state.set_labels(result, labels_along(repeated, axis, result.dim()))


def fold(state: PropagationState, op: Op) -> None:
    """Unite the channels of the places of a window, which become one channel."""
    image, result = op.inputs[0], op.result
    axis = result.dim() - 3
    ids = state.ids_along(image, axis)
    if ids is None:
        return state.give_up(op, MIXED(op.name))
    return _merge(state, op, ids, axis)


def _merge(state: PropagationState, op: Op, ids: Ids, axis: int) -> None:
    """Unite each run of successive ``ids`` (n,) that becomes one channel of the result."""
    parts = ids.reshape(op.result.shape[axis], -1)
    for column in parts.T[1:]:
        state.union.unite(parts[:, 0], column)
    return state.set_labels(op.result, labels_along(parts[:, 0], axis, op.result.dim()))


def sampled(state: PropagationState, op: Op) -> None:
    """Keep the channels of images that are sampled at points or in boxes."""
    image, *places = op.inputs
    ids = state.ids_along(image, 1)
    if ids is None:
        return state.give_up(op, MIXED(op.name))
    for place in places:
        state.fix(place, COMPUTED_PLACES(op.name))
    return state.set_labels(op.result, labels_along(ids, 1, op.result.dim()))
