"""Jobs that leave out what takes time and says nothing where tests run."""

from __future__ import annotations

import job.report.page
from job.pipeline import round_latency
from job.report.chart import Axis, Chart
from job.report.drawing import draw_charts
from job.slimming.latency.alternation import TimeLimits


def make_jobs_brief() -> None:
    """Have jobs of this process time their networks a few times, and draw one figure for all."""
    round_latency.QUICK = TimeLimits(seconds=0, warmup=0, max_calls=1, min_rounds=2)
    round_latency.MOST_REPEATS = 0
    drawn = draw_charts([Chart("drawn", "", Axis("x"), Axis("y"), ())])
    job.report.page.draw_charts = lambda charts: drawn * len(charts)


def draw_all() -> None:
    """Have this process draw every figure again."""
    job.report.page.draw_charts = draw_charts
