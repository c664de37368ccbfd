"""Tolerant reader of a run folder: it needs neither torch nor a complete run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping  # noqa: TC003  (from_json reads the types)
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from job.artifacts.evaluation_record import EVALUATION_FILE, read_evaluation
from job.artifacts.history import History, LayerWidth, MeasuredRound, slim_round
from job.artifacts.json_records import from_json
from job.artifacts.lock import current_state
from job.artifacts.records import (
    LATENCY_FILE,
    SENSITIVITY_FILE,
    EpochRecord,
    LatencyRecord,
    RoundRecord,
    StatusRecord,
)
from job.artifacts.run_config import CONFIG_FILE, read_run_config
from job.errors import InputNotFound, reason, shown
from job.files import is_file, read_bytes, read_json
from job.slimming.sensitivity.record import Sensitivity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from _typeshed import DataclassInstance

    from job.files import JsonObject

    R = TypeVar("R", bound=DataclassInstance)

T = TypeVar("T")
FILES = ("config.toml", "status.json", "metrics.jsonl", "summary.json")  # any of them makes a run
LARGEST = 10**18  # a larger number is invalid


@dataclass(frozen=True)
class _Outcome:
    """Part of a summary that concerns no single round; every field can be missing."""

    recommended: str = ""
    reason: str = ""
    cautions: tuple[str, ...] = ()
    seconds: float | None = None


@dataclass(frozen=True)
class _BaseWidths:
    widths: Mapping[str, int]


@dataclass(frozen=True)
class _CardWidths:
    """The output channels in a model.json, by layer in the network's order."""

    widths: Mapping[str, int]
    base: _BaseWidths | None = None
    class_names: tuple[str, ...] = ()


def find_runs(path: Path) -> list[Path]:
    """Return ``path`` if it is a run folder, else the runs under it in the order of their names.

    Raises InputNotFound if there is none, or StorageError.
    """
    if not path.exists():
        raise InputNotFound(f"{shown(path)} does not exist: give a run folder")
    if is_run(path):
        return [path]
    found: list[Path] = []
    for folder, folders, _ in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if any(is_file(Path(folder) / name) for name in ("status.json", "metrics.jsonl")):
            found.append(Path(folder))
            folders.clear()
    if not found:
        names = ", ".join(FILES)
        raise InputNotFound(
            f"{shown(path)} is not a run folder, and has none inside: a run has one of {names}"
        )
    return found


def is_run(path: Path) -> bool:
    """Return whether ``path`` is the folder of a run; raises StorageError."""
    return any(is_file(path / name) for name in FILES)


def read_run(path: Path) -> History:
    """Read the run in ``path``, in any state, with or without a finished round.

    Damaged parts are left out and named in ``problems``. Raises InputNotFound, or StorageError
    when the storage does not respond.
    """
    if not path.exists():
        raise InputNotFound(f"{shown(path)} does not exist: give a run folder")
    if not is_run(path):
        raise InputNotFound(f"{shown(path)} is not a run folder: it has none of {', '.join(FILES)}")
    problems: list[str] = []
    status = _read_file(path / "status.json", _read_status, problems)
    summary = _table(_read_file(path / "summary.json", read_json, problems))
    settings = _read_file(path / CONFIG_FILE, lambda p: read_run_config(p.parent), problems)
    events = _read_file(path / "metrics.jsonl", lambda p: read_events(p, problems), problems) or []
    rounds = _rounds(events, summary, problems)
    outcome = _plausible(from_json(_Outcome, summary, lenient=True)) or _Outcome()
    chosen = (e.round for e in rounds if outcome.recommended == f"rounds/{e.round:02d}")
    recommended = next(chosen, None)
    slim = slim_round(rounds, recommended)
    card = None if slim is None else _read_card(path, slim, problems)
    return History(
        path=path,
        state=current_state(path, status.state if status else "unknown"),
        exit_code=status.exit_code if status else None,
        time=status.time if status else None,
        position=status.at if status else None,
        processes=status.processes if status else None,
        rounds=rounds,
        epochs=_epochs(events),
        recommended=recommended,
        reason=outcome.reason,
        cautions=outcome.cautions,
        seconds=outcome.seconds,
        layers=_layers(card) if card else (),
        class_names=card.class_names if card else (),
        measured=_measured(path, rounds, slim, problems),
        evaluations=_by_round(path, (0, slim), EVALUATION_FILE, read_evaluation, problems),
        latencies=_by_round(path, (e.round for e in rounds), LATENCY_FILE, _read_latency, problems),
        settings=settings or {},
        problems=tuple(problems),
    )


def _read_file(path: Path, read: Callable[[Path], T], problems: list[str]) -> T | None:
    """Return ``read(path)``; None for a missing file, or a damaged one, which is a problem."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{shown(path)} cannot be read: {reason(error)}")
        return None


def _read_status(path: Path) -> StatusRecord:
    status = _plausible(from_json(StatusRecord, read_json(path)))
    if status is None:
        raise ValueError("its numbers are out of range")
    return status


def read_events(path: Path, problems: list[str]) -> list[JsonObject]:
    """Return the events of the complete lines of metrics.jsonl; damaged lines are ``problems``.

    The last line is skipped if it is incomplete, e.g. after a power failure.
    """
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
    events: list[JsonObject], summary: JsonObject, problems: list[str]
) -> tuple[RoundRecord, ...]:
    """Return the summary's rounds, and those that only metrics.jsonl has."""
    summarised = summary.get("rounds", [])
    entries: list[object] = [event for event in events if event.get("event") == RoundRecord.EVENT]
    entries += [summary[key] for key in ("base",) if key in summary]
    entries += summarised if isinstance(summarised, list) else [summarised]
    by_round = {}
    for entry in entries:
        record = _parse(RoundRecord, entry)
        if record and math.isfinite(record.width + record.valid_acc):
            by_round[record.round] = record
        else:
            problems.append("a round without its numbers is left out")
    return tuple(by_round[number] for number in sorted(by_round))


def _epochs(events: list[JsonObject]) -> tuple[EpochRecord, ...]:
    """Return the epochs by round and epoch; the last one where an interruption repeated it."""
    lines = (event for event in events if event.get("event") == EpochRecord.EVENT)
    records = (_parse(EpochRecord, line) for line in lines)
    by_epoch = {(record.round, record.epoch): record for record in records if record}
    return tuple(by_epoch[key] for key in sorted(by_epoch))


def _read_card(run: Path, round_index: int, problems: list[str]) -> _CardWidths | None:
    def read(path: Path) -> _CardWidths:
        return from_json(_CardWidths, read_json(path), lenient=True)

    return _read_file(run / "rounds" / f"{round_index:02d}" / "model.json", read, problems)


def _by_round(
    run: Path,
    rounds: Iterable[int | None],
    name: str,
    read: Callable[[Path], T],
    problems: list[str],
) -> dict[int, T]:
    """Return the file ``name`` of each round that has it."""
    found = {}
    for number in dict.fromkeys(number for number in rounds if number is not None):
        content = _read_file(run / "rounds" / f"{number:02d}" / name, read, problems)
        if content is not None:
            found[number] = content
    return found


def _read_latency(path: Path) -> LatencyRecord:
    latency = from_json(LatencyRecord, read_json(path))
    if not 0 < latency.seconds <= LARGEST or not 0 < latency.batch_size <= LARGEST:
        raise ValueError("its numbers are out of range")
    return latency


def _layers(card: _CardWidths) -> tuple[LayerWidth, ...]:
    """Return the widths of a model in the network's order."""
    full = card.base.widths if card.base else card.widths
    return tuple(
        LayerWidth(name, kept, full[name])
        for name, kept in card.widths.items()
        if 0 <= kept <= full.get(name, -1) <= LARGEST
    )


def _measured(
    run: Path, rounds: Sequence[RoundRecord], slim: int | None, problems: list[str]
) -> MeasuredRound | None:
    """Return what was measured for the cut of the round ``slim``, or else of the last one."""
    numbers = [entry.round for entry in reversed(rounds)]
    if slim is not None:
        numbers.insert(0, slim)
    for number in dict.fromkeys(numbers):
        path = run / "rounds" / f"{number:02d}" / SENSITIVITY_FILE
        sensitivity = _read_file(path, _read_sensitivity, problems)
        if sensitivity:
            return MeasuredRound(number, sensitivity)
    return None


def _read_sensitivity(path: Path) -> Sensitivity:
    """Read a file; raises ValueError for numbers that are out of range."""
    found = from_json(Sensitivity, read_json(path))
    points = [point for row in found.rows for point in row.points]
    counts = [found.images, *(row.channels for row in found.rows), *(p.channels for p in points)]
    counts += [row.kept for row in found.rows if row.kept is not None]
    numbers = [*found.fractions, *(n for row in found.rows for n in (row.macs, row.params))]
    numbers += [n for p in points for n in (p.fraction, p.loss) if n is not None]
    if any(not 0 <= count <= LARGEST for count in counts) or not all(
        math.isfinite(number) and abs(number) <= LARGEST for number in numbers
    ):
        raise ValueError("its numbers are out of range")
    return found


def _parse(kind: type[R], content: object) -> R | None:
    """Parse a record; None if a field is missing or a number is out of range."""
    try:
        return _plausible(from_json(kind, content, lenient=True))
    except ValueError:
        return None


def _plausible(record: R) -> R | None:
    """Return ``record`` with NaN, or None in an optional field, in place of each infinite number.

    Returns None if any number is out of range.
    """
    changes: dict[str, float | None] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if type(value) is float and not math.isfinite(value):
            changes[field.name] = None if field.default is None else math.nan
        elif (type(value) is int and not 0 <= value <= LARGEST) or (
            type(value) is float and abs(value) > LARGEST
        ):
            return None
    return replace(record, **changes)


def _table(value: object) -> JsonObject:
    return value if isinstance(value, dict) else {}
