"""Moments of rows over all processes, of fitted and of held-out images.

Least squares needs only moments. Fits are evaluated on held-out images, because a layer with many
inputs can fit few images without an error and still be wrong on all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from job.distributed.collectives import total
from job.processes import rank, world_size

if TYPE_CHECKING:
    from collections.abc import Iterator

GRAM_BLOCK = 256  # columns; products of two columns are computed once, but for those within a block
GOLDEN_RATIO = 2654435769  # its inverse, times 2**32: multiples of it are evenly spread


def is_held_out(images: torch.Tensor) -> torch.Tensor:
    """Return the mask (N,) of the held-out images, a fourth, by the indices ``images`` (N,).

    The fraction is the same on each process, for any number of processes.
    """
    return images * GOLDEN_RATIO % 2**32 >= 3 * 2**30


def overall_index(images: torch.Tensor) -> torch.Tensor:
    """Return the indices over all processes of the images with these indices on this process.

    Images are distributed over the processes in turn.
    """
    return images * world_size() + rank()


@dataclass(frozen=True)
class Moments:
    """Mean (G, N) and scatter (G, columns, N) of ``count`` rows, in each of G groups.

    The scatter contains the sums of products of deviations from the mean, float64, of the first
    columns with all N columns.
    """

    count: int
    mean: torch.Tensor
    scatter: torch.Tensor

    def is_finite(self) -> bool:
        """Return whether all sums are finite."""
        return bool(self.scatter.isfinite().all())

    def merged(self, other: AnyMoments) -> Moments:
        """Return the moments of the rows of both (Chan et al. 1982)."""
        count = self.count + other.count
        shift, share = other.mean - self.mean, other.count / max(1, count)
        offset = self.count * share * products(shift, self.scatter.shape[1])
        return Moments(count, self.mean + share * shift, self.scatter + other.scatter + offset)

    def select(self, order: torch.Tensor, columns: int) -> Moments:
        """Return the moments of the columns ``order``; its first ``columns`` index the scatter."""
        scatter = self.scatter[:, order[:columns]][:, :, order]
        return Moments(self.count, self.mean[:, order], scatter)


@dataclass(frozen=True)
class RowMoments:
    """Moments of few rows and many columns: the rows themselves are smaller than their scatter.

    ``rows`` (G, count, N) contains the deviations from the mean, float64.
    """

    mean: torch.Tensor
    rows: torch.Tensor
    columns: int

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.rows.shape[1]

    @property
    def scatter(self) -> torch.Tensor:
        """Scatter (G, columns, N), computed at each access."""
        return self.rows[:, :, : self.columns].mT @ self.rows

    def is_finite(self) -> bool:
        """Return whether all rows are finite."""
        return bool(self.rows.isfinite().all())

    def merged(self, other: AnyMoments) -> AnyMoments:
        """Return the moments of the rows of both."""
        if isinstance(other, Moments):
            return other.merged(self)
        rows = torch.cat([part.rows + part.mean[:, None] for part in (self, other)], 1)
        return row_moments(rows, self.columns)

    def select(self, order: torch.Tensor, columns: int) -> RowMoments:
        """Return the moments of the columns ``order``; its first ``columns`` index the scatter."""
        return RowMoments(self.mean[:, order], self.rows[:, :, order], columns)


AnyMoments = Moments | RowMoments


def row_moments(rows: torch.Tensor, columns: int) -> RowMoments:
    """Return the moments of ``rows`` (G, R, N), float64."""
    mean = rows.sum(1) / max(1, rows.shape[1])
    return RowMoments(mean, rows - mean[:, None], columns)


class SplitSums:
    """Sums over the rows of this process, for the moments of fitted and of held-out images.

    Products are computed in the dtype of the rows and accumulated in float64, those of held-out
    images in the dtype ``held_out``: the relative error of sums of float32 rows is about 1e-6.
    Up to half as many rows as columns are kept as they are.
    """

    def __init__(
        self,
        groups: int,
        columns: int,
        size: int,
        device: torch.device,
        held_out: torch.dtype = torch.float64,
    ) -> None:
        self.shape, self.columns = (groups, columns, size), columns
        self.device, self.dtypes = device, (torch.float64, held_out)
        self.few: list[tuple[torch.Tensor, torch.Tensor]] = []  # rows, whether they are held out
        self.parts: list[_Sums] = []

    def add(self, rows: torch.Tensor, images: torch.Tensor) -> None:
        """Add ``rows`` (N, G, size) of the images (N,), by their index on this process."""
        held_out = is_held_out(overall_index(images))
        if self.parts:
            self._accumulate(rows, held_out)
            return
        self.few.append((rows.clone(), held_out))
        if 2 * sum(len(rows) for rows, _ in self.few) > self.columns:
            self._sum_up()

    def moments(self) -> tuple[AnyMoments, AnyMoments]:
        """Return the moments over all processes, on the CPU."""
        if self._all_have_few():
            fitted, held_out = (self._rows_of(number) for number in (0, 1))
            return fitted, held_out
        self._sum_up()
        one, other = (sums.moments() for sums in self.parts)
        return one, other

    def _all_have_few(self) -> bool:
        """Return whether all processes together have at most half as many rows as columns."""
        rows = sum(len(rows) for rows, _ in self.few) if not self.parts else self.columns
        return 2 * int(total(torch.tensor(float(rows), device=self.device))) <= self.columns

    def _sum_up(self) -> None:
        """Replace the rows by their sums."""
        if not self.parts:
            self.parts = [_Sums(*self.shape, self.device, dtype) for dtype in self.dtypes]
        for rows, held_out in self.few:
            self._accumulate(rows, held_out)
        self.few.clear()

    def _accumulate(self, rows: torch.Tensor, held_out: torch.Tensor) -> None:
        for sums, chosen in zip(self.parts, (~held_out, held_out), strict=True):
            sums.add(rows.index_select(0, chosen.nonzero()[:, 0]))

    def _rows_of(self, part: int) -> RowMoments:
        """Return the moments of the rows of all processes, of fitted (0) or held-out images."""
        groups, columns, size = self.shape
        own = [rows[held_out == bool(part)].double() for rows, held_out in self.few]
        mine = torch.cat([torch.zeros(0, groups, size, device=self.device).double(), *own])
        counts = torch.zeros(world_size(), dtype=torch.int64, device=self.device)
        counts[rank()] = len(mine)
        first = int(total(counts)[: rank()].sum())
        rows = mine.new_zeros(int(counts.sum()), groups, size)
        rows[first : first + len(mine)] = mine
        return row_moments(total(rows).transpose(0, 1).cpu(), columns)


class _Sums:
    """Sums over rows, shifted by the mean of the first ones.

    ``products`` holds the products of each column with those from its block on.
    """

    def __init__(
        self, groups: int, columns: int, size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        zeros = torch.zeros(groups, columns, size, dtype=dtype, device=device)
        self.products, self.columns, self.count = zeros, columns, 0
        self.sums, self.shift = zeros.new_zeros(2, groups, size, dtype=torch.float64)

    def add(self, rows: torch.Tensor) -> None:
        """Add ``rows`` (N, G, size), which are overwritten."""
        if not len(rows):
            return
        if not self.count:
            self.shift = rows.mean(0, dtype=torch.float64)
        rows = rows.sub_(self.shift.to(rows.dtype)).transpose(0, 1)
        for first, last in self._blocks():
            left, right = rows[:, :, first:last], rows[:, :, first:]
            self.products[:, first:last, first:] += left.transpose(1, 2) @ right
        self.sums += rows.sum(1)
        self.count += rows.shape[1]

    def moments(self) -> Moments:
        """Return the moments of the rows of all processes."""
        mean = self.shift + self.sums / max(1, self.count)
        count = int(total(mean.new_tensor(float(self.count))))
        overall = total(mean * self.count) / max(1, count)
        for first, last in self._blocks():
            above = self.products[:, first:last, last : self.columns]
            self.products[:, last:, first:last] = above.transpose(1, 2)
        scatter = self._plus(self.products, self.sums, -1 / max(1, self.count))
        scatter = total(self._plus(scatter, mean - overall, self.count))
        return Moments(count, overall.cpu(), scatter.cpu())

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the first column of each block and that after its last one."""
        for first in range(0, self.columns, GRAM_BLOCK):
            yield first, min(first + GRAM_BLOCK, self.columns)

    def _plus(self, matrix: torch.Tensor, vectors: torch.Tensor, factor: float) -> torch.Tensor:
        """Return ``matrix`` plus ``factor`` times the products of ``vectors``."""
        vectors = vectors.to(matrix.dtype)
        columns = vectors[:, : self.columns, None]
        return torch.baddbmm(matrix, columns, vectors[:, None], alpha=factor)


def products(vectors: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the products (G, columns, N) of the first columns of ``vectors`` (G, N) with all."""
    return vectors[:, :columns, None] * vectors[:, None]
