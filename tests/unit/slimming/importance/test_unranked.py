"""Channels that no BatchNorm ranks take part in every cut, by a stated rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import job
from job.slimming.analysis import analyse
from job.slimming.calibration.input_statistics import CalibrationData
from job.slimming.importance.criteria import gamma_importance, l2_importance, score_channels
from support.cuts import randomise
from support.masked import assert_equal_to_masked
from support.networks import Gate, Net, PreActivation, Residual

IMAGE = torch.rand(1, 3, 20, 28)


class Grouped(Net):
    width = out = 16

    def build(self) -> None:
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(1, 16), nn.ReLU())
        self.one, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(1, 16)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.one(x)))


def scores_of(network: nn.Module, importance: str) -> tuple[object, np.ndarray]:
    graph = analyse(network, IMAGE)
    return graph, score_channels(importance, network, graph, CalibrationData())


def test_scores_by_batchnorm_are_what_they_were() -> None:
    torch.manual_seed(0)
    network = randomise(Residual())
    graph, scores = scores_of(network, "gamma")
    np.testing.assert_array_equal(scores, gamma_importance(network, graph))


def test_other_channels_are_ranked_by_their_weights_at_the_mean_gamma() -> None:
    torch.manual_seed(0)
    network = randomise(Gate())
    graph, scores = scores_of(network, "gamma")
    gamma, weights = gamma_importance(network, graph), l2_importance(network, graph)
    hidden = next(g for g in graph.groups if g.name == "down").channels
    assert np.isnan(gamma[hidden]).all()
    others = np.concatenate([g.channels for g in graph.groups if g.norms])
    expected = gamma[others].mean() * weights[hidden] / weights[hidden].mean()
    np.testing.assert_allclose(scores[hidden], expected)
    np.testing.assert_array_equal(scores[others], gamma[others])


class Mixed(Net):
    """Two equally large halves, one of which passes through a BatchNorm."""

    def build(self) -> None:
        self.a, self.norm = nn.Conv2d(12, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.b = nn.Conv2d(12, 10, 3, padding=1)
        self.left, self.right = nn.Conv2d(10, 12, 1), nn.Conv2d(10, 12, 1)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.norm(self.a(x)), self.b(x)], 1)
        half = x.shape[1] // 2
        return self.left(x[:, :half]) + self.right(x[:, half:])


def test_a_block_without_a_batchnorm_is_ranked_beside_those_with_one() -> None:
    torch.manual_seed(0)
    network = randomise(Mixed())
    graph, scores = scores_of(network, "gamma")
    (group,) = (g for g in graph.groups if g.blocks is not None)
    gamma, weights = gamma_importance(network, graph), l2_importance(network, graph)
    with_norm, without = sorted(group.blocks, key=lambda block: np.isnan(gamma[block]).any())
    np.testing.assert_array_equal(scores[with_norm], gamma[with_norm])
    others = np.concatenate([g.channels for g in graph.groups])
    mean = np.nanmean(gamma[others])
    np.testing.assert_allclose(scores[without], mean * weights[without] / weights[without].mean())
    narrow, plan = job.slim(network, IMAGE, target="width=0.5", policy="uniform")
    assert (narrow.a.out_channels, narrow.b.out_channels) == (5, 5)
    assert {b.layer for b in plan.blocked} == {"head"}
    assert_equal_to_masked(network, narrow, plan.layers, IMAGE)


def test_gamma_of_another_norm_ranks_its_channels() -> None:
    torch.manual_seed(0)
    network = Grouped().eval()
    with torch.no_grad():
        network.norm.weight.copy_(torch.rand(16) + 0.1)
    graph, scores = scores_of(network, "gamma")
    channels = next(g for g in graph.groups if g.name == "one").channels
    gammas = network.norm.weight.detach().double().numpy()
    np.testing.assert_allclose(scores[channels], gammas / gammas.mean())
    narrow, plan = job.slim(network, IMAGE)  # half of the outputs of all layers
    assert plan.after.channels <= 0.5 * plan.before.channels
    kept = plan.layers["one"].out
    lost = set(range(16)) - set(kept)
    assert max(gammas[list(lost)]) <= min(gammas[list(kept)])
    assert narrow.norm.num_channels == len(kept)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_network_without_norms_is_cut_by_default(calibrated: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)
    )
    options = {"calibration": [torch.rand(16, 3, 20, 28)]} if calibrated else {}
    narrow, plan = job.slim(plain, IMAGE, target="channels=0.6", **options)
    assert plan.before.channels == 36
    assert plan.after.channels <= 0.6 * 36
    if not calibrated:
        assert_equal_to_masked(plain, narrow, plan.layers, IMAGE)


def test_channels_that_a_batchnorm_selects_are_ranked_by_it_where_no_weights_produce_them() -> None:
    torch.manual_seed(0)
    network = randomise(PreActivation())
    with torch.no_grad():
        network.n1.weight[:6] *= 0.01
    _, plan = job.slim(network, IMAGE, importance="l2", policy="uniform", target="width=0.5")
    selected = plan.layers["n1"].select
    assert selected is not None
    assert set(selected) == set(range(6, 12))
