"""Accuracies that are likely to mean a mistake are cautioned about."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from job.config import PruneConfig
from job.pipeline.cautions import (
    Cautions,
    chance_caution,
    single_class_caution,
    under_trained_caution,
    weights_caution,
)
from job.training.evaluation import Evaluation
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
        ({"target": "macs=0.5", "rate": 0.8}, "--rate has no effect with --target macs=0.5"),
        ({"distill_temperature": 3.0}, "--distill-temperature has no effect without --distill-alp"),
        ({"latency_batch": 4}, "--latency-batch has no effect without --target latency=VALUE"),
        ({"target": "latency=0.5", "latency_batch": 4}, None),
        ({"accumulate": 40}, "--accumulate 40 is more than --batch-size 32"),
    ],
)
def test_options_that_do_not_fit_each_other_are_cautioned_about(
    options: dict[str, Any], said: str | None
) -> None:
    cautions = PruneConfig(**options).cautions
    assert cautions == [] if said is None else [said in each for each in cautions] == [True]
