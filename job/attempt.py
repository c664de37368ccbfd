"""One attempt at a run: its lock, its dashboard, where it stands and how it ends."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import click

from job.checkpoint import newest_position
from job.console import say
from job.errors import GammaslimError, printable, reason
from job.files import check_writable
from job.lock import Lock
from job.processes import on_main, world
from job.report import write_run_report
from job.tracking import Tracker

if TYPE_CHECKING:
    from collections.abc import Callable

    from job.checkpoint import Position
    from job.config import PruneConfig
    from job.run import Run
    from job.signals import Watch

T = TypeVar("T")


class Attempt:
    """What the main process holds while the run is its own; the others only know where it stands.

    All methods but ``report``, ``abandon`` and ``end`` are collective.
    """

    def __init__(self, config: PruneConfig, run: Run, watch: Watch) -> None:
        self.config, self.run, self.watch = config, run, watch
        self.lock = Lock(run.path)
        self.tracker: Tracker | None = None
        self.saved = 0  # rounds that earlier attempts completed, the base included
        self.at = (0, 0, 0)  # round, epoch, step
        self.unreported = ""  # what kept the last report from being written

    def begin(self, record: dict[str, Any], base: dict[str, Any]) -> Position | None:
        """Take the run directory, or only look at it where the run is finished.

        Returns the position within a round that an earlier attempt saved last. Raises OutputError
        while another job has the run, and what ``Run.open`` does.
        """
        start = None
        if not on_main(lambda: self.finished(record, base)):
            on_main(lambda: check_writable(self.run.path))
            on_main(lambda: self.lock.acquire(say), interrupt=True)
            start = on_main(lambda: self.claim(record, base))
        self.saved = on_main(lambda: self.run.saved)
        self.at = (self.saved, 0, 0)
        if not on_main(self.run.finished_summary):
            self.status("running", None)
            settings = self.config.to_dict() | record
            on_main(lambda: self.track(settings), interrupt=True)
        return start

    def finished(self, record: dict[str, Any], base: dict[str, Any]) -> bool:
        """Whether this very run is finished: it is only shown then, and needs no lock."""
        return bool(self.run.check(self.config, record, base) and self.run.finished_summary())

    def claim(self, record: dict[str, Any], base: dict[str, Any]) -> Position | None:
        """Create the run or go on with it, now that it is ours; where it stood, if within a round.

        The metrics that came after that position are dropped.
        """
        saved = self.run.open(self.config, record, base)
        self.watch.forget_old_request()
        if self.run.finished_summary():  # by the job that had it until just now
            return None
        self.run.remove_unfinished()
        start, problems = newest_position(self.run.path / "checkpoints", saved)
        for problem in problems:
            say(f"Warning: {problem}; going on from the one before")
        self.run.rewind_metrics(saved, start.values["metrics_size"] if start else None)
        if saved or start:
            before = start.values["processes"] if start else None
            entry = {"round": saved, "epoch": start.epoch if start else 0}
            batch = start.batch if start else 0
            processes = {"processes": world(), "processes_before": before}
            self.run.log({"event": "resume", **entry, "batch": batch, **processes})
        if start:
            self.run.earlier_seconds = start.values["run_seconds"]
        return start

    def track(self, settings: dict[str, Any]) -> None:
        """Begin the W&B run; on the main process."""
        config = self.config
        self.tracker = Tracker(config.wandb, config.wandb_project, self.run.path, settings)

    def write(self, work: Callable[[], T]) -> T:
        """Have the main process write into the run, as long as the run is this job's."""

        def guarded() -> T:
            self.lock.check()
            return work()

        return on_main(guarded)

    def log(self, event: str, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl; epochs go to the dashboard too."""
        self.write(lambda: self.run.log({"event": event, **values}))
        if self.tracker and event == "epoch":
            self.tracker.log(event, values)

    def status(self, state: str, exit_code: int | None) -> None:
        """Write status.json."""
        self.write(lambda: self.run.status(state, exit_code, *self.at))

    def report(self) -> None:
        """Write the report of the run so far, where this process writes; not collective.

        What keeps it from that is a warning: the run is worth more than its report.
        """
        if not self.lock.held or self.lock.lost:
            return
        try:
            write_run_report(self.run.path)
        except Exception as error:  # whatever it is, a full disk or a broken matplotlib
            problem, said = reason(error), self.unreported
            if problem != said:
                self.unreported = problem
                text = f"the report is not written, the job goes on: {problem}"
                with suppress(OSError):
                    click.echo(f"Warning: {printable(text)}", err=True)

    def abandon(self, state: str, exit_code: int) -> None:
        """Say in status.json and on the dashboard why the run ended early, as far as possible."""
        if not self.lock.held or self.lock.lost:  # not the main process, or the run is not ours
            return
        with suppress(GammaslimError):  # a full disk may be the reason
            self.run.status(state, exit_code, *self.at)
            self.run.log({"event": "stop", "state": state, "exit_code": exit_code})
        if self.tracker:
            self.tracker.abandon(exit_code)

    def end(self) -> None:
        """Give the run directory back."""
        if self.lock.held:
            self.lock.release()
