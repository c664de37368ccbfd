"""``status``: state and progress of runs, once or until they end."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from job.artifacts.json_records import to_json
from job.artifacts.run_reader import find_runs
from job.artifacts.run_status import read_status
from job.artifacts.stored_copy import local_path
from job.console import print_result, warn
from job.report.status import status_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.artifacts.run_status import RunStatus

INTERVAL = 2.0  # seconds between two updates
HOME = "\033[H\033[2J"  # moves the cursor to the upper left corner and clears the screen


def print_status(paths: Sequence[str], *, watch: bool, as_json: bool) -> None:
    """Print the status of runs, with ``watch`` again and again until none is running.

    An interrupt ends watching. Raises InputNotFound or StorageError.
    """
    statuses = _read(paths)
    if not as_json:
        for problem in [p for status in statuses for p in status.problems]:
            warn(problem)
    if not watch:
        _print(statuses, as_json=as_json)
        return
    try:
        _watch(paths, statuses, as_json=as_json)
    except KeyboardInterrupt:
        return


def _watch(paths: Sequence[str], statuses: list[RunStatus], *, as_json: bool) -> None:
    """Print the status whenever it changes; on a terminal, redraw it in place."""
    drawn, on_terminal = "", sys.stdout.isatty() and not as_json
    while True:
        shown = _fingerprint(statuses)
        if on_terminal or shown != drawn:
            if on_terminal:
                print_result(HOME.encode())
            _print(statuses, as_json=as_json)
            drawn = shown
        if not any(status.alive for status in statuses):
            return
        time.sleep(INTERVAL)
        statuses = _read(paths)


def _read(paths: Sequence[str]) -> list[RunStatus]:
    unique: dict[str, Path] = {}
    for path in paths:
        for run in find_runs(Path(local_path(path, weights=False))):
            unique.setdefault(os.path.realpath(run), run)
    return [read_status(run) for run in unique.values()]


def _print(statuses: Sequence[RunStatus], *, as_json: bool) -> None:
    if as_json:
        record = {"format": 1, "runs": [to_json(status) for status in statuses]}
        print_result(json.dumps(record))
    else:
        print_result(status_text(statuses))


def _fingerprint(statuses: Sequence[RunStatus]) -> str:
    """Return the values whose change is printed; ages are excluded because they always change."""
    return repr([
        (s.state, s.round, s.epoch, s.step, s.best_acc, s.saved, s.error) for s in statuses
    ])  # fmt: skip
