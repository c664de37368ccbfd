"""Console output of the status of runs: lines for one run, a table for several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.artifacts.accuracy import accuracy_change, score_name, signed_points
from job.console import span, table
from job.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from job.artifacts.run_status import RunStatus

STATES = {
    "running": "alive: last heartbeat {} ago",
    "died": "dead: last heartbeat {} ago",
    "stopped": "stopped by request {} ago",
    "finished": "finished {} ago",
    "failed": "failed {} ago",
}


def status_text(statuses: Sequence[RunStatus]) -> str:
    """Return lines about one run, or a table of several and the commands to resume them."""
    return _one(statuses[0]) if len(statuses) == 1 else _several(statuses)


def _one(status: RunStatus) -> str:
    rows = [
        ("run", status.path),
        ("state", _state(status)),
        ("job", _job(status)),
        ("position", _position(status)),
        ("best so far", _best(status)),
        ("speed", _speed(status)),
        ("last saved", _ago(status.saved_age)),
        ("time left", _left(status)),
        ("last error", printable(status.error) if status.error else ""),
        *(("caution", printable(problem)) for problem in status.problems),
        *(("next", line) for line in status.next),
    ]
    return _aligned((name, text) for name, text in rows if text)


def _several(statuses: Sequence[RunStatus]) -> str:
    header = ("run", "state", "since", "round", "epoch", "best", "params", "saved", "left")
    rows = [
        (
            status.path,
            printable(status.state) + (f" ({status.exit_code})" if status.exit_code else ""),
            _ago(status.age),
            _of(status.round, status.rounds),
            "" if status.epochs == 0 else _of(_counted_from_one(status.epoch), status.epochs),
            "" if status.best_acc is None else f"{status.best_acc:.4f}",
            "" if status.params is None else f"{status.params:.1%}",
            _ago(status.saved_age),
            "" if status.seconds_left is None else span(status.seconds_left),
        )
        for status in statuses
    ]
    parts = [table(header, rows, left=2)]
    errors = [f"{s.path}: {printable(s.error)}" for s in statuses if s.error]
    parts += ["\n".join(errors)] if errors else []
    again = [line for s in statuses if s.state in ("died", "failed", "stopped") for line in s.next]
    parts += ["to resume:\n" + "\n".join(f"  {line}" for line in again)] if again else []
    return "\n\n".join(parts)


def _state(status: RunStatus) -> str:
    code = f" (exit code {status.exit_code})" if status.exit_code else ""
    form = STATES.get(status.state)
    if form is None or status.age is None:
        return printable(status.state) + code
    detail = form.format(_span(status.age))
    return (f"{status.state}, {detail}" if status.state in ("running", "died") else detail) + code


def _job(status: RunStatus) -> str:
    if status.host is None or status.state not in ("running", "died"):
        return ""
    return f"process {status.pid} on {status.host}"


def _position(status: RunStatus) -> str:
    if status.round is None or status.state == "finished":
        return ""
    name = "the base" if status.round == 0 else f"round {_of(status.round, status.rounds)}"
    if status.epochs == 0:  # a base that is given is not trained
        return name
    epoch = _of(_counted_from_one(status.epoch), status.epochs)
    return f"{name}, epoch {epoch}, step {status.step}"


def _best(status: RunStatus) -> str:
    if status.best_acc is None:
        return ""
    text = f"{score_name(status.metric)} {status.best_acc:.4f}"
    if status.recommended and status.params is not None:
        text = f"{status.recommended}, {text}, {status.params:.1%} of the parameters"
    if status.base_acc is not None and status.recommended not in (None, "rounds/00"):
        points = signed_points(accuracy_change(status.best_acc, status.base_acc))
        text += f", {points} points relative to the base"
    return text


def _speed(status: RunStatus) -> str:
    speed = status.images_per_second
    return f"{speed:,.0f} images/s" if speed is not None and status.alive else ""


def _left(status: RunStatus) -> str:
    if status.seconds_left is None:
        return ""
    scope = " in this round" if status.rounds is None else ""
    return f"about {span(status.seconds_left)}{scope}" + ("" if status.alive else ", once resumed")


def _counted_from_one(epoch: int | None) -> int | None:
    return None if epoch is None else epoch + 1


def _of(number: int | None, count: int | None) -> str:
    if number is None:
        return ""
    return str(number) if count is None else f"{number} of {count}"


def _ago(seconds: float | None) -> str:
    return "" if seconds is None else f"{_span(seconds)} ago"


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 55 else span(seconds)


def _aligned(rows: Iterable[tuple[str, str]]) -> str:
    lines = list(rows)
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)
