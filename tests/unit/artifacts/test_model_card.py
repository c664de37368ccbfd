"""model.json: written and read as one record, and errors that say what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.artifacts.model_card import ModelCard, read_card, save_model
from job.artifacts.records import Lineage
from job.data.preprocessing import Preprocessing
from job.errors import DataError
from job.slimming.planning.base import Base
from job.slimming.planning.cost import Cost
from job.slimming.planning.layer_channels import LayerChannels

KEYS = [
    "format", "model", "args", "num_classes", "class_names", "width", "layers", "widths", "input",
    "metrics", "lineage", "base", "versions",
]  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, ModelCard]:
    wide = ModelCard("student", {"base": 2}, 3, preprocessing=Preprocessing.of("small", 32))
    kept = (0, 3)
    layers = {"cnn.3.3": LayerChannels(out=kept), "cnn.3.4": LayerChannels(bias=True)}
    card = replace(
        wide,
        class_names=("a", "b", "c"),
        layers=layers,
        metrics={"valid_acc": 0.5},
        lineage=Lineage(base_sha256="0", seed=1, from_=Lineage(run="/r", round=2)),
        base=Base({"cnn.0.0": 2}, Cost(1, 2, 3, 4), slim=True),
    )
    save_model(tmp_path / "model", wide.build(), card)
    return tmp_path / "model", card


def test_a_card_is_read_as_it_was_written(saved: tuple[Path, ModelCard]) -> None:
    folder, card = saved
    content = json.loads((folder / "model.json").read_text())
    assert list(content) == KEYS
    assert content["base"] == {
        "widths": {"cnn.0.0": 2},
        "cost": {"channels": 1, "params": 2, "macs": 3, "bytes": 4},
        "slim": True,
    }
    assert content["lineage"]["from"] == {"run": "/r", "round": 2}
    assert content["layers"] == {"cnn.3.3": {"out": [0, 3]}, "cnn.3.4": {"bias": True}}
    again = read_card(folder)
    assert again == replace(card, widths=again.widths, versions=again.versions)
    assert again.widths == content["widths"]
    assert "torch" in again.versions


def test_the_cost_of_a_base_can_be_unknown(saved: tuple[Path, ModelCard]) -> None:
    folder, card = saved
    other = folder.with_name("other")
    save_model(
        other, replace(card, layers={}).build(), replace(card, base=Base({"cnn.0.0": 2}, None))
    )
    content = json.loads((other / "model.json").read_text())
    assert content["base"] == {"widths": {"cnn.0.0": 2}, "cost": None}
    assert read_card(other).base == Base({"cnn.0.0": 2}, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_classes": "3"}, "is not a model card: num_classes: '3' is not int"),
        ({"num_classes": 4}, "3 class names for 4 classes"),
        ({"width": float("nan")}, "a width of nan"),
        ({"layers": {"cnn.0.0": {"out": [1, 0]}}}, "rising indices"),
        ({"base": {"widths": {"a": "x"}, "cost": None}}, "base: widths: 'x' is not int"),
        ({"lineage": {"seed": "x"}}, "lineage: seed: 'x' is not int"),
        ({"input": {}}, "unknown preprocessing"),
        ({"format": 2}, "format 2 is not 1; use a newer gammaslim"),
    ],
)
def test_a_damaged_card_says_what_is_wrong(
    saved: tuple[Path, ModelCard], change: dict[str, Any], said: str
) -> None:
    path = saved[0] / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=said):
        read_card(saved[0])


def test_a_card_of_an_earlier_or_later_version_is_read(saved: tuple[Path, ModelCard]) -> None:
    path = saved[0] / "model.json"
    content = json.loads(path.read_text())
    for key in ("base", "widths", "versions"):
        del content[key]
    path.write_text(json.dumps(content | {"later": 1}))
    assert read_card(saved[0]).base is None
