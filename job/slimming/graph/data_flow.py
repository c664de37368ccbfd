"""Removal of whole branches: the groups that are removed with groups that keep no channel.

A layer without any input channel is a constant. Groups whose channels are then constant or unused
are removed too, e.g. those of the bottleneck before the layer, or of a gate on the channels. This
is derived from the data flow of a forward pass.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from job.slimming.graph.trace_summary import NETWORK_INPUT

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from job.slimming.graph.groups import ChannelGraph, ChannelGroup
    from job.slimming.graph.union import Ids


class DataFlow:
    """Data flow of a network, to find what is constant or unused after a removal."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.steps, self.outputs = graph.forward.steps, graph.forward.outputs
        self.calls: dict[str, list[int]] = defaultdict(list)  # steps by layer
        for number, step in enumerate(self.steps):
            if step.layer:
                self.calls[step.layer.removesuffix(".norm")].append(number)
        self.inputs = [slot for slot in graph.slots if slot.side == "in"]
        self.idle = self._idle_groups(frozenset())
        self._closures: dict[frozenset[str], frozenset[str]] = {frozenset(): frozenset()}

    def closure(self, names: Iterable[str]) -> frozenset[str]:
        """Return all groups that are removed when the groups ``names`` keep no channel."""
        names_removed = frozenset(names)
        if names_removed not in self._closures:
            removed = names_removed
            while not (idle := self._idle_groups(removed) - self.idle) <= removed:
                removed |= idle
            self._closures[names_removed] = removed
        return self._closures[names_removed]

    def outputs_depend(self, removed: frozenset[str]) -> bool:
        """Return whether all outputs still depend on the input of the network."""
        before, after = self._dependent(set()), self._dependent(self._constants(removed))
        return all(after[n] or not before[n] for n in self.outputs if n >= 0)

    def channels_of(self, names: Collection[str]) -> Ids:
        """Return the mask (count,) of the channels of some groups."""
        mask: Ids = np.zeros(self.graph.count, bool)
        for group in self.graph.groups:
            if group.name in names:
                mask[group.channels] = True
        return mask

    def _constants(self, removed: frozenset[str]) -> set[str]:
        """Return the layers without any remaining input channel."""
        mask = self.channels_of(removed)
        return {slot.layer for slot in self.inputs if mask[slot.ids].all()}

    def _dependent(self, constants: set[str]) -> list[bool]:
        """Return for each step whether its result depends on the input of the network."""
        depends: list[bool] = []
        for step in self.steps:
            passes = not step.constant and step.layer not in constants
            depends.append(passes and any(n == NETWORK_INPUT or depends[n] for n in step.sources))
        return depends

    def _used(self, constants: set[str]) -> list[bool]:
        """Return for each step whether an output depends on its result."""
        used = [False] * len(self.steps)
        for n in self.outputs:
            if n >= 0:
                used[n] = True
        for number in range(len(used) - 1, -1, -1):
            step = self.steps[number]
            if used[number] and not step.constant and step.layer not in constants:
                for n in step.sources:
                    if n >= 0:
                        used[n] = True
        return used

    def _idle_groups(self, removed: frozenset[str]) -> frozenset[str]:
        """Return the groups whose channels are constant or unused after ``removed`` are removed."""
        constants = self._constants(removed)
        depends, used = self._dependent(constants), self._used(constants)
        consumers: dict[str, list[int]] = defaultdict(list)
        train_only = set()  # groups with a consumer that runs only in train mode
        for group in self.graph.groups:
            for layer, side in group.slots:
                if side == "in":
                    consumers[group.name] += self.calls.get(layer, ())
                    if layer not in self.calls:
                        train_only.add(group.name)
        return frozenset(
            group.name
            for group in self.graph.groups
            if group.name not in train_only
            and (
                self._is_constant(group, depends)
                or not any(
                    used[n] and self.steps[n].layer not in constants for n in consumers[group.name]
                )
            )
        )

    def _is_constant(self, group: ChannelGroup, depends: list[bool]) -> bool:
        calls = [n for layer in group.layers for n in self.calls.get(layer, ())]
        return bool(calls) and not any(depends[n] for n in calls)
