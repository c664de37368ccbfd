"""Model of a network's latency as a function of its kept channels, from measured layers.

A profile gives the time of each layer within the uncut network, and the table of its shape how that
time falls with its channels. The time of the ops after a layer, such as an activation or a sum,
falls with the outputs of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch

from job.slimming.calibration.progress import no_progress
from job.slimming.graph.layer_rules import is_layer
from job.slimming.graph.layers import modules_of
from job.slimming.latency.layer_shapes import narrow_call, shape_of
from job.slimming.latency.layer_table import LayerTable, measure_table
from job.slimming.latency.profile import profile_alternately
from job.slimming.latency.table_cache import cache_file, read_tables, write_tables

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from job.slimming.calibration.progress import Progress
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.inputs import Example
    from job.slimming.latency.clock import Clock
    from job.slimming.latency.profile import Profile

OVERHEAD = 0.05  # share of the time of an op that does not depend on its channels
PROFILE_SECONDS = 1.0


@dataclass(frozen=True, eq=False)
class LayerLatency:
    """Seconds of one layer at its full ``inputs`` and ``outputs``, and of the ops ``following`` it.

    ``input_slot`` and ``output_slot`` number the channel slots that count its channels; 0 is for
    channels that are never cut. Without a ``table`` the time falls with the product of both.
    """

    seconds: float
    following: float
    inputs: int
    outputs: int
    input_slot: int
    output_slot: int
    table: LayerTable | None

    def at(self, kept_inputs: float, kept_outputs: float) -> float:
        """Return the seconds when the fractions ``kept_…`` of its channels are kept."""
        if not kept_inputs or not kept_outputs:
            return 0.0
        if self.table is not None:
            share = self.table.at(kept_inputs * self.inputs, kept_outputs * self.outputs)
            share /= self.table.at(self.inputs, self.outputs)
        else:
            share = OVERHEAD + (1 - OVERHEAD) * kept_inputs * kept_outputs
        return self.seconds * share + self.following * (OVERHEAD + (1 - OVERHEAD) * kept_outputs)


class NetworkLatency:
    """Prediction of the seconds of a pass from the number of channels in each slot of a graph.

    ``other`` are the seconds before the first layer, and ``lengths`` (slots,) the full numbers.
    """

    def __init__(
        self, layers: Sequence[LayerLatency], other: float, lengths: Sequence[int]
    ) -> None:
        self.layers, self.other, self.lengths = layers, other, lengths
        self._memo: dict[tuple[int, int, int], float] = {}

    @cached_property
    def whole(self) -> float:
        """Seconds with all channels."""
        return self.seconds(self.lengths)

    def seconds(self, counts: Ids | Sequence[int]) -> float:
        """Return the seconds with ``counts`` (slots,) channels; slot 0 has those never cut."""
        return self.other + sum(
            self._layer(n, layer, counts) for n, layer in enumerate(self.layers)
        )

    def _layer(self, number: int, layer: LayerLatency, counts: Any) -> float:
        inputs, outputs = int(counts[layer.input_slot]), int(counts[layer.output_slot])
        key = number, inputs, outputs
        if key not in self._memo:
            kept = (
                inputs / self.lengths[layer.input_slot],
                outputs / self.lengths[layer.output_slot],
            )
            self._memo[key] = layer.at(*kept)
        return self._memo[key]


def measure_network(
    network: nn.Module,
    graph: ChannelGraph,
    inputs: Example,
    clock: Clock,
    progress: Progress = no_progress,
) -> NetworkLatency:
    """Profile ``network`` on ``inputs``, and measure its layer shapes that are not cached.

    The caller puts the network in eval mode and disables gradients.
    """
    (profile,) = profile_alternately([(network, inputs)], clock, PROFILE_SECONDS)
    tables = dict(_tables(network, profile, clock, progress))
    numbers = {(slot.layer, slot.side): n for n, slot in enumerate(graph.slots, start=1)}
    lengths = [1, *(len(slot.ids) for slot in graph.slots)]
    modules = modules_of(network)
    layers = []
    for name, table in tables.items():
        layer = name.removesuffix(".norm")
        through = next(
            (numbers[layer, s] for s in ("through", "select") if (layer, s) in numbers), 0
        )
        slots = numbers.get((layer, "in"), through), numbers.get((layer, "out"), through)
        shape = shape_of(modules[name], profile.input_sizes.get(name, ()))
        sizes = (shape.inputs, shape.outputs) if shape else (1, 1)
        following = profile.after_layers.get(name, 0.0)
        layers.append(LayerLatency(profile.layers[name].seconds, following, *sizes, *slots, table))
    return NetworkLatency(layers, profile.after_layers.get("", 0.0), lengths)


def _tables(
    network: nn.Module, profile: Profile, clock: Clock, progress: Progress
) -> Iterator[tuple[str, LayerTable | None]]:
    """Yield each layer with channels and its table, measured unless it is in the cache."""
    weight = next(network.parameters(), torch.empty(0))
    four = next((p for p in network.parameters() if p.dim() == 4), weight)
    layout = "contiguous" if four.is_contiguous() else "channels_last"
    path = cache_file(weight.device, weight.dtype, layout)
    tables = read_tables(path)
    modules = modules_of(network)
    layers = [name for name in profile.layers if is_layer(modules[name])]
    changed = False
    for number, name in enumerate(layers, start=1):
        shape = shape_of(modules[name], profile.input_sizes.get(name, ()))
        if shape is None:
            yield name, None
            continue
        if shape.key not in tables:
            progress("timing layers", number, len(layers))
            call = partial(narrow_call, modules[name], shape)
            tables[shape.key] = measure_table(shape, call, clock)
            changed = True
        yield name, tables[shape.key]
    if changed:
        write_tables(path, tables)
