"""Blank channels: axes of tensors that code fills alike, as many as there are channels.

Examples are the zeros that a ConvLSTM starts with (Shi et al. 2015), and the map of a spatial gate
that is expanded to all channels (BAM, Park et al. 2018). No weight makes these channels, so that
they are those of the tensors that they are combined with. A trial cut shows whether the code makes
fewer of them for a narrow network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from job.slimming.graph.channel_labels import flat_ids, label_axes
from job.slimming.graph.propagation_state import Blank
from job.slimming.graph.reasons import OP_COUNT
from job.slimming.graph.trace import EXPANDING, FILLING
from job.slimming.graph.union import AttributeSize

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.trace import Op
    from job.slimming.graph.union import Ids

READING = frozenset("conv1d conv2d conv3d conv_transpose1d conv_transpose2d linear".split())


def follow_blank(
    state: PropagationState, op: Op, inputs: Sequence[torch.Tensor], *, pointwise: bool
) -> None:
    """Note the results of an op on ``inputs`` that are blank along some axes.

    ``pointwise`` is whether it computes each value from those at the same position.
    """
    found = None
    if len(op.results) == 1:
        found = _combined(state, op, inputs) if pointwise else _made(state, op)
    for result in op.results:
        state.blanks.pop(id(result), None)
    if found and found.axes:
        state.blanks[id(op.results[0])] = found


def _made(state: PropagationState, op: Op) -> Blank | None:
    """Return what an op fills, or expands."""
    result = op.results[0]
    if op.name in FILLING:
        return Blank(frozenset(range(1, result.dim())), (op,))
    if op.name in EXPANDING:
        shape, earlier = op.inputs[0].shape, state.blanks.get(id(op.inputs[0]))
        if result.dim() != len(shape):
            return None
        grown = frozenset(axis for axis, n in enumerate(shape) if axis and n < result.shape[axis])
        if any(shape[axis] > 1 for axis in grown):
            return None
        axes, makers = earlier or (frozenset(), ())
        return Blank(axes | grown, (*makers, op))
    return None


def _combined(state: PropagationState, op: Op, inputs: Sequence[torch.Tensor]) -> Blank | None:
    """Return what an op on values at the same position makes of blank tensors."""
    dims = op.results[0].dim()
    axes = set(range(dims))
    makers: tuple[Op, ...] = ()
    for tensor in inputs:
        blank, missing = state.blanks.get(id(tensor)), dims - tensor.dim()
        axes -= {
            axis
            for axis, size in enumerate(tensor.shape, missing)
            if size > 1 and not (blank and axis - missing in blank.axes)
        }
        makers += blank.makers if blank else ()
    return Blank(frozenset(axes), makers) if makers else None


def fits_blank(state: PropagationState, tensor: torch.Tensor, labels: torch.Tensor) -> bool:
    """Return whether a tensor is blank along all axes of ``labels``, so that it may have them."""
    blank, missing = state.blanks.get(id(tensor)), labels.dim() - tensor.dim()
    axes = label_axes(labels)
    if blank is None or not axes or any(axis - missing not in blank.axes for axis in axes):
        return False
    _note_sizes(state, blank, flat_ids(labels))
    return True


def label_blank(state: PropagationState, tensor: torch.Tensor, axis: int) -> Ids | None:
    """Label a blank tensor with new channels (n,) along ``axis``; None for another tensor.

    They are cut only if they are united with channels that a layer makes, later in the pass.
    """
    blank = state.blanks.pop(id(tensor), None)
    if blank is None or axis not in blank.axes:
        return None
    ids = np.arange(state.union.count, state.union.count + tensor.shape[axis])
    state.union.count += len(ids)
    state.set_ids(tensor, ids, axis)
    _note_sizes(state, blank, ids)
    return ids


def label_blank_input(state: PropagationState, op: Op) -> None:
    """Label the input of a convolution or linear layer, if it is blank."""
    if op.name in READING and state.labels_of(image := op.argument(0, "input")) is None:
        label_blank(state, image, image.dim() - 1 if op.name == "linear" else 1)


def concatenates_blanks(state: PropagationState, op: Op) -> bool:
    """Return whether an op without channels concatenates blank ones with others."""
    axis = op.argument(1, "dim", op.kwargs.get("axis", 0)) % op.results[0].dim()
    blanks = [state.blanks.get(id(tensor)) for tensor in op.inputs]
    return axis == 1 and op.results[0].dim() != 3 and any(b and 1 in b.axes for b in blanks)


def _note_sizes(state: PropagationState, blank: Blank, ids: Ids) -> None:
    """Note the attributes that the code fills a blank tensor by, and that a trial cut must pass."""
    for maker in blank.makers:
        state.union.suspect_at(maker.line, OP_COUNT(maker.name), ids)
        name = state.module_name(maker.module)
        numbers = maker.caller.numbers if state.main and name is not None else {}
        for attribute, value in numbers.items():
            if type(value) is int and value == len(ids):
                state.union.sizes.append(AttributeSize(str(name), attribute, None, ids))
