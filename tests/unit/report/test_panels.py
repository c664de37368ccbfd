"""One figure of several charts."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageChops

from job.artifacts.run_reader import read_run
from job.report.drawing import draw_panels
from job.report.figures import comparison_charts
from job.report.page import write_comparison
from support.report_pages import make_run


def test_the_charts_of_runs_are_panels_of_one_figure(tmp_path: Path) -> None:
    histories = [read_run(make_run(tmp_path / name)) for name in ("a", "b")]
    charts = comparison_charts(histories)
    figure = Image.open(io.BytesIO(draw_panels(charts))).convert("L")
    assert figure.size == (640 * len(charts), 400)
    for number in range(len(charts)):  # each panel has content
        panel = figure.crop((640 * number, 0, 640 * (number + 1), 400))
        assert ImageChops.invert(panel).getbbox()
    write_comparison(tmp_path, charts)
    assert (tmp_path / "comparison.png").read_bytes() == draw_panels(charts)
    write_comparison(tmp_path / "none", [])
    assert not (tmp_path / "none").exists()
