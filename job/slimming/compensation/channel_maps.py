"""Channel maps: linear maps from the narrow inputs of a layer to its wide ones.

The map is the same for all positions. It has fewer elements than a kernel, so that few positions
are enough to fit it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from job.slimming.calibration.consumers import input_values, sample_rows
from job.slimming.calibration.input_statistics import RunningStatistics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from job.slimming.calibration.consumers import Consumer
    from job.slimming.calibration.input_statistics import InputStatistics
    from job.slimming.compensation.cut_pair import CutPair, Fit


def fit_channel_map(
    pair: CutPair,
    consumer: Consumer,
    inputs: Iterable[tuple[torch.Tensor, torch.Tensor]],
    ridge: float,
) -> bool:
    """Fit wide inputs as M · x + b of narrow inputs x, and fold the map into a narrow consumer.

    ``inputs`` are pairs of narrow and wide inputs on this process. At padded borders the fold is
    approximate, since it adds b to the padding as well. Returns whether any process has inputs.
    """
    kept = int(pair.keep[consumer.channels].sum())
    width = kept + len(consumer.channels)
    layer = pair.wide.get_submodule(consumer.layer)
    running = RunningStatistics(kept, width, layer.get_parameter("weight").device)
    for narrow_and_wide in inputs:
        rows = [sample_rows(input_values(layer, v, consumer), width) for v in narrow_and_wide]
        running.add(torch.cat(rows, 1))
    statistics = running.result(consumer.layer)
    if statistics.count:
        pair.apply_fits(consumer, _solve_fits(pair, consumer, kept, statistics, ridge))
    return bool(statistics.count)


def _solve_fits(
    pair: CutPair, consumer: Consumer, kept: int, statistics: InputStatistics, ridge: float
) -> list[Fit]:
    """Return M (C, K) and b (C,) for each group of a consumer."""
    fits, start = [], 0
    for part, stays in pair.kept_columns(consumer):
        narrow = slice(start, start + int(stays.sum()))
        wide = slice(kept + part.start, kept + part.stop)
        start = narrow.stop
        inner, cross = statistics.covariance[narrow, narrow], statistics.covariance[narrow, wide]
        slope = ridge_slope(inner, cross, stays, ridge)
        fits.append((slope, statistics.mean[wide] - slope @ statistics.mean[narrow]))
    return fits


def ridge_slope(
    inner: torch.Tensor, cross: torch.Tensor, stays: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Return M (C, K) that predicts C wide inputs from the K narrow ones in the mask ``stays``.

    ``inner`` (K, K) and ``cross`` (K, C) are covariances, float64. The ridge is relative to the
    mean variance and pulls M to the plain cut, which copies kept channels and sets others to zero.
    """
    slope = torch.eye(len(stays)).double()[:, stays]
    scale = inner.diagonal().mean()
    if scale > 0:
        missed = cross - inner @ slope.T
        damped = inner + ridge * scale * torch.eye(len(inner)).double()
        slope = slope + torch.linalg.solve(damped, missed).T
    return slope
