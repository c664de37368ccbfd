"""The tracker builds an event only for a W&B run that receives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest

from job.tracking.wandb_tracker import Tracker


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
