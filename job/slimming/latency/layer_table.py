"""A layer's time by its numbers of channels: measured at some widths, monotone, interpolated.

Hardware works in tiles of 8, 16 or more channels: one channel more than a multiple takes the time
of the next one. Times at half of the channels and at one more tell the size of the tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from job.slimming.latency.clock import time_call

if TYPE_CHECKING:
    from collections.abc import Callable

    from job.slimming.latency.clock import Clock
    from job.slimming.latency.layer_shapes import LayerShape

TABLE_WIDTHS = (0.125, 0.25, 0.5, 0.75)  # and all channels
TILES = (1, 8, 16, 32, 64)
SHORTEST = 1e-9  # seconds: a clock may show none
MAX_TOGETHER = 2**18  # inputs times outputs of layers that are built together
SWEEPS, CALLS = 3, 3  # the shortest of so many calls counts
Times = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class LayerTable:
    """``seconds`` (I, O) at the numbers of channels ``inputs`` (I,) and ``outputs`` (O,), rising.

    ``tiles`` are the sizes of tiles of inputs and outputs. A layer with as many outputs as inputs
    has one column.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seconds: Times
    tiles: tuple[int, int] = (1, 1)

    def at(self, inputs: float, outputs: float) -> float:
        """Return the seconds with so many channels; no channel takes no time."""
        if not inputs or not outputs:
            return 0.0
        rows = [np.interp(self._whole(outputs, 1), self.outputs, row) for row in self.seconds]
        return float(np.interp(self._whole(inputs, 0), self.inputs, rows))

    def _whole(self, channels: float, axis: int) -> float:
        """The channels of whole tiles, at most all of them."""
        tile = self.tiles[axis]
        return min(math.ceil(channels / tile) * tile, (self.inputs, self.outputs)[axis][-1])

    def to_dict(self) -> dict[str, Any]:
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
        right = seconds.shape == (len(inputs), len(outputs)) and bool((seconds > 0).all())
        if not right or len(tiles) != 2 or min(tiles) < 1 or not np.isfinite(seconds).all():
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
    outs = (shape.outputs,) if shape.together else widths_of(shape.outputs)
    places = [(i, i) if shape.together else (i, o) for i in ins for o in outs]
    half, more = ins[len(ins) // 2], outs[len(outs) // 2]
    beyond = {0: (half + 1, half + 1 if shape.together else outs[-1]), 1: (ins[-1], more + 1)}
    if shape.together or more == outs[-1]:
        del beyond[1]
    if half == ins[-1]:
        beyond.pop(0)
    times = _shortest_times(shape, list(dict.fromkeys((*places, *beyond.values()))), call, clock)
    shortest = [max(times[place], SHORTEST) for place in places]
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
    """The shortest time of a layer with each pair of numbers of channels.

    The layers are timed in turn, in sweeps that see different moments of a machine with other
    programs. Of a large layer there is one at a time: all of them together would fill the memory.
    """
    large = shape.inputs * shape.outputs > MAX_TOGETHER
    times = dict.fromkeys(places, math.inf)
    for group in [[place] for place in places] if large else [places]:
        calls = {place: call(*place) for place in group}
        for _ in range(SWEEPS):
            for place, run in calls.items():
                run()
                times[place] = min(times[place], *(time_call(clock, run) for _ in range(CALLS)))
    return times


def _tile(counts: tuple[int, ...], seconds: Times, one_more: float) -> int:
    """The size of tiles, by the time with one channel more than at the middle of ``counts``.

    The share of the growth up to the next count that the first channel takes is that of a tile.
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
