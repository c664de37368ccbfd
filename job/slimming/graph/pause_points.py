"""Pause points: ops at which a forward pass can pause for a layer, and the memory it then needs.

If an addition is the only consumer of the outputs of a layer, possibly normalised, as at the end of
a residual block, the pause point of the layer is the addition, else the layer itself.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from job.slimming.graph.layers import owner_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from job.slimming.graph.trace import Op, Trace

CONSUMERS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear".split()
)
ADDITIONS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})


@dataclass(frozen=True)
class PausePoint:
    """Op, given by number, at which a pass pauses for a layer, and the memory it needs there.

    ``call`` is the number of the op of the layer itself. ``bytes_per_sample`` is a high estimate.
    ``summand`` is the module whose output is added, the layer or the BatchNorm after it; it is None
    if the pause point is the layer.
    """

    op: int
    call: int
    bytes_per_sample: int
    summand: str | None = None


def pause_points(trace: Trace, norms_after: Mapping[str, tuple[str, ...]]) -> dict[str, PausePoint]:
    """Return the pause points of all convolution and linear layers, in the order of the ops."""
    alive, summands = _alive_bytes(trace), _summands(trace, norms_after)
    points: dict[str, PausePoint] = {}
    for number, op in enumerate(trace.ops):
        layer = consumer_of(trace, op)
        if layer is None or layer in points:
            continue
        # the wide network pauses after the layer
        size, place, summand = alive[number] + op.result.nbytes, number, None
        if layer in summands:
            place, summand = summands[layer]
            size = max(size, alive[place] + op.inputs[0].nbytes)
        points[layer] = PausePoint(place, number, size // trace.sample_count, summand)
    return dict(sorted(points.items(), key=lambda item: item[1].op))


def consumer_of(trace: Trace, op: Op) -> str | None:
    """Return the convolution or linear layer that an op belongs to; None for other ops."""
    if op.name not in CONSUMERS:
        return None
    weight = op.argument(1, "weight")
    name = trace.name(weight) or trace.computed.get(id(weight))
    return owner_of(name) if name else None


def multiplied_values(op: Op) -> int:
    """Return how many values of a batch are multiplied by a row of the weight of a layer.

    These are the outputs, or the inputs of a transposed convolution, each of which is multiplied by
    a part of the kernel.
    """
    values = op.inputs[0] if op.name.startswith("conv_transpose") else op.result
    if op.name != "spaced_convolution":
        return int(values.numel())
    size, axis, *_ = op.argument(4, "line")  # zeros between the channels count too
    return int(values.numel() // values.shape[axis] * size)


def _alive_bytes(trace: Trace) -> list[int]:
    """Return the bytes of the activations that are in memory before each op."""
    last = {id(t): n for n, op in enumerate(trace.ops) for t in op.inputs}
    alive = {id(tensor): tensor.nbytes for tensor in trace.inputs}
    sizes = []
    for number, op in enumerate(trace.ops):
        sizes.append(sum(alive.values()))
        alive |= {id(result): result.nbytes for result in op.results}
        alive = {key: size for key, size in alive.items() if last.get(key, -1) > number}
    return sizes


def _summands(
    trace: Trace, norms_after: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[int, str]]:
    """Return the layers whose outputs are only added: the addition's number, and the summand.

    If the outputs of two layers are added, only the later layer is returned.
    """
    normed = {norms[0]: layer for layer, norms in norms_after.items() if len(norms) == 1}
    producers: dict[int, tuple[str, str]] = {}  # layer and module, by id of the activation
    uses: dict[tuple[str, str], list[int]] = defaultdict(list)  # numbers of ops
    for number, op in enumerate(trace.ops):
        for tensor in op.inputs:
            if id(tensor) in producers:
                uses[producers[id(tensor)]].append(number)
        for result in op.results:
            producers.pop(id(result), None)
        layer = consumer_of(trace, op)
        if layer and not norms_after.get(layer):
            producers[id(op.result)] = layer, layer
        elif op.name == "batch_norm":
            norm = owner_of(trace.name(op.argument(1, "running_mean")) or "")
            if norm in normed:
                producers[id(op.result)] = normed[norm], norm
    for output in trace.outputs:
        if id(output) in producers:
            uses[producers[id(output)]].append(-1)
    of_op = {
        numbers[0]: producer
        for producer, numbers in uses.items()
        if len(numbers) == 1 and numbers[0] >= 0 and _is_addition(trace.ops[numbers[0]])
    }
    return {layer: (number, module) for number, (layer, module) in of_op.items()}


def _is_addition(op: Op) -> bool:
    """Return whether an op adds two activations of the same shape."""
    if op.name not in ADDITIONS or op.kwargs or len(op.args) != 2:
        return False
    one, other = op.args
    tensors = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return tensors and one.shape == other.shape
