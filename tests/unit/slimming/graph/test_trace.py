"""What is traced on the meta device against what really happens."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from job import slim
from job.slimming.graph.grouping import channel_graph
from job.slimming.graph.snapshot import Snapshot
from job.slimming.graph.trace import Trace, trace_network, trace_on
from support.masked import masked_network


class Convolutions(nn.Module):
    """Every way to pad, stride, dilate and group, and sums in place and not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(3, 6, **options)
            for options in (
                {"kernel_size": 3},
                {"kernel_size": (1, 5), "stride": (2, 3), "padding": (0, 2)},
                {"kernel_size": 3, "dilation": (2, 1), "groups": 3, "bias": False},
                {"kernel_size": 5, "padding": "same"},
                {"kernel_size": 4, "padding": "valid", "padding_mode": "circular"},
                {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
            )
        )
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for layer in self.layers:
            y = self.norm(layer(x))
            z = y * y.mean((2, 3), keepdim=True)
            z += y
            z.mul_(y.amax((2, 3), keepdim=True))
            found.append(z)
        return found


def shapes(trace: Trace) -> list[tuple[object, ...]]:
    return [
        (op.name, *(trace.name(t) for t in op.inputs), *(r.shape for r in op.results))
        for op in trace.ops
    ]


@pytest.mark.parametrize(
    "make",
    [
        Convolutions,
        torchvision.models.resnet18,
        torchvision.models.mobilenet_v3_small,
        torchvision.models.shufflenet_v2_x0_5,
        torchvision.models.densenet121,
    ],
)
def test_shapes_on_the_meta_device_are_those_of_real_images(make: type[nn.Module]) -> None:
    network = make().eval()
    image = torch.rand(1, 3, 67, 64)
    traced = trace_network(network, image)
    assert traced.inputs[0].is_meta
    really = trace_on(network, image, None, Snapshot(network), training=False)
    assert shapes(traced) == shapes(really)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 2, 3), nn.Conv2d(3, 2, 9), nn.Conv2d(3, 2, 3).double()]
)
def test_what_a_convolution_does_not_take_raises(layer: nn.Module) -> None:
    with pytest.raises(RuntimeError):
        trace_network(layer, torch.rand(1, 3, 8, 8))


class Doubled(torch.autograd.Function):
    """2 x, with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


class WithDoubled(nn.Sequential):
    """Has ``Doubled`` within reach, and calls it in train mode if ``called``."""

    called = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return Doubled.apply(x) if self.called and self.training else x * 2


@pytest.mark.parametrize("called", [True, False])
def test_only_functions_of_autograd_that_are_called_raise_doubts(*, called: bool) -> None:
    apply = torch.autograd.Function.__dict__["apply"]
    network = WithDoubled(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    network.called = called
    graph = channel_graph(network, torch.rand(1, 3, 8, 8))
    assert len(graph.groups) == 1
    assert bool(graph.suspects) == called
    assert torch.autograd.Function.__dict__["apply"] is apply


def gate(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=1)
    return first * torch.sigmoid(second) + y


def centre(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(1, keepdim=True)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, and still used
    scripted_gate, scripted_centre = torch.jit.script(gate), torch.jit.script(centre)
    traced = torch.jit.trace(lambda x: x.relu() * 2, torch.rand(1, 8, 2, 2))


class Scripted(nn.Module):
    """Calls a function of TorchScript, as activations of many networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 1)
        self.last = nn.Conv2d(16, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(scripted_gate(self.gate(x), x))


def test_functions_of_torchscript_are_traced_as_the_python_that_they_are_made_from() -> None:
    call = torch.jit.ScriptFunction.__call__
    torch.manual_seed(0)
    wide = Scripted().double().eval()
    image = torch.rand(1, 3, 8, 8)
    narrow, plan = slim(wide, image, policy="uniform", target="width=0.5", importance="l2")
    assert (narrow.first.out_channels, narrow.gate.out_channels) == (8, 16)
    assert torch.jit.ScriptFunction.__call__ is call
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(narrow(images), masked_network(wide, plan.layers)(images))


class Centred(nn.Module):
    """Means over channels within a function of TorchScript, and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.norm, self.last = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = scripted_centre(self.first(x))
        x = x.mean(1, keepdim=True) + self.second(x)
        return self.last(self.norm(x.mean((2, 3))))


def test_the_proof_knows_what_functions_of_torchscript_read() -> None:
    torch.manual_seed(0)
    wide, image = Centred().eval(), torch.rand(1, 3, 8, 8)
    narrow, plan = slim(wide, image, policy="uniform", target="width=0.5", importance="l2")
    assert narrow.first.out_channels == 8
    assert plan.proof.error <= 1e-12


def test_a_traced_function_runs_as_its_python_too() -> None:
    class Traced(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](traced(self[0](x)))

    graph = channel_graph(Traced(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)), torch.rand(1, 3, 8, 8))
    assert len(graph.groups) == 1


def test_a_wrapped_tensor_is_the_tensor_itself() -> None:
    class Chosen(nn.Module):
        """Chooses channels by a wrapped buffer, as CondenseNet does."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(12, 4, 3)
            self.register_buffer("index", torch.randperm(16)[:12])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            index = torch.autograd.Variable(self.index)
            return self.last(torch.index_select(self.first(x).relu(), 1, index))

    torch.manual_seed(0)
    wide = Chosen().double().eval()
    image = torch.rand(1, 3, 8, 8)
    narrow, plan = slim(wide, image, policy="uniform", target="width=0.5", importance="l2")
    assert narrow.first.out_channels == 8
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(narrow(images), masked_network(wide, plan.layers)(images))


@pytest.mark.parametrize("make", [torch.from_numpy, lambda array: torch.Tensor(array.tolist())])
def test_constants_that_code_makes_of_numbers_block_nothing(make: Any) -> None:
    class Scaled(nn.Module):
        """Draws a factor with NumPy in train mode, as FractalNet chooses its paths."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = make(np.ones(1, np.float32)).to(x)
            return self.last(self.first(x).relu() * scale)

    network, image = Scaled().eval(), torch.rand(1, 3, 8, 8)
    narrow, plan = slim(network, image, policy="uniform", target="width=0.5", importance="l2")
    assert narrow.first.out_channels == 8
    assert [blocked.layer for blocked in plan.blocked] == ["last"]
