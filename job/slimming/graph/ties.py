"""Ties of channels in overlapping parts of equal size, e.g. nested halves of a shuffled stream.

Each channel gets a *colour*, so that every part has each colour equally often. Channels of one
colour are cut together, so that the parts remain equally large whichever colours are cut.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np

from job.slimming.graph.reasons import OVERLAP
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
        uneven = _uneven(rows)
        colours = _colours([[each for each in row if each not in uneven] for row in rows])
        if colours is None:
            continue
        if uneven:
            _keep(union, roots, np.array(sorted(uneven)))
        first: dict[int, int] = {}
        for element, colour in colours.items():
            union.unite(np.array([first.setdefault(colour, element)]), np.array([element]))
    return len(union.pairs) > count


def _uneven(rows: Rows) -> set[int]:
    """Return the elements that are in some rows more often than others of the same row.

    Where parts end within the channels that a shuffle puts next to each other (ShuffleNet), these
    must stay, and as many others as the rows have more than the shortest; the others leave evenly.
    """
    uneven = set[int]()
    for row in rows:
        count = Counter(row)
        (usual, _), *_ = Counter(count.values()).most_common(1)
        uneven.update(element for element, times in count.items() if times != usual)
    if uneven:
        even = [[each for each in dict.fromkeys(row) if each not in uneven] for row in rows]
        shortest = min(map(len, even))
        uneven.update(element for row in even for element in row[shortest:])
    return uneven


def _keep(union: ChannelUnion, roots: Ids, elements: Ids) -> None:
    """Never cut some ``elements``, and take them out of all blocks."""
    ids = np.flatnonzero(np.isin(roots, elements))
    union.fix(ids, OVERLAP())
    for number, block in enumerate(union.blocks):
        stays = ~np.isin(block, ids)
        if not stays.all() and len(set(stays.sum(1))) == 1:
            union.blocks[number] = block[stays].reshape(len(block), -1)


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
    if not all(rows):
        return None
    parts = _without_unions([list(dict.fromkeys(row)) for row in rows])
    most = math.gcd(*map(len, parts))
    for number in range(most, 1, -1):
        for method in (_with_colours, _edge_colours) if most % number == 0 else ():
            if (colours := method(parts, number)) is not None:
                return colours
    return None


def _without_unions(rows: Rows) -> Rows:
    """Return the rows that are no disjoint union of shorter ones, which have the colours of these.

    The groups of a convolution behind a concatenation of streams are an example.
    """
    kept: Rows = []
    of_element: dict[int, list[int]] = defaultdict(list)
    for row in sorted(rows, key=len):
        elements, covered = set(row), set[int]()
        for number in sorted({n for e in row for n in of_element[e]}, key=lambda n: -len(kept[n])):
            if elements.issuperset(kept[number]) and covered.isdisjoint(kept[number]):
                covered |= set(kept[number])
        if covered != elements:
            for element in row:
                of_element[element].append(len(kept))
            kept.append(row)
    return kept


def _edge_colours(rows: Rows, number: int) -> dict[int, int] | None:
    """Return colours from 0 to ``number`` - 1 if each element is in one or two rows, else None.

    Rows are the nodes of a graph, and elements its edges. If it is bipartite, its edges can be
    coloured by as many colours as a node has edges (Kőnig 1916), where a long row is several nodes
    of ``number`` edges each. Returns None too if it is not bipartite.
    """
    ends: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row_number, row in enumerate(rows):
        for place, element in enumerate(row):
            ends[element].append((row_number, place // number))
    if any(len(nodes) > 2 for nodes in ends.values()) or not _is_bipartite(ends.values()):
        return None
    at: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)  # elements by node and colour
    colours: dict[int, int] = {}
    for element, nodes in ends.items():
        free = [next(c for c in range(number) if c not in at[node]) for node in nodes]
        if free[-1] != free[0] and free[0] in at[nodes[-1]]:
            _swap_along(nodes[-1], (free[0], free[-1]), at, ends, colours)
        colours[element] = free[0]
        for node in nodes:
            at[node][free[0]] = element
    return colours


def _is_bipartite(edges: Iterable[list[tuple[int, int]]]) -> bool:
    """Return whether the rows have two sides, so that no element is in two rows of one side."""
    beside: dict[int, set[int]] = defaultdict(set)
    for (row, _), (other, _) in (pair for pair in edges if len(pair) == 2):
        beside[row].add(other)
        beside[other].add(row)
    side: dict[int, bool] = {}
    for start in beside:
        waiting = [] if start in side else [start]
        side.setdefault(start, False)
        while waiting:
            row = waiting.pop()
            for other in beside[row]:
                if other not in side:
                    side[other] = not side[row]
                    waiting.append(other)
                elif side[other] == side[row]:
                    return False
    return True


def _swap_along(
    node: tuple[int, int],
    pair: tuple[int, int],
    at: dict[tuple[int, int], dict[int, int]],
    ends: dict[int, list[tuple[int, int]]],
    colours: dict[int, int],
) -> None:
    """Exchange two colours along the path of edges of these that begins at ``node``."""
    path, colour = [], pair[0]
    at_node = node
    while (element := at[at_node].get(colour)) is not None:
        path.append(element)
        others = [each for each in ends[element] if each != at_node]
        if not others:
            break
        at_node, colour = others[0], pair[1] if colour == pair[0] else pair[0]
    for element in path:
        for each in ends[element]:
            if at[each].get(colours[element]) == element:
                del at[each][colours[element]]
    for element in path:
        colours[element] = pair[1] if colours[element] == pair[0] else pair[0]
        for each in ends[element]:
            at[each][colours[element]] = element


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
