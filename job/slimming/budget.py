"""What a cut is to leave, as ``--target METRIC=VALUE`` says it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from job.errors import UsageError

if TYPE_CHECKING:
    from job.slimming.cost import Cost

METRICS = ("width", "channels", "params", "macs", "bytes")


@dataclass(frozen=True)
class Budget:
    """What is to be left: ``value`` of ``metric`` (width, channels, params, macs or bytes).

    At most 1: a fraction of the base; above 1: absolute.
    """

    metric: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``METRIC=VALUE`` as typed; raises UsageError."""
        metric, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if metric not in METRICS or not (0 < value < math.inf):
            raise UsageError(
                f"{text!r} is no target: give METRIC=VALUE, METRIC one of {', '.join(METRICS)}, "
                "VALUE at most 1 for a fraction of the base, as macs=0.5"
            )
        if metric == "width" and value > 1:
            raise UsageError(f"{text!r} is no target: a width is a fraction, at most 1")
        return cls(metric, value)

    def __str__(self) -> str:
        return f"{self.metric}={self.value:g}"

    def fraction(self, base: Cost) -> float:
        """The part of the base that is to be left; raises UsageError above the whole."""
        if self.value <= 1:
            return self.value
        whole = getattr(base, self.metric)
        if self.value > whole:
            raise UsageError(f"--target {self} is above what the base has, {whole:,}")
        return float(self.value / whole)

    def limit(self, base: Cost) -> float:
        """The most that may be left, in the metric's own unit; of a width, itself."""
        if self.metric == "width" or self.value > 1:
            return self.value
        return self.value * float(getattr(base, self.metric))

    def spread(self, round_: int, rounds: int, base: Cost) -> Budget:
        """What is to be left after ``round_`` of ``rounds``: a geometric way to the whole cut."""
        if round_ == rounds:
            return self
        return Budget(self.metric, self.fraction(base) ** (round_ / rounds))
