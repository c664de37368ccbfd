"""HTML page of one run, or of several runs compared.

The page contains its charts and images and loads nothing else. The templates escape all text from
files, and show control characters as escapes. A script sorts tables; it is optional.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.artifacts.run_reader import read_run
from job.errors import writing
from job.files import write_bytes
from job.report.drawing import draw_charts, draw_panels
from job.report.figures import run_charts
from job.report.run_page import run_page

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from job.report.chart import Chart


def write_run_report(run: Path) -> None:
    """Write ``run``/report.html and ``run``/figures for the current state of the run.

    Raises GammaslimError.
    """
    history = read_run(run)
    charts = run_charts(history)
    write_figures(run / "figures", charts)
    write_bytes(run / "report.html", run_page(history, charts))


def write_figures(folder: Path, charts: Sequence[Chart]) -> None:
    """Write each chart as PNG into ``folder``; raises StorageError, or GammaslimError."""
    images = draw_charts(charts)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for chart, image in zip(charts, images, strict=True):
        write_bytes(folder / f"{chart.name}.png", image)


def write_comparison(folder: Path, charts: Sequence[Chart]) -> None:
    """Write the charts of several runs as the panels of ``folder``/comparison.png.

    Raises StorageError, or GammaslimError.
    """
    if charts:
        write_bytes(folder / "comparison.png", draw_panels(charts))
