"""Charts drawn as PNG by matplotlib. The same chart gives the same bytes; no display is needed.

matplotlib is imported when the first chart is drawn. It ignores the user's style and needs no
writable home folder.
"""

from __future__ import annotations

import io
import logging
import math
import os
import warnings
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from job.errors import GammaslimError, reason
from job.report.chart import PALETTE, shorten_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes

    from job.report.chart import Axis, Chart, PlotSeries

STYLE = {
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "grid.color": "#dddddd", "grid.linewidth": 0.6, "font.size": 10,
    "legend.fontsize": 9, "legend.framealpha": 0.8, "lines.linewidth": 1.6, "lines.markersize": 5,
    "axes.formatter.useoffset": False,
}  # fmt: skip
SIZE, DPI = (6.4, 4.0), 100  # inches, dots per inch
MAX_LABELS = 48  # of an axis or a series, to remain readable
MAX_TICK_LETTERS = 13  # of a name below the axis
MAX_NAMED = 10  # series in a legend


def draw_charts(charts: Sequence[Chart]) -> list[bytes]:
    """Return each chart as PNG; raises GammaslimError when matplotlib cannot be imported."""
    if not charts:
        return []
    with _matplotlib() as figure_class:
        return [_draw(figure_class, chart) for chart in charts]


def draw_panels(charts: Sequence[Chart]) -> bytes:
    """Return charts without marks as the panels of one PNG, side by side.

    Raises GammaslimError when matplotlib cannot be imported.
    """
    width, height = SIZE
    with _matplotlib() as figure_class:
        canvas = figure_class(figsize=(width * len(charts), height), dpi=DPI)
        panels = canvas.subplots(1, len(charts), squeeze=False)[0]
        margin = 0.12 / len(charts)
        canvas.subplots_adjust(left=margin, right=1 - margin / 4, top=0.93, bottom=0.14)
        for axes, chart in zip(panels, charts, strict=True):
            _draw_chart(axes, chart)
        return _png(canvas)


@lru_cache(maxsize=32)  # most charts of a finished run are those after its last round
def _draw(figure_class: Any, chart: Chart) -> bytes:
    canvas = figure_class(figsize=SIZE, dpi=DPI)
    # fixed margins: computing them takes as long as drawing
    bottom = 0.3 if chart.x.names else 0.14
    canvas.subplots_adjust(left=0.12, right=0.97, top=0.93, bottom=bottom)
    _draw_chart(canvas.subplots(), chart)
    return _png(canvas)


def _draw_chart(axes: Axes, chart: Chart) -> None:
    axes.locator_params(nbins=6)  # a tick costs a millisecond
    for series in chart.series:
        _draw_series(axes, series)
    _set_axes(axes, chart)
    _draw_marks(axes, chart)
    shown = [series for series in chart.series if series.in_legend][: MAX_NAMED + 1]
    handles = list(axes.get_legend_handles_labels()[0])[: len(shown)]
    if handles:
        for text in axes.legend(handles=handles).get_texts():
            text.set_parse_math(False)  # a name can hold dollars


def _png(canvas: Any) -> bytes:
    content = io.BytesIO()
    canvas.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _draw_series(axes: Axes, series: PlotSeries) -> None:
    color = PALETTE[series.color]
    label = series.label if series.in_legend else "_"
    xs, ys = [x for x, _ in series.points], [y for _, y in series.points]
    if series.steps:
        axes.stairs(
            ys[:-1], xs, fill=series.filled, color=color, label=label, linestyle=series.dash
        )
        return
    ring = series.marker == "ring"
    axes.plot(
        xs,
        ys,
        label=label,
        color=color,
        linestyle=series.dash if series.line else "none",
        marker="o" if ring else series.marker or None,
        markersize=12 if ring else 5 if series.filled else 7,
        fillstyle="full" if series.filled else "none",
        zorder=2 if series.filled else 3,  # an open marker does not cover what it is around
    )
    finite = [point for point in series.points if math.isfinite(sum(point))]
    for name, point in list(zip(series.names, finite, strict=False))[:MAX_LABELS]:
        axes.annotate(
            name, point, (4, 4), textcoords="offset points", fontsize=8, parse_math=False,
            annotation_clip=True,
        )  # fmt: skip


def _set_axes(axes: Axes, chart: Chart) -> None:
    axes.set_xlabel(chart.x.label)
    axes.set_ylabel(chart.y.label)
    _set_axis(axes.xaxis, chart.x)
    _set_axis(axes.yaxis, chart.y)
    axes.set_xlim(chart.range(0))
    axes.set_ylim(chart.range(1))
    if chart.x.names:
        every = 1 + (len(chart.x.names) - 1) // MAX_LABELS
        ticks = range(0, len(chart.x.names), every)
        names = [shorten_name(chart.x.names[tick], MAX_TICK_LETTERS) for tick in ticks]
        axes.set_xticks(list(ticks), names, rotation=90, fontsize=7, parse_math=False)
        axes.grid(visible=False, axis="x")


def _set_axis(drawn: Any, axis: Axis) -> None:
    from matplotlib.ticker import EngFormatter

    if axis.log:
        drawn.axes.set_yscale("log")
    elif axis.prefixes:
        drawn.set_major_formatter(EngFormatter(axis.unit))


def _draw_marks(axes: Axes, chart: Chart) -> None:
    for value, _ in chart.marks:
        axes.axvline(value, color=PALETTE["grey"], linewidth=0.7, zorder=0)
    for value, text in chart.marks[:: 1 + len(chart.marks) // MAX_LABELS]:
        axes.annotate(
            text, (value, 1), (0, 3), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", fontsize=8,
        )  # fmt: skip


@contextmanager
def _matplotlib() -> Iterator[Any]:
    """Yield matplotlib's Figure class, in the style of the report."""
    try:
        with _quiet_import():
            import matplotlib
            from matplotlib.backends import backend_agg  # noqa: F401  (savefig would import it)
            from matplotlib.figure import Figure
    except ImportError as error:
        raise GammaslimError(
            f"the figures need matplotlib, which cannot be imported: {reason(error)}"
        ) from error
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")  # about characters that its font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield Figure


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Ignore MPLBACKEND and silence messages about fonts and caches while matplotlib is imported.

    matplotlib uses a temporary folder if neither MPLCONFIGDIR nor the home folder is writable.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
