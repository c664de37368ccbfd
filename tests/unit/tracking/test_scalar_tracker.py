"""TensorBoard and MLflow: attempts of one run are one run, without repeated steps."""

from __future__ import annotations

import json
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from accelerate import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from job.errors import StopRequest, UsageError
from job.files import read_json
from job.tracking import scalar_tracker, trackers
from job.tracking.scalar_tracker import ScalarTracker, TrackedRun, check_trackers
from job.tracking.trackers import Trackers
from job.tracking.wandb_events import WandbEvent
from job.tracking.wandb_tracker import Tracker
from support.commands import ROOT
from support.mlflow_stand_in import write_stand_in


@pytest.fixture(autouse=True)
def _no_other_run(monkeypatch: pytest.MonkeyPatch) -> None:
    PartialState(cpu=True)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def attempt(run: Path, names: tuple[str, ...], epochs: range, code: int, start: int = 0) -> None:
    """Log epochs of 10 steps; with code 0 also a round at the end."""
    wandb = Tracker("off", "gammaslim", run, {})
    tracked = TrackedRun.of(run, {"rate": 0.9, "mean": [1, 2]}, start)
    all_ = Trackers(wandb, names, tracked)
    for epoch in epochs:
        values = {"epoch/step": 10 * epoch + 10, "epoch/loss": 1 / (epoch + 1), "epoch/note": "x"}
        all_.log(lambda values=values: WandbEvent(values))
    if code:
        all_.abandon(code)
    else:
        all_.log(lambda: WandbEvent({"round/round": 1, "round/params": 7}))
        all_.finish({})


def test_tensorboard_shows_each_step_of_all_attempts_once(tmp_path: Path) -> None:
    attempt(tmp_path, ("tensorboard",), range(3), 1)  # killed, with step 20 saved
    attempt(tmp_path, ("tensorboard",), range(2, 5), 0, start=20)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("epoch/loss")] == [
        (10, 1.0), (20, 0.5), (30, 0.3333), (40, 0.25), (50, 0.2),
    ]  # fmt: skip
    assert [(e.step, e.value) for e in events.Scalars("round/params")] == [(1, 7.0)]
    assert "epoch/note" not in events.Tags()["scalars"]
    assert len(list((tmp_path / "tensorboard").glob("*/hparams.yml"))) == 1


def test_a_round_before_the_saved_position_stays(tmp_path: Path) -> None:
    attempt(tmp_path, ("tensorboard",), range(1), 0)  # a round 1
    attempt(tmp_path, ("tensorboard",), range(1, 2), 1, start=1)  # rounds of one step
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("round/params")] == [1]


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for the package mlflow; the file that holds what it received."""
    store = write_stand_in(tmp_path / "packages")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield store
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlflow"]:
        del sys.modules[name]


def test_mlflow_continues_one_run_and_repeats_no_step(tmp_path: Path, mlflow: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    attempt(run, ("mlflow",), range(3), StopRequest.exit_code)
    assert json.loads(mlflow.read_text())["state"] == "KILLED"
    attempt(run, ("mlflow",), range(2, 4), 0, start=20)
    stored = json.loads(mlflow.read_text())
    assert stored["metrics"]["epoch/loss"] == [[10, 1], [20, 0.5], [30, 1 / 3], [40, 0.25]]
    assert stored["metrics"]["round/params"] == [[1, 7]]
    assert (stored["state"], stored["runs"]) == ("FINISHED", 1)
    assert stored["params"] == {"rate": 0.9, "mean": "[1, 2]"}
    assert stored["uri"] == (run / "mlruns").as_uri()
    assert read_json(run / "mlflow.json") == {"id": "run-1"}


@pytest.mark.parametrize("code", [0, StopRequest.exit_code])
def test_a_run_without_a_server_ends_with_the_command_that_opens_its_folder(
    tmp_path: Path, mlflow: Path, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    run = tmp_path / "a run"
    run.mkdir()
    attempt(run, ("mlflow",), range(1), code)
    command = capsys.readouterr().out.partition("MLflow: to see the run: ")[2]
    assert shlex.split(command) == [
        "MLFLOW_ALLOW_FILE_STORE=true", "mlflow", "ui", "--backend-store-uri", str(run / "mlruns"),
    ]  # fmt: skip
    manual = (ROOT / "job" / "README.md").read_text("utf-8")
    assert "`MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri RUN/mlruns`" in manual


def test_on_a_server_there_is_no_folder_to_open(
    tmp_path: Path,
    mlflow: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    attempt(tmp_path, ("mlflow",), range(1), 0)
    assert capsys.readouterr().out == ""
    assert json.loads(mlflow.read_text())["uri"] is None


def test_several_trackers_receive_an_event_that_is_built_once(tmp_path: Path, mlflow: Path) -> None:
    built = []

    def build() -> WandbEvent:
        built.append(1)
        return WandbEvent({"epoch/step": 1, "epoch/loss": 2.0})

    run = TrackedRun.of(tmp_path, {}, 0)
    both = Trackers(Tracker("off", "", tmp_path, {}), ("tensorboard", "mlflow"), run)
    both.log(build)
    both.finish({})
    assert built == [1]
    assert json.loads(mlflow.read_text())["metrics"]["epoch/loss"] == [[1, 2.0]]
    assert (tmp_path / "tensorboard").is_dir()


def test_no_tracker_builds_no_event(tmp_path: Path) -> None:
    def unexpected() -> WandbEvent:
        raise AssertionError

    none = Trackers(Tracker("off", "", tmp_path, {}), ("none",), TrackedRun.of(tmp_path, {}, 0))
    none.log(unexpected)
    none.finish({})


def test_a_tracker_that_fails_is_off_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_run: Any) -> Any:
        raise OSError("disk full")

    monkeypatch.setitem(trackers.SINKS, "tensorboard", fail)
    attempt(tmp_path, ("tensorboard",), range(3), 0)
    assert capsys.readouterr().err.count("TensorBoard failed and is now off: disk full") == 1


def test_a_tracker_that_hangs_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scalar_tracker, "FINAL_FLUSH", 0.1)
    release = threading.Event()

    def hang() -> Any:
        release.wait()
        return mock.Mock()

    tracker = ScalarTracker("MLflow", hang)
    tracker.finish({})
    assert "MLflow does not answer" in capsys.readouterr().err
    release.set()
    tracker._thread.join()
    assert not capsys.readouterr().err


def test_a_tracker_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_trackers(("wandb", "none", "tensorboard"))
    monkeypatch.setitem(scalar_tracker.TRACKER_PACKAGES, "mlflow", "not_installed_here")
    with pytest.raises(UsageError, match=r"pip install 'gammaslim\[mlflow\]'"):
        check_trackers(("mlflow",))
