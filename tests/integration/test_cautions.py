"""Accuracies that are likely to mean a mistake are cautioned about by each command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from job.artifacts.model_card import ModelCard, save_model
from job.artifacts.run_reader import read_run
from job.cli.command_options import EvaluateOptions, ModelOptions
from job.cli.evaluate import evaluate
from job.cli.report import report
from job.config import PruneConfig
from job.data.preprocessing import Preprocessing
from job.pipeline.prune import prune
from support.datasets import write_flat, write_noise_idx


def config(data: Path, output: Path, **options: Any) -> PruneConfig:
    cheap = {"importance": "gamma", "compensate": "none", "workers": 0, "wandb": "off"}
    small = {"model_arg": (("base", 2),), "rounds": 0, "epochs": 1, "batch_size": 16}
    return PruneConfig(
        data=str(data),
        output=str(output),
        **{**cheap, **small, **options},  # type: ignore[arg-type]
    )


@pytest.fixture
def useless(tmp_path: Path) -> Path:
    """Weights that always give class 2."""
    card = ModelCard("student", {"base": 2}, 4, preprocessing=Preprocessing.of("small", 32))
    network = card.build()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith("fc"):
                parameter.zero_()
                if name.endswith("bias"):
                    parameter[2] = 1
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    save_model(tmp_path / "model", network, card)
    return tmp_path


def test_useless_weights_are_cautioned_about_wherever_they_are_used(
    useless: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_noise_idx(useless / "data", 16, 40)
    weights = str(useless / "w.safetensors")
    low = "the weights score 25.0%, near chance for 4 classes: is the preprocessing"
    only = "the class 2 is predicted for every image by the base"
    for options in ({}, {"dry_run": True}, {"base_epochs": 1}):
        prune(config(data, useless / f"run{len(options)}{options}", weights=weights, **options))
        done = capsys.readouterr()
        assert f"aution: {low}" in done.out or f"Warning: {low}" in done.err, options
        assert f"caution: {only}" in done.out or options == {"dry_run": True}
    run = useless / "run0{}"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["cautions"] == summary["base"]["cautions"]
    assert summary["cautions"][0].startswith(low)
    assert summary["cautions"][1] == only
    assert read_run(run).cautions == tuple(summary["cautions"])
    report([str(run)], None, as_json=False)
    assert f"caution: {low}" in capsys.readouterr().out
    assert f"<b>Caution:</b> {low}" in (run / "report.html").read_text()
    options = EvaluateOptions(data=str(data), split="validation", device="cpu", workers=0)
    evaluate(ModelOptions(weights, "student", (("base", 2),)), options, as_json=True)
    found = json.loads(capsys.readouterr().out)["cautions"]
    assert found[0].startswith(low)
    assert found[1] == only.removesuffix(" by the base")
    evaluate(ModelOptions(str(useless / "model")), options, as_json=False)
    assert "caution: the model scores 25.0%, near chance for 4" in capsys.readouterr().out


def test_a_new_classifier_is_not_taken_for_wrong_preprocessing(
    useless: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_flat(useless / "data", {"training": 4, "validation": 30})  # 3 classes, not 4
    prune(config(data, useless / "run", weights=str(useless / "w.safetensors"), base_epochs=1))
    assert "is the preprocessing" not in capsys.readouterr().out


def test_a_base_that_has_not_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_noise_idx(tmp_path / "data", 16, 400)
    prune(config(data, tmp_path / "run", base_epochs=1, lr=1e-12, batch_size=16))
    said = capsys.readouterr().out
    assert "caution: the base scores" in said
    assert "near chance for 4 classes" in said
