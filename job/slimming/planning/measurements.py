"""Measurements of a cut: its exactness, and its latency."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Proof:
    """Measured exactness of a cut.

    ``error`` is the largest error of the narrow network's outputs, relative to the largest value of
    each output. It is computed in ``precision``: float64, or the precision of the network if it
    does not run in float64. ``tolerance`` is the largest error that is allowed.
    """

    error: float
    precision: str
    tolerance: float

    def __str__(self) -> str:
        return f"{self.error:.1e} in {self.precision}, where {self.tolerance:.0e} is allowed"


@dataclass(frozen=True)
class PlannedLatency:
    """Measured seconds of a batch, of the base and after the cut, and the latter as a fraction.

    Both networks are timed in turn: ``after`` is the ``fraction`` of ``base``.
    """

    base: float
    after: float
    fraction: float

    def __str__(self) -> str:
        times = f"{1000 * self.after:.3g} ms, {1000 * self.base:.3g} ms for the base"
        return f"latency: {times} ({self.fraction:.1%})"
