"""Accuracies that are likely to mean a mistake are cautioned about."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
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
from job.pipeline.cautions import (
    Cautions,
    chance_caution,
    single_class_caution,
    under_trained_caution,
    weights_caution,
)
from job.pipeline.prune import prune
from job.training.evaluation import Evaluation
from support.datasets import write_flat, write_noise_idx
from support.records import round_records

TEN = [100] * 10


@pytest.mark.parametrize(
    ("accuracy", "counts", "said"),
    [
        (0.102, TEN, "the weights score 10.2%, near chance for 10 classes: is the preprocessing"),
        (0.278, TEN, "the weights score 27.8%, low for 10 classes"),
        (0.45, TEN, "low for 10 classes"),
        (0.47, TEN, None),
        (0.667, [2, 2, 2], "66.7%, near chance for 3 classes as far as 6 images can tell: is"),
        (0.91, [900, 100], "near chance for 2 classes"),  # the commonest class would do as well
        (0.97, [900, 100], None),
        (0.2, [10, 0, 0], None),  # one class alone tells nothing
    ],
)
def test_weights_that_score_low(accuracy: float, counts: list[int], said: str | None) -> None:
    caution = weights_caution(accuracy, counts)
    assert (said in caution if caution else False) if said else caution is None, caution
    if caution:
        assert caution.endswith("see --mean, --std, --transform")


def test_chance_has_its_noise() -> None:
    assert chance_caution("x", 0.118, TEN)  # 0.1 and two standard deviations of 0.0095
    assert chance_caution("x", 0.120, TEN) is None
    assert chance_caution("x", 0.118, [count * 100 for count in TEN]) is None


def test_a_model_of_one_class_only() -> None:
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    confusion[:, 1] = torch.tensor([4, 5, 6])
    assert single_class_caution(Evaluation(1.0, confusion), ("a", "b", "c")) == (
        "the class b is predicted for every image"
    )
    hostile = single_class_caution(Evaluation(1.0, confusion), ("a", "\x1b[31m", "c"))
    assert hostile == r"the class \x1b[31m is predicted for every image"
    confusion[0, 0] = 1
    assert single_class_caution(Evaluation(1.0, confusion), ("a", "b", "c")) is None
    alone = torch.zeros(3, 3, dtype=torch.int64)
    alone[1, 1] = 5  # the only class that there is
    assert single_class_caution(Evaluation(1.0, alone), ()) is None


@pytest.mark.parametrize(
    ("accuracies", "count", "weights", "said"),
    [
        ([0.8367, 0.8467, 0.8727], 1500, False, r"round 2 is \+3.60 points above .*under-trained$"),
        ([0.278, 0.57], 10_000, True, "under-trained, or its preprocessing is not the one it was"),
        ([0.8667, 0.8707], 1500, False, None),
        ([0.8367, 0.8727], 150, True, None),  # within the noise of so few
        ([0.9, 0.5], 1500, True, None),
    ],
)
def test_rounds_that_beat_the_base(
    accuracies: list[float], count: int, weights: bool, said: str | None
) -> None:
    caution = under_trained_caution(round_records(*accuracies), count, weights)
    if said is None:
        assert caution is None
    else:
        assert caution
        assert re.search(said, caution)


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


def test_trained_networks_are_evaluated_again_only_in_doubt() -> None:
    cautions = Cautions(TEN, (), weights=False, unchanged=False)
    assert cautions.of_round(1, 0.9, pytest.fail) == []
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    confusion[:, 3] = torch.from_numpy(np.array(TEN))
    found = cautions.of_round(1, 0.1, lambda: Evaluation(2.3, confusion))
    assert found == [
        "round 1 scores 10.0%, near chance for 10 classes",
        "the class 3 is predicted for every image by round 1",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, None),
        ({"compensate": "beta"}, "--importance refit assumes --compensate regress"),
        ({"allocate": "local"}, "--allocate local has no effect without --policy global"),
        ({"allocate": "outputs", "policy": "global"}, None),
    ],
)
def test_options_that_do_not_fit_each_other_are_cautioned_about(
    options: dict[str, Any], said: str | None
) -> None:
    caution = PruneConfig(**options).caution
    assert caution is None if said is None else said in str(caution)
