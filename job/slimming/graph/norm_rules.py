"""Rules of norms other than BatchNorm.

InstanceNorm normalises each channel separately. LayerNorm, RMSNorm and GroupNorm compute statistics
over channels; in the narrow network, over the kept channels. Verification compares it with the wide
network in which the statistics ignore the removed channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.slimming.graph.channel_labels import labels_along
from job.slimming.graph.layers import owner_of
from job.slimming.graph.reasons import COMPUTED_OR_MIXED, SEVERAL_OR_COMPUTED
from job.slimming.graph.union import ChannelRead, Operand

if TYPE_CHECKING:
    import torch

    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.trace import Op
    from job.slimming.graph.union import Ids

MIN_GROUP_CHANNELS = 4  # of a GroupNorm's group; smaller groups are cut as a whole


def instance_norm(state: PropagationState, op: Op) -> None:
    """Keep the labels of InstanceNorm, whose parameters are cut with its channels."""
    image = op.argument(0, "input")
    names = "running_mean", "running_var", "weight", "bias"
    tensors = [op.argument(place, name) for place, name in enumerate(names, 1)]
    ids, labels = state.ids_along(image, 1), state.labels_of(image)
    if labels is None:
        return state.forget(op)
    if ids is None or not _add_tensors(state, op, tensors, ids):
        return state.give_up(op, COMPUTED_OR_MIXED("an InstanceNorm"))
    return state.set_labels(op.result, labels)


def layer_norm(state: PropagationState, op: Op) -> None:
    """Keep the labels of LayerNorm and RMSNorm, over all channels or within each channel."""
    image, shape = op.argument(0, "input"), op.argument(1, "normalized_shape")
    tensors = [op.argument(2, "weight")]
    tensors += [op.argument(3, "bias")] if op.name == "layer_norm" else []
    labels, axis = state.labels_of(image), image.dim() - len(shape)
    if labels is None:
        return state.forget(op)
    if labels.shape[-1] == 1 and len(shape) == 1 and image.shape[-1] > 1:
        return state.set_labels(op.result, labels)  # channels are along another axis
    if len(shape) == 1 and state.heads.are_cut_whole(labels):
        return state.set_labels(op.result, labels)  # of each head that stays
    ids = state.unite_lines(labels, axis)
    several = any(size > 1 for size in shape[1:])  # axes of more than one value
    if ids is None or several or not _add_tensors(state, op, tensors, ids):
        return state.give_up(op, SEVERAL_OR_COMPUTED(op.name))
    operands = [Operand(0, "input", axis, ids)]
    operands += [
        Operand(place, name, 0, ids)
        for place, name in ((2, "weight"), (3, "bias"))
        if op.argument(place, name) is not None and (place < 3 or op.name == "layer_norm")
    ]
    state.add_read(op, ChannelRead(op.name, tuple(operands), axis))
    state.note_sizes(op, [labels_along(ids, 0, 1)])
    if state.main:
        state.heads.note_norm(ids, [state.slot_name(t) for t in tensors if t is not None])
    return state.set_labels(op.result, labels)


def group_norm(state: PropagationState, op: Op) -> None:
    """Keep the labels of GroupNorm, and the same number of channels in each of its groups.

    Small groups are cut as a whole.
    """
    image, groups = op.argument(0, "input"), int(op.argument(1, "num_groups"))
    tensors = [op.argument(2, "weight"), op.argument(3, "bias")]
    labels = state.labels_of(image)
    if labels is None:
        return state.forget(op)
    ids = state.ids_along(image, 1)
    if ids is None or not _add_tensors(state, op, tensors, ids):
        return state.give_up(op, COMPUTED_OR_MIXED("a GroupNorm"))
    parts = ids.reshape(groups, -1)
    if groups > 1 and parts.shape[1] >= MIN_GROUP_CHANNELS:
        state.union.blocks.append(parts)
    elif groups > 1:
        for column in parts.T[1:]:
            state.union.unite(parts[:, 0], column)
    operands = [Operand(0, "input", 1, ids)]
    operands += [
        Operand(place, name, 0, ids)
        for place, name in ((2, "weight"), (3, "bias"))
        if op.argument(place, name) is not None
    ]
    state.add_read(op, ChannelRead(op.name, tuple(operands), 1))
    return state.set_labels(op.result, labels)


def _add_tensors(
    state: PropagationState, op: Op, tensors: list[torch.Tensor | None], ids: Ids
) -> bool:
    """Add channel slots for the parameters of a norm along ``ids``; False if one is computed."""
    named = [state.trace.name(tensor) for tensor in tensors if tensor is not None]
    if None in named:
        return False
    for name in map(str, named):
        layer = owner_of(name)
        state.add_slot(f"{layer}.weight" if layer in state.layers else name, "through", ids)
    if not named:
        state.add_module_slot(op, ids)
    return True
