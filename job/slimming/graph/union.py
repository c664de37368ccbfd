"""Which channels belong together, followed through the recorded ops of a network.

Every output channel of a convolution or linear layer is an *element*; each activation carries, as
an int64 tensor that broadcasts to its shape, the element that each of its entries comes from. Where
two meet (a residual sum, a gate) they are tied; what reads, writes or passes them is noted as a
*position*. Operations that only move data are run on those labels themselves. What is not
understood fixes the elements that it touches, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Side = Literal["out", "in", "through", "select"]
Ids = np.ndarray[Any, np.dtype[np.int64]]
FIXED = 0  # the element of everything that is never cut


@dataclass(frozen=True)
class ChannelSlot:
    """Elements ``ids`` along one side of a layer, or of a parameter that no known layer owns.

    ``out``: rows that it writes; ``in``: columns that it sums over; ``through``: channels that pass
    one by one (BatchNorm, or depthwise convolution: ``times`` outputs each); ``select``: a
    BatchNorm that picks its own channels from a stream which stays whole.
    """

    layer: str
    side: Side
    ids: Ids
    times: int = 0


@dataclass(frozen=True)
class LayerCall:
    """A use of a convolution or linear layer: multiply-adds for one picture and each weight.

    ``weight`` is None where it is computed; then they are those of all of it.
    """

    weight: str | None
    places: int


@dataclass
class Flow:
    """What following the ops has found."""

    slots: list[ChannelSlot] = field(default_factory=list)
    births: list[tuple[str, Ids]] = field(default_factory=list)  # who writes which elements
    blocks: list[Ids] = field(default_factory=list)  # (B, n): as many of each row must stay
    suspects: list[tuple[str, Ids]] = field(default_factory=list)  # moved by fixed numbers, maybe
    reasons: list[tuple[str, Ids]] = field(default_factory=list)  # why elements are fixed
    calls: list[LayerCall] = field(default_factory=list)
    doubtful: bool = False  # there is an op that is not understood
    count: int = 1  # elements, FIXED among them
    ties: list[tuple[Ids, Ids]] = field(default_factory=list)  # pair by pair

    def tie(self, one: Ids, other: Ids) -> None:
        """Cut these elements together, pair by pair."""
        if len(one):
            self.ties.append((one, other))

    def fix(self, ids: Ids, reason: str) -> None:
        """Never cut these elements."""
        ids = np.unique(ids[ids != FIXED])
        if len(ids):
            self.reasons.append((reason, ids))

    def born(self, layer: str, count: int) -> Ids:
        """New elements, written by ``layer``."""
        ids = np.arange(self.count, self.count + count)
        self.births.append((layer, ids))
        self.count += count
        return ids

    def classes(self) -> Ids:
        """For each element the smallest one that it is tied to."""
        classes = np.arange(self.count)
        if not self.ties:
            return classes
        one, other = (np.concatenate(side) for side in zip(*self.ties, strict=True))
        while True:
            least = np.minimum(classes[one], classes[other])
            after = classes.copy()
            np.minimum.at(after, classes[one], least)
            np.minimum.at(after, classes[other], least)
            after = after[after]
            if (after == classes).all():
                return classes
            classes = after

    def mixed(self, layers: set[str]) -> set[str]:
        """Those of ``layers`` whose elements are tied to what another layer writes."""
        if not layers:
            return set()
        classes = self.classes()
        writer = np.full(self.count, -1)
        several = np.zeros(self.count, bool)
        several[classes[FIXED]] = True
        for number, (_, ids) in enumerate(self.births):
            own = classes[ids]
            several[own] |= writer[own] >= 0
            writer[own] = number
        return {
            layer
            for layer, ids in self.births
            if layer in layers and bool(several[classes[ids]].any())
        }
