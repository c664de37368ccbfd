"""Figures of one run and of several runs. To add a figure, add an entry to a table below."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from job.errors import printable
from job.report.comparison import COSTS, pareto_front
from job.report.drawing import (
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    MARKERS,
    VERMILLION,
    DrawnFigure,
    FigureSpec,
    draw_figures,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from job.artifacts.history import History

NAMED_RUNS = 10  # most runs that a legend names; more runs are only numbered
MAX_LABELS = 48  # most labels that remain readable
NAMED_GROUPS = 5  # channel groups that a legend names
MIN_LOSS = 1e-9  # smaller losses are noise
SHOWN_LOSSES = 1e-6  # of the highest: the range of the axis
ACCURACY = "validation accuracy (%)"
RING: dict[str, Any] = {"marker": "o", "markersize": 12, "fillstyle": "none"}


@dataclass(frozen=True)
class CostAxis:
    """Label of a cost axis, and the unit of its ticks."""

    words: str
    unit: str = ""


COST_AXES = {
    "params": CostAxis("parameters"),
    "macs": CostAxis("multiply-adds for one image (MACs)"),
    "bytes": CostAxis("size of all tensors", "B"),
}


def draw_run(history: History) -> list[DrawnFigure]:
    """Draw the figures of a run; raises GammaslimError when matplotlib cannot be imported."""
    return draw_figures(RUN_FIGURES, history)


def draw_comparison(histories: Sequence[History]) -> list[DrawnFigure]:
    """Draw the figures of several runs; raises GammaslimError as `draw_run` does."""
    return draw_figures(COMPARISON_FIGURES, histories)


def draw_accuracy(axes: Axes, history: History, cost: str) -> None:
    """Draw the accuracy of each round, after surgery and after fine-tuning, against ``cost``."""
    rounds, best = history.rounds, history.best
    costs = [getattr(entry, cost) for entry in rounds]
    pairs = zip(costs, rounds, strict=True)
    pruned = [(x, entry) for x, entry in pairs if entry.valid_acc_pruned is not None]
    if pruned:
        style: dict[str, Any] = {"linestyle": "--", "marker": "s", "fillstyle": "none"}
        scores = [100 * (entry.valid_acc_pruned or 0) for _, entry in pruned]
        axes.plot([x for x, _ in pruned], scores, label="after surgery", color=VERMILLION, **style)
    recovered = [(x, e) for x, e in zip(costs, rounds, strict=True) if e.valid_acc_recovered]
    if recovered:
        scores = [100 * (entry.valid_acc_recovered or 0) for _, entry in recovered]
        style = {"linestyle": "-.", "marker": "^", "fillstyle": "none"}
        axes.plot([x for x, _ in recovered], scores, label="after recovery", color=GREEN, **style)
    tuned = [100 * entry.valid_acc for entry in rounds]
    axes.plot(costs, tuned, marker="o", color=BLUE, label="after fine-tuning")
    if history.base:
        axes.axhline(100 * history.base.valid_acc, color=GREY, linestyle=":", label="base")
    if best:
        point = [getattr(best, cost)], [100 * best.valid_acc]
        axes.plot(*point, color=BLACK, label="recommended", linestyle="none", **RING)
    for x, y, entry in list(zip(costs, tuned, rounds, strict=True))[:MAX_LABELS]:
        _label_point(axes, x, y, entry.name)
    _label_cost(axes, cost)
    axes.set_ylabel(ACCURACY)
    axes.legend()


def draw_curves(axes: Axes, history: History, metric: str) -> None:
    """Draw the accuracy (``acc``) or ``loss`` of each epoch over the steps, and mark the rounds."""
    steps: list[int] = []
    curves: dict[str, list[float]] = {"train": [], "valid": []}
    previous, factor = None, 100 if metric == "acc" else 1
    for epoch in history.epochs:
        if previous is not None and epoch.round != previous:  # a cut: the line is interrupted
            steps.append(steps[-1])
            for curve in curves.values():
                curve.append(float("nan"))
        previous = epoch.round
        steps.append(epoch.step)
        for split, curve in curves.items():
            curve.append(factor * getattr(epoch, f"{split}_{metric}"))
    marker = "." if len(steps) <= 200 else ""
    for split, label, color, dash in (
        ("train", "training", VERMILLION, "--"),
        ("valid", "validation", BLUE, "-"),
    ):
        axes.plot(steps, curves[split], color=color, linestyle=dash, label=label, marker=marker)
    _mark_rounds(axes, history)
    axes.set_xlabel("steps (batches) since the run began")
    axes.set_ylabel("accuracy (%)" if metric == "acc" else "loss")
    axes.legend(loc="lower right" if metric == "acc" else "upper right")


def draw_widths(axes: Axes, history: History) -> None:
    """Draw the kept channels of each layer over the channels of the base."""
    layers = history.layers
    edges = [number - 0.5 for number in range(len(layers) + 1)]
    axes.stairs([la.full for la in layers], edges, fill=True, color="#cccccc", label="base")
    axes.stairs([la.kept for la in layers], edges, fill=True, color=BLUE, label="kept")
    every = 1 + (len(layers) - 1) // MAX_LABELS
    ticks = range(0, len(layers), every)
    names = [printable(layers[tick].name)[-24:] for tick in ticks]
    axes.set_xticks(list(ticks), names, rotation=90, fontsize=7, parse_math=False)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("layer")
    axes.set_ylabel("output channels")
    axes.legend(loc="upper left")


def draw_sensitivity(axes: Axes, history: History) -> None:
    """Draw the loss of the outputs against the kept channels: a line per group, the worst named."""
    measured = history.measured
    assert measured
    lines = []
    for row in measured.sensitivity.rows:
        points = [(p.channels, p.loss) for p in row.points if p.loss is not None]
        shares = [channels / max(1, row.channels) for channels, _ in points]
        losses = [max(loss, MIN_LOSS) for _, loss in points]
        if losses:
            lines.append((statistics.fmean(map(math.log, losses)), row.group, shares, losses))
    lines.sort(key=lambda line: -line[0])
    for number, (_, group, shares, losses) in reversed([*enumerate(lines)]):
        style: dict[str, Any] = {"color": "#bbbbbb", "linewidth": 0.8}
        if number < NAMED_GROUPS:
            style = {"color": COLOURS[number], "marker": MARKERS[number], "label": group[-32:]}
        axes.plot([100 * share for share in shares], losses, **style)
    highest = max((max(losses) for *_, losses in lines), default=MIN_LOSS)
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(MIN_LOSS, highest * SHOWN_LOSSES) / 2)
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"channels kept of one group (%), before the cut of round {measured.round}")
    axes.set_ylabel("loss of the outputs")
    handles = [line for line in reversed(axes.get_lines()) if line.get_marker() != "None"]
    legend = axes.legend(handles=handles, loc="lower left", title="the most sensitive groups")
    for text in legend.get_texts():
        text.set_parse_math(False)


def draw_pareto(axes: Axes, histories: Sequence[History], cost: str) -> None:
    """Draw accuracy against ``cost``: a line per run, and the Pareto front."""
    for number, history in enumerate(histories, start=1):
        if not history.rounds:
            continue
        color, marker = COLOURS[(number - 1) % len(COLOURS)], MARKERS[(number - 1) % len(MARKERS)]
        costs = [getattr(entry, cost) for entry in history.rounds]
        scores = [100 * entry.valid_acc for entry in history.rounds]
        name = f"{number} {history.name[:24]}"
        axes.plot(costs, scores, linewidth=1, label=name, color=color, marker=marker)
        chosen = history.best or history.rounds[-1]
        _label_point(axes, getattr(chosen, cost), 100 * chosen.valid_acc, str(number))
    points = [
        (getattr(entry, cost), 100 * entry.valid_acc) for h in histories for entry in h.rounds
    ]
    front = [points[index] for index in pareto_front(points)]
    steps: dict[str, Any] = {"linewidth": 1, "linestyle": ":", "drawstyle": "steps-post"}
    xs, ys = [x for x, _ in front], [y for _, y in front]
    axes.plot(xs, ys, label="Pareto front", color=BLACK, zorder=1, **RING, **steps)
    _label_cost(axes, cost)
    axes.set_ylabel(ACCURACY)
    lines = axes.get_lines()
    legend = axes.legend(handles=lines if len(histories) <= NAMED_RUNS else lines[-1:])
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name can hold dollars


def _has_losses(history: History) -> bool:
    rows = history.measured.sensitivity.rows if history.measured else ()
    return any(point.loss is not None for row in rows for point in row.points)


def _label_cost(axes: Axes, cost: str) -> None:
    """Label the x axis with a cost, its ticks with prefixes: 1.5 M."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(COST_AXES[cost].unit))
    axes.set_xlabel(COST_AXES[cost].words)


def _label_point(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(
        text, (x, y), (4, 4), textcoords="offset points", fontsize=8, parse_math=False,
        annotation_clip=True,
    )  # fmt: skip


def _mark_rounds(axes: Axes, history: History) -> None:
    """Draw a line at the end of each round, with its number above."""
    ends = [(entry.step, entry.name) for entry in history.rounds]
    for step, _ in ends:
        axes.axvline(step, color=GREY, linewidth=0.7, zorder=0)
    for step, text in ends[:: 1 + len(ends) // MAX_LABELS]:
        axes.annotate(
            text, (step, 1), (0, 3), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", fontsize=8,
        )  # fmt: skip


RUN_FIGURES: tuple[FigureSpec[History], ...] = (
    *(
        FigureSpec(
            name=f"accuracy-{cost}",
            caption=f"Accuracy of the base and of each round against {COST_AXES[cost].words}",
            draw=partial(draw_accuracy, cost=cost),
            applies=lambda history: bool(history.rounds),
        )
        for cost in COSTS
    ),
    *(
        FigureSpec(
            name=f"training-{name}",
            caption=f"Training and validation {name} of each epoch",
            draw=partial(draw_curves, metric=metric),
            applies=lambda history: bool(history.epochs),
        )
        for metric, name in (("acc", "accuracy"), ("loss", "loss"))
    ),
    FigureSpec(
        name="channels",
        caption="Output channels of each layer of the recommended model, and of the base",
        draw=draw_widths,
        applies=lambda history: bool(history.layers),
        bottom=0.3,
    ),
    FigureSpec(
        name="sensitivity",
        caption="Loss of the outputs when each channel group alone is reduced; the groups that "
        "lose most are named",
        draw=draw_sensitivity,
        applies=_has_losses,
    ),
)

COMPARISON_FIGURES: tuple[FigureSpec[Sequence[History]], ...] = tuple(
    FigureSpec(
        name=f"pareto-{cost}",
        caption=f"Accuracy of all rounds of all runs against {COST_AXES[cost].words}, "
        "with the Pareto front",
        draw=partial(draw_pareto, cost=cost),
        applies=lambda histories: any(history.rounds for history in histories),
    )
    for cost in COSTS
)
