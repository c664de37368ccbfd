"""Charts and images that W&B shows."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image

from job.artifacts.evaluation_record import ErrorRecord, ExampleImage, RoundEvaluation
from job.artifacts.records import RoundRecord
from job.tracking import wandb_charts
from job.tracking.wandb_charts import accuracy_charts, confusion_chart, example_images
from job.tracking.wandb_process import _gallery


def entry(number: int, params: int, latency: float | None = None) -> RoundRecord:
    return RoundRecord(
        round=number, width=1.0, channels=1, params=params, macs=7, bytes=9, valid_acc=0.5,
        valid_loss=1.0, step=0, latency=latency,
    )  # fmt: skip


def png(level: int) -> str:
    content = io.BytesIO()
    Image.new("RGB", (4, 3), (level, 0, 0)).save(content, "png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def evaluation() -> RoundEvaluation:
    examples = (
        ExampleImage("a.png", label=0, base=0, predicted=1, image=png(10)),
        ExampleImage("b.png", label=1, base=2, predicted=1, image=png(20)),
    )
    errors = ErrorRecord(index=(0, 3), label=(0, 2), predicted=(1, 1))
    return RoundEvaluation((2, 2, 1), errors, lost=1, won=1, examples=examples)


def test_a_cost_that_was_not_measured_has_no_chart() -> None:
    charts = accuracy_charts([entry(0, 100, 0.5), entry(1, 40)])
    assert charts["accuracy/by_params"]["table"][1] == [("base", 100, 0.5), ("1", 40, 0.5)]
    assert charts["accuracy/by_latency"]["table"][1] == [("base", 0.5, 0.5)]
    assert set(accuracy_charts([entry(0, 100)])) == {"accuracy/by_params", "accuracy/by_macs"}


def test_a_confusion_matrix_names_the_classes() -> None:
    (chart,) = confusion_chart("base", evaluation(), ("bread", "egg")).values()
    assert sorted(chart["table"][1]) == [
        ("2", "egg", 1), ("bread", "bread", 1), ("bread", "egg", 1), ("egg", "egg", 2),
    ]  # fmt: skip
    assert confusion_chart("base", None, ()) == {}


def test_a_large_confusion_matrix_keeps_its_largest_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_charts, "MAX_ROWS", 1)
    (chart,) = confusion_chart("base", evaluation(), ("bread", "egg")).values()
    assert chart["table"][1] == [("egg", "egg", 2)]


def test_examples_are_tables_of_images_lost_and_won() -> None:
    tables = example_images(evaluation(), ("bread", "egg", "soup"))
    assert [row[1:] for row in tables["examples/lost"][1]] == [("a.png", "bread", "bread", "egg")]
    assert [row[1:] for row in tables["examples/won"][1]] == [("b.png", "egg", "soup", "egg")]
    shown: Any = _gallery(tables["examples/won"])
    assert shown.data[0][0].image.getpixel((0, 0)) == (20, 0, 0)
    assert shown.data[0][1:] == ["b.png", "egg", "soup", "egg"]
