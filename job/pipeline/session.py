"""The session of a job: owns the state of the run.

This is the run directory and its lock, the trackers, the entries of finished rounds, the
forecast and the watch for stop requests. The trainer reports to it.
"""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, TypeVar

from job.artifacts.checkpoint import save_position
from job.artifacts.json_records import to_json
from job.artifacts.model_card import read_card
from job.artifacts.records import EpochRecord, GammaRecord, RoundRecord, to_line
from job.console import counted, phase, progress, say, say_event, warn
from job.distributed.collectives import accelerator_name, on_main
from job.errors import StopRequest, describe_error, exit_code, reason, shown
from job.pipeline.cautions import Cautions
from job.pipeline.claim import claim_run, record_end
from job.pipeline.console_summary import print_summary
from job.pipeline.forecast import Forecast
from job.pipeline.session_state import Place, RoundInProgress, SessionState
from job.report.page import write_run_report
from job.report.tables import describe_position, epoch_line
from job.tracking.scalar_tracker import TrackedRun
from job.tracking.trackers import Trackers
from job.tracking.wandb_events import epoch_event, recommended_event, run_inputs, summary_values
from job.tracking.wandb_tracker import Tracker
from job.training.checkpoint_content import CutRecord, RoundProgress
from job.training.session import TrainingSession

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch

    from job.artifacts.records import EventRecord, SummaryRecord
    from job.distributed.stop import Watch
    from job.pipeline.claim import Claim
    from job.pipeline.session_state import TrainedModel
    from job.pipeline.setup import Setup
    from job.training.checkpoint_content import Position
    from job.training.epoch import EpochResult
    from job.training.gamma import GammaHistogram

_T = TypeVar("_T")


@contextmanager
def open_session(setup: Setup) -> Iterator[Session]:
    """Claim the run directory; at the end, record how the run ended and release the directory.

    Raises GammaslimError; a StopRequest tells where the run stopped.
    """
    session = Session(setup, claim_run(setup))
    try:
        session.begin()
        yield session
    except (KeyboardInterrupt, StopRequest):
        session.abandon(StopRequest.exit_code)
        raise StopRequest(session.where_stopped()) from None
    except BaseException as error:
        session.abandon(exit_code(error), describe_error(error))
        raise
    finally:
        session.close()


class Session(TrainingSession):
    """The state of a run that a job holds.

    The methods are collective, except `report`, `abandon` and `close`.
    """

    def __init__(self, setup: Setup, claim: Claim) -> None:
        config = setup.config
        if claim.base_epochs is not None:
            config = replace(config, base_epochs=claim.base_epochs)
        self.setup, self.claim = replace(setup, config=config), claim
        self.run, self.lock = claim.run, claim.lock
        self.entries: list[RoundRecord] = []  # of the base and of each finished round
        self.cautions = Cautions.of(config, setup.data, setup.card)
        forecast = Forecast(self.epochs_of(0), config.epochs, config.last_round)
        self.state = SessionState(forecast, claim.place, claim.resume)
        self._move(*claim.place)

    # --- the run

    def begin(self) -> None:
        """Print the run and its resources, and start its trackers."""
        if not self.claim.finished:
            self._status("running", None)
            on_main(self._track, interrupt=True)
        resources = accelerator_name(self.setup.accelerator)
        say(f"run: {shown(self.run.path)} on {resources}{self.claim.describe()}")

    def _track(self) -> None:
        config = self.setup.config
        settings = config.to_dict() | to_json(self.setup.dataset_record)
        inputs = run_inputs(self.setup.dataset_record, self.setup.base_record, config.weights)
        path = self.run.path
        wandb = Tracker(config.wandb_mode, config.wandb_project, path, settings, inputs)
        tracked = TrackedRun.of(path, settings, self.place.step)
        self.state.tracker = Trackers(wandb, config.tracker, tracked)

    def write(self, work: Callable[[], _T]) -> _T:
        """Call ``work`` on the main process, as long as this job holds the run."""

        def guarded() -> _T:
            self.lock.check()
            return work()

        return on_main(guarded)

    def log(self, record: EventRecord) -> None:
        """Append a line to metrics.jsonl."""
        self.write(lambda: self.run.log(record))
        say_event(to_line(record))

    def _status(self, state: str, code: int | None) -> None:
        self.write(lambda: self.run.status(state, code, *self.place))

    def summarise(self, state: str) -> SummaryRecord:
        """Write the summary of the rounds so far, and return it."""
        limit, cautions = self.setup.config.max_drop, self.cautions.of_run(self.entries)
        return self.write(lambda: self.run.summarise(self.entries, state, limit, cautions))

    def report(self) -> None:
        """Write the report of the run so far, on the main process.

        A failure is only a warning: the run continues without its report.
        """
        if not self.lock.held or self.lock.lost:
            return
        try:
            write_run_report(self.run.path)
        except Exception as error:  # anything, e.g. a full disk or a broken matplotlib
            problem = reason(error)
            if problem != self.state.report_problem:
                self.state.report_problem = problem
                with suppress(OSError):
                    warn(f"the report is not written, the job continues: {problem}")

    def finish(self) -> None:
        """Write the final summary and show the table of rounds."""
        summary = on_main(self.run.finished_summary) or self.summarise("finished")
        # a full disk may have prevented the write
        if on_main(lambda: getattr(self.run.recorded_status, "state", None)) != "finished":
            last = len(self.entries) - 1
            self._move(last, self.epochs_of(last), self.entries[last].step)
            self._status("finished", 0)
        self.report()
        tested = self.setup.dataset_record.testing > 0
        print_summary(self.run.path, summary, self.entries, tested=tested)
        if self.tracker:
            folder = self.run.path / summary.recommended
            self.tracker.log(lambda: recommended_event(summary, read_card(folder), folder))
            self.tracker.finish(summary_values(summary))

    def abandon(self, code: int, error: str | None = None) -> None:
        """Record why the run ended early, in its files and on the dashboard if possible."""
        if not self.lock.held or self.lock.lost:  # not the main process, or the run is not ours
            return
        record_end(self.run, self.place, code, error)
        if self.tracker:
            self.tracker.abandon(code)
        if (self.run.path / "report.html").exists():  # it still shows the run as running
            self.report()

    def close(self) -> None:
        """Release the run directory."""
        if self.lock.held:
            self.lock.release()

    def where_stopped(self) -> str:
        """Return the place where the run stopped, and what a later job resumes from."""
        rounds = max(len(self.entries), self.claim.saved) - 1
        saved = f"the base and {counted(rounds, 'round')} are saved"
        saved = saved if rounds >= 0 else "the base is not finished"
        return f"stopped by request in {describe_position(*self.place)}; {saved}: " + (
            "run the same command to resume"
        )

    @property
    def place(self) -> Place:
        """The current place of the run."""
        return self.state.place

    @property
    def tracker(self) -> Trackers | None:
        """The trackers of the run, on the main process."""
        return self.state.tracker

    @property
    def image_size(self) -> int | tuple[int, ...]:
        """Side of the network's images in pixels, or the shape of one input."""
        return self.setup.preprocessing.input_size

    # --- the round in progress

    @property
    def round(self) -> RoundInProgress:
        """The round in progress."""
        assert self.state.round
        return self.state.round

    @property
    def round_name(self) -> str:
        """Name of the round in progress, as the console shows it."""
        return self.state.forecast.name()

    def time_left(self) -> str:
        """Return the remaining time of the run as text; "" while it is unknown."""
        return self.state.forecast.text()

    def epochs_of(self, round_index: int) -> int:
        """Return the number of epochs of a round; the base, round 0, includes its sparse epochs."""
        config = self.setup.config
        return config.epochs if round_index else config.first_epochs + config.sparsity_epochs

    def _move(self, round_index: int, epoch: int, step: int) -> None:
        """Record the place of the run; a trained round remains in its last epoch."""
        last = max(self.epochs_of(round_index), 1) - 1
        self.state.place = Place(round_index, min(epoch, last), step)

    def _move_to_batch(self, epoch: int, batch: int) -> None:
        """Record that the round in progress is at ``batch`` of ``epoch``."""
        step = self.round.first_step + epoch * self.setup.trainer.steps + batch
        self._move(self.round.index, epoch, step)

    def start_round(self) -> RoundInProgress:
        """Begin the round after the last entry, or resume it where an earlier job stopped."""
        state, index, resume = self.state, len(self.entries), self.state.resume
        first_step = self.entries[-1].step if self.entries else 0
        spent = resume.progress.round_seconds if resume else 0
        state.round = RoundInProgress(index, first_step, time.perf_counter() - spent, resume)
        state.resume = state.best_acc = state.speed = None
        self._move_to_batch(resume.epoch if resume else 0, resume.batch if resume else 0)
        state.forecast = state.forecast.begin(index)
        if (self.claim.saved or resume) and not state.resume_reported:
            say(f"resuming in {describe_position(*state.place)}{self.claim.describe_end()}")
            state.resume_reported = True
        self._status("running", None)
        return state.round

    def start_training(self, model: TrainedModel) -> None:
        """Record the network that the round in progress trains."""
        self.state.round = replace(self.round, model=model)

    def training(self, batches: Iterable[_T], epoch: int, batch: int) -> Iterator[_T]:
        """Yield the batches of ``epoch`` from number ``batch`` on; record and show progress."""
        steps, began = self.setup.trainer.steps, time.monotonic()
        for number, item in enumerate(batches, start=batch):
            self.state.forecast = self.state.forecast.train(epoch, number / steps)
            images = (number - batch) * self.setup.config.batch_size
            seconds = time.monotonic() - began
            self.state.speed = images / seconds if images and seconds else None
            phase(self.round_name, f"epoch {epoch}", number / steps)
            self._move_to_batch(epoch, number)
            yield item

    def validating(self, batches: Iterable[_T], count: int) -> Iterable[_T]:
        """Yield the batches of an evaluation, and show progress."""
        return progress(self.round_name, "validating")(batches, count)

    def epoch_finished(self, result: EpochResult) -> None:
        """Print the epoch's line; log its numbers, on the dashboard too."""
        model = self.round.model
        assert model
        state = self.state
        state.forecast = state.forecast.trained()
        if state.best_acc is None or result.valid_acc > state.best_acc:
            state.best_acc = result.valid_acc
        width, cost = model.card.width, model.cost
        say(epoch_line(width, result), event=True)
        record = EpochRecord(**asdict(result), width=width, params=cost.params, macs=cost.macs)
        self.log(record)
        if self.tracker:
            self.tracker.log(lambda: epoch_event(record))

    def gamma_measured(self, when: str, epoch: int, histogram: GammaHistogram) -> None:
        """Log a histogram of γ."""
        self.log(GammaRecord(round=self.round.index, epoch=epoch, when=when, **asdict(histogram)))

    def keep_predictions(self, predictions: torch.Tensor | None) -> None:
        """Keep the predictions of the round's best model, for the record of its evaluation."""
        self.state.round = replace(self.round, predictions=predictions)

    def save(self, position: Position) -> None:
        """Save the position with the progress of the run, and the status."""
        model, current = self.round.model, self.round
        assert model
        self._move_to_batch(position.epoch, position.batch)
        card = model.card
        cut = CutRecord(card.lineage.wide_sha256 or "", card.width, card.layers)

        def write() -> None:
            run = RoundProgress(
                step=self.place.step,
                scores=model.scores,
                sensitivity=model.sensitivity,
                plan=cut,
                metrics_size=self.run.metrics_size,
                round_seconds=current.seconds,
                run_seconds=self.run.seconds,
            )
            save_position(self.run.path / "checkpoints", replace(position, run=run))
            self.run.status("running", None, *self.place)

        self.write(write)
        self.watch.saved()
        self.state.saved_at = time.monotonic()

    @property
    def watch(self) -> Watch:
        """Decides when to save and when to stop."""
        return self.setup.watch
