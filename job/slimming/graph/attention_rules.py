"""Rules of attention: products of activations, and scaled_dot_product_attention.

The channels of queries and keys are summed over in pairs and cut together. The channels of the
values pass to the result. Verification compares with the wide network in which removed channels of
the queries are zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from job.slimming.graph.channel_labels import flat_ids, label_axes
from job.slimming.graph.cross_covariance import (
    attend_channels,
    multiply_channels,
    sum_over_columns,
    sum_over_rows,
)
from job.slimming.graph.letter_rules import multiply_by_letters
from job.slimming.graph.reasons import (
    COMPUTED_MASK,
    DIFFERENT_AXES,
    FIXED_QUERIES,
    NEVER_CUT,
    NOT_SUPPORTED,
    NUMBER_OF_HEADS,
    ONE_WITH_SEVERAL,
    OP_COUNT,
    OTHER_HEADS,
    OVER_VALUES,
)
from job.slimming.graph.union import ChannelRead, Operand

if TYPE_CHECKING:
    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.reasons import Reason
    from job.slimming.graph.trace import Op


def matmul(state: PropagationState, op: Op) -> None:
    """Multiply two activations: sum over the channels of both, or pass the channels of one."""
    one, other = (op.args[0], op.args[1]) if len(op.args) > 1 else op.inputs[:2]
    dims = one.dim()
    if dims != other.dim() or dims < 3:
        return _by_letters(state, op, NOT_SUPPORTED(op.name))
    if (rows := state.rows.get(id(one))) is not None:
        return sum_over_columns(state, op, rows)
    if (rows := state.rows.get(id(other))) is not None:
        return sum_over_rows(state, op, rows)
    summed = _depends(state, one, -1), _depends(state, other, -2)
    free = _depends(state, one, -2), _depends(state, other, -1)
    if all(summed) and not any(free):
        labels, transposed = state.labels_of(one), state.labels_of(other)
        assert labels is not None
        assert transposed is not None
        if not unite_products(state, op, labels, transposed.mT, _name_of_first(op)):
            return state.give_up(op, DIFFERENT_AXES(op.name))
        return None
    if all(free) and not any(summed) and multiply_channels(state, op):
        return None
    passing = one if free[0] else other
    labels = state.labels_of(passing)
    if any(summed) or sum(free) != 1 or labels is None:
        return _by_letters(state, op, NEVER_CUT(op.name))
    factors = other if passing is one else one
    heads = state.labels_of(factors)
    if heads is not None and not label_axes(heads):  # weights from a layer of one output
        state.fix(factors, ONE_WITH_SEVERAL(op.name))
    elif heads is not None and not state.heads.are_cut_whole(labels):
        state.fix(factors, NUMBER_OF_HEADS(op.name))
    elif heads is not None and not _unite_heads(state, heads, labels):
        return state.give_up(op, DIFFERENT_AXES(op.name))
    state.heads.attend(labels)
    state.union.suspects.append((OP_COUNT(op.name), flat_ids(labels)))
    return state.set_labels(op.result, labels)


def sides_of(op: Op) -> list[str] | None:
    """Return the letters of both operands and of the result of an einsum; None for others."""
    sides = str(op.args[0]).replace(" ", "").replace("->", ",").split(",")
    return sides if len(sides) == len(op.args) == 3 else None


def einsum(state: PropagationState, op: Op) -> None:
    """Multiply queries with keys, or weights with values, as an einsum equation states."""
    sides = sides_of(op)
    if sides is None or "." in str(op.args[0]):
        return _by_letters(state, op, NOT_SUPPORTED("einsum"))
    first, second, result = sides
    labels = [state.labels_of(tensor) for tensor in op.args[1:]]
    batch, one, last = first[:-2], first[-2:-1], first[-1:]
    if second[:-2] == batch and second[-1] == last and result == batch + one + second[-2]:
        queries, keys = labels
        if queries is None or keys is None:
            return _pass(state, op, sides, labels)
        if unite_products(state, op, queries, keys, "operands"):
            return None
    elif second[:-1] == batch + last and result == batch + one + second[-1]:
        values = labels[1]
        if labels[0] is None and values is not None and values.shape[-2] == 1:
            state.heads.attend(values)
            state.union.suspects.append((OP_COUNT(op.name), flat_ids(values)))
            return state.set_labels(op.result, values)
    return _pass(state, op, sides, labels)


def _pass(
    state: PropagationState, op: Op, sides: list[str], labels: list[torch.Tensor | None]
) -> None:
    """Pass the channels of one operand along letters that the result has and the other has not."""
    for own, other in ((0, 1), (1, 0)):
        image, factors = labels[own], labels[other]
        if image is None or (factors is not None and label_axes(factors)):
            continue
        along = {sides[own][axis] for axis in label_axes(image)}
        if along <= set(sides[2]) - set(sides[other]) and len(set(sides[own])) == image.dim():
            rest = [axis for axis, letter in enumerate(sides[own]) if letter not in along]
            sizes = [image.shape[sides[own].index(c)] if c in along else 1 for c in sides[2]]
            order = [sides[own].index(letter) for letter in sides[2] if letter in along]
            passed = image.permute(*rest, *order).reshape(sizes)
            state.union.suspects.append((OP_COUNT(op.name), flat_ids(passed)))
            if factors is not None:  # weights from a layer of one output
                state.fix(op.args[1 + other], ONE_WITH_SEVERAL(op.name))
            return state.set_labels(op.result, passed)
    return _by_letters(state, op, NOT_SUPPORTED("einsum"))


def _by_letters(state: PropagationState, op: Op, reason: Reason) -> None:
    """Multiply by the general rule, or block the channels with the ``reason``."""
    if not multiply_by_letters(state, op):
        state.give_up(op, reason)


def attention(state: PropagationState, op: Op) -> None:
    """Apply scaled_dot_product_attention, whose scale is 1/sqrt(channels) by default."""
    query, key, value = (
        op.argument(place, name) for place, name in enumerate(("query", "key", "value"))
    )
    mask, scale = op.argument(3, "attn_mask"), op.kwargs.get("scale")
    labels, keys, passing = (state.labels_of(each) for each in (query, key, value))
    if attend_channels(state, op, (labels, keys, passing)):
        return None
    if mask is not None:
        state.fix(mask, COMPUTED_MASK(op.name))
    if (labels is None) != (keys is None):
        return state.give_up(op, FIXED_QUERIES(op.name))
    if op.kwargs.get("enable_gqa"):
        keys, passing = (_of_each_query(op, each) for each in (keys, passing))
    if labels is not None:
        if keys is None or not unite_products(state, op, labels, keys, "query"):
            return state.give_up(op, DIFFERENT_AXES(op.name))
        ids = flat_ids(labels)
        if scale is None or state.heads.is_computed(op, float(scale), ids):
            state.heads.scaled.append(ids)
            state.heads.keys[ids.tobytes()] = flat_ids(keys)
    heads = state.labels_of(op.result)
    if passing is None:
        return state.forget(op)
    if heads is not None and not _unite_heads(state, heads, passing):
        return state.give_up(op, OTHER_HEADS(op.name))
    if set(label_axes(passing)) & {passing.dim() - 2}:
        return state.give_up(op, OVER_VALUES(op.name))
    state.heads.attend(passing)
    state.union.suspects.append((OP_COUNT(op.name), flat_ids(passing)))
    return state.set_labels(op.result, passing)


def _of_each_query(op: Op, labels: torch.Tensor | None) -> torch.Tensor | None:
    """Return the labels of keys or values, repeated for the queries that share their heads."""
    if labels is None or labels.shape[-3] == 1:
        return labels
    return labels.repeat_interleave(op.result.shape[-3] // labels.shape[-3], -3)


def unite_products(
    state: PropagationState,
    op: Op,
    one: torch.Tensor,
    other: torch.Tensor,
    first: str,
) -> bool:
    """Unite the channels of queries with the channels of keys, which are summed over in pairs.

    ``one`` and ``other`` are their labels, with the channels along the last axis; ``first`` is the
    name of the argument of the queries. Returns False if channels are along other axes.
    """
    last = one.dim() - 1
    axes = set(label_axes(one)) | set(label_axes(other))
    if one.dim() != other.dim() or last - 1 in axes or not one.shape[-1] == other.shape[-1] > 1:
        return False
    shape = torch.broadcast_shapes(one.shape, other.shape)  # type: ignore[no-untyped-call]
    state.union.unite(flat_ids(one.expand(shape)), flat_ids(other.expand(shape)))  # shared keys too
    state.heads.attend(one)
    state.heads.attend(other)
    state.heads.note_scores(op.result, one)
    state.forget(op)
    if state.heads.are_cut_whole(one):
        state.set_labels(op.result, one.narrow(last, 0, 1))
    operand = Operand(int(op.name == "einsum"), first, last, one.numpy())
    state.add_read(op, ChannelRead(op.name, (operand,), zeroed=True))
    return True


def _unite_heads(state: PropagationState, heads: torch.Tensor, labels: torch.Tensor) -> bool:
    """Unite whole heads of queries and values; return False if they are along other axes."""
    axes = label_axes(heads)
    if not set(axes) <= set(label_axes(labels)) or max(axes, default=0) >= heads.dim() - 2:
        return False
    if heads.dim() != labels.dim() or not axes:
        return False
    state.union.unite(flat_ids(heads.expand_as(labels)), flat_ids(labels))
    return True


def _depends(state: PropagationState, tensor: torch.Tensor, axis: int) -> bool:
    labels = state.labels_of(tensor)
    return labels is not None and labels.shape[axis] > 1


def _name_of_first(op: Op) -> str:
    return "self" if op.name.startswith("__") else "input"
