"""Rules of products with a matrix of the network: ``x @ W``, ``x @ W.T``, ``W @ x``, einsum.

Such a matrix, a parameter or a buffer, acts as a linear layer without a module. Its outputs are
along axis 1 for ``x @ W``, otherwise along axis 0, as in ``nn.Linear``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from job.slimming.graph.attention_rules import einsum, matmul, sides_of
from job.slimming.graph.channel_labels import label_axes, labels_along
from job.slimming.graph.computed_weights import computed_from, end_computed
from job.slimming.graph.followed_parameters import (
    cut_parameter,
    follow_parameters,
    is_parameter,
    produced_by,
)
from job.slimming.graph.layers import owner_of
from job.slimming.graph.letter_rules import multiply_by_letters
from job.slimming.graph.reasons import BUFFER, COMPUTED_BIAS, MIXED, NOT_SUPPORTED
from job.slimming.graph.union import ChannelRead, Operand

if TYPE_CHECKING:
    import torch

    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.trace import Op

TRANSPOSITIONS = frozenset("t T mT transpose swapaxes swapdims".split())
MATRIX_PRODUCTS = frozenset("matmul __matmul__ mm addmm einsum".split())


class StoredMatrix(NamedTuple):
    """The parameter or buffer ``name`` that a matrix is, or that it is computed from.

    ``weight`` has its outputs along the axis 0, or along ``axis`` if that is 1.
    """

    name: str
    weight: torch.Tensor
    axis: int | None = None
    computed: bool = False

    @property
    def outputs(self) -> int:
        """The number of outputs."""
        return int(self.weight.shape[self.axis or 0])


def product(state: PropagationState, op: Op) -> None:
    """Multiply activations and a matrix, in either order, or two activations."""
    one, other = op.inputs[:2] if len(op.args) < 2 else op.args[:2]
    if min(one.dim(), other.dim()) > 1:
        if (matrix := _matrix(state, op, other, inputs_first=True)) and one.dim() > 1:
            return _multiply(state, op, one, -1, matrix)
        if matrix := _matrix(state, op, one, inputs_first=False):
            return _multiply(state, op, other, -2, matrix)
    state.read_inputs_elsewhere(op)
    return matmul(state, op)


def produces(state: PropagationState, op: Op) -> bool:
    """Produce the channels of ``x @ W`` for ``x`` computed from the inputs, without channels.

    Returns False for other products.
    """
    image, other = op.inputs[:2] if len(op.args) < 2 else op.args[:2]
    if op.name in ("einsum", "addmm") or id(image) not in state.trace.of_inputs:
        return False
    matrix = _matrix(state, op, other, inputs_first=True)
    if matrix is None or not is_parameter(state, matrix.name):
        return False
    made = produced_by(state, matrix.name, matrix.outputs, matrix.axis)
    state.set_ids(op.result, made, op.result.dim() - 1)
    return True


def sum_of_product(state: PropagationState, op: Op) -> None:
    """Add a bias to a product of activations and a matrix: addmm."""
    bias, image = op.argument(0, "input"), op.argument(1, "mat1")
    matrix = _matrix(state, op, op.argument(2, "mat2"), inputs_first=True)
    if matrix is None or state.labels_of(bias) is not None:
        return state.give_up(op, NOT_SUPPORTED(op.name))
    _multiply(state, op, image, -1, matrix)
    made = state.labels_of(op.result)
    if made is not None and not follow_parameters(state, op, bias, made):
        state.fix(op.result, COMPUTED_BIAS(op.name))
    return None


def product_by_letters(state: PropagationState, op: Op) -> None:
    """Multiply activations and a matrix, or two activations, by an equation."""
    for place in (0, 1):
        found = _letters(op, place)
        if found is None:
            continue
        image, matrix_letters, summed, result = found
        labels = state.labels_of(op.args[1 + place])
        if labels is not None and label_axes(labels) and labels.shape[image.index(summed)] == 1:
            continue  # a sum over places
        own = _matrix(state, op, op.args[2 - place], inputs_first=matrix_letters[0] == summed)
        if own is not None:
            (made,) = set(matrix_letters) - {summed}
            axis = image.index(summed)
            return _multiply(state, op, op.args[1 + place], axis, own, result.index(made))
    if _sum_with_table(state, op):
        return None
    if any(map(state.derived.sources, op.inputs)) and multiply_by_letters(state, op):
        return None
    state.read_inputs_elsewhere(op)
    return einsum(state, op)


def _sum_with_table(state: PropagationState, op: Op) -> bool:
    """Sum over the channels of activations and a table, such as that of relative positions.

    All lines of the activations share the table, and lose the same channels. Returns False for
    other products.
    """
    sides = sides_of(op)
    if sides is None or "." in str(op.args[0]):
        return False
    for place in (0, 1):
        image, table = op.args[1 + place], op.args[2 - place]
        labels, sources = state.labels_of(image), state.derived.sources(table)
        summed = "".join(set(sides[place]) & set(sides[1 - place]) - set(sides[2]))
        if labels is None or not sources or len(summed) != 1:
            continue
        axis = sides[place].index(summed)
        if labels.shape[axis] == 1 or (ids := state.unite_lines(labels, axis)) is None:
            return False
        along_table = labels_along(ids, sides[1 - place].index(summed), table.dim())
        places = [None if s.reduced else s.ids_on_axis(along_table) for s in sources]
        for source, found in zip(sources, places, strict=True):
            if found is None:
                return False
            state.union.unite(*found[2])
            cut_parameter(state, source.name, found[0], found[1])
        state.heads.tables.append(ids)
        shape = [-1 if each == axis else 1 for each in range(image.dim())]
        operand = Operand(1 + place, "operands", axis, ids.reshape(shape))
        state.add_read(op, ChannelRead(op.name, (operand,), zeroed=True))
        state.forget(op)
        return True
    return False


def distances(state: PropagationState, op: Op) -> None:
    """Sum over the channels of activations and of centres, which are a parameter: cdist."""
    image, centres = op.args[:2] if len(op.args) > 1 else (None, None)
    name, labels = state.trace.name(centres), state.labels_of(image)
    ids = None if image is None or labels is None else state.ids_along(image, -1)
    if ids is None or name is None or centres.dim() != 2:
        return state.give_up(op, NOT_SUPPORTED(op.name))
    if not is_parameter(state, name):
        return state.give_up(op, BUFFER(op.name))
    state.add_slot(name, "through", ids, axis=1)
    operands = Operand(0, "x1", image.dim() - 1, ids), Operand(1, "x2", 1, ids)
    state.add_read(op, ChannelRead(op.name, operands))
    return state.forget(op)


def _letters(op: Op, place: int) -> tuple[str, str, str, str] | None:
    """Return the letters of an equation if its operand ``place`` is multiplied by a matrix.

    These are the letters of the operand, of the matrix, the one that is summed over, and those of
    the result.
    """
    sides = sides_of(op)
    if sides is None:
        return None
    rest = "ABCDEFGH"[: op.args[1 + place].dim() - len(sides[place].replace("...", ""))]
    image, result = (side.replace("...", rest) for side in (sides[place], sides[2]))
    matrix = sides[1 - place]
    shared = set(image) & set(matrix)
    if len(set(matrix)) != 2 or len(matrix) != 2 or len(shared) != 1 or "." in matrix:
        return None
    (summed,) = shared
    expected = (set(image) | set(matrix)) - shared
    if set(result) != expected or len(image) != len(set(image)) or len(result) != len(set(result)):
        return None
    return image, matrix, summed, result


def _multiply(
    state: PropagationState,
    op: Op,
    image: torch.Tensor,
    axis: int,
    matrix: StoredMatrix,
    result_axis: int | None = None,
) -> None:
    """Consume the channels of ``image`` along ``axis``, and produce those of a matrix."""
    labels = state.labels_of(image)
    if labels is None:
        return state.give_up(op, NOT_SUPPORTED(op.name))
    if result_axis is None:
        result_axis = axis
        if labels.shape[axis] == 1 < image.shape[axis] and image.dim() == op.result.dim():
            return state.set_labels(op.result, labels)  # channels are along another axis
    ids = state.ids_of_lines(image, axis)
    if ids is None:
        return state.give_up(op, MIXED(op.name))
    state.add_slot(matrix.name, "in", ids, axis=matrix.axis)
    produced = produced_by(state, matrix.name, matrix.outputs, matrix.axis)
    if matrix.computed:
        end_computed(state, op, matrix.name, matrix.weight, ids, produced)
    return state.set_ids(op.result, produced, result_axis % op.result.dim())


def _matrix(
    state: PropagationState, op: Op, tensor: torch.Tensor, *, inputs_first: bool
) -> StoredMatrix | None:
    """Return the parameter or buffer behind the matrix of a product; None for other tensors."""
    if tensor.dim() != 2 or state.labels_of(tensor) is not None:
        return None
    turned, axis = _before_transposition(state, tensor), 1 if inputs_first else None
    for weight, along in ((tensor, axis), (turned, None if axis else 1)):
        name = None if weight is None else state.trace.name(weight)
        if weight is not None and name is not None:
            return StoredMatrix(name, weight, along) if _can_be_cut(state, name, along) else None
    weight = turned if inputs_first else tensor
    name = None if weight is None else computed_from(state, op, weight)
    if weight is None or name is None or not _can_be_cut(state, name, None):
        return None
    return StoredMatrix(name, weight, computed=True)


def _can_be_cut(state: PropagationState, name: str, axis: int | None) -> bool:
    """Return whether a matrix is that of no layer, or the weight of a layer as it is."""
    return owner_of(name) not in state.layers or (axis is None and name.endswith(".weight"))


def _before_transposition(state: PropagationState, tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the matrix whose transpose ``tensor`` is, or None."""
    for op in state.trace.ops:
        if op.name in TRANSPOSITIONS and any(tensor is result for result in op.results):
            matrix = op.inputs[0]
            return matrix if matrix.shape == tensor.shape[::-1] else None
    return None
