"""Comparison of runs: accuracy against parameters, multiply-adds and bytes."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from itertools import product
from typing import TYPE_CHECKING, TypedDict

from job.artifacts.accuracy import score_name
from job.artifacts.json_records import to_json
from job.errors import shown
from job.report.configuration import differing_options
from job.training.epoch import ACCURACY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.artifacts.history import History
    from job.artifacts.records import RoundRecord
    from job.files import JsonObject

COSTS = ("params", "macs", "bytes", "latency")  # what accuracy is compared against


def common_metric(histories: Sequence[History]) -> str:
    """Return the name of the metric of all runs, or ``score`` if they have several."""
    metrics = {history.metric for history in histories if history.rounds or history.epochs}
    return metrics.pop() if len(metrics) == 1 else "score" if metrics else ACCURACY


def common_score_name(histories: Sequence[History]) -> str:
    """Return the name in sentences of the metric of all runs, or ``score``."""
    return score_name(common_metric(histories))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto-optimal (cost, accuracy) pairs, by rising cost.

    If several pairs are equal, all of them are included.
    """
    front: list[int] = []
    best = (math.inf, -math.inf)
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best[1] or points[index] == best:
            front.append(index)
            best = points[index]
    return front


def compared_cost(history: History, entry: RoundRecord, cost: str) -> float | None:
    """Return the cost by which models of several runs are compared; None if it is not known.

    A latency is divided by that of the run's own base, which was timed next to it: runs are timed
    at different moments, and the time of the same network differs between them.
    """
    return history.share(entry, cost) if cost == "latency" else history.cost(entry, cost)


def comparison_notes(histories: Sequence[History]) -> list[str]:
    """Return how several runs are compared where that is not obvious."""
    return [note for note in (_latency_note(histories), _metrics_note(histories)) if note]


def _latency_note(histories: Sequence[History]) -> str | None:
    """Return how the latencies of several runs are compared; None if none was measured."""
    if not any(history.latencies for history in histories):
        return None
    return (
        "latencies are compared as shares of each run's own base, because the runs were timed at "
        "different moments"
    )


def compared_metrics(histories: Sequence[History]) -> list[str]:
    """Return the metrics of the runs that have rounds, each once."""
    return list(dict.fromkeys(history.metric for history in histories if history.rounds))


def _metrics_note(histories: Sequence[History]) -> str | None:
    """Return how runs with different metrics are compared; None if they have the same."""
    names = compared_metrics(histories)
    if len(names) < 2:
        return None
    return f"each metric ({', '.join(names)}) has a Pareto front of its own"


def pareto_models(histories: Sequence[History]) -> dict[str, list[tuple[int, int]]]:
    """Return the Pareto-optimal models of all runs by cost: (index of the run, round).

    Runs with different metrics have fronts of their own, one after the other.
    """
    fronts: dict[str, list[tuple[int, int]]] = {cost: [] for cost in COSTS}
    for cost, metric in product(COSTS, compared_metrics(histories)):
        models = [
            (index, entry.round, x, entry.valid_acc)
            for index, history in enumerate(histories)
            for entry in (history.rounds if history.metric == metric else ())
            if (x := compared_cost(history, entry, cost)) is not None
        ]
        front = pareto_front([(x, accuracy) for _, _, x, accuracy in models])
        fronts[cost] += [models[place][:2] for place in front]
    return fronts


def run_names(histories: Sequence[History]) -> list[str]:
    """Return the folder name of each run, or its whole path if several runs share the name."""
    count = Counter(history.name for history in histories)
    return [shown(h.path) if count[h.name] > 1 else h.name for h in histories]


def comparison_caution(histories: Sequence[History]) -> str | None:
    """Return a caution if the runs have different validation images, else None."""
    data = {
        (h.setting("dataset", "fingerprint"), h.setting("dataset", "validation"))
        for h in histories
        if h.setting("dataset", "fingerprint")
    }
    if len(data) < 2:
        return None
    return f"these runs were validated on {len(data)} different data sets"


class ParetoModel(TypedDict):
    """Pareto-optimal model: the path of its run, and its round."""

    path: str
    round: int


class MeasuredLatency(TypedDict, total=False):
    """Measured seconds of a batch, by round, e.g. ``rounds/01``; absent without measurements.

    ``latency_of_base`` has the fractions of the latency of the run's base.
    """

    latency: dict[str, float]
    latency_of_base: dict[str, float]


class RunJson(MeasuredLatency):
    """Run in a comparison. Accuracies are fractions, ``points_lost`` percentage points."""

    run: str
    path: str
    state: str
    exit_code: int | None
    position: dict[str, int]
    base: JsonObject | None
    rounds: list[JsonObject]
    recommended: str | None
    reason: str
    cautions: list[str]
    relative: dict[str, float | None]
    points_lost: float | None
    problems: list[str]


class ComparisonJson(TypedDict):
    """Comparison of runs; ``pareto`` is by cost, ``options`` has the values of each run.

    ``notes`` says how costs are compared.
    """

    format: int
    runs: list[RunJson]
    pareto: dict[str, list[ParetoModel]]
    options: dict[str, list[str]]
    notes: list[str]


def comparison_json(histories: Sequence[History]) -> ComparisonJson:
    """Return the comparison as ``report --json`` prints it."""
    names = run_names(histories)
    paths = [shown(history.path) for history in histories]
    fronts: dict[str, list[ParetoModel]] = {
        cost: [{"path": paths[index], "round": number} for index, number in models]
        for cost, models in pareto_models(histories).items()
    }
    runs = [_run_json(name, history) for name, history in zip(names, histories, strict=True)]
    options = {flag.removeprefix("--"): values for flag, values in differing_options(histories)}
    notes = comparison_notes(histories)
    return {"format": 1, "runs": runs, "pareto": fronts, "options": options, "notes": notes}


def comparison_csv(histories: Sequence[History]) -> str:
    """Return a line for each model of each run, with the options that differ between the runs.

    Accuracies are fractions, ``points`` percentage points above the base, ``latency`` seconds.
    ``pareto_latency`` compares ``latency_of_base``, the fraction of the latency of the run's base.
    """
    text, fronts = io.StringIO(), pareto_models(histories)
    options = differing_options(histories)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((
        "run", "path", "state", "round", "recommended", "width", "channels", *COSTS,
        f"valid_{common_metric(histories)}", "valid_loss", "points",
        *(f"pareto_{cost}" for cost in COSTS), "latency_of_base",
        *(flag.removeprefix("--") for flag, _ in options),
    ))  # fmt: skip
    for index, (name, history) in enumerate(zip(run_names(histories), histories, strict=True)):
        for entry in history.rounds:
            costs = [getattr(entry, cost) for cost in COSTS if cost != "latency"]
            writer.writerow((
                name, shown(history.path), history.state, entry.round,
                int(entry is history.best), entry.width, entry.channels, *costs,
                history.cost(entry, "latency"), entry.valid_acc, entry.valid_loss,
                history.points(entry), *(int((index, entry.round) in fronts[c]) for c in COSTS),
                history.share(entry, "latency"), *(values[index] for _, values in options),
            ))  # fmt: skip
    return text.getvalue()


def _run_json(name: str, history: History) -> RunJson:
    base, best = history.base, history.best
    seconds = {f"rounds/{n:02d}": latency.seconds for n, latency in history.latencies.items()}
    shares = {
        f"rounds/{entry.round:02d}": share
        for entry in history.rounds
        if (share := history.share(entry, "latency")) is not None
    }
    measured: MeasuredLatency = {"latency": seconds, "latency_of_base": shares} if seconds else {}
    position = zip(("round", "epoch", "step"), history.position or (), strict=False)
    return {
        "run": name,
        "path": shown(history.path),
        "state": history.state,
        "exit_code": history.exit_code,
        "position": dict(position),
        "base": to_json(base, everything=True) if base else None,
        "rounds": [to_json(entry, everything=True) for entry in history.rounds if entry.round],
        "recommended": f"rounds/{best.round:02d}" if best else None,
        "reason": history.reason,
        "cautions": list(history.cautions),
        "relative": _shares(history, best) if best else {},
        "points_lost": None if history.change is None else 0.0 - history.change,
        **measured,
        "problems": list(history.problems),
    }


def _shares(history: History, entry: RoundRecord) -> dict[str, float | None]:
    """Return the costs of ``entry`` as fractions of the base's; the latency where measured."""
    shares = {cost: history.share(entry, cost) for cost in COSTS}
    return {k: v for k, v in shares.items() if k != "latency" or v is not None}
