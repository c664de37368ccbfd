"""Tables of a layer's time by its channels: measured at some widths, monotone, interpolated.

Hardware works in tiles of 8, 16 or more channels: one channel more than a multiple takes as long as
the next multiple. The times at half of the channels and at one more give the size of the tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from job.slimming.latency.clock import time_call

if TYPE_CHECKING:
    from collections.abc import Callable

    from job.files import JsonObject
    from job.slimming.latency.clock import Clock
    from job.slimming.latency.layer_shapes import LayerShape

TABLE_WIDTHS = (0.125, 0.25, 0.5, 0.75)  # fractions of the channels; and 1
TILES = (1, 8, 16, 32, 64)
MIN_SECONDS = 1e-9  # a clock may measure 0
MAX_LAYER_SIZE = 2**18  # inputs times outputs; larger layers are built one at a time
SWEEPS, CALLS = 3, 3  # of a layer; the shortest call of all sweeps counts
Times = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class LayerTable:
    """Times ``seconds`` (I, O) with ``inputs`` (I,) and ``outputs`` (O,) channels, both ascending.

    ``tiles`` are the sizes of tiles of inputs and outputs. A layer with as many outputs as inputs
    has one column.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seconds: Times
    tiles: tuple[int, int] = (1, 1)

    def at(self, inputs: float, outputs: float) -> float:
        """Return the seconds with ``inputs`` and ``outputs`` channels; 0 without channels."""
        if not inputs or not outputs:
            return 0.0
        rows = [np.interp(self._round_up(outputs, 1), self.outputs, row) for row in self.seconds]
        return float(np.interp(self._round_up(inputs, 0), self.inputs, rows))

    def _round_up(self, channels: float, axis: int) -> float:
        """Return ``channels`` rounded up to whole tiles, at most all channels."""
        tile = self.tiles[axis]
        return min(math.ceil(channels / tile) * tile, (self.inputs, self.outputs)[axis][-1])

    def to_dict(self) -> JsonObject:
        """Return the table for JSON."""
        return {
            "inputs": list(self.inputs), "outputs": list(self.outputs),
            "seconds": self.seconds.tolist(), "tiles": list(self.tiles),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Any) -> LayerTable:
        """Read the table of ``to_dict``; raises ValueError, KeyError or TypeError."""
        inputs, outputs = (tuple(map(int, values[side])) for side in ("inputs", "outputs"))
        seconds = np.array(values["seconds"], np.float64)
        tiles = tuple(map(int, values["tiles"]))
        valid = seconds.shape == (len(inputs), len(outputs)) and bool((seconds > 0).all())
        if not valid or len(tiles) != 2 or min(tiles) < 1 or not np.isfinite(seconds).all():
            raise ValueError("not a table of times")
        return cls(inputs, outputs, seconds, (tiles[0], tiles[1]))


def widths_of(channels: int) -> tuple[int, ...]:
    """Return the numbers of channels to measure: multiples of 8 where there are many."""
    step = 8 if channels >= 64 else 1
    counts = {max(1, round(channels * fraction / step) * step) for fraction in TABLE_WIDTHS}
    return tuple(sorted({*(count for count in counts if count < channels), channels}))


def measure_table(
    shape: LayerShape, call: Callable[[int, int], Callable[[], object]], clock: Clock
) -> LayerTable:
    """Return the table of ``shape``; ``call(inputs, outputs)`` makes a call of a layer to time."""
    ins = widths_of(shape.inputs)
    outs = (shape.outputs,) if shape.channelwise else widths_of(shape.outputs)
    places = [(i, i) if shape.channelwise else (i, o) for i in ins for o in outs]
    half, more = ins[len(ins) // 2], outs[len(outs) // 2]
    beyond = {0: (half + 1, half + 1 if shape.channelwise else outs[-1]), 1: (ins[-1], more + 1)}
    if shape.channelwise or more == outs[-1]:
        del beyond[1]
    if half == ins[-1]:
        beyond.pop(0)
    times = _shortest_times(shape, list(dict.fromkeys((*places, *beyond.values()))), call, clock)
    shortest = [max(times[place], MIN_SECONDS) for place in places]
    seconds = np.array(shortest).reshape(len(ins), len(outs))
    for axis in (0, 1):  # more channels never take less time
        seconds = np.maximum.accumulate(seconds, axis)
    ends = {0: seconds[:, -1], 1: seconds[-1]}
    tiles = [1, 1]
    for axis, place in beyond.items():
        counts = (ins, outs)[axis]
        tiles[axis] = _tile(counts, ends[axis], times[place])
    return LayerTable(ins, outs, seconds, (tiles[0], tiles[1]))


def _shortest_times(
    shape: LayerShape,
    places: list[tuple[int, int]],
    call: Callable[[int, int], Callable[[], object]],
    clock: Clock,
) -> dict[tuple[int, int], float]:
    """Return the shortest time of a layer with each pair (inputs, outputs) of channels.

    The layers are timed in turn, in sweeps, so that a short load by other programs does not affect
    all calls of one width. Large layers are built one at a time, to save memory.
    """
    large = shape.inputs * shape.outputs > MAX_LAYER_SIZE
    times = dict.fromkeys(places, math.inf)
    for group in [[place] for place in places] if large else [places]:
        calls = {place: call(*place) for place in group}
        for _ in range(SWEEPS):
            for place, run in calls.items():
                run()
                times[place] = min(times[place], *(time_call(clock, run) for _ in range(CALLS)))
    return times


def _tile(counts: tuple[int, ...], seconds: Times, one_more: float) -> int:
    """Return the size of tiles, from the time with one channel more than the middle of ``counts``.

    One channel more costs a whole tile. Its share of the growth up to the next count is therefore
    the share of a tile in the gap between the counts.
    """
    middle = len(counts) // 2
    growth = float(seconds[middle + 1] - seconds[middle])
    gap = counts[middle + 1] - counts[middle]
    share = (one_more - float(seconds[middle])) / growth if growth > 0 else 0.0
    channels = min(max(share, 0.0) * gap, float(gap))
    if channels < 4 or counts[middle] % 8:
        return 1
    nearest = min(TILES[1:], key=lambda tile: abs(math.log(tile / channels)))
    return nearest if nearest <= gap and not counts[middle] % nearest else 1
