"""The start-up is one list of steps: a run ends at the first error, a dry run collects them all."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.config import PruneConfig
from job.errors import DataError, UsageError
from job.pipeline import dry_run as dry
from job.pipeline import setup as start_up_module
from job.pipeline.setup import MISSING, START_UP, Setup, StartUpStep, start_up


def setup(folder: Path) -> Setup:
    parts: Any = SimpleNamespace(check=lambda: None)
    return Setup(PruneConfig(wandb="off"), parts, parts, folder)


def bad_data(_: Setup) -> Setup:
    raise DataError("bad data")


def bad_teacher(_: Setup) -> Setup:
    raise UsageError("bad teacher")


def reach(found: Setup) -> Setup:
    return replace(found, smallest_batch=7)


def test_a_step_runs_only_with_what_it_needs(tmp_path: Path) -> None:
    step = StartUpStep(reach, needs=("data", "weights"))
    missing = setup(tmp_path)
    assert not step.can_run(missing)
    nothing: Any = None
    assert not step.can_run(replace(missing, data=nothing))
    assert step.can_run(replace(missing, data=nothing, weights=nothing))


def test_every_step_needs_only_what_steps_before_it_set() -> None:
    """Otherwise a dry run would never take it."""
    missing = {field.name for field in fields(Setup) if field.default is MISSING}
    assert {name for step in START_UP for name in step.needs} <= missing


def test_a_run_ends_at_the_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        start_up_module, "START_UP", (StartUpStep(bad_data), StartUpStep(bad_teacher))
    )
    with pytest.raises(DataError, match="bad data"):
        start_up(setup(tmp_path))
    monkeypatch.setattr(start_up_module, "START_UP", (StartUpStep(reach),))
    assert start_up(setup(tmp_path)).smallest_batch == 7


def test_a_dry_run_takes_the_same_steps_and_collects_every_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry.START_UP is START_UP
    skipped = StartUpStep(reach, needs=("data",))
    monkeypatch.setattr(dry, "START_UP", (StartUpStep(bad_data), skipped, StartUpStep(bad_teacher)))
    with pytest.raises(DataError, match="bad data"):
        dry.dry_run(setup(tmp_path / "run"))
    assert capsys.readouterr().err == "Error: bad teacher\n"
    assert not (tmp_path / "run").exists()
