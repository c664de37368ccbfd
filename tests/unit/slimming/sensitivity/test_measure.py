"""Loss curves: what the outputs lose when one group is cut, against networks really cut."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from job.config import PruneConfig
from job.errors import UsageError
from job.pipeline.slim_round import method_of
from job.slimming.analysis import analyse
from job.slimming.calibration.input_statistics import CalibrationData, measure_inputs
from job.slimming.calibration.moments import is_held_out
from job.slimming.importance.criteria import score_channels
from job.slimming.inputs import call_network
from job.slimming.planning.loss_curves import fit_curve
from job.slimming.planning.ranked_groups import rank_groups
from job.slimming.sensitivity.measure import measure_curves
from job.slimming.sensitivity.output_loss import loss_terms, mean_loss
from job.slimming.sensitivity.replay import Replay
from support.cuts import randomise
from support.networks import Residual

IMAGES = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class InPlace(nn.Module):
    """Ops that change what a layer returned, a layer without bias, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.back = nn.Conv2d(12, 8, 1, bias=False)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        y = self.back(F.relu(self.inner(x), inplace=True))
        y += x
        return [self.head(y.mean((2, 3))), y.mean(1)]


def calibrated(network: nn.Module) -> tuple[Any, CalibrationData]:
    graph = analyse(network, IMAGES[:1])
    batches = IMAGES.split(10)
    statistics = measure_inputs(network, graph, batches)
    return graph, CalibrationData(lambda: batches, statistics, len(IMAGES))


class PaddedConv(nn.Conv2d):
    """Has a layer of its own, as ports of TensorFlow have for their padding."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride)


class OwnForward(nn.Module):
    """Convolutions with code of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = PaddedConv(3, 8, 2), nn.BatchNorm2d(8)
        self.inner, self.back = PaddedConv(8, 12, 2), PaddedConv(12, 8, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.back(F.relu(self.inner(x)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("make", [Residual, InPlace, OwnForward])
def test_a_point_is_the_loss_of_a_network_with_that_group_cut_alone(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    wide = randomise(make())
    graph, calibration = calibrated(wide)
    scores = score_channels("refit", wide, graph, calibration)
    groups = rank_groups(graph, scores)
    before = {key: value.clone() for key, value in wide.state_dict().items()}
    curves = measure_curves(wide, graph, groups, calibration, IMAGES[:1], accumulated=True)
    assert all(torch.equal(before[key], value) for key, value in wide.state_dict().items())
    assert set(curves) == {r.group.name for r in groups}
    held_out = IMAGES[is_held_out(torch.arange(len(IMAGES)))]
    for ranked in groups:
        curve = curves[ranked.group.name]
        assert curve.images == len(held_out)
        for count, loss in zip(curve.counts, curve.losses, strict=True):
            if not count:
                continue
            assert curve.by_count[count] >= 0
            narrow = cut_alone(wide, graph, ranked, count, calibration)
            with torch.no_grad():
                terms = loss_terms(tensors(wide(held_out)), narrow(held_out))
            assert loss == pytest.approx(float(mean_loss(terms)), rel=1e-3, abs=1e-7)
        assert (np.diff(curve.by_count) <= 0).all()
        assert curve.by_count[-1] == 0


def tensors(outputs: object) -> list[torch.Tensor]:
    return list(outputs) if isinstance(outputs, list) else [outputs]


def cut_alone(
    wide: nn.Module, graph: Any, ranked: Any, count: int, calibration: CalibrationData
) -> nn.Module:
    """Return the network with ``count`` units in one group and its consumers refitted."""
    keep = np.ones(graph.count, bool)
    keep[ranked.units[count:].reshape(-1)] = False
    hooks = {}
    for slot in graph.slots:
        if slot.side != "in" or keep[slot.ids].all():
            continue
        stays = torch.from_numpy(keep[slot.ids])
        slope, constant = best_slope(calibration.statistics[slot.layer], stays)
        hooks[slot.layer] = slope.float(), constant.float(), stays
    narrow = copy.deepcopy(wide)
    for name, (slope, constant, stays) in hooks.items():
        layer = narrow.get_submodule(name)

        def hook(layer, inputs, output, slope=slope, constant=constant, stays=stays):
            # the slope goes into the weights and the constant into the outputs, borders included
            (x,) = inputs
            if isinstance(layer, nn.Linear):
                return F.linear(x[:, stays] @ slope.T + constant, layer.weight, layer.bias)
            mixed = torch.einsum("ck,bkhw->bchw", slope, x[:, stays])
            new = type(layer).forward(layer, mixed)
            return new + (layer.weight.sum((2, 3)) @ constant).view(1, -1, 1, 1)

        layer.register_forward_hook(hook)
    return narrow.eval()


def best_slope(measured: Any, stays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit inputs by those that stay; the ridge is chosen on the held-out images."""
    moments, errors, fits = measured.fitted, [], []
    plain = torch.eye(len(stays)).double()[:, stays]
    for ridge in (1e-3, 1e-2, 1e-1, 1.0):
        covariance = moments.scatter[0] / moments.count
        inner = covariance[stays][:, stays]
        damped = inner + ridge * inner.diagonal().mean() * torch.eye(len(inner)).double()
        # ridge towards the plain cut: least squares of what it misses
        slope = plain + torch.linalg.solve(damped, covariance[stays] - inner @ plain.T).T
        constant = moments.mean[0] - slope @ moments.mean[0][stays]
        fits.append((slope, constant))
        missed = torch.eye(len(stays)).double() - torch.zeros_like(covariance).index_copy(
            1, stays.nonzero()[:, 0], slope
        )
        scatter, mean = measured.held_out.scatter[0], measured.held_out.mean[0]
        bias = missed @ mean - constant
        errors.append((missed @ scatter @ missed.T).trace() + measured.held_out.count * bias @ bias)
        if len(errors) > 1 and errors[-1] >= errors[-2]:
            return fits[-2]
    return fits[-1]


class Keeps(nn.Module):
    """Two blocks, one with a hook inside, and a weight that is used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), Block(), Block()
        self.head, self.seen = nn.Linear(8, 5), list[torch.Tensor]()
        self.two.conv.register_forward_hook(lambda *args: self.seen.append(args[-1].mean((2, 3))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.clear()
        x = self.two(self.one(F.conv2d(x, self.stem.weight) + self.stem(x)[:, :, 1:-1, 1:-1]))
        return self.head(x.mean((2, 3)) + self.seen[0])


class Block(nn.Module):
    """A convolution and functions that no layer computes."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Block.calls += 1
        return F.relu(self.conv(x) + x, inplace=True)


def test_a_block_is_replayed_whole_unless_its_layers_are_observed() -> None:
    wide = randomise(Keeps())
    with torch.no_grad():
        expected, replay = wide(IMAGES), Replay(wide, IMAGES)
        place, Block.calls = replay.order.index("head"), 0
        assert torch.equal(replay.run_from(place), expected)
        assert Block.calls == 1  # two, which has a hook; not one
        leaves = Replay(wide, IMAGES, blocks=False)
        assert torch.equal(leaves.run_from(place), expected)
        assert Block.calls == 1 + 2 + 2


def test_passes_are_whole_where_a_weight_is_also_used_outside_of_its_layer() -> None:
    wide = randomise(Keeps())
    with torch.no_grad():
        replay = Replay(wide, IMAGES)
    assert replay.first_call({"two.conv": 1}) == 2
    assert replay.first_call({"two.conv": 1, "head": 2}) == 0


@pytest.mark.parametrize("make", [Residual, InPlace, OwnForward, Keeps])
def test_replayed_passes_give_the_outputs_of_whole_passes(make: type[nn.Module]) -> None:
    wide = randomise(make())
    with torch.no_grad():
        expected = tensors(wide(IMAGES))
        replay = Replay(wide, IMAGES)
        for place in range(len(replay.order) + 1):
            for _ in range(2):  # what an op changes in place is recorded untouched
                outputs = tensors(replay.run_from(place))
                assert all(map(torch.equal, outputs, expected))
    assert not any("forward" in module.__dict__ for module in wide.modules())


def test_only_layers_from_the_given_place_on_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = randomise(Residual())
    with torch.no_grad():
        replay = Replay(wide, IMAGES)
        convolutions: list[torch.Tensor] = []
        original = nn.Conv2d._conv_forward

        def counting(self: nn.Conv2d, *args: torch.Tensor) -> torch.Tensor:
            convolutions.append(args[0])
            return original(self, *args)

        monkeypatch.setattr(nn.Conv2d, "_conv_forward", counting)
        call_network(wide, IMAGES)
        every = len(convolutions)
        convolutions.clear()
        replay.run_from(len(replay.order))
        assert (len(convolutions), every > 2) == (0, True)


def test_passes_are_whole_where_the_calls_of_a_layer_are_not_observed() -> None:
    wide = randomise(Residual())
    with torch.no_grad():
        replay = Replay(wide, IMAGES)
    assert replay.first_call({replay.order[2]: 1, replay.order[1]: 1}) == 1
    assert replay.first_call({replay.order[2]: 1, "of another kind": 1}) == 0


def test_curves_interpolate_and_never_rise() -> None:
    local = np.array([8.0, 4.0, 2.0, 1.0])
    curve = fit_curve([1, 3], [0.4, 0.1], 4, local)
    assert curve.by_count == pytest.approx([0.8, 0.4, 0.2, 0.1, 0.0])
    plain = fit_curve([0, 2], [4.0, 1.0], 4)
    assert plain.by_count == pytest.approx([4.0, 2.25, 1.0, 0.25, 0.0])
    noisy = fit_curve([0, 2], [0.1, 0.3], 4)
    assert list(noisy.by_count) == sorted(noisy.by_count, reverse=True)


def test_allocation_by_outputs_spares_what_the_outputs_miss() -> None:
    torch.manual_seed(0)
    wide = randomise(Residual())
    batches = [(IMAGES, None)]
    narrow, plan = job.slim(wide, IMAGES[:1], target="macs=0.6", calibration=batches)
    assert "allocation outputs" in plan.method
    local, other = job.slim(
        wide, IMAGES[:1], target="macs=0.6", calibration=batches, allocate="local"
    )
    assert "allocation outputs" not in other.method
    assert plan.after.macs <= 0.6 * plan.before.macs
    with torch.no_grad():
        reference = tensors(wide(IMAGES))
        by_outputs, by_channels = (
            float(mean_loss(loss_terms(reference, network(IMAGES)))) for network in (narrow, local)
        )
    assert by_outputs <= by_channels


def test_squared_errors_are_relative_and_averaged_over_the_outputs() -> None:
    wide = [torch.tensor([[2.0], [0.0]]), torch.tensor([1.0, float("inf")])]
    terms = loss_terms(wide, [torch.tensor([[1.0], [0.0]]), torch.tensor([1.0, 5.0])])
    assert float(mean_loss(terms)) == pytest.approx(0.125)
    logits = [torch.tensor([[0.0, 0.0]])]
    changed = torch.tensor([[np.log(3.0), 0.0]])
    divergence = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert float(mean_loss(loss_terms(logits, changed))) == pytest.approx(divergence)


class Together(nn.Module):
    """A regression whose outputs, of several values, move together."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 3)
        for weight in (self.one.weight, self.two.weight, self.head.weight):
            nn.init.normal_(weight)
        with torch.no_grad():
            self.head.weight.copy_(self.head.weight[:1].expand(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.two(F.relu(self.one(x))))
        return self.head(x.mean((2, 3)))


def test_a_change_that_all_values_have_in_common_is_an_error_of_a_regression() -> None:
    torch.manual_seed(0)
    wide = Together().eval()
    given: dict[str, Any] = {"calibration": [IMAGES], "output_loss": "squared_error"}
    blind = job.sensitivity(wide, IMAGES[:1], calibration=[IMAGES])
    seen = job.sensitivity(wide, IMAGES[:1], **given)
    assert (blind.loss, seen.loss) == ("kl", "squared_error")
    assert all(row.points[-1].loss < 1e-9 for row in blind.rows)  # no channel is left
    assert all(row.points[-1].loss > 1e-5 for row in seen.rows)
    narrow, _ = job.slim(wide, IMAGES[:1], target="macs=0.5", **given)
    worse, _ = job.slim(wide, IMAGES[:1], target="macs=0.5", calibration=[IMAGES])
    with torch.no_grad():
        errors = [(network(IMAGES) - wide(IMAGES)).square().sum() for network in (narrow, worse)]
    assert errors[0] <= errors[1]
    with pytest.raises(UsageError, match="output_loss must be one of kl, squared_error"):
        job.slim(wide, IMAGES[:1], output_loss="mse")


@pytest.mark.parametrize(
    ("task", "loss"),
    [("classification", None), ("multi-label", "squared_error"), ("a:Task", "squared_error")],
)
def test_only_classes_are_compared_by_their_softmax(task: str, loss: str | None) -> None:
    assert method_of(PruneConfig(task=task)).output_loss == loss


def test_a_removable_group_has_one_more_point_that_changes_no_other() -> None:
    torch.manual_seed(0)
    wide = randomise(Residual())
    graph, calibration = calibrated(wide)
    groups = rank_groups(graph, score_channels("refit", wide, graph, calibration))
    without = measure_curves(wide, graph, groups, calibration, IMAGES[:1])
    name = next(iter(without))
    within = measure_curves(wide, graph, groups, calibration, IMAGES[:1], removable=[name])
    assert [n for n, curve in within.items() if curve.removable] == [name]
    assert within[name].counts == (0, *without[name].counts)
    assert within[name].by_count[0] == within[name].losses[0]
    bounded = np.minimum(without[name].by_count, within[name].losses[0])
    np.testing.assert_array_equal(within[name].by_count[1:], bounded[1:])
