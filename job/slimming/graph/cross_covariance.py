"""Cross-covariance attention: products of channels with channels that weight the values.

The products have the channels of one operand, such as queries, along their rows, and those of the
other, such as keys, along their columns (El-Nouby et al. 2021). A softmax over the columns and a
product with the values sum over the columns, and the result has the channels of the rows. In
linear attention, q @ (k.mT @ v), the sum is over the rows, and the result has the channels of the
columns. The labels of the products are the labels of their columns; ``state.rows`` has the labels
of their rows. Verification compares with the wide network in which the weights of removed columns
are zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.slimming.graph.channel_labels import flat_ids, label_axes
from job.slimming.graph.reasons import NOT_SUPPORTED, OP_COUNT
from job.slimming.graph.union import ChannelRead, Operand

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.trace import Op

PRODUCTS = frozenset({"matmul", "__matmul__", "bmm"})


def multiply_channels(state: PropagationState, op: Op) -> bool:
    """Label products of channels with channels, if values are multiplied by them later.

    Returns False if they are used in another way, or if their operands have other heads.
    """
    rows, columns = (state.labels_of(tensor) for tensor in op.args[:2])
    if rows is None or columns is None or rows.shape[:-2] != columns.shape[:-2]:
        return False
    if rows.shape[-1] > 1 or columns.shape[-2] > 1 or not _multiply_values(state, op):
        return False
    for tensor in _followed(state, op):
        state.rows[id(tensor)] = rows
    for labels in (rows, columns):
        state.heads.attend(labels)
        state.union.suspects.append((OP_COUNT(op.name), flat_ids(labels)))
    state.set_labels(op.result, columns)
    return True


def weight_columns(state: PropagationState, op: Op) -> bool:
    """Keep the labels of a softmax over the columns of products; False for another softmax."""
    image = op.inputs[0]
    labels, dim = state.labels_of(image), op.argument(1, "dim")
    last = image.dim() - 1
    if id(image) not in state.rows or labels is None or dim is None or dim % (last + 1) != last:
        return False
    if not state.heads.are_cut_whole(labels):
        state.add_read(
            op, ChannelRead(op.name, (Operand(0, "input", last, labels.numpy()),), zeroed=True)
        )
    state.set_labels(op.result, labels)
    return True


def sum_over_columns(state: PropagationState, op: Op, rows: torch.Tensor) -> None:
    """Multiply values by the products whose rows have the labels ``rows``."""
    weights, values = (state.labels_of(tensor) for tensor in op.args[:2])
    fits = weights is not None and values is not None and weights.shape == values.mT.shape
    if weights is None or values is None or not fits or weights.shape[-2] > 1:
        state.union.fix(flat_ids(rows), NOT_SUPPORTED(op.name))
        return state.give_up(op, NOT_SUPPORTED(op.name))
    state.heads.attend(values)
    return _sum_over(state, op, weights, values, rows)


def sum_over_rows(state: PropagationState, op: Op, rows: torch.Tensor) -> None:
    """Multiply queries by products of channels with channels, as in q @ (k.mT @ v).

    The products have the labels ``rows`` along their rows, which are summed over.
    """
    queries, columns = (state.labels_of(tensor) for tensor in op.args[:2])
    fits = queries is not None and queries.shape == rows.mT.shape
    if queries is None or columns is None or not fits:
        state.union.fix(flat_ids(rows), NOT_SUPPORTED(op.name))
        return state.give_up(op, NOT_SUPPORTED(op.name))
    state.heads.attend(queries)
    return _sum_over(state, op, queries, rows, columns)


def _sum_over(
    state: PropagationState,
    op: Op,
    first: torch.Tensor,
    second: torch.Tensor,
    result: torch.Tensor,
) -> None:
    """Sum over the channels of both operands, whose labels are ``first`` and ``second``."""
    state.union.unite(flat_ids(first), flat_ids(second))
    name = "self" if op.name.startswith("__") else "input"
    operand = Operand(0, name, label_axes(first)[-1], first.numpy())
    state.add_read(op, ChannelRead(op.name, (operand,), zeroed=True))
    return state.set_labels(op.result, result)


def attend_channels(state: PropagationState, op: Op, labels: Sequence[torch.Tensor | None]) -> bool:
    """Attend to channels with ``scaled_dot_product_attention``, without a mask.

    ``labels`` are those of queries, keys and values. Returns False if these have no channels in
    place of tokens, or have other heads.
    """
    queries, keys, values = labels
    masked = op.argument(3, "attn_mask") is not None or op.argument(5, "is_causal", False)
    if queries is None or keys is None or values is None or masked:
        return False
    if any(each.shape[-1] > 1 or each.shape[-2] == 1 for each in (queries, keys, values)):
        return False
    if queries.shape[:-2] != keys.shape[:-2] or values.shape != keys.shape:
        return False
    state.union.unite(flat_ids(keys), flat_ids(values))
    for each in (queries, keys, values):
        state.heads.attend(each)
        state.union.suspects.append((OP_COUNT(op.name), flat_ids(each)))
    if not state.heads.are_cut_whole(keys):
        operand = Operand(3, "attn_mask", keys.dim() - 2, keys.mT.numpy())
        state.add_read(op, ChannelRead(op.name, (operand,), zeroed=True))
    state.set_labels(op.result, queries)
    return True


def _multiply_values(state: PropagationState, op: Op) -> bool:
    """Return whether the products of ``op`` end as one operand of a product."""
    *_, last = _uses(state, op)
    return last.name in PRODUCTS and last is not op


def _followed(state: PropagationState, op: Op) -> Iterator[torch.Tensor]:
    """Yield the products of ``op``, and the results of later ops that keep their shape."""
    for use in _uses(state, op):
        if use is op or use.name not in PRODUCTS:
            yield use.result


def _uses(state: PropagationState, op: Op) -> Iterator[Op]:
    """Yield ``op`` and the first op that uses each result, up to a product with values."""
    yield op
    tensor, ops = op.result, iter(state.trace.ops)
    next(each for each in ops if each is op)
    for use in ops:
        if not any(tensor is each for each in use.inputs):
            continue
        if use.name in PRODUCTS:
            if (tensor is use.args[0]) != (tensor is use.args[1]):
                yield use
            return
        if len(use.results) != 1 or use.results[0].shape != tensor.shape:
            return
        yield use
        tensor = use.results[0]
