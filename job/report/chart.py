"""Charts, independent of how they are drawn: as SVG for the page, as PNG for a file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

# Okabe & Ito 2008: distinct for colour-blind readers; markers and dashes differ too
PALETTE = {
    "black": "#000000", "orange": "#E69F00", "sky": "#56B4E9", "green": "#009E73",
    "blue": "#0072B2", "vermillion": "#D55E00", "purple": "#CC79A7", "grey": "#999999",
    "pale": "#BBBBBB",
}  # fmt: skip
CYCLE = ("blue", "vermillion", "green", "orange", "purple", "sky", "black")
MARKERS = ("o", "s", "^", "D", "v")
PREFIXES = {0: "", 3: " k", 6: " M", 9: " G", 12: " T", -3: " m", -6: " µ", -9: " n"}

Point = tuple[float, float]
Section = Literal["accuracy", "training", "channels", "time"]


@dataclass(frozen=True)
class Axis:
    """Axis of a chart. ``names`` label 0, 1, …; ``prefixes`` shows values as e.g. ``1.5 MB``."""

    label: str
    unit: str = ""
    prefixes: bool = False
    log: bool = False
    names: tuple[str, ...] = ()
    limits: tuple[float, float] | None = None

    def text(self, value: float) -> str:
        """Return a value as the axis shows it."""
        if self.log:
            return _power(value)
        if not self.prefixes:
            return f"{value:.4g}"
        power = 0 if not value else 3 * math.floor(math.log10(abs(value)) / 3 + 1e-9)
        power = min(max(power, -9), 12)
        prefix = PREFIXES[power] + self.unit
        return f"{value / 10**power:.4g}{prefix if PREFIXES[power] else ' ' + prefix}".rstrip()


def _power(value: float) -> str:
    """Return a value of a logarithmic axis: 0.01, 10⁻⁴."""
    power = round(math.log10(value)) if value > 0 else 0
    if not math.isclose(value, 10.0**power):
        return f"{value:.3g}"
    digits = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:g}" if abs(power) <= 2 else f"10{digits}"


@dataclass(frozen=True)
class PlotSeries:
    """Points of one kind: a line, markers, or filled steps.

    A point that is not finite interrupts the line. ``names`` are labels of the points. With
    ``steps``, points are left edges and heights; the last one is the right edge.
    """

    label: str
    points: tuple[Point, ...]
    color: str
    marker: str = ""
    dash: Literal["-", "--", ":", "-."] = "-"
    filled: bool = True
    line: bool = True
    steps: bool = False
    names: tuple[str, ...] = ()
    in_legend: bool = True


NARROW = 0.005  # of the largest value; texts of ticks have four digits


@dataclass(frozen=True)
class Chart:
    """Chart with a name, caption, axes, series, and labelled vertical lines at ``marks``.

    ``summary`` describes the data in words, for screen readers. ``section`` is the part of a run's
    page that shows the chart.
    """

    name: str
    caption: str
    x: Axis
    y: Axis
    series: tuple[PlotSeries, ...]
    marks: tuple[tuple[float, str], ...] = ()
    summary: str = ""
    section: Section = "accuracy"

    def range(self, axis: int) -> tuple[float, float]:
        """Return the least and largest value on the x axis (0) or the y axis (1), with a margin."""
        shape = (self.x, self.y)[axis]
        if shape.limits:
            return shape.limits
        if shape.names:
            return -0.5, len(shape.names) - 0.5
        stepped = any(series.steps for series in self.series)
        values = [v for s in self.series for p in s.points if math.isfinite(v := p[axis])]
        values += [] if axis else [value for value, _ in self.marks]
        low, high = min(values, default=0.0), max(values, default=1.0)
        if stepped:
            return (low, high) if axis == 0 else (0.0, 1.05 * high or 1.0)
        if shape.log:
            margin = (high / low) ** 0.05
            return low / margin, high * max(margin, 1.1)
        margin = 0.05 * (high - low)
        if high - low < NARROW * abs(high):  # the ticks would have the same text
            margin = 0.05 * abs(high)
        margin = margin or 1.0
        return low - margin, high + margin


def shorten_name(name: str, letters: int) -> str:
    """Return the end of a name, by which layers differ, in at most ``letters``."""
    return name if len(name) <= letters else f"…{name[1 - letters :]}"


def ticks(axis: Axis, low: float, high: float, count: int = 5) -> list[float]:
    """Return round values between ``low`` and ``high``, about ``count`` of them."""
    if axis.log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        every = 1 + (last - first) // count
        return [10.0**power for power in range(first, last + 1, every)]
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(s * size for s in (1, 2, 2.5, 5, 10) if s * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    values: list[float] = []
    while (first + len(values)) * step <= high + 1e-9 * step:
        values.append((first + len(values)) * step)
    return values
