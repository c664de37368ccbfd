"""Normal equations: ridge regression from sums over rows, over all processes."""

from __future__ import annotations

import torch

from job.distributed.collectives import total
from job.errors import DataError


class NormalEquations:
    """Sums for the regression of ``outputs`` errors on ``columns`` values, in each of ``groups``.

    Products are computed in the precision of the rows, at least float32, and accumulated in
    float64: the relative error of sums of float32 rows is about 1e-6. Rows are shifted by the mean
    of the first batch.
    """

    def __init__(self, groups: int, columns: int, outputs: int, device: torch.device) -> None:
        zeros = torch.zeros(groups, columns, columns + outputs, dtype=torch.float64, device=device)
        self.products, self.columns, self.count = zeros, columns, 0
        self.sums, self.shift = zeros.new_zeros(2, groups, columns + outputs)

    def add(self, values: torch.Tensor, errors: torch.Tensor) -> None:
        """Add rows: ``values`` (N, G, columns) and ``errors`` (N, G, outputs)."""
        rows = torch.cat([values, errors.to(values.dtype)], 2)
        if not len(rows):
            return
        if not self.count:
            self.shift = rows.mean(0, dtype=torch.float64)
        rows = (rows - self.shift.to(rows.dtype)).transpose(0, 1)
        self.products += rows[:, :, : self.columns].transpose(1, 2) @ rows
        self.sums += rows.sum(1, dtype=torch.float64)
        self.count += len(values)

    def solve(
        self, name: str, ridge: float, *, constant: bool
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the slopes (G, columns, outputs) and constants (G, outputs); None without rows.

        They are float64 on the CPU. The ``ridge`` is relative to the mean variance of the columns.
        Without ``constant`` the constants are zero. Raises DataError, with the ``name`` of the
        layer, if the sums are not finite.
        """
        count, mean, products = self._combined()
        if not count:
            return None
        if not bool(products.isfinite().all()):
            raise DataError(f"the inputs of {name} on the calibration images are not finite")
        inputs, errors = mean[:, : self.columns], mean[:, self.columns :]
        if not constant:
            products = products + inputs[:, :, None] * mean[:, None]
        gram, cross = products[:, :, : self.columns], products[:, :, self.columns :]
        scale = gram.diagonal(dim1=1, dim2=2).mean(1)
        # constant columns have slope zero
        damping = torch.where(scale > 0, ridge * scale, 1)[:, None]
        slopes = _solve(gram + torch.diag_embed(damping.expand(-1, self.columns)), cross)
        if not constant:
            return slopes, torch.zeros_like(errors)
        return slopes, errors - torch.einsum("gc,gco->go", inputs, slopes)

    def _combined(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Return the number of rows, their mean, and their covariances, over all processes."""
        mean = self.shift + self.sums / max(1, self.count)
        local = self.sums[:, : self.columns, None] * self.sums[:, None] / max(1, self.count)
        count = int(total(mean.new_tensor(float(self.count))))
        overall = total(mean * self.count) / max(1, count)
        offset = mean - overall
        of_means = self.count * offset[:, : self.columns, None] * offset[:, None]
        products = total(self.products - local + of_means) / max(1, count)
        return count, overall.cpu(), products.cpu()


def _solve(gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed.any()):  # not positive definite, due to rounding
        solution: torch.Tensor = torch.linalg.solve(gram, cross)
        return solution
    return torch.cholesky_solve(cross, factor)
