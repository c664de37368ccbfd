"""The report's figures, drawn by matplotlib without a display: the same run, the same bytes.

matplotlib is imported when something is drawn, not before, and takes neither the user's style nor a
home folder that can be written.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.artifacts.history import COSTS, History, Round, pareto
from job.errors import GammaslimError, printable, reason

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Okabe & Ito 2008: colours that the colour-blind tell apart; shapes and dashes differ too
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#999999"
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
STYLE = {
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "grid.color": "#dddddd", "grid.linewidth": 0.6, "font.size": 10,
    "legend.fontsize": 9, "legend.framealpha": 0.8, "lines.linewidth": 1.6, "lines.markersize": 5,
    "axes.formatter.useoffset": False,
}  # fmt: skip
SIZE, DPI = (6.4, 4.0), 100  # inches, dots an inch
NAMED = 10  # runs that a legend names; of more there are only the numbers
LABELS = 48  # ticks and marks that still can be read
UNITS = {
    "params": ("parameters", "parameters"),
    "macs": ("multiply-adds an image (MACs)", "multiply-adds an image (MACs)"),
    "bytes": ("size of all tensors (bytes)", "size"),
}
ACCURACY = "validation accuracy (%)"


@dataclass(frozen=True)
class Picture:
    """A PNG, the name of its file without the ending, and what it shows in words."""

    name: str
    text: str
    png: bytes


def draw_run(history: History) -> list[Picture]:
    """The figures of one run that there is something to show in.

    Raises GammaslimError when matplotlib cannot be imported.
    """
    with _drawing() as figure:
        pictures = []
        if history.rounds:
            pictures += [_accuracy(figure, history, cost) for cost in COSTS]
        if history.epochs:
            pictures += [_curves(figure, history, what) for what in ("acc", "loss")]
        if history.layers:
            pictures.append(_layers(figure, history))
        return pictures


def draw_comparison(histories: Sequence[History]) -> list[Picture]:
    """The figures of several runs: accuracy against each cost; raises as ``draw_run`` does."""
    if not any(history.rounds for history in histories):
        return []
    with _drawing() as figure:
        return [_pareto(figure, histories, cost) for cost in COSTS]


@contextmanager
def _drawing() -> Iterator[Any]:
    """matplotlib's Figure, in our style whatever the user's is."""
    try:
        with _quietly():
            import matplotlib
            from matplotlib.backends import backend_agg  # noqa: F401  (savefig would import it)
            from matplotlib.figure import Figure
    except ImportError as error:
        raise GammaslimError(
            f"the figures need matplotlib, which cannot be imported: {reason(error)}"
        ) from error
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")  # of letters that its font has not
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield Figure


@contextmanager
def _quietly() -> Iterator[None]:
    """Let matplotlib be imported whatever MPLBACKEND says, and tell nothing of fonts and caches.

    Where neither MPLCONFIGDIR nor the home folder can be written it takes a temporary folder.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    before = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["MPLBACKEND"] = before


def _axes(figure: Any, bottom: float = 0.14) -> tuple[Any, Any]:
    """A new figure and its axes; fixed margins, since measuring them takes as long as drawing."""
    canvas = figure(figsize=SIZE, dpi=DPI)
    axes = canvas.subplots()
    axes.locator_params(nbins=6)  # a tick costs a millisecond
    canvas.subplots_adjust(left=0.12, right=0.97, top=0.93, bottom=bottom)
    return canvas, axes


def _picture(canvas: Any, name: str, text: str) -> Picture:
    content = io.BytesIO()
    canvas.savefig(content, format="png", metadata={"Software": None})
    return Picture(name, text, content.getvalue())


def _scale(cost: str, values: Sequence[float]) -> tuple[float, str]:
    """What to divide by for numbers of three digits or so, and the axis's label."""
    whole, short = UNITS[cost]
    prefixes = ((1e9, "billions of", "GB"), (1e6, "millions of", "MB"), (1e3, "thousands of", "kB"))
    for factor, word, unit in prefixes:
        if max(values, default=0) >= 2 * factor:
            return factor, f"{whole[:-8]} ({unit})" if cost == "bytes" else f"{word} {short}"
    return 1.0, whole


def _label(axes: Any, x: float, y: float, text: str) -> None:
    axes.annotate(
        text, (x, y), (4, 4), textcoords="offset points", fontsize=8, parse_math=False,
        annotation_clip=True,
    )  # fmt: skip


def _accuracy(figure: Any, history: History, cost: str) -> Picture:
    """Accuracy of each round, right after the cut and after fine-tuning, against ``cost``."""
    rounds, best = history.rounds, history.best
    factor, label = _scale(cost, [getattr(entry, cost) for entry in rounds])

    def place(entry: Round) -> float:
        return float(getattr(entry, cost) / factor)

    canvas, axes = _axes(figure)
    cut = [(place(e), e.valid_acc_pruned) for e in rounds if e.valid_acc_pruned is not None]
    if cut:
        xs, ys = zip(*((x, 100 * y) for x, y in cut), strict=True)
        style = {"linestyle": "--", "marker": "s", "fillstyle": "none", "color": VERMILLION}
        axes.plot(xs, ys, label="right after the cut", **style)
    tuned = [(place(entry), 100 * entry.valid_acc) for entry in rounds]
    xs, ys = zip(*tuned, strict=True)
    axes.plot(xs, ys, marker="o", color=BLUE, label="after fine-tuning")
    if history.base:
        base = 100 * history.base.valid_acc
        axes.axhline(base, color=GREY, linestyle=":", label="base")
    if best:
        ring = {"marker": "o", "markersize": 12, "fillstyle": "none", "linestyle": "none"}
        at = [place(best)], [100 * best.valid_acc]
        axes.plot(*at, color=BLACK, label="recommended", **ring)
    for entry, (x, y) in list(zip(rounds, tuned, strict=True))[:LABELS]:
        _label(axes, x, y, entry.name)
    axes.set_xlabel(label)
    axes.set_ylabel(ACCURACY)
    axes.legend()
    text = f"Accuracy of the base and of each round against {UNITS[cost][0]}"
    return _picture(canvas, f"accuracy-{cost}", text)


def _curves(figure: Any, history: History, what: str) -> Picture:
    """Accuracy (``acc``) or ``loss`` of each epoch over the steps, the rounds marked."""
    steps: list[float] = []
    values: dict[str, list[float]] = {"train": [], "valid": []}
    last, factor = None, 100 if what == "acc" else 1
    for epoch in history.epochs:
        if last is not None and epoch.round != last:  # a cut lies between
            steps.append(steps[-1])
            for line in values.values():
                line.append(float("nan"))
        last = epoch.round
        steps.append(epoch.step)
        for split, line in values.items():
            line.append(factor * getattr(epoch, f"{split}_{what}"))
    canvas, axes = _axes(figure)
    dots = {"marker": "."} if len(steps) <= 200 else {}
    for split, color, dash in (("train", VERMILLION, "--"), ("valid", BLUE, "-")):
        label = {"train": "training", "valid": "validation"}[split]
        axes.plot(steps, values[split], color=color, linestyle=dash, label=label, **dots)
    _mark_rounds(axes, history)
    axes.set_xlabel("steps (batches) since the run began")
    axes.set_ylabel("accuracy (%)" if what == "acc" else "loss")
    axes.legend(loc="lower right" if what == "acc" else "upper right")
    name = {"acc": "accuracy", "loss": "loss"}[what]
    return _picture(canvas, f"training-{name}", f"Training and validation {name} of each epoch")


def _mark_rounds(axes: Any, history: History) -> None:
    """A line at the end of each round, its number above."""
    ends = [(entry.step, entry.name) for entry in history.rounds]
    for step, _ in ends:
        axes.axvline(step, color=GREY, linewidth=0.7, zorder=0)
    for step, text in ends[:: 1 + len(ends) // LABELS]:
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(text, (step, 1), (0, 3), ha="center", fontsize=8, **where)


def _layers(figure: Any, history: History) -> Picture:
    """Channels kept of each layer beside those of the base."""
    layers = history.layers
    canvas, axes = _axes(figure, bottom=0.3)
    edges = [number - 0.5 for number in range(len(layers) + 1)]
    full, kept = [layer.full for layer in layers], [layer.kept for layer in layers]
    axes.stairs(full, edges, fill=True, color="#cccccc", label="base")
    axes.stairs(kept, edges, fill=True, color=BLUE, label="kept")
    every = 1 + (len(layers) - 1) // LABELS
    places = range(0, len(layers), every)
    names = [printable(layers[place].name)[-24:] for place in places]
    axes.set_xticks(list(places), names, rotation=90, fontsize=7, parse_math=False)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("layer")
    axes.set_ylabel("output channels")
    axes.legend(loc="upper left")
    text = "Output channels of each layer of the recommended model, and of the base"
    return _picture(canvas, "channels", text)


def _pareto(figure: Any, histories: Sequence[History], cost: str) -> Picture:
    """Accuracy against ``cost``: a line a run, and the front that no other model beats."""
    points = [(getattr(e, cost), e.valid_acc) for history in histories for e in history.rounds]
    factor, label = _scale(cost, [x for x, _ in points])
    canvas, axes = _axes(figure)
    for number, history in enumerate(histories, start=1):
        if not history.rounds:
            continue
        color, marker = COLOURS[(number - 1) % len(COLOURS)], MARKERS[(number - 1) % len(MARKERS)]
        name = f"{number} {history.name[:24]}"
        xs = [getattr(entry, cost) / factor for entry in history.rounds]
        ys = [100 * entry.valid_acc for entry in history.rounds]
        axes.plot(xs, ys, linewidth=1, label=name, color=color, marker=marker)
        chosen = history.best or history.rounds[-1]
        _label(axes, getattr(chosen, cost) / factor, 100 * chosen.valid_acc, str(number))
    front = [(points[place][0] / factor, 100 * points[place][1]) for place in pareto(points)]
    xs, ys = [x for x, _ in front], [y for _, y in front]
    ring = {"marker": "o", "markersize": 12, "fillstyle": "none"}
    steps = {"color": BLACK, "linewidth": 1, "linestyle": ":", "drawstyle": "steps-post"}
    axes.plot(xs, ys, label="Pareto front", zorder=1, **ring, **steps)
    axes.set_xlabel(label)
    axes.set_ylabel(ACCURACY)
    few = len(histories) <= NAMED
    lines = axes.get_lines()
    legend = axes.legend(handles=lines if few else lines[-1:])
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold dollars
    text = f"Accuracy of all rounds of all runs against {UNITS[cost][0]}, with the Pareto front"
    return _picture(canvas, f"pareto-{cost}", text)
