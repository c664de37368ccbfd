"""The built-in task of images with several classes each, from CSV files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from job.data.preprocessing import Preprocessing
from job.errors import DataError, InputNotFound, UsageError
from job.tasks.image_task import TaskOptions
from job.tasks.multi_label import MultiLabel
from support.colours import COLOURS, write


def options(data: Path | None, **more: Any) -> TaskOptions:
    return TaskOptions(data and str(data), Preprocessing.of("small", 32), **more)


@pytest.mark.parametrize("columns", [False, True])
def test_labels_are_names_in_a_column_or_columns_of_marks(tmp_path: Path, columns: bool) -> None:
    task = MultiLabel(options(write(tmp_path, 30, columns=columns)))
    assert task.class_names == COLOURS
    assert (len(task.training), len(task.validation)) == (27, 3)
    for number in range(3):
        image, target = task.validation.sample(number, 0)
        bright = image.double().mean((0, 1)) > 90
        assert target.tolist() == bright.flip(0).tolist()
    again = MultiLabel(options(tmp_path / "images.csv"))
    assert again.fingerprint == task.fingerprint
    one, other = (task.training.sample(4, seed)[0] for seed in (1, 2))
    assert torch.equal(one, task.training.sample(4, 1)[0])
    assert not torch.equal(one, other)


def test_the_loss_and_f1_are_those_of_their_definitions(tmp_path: Path) -> None:
    task = MultiLabel(options(write(tmp_path, 20)))
    logits = torch.tensor([[2.0, -1.0, 0.5], [-1.0, -2.0, 3.0]])
    targets = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    loss, count = task.loss(logits, targets)
    chances = logits.sigmoid()
    expected = -(targets * chances.log() + (1 - targets) * (1 - chances).log()).mean(1).sum()
    torch.testing.assert_close(loss, expected)
    assert count == 2
    sums, counts = task.metrics(logits, targets)["f1"]
    assert sums.tolist() == [2, 0, 2]
    assert counts.tolist() == [3, 0, 3]  # F1 is 2 TP / (2 TP + FP + FN)
    assert task.distillation_loss(logits, logits, 3.0).item() == pytest.approx(0, abs=1e-6)
    assert task.distillation_loss(logits, -logits, 3.0).item() > 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,labels\na.png,x\n", "has no column of image paths"),
        ("file,labels\na.png,\n", "no training image has a class"),
        ("file,labels,split\na.png,x,train\na.png,y,val\n", "'y' has no training image"),
        ("file,x,y\na.png,0,2\n", "line 2 has '2' for the class 'y': 0 or 1"),
    ],
)
def test_lists_that_cannot_be_used_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "images.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        MultiLabel(options(tmp_path))
    with pytest.raises(InputNotFound, match="does not exist"):
        MultiLabel(options(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="--task multi-label needs --data: a CSV file"):
        MultiLabel(options(None))
