"""Page of one run: its result first, then the details, then the configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, get_args

from job.artifacts.accuracy import signed_points
from job.artifacts.stored_places import place_of
from job.config import CLASSIFICATION
from job.console import counted, span
from job.errors import shown
from job.files import shell_word
from job.report.chart import Axis, Section
from job.report.classes import changed_classes, confusion_matrices
from job.report.configuration import changed_options, grouped_options
from job.report.figures import COST_AXES
from job.report.html import HtmlTable, NumberCell, render
from job.report.tables import cautions_of, describe_state, format_points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.artifacts.evaluation_record import ExampleImage
    from job.artifacts.history import History
    from job.artifacts.records import RoundRecord
    from job.report.chart import Chart

_TEMPLATE = "run.html.j2"
RESULT_COSTS = {
    "params": "parameters", "macs": "MACs", "latency": "latency", "bytes": "size",
}  # fmt: skip
COST_HEADINGS = {"params": "parameters", "macs": "MACs", "bytes": "bytes", "latency": "latency"}
IMAGE = re.compile(r"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/]{1,100000}={0,2}")
MAX_EXACT_COST = 10**7  # larger costs are rounded to four digits
SIZE = Axis("", unit="B", prefixes=True)


@dataclass(frozen=True)
class ResultRow:
    """Value of the base and of a slim model, and the ``change`` between them."""

    name: str
    base: str
    slim: str
    change: str


@dataclass(frozen=True)
class ShownExample:
    """Image that the base and the slim model classify differently."""

    image: str
    name: str
    true: str
    base: str
    slim: str


def run_page(history: History, charts: Sequence[Chart]) -> bytes:
    """Return the page of one run."""
    first = next((chart for chart in charts if chart.name == "accuracy-params"), None)
    sections: dict[str, list[Chart]] = {name: [] for name in get_args(Section)}
    for chart in charts:
        if chart is not first:
            sections[chart.section].append(chart)
    lost, won = _examples(history)
    compared = _compared(history)
    return render(
        _TEMPLATE,
        history=history,
        heading=history.name,
        state=f"State: {describe_state(history)}{_when(history)}.",
        cautions=(*cautions_of(history), *history.problems),
        headline=_headline(history),
        result=_result_rows(history),
        compared=compared,
        first=first,
        charts=sections,
        rounds=_rounds_table(history),
        times=_times_table(history),
        sensitivity=_sensitivity_table(history),
        matrices=confusion_matrices(history),
        changed=changed_classes(history),
        lost=lost,
        won=won,
        evaluation=history.evaluations.get(history.slim_round or 0),
        commands=_commands(history),
        options=changed_options(history),
        groups=grouped_options(history),
        tables={k: v for k, v in history.settings.items() if k != "prune"},
    )


def _headline(history: History) -> str:
    """Return the result in a sentence."""
    base, best = history.base, history.best
    if not base or not best:
        return "No round is finished yet." if not base else "No model is recommended yet."
    if best.round == 0:
        text = f"Recommended: ★ rounds/00, {history.reason}."
        return f"{text} {_most_accurate(history, top)}" if (top := history.most_accurate) else text
    parts = [
        f"{share:.1%} of the {name}"
        for cost, name in (("params", "parameters"), ("macs", "MACs"), ("latency", "latency"))
        if (share := history.share(best, cost)) is not None
    ]
    points = signed_points(history.change or 0.0)
    return (
        f"Recommended: ★ rounds/{best.round:02d}. {', '.join(parts)}, {history.score_name} "
        f"{best.valid_acc:.2%} ({points} points)."
    )


def _most_accurate(history: History, entry: RoundRecord) -> str:
    """Return a sentence on the most accurate round, where none is recommended."""
    points = format_points(history.points(entry))
    return (
        f"No round kept the {history.score_name}: the best one is round {entry.round}, with "
        f"{entry.valid_acc:.2%} ({points} points)."
    )


def _compared(history: History) -> RoundRecord | None:
    """Return the round next to the base in the result: recommended, or the most accurate."""
    return history.best if history.recommended else history.most_accurate


def _result_rows(history: History) -> tuple[ResultRow, ...]:
    """Return the result; without a round it has the values of the base alone."""
    base, slim = history.base, _compared(history)
    if not base or not history.best:
        return ()
    rows = [ResultRow(history.score_name, _percent(base.valid_acc),
                      _percent(slim.valid_acc if slim else None),
                      f"{format_points(history.points(slim))} points" if slim else "")]  # fmt: skip
    for cost, name in RESULT_COSTS.items():
        before, after = history.cost(base, cost), history.cost(slim, cost) if slim else None
        if before is None or (slim and after is None):
            continue
        text = "" if after is None else _short(cost, after)
        change = f"× {after / before:.3f}" if before and after is not None else ""
        rows.append(ResultRow(name, _short(cost, before), text, change))
    return tuple(rows)


def _short(cost: str, value: float) -> str:
    """Return a cost in about four digits."""
    return (SIZE if cost == "bytes" else COST_AXES[cost]).text(value)


def _rounds_table(history: History) -> HtmlTable:
    recovered = any(entry.valid_acc_recovered is not None for entry in history.rounds)
    timed, score = bool(history.latencies), history.score_name
    costs = [cost for cost in COST_HEADINGS if cost != "latency" or timed]
    header = (
        "round", f"{score} after fine-tuning", "points relative to base", "loss",
        f"{score} after the cut", *((f"{score} after recovery",) if recovered else ()),
        *(COST_HEADINGS[cost] for cost in costs), "width", "channels", "best epoch",
    )  # fmt: skip
    rows = tuple(
        (
            NumberCell("★ " + entry.name if entry is history.best else entry.name, entry.round),
            score_cell(entry.valid_acc),
            NumberCell(
                format_points(history.points(entry)) if entry.round else "", history.points(entry)
            ),
            NumberCell(f"{entry.valid_loss:.4f}", entry.valid_loss),
            score_cell(entry.valid_acc_pruned),
            *((score_cell(entry.valid_acc_recovered),) if recovered else ()),
            *(cost_cell(history, entry, cost) for cost in costs),
            NumberCell(f"{entry.width:.4f}", entry.width),
            NumberCell(f"{entry.channels:,}", entry.channels),
            "" if entry.best_epoch is None else str(entry.best_epoch),
        )
        for entry in history.rounds
    )
    best = history.rounds.index(history.best) if history.best else None
    return HtmlTable(
        header, rows, title="Base and rounds (★ recommended)", best=best, cards=True, sortable=True
    )


def _times_table(history: History) -> HtmlTable:
    """Return the time of each round, and its mean images per second in training."""
    rows = []
    for entry in history.rounds:
        epochs = [epoch for epoch in history.epochs if epoch.round == entry.round]
        speed = sum(epoch.images_per_second for epoch in epochs) / len(epochs) if epochs else None
        rows.append((
            entry.name,
            "" if entry.seconds is None else f"{entry.seconds:,.0f}",
            f"{sum(epoch.seconds for epoch in epochs):,.0f}" if epochs else "",
            "" if speed is None else f"{speed:,.0f}",
        ))  # fmt: skip
    header = ("round", "seconds", "seconds in epochs", "images per second")
    return HtmlTable(header, tuple(rows), title="Time of each round")


def _sensitivity_table(history: History) -> HtmlTable | None:
    """Return the table of the channel groups that a cut measured; None without one."""
    measured = history.measured
    if measured is None:
        return None
    record = measured.sensitivity
    title = f"Channel groups before the cut of round {measured.round}: {record.describe()}"
    rows = tuple(
        tuple(
            text if isinstance(value, str) else NumberCell(text, value)
            for text, value in zip(cells, values, strict=True)
        )
        for cells, values in zip(record.cells(), record.values(), strict=True)
    )
    return HtmlTable(record.header(), rows, title=title, sortable=True)


def _examples(history: History) -> tuple[list[ShownExample], list[ShownExample]]:
    """Return the examples that only the base, and that only the slim model, gets right."""
    evaluation = history.evaluations.get(history.slim_round or 0)
    lost: list[ShownExample] = []
    won: list[ShownExample] = []
    for each in evaluation.examples if evaluation else ():
        if IMAGE.fullmatch(each.image):
            (lost if each.base == each.label else won).append(_example(history, each))
    return lost, won


def _example(history: History, each: ExampleImage) -> ShownExample:
    names = (history.class_name(number) for number in (each.label, each.base, each.predicted))
    return ShownExample(each.image, each.name, *names)


def _commands(history: History) -> dict[str, str]:
    """Return code and command lines that load and use the recommended model, by title."""
    if not history.best:
        return {}
    task = history.setting("prune", "task") or CLASSIFICATION
    inputs, images, outputs = "images (B, 3, H, W) float32", "images", "logits"
    if task != CLASSIFICATION:
        inputs, images, outputs = f"inputs as {shown(str(task))} makes them", "inputs", "outputs"
    run = shown(place_of(history.path))
    model = f"{run}/rounds/{history.best.round:02d}"
    return {
        "In Python": (
            "import gammaslim\n"
            f"network = gammaslim.load({model!r})  # eval mode; {inputs}\n"
            f"{outputs} = network({images})"
        ),
        **_scoring_commands(history, run),
        "Export": f"gammaslim export {shell_word(run)} --output model.onnx",
    }


def _scoring_commands(history: History, run: str) -> dict[str, str]:
    """Return lines that evaluate, on the test split if there is one, and that predict classes."""
    word = shell_word(run)
    lines = {"Evaluate": f"gammaslim evaluate {word}"}
    if history.setting("dataset", "testing"):
        lines = {"Evaluate on the test split": f"gammaslim evaluate {word} --split testing"}
    if (history.setting("prune", "task") or CLASSIFICATION) != CLASSIFICATION:
        return lines
    return {
        **lines,
        "Predict a folder of images": (
            f"gammaslim predict {word} --data FOLDER --output classes.csv"
        ),
    }


def _when(history: History) -> str:
    try:
        time = datetime.fromtimestamp(history.time, UTC) if history.time else None
    except (OverflowError, ValueError, OSError):  # a year beyond 9999
        time = None
    when = f" at {time:%Y-%m-%d %H:%M:%S} UTC" if time else ""
    if history.seconds is None:
        return when
    seconds = history.seconds
    took = span(seconds) if seconds == seconds and seconds >= 100 else counted(seconds, "second")
    return f"{when}, after {took}"


def _percent(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{accuracy:.2%}"


def score_cell(score: float | None) -> NumberCell:
    """Return a score between 0 and 1 as a percentage; an empty cell for None."""
    return NumberCell(_percent(score), score)


def cost_cell(history: History, entry: RoundRecord, cost: str) -> NumberCell:
    """Return a cost of ``entry`` and its share of the base's; empty if it is not known."""
    value, share = history.cost(entry, cost), history.share(entry, cost)
    if value is None:
        return NumberCell("", None)
    exact = cost != "latency" and value < MAX_EXACT_COST
    text = f"{value:,.0f}" if exact else COST_AXES[cost].text(value)
    text += "" if share is None or not entry.round else f" ({share:.1%})"
    return NumberCell(text, value)
