"""Paired passes: forward passes of the narrow and the wide network on the same images.

A pass keeps its activations in memory while it is paused. Few images fit before the first layers,
whose feature maps are large; more images join at later layers.
"""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from job.distributed.memory import resident_memory, trim_heap
from job.slimming.calibration.batch import JoinedBatch, inputs_of, join_batches
from job.slimming.calibration.paused_forward import ForwardPass, Summands, forward_passes
from job.slimming.graph.modes import eval_with_hooks
from job.slimming.graph.snapshot import Snapshot, preserve_state
from job.slimming.inputs import (
    call_network,
    sample_count,
    tensors_in,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import nn

    from job.slimming.calibration.batch import CalibrationBatch
    from job.slimming.compensation.cut_pair import CutPair
    from job.slimming.inputs import Example

MAX_PAUSED_BYTES = 2**31  # of the activations of all paused passes
MAX_FREED_BYTES = 2**29  # by which the process grows before freed memory is returned
PARTS = 8  # batches of the images before the first layer, since a running pass needs memory too


@dataclass(frozen=True)
class PairedValues:
    """Inputs of a layer in both networks, and its outputs in the wide network.

    They belong to joined batches of ``sizes`` samples. ``inputs`` are those of the narrow network.
    If the layer is fitted to a sum, ``narrow_sum`` is the sum in the narrow network, ``outputs``
    the sum in the wide network, and ``narrow`` the pass that is paused at the addition.
    """

    sizes: Sequence[int]
    inputs: torch.Tensor
    wide_inputs: torch.Tensor
    outputs: torch.Tensor
    narrow_sum: torch.Tensor | None = None
    narrow: ForwardPass | None = None


class PairedPasses:
    """Pairs of passes over the images of this process, which pause at each of ``layers``.

    A process may have no images. ``layers`` are in the order of their pause points. ``summands``
    maps layers whose outputs are only added to another to the module whose output is added.
    """

    def __init__(
        self,
        pair: CutPair,
        batches: Iterable[CalibrationBatch],
        layers: Sequence[str],
        summands: Mapping[str, str],
    ) -> None:
        facts = pair.graph.forward
        self.networks, self.layers, self.summands = (pair.narrow, pair.wide), layers, summands
        self.calls = Counter(call.weight for call in pair.graph.calls)
        points = facts.pause_points
        self.in_order = sorted(layers, key=lambda layer: points[layer].call)
        sizes = [points[layer].bytes_per_sample for layer in layers]
        # the largest size of the activations from each layer on
        largest = list(itertools.accumulate(reversed(sizes), max))[::-1]
        first = max(1, MAX_PAUSED_BYTES // max(1, 2 * largest[0]))  # samples
        inputs, self.unpaused = map(inputs_of, batches), Snapshot(pair.wide).has_locks
        if facts.keeps_activations:  # a paused pass could use activations of another one
            joined = list(join_batches(_first_samples(inputs, first), first * PARTS))
            self.unpaused = self.unpaused or len(joined) > 1
            largest, self.batches = [0] * len(layers), _Batches(iter(joined))
        else:
            self.batches = _Batches(join_batches(inputs, first // PARTS))
        self.largest = dict(zip(layers, largest, strict=True))
        self.resident = 0  # bytes of this process after freed memory was returned
        self.joined: list[JoinedBatch] = []
        self.passes: list[tuple[ForwardPass, ForwardPass]] = []
        self.start: list[Callable[[Example], ForwardPass]] = []

    @contextmanager
    def started(self) -> Iterator[None]:
        """Prepare both networks for passes; the passes end with the context."""
        with ExitStack() as stack:
            stack.enter_context(preserve_state(self.networks[1]))
            for network in self.networks:
                layers = map(network.get_submodule, self.in_order)
                summands = {
                    network.get_submodule(layer): network.get_submodule(module)
                    for layer, module in self.summands.items()
                }
                if self.unpaused:
                    summands = {}
                self.start.append(stack.enter_context(forward_passes(network, layers, summands)))
            yield

    def values(self, name: str) -> list[PairedValues]:
        """Return the inputs and the wide outputs of the layer ``name``, by batch and call."""
        self._join(name)
        once = self.calls[f"{name}.weight"] == 1 and not self.unpaused
        values: list[PairedValues] = []
        for batch, passes in zip(self.joined, self.passes, strict=True):
            self._trim()
            if not once:  # layers between the calls of this layer are fitted later
                values += self._from_whole_passes(name, batch)
            elif name in self.summands:
                values += self._from_addition(name, batch.sizes, *passes)
            else:
                narrow, wide = (network.get_submodule(name) for network in self.networks)
                inputs, called = passes[0].run_until(narrow), passes[1].run_through(wide)
                if inputs is not None and called is not None:
                    values.append(PairedValues(batch.sizes, inputs, *called))
        return values

    def _from_addition(
        self, name: str, sizes: Sequence[int], narrow: ForwardPass, wide: ForwardPass
    ) -> Iterator[PairedValues]:
        narrow_summands, wide_summands = (
            forward_pass.run_until_added(network.get_submodule(name))
            for forward_pass, network in zip((narrow, wide), self.networks, strict=True)
        )
        if narrow_summands is not None and wide_summands is not None:
            inputs = narrow_summands.inputs, wide_summands.inputs
            yield PairedValues(sizes, *inputs, _sum(wide_summands), _sum(narrow_summands), narrow)

    def replace_outputs(self, name: str, values: Sequence[PairedValues]) -> None:
        """Replace the outputs of a fitted layer in passes that have already run it."""
        layer = self.networks[0].get_submodule(name)
        module = self.networks[0].get_submodule(self.summands.get(name, name))
        with torch.no_grad():
            for batch in values:
                if batch.narrow is not None:
                    outputs = layer.forward(batch.inputs)
                    outputs = outputs if module is layer else module.forward(outputs)
                    batch.narrow.replace_output(outputs)

    def _join(self, name: str) -> None:
        """Start passes over more images if they fit into memory from this layer on."""
        for batch in self.batches.take(MAX_PAUSED_BYTES, 2 * self.largest[name]):
            self.joined.append(batch)
            narrow, wide = (start(batch.inputs) for start in self.start)
            self.passes.append((narrow, wide))

    def _trim(self) -> None:
        """Return freed memory once it may be a lot: each pass frees into the heap of its thread."""
        if resident_memory() > self.resident + MAX_FREED_BYTES:
            trim_heap()
            self.resident = resident_memory()

    def _from_whole_passes(self, name: str, batch: JoinedBatch) -> Iterator[PairedValues]:
        """Yield the values at each call of a layer, from passes that do not pause."""
        narrow_calls, wide_calls = (_calls(net, name, batch.inputs) for net in self.networks)
        for (inputs, _), wide_call in zip(narrow_calls, wide_calls, strict=True):
            yield PairedValues(batch.sizes, inputs, *wide_call)


def _sum(summands: Summands) -> torch.Tensor:
    return summands.output + summands.other


def _calls(
    network: nn.Module, name: str, batch: Example
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return copies of the inputs and outputs of a layer at each of its calls."""
    layer, calls = network.get_submodule(name), []
    inputs: list[torch.Tensor] = []

    def before(_: nn.Module, values: tuple[torch.Tensor, ...]) -> None:
        inputs.append(values[0].clone())  # the layer may change its input in place

    def after(_: nn.Module, __: object, outputs: torch.Tensor) -> None:
        calls.append((inputs[-1], outputs.clone()))

    with eval_with_hooks(network, [(layer, before)]):
        layer.register_forward_hook(after)
        call_network(network, batch)
    return calls


class _Batches:
    """Queue of batches, read when they are needed."""

    def __init__(self, batches: Iterator[JoinedBatch]) -> None:
        self.waiting = batches
        self.samples = self.nbytes = 0

    def take(self, most: int, bytes_per_sample: int) -> Iterator[JoinedBatch]:
        """Yield batches until all batches taken so far need ``most`` bytes or more."""
        while self.samples * bytes_per_sample + self.nbytes < most:
            batch = next(self.waiting, None)
            if batch is None:
                return
            self.samples += sum(batch.sizes)
            self.nbytes += sum(tensor.nbytes for tensor in tensors_in(batch.inputs))
            yield batch


def _first_samples(batches: Iterable[Example], most: int) -> Iterator[Example]:
    """Yield the first batches, up to ``most`` samples or slightly more."""
    for batch in batches:
        yield batch
        most -= sample_count(batch)
        if most <= 0:
            return
