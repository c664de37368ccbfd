"""Tables of channels, and convolutions across channels, whose places matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnxruntime
import pytest
import torch
from torch import nn

import job
from job.artifacts.export_onnx import onnx_bytes
from job.artifacts.model_card import read_card
from job.slimming.planning.cost import network_cost
from support.cuts import randomise
from support.masked import assert_compensated, assert_equal_to_masked, halve
from support.networks import Net, block

if TYPE_CHECKING:
    from pathlib import Path

IMAGE = torch.rand(1, 3, 20, 28)
UNIFORM = {"policy": "uniform", "target": "width=0.5", "importance": "l2"}


class Permuted(Net):
    """Channels in another order, which a buffer holds."""

    def build(self) -> None:
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        self.order, self.after = nn.Buffer(order), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(x[:, self.order])


class Picked(Net):
    """Some channels, one of them twice."""

    def build(self) -> None:
        self.chosen = nn.Buffer(torch.tensor([1, 5, 3, 3, 8, 0], dtype=torch.int32))
        self.after = block(6, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(x.index_select(1, self.chosen))


class Shuffled(Net):
    """The same table at two places, and its inverse."""

    def build(self) -> None:
        order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
        self.order, self.back = nn.Buffer(order), nn.Buffer(order.argsort())
        self.after, self.mix = block(12, 12), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mix(x[:, self.order, :, :])
        return self.after(x + torch.index_select(x[..., self.order, :, :], 1, self.back))


class Efficient(Net):
    """Efficient channel attention (Wang et al. 2020)."""

    def build(self) -> None:
        self.across, self.after = nn.Conv1d(1, 1, 5, padding=2), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        gates = self.across(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
        return self.after(x * gates.sigmoid())


class Triplet(Net):
    """Attention over channels and columns of an image (Misra et al. 2021)."""

    def build(self) -> None:
        self.across, self.norm = nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1)
        self.after = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        turned = x.transpose(1, 2)  # (B, H, C, W)
        both = torch.cat((turned.amax(1, keepdim=True), turned.mean(1, keepdim=True)), 1)
        return self.after((turned * self.norm(self.across(both)).sigmoid()).transpose(1, 2))


TABLES, ACROSS = [Permuted, Picked, Shuffled], [Efficient, Triplet]


def made(kind: type[Net]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(kind())


@pytest.mark.parametrize("kind", TABLES + ACROSS)
def test_channels_with_places_are_cut_twice(kind: type[Net]) -> None:
    network = made(kind)
    narrow, plan = halve(network, IMAGE)
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    assert narrow.stem[0].out_channels == narrow.after[0].out_channels == 6
    assert network_cost(narrow, (3, 20, 28)) == plan.after
    assert plan.after.bytes == sum(t.nbytes for t in narrow.state_dict().values())
    narrower, then = halve(narrow, IMAGE)
    assert narrower.stem[0].out_channels == 3
    assert network_cost(narrower, (3, 20, 28)) == then.after


def cut_twice(network: nn.Module) -> tuple[nn.Module, job.Plan]:
    narrow, first = job.slim(network, IMAGE, **UNIFORM)
    narrower, second = job.slim(narrow, IMAGE, **UNIFORM)
    return narrower, first.then(second)


@pytest.mark.parametrize("kind", TABLES + ACROSS)
def test_they_are_saved_loaded_and_exported(kind: type[Net], tmp_path: Path) -> None:
    network = made(kind)
    narrow, plan = cut_twice(network)
    assert_equal_to_masked(network, narrow, plan.layers, IMAGE)
    job.save(narrow, tmp_path / "slim", plan=plan, class_names=list("abcde"), image_size=20)
    loaded = job.load(tmp_path / "slim", network=made(kind))
    torch.testing.assert_close(loaded(IMAGE), narrow(IMAGE), rtol=0, atol=0)
    applied = job.apply(network, plan)
    torch.testing.assert_close(applied(IMAGE), narrow(IMAGE))
    content, _ = onnx_bytes(loaded, read_card(tmp_path / "slim"))
    session = onnxruntime.InferenceSession(content)
    images = torch.rand(2, 3, 20, 20)
    (ours,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(ours), narrow(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Permuted, Picked, Efficient, Triplet])
def test_they_are_measured_and_compensated(kind: type[Net]) -> None:
    network, images = made(kind), torch.rand(48, 3, 20, 28)
    assert_compensated(network, IMAGE, images)


def test_indices_that_are_no_table_are_named_with_the_remedy() -> None:
    class Listed(Net):
        def build(self) -> None:
            self.after = block(12, 12)

        def body(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(x[:, [3, 2, 1, 0, 4, 5, 6, 7, 8, 9, 11, 10]])

    narrow, plan = halve(made(Listed), IMAGE)
    assert narrow.stem[0].out_channels == 12
    stem = next(blocked for blocked in plan.blocked if blocked.layer == "stem.0")
    assert "__getitem__" in stem.reason
    assert "buffer of integers" in stem.remedy


def test_a_convolution_with_a_step_across_channels_is_left_alone() -> None:
    class Strided(Net):
        def build(self) -> None:
            self.across, self.after = nn.Conv1d(1, 1, 3, 2, 1), block(12, 12)

        def body(self, x: torch.Tensor) -> torch.Tensor:
            gates = self.across(x.mean((2, 3)).unsqueeze(1)).mean(2)
            return self.after(x * gates[:, :, None, None].sigmoid())

    narrow, plan = halve(made(Strided), IMAGE)
    assert (narrow.stem[0].out_channels, narrow.after[0].out_channels) == (12, 6)
    assert "stem.0" in {blocked.layer for blocked in plan.blocked}
