"""Statistics of measured times, robust to outliers and drift."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

OUTLIER_DEVIATIONS = 5.0  # scaled median absolute deviations above the median
MIN_SPREAD = 0.02  # of the median; times on an idle machine vary by less
MIN_SPEEDUP = 1.02  # memory alignment alone can cause a smaller one


@dataclass(frozen=True)
class Series:
    """Times of one call in seconds: a few calls for each round."""

    rounds: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Latency:
    """Seconds of one batch: ``median``, 90th and 99th percentile of all ``samples`` calls.

    ``images_per_second`` follows from the median. ``outliers`` is the number of calls far above it,
    e.g. while another program used the processor; percentiles include them. ``drift`` is the
    relative change from the first third of the rounds to the last.
    """

    median: float
    p90: float
    p99: float
    images_per_second: float
    samples: int
    outliers: int
    drift: float


@dataclass(frozen=True)
class Speedup:
    """Speed-up relative to the reference; ``low`` to ``high`` is a 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def faster(self) -> bool:
        """Whether the network is significantly faster than the reference."""
        return self.low > 1 and self.value >= MIN_SPEEDUP

    def __str__(self) -> str:
        return f"{self.value:.2f}x ({self.low:.2f} to {self.high:.2f})"


def latency_of(series: Series, batch_size: int) -> Latency:
    """Return the statistics of ``series``, whose calls take ``batch_size`` images each."""
    times = np.array([seconds for round_times in series.rounds for seconds in round_times])
    median, p90, p99 = np.quantile(times, (0.5, 0.9, 0.99)).tolist()
    spread = max(1.4826 * float(np.median(np.abs(times - median))), MIN_SPREAD * median)
    return Latency(
        median, p90, p99, batch_size / median, len(times),
        int((times > median + OUTLIER_DEVIATIONS * spread).sum()), _drift(round_times(series)),
    )  # fmt: skip


def round_times(series: Series) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the shortest time of each round, (rounds,) seconds.

    Other programs interrupt long calls more often than short ones, which distorts the ratio of two
    medians on a busy machine; they never shorten a call.
    """
    return np.array([min(times) for times in series.rounds])


def _drift(times: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    third = len(times) // 3
    if not third:
        return 0.0
    return float(np.median(times[-third:]) / np.median(times[:third]) - 1)


def speedup(reference: Series, other: Series) -> Speedup:
    """Return the median over the rounds of the reference's time divided by the other's.

    The interval is the distribution-free one of a median by order statistics (David and Nagaraja
    2003, section 7.1).
    """
    ratios = np.sort(round_times(reference) / round_times(other))
    count = len(ratios)
    half_width = 0.98 * math.sqrt(count)  # 1.96 standard deviations of the rank of the median
    low = max(0, math.floor(count / 2 - half_width) - 1)
    high = min(count - 1, math.ceil(count / 2 + half_width))
    return Speedup(float(np.median(ratios)), float(ratios[low]), float(ratios[high]))
