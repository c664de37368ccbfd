"""Page of several runs: a row for each run, the options that differ, and the Pareto charts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.report.comparison import (
    COSTS,
    common_score_name,
    comparison_caution,
    comparison_notes,
    pareto_models,
    run_names,
)
from job.report.configuration import differing_options
from job.report.html import HtmlTable, NumberCell, render
from job.report.run_page import COST_HEADINGS, cost_cell, score_cell
from job.report.tables import describe_state, format_points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.artifacts.history import History
    from job.report.chart import Chart

_TEMPLATE = "comparison.html.j2"


def comparison_page(histories: Sequence[History], charts: Sequence[Chart]) -> bytes:
    """Return the page of several runs."""
    caution = comparison_caution(histories)
    problems = [problem for history in histories for problem in history.problems]
    return render(
        _TEMPLATE,
        heading=f"{len(histories)} runs",
        cautions=(*([caution] if caution else []), *problems),
        table=_runs_table(histories),
        note="; ".join(comparison_notes(histories)) or None,
        options=_options_table(histories),
        charts=charts,
    )


def _runs_table(histories: Sequence[History]) -> HtmlTable:
    costs = [c for c in COSTS if c != "latency" or any(h.latencies for h in histories)]
    score = common_score_name(histories)
    header = (
        "", "run", "state", f"base's {score}", "recommended", *(COST_HEADINGS[c] for c in costs),
        score, "points relative to base", "Pareto-optimal in",
    )  # fmt: skip
    optimal, rows = pareto_models(histories), []
    for index, (name, history) in enumerate(zip(run_names(histories), histories, strict=True)):
        base, best = history.base, history.best
        fronts = [COST_HEADINGS[c] for c in costs if best and (index, best.round) in optimal[c]]
        rows.append((
            str(index + 1), name, describe_state(history),
            score_cell(base.valid_acc if base else None),
            f"rounds/{best.round:02d}" if best else "",
            *(cost_cell(history, best, cost) if best else "" for cost in costs),
            score_cell(best.valid_acc if best else None),
            NumberCell(format_points(history.change), history.change), ", ".join(fronts),
        ))  # fmt: skip
    title = "Recommended model of each run"
    return HtmlTable(header, tuple(rows), title=title, left=3, cards=True, sortable=True)


def _options_table(histories: Sequence[History]) -> HtmlTable:
    """Return a table with a row for each run and a column for each option that differs."""
    options = differing_options(histories)
    header = ("", "run", *(flag for flag, _ in options))
    rows = tuple(
        (str(index + 1), name, *(values[index] for _, values in options))
        for index, name in enumerate(run_names(histories))
    )
    title = "Options that differ between the runs"
    return HtmlTable(header, rows if options else (), title=title, left=2, cards=True,
                     sortable=True)  # fmt: skip
