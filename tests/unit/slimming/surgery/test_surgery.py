"""The homework's own surgery on StudentNet, the proof, and how cuts compose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from job.errors import GammaslimError, UsageError
from job.models.factory import build_network
from job.slimming.analysis import analyse
from job.slimming.importance.criteria import gamma_importance
from job.slimming.planning.cost import example_image
from job.slimming.planning.layer_channels import LayerChannels, Layers, compose
from job.slimming.planning.plan import keep_of, layers_of
from job.slimming.planning.ranked_groups import rank_groups
from job.slimming.surgery.probe import smallest_equivalent_input
from job.slimming.surgery.surgery import apply_plan
from job.slimming.surgery.verification import verify
from support.cuts import randomise, uniform
from support.reference import PlainStudentNet, homework_slimming

SWEEP = [float(w) for w in np.linspace(1, 0.1, 19)]
ROUNDS = [0.95, 0.9025, 0.8573749999999999, 0.8145062499999999, 0.7737809374999999]
PIXELS = example_image(64)


def student(seed: int = 0, **args: float) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(build_network("student", 11, args), seed)


def proof(wide: nn.Module, narrow: nn.Module, layers: Layers) -> float:
    return verify(wide, narrow, layers, PIXELS).error


@pytest.mark.parametrize("width", SWEEP)
def test_uniform_equals_the_homework_at_every_width(width: float) -> None:
    network = student()
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    narrow = apply_plan(network, uniform(network, width).layers)
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
        network = apply_plan(network, uniform(network, width).layers)
        state = homework_slimming(state, width)
        reference = PlainStudentNet(width).eval()
        reference.load_state_dict(state)
        torch.testing.assert_close(network(images), reference(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [1.0, 0.9, 0.5, 0.1])
def test_every_cut_is_proven_in_float64(width: float) -> None:
    network = student(4)
    plan = uniform(network, width)
    assert proof(network, apply_plan(network, plan.layers), plan.layers) <= 1e-9


def test_the_proof_fails_for_a_wrong_cut() -> None:
    network = student(5)
    plan = uniform(network, 0.5)
    narrow = apply_plan(network, plan.layers)
    for key in ("cnn.4.0.weight", "cnn.5.1.running_mean", "cnn.3.3.bias", "cnn.7.3.weight"):
        wrong = apply_plan(narrow, {})
        wrong.state_dict()[key].copy_(wrong.state_dict()[key].roll(1, 0))
        with pytest.raises(GammaslimError, match="differs from the wide"):
            proof(network, wrong, plan.layers)
    # other channels than the plan says
    graph = analyse(network, PIXELS)
    sizes = {group.name: group.size for group in graph.groups}
    others = {
        name: tuple(sorted((i + 1) % sizes[name] for i in kept))
        for name, kept in plan.groups.items()
    }
    moved = layers_of(graph, keep_of(graph, others))
    with pytest.raises(GammaslimError, match="differs from the wide"):
        proof(network, apply_plan(network, moved), plan.layers)
    broken = apply_plan(narrow, {})
    broken.state_dict()["cnn.5.1.weight"][0] = float("nan")
    with pytest.raises(GammaslimError, match="differs from the wide"):
        proof(network, broken, plan.layers)


class Halves(nn.Module):
    """Halves its images ``times`` times; ``other`` changes what it does with large ones."""

    def __init__(self, times: int, other: str = "") -> None:
        super().__init__()
        layers = [nn.Conv2d(3 if n == 0 else 4, 4, 3, stride=2, padding=1) for n in range(times)]
        self.layers, self.other = nn.Sequential(*layers), other
        self.linear = nn.Linear(4 * 28 * 28 if other == "linear" else 4, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layers(images)
        if self.other == "linear":
            return self.linear(found.flatten(1))
        if self.other == "branch" and images.shape[-1] > 100:
            found = found.flip(1)
        return self.linear(found.mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "sides", "proven"),
    [
        (Halves(3), (224, 224), (32, 32)),
        (Halves(4), (224, 224), (64, 64)),  # at 32, two places of the last for kernels of 3
        (Halves(1), (32, 48), (16, 24)),
        (Halves(3), (32, 32), (32, 32)),
        (Halves(5), (200, 300), (64, 96)),
        (Halves(6), (224, 224), (96, 96)),  # at 64, every place of the last would see but one
        (Halves(7), (224, 224), (224, 224)),
        (Halves(3, "linear"), (224, 224), (224, 224)),
        (Halves(3, "branch"), (224, 224), (224, 224)),
        (Halves(4), (100, 100), (100, 100)),
    ],
)
def test_proofs_take_smaller_images_only_where_they_are_as_good(
    network: nn.Module, sides: tuple[int, int], proven: tuple[int, int]
) -> None:
    assert tuple(smallest_equivalent_input(network.eval(), torch.rand(1, 3, *sides)).shape) == (
        1,
        3,
        *proven,
    )


def test_the_network_that_is_cut_is_left_untouched() -> None:
    network = student(6).to(memory_format=torch.channels_last).train()
    network.get_parameter("cnn.5.0.weight").requires_grad_(False)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    narrow = apply_plan(network, uniform(network, 0.5).layers)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
    assert narrow.training
    assert not narrow.get_parameter("cnn.5.0.weight").requires_grad
    assert narrow.get_parameter("cnn.5.3.weight").requires_grad
    assert narrow.get_parameter("cnn.0.0.weight").is_contiguous(memory_format=torch.channels_last)
    narrow(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for n, p in narrow.named_parameters() if n != "cnn.5.0.weight")


def test_ranking_is_by_magnitude_and_ties_go_to_the_lower_index() -> None:
    network = student()
    with torch.no_grad():
        network.get_parameter("cnn.4.1.weight").fill_(0.1)
        network.get_parameter("cnn.4.1.weight")[7] = -3.0
        network.get_parameter("cnn.4.1.weight")[9] = -0.0
    graph = analyse(network, PIXELS)
    scores = gamma_importance(network, graph)
    assert scores.dtype == np.float64
    group = next(r for r in rank_groups(graph, scores) if r.group.name == "cnn.3.3")
    first = group.units[:, 0] - group.group.channels[0]
    assert first[:3].tolist() == [7, 0, 1]
    assert first[-1] == 9


def test_kept_indices_of_several_cuts_lead_back_to_the_base() -> None:
    base = student(8)
    first = uniform(base, 0.7)
    middle = apply_plan(base, first.layers)
    second = uniform(middle, 0.4)
    twice = apply_plan(middle, second.layers)
    once = apply_plan(base, compose(first.layers, second.layers))
    for key, value in twice.state_dict().items():
        assert torch.equal(value, once.state_dict()[key]), key


def test_width_counts_from_the_network_at_width_1() -> None:
    network = student(width_mult=0.95)
    narrow = apply_plan(network, uniform(network, 0.9025).layers)
    PlainStudentNet(0.9025).load_state_dict(narrow.state_dict())


def test_impossible_widths_are_refused() -> None:
    with pytest.raises(UsageError, match=r"leaves no channel of cnn\.3\.3"):
        uniform(student(), 0.007)
    with pytest.raises(UsageError, match="not below the network's own"):
        uniform(student(width_mult=0.5), 0.6)
    with pytest.raises(UsageError, match="does not run on images of 3 x 64 x 64"):
        analyse(nn.Linear(2, 2), PIXELS)


def test_a_plan_covers_each_position_of_its_groups() -> None:
    network = student()
    plan = uniform(network, 0.5)
    cut = {name for name, kept in plan.groups.items() if len(kept) in (64, 128)}
    assert {"cnn.3.3", "cnn.4.3", "cnn.5.3", "cnn.6.3"} <= cut
    layers = plan.layers
    kept = plan.groups["cnn.3.3"]
    assert len(kept) == 64
    assert layers["cnn.3.3"] == LayerChannels(out=kept)
    assert layers["cnn.4.0"] == LayerChannels(kept, kept)
    assert layers["cnn.4.1"] == LayerChannels(out=kept)
    assert layers["cnn.4.3"] == LayerChannels(plan.groups["cnn.4.3"], kept)
    assert layers["cnn.7.3"].out is None
