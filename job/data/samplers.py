"""Batch samplers: one rank's share of each global batch, or of a whole split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.data.sample_order import Draw, epoch_table

if TYPE_CHECKING:
    from collections.abc import Iterator


class GlobalBatches:
    """Batch sampler of training: this rank's rows of every global batch of an epoch.

    Rank r of W takes rows r, r + W, … of a global batch. Shares differ by at most one row, and
    every sample is taken once. The last batch may be short; with fewer than ``least`` samples it
    is merged into the previous batch.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, rank: int, world: int, least: int = 1
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.batches = max(1, -(-count // batch_size) - (0 < count % batch_size < least))
        self.rank, self.world = rank, world
        self.round, self.epoch, self.first = 0, 0, 0

    def set_epoch(self, round_index: int, epoch: int, first: int = 0) -> None:
        """Set the epoch of the next pass, and the global batch to start with."""
        self.round, self.epoch, self.first = round_index, epoch, first

    def __len__(self) -> int:
        return self.batches

    def sizes(self) -> list[int]:
        """Return the number of samples in each global batch."""
        last = self.count - (self.batches - 1) * self.batch_size
        return [self.batch_size] * (self.batches - 1) + [last]

    def __iter__(self) -> Iterator[list[Draw]]:
        table = epoch_table(self.count, self.seed, self.round, self.epoch)
        sizes = self.sizes()
        for number in range(self.first, self.batches):
            start = number * self.batch_size
            stop = start + sizes[number]
            yield table.rows(range(start + self.rank, stop, self.world))


class RankShare:
    """Batch sampler of evaluation: images r, r + W, … of a split, for rank r of W."""

    def __init__(self, count: int, batch_size: int, rank: int, world: int) -> None:
        self.indices, self.batch_size = range(rank, count, world), batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield list(self.indices[start : start + self.batch_size])
