"""Two jobs on one run directory: the second is refused while the first lives."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import job.artifacts.lock
from job.artifacts.lock import Lock
from job.errors import OutputError


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.artifacts.lock, "BEAT", 0.1)
    monkeypatch.setattr(job.artifacts.lock, "STALE", 1.5)


def elsewhere(lock: Lock, host: str = "node7") -> Lock:
    """As if taken on another host, or in another container of this one."""
    lock._record = replace(lock._record, host=host, processes="pid:[1]")
    return lock


def killed(lock: Lock) -> None:
    """End the heartbeat and leave the file, as SIGKILL does."""
    lock._ended.set()
    assert lock._thread
    lock._thread.join()


def test_a_living_job_of_another_host_is_seen_by_its_heartbeat(tmp_path: Path) -> None:
    first = elsewhere(Lock(tmp_path / "run"))
    first.acquire()
    lines: list[str] = []
    with pytest.raises(OutputError, match=r"in use by process \d+ on node7"):
        Lock(tmp_path / "run").acquire(lines.append)
    assert "node7" in lines[0]
    first.release()
    Lock(tmp_path / "run").acquire()


def test_a_dead_job_of_another_host_blocks_only_until_its_heartbeat_is_old(tmp_path: Path) -> None:
    first = elsewhere(Lock(tmp_path / "run"))
    first.acquire()
    killed(first)
    began = time.monotonic()
    second = Lock(tmp_path / "run")
    second.acquire()
    assert time.monotonic() - began > 1
    assert json.loads((tmp_path / "run" / "lock.json").read_text())["id"] == second._record.id
    second.release()
    assert not list((tmp_path / "run").iterdir())


def test_a_clock_that_is_wrong_on_one_host_changes_nothing(tmp_path: Path) -> None:
    """The file system's own clock dates both the heartbeat and the probe."""
    first = elsewhere(Lock(tmp_path / "run"))
    first.acquire()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: 0.0)
        with pytest.raises(OutputError):
            Lock(tmp_path / "run").acquire()
    first.release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1e400}'])
def test_a_damaged_lock_is_taken_over(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock.json").write_text(content)
    Lock(tmp_path).acquire()


def test_a_process_number_that_is_used_again_does_not_block(tmp_path: Path) -> None:
    first = Lock(tmp_path)
    first.acquire()
    killed(first)
    owner = json.loads((tmp_path / "lock.json").read_text())
    (tmp_path / "lock.json").write_text(json.dumps(owner | {"started": "1"}))
    lines: list[str] = []
    Lock(tmp_path).acquire(lines.append)
    assert not lines  # it did not wait for a heartbeat


def test_a_job_that_was_silent_too_long_finds_out_that_it_lost_the_run(tmp_path: Path) -> None:
    first = elsewhere(Lock(tmp_path))
    first.acquire()
    killed(first)  # as if its host had been suspended …
    second = Lock(tmp_path)
    second.acquire()
    first._ended.clear()
    first._keep_alive()  # … and went on now
    with pytest.raises(OutputError, match="taken over by another job"):
        first.check()
    first.release()
    assert json.loads((tmp_path / "lock.json").read_text())["id"] == second._record.id


def test_of_two_that_take_over_at_once_one_has_it(tmp_path: Path) -> None:
    dead = elsewhere(Lock(tmp_path))
    dead.acquire()
    killed(dead)
    code = (
        "import sys, job.artifacts.lock; from pathlib import Path\n"
        "job.artifacts.lock.STALE = 1.5\n"
        "try: job.artifacts.lock.Lock(Path(sys.argv[1])).acquire(); print('mine');"
        " sys.stdin.read()\n"
        "except Exception as error: print(error); sys.stdin.read()\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [process.stdout.readline() for process in both if process.stdout]
    for process in both:
        process.communicate("")
    assert said.count("mine\n") == 1, said
