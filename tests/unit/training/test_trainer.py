"""Fine-tuning changes weights, and the original's could not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job.training.trainer
from job.config import OptimizerName, PruneConfig, ScheduleName
from job.data.layout import open_data
from job.errors import GammaslimError
from job.models.factory import build_network
from job.slimming.surgery.surgery import apply_plan
from job.training.evaluation import Evaluation
from job.training.optimizer import (
    OPTIMIZERS,
    build_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from job.training.schedule import SCHEDULES, learning_rate
from job.training.session import RoundSpec, Unattended
from job.training.trainer import Trainer, TrainingRound
from support.cuts import randomise, uniform
from support.training import SMALL, Recorder, changed_parameters, trainer


def three_rounds(training: Trainer) -> list[tuple[nn.Module, nn.Module]]:
    """Networks before and after the fine-tuning of each of three rounds."""
    torch.manual_seed(0)
    network, width, rounds = randomise(build_network("student", 4, {})), 1.0, []
    for round_ in range(1, 4):
        width *= 0.8
        network = apply_plan(network, uniform(network, width).layers)
        before = copy.deepcopy(network)
        training.fit(network, RoundSpec(round_, 2))
        rounds.append((before, copy.deepcopy(network)))
    return rounds


def test_parameters_change_in_every_round(tmp_path: Path) -> None:
    for before, after in three_rounds(trainer(tmp_path)):
        assert changed_parameters(before, after) == len(list(after.parameters())) == 48


def test_with_the_homeworks_stale_optimizer_no_parameter_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[torch.optim.Optimizer] = []

    def stale(network: nn.Module, config: PruneConfig, *, fused: bool) -> torch.optim.Optimizer:
        if not first:  # created once, before the loop, as in the homework's notebook
            first.append(build_optimizer(network, config, fused=fused))
        return first[0]

    monkeypatch.setattr(job.training.trainer, "build_optimizer", stale)
    rounds = three_rounds(trainer(tmp_path))
    assert changed_parameters(*rounds[0]) == 48
    for before, after in rounds[1:]:
        assert changed_parameters(before, after) == 0
        # the defect's fingerprint: only BatchNorm's buffers moved
        pairs = zip(before.named_buffers(), after.buffers(), strict=True)
        moved = [name for (name, old), new in pairs if not torch.equal(old, new)]
        assert len(moved) == 24


def test_the_best_epoch_is_kept_the_first_of_equals(tmp_path: Path) -> None:
    training = trainer(tmp_path, lr=0.01, schedule="constant")
    torch.manual_seed(0)
    network, seen = build_network("student", 4, {}), Recorder()
    best = training.fit(network, RoundSpec(0, 6, first_step=100), seen)
    assert [result.epoch for result in seen.epochs] == list(range(6))
    assert [result.step for result in seen.epochs] == [100 + 6 * (e + 1) for e in range(6)]
    top = max(result.valid_acc for result in seen.epochs)
    assert best == next(result for result in seen.epochs if result.valid_acc == top)
    again = training.evaluator(network)
    assert again.accuracy == best.valid_acc
    assert again.loss == pytest.approx(best.valid_loss, abs=1e-6)


def test_the_first_of_equally_good_epochs_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = trainer(tmp_path)
    scores, states = iter([0, 2, 1, 2, 2]), []

    def evaluate(network: nn.Module, *_: object) -> Evaluation:
        states.append(copy.deepcopy(network.state_dict()))
        right = next(scores)
        return Evaluation(1.0, torch.tensor([[right, 3 - right], [0, 0]]))

    monkeypatch.setattr(training, "evaluator", evaluate)
    network = build_network("student", 4, {})
    best = training.fit(network, RoundSpec(0, 5))
    assert best.epoch == 1
    for key, value in network.state_dict().items():
        assert torch.equal(value, states[1][key]), key


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    states = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        states.append([after.state_dict() for _, after in three_rounds(trainer(tmp_path / name))])
    for one, other in zip(*states, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_loss_and_accuracy_of_an_epoch_are_means_over_every_image(tmp_path: Path) -> None:
    training = trainer(tmp_path, lr=1e-30, batchnorm="local")
    torch.manual_seed(0)
    network = build_network("student", 4, {})
    result = training.fit(network, RoundSpec(0, 1))
    loss = right = count = 0.0
    network.train()
    training.sampler.set_epoch(0, 0)
    for images, labels in training.batches:
        logits = network(SMALL.to_input(images))
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    assert count == 90  # the last short batch is in
    assert result.train_loss == pytest.approx(loss / 90, rel=1e-4)
    assert result.train_acc == pytest.approx(right / 90)


def test_evaluation_equals_a_plain_loop(tmp_path: Path) -> None:
    training = trainer(tmp_path)
    network = randomise(build_network("student", 4, {}))
    result = training.evaluator(network)
    split = training.evaluator.split
    logits = torch.cat(
        [
            network(SMALL.to_input(torch.from_numpy(_array(SMALL.evaluate(split.image(i))))[None]))
            for i in range(len(split))
        ]
    )
    labels = torch.from_numpy(split.labels)
    assert result.count == 30
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result.accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert result.confusion.sum(1).tolist() == torch.bincount(labels, minlength=4).tolist()
    assert training.evaluator.predict(network)[0] == logits.argmax(1).tolist()


def _array(image: Any) -> Any:
    import numpy as np

    return np.array(image)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_gamma_and_biases_get_no_weight_decay(name: str) -> None:
    network = build_network("student", 4, {})
    config = PruneConfig(optimizer=name, weight_decay=0.3)
    decay = {
        id(p): group["weight_decay"]
        for group in build_optimizer(network, config, fused=True).param_groups
        for p in group["params"]
    }
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            assert decay[id(layer.weight)] == 0.3
            assert layer.bias is not None
            assert decay[id(layer.bias)] == 0
        elif isinstance(layer, nn.BatchNorm2d):
            assert decay[id(layer.weight)] == decay[id(layer.bias)] == 0
    assert len(decay) == 48


def test_a_restored_optimizer_is_on_the_device_of_its_parameters() -> None:
    """A fused one on a GPU counts its steps there; the meta device takes the GPU's place."""
    parameter = nn.Parameter(torch.rand(3, 2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.rand(3, 2)
    optimizer.step()
    saved = {key.removeprefix("optimizer."): v for key, v in optimizer_tensors(optimizer).items()}
    for fused, device in ((True, "meta"), (False, "cpu")):
        elsewhere = nn.Parameter(torch.empty(3, 2, device="meta"))
        other = torch.optim.AdamW([elsewhere])
        other.param_groups[0]["fused"] = fused
        restore_optimizer(other, saved)
        state = other.state[elsewhere]
        assert state["exp_avg"].device.type == "meta"
        assert state["step"].device.type == device


def test_each_schedule_and_optimizer_of_the_tables_is_a_choice_of_its_option() -> None:
    assert set(SCHEDULES) == set(get_args(ScheduleName))
    assert set(OPTIMIZERS) == set(get_args(OptimizerName))
    assert all(schedule.help for schedule in SCHEDULES.values())


def test_learning_rates_of_each_schedule() -> None:
    rates = {
        schedule: [learning_rate(PruneConfig(schedule=schedule, lr=1.0), s, 8) for s in range(8)]
        for schedule in ("constant", "step", "cosine")
    }
    assert rates["constant"] == [1.0] * 8
    assert rates["step"] == [1.0] * 4 + [0.1] * 2 + [0.01] * 2
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], 1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for rate in rates["cosine"]:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    training = trainer(tmp_path, lr=1e12, optimizer="sgd")
    with pytest.raises(GammaslimError, match="try a lower --lr"):
        training.fit(build_network("student", 4, {}), RoundSpec(0, 5))


def test_gradients_are_those_of_float64(tmp_path: Path) -> None:
    """On flat backgrounds, where torch's kernel for channels last strays by several per cent."""
    data = open_data(None).splits["training"]
    training = torch.stack([torch.from_numpy(_array(data.image(i))) for i in range(32)])
    images = SMALL.to_input(F.pad(training, (0, 0, 2, 2, 2, 2)))
    labels = torch.from_numpy(data.labels[:32])
    torch.manual_seed(3)
    network = build_network("student", 10, {}).train()
    exact = copy.deepcopy(network).double()
    F.cross_entropy(exact(images.double()), labels).backward()
    training = trainer(tmp_path)
    round_ = TrainingRound(training, network, RoundSpec(0, 1), Unattended())
    ours = round_.trained.train()
    assert round_.layout == torch.channels_last
    images = images.contiguous(memory_format=round_.layout)
    F.cross_entropy(ours(images), labels).backward()
    for (name, mine), theirs in zip(ours.named_parameters(), exact.parameters(), strict=True):
        if name.endswith("weight"):
            assert mine.grad is not None
            assert theirs.grad is not None
            error = (mine.grad - theirs.grad).abs().max() / theirs.grad.abs().max()
            assert error < 1e-3, name
    for mine, theirs in zip(ours.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), atol=1e-5, rtol=1e-5)
