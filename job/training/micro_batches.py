"""Gradient accumulation: the parts of a global batch that are trained one after another."""

from __future__ import annotations

from job.processes import rank, world_size


def micro_batches(size: int, accumulate: int) -> int:
    """Return the number of parts of a global batch of ``size`` images; the same on every process.

    At most ``accumulate``, and so many that each process has two images or more in each: BatchNorm
    with one value per channel of an image needs two.
    """
    return max(1, min(accumulate, size // (2 * world_size())))


def part_sizes(size: int, accumulate: int) -> set[int]:
    """Return the numbers of images of this process in the parts of a global batch: one or two."""
    share, parts = len(range(rank(), size, world_size())), micro_batches(size, accumulate)
    return {share // parts, -(-share // parts)}
