"""Charts drawn as SVG, coloured by the style sheet of the page, including its dark mode."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from job.errors import printable
from job.report.chart import shorten_name, ticks
from job.report.labels import LETTER, Label, Rectangle, place_label, square

if TYPE_CHECKING:
    from collections.abc import Iterator

    from job.report.chart import Axis, Chart, PlotSeries, Point

WIDTH, LEFT, RIGHT, BOTTOM, PLOT = 380, 50, 10, 40, 200  # pixels at full size
NAME_LETTERS, SLOPE = 12, 55  # of a name below the axis; degrees
OPEN = 1.25  # scale of open markers: around a filled one at the same place, both are seen
RADIUS, RING = 5, 10  # pixels; half the width of a marker, and of a ring
ROW = 15  # pixels; height of a row of the legend
MAX_HOVER_TEXTS = 200  # of a series
DASHES = {"-": "", "--": "5 3", ":": "1.5 3", "-.": "6 3 1.5 3"}
SHAPES = {
    "o": "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0z",
    "s": "M-3-3h6v6h-6z",
    "^": "M0-3.8L3.6 2.8H-3.6z",
    "v": "M0 3.8L3.6-2.8H-3.6z",
    "D": "M0-4L4 0L0 4L-4 0z",
    "ring": "M-7 0a7 7 0 1 0 14 0a7 7 0 1 0-14 0z",
}


def to_svg(chart: Chart) -> Markup:
    """Return ``chart`` as an SVG element of fixed proportions."""
    frame = _Frame(chart)
    parts = [*_axes(frame), *_marks(frame)]
    for series in chart.series:
        parts += _steps(frame, series) if series.steps else _line(frame, series)
    # open markers last: they do not cover what they are around
    for series in sorted(chart.series, key=lambda series: not series.filled):
        parts += _markers(frame, series)
    parts += _names(frame)
    parts += _legend(frame)
    label = _text(f"{chart.caption}. {chart.summary}".rstrip(". ") + ".")
    head = f'<svg viewBox="0 0 {WIDTH} {frame.height}" role="img" aria-label="{label}">'
    return Markup(head + "".join(parts) + "</svg>")


@dataclass(frozen=True)
class _Frame:
    """Layout of a chart, and the place of a value in it, in pixels."""

    chart: Chart

    @cached_property
    def rows(self) -> list[list[PlotSeries]]:
        """Series in each row of the legend."""
        rows: list[list[PlotSeries]] = [[]]
        used = 0.0
        for series in self.chart.series:
            if not series.in_legend:
                continue
            width = 30 + LETTER * len(series.label)
            if rows[-1] and used + width > WIDTH - LEFT:
                rows.append([])
                used = 0.0
            rows[-1].append(series)
            used += width
        return [row for row in rows if row]

    @property
    def top(self) -> int:
        return ROW * len(self.rows) + (18 if self.chart.marks else 8)

    @property
    def bottom(self) -> int:
        return self.top + PLOT

    @property
    def height(self) -> int:
        names = self.chart.x.names
        letters = max((len(shorten_name(name, NAME_LETTERS)) for name in names), default=0)
        slope = math.ceil(math.sin(math.radians(SLOPE)) * LETTER * letters)
        return self.bottom + (slope + 30 if names else BOTTOM)

    @cached_property
    def ranges(self) -> tuple[Point, Point]:
        return self.chart.range(0), self.chart.range(1)

    def place(self, point: Point) -> Point:
        x = _share(self.chart.x, point[0], *self.ranges[0])
        y = _share(self.chart.y, point[1], *self.ranges[1])
        return LEFT + x * (WIDTH - LEFT - RIGHT), self.bottom - y * PLOT


def _share(axis: Axis, value: float, low: float, high: float) -> float:
    if axis.log:
        value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
    return min(max((value - low) / (high - low or 1), -0.02), 1.02)


def _text(text: str) -> str:
    return str(escape(printable(text)))


def _axes(frame: _Frame) -> Iterator[str]:
    chart, right = frame.chart, WIDTH - RIGHT
    low, high = chart.range(1)
    for value in ticks(chart.y, low, high):
        y = frame.place((0, value))[1]
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>'
        label = _text(chart.y.text(value))
        yield f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    yield from _x_names(frame) if chart.x.names else _x_ticks(frame)
    yield f'<path class="axis" d="M{LEFT} {frame.top}V{frame.bottom}H{right}"/>'
    middle = (LEFT + right) / 2
    x_label, y_label = _text(chart.x.label), _text(chart.y.label)
    yield f'<text x="{middle}" y="{frame.height - 6}" text-anchor="middle">{x_label}</text>'
    turned = f'transform="translate(12 {(frame.top + frame.bottom) / 2}) rotate(-90)"'
    yield f'<text {turned} text-anchor="middle">{y_label}</text>'


def _x_ticks(frame: _Frame) -> Iterator[str]:
    axis, (low, high) = frame.chart.x, frame.chart.range(0)
    for value in ticks(axis, low, high):
        x = frame.place((value, 1))[0]
        yield f'<path class="grid" d="M{x:.1f} {frame.top}V{frame.bottom}"/>'
        text = axis.text(value)
        x = min(x, WIDTH - 0.6 * LETTER * len(text))  # a long one would be cut off
        yield f'<text x="{x:.1f}" y="{frame.bottom + 15}" text-anchor="middle">{_text(text)}</text>'


def _x_names(frame: _Frame) -> Iterator[str]:
    names = frame.chart.x.names
    every = 1 + (len(names) - 1) // 26  # as many as do not overlap
    for number in range(0, len(names), every):
        x, y = frame.place((number, 0))[0] + 3, frame.bottom + 8
        turned = f'transform="translate({x:.1f} {y}) rotate(-{SLOPE})"'
        short = shorten_name(names[number], NAME_LETTERS)
        yield f'<text {turned} text-anchor="end" class="small">{_text(short)}</text>'


def _marks(frame: _Frame) -> Iterator[str]:
    last = -math.inf
    for value, text in frame.chart.marks:
        x = frame.place((value, 1))[0]
        yield f'<path class="mark" d="M{x:.1f} {frame.top}V{frame.bottom}"/>'
        if x - last > 8 + LETTER * len(text):
            anchor = f'x="{x:.1f}" y="{frame.top - 4}" text-anchor="middle" class="small"'
            yield f"<text {anchor}>{_text(text)}</text>"
            last = x


def _line(frame: _Frame, series: PlotSeries) -> Iterator[str]:
    if series.line:
        path, pen = [], "M"
        for point in series.points:
            if not math.isfinite(sum(point)):
                pen = "M"
                continue
            x, y = frame.place(point)
            path.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
        dash = DASHES[series.dash]
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        yield f'<path class="line {series.color}"{dashes} d="{"".join(path)}"/>'


def _markers(frame: _Frame, series: PlotSeries) -> Iterator[str]:
    if series.steps or not series.marker:
        return
    for number, point in enumerate(_finite(series)):
        x, y = frame.place(point)
        title = ""
        if number < MAX_HOVER_TEXTS:
            title = f"<title>{_hover(frame.chart, series, number, point)}</title>"
        yield f"<path {_marker(series, x, y)}>{title}</path>"


def _marker(series: PlotSeries, x: float, y: float) -> str:
    """Return the attributes of a marker."""
    kind = "dot" if series.filled else "open"
    scale = "" if series.filled or series.marker == "ring" else f" scale({OPEN})"
    return (
        f'class="{kind} {series.color}" transform="translate({x:.1f} {y:.1f}){scale}" '
        f'd="{SHAPES[series.marker]}"'
    )


def _finite(series: PlotSeries) -> list[Point]:
    return [point for point in series.points if math.isfinite(sum(point))]


def _hover(chart: Chart, series: PlotSeries, number: int, point: Point) -> str:
    name = f" {series.names[number]}" if number < len(series.names) else ""
    x, y = (
        f"{axis.label}: {axis.text(v)}" for axis, v in zip((chart.x, chart.y), point, strict=True)
    )
    return _text(f"{series.label}{name}; {x}; {y}")


def _steps(frame: _Frame, series: PlotSeries) -> Iterator[str]:
    """Yield filled or outlined columns; named columns have a hover text."""
    base = frame.place((0, 0))[1]
    path = ""
    for (left, height), (right, _) in zip(series.points, series.points[1:], strict=False):
        x0, y = frame.place((left, height))
        x1 = frame.place((right, height))[0]
        path += f"{'V' if path else f'M{x0:.1f} {base:.1f}V'}{y:.1f}H{x1:.1f}"
    path += f"V{base:.1f}"
    dash = f' stroke-dasharray="{DASHES[series.dash]}"' if DASHES[series.dash] else ""
    kind = "area" if series.filled else "line"
    yield f'<path class="{kind} {series.color}"{dash} d="{path}"/>'
    for number, name in enumerate(series.names[:MAX_HOVER_TEXTS]):
        (left, height), (right, _) = series.points[number : number + 2]
        x0, y = frame.place((left, height))
        x1 = frame.place((right, height))[0]
        title = _text(f"{name}: {series.label} {height:,.0f}")
        yield (
            f'<path class="hover" d="M{x0:.1f} {base:.1f}V{y:.1f}H{x1:.1f}V{base:.1f}z">'
            f"<title>{title}</title></path>"
        )


def _names(frame: _Frame) -> Iterator[str]:
    """Yield the names of points, except names that would overlap earlier ones."""
    drawn = [series for series in frame.chart.series if not series.steps]
    markers = [
        square(*frame.place(point), RING if series.marker == "ring" else RADIUS)
        for series in drawn
        if series.marker
        for point in _finite(series)
    ]
    plot = Rectangle(LEFT, frame.top, WIDTH, frame.bottom)
    labels: list[Label] = []
    for series in drawn:
        for name, point in zip(series.names, _finite(series), strict=False):
            own = square(*frame.place(point), RADIUS)
            label = place_label(printable(name), own, markers, labels, plot) if name else None
            if label:
                labels.append(label)
                place = f'x="{label.x:.1f}" y="{label.box.bottom:.1f}" text-anchor="{label.anchor}"'
                yield f'<text {place} class="small name">{_text(name)}</text>'


def _legend(frame: _Frame) -> Iterator[str]:
    for row, entries in enumerate(frame.rows):
        x, y = float(LEFT), 9 + ROW * row
        for series in entries:
            yield _sample(series, x, y)
            yield f'<text x="{x + 22:.1f}" y="{y + 4}" class="small">{_text(series.label)}</text>'
            x += 30 + LETTER * len(series.label)


def _sample(series: PlotSeries, x: float, y: float) -> str:
    if series.steps and series.filled:
        return f'<path class="area {series.color}" d="M{x:.1f} {y - 4}h18v8h-18z"/>'
    parts = ""
    if series.line or series.steps:
        dash = f' stroke-dasharray="{DASHES[series.dash]}"' if DASHES[series.dash] else ""
        parts = f'<path class="line {series.color}"{dash} d="M{x:.1f} {y}h18"/>'
    if series.marker:
        parts += f"<path {_marker(series, x + 9, y)}/>"
    return parts
