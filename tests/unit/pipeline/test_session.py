"""A session knows where its run is: round, epoch and step, as status.json has them."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from job.config import PruneConfig
from job.pipeline.forecast import Forecast
from job.pipeline.session import Session
from job.pipeline.session_state import Place, RoundInProgress, SessionState


def session(**options: Any) -> Session:
    """A session of epochs of 10 steps, without all else that a job has."""
    found, setup = object.__new__(Session), SimpleNamespace(config=PruneConfig(**options))
    setup.trainer = SimpleNamespace(steps=10)
    found.setup = setup  # type: ignore[assignment]
    found.state = SessionState(Forecast(1, 1, 1), Place(), None)
    return found


@pytest.mark.parametrize(
    ("round_index", "epoch", "batch", "expected"),
    [
        (0, 0, 4, (0, 0, 4)),
        (0, 1, 0, (0, 1, 10)),
        (0, 4, 9, (0, 4, 49)),  # in the last sparse epoch
        (0, 5, 0, (0, 4, 50)),  # trained
        (2, 0, 0, (2, 0, 100)),
        (2, 3, 0, (2, 2, 130)),  # trained
    ],
)
def test_a_trained_round_is_in_its_last_epoch(
    round_index: int, epoch: int, batch: int, expected: tuple[int, int, int]
) -> None:
    """Sparse epochs are epochs of the base."""
    job = session(base_epochs=2, sparsity="l1", sparsity_epochs=3, epochs=3)
    first_step = 100 if round_index else 0
    job.state.round = RoundInProgress(round_index, first_step, time.perf_counter(), None)
    assert list(job.training(["batch"], epoch, batch)) == ["batch"]
    assert job.state.place == expected


def test_a_base_without_training_is_in_its_first_epoch() -> None:
    job = session(weights="w.pt")
    job.state.round = RoundInProgress(0, 0, time.perf_counter(), None)
    list(job.training(["batch"], 0, 0))
    assert job.state.place == (0, 0, 0)
