"""Fits of kernels: against float64 least squares, for depthwise layers, sums and odd layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from job.slimming.analysis import analyse
from job.slimming.calibration.patches import (
    pad_inputs,
    patches_at,
    row_count,
    sample_positions,
    values_at,
)
from job.slimming.compensation import kernel_fit, reconstruction
from job.slimming.compensation.constants import add_biases, layers_without_constant
from job.slimming.compensation.cut_pair import CutPair
from job.slimming.compensation.normal_equations import NormalEquations
from job.slimming.compensation.reconstruction import reconstruct
from job.slimming.planning.plan import keep_all, layers_of
from job.slimming.surgery.surgery import apply_plan
from support.cuts import randomise

GENERATOR = torch.Generator().manual_seed(3)
IMAGES = torch.rand(32, 3, 12, 12, generator=GENERATOR)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 5, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1), groups=2),
        nn.Conv2d(4, 4, 5, padding=2, padding_mode="circular", groups=4),
        nn.Conv2d(4, 3, 3, padding="same", padding_mode="replicate"),
        nn.Conv1d(4, 5, 3, stride=2, padding=1),
        nn.Conv3d(4, 2, 2, padding=1),
        nn.Linear(4, 3),
    ],
    ids=str,
)
def test_patches_times_the_kernel_are_the_outputs(layer: nn.Module) -> None:
    dims = layer.weight.dim() - 2
    inputs = torch.rand((2, 4, *(7, 6, 5)[:dims]) if dims else (2, 3, 4))
    with torch.no_grad():
        outputs = layer(inputs)
    rows = row_count(layer, outputs)
    for step in (1, 4):
        where = sample_positions(rows, step, (1, 1), inputs.device)
        patches = patches_at(layer, pad_inputs(layer, inputs), where, outputs.shape[2:])
        groups = getattr(layer, "groups", 1)
        taps = patches.reshape(len(where), groups, -1)
        kernel = layer.weight.detach().reshape(groups, len(layer.weight) // groups, -1)
        ours = torch.einsum("ngc,goc->ngo", taps, kernel).flatten(1) + layer.bias.detach()
        torch.testing.assert_close(ours, values_at(layer, outputs, where))


@pytest.mark.parametrize("constant", [True, False])
def test_float32_sums_give_the_float64_solution(constant: bool) -> None:
    values = torch.randn(5000, 2, 12, generator=GENERATOR) + 3
    values[:, :, 1] += values[:, :, 0] * 5
    errors = torch.randn(5000, 2, 3, generator=GENERATOR) + values[:, :, :3] ** 2
    equations = NormalEquations(2, 12, 3, values.device)
    for part in (slice(0, 7), slice(7, 7), slice(7, 5000)):
        equations.add(values[part], errors[part], torch.arange(5000)[part] // 10)
    solution = equations.solve("layer", 1e-3, constant=constant)
    assert solution is not None
    for group, (slopes, constants) in enumerate(zip(*solution, strict=True)):
        rows, targets = (t[:, group].double().numpy() for t in (values, errors))
        means = (rows.mean(0), targets.mean(0)) if constant else (0, 0)
        rows, targets = rows - means[0], targets - means[1]
        gram = rows.T @ rows / 5000
        damped = gram + 1e-3 * gram.diagonal().mean() * np.eye(12)
        expected = np.linalg.solve(damped, rows.T @ targets / 5000)
        assert np.abs(slopes.numpy() - expected).max() < 1e-4 * np.abs(expected).max()
        intercept = means[1] - means[0] @ expected if constant else np.zeros(3)
        assert np.abs(constants.numpy() - intercept).max() < 1e-3


def test_columns_that_are_constant_get_no_slope() -> None:
    equations = NormalEquations(1, 2, 1, torch.device("cpu"))
    errors = torch.randn(9, 1, 1, generator=GENERATOR) + 4
    equations.add(torch.ones(9, 1, 2), errors, torch.arange(9))
    solution = equations.solve("layer", 1e-3, constant=True)
    assert solution is not None
    assert not solution[0].any()
    assert float(solution[1]) > 3
    assert NormalEquations(1, 2, 1, torch.device("cpu")).solve("layer", 1, constant=True) is None


class Residual(nn.Module):
    """An expansion, a depthwise convolution and a projection onto a stream of eight channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand, self.norm = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.mix, self.mixed = nn.Conv2d(12, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depth, self.after = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.project, self.last = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.other, self.end = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        stream = F.relu(self.stem(images))
        values = F.relu(self.norm(self.expand(stream)))
        values = F.relu(self.mixed(self.mix(values)))
        values = F.relu(self.after(self.depth(values)))
        values = self.last(self.project(values))
        values += stream  # in place
        stream = F.relu(values + self.end(self.other(values)), inplace=True)
        found: torch.Tensor = self.head(stream.mean((2, 3)))
        return found


def pair_of(wide: nn.Module, group: int = 1, every: int = 3) -> CutPair:
    """The plain cut of every third channel of a group."""
    graph = analyse(wide, IMAGES[:1].to(next(wide.parameters())))
    keep = keep_all(graph)
    keep[graph.groups[group].channels[::every]] = False
    layers = add_biases(layers_of(graph, keep), layers_without_constant(wide, graph))
    return CutPair(wide, apply_plan(wide, layers), graph, keep, layers, IMAGES[:1])


def residual() -> Residual:
    torch.manual_seed(1)
    return randomise(Residual(), 1)


def activation(network: nn.Module, name: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = network.get_submodule(name).register_forward_hook(
        lambda _, __, output: seen.append(output.clone())
    )
    with torch.no_grad():
        network(IMAGES)
    handle.remove()
    return seen[0]


def error(pair: CutPair, name: str) -> float:
    return float((activation(pair.wide, name) - activation(pair.narrow, name)).square().mean())


def test_additions_are_the_pause_points_of_the_layers_that_they_read() -> None:
    points = analyse(residual(), IMAGES[:1]).forward.pause_points
    assert {name: point.summand for name, point in points.items() if point.summand} == {
        "project": "last", "other": "end",
    }  # fmt: skip
    assert list(points) == ["stem", "expand", "mix", "depth", "project", "other", "head"]


def test_a_depthwise_kernel_makes_up_for_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, without = pair_of(residual()), pair_of(residual())
    assert pair.graph.groups[1].name == "expand"
    reconstruct(pair, IMAGES.split(8))
    can_fit = kernel_fit.can_fit_kernel
    monkeypatch.setattr(
        reconstruction,
        "can_fit_kernel",
        lambda layer, rows: getattr(layer, "groups", 1) == 1 and can_fit(layer, rows),
    )
    reconstruct(without, IMAGES.split(8))
    assert error(pair, "after") < error(without, "after")


def test_the_last_layer_of_a_block_makes_up_for_the_other_summand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair, plain = pair_of(residual()), pair_of(residual())
    reconstruct(pair, IMAGES.split(8))
    monkeypatch.setattr(CutPair, "summand", lambda *_: None)
    reconstruct(plain, IMAGES.split(8))
    assert error(pair, "head") < error(plain, "head")


def test_passes_continue_with_the_fitted_outputs() -> None:
    pair = pair_of(residual())
    reconstruct(pair, IMAGES.split(8), ridge=1e-9)
    other = pair_of(residual())
    other.narrow.load_state_dict(pair.narrow.state_dict())
    layer = other.narrow.get_submodule("head")
    with torch.no_grad():  # a fit of the last layer alone to what it really reads
        layer.load_state_dict(other.wide.get_submodule("head").state_dict())
        rows = other.narrow(IMAGES) - other.wide(IMAGES)
        narrow = other.narrow
        narrow.head = nn.Identity()
        inputs = torch.cat([narrow(IMAGES), torch.ones(len(IMAGES), 1)], 1).double()
    change = torch.linalg.lstsq(inputs, -rows.double()).solution
    expected = other.wide.get_submodule("head").weight + change[:-1].T
    torch.testing.assert_close(pair.narrow.head.weight.double(), expected, rtol=1e-2, atol=1e-3)


class Padded(nn.Conv2d):
    """Pads by code of its own, so that the borders of its inputs are not where torch expects."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(values, (1, 2, 1, 0)))


class SamePadded(nn.Conv2d):
    """Pads by the size of its inputs and calls the op itself, as ports of TensorFlow do."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        sides = []
        for size, kernel, stride in zip(
            values.shape[-2:], self.weight.shape[-2:], self.stride, strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides = [total // 2, total - total // 2, *sides]
        return F.conv2d(
            F.pad(values, sides), self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


class Standardised(nn.Conv2d):
    """Computes its kernel from its weight."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(values, self.weight - self.weight.mean(), self.bias)


class Activated(nn.Conv2d):
    """Returns more than its convolution does."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return F.relu(super().forward(values))


@pytest.mark.parametrize(
    "layer",
    [
        Padded(4, 5, 3), SamePadded(4, 4, 5, 2, groups=4), SamePadded(4, 6, (3, 2), (2, 1)),
        nn.Conv2d(4, 5, 3, padding=1),
    ],
    ids=str,
)  # fmt: skip
def test_layers_that_prepare_their_inputs_have_patches(layer: nn.Module) -> None:
    assert kernel_fit.can_fit_kernel(layer, 10**9)
    inputs = torch.rand(2, 4, 9, 8)
    with torch.no_grad():
        outputs = layer(inputs)
    where = sample_positions(row_count(layer, outputs), 1, (1, 1), inputs.device)
    patches = patches_at(layer, pad_inputs(layer, inputs), where, outputs.shape[2:])
    taps = patches.reshape(len(where), layer.groups, -1)
    kernel = layer.weight.detach().reshape(layer.groups, len(layer.weight) // layer.groups, -1)
    expected = torch.einsum("ngc,goc->ngo", taps, kernel).flatten(1) + layer.bias.detach()
    torch.testing.assert_close(expected, values_at(layer, outputs, where))


def test_a_layer_with_its_own_kernel_or_result_gets_a_map_of_channels() -> None:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
    wide = randomise(nn.Sequential(*stem, Activated(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 1)))
    assert not kernel_fit.can_fit_kernel(Standardised(6, 5, 3), 10**9)
    assert not kernel_fit.can_fit_kernel(wide[3], 10**9)
    assert kernel_fit.can_fit_kernel(wide[0], 10**9)
    assert not kernel_fit.can_fit_kernel(wide[0], 4 * 27 - 1)
    pair, plain = pair_of(wide, 0), pair_of(wide, 0)
    reconstruct(pair, IMAGES.split(8))
    assert error(pair, "5") < 0.9 * error(plain, "5")


def test_a_depthwise_layer_with_its_own_padding_is_fitted() -> None:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
    depthwise = nn.Conv2d(6, 8, 1), nn.ReLU(), SamePadded(8, 8, 3, groups=8), nn.ReLU()
    pair = pair_of(randomise(nn.Sequential(*stem, *depthwise, nn.Conv2d(8, 3, 1))), 0)
    kernel = pair.narrow.get_submodule("5").weight.clone()
    reconstruct(pair, IMAGES.split(8))
    assert not torch.allclose(pair.narrow.get_submodule("5").weight, kernel, rtol=1e-3)
