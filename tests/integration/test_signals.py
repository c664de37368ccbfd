"""Requests to stop: none is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from job.distributed import signals, stop
from job.distributed.stop import STOP, Watch


@pytest.fixture(autouse=True)
def _nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals._State, "requested", False)
    monkeypatch.setattr(stop, "FILE_INTERVAL", 0.0)


def test_a_signal_that_comes_while_the_file_is_looked_for_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(tmp_path / "STOP", 300)

    def slow_storage(_: Watch) -> None:
        signals._State.requested = True  # as the handler does

    monkeypatch.setattr(Watch, "_identity", slow_storage)
    assert watch.requested_here()
    assert watch.poll() == STOP


def test_an_old_file_is_no_request_and_a_new_one_is(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    watch = Watch(tmp_path / "STOP", 300)
    assert not watch.requested_here()
    watch.forget_old_request()
    assert not (tmp_path / "STOP").exists()
    (tmp_path / "other").touch()
    (tmp_path / "other").rename(tmp_path / "STOP")
    watch.forget_old_request()
    assert (tmp_path / "STOP").exists()
    assert watch.poll() == STOP


BECOME = """
import signal, sys
from job.distributed.signals import become
become([sys.executable, "-c", sys.argv[1]])
"""
ASKED_BEFORE = """
import os, signal, sys
os.kill(os.getpid(), signal.SIGUSR1)  # as while Python starts
from job.__main__ import main
sys.argv = ["gammaslim", "prune", "--output", "run"]
main()
"""


def test_a_request_while_a_program_takes_anothers_place_is_answered(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", BECOME, ASKED_BEFORE],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (75, "Error: stopped by request\n")
    assert not (tmp_path / "run").exists()
