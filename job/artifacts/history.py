"""A run as its folder tells it, whatever became of it; reads what there is, needs no torch."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from job.artifacts.accuracy import change
from job.artifacts.lock import present_state
from job.errors import InputNotFound, reason, shown
from job.files import is_file, parse_toml, read_bytes, read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

T = TypeVar("T")
FILES = ("config.toml", "status.json", "metrics.jsonl", "summary.json")  # one of them makes a run
COSTS = ("params", "macs", "bytes")  # what accuracy is compared against
LARGEST = 10**18  # a number above it is none of a run's


@dataclass(frozen=True)
class Round:
    """The base (round 0) or a round: costs of its best model, accuracies as fractions, seconds."""

    round: int
    step: int
    width: float
    channels: int
    params: int
    macs: int
    bytes: int
    valid_acc: float
    valid_acc_pruned: float | None = None
    best_epoch: int | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        """Its number, or that it is the base."""
        return "base" if self.round == 0 else str(self.round)


@dataclass(frozen=True)
class Epoch:
    """An epoch's numbers; NaN where the loss was no number."""

    round: int
    epoch: int
    step: int
    train_loss: float
    train_acc: float
    valid_loss: float
    valid_acc: float


@dataclass(frozen=True)
class Layer:
    """Output channels of a layer: those that are left, and those of the base."""

    name: str
    kept: int
    full: int


@dataclass(frozen=True)
class History:
    """What a run's folder says. ``rounds`` begins with the base; ``time`` is in Unix seconds."""

    path: Path
    state: str = "unknown"
    exit_code: int | None = None
    time: float | None = None
    position: tuple[int, int, int] | None = None  # round, epoch, step
    rounds: tuple[Round, ...] = ()
    epochs: tuple[Epoch, ...] = ()
    recommended: int | None = None
    reason: str = ""
    cautions: tuple[str, ...] = ()
    seconds: float | None = None
    layers: tuple[Layer, ...] = ()  # of the recommended model
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder's name, fit for printing."""
        return shown(os.path.basename(os.path.abspath(self.path)))  # noqa: PTH100, PTH119

    @property
    def base(self) -> Round | None:
        """Round 0, once it is finished."""
        return next((entry for entry in self.rounds if entry.round == 0), None)

    @property
    def best(self) -> Round | None:
        """The recommended model's round."""
        return next((entry for entry in self.rounds if entry.round == self.recommended), None)

    def setting(self, table: str, key: str) -> Any:
        """A value of config.toml, or None."""
        return self.settings.get(table, {}).get(key)

    def points(self, entry: Round) -> float | None:
        """Change of validation accuracy from the base to ``entry``, below zero for a loss."""
        return change(entry.valid_acc, self.base.valid_acc) if self.base else None

    @property
    def change(self) -> float | None:
        """Points from the base to the recommended model."""
        return self.points(self.best) if self.best else None

    def share(self, entry: Round, cost: str) -> float | None:
        """``entry``'s cost as a fraction of the base's."""
        whole = getattr(self.base, cost, 0)
        return getattr(entry, cost) / whole if whole else None


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the (cost, accuracy) that none other beats in both, by rising cost."""
    found, best = [], -math.inf
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[place][1] > best:
            found.append(place)
            best = points[place][1]
    return found


def names(histories: Sequence[History]) -> list[str]:
    """What to call each run: its folder's name, or all of the path where several share it."""
    count = Counter(history.name for history in histories)
    return [shown(h.path) if count[h.name] > 1 else h.name for h in histories]


def fronts(histories: Sequence[History]) -> dict[str, list[tuple[int, int]]]:
    """For each cost the Pareto-optimal models of all runs: (place of the run, round)."""
    models = [(place, entry) for place, h in enumerate(histories) for entry in h.rounds]
    return {
        cost: [
            (models[found][0], models[found][1].round)
            for found in pareto([(getattr(e, cost), e.valid_acc) for _, e in models])
        ]
        for cost in COSTS
    }


def incomparable(histories: Sequence[History]) -> str | None:
    """A caution where accuracies are of different validation pictures."""
    data = {
        (h.setting("dataset", "fingerprint"), h.setting("dataset", "validation"))
        for h in histories
        if h.setting("dataset", "fingerprint")
    }
    if len(data) < 2:
        return None
    return f"these runs were validated on {len(data)} different data sets"


def read_run(path: Path) -> History:
    """The run in ``path``: running, stopped, failed, died or finished, with or without any round.

    What is damaged is left out and named in ``problems``. Raises InputNotFound, or StorageError
    when the storage does not answer.
    """
    if not path.exists():
        raise InputNotFound(f"{shown(path)} does not exist; report takes run folders")
    if not any(is_file(path / name) for name in FILES):
        raise InputNotFound(f"{shown(path)} is not a run folder: it has none of {', '.join(FILES)}")
    problems: list[str] = []
    status = _dict(_read(path / "status.json", read_json, problems))
    summary = _dict(_read(path / "summary.json", read_json, problems))
    settings = _dict(_read(path / "config.toml", _tables, problems))
    events = _read(path / "metrics.jsonl", lambda p: _events(p, problems), problems) or []
    rounds = _rounds(events, summary, problems)
    recommended = _recommended(summary, rounds)
    return History(
        path=path,
        state=present_state(path, str(status.get("state", "unknown"))),
        exit_code=_number(status.get("exit_code")),
        time=_number(status.get("time")),
        position=_position(status),
        rounds=rounds,
        epochs=_epochs(events),
        recommended=recommended,
        reason=str(summary.get("reason", "")),
        cautions=_texts(summary.get("cautions")),
        seconds=_number(summary.get("seconds")),
        layers=() if recommended is None else _layers(path, recommended, problems),
        settings={k: v for k, v in settings.items() if isinstance(v, dict)},
        problems=tuple(problems),
    )


def _position(status: dict[str, Any]) -> tuple[int, int, int] | None:
    numbers = tuple(status.get(key) for key in ("round", "epoch", "step"))
    return numbers if all(map(_is_count, numbers)) else None  # type: ignore[return-value]


def _read(path: Path, read: Callable[[Path], T], problems: list[str]) -> T | None:
    """What ``read`` makes of a file; None when it is missing, or damaged, which is a problem."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{shown(path)} cannot be read: {reason(error)}")
        return None


def _tables(path: Path) -> dict[str, Any]:
    return parse_toml(read_bytes(path).decode())


def _events(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The whole lines; the last one is being written, or was torn by a power failure."""
    *lines, _torn = read_bytes(path).split(b"\n")
    events, damaged = [], []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line.decode())
        except (ValueError, RecursionError):
            event = None
        if isinstance(event, dict):
            events.append(event)
        else:
            damaged.append(number)
    if damaged:
        first, more = damaged[0], len(damaged) - 1
        others = f" and {more} more are" if more else " is"
        problems.append(f"{shown(path)}: line {first}{others} damaged")
    return events


def _rounds(
    events: list[dict[str, Any]], summary: dict[str, Any], problems: list[str]
) -> tuple[Round, ...]:
    """The summary's rounds, and those that only their line in metrics.jsonl tells of."""
    told = summary.get("rounds", [])
    entries = [event for event in events if event.get("event") == "round"]
    entries += [summary[key] for key in ("base",) if key in summary]
    entries += told if isinstance(told, list) else [told]
    found = {}
    for entry in entries:
        parsed = _parsed(Round, entry)
        if parsed and math.isfinite(parsed.width + parsed.valid_acc):
            found[parsed.round] = parsed
        else:
            problems.append("a round without its numbers is left out")
    return tuple(found[number] for number in sorted(found))


def _epochs(events: list[dict[str, Any]]) -> tuple[Epoch, ...]:
    """By round and epoch; of one that was repeated after an interruption the last."""
    parsed = (_parsed(Epoch, event) for event in events if event.get("event") == "epoch")
    found = {(epoch.round, epoch.epoch): epoch for epoch in parsed if epoch}
    return tuple(found[key] for key in sorted(found))


def _recommended(summary: dict[str, Any], rounds: tuple[Round, ...]) -> int | None:
    chosen = str(summary.get("recommended", ""))
    return next((e.round for e in rounds if chosen == f"rounds/{e.round:02d}"), None)


def _layers(run: Path, round_: int, problems: list[str]) -> tuple[Layer, ...]:
    """The layers of a round's model, in the network's order."""
    card = _dict(_read(run / "rounds" / f"{round_:02d}" / "model.json", read_json, problems))
    widths = _dict(card.get("widths"))
    full = _dict(_dict(card.get("base")).get("widths")) or widths
    return tuple(
        Layer(name, kept, full[name])
        for name, kept in widths.items()
        if _is_count(kept) and _is_count(full.get(name))
    )


def _parsed(kind: type[T], content: Any) -> T | None:
    """A dataclass of numbers out of JSON; None where one is missing or is none."""
    values: dict[str, Any] = {}
    for known in fields(kind):  # type: ignore[arg-type]
        value = _dict(content).get(known.name)
        if "float" in known.type and type(value) is float and not math.isfinite(value):
            value = None if "None" in known.type else math.nan
        elif "float" in known.type:
            value = _number(value)
        elif not _is_count(value):
            value = None
        if value is None and "None" not in known.type:
            return None
        values[known.name] = value
    return kind(**values)


def _number(value: Any) -> Any:
    """``value`` if it is a finite number of a bearable size, else None."""
    return value if type(value) in (int, float) and abs(value) <= LARGEST else None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
