"""The data stream as a pure function of (seed, round, epoch, position).

There is one table per epoch: row p holds the index of the sample at position p, and the uniform
numbers that determine its crop, flip and angle. Global batch b of size B is rows b*B to (b+1)*B,
whatever the number of processes, loader processes or restarts. Philox (Salmon et al. 2011) is
counter-based, and NumPy guarantees that the raw output of its bit generators never changes (but not
that of Generator's methods).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

COLUMNS = ("top", "left", "flip", "angle", "area", "ratio")


@dataclass(frozen=True)
class Draw:
    """One row: the ``index`` of a sample, and a uniform number in [0, 1) for each of COLUMNS."""

    index: int
    top: float
    left: float
    flip: float
    angle: float
    area: float
    ratio: float


@dataclass(frozen=True)
class EpochTable:
    """``order`` (N,) sample indices and ``uniforms`` (N, 6) float64 in [0, 1), by position."""

    order: np.ndarray[Any, np.dtype[np.int64]]
    uniforms: np.ndarray[Any, np.dtype[np.float64]]

    def rows(self, positions: range) -> list[Draw]:
        """Return the rows at ``positions``."""
        return [Draw(int(self.order[p]), *self.uniforms[p].tolist()) for p in positions]


def _raw(count: int, seed: int, stream: str, round_index: int, epoch: int) -> Any:
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    # the lowest word of the counter counts the draws
    generator = np.random.Philox(
        key=np.array([seed % 2**64, key], np.uint64),
        counter=np.array([0, epoch, round_index, 0], np.uint64),
    )
    return generator.random_raw(count)


def stable_order(
    count: int, seed: int, *, stream: str, round_index: int = 0, epoch: int = 0
) -> Any:
    """Draw a permutation (count,) of ``range(count)``, by sorting random 64-bit numbers."""
    return np.argsort(_raw(count, seed, stream, round_index, epoch), kind="stable")


def epoch_table(count: int, seed: int, round_index: int, epoch: int) -> EpochTable:
    """Draw the table of one epoch over ``count`` samples."""
    order = stable_order(count, seed, stream="order", round_index=round_index, epoch=epoch)
    bits = _raw(count * len(COLUMNS), seed, "augmentation", round_index, epoch)
    uniforms = (bits >> np.uint64(11)) * 2.0**-53
    return EpochTable(order, uniforms.reshape(count, len(COLUMNS)))
