"""W&B beside the job: attempts, offline segments, outages; against a server of our own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from job.tracking import wandb_tracker as tracking
from job.tracking.wandb_events import LAYER_COLUMNS, WandbEvent, WandbModel, gamma_histograms
from job.tracking.wandb_tracker import Tracker
from support.commands import Result, gammaslim, run
from support.datasets import write_noise_idx
from support.interrupted_runs import KILL_AT, SPEEDUP
from support.wandb_server import KEY, WandbServer


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as started:
        yield started


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run directory whose name a shell would take apart; W&B's processes end with the test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "run é's"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("{}")
    yield path
    for pid in processes(path):
        os.kill(pid, signal.SIGKILL)


def processes(place: Path) -> list[int]:
    """W&B's own process, and its service's, for the run in ``place``."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            known = f"WANDB_DATA_DIR={place / 'wandb'}".encode() in environ.read_bytes().split(
                b"\0"
            )
        except OSError:
            continue
        if known:
            found.append(int(environ.parent.name))
    return found


def gone(place: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while processes(place):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def track(place: Path, mode: str = "auto") -> Tracker:
    place.mkdir(exist_ok=True)
    return Tracker(mode, "gammaslim", place, {"rate": 0.95})


def begun(tracker: Tracker) -> Tracker:
    wait_for(lambda: tracker._started)
    return tracker


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def log_some(tracker: Tracker, first: int) -> None:
    """Three epochs and a round."""
    for step in range(first, first + 3):
        epoch = WandbEvent({"epoch/step": step, "epoch/loss": 1 / (step + 1)})
        tracker.log(partial(lambda event: event, epoch))
    values = {"round/round": first, "round/valid_acc": 0.5}
    model = WandbModel(str(tracker.run.parent / "model"), (f"round-{first}",), {"round": first})
    histograms = gamma_histograms(nn.Sequential(nn.BatchNorm2d(9)))
    tables = {"layers": (LAYER_COLUMNS, list[list[Any]]())}
    tracker.log(lambda: WandbEvent(values, histograms, tables, model))


def sync(line: str, server: WandbServer) -> None:
    """Run the ``wandb sync`` line that was printed."""
    program, *args = shlex.split(line[line.index("wandb sync") :])
    assert program == "wandb"
    done = run(sys.executable, "-m", "wandb", *args, env=server.env)
    assert done.code == 0, done
    assert "ERROR" not in done.err


def leaks(*texts: str) -> bool:
    return any(KEY in text for text in texts)


def small(data: Path, output: Path) -> tuple[object, ...]:
    return (
        "prune", "--data", data, "--output", output, "--base-epochs", 2, "--rounds", 1,
        "--epochs", 2, "--batch-size", 16, "--checkpoint-every", 0,
    )  # fmt: skip


def lines(output: Path, event: str) -> list[dict[str, Any]]:
    found = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["event"] == event]


def files_with_key(output: Path) -> list[Path]:
    files = (file for file in output.rglob("*") if file.is_file())
    return [file for file in files if KEY.encode() in file.read_bytes()]


def test_a_requeued_job_goes_on_with_its_wandb_run(place: Path, server: WandbServer) -> None:
    data = write_noise_idx(place.parent / "idx", 48, 20)
    stop = (sys.executable, KILL_AT, "step", 8, place.parent / "proof", *small(data, place))
    first = run(*stop, env={**server.env, "KILL_SIGNAL": "SIGTERM"})
    assert first.code == 75, first
    (wandb_run,) = server.runs.values()
    assert (wandb_run.attempts, wandb_run.exit_code, wandb_run.preempting) == (1, 75, True)
    # now two processes, of which one talks
    again = gammaslim("launch", "--nproc", 2, "--", *small(data, place), env=server.env)
    assert again.code == 0, again
    assert gone(place, 60)
    assert list(server.runs) == [json.loads((place / "wandb.json").read_text())["id"]]
    assert (wandb_run.attempts, wandb_run.exit_code) == (2, 0)
    for key in ("step", "train_loss", "valid_acc", "lr"):
        assert wandb_run.column(f"epoch/{key}") == [line[key] for line in lines(place, "epoch")]
    for key in ("round", "valid_acc", "params", "macs"):
        assert wandb_run.column(f"round/{key}") == [line[key] for line in lines(place, "round")]
    assert wandb_run.config["batch_size"] == 16
    assert wandb_run.config["args"][0] == "prune"
    assert wandb_run.summary["recommended"].startswith("rounds/")
    models = [a for a in server.artifacts if a["artifactTypeName"] == "model"]
    aliases = [{entry["alias"] for entry in a["aliases"]} for a in models]
    recommended = {"recommended", "latest"}
    assert aliases == [{"round-0", "base", "latest"}, {"round-1", "latest"}, recommended]
    assert any(name.endswith("model.safetensors") for name in server.uploads)
    assert again.out.count("W&B: http") == 1
    assert not leaks(first.out, first.err, again.out, again.err, json.dumps(wandb_run.fields))
    assert files_with_key(place) == []


def test_offline_attempts_are_grouped_and_synced_by_the_line_printed(
    place: Path, server: WandbServer
) -> None:
    data = write_noise_idx(place.parent / "idx", 48, 20)
    stop = (sys.executable, KILL_AT, "step", 8, place.parent / "proof", *small(data, place))
    first = run(*stop, env={"WANDB_MODE": "offline", "KILL_SIGNAL": "SIGTERM"})
    assert first.code == 75, first
    assert len(first.err.splitlines()) == 1
    again = gammaslim(*small(data, place), "--wandb", "offline", env={"WANDB_MODE": "online"})
    assert again.code == 0, again
    assert server.requests == []
    line = again.out.splitlines()[-1]
    assert line.startswith("W&B: to send the rest later: wandb sync ")
    sync(line, server)
    id_ = json.loads((place / "wandb.json").read_text())["id"]
    assert sorted(server.runs) == [f"{id_}-1", f"{id_}-2"]
    one, two = (server.runs[f"{id_}-{number}"] for number in (1, 2))
    assert {one.fields["groupName"], two.fields["groupName"]} == {id_}
    assert (one.fields["displayName"], two.fields["displayName"]) == ("run é's", "run é's-2")
    steps = one.column("epoch/step") + two.column("epoch/step")
    assert steps == [line["step"] for line in lines(place, "epoch")]
    assert (one.preempting, one.exit_code, two.exit_code) == (True, 75, 0)
    assert track(place, "offline").segments.sync_command() is None  # it is done


OUTAGES = [(how, at) for how in ("hang", "reset", "500") for at in ("init", "stream", "finish")]


@pytest.mark.alone
@pytest.mark.parametrize(("how", "at"), OUTAGES, ids=map(" at ".join, OUTAGES))
@pytest.mark.sampled(3)
def test_an_outage_is_waited_for_briefly_and_loses_nothing(
    place: Path,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    how: str,
    at: str,
) -> None:
    for key, value in server.env.items():
        monkeypatch.setenv(key, value)
    if at == "init":
        server.behaviour = how
    else:
        server.turn = at, how
    tracker = track(place)
    if at != "init":
        begun(tracker)
    began = time.monotonic()
    log_some(tracker, 0)
    assert time.monotonic() - began < 0.1
    if at == "stream":
        wait_for(lambda: server.behaviour == how)
        log_some(tracker, 3)
        time.sleep(2)  # W&B writes to its file once a second
    began = time.monotonic()
    tracker.finish({"recommended": "rounds/00"})
    assert time.monotonic() - began < (25 if at == "init" else 3.5)
    out, err = capfd.readouterr()
    assert err.count("\n") == err.count("continuing offline") == (at == "init"), err
    assert not leaks(out, err)
    for pid in processes(place):  # as a scheduler does when the job has ended
        os.kill(pid, signal.SIGKILL)
    server.behaviour, server.turn = "answer", None
    sync(out.splitlines()[-1], server)
    (wandb_run,) = (found for found in server.runs.values() if found.history)
    last = 6 if at == "stream" else 3
    assert wandb_run.column("epoch/step") == list(range(last))
    assert wandb_run.column("round/round") == list(range(0, last, 3))


def metrics(output: Path) -> list[dict[str, Any]]:
    clock = ("seconds", "images_per_second", "latency", *SPEEDUP)
    found = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in clock} for line in found]


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Result, float]:
    """Data, a run on it with W&B off, how it ended and how long it took."""
    place = tmp_path_factory.mktemp("off")
    data = write_noise_idx(place / "idx", 48, 20)
    began = time.monotonic()
    done = gammaslim(*small(data, place / "run"), "--wandb", "off")
    assert done.code == 0, done
    return data, place / "run", done, time.monotonic() - began


@pytest.mark.parametrize(("how", "at"), [("hang", "init"), ("hang", "stream"), ("500", "finish")])
def test_an_outage_changes_nothing_of_the_job(
    place: Path,
    server: WandbServer,
    without: tuple[Path, Path, Result, float],
    how: str,
    at: str,
) -> None:
    if at == "init":
        server.behaviour = how
    else:
        server.turn = at, how
    data, undisturbed, _, took = without
    began = time.monotonic()
    done = gammaslim(*small(data, place), env=server.env)
    assert done.code == 0, done
    assert time.monotonic() - began < took + 25
    assert metrics(place) == metrics(undisturbed)
    assert done.err.count("\n") == (at == "init"), done
    assert "wandb sync" in done.out.splitlines()[-1]
    model = Path("rounds") / "01" / "model.safetensors"
    assert (place / model).read_bytes() == (undisturbed / model).read_bytes()


def test_variables_of_wandb_win(
    place: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "WANDB_PROJECT": "theirs", "WANDB_NAME": "name", "WANDB_RUN_GROUP": "sweep",
        "WANDB_TAGS": "a,b", "WANDB_NOTES": "notes", "WANDB_ENTITY": "team",
        "WANDB_RUN_ID": "chosen", "WANDB_DIR": str(place.parent / "elsewhere"),
        "WANDB_JOB_TYPE": "",
    }  # fmt: skip
    for key, value in (server.env | given).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(tracking, "MIN_SYNC", 30.0)
    tracker = begun(track(place))
    tracker.finish({})
    assert tracker.segments.sync_command() is None
    fields = server.runs["chosen"].fields
    expected = {
        "project": "theirs", "displayName": "name", "groupName": "sweep", "entity": "team",
        "tags": ["a", "b"], "notes": "notes",
    }  # fmt: skip
    assert {key: fields[key] for key in expected} == expected
    assert list((place.parent / "elsewhere" / "wandb").glob("run-*-chosen"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    asked = Tracker("auto", "of the command line", place, {})
    asked.finish({})
    offline = asked.segments.sync_command()
    assert offline
    assert "elsewhere/wandb/offline-run-" in offline
    sync(offline, server)
    fields = server.runs["chosen-2"].fields
    assert fields["project"] == "of the command line"
    assert (fields["displayName"], fields["groupName"]) == ("name", "sweep")


def test_a_killed_job_leaves_no_process_and_its_numbers(place: Path) -> None:
    data = write_noise_idx(place.parent / "idx", 48, 20)
    kill = (sys.executable, KILL_AT, "round saved", 2, place.parent / "proof")
    done = run(*kill, *small(data, place), env={"WANDB_MODE": "offline"})
    assert done.code == -signal.SIGKILL, done
    assert gone(place, 15)
    with WandbServer() as server:
        sync(str(track(place, "offline").segments.sync_command()), server)
        (wandb_run,) = server.runs.values()
    assert wandb_run.column("epoch/step") == [line["step"] for line in lines(place, "epoch")]


def test_signals_to_all_processes_of_the_job_are_not_for_wandb(place: Path) -> None:
    tracker = begun(track(place, "offline"))
    assert tracker._process
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(tracker._process.pid, number)
    log_some(tracker, 0)
    tracker.finish({})
    assert tracker._process.returncode == 0


def test_when_its_process_dies_that_is_said_once(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = begun(track(place, "offline"))
    assert tracker._process
    tracker._process.kill()
    tracker._process.wait()
    log_some(tracker, 0)
    log_some(tracker, 3)
    tracker.finish({})
    assert capsys.readouterr().err.count("Warning: W&B") == 1


@pytest.mark.parametrize(
    ("mode", "project", "env", "warning"),
    [
        ("offline", "a/b#c", {}, "W&B did not start"),
        ("auto", "gammaslim", {"WANDB_MODE": "bogus"}, "continuing offline"),
        ("auto", "gammaslim", {"WANDB_MODE": "disabled"}, ""),
        ("online", "gammaslim", {"NETRC": "/dev/null"}, "continuing offline"),
        ("online", "gammaslim", {"WANDB_API_KEY": f"{KEY}!"}, "continuing offline"),
    ],
    ids=["project", "mode", "disabled", "no key", "wrong key"],
)
@pytest.mark.sampled(2)
def test_wrong_settings_cost_a_warning(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    mode: str,
    project: str,
    env: dict[str, str],
    warning: str,
) -> None:
    monkeypatch.setattr(tracking, "MIN_SYNC", 30.0)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    place.mkdir()
    tracker = Tracker(mode, project, place, {})
    log_some(tracker, 0)
    tracker.finish({})
    out, err = capfd.readouterr()
    assert warning in err
    assert err.count("\n") == bool(warning), err
    assert not leaks(out, err)


SLOW_START = """
import time, wandb
start = wandb.init
def init(*args, **options):
    run = start(*args, **options)
    time.sleep(4)
    return run
wandb.init = init
"""


def test_an_offline_run_that_starts_slowly_is_not_started_twice(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PYTHONPATH", str(place.parent))
    (place.parent / "sitecustomize.py").write_text(SLOW_START)
    tracker = track(place, "auto")
    wait_for(lambda: list(place.glob("wandb/offline-run-*")))
    assert not tracker._started
    tracker.finish({})
    assert len(list(place.glob("wandb/offline-run-*"))) == 1


def test_the_final_sync_takes_at_most_a_share_of_the_jobs_time(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []

    class Endless:
        def join(self, limit: float) -> None:
            waited.append(limit)

        def is_alive(self) -> bool:
            return False

    for took in (10.0, 600.0, 1e6):
        tracker = track(place, "off")
        tracker.mode, tracker._thread = "online", Endless()  # type: ignore[assignment]
        tracker.segments = tracking.Segments(place)
        monkeypatch.setattr(tracker, "start_time", time.monotonic() - took)
        tracker.finish({})
    assert waited == pytest.approx([2.0, 18.0, 30.0], abs=0.1)
