"""Rules of ops that depend on the positions of channels: index tables, convolutions across them.

The narrow network has tables of the kept channels alone, renumbered, and convolutions whose kept
channels remain as far apart as they were (spaced.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from job.slimming.graph.channel_labels import flat_ids, label_axes, run_on_labels
from job.slimming.graph.layers import owner_of
from job.slimming.graph.reasons import COMPUTED_WEIGHT_OR_MIXED, OP_COUNT
from job.slimming.graph.selection import SelectedChannels
from job.slimming.graph.spaced import can_be_spaced
from job.slimming.graph.union import ChannelRead, Operand

if TYPE_CHECKING:
    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.trace import Op


def picked(state: PropagationState, op: Op) -> list[torch.Tensor] | None:
    """Return the labels of what an op picks by buffers of indices; None if that is not known.

    Where a buffer (n,) picks channels, it is cut with them.
    """
    tables = _tables(state, op)
    elsewhere = op.name == "__getitem__" and _picks_elsewhere(state, op)
    results = run_on_labels(
        op, lambda t: tables.get(id(t), state.labels_of(t)), any_index=elsewhere
    )
    images = [labels for t in op.inputs if (labels := state.labels_of(t)) is not None]
    if results is None or not tables or len(images) != 1:
        return results
    (before,), (after,) = images, results
    if np.array_equal(flat_ids(before), flat_ids(after)):
        return results  # other places than channels
    names = [state.trace.name(t) for t in op.inputs if id(t) in tables]
    table = next(iter(tables.values()))
    ids = flat_ids(before)
    one_axis = len(label_axes(before)) == len(label_axes(after)) == len(names) == table.dim() == 1
    one_axis = one_axis and bool((table >= 0).all())
    if not one_axis or not np.array_equal(ids[flat_ids(table)], flat_ids(after)):
        state.union.fix(ids, OP_COUNT(op.name))
        return None
    state.add_slot(str(names[0]), "through", flat_ids(after), axis=0)
    state.add_slot(str(names[0]), "places", ids)
    return results


def _picks_elsewhere(state: PropagationState, op: Op) -> bool:
    """Return whether indices without values pick along axes that have no channels."""
    labels, axis = state.labels_of(op.args[0]), 0
    parts = op.args[1] if isinstance(op.args[1], tuple) else (op.args[1],)
    if labels is None or any(part is Ellipsis for part in parts):
        return False
    for part in parts:
        if isinstance(part, torch.Tensor):
            whole = not part.is_meta or (labels.shape[axis] == 1 and not part.is_floating_point())
            if not whole or part.dtype == torch.bool or state.labels_of(part) is not None:
                return False
        axis += part is not None
    return True


def _tables(state: PropagationState, op: Op) -> dict[int, torch.Tensor]:
    """Return the values of the buffers of integers among the inputs, by id of the traced one."""
    named = {id(t): name for t in op.inputs if (name := state.trace.name(t)) is not None}
    buffers = dict(state.network.named_buffers(remove_duplicate=False)) if named else {}
    return {
        key: buffers[name].cpu()
        for key, name in named.items()
        if name in buffers
        and buffers[name].dtype in (torch.int64, torch.int32)
        # of these the BatchNorm is cut
        and not isinstance(state.modules[owner_of(name)], SelectedChannels)
    }


def along_channels(state: PropagationState, op: Op) -> bool:
    """Keep the labels of a convolution along an axis of channels, as in ECA (Wang et al. 2020).

    Returns False for other convolutions. Verification compares with the wide network in which the
    removed channels are zero before the convolution.
    """
    image, weight = op.argument(0, "input"), op.argument(1, "weight")
    labels, name = state.labels_of(image), state.trace.name(weight)
    axes = [] if labels is None else label_axes(labels)
    if labels is None or name is None or len(axes) != 1 or axes[0] < 2:
        return False
    axis, layer = axes[0], state.modules.get(owner_of(name))
    same_size = op.result.dim() == image.dim() and op.result.shape[axis] == image.shape[axis]
    if not same_size or not can_be_spaced(layer, axis):
        return False
    state.count_call(op, name)
    _keep_places(state, op, name, labels)
    return True


def already_spaced(state: PropagationState, op: Op) -> None:
    """Keep the labels of a convolution that was cut before, whose channels are spaced."""
    labels, name = state.labels_of(op.inputs[0]), state.trace.name(op.argument(1, "weight"))
    state.count_call(op, name)
    axis = op.argument(4, "line")[1]
    if name is None or (labels is not None and label_axes(labels) != [axis]):
        return state.give_up(op, COMPUTED_WEIGHT_OR_MIXED("a convolution"))
    return state.forget(op) if labels is None else _keep_places(state, op, name, labels)


def _keep_places(state: PropagationState, op: Op, weight: str, labels: torch.Tensor) -> None:
    (axis,) = label_axes(labels)
    state.add_slot(weight, "places", flat_ids(labels), axis=axis)
    operand = Operand(0, "input" if op.name.startswith("conv") else "image", axis, labels.numpy())
    state.add_read(op, ChannelRead(op.name, (operand,), zeroed=True))
    state.set_labels(op.result, labels)
