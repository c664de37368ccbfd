"""Follow the channels of a network through its recorded ops, one kind of them after another.

What each kind does to channels is decided here; see job.slimming.graph.union for what is found.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from job.slimming.graph.channel_labels import plain
from job.slimming.graph.layers import BATCHNORM, LAYER_TYPES, owner_of
from job.slimming.graph.op_kinds import AXIS_AT, CAT, ELEMENTWISE, FRESH, MOVES, PAIRWISE, RESHAPES
from job.slimming.graph.op_rules import Between
from job.slimming.graph.selection import SelectedChannels
from job.slimming.graph.union import ChannelSlot, Flow, Ids, LayerCall, Side

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import nn

    from job.slimming.graph.trace import Op, Trace


def follow(network: nn.Module, traces: Sequence[Trace]) -> Flow:
    """Follow the channels of ``network`` through what was recorded of it, the main pass first."""
    bound: set[str] = set()
    while True:
        walk = _Walk(network, bound)
        for trace in traces:
            walk.follow(trace)
        mixed = walk.flow.mixed(set(walk.selected)) | (walk.selected.keys() & walk.passed)
        if not mixed:
            return walk.flow
        bound |= mixed  # its output meets other channels: it is no selection


class _Walk(Between):
    def __init__(self, network: nn.Module, bound: set[str]) -> None:
        super().__init__(network)
        self.bound = bound
        self.written: dict[str, Ids] = {}
        self.selected: dict[str, Ids] = {}
        self.passed: set[str] = set()  # BatchNorms that select nothing
        self.loose: dict[str, str] = {}  # layers whose weights something else reads too, and what
        self.rules: dict[str, Callable[[Op], None]] = {
            **dict.fromkeys(("conv1d", "conv2d", "conv3d"), self.convolution),
            **dict.fromkeys(PAIRWISE, self.pairwise),
            **dict.fromkeys(CAT, self.cat),
            **dict.fromkeys(RESHAPES, self.reshape),
            **dict.fromkeys(MOVES, self.move),
            **dict.fromkeys(ELEMENTWISE, self.elementwise),
            **dict.fromkeys(AXIS_AT, self.along),
            **dict.fromkeys(FRESH, self.forget),
            **dict.fromkeys(("matmul", "__matmul__", "mm"), self.product),
            "cdist": self.distance,
            "linear": self.linear,
            "glu": self.glu,
            "batch_norm": self.batch_norm,
            "prelu": self.prelu,
            "__setitem__": lambda op: self.give_up(op, "a slice that is written to"),
        }

    def follow(self, trace: Trace) -> None:
        self.trace, first = trace, not self.flow.calls
        self.labels, self.shared = {}, set()
        known = {*map(id, trace.inputs), *trace.names, *trace.constants}
        for op, often in zip(trace.ops, _used_often(trace), strict=True):
            self.often, self.counting = often, first
            inputs = {id(tensor): tensor for tensor in op.inputs()}
            if not known.issuperset(inputs):
                everything = np.arange(self.flow.count)
                self.flow.fix(everything, f"{op.name} of a tensor of unknown origin")
            self.step(op, list(inputs.values()))
            known.update(map(id, op.results()))
        for output in trace.outputs:
            self.fix(output, "the network's output")
        self.parts()
        for position in self.flow.slots:
            if position.layer in self.loose:
                self.flow.fix(position.ids, f"{self.loose[position.layer]} reads its weight too")
        for tensor in trace.measured:
            if (found := self.of(tensor)) is not None:
                self.flow.suspects.append(("what their number is used for", plain(found)))

    def step(self, op: Op, inputs: list[torch.Tensor]) -> None:
        labelled = [tensor for tensor in inputs if self.of(tensor) is not None]
        self.wide = self.often or any(id(tensor) in self.shared for tensor in labelled)
        rule = self.rules.get(op.name)
        if not labelled and op.name not in STARTS:
            self.alone(op, inputs)
        elif rule is None:
            self.give_up(op, f"{op.name} is not understood")
        else:
            rule(op)

    def alone(self, op: Op, inputs: list[torch.Tensor]) -> None:
        """An op on nothing that can be cut, or on weights."""
        for tensor in inputs:
            name = self.trace.name(tensor)
            if name and tensor.dim() and all(tensor is not result for result in op.results()):
                self.loose.setdefault(name, op.name)
                self.loose.setdefault(owner_of(name), op.name)
        self.forget(op)

    # layers

    def convolution(self, op: Op) -> None:
        image, weight = op.argument(0, "input"), op.argument(1, "weight")
        groups = int(op.argument(6, "groups", 1))
        ids = self.ids(image, 1) if image.dim() == weight.dim() else None
        name, outputs = self.trace.name(weight), weight.shape[0]
        self.call(op, name)
        if ids is None or name is None:
            return self.give_up(op, "a convolution with a computed weight or mixed channels")
        if groups == len(ids) and groups > 1:
            passed = np.repeat(ids, outputs // groups)
            self.note(name, "through", passed, outputs // groups)
            self.bias(op, name, passed)
            return self.lay(op.result, passed, 1, shared=self.often)
        self.note(name, "in", ids)
        written = self.writes(op, name, outputs)
        if groups > 1:
            self.flow.blocks += [ids.reshape(groups, -1), written.reshape(groups, -1)]
        return self.lay(op.result, written, 1, shared=self.often)

    def linear(self, op: Op) -> None:
        image, weight = op.argument(0, "input"), op.argument(1, "weight")
        name, found = self.trace.name(weight), self.of(image)
        self.call(op, name)
        if found is not None and found.shape[-1] == 1 and image.shape[-1] > 1:
            return self.set(op.result, found, shared=self.wide)  # channels stand elsewhere
        ids = self.ids(image, -1)
        if ids is None or name is None:
            return self.give_up(op, "a linear layer with a computed weight or mixed channels")
        self.note(name, "in", ids)
        written = self.writes(op, name, weight.shape[0])
        return self.lay(op.result, written, op.result.dim() - 1, shared=self.often)

    def call(self, op: Op, name: str | None) -> None:
        if self.counting:
            weight = op.argument(1, "weight")
            places = op.result.numel() // (len(weight) * self.trace.sample_count)
            self.flow.calls.append(LayerCall(name, places if name else places * weight.numel()))

    def writes(self, op: Op, name: str, count: int) -> Ids:
        """A writer's rows: new elements, or those of its first use."""
        if name not in self.written:
            self.written[name] = self.flow.born(owner_of(name), count)
            self.note(name, "out", self.written[name])
        self.bias(op, name, self.written[name])
        return self.written[name]

    def bias(self, op: Op, name: str, ids: Ids) -> None:
        """What is added to ``ids``: by the layer of the weight ``name``, or by another's bias."""
        bias = op.argument(2, "bias")
        if bias is None:
            return
        added, layers = (
            self.trace.name(bias),
            [owner_of(name), *self.twins.get(owner_of(name), ())],
        )
        if added is None:
            self.flow.fix(ids, f"{op.name} with a computed bias")
        elif owner_of(added) not in layers or not isinstance(
            self.modules[owner_of(name)], LAYER_TYPES
        ):
            self.note(added, "through", ids)

    def batch_norm(self, op: Op) -> None:
        image, labels = op.argument(0, "input"), self.of(op.argument(0, "input"))
        tensors = [op.argument(place, own) for place, own in enumerate(STATISTICS, 1)]
        names = [self.trace.name(tensor) for tensor in tensors if tensor is not None]
        layers = list(dict.fromkeys(owner_of(name) for name in names if name))
        ids = self.ids(image, 1)
        if not names:
            return (
                self.forget(op) if labels is None else self.set(op.result, labels, shared=self.wide)
            )
        known = all(isinstance(self.modules[layer], BATCHNORM) for layer in layers)
        if ids is None or None in names or not known:
            return self.give_up(op, "a BatchNorm with computed parameters or mixed channels")
        layer = layers[0]
        selects = isinstance(self.modules[owner_of(layer)], SelectedChannels)
        layer = owner_of(layer) if selects else layer
        splits = id(image) in self.shared and layer not in self.bound and len(layers) == 1
        if selects or splits:
            self.fix(image, "channels are selected before each BatchNorm that reads them")
            if layer not in self.selected:
                self.selected[layer] = self.flow.born(layer, len(ids))
                self.flow.slots.append(ChannelSlot(layer, "select", self.selected[layer]))
            ids = self.selected[layer]
            return self.lay(op.result, ids, 1, shared=self.often)
        for layer in layers:  # several, where they share some tensors
            self.passed.add(layer)
            self.note(f"{layer}.weight", "through", ids)
        return self.forget(op) if labels is None else self.set(op.result, labels, shared=self.wide)

    def product(self, op: Op) -> None:
        """Channels times the rows of a matrix, which only train mode has."""
        self.matrix(op, "through", 0)

    def distance(self, op: Op) -> None:
        """Channels compared with the columns of a matrix, which only train mode has."""
        self.matrix(op, "in", 1)

    def matrix(self, op: Op, side: Side, axis: int) -> None:
        image, matrix = op.args[:2] if len(op.args) > 1 else (None, None)
        name = self.trace.name(matrix)
        ids = None if image is None or self.of(image) is None else self.ids(image, -1)
        if self.counting or ids is None or name is None or matrix.dim() != 2:
            return self.give_up(op, f"{op.name} is not understood")
        if side == "in" and name not in dict(self.network.named_parameters()):
            return self.give_up(op, f"{op.name} with a buffer is not understood")
        self.note(name, side, ids)
        return self.forget(op)

    def prelu(self, op: Op) -> None:
        image, weight = op.argument(0, "input"), op.argument(1, "weight")
        ids, name, found = self.ids(image, 1), self.trace.name(weight), self.of(image)
        if ids is None or found is None or (weight.numel() > 1 and name is None):
            return self.give_up(op, "a PReLU with a computed weight or mixed channels")
        if weight.numel() > 1:
            self.note(str(name), "through", ids)
        return self.set(op.result, found, shared=self.wide)


STATISTICS = ("running_mean", "running_var", "weight", "bias")
STARTS = frozenset({"conv1d", "conv2d", "conv3d", "linear", "batch_norm"})


def _used_often(trace: Trace) -> list[bool]:
    """For each op, whether its result is an input of more than one later op."""
    makers: dict[int, int] = {}
    count: Counter[int] = Counter()
    for number, op in enumerate(trace.ops):
        for tensor in {id(t) for t in op.inputs()}:
            if tensor in makers:
                count[makers[tensor]] += 1
        for result in op.results():
            makers[id(result)] = number  # in place, the changed tensor counts as a new one
    for output in trace.outputs:
        if id(output) in makers:
            count[makers[id(output)]] += 1
    return [count[number] > 1 for number in range(len(trace.ops))]
