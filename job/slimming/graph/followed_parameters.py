"""Parameters that are cut with the channels that their values are combined with.

A parameter may be used in parts, e.g. the table of a rotary embedding that holds sines and cosines;
its channels are then known when all ops have been processed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from job.slimming.graph.channel_labels import flat_ids, label_axes, labels_along
from job.slimming.graph.derived import ParameterView
from job.slimming.graph.heads import SUMS
from job.slimming.graph.layers import owner_of, tensor_named
from job.slimming.graph.reasons import COMPUTED_BIAS, OP_COUNT
from job.slimming.graph.trace import SIZED

if TYPE_CHECKING:
    import torch

    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.trace import Op
    from job.slimming.graph.union import Ids


def follow_parameters(
    state: PropagationState, op: Op, tensor: torch.Tensor, labels: torch.Tensor
) -> bool:
    """Cut the parameters that ``tensor`` is computed from, together with the channels ``labels``.

    ``tensor`` has no labels itself. Along axes on which it does not depend, such as heads, all
    channels are united. Returns False if the parameters do not have these channels.
    """
    sizes = [1] * (labels.dim() - tensor.dim()) + list(tensor.shape)
    if sizes[label_axes(labels)[-1]] == 1 and _keeps_lines(state, labels):
        state.read_elsewhere(op, tensor)
        state.union.suspects.append((OP_COUNT(op.name), flat_ids(labels)))
        return True  # alike for all channels of a head, or of an activation in a stack
    first = labels
    for axis in label_axes(labels):
        first = first.narrow(axis, 0, 1) if sizes[axis] == 1 else first
    if not label_axes(first):
        state.read_elsewhere(op, tensor)
        return True  # alike for all channels
    if any(source.reduced for source in state.derived.sources(tensor)):
        state.read_elsewhere(op, tensor)
        return False
    within = len(label_axes(first)) > 1 and not state.heads.are_cut_whole(first)  # of each head
    found = [
        (source.name, source.ids_on_axis(first, last=within))
        for source in state.derived.sources(tensor)
        if source.indices.numel() > 1
    ]
    cuts = [(name, on_axis) for name, on_axis in found if on_axis is not None]
    if not found or len(cuts) < len(found):
        return False
    state.union.unite(flat_ids(first.expand_as(labels)), flat_ids(labels))
    for name, (axis, ids, together) in cuts:
        if op.name in SUMS:
            state.heads.added.add(name)
        state.union.unite(*together)
        cut_parameter(state, name, axis, ids)
    return True


def _keeps_lines(state: PropagationState, labels: torch.Tensor) -> bool:
    """Return whether ``labels`` are of several heads, none cut whole, or of stacked activations."""
    stacked = len(label_axes(labels)) > 1 and not any(
        True for _ in state.heads.of(flat_ids(labels))
    )
    return stacked or state.heads.keep_their_number(labels)


def produce(state: PropagationState, op: Op, weight: str, count: int) -> Ids:
    """Return the elements (count,) that a layer produces, and cut its bias with them."""
    produced = produced_by(state, weight, count)
    add_bias(state, op, weight, produced)
    return produced


def produced_by(state: PropagationState, weight: str, count: int, axis: int | None = None) -> Ids:
    """Return the elements (count,) that a layer produces, the same ones at each call.

    ``axis`` is that of a parameter outside known layers.
    """
    made = state.produced.get((weight, axis))
    if made is None:
        made = state.union.produce(state.owner_or_self(weight), count)
        state.produced[weight, axis] = made
        state.add_slot(weight, "out", made, axis=axis)
    return made


def add_bias(state: PropagationState, op: Op, weight: str, ids: Ids) -> None:
    """Cut the bias of ``ids``, unless it is the bias of the layer itself."""
    bias = op.argument(2, "bias")
    if bias is None:
        return
    layer = owner_of(weight)
    name = state.trace.name(bias)
    if name is None:
        labels = labels_along(ids, 0, 1)
        if len(ids) > 1 and not follow_parameters(state, op, bias, labels):
            state.union.fix(ids, COMPUTED_BIAS(op.name))
        state.heads.biases[layer] = [source.name for source in state.derived.sources(bias)]
    elif owner_of(name) not in (layer, *state.twins.get(layer, ())) or layer not in state.layers:
        state.add_slot(name, "through", ids)
        state.heads.biases[layer] = [name]


def is_parameter(state: PropagationState, name: str) -> bool:
    """Return whether a tensor of the network is a parameter, not a buffer."""
    return isinstance(tensor_named(state.network, name), nn.Parameter)


def cut_parameter(state: PropagationState, name: str, axis: int, ids: Ids) -> None:
    """Cut a parameter with elements ``ids`` (n,) along ``axis``; other ops set entries of -1."""
    if (ids >= 0).all():
        return state.add_slot(name, "through", ids, axis=axis)
    earlier = state.parts.setdefault((name, axis), ids.copy())
    both = (earlier >= 0) & (ids >= 0)
    state.union.unite(earlier[both], ids[both])
    earlier[earlier < 0] = ids[earlier < 0]
    return None


def note_view(state: PropagationState, op: Op) -> None:
    """Note an op that moves parameters, whose sizes may be attributes of its caller."""
    modules = (op.caller.module, *op.caller.near)
    if not state.main or op.name not in SIZED or not any(map(op.caller.numbers_of, modules)):
        return
    if all(state.module_name(module) is None for module in modules):
        return
    before = state.derived.sources(op.inputs[0])
    for source, *after in zip(before, *map(state.derived.sources, op.results), strict=True):
        state.parameter_views.append(ParameterView(op, source, tuple(after)))


def end_views(state: PropagationState) -> None:
    """Note the attributes that count the channels of parameters in ops that move these."""
    for op, before, after in state.parameter_views:
        slot = state.slot(before.name, "through")
        if slot is not None and slot.axis is not None:
            labels, *results = (each.labels(slot.axis, slot.ids) for each in (before, *after))
            state.note_sizes(op, results, labels)


def end_parts(state: PropagationState) -> None:
    """Cut the parameters that several ops use in parts; parts that none uses are never cut."""
    for (name, axis), ids in state.parts.items():
        slot, known = state.slot(name, "through"), ids >= 0
        if slot is None:
            state.add_slot(name, "through", np.where(known, ids, 0), axis=axis)
        else:
            state.union.unite(slot.ids[known], ids[known])
