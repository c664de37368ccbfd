"""HTML page of one run, or of several runs compared.

The page contains its figures and loads nothing else. The template ``report.html.j2`` escapes all
text from files, and shows control characters as escapes.
"""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from job.artifacts.run_reader import read_run
from job.console import counted
from job.errors import printable, writing
from job.files import write_bytes
from job.report.comparison import COSTS, comparison_caution, pareto_models, run_names
from job.report.figures import draw_run
from job.report.tables import describe_state, format_points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.artifacts.history import History
    from job.artifacts.records import RoundRecord
    from job.report.drawing import DrawnFigure

TEMPLATE = "report.html.j2"
COST_HEADINGS = {"params": "parameters", "macs": "MACs", "bytes": "bytes"}


@dataclass(frozen=True)
class HtmlTable:
    """Table whose first ``left`` columns are left-aligned and whose row ``best`` is marked."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    left: int = 1
    best: int | None = None


@dataclass(frozen=True)
class Page:
    """Content of a page in reading order; ``details`` holds the tables after the figures."""

    heading: str
    facts: tuple[str, ...]
    cautions: tuple[str, ...]
    table: HtmlTable
    figures: Sequence[DrawnFigure]
    details: tuple[HtmlTable, ...] = ()


def write_run_report(run: Path) -> None:
    """Write ``run``/report.html and ``run``/figures for the present state of the run.

    Raises GammaslimError.
    """
    history = read_run(run)
    figures = draw_run(history)
    write_figures(run / "figures", figures)
    write_bytes(run / "report.html", render(run_page(history, figures)))


def write_figures(folder: Path, figures: Sequence[DrawnFigure]) -> None:
    """Write each figure as PNG into ``folder``; raises StorageError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        write_bytes(folder / f"{figure.name}.png", figure.png)


def render(page: Page) -> bytes:
    """Return ``page`` as HTML in UTF-8."""
    return _template().render(page=page).encode()


def run_page(history: History, figures: Sequence[DrawnFigure]) -> Page:
    """Return the page of one run: its rounds, figures and configuration."""
    facts = [f"State: {describe_state(history)}{_when(history)}."]
    if history.best:
        facts.append(f"Recommended: ★ rounds/{history.best.round:02d}, {history.reason}.")
    if history.seconds is not None:
        facts.append(f"The run has taken {counted(history.seconds, 'second')} so far.")
    if not history.rounds:
        facts.append("No round is finished yet.")
    settings = tuple(
        HtmlTable((), tuple((key, str(value)) for key, value in values.items()),
                  title=f"Configuration: {name}", left=2)
        for name, values in history.settings.items()
    )  # fmt: skip
    return Page(
        heading=history.name,
        facts=tuple(facts),
        cautions=(*history.cautions, *history.problems),
        table=_rounds_table(history),
        figures=figures,
        details=(*_sensitivity_tables(history), *settings),
    )


def comparison_page(histories: Sequence[History], figures: Sequence[DrawnFigure]) -> Page:
    """Return the page of several runs: a row each, and the Pareto figures."""
    caution = comparison_caution(histories)
    problems = [problem for history in histories for problem in history.problems]
    return Page(
        heading=f"{len(histories)} runs",
        facts=(),
        cautions=(*([caution] if caution else []), *problems),
        table=_comparison_table(histories),
        figures=figures,
    )


def _sensitivity_tables(history: History) -> tuple[HtmlTable, ...]:
    """Return the table of the channel groups that a cut measured; nothing if none did."""
    measured = history.measured
    if measured is None:
        return ()
    found = measured.sensitivity
    title = f"Channel groups before the cut of round {measured.round}: {found.describe()}"
    return (HtmlTable(found.header(), tuple(found.cells()), title=title),)


def _rounds_table(history: History) -> HtmlTable:
    recovered = any(entry.valid_acc_recovered is not None for entry in history.rounds)
    header = (
        "round", "width", *COST_HEADINGS.values(), "channels", "accuracy after surgery",
        *(("accuracy after recovery",) if recovered else ()),
        "accuracy after fine-tuning", "best epoch", "difference from the base, points", "seconds",
    )  # fmt: skip
    rows = tuple(
        (
            "★ recommended: " + entry.name if entry is history.best else entry.name,
            f"{entry.width:.4f}",
            *(_cost(history, entry, cost) for cost in COSTS),
            f"{entry.channels:,}",
            _percent(entry.valid_acc_pruned),
            *((_percent(entry.valid_acc_recovered),) if recovered else ()),
            _percent(entry.valid_acc),
            "" if entry.best_epoch is None else str(entry.best_epoch),
            format_points(history.points(entry)) if entry.round else "",
            "" if entry.seconds is None else f"{entry.seconds:,.0f}",
        )
        for entry in history.rounds
    )
    best = history.rounds.index(history.best) if history.best else None
    return HtmlTable(header if rows else (), rows, title="Base and rounds", best=best)


def _comparison_table(histories: Sequence[History]) -> HtmlTable:
    header = (
        "", "run", "state", "base's accuracy", "recommended", *COST_HEADINGS.values(), "accuracy",
        "difference from the base, points", "Pareto-optimal in",
    )  # fmt: skip
    optimal, rows = pareto_models(histories), []
    for index, (name, history) in enumerate(zip(run_names(histories), histories, strict=True)):
        base, best = history.base, history.best
        fronts = [COST_HEADINGS[c] for c in COSTS if best and (index, best.round) in optimal[c]]
        rows.append((
            str(index + 1), name, describe_state(history),
            _percent(base.valid_acc if base else None),
            f"rounds/{best.round:02d}" if best else "",
            *(_cost(history, best, cost) if best else "" for cost in COSTS),
            _percent(best.valid_acc if best else None),
            format_points(history.change), ", ".join(fronts),
        ))  # fmt: skip
    return HtmlTable(header, tuple(rows), left=3)


def _when(history: History) -> str:
    try:
        time = datetime.fromtimestamp(history.time, UTC) if history.time else None
    except (OverflowError, ValueError, OSError):  # a year beyond 9999
        time = None
    return f" at {time:%Y-%m-%d %H:%M:%S} UTC" if time else ""


def _percent(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{accuracy:.2%}"


def _cost(history: History, entry: RoundRecord, cost: str) -> str:
    share = history.share(entry, cost)
    return f"{getattr(entry, cost):,}" + ("" if share is None else f" ({share:.1%})")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_show_controls,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda content: b64encode(content).decode()
    return environment.get_template(TEMPLATE)


def _show_controls(value: Any) -> Any:
    """Escape control characters in text; markup of the template is not changed."""
    return value if isinstance(value, Markup) else printable(str(value))
