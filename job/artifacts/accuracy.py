"""Changes of accuracy, or a task's metric, in percentage points, negative for a loss."""

from __future__ import annotations

from job.training.epoch import ACCURACY


def accuracy_change(accuracy: float, base: float) -> float:
    """Return the change from ``base`` to ``accuracy``, both fractions, in percentage points."""
    return round(100 * (accuracy - base), 7)  # rounded: 0.9 - 0.89 is exactly one point


def score_name(metric: str) -> str:
    """Return the name of a metric in sentences: ``accuracy`` for classification."""
    return "accuracy" if metric == ACCURACY else metric


def signed_points(points: float) -> str:
    """Return the points with their sign: ``-0.40`` for a loss, ``+0.40`` for a gain."""
    return f"{round(points, 2) + 0.0:+.2f}"  # + 0.0: no -0.00
