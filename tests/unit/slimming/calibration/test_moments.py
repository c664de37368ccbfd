"""Moments of fitted and held-out images, and the ridge that held-out images choose."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from job.slimming.calibration.moments import Moments, RowMoments, SplitSums, is_held_out
from job.slimming.compensation.normal_equations import (
    RIDGE,
    NormalEquations,
    fit_held_out,
    regression,
)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 5, 8, 13, 16, 32])
def test_a_fourth_of_the_images_of_each_process_is_held_out(processes: int) -> None:
    held_out = is_held_out(torch.arange(400 * processes)).view(400, processes).double().mean(0)
    assert float((held_out - 0.25).abs().max()) < 0.02


def test_of_four_images_one_is_held_out_and_not_the_first() -> None:
    assert is_held_out(torch.arange(4)).tolist() == [False, False, False, True]


def test_moments_are_those_of_numpy_and_merge() -> None:
    rows = torch.randn(60, 2, 5, generator=seeded(), dtype=torch.float64) * 3 + 7
    images = torch.arange(60) // 3
    sums = SplitSums(2, 3, 5, rows.device)
    for part in (slice(0, 10), slice(10, 10), slice(10, 60)):
        sums.add(rows[part], images[part])
    fitted, held_out = sums.moments()
    chosen = is_held_out(images)
    for moments, mask in ((fitted, ~chosen), (held_out, chosen), (fitted.merged(held_out), None)):
        those = rows if mask is None else rows[mask]
        assert moments.count == len(those)
        for group in range(2):
            expected = np.cov(those[:, group].numpy().T, bias=True)[:3] * len(those)
            np.testing.assert_allclose(moments.scatter[group], expected, rtol=1e-11)
            np.testing.assert_allclose(moments.mean[group], those[:, group].mean(0), rtol=1e-13)


@pytest.mark.parametrize("rows", [0, 1, 20])
def test_few_rows_have_the_moments_of_many(rows: int) -> None:
    values = torch.randn(rows, 2, 45, generator=seeded(), dtype=torch.float64) * 3 + 7
    sums, images = SplitSums(2, 40, 45, values.device), torch.arange(rows)
    sums.add(values, images)
    fitted, held_out = sums.moments()
    assert isinstance(fitted, RowMoments)
    chosen = is_held_out(images)
    order = torch.cat([torch.arange(30, 10, -1), torch.arange(40, 45)])
    for moments, mask in ((fitted, ~chosen), (held_out, chosen), (fitted.merged(held_out), None)):
        those = values if mask is None else values[mask]
        mean = those.sum(0) / max(1, len(those))
        deviations = (those - mean).transpose(0, 1)
        dense = Moments(len(those), mean, deviations[:, :, :40].mT @ deviations)
        for found, expected in (
            (moments, dense),
            (moments.select(order, 20), dense.select(order, 20)),
            (dense.merged(moments), dense.merged(dense)),
        ):
            assert found.count == expected.count
            torch.testing.assert_close(found.scatter, expected.scatter, atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(found.mean, expected.mean)


def problem(images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows, errors, and images: 40 columns, one of which the errors depend on, and noise."""
    values = torch.randn(images, 1, 40, generator=seeded(), dtype=torch.float64)
    noise = torch.randn(images, 1, 3, generator=seeded(), dtype=torch.float64)
    return values, 0.1 * values[:, :, :1] + noise, torch.arange(images)


def unseen_error(solution: tuple[torch.Tensor, torch.Tensor] | None) -> float:
    assert solution is not None
    slopes, constants = solution
    truth = torch.zeros_like(slopes)
    truth[:, 0] = 0.1
    return float((slopes - truth).square().sum() + constants.square().sum())


def test_few_images_get_a_larger_ridge_and_a_smaller_error_on_others() -> None:
    equations = NormalEquations(1, 40, 3, torch.device("cpu"))
    equations.add(*problem(60))
    fitted, held_out = equations.sums.moments()
    ridge, _ = fit_held_out(fitted, held_out, RIDGE)
    assert ridge > 0.5
    overfitted = regression(fitted.merged(held_out), RIDGE, constant=True)
    chosen = equations.solve("layer", RIDGE, constant=True)
    assert unseen_error(chosen) < 0.5 * unseen_error(overfitted)


def test_without_noise_the_smallest_ridge_stays() -> None:
    values, _, images = problem(400)
    sums = SplitSums(1, 40, 43, values.device)
    sums.add(torch.cat([values, values[:, :, :3] * 2 + 1], 2), images)
    assert fit_held_out(*sums.moments(), RIDGE)[0] == RIDGE


def test_without_held_out_images_the_smallest_ridge_is_used() -> None:
    values, errors, _ = problem(60)
    equations = NormalEquations(1, 40, 3, torch.device("cpu"))
    equations.add(values, errors, torch.zeros(60, dtype=torch.int64))
    solution = equations.solve("layer", RIDGE, constant=True)
    fitted, held_out = equations.sums.moments()
    assert held_out.count == 0
    assert solution is not None
    expected = regression(fitted, RIDGE, constant=True)
    torch.testing.assert_close(solution, expected)
