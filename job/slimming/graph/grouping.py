"""Grouping: the channel groups of a network, from its traces."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from job.slimming.graph.groups import (
    BlockedChannels,
    ChannelGraph,
    ChannelGroup,
    renumber_reads,
    renumber_slots,
)
from job.slimming.graph.head_blocks import merge_head_blocks
from job.slimming.graph.layer_rules import layer_rule
from job.slimming.graph.layers import fixed_modules, modules_of
from job.slimming.graph.propagation import propagate_channels
from job.slimming.graph.reasons import (
    ADDED_TO_FIXED,
    ALL_TOGETHER,
    ASKED,
    FIXED_HEADS,
    FIXED_PARTS,
    OVERLAP,
    OVERLAPPING_HEADS,
    TRAIN_MODE_FAILS,
    UNBALANCED,
    UNKNOWN_COUNT,
)
from job.slimming.graph.same_ops import same_ops
from job.slimming.graph.selection import batchnorms, unwrap_selection
from job.slimming.graph.snapshot import Snapshot
from job.slimming.graph.ties import tie_beside, tie_overlapping
from job.slimming.graph.trace import trace_with_snapshot
from job.slimming.graph.trace_summary import summarise_trace
from job.slimming.graph.union import FIXED, ChannelUnion, Ids, ScaledRows
from job.slimming.graph.unsupported import unsupported_layers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    from job.slimming.graph.reasons import Reason
    from job.slimming.graph.trace import Trace
    from job.slimming.graph.union import ChannelSlot
    from job.slimming.inputs import Example


def channel_graph(network: nn.Module, example: Example, ignore: Iterable[str] = ()) -> ChannelGraph:
    """Return the channel groups of ``network`` on inputs like ``example``.

    ``ignore`` names layers, or modules that contain them, whose inputs and outputs are not cut.
    Raises whatever the network's forward pass raises.
    """
    with fixed_modules(network):
        return _channel_graph(network, example, ignore)


def _channel_graph(network: nn.Module, example: Example, ignore: Iterable[str]) -> ChannelGraph:
    snapshot = Snapshot(network)
    traces = [trace_with_snapshot(network, example, snapshot, training=False)]
    with suppress(Exception):  # e.g. images that are too small for an auxiliary head
        traces.append(trace_with_snapshot(network, example, snapshot, training=True))
    main, custom = traces[0], any(trace.custom_autograd for trace in traces)
    unused = _unused_layers(network, main)
    auxiliary = bool(unused) and len(traces) == 1
    if len(traces) > 1:
        auxiliary = bool(unused) and bool(unused - _unused_layers(network, traces[1]))
        if not auxiliary and same_ops(*traces):
            traces.pop()
    union = propagate_channels(network, traces)
    if auxiliary and len(traces) == 1:
        union.fix(np.arange(union.count), TRAIN_MODE_FAILS(min(unused)))
    odd = len(traces) > 1
    union.doubtful |= custom or (odd and not unused)
    graph = _grouped(network, union)
    graph = replace(graph, blocked=graph.blocked + unsupported_layers(network, graph, unused))
    forward = summarise_trace(main)
    auxiliary = auxiliary and odd  # not where only a pass in eval mode succeeds
    graph = replace(graph, auxiliary=auxiliary, odd=odd or union.doubtful, forward=forward)
    ignored = tuple(ignore)
    asked = [
        group.name
        for group in graph.groups
        if any(_within(layer, ignored) for layer, _ in group.slots)
    ]
    return graph.without(asked, ASKED())


def _within(layer: str, names: tuple[str, ...]) -> bool:
    return any(layer == name or layer.startswith(f"{name}.") for name in names)


def _unused_layers(network: nn.Module, trace: Trace) -> set[str]:
    """Return the layers that a pass does not use."""
    used = {id(tensor) for op in trace.ops for tensor in op.inputs}
    names = {name for key, name in trace.names.items() if key in used}
    unused = set()
    for name, layer in modules_of(network, once=True).items():
        rule = layer_rule(layer)
        if rule is None:
            continue
        tensors = ("weight", "running_mean") if "weight" in rule.tensors else tuple(rule.tensors)
        if all(getattr(unwrap_selection(layer), tensor, None) is None for tensor in tensors):
            continue  # a norm without tensors
        if not any(f"{name}.{tensor}" in names for tensor in tensors):
            unused.add(name)
    return unused


def _grouped(network: nn.Module, union: ChannelUnion) -> ChannelGraph:
    """Return the graph of a finished union, whose channels are the unions that can be cut."""
    roots = union.roots()
    if union.heads:
        merge_head_blocks(union, roots)
    for tie in (tie_overlapping, tie_beside):
        if tie(union, roots):
            roots = union.roots()
    blocks = _balanced_blocks(union, roots)
    fixed = _fixed_roots(union, roots)
    produced = np.zeros(union.count, bool)
    produced[roots[1:]] = True  # all elements but FIXED have a producer
    channels = np.flatnonzero(produced & ~fixed)
    numbers = np.zeros(union.count, np.int64)
    numbers[channels] = np.arange(1, len(channels) + 1)
    numbers = numbers[roots]
    count = len(channels) + 1
    slots = renumber_slots(union.slots, numbers)
    blocks = [numbers[block] for block in blocks if numbers[block].any()]
    groups = _groups(network, union, numbers, slots, blocks, count)
    graph = ChannelGraph(
        tuple(groups),
        _blocked(union, roots),
        slots,
        count,
        tuple(union.calls),
        _suspects(union, groups, numbers, count),
        reads=renumber_reads(union.reads, numbers),
        sizes=tuple(replace(size, ids=numbers[size.ids]) for size in union.sizes),
        computed=frozenset(union.computed),
        scaled=tuple(ScaledRows(layer, rows, numbers[ids]) for layer, rows, ids in union.scaled),
    )
    unbalanced = [group.name for group in groups if not _is_balanced(group, blocks)]
    graph = graph.without(unbalanced, UNBALANCED())
    single = [group.name for group in groups if group.size == 1]
    return graph.without(single, ALL_TOGETHER())


def _fixed_roots(union: ChannelUnion, roots: Ids) -> Ids:
    """Return the mask (count,) of the roots of unions that are never cut."""
    fixed = np.zeros(union.count, bool)
    for ids in (np.array([FIXED]), *(ids for _, ids in union.fixes)):
        fixed[roots[ids]] = True
    return fixed


def _balanced_blocks(union: ChannelUnion, roots: Ids) -> list[Ids]:
    """Return blocks (B, n) of roots whose rows stay equally long; overlapping ones are fixed."""
    balanced: list[tuple[Ids, Reason]] = []
    within = np.zeros(union.count, bool)  # roots of the balanced blocks
    for block in union.blocks:
        rows = roots[block]
        ordered = np.sort(rows, axis=1)
        if (ordered == ordered[0]).all():
            continue  # a channel that is cut is cut from each row
        candidates = [other for other, _ in balanced] if within[rows].any() else []
        meeting = [other for other in candidates if np.isin(rows, other).any()]
        if any(np.array_equal(ordered, np.sort(other, axis=1)) for other in meeting):
            continue
        flat = rows.reshape(-1)
        heads = any(block is each for each in union.heads)
        fixed_reason = FIXED_HEADS() if heads else FIXED_PARTS()
        if meeting or len(np.unique(flat)) < len(flat):
            for each in (block, *meeting):
                union.fix(each.reshape(-1), OVERLAPPING_HEADS() if heads else OVERLAP())
        elif (rows == roots[FIXED]).any():
            union.fix(block.reshape(-1), fixed_reason)
        else:
            balanced.append((rows, fixed_reason))
            within[rows] = True
    fixed = _fixed_roots(union, roots)
    for rows, fixed_reason in balanced:  # one fixed for another reason would unbalance them
        if fixed[rows].any():
            union.fix(rows.reshape(-1), fixed_reason)
    return [rows for rows, _ in balanced]


def _groups(
    network: nn.Module,
    union: ChannelUnion,
    numbers: Ids,
    slots: Sequence[ChannelSlot],
    blocks: Sequence[Ids],
    count: int,
) -> list[ChannelGroup]:
    """Group the channels that are produced by one layer or are part of one block."""
    produced = [(layer, numbers[ids]) for layer, ids in union.producers]
    produced = [(layer, ids[ids != FIXED]) for layer, ids in produced]
    produced = [(layer, ids) for layer, ids in produced if len(ids)]
    within = ChannelUnion(count=count)
    for ids in [ids for _, ids in produced] + [block.reshape(-1) for block in blocks]:
        within.unite(np.full(len(ids), ids[0]), ids)
    first_of = within.roots()  # (count,): the first channel of each channel's group
    layers_of, slots_of = defaultdict(list), defaultdict(list)
    for layer, ids in produced:
        layers_of[first_of[ids[0]]].append(layer)
    arrays = {id(slot.ids): slot.ids for slot in slots}
    firsts = {key: np.unique(first_of[ids]) for key, ids in arrays.items()}
    for slot in slots:
        for first in firsts[id(slot.ids)]:
            slots_of[first].append(slot)
    ranking = {name for name, norm in batchnorms(network).items() if norm.weight is not None}
    groups = []
    for first in sorted(layers_of):
        layers, of_group = tuple(layers_of[first]), slots_of[first]
        norms = tuple(
            slot.layer
            for slot in of_group
            if slot.side in ("through", "select") and slot.layer in ranking
        )
        block = next((block for block in blocks if first_of[block[0, 0]] == first), None)
        channels, sides = (
            np.flatnonzero(first_of == first),
            tuple((s.layer, s.side) for s in of_group),
        )
        groups.append(ChannelGroup(layers[0], channels, layers, norms, sides, block))
    return groups


def _is_balanced(group: ChannelGroup, blocks: Sequence[Ids]) -> bool:
    """Return whether a group has no blocks, or a single one with all of its channels."""
    if group.blocks is None:
        return True
    count = np.isin([block[0, 0] for block in blocks], group.channels).sum()
    return bool(count == 1 and group.blocks.size == group.size)


def _suspects(
    union: ChannelUnion, groups: Sequence[ChannelGroup], numbers: Ids, count: int
) -> tuple[tuple[str, Reason, str], ...]:
    """Return groups that may be misinterpreted, with the op that moves their channels."""
    names = np.zeros(count, object)
    for group in groups:
        names[group.channels] = group.name
    # an unsupported op may depend on the number of any channels
    doubt = UNKNOWN_COUNT()
    suspects = dict.fromkeys((group.name, doubt, "") for group in groups if union.doubtful)
    suspects |= dict.fromkeys(
        (str(name), reason, place)
        for (reason, ids), place in zip(union.suspects, union.suspect_places, strict=True)
        for name in np.unique(names[numbers[ids][numbers[ids] != FIXED]].astype(str))
    )
    return tuple(suspects)


def _blocked(union: ChannelUnion, roots: Ids) -> tuple[BlockedChannels, ...]:
    """Return the layers whose output channels are fixed, with the first reason for each."""
    reasons = dict.fromkeys(reason for reason, _ in union.fixes)
    reasons[ADDED_TO_FIXED()] = None
    order = {reason: number for number, reason in enumerate(reasons, 1)}
    why = np.zeros(union.count, np.int64)  # of a root: the number of its first reason
    why[roots[FIXED]] = len(order)
    places, where = ["", *union.places], np.zeros(union.count, np.int64)
    for number in range(len(union.fixes), 0, -1):
        reason, ids = union.fixes[number - 1]
        why[roots[ids]], where[roots[ids]] = order[reason], number
    return tuple(
        BlockedChannels.by(
            layer,
            int((why[roots[ids]] == number).sum()),
            reason,
            places[where[roots[ids]][why[roots[ids]] == number][0]],
        )
        for layer, ids in union.producers
        for reason, number in order.items()
        if (why[roots[ids]] == number).any()
    )
