"""Propagation of channels through the traces of a network, op by op.

The tables in op_rules and layer_rules define the effect of each op on channels. The result is a
``ChannelUnion``.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from job.errors import GammaslimError, is_out_of_memory, reason
from job.slimming.graph.attribute_sizes import compared_lists, missing_elements
from job.slimming.graph.blank_channels import (
    concatenates_blanks,
    follow_blank,
    label_blank_input,
)
from job.slimming.graph.channel_labels import flat_ids, label_axes
from job.slimming.graph.computed_weights import REDUCING, normalise_rows, reduce_rows
from job.slimming.graph.derived import DerivedValues
from job.slimming.graph.followed_parameters import end_parts, end_views, note_view
from job.slimming.graph.heads import SCALINGS
from job.slimming.graph.layer_rules import LAYER_RULES, is_layer
from job.slimming.graph.layers import modules_of
from job.slimming.graph.lookup_rule import LOOKUPS, look_up
from job.slimming.graph.op_rules import CONCATENATIONS, LIKE, MOVING, OP_RULES, POINTWISE
from job.slimming.graph.product_rules import MATRIX_PRODUCTS, produces
from job.slimming.graph.propagation_state import PropagationState
from job.slimming.graph.reasons import (
    CODE_COUNT,
    FAULT,
    NOT_SUPPORTED,
    OTHER_USE,
    OUTPUT,
    UNKNOWN_ORIGIN,
)
from job.slimming.graph.streams import outvoted_selectors
from job.slimming.graph.union import FIXED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import nn

    from job.slimming.graph.propagation_state import Rule
    from job.slimming.graph.trace import Op, SizeRead, Trace
    from job.slimming.graph.union import ChannelUnion, Ids


OVER_CHANNELS = frozenset({"layer_norm", "rms_norm", "group_norm"})


def propagate_channels(network: nn.Module, traces: Sequence[Trace]) -> ChannelUnion:
    """Propagate the channels of ``network`` through its traces, first the one in eval mode."""
    layers = frozenset(name for name, m in modules_of(network).items() if is_layer(m))
    layer_ops = {op: rule.propagate for rule in LAYER_RULES for op in rule.ops}
    not_selecting, normed = set[str](), set[bytes]()
    while True:
        state = PropagationState(network, layers, not_selecting, normed)
        for number, trace in enumerate(traces):
            state.begin(trace, DerivedValues(trace, MOVING, POINTWISE), main=number == 0)
            _propagate_trace(state, layer_ops)
        end_parts(state)
        end_views(state)
        state.union.sizes += list(missing_elements(state.union.sizes, state.modules))
        state.heads.end(state.union)
        state.union.end_op()
        mixed = state.union.united_with_others(set(state.selected))
        mixed |= state.selected.keys() & state.passed
        mixed |= _selected_next_to_norms(state) - not_selecting
        mixed |= outvoted_selectors(state.union, state.streams)
        found = state.heads.newly_normed()
        if not mixed and not found:
            return state.union
        normed |= found
        not_selecting |= mixed  # united with other channels, or outvoted


def _selected_next_to_norms(state: PropagationState) -> set[str]:
    """Return the BatchNorms that select from a stream that norms over all channels use too.

    Such a norm cannot select channels, so that they are cut from the stream instead.
    """
    read = [r.operands[0].ids for r in state.union.reads if r.name in OVER_CHANNELS]
    if not read or not state.streams:
        return set()
    roots = state.union.roots()
    normed = set(roots[np.concatenate(read)].tolist()) - {roots[FIXED]}
    return {name for name, ids in state.streams.items() if normed & set(roots[ids].tolist())}


def _propagate_trace(state: PropagationState, layer_ops: Mapping[str, Rule]) -> None:
    trace, union = state.trace, state.union
    known = {*map(id, trace.inputs), *trace.names, *trace.constants}
    on_meta = any(tensor.is_meta for tensor in trace.inputs)  # others are constants of the code
    for op, shared in zip(trace.ops, _shared_results(trace), strict=True):
        if any(id(tensor) not in known and tensor.is_meta == on_meta for tensor in op.inputs):
            union.fix(np.arange(union.count), UNKNOWN_ORIGIN(op.name))
        try:
            _propagate_op(state, op, layer_ops, shared)
        except GammaslimError:
            raise
        except Exception as error:  # of a rule: the rest of the network can be cut
            if is_out_of_memory(error):
                raise
            state.give_up(op, FAULT(f"{op.name}: {reason(error)}"))
        union.end_op()
        known.update(map(id, op.results))
    union.place = ""
    for output in trace.outputs:
        state.fix(output, OUTPUT())
        for source in state.derived.sources(output):
            state.other_uses.setdefault(source.name, OUTPUT.text)
    state.end_slices()
    for slot in union.slots:
        if slot.layer in state.other_uses:
            union.fix(slot.ids, OTHER_USE(state.other_uses[slot.layer]))
    for read in trace.measured:
        if (labels := state.labels_of(read.tensor)) is not None:
            union.suspects.append((CODE_COUNT(), flat_ids(labels)))
            state.note_compared(read, labels)
            union.place = read.line
            union.end_op()
    union.place = ""
    if state.main:
        _note_lists(state)


def _note_lists(state: PropagationState) -> None:
    """Note the lists that code may compare with the sizes of several tensors."""
    methods: dict[Any, dict[int, tuple[SizeRead, Ids]]] = {}
    for read in state.trace.measured:
        labels = state.labels_of(read.tensor)
        one = labels is not None and len(label_axes(labels)) == 1
        ids = flat_ids(labels) if labels is not None and one else np.empty(0, np.intp)
        tensors = methods.setdefault((id(read.caller.module), read.caller.names_used), {})
        tensors.setdefault(id(read.tensor), (read, ids))
    for tensors in methods.values():
        reads = list(tensors.values())
        if len(reads) > 1 and (module := state.module_name(reads[0][0].caller.module)) is not None:
            state.union.sizes += compared_lists(reads, module)


def _propagate_op(
    state: PropagationState, op: Op, layer_ops: Mapping[str, Rule], shared: bool
) -> None:
    if op.name in SCALINGS:
        state.heads.note_scale(op, state.labels_of(op.inputs[0]) if op.inputs else None)
    labelled = [tensor for tensor in op.inputs if state.labels_of(tensor) is not None]
    state.begin_op(op, labelled, result_shared=shared)
    if op.name in layer_ops:
        label_blank_input(state, op)
        layer_ops[op.name](state, op)
    elif not labelled and op.name in CONCATENATIONS and concatenates_blanks(state, op):
        OP_RULES[op.name](state, op)
    elif not labelled or (op.name in LIKE and labelled == list(op.inputs[1:2])):
        _skip(state, op)
    elif op.name == "__getitem__" and id(op.result) in state.trace.sizes_alone:
        state.forget(op)
    elif op.name in OP_RULES:
        if op.name not in (*POINTWISE, *CONCATENATIONS, *MATRIX_PRODUCTS):
            state.read_inputs_elsewhere(op)
        OP_RULES[op.name](state, op)
    else:
        state.give_up(op, NOT_SUPPORTED(op.name))
    follow_blank(state, op, _with_values(op), pointwise=op.name in POINTWISE)
    for result in op.results:
        if (labels := state.labels_of(result)) is not None:
            state.heads.check(labels)


def _skip(state: PropagationState, op: Op) -> None:
    """Skip an op on weights, or on values from which nothing can be cut."""
    state.forget(op)
    if op.name in LOOKUPS and look_up(state, op):
        return
    if op.name in MATRIX_PRODUCTS and produces(state, op):
        return
    if op.name in POINTWISE or op.name in MOVING:
        state.heads.follow_scores(op)
    inputs = _with_values(op)
    if state.derived.derive(op, inputs):
        note_view(state, op)
        return
    if op.name in REDUCING and reduce_rows(state, op, state.call_number(op)):
        return
    if op.name == "normalize" and normalise_rows(state, op, state.call_number(op)):
        return
    for tensor in inputs:
        if tensor.dim() and all(tensor is not result for result in op.results):
            state.read_elsewhere(op, tensor)


def _with_values(op: Op) -> tuple[torch.Tensor, ...]:
    """Return the inputs of an op whose values it uses, not only their sizes."""
    return op.inputs[:1] if op.name in LIKE else op.inputs


def _shared_results(trace: Trace) -> list[bool]:
    """Return for each op whether later ops use the values of one of its results several times."""
    producers: dict[int, tuple[int, int]] = {}  # ops, and numbers of their results
    count: Counter[tuple[int, int]] = Counter()
    for number, op in enumerate(trace.ops):
        for key in {id(tensor) for tensor in _with_values(op)}:
            if key in producers:
                count[producers[key]] += 1
        for place, result in enumerate(op.results):
            producers[id(result)] = number, place  # a tensor changed in place is a new result
    for output in trace.outputs:
        if id(output) in producers:
            count[producers[id(output)]] += 1
    shared = {number for (number, _), times in count.items() if times > 1}
    return [number in shared for number in range(len(trace.ops))]
