"""Rules of values that are looked up at computed indices: nn.Embedding, ``gather``.

A lookup in a table (V, C) is a product with one-hot rows: the table produces C channels, along its
axis 1. Tables that are looked up alike for all inputs, such as those of positions, are followed as
parameters (derived.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.slimming.graph.channel_labels import flat_ids, label_axes
from job.slimming.graph.followed_parameters import is_parameter, produced_by
from job.slimming.graph.layers import owner_of
from job.slimming.graph.reasons import COMPUTED_PLACES, OP_COUNT

if TYPE_CHECKING:
    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.trace import Op

LOOKUPS = frozenset({"embedding", "embedding_bag"})


def look_up(state: PropagationState, op: Op) -> bool:
    """Produce the channels of a table that is looked up by indices of the inputs.

    A table that scores the words too, as the weight of a linear layer, has them as its inputs.
    Returns False for other indices, and for a table that is not a parameter that can be cut. One
    with ``max_norm`` cannot: its rows are normalised over all channels at each use.
    """
    indices, table = op.argument(0, "input"), op.argument(1, "weight")
    name = state.trace.name(table)
    if id(indices) not in state.trace.of_inputs or name is None or table.dim() != 2:
        return False
    if op.argument(3, "max_norm") is not None:
        return False
    linear = (each for each in state.trace.ops if each.name == "linear")
    if any(each.argument(1, "weight") is table for each in linear):
        made = state.produced.get((name, 1))
        if made is None:
            made = state.produced[name, 1] = state.union.produce(name, table.shape[1])
            state.add_slot(name, "in", made)
    elif owner_of(name) in state.layers or not is_parameter(state, name):
        return False
    else:
        made = produced_by(state, name, table.shape[1], axis=1)
    state.set_ids(op.result, made, op.result.dim() - 1)
    return True


def gathered(state: PropagationState, op: Op) -> None:
    """Keep the channels of values that are picked at indices along another axis."""
    image = op.argument(0, "input")
    if op.name == "gather":
        axis, index = op.argument(1, "dim"), op.argument(2, "index")
    else:
        index, axis = op.argument(1, "indices"), op.argument(2, "dim")
    labels = state.labels_of(image)
    if labels is None or axis is None or state.labels_of(index) is not None:
        return state.give_up(op, COMPUTED_PLACES(op.name))
    axes = label_axes(labels)
    if axis % image.dim() in axes or any(op.result.shape[a] != image.shape[a] for a in axes):
        return state.give_up(op, COMPUTED_PLACES(op.name))
    state.union.suspects.append((OP_COUNT(op.name), flat_ids(labels)))
    return state.set_labels(op.result, labels)
