"""Training for sparsity: the steps on γ are the papers', and act when and where they should."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from job.config import PruneConfig, SparsityName
from job.errors import UsageError
from job.models.factory import build_network
from job.training.evaluation import Evaluation
from job.training.gamma import (
    gamma_histogram,
    gamma_layers,
    gamma_parameters,
    gamma_statistics,
)
from job.training.penalties import PENALTIES, POLARIZE_T, polarize, soft_threshold
from job.training.session import RoundSpec
from job.training.sparsity import apply_penalty, describe_sparsity
from job.training.trainer import Trainer, TrainingRound
from support.cuts import randomise
from support.training import Recorder, trainer

SLIM = {"base": 4}


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sparse_trainer(folder: Path, kind: str = "l1", weight: float = 0.5, **options: Any) -> Trainer:
    sparsity = {"sparsity": kind, "sparsity_weight": weight, "sparsity_epochs": 1}
    return trainer(folder, **sparsity, **options)


def test_each_penalty_of_the_table_is_a_choice_of_the_option() -> None:
    assert {"none", *PENALTIES} == set(get_args(SparsityName))
    assert all(penalty.help for penalty in PENALTIES.values())


def test_l1_is_the_minimum_of_distance_and_penalty() -> None:
    """The proximal step by its definition: argmin over x of (x - γ)²/2 + strength·|x|."""
    grid = torch.linspace(-2, 2, 400_001, dtype=torch.float64)
    gamma = double(1.5, -0.7, 0.1, -0.1, 0.0999, -0.05, 0)
    found = [float(grid[((grid - g) ** 2 / 2 + 0.1 * grid.abs()).argmin()]) for g in gamma]
    assert soft_threshold(gamma, 0.1).tolist() == pytest.approx(found, abs=1e-5)
    assert soft_threshold(gamma, 0.1)[2:].abs().tolist() == [0] * 5  # exactly


def test_polarize_is_the_gradient_of_the_papers_penalty() -> None:
    gamma = (torch.rand(101, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    penalty = POLARIZE_T * gamma.abs().sum() - (gamma - gamma.mean()).abs().sum()
    penalty.backward()
    assert gamma.grad is not None
    expected = gamma.detach() - 1e-3 * gamma.grad
    torch.testing.assert_close(polarize(gamma.detach(), 1e-3), expected, atol=1e-15, rtol=0)


def test_polarize_parts_small_from_large_and_stays_within_0_and_1() -> None:
    gamma = double(-0.2, 0.05, 0.1, 0.9, 0.95, 1.4)
    for _ in range(100):
        gamma = polarize(gamma, 0.01)
        assert gamma.min() >= 0
        assert gamma.max() <= 1
    assert gamma[:3].tolist() == [0, 0, 0]
    assert gamma[3:].min() > 0.65


def test_equal_gammas_lie_on_no_side_of_their_mean() -> None:
    """In float32 the mean of 1,022 values of 0.9 is none of them."""
    gamma = torch.full((1024,), 0.9)
    gamma[0] += 0.0625
    gamma[1] -= 0.0625
    moved = (gamma - polarize(gamma, 0.1)).tolist()
    assert moved == pytest.approx(
        [0.1 * (POLARIZE_T - 1), 0.1 * (POLARIZE_T + 1)] + [0.1 * POLARIZE_T] * 1022, abs=1e-6
    )


@pytest.mark.parametrize("kind", ["l1", "polarize"])
def test_the_layers_of_a_network_are_one_vector(kind: str) -> None:
    """The mean of polarize is over the network; nothing but γ of the layers named moves."""
    network = randomise(build_network("student", 4, SLIM))
    before = copy.deepcopy(network.state_dict())
    names = gamma_layers(network)
    assert names == [n for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)]
    apply_penalty(kind, gamma_parameters(network, names[2:]), 0.01)
    flat = torch.cat([before[f"{name}.weight"] for name in names[2:]])
    expected = {"l1": soft_threshold, "polarize": polarize}[kind](flat, 0.01)
    assert torch.equal(torch.cat(gamma_parameters(network, names[2:])).detach(), expected)
    moved = {key for key, value in network.state_dict().items() if not value.equal(before[key])}
    assert moved == {f"{name}.weight" for name in names[2:]}


def test_layers_without_a_gamma_are_passed_over() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 3, 1))
    assert gamma_layers(network) == []
    apply_penalty("l1", [], 0.1)
    assert gamma_statistics([]) == {}
    assert gamma_histogram([]).count == 0


def test_numbers_and_histogram_of_gamma() -> None:
    gammas = [double(0, -2, 0.019), double(0.1, 1.95, 0.05)]
    numbers = gamma_statistics(gammas)
    assert numbers["gamma_small"] == 2 / 6
    assert numbers["gamma_mean"] == pytest.approx((2 + 0.019 + 0.1 + 1.95 + 0.05) / 6)
    histogram = gamma_histogram(gammas)
    assert (histogram.count, histogram.zeros, histogram.max) == (6, 1, 2)
    assert histogram.bins == (3, 1, *[0] * 17, 2)
    assert gamma_histogram([double(0, 0)]).bins == (2, *[0] * 19)


@pytest.mark.parametrize(
    ("optimizer", "kind"), [("adamw", "l1"), ("sgd", "l1"), ("adamw", "polarize")]
)
def test_gamma_falls_and_zeros_appear(tmp_path: Path, optimizer: str, kind: str) -> None:
    histograms, means = {}, []
    for weight in (1e-9, 20.0):
        torch.manual_seed(0)
        network, seen = randomise(build_network("student", 4, SLIM)), Recorder()
        folder = tmp_path / str(weight)
        folder.mkdir()
        training = sparse_trainer(folder, kind, weight, lr=2e-3, optimizer=optimizer)
        training.fit(network, RoundSpec(0, 0, sparse_epochs=4), seen)
        histograms[weight] = seen.histograms
        means.append(gamma_statistics(gamma_parameters(network, gamma_layers(network))))
    (before, without), (same, with_) = histograms.values()
    assert before == same
    assert with_.zeros > 20 > without.zeros
    assert means[1]["gamma_mean"] < means[0]["gamma_mean"] - 0.05


def test_only_the_last_epochs_are_sparse_with_rates_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = sparse_trainer(tmp_path, "l1", 1e9, lr=0.01)
    rates, step = list[float](), TrainingRound.step

    def recording(self: TrainingRound, *args: Any) -> None:
        step(self, *args)
        rates.append(self.optimizer.param_groups[0]["lr"])
        strongest = max(float(g.detach().abs().max()) for g in self.gammas)
        assert (strongest == 0) == (self.state.epoch >= 2)

    monkeypatch.setattr(TrainingRound, "step", recording)
    torch.manual_seed(0)
    seen = Recorder()
    network = build_network("student", 4, SLIM)
    training.fit(network, RoundSpec(0, 2, sparse_epochs=3), seen)

    def cosine(steps: int) -> list[float]:
        return [0.01 * (1 + math.cos(math.pi * s / steps)) / 2 for s in range(steps)]

    assert rates == pytest.approx(cosine(2 * 6) + cosine(3 * 6))
    assert [result.lr for result in seen.epochs] == pytest.approx(rates[5::6])
    assert [result.gamma_mean == 0 for result in seen.epochs] == [False, False, True, True, True]


def test_the_last_sparse_epoch_is_kept_even_if_others_were_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = sparse_trainer(tmp_path)
    scores, states = iter([1, 3, 2, 0]), []

    def evaluate(network: nn.Module, *_: object) -> Evaluation:
        states.append(copy.deepcopy(network.state_dict()))
        right = next(scores)
        return Evaluation(1.0, torch.tensor([[right, 3 - right], [0, 0]]))

    monkeypatch.setattr(training, "evaluator", evaluate)
    network = build_network("student", 4, SLIM)
    best = training.fit(network, RoundSpec(0, 2, sparse_epochs=2))
    assert (best.epoch, best.valid_acc) == (3, 0)
    assert all(torch.equal(value, states[3][key]) for key, value in network.state_dict().items())


def test_no_pull_where_the_optimizer_took_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fp16's scaler skips a step whose gradients overflowed."""
    training = sparse_trainer(tmp_path, "l1", 1e9)
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", True)
    network = build_network("student", 4, SLIM)
    training.fit(network, RoundSpec(0, 0, sparse_epochs=1))
    assert (
        min(float(g.detach().min()) for g in gamma_parameters(network, gamma_layers(network))) > 0.5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": "l1"}, "--sparsity-epochs 10"),
        ({"sparsity": "polarize", "sparsity_weight": 1.0}, "--sparsity-epochs 10"),
        ({"sparsity_epochs": 3}, "--sparsity-epochs needs --sparsity l1"),
        ({"sparsity_weight": 1.0}, "--sparsity-weight needs --sparsity l1"),
    ],
)
def test_half_of_the_options_is_an_error_that_says_what_to_type(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        PruneConfig(**options)


def test_a_pull_too_weak_to_show_is_said_with_what_would_do() -> None:
    """The paper's own: 160 epochs of 782 steps from 0.1 on; ours by default: Adam's small steps."""
    paper = PruneConfig(
        sparsity="l1", sparsity_epochs=160, optimizer="sgd", lr=0.1, schedule="step"
    )
    assert describe_sparsity(paper, 160, 160 * 782).endswith("adds up to 0.66")
    ours = describe_sparsity(PruneConfig(sparsity="l1", sparsity_epochs=8), 8, 8 * 188)
    assert ours.startswith("Warning: ")
    assert "--sparsity-weight 0.88" in ours
    strong = PruneConfig(sparsity="l1", sparsity_epochs=8, sparsity_weight=0.88)
    assert describe_sparsity(strong, 8, 8 * 188).endswith("adds up to 0.662")
