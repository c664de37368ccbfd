"""``job.slim`` in Python."""

from __future__ import annotations

import doctest

import pytest
import torch
import torchvision
from torch import nn

import job
import job.slimming.api
from job.errors import UsageError
from job.slimming.planning.target import Budget
from support.cuts import randomise
from support.networks import BareStream, PreActivation, Residual


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(Residual())


EXAMPLE = torch.rand(1, 3, 24, 24)
BATCHES = [torch.rand(8, 3, 24, 24) for _ in range(3)]
LABELLED = [(images, torch.arange(8) % 5) for images in BATCHES]


def test_the_example_in_its_docstring_runs() -> None:
    failed, tried = doctest.testmod(job.slimming.api)
    assert (failed, tried) == (0, 12)


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_untouched_and_its_likes_come_back(training: bool) -> None:
    network = small().train(training)
    network.get_parameter("stem.0.weight").requires_grad_(False)
    network.get_submodule("one").eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    narrow, plan = job.slim(network, EXAMPLE)
    after = network.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(p.grad is None for p in network.parameters())
    modes = {name: m.training for name, m in network.named_modules()}
    assert {name: m.training for name, m in narrow.named_modules()} == modes
    frozen = {name for name, p in narrow.named_parameters() if not p.requires_grad}
    assert frozen == {"stem.0.weight"}
    storage = {t.data_ptr() for t in network.state_dict().values()}
    assert not storage & {t.data_ptr() for t in narrow.state_dict().values()}
    assert plan.after.channels <= 0.5 * plan.before.channels
    assert set(plan.layers) >= {"stem.0", "stem.1", "head"}


@pytest.mark.parametrize("importance", ["gamma", "l2", "random", "refit", "taylor"])
@pytest.mark.parametrize("compensate", ["none", "beta", "mean", "regress"])
def test_every_importance_goes_with_every_compensation(importance: str, compensate: str) -> None:
    network = small()
    narrow, plan = job.slim(
        network, EXAMPLE, target="macs=0.5", importance=importance, compensate=compensate,
        recalibrate=2, calibration=iter(LABELLED),
    )  # fmt: skip
    assert plan.after.macs <= 0.5 * plan.before.macs
    assert narrow(EXAMPLE).isfinite().all()


@pytest.mark.parametrize("target", ["params=0.6", "bytes=0.6", "channels=0.5"])
def test_biases_that_compensation_adds_are_in_the_costs(target: str) -> None:
    torch.manual_seed(0)
    network = randomise(BareStream())
    narrow, plan = job.slim(
        network, EXAMPLE, target=target, compensate="mean", calibration=BATCHES, min_keep=0
    )
    assert narrow.get_submodule("c2").bias is not None
    assert plan.after.params == sum(p.numel() for p in narrow.parameters())
    state = narrow.state_dict().values()
    assert plan.after.bytes == sum(t.numel() * t.element_size() for t in state)
    budget = Budget.parse(target)
    assert getattr(plan.after, budget.metric) <= budget.limit(plan.before)


def test_preactivation_networks_select_before_their_batchnorms() -> None:
    torch.manual_seed(0)
    network = randomise(PreActivation())
    narrow, plan = job.slim(network, EXAMPLE, target="channels=0.4", min_keep=0)
    assert plan.layers["n1"].select is not None
    assert any("selected before each BatchNorm" in blocked.reason for blocked in plan.blocked)
    again, _ = job.slim(narrow, EXAMPLE, target="channels=0.9", min_keep=0)
    assert again(EXAMPLE).shape == (1, 5)


def test_ignored_layers_keep_inputs_and_outputs() -> None:
    network = torchvision.models.resnet18(num_classes=7)
    narrow, plan = job.slim(network, torch.rand(1, 3, 64, 64), ignore=["layer1", "layer3.0.conv2"])
    for name in ("layer1.0.conv1", "layer1.1.conv2", "layer3.0.conv2"):
        assert narrow.get_parameter(f"{name}.weight").shape == network.get_parameter(
            f"{name}.weight"
        ).shape  # fmt: skip
    assert {b.reason for b in plan.blocked} >= {"asked to be ignored"}


def test_wrong_arguments_are_said() -> None:
    network = small()
    for wrong in (
        {"policy": "best"}, {"importance": "beauty"}, {"compensate": "some"}, {"round_to": 0},
        {"target": "macs"}, {"compensate": "mean"}, {"importance": "refit"}, {"recalibrate": 3},
        {"importance": "taylor", "calibration": BATCHES}, {"min_keep": 1.5},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            job.slim(network, EXAMPLE, **wrong)


def test_nothing_is_shared_with_the_wide_network_not_even_what_is_empty() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(), nn.Conv2d(8, 4, 3)
    )
    narrow, _ = job.slim(network, torch.rand(1, 3, 8, 8))
    assert not {id(m) for m in network.modules()} & {id(m) for m in narrow.modules()}
