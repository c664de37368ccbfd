"""Rule of nn.MultiheadAttention.

Its queries, keys and values are computed by one packed weight (3E, E) from inputs of the same
width, or by three separate weights (E, E), (E, kdim) and (E, vdim). All heads together have as many
channels as the queries' input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from job.slimming.graph.channel_labels import labels_along
from job.slimming.graph.followed_parameters import follow_parameters, produced_by
from job.slimming.graph.layers import owner_of
from job.slimming.graph.reasons import COMPUTED_BIAS, COMPUTED_WEIGHT, FIXED_INPUTS, OP_COUNT
from job.slimming.graph.union import ChannelRead, LayerCall, Operand

if TYPE_CHECKING:
    import torch

    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.trace import Op
    from job.slimming.graph.union import Ids

PACKED = ((5, "in_proj_weight"),)
SEPARATE = ((18, "q_proj_weight"), (19, "k_proj_weight"), (20, "v_proj_weight"))


class Projection(NamedTuple):
    """A weight ``slot`` that is the argument ``name`` of the op, and the channels that it makes."""

    place: int
    name: str
    slot: str
    made: Ids


def multi_head_attention(state: PropagationState, op: Op) -> None:
    """Propagate channels through nn.MultiheadAttention."""
    weights = SEPARATE if op.argument(5, "in_proj_weight") is None else PACKED
    out = state.trace.name(op.argument(11, "out_proj_weight"))
    names = [state.trace.name(op.argument(place, name)) for place, name in weights]
    if out is None or None in names or owner_of(names[0] or "") not in state.layers:
        return state.give_up(op, COMPUTED_WEIGHT(op.name))
    _count_calls(state, op, [*map(str, names), out])
    inputs = [state.ids_along(tensor, -1) for tensor in _images(op)]
    inputs = [ids if ids is not None and ids.any() else None for ids in inputs]
    if weights is PACKED and not _share_stream(state, op, inputs):
        return state.give_up(op, FIXED_INPUTS(op.name))
    projections = _projections(state, op, weights)
    for projection, ids in zip(projections, inputs, strict=False):
        if ids is not None:
            state.add_slot(projection.slot, "in", ids)
    _attend(state, op, inputs[0], projections)
    result = op.results[0]
    made = produced_by(state, out, result.shape[-1])
    return state.set_ids(result, made, result.dim() - 1)


def _images(op: Op) -> list[torch.Tensor]:
    """Return the inputs of queries, keys and values."""
    return [op.argument(place, name) for place, name in enumerate(("query", "key", "value"))]


def _share_stream(state: PropagationState, op: Op, inputs: list[Ids | None]) -> bool:
    """Unite the ``inputs`` of a packed weight; those without channels may be parameters."""
    stream = next((ids for ids in inputs if ids is not None), None)
    if stream is None:
        return False
    for place, (tensor, ids) in enumerate(zip(_images(op), inputs, strict=True)):
        if ids is not None:
            state.union.unite(stream, ids)
        elif not follow_parameters(state, op, tensor, labels_along(stream, -1, tensor.dim())):
            return False
        inputs[place] = stream
    return True


def _projections(
    state: PropagationState, op: Op, weights: tuple[tuple[int, str], ...]
) -> list[Projection]:
    """Return the weights of queries, keys and values."""
    found = []
    for place, name in weights:
        weight = op.argument(place, name)
        slot = str(state.trace.name(weight))
        if weights is PACKED:
            slot = f"{owner_of(slot)}.weight"
        found.append(Projection(place, name, slot, produced_by(state, slot, len(weight))))
    return found


def _attend(
    state: PropagationState, op: Op, stream: Ids | None, projections: list[Projection]
) -> None:
    """Cut queries with keys, and keep as many of them in all heads as channels of the stream."""
    made = np.concatenate([projection.made for projection in projections])
    query, key, value = made.reshape(3, -1)
    state.union.unite(query, key)
    for place, name, ids in ((7, "bias_k", key), (8, "bias_v", value)):
        extra = state.trace.name(op.argument(place, name))
        if extra is not None:  # one more key or value
            state.add_slot(extra, "through", ids, axis=2)
    split = state.heads.add(made.reshape(3 * int(op.argument(4, "num_heads")), -1))
    split.attended = True
    state.add_slot(str(state.trace.name(op.argument(11, "out_proj_weight"))), "in", value)
    operands = [Operand(p.place, p.name, 0, p.made[:, None]) for p in projections]
    bias = op.argument(6, "in_proj_bias")
    if bias is not None:
        operands.append(Operand(6, "in_proj_bias", 0, made))
        if len(projections) > 1:  # a packed weight has it as its own
            _cut_bias(state, op, bias, projections)
    state.add_read(op, ChannelRead(op.name, tuple(operands), zeroed=True))
    if stream is None:
        state.union.fix(made, FIXED_INPUTS(op.name))
    else:
        split.count_with(stream, made, merged=True)
        state.heads.scaled.append(query)
        state.union.suspects.append((OP_COUNT(op.name), np.concatenate([stream, made])))
    state.forget(op)


def _cut_bias(
    state: PropagationState, op: Op, bias: torch.Tensor, projections: list[Projection]
) -> None:
    """Cut the bias (3E,) of separate weights: a parameter, or the biases of three layers."""
    made = np.concatenate([projection.made for projection in projections])
    name = state.trace.name(bias)
    if name is not None:
        state.add_slot(name, "through", made)
        state.heads.biases[projections[0].slot] = [name]
        return
    owners = {owner_of(source.name) for source in state.derived.sources(bias)}
    if owners != {owner_of(projection.slot) for projection in projections}:
        state.union.fix(made, COMPUTED_BIAS(op.name))


def _count_calls(state: PropagationState, op: Op, names: list[str]) -> None:
    """Count the calls of the weights, which are used once a token (…, channels) of a sample."""
    if not state.main:
        return
    used = (*_images(op), op.results[0])
    tokens = [t.numel() / t.shape[-1] / state.trace.sample_count for t in used]
    if len(names) == 2:  # one weight for three inputs: the mean
        tokens[:3] = [sum(tokens[:3]) / 3]
    state.union.calls += map(LayerCall, names, tokens)
