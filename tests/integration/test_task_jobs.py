"""The job of each built-in task beside classification, from its data to a smaller model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from job.artifacts.saving import load
from job.cli.command_options import EvaluateOptions, ModelOptions
from job.cli.evaluate import evaluate
from job.config import PruneConfig
from job.pipeline.prune import prune
from job.report.page import write_run_report
from support import coco
from support.colours import write
from support.shapes import rgb_unet, write_masks


def test_the_job_ends_with_a_smaller_network_of_several_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data", 60)
    monkeypatch.chdir(tmp_path)
    prune(PruneConfig(
        task="multi-label", data=str(data), output="run", base_epochs=12, rounds=1, epochs=3,
        batch_size=4, lr=0.005, model_arg=(("base", 4),), workers=0, wandb="off", device="cpu",
        target="macs=0.7",
    ))  # fmt: skip
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["rounds"][0]["valid_f1"] > 0.8
    assert summary["rounds"][0]["macs"] <= 0.7 * summary["base"]["macs"]
    capsys.readouterr()
    evaluate(
        ModelOptions(path="run/rounds/01"), EvaluateOptions(device="cpu", workers=0), as_json=True
    )
    found = json.loads(capsys.readouterr().out)
    assert found["f1"] == pytest.approx(summary["rounds"][0]["valid_f1"])
    assert found["count"] == 6


def test_the_job_ends_with_a_smaller_detector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = coco.write_coco(tmp_path / "data", {"train": 48, "val": 12})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "nets", SimpleNamespace(ssd=coco.ssd))
    prune(PruneConfig(
        task="detection", data=str(data), model="nets:ssd", output="run", base_epochs=6, rounds=1,
        epochs=6, batch_size=6, lr=0.005, workers=0, wandb="off", device="cpu", policy="global",
        target="params=0.75", recover=1,
    ))  # fmt: skip
    said = capsys.readouterr()
    assert "data: task detection: 48 training, 12 validation, 2 classes" in said.out + said.err
    assert "the network resizes images: 64x64 pixels" in said.out + said.err
    assert "Warning" not in said.err
    summary = json.loads(Path("run/summary.json").read_text())
    base, last = summary["base"], summary["rounds"][0]
    assert last["params"] <= 0.75 * base["params"]
    assert base["valid_map"] > 0.25
    assert last["valid_map"] > base["valid_map"] - 0.04
    assert last["metrics"]["map50"] > last["valid_map"]
    card = json.loads(Path("run/rounds/01/model.json").read_text())
    assert card["task"] == "detection"
    assert card["class_names"] == ["__background__", "disc", "square"]
    assert (card["input"]["size"], card["input"]["fit"]) == (64, "both")
    write_run_report(Path("run"))
    assert "map after fine-tuning" in Path("run/report.html").read_text("utf-8")
    evaluate(
        ModelOptions(path="run/rounds/01"), EvaluateOptions(device="cpu", workers=0), as_json=True
    )
    found = json.loads(capsys.readouterr().out)
    assert found["map"] == pytest.approx(last["valid_map"])
    assert found["map"] == pytest.approx(coco.map_by_image("run", data))


def test_the_job_ends_with_a_smaller_unet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_masks(tmp_path / "data", {"train": 24, "val": 8})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "nets", SimpleNamespace(unet=rgb_unet))
    prune(PruneConfig(
        task="segmentation", data=str(data), model="nets:unet", output="run", base_epochs=8,
        rounds=1, epochs=3, batch_size=4, lr=0.005, workers=0, wandb="off", device="cpu",
        policy="global", target="params=0.6", distill_alpha=0.5,
    ))  # fmt: skip
    summary = json.loads(Path("run/summary.json").read_text())
    base, last = summary["base"], summary["rounds"][0]
    assert last["params"] <= 0.6 * base["params"]
    assert last["valid_miou"] > base["valid_miou"] - 0.01
    assert last["valid_miou"] > 0.5
    capsys.readouterr()
    evaluate(
        ModelOptions(path="run/rounds/01"), EvaluateOptions(device="cpu", workers=0), as_json=True
    )
    found = json.loads(capsys.readouterr().out)
    assert found["miou"] == pytest.approx(last["valid_miou"])
    assert load("run")(torch.rand(1, 3, 32, 32)).shape == (1, 3, 32, 32)


class Clips(torch.utils.data.Dataset[Any]):
    """Clips (1, 4, 8, 8) of noise around 0 or 1, of classes 0 and 1."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(index))
        return noise + index % 2, torch.tensor(index % 2)


class Videos:
    training, validation, testing = Clips(), Clips(), Clips()

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
        return F.cross_entropy(outputs, targets, reduction="sum"), len(targets)

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
        return {"right": ((outputs.argmax(1) == targets).sum(), len(targets))}


def video_network() -> nn.Module:
    """Weights of 2-d and of 3-d convolutions."""
    frames = nn.Sequential(nn.Conv3d(1, 12, 3, padding=1), nn.BatchNorm3d(12), nn.ReLU())
    images = nn.Sequential(nn.Conv2d(48, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 2))
    return nn.Sequential(frames, nn.Flatten(1, 2), images, head)


def test_the_job_slims_a_network_of_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = SimpleNamespace(Videos=Videos, network=video_network)
    monkeypatch.setitem(sys.modules, "clips", names)
    prune(PruneConfig(
        task="clips:Videos", model="clips:network", output="run", base_epochs=2, rounds=1, epochs=1,
        batch_size=8, lr=0.01, workers=0, wandb="off", device="cpu", target="macs=0.7",
    ))  # fmt: skip
    said = capsys.readouterr().out
    assert "next: gammaslim evaluate run --split testing\n" in said
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["rounds"][0]["macs"] <= 0.7 * summary["base"]["macs"]
