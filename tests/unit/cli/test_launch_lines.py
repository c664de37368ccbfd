"""The lines of ``launch`` are JSON objects where those of its command are."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from job.cli import main
from job.console import log_as_json, print_error
from support.brightness import call


@pytest.fixture(autouse=True)
def _text_again() -> Iterator[None]:
    yield
    log_as_json(False)


def lines_of(monkeypatch: pytest.MonkeyPatch, *args: str) -> list[str]:
    def failing(*_: object) -> int:
        print_error("the processes ended")
        return 1

    monkeypatch.setattr(main, "nodes_left_out", lambda _env: 1)
    monkeypatch.setattr(main, "launch", failing)
    done = call("launch", "--nproc", 2, "--", "prune", *args)
    assert done.exit_code == 1, done.output
    return done.output.splitlines()


def test_lines_of_launch_are_objects_in_a_json_log(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [json.loads(line) for line in lines_of(monkeypatch, "--log", "json")]
    assert [line["event"] for line in found] == ["warning", "error"]
    assert found[1]["text"] == "the processes ended"


def test_lines_of_launch_are_text_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [line.partition(":")[0] for line in lines_of(monkeypatch)] == ["Warning", "Error"]
