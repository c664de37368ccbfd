"""Target of a cut: ``--target METRIC=VALUE``."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from job.errors import UsageError, printable

if TYPE_CHECKING:
    from job.slimming.planning.cost import Cost

UNIT_NAMES = {
    "width": "width",
    "channels": "channels",
    "params": "parameters",
    "macs": "multiply-adds",
    "bytes": "bytes",
    "latency": "seconds",
}
TARGET_METRICS = tuple(UNIT_NAMES)
OTHER_NAMES = {
    "": "macs", "flops": "macs", "ops": "macs", "mults": "macs", "multiply-adds": "macs",
    "weights": "params", "parameters": "params", "size": "bytes", "memory": "bytes",
    "filters": "channels",
}  # fmt: skip
TYPED = re.compile(r"([a-z_-]*)\s*[=:]?\s*([\d.,_]+(?:e[+-]?\d+)?)\s*(%|percent|[kmg])?")
SECONDS = re.compile(r"(.*?)(ms|us|µs|s)")
SECOND_FACTORS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
FACTORS = {"": 1.0, "%": 0.01, "percent": 0.01, "k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Budget:
    """Budget of a cut: the ``value`` of ``metric`` that it leaves, one of ``TARGET_METRICS``.

    A value of at most 1 is a fraction of the base, a larger one is absolute. ``typed`` is the text
    that the user typed, for messages. A latency in seconds is ``absolute`` if it was typed with a
    unit, e.g. ``latency=5ms``, or is above 1.
    """

    metric: str
    value: float
    typed: str = field(default="", compare=False)
    absolute: bool = False

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse ``METRIC=VALUE``; raises UsageError."""
        metric, _, number = text.partition("=")
        unit = SECONDS.fullmatch(number) if metric == "latency" else None
        try:
            value = float(unit[1]) * SECOND_FACTORS[unit[2]] if unit else float(number)
        except ValueError:
            value = math.nan
        quoted = printable(text)
        if metric not in TARGET_METRICS or not (0 < value < math.inf):
            metrics = ", ".join(TARGET_METRICS)
            raise UsageError(
                f"{quoted!r} is not a target: give METRIC=VALUE, METRIC one of "
                f"{metrics}, VALUE a fraction of the base up to 1, or a number above 1"
                f"{_did_you_mean(text)}"
            )
        if metric == "width" and value > 1:
            raise UsageError(
                f"{quoted!r} is not a target: a width is a fraction of the base, at most 1"
                f"{_did_you_mean(text)}"
            )
        absolute = metric == "latency" and (unit is not None or value > 1)
        return cls(metric, value, f"--target {quoted}", absolute)

    def __str__(self) -> str:
        return self.typed or f"--target {self.target}"

    @property
    def target(self) -> str:
        """The target as METRIC=VALUE, with the unit of a latency in seconds."""
        return f"{self.metric}={self.value:g}{'s' if self.absolute else ''}"

    def fraction(self, base: Cost) -> float:
        """Return the budget as a fraction of the base; raises UsageError above the base."""
        # a StudentNet may be wider than 1, and the costs of the base have no latency
        if self.value <= 1 or self.metric in ("width", "latency"):
            return self.value
        whole = getattr(base, self.metric)
        if self.value > whole:
            unit = UNIT_NAMES[self.metric]
            raise UsageError(
                f"{self} is above what the base has, {whole:,} {unit}: give fewer, "
                f"or a fraction{self.hint() or f', e.g. {self.metric}=0.5'}"
            )
        return float(self.value / whole)

    def limit(self, base: Cost) -> float:
        """Return the budget in the unit of the metric."""
        if self.metric in ("width", "latency") or self.value > 1:
            return self.value
        return self.value * float(getattr(base, self.metric))

    def spread(self, round_index: int, rounds: int, base: Cost) -> Budget:
        """Return the budget of a round; each round keeps the same fraction of the previous one."""
        if round_index == rounds:
            return self
        return replace(self, value=self.fraction(base) ** (round_index / rounds))

    def unreachable(self, least: float, base: Cost, advice: str) -> str:
        """Return the message for a budget below ``least``, the smallest value within reach."""
        whole = getattr(base, self.metric)
        share = math.ceil(1000 * least / whole) / 1000
        typed = re.search(r"=(.*)", self.typed)
        absolute = typed and float(typed[1]) > 1
        unit = UNIT_NAMES[self.metric]
        number = f" (above 1: an absolute number of {unit})" if absolute else ""
        return (
            f"{self}{number} cannot be reached: the minimum is {self.metric}={least:,.0f} of "
            f"{whole:,} ({share:g}){advice}"
            f"{self.hint() if absolute else ''}"
        )

    def hint(self) -> str:
        """Return ``; did you mean …?`` for a number that was probably meant as a fraction."""
        value = self.typed.partition("=")[2]
        return _as_fraction(self.metric, float(value)) if value else ""


def _did_you_mean(text: str) -> str:
    """Return ``; did you mean …?`` with the target that ``text`` probably means, or ""."""
    match = TYPED.fullmatch(text.strip().lower())
    if not match:
        return ""
    name, number, unit = match[1], match[2], match[3] or ""
    near = difflib.get_close_matches(name, [*TARGET_METRICS, *OTHER_NAMES], 1, 0.6)
    metric = OTHER_NAMES.get(name) or (OTHER_NAMES.get(near[0], near[0]) if near else "")
    if re.fullmatch(r"\d*,\d+", number) and not re.fullmatch(r"\d+,\d{3}", number):
        number = number.replace(",", ".")  # 0,5
    try:
        value = float(number.replace(",", "").replace("_", "")) * FACTORS[unit]
    except ValueError:
        return ""
    if not metric or not 0 < value < math.inf:
        return ""
    if value > 1 and (metric == "width" or not name):
        return _as_fraction(metric, value)
    return f"; did you mean {metric}={value:g}?"


def _as_fraction(metric: str, value: float) -> str:
    """Return ``; did you mean …?`` with a fraction: 0.5 for 2, or for 50 (percent)."""
    if not 1 < value <= 100:
        return ""
    return f"; did you mean {metric}={1 / value if value < 10 else value / 100:.3g}?"
