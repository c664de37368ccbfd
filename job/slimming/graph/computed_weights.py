"""Weights that are computed from the weight of their layer, row by row.

Weight standardisation (Qiao et al. 2019; Brock et al. 2021) subtracts the mean of each row of a
weight (O, I, …) and divides by its deviation, in each forward pass. The statistics are over the
inputs, so that a narrow network takes them over the kept inputs, like a LayerNorm. Verification
compares with a wide network whose statistics ignore the removed inputs. The same holds for the
norms of the rows where a layer computes cosines (Wang et al. 2018).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from job.slimming.graph.channel_labels import compact, flat_ids, label_axes, labels_along
from job.slimming.graph.derived import RowStatistics
from job.slimming.graph.followed_parameters import cut_parameter
from job.slimming.graph.layers import owner_of
from job.slimming.graph.reasons import COMPUTED_WEIGHT, OP_COUNT
from job.slimming.graph.union import ChannelRead, Operand

if TYPE_CHECKING:
    from job.slimming.graph.derived import Source
    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.trace import Op
    from job.slimming.graph.union import Ids

REDUCING = frozenset("mean sum var std var_mean std_mean amax amin".split())


def reduce_rows(state: PropagationState, op: Op, call: int) -> bool:
    """Follow parameters through an op that takes their statistics; return whether that succeeds."""
    axes = _reduced_axes(op)
    sources = state.derived.sources(op.inputs[0]) if op.inputs else ()
    if axes is None or not sources or len(op.inputs) > 1:
        return False
    keep = bool(
        op.kwargs.get(
            "keepdim",
            op.args[2]
            if op.name in ("mean", "sum", "amax", "amin") and len(op.args) > 2
            else False,
        )
    )
    reduced = []
    for source in sources:
        indices = source.indices
        for axis in axes:
            indices = indices.narrow(axis, 0, 1)
        shape = [n for a, n in enumerate(indices.shape) if keep or a not in axes]
        reduced.append(replace(source, indices=indices.reshape(shape), reduced=True))
    _note_statistics(state, op, call, axes, result_axis=False)
    if any(result.dim() != reduced[0].indices.dim() for result in op.results):
        return False
    for result in op.results:
        state.derived.set_sources(result, tuple(reduced))
    return True


def standardise(state: PropagationState, op: Op, call: int) -> bool:
    """Follow a weight through a batch_norm that normalises its rows; return whether it succeeds."""
    weight, *scales = (op.argument(n, key) for n, key in ((0, "input"), (3, "weight"), (4, "bias")))
    sources = state.derived.sources(weight)
    moments = op.argument(1, "running_mean"), op.argument(2, "running_var")
    if not sources or any(tensor is not None for tensor in moments):
        return False
    found = list(sources)
    for scale in (each for each in scales if each is not None):
        of_scale = state.derived.sources(scale)
        if not of_scale:
            return False
        along = [1, -1, *[1] * (weight.dim() - 2)]
        found += [replace(each, indices=each.indices.reshape(along)) for each in of_scale]
    axes = tuple(axis for axis in range(weight.dim()) if axis != 1)
    _note_statistics(state, op, call, axes, result_axis=True)
    state.derived.set_sources(op.result, tuple(found))
    return True


def normalise_rows(state: PropagationState, op: Op, call: int) -> bool:
    """Follow a weight through F.normalize; return whether that succeeds."""
    dim = op.argument(2, "dim", 1)
    sources = state.derived.sources(op.inputs[0])
    if type(dim) is not int or not sources or len(op.inputs) > 1:
        return False
    _note_statistics(state, op, call, (dim % op.result.dim(),), result_axis=True)
    state.derived.set_sources(op.result, sources)
    return True


def _note_statistics(
    state: PropagationState, op: Op, call: int, axes: tuple[int, ...], *, result_axis: bool
) -> None:
    """Note that an op takes statistics of the parameters behind its first input over ``axes``."""
    for source in state.derived.sources(op.inputs[0]):
        statistics = RowStatistics(op.name, call, source, axes, result_axis)
        state.derived.row_statistics.setdefault(source.name, []).append(statistics)


def computed_from(state: PropagationState, op: Op, weight: torch.Tensor) -> str | None:
    """Return the parameter that the ``weight`` of a layer is computed from, or None.

    Each row must be computed from the same row. Other parameters of its shape are masks.
    """
    sources = state.derived.sources(weight)
    whole = {each.name for each in sources if not each.reduced and each.shape == weight.shape}
    of_layers = {each for each in whole if owner_of(each) in state.layers}
    weights = [each for each in of_layers if each.endswith(".weight")] or list(whole - of_layers)
    if len(weights) != 1:
        return None
    (name,) = weights
    order = torch.arange(weight.numel()).reshape(weight.shape)
    for source in sources:
        if source.name in whole and not source.reduced and not torch.equal(source.indices, order):
            return None
        if (source.reduced and source.name != name) or not _follows_rows(source, weight):
            return None
    return name if all(map(_is_of_rows, state.derived.row_statistics.get(name, ()))) else None


def end_computed(
    state: PropagationState, op: Op, name: str, weight: torch.Tensor, ids: Ids, produced: Ids
) -> None:
    """Note the statistics of a computed weight, and the parameters of its rows.

    ``ids`` are the inputs of the convolution, ``produced`` its outputs. Each group of a grouped
    convolution loses the same inputs, so that the statistics of all rows are over the same ones.
    """
    state.union.computed.add(owner_of(name))
    state.trace.computed[id(weight)] = name
    of_row, *others = ids.reshape(-1, weight.shape[1])
    for source in state.derived.sources(weight):
        if source.name != name and source.shape == weight.shape and len(of_row) > 1:  # a mask
            state.add_slot(source.name, "out", produced, axis=0)
            state.add_slot(source.name, "in", of_row, axis=0)
        elif source.name != name and not _is_alike(source, weight):
            labels = labels_along(produced, 0, weight.dim())
            if (on_axis := source.ids_on_axis(labels)) is None:
                state.union.fix(produced, COMPUTED_WEIGHT(op.name))
                continue
            axis, of_rows, together = on_axis
            state.union.unite(*together)
            cut_parameter(state, source.name, axis, of_rows)
    if len(of_row) > 1 or not others:  # no depthwise convolution, whose rows have one input
        for of_other in others:
            state.union.unite(of_row, of_other)
        for each in state.derived.row_statistics.get(name, ()):
            _add_read(state, each, of_row)
        shape = [-1, *[1] * (weight.dim() - 2)]
        operand = Operand(0, "input", 1, ids.reshape(shape))
        state.add_read(op, ChannelRead(op.name, (operand,), zeroed=True))
    state.derived.row_statistics.pop(name, None)
    state.derived.drop(name)


def _add_read(state: PropagationState, each: RowStatistics, ids: Ids) -> None:
    columns = _coordinates(each.source, 1)
    for axis in set(label_axes(columns)) & set(each.axes):
        read = ChannelRead(
            each.name,
            (Operand(0, "input", axis, ids[flat_ids(columns)]),),
            axis if each.result_axis else None,
            each.call,
        )
        state.union.suspects.append((OP_COUNT(each.name), read.operands[0].ids))
        if state.main:
            state.union.reads.append(read)


def _coordinates(source: Source, axis: int) -> torch.Tensor:
    """Return the index along ``axis`` of a parameter for each value of a tensor, as labels."""
    return compact(torch.from_numpy(source.along(source.indices.numpy(), axis)))


def _is_of_rows(each: RowStatistics) -> bool:
    """Return whether statistics are of each row, and their inputs along one axis."""
    rows, columns = label_axes(_coordinates(each.source, 0)), _coordinates(each.source, 1)
    return not set(rows) & set(each.axes) and len(label_axes(columns)) <= 1


def _follows_rows(source: Source, weight: torch.Tensor) -> bool:
    """Return whether the values of ``source`` are those of the same row, or alike for all."""
    if _is_alike(source, weight):
        return True
    if source.indices.dim() != weight.dim() or len(source.shape) < 1:
        return False
    lines = [axis for axis, size in enumerate(source.shape) if size == weight.shape[0]]
    rows = torch.arange(len(weight)).reshape(-1, *[1] * (weight.dim() - 1))
    return any(torch.equal(_coordinates(source, axis), rows) for axis in lines)


def _is_alike(source: Source, weight: torch.Tensor) -> bool:
    """Return whether the values of ``source`` are alike for all rows and inputs, as some masks."""
    if source.indices.numel() == 1:
        return True
    return source.indices.dim() == weight.dim() > 2 and set(source.indices.shape[:2]) == {1}


def _reduced_axes(op: Op) -> tuple[int, ...] | None:
    dim = op.argument(1, "dim", op.kwargs.get("axis"))
    dims = [dim] if type(dim) is int else dim
    if not isinstance(dims, (list, tuple)) or not dims or not op.inputs:
        return None
    return tuple(sorted({axis % op.inputs[0].dim() for axis in dims}))
