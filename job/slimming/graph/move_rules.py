"""Rules of ops that move data: views, slices, transposes, concatenations, windows, padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from job.slimming.graph.attribute_sizes import sliced_by_attributes
from job.slimming.graph.blank_channels import fits_blank, label_blank
from job.slimming.graph.channel_labels import (
    cat_labels,
    flat_ids,
    label_axes,
    labels_along,
    reshape_labels,
    run_on_labels,
)
from job.slimming.graph.followed_parameters import follow_parameters
from job.slimming.graph.heads import fixed_size
from job.slimming.graph.place_rules import picked
from job.slimming.graph.reasons import (
    DIFFERENT_CHANNELS,
    MIXES,
    NOT_SUPPORTED_HERE,
    OP_COUNT,
    SEVERAL_AXES,
    UNEQUAL_SLICES,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.trace import Op
    from job.slimming.graph.union import Ids


# whose channels are along the axis 1 of (B, C, L)
OF_SIGNALS = frozenset(
    """conv1d conv_transpose1d batch_norm instance_norm max_pool1d avg_pool1d
    adaptive_avg_pool1d adaptive_max_pool1d interpolate upsample""".split()
)


def cat(state: PropagationState, op: Op) -> None:
    """Concatenate channels, or unite them in a concatenation along another axis."""
    axis = op.argument(1, "dim", op.kwargs.get("axis", 0)) % op.result.dim()
    parts = []
    tensors = [t for t in op.argument(0, "tensors") if t.numel()]  # others add nothing
    if not tensors:
        return state.forget(op)
    for tensor in tensors:
        part = state.labels_of(tensor)
        if part is None:
            part = _followed(state, op, tensors, tensor, axis)
        if part is None:
            part = torch.zeros([1] * tensor.dim(), dtype=torch.int64)
        shape = list(part.shape)
        shape[axis] = tensor.shape[axis]
        parts.append(part.expand(shape))
    labels = cat_labels(parts, axis)
    if labels is not None:
        return state.set_labels(op.result, labels)
    ends = {tuple(label_axes(part.narrow(axis, 0, 1))) for part in parts}
    if len(ends) > 1 or any(part.shape[axis] > 1 and part.stride(axis) for part in parts):
        return state.give_up(op, DIFFERENT_CHANNELS())
    first = parts[0].narrow(axis, 0, 1)
    for part in parts[1:]:  # along another axis: channel by channel
        state.union.unite(flat_ids(first), flat_ids(part.narrow(axis, 0, 1)))
    return state.set_labels(op.result, first)


def _followed(
    state: PropagationState,
    op: Op,
    tensors: Sequence[torch.Tensor],
    tensor: torch.Tensor,
    axis: int,
) -> torch.Tensor | None:
    """Return labels for a part without: those of others, of a parameter, or of blank channels."""
    for other in tensors:
        labels = state.labels_of(other)
        if labels is not None and label_axes(labels) and axis not in label_axes(labels):
            labels = labels.narrow(axis, 0, 1)
            follows = fits_blank(state, tensor, labels) or (
                state.derived.sources(tensor) and follow_parameters(state, op, tensor, labels)
            )
            return labels if follows else None
    ids = label_blank(state, tensor, axis)
    return None if ids is None else labels_along(ids, axis, tensor.dim())


def reshape(state: PropagationState, op: Op) -> None:
    """Reshape labels: views that split channels into groups, or merge them with later axes."""
    image, result = op.inputs[0], op.result
    labels = state.labels_of(image)
    outcome = None if labels is None else reshape_labels(labels, image.shape, result.shape)
    if outcome is None:
        return state.give_up(op, MIXES(op.name))
    labels, split = outcome
    maps = split and image.dim() == 2  # features become maps
    maps = maps and (len(label_axes(labels)) > 2 or _feeds_convolution(state, op))
    if split:  # (groups, channels per group): the same channels are kept in each group
        lines = flat_ids(labels).reshape(-1, labels.shape[label_axes(labels)[-1]])
        if maps:
            lines = lines.reshape(labels.shape[label_axes(labels)[0]], -1).T
        leaves_groups = not maps and _leaves_group_count_open(op, labels)  # and not their size
        state.heads.add(np.ascontiguousarray(lines), whole=leaves_groups, held=_is_held(op))
    elif _is_one_head(labels, image, result):
        state.heads.add(flat_ids(labels)[None], held=_is_held(op))
    any_size = op.name == "flatten" or (op.name in ("view", "reshape") and op.args[-1] == -1)
    if maps:
        labels = labels_along(lines[0], label_axes(labels)[0], labels.dim())
    state.note_sizes(op, [labels])
    if split or not state.is_measured(image, op.module):  # else its own size decides
        _count_with_streams(state, op, labels)
    if split or not any_size:
        state.union.suspects.append((OP_COUNT(op.name), flat_ids(labels)))
    return state.set_labels(result, labels)


def _feeds_convolution(state: PropagationState, op: Op) -> bool:
    """Return whether the next op on the result (B, C, L) that is not pointwise is of signals."""
    reached, after = {id(op.result)}, False
    for each in state.trace.ops:
        after = after or each is op
        if not after or each is op or reached.isdisjoint(map(id, each.inputs)):
            continue
        if each.name in OF_SIGNALS:
            return True
        if len(each.inputs) > 1 and each.name not in ("prelu", "add", "mul"):
            return False
        reached.update(map(id, each.results))
    return False


def _is_one_head(labels: torch.Tensor, image: torch.Tensor, result: torch.Tensor) -> bool:
    """Return whether a view adds an axis of size 1 before the channels, for a single head."""
    axes = label_axes(labels)
    return len(axes) == 1 and result.dim() > image.dim() and 1 in result.shape[1 : axes[0]]


def _count_with_streams(state: PropagationState, op: Op, labels: torch.Tensor) -> None:
    """Note channels whose number decides the size of a view, as in ``C // heads``."""
    axes = label_axes(labels)
    if not axes or fixed_size(op, axes[-1], labels.dim(), splits=len(axes) > 1) is None:
        return
    streams, ids = list(state.measured_channels(op.module)), flat_ids(labels)
    splits = list(state.heads.of(ids))
    for split in splits:
        for stream in streams:
            split.count_with(stream, ids, merged=labels.shape[axes[-1]] > split.width)
    alike = [stream for stream in streams if len(stream) == len(ids)]
    if not splits and len(axes) == 1 and not any(np.array_equal(ids, each) for each in alike):
        for stream in alike:
            state.union.unite(ids, stream)


def _is_held(op: Op) -> bool:
    """Return whether the last size of a view is an attribute, which a cut can change."""
    last = op.view_sizes[-1:]
    return any(type(value) is int and value in last for value in op.caller.numbers.values())


def _leaves_group_count_open(op: Op, labels: torch.Tensor) -> bool:
    """Return whether a view fixes the size of its groups and leaves their number open."""
    axes = label_axes(labels)
    sizes = op.view_sizes
    if len(axes) != 2 or len(sizes) != labels.dim():
        return False
    if -1 in (sizes[axes[0]], sizes[axes[1]]):
        return bool(sizes[axes[0]] == -1)
    return labels.shape[axes[1]] == 2 < labels.shape[axes[0]]  # pairs of channels


def glu(state: PropagationState, op: Op) -> None:
    """Unite the two halves of the channels that GLU multiplies (Dauphin et al. 2017)."""
    image = op.inputs[0]
    axis = op.argument(1, "dim", -1) % image.dim()
    ids, labels = state.ids_along(image, axis), state.labels_of(image)
    if labels is not None and axis not in label_axes(labels):
        return state.set_labels(op.result, labels)
    if ids is None:
        return state.give_up(op, SEVERAL_AXES("glu"))
    half, gate = np.split(ids, 2)
    state.union.unite(half, gate)
    return state.set_labels(op.result, labels_along(half, axis, op.result.dim()))


def rearrange(
    state: PropagationState, op: Op, *, any_size: bool = False, splits: bool = False
) -> None:
    """Apply the op to the labels: slices, transposes, shuffles and other moves of data.

    With ``any_size`` the op is valid for any number of channels. With ``splits`` its results are
    parts that may have to remain equally large.
    """
    _set_rearranged(state, op, picked(state, op), any_size, splits)


def pad(state: PropagationState, op: Op) -> None:
    """Pad labels; channels that padding adds are never cut."""
    image, sizes = op.argument(0, "input"), op.argument(1, "pad")
    padded = {image.dim() - 1 - place // 2 for place, size in enumerate(sizes) if size}
    labels = state.labels_of(image)
    if labels is not None and not padded & set(label_axes(labels)):
        results: list[torch.Tensor] | None = [labels]
    else:
        results = run_on_labels(op, state.labels_of, lambda image, pad, *_, **__: F.pad(image, pad))
    _set_rearranged(state, op, results, any_size=False, splits=False)


def _parts_of_measured_sizes(state: PropagationState, op: Op, parts: list[Ids]) -> bool:
    """Unite the parts of a split into sizes that the code has read elsewhere with what it has read.

    Parts of other sizes are never cut. Returns False if no part has such a size.
    """
    sizes = set[float]()
    for value in op.caller.numbers.values():
        several = value if isinstance(value, (list, tuple)) else (value,)
        sizes.update((*several, sum(several)))
    streams = {len(ids): ids for ids in state.measured_channels(op.module)}
    tied = [part for part in parts if len(part) in streams and len(part) not in sizes]
    if op.name not in ("split", "split_with_sizes") or not tied:
        return False
    for part in parts:
        if any(part is each for each in tied):
            state.union.unite(part, streams[len(part)])
        else:
            state.union.fix(part, UNEQUAL_SLICES())
    return True


def _set_rearranged(
    state: PropagationState,
    op: Op,
    results: list[torch.Tensor] | None,
    any_size: bool,
    splits: bool,
) -> None:
    if results is None:
        return state.give_up(op, NOT_SUPPORTED_HERE(op.name))
    sources = [labels for t in op.inputs if (labels := state.labels_of(t)) is not None]
    before = np.concatenate([flat_ids(labels) for labels in sources])
    sliced = len(sources) == 1
    state.note_sizes(op, results)
    parts = [flat_ids(labels) for labels in results]
    free = sliced_by_attributes(op, parts)
    if splits and len(results) > 1:
        if {len(part) for part in parts} == {len(before) / len(parts)}:
            state.union.blocks.append(np.stack(parts))
            sliced = False
        elif len(label_axes(sources[0])) == 1 and _parts_of_measured_sizes(state, op, parts):
            sliced = False
    for result, labels, after in zip(op.results, results, parts, strict=True):
        unmoved = np.array_equal(before, after) and not op.name.startswith("expand")
        if not (any_size or unmoved):
            state.union.suspects += [(OP_COUNT(op.name), ids) for ids in (before, after)]
            if sliced and not (free and op.name == "__getitem__"):
                state.add_slice(before, after, free)
        state.set_labels(result, labels)
    return None
