"""The state of a session that changes during a run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.pipeline.forecast import Forecast
    from job.slimming.planning.cost import Cost
    from job.slimming.sensitivity.record import Sensitivity
    from job.tracking.trackers import Trackers
    from job.training.checkpoint_content import Position, PrunedScores


class Place(NamedTuple):
    """A place in a run: ``epoch`` counts within the round, ``step`` from the start of the run."""

    round: int = 0
    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class TrainedModel:
    """The network that a round trains, as the session records it."""

    card: ModelCard
    cost: Cost
    scores: PrunedScores
    sensitivity: Sensitivity | None = None


@dataclass(frozen=True)
class RoundInProgress:
    """The round in progress; ``began`` is its start by ``time.perf_counter``, without pauses."""

    index: int
    first_step: int  # optimizer steps of the run before this round
    began: float
    resume: Position | None  # where the round resumes
    model: TrainedModel | None = None  # None until training starts
    predictions: torch.Tensor | None = None  # (N,), of the best epoch on the validation split

    @property
    def seconds(self) -> float:
        """Time that the round has taken so far."""
        return time.perf_counter() - self.began


@dataclass
class SessionState:
    """The mutable state of a session, except for the entries of finished rounds."""

    forecast: Forecast
    place: Place
    resume: Position | None  # for the first round that is not saved yet
    round: RoundInProgress | None = None
    tracker: Trackers | None = None  # of the main process
    resume_reported: bool = False
    report_problem: str = ""  # why the last report was not written
    speed: float | None = None  # images per second in the epoch in progress
    best_acc: float | None = None  # of the round in progress, on the validation split
    saved_at: float | None = None  # by time.monotonic
    base: nn.Module | None = None  # the network of round 0, which later ones are timed against
