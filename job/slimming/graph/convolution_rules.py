"""Rules of convolutions: plain, grouped, depthwise, transposed, and deformable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from job.slimming.graph.channel_labels import labels_along
from job.slimming.graph.computed_weights import computed_from, end_computed
from job.slimming.graph.followed_parameters import add_bias, produce, produced_by
from job.slimming.graph.layers import owner_of
from job.slimming.graph.place_rules import along_channels
from job.slimming.graph.reasons import (
    COMPUTED_BY,
    COMPUTED_PLACES,
    COMPUTED_WEIGHT_OR_MIXED,
    MIXED,
    OP_COUNT,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.reasons import Reason
    from job.slimming.graph.trace import Op
    from job.slimming.graph.union import Ids

COMPUTED_WAYS = {  # attributes of layers, and the ways that their weights are computed in each pass
    "parametrizations": "a parametrization",
    "weight_g": "weight_norm",
    "weight_u": "spectral_norm",
    "weight_mask": "a pruning mask",
}


def convolution(state: PropagationState, op: Op) -> None:
    """Propagate channels through a convolution: plain, depthwise, grouped, or across channels."""
    if along_channels(state, op):
        return None
    image, weight = op.argument(0, "input"), op.argument(1, "weight")
    groups = int(op.argument(6, "groups", 1))
    ids = lines = None
    if image.dim() == weight.dim() and (ids := state.ids_along(image, 1)) is None:
        lines = state.labels_of(image)  # of heads, or of the places that a pixel shuffle writes
        ids = None if lines is None else state.unite_lines(lines, 1)
    name, outputs = state.trace.name(weight), weight.shape[0]
    computed = name is None
    name = name or computed_from(state, op, weight)
    state.count_call(op, name)
    if ids is None and not computed and groups == 1:  # channels are along an axis of places
        state.fix(image, MIXED(op.name))
        ids = np.zeros(image.shape[1], np.int64)
    if ids is None or name is None:
        reason = computed_weight(op.module) if name is None else None
        depthwise = ids is not None and 1 < groups == len(ids) == outputs
        if ids is not None and depthwise and not reason and _is_alone(state, op, weight):
            state.union.suspects.append((OP_COUNT(op.name), np.unique(ids)))
            return _pass_lines(state, op, ids, lines)
        return state.give_up(op, reason or COMPUTED_WEIGHT_OR_MIXED("a convolution"))
    if groups == len(ids) and groups > 1:
        passed = np.repeat(ids, outputs // groups)
        state.add_slot(name, "through", passed, outputs // groups)
        state.note_sizes(op, [labels_along(passed, 1, weight.dim())])
        add_bias(state, op, name, passed)
        if computed:
            end_computed(state, op, name, weight, ids, passed)
        return _pass_lines(state, op, passed, lines if outputs == groups else None)
    state.add_slot(name, "in", ids)
    produced = produce(state, op, name, outputs)
    if computed:
        end_computed(state, op, name, weight, ids, produced)
    if groups > 1:
        state.union.blocks += [ids.reshape(groups, -1), produced.reshape(groups, -1)]
    return state.set_ids(op.result, produced, 1)


def _is_alone(state: PropagationState, op: Op, weight: torch.Tensor) -> bool:
    """Return whether an op with the ``weight`` has no bias, and computes it from no channels."""
    return op.argument(2, "bias") is None and state.labels_of(weight) is None


def _pass_lines(state: PropagationState, op: Op, passed: Ids, lines: torch.Tensor | None) -> None:
    """Pass channels through a depthwise convolution; those of heads stay apart in a batch."""
    if lines is None:
        return state.set_ids(op.result, passed, 1)
    for axis in range(2, lines.dim()):
        lines = lines.narrow(axis, 0, 1)
    return state.set_labels(op.result, lines)


def computed_weight(layer: nn.Module | None) -> Reason | None:
    """Return why the weight of a layer is computed, or None where the way is not known."""
    for attribute, way in COMPUTED_WAYS.items():
        if hasattr(layer, attribute):
            return COMPUTED_BY(way)
    return None


def transposed_convolution(state: PropagationState, op: Op) -> None:
    """Propagate channels through a transposed convolution.

    Its weight is (inputs, outputs of a group, …).
    """
    image, weight = op.argument(0, "input"), op.argument(1, "weight")
    groups = int(op.argument(6, "groups", 1))
    ids = state.ids_along(image, 1) if image.dim() == weight.dim() else None
    name = state.trace.name(weight)
    state.count_call(op, name)
    if ids is None or name is None or owner_of(name) not in state.layers:
        return state.give_up(op, COMPUTED_WEIGHT_OR_MIXED("a transposed convolution"))
    if groups == len(ids) and groups > 1:
        passed = np.repeat(ids, weight.shape[1])
        state.add_slot(name, "through", passed, weight.shape[1])
        add_bias(state, op, name, passed)
        return state.set_ids(op.result, passed, 1)
    state.add_slot(name, "in", ids)
    produced = produce(state, op, name, weight.shape[1] * groups)
    if groups > 1:
        state.union.blocks += [ids.reshape(groups, -1), produced.reshape(groups, -1)]
    return state.set_ids(op.result, produced, 1)


def deformable_convolution(state: PropagationState, op: Op) -> None:
    """Propagate channels through a deformable convolution, whose sampling positions are never cut.

    Dai et al. 2017, Zhu et al. 2019.
    """
    image, weight, *places = op.args[:4]
    groups, place_groups = op.args[11:13]
    ids, name = state.ids_along(image, 1), state.trace.name(weight)
    state.count_call(op, name)
    if ids is None or name is None or groups > 1:
        return state.give_up(op, COMPUTED_WEIGHT_OR_MIXED("a deformable convolution"))
    for tensor in places:
        state.fix(tensor, COMPUTED_PLACES(op.name))
    if place_groups > 1:
        state.union.blocks.append(ids.reshape(place_groups, -1))
    state.add_slot(name, "in", ids)
    return state.set_ids(op.result, produced_by(state, name, len(weight)), 1)
