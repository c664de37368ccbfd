"""Products of activations by the letters of an equation, as in einsum. A matmul is one of these.

Channels along a letter of the result pass to it. Those along a letter that two operands are summed
over are cut together, as queries and keys are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from job.slimming.graph.channel_labels import flat_ids, label_axes
from job.slimming.graph.followed_parameters import follow_parameters
from job.slimming.graph.reasons import (
    DIFFERENT_AXES,
    NEVER_CUT,
    NUMBER_OF_HEADS,
    ONE_WITH_SEVERAL,
    OP_COUNT,
)
from job.slimming.graph.union import ChannelRead, Operand

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.trace import Op


class Factor(NamedTuple):
    """An operand with a letter for each axis; ``place`` and ``name`` are those of the argument."""

    tensor: torch.Tensor
    letters: str
    place: int
    name: str


def factors_of(op: Op) -> tuple[list[Factor], str] | None:
    """Return the operands of an einsum or matmul, and the letters of the result.

    Returns None for equations with an ellipsis, without a result, or with a letter twice.
    """
    if op.name != "einsum":
        return _factors_of_matmul(op)
    sides = str(op.args[0]).replace(" ", "").split("->")
    letters = sides[0].split(",")
    if len(sides) != 2 or "." in sides[0] or len(letters) != len(op.args) - 1:
        return None
    if any(len(set(each)) < len(each) for each in (*letters, sides[1])):
        return None
    tensors = op.args[1:]
    places = range(1, len(op.args))
    return [
        Factor(*each, "operands") for each in zip(tensors, letters, places, strict=True)
    ], sides[1]


def _factors_of_matmul(op: Op) -> tuple[list[Factor], str] | None:
    one, other = (op.args[0], op.args[1]) if len(op.args) > 1 else op.inputs[:2]
    batch = "ABCDEFGH"[: max(one.dim(), other.dim()) - 2]
    letters = [batch[len(batch) - max(0, t.dim() - 2) :] for t in (one, other)]
    rows, columns = "n" * (one.dim() > 1), "m" * (other.dim() > 1)
    first = "self" if op.name.startswith("__") else "input"
    factors = [
        Factor(one, letters[0] + rows + "k", 0, first),
        Factor(other, letters[1] + "k" + columns, 1, "other"),
    ]
    return factors, batch + rows + columns


def multiply_by_letters(state: PropagationState, op: Op) -> bool:
    """Pass the channels of a product, or unite those that it sums over; return False on failure."""
    found = factors_of(op)
    if found is None:
        return False
    factors, result = found
    labelled = {}
    for number, factor in enumerate(factors):
        labels = state.labels_of(factor.tensor)
        if labels is not None and label_axes(labels):
            labelled[number] = labels
        elif labels is not None:  # weights from a layer of one output
            state.fix(factor.tensor, ONE_WITH_SEVERAL(op.name))
    along = {n: _letters_along(factors[n], labels) for n, labels in labelled.items()}
    summed = {letter for letters in along.values() for letter in letters} - set(result)
    if len(along) == 2 and len(summed) == 1 and all(summed <= each for each in along.values()):
        return _unite_summed(state, op, factors, labelled, result, *summed)
    for number, letters in along.items():
        if letters & summed:
            if not letters - summed:  # a sum with channels that are never cut
                state.fix(factors[number].tensor, NEVER_CUT(op.name))
                del labelled[number]
                continue
            for axis in map(factors[number].letters.index, letters & summed):
                labelled[number] = _alike_along(state, labelled[number], axis)
    weights = {n for n, letters in along.items() if letters & summed}
    return bool(labelled) and _pass_on(state, op, factors, labelled, result, weights)


def _letters_along(factor: Factor, labels: torch.Tensor) -> set[str]:
    return {factor.letters[axis] for axis in label_axes(labels)}


def _alike_along(state: PropagationState, labels: torch.Tensor, axis: int) -> torch.Tensor:
    """Unite the channels along ``axis``, e.g. those of experts whose results are added."""
    first = labels.narrow(axis, 0, 1)
    state.union.unite(flat_ids(first.expand_as(labels)), flat_ids(labels))
    return first


def _arranged(labels: torch.Tensor, letters: str, result: str) -> torch.Tensor:
    """Return labels along ``letters`` in the order of ``result``; they have size 1 along others."""
    axes = [axis for axis, letter in enumerate(letters) if letter not in result]
    for axis in reversed(axes):
        labels = labels.narrow(axis, 0, 1).squeeze(axis)
    kept = [letter for letter in letters if letter in result]
    labels = labels.permute([kept.index(letter) for letter in result if letter in kept])
    for axis, letter in enumerate(result):
        if letter not in kept:
            labels = labels.unsqueeze(axis)
    return labels


def _unite_summed(
    state: PropagationState,
    op: Op,
    factors: Sequence[Factor],
    labelled: dict[int, torch.Tensor],
    result: str,
    summed: str,
) -> bool:
    """Unite the channels that two operands are summed over; both have them along ``summed``."""
    (number, one), (other_number, other) = labelled.items()
    first, second = factors[number], factors[other_number]
    if len(factors) > 2 or _letters_along(first, one) != _letters_along(second, other):
        return False
    letters = "".join(dict.fromkeys(first.letters + second.letters))
    both = [_arranged(*each, letters) for each in ((one, first.letters), (other, second.letters))]
    shape = torch.broadcast_shapes(*(each.shape for each in both))  # type: ignore[no-untyped-call]
    state.union.unite(*(flat_ids(each.expand(shape)) for each in both))
    state.heads.attend(one)
    state.heads.attend(other)
    state.heads.note_scores(op.result, one)
    state.forget(op)
    axis = first.letters.index(summed)
    if state.heads.are_cut_whole(one):
        state.set_labels(op.result, _arranged(one.narrow(axis, 0, 1), first.letters, result))
    operand = Operand(first.place, first.name, axis, one.numpy())
    state.add_read(op, ChannelRead(op.name, (operand,), zeroed=True))
    return True


def _pass_on(
    state: PropagationState,
    op: Op,
    factors: Sequence[Factor],
    labelled: dict[int, torch.Tensor],
    result: str,
    weights: Collection[int],
) -> bool:
    """Pass the channels of operands to the result; those that are along other axes are fixed.

    ``weights`` are the numbers of the operands that have channels along letters to sum over.
    """
    arranged = {n: _arranged(x, factors[n].letters, result) for n, x in labelled.items()}
    extents = {n: (len(label_axes(x)), x.numel()) for n, x in arranged.items()}
    most = max(arranged, key=lambda n: (n not in weights, *extents[n]))
    passed = arranged.pop(most)
    for number, labels in arranged.items():
        axes = set(label_axes(labels)), set(label_axes(passed))
        if number in weights and axes[0] & axes[1]:  # those of a head are cut together
            for axis in axes[0] - axes[1]:
                labels = _alike_along(state, labels, axis)
            axes = axes[0] & axes[1], axes[1]
        heads = axes[0] < axes[1]
        if not axes[0] <= axes[1]:
            if axes[0] & axes[1]:
                return False
            state.fix(factors[number].tensor, DIFFERENT_AXES(op.name))
        elif heads and not state.heads.are_cut_whole(passed):
            state.fix(factors[number].tensor, NUMBER_OF_HEADS(op.name))
        else:
            state.union.unite(flat_ids(labels.expand_as(passed)), flat_ids(passed))
    letters = {result[axis] for axis in label_axes(passed)}
    for number, factor in enumerate(factors):
        if number in labelled:
            continue
        sizes = zip(factor.letters, factor.tensor.shape, strict=True)
        own = {letter for letter, size in sizes if letter in letters and size > 1}
        # weights of heads whose number stays
        of_heads = own < letters and not state.heads.are_cut_whole(passed)
        if not own or of_heads:
            state.read_elsewhere(op, factor.tensor)
            continue
        labels = _arranged(passed, result, factor.letters)
        if not follow_parameters(state, op, factor.tensor, labels):
            return False
    state.heads.attend(passed)
    state.union.suspects.append((OP_COUNT(op.name), flat_ids(passed)))
    state.set_labels(op.result, passed)
    return True
