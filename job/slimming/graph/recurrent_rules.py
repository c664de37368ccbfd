"""Rules of recurrent layers, whose inputs are cut and whose hidden states are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.slimming.graph.layers import owner_of
from job.slimming.graph.reasons import OP_COUNT, PACKED_OR_MIXED

if TYPE_CHECKING:
    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.trace import Op


def recurrent(state: PropagationState, op: Op) -> None:
    """Propagate channels into an LSTM, GRU or RNN, whose inputs are along the last axis."""
    image, weights = op.argument(0, "input"), op.argument(2, "params")
    packed = not isinstance(weights, (list, tuple))
    name = None if packed or not weights else state.trace.name(weights[0])
    ids = state.ids_along(image, -1)
    if ids is None or name is None or owner_of(name) not in state.layers:
        return state.give_up(op, PACKED_OR_MIXED(op.name))
    if ids.any():
        state.add_slot(f"{owner_of(name)}.weight", "in", ids)
        state.union.suspects.append((OP_COUNT(op.name), ids))
    return state.forget(op)
