"""The cut equals the homework's, is proven, and its proof can fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import randomise
from job.errors import GammaslimError, UsageError
from job.models import build
from job.models.student import StudentNet
from job.slimming.graph import channel_graph
from job.slimming.importance import gamma_importance, strongest
from job.slimming.plan import compose, layers_of, uniform_plan
from job.slimming.surgery import narrowed
from job.slimming.verification import verify
from reference import PlainStudentNet, homework_slimming

SWEEP = [float(w) for w in np.linspace(1, 0.1, 19)]
ROUNDS = [0.95, 0.9025, 0.8573749999999999, 0.8145062499999999, 0.7737809374999999]


def student(seed: int = 0, **args: float) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(build("student", 11, args), seed)


@pytest.mark.parametrize("width", SWEEP)
def test_uniform_equals_the_homework_at_every_width(width: float) -> None:
    network = student()
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    narrow = narrowed(network, uniform_plan(network, width).layers)
    reference = PlainStudentNet(width).eval()
    reference.load_state_dict(homework_slimming(network.state_dict(), width))
    with torch.inference_mode():
        ours, theirs = narrow(images), reference(images)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    # and the state dict loads into the homework's class as it is
    plain = PlainStudentNet(width).eval()
    plain.load_state_dict(narrow.state_dict())
    torch.testing.assert_close(plain(images), theirs, atol=1e-5, rtol=0)


def test_rounds_one_after_another_equal_the_homework() -> None:
    network, state = student(3), student(3).state_dict()
    images = torch.rand(2, 3, 64, 64)
    for width in ROUNDS:
        network = narrowed(network, uniform_plan(network, width).layers)
        state = homework_slimming(state, width)
        reference = PlainStudentNet(width).eval()
        reference.load_state_dict(state)
        torch.testing.assert_close(network(images), reference(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [1.0, 0.9, 0.5, 0.1])
def test_every_cut_is_proven_in_float64(width: float) -> None:
    network = student(4)
    plan = uniform_plan(network, width)
    assert verify(network, narrowed(network, plan.layers), plan, 64) <= 1e-9


def test_the_proof_fails_for_a_wrong_cut() -> None:
    network = student(5)
    plan = uniform_plan(network, 0.5)
    narrow = narrowed(network, plan.layers)
    for key in ("cnn.4.0.weight", "cnn.5.1.running_mean", "cnn.3.3.bias", "cnn.7.3.weight"):
        wrong = narrowed(narrow, {})
        wrong.state_dict()[key].copy_(wrong.state_dict()[key].roll(1, 0))
        with pytest.raises(GammaslimError, match="differs from the wide"):
            verify(network, wrong, plan, 64)
    # other channels than the plan says
    graph = channel_graph(network)
    others = {name: tuple((i + 1) % 128 for i in kept) for name, kept in plan.groups.items()}
    with pytest.raises(GammaslimError, match="differs from the wide"):
        verify(network, narrowed(network, layers_of(graph, others)), plan, 64)
    broken = narrowed(narrow, {})
    broken.state_dict()["cnn.5.1.weight"][0] = float("nan")
    with pytest.raises(GammaslimError, match="differs from the wide"):
        verify(network, broken, plan, 64)


def test_the_network_that_is_cut_is_left_untouched() -> None:
    network = student(6).to(memory_format=torch.channels_last).train()
    network.get_parameter("cnn.5.0.weight").requires_grad_(False)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    narrow = narrowed(network, uniform_plan(network, 0.5).layers)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
    assert narrow.training
    assert not narrow.get_parameter("cnn.5.0.weight").requires_grad
    assert narrow.get_parameter("cnn.5.3.weight").requires_grad
    assert narrow.get_parameter("cnn.0.0.weight").is_contiguous(memory_format=torch.channels_last)
    narrow(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for n, p in narrow.named_parameters() if n != "cnn.5.0.weight")


def test_ranking_is_by_magnitude_and_ties_go_to_the_lower_index() -> None:
    assert strongest(torch.tensor([0.5, -0.0, 2.0, 0.5, 0.5]).double(), 3) == (0, 2, 3)
    network = student()
    with torch.no_grad():
        network.get_parameter("cnn.4.1.weight").fill_(0.1)
        network.get_parameter("cnn.4.1.weight")[7] = -3.0
    group = channel_graph(network).groups[0]
    importance = gamma_importance(network, group)
    assert importance.dtype == torch.float64
    assert strongest(importance, 3) == (0, 1, 7)


def test_kept_indices_of_several_cuts_lead_back_to_the_base() -> None:
    base = student(8)
    first = uniform_plan(base, 0.7)
    middle = narrowed(base, first.layers)
    second = uniform_plan(middle, 0.4)
    twice = narrowed(middle, second.layers)
    once = narrowed(base, compose(first.layers, second.layers))
    for key, value in twice.state_dict().items():
        assert torch.equal(value, once.state_dict()[key]), key


def test_width_counts_from_the_network_at_width_1() -> None:
    network = student(width_mult=0.95)
    narrow = narrowed(network, uniform_plan(network, 0.9025).layers)
    PlainStudentNet(0.9025).load_state_dict(narrow.state_dict())


def test_impossible_widths_are_refused() -> None:
    with pytest.raises(UsageError, match=r"leaves no channel of cnn\.4"):
        uniform_plan(student(), 0.007)
    with pytest.raises(UsageError, match="not below the network's own"):
        uniform_plan(student(width_mult=0.5), 0.6)
    with pytest.raises(UsageError, match="only StudentNet"):
        uniform_plan(nn.Linear(2, 2), 0.5)


def test_a_plan_covers_each_position_of_its_groups() -> None:
    network = student()
    assert isinstance(network, StudentNet)
    plan = uniform_plan(network, 0.5)
    assert set(plan.groups) == {"cnn.4", "cnn.5", "cnn.6", "cnn.7"}
    layers = plan.layers
    assert layers["cnn.3.3"].in_ is None
    assert layers["cnn.3.3"].out == layers["cnn.4.0"].out == layers["cnn.4.1"].out
    assert layers["cnn.4.3"] == replace(layers["cnn.5.3"], out=plan.groups["cnn.5"],
                                        in_=plan.groups["cnn.4"])  # fmt: skip
    assert layers["cnn.7.3"].out is None
