"""Summary of a trace: the facts that later steps of a cut need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from job.slimming.graph.layers import owner_of
from job.slimming.graph.pause_points import CONSUMERS, consumer_of, pause_points

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from job.slimming.graph.pause_points import PausePoint
    from job.slimming.graph.trace import Trace

LAYER_CALLS = {  # position and name of the argument that identifies the layer
    **dict.fromkeys(CONSUMERS, (1, "weight")),
    "batch_norm": (1, "running_mean"),
    "constant_output": (2, "bias"),
}
NO_VALUES = frozenset(  # ops that use the shape of their input, not its values
    """no_output constant_output new_empty new_zeros new_ones new_full zeros_like ones_like
    empty_like full_like rand_like randn_like""".split()
)


NETWORK_INPUT = -1  # as the source of a step


class FlowStep(NamedTuple):
    """Op in the data flow, with the steps that produce its inputs, or -1 for an input.

    ``layer`` is the name of the convolution, linear layer or BatchNorm that calls the op.
    ``constant`` tells that the op does not use the values of its sources.
    """

    sources: tuple[int, ...]
    layer: str | None = None
    constant: bool = False


@dataclass(frozen=True)
class Treatment:
    """How a network processes an image: ops, the parameters they use, which axes have size 1.

    ``smallest_side`` is the fewest pixels, more than one, along a side of a feature map.
    """

    ops: Sequence[tuple[object, ...]]
    smallest_side: int = field(compare=False)


@dataclass(frozen=True)
class TraceSummary:
    """Facts of one forward pass in eval mode.

    ``norms_after`` maps a convolution or linear layer to the BatchNorms that are the only consumers
    of its outputs. ``keeps_activations`` tells that the network stores activations of a batch,
    which another pass could use. ``treatment`` is that of an image of any size. ``pause_points``
    are those of each layer, in the order of the ops. ``steps`` are the data flow, and ``outputs``
    the steps whose results the network returns.
    """

    norms_after: Mapping[str, tuple[str, ...]]
    keeps_activations: bool
    treatment: Treatment | None = None
    pause_points: Mapping[str, PausePoint] = field(default_factory=dict)
    steps: tuple[FlowStep, ...] = ()
    outputs: tuple[int, ...] = ()


NOTHING_TRACED = TraceSummary({}, keeps_activations=False)


def summarise_trace(trace: Trace) -> TraceSummary:
    """Return the facts of a forward pass."""
    norms = _norms_after(trace)
    return TraceSummary(
        norms,
        _keeps_activations(trace),
        treatment_of(trace),
        pause_points(trace, norms),
        *_data_flow(trace),
    )


def treatment_of(trace: Trace) -> Treatment:
    """Return how the network of a trace processes its input."""
    results = [result for op in trace.ops for result in op.results]
    dims = max((tensor.dim() for tensor in trace.inputs), default=0)
    sides = [side for r in results if r.dim() == dims for side in r.shape[2:] if side > 1]
    ops = [
        (
            op.name,
            *(trace.name(tensor) for tensor in op.inputs),
            *(tuple(size == 1 for size in result.shape) for result in op.results),
        )
        for op in trace.ops
    ]
    return Treatment(ops, min(sides, default=1))


def _data_flow(trace: Trace) -> tuple[tuple[FlowStep, ...], tuple[int, ...]]:
    """Return the steps of a trace, and the steps whose results are the outputs."""
    makers = {id(tensor): NETWORK_INPUT for tensor in trace.inputs}
    steps: list[FlowStep] = []
    for number, op in enumerate(trace.ops):
        sources = dict.fromkeys(makers[id(t)] for t in op.inputs if id(t) in makers)
        name = trace.name(op.argument(*LAYER_CALLS.get(op.name, (0, ""))))
        layer = owner_of(name) if name and op.name in LAYER_CALLS else None
        steps.append(FlowStep(tuple(sources), layer, op.name in NO_VALUES))
        # a tensor that is written to counts as a new one
        changed = op.results or op.inputs[:1]
        makers |= {id(result): number for result in changed}
    return tuple(steps), tuple(makers.get(id(t), NETWORK_INPUT) for t in trace.outputs)


def _norms_after(trace: Trace) -> dict[str, tuple[str, ...]]:
    """Return the BatchNorms that are the only consumers of each convolution or linear layer.

    Layers with other consumers, and BatchNorms of the outputs of several layers, are left out.
    """
    producers: dict[int, str] = {}  # by id of the activation
    norms: dict[str, set[str | None]] = {}  # that read a layer's outputs; None: another op
    sources: dict[str, set[str | None]] = {}  # layers whose outputs a BatchNorm reads
    for op in trace.ops:
        norm = None
        if op.name == "batch_norm":
            norm = trace.name(op.argument(1, "running_mean"))
            producer = producers.get(id(op.argument(0, "input")))
            sources.setdefault(owner_of(norm or ""), set()).add(producer)
        for tensor in op.inputs:
            if id(tensor) in producers:
                readers = norms.setdefault(producers[id(tensor)], set())
                readers.add(owner_of(norm) if norm else None)
        for result in op.results:
            producers.pop(id(result), None)
        layer = consumer_of(trace, op)
        if layer:
            producers[id(op.result)] = layer
    for output in trace.outputs:
        if id(output) in producers:
            norms.setdefault(producers[id(output)], set()).add(None)
    return {
        layer: tuple(sorted(norm for norm in after if norm))
        for layer, after in norms.items()
        if None not in after and all(sources[norm or ""] == {layer} for norm in after)
    }


def _keeps_activations(trace: Trace) -> bool:
    results = (result for op in trace.ops for result in op.results)
    return any(
        id(tensor) in trace.constants and tensor.dim() > 1 and len(tensor) == trace.sample_count
        for tensor in (*trace.inputs, *results)
    )
