"""Charts of one run and of several runs. To add one, add an entry to a table at the end."""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import TYPE_CHECKING

from job.errors import printable
from job.report.chart import CYCLE, MARKERS, Axis, Chart, PlotSeries
from job.report.comparison import (
    COSTS,
    common_score_name,
    compared_cost,
    compared_metrics,
    pareto_front,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from job.artifacts.history import History

MAX_NAMED_RUNS = 10  # in a legend; if there are more, points have numbers only
MAX_NAMED_GROUPS = 5  # in a legend
MAX_LETTERS = 24  # of the name of a run in a legend
MAX_MARKED_POINTS = 60  # of a line; longer lines have no markers
MIN_LOSS = 1e-9  # smaller losses are noise
MIN_LOSS_SHARE = 1e-6  # lower end of the axis, relative to the highest loss
STEP_AXIS = Axis("steps (batches) since the run began", prefixes=True)
COST_AXES = {
    "params": Axis("parameters", prefixes=True),
    "macs": Axis("multiply-adds for one image (MACs)", prefixes=True),
    "bytes": Axis("size of all tensors", unit="B", prefixes=True),
    "latency": Axis("measured latency", unit="s", prefixes=True),
}
COMPARED_AXES = COST_AXES | {"latency": Axis("latency relative to the run's own base")}


def run_charts(history: History) -> list[Chart]:
    """Return the charts of a run for which it has data."""
    return [chart for build in RUN_FIGURES if (chart := build(history))]


def comparison_charts(histories: Sequence[History]) -> list[Chart]:
    """Return the charts of several runs for which they have data."""
    return [chart for build in COMPARISON_FIGURES if (chart := build(histories))]


def accuracy_chart(history: History, cost: str) -> Chart | None:
    """Return the chart of the accuracy of each round, after surgery and tuning, by ``cost``."""
    rounds = [(x, e) for e in history.rounds if (x := history.cost(e, cost)) is not None]
    if not rounds or (cost == "latency" and len(rounds) < 2):
        return None
    series = []
    pruned = [(x, 100 * e.valid_acc_pruned) for x, e in rounds if e.valid_acc_pruned is not None]
    if pruned:
        series.append(
            PlotSeries("after the cut", tuple(pruned), "vermillion", "s", "--", filled=False)
        )
    recovered = [(x, 100 * e.valid_acc_recovered) for x, e in rounds if e.valid_acc_recovered]
    if recovered:
        series.append(
            PlotSeries("after recovery", tuple(recovered), "green", "^", "-.", filled=False)
        )
    tuned = tuple((x, 100 * e.valid_acc) for x, e in rounds)
    names = tuple(e.name for _, e in rounds)
    series.append(PlotSeries("after fine-tuning", tuned, "blue", "o", names=names))
    costs = [x for x, _ in rounds]
    if history.base:
        level = 100 * history.base.valid_acc
        ends = ((min(costs), level), (max(costs), level))
        series.append(PlotSeries("base", ends, "grey", dash=":"))
    best = history.best
    if best and (x_best := history.cost(best, cost)) is not None:
        point = ((x_best, 100 * best.valid_acc),)
        series.append(PlotSeries("recommended", point, "black", "ring", filled=False, line=False))
    words = "; ".join(
        f"{'base' if not e.round else f'round {e.round}'}: {COST_AXES[cost].text(x)}, "
        f"{e.valid_acc:.2%}"
        for x, e in rounds
    )
    score = history.score_name
    caption = f"{_capital(score)} of the base and of each round against {COST_AXES[cost].label}"
    return Chart(f"accuracy-{cost}", caption, COST_AXES[cost], _score_axis(score), tuple(series),
                 summary=words)  # fmt: skip


def training_chart(history: History, metric: str) -> Chart | None:
    """Return the chart of the accuracy (``acc``) or ``loss`` of each epoch over the steps."""
    if not history.epochs:
        return None
    name, factor = (history.score_name, 100) if metric == "acc" else ("loss", 1)
    marker, last = "o" if len(history.epochs) <= MAX_MARKED_POINTS else "", history.epochs[-1]
    series = tuple(
        PlotSeries(
            label,
            _by_round(history, lambda epoch, key=key: factor * getattr(epoch, key)),
            color,
            marker,
            "--" if key.startswith("train") else "-",
            filled=not key.startswith("train"),
        )
        for key, label, color in (
            (f"train_{metric}", "training", "vermillion"),
            (f"valid_{metric}", "validation", "blue"),
        )
        if getattr(last, key) is not None
    )
    value = factor * getattr(last, f"valid_{metric}")
    return Chart(
        "training-accuracy" if metric == "acc" else "training-loss",
        f"Training and validation {name} of each epoch; vertical lines mark the ends of rounds",
        STEP_AXIS,
        Axis(f"{name} (%)" if metric == "acc" else "loss"),
        series,
        marks=_round_marks(history),
        summary=f"Validation {name} of the last epoch: {value:.4g}",
        section="training",
    )


def throughput_chart(history: History) -> Chart | None:
    """Return the chart of the images per second of each epoch of training."""
    if not history.epochs:
        return None
    points = _by_round(history, lambda epoch: epoch.images_per_second)
    mean = statistics.fmean(epoch.images_per_second for epoch in history.epochs)
    return Chart(
        "throughput",
        "Images per second in training, by epoch",
        STEP_AXIS,
        Axis("images per second"),
        (PlotSeries("training", points, "green", "o" if len(points) <= MAX_MARKED_POINTS else ""),),
        marks=_round_marks(history),
        summary=f"Mean: {mean:,.0f} images per second",
        section="time",
    )


def channels_chart(history: History) -> Chart | None:
    """Return the chart of the channels of each layer, in the slim model and the base."""
    layers = history.layers
    if not layers:
        return None
    names = tuple(printable(layer.name) for layer in layers)
    end = (len(layers) - 0.5, 0.0)
    full = (*((n - 0.5, float(layer.full)) for n, layer in enumerate(layers)), end)
    kept = (*((n - 0.5, float(layer.kept)) for n, layer in enumerate(layers)), end)
    cut = sorted(layers, key=lambda layer: layer.kept / max(1, layer.full))[:3]
    return Chart(
        "channels",
        f"Output channels of each layer of {history.slim_name}, and of the base",
        Axis("layer", names=names),
        Axis("output channels"),
        (
            PlotSeries("base", full, "pale", steps=True, names=names),
            PlotSeries("kept", kept, "blue", steps=True, names=names),
        ),
        summary="Reduced most: "
        + "; ".join(f"{printable(la.name)} keeps {la.kept} of {la.full}" for la in cut),
        section="channels",
    )


def sensitivity_chart(history: History) -> Chart | None:
    """Return the chart of the loss of the outputs by kept channels, with a line per group."""
    measured, lines = history.measured, []
    for row in measured.sensitivity.rows if measured else ():
        points = tuple(
            (100 * p.channels / max(1, row.channels), max(p.loss, MIN_LOSS))
            for p in row.points
            if p.loss is not None
        )
        if points:
            mean = statistics.fmean(math.log(loss) for _, loss in points)
            lines.append((mean, printable(row.group), points))
    if not measured or not lines:
        return None
    lines.sort(key=lambda line: -line[0])
    series = [
        PlotSeries(group[-32:], points, CYCLE[number], MARKERS[number])
        if number < MAX_NAMED_GROUPS
        else PlotSeries(group, points, "pale", in_legend=False)
        for number, (_, group, points) in enumerate(lines)
    ]
    highest = max(loss for line in lines for _, loss in line[2])
    lowest = min(loss for line in lines for _, loss in line[2])
    bottom = max(MIN_LOSS, highest * MIN_LOSS_SHARE, lowest) / 2
    return Chart(
        "sensitivity",
        "Loss of the outputs when each channel group alone is reduced; the most sensitive groups "
        "are named",
        Axis(f"channels kept of one group (%), before the cut of round {measured.round}",
             limits=(0.0, 100.0)),
        Axis("loss of the outputs", log=True, limits=(bottom, 2 * highest)),
        (*series[MAX_NAMED_GROUPS:], *reversed(series[:MAX_NAMED_GROUPS])),
        summary="Most sensitive: " + ", ".join(group for _, group, _ in lines[:MAX_NAMED_GROUPS]),
        section="channels",
    )  # fmt: skip


def gamma_chart(history: History) -> Chart | None:
    """Return the chart of the histograms of γ of the base and of the slim model."""
    series, words, slim = [], [], history.slim_round
    for name, number in (
        ("base", 0),
        ("recommended" if history.recommended else f"round {slim}", slim),
    ):
        evaluation = history.evaluations.get(-1 if number is None else number)
        gamma = evaluation.gamma if evaluation else None
        if not gamma or not gamma.bins or (name != "base" and number == 0):
            continue
        width = gamma.max / len(gamma.bins)
        points = [(place * width, float(count)) for place, count in enumerate(gamma.bins)]
        end = (gamma.max, 0.0)
        style = ("pale", "-", True) if name == "base" else ("blue", "-", False)
        series.append(
            PlotSeries(f"{name}: {gamma.count:,}", (*points, end), style[0], dash="-",
                   filled=style[2], steps=True)
        )  # fmt: skip
        words.append(f"{name}: {gamma.count:,} values up to {gamma.max:.3g}, {gamma.zeros:,} zero")
    if not series:
        return None
    return Chart(
        "gamma",
        f"Absolute values of γ of every BatchNorm, in the base and in {history.slim_name}",
        Axis("|γ|"),
        Axis("channels"),
        tuple(series),
        summary="; ".join(words),
        section="channels",
    )


def _cut(name: str) -> str:
    """Return the first letters of a name, for a legend."""
    return name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS - 1]}…"


def pareto_chart(histories: Sequence[History], cost: str) -> Chart | None:
    """Return the chart of accuracy by ``cost``, with a line per run and the Pareto front."""
    lines = []
    for number, history in enumerate(histories, start=1):
        points = [
            (entry, (x, 100 * entry.valid_acc))
            for entry in history.rounds
            if (x := compared_cost(history, entry, cost)) is not None
        ]
        lines.append((number, history, points))
    all_points = [point for _, _, points in lines for _, point in points]
    if not all_points:
        return None
    series = []
    for number, history, points in lines:
        if not points:
            continue
        chosen = history.best or history.rounds[-1]
        series.append(
            PlotSeries(
                f"{number} {_cut(history.name)}",
                tuple(point for _, point in points),
                CYCLE[(number - 1) % len(CYCLE)],
                MARKERS[(number - 1) % len(MARKERS)],
                names=tuple(str(number) if e is chosen else "" for e, _ in points),
                in_legend=len(histories) <= MAX_NAMED_RUNS,
            )
        )
    score, axis = common_score_name(histories), COMPARED_AXES[cost]
    title = f"{_capital(score)} of all rounds of all runs against {axis.label}"
    summary, with_front = "runs with different metrics", ""
    if len(compared_metrics(histories)) == 1:
        front = tuple(dict.fromkeys(all_points[index] for index in pareto_front(all_points)))
        series.append(PlotSeries("Pareto front", front, "black", "ring", ":", filled=False))
        points_text = "; ".join(f"{axis.text(x)}, {y:.2f}%" for x, y in front[:20])
        summary, with_front = f"Pareto front: {points_text}", ", with the Pareto front"
    return Chart(
        f"pareto-{cost}", f"{title}{with_front}", axis, _score_axis(score), tuple(series),
        summary=summary,
    )  # fmt: skip


def _score_axis(name: str) -> Axis:
    return Axis(f"validation {name} (%)")


def _capital(name: str) -> str:
    """Return the name of a metric at the start of a sentence; only ``accuracy`` is a word."""
    return name.capitalize() if name == "accuracy" else name


def _by_round(history: History, value: Callable[..., float]) -> tuple[tuple[float, float], ...]:
    """Return (step, value) of each epoch, interrupted where a round begins."""
    points: list[tuple[float, float]] = []
    previous = None
    for epoch in history.epochs:
        if previous is not None and epoch.round != previous:
            points.append((points[-1][0], math.nan))
        previous = epoch.round
        points.append((epoch.step, value(epoch)))
    return tuple(points)


def _round_marks(history: History) -> tuple[tuple[float, str], ...]:
    """Return the end of each round, with its name."""
    return tuple((entry.step, entry.name) for entry in history.rounds)


RUN_FIGURES: tuple[Callable[[History], Chart | None], ...] = (
    *(partial(accuracy_chart, cost=cost) for cost in COSTS),
    *(partial(training_chart, metric=metric) for metric in ("acc", "loss")),
    throughput_chart,
    channels_chart,
    sensitivity_chart,
    gamma_chart,
)
COMPARISON_FIGURES: tuple[Callable[[Sequence[History]], Chart | None], ...] = tuple(
    partial(pareto_chart, cost=cost) for cost in COSTS
)
