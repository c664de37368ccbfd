"""wandb.json keeps its keys; a damaged one does not end the job."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from job.tracking.wandb_runs import Segments

if TYPE_CHECKING:
    from pathlib import Path


def test_attempts_continue_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    path = tmp_path / "wandb.json"
    path.write_text(json.dumps({"id": "abc", "attempts": 2, "unsent": ["wandb/run-1"]}))
    segments = Segments(tmp_path)
    assert (segments.id, segments.attempt) == ("abc", 3)
    segments.add_folder(str(tmp_path / "wandb" / "run-2"))
    stored = {"id": "abc", "attempts": 3, "unsent": ["wandb/run-1", "wandb/run-2"]}
    assert list(json.loads(path.read_text()).items()) == list(stored.items())


@pytest.mark.parametrize("content", ["", "[]", '{"id": 3, "attempts": "two", "unsent": null}'])
def test_a_damaged_file_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    (tmp_path / "wandb.json").write_text(content)
    segments = Segments(tmp_path)
    assert len(segments.id) == 8
    assert (segments.attempt, segments.unsent) == (1, [])
