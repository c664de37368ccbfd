"""The trackers of a run: each receives the same events."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

from job.tracking.scalar_tracker import MlflowSink, ScalarTracker, TensorBoardSink, TrackedRun

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from job.tracking.scalar_tracker import ScalarSink
    from job.tracking.wandb_events import WandbEvent
    from job.tracking.wandb_tracker import Tracker

TITLES = {"tensorboard": "TensorBoard", "mlflow": "MLflow"}
SINKS: dict[str, Callable[[TrackedRun], ScalarSink]] = {
    "tensorboard": TensorBoardSink,
    "mlflow": MlflowSink,
}


class Trackers:
    """W&B and the trackers of `SINKS` among ``names``, on the main process. No method raises."""

    def __init__(self, wandb: Tracker, names: Sequence[str], run: TrackedRun) -> None:
        self._all: list[Tracker | ScalarTracker] = [wandb]
        for name in names:
            if name in SINKS:
                self._all.append(ScalarTracker(TITLES[name], partial(SINKS[name], run)))

    def log(self, build: Callable[[], WandbEvent]) -> None:
        """Log the event that ``build`` returns; it is called once, if any tracker receives it."""
        build_once = cache(build)
        for tracker in self._all:
            tracker.log(build_once)

    def finish(self, summary: Mapping[str, object]) -> None:
        """End the trackers' runs of a finished run."""
        for tracker in reversed(self._all):  # W&B prints what to type next
            tracker.finish(summary)

    def abandon(self, exit_code: int) -> None:
        """End the trackers' runs of a job that ends early."""
        for tracker in reversed(self._all):
            tracker.abandon(exit_code)
