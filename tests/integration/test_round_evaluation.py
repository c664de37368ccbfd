"""``rounds/NN/evaluation.json``: what ``evaluate`` finds, and images on which models disagree."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from job.artifacts.evaluation_record import RoundEvaluation, read_evaluation
from job.data.preprocessing import Preprocessing
from job.data.splits import ArraySplit
from job.models.student import StudentNet
from job.pipeline.round_evaluation import evaluate_round
from support.commands import gammaslim


def matrix(found: RoundEvaluation) -> list[list[int]]:
    cells, classes = found.confusion(), range(len(found.counts))
    return [[cells[true, predicted] for predicted in classes] for true in classes]


def test_a_round_records_what_evaluate_measures(finished_run: Path) -> None:
    for name in ("00", "01", "02"):
        folder = finished_run / "rounds" / name
        found = read_evaluation(folder / "evaluation.json")
        done = gammaslim("evaluate", folder, "--json")
        assert done.code == 0, done
        measured = json.loads(done.out)
        assert matrix(found) == measured["confusion"]
        assert list(found.class_accuracy()) == list(measured["class_accuracy"].values())
        assert found.gamma
        assert sum(found.gamma.bins) == found.gamma.count > 0
        assert (found.lost is None) == (name == "00")


def test_examples_are_images_that_only_one_of_the_models_gets_right() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    images = rng.integers(0, 256, (60, 32, 32, 3), np.uint8)
    split, small = ArraySplit(images, labels), Preprocessing.of("small", 32)
    before, after = (torch.from_numpy(rng.integers(0, 3, 60)) for _ in range(2))
    after[7] = -1  # it could not be read
    network = StudentNet(num_classes=3, base=4)
    base = evaluate_round(network, before, split, small, 3, None)
    found = evaluate_round(network, after, split, small, 3, base)
    truth = torch.from_numpy(labels)
    lost = (before == truth) & (after != truth) & (after >= 0)
    won = (before != truth) & (after == truth)
    assert (found.lost, found.won) == (int(lost.sum()), int(won.sum()))
    assert sum(found.counts) == 59
    assert len(found.examples) == 16
    for number, example in enumerate(found.examples):
        place = int(example.name)
        assert (lost if number < 8 else won)[place]
        assert (example.label, example.base) == (labels[place], int(before[place]))
        assert example.predicted == int(after[place])
        head, _, content = example.image.partition(",")
        assert head == "data:image/png;base64"
        assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(content))), images[place])
    json.loads(found.to_text())
