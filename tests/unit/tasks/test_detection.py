"""The built-in task of images and boxes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.artifacts.model_card import ModelCard, save_model
from job.artifacts.saving import load
from job.cli.command_options import (
    ModelOptions,
    SensitivityOptions,
    SlimOptions,
)
from job.cli.sensitivity import print_sensitivity
from job.cli.slim import slim_model
from job.config import PruneConfig
from job.data.preprocessing import Preprocessing
from job.errors import UsageError
from job.models.detectors import as_detector, detector_preprocessing
from job.pipeline.prune import prune
from job.processes import world_size
from job.tasks.detection import Detection
from job.tasks.image_task import TaskOptions
from job.tasks.loading import try_own_objective
from job.training.trial import batch_for_processes
from support import coco


def config(data: Path, **more: Any) -> PruneConfig:
    given: dict[str, Any] = {
        "task": "detection", "data": str(data), "model": "nets:ssd", "output": "run",
        "base_epochs": 6, "rounds": 1, "epochs": 6, "batch_size": 6, "lr": 0.005, "workers": 0,
        "wandb": "off", "device": "cpu", "policy": "global", "target": "params=0.75",
    }  # fmt: skip
    return PruneConfig(**given | more)


@pytest.fixture
def nets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "nets", SimpleNamespace(ssd=coco.ssd, body=coco.Body))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 0.9}, "--crop has no effect with --task detection"),
        ({"transform": "imagenet"}, "--transform has no effect with --task detection"),
        ({"compile": True}, "--compile does not work with --task detection: leave it out"),
        ({"distill_alpha": 0.5}, "--distill-alpha does not work with --task detection"),
    ],
)
def test_options_that_do_not_work_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(Path("data"), **options)


@pytest.mark.usefixtures("nets")
def test_a_network_that_is_no_detector_is_named(tmp_path: Path) -> None:
    data = coco.write_coco(tmp_path / "data", {"train": 4, "val": 2})
    with pytest.raises(UsageError, match="nets:body is a Body: --task detection takes a detector"):
        prune(config(data, model="nets:body"))
    task: Any = Detection(TaskOptions(str(data), Preprocessing.of("small", 64)))
    network: Any = as_detector("ssd", coco.ssd(2))  # a class too few
    with pytest.raises(UsageError, match="--task detection: the network fails"):
        try_own_objective("detection", task, task.objective(network), network)


def test_every_process_needs_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world_size() == 1
    assert batch_for_processes(config(Path("data"), batch_size=1), 1) == 1
    monkeypatch.setattr("job.training.trial.world_size", lambda: 4)
    with pytest.raises(UsageError, match="--batch-size 3 is too small for 4 processes"):
        batch_for_processes(config(Path("data"), batch_size=3), 9)


@pytest.mark.usefixtures("nets")
def test_slim_and_sensitivity_calibrate_on_the_items_of_a_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = coco.write_coco(tmp_path / "data", {"train": 8, "val": 4})
    network: Any = as_detector("ssd", coco.ssd(3)).eval()
    how = detector_preprocessing(network, None)
    names = "__background__", "disc", "square"
    card = ModelCard("nets:ssd", {}, 3, class_names=names, preprocessing=how, task="detection")
    save_model(tmp_path / "wide", network, card)
    model = ModelOptions(path="wide")
    more: dict[str, Any] = {"data": str(data), "device": "cpu", "workers": 0}
    slim_model(model, "narrow", SlimOptions(**more, target="params=0.7", recover=1))
    said = "".join(capsys.readouterr())
    assert "importance refit, compensation regress, allocation outputs" in said
    assert "map on the validation split of the task detection (4 items): 0." in said
    narrow = json.loads(Path("narrow/model.json").read_text())
    assert 0 <= narrow["metrics"]["valid_map"] <= 1
    loaded: Any = load("narrow")
    params, before = (sum(p.numel() for p in each.parameters()) for each in (loaded, network))
    assert 0.6 * before < params <= 0.7 * before
    print_sensitivity(model, SensitivityOptions(**more), None, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == "squared_error"
    assert 1 <= found["images"] <= 8  # those that the fits do not use
    with pytest.raises(UsageError, match="--importance taylor needs labels of classes"):
        slim_model(model, "other", SlimOptions(**more, importance="taylor"))
