"""Ridge regression from moments of rows: slopes and constants that predict the last columns.

The ridge is chosen by held-out images: it is the one with the smallest error on them. Few images
with many columns need a large one.
"""

from __future__ import annotations

import torch

from job.errors import DataError
from job.slimming.calibration.moments import (
    AnyMoments,
    Moments,
    RowMoments,
    SplitSums,
    products,
)

RIDGE = 1e-3  # the smallest, as a fraction of the mean variance of the columns
RIDGE_STEP, MAX_RIDGE_STEPS = 10.0, 4  # tried are the smallest ridge and larger ones

Solution = tuple[torch.Tensor, torch.Tensor]  # slopes (G, columns, outputs), constants (G, outputs)


class NormalEquations:
    """Sums for the regression of ``outputs`` errors on ``columns`` values, in each of ``groups``.

    The relative error of sums of float32 rows is about 1e-6; see
    job.slimming.calibration.moments.SplitSums.
    """

    def __init__(self, groups: int, columns: int, outputs: int, device: torch.device) -> None:
        self.sums = SplitSums(groups, columns, columns + outputs, device)

    def add(self, values: torch.Tensor, errors: torch.Tensor, images: torch.Tensor) -> None:
        """Add rows: ``values`` (N, G, columns) and ``errors`` (N, G, outputs).

        ``images`` (N,) contains the index of each row's image among those of this process.
        """
        self.sums.add(torch.cat([values, errors.to(values.dtype)], 2), images)

    def solve(self, name: str, ridge: float, *, constant: bool) -> Solution | None:
        """Return the slopes (G, columns, outputs) and constants (G, outputs); None without rows.

        They are float64 on the CPU. The ``ridge``, the smallest that is tried, is relative to the
        mean variance of the columns. Without ``constant`` the constants are zero. Raises DataError,
        with the ``name`` of the layer, if the sums are not finite.
        """
        fitted, held_out = self.sums.moments()
        moments = fitted.merged(held_out)
        if not moments.count:
            return None
        if not moments.is_finite():
            raise DataError(f"the inputs of {name} on the calibration images are not finite")
        ridge, _ = fit_held_out(fitted, held_out, ridge, constant=constant)
        return regression(moments, ridge, constant=constant)


def fit_held_out(
    fitted: AnyMoments, held_out: AnyMoments, ridge: float, *, constant: bool = True
) -> tuple[float, Solution]:
    """Return the best ridge by the error on held-out rows, and the regression of the fitted rows.

    Larger ridges are tried, from ``ridge`` upwards, until the error no longer falls. Without
    held-out rows the result is for ``ridge`` itself.
    """
    best = ridge, regression(fitted, ridge, constant=constant)
    if not held_out.count:
        return best
    least = _squared_error(held_out, best[1])
    for step in range(1, MAX_RIDGE_STEPS):
        larger = ridge * RIDGE_STEP**step
        solution = regression(fitted, larger, constant=constant)
        error = _squared_error(held_out, solution)
        if not error < least:
            break
        best, least = (larger, solution), error
    return best


def regression(moments: AnyMoments, ridge: float, *, constant: bool) -> Solution:
    """Return the slopes (G, columns, outputs) and constants (G, outputs) of a ridge regression.

    The last columns of the moments are the outputs.
    """
    if isinstance(moments, RowMoments):
        slopes = _slopes_of_rows(moments, ridge, constant=constant)
    else:
        slopes = _slopes(moments, ridge, constant=constant)
    columns = slopes.shape[1]
    inputs, outputs = moments.mean[:, :columns], moments.mean[:, columns:]
    if not constant:
        return slopes, torch.zeros_like(outputs)
    return slopes, outputs - torch.einsum("gc,gco->go", inputs, slopes)


def _slopes(moments: Moments, ridge: float, *, constant: bool) -> torch.Tensor:
    columns = moments.scatter.shape[1]
    covariance = moments.scatter / max(1, moments.count)
    if not constant:
        covariance = covariance + products(moments.mean, columns)
    gram, cross = covariance[:, :, :columns], covariance[:, :, columns:]
    damping = _damping(ridge, gram.diagonal(dim1=1, dim2=2).mean(1))
    return _solve(gram + torch.diag_embed(damping[:, None].expand(-1, columns)), cross)


def _slopes_of_rows(moments: RowMoments, ridge: float, *, constant: bool) -> torch.Tensor:
    """Return the same slopes, solved for the rows, which are fewer (Saunders et al. 1998)."""
    rows = moments.rows if constant else moments.rows + moments.mean[:, None]
    inputs, outputs = rows[:, :, : moments.columns], rows[:, :, moments.columns :]
    count = max(1, moments.count)
    damping = _damping(ridge, inputs.square().sum((1, 2)) / (count * moments.columns))
    kernel = inputs @ inputs.mT
    kernel = kernel + torch.diag_embed((count * damping)[:, None].expand(-1, moments.count))
    return inputs.mT @ _solve(kernel, outputs)


def _damping(ridge: float, variance: torch.Tensor) -> torch.Tensor:
    """Return what is added to the diagonals (G,); constant columns have slope zero."""
    return torch.where(variance > 0, ridge * variance, 1)


def _squared_error(moments: AnyMoments, solution: Solution) -> float:
    """Return the sum of squared errors of a regression, less that of predicting the means."""
    slopes, constants = solution
    columns = slopes.shape[1]
    inputs, outputs = moments.mean[:, :columns], moments.mean[:, columns:]
    bias = outputs - torch.einsum("gc,gco->go", inputs, slopes) - constants
    if isinstance(moments, RowMoments):
        predicted = moments.rows[:, :, :columns] @ slopes
        around_means = predicted * (predicted - 2 * moments.rows[:, :, columns:])
    else:
        scatter = moments.scatter.to(slopes)
        gram, cross = scatter[:, :, :columns], scatter[:, :, columns:]
        around_means = slopes * (gram @ slopes - 2 * cross)
    return float(around_means.sum() + moments.count * bias.square().sum())


def _solve(gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed.any()):  # not positive definite, due to rounding
        solution: torch.Tensor = torch.linalg.solve(gram, cross)
        return solution
    return torch.cholesky_solve(cross, factor)
