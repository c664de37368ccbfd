"""Products with matrices that are parameters, cut like linear layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from job import UsageError
from job.artifacts.export_onnx import onnx_bytes
from job.artifacts.model_card import read_card
from job.slimming.planning.cost import network_cost
from support.cuts import randomise
from support.masked import halve, masked_network, with_kept_norms
from support.networks import Net, block
from support.transformer import zeroed_outputs

if TYPE_CHECKING:
    from pathlib import Path

IMAGE = torch.rand(1, 3, 20, 28)


def matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) / columns**0.5)


class Headless(Net):
    """Features (B, 12), and what ``classify`` makes of them."""

    shape = (12, 5)

    def build(self) -> None:
        del self.head
        self.matrix = matrix(*self.shape)

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classify(F.adaptive_avg_pool2d(self.stem(images), 1).flatten(1))


class Transposed(Headless):
    shape = (5, 12)

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, self.matrix.T) + 1


class Addmm(Headless):
    def build(self) -> None:
        super().build()
        self.bias = nn.Parameter(torch.randn(5))

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.matrix)


class Equation(Headless):
    shape = (5, 12)

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bc,kc->bk", x, self.matrix)


class Cosines(Headless):
    shape = (5, 12)

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x) @ F.normalize(self.matrix).t()


class Distances(Headless):
    shape = (5, 12)

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(x, self.matrix)


class OfLayer(Headless):
    """The weight of a linear layer, transposed."""

    def build(self) -> None:
        del self.head
        self.layer = nn.Linear(12, 5)

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        return x.mm(self.layer.weight.t()) + self.layer.bias


class Hidden(Net):
    """Matrices on both sides of maps (B, C, N), whose outputs are cut too."""

    def build(self) -> None:
        self.first, self.second, self.third = matrix(8, 12), matrix(8, 10), matrix(12, 10)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        maps = (self.first @ x.flatten(2)).relu()
        maps = (self.second.mT @ maps).relu()
        maps = torch.einsum("ck,b...c->b...k", self.third.T, maps.transpose(1, 2)).mT
        return maps.relu().unflatten(2, x.shape[2:])


class Positions(Net):
    """A matrix that mixes the positions of each channel."""

    def build(self) -> None:
        self.mix, self.after = matrix(28, 9), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(x @ self.mix)


class Attention(nn.Module):
    """Attention whose projections are matrices, with a scale computed from their width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (matrix(width, width) for _ in range(4))
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, _ = x.shape
        query, key, value = (
            (x @ weight).view(batch, count, 3, -1).transpose(1, 2)
            for weight in (self.query, self.key, self.value)
        )
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        return (weights @ value).transpose(1, 2).reshape(batch, count, -1) @ self.out + self.bias


class Transformer(Net):
    def build(self) -> None:
        self.norm, self.attention = nn.LayerNorm(12), Attention(12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).mT
        return (tokens + self.attention(self.norm(tokens))).mT.unflatten(2, x.shape[2:])


LINEAR = [Headless, Transposed, Addmm, Equation]


def made(kind: type[Net]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(kind())


@pytest.mark.parametrize("kind", [*LINEAR, Hidden, Positions])
def test_matrices_are_cut_twice(kind: type[Net]) -> None:
    network = made(kind)
    narrow, plan = halve(network, IMAGE)
    reasons = {blocked.reason for blocked in plan.blocked}
    assert reasons == {"the network's output"}
    assert narrow.stem[0].out_channels == 6
    assert network_cost(narrow, (3, 20, 28)) == plan.after
    narrower, then = halve(narrow, IMAGE)
    assert narrower.stem[0].out_channels == 3
    assert network_cost(narrower, (3, 20, 28)) == then.after


def test_their_outputs_are_cut_along_their_axis() -> None:
    network = made(Hidden)
    narrow, plan = halve(network, IMAGE)
    shapes = [tuple(m.shape) for m in (narrow.first, narrow.second, narrow.third)]
    assert shapes == [(4, 6), (4, 5), (6, 5)]
    channels = plan.layers["second"]
    assert channels.axis == 1
    kept = network.second[list(channels.in_)][:, list(channels.out)]
    assert torch.equal(narrow.second, kept)


@pytest.mark.parametrize("kind", [*LINEAR, Cosines, Distances, OfLayer])
def test_heads_use_the_kept_features_alone(kind: type[Headless]) -> None:
    network = made(kind)
    narrow, plan = job.slim(network, IMAGE, target="channels=0.5", importance="l2")
    assert plan.proof is not None
    assert plan.proof.error <= 1e-9
    kept = list(plan.layers["stem.0"].out or ())
    features = F.adaptive_avg_pool2d(network.stem(IMAGE), 1).flatten(1)[:, kept]
    torch.testing.assert_close(narrow(IMAGE), narrow.classify(features))
    wide, cut = (n.layer.weight if kind is OfLayer else n.matrix for n in (network, narrow))
    assert torch.equal(cut, wide[kept] if len(wide) == 12 else wide[:, kept])


def test_the_scale_of_attention_by_matrices_is_kept() -> None:
    network = made(Transformer)
    narrow, plan = job.slim(network, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    assert {blocked.reason for blocked in plan.blocked} == {"the network's output"}
    channels = plan.layers["attention.query"]
    (rows, over, under), *_ = channels.scaled
    assert (len(rows), over / under) == (6, 0.5)
    kept = network.attention.query[list(channels.in_)][:, list(channels.out)]
    torch.testing.assert_close(narrow.attention.query, kept * 0.5**0.5)
    masked = with_kept_norms(masked_network(network, plan.layers), plan.layers)
    gone = [column for column in range(12) if column not in channels.out]
    masked.attention.query.data[:, gone] = 0
    torch.testing.assert_close(narrow.eval()(IMAGE), masked.eval()(IMAGE))


@pytest.mark.parametrize("kind", [Headless, Hidden, Transformer])
def test_they_are_saved_loaded_and_exported(kind: type[Net], tmp_path: Path) -> None:
    network = made(kind)
    narrow, plan = job.slim(network, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    job.save(narrow, tmp_path / "slim", plan=plan, class_names=list("abcde"), image_size=20)
    loaded = job.load(tmp_path / "slim", network=made(kind))
    torch.testing.assert_close(loaded(IMAGE), narrow(IMAGE), rtol=0, atol=0)
    assert onnx_bytes(loaded, read_card(tmp_path / "slim"))[0]


@pytest.mark.parametrize("kind", [Headless, Cosines, Hidden])
@pytest.mark.parametrize("importance", ["refit", "gamma"])
def test_every_importance_ranks_channels_that_only_matrices_read(
    kind: type[Net], importance: str
) -> None:
    """By the BatchNorm that they pass, else by the weights that produce them."""
    network, images = made(kind), torch.rand(32, 3, 20, 28)
    narrow, plan = job.slim(
        network, IMAGE, target="channels=0.5", importance=importance, calibration=[images],
        compensate="regress",
    )  # fmt: skip
    assert {blocked.reason for blocked in plan.blocked} == {"the network's output"}
    assert narrow.stem[0].out_channels == 6


def test_a_matrix_with_two_roles_is_left_alone() -> None:
    class Tied(Net):
        def build(self) -> None:
            self.matrix = matrix(12, 12)

        def body(self, x: torch.Tensor) -> torch.Tensor:
            x = x.movedim(1, -1) @ self.matrix
            return (x.relu() @ self.matrix.T).movedim(-1, 1)

    with pytest.raises(UsageError, match=r"use matrix on the same channels at each of its uses$"):
        halve(made(Tied), IMAGE)


def test_a_buffer_is_cut_like_a_parameter() -> None:
    class Fixed(Net):
        def build(self) -> None:
            self.matrix, self.mix = nn.Buffer(torch.randn(12, 12)), block(12, 12)

        def body(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix((x.movedim(1, -1) @ self.matrix).movedim(-1, 1))

    network = made(Fixed)
    narrow, plan = job.slim(network, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    channels = plan.layers["matrix"]
    kept = network.matrix[list(channels.in_)][:, list(channels.out)]
    assert torch.equal(narrow.matrix, kept)
    assert tuple(kept.shape) == (6, 6)


class SequencePool(nn.Module):
    """A mean of tokens, weighted by a layer of one output (CCT, Hassani et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pool, self.last = (
            nn.Conv2d(3, 16, 4, 4),
            nn.Linear(16, 1),
            nn.Linear(16, 5),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).mT.relu()
        weights = self.pool(x).reshape(len(x), -1).softmax(1)
        return self.last(torch.einsum("bn,bnd->bd", weights, x))


def test_tokens_are_pooled_by_weights() -> None:
    torch.manual_seed(0)
    wide = SequencePool().double().eval()
    narrow, plan = job.slim(
        wide, torch.rand(1, 3, 16, 16), policy="uniform", target="width=0.5", importance="l2"
    )
    assert {b.layer for b in plan.blocked} == {"pool", "last"}
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(narrow(images), masked_network(wide, plan.layers)(images))


class Layers(nn.Module):
    """Attention of layers to one another, at all places of their maps (Niu et al. 2020, HAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(24, 4, 1)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = [self.first(x)]
        for layer in self.layers:
            found.append(found[-1] + layer(found[-1].relu()))
        maps = torch.stack(found, 1)
        count, number, channels, height, width = maps.shape
        rows = maps.view(count, number, -1)
        weights = torch.bmm(rows, rows.transpose(1, 2)).softmax(-1)
        mixed = torch.bmm(weights, rows).view(count, number, channels, height, width)
        return self.last((mixed + maps).view(count, -1, height, width))


def test_channels_at_all_places_are_proven_at_the_size_of_the_image() -> None:
    torch.manual_seed(0)
    wide, image = Layers().double().eval(), torch.rand(1, 3, 32, 32)
    narrow, plan = job.slim(wide, image, policy="uniform", target="width=0.5", importance="l2")
    assert (narrow.first.out_channels, narrow.last.in_channels) == (4, 12)
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(
        narrow(images), masked_network(zeroed_outputs(wide, plan), plan.layers)(images)
    )
