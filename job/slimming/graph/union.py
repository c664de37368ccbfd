"""Union of channels that must be cut together.

Every output channel of a convolution or linear layer has a number from 1, its *element*. Elements
that an op combines, e.g. a residual sum, are united. Element 0 stands for all channels that are
never cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from job.slimming.graph.reasons import Reason

Side = Literal["out", "in", "through", "select", "places", "whole"]
Ids = np.ndarray[Any, np.dtype[np.int64]]
FIXED = 0  # element of all channels that are never cut


@dataclass(frozen=True)
class ChannelSlot:
    """Elements ``ids`` (C,) along one side of a layer, or of a parameter outside known layers.

    ``layer`` is the name of either. Sides are ``out``: rows that a layer produces; ``in``: columns
    that it sums over; ``through``: channels that pass through separately (a BatchNorm, or a
    depthwise convolution with ``times`` outputs for each); ``select``: channels that a BatchNorm
    selects from a stream that is not cut; ``places``: channels that a table of indices contains, or
    those along the ``axis`` of a convolution across channels. ``axis`` is that of a parameter, too;
    None for the first one of a size above 1.
    """

    layer: str
    side: Side
    ids: Ids
    times: int = 0
    axis: int | None = None


@dataclass(frozen=True)
class LayerCall:
    """Call of a convolution or linear layer, to count the multiply-adds for one image.

    ``places`` is the mean number of times that an element of the parameter ``weight`` is used.
    ``weight`` is None for a computed weight; ``places`` is then the sum over its elements.
    """

    weight: str | None
    places: float


@dataclass(frozen=True)
class Operand:
    """Elements ``ids`` (C,) along ``axis`` of an op's argument, given by position and name.

    For a ``ChannelRead`` that is ``zeroed``, ``ids`` may have several axes and broadcasts to the
    argument.
    """

    position: int
    name: str
    axis: int
    ids: Ids


@dataclass(frozen=True)
class ChannelRead:
    """An op that computes over channels without a weight, such as a norm or a sum across them.

    It is call number ``call`` of the op ``name`` in eval mode. Its result has the channels of the
    first operand along ``result_axis``, which is None if it has no channels. In the wide network of
    the verification this op is computed from the kept channels alone. If ``zeroed``, the removed
    channels of the operands are set to zero instead, or for a softmax to a value so low that its
    weights are zero. An ``attn_mask`` masks them out.
    """

    name: str
    operands: tuple[Operand, ...]
    result_axis: int | None = None
    call: int = 0
    zeroed: bool = False


@dataclass(frozen=True)
class AttributeSize:
    """An attribute of a module that counts the elements ``ids``: a number, or one of a sequence.

    It may only be ``compared`` with their number, and equal it by chance.
    """

    module: str
    attribute: str
    place: int | None
    ids: Ids
    compared: bool = False


@dataclass(frozen=True)
class ScaledRows:
    """Outputs ``rows`` (n,) of ``layer``, which are the queries or keys ``ids`` of attention.

    Their weights are multiplied by the square root of the kept fraction of channels, since the
    scale of attention, computed as 1/sqrt(channels), is larger for fewer channels.
    """

    layer: str
    rows: Ids
    ids: Ids


@dataclass
class ChannelUnion:
    """Elements, their unions, and the results of propagation.

    ``producers`` are layers with the elements that they produce. The same number of elements must
    be kept in each row of an array (B, n) in ``blocks``. ``suspects`` are elements that may be
    misinterpreted, with the reason if they are; ``fixes`` are elements that are never cut, with the
    reason. ``reads`` are ops that compute over channels without a weight. ``doubtful`` tells that
    some op is not supported. ``count`` includes the element FIXED.
    ``sizes`` are attributes that may count channels. ``heads`` are blocks of the heads of
    attention, ``scaled`` the layers, rows and elements whose weights make up for its scale.
    ``places`` are the lines of code of the ``fixes``, ``suspect_places`` of the ``suspects``;
    ``place`` is the present one. ``computed`` are layers that compute their weight in each pass.
    """

    slots: list[ChannelSlot] = field(default_factory=list)
    producers: list[tuple[str, Ids]] = field(default_factory=list)
    blocks: list[Ids] = field(default_factory=list)
    suspects: list[tuple[Reason, Ids]] = field(default_factory=list)
    fixes: list[tuple[Reason, Ids]] = field(default_factory=list)
    calls: list[LayerCall] = field(default_factory=list)
    reads: list[ChannelRead] = field(default_factory=list)
    sizes: list[AttributeSize] = field(default_factory=list)
    heads: list[Ids] = field(default_factory=list)
    scaled: list[tuple[str, Ids, Ids]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    suspect_places: list[str] = field(default_factory=list)
    place: str = ""
    doubtful: bool = False
    computed: set[str] = field(default_factory=set)
    count: int = 1
    pairs: list[tuple[Ids, Ids]] = field(default_factory=list)

    def unite(self, one: Ids, other: Ids) -> None:
        """Unite the elements of two arrays (n,), pair by pair."""
        if len(one):
            self.pairs.append((one, other))

    def fix(self, ids: Ids, reason: Reason) -> None:
        """Block elements, for ``reason``."""
        ids = np.unique(ids[ids != FIXED])
        if len(ids):
            self.fixes.append((reason, ids))
            self.places.append(self.place)

    def end_op(self) -> None:
        """Record the current line of code for the suspects added since the last call."""
        missing = len(self.suspects) - len(self.suspect_places)
        self.suspect_places += [self.place] * missing

    def suspect_at(self, place: str, reason: Reason, ids: Ids) -> None:
        """Add suspects that an earlier line of code has made."""
        self.end_op()
        self.suspects.append((reason, ids))
        self.suspect_places.append(place or self.place)

    def produce(self, layer: str, count: int) -> Ids:
        """Add ``count`` elements that ``layer`` produces; returns them."""
        ids = np.arange(self.count, self.count + count)
        self.producers.append((layer, ids))
        self.count += count
        return ids

    def roots(self) -> Ids:
        """Return the smallest element in the union of each element, as an array (count,)."""
        roots = np.arange(self.count)
        if not self.pairs:
            return roots
        one, other = (np.concatenate(side) for side in zip(*self.pairs, strict=True))
        while True:
            least = np.minimum(roots[one], roots[other])
            after = roots.copy()
            np.minimum.at(after, roots[one], least)
            np.minimum.at(after, roots[other], least)
            after = after[after]
            if (after == roots).all():
                return roots
            roots = after

    def united_with_others(self, layers: set[str]) -> set[str]:
        """Return those of ``layers`` whose elements are united with elements of other layers."""
        if not layers:
            return set()
        roots = self.roots()
        producer = np.full(self.count, -1)
        several = np.zeros(self.count, bool)
        several[roots[FIXED]] = True
        for number, (_, ids) in enumerate(self.producers):
            of_layer = roots[ids]
            several[of_layer] |= producer[of_layer] >= 0
            producer[of_layer] = number
        return {
            layer
            for layer, ids in self.producers
            if layer in layers and bool(several[roots[ids]].any())
        }
