"""State of a propagation: labels of activations, and the channel slots so far.

Rules of ops and layers are functions of this state and one op.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from job.slimming.graph.attribute_sizes import attribute_sizes, compared_sizes
from job.slimming.graph.channel_labels import flat_ids, label_axes, labels_along
from job.slimming.graph.heads import Heads
from job.slimming.graph.layers import modules_of, owner_of, twins_of
from job.slimming.graph.pause_points import multiplied_values
from job.slimming.graph.reasons import OP_COUNT, PARAMETER_COUNT, TWO_AXES, UNEQUAL_SLICES
from job.slimming.graph.trace import SIZED
from job.slimming.graph.union import FIXED, ChannelSlot, ChannelUnion, LayerCall

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    import torch
    from torch import nn

    from job.slimming.graph.derived import DerivedValues, ParameterView
    from job.slimming.graph.reasons import Reason
    from job.slimming.graph.trace import Op, SizeRead, Trace
    from job.slimming.graph.union import ChannelRead, Ids, Side

    Rule = Callable[["PropagationState", Op], None]


class Blank(NamedTuple):
    """Axes of a tensor along which all values are alike, and the ops that set their sizes."""

    axes: frozenset[int]
    makers: tuple[Op, ...]


class PropagationState:
    """Labels of the activations of ``trace``; results are collected in ``union``.

    ``layers`` are the names of the layers with a rule. The BatchNorms in ``not_selecting`` must
    pass all channels of their input.
    """

    trace: Trace
    main: bool  # whether the trace is the first one, which is in eval mode
    result_shared: bool  # whether the result of the current op is used by several ops
    input_shared: bool  # whether its result or one of its inputs is

    def __init__(
        self,
        network: nn.Module,
        layers: Collection[str],
        not_selecting: Collection[str],
        normed: Collection[bytes] = (),
    ) -> None:
        self.network, self.layers, self.not_selecting = network, layers, not_selecting
        self.modules = modules_of(network)
        self.union, self.heads = ChannelUnion(), Heads(normed)
        self._module_names = {id(m): n for n, m in modules_of(network, once=True).items()}
        self.twins = twins_of(network, layers)
        self.produced: dict[tuple[str, int | None], Ids] = {}  # elements by weight and axis
        self.selected: dict[str, Ids] = {}  # elements by BatchNorm that selects them
        self.streams: dict[str, Ids] = {}  # elements that it selects from
        self.passed: set[str] = set()  # BatchNorms that do not select
        self.other_uses: dict[str, str] = {}  # by layer or weight: another op that uses it
        self._slots: dict[tuple[str, Side], ChannelSlot] = {}
        self.parts: dict[tuple[str, int], Ids] = {}  # by name and axis of a parameter
        # bounds by sliced channels, and whether they are free
        self._slices: dict[bytes, tuple[Ids, set[int], set[bool]]] = {}
        self._labels: dict[int, torch.Tensor] = {}  # by id of the activation
        self.rows: dict[int, torch.Tensor] = {}  # of products of channels, by their id
        self._shared: set[int] = set()  # ids of activations used by several ops
        self.blanks: dict[int, Blank] = {}  # by id of the tensor
        self.parameter_views: list[ParameterView] = []

    def begin(self, trace: Trace, derived: DerivedValues, *, main: bool) -> None:
        """Continue with another trace of the same network."""
        self.trace, self.derived, self.main = trace, derived, main
        self._calls: Counter[str] = Counter()
        self._labels, self._shared, self.rows, self.blanks = {}, set(), {}, {}
        derived.blanks = self.blanks
        self.heads.begin_trace()

    def begin_op(self, op: Op, inputs: Collection[torch.Tensor], *, result_shared: bool) -> None:
        """Continue with the next op, whose labelled inputs are ``inputs``."""
        self._calls[op.name] += 1
        self.union.place = op.line
        self.result_shared = result_shared
        self.input_shared = result_shared or any(self.is_shared(tensor) for tensor in inputs)

    def is_shared(self, tensor: torch.Tensor) -> bool:
        """Return whether the elements of an activation are used by several ops."""
        return id(tensor) in self._shared

    def labels_of(self, tensor: Any) -> torch.Tensor | None:
        """Return the labels of an activation; None if nothing in it can be cut."""
        return self._labels.get(id(tensor))

    def ids_along(self, tensor: torch.Tensor, axis: int) -> Ids | None:
        """Return the elements (n,) along ``axis``; None if they also depend on another axis."""
        axis %= tensor.dim()
        labels = self.labels_of(tensor)
        if labels is None:
            return np.zeros(tensor.shape[axis], np.int64)
        if set(label_axes(labels)) - {axis}:
            return None
        return flat_ids(labels.reshape(-1).expand(tensor.shape[axis]))

    def ids_of_lines(self, tensor: torch.Tensor, axis: int) -> Ids | None:
        """Return the elements (n,) along ``axis``, united if several lines share a weight.

        None if they do not depend on it.
        """
        ids = self.ids_along(tensor, axis)
        if ids is not None:
            return ids
        labels = self.labels_of(tensor)
        return None if labels is None else self.unite_lines(labels, axis % tensor.dim())

    def unite_lines(self, labels: torch.Tensor, axis: int) -> Ids | None:
        """Unite the channels at the same index along ``axis``, such as those of all heads.

        Returns the elements (n,) along ``axis``; None if ``labels`` do not depend on it.
        """
        if labels.shape[axis] == 1:
            return None
        lines = np.ascontiguousarray(labels.movedim(axis, -1).reshape(-1, labels.shape[axis]))
        self.union.unite(np.repeat(lines[:1], len(lines) - 1, 0).reshape(-1), lines[1:].reshape(-1))
        first: Ids = lines[0]
        return first

    def owner_or_self(self, name: str) -> str:
        """Return the layer whose weight a parameter is, or the parameter outside layers."""
        layer, _, parameter = name.rpartition(".")
        return layer if layer in self.layers and parameter == "weight" else name

    def slot_name(self, parameter: torch.Tensor) -> str:
        """Return the name of the slot of a parameter: its layer, or its own outside layers."""
        name = str(self.trace.name(parameter))
        return owner_of(name) if owner_of(name) in self.layers else name

    def set_labels(self, tensor: torch.Tensor, labels: torch.Tensor) -> None:
        """Label a result with elements of the op's inputs."""
        self._set(tensor, labels, shared=self.input_shared)

    def set_ids(self, tensor: torch.Tensor, ids: Ids, axis: int) -> None:
        """Label a result with new elements ``ids`` along ``axis``."""
        labels = labels_along(ids, axis, tensor.dim())
        self._set(tensor, labels, shared=self.result_shared)

    def _set(self, tensor: torch.Tensor, labels: torch.Tensor, *, shared: bool) -> None:
        self._labels.pop(id(tensor), None)
        self._shared.discard(id(tensor))
        if bool(labels.any()):  # other than FIXED
            self._labels[id(tensor)] = labels
            if shared:
                self._shared.add(id(tensor))

    def forget(self, op: Op) -> None:
        """Drop the labels of results from which nothing can be cut."""
        for result in op.results:
            self._labels.pop(id(result), None)

    def fix(self, tensor: torch.Tensor, reason: Reason) -> None:
        """Block the channels that an activation comes from."""
        labels = self.labels_of(tensor)
        if labels is not None:
            self.union.fix(flat_ids(labels), reason if self.main else reason.in_train_mode())

    def give_up(self, op: Op, reason: Reason) -> None:
        """Block all channels of an op's inputs, and of the weights that these are computed from."""
        self.union.doubtful = True
        for tensor in op.inputs:
            self.fix(tensor, reason)
        self.read_inputs_elsewhere(op)
        self.forget(op)

    def add_slot(
        self, name: str, side: Side, ids: Ids, times: int = 0, axis: int | None = None
    ) -> None:
        """Add a slot for one side of the parameter ``name``; elements of two uses are united.

        ``axis`` is that of a parameter outside known layers.
        """
        where = self.owner_or_self(name)
        bare = where == name
        if (where, side) in self._slots:
            earlier = self._slots[where, side]
            if len(earlier.ids) != len(ids):
                return self.union.fix(np.union1d(earlier.ids, ids), TWO_AXES(where))
            return self.union.unite(earlier.ids, ids)
        for alike in (where, *self.twins.get(where, ())):
            slot = ChannelSlot(alike, side, ids, times, axis if bare or side == "places" else None)
            self._slots[alike, side] = slot
            self.union.slots.append(slot)
        if bare:
            self.union.suspects.append((PARAMETER_COUNT(where), ids))
        return None

    def slot(self, name: str, side: Side) -> ChannelSlot | None:
        """Return the slot for one side of a layer or of a parameter outside layers."""
        return self._slots.get((name, side))

    def add_module_slot(self, op: Op, ids: Ids) -> None:
        """Add a slot of ``ids`` (n,) for the layer without tensors whose code calls ``op``."""
        name = self._module_names.get(id(op.module))
        if name in self.layers:
            self.add_slot(f"{name}.weight", "through", ids)

    def call_number(self, op: Op) -> int:
        """Return the number of the present call of an op, among those of its name."""
        return self._calls[op.name] - 1

    def add_read(self, op: Op, read: ChannelRead) -> None:
        """Note an op that computes over channels without a weight."""
        self.union.suspects.append((OP_COUNT(op.name), read.operands[0].ids))
        if self.main:
            self.union.reads.append(replace(read, call=self.call_number(op)))

    def note_sizes(
        self, op: Op, results: Sequence[torch.Tensor], before: torch.Tensor | None = None
    ) -> None:
        """Note the attributes that count the channels of an op that moves them.

        ``before`` are the labels of its input, by default those of an activation.
        """
        before = self.labels_of(op.inputs[0]) if before is None else before
        if not self.main or before is None or op.name not in SIZED:
            return
        for module in (op.caller.module, *op.caller.near):
            if (name := self.module_name(module)) is not None:
                named = op.caller.numbers_of(module)
                self.union.sizes += attribute_sizes(op, name, named, before, results)

    def module_name(self, module: nn.Module | None) -> str | None:
        """Return the name of a module whose attributes may count channels; not of a layer.

        The attributes of a layer follow its tensors.
        """
        name = self._module_names.get(id(module))
        return None if name in self.layers else name

    def note_compared(self, read: SizeRead, labels: torch.Tensor) -> None:
        """Note the attributes that code may compare with the size that it reads."""
        module = self.module_name(read.caller.module)
        if self.main and module is not None and len(label_axes(labels)) == 1:
            known = {(size.module, size.attribute) for size in self.union.sizes}
            self.union.sizes += compared_sizes(read, module, flat_ids(labels), known)

    def read_elsewhere(self, op: Op, tensor: torch.Tensor) -> None:
        """Note an op that reads parameters in a way that no rule follows."""
        for source in self.derived.sources(tensor):
            self.other_uses.setdefault(source.name, op.name)
            self.other_uses.setdefault(owner_of(source.name), op.name)

    def read_inputs_elsewhere(self, op: Op) -> None:
        """Note that no rule follows the parameters that the inputs of an op are computed from."""
        for tensor in op.inputs:
            if self.trace.name(tensor) is None:
                self.read_elsewhere(op, tensor)

    def count_call(self, op: Op, weight: str | None) -> None:
        """Add a call of a convolution or linear layer, with its multiply-adds."""
        if self.main:
            tensor = op.argument(1, "weight")
            places = multiplied_values(op) // (len(tensor) * self.trace.sample_count)
            places = places if weight else places * tensor.numel()
            self.union.calls.append(LayerCall(weight, places))

    def measured_channels(self, module: nn.Module | None) -> Iterator[Ids]:
        """Yield the elements of the activations of which ``module`` has read the size."""
        for read in self.trace.measured:
            labels = self.labels_of(read.tensor) if read.caller.module is module else None
            if labels is not None and len(label_axes(labels)) == 1:
                yield flat_ids(labels)

    def is_measured(self, tensor: torch.Tensor, module: nn.Module | None) -> bool:
        """Return whether ``module`` has read the size of ``tensor``."""
        reads = self.trace.measured
        return any(each.tensor is tensor and each.caller.module is module for each in reads)

    def add_slice(self, before: Ids, after: Ids, free: bool = False) -> None:
        """Add a slice ``after`` of channels ``before`` (n,), ``free`` if a cut sets its size."""
        if not len(after):
            return
        start = int(np.argmax(before == after[0]))
        if len(after) < len(before) and np.array_equal(before[start : start + len(after)], after):
            slices = self._slices.setdefault(before.tobytes(), (before, set(), set()))
            slices[1].update((start, start + len(after)))
            slices[2].add(free)

    def end_slices(self) -> None:
        """Keep the same number of channels in equal parts, so that slices keep their fractions.

        Free slices are cut on their own where some have no common size or are never cut.
        """
        never_cut = np.concatenate([[FIXED], *(ids for _, ids in self.union.fixes)])
        for channels, bounds, free in self._slices.values():
            size = int(np.gcd.reduce([len(channels), *bounds]))
            if all(free) and (size == 1 or np.isin(channels, never_cut).any()):
                continue
            if size == 1:
                self.union.fix(channels, UNEQUAL_SLICES())
            else:
                self.union.blocks.append(channels.reshape(-1, size))
        self._slices.clear()
