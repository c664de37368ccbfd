"""Status of a run, read from its files: alive or dead, progress, saved position, last error."""

from __future__ import annotations

import math
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from job.artifacts.json_records import from_json
from job.artifacts.object_store import is_store_url
from job.artifacts.records import LockRecord
from job.artifacts.run_config import CONFIG_FILE
from job.artifacts.run_reader import read_events, read_run
from job.artifacts.stored_places import place_of
from job.errors import shown
from job.files import read_json, shell_word
from job.training.epoch import ACCURACY, BRIEF

if TYPE_CHECKING:
    from pathlib import Path

    from job.artifacts.history import History

RECENT_EPOCHS = 5  # number of epochs from which the time left is estimated


@dataclass(frozen=True)
class RunStatus:
    """Status of a run; times are in Unix seconds, ``seconds_left`` and ages in seconds.

    ``state`` is running, stopped, finished, failed, died or unknown. ``since`` is when the run
    ended, or its last heartbeat; ``saved`` is when its last position was saved.
    ``best_acc`` is the accuracy of the recommended model, or of the best epoch of the base
    until a round is finished; ``params`` is the share of the base's parameters. ``error`` is the
    message that ended the run.
    """

    WRITE_DEFAULTS: ClassVar[bool] = True

    run: str
    path: str
    state: str
    alive: bool
    exit_code: int | None = None
    since: float | None = None
    age: float | None = None
    host: str | None = None
    pid: int | None = None
    round: int | None = None
    rounds: int | None = None
    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    recommended: str | None = None
    best_acc: float | None = field(default=None, metadata={"key": "best_{metric}"})
    base_acc: float | None = field(default=None, metadata={"key": "base_{metric}"})
    params: float | None = None
    images_per_second: float | None = None
    saved: float | None = None
    saved_age: float | None = None
    seconds_left: float | None = None
    error: str | None = None
    next: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    metric: str = field(default=ACCURACY, metadata=BRIEF)


def read_status(path: Path, now: float | None = None) -> RunStatus:
    """Read the status of the run in ``path``.

    Raises InputNotFound, or StorageError when the storage does not respond.
    """
    now = time.time() if now is None else now
    history = read_run(path)
    alive = history.state == "running"
    lock = _lock(path)
    heartbeat = _modified(path / "lock.json")
    ended = history.state in ("stopped", "finished", "failed")
    since = history.time if ended or heartbeat is None else heartbeat
    saved = _last_save(path)
    if saved and history.time and not alive:  # files of a copy are newer
        saved = min(saved, history.time)
    position = history.position or (None, None, None)
    best, last = history.best, history.epochs[-1] if history.epochs else None
    scores = [e.valid_acc for e in history.epochs if math.isfinite(e.valid_acc)]
    speed = last.images_per_second if last else math.nan
    return RunStatus(
        run=history.name,
        path=shown(place_of(path)),
        state=history.state,
        alive=alive,
        exit_code=history.exit_code,
        since=since,
        age=None if since is None else max(0.0, now - since),
        host=lock[0],
        pid=lock[1],
        round=position[0],
        rounds=planned_rounds_of(history),
        epoch=position[1],
        epochs=None if position[0] is None else epochs_of_round(history, position[0]),
        step=position[2],
        recommended=f"rounds/{best.round:02d}" if best else None,
        best_acc=best.valid_acc if best else max(scores, default=None),
        base_acc=history.base.valid_acc if history.base else None,
        params=history.share(best, "params") if best else None,
        images_per_second=speed if math.isfinite(speed) else None,
        saved=saved,
        saved_age=None if saved is None else max(0.0, now - saved),
        seconds_left=seconds_left(history),
        error=_last_error(path, history),
        next=next_commands(history),
        problems=history.problems,
        metric=history.metric,
    )


def planned_rounds_of(history: History) -> int | None:
    """Return ``--rounds`` of a run; None if it depends on the accuracies or is not known."""
    rounds = history.setting("prune", "rounds")
    return rounds if type(rounds) is int else None


def epochs_of_round(history: History, round_index: int) -> int | None:
    """Return the planned epochs of a round, or of the base with its sparse epochs."""
    if round_index:
        epochs = history.setting("prune", "epochs")
        return epochs if type(epochs) is int else None
    base, sparse = history.setting("base", "epochs"), history.setting("prune", "sparsity_epochs")
    if type(base) is not int:
        return None
    return base + (sparse if type(sparse) is int else 0)


def seconds_left(history: History) -> float | None:
    """Estimate the seconds until a run ends, or its current round with ``--rounds auto``.

    The estimate uses the last epochs and all cuts. None before the first epoch and for a finished
    run.
    """
    if not history.epochs or history.state == "finished" or not history.position:
        return None
    index = len(history.rounds)  # of the round in progress
    done = sum(epoch.round == index for epoch in history.epochs)
    rounds, epochs = planned_rounds_of(history), epochs_of_round(history, 1)
    planned = epochs_of_round(history, index)
    if planned is None or epochs is None:
        return None
    after = 0 if rounds is None else max(0, rounds - index)
    times = [e.seconds for e in history.epochs if math.isfinite(e.seconds)]
    if not times:
        return None
    epoch = statistics.median(times[-RECENT_EPOCHS:])
    cuts = [
        entry.seconds - sum(e.seconds for e in history.epochs if e.round == entry.round)
        for entry in history.rounds
        if entry.round and entry.seconds is not None
    ]
    cuts = [seconds for seconds in cuts if math.isfinite(seconds)]
    cut = max(0.0, statistics.fmean(cuts)) if cuts else 0.0
    return (max(0, planned - done) + after * epochs) * epoch + after * cut


def next_commands(history: History) -> tuple[str, ...]:
    """Return the command lines to type next, for the state of the run."""
    place = place_of(history.path)
    run = shell_word(place)
    if history.state == "running":  # a file in a store stops nothing
        return () if is_store_url(place) else (f"touch {shell_word(f'{place}/STOP')}",)
    if history.state == "finished":
        return commands_after(place, tested=bool(history.setting("dataset", "testing")))
    config = shell_word(f"{place}/{CONFIG_FILE}")
    data, root = history.setting("prune", "data"), history.setting("dataset", "path")
    data_option = f" --data {shell_word(root)}" if data and isinstance(root, str) else ""
    processes = history.processes or 1
    launch = f"launch --nproc {processes} -- " if processes > 1 else ""
    return (f"gammaslim {launch}prune --config {config} --output {run}{data_option}",)


def commands_after(place: str, *, tested: bool) -> tuple[str, ...]:
    """Return the command lines to type after the run in ``place``, a folder or URL, has finished.

    ``tested`` tells whether its data have a test split with targets.
    """
    run = shell_word(place)
    split = " --split testing" if tested else ""
    return (
        f"gammaslim report {run}",
        f"gammaslim evaluate {run}{split}",
        f"gammaslim export {run} --output model.onnx",
    )


def _lock(path: Path) -> tuple[str | None, int | None]:
    """Return the host and PID of the job that holds or held the run."""
    with suppress(OSError, ValueError):
        lock = from_json(LockRecord, read_json(path / "lock.json"))
        return shown(lock.host), lock.pid
    return None, None


def _last_save(path: Path) -> float | None:
    """Return when the last position, or else the last round, was saved."""
    manifests = [*path.glob("checkpoints/*/manifest.json"), *path.glob("rounds/*/model.json")]
    return max((t for file in manifests if (t := _modified(file)) is not None), default=None)


def _last_error(path: Path, history: History) -> str | None:
    if history.state not in ("failed", "stopped"):
        return None
    with suppress(OSError, ValueError):
        stops = [e for e in read_events(path / "metrics.jsonl", []) if e.get("event") == "stop"]
        if stops and isinstance(error := stops[-1].get("error"), str):
            return shown(error)
    return None


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
