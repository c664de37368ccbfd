"""Where a run is: the part of a session that changes while the run is in progress."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from job.artifacts.model_card import ModelCard
    from job.pipeline.forecast import Forecast
    from job.slimming.planning.cost import Cost
    from job.tracking.tracker import Tracker
    from job.training.position import Position, PrunedScores


class Place(NamedTuple):
    """Where a run is: ``epoch`` counts within the round, ``step`` since the run began."""

    round: int = 0
    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class TrainedModel:
    """What the session records about the network that a round trains."""

    card: ModelCard
    cost: Cost
    scores: PrunedScores


@dataclass(frozen=True)
class RoundInProgress:
    """The round in progress; ``began`` is by ``time.perf_counter``, as if never interrupted."""

    index: int
    first_step: int  # optimizer steps of the run before it
    began: float
    resume: Position | None  # where it resumes
    model: TrainedModel | None = None  # None until it trains

    @property
    def seconds(self) -> float:
        """Time that the round has taken so far."""
        return time.perf_counter() - self.began


@dataclass
class SessionState:
    """All that changes in a session, apart from the entries of finished rounds."""

    forecast: Forecast
    place: Place
    resume: Position | None  # for the first round that is not saved yet
    round: RoundInProgress | None = None
    tracker: Tracker | None = None  # of the main process
    resume_reported: bool = False
    report_problem: str = ""  # why the last report was not written
