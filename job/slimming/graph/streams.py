"""Streams of residual and densely connected networks, and the BatchNorms that select from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from job.slimming.graph.reasons import SELECTION
from job.slimming.graph.union import FIXED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from job.slimming.graph.union import ChannelUnion, Ids


def outvoted_selectors(union: ChannelUnion, streams: Mapping[str, Ids]) -> set[str]:
    """Return the BatchNorms whose stream is summed over by more layers than select from it.

    ``streams`` maps each BatchNorm to the elements (n,) of its stream. A stream that a BatchNorm
    selects from is not cut, so all layers that sum over it keep all their inputs: e.g. those of all
    blocks, for one BatchNorm at the end. Streams that cannot be cut anyway are left out.
    """
    if not streams:
        return set()
    roots = union.roots()
    blocked = np.zeros(union.count, bool)
    blocked[roots[FIXED]] = True
    for reason, ids in union.fixes:
        if reason != SELECTION():
            blocked[roots[ids]] = True
    votes = np.zeros(union.count, np.int64)
    readers: dict[str, list[Ids]] = {}
    for slot in union.slots:
        if slot.side == "in":
            readers.setdefault(slot.layer, []).append(slot.ids)
    for arrays in readers.values():
        votes[np.unique(roots[np.concatenate(arrays)])] += 1
    read = {layer: np.unique(roots[ids]) for layer, ids in streams.items()}
    for ids in read.values():
        votes[ids] -= 1
    return {
        layer for layer, ids in read.items() if (votes[ids] > 0).all() and not blocked[ids].any()
    }
