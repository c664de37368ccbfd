"""Trace of a network: all torch ops of one forward pass, in order.

A TorchFunctionMode intercepts the ops, so that control flow and shapes are plain Python values, and
functions and modules are treated alike. On torch's ``meta`` device no values are computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from job.slimming.graph.callers import NO_CALLER, Caller, calling_module, line_of_network
from job.slimming.graph.hidden_calls import autograd_calls, scripted_functions_in_python
from job.slimming.graph.layers import constants_of, tensors_of
from job.slimming.graph.modes import training_mode
from job.slimming.graph.saved_state import memory_layout
from job.slimming.graph.shape_inference import infer_result
from job.slimming.graph.snapshot import Snapshot
from job.slimming.graph.traced_copies import batch_on, copy_tensors, replaced
from job.slimming.inputs import (
    call_network,
    map_tensors,
    sample_count,
    tensors_in,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from job.slimming.inputs import Example

SIZE_QUERIES = frozenset({"size", "numel", "nelement"})
NORM_OPS = frozenset("batch_norm instance_norm group_norm layer_norm rms_norm".split())
SIZED = frozenset("split split_with_sizes narrow __getitem__ __setitem__ view reshape".split())
SIZED |= {"unflatten", "layer_norm", "rms_norm", "conv1d", "conv2d", "conv3d"}
FILLING = frozenset(
    "zeros ones full empty rand randn new_zeros new_ones new_full new_empty".split()
)
SHAPED_LIKE = frozenset("zeros_like ones_like full_like empty_like rand_like randn_like".split())
EXPANDING = frozenset("expand expand_as repeat tile broadcast_to".split())
CALLED_BY_MODULES = NORM_OPS | SIZED | {"linear"}
CALLED_BY_MODULES |= {"scaled_dot_product_attention", *FILLING, *EXPANDING}
RESHAPING_IN_PLACE = frozenset("unsqueeze_ squeeze_ transpose_ t_ swapaxes_ swapdims_".split())
BY_NAME = {"reshape": ("input", "shape"), "view": ("size",)}  # arguments that rules want in order
SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
BATCH = 2  # samples; BatchNorm in train mode needs two values per channel


@dataclass(frozen=True)
class Op:
    """Call of a torch function, with the tensors in its arguments and in its result.

    ``inputs`` and ``results`` include tensors in lists and dataclasses. ``caller`` is the method
    that calls the function; it is known for a few kinds of ops. ``line`` is that of the network's
    code, e.g. ``net.py:12``.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any
    inputs: tuple[torch.Tensor, ...]
    results: tuple[torch.Tensor, ...]
    caller: Caller = NO_CALLER
    line: str = ""

    @property
    def module(self) -> nn.Module | None:
        """The module whose method calls the function."""
        return self.caller.module

    @property
    def view_sizes(self) -> tuple[Any, ...]:
        """The sizes that a view is given, those of all axes for ``unflatten``; else empty."""
        if self.name == "unflatten":
            shape, within = self.inputs[0].shape, self.argument(2, "sizes")
            axis = self.argument(1, "dim") % len(shape)
            return (*shape[:axis], *within, *shape[axis + 1 :])
        sizes: Any = self.args[1:] if self.name in ("view", "reshape") else ()
        return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument that was passed by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)


class SizeRead(NamedTuple):
    """Read of the size of a tensor along an axis other than the first, by a method of a module."""

    tensor: torch.Tensor
    caller: Caller
    line: str


@dataclass(frozen=True)
class Trace:
    """Ops of one forward pass on ``inputs``, which contain ``sample_count`` samples.

    ``names`` are the names of parameters and buffers by id. ``constants`` are the ids of other
    tensors that the network or its code keeps. ``measured`` are the reads of sizes of tensors.
    ``custom_autograd`` tells that the pass called functions of autograd that its code defines.
    ``computed`` are the weights of layers by the ids of tensors that are computed from them.
    """

    ops: list[Op]
    names: dict[int, str]
    constants: frozenset[int]
    inputs: list[torch.Tensor]
    sample_count: int
    outputs: list[torch.Tensor]
    measured: list[SizeRead]
    custom_autograd: bool = False
    computed: dict[int, str] = field(default_factory=dict)

    def name(self, value: Any) -> str | None:
        """Return the name of a parameter or buffer; None for anything else."""
        return self.names.get(id(value))

    @cached_property
    def of_inputs(self) -> frozenset[int]:
        """Ids of the tensors that are computed from the inputs of the pass, and of these."""
        found = set(map(id, self.inputs))
        for op in self.ops:
            if not found.isdisjoint(map(id, op.inputs)):
                found.update(map(id, op.results))
        return frozenset(found)

    @cached_property
    def sizes_alone(self) -> frozenset[int]:
        """Ids of the tensors of which the pass uses the sizes alone, e.g. in ``zeros_like``."""
        values = {id(t) for op in self.ops if op.name not in SHAPED_LIKE for t in op.inputs}
        values.update(map(id, self.outputs))
        shaped = {id(t) for op in self.ops if op.name in SHAPED_LIKE for t in op.inputs}
        return frozenset(shaped - values)

    def is_read(self, tensor: torch.Tensor) -> bool:
        """Whether an op reads a tensor, or the network returns it."""
        read = (*(t for op in self.ops for t in op.inputs), *self.outputs)
        return any(tensor is each for each in read)

    def without_counters(self) -> list[Op]:
        """Return the ops except those that count the batches of a BatchNorm."""
        counters = {key for key, name in self.names.items() if name.endswith("batches_tracked")}
        return [op for op in self.ops if not (op.args and id(op.args[0]) in counters)]


def trace_network(network: nn.Module, example: Example, *, training: bool = False) -> Trace:
    """Trace ``network`` on ``BATCH`` samples like those of ``example``; its state is preserved.

    The pass is on the ``meta`` device, or on the device of the network if that fails. Exceptions of
    the forward pass are not caught.
    """
    return trace_with_snapshot(network, example, Snapshot(network), training=training)


def trace_with_snapshot(
    network: nn.Module, example: Example, snapshot: Snapshot, *, training: bool
) -> Trace:
    """Trace like ``trace_network``, with a ``snapshot`` that several traces share and restore."""
    try:
        return trace_on(network, example, "meta", snapshot, training=training)
    except Exception:  # meta tensors have no values, and some networks read values
        return trace_on(network, example, None, snapshot, training=training)


class _Tracer(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.measured: list[SizeRead] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        if name == "__get__":  # of a property such as ``mT``
            name = func.__self__.__name__
        before = args
        if name in RESHAPING_IN_PLACE:
            self.ops, view = _before_reshaping(self.ops, args[0])
            before = (view, *args[1:])
        result = infer_result(name, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        if name in RESHAPING_IN_PLACE:
            name = name.removesuffix("_")
            func, args = getattr(torch.Tensor, name), before
        results = tuple(tensors_in(result))
        if results or name == "__setitem__":
            args, kwargs = _copy_lists(args), _copy_lists(kwargs)
            for key in BY_NAME.get(name, ()):
                args = (*args, kwargs.pop(key)) if key in kwargs else args
            inputs = tuple(tensors_in((args, kwargs)))
            known = name in CALLED_BY_MODULES or any(type(arg) is float for arg in args)
            caller = calling_module() if known else NO_CALLER
            line = line_of_network()
            self.ops.append(Op(name, func, args, kwargs, result, inputs, results, caller, line))
        elif (name in SIZE_QUERIES and (*args[1:], *kwargs.values()) != (0,)) or func == SHAPE:
            self.measured.append(SizeRead(args[0], calling_module(), line_of_network()))
        return result


def _before_reshaping(ops: Sequence[Op], tensor: torch.Tensor) -> tuple[list[Op], torch.Tensor]:
    """Return ``ops`` with a view in place of ``tensor``, whose shape is about to change; the view.

    The tensor itself stands for the result of the change.
    """
    view = tensor.view_as(tensor)
    return [_with_view(op, tensor, view) for op in ops], view


def _without_wrappers(ops: list[Op], tensors: Sequence[torch.Tensor]) -> list[Op]:
    """Return ``ops`` on the tensors themselves where code has wrapped them, as in ``Variable(x)``.

    ``tensors`` are those that no op makes. A wrapper has all values of its tensor, and no origin.
    """
    known = {id(tensor) for tensor in (*tensors, *(t for op in ops for t in op.results))}
    if all(id(tensor) in known for op in ops for tensor in op.inputs):
        return ops
    places = {memory_layout(tensor): tensor for tensor in tensors}
    unwrapped = []
    for op in ops:
        for tensor in op.inputs:
            layout = () if id(tensor) in known else memory_layout(tensor)
            if layout and layout in places:
                op = _with_view(op, tensor, places[layout])
        places |= {memory_layout(tensor): tensor for tensor in op.results}
        unwrapped.append(op)
    return unwrapped


def _with_view(op: Op, tensor: torch.Tensor, view: torch.Tensor) -> Op:
    if not any(each is tensor for each in (*op.inputs, *op.results)):
        return op
    exchange = partial(map_tensors, change=lambda each: view if each is tensor else each)
    fields: dict[str, Any] = {
        name: exchange(getattr(op, name))
        for name in ("args", "kwargs", "result", "inputs", "results")
    }
    return replace(op, **fields)


LEAVES = frozenset([torch.Tensor, nn.Parameter, int, float, bool, str, NoneType])


def _copy_lists(value: Any) -> Any:
    """Copy lists, since the network may append to them later."""
    if isinstance(value, (list, tuple)):
        parts = [part if type(part) in LEAVES else _copy_lists(part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, dict):
        return {key: _copy_lists(part) for key, part in value.items()}
    return value


def trace_on(
    network: nn.Module,
    example: Example,
    device: str | None,
    snapshot: Snapshot,
    *,
    training: bool,
) -> Trace:
    """Trace one pass with copies of the tensors on ``device``, or that of the network if None.

    Tensors that are not stored in attributes cannot be replaced; their values are restored.
    """
    places = snapshot.tensor_places
    tracer, new = _Tracer(), list[torch.Tensor]()
    try:
        batch = batch_on(network, example, device, BATCH)
        copies = copy_tensors(network, places, device)
        named = [*((name, t) for name, *_, t in tensors_of(network)), *constants_of(network)]
        names = {id(copies.get(id(tensor), tensor)): name for name, tensor in reversed(named)}
        others = [tensor for tensor in snapshot.tensors if id(tensor) not in copies]
        if device is None:
            snapshot.keep_values(t for t in others if not isinstance(t, nn.Parameter))
        mode, scripted = training_mode(network, training=training), scripted_functions_in_python()
        hidden = autograd_calls()
        with replaced(places, copies), mode, torch.no_grad(), scripted, hidden as calls, tracer:
            outputs = call_network(network, batch)
    finally:
        new += snapshot.restore()
    kept = [*copies.values(), *others, *new]
    constants = {*map(id, kept)}
    return Trace(
        _without_wrappers(tracer.ops, [*kept, *tensors_in(batch)]),
        names,
        frozenset(constants),
        list(tensors_in(batch)),
        sample_count(batch),
        list(tensors_in(outputs)),
        tracer.measured,
        bool(calls),
    )
