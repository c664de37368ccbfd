"""Tables and lines about a run, for the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.artifacts.accuracy import signed_points
from job.artifacts.records import PlannedRound, RoundRecord
from job.artifacts.stored_places import place_of
from job.console import table
from job.errors import printable
from job.report.comparison import (
    COSTS,
    common_metric,
    comparison_caution,
    comparison_notes,
    run_names,
)
from job.report.configuration import differing_options
from job.report.latency import latency_cautions, milliseconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.artifacts.history import History
    from job.slimming.planning.cost import LayerCost
    from job.training.epoch import EpochResult


def epoch_line(width: float, epoch: EpochResult) -> str:
    """Return the line of an epoch, in the homework's format."""
    trained = "" if epoch.train_acc is None else f", {epoch.metric} {epoch.train_acc:6.4f}"
    return (
        f"rate {width:6.4f} epoch {epoch.epoch:>3d}: "
        f"train loss: {epoch.train_loss:6.4f}{trained} "
        f"valid loss: {epoch.valid_loss:6.4f}, {epoch.metric} {epoch.valid_acc:6.4f}"
    )


def describe_position(round_index: int, epoch: int, step: int) -> str:
    """Describe a position of a run in words; epochs count from 0, as in the line of an epoch."""
    name = f"round {round_index}" if round_index else "the base (round 0)"
    return f"{name}, epoch {epoch}, step {step}"


def rounds_table(rounds: Sequence[PlannedRound]) -> str:
    """Return a table with a row per round: width and costs and, after training, accuracies."""
    trained = [entry for entry in rounds if isinstance(entry, RoundRecord)]
    recovered = any(entry.valid_acc_recovered is not None for entry in trained)
    timed = any(entry.latency is not None for entry in trained)
    metric = next((entry.metric for entry in trained), "")
    scores = (f"{metric} after cut", *(("recovered",) if recovered else ()), f"{metric} tuned")
    header = (
        "round", "width", "channels", "params", "MACs", "bytes",
        *(("latency", "speed-up") if timed else ()), *(scores if trained else ()),
    )  # fmt: skip
    return table(
        header,
        [
            (*_costs(entry), *(_latency(entry) if timed else ()), *_scores(entry, recovered))
            for entry in rounds
        ],
    )


def _latency(entry: PlannedRound) -> tuple[str, str]:
    """Return the latency of a round, in milliseconds, and its speed-up; "" where not measured."""
    latency = getattr(entry, "latency", None)
    gain = getattr(entry, "speedup", None)
    return "" if latency is None else milliseconds(latency), "" if gain is None else f"{gain:.2f}x"


def _costs(entry: PlannedRound) -> tuple[str, ...]:
    counts = (entry.channels, entry.params, entry.macs, entry.bytes)
    return entry.name, f"{entry.width:.4f}", *(f"{count:,}" for count in counts)


def _scores(entry: PlannedRound, recovered: bool) -> tuple[str, ...]:
    if not isinstance(entry, RoundRecord):
        return ()
    before = (entry.valid_acc_pruned, *((entry.valid_acc_recovered,) if recovered else ()))
    texts = ("" if accuracy is None else f"{accuracy:.4f}" for accuracy in before)
    return *texts, f"{entry.valid_acc:.4f}"


def run_overview(history: History) -> str:
    """Return the state of a run, the table of its rounds, and the recommended model."""
    lines = [f"{history.name}: {printable(describe_state(history))}"]
    if history.rounds:
        lines += ["", rounds_table(history.rounds)]
    else:
        lines.append("no round is finished yet")
    if history.best:
        lines += ["", f"recommended: rounds/{history.best.round:02d} ({printable(history.reason)})"]
    lines += [f"caution: {printable(caution)}" for caution in cautions_of(history)]
    if history.state == "died":
        advice = "its process was killed or its machine was lost: run the same command to resume"
        lines += ["", advice]
    return "\n".join(lines)


def cautions_of(history: History) -> list[str]:
    """Return the cautions of a run, and those about its latencies."""
    return [*history.cautions, *latency_cautions(history.rounds, place_of(history.path))]


def comparison_table(histories: Sequence[History]) -> str:
    """Return a table with a row per run: costs and accuracies of its recommended model."""
    timed = any(history.latencies for history in histories)
    costs = [cost for cost in COSTS if cost != "latency" or timed]
    heads = ("params", "MACs", "bytes", *(("latency",) if timed else ()))
    header = ("run", "state", "width", *heads, "base", common_metric(histories), "points")
    rows = []
    for name, history in zip(run_names(histories), histories, strict=True):
        base, best = history.base, history.best
        cells = [_cost_text(history, best, cost) if best else "" for cost in costs]
        width = f"{best.width:.4f}" if best else ""
        scores = [f"{entry.valid_acc:.4f}" if entry else "" for entry in (base, best)]
        points = format_points(history.change)
        rows.append((name, printable(history.state), width, *cells, *scores, points))
    parts, caution = [table(header, rows, left=2)], comparison_caution(histories)
    if options := differing_options(histories):
        names = run_names(histories)
        lines = [(name, *(v[i] for _, v in options)) for i, name in enumerate(names)]
        parts.append(table(("run", *(flag for flag, _ in options)), lines))
    notes = [f"caution: {caution}" if caution else None, *comparison_notes(histories)]
    parts += [note for note in notes if note]
    return "\n\n".join(parts)


def _cost_text(history: History, entry: RoundRecord, cost: str) -> str:
    """Return a cost, with a latency's share of the latency of the run's base."""
    value, share = history.cost(entry, cost), history.share(entry, cost)
    if value is None:
        return ""
    if cost != "latency":
        return f"{value:,.0f}"
    return f"{1000 * value:.3g} ms" + ("" if share is None else f" ({share:.1%})")


def describe_state(history: History) -> str:
    """Describe the state, the exit code, and the position of an unfinished run."""
    code, state = history.exit_code, history.state
    text = state + (f" (exit code {code})" if code else "")
    if history.position and state not in ("finished", "unknown"):
        text += f", in {describe_position(*history.position)}"
    return text


def format_points(change: float | None) -> str:
    """Return a change of accuracy with its sign; "" for None."""
    return "" if change is None else signed_points(change)


def layers_table(layers: Sequence[LayerCost]) -> str:
    """Return a table with a row per layer: its channels and costs."""
    header = ("layer", "kind", "in", "out", "params", "MACs")
    return table(
        header,
        [
            (row.name, row.kind, *(f"{n:,}" for n in (row.channels_in, row.channels_out)),
             f"{row.params:,}", f"{row.macs:,}")
            for row in layers
        ],
        left=2,
    )  # fmt: skip
