"""A second job on a run directory is refused while the first lives."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from job.artifacts.lock import Lock
from support.commands import gammaslim

OPTIONS = ("--base-epochs", 60, "--rounds", 0, "--batch-size", 16, "--wandb", "off")


def test_a_second_job_is_refused_while_the_first_lives(noise: Path, tmp_path: Path) -> None:
    args = ("prune", "--data", noise, "--output", tmp_path / "run", *OPTIONS)
    command = [sys.executable, "-m", "job", *map(str, args)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoints").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = gammaslim(*args)
        assert second.code == 73, second
        assert f"in use by process {first.pid} on " in second.err
        assert len(second.err.splitlines()) == 1
        assert first.poll() is None
        first.send_signal(signal.SIGKILL)
        first.wait()
        again = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while '"resume"' not in (tmp_path / "run" / "metrics.jsonl").read_text():
            assert again.poll() is None, again.communicate()
            time.sleep(0.05)
        again.terminate()
        again.communicate(timeout=60)
        assert again.returncode == 75
        assert not (tmp_path / "run" / "lock.json").exists()
    finally:
        first.kill()
        first.communicate()


def test_a_refused_job_leaves_a_stop_request_to_the_first(noise: Path, tmp_path: Path) -> None:
    held = Lock(tmp_path / "run")
    held.acquire()
    (tmp_path / "run" / "STOP").touch()
    refused = gammaslim("prune", "--data", noise, "--output", tmp_path / "run", *OPTIONS)
    assert refused.code == 73
    assert (tmp_path / "run" / "STOP").exists()
    held.release()
