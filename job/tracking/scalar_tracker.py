"""Log epochs and rounds to TensorBoard or MLflow by Accelerate's trackers.

A thread forwards the numbers, so the job never waits for a server or a file system, except for a
bounded time at its end. A tracker that fails is off for the rest of the job, with a warning.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from importlib.util import find_spec
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from job.artifacts.json_records import from_json, to_json
from job.artifacts.records import MlflowRecord
from job.console import say, warn
from job.errors import GammaslimError, StopRequest, UsageError, reason
from job.files import read_json, shell_word, write_json
from job.tracking.wandb_events import AXES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from job.tracking.wandb_events import WandbEvent

    Settings = Mapping[str, str | int | float | bool]

FINAL_FLUSH = 10.0  # seconds that the end of a job waits for a tracker
TRACKER_PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow"}  # by name of the tracker
EXPERIMENT = "gammaslim"
SERVER_VARIABLES = ("MLFLOW_TRACKING_URI", "DATABRICKS_HOST")
# MLflow 3 opens a folder only with it; a database needs packages that mlflow-skinny lacks
ALLOW_FOLDER = ("MLFLOW_ALLOW_FILE_STORE", "true")


def check_trackers(names: Sequence[str]) -> None:
    """Raise UsageError if the package of a tracker is not installed."""
    for name in names:
        package = TRACKER_PACKAGES.get(name)
        if package and find_spec(package) is None:
            raise UsageError(
                f"--tracker {name} needs the package {package}: pip install 'gammaslim[{name}]', "
                "or leave it out"
            )


class ScalarSink(Protocol):
    """Where a tracker writes; called from its thread alone."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write values of ``step``."""

    def finish(self, exit_code: int) -> None:
        """End the tracker's run; the job ends with ``exit_code``."""


class ScalarTracker:
    """Forward the numbers of a run to a sink that ``start`` opens. No method raises."""

    def __init__(self, name: str, start: Callable[[], ScalarSink]) -> None:
        self.name, self._start = name, start
        self._events: SimpleQueue[tuple[dict[str, float], int] | int] = SimpleQueue()
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._thread.start()

    def log(self, build: Callable[[], WandbEvent]) -> None:
        """Log the numbers of the event that ``build`` returns, at the step of their axis."""
        if not self._thread.is_alive():
            return
        values = build().values
        for keys, axis in AXES.items():
            prefix = keys.removesuffix("*")
            numbers = {
                key: float(value)
                for key, value in values.items()
                if key.startswith(prefix) and isinstance(value, (int, float))
            }
            if axis in numbers:
                self._events.put((numbers, int(numbers[axis])))

    def finish(self, summary: Mapping[str, object]) -> None:
        """End the run of the tracker."""
        del summary  # it is that of the last round, which is logged
        self._end(0)

    def abandon(self, exit_code: int) -> None:
        """End the run of the tracker for a job that ends early."""
        self._end(exit_code)

    def _end(self, exit_code: int) -> None:
        self._events.put(exit_code)
        self._thread.join(FINAL_FLUSH)
        if self._thread.is_alive():
            warn(f"{self.name} does not answer: its last numbers may be missing")

    def _forward(self) -> None:
        try:
            sink = self._start()
            while not isinstance(event := self._events.get(), int):
                sink.log(*event)
            sink.finish(event)
        except Exception as error:  # of a server, a disk or the package; the job continues
            warn(f"{self.name} failed and is now off: {reason(error)}")


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker shows, and the ``step`` at which this attempt starts."""

    path: Path
    settings: Settings
    step: int

    @classmethod
    def of(cls, path: Path, config: Mapping[str, object], step: int) -> TrackedRun:
        """Make a run; settings that are lists become texts."""
        settings = {
            key: value if isinstance(value, (str, int, float, bool)) else str(value)
            for key, value in config.items()
        }
        return cls(path, settings, step)


class TensorBoardSink:
    """Event files in ``RUN/tensorboard``: all attempts share them, and no step appears twice."""

    def __init__(self, run: TrackedRun) -> None:
        from accelerate.tracking import TensorBoardTracker

        folder = run.path / "tensorboard"
        is_first = not folder.exists()
        # TensorBoard hides what an earlier attempt wrote after the position at which this one
        # starts; an epoch has the step of its end
        self._tracker: Any = TensorBoardTracker(folder.name, run.path, purge_step=run.step + 1)
        self._tracker.start()
        if is_first:
            self._tracker.store_init_configuration(dict(run.settings))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write and flush scalars."""
        self._tracker.log(dict(values), step)

    def finish(self, exit_code: int) -> None:
        """Close the file."""
        del exit_code  # TensorBoard shows none
        self._tracker.finish()


class MlflowSink:
    """An MLflow run, on the server of MLFLOW_TRACKING_URI or in ``RUN/mlruns``.

    All attempts share it: its id is stored in ``RUN/mlflow.json``.
    """

    def __init__(self, run: TrackedRun) -> None:
        import mlflow
        from accelerate.tracking import MLflowTracker

        self._mlflow: Any = mlflow
        self._folder: Path | None = None
        if not any(map(os.environ.get, SERVER_VARIABLES)):
            os.environ.setdefault(*ALLOW_FOLDER)
            self._folder = run.path.absolute() / "mlruns"
            mlflow.set_tracking_uri(self._folder.as_uri())
        stored = self._stored_id(run.path / "mlflow.json")
        self._tracker: Any = MLflowTracker(EXPERIMENT, run_id=stored, run_name=run.path.name)
        self._tracker.start()
        self._id = str(self._tracker.tracker.info.run_id)
        if stored is None:
            write_json(run.path / "mlflow.json", to_json(MlflowRecord(self._id)))
            self._tracker.store_init_configuration(dict(run.settings))
        self._logged = {axis: self._last_step(axis) for axis in AXES.values()} if stored else {}

    @staticmethod
    def _stored_id(path: Path) -> str | None:
        try:
            return from_json(MlflowRecord, read_json(path), lenient=True).id or None
        except (OSError, ValueError, GammaslimError):
            return None

    def _last_step(self, axis: str) -> int:
        history = self._mlflow.MlflowClient().get_metric_history(self._id, axis)
        return max((metric.step for metric in history), default=-1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write metrics, unless an earlier attempt wrote those of this step."""
        if all(step > last for axis, last in self._logged.items() if axis in values):
            self._tracker.log(dict(values), step)

    def finish(self, exit_code: int) -> None:
        """End the run with the state that MLflow shows; print how to open its folder."""
        states = {0: "FINISHED", StopRequest.exit_code: "KILLED"}
        self._mlflow.end_run(states.get(exit_code, "FAILED"))
        if self._folder is not None:
            command = f"mlflow ui --backend-store-uri {shell_word(str(self._folder))}"
            say(f"MLflow: to see the run: {'='.join(ALLOW_FOLDER)} {command}")
