"""Distillation: the loss is the homework's, the teacher is the right one and stays as it is."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from job.artifacts.model_card import ModelCard, save_model
from job.config import PruneConfig
from job.data.preprocessing import Preprocessing
from job.errors import DataError, InputNotFound, UsageError
from job.models.factory import build_network
from job.pipeline.base_model import load_teacher_network
from job.training.distillation import distillation, distillation_loss
from job.training.session import RoundSpec
from support.cuts import randomise
from support.training import SMALL, Recorder, changed_parameters, trainer

SLIM = {"base": 4}


def softmax(logits: list[float], temperature: float = 1) -> list[float]:
    powers = [math.exp(value / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


def by_hand(student: Any, teacher: Any, labels: Any, alpha: float, temperature: float) -> float:
    """The homework's formula, image by image and class by class."""
    loss = 0.0
    for ours, theirs, label in zip(student, teacher, labels, strict=True):
        p, q = softmax(theirs, temperature), softmax(ours, temperature)
        loss += alpha * temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        loss -= (1 - alpha) * math.log(softmax(ours)[label])
    return loss


@pytest.mark.parametrize(
    ("alpha", "temperature"), [(0.5, 20.0), (0.9, 4.0), (1.0, 1.0), (0.0, 3.0)]
)
def test_loss_and_gradient_are_the_formulas(alpha: float, temperature: float) -> None:
    torch.manual_seed(0)
    student = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    teacher = 3 * torch.randn(5, 4, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, 1, 2])
    loss = distillation_loss(student, teacher, labels, alpha, temperature)
    expected = by_hand(student.tolist(), teacher.tolist(), labels.tolist(), alpha, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    soft = F.softmax(student / temperature, 1) - F.softmax(teacher / temperature, 1)
    hard = F.softmax(student, 1) - F.one_hot(labels, 4)
    gradient = alpha * temperature * soft + (1 - alpha) * hard
    torch.testing.assert_close(student.grad, gradient.detach(), atol=1e-12, rtol=1e-10)


def test_a_network_learns_from_its_teacher_which_stays_as_it_is(tmp_path: Path) -> None:
    training = trainer(tmp_path, lr=0.02)
    torch.manual_seed(0)
    teacher = randomise(build_network("student", 4, SLIM)).train()  # whatever mode it was in
    with torch.no_grad():
        teacher.get_parameter("fc.0.weight").mul_(30)  # so that it has a lot to say
    before = copy.deepcopy(teacher.state_dict())
    learning = distillation(teacher, 1.0, 4.0, training.accelerator)

    def disagreement(network: torch.nn.Module) -> float:
        total = 0.0
        training.sampler.set_epoch(0, 0)
        for images, labels in training.batches:
            inputs = SMALL.to_input(images)
            with torch.no_grad():
                total += float(learning.loss(network.eval()(inputs), inputs, labels))
        return total / 90

    network = randomise(build_network("student", 4, SLIM), seed=5)
    first, seen = disagreement(network), Recorder()
    training.fit(network, RoundSpec(1, 12, distillation=learning), seen)
    assert disagreement(network) < first / 2
    assert seen.epochs[-1].train_loss < seen.epochs[0].train_loss  # what is minimised
    placed = learning.teacher
    assert not placed.training
    assert all(p.grad is None and not p.requires_grad for p in placed.parameters())
    for state in (placed.state_dict(), teacher.state_dict()):
        assert all(torch.equal(value, before[key]) for key, value in state.items())
    assert changed_parameters(teacher, placed) == 0
    assert teacher.training


def test_the_training_loss_is_the_one_that_is_minimised(tmp_path: Path) -> None:
    training = trainer(tmp_path, lr=1e-30, batchnorm="local")
    network, teacher = (
        build_network("student", 4, SLIM),
        randomise(build_network("student", 4, SLIM), seed=2),
    )
    learning = distillation(teacher, 0.7, 2.0, training.accelerator)
    result = training.fit(network, RoundSpec(1, 1, distillation=learning))
    plain = training.evaluator(network)
    assert result.valid_loss == pytest.approx(plain.loss, rel=1e-4)  # cross entropy, as ever
    loss = 0.0
    network.train()
    training.sampler.set_epoch(1, 0)
    with torch.no_grad():
        for images, labels in training.batches:
            inputs = SMALL.to_input(images)
            outputs = network(inputs).tolist(), teacher(inputs).tolist()
            loss += by_hand(*outputs, labels.tolist(), 0.7, 2.0)
    assert result.train_loss == pytest.approx(loss / 90, rel=1e-4)


def card(classes: int = 3, names: tuple[str, ...] = (), size: int = 32) -> ModelCard:
    return ModelCard(
        "student", {}, classes, preprocessing=Preprocessing.of("small", size), class_names=names
    )


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (card(4), card(3), "has 4 classes, this run has 3"),
        (card(3, ("a", "b", "c")), card(3, ("a", "x", "c")), "names class 1 b, this run x"),
        (card(size=64), card(), "other inputs than this run: small transforms at 64 pixels"),
        (
            ModelCard("student", {}, 3, preprocessing=Preprocessing.of("imagenet", 32)),
            card(),
            "imagenet transforms",
        ),
    ],
)
def test_a_teacher_of_other_classes_or_inputs_is_refused(
    tmp_path: Path, theirs: ModelCard, ours: ModelCard, message: str
) -> None:
    save_model(tmp_path / "teacher", theirs.build(), theirs)
    config = PruneConfig(distill_alpha=0.5, teacher=str(tmp_path / "teacher"))
    with pytest.raises(DataError, match=message):
        load_teacher_network(config, ours)


def test_a_teacher_may_have_no_class_names_and_another_augmentation(tmp_path: Path) -> None:
    theirs = ModelCard("student", {"base": 4}, 3, preprocessing=Preprocessing.of("homework", 32))
    save_model(tmp_path / "teacher", theirs.build(), theirs)
    config = PruneConfig(distill_alpha=0.5, teacher=str(tmp_path / "teacher"))
    assert load_teacher_network(config, card(3, ("a", "b", "c"))) is not None
    assert load_teacher_network(PruneConfig(), card()) is None


def test_a_missing_teacher_and_one_that_is_not_asked() -> None:
    with pytest.raises(InputNotFound, match="--teacher nowhere is not a run"):
        load_teacher_network(PruneConfig(distill_alpha=0.5, teacher="nowhere"), card())
    with pytest.raises(UsageError, match="without --distill-alpha"):
        PruneConfig(teacher="somewhere")
