"""Rules of assignments to a part of a tensor, such as ``x[:, :8] = y``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from job.slimming.graph.blank_channels import label_blank
from job.slimming.graph.channel_labels import (
    MAX_ENTRIES,
    compact,
    flat_ids,
    label_axes,
    labels_along,
)
from job.slimming.graph.reasons import OP_COUNT, SLICE_ASSIGNMENT

if TYPE_CHECKING:
    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.trace import Op


def write(state: PropagationState, op: Op) -> None:
    """Keep the channels of values that are assigned to a part of a tensor, or to new samples."""
    target, index, value = op.args
    labels, earlier = state.labels_of(value), state.labels_of(target)
    known = id(target) in state.trace.constants or state.derived.sources(target)
    parts = index if isinstance(index, tuple) else (index,)
    if known or target.numel() > MAX_ENTRIES:
        return state.give_up(op, SLICE_ASSIGNMENT())
    if isinstance(index, torch.Tensor) and index.dim() == 1:
        return _write_samples(state, op)
    if earlier is None and labels is not None and not any(map(_is_tensor, parts)):
        _label_blank_target(state, op, labels)
        earlier = state.labels_of(target)
    if earlier is None or len(label_axes(earlier)) != 1 or any(map(_is_tensor, parts)):
        return state.give_up(op, SLICE_ASSIGNMENT())
    written = earlier.expand(target.shape)[index]
    if _is_tensor(value):
        alike = torch.zeros([1] * value.dim(), dtype=torch.int64)
        alike = alike.expand(value.shape) if labels is None else labels
        state.union.unite(flat_ids(alike.expand_as(written)), flat_ids(written))
    before, after = flat_ids(earlier), flat_ids(compact(written))
    state.note_sizes(op, [compact(written)])
    state.union.suspects += [(OP_COUNT(op.name), ids) for ids in (before, after)]
    state.add_slice(before, after)
    return state.set_labels(target, earlier)


def _label_blank_target(state: PropagationState, op: Op, labels: torch.Tensor) -> None:
    """Label a target that code filled alike with channels along the axis that the values have."""
    target, index, value = op.args
    blank = state.blanks.get(id(target))
    for axis in sorted(blank.axes) if blank else ():
        numbers = labels_along(np.arange(target.shape[axis]), axis, target.dim())
        written = compact(numbers.expand(target.shape)[index])
        missing = written.dim() - value.dim()
        if label_axes(written) == [each + missing for each in label_axes(labels)] != []:
            label_blank(state, target, axis)
            return


def _write_samples(state: PropagationState, op: Op) -> None:
    target, _, value = op.args
    labels, earlier = state.labels_of(value), state.labels_of(target)
    whole = _is_tensor(value) and value.dim() == target.dim()
    if labels is None or not whole or 0 in label_axes(labels):
        return state.give_up(op, SLICE_ASSIGNMENT())
    if earlier is not None:
        if label_axes(earlier) != label_axes(labels):
            return state.give_up(op, SLICE_ASSIGNMENT())
        state.union.unite(flat_ids(earlier), flat_ids(labels))
    state.union.suspects.append((OP_COUNT(op.name), flat_ids(labels)))
    return state.set_labels(target, labels[:1])


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
