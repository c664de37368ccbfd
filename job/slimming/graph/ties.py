"""Ties of channels in overlapping parts of equal size, e.g. nested halves of a shuffled stream.

Each channel gets a *colour*, so that every part has each colour equally often. Channels of one
colour are cut together, so that the parts remain equally large whichever colours are cut.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np

from job.slimming.graph.union import FIXED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from job.slimming.graph.union import ChannelUnion, Ids

Rows = list[list[int]]  # elements of parts


def tie_overlapping(union: ChannelUnion, roots: Ids) -> bool:
    """Unite the channels of overlapping blocks by colour; return whether any were united."""
    return _tie(union, roots, _overlapping(_distinct_blocks(union, roots)))


def tie_beside(union: ChannelUnion, roots: Ids) -> bool:
    """Unite by colour the channels of layers that are only in part in blocks.

    A layer of queries, keys and values whose values alone must stay as many as those of another
    layer is an example. Returns whether any were united.
    """
    blocks = _distinct_blocks(union, roots)
    within = np.zeros(union.count, bool)
    for block in blocks:
        within[block] = True
    parts = []
    for _, made in union.producers:
        channels = roots[made]
        if within[channels].any() and not within[channels].all():
            touched = [block for block in blocks if np.isin(channels, block).any()]
            parts.append([*touched, np.unique(channels[~within[channels]])[None]])
    return _tie(union, roots, parts)


def _tie(union: ChannelUnion, roots: Ids, parts: Iterable[list[Ids]]) -> bool:
    """Unite the channels of the blocks of each part by colour; return whether any were united."""
    count = len(union.pairs)
    for blocks in parts:
        rows = [row for block in blocks for row in block.tolist()]
        if any(roots[FIXED] in row for row in rows):
            continue
        colours = _colours(rows)
        if colours is None:
            continue
        first: dict[int, int] = {}
        for element, colour in colours.items():
            union.unite(np.array([first.setdefault(colour, element)]), np.array([element]))
    return len(union.pairs) > count


def _distinct_blocks(union: ChannelUnion, roots: Ids) -> list[Ids]:
    """Return the blocks, as roots, without duplicates and blocks of equal rows."""
    blocks: dict[tuple[int, bytes], Ids] = {}  # halves can have the bytes of thirds
    for block in union.blocks:
        rows = np.sort(roots[block], axis=1)
        if not (rows == rows[0]).all():
            rows = rows[np.lexsort(rows.T[::-1])]
            blocks.setdefault((len(rows), rows.tobytes()), rows)
    return list(blocks.values())


def _overlapping(blocks: Sequence[Ids]) -> Iterator[list[Ids]]:
    """Yield the sets of blocks that share elements, and single blocks whose rows do."""
    parts: list[tuple[set[int], list[Ids]]] = []
    for block in blocks:
        elements, together = set(block.reshape(-1).tolist()), [block]
        for part in [part for part in parts if part[0] & elements]:
            parts.remove(part)
            elements, together = elements | part[0], part[1] + together
        parts.append((elements, together))
    for elements, together in parts:
        if len(together) > 1 or len(elements) < together[0].size:
            yield together


def _colours(rows: Rows) -> dict[int, int] | None:
    """Return a colour for each element, so that a row has each colour equally often."""
    counts = [Counter(row) for row in rows]
    if any(len(set(count.values())) > 1 for count in counts):
        return None  # some elements are in a row more often than others
    parts = [list(dict.fromkeys(row)) for row in rows]
    most = math.gcd(*map(len, parts))
    for number in range(most, 1, -1):
        if most % number == 0 and (colours := _with_colours(parts, number)) is not None:
            return colours
    return None


def _with_colours(rows: Rows, number: int) -> dict[int, int] | None:
    """Return colours from 0 to ``number`` - 1, assigned row by row; None if a row has too many."""
    colours: dict[int, int] = {}
    for row in sorted(rows, key=len):
        left = dict.fromkeys(range(number), len(row) // number)
        for element in row:
            if element in colours:
                left[colours[element]] -= 1
        if min(left.values()) < 0:
            return None
        free = _in_turn(left)
        for element in row:
            if element not in colours:
                colours[element] = next(free)
    return colours


def _in_turn(left: dict[int, int]) -> Iterator[int]:
    """Yield each colour in turn, as often as ``left`` says."""
    by_round: dict[int, list[int]] = defaultdict(list)
    for colour, times in left.items():
        for turn in range(times):
            by_round[turn].append(colour)
    for turn in sorted(by_round):
        yield from by_round[turn]
