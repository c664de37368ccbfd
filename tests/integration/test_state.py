"""What a run's folder says of it: its state is that of its job, its position where it is."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import job.artifacts.lock
from job.artifacts.lock import Lock
from job.artifacts.run_reader import read_run
from job.cli.report import report
from job.config import PruneConfig
from job.distributed.stop import NOTHING, STOP, Watch
from job.errors import GammaslimError, StopRequest
from job.pipeline.prune import prune
from job.training.trainer import TrainingRound
from support.datasets import write_noise_idx


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise_idx(tmp_path_factory.mktemp("noise") / "idx", 24, 8)


def tiny(data: Path, output: Path, **options: Any) -> PruneConfig:
    """Three steps an epoch: the base has one epoch, each of the two rounds two."""
    values: dict[str, Any] = {
        "data": str(data), "output": str(output), "model_arg": (("base", 4),), "base_epochs": 1,
        "rounds": 2, "epochs": 2, "batch_size": 8, "wandb": "off", "workers": 0,
        "device": "cpu",
    }  # fmt: skip
    return PruneConfig(**{**values, **options})


def status(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "status.json").read_text())
    return content


def position(run: Path) -> tuple[int, int, int]:
    content = status(run)
    return content["round"], content["epoch"], content["step"]


def running_folder(folder: Path) -> Path:
    folder.mkdir()
    content = {"state": "running", "exit_code": None, "round": 1, "epoch": 2, "step": 34}
    (folder / "status.json").write_text(json.dumps(content | {"time": 1e9}))
    return folder


def forget(lock: Lock) -> None:
    """End the heartbeat and leave the file, as SIGKILL does."""
    lock._ended.set()
    assert lock._thread
    lock._thread.join()


def test_a_run_is_running_only_while_its_job_lives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = running_folder(tmp_path / "run")
    lock = Lock(folder)
    assert read_run(folder).state == "died"  # no job has it
    lock.acquire()
    assert read_run(folder).state == "running"
    forget(lock)
    assert read_run(folder).state == "running"  # this process lives, whatever its heartbeat
    owner = json.loads((folder / "lock.json").read_text())
    (folder / "lock.json").write_text(json.dumps(owner | {"started": "1"}))
    assert read_run(folder).state == "died"  # its number is another process's now
    report([str(folder)], None, False)
    said = capsys.readouterr().out
    assert "run: died, in round 1, epoch 2, step 34" in said
    assert "run the same command to resume" in said
    page = (folder / "report.html").read_text()
    assert "died, in round 1" in page
    assert "running" not in page.partition("<h2>")[0].partition("</head>")[2]
    folders = [str(folder), str(running_folder(tmp_path / "b"))]
    report(folders, str(tmp_path / "c.html"), True)
    record = json.loads(capsys.readouterr().out)
    assert [run["state"] for run in record["runs"]] == ["died", "died"]


def test_a_job_of_another_host_lives_while_its_heartbeat_is_fresh(tmp_path: Path) -> None:
    folder = running_folder(tmp_path / "run")
    lock = Lock(folder)
    lock._record = replace(lock._record, host="node7", processes="pid:[1]")
    lock.acquire()
    forget(lock)
    assert read_run(folder).state == "running"
    old = time.time() - job.artifacts.lock.STALE - 1
    os.utime(folder / "lock.json", (old, old))
    assert read_run(folder).state == "died"
    assert sorted(os.listdir(folder)) == ["lock.json", "status.json"]  # a reader leaves nothing


@pytest.mark.parametrize("state", ["stopped", "failed", "finished"])
def test_how_a_run_ended_needs_no_lock(tmp_path: Path, state: str) -> None:
    folder = running_folder(tmp_path / "run")
    (folder / "status.json").write_text(json.dumps(status(folder) | {"state": state}))
    assert read_run(folder).state == state


# base: steps 1 to 3; round 1: 4 to 9 in two epochs; round 2: 10 to 15
@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("poll", "where"), [(2, (0, 0, 2)), (8, (1, 0, 5)), (12, (1, 1, 8)), (20, (2, 1, 14))]
)
def test_a_stopped_run_says_where_it_is_and_resumes_there(
    noise: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    poll: int,
    where: tuple[int, int, int],
) -> None:
    steps = 0
    step = TrainingRound.step

    def counted(*args: Any) -> None:
        nonlocal steps
        step(*args)
        steps += 1

    def at_step(_watch: Watch) -> int:
        return STOP if steps == where[2] else NOTHING

    monkeypatch.setattr(TrainingRound, "step", counted)
    monkeypatch.setattr(Watch, "poll", at_step)
    run = tmp_path / "run"
    with pytest.raises(StopRequest) as stopped:
        prune(tiny(noise, run))
    round_, epoch, number = where
    words = f"{f'round {round_}' if round_ else 'the base (round 0)'}, epoch {epoch}, step {number}"
    assert f"in {words};" in str(stopped.value)
    assert "run the same command to resume" in str(stopped.value)
    assert (status(run)["state"], position(run)) == ("stopped", where)
    if round_:
        assert json.loads((run / "summary.json").read_text())["state"] == "stopped"
        assert f"stopped (exit code 75), in {words}" in (run / "report.html").read_text()
    monkeypatch.undo()
    capsys.readouterr()
    prune(tiny(noise, run))
    assert f"resuming in {words}; the run was stopped before\n" in capsys.readouterr().out
    assert (status(run)["state"], position(run)) == ("finished", (2, 1, 15))
    assert json.loads((run / "summary.json").read_text())["state"] == "finished"


def test_a_run_that_fails_or_dies_says_where_it_was(
    noise: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = 0
    step = TrainingRound.step

    def failing(*args: Any) -> None:
        nonlocal steps
        step(*args)
        steps += 1
        if steps == 8:
            raise GammaslimError("the loss is no number")

    monkeypatch.setattr(TrainingRound, "step", failing)
    run = tmp_path / "run"
    with pytest.raises(GammaslimError, match="no number"):
        prune(tiny(noise, run))
    assert (status(run)["state"], position(run)) == ("failed", (1, 1, 7))
    monkeypatch.undo()
    # as SIGKILL leaves it: running, by its last word, where the last position was saved
    (run / "status.json").write_text(json.dumps(status(run) | {"state": "running"}))
    assert read_run(run).state == "died"
    capsys.readouterr()
    prune(tiny(noise, run))
    said = capsys.readouterr().out
    assert "resuming in round 1, epoch 1, step 6; the run died before\n" in said  # what is saved
