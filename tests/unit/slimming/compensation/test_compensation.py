"""What removed channels added is kept: against least squares in numpy, and by exact cases."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from job.errors import UsageError
from job.slimming.analysis import analyse
from job.slimming.calibration.input_statistics import (
    CalibrationData,
    InputStatistics,
    measure_inputs,
)
from job.slimming.compensation.constants import add_biases, layers_without_constant
from job.slimming.compensation.cut_pair import CutPair
from job.slimming.compensation.methods import compensate_cut
from job.slimming.compensation.recalibration import recalibrate_batchnorms
from job.slimming.compensation.reconstruction import reconstruct
from job.slimming.cut import measure_importance
from job.slimming.graph.groups import ChannelGraph
from job.slimming.importance.criteria import score_channels
from job.slimming.method import Method
from job.slimming.planning.plan import keep_all, layers_of
from job.slimming.surgery.surgery import apply_plan
from job.slimming.surgery.verification import verify

IMAGES = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def after_a_stem(*layers: nn.Module, channels: int = 6) -> nn.Sequential:
    """conv, BN, ReLU, then the layers under test; random weights and statistics, float64."""
    stem = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()
    return random(nn.Sequential(*stem, *layers))


def random(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.1)
    return network.double().eval()


class TwoConsumers(nn.Module):
    """A residual stream of six channels that two convolutions read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.inner_norm = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.one, self.other = nn.Conv2d(6, 5, 3), nn.Conv2d(6, 5, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.inner_norm(self.inner(x)))
        return self.one(x) + self.other(x)


class Twice(nn.Module):
    """Every channel is read in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.read = nn.Conv2d(12, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        return self.read(torch.cat([F.relu(x), F.relu(-x)], 1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "3 x 3": lambda: after_a_stem(nn.Conv2d(6, 4, 3)),
    "1 x 1 without a bias": lambda: after_a_stem(nn.Conv2d(6, 4, 1, bias=False)),
    "strided": lambda: after_a_stem(nn.Conv2d(6, 4, 1, stride=2)),
    "into a BatchNorm": lambda: after_a_stem(
        nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ),
    "borders": lambda: after_a_stem(
        nn.Conv2d(6, 4, 3, stride=2, padding=(2, 1), dilation=(2, 1), bias=False)
    ),
    "reflected": lambda: after_a_stem(nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")),
    "grouped": lambda: after_a_stem(nn.Conv2d(6, 4, 3, groups=2)),
    "depthwise": lambda: after_a_stem(
        nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 4, 1)
    ),
    "flatten": lambda: after_a_stem(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(24, 5)),
    "pooled": lambda: after_a_stem(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    "residual": lambda: random(TwoConsumers()),
    "twice": lambda: random(Twice()),
}


def cut(network: nn.Module) -> tuple[ChannelGraph, np.ndarray]:
    """The graph, and what stays when a third of the first group goes."""
    graph = analyse(network, IMAGES[:1].to(next(network.parameters())))
    keep, group = keep_all(graph), graph.groups[0]
    rows = group.channels[None] if group.blocks is None else group.blocks
    keep[rows[:, :: rows.shape[1] // 2 or 1][:, : max(1, rows.shape[1] // 3)]] = False
    assert 0 < (~keep).sum() < group.size
    return graph, keep


def slim(network: nn.Module, method: str, ridge: float = 1e-12) -> nn.Module:
    graph, keep = cut(network)
    pair = pair_of(network, graph, keep, IMAGES)
    verify(network, pair.narrow, pair.layers, IMAGES)
    if method == "regress":
        reconstruct(pair, IMAGES.split(10), ridge=ridge)
    else:
        statistics = measure_inputs(network, graph, IMAGES.split(10))
        compensate_cut(method, pair, CalibrationData(None, statistics))
    return pair.narrow


def pair_of(
    network: nn.Module, graph: ChannelGraph, keep: np.ndarray, images: torch.Tensor
) -> CutPair:
    """The network and its plain cut to ``keep``, with the biases that a compensation needs."""
    layers = add_biases(layers_of(graph, keep), layers_without_constant(network, graph))
    return CutPair(network, apply_plan(network, layers), graph, keep, layers, images)


def inputs_of(network: nn.Module, layer: nn.Module) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        network(IMAGES)
    handle.remove()
    return seen[0]


def refitted(
    layer: nn.Module, then: torch.Tensor, now: torch.Tensor, gone: list[int], slopes: bool
) -> nn.Module:
    """``layer`` with weights for the other columns, by numpy's least squares; gone ones are 0.

    ``then`` and ``now`` are what it reads before and after the cut: a map of channels is fitted.
    Columns of a linear layer after a flatten to 2 x 2 are four a channel.
    """
    layer = copy.deepcopy(layer)
    weight, groups = layer.weight.detach(), getattr(layer, "groups", 1)
    inputs = weight.shape[1] * groups
    places = 4 if inputs == 24 else 1
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
        then, now = (x[:, :, :: layer.stride[0], :: layer.stride[1]] for x in (then, now))
    wide, narrow = (
        x.reshape(len(x), inputs // places, -1).transpose(1, 2).flatten(0, 1).numpy()
        for x in (then, now)
    )
    constant, size = np.zeros(len(weight)), weight.shape[1] // places
    taps = weight.reshape(len(weight), size, -1).numpy().copy()
    for group in range(groups):
        own = slice(group * size, (group + 1) * size)
        rows = slice(group * len(weight) // groups, (group + 1) * len(weight) // groups)
        stay = [c for c in range(size) if own.start + c not in gone]
        if slopes:
            known = np.concatenate([narrow[:, own][:, stay], np.ones((len(narrow), 1))], 1)
            solution = np.linalg.lstsq(known, wide[:, own], rcond=None)[0]
        else:
            solution = np.zeros((len(stay) + 1, size))
            solution[range(len(stay)), stay] = 1
            solution[-1] = np.where(np.isin(range(size), stay), 0, wide[:, own].mean(0))
        constant[rows] = taps[rows].sum(2) @ solution[-1]
        new = np.zeros_like(taps[rows])
        for tap in range(taps.shape[2]):
            new[:, stay, tap] = taps[rows][:, :, tap] @ solution[:-1].T
        taps[rows] = new
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(taps).view_as(weight))
        add_bias(layer, torch.from_numpy(constant))
    return layer


def add_bias(layer: nn.Module, constant: torch.Tensor) -> None:
    old = layer.bias.detach() if layer.bias is not None else torch.zeros(len(constant)).double()
    layer.bias = nn.Parameter(old + constant)


def kernel_refitted(
    layer: nn.Module, now: torch.Tensor, wanted: torch.Tensor, gone: list[int]
) -> nn.Module:
    """``layer`` with the kernel for which its outputs are ``wanted``, by numpy; gone columns are 0.

    ``now`` is what it reads after the cut.
    """
    layer = copy.deepcopy(layer)
    weight, groups = layer.weight.detach(), layer.groups
    size, outputs = weight.shape[1], len(weight) // groups
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(now, (layer.padding[1],) * 2 + (layer.padding[0],) * 2, mode=mode)
    unfolded = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    patches = unfolded.transpose(1, 2).reshape(-1, size * groups, weight[0, 0].numel()).numpy()
    target = wanted.permute(0, 2, 3, 1).flatten(0, 2).numpy()
    kernel = np.zeros(weight.reshape(len(weight), size, -1).shape)
    constant = np.zeros(len(weight))
    for group in range(groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        stay = [c for c in range(size) if group * size + c not in gone]
        own = patches[:, [group * size + c for c in stay]].reshape(len(patches), -1)
        known = np.concatenate([own, np.ones((len(own), 1))], 1)
        solution = np.linalg.lstsq(known, target[:, rows], rcond=None)[0]
        kernel[rows, stay] = solution[:-1].T.reshape(outputs, len(stay), -1)
        constant[rows] = solution[-1]
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(kernel).view_as(weight))
        layer.bias = nn.Parameter(torch.from_numpy(constant))
    return layer


@pytest.mark.parametrize("method", ["mean", "regress"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_consumers_are_fitted_as_numpy_fits_them(kind: str, method: str) -> None:
    network = NETWORKS[kind]()
    graph, keep = cut(network)
    expected = copy.deepcopy(network)
    for position in graph.slots:
        if position.side == "in" and position.ids.any():
            layer = network.get_submodule(position.layer)
            gone = np.flatnonzero(~keep[position.ids])
            if position.ids.size == 24:
                gone = np.unique(gone // 4)
            then = inputs_of(network, layer)
            now = inputs_of(expected, expected.get_submodule(position.layer))
            if method == "regress" and isinstance(layer, nn.Conv2d):
                with torch.no_grad():
                    wanted = layer(then)
                    if position.layer == "other":  # added to the outputs of ``one``
                        wanted += network.one(then) - expected.one(now)
                fitted = kernel_refitted(layer, now, wanted, gone.tolist())
            else:
                fitted = refitted(layer, then, now, gone.tolist(), method == "regress")
            expected.set_submodule(position.layer, fitted)
    with torch.no_grad():
        ours, theirs = slim(network, method)(IMAGES), expected(IMAGES)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "kind", ["3 x 3", "into a BatchNorm", "flatten", "strided", "residual", "borders", "reflected"]
)
def test_nothing_is_lost_when_the_others_can_stand_in(kind: str) -> None:
    network = NETWORKS[kind]()
    graph, keep = cut(network)
    group = graph.groups[0]
    gone = np.flatnonzero(~keep[group.channels])
    stay = np.flatnonzero(keep[group.channels])
    with torch.no_grad():  # each is a positive multiple of one that stays
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d) and layer.in_channels == 3:
                layer.weight[gone], layer.bias[gone] = layer.weight[stay[:2]], layer.bias[stay[:2]]
            if isinstance(layer, nn.BatchNorm2d) and layer.num_features == 6:
                for own in (layer.running_mean, layer.running_var):
                    own[gone] = own[stay[:2]]
                for own in (layer.weight, layer.bias):
                    own[gone] = own[stay[:2]] * 1.5
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and kind == "residual":
                layer.weight[gone] = layer.weight[stay[:2]]
    with torch.no_grad():
        ours, whole = slim(network, "regress")(IMAGES), network(IMAGES)
    assert float((ours - whole).abs().max() / whole.abs().max()) < 1e-6


@pytest.mark.parametrize("kind", sorted(NETWORKS.keys() - {"borders"}))
def test_beta_is_exact_where_γ_is_zero(kind: str) -> None:
    network = NETWORKS[kind]()
    graph, keep = cut(network)
    with torch.no_grad():
        for position in graph.slots:
            layer = network.get_submodule(position.layer)
            if position.side == "through" and isinstance(layer, nn.BatchNorm2d):
                layer.weight[torch.from_numpy(~keep[position.ids])] = 0
                layer.bias.abs_()
        whole = network(IMAGES)
        torch.testing.assert_close(slim(network, "beta")(IMAGES), whole, rtol=1e-9, atol=1e-9)
        plain = slim(network, "none")(IMAGES)
    assert float((plain - whole).abs().max() / whole.abs().max()) > 1e-3


def test_beta_adds_what_is_left_of_a_channel_without_its_γ() -> None:
    network = NETWORKS["3 x 3"]()
    graph, keep = cut(network)
    gone = torch.from_numpy(~keep[graph.groups[0].channels])
    with torch.no_grad():
        network[1].bias.abs_()
    added = slim(network, "beta")[3].bias - network[3].bias
    expected = network[3].weight.sum((2, 3))[:, gone] @ F.relu(network[1].bias[gone])
    torch.testing.assert_close(added, expected)


def test_the_constant_goes_into_the_running_mean_else_a_new_bias() -> None:
    into_norm, bare = NETWORKS["into a BatchNorm"](), NETWORKS["1 x 1 without a bias"]()
    norms_after = analyse(into_norm, IMAGES).forward.norms_after
    assert norms_after == {"0": ("1",), "3": ("4",)}
    assert slim(into_norm, "mean").get_submodule("3").bias is None
    assert slim(bare, "mean").get_submodule("3").bias is not None


def test_statistics_of_inputs_are_those_of_numpy() -> None:
    network = NETWORKS["3 x 3"]()
    statistics = measure_inputs(network, analyse(network, IMAGES), IMAGES.split(7))["3"]
    rows = inputs_of(network, network.get_submodule("3")).transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(statistics.mean, rows.mean(1), rtol=1e-12)
    covariance = np.cov(rows, bias=True)
    scatter = statistics.overall().scatter[0]
    np.testing.assert_allclose(scatter / statistics.count, covariance, rtol=1e-10, atol=1e-13)
    assert statistics.count == rows.shape[1]


def test_of_large_feature_maps_every_column_of_the_image_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = after_a_stem(nn.Conv2d(6, 4, 1))
    monkeypatch.setattr("job.slimming.calibration.consumers.MAX_VALUES", 6 * 400)
    column = torch.arange(8.0, dtype=torch.float64).expand(24, 3, 8, 8)
    graph = analyse(network, IMAGES)
    few = measure_inputs(network, graph, [column])["3"]
    assert few.count <= 400
    monkeypatch.undo()
    every = measure_inputs(network, graph, [column])["3"]
    assert every.count == 24 * 64
    torch.testing.assert_close(few.mean, every.mean, rtol=0.05, atol=0.01)


def test_dead_channels_and_one_image_give_finite_weights() -> None:
    for kind in NETWORKS:
        network = NETWORKS[kind]()
        graph, keep = cut(network)
        for dead in (False, True):
            if dead:
                with torch.no_grad():
                    for parameter in network.parameters():
                        parameter.zero_()
            statistics = measure_inputs(network, graph, [IMAGES[:1]])
            calibration = CalibrationData(lambda: [IMAGES[:1]], statistics)
            for method in ("beta", "mean", "regress"):
                pair = pair_of(network, graph, keep, IMAGES)
                compensate_cut(method, pair, calibration)
                assert all(t.isfinite().all() for t in pair.narrow.state_dict().values())
            scores = score_channels("refit", network, graph, calibration)
            assert np.isfinite(scores[graph.groups[0].channels]).all()


def test_frozen_layers_stay_frozen_and_single_precision_single() -> None:
    network = NETWORKS["1 x 1 without a bias"]().float().requires_grad_(False)
    graph, keep = cut(network)
    pair = pair_of(network, graph, keep, IMAGES.float())
    compensate_cut("regress", pair, CalibrationData(lambda: [IMAGES.float()]))
    assert {(p.requires_grad, p.dtype) for p in pair.narrow.parameters()} == {
        (False, torch.float32)
    }


def test_a_batchnorm_gets_the_statistics_of_all_images_and_nothing_else_changes() -> None:
    network = after_a_stem(nn.Dropout(0.5), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        rows = network[0](IMAGES).transpose(0, 1).flatten(1).numpy()
    recalibrate_batchnorms(network, [(part, None) for part in IMAGES.split(9)])
    np.testing.assert_allclose(network[1].running_mean, rows.mean(1), rtol=1e-6)
    np.testing.assert_allclose(network[1].running_var, rows.var(1, ddof=1), rtol=1e-6)
    after = network.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"{n}.running_{own}" for n in (1, 5) for own in ("mean", "var")}
    assert all(layer.training and getattr(layer, "momentum", 0.1) == 0.1 for layer in network)
    again = copy.deepcopy(network)
    for layer in again:
        layer.train(isinstance(layer, nn.BatchNorm2d))
        layer.momentum = None
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    again(IMAGES)  # torch's own, in one batch
    recalibrate_batchnorms(network, [IMAGES])
    for ours, theirs in zip(network.buffers(), again.buffers(), strict=True):
        if ours.is_floating_point():
            torch.testing.assert_close(ours, theirs)


def test_recalibration_without_images_changes_nothing() -> None:
    network = NETWORKS["3 x 3"]()
    before = copy.deepcopy(network.state_dict())
    recalibrate_batchnorms(network, [])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(("importance", "method"), [("refit", "none"), ("gamma", "mean")])
def test_what_needs_statistics_measures_them_or_says_so(importance: str, method: str) -> None:
    network = NETWORKS["3 x 3"]()
    graph = analyse(network, IMAGES)
    for batches in (None, list):
        with pytest.raises(UsageError, match="calibration images are needed"):
            measure_importance(network, graph, Method(importance, method), batches)
    _, nothing = measure_importance(network, graph, Method("gamma", "beta"))
    assert nothing == CalibrationData()
    method_used = Method(importance, method)
    _, calibration = measure_importance(network, graph, method_used, lambda: [IMAGES])
    assert isinstance(calibration.statistics["3"], InputStatistics)


@pytest.mark.parametrize("calibration", [None, []])
def test_regress_without_images_says_so(calibration: list[torch.Tensor] | None) -> None:
    with pytest.raises(UsageError, match=r"regress: calibration images are needed|it is empty"):
        job.slim(NETWORKS["3 x 3"](), IMAGES, compensate="regress", calibration=calibration)
