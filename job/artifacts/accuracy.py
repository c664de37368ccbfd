"""Changes of accuracy in percentage points: one sign everywhere, below zero for a loss."""

from __future__ import annotations


def change(accuracy: float, base: float) -> float:
    """Percentage points from ``base`` to ``accuracy``, both fractions."""
    return round(100 * (accuracy - base), 7)  # rounded: 0.9 - 0.89 is a point and no more


def signed(points: float) -> str:
    """``-0.40`` for a loss, ``+0.40`` for a gain."""
    return f"{round(points, 2) + 0.0:+.2f}"  # + 0.0: no -0.00
