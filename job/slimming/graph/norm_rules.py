"""Rules of norms other than BatchNorm.

InstanceNorm computes each channel for itself. LayerNorm, RMSNorm and GroupNorm compute statistics
over channels; in the narrow network over those that are kept. The proof compares with the wide
network whose removed channels take no part in the statistics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.slimming.graph.layers import owner_of
from job.slimming.graph.union import ChannelRead, Operand

if TYPE_CHECKING:
    import torch

    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.trace import Op
    from job.slimming.graph.union import Ids

FEWEST_OF_GROUP = 4  # channels of a GroupNorm's group; of smaller ones whole groups are cut


def instance_norm(state: PropagationState, op: Op) -> None:
    """InstanceNorm: channels pass."""
    image = op.argument(0, "input")
    names = "running_mean", "running_var", "weight", "bias"
    tensors = [op.argument(place, name) for place, name in enumerate(names, 1)]
    ids, labels = state.ids_along(image, 1), state.labels_of(image)
    if labels is None:
        return state.forget(op)
    if ids is None or not _add_tensors(state, op, tensors, ids):
        return state.give_up(op, "an InstanceNorm with computed parameters or mixed channels")
    return state.set_labels(op.result, labels)


def layer_norm(state: PropagationState, op: Op) -> None:
    """LayerNorm and RMSNorm over channels along the last axis, or channel by channel."""
    image, shape = op.argument(0, "input"), op.argument(1, "normalized_shape")
    tensors = [op.argument(2, "weight")]
    tensors += [op.argument(3, "bias")] if op.name == "layer_norm" else []
    labels, axis = state.labels_of(image), image.dim() - 1
    if labels is None:
        return state.forget(op)
    if labels.shape[-1] == 1 and len(shape) == 1 and image.shape[-1] > 1:
        return state.set_labels(op.result, labels)  # channels are along another axis
    ids = state.ids_along(image, axis)
    if ids is None or len(shape) != 1 or not _add_tensors(state, op, tensors, ids):
        return state.give_up(op, f"{op.name} of places, or with computed parameters")
    operands = [Operand(0, "input", axis, ids)]
    operands += [
        Operand(place, name, 0, ids)
        for place, name in ((2, "weight"), (3, "bias"))
        if op.argument(place, name) is not None and (place < 3 or op.name == "layer_norm")
    ]
    state.add_read(op, ChannelRead(op.name, tuple(operands), axis))
    return state.set_labels(op.result, labels)


def group_norm(state: PropagationState, op: Op) -> None:
    """GroupNorm: equally many channels stay in each group, or whole groups are cut."""
    image, groups = op.argument(0, "input"), int(op.argument(1, "num_groups"))
    tensors = [op.argument(2, "weight"), op.argument(3, "bias")]
    labels = state.labels_of(image)
    if labels is None:
        return state.forget(op)
    ids = state.ids_along(image, 1)
    if ids is None or not _add_tensors(state, op, tensors, ids):
        return state.give_up(op, "a GroupNorm with computed parameters or mixed channels")
    parts = ids.reshape(groups, -1)
    if groups > 1 and parts.shape[1] >= FEWEST_OF_GROUP:
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
    """Note the tensors of a norm along ``ids``; False where one has no name."""
    named = [state.trace.name(tensor) for tensor in tensors if tensor is not None]
    if None in named:
        return False
    for name in map(str, named):
        layer = owner_of(name)
        state.add_slot(f"{layer}.weight" if layer in state.layers else name, "through", ids)
    if not named:
        state.add_module_slot(op, ids)
    return True
