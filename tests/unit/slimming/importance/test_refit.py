"""Importance by refitting: against brute force, by exact cases, over processes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from job.models.student import StudentNet
from job.slimming.analysis import analyse
from job.slimming.calibration.input_statistics import (
    InputStatistics,
    measure_inputs,
)
from job.slimming.calibration.moments import Moments, RowMoments
from job.slimming.graph.groups import ChannelGraph
from job.slimming.importance.refit import refit_importance
from support.cuts import randomise
from support.networks import Streams

IMAGES = torch.rand(32, 3, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def streams() -> tuple[nn.Module, ChannelGraph, dict[str, InputStatistics]]:
    torch.manual_seed(0)
    network = randomise(Streams()).double()
    graph = analyse(network, IMAGES)
    return network, graph, measure_inputs(network, graph, IMAGES.split(10))


def rows_in_front(network: nn.Module) -> dict[str, np.ndarray]:
    """(N, C) of each reader, centred."""
    rows = {}
    with torch.no_grad():
        y = network.norm(network.stem(IMAGES))
        z = F.relu(network.also_norm(network.also(IMAGES)))
        streams = {"one": F.relu(y), "other": torch.cat([F.relu(y), torch.tanh(y), z], 1)}
    for name, values in streams.items():
        flat = values.transpose(0, 1).flatten(1).T.numpy()
        rows[name] = flat - flat.mean(0)
    return rows


def lost(network: nn.Module, gone: list[int]) -> float:
    """Return the error of the consumers' outputs after a least-squares fit, by their variance."""
    total = 0.0
    for name, rows in rows_in_front(network).items():
        weight = network.get_submodule(name).weight.detach().flatten(1).numpy()
        target = rows @ weight.T
        away = gone if name == "one" else [*gone, *(8 + c for c in gone)]
        stay = [c for c in range(rows.shape[1]) if c not in away]
        error = target - rows[:, stay] @ np.linalg.lstsq(rows[:, stay], target, rcond=None)[0]
        total += float((error**2).sum() / (target**2).sum())
    return total


def test_the_loss_is_that_of_a_new_fit_without_the_channels() -> None:
    network, graph, statistics = streams()
    (group,) = [group for group in graph.groups if group.size == 8]
    scores = refit_importance(network, graph, statistics, ridge=1e-12)[group.channels]
    order = np.argsort(scores)
    singly = [lost(network, [channel]) for channel in range(8)]
    assert order[0] == int(np.argmin(singly))
    for count in range(1, 9):  # the cost of the greedy order, sum by sum
        assert scores[order[count - 1]] == pytest.approx(lost(network, order[:count].tolist()))
    best = min(lost(network, list(pair)) for pair in itertools.combinations(range(8), 2))
    assert scores[order[1]] == pytest.approx(best, rel=0.5)


def test_few_rows_give_the_losses_of_their_covariance() -> None:
    network = nn.Sequential(nn.Conv2d(3, 40, 1), nn.ReLU(), nn.Flatten(), nn.Linear(40, 5)).double()
    images = IMAGES[:12, :, :1, :1]
    graph = analyse(network, images)
    statistics = measure_inputs(network, graph, [images])
    few = statistics["3"]
    assert isinstance(few.fitted, RowMoments)
    parts = few.fitted, few.held_out
    dense = InputStatistics(*(Moments(part.count, part.mean, part.scatter) for part in parts))
    scores = refit_importance(network, graph, statistics)
    expected = refit_importance(network, graph, {"3": dense})
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-12)
    assert np.isfinite(scores).any()


def test_of_two_equal_channels_one_is_free_and_the_other_is_not() -> None:
    network, graph, _ = streams()
    with torch.no_grad():
        for tensor in (*network.stem.parameters(), *network.norm.state_dict().values()):
            if tensor.dim():
                tensor[5] = tensor[2]
    statistics = measure_inputs(network, graph, [IMAGES])
    (group,) = [group for group in graph.groups if group.size == 8]
    scores = refit_importance(network, graph, statistics, ridge=1e-9)[group.channels]
    assert min(scores[2], scores[5]) < 1e-6
    assert max(scores[2], scores[5]) > 1e-3


def test_several_at_once_are_about_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = randomise(StudentNet(base=4, num_classes=5)).double()
    graph = analyse(network, torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    images = torch.rand(16, 3, 32, 32, dtype=torch.float64)
    statistics = measure_inputs(network, graph, [images])
    one_by_one = refit_importance(network, graph, statistics)
    monkeypatch.setattr("job.slimming.importance.refit.STEPS", 16)
    at_once = refit_importance(network, graph, statistics)
    for group in graph.groups:
        ours, theirs = at_once[group.channels], one_by_one[group.channels]
        half = group.size // 2
        same = set(np.argsort(ours)[:half]) & set(np.argsort(theirs)[:half])
        assert len(same) >= 0.8 * half
        np.testing.assert_allclose(np.sort(ours)[half], np.sort(theirs)[half], rtol=0.2)


def test_channels_of_unmeasured_consumers_have_no_rank() -> None:
    network, graph, statistics = streams()
    scores = refit_importance(network, graph, {})
    assert np.isnan(scores).all()
    scores = refit_importance(network, graph, {"one": statistics["one"]})
    sizes = {group.size: np.isfinite(scores[group.channels]).all() for group in graph.groups}
    assert sizes == {8: True, 4: False}
