"""Claim a run directory: acquire its lock, and find where its run resumes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from job.artifacts.checkpoint import newest_position
from job.artifacts.lock import Lock
from job.artifacts.model_card import read_card
from job.artifacts.records import ResumeRecord, StopRecord
from job.artifacts.run_directory import Run
from job.artifacts.run_folder import await_config, choose_run_folder
from job.console import counted, say
from job.distributed.collectives import on_main
from job.errors import (
    ConfigError,
    GammaslimError,
    OutputError,
    StopRequest,
    describe_error,
    exit_code,
)
from job.files import check_writable
from job.pipeline.session_state import Place
from job.processes import world_size

if TYPE_CHECKING:
    from pathlib import Path

    from job.pipeline.setup import Setup
    from job.training.checkpoint_content import Position


@dataclass(frozen=True)
class Claim:
    """A run directory that this job holds, or only reads because its run is finished.

    The main process holds ``lock``.
    """

    run: Run
    lock: Lock
    reason: str  # why another folder than the default is used
    finished: bool
    saved: int  # rounds that earlier jobs completed, the base included
    base_epochs: int | None  # of the run
    place: Place  # where the run resumes
    resume: Position | None = None  # within a round
    state_before: str | None = None  # how the previous job ended

    def describe(self) -> str:
        """Return what is special about the run, as the end of a line; "" for a new run."""
        notes = f"; {counted(self.saved, 'model')} of an earlier attempt" if self.saved else ""
        if self.finished:
            notes = "; the run is finished and only shown"
        return f"{notes}; {self.reason}" if self.reason else notes

    def describe_end(self) -> str:
        """Return how the previous job ended, as the end of a line; "" without one."""
        before = self.state_before or ""
        how = {"stopped": "was stopped", "finished": "had finished"}.get(before, before)
        return f"; the run {how} before" if how else ""


def claim_run(setup: Setup) -> Claim:
    """Claim the run directory, and create or resume its run; collective.

    Tries the next folder if another run has just claimed this one. Raises OutputError while
    another job holds the run, the errors of ``Run.open``, or StopRequest.
    """
    folder, reason = setup.folder, setup.folder_reason
    while True:
        setup.watch.follow(folder / "STOP")
        run, lock = Run(folder), Lock(folder)
        try:
            return _claim_folder(setup, run, lock, reason)
        except (ConfigError, OutputError):
            if lock.held:
                lock.release()
            other, reason = _next_folder(setup, run)
            if other == folder:
                raise
            folder = other
        except KeyboardInterrupt:
            _abandon_claim(run, lock, StopRequest.exit_code)
            raise StopRequest("stopped by request: run the same command to resume") from None
        except BaseException as error:
            _abandon_claim(run, lock, exit_code(error), describe_error(error))
            raise


def _claim_folder(setup: Setup, run: Run, lock: Lock, reason: str) -> Claim:
    resume, before = None, None
    if not on_main(lambda: _is_finished(setup, run)):
        on_main(lambda: check_writable(run.path))
        on_main(lambda: lock.acquire(say), interrupt=True)
        resume, before = on_main(lambda: _open_run(setup, run))
    saved = on_main(lambda: run.saved)
    return Claim(
        run,
        lock,
        reason,
        finished=on_main(lambda: run.finished_summary() is not None),
        saved=saved,
        base_epochs=on_main(lambda: run.base_epochs),
        place=on_main(lambda: _resume_place(run, saved, resume)),
        resume=resume,
        state_before=before,
    )


def _is_finished(setup: Setup, run: Run) -> bool:
    """Return whether this run is finished; it is only read, without the lock."""
    origin = setup.config, setup.dataset_record, setup.base_record
    return run.check(*origin) and run.complete(setup.config)


def _next_folder(setup: Setup, run: Run) -> tuple[Path, str]:
    """Return the next folder to claim and the reason; the same folder if there is no other."""

    def choose_next() -> tuple[Path, str]:
        await_config(run.path)
        return choose_run_folder(setup.config, setup.dataset_record, setup.base_record)

    return (run.path, "") if setup.config.output else on_main(choose_next)


def _open_run(setup: Setup, run: Run) -> tuple[Position | None, str | None]:
    """Create or resume the run; the lock must be held.

    Returns the position within a round to resume from, and how the previous job ended. Removes the
    metrics logged after that position.
    """
    last = run.recorded_status
    before, processes_before = (last.state, last.processes or 1) if last else (None, None)
    before = "died" if before == "running" else before
    saved = run.open(setup.config, setup.dataset_record, setup.base_record)
    setup.watch.forget_old_request()
    if run.finished_summary():  # by the job that has just released the lock
        return None, before
    run.remove_unfinished()
    resume, problems = newest_position(run.path / "checkpoints", saved)
    for problem in problems:
        say(f"Warning: {problem}; resuming from the previous one")
    run.rewind_metrics(saved, resume.progress.metrics_size if resume else None)
    if saved or resume:
        record = ResumeRecord(
            round=saved,
            epoch=resume.epoch if resume else 0,
            batch=resume.batch if resume else 0,
            processes=world_size(),
            processes_before=resume.training.processes if resume else processes_before,
        )
        run.log(record)
    if resume:
        run.count_from(resume.progress.run_seconds)
    return resume, before


def _resume_place(run: Run, saved: int, resume: Position | None) -> Place:
    if resume:
        return Place(saved, resume.epoch, resume.progress.step)
    metrics = read_card(run.round_path(saved - 1)).metrics if saved else {}
    step = metrics.get("step")  # load_round reports a damaged one
    return Place(saved, 0, step if type(step) is int else 0)


def _abandon_claim(run: Run, lock: Lock, code: int, error: str | None = None) -> None:
    """Record that the job ended before the run began, and release the lock."""
    if lock.held:
        record_end(run, Place(), code, error)
        lock.release()


def record_end(run: Run, place: Place, code: int, error: str | None = None) -> None:
    """Record in the run's files that this job ends early, if the storage allows it.

    ``error`` is the message.
    """
    state = "stopped" if code == StopRequest.exit_code else "failed"
    with suppress(GammaslimError):  # a full disk may be the reason
        run.status(state, code, *place)
        run.log(StopRecord(state, code, error))
        run.restate_summary("running", state)
