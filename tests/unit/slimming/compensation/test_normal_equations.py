"""Ridge regression on fewer rows than columns is solved in the space of the rows."""

from __future__ import annotations

import pytest
import torch

from job.slimming.calibration.moments import Moments, RowMoments
from job.slimming.compensation.normal_equations import (
    RIDGE,
    NormalEquations,
    fit_held_out,
    regression,
)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(
    ("groups", "columns", "rows"), [(1, 300, 60), (3, 90, 40), (2, 64, 5), (1, 2, 1)]
)
def test_fewer_rows_than_columns_give_the_same_solution(
    groups: int, columns: int, rows: int, constant: bool
) -> None:
    torch.manual_seed(0)
    values = torch.randn(rows, groups, columns, dtype=torch.float64) + 3
    values[:, :, 1] = 2  # a constant column
    errors = torch.randn(rows, groups, 7, dtype=torch.float64)
    equations = NormalEquations(groups, columns, 7, torch.device("cpu"))
    equations.add(values, errors, torch.arange(rows) // 3)
    found = equations.solve("layer", RIDGE, constant=constant)
    fitted, held_out = equations.sums.moments()
    assert isinstance(fitted, RowMoments)
    dense = [Moments(part.count, part.mean, part.scatter) for part in (fitted, held_out)]
    ridge, _ = fit_held_out(*dense, RIDGE, constant=constant)
    expected = regression(dense[0].merged(dense[1]), ridge, constant=constant)
    assert found is not None
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-7)
