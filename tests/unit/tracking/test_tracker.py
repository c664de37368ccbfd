"""The tracker builds an event only for a W&B run that receives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest

from job.config import PruneConfig
from job.pipeline.prune import prune
from job.tracking import wandb_events
from job.tracking.tracker import Tracker
from job.tracking.wandb_events import WandbEvent
from support.datasets import write_noise_idx


def unexpected(*_: Any) -> NoReturn:
    raise AssertionError("computed for nobody")


def test_a_tracker_that_is_off_builds_no_event(tmp_path: Path) -> None:
    Tracker("off", "gammaslim", tmp_path, {}).log(unexpected)


def test_a_tracker_that_failed_builds_no_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tracker, "_start_run", lambda *_, **__: False)
    tracker = Tracker("offline", "gammaslim", tmp_path, {})
    assert tracker._thread
    tracker._thread.join()
    tracker.log(unexpected)


def test_a_run_without_wandb_computes_no_costs_of_layers_and_no_histograms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_events, "layer_costs", unexpected)
    monkeypatch.setattr(wandb_events, "gamma_histograms", unexpected)
    monkeypatch.setattr(WandbEvent, "__init__", unexpected)
    prune(
        PruneConfig(
            data=str(write_noise_idx(tmp_path / "idx", 24, 8)), output=str(tmp_path / "run"),
            model_arg=(("base", 4),), base_epochs=1, rounds=1, epochs=1, batch_size=8,
            wandb="off", workers=0, device="cpu",
        )
    )  # fmt: skip
    assert (tmp_path / "run" / "rounds" / "01").is_dir()
