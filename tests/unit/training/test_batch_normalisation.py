"""BatchNorm with channels last on a CPU is as accurate as torch's with channels first."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from job.models.student import StudentNet
from job.training import batch_normalisation, sync_batchnorm
from job.training.sync_batchnorm import accurate_with_channels_last, prepare_batch_norms
from support.datasets import draw_image
from support.networks import Norms


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel adds up 16 rows, and any batch of more is ours."""
    monkeypatch.setattr(batch_normalisation, "ROWS", 16)
    monkeypatch.setattr(sync_batchnorm, "ROWS", 1)
    batch_normalisation._row_count.cache_clear()


def gradients(network: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    network.zero_grad()
    F.cross_entropy(network(images), torch.arange(len(images)) % 3).backward()
    return {name: p.grad.double() for name, p in network.named_parameters() if p.grad is not None}


def last(images: torch.Tensor) -> torch.Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def compare_a_step(ours: nn.Module, exact: nn.Module, images: torch.Tensor) -> None:
    """Compare the gradients and the buffers with those of ``exact``, in float64."""
    expected = gradients(exact, images.double())
    for name, found in gradients(ours, last(images)).items():
        torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=1e-3, msg=name)
    for (name, mine), theirs in zip(ours.named_buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("size", [9, 14, 25])
def test_every_kind_trains_as_in_float64(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of 5 and 3 images, with in-place operations behind each BatchNorm."""
    torch.manual_seed(0)
    exact = Norms().double().train()
    ours = copy.deepcopy(exact).float().to(memory_format=torch.channels_last)
    accurate_with_channels_last(ours)
    assert ours.norms[0].forward.__func__ is not nn.BatchNorm2d.forward
    calls = []
    real = sync_batchnorm.normalise_batch
    monkeypatch.setattr(
        sync_batchnorm, "normalise_batch", lambda *given: calls.append(given) or real(*given)
    )
    for count in (5, 3):
        images = torch.rand(count, 3, size, size)
        compare_a_step(ours, exact, images)
    assert len(calls) == 2 * 6  # BatchNorm1d and 3d are torch's own
    frozen = ours.eval()(last(images))
    torch.testing.assert_close(frozen.double(), exact.eval()(images.double()), atol=1e-4, rtol=1e-4)
    assert len(calls) == 2 * 6


class Concatenated(nn.Module):
    """A BatchNorm whose gradient is a slice of channels, and one whose gradient is expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3)
        self.first, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(16)
        self.last = nn.Linear(16, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.first(self.a(images))
        return self.last(self.second(torch.cat([x[..., 1:-1, 1:-1], self.b(x)], 1)).mean((2, 3)))


@pytest.mark.usefixtures("few_rows")
def test_gradients_of_any_layout() -> None:
    torch.manual_seed(0)
    exact = Concatenated().double().train()
    ours = copy.deepcopy(exact).float().to(memory_format=torch.channels_last)
    accurate_with_channels_last(ours)
    images = torch.rand(6, 3, 12, 12)
    expected = gradients(exact, images.double())
    for name, found in gradients(ours, last(images)).items():
        torch.testing.assert_close(found, expected[name], atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.usefixtures("few_rows")
def test_bfloat16_is_summed_in_float32() -> None:
    norm = nn.BatchNorm2d(4).train()
    accurate_with_channels_last(norm)
    images = last(torch.rand(8, 4, 40, 40).add_(3)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = norm(images)
    assert output.dtype == torch.bfloat16
    mean = images.double().mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean.double(), mean * 0.1, atol=1e-6, rtol=1e-6)


def test_flat_backgrounds_leave_exact_gradients() -> None:
    """Sums that nearly cancel: with torch's kernel for channels last they are 5 % off."""
    rng = np.random.default_rng(0)
    images = np.stack([np.array(draw_image(rng, i % 3, 128, 128)) for i in range(16)])
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    torch.manual_seed(0)
    network = StudentNet(num_classes=3).train()
    expected = gradients(copy.deepcopy(network).double(), inputs.double())
    network.to(memory_format=torch.channels_last)
    accurate_with_channels_last(network)
    for name, found in gradients(network, last(inputs)).items():
        if expected[name].dim() > 1:
            error = (found - expected[name]).norm() / expected[name].norm()
            assert error < 0.01, (name, float(error))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_shared_norm_keeps_the_memory_format(layout: torch.memory_format) -> None:
    """As torch's does: a network may view its output as another shape."""
    images = torch.rand(4, 3, 6, 6).contiguous(memory_format=layout)
    norm = nn.BatchNorm2d(3)
    expected = copy.deepcopy(norm)(images)
    norm.__class__ = sync_batchnorm._intercepted(nn.BatchNorm2d, shared=True)
    output = norm(images)
    torch.testing.assert_close(output, expected)
    assert output.stride() == expected.stride()


POOLS = {
    "halves": nn.MaxPool2d(2),
    "overlapping": nn.MaxPool2d(3, 2, 1),
    "odd": nn.MaxPool2d((3, 2), (2, 1), ceil_mode=True),
    "dilated": nn.MaxPool2d(2, 1, dilation=2),
}


def pooled_network(pool: nn.MaxPool2d, activation: nn.Module) -> nn.Sequential:
    """A network whose BatchNorm has slopes of both signs, and one of 0."""
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), activation, pool),
        nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5, affine=False), nn.ReLU(), pool),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )
    nn.init.uniform_(network[0][1].weight, -1, 1)
    nn.init.constant_(network[0][1].weight[0:1], 0)
    nn.init.uniform_(network[0][1].bias, -1, 3)
    return network


@pytest.fixture
def pooled_by(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The pooling layers, or None, of the calls of ``normalise_batch``."""
    pools: list[object] = []
    real = sync_batchnorm.normalise_batch

    def recorded(*given: object) -> object:
        pools.append(given[-1])
        return real(*given)

    monkeypatch.setattr(sync_batchnorm, "normalise_batch", recorded)
    return pools


def prepare(network: nn.Module, *, shared: bool = False) -> nn.Module:
    prepare_batch_norms(network, torch.device("cpu"), shared=shared, compiled=False)
    return network.to(memory_format=torch.channels_last)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6()], ids=str)
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("shared", [False, True])
def test_pooled_values_alone_are_normalised(
    pool: nn.MaxPool2d,
    activation: nn.Module,
    shared: bool,
    pooled_by: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    exact = pooled_network(pool, activation).double().train()
    monkeypatch.setattr(sync_batchnorm, "world_size", lambda: 2)  # of which one is here
    monkeypatch.setattr(batch_normalisation, "total", lambda values: values)
    ours = prepare(copy.deepcopy(exact).float(), shared=shared)
    for count in (5, 3):
        images = torch.rand(count, 3, 25, 25)
        compare_a_step(ours, exact, images)
    assert len(pooled_by) == 4
    assert None not in pooled_by
    output = ours.eval()(last(images))
    torch.testing.assert_close(output.double(), exact.eval()(images.double()), atol=1e-4, rtol=1e-4)
    assert len(pooled_by) == 4


@pytest.mark.parametrize("least", [0.5, -1])
def test_a_rank_without_images_pools_nothing(least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_normalisation, "total", lambda values: values + 8)  # of other ranks
    images = torch.zeros(0, 4, 8, 6, requires_grad=True)
    slopes = torch.linspace(least, 1, 4, requires_grad=True)
    output, *_ = batch_normalisation.normalise_batch(
        images, slopes, torch.zeros(4), 1e-5, True, nn.MaxPool2d(2)
    )
    assert output.shape == (0, 4, 4, 3)
    output.sum().backward()
    assert images.grad is not None
    assert images.grad.shape == images.shape
    assert slopes.grad is not None
    assert not slopes.grad.any()


@pytest.mark.usefixtures("few_rows")
def test_pooled_bfloat16_is_normalised_in_float32(pooled_by: list[object]) -> None:
    torch.manual_seed(0)
    network = prepare(pooled_network(nn.MaxPool2d(2), nn.ReLU()))
    exact = copy.deepcopy(network).double()[0]
    images = last(torch.rand(4, 3, 20, 20))
    with torch.autocast("cpu", torch.bfloat16):
        output = network[0](images)
    assert output.dtype == torch.bfloat16
    assert pooled_by[0] is network[0][3]
    torch.testing.assert_close(output.double(), exact(last(images.double())), atol=0.1, rtol=0.02)


@pytest.mark.usefixtures("few_rows")
def test_layers_that_are_watched_or_called_one_by_one_are_not_pooled_early(
    pooled_by: list[object],
) -> None:
    torch.manual_seed(0)
    network = prepare(pooled_network(nn.MaxPool2d(2), nn.ReLU()))
    images = last(torch.rand(4, 3, 20, 20))
    shapes: list[torch.Size] = []
    network[0][2].register_forward_hook(lambda *given: shapes.append(given[-1].shape))
    network[1][1].eval()  # frozen
    network(images)
    for layer in network[0]:  # as a U-Net's encoder takes its skip connections
        images = layer(images)
    assert pooled_by == [None, None]
    assert shapes == [(4, 6, 18, 18)] * 2
