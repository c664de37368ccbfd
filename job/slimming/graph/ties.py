"""Parts that must stay equally large and overlap, e.g. nested halves of a shuffled stream.

Channels of such parts get *colours*, so that each part has each colour equally often. Channels of
one colour are cut together: whatever colours are cut, the parts stay equally large.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np

from job.slimming.graph.union import FIXED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from job.slimming.graph.union import ChannelUnion, Ids

Rows = list[list[int]]  # elements of parts


def tie_overlapping(union: ChannelUnion, roots: Ids) -> bool:
    """Unite channels of overlapping blocks by colours; returns whether any are united."""
    count = len(union.pairs)
    for blocks in _overlapping(_distinct_blocks(union, roots)):
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
    """The blocks, as roots, except those whose rows are equal or of another block's rows."""
    blocks: dict[bytes, Ids] = {}
    for block in union.blocks:
        rows = np.sort(roots[block], axis=1)
        if not (rows == rows[0]).all():
            rows = rows[np.lexsort(rows.T[::-1])]
            blocks.setdefault(rows.tobytes(), rows)
    return list(blocks.values())


def _overlapping(blocks: Sequence[Ids]) -> Iterator[list[Ids]]:
    """Sets of blocks that share elements; single blocks only where rows share some."""
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
    """A colour for each element, so that a row has each colour equally often."""
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
    """Colours from 0 to ``number`` - 1, given row by row; None where a row gets one too often."""
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
    """Each colour as often as it is left, in turn."""
    by_round: dict[int, list[int]] = defaultdict(list)
    for colour, times in left.items():
        for turn in range(times):
            by_round[turn].append(colour)
    for turn in sorted(by_round):
        yield from by_round[turn]
