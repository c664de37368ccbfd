"""Blocks of heads: the lines of all views that keep the same number of channels each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from job.slimming.graph.union import ChannelUnion, Ids

Lines = dict[bytes, "Ids"]  # roots of a line, by their sorted bytes


def merge_head_blocks(union: ChannelUnion, roots: Ids) -> None:
    """Replace the heads of ``union`` by blocks of distinct lines, and add these to its blocks.

    Blocks with a common line become one, since all of its lines keep the same number of channels. A
    block whose rows consist of whole lines joins them, because equal lines give equal rows.
    """
    parts = [_lines(roots[block]) for block in union.heads]
    parts = _joined(parts)
    others = []
    for block in union.blocks:
        inside = _consists_of(roots[block], parts)
        if inside is None:
            others.append(block)
            continue
        together = {key: line for n in inside for key, line in parts[n].items()}
        parts = [part for n, part in enumerate(parts) if n not in inside] + [together]
    union.heads = [np.stack(list(part.values())) for part in parts if len(part) > 1]
    union.blocks = others + union.heads


def _lines(rows: Ids) -> Lines:
    return {np.sort(row).tobytes(): row for row in rows}


def _joined(parts: list[Lines]) -> list[Lines]:
    """Join sets of lines that have a line in common."""
    joined: list[Lines] = []
    for part in parts:
        meeting = [other for other in joined if part.keys() & other.keys()]
        joined = [other for other in joined if not part.keys() & other.keys()]
        for other in meeting:
            part = other | part
        joined.append(part)
    return joined


def _consists_of(rows: Ids, parts: list[Lines]) -> set[int] | None:
    """Return the numbers of the sets of lines that fill all ``rows``; None if they do not."""
    inside: set[int] = set()
    where = {int(e): (n, key) for n, part in enumerate(parts) for key in part for e in part[key]}
    for row in rows:
        roots, times = np.unique(row, return_counts=True)
        often: dict[tuple[int, bytes], list[int]] = {}
        for element, count in zip(roots.tolist(), times.tolist(), strict=True):
            often.setdefault(where.get(element, (-1, b"")), []).append(count)
        inside |= {number for number, _ in often}
        whole = (
            len(set(counts)) == 1 and len(counts) == len(np.unique(parts[n][key]))
            for (n, key), counts in often.items()
        )
        if -1 in inside or not all(whole):
            return None
    widths = {len(line) for n in inside for line in parts[n].values()}
    return inside if len(widths) == 1 else None
