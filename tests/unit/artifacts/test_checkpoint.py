"""Folders and positions that are replaced, and the kills between two steps of that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from job.artifacts.accuracy import accuracy_change, signed_points
from job.artifacts.checkpoint import newest_position, save_position
from job.files import new_directory, tidy
from job.training.checkpoint_content import (
    CutRecord,
    Position,
    PrunedScores,
    RoundProgress,
    TrainingProgress,
)


def test_a_folder_that_is_replaced_is_there_before_and_after(tmp_path: Path) -> None:
    def make(text: str) -> None:
        with new_directory(tmp_path / "model") as folder:
            (folder / "content").write_text(text)

    def killed(path: Path, to: Path) -> None:
        if path.suffix == ".tmp" or to.suffix == moment:
            os._exit(9)
        rename(path, to)

    make("old")
    rename = Path.rename
    for moment in (".old", ""):  # before the old one is aside, and after it
        process = os.fork()
        if process == 0:
            Path.rename = killed  # type: ignore[method-assign,assignment]
            make("new")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
        assert (tmp_path / "model").exists() == bool(moment)
        tidy(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["model"]
        assert (tmp_path / "model" / "content").read_text() == "old"
    make("new")
    assert (tmp_path / "model" / "content").read_text() == "new"


TRAINING = TrainingProgress(processes=1, seconds=0.0, best=None)
PROGRESS = RoundProgress(
    scores=PrunedScores(),
    plan=CutRecord("", 1.0, {}),
    metrics_size=0,
    round_seconds=1.0,
    run_seconds=1.0,
)


def keep(folder: Path, *places: tuple[int, int]) -> list[str]:
    """Save positions at (round, batch); the names that are kept, all of them whole."""
    for round_, batch in places:
        tensors = {"w": torch.zeros(9)}
        save_position(folder, Position(round_, 0, batch, TRAINING, tensors, PROGRESS))
    kept = sorted(folder.glob("[0-9]*"))
    assert all(len(list(path.iterdir())) == 3 for path in kept)
    return [path.name for path in kept]


def test_two_whole_positions_are_kept_beside_damaged_and_later_ones(tmp_path: Path) -> None:
    first, second, third = (f"000-0000-000000{n}" for n in (1, 2, 3))
    assert keep(tmp_path, (0, 1), (0, 2)) == [first, second]
    (tmp_path / second / "state.safetensors").write_bytes(b"damaged")
    position, problems = newest_position(tmp_path, 0)
    assert position
    assert position.name == first
    assert len(problems) == 1
    assert keep(tmp_path, (0, 3)) == [first, third]
    # rounds/01 was removed to be repeated: positions of round 2 are of no use
    keep(tmp_path, (2, 1), (2, 2))
    assert keep(tmp_path, (1, 1)) == ["001-0000-0000001"]


def test_a_half_deleted_position_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: next(path.iterdir()).unlink())
    assert len(keep(tmp_path, (1, 1), (1, 2), (1, 3), (1, 4))) == 2
    assert len(list(tmp_path.iterdir())) > 2
    monkeypatch.undo()
    tidy(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("accuracy", "base", "text"),
    [(0.896, 0.9, "-0.40"), (0.9, 0.864, "+3.60"), (0.9, 0.9, "+0.00"), (0.899999, 0.9, "+0.00")],
)
def test_a_lost_point_has_one_sign(accuracy: float, base: float, text: str) -> None:
    assert signed_points(accuracy_change(accuracy, base)) == text
    assert signed_points(0.0 - accuracy_change(base, accuracy)) == text
