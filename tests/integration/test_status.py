"""``status``: alive or dead from the files alone, how far, and lines that work when typed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from job.artifacts.lock import Lock
from job.artifacts.run_reader import read_run
from job.artifacts.run_status import read_status, seconds_left
from support.commands import ROOT, clean_environ, gammaslim
from support.commands import run as run_command
from support.datasets import write_noise_idx
from support.report_pages import ENTRIES, entry, make_run

OLD_RUNS = ROOT / "tests" / "support" / "old_runs"


def lock(folder: Path, age: float, **more: Any) -> None:
    """As a job on another machine holds the run, which was last seen ``age`` seconds ago."""
    record = {"id": "1", "host": "node7", "boot": "b", "processes": "pid:[1]", "pid": 7}
    (folder / "lock.json").write_text(json.dumps(record | {"started": "5"} | more))
    beat = time.time() - age
    os.utime(folder / "lock.json", (beat, beat))


def running(folder: Path, age: float) -> Path:
    """A run of 5 rounds of 2 epochs, in its third round, by a job on another machine."""
    entries = tuple(entry(n, 0.9 - 0.01 * n, 1000 - 100 * n, seconds=4.0) for n in range(3))
    make_run(folder, entries, state="running", code=None)
    config = (folder / "config.toml").read_text()
    more = "rate = 0.9\nrounds = 5\nepochs = 2\n"
    (folder / "config.toml").write_text(
        config.replace("rate = 0.9\n", more) + "\n[base]\nepochs = 2\n"
    )
    status = json.loads((folder / "status.json").read_text())
    status |= {"round": 3, "epoch": 0, "time": time.time() - age}
    (folder / "status.json").write_text(json.dumps(status))
    lock(folder, age)
    return folder


def test_a_run_on_another_machine_is_alive_or_dead_by_its_heartbeat(tmp_path: Path) -> None:
    alive = read_status(running(tmp_path / "alive", 1))
    assert (alive.state, alive.alive, alive.host, alive.pid) == ("running", True, "node7", 7)
    assert alive.age
    assert alive.age < 10
    assert alive.next == (f"touch {tmp_path}/alive/STOP",)
    dead = read_status(running(tmp_path / "dead", 3600))
    assert (dead.state, dead.alive) == ("died", False)
    assert dead.age
    assert 3590 < dead.age < 3700
    done = gammaslim("status", tmp_path / "dead")
    assert (done.code, done.err) == (0, ""), done
    lines = dict(line.split("  ", 1) for line in done.out.splitlines())
    assert lines["state"].strip() == "died, dead: last heartbeat 60 min ago"
    assert lines["job"].strip() == "process 7 on node7"
    assert lines["position"].strip() == "round 3 of 5, epoch 1 of 2, step 80"
    assert lines["best so far"].startswith("rounds/02, accuracy 0.8800, 80.0% of the parameters")
    assert lines["time left"].strip() == "about 10 s, once resumed"


def test_the_time_left_counts_epochs_and_cuts(tmp_path: Path) -> None:
    """Two epochs of 1.5 s are left in each of 3 rounds, and two cuts of 1 s."""
    history = read_run(running(tmp_path / "run", 1))
    assert seconds_left(history) == pytest.approx(3 * 2 * 1.5 + 2 * 1.0)


def test_json_is_for_scripts(tmp_path: Path) -> None:
    running(tmp_path / "a", 1)
    make_run(tmp_path / "b", ENTRIES[:1], best=0, state="failed", code=74)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        stop = {"event": "stop", "state": "failed", "exit_code": 74, "error": "disk \x1b full"}
        file.write(json.dumps(stop) + "\n")
    done = gammaslim("status", tmp_path, "--json")
    assert done.code == 0, done
    record = json.loads(done.out)
    assert record["format"] == 1
    one, two = record["runs"]
    assert (one["state"], one["round"], one["rounds"], one["alive"]) == ("running", 3, 5, True)
    assert (two["state"], two["exit_code"], two["error"]) == ("failed", 74, "disk \\x1b full")
    text = gammaslim("status", tmp_path)
    rows = [line.split() for line in text.out.splitlines()]
    assert rows[0][:3] == ["run", "state", "since"]
    assert rows[1][1] == "running"
    assert rows[2][1:3] == ["failed", "(74)"]
    assert "b: disk \\x1b full" in text.out


@pytest.mark.parametrize("processes", [2, 1])
@pytest.mark.sampled(2)
def test_the_line_to_resume_resumes(tmp_path: Path, processes: int) -> None:
    run = tmp_path / "my runs" / "stopped"
    shutil.copytree(OLD_RUNS / "stopped", run)
    shutil.rmtree(run / "checkpoints")  # from the end of a round
    if processes > 1:
        recorded = json.loads((run / "status.json").read_text()) | {"processes": processes}
        (run / "status.json").write_text(json.dumps(recorded))
    status = read_status(run)
    assert (status.state, status.exit_code) == ("stopped", 75)
    (line,) = status.next
    program, *args = shlex.split(line)
    assert program == "gammaslim"
    done = gammaslim(*args, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    assert done.code == 0, done
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    resumed = [e for e in events if e["event"] == "resume"][-1]
    assert (resumed["processes_before"], resumed["processes"]) == (processes, processes)
    assert json.loads((run / "status.json").read_text()).get("processes", 1) == processes
    after = read_status(run)
    assert (after.state, after.seconds_left) == ("finished", None)
    assert after.next[0] == f"gammaslim report '{run}'"


def test_a_base_that_is_given_has_no_epochs(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", (), state="stopped", code=75)
    with (folder / "config.toml").open("a") as file:
        file.write("\n[base]\nepochs = 0\n")
    done = gammaslim("status", folder)
    assert re.search(r"^position +the base$", done.out, re.MULTILINE)


def test_the_line_to_resume_starts_as_many_processes(tmp_path: Path) -> None:
    run = running(tmp_path / "run", 3600)
    assert read_status(run).next[0].startswith("gammaslim prune --config ")
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"processes": 4}))
    assert read_status(run).next[0].startswith("gammaslim launch --nproc 4 -- prune --config ")


def test_a_copy_of_a_run_was_saved_when_the_run_was(tmp_path: Path) -> None:
    run = running(tmp_path / "run", 3600)
    (run / "checkpoints" / "000000000000").mkdir(parents=True)
    (run / "checkpoints" / "000000000000" / "manifest.json").write_text("{}")  # now
    assert read_status(run).saved_age == pytest.approx(3600, abs=60)


def test_the_line_to_resume_works_in_another_folder(tmp_path: Path) -> None:
    """Data that were given relative to the folder of the job are found by their path."""
    folder = make_run(tmp_path / "run", ENTRIES[:1], best=0, state="stopped", code=75)
    config = (folder / "config.toml").read_text().replace("rate", 'data = "food"\nrate')
    (folder / "config.toml").write_text(config + '\npath = "/data/my food"\n')
    (line,) = read_status(folder).next
    assert shlex.split(line)[-2:] == ["--data", "/data/my food"]


def test_the_error_that_ended_a_run_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    script = (
        "import job.pipeline.round as r\n"
        "from job.errors import StorageError\n"
        "def full(*_, **__): raise StorageError('cannot write x: No space left on device')\n"
        "r.keep_round = full\n"
        "from job.__main__ import main\nmain()\n"
    )
    done = run_command(
        sys.executable, "-c", script, "prune", "--data", write_noise_idx(tmp_path / "d", 32, 12),
        "--output", run, "--base-epochs", 1, "--rounds", 1, "--wandb", "off", "--workers", 0,
        "--model-arg", "base=4", env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.code == 74, done
    status = read_status(run)
    assert (status.state, status.error) == ("failed", "cannot write x: No space left on device")
    assert "last error" in gammaslim("status", run).out


def test_watching_ends_with_the_run_or_by_an_interrupt(tmp_path: Path) -> None:
    run = running(tmp_path / "run", 0)
    mine = Lock(run)
    (run / "lock.json").unlink()
    mine.acquire()
    command = [sys.executable, "-m", "job", "status", str(run), "--watch", "--json"]
    watching = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=clean_environ(), cwd=ROOT)
        for _ in range(2)
    ]
    for process in watching:
        assert process.stdout
        assert json.loads(process.stdout.readline())["runs"][0]["state"] == "running"
    watching[0].send_signal(signal.SIGINT)
    assert watching[0].wait(timeout=20) == 0
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "finished", "exit_code": 0}))
    mine.release()
    assert watching[1].stdout
    last = json.loads(watching[1].stdout.read().splitlines()[-1])
    assert last["runs"][0]["state"] == "finished"
    assert watching[1].wait(timeout=20) == 0


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    done = gammaslim("status", tmp_path / "none")
    assert (done.code, done.out) == (66, "")
    assert "none does not exist" in done.err
