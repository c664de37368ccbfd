"""One attempt at a run: its lock, its dashboard, where it stands and how it ends."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from job.artifacts.checkpoint import newest_position
from job.artifacts.json_records import to_json
from job.artifacts.lock import Lock
from job.artifacts.model_card import read_card
from job.artifacts.records import EpochRecord, ResumeRecord, StopRecord
from job.artifacts.run_directory import Run
from job.artifacts.run_folder import await_config, choose
from job.console import say, warn, where
from job.distributed.collectives import on_main
from job.errors import ConfigError, GammaslimError, OutputError, reason
from job.files import check_writable
from job.processes import world_size
from job.report.page import write_run_report
from job.tracking.tracker import Tracker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from job.artifacts.records import BaseRecord, DatasetRecord, EventRecord
    from job.config import PruneConfig
    from job.distributed.stop import Watch
    from job.training.position import Position

T = TypeVar("T")


class Attempt:
    """What the main process holds while the run is its own; the others only know where it stands.

    All methods but ``report``, ``abandon`` and ``end`` are collective.
    """

    def __init__(self, config: PruneConfig, watch: Watch) -> None:
        self.config, self.watch = config, watch
        self.run = Run(watch.stop_file.parent)  # until ``begin`` knows better
        self.lock = Lock(self.run.path)
        self.tracker: Tracker | None = None
        self.saved = 0  # rounds that earlier attempts completed, the base included
        self.at = (0, 0, 0)  # round, epoch, step: where the run is, as status.json has it
        self.numbered = ""  # why the folder is not the first of its name
        self.told = False  # where it resumes
        self.before: str | None = None  # how an earlier attempt ended
        self.unreported = ""  # what kept the last report from being written

    def begin(self, record: DatasetRecord, base: BaseRecord) -> Position | None:
        """Take the run directory, or only look at it where the run is finished.

        Returns the position within a round that an earlier attempt saved last. Raises OutputError
        while another job has the run, and what ``Run.open`` does.
        """
        start = self._take(record, base)
        self.saved = on_main(lambda: self.run.saved)
        self.at = on_main(lambda: self._place(start))
        if not on_main(self.run.finished_summary):
            self.status("running", None)
            settings = self.config.to_dict() | to_json(record)
            on_main(lambda: self.track(settings), interrupt=True)
        return start

    def _take(self, record: DatasetRecord, base: BaseRecord) -> Position | None:
        """Choose the folder and take it; another one if that was taken just now by another run."""
        self._settle(on_main(lambda: choose(self.config, record, base)))
        while not on_main(lambda: self.finished(record, base)):
            try:
                on_main(lambda: check_writable(self.run.path))
                on_main(lambda: self.lock.acquire(say), interrupt=True)
                return on_main(lambda: self.claim(record, base))
            except (ConfigError, OutputError):
                other = on_main(lambda: self._other(record, base))
                if other[0] == self.run.path:
                    raise
                self._settle(other)
        return None

    def _settle(self, chosen: tuple[Path, str]) -> None:
        self.run = Run(chosen[0])
        self.lock = Lock(self.run.path)
        self.watch.follow(self.run.path / "STOP")
        self.numbered = chosen[1]

    def _other(self, record: DatasetRecord, base: BaseRecord) -> tuple[Path, str]:
        """The folder to try next: the same one where nothing but an error is left."""
        if self.config.output:
            return self.run.path, ""
        if self.lock.held:
            self.lock.release()
        await_config(self.run.path)
        return choose(self.config, record, base)

    def _place(self, start: Position | None) -> tuple[int, int, int]:
        """Round, epoch and step that the run resumes at."""
        if start:
            return self.saved, start.epoch, start.progress.step
        metrics = read_card(self.run.round_path(self.saved - 1)).metrics if self.saved else {}
        step = metrics.get("step")  # load_round will say what is wrong with another
        return self.saved, 0, step if type(step) is int else 0

    def finished(self, record: DatasetRecord, base: BaseRecord) -> bool:
        """Whether this very run is finished: it is only shown then, and needs no lock."""
        return self.run.check(self.config, record, base) and self.run.complete(self.config)

    def claim(self, record: DatasetRecord, base: BaseRecord) -> Position | None:
        """Create or resume the run, now that it is ours; its position, if within a round.

        The metrics that came after that position are dropped.
        """
        state = self.run.state
        self.before = "died" if state == "running" else state
        saved = self.run.open(self.config, record, base)
        self.watch.forget_old_request()
        if self.run.finished_summary():  # by the job that had it until just now
            return None
        self.run.remove_unfinished()
        start, problems = newest_position(self.run.path / "checkpoints", saved)
        for problem in problems:
            say(f"Warning: {problem}; resuming from the one before")
        self.run.rewind_metrics(saved, start.progress.metrics_size if start else None)
        if saved or start:
            before = start.training.processes if start else None
            epoch, batch = (start.epoch, start.batch) if start else (0, 0)
            self.run.log(ResumeRecord(saved, epoch, batch, world_size(), before))
        if start:
            self.run.earlier_seconds = start.progress.run_seconds
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

    def tell_resume(self) -> None:
        """Say once where the run resumes, ``at``, and how the attempt before ended."""
        if self.told:
            return
        self.told = True
        how = on_main(lambda: self.before)
        how = {"stopped": "was stopped", "finished": "had finished"}.get(how or "", how)
        say(f"resuming in {where(*self.at)}" + (f"; the run {how} before" if how else ""))

    def log(self, record: EventRecord) -> None:
        """One line of metrics.jsonl; epochs go to the dashboard too."""
        self.write(lambda: self.run.log(record))
        if self.tracker and isinstance(record, EpochRecord):
            self.tracker.log(record.EVENT, to_json(record))

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
                with suppress(OSError):
                    warn(f"the report is not written, the job continues: {problem}")

    def abandon(self, state: str, exit_code: int) -> None:
        """Say in status.json and on the dashboard why the run ended early, as far as possible."""
        if not self.lock.held or self.lock.lost:  # not the main process, or the run is not ours
            return
        with suppress(GammaslimError):  # a full disk may be the reason
            self.run.status(state, exit_code, *self.at)
            self.run.log(StopRecord(state, exit_code))
            self.run.restate_summary("running", state)
        if self.tracker:
            self.tracker.abandon(exit_code)
        if (self.run.path / "report.html").exists():  # it says that the run is running
            self.report()

    def end(self) -> None:
        """Give the run directory back."""
        if self.lock.held:
            self.lock.release()
