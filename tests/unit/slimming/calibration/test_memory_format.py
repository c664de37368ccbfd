"""Calibration images come in the memory format that is the fastest for the network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import job
from job.slimming.calibration.batch import CalibrationBatch
from job.slimming.calibration.memory_format import in_image_format
from support.cuts import randomise
from support.networks import block

IMAGES = torch.rand(24, 3, 8, 8)


class Net(nn.Module):
    """A classifier of all values of a feature map, which ``flattened`` brings into one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(3, 8), block(8, 12)
        self.last = nn.Linear(12 * 64, 5)

    def flattened(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.flatten(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.flattened(self.second(self.first(images))))


class Viewed(Net):
    def flattened(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.view(maps.size(0), -1)


def made(kind: type[Net]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(kind())


@pytest.mark.parametrize("kind", [Net, Viewed])
def test_images_in_either_format_give_the_same_cut(kind: type[Net]) -> None:
    network, cuts = made(kind), []
    for layout in (torch.contiguous_format, torch.channels_last):
        images = IMAGES.contiguous(memory_format=layout)
        narrow, _ = job.slim(
            network, IMAGES[:1], target="macs=0.5", calibration=[images], recover=1
        )
        cuts.append(narrow.eval()(IMAGES))
    torch.testing.assert_close(*cuts, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Net, Viewed])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_come_with_channels_last_where_the_network_runs(
    kind: type[Net], layout: torch.memory_format
) -> None:
    given: list[CalibrationBatch] = [IMAGES.contiguous(memory_format=layout)]
    given.append((given[0], torch.zeros(24)))
    first, (second, labels) = in_image_format(made(kind), lambda: given)()
    expected = torch.channels_last if kind is Net else torch.contiguous_format
    for images in (first, second):
        assert images.is_contiguous(memory_format=expected)
        assert torch.equal(images, IMAGES)
    assert labels is given[1][1]


def test_other_inputs_stay_as_they_are() -> None:
    others: list[CalibrationBatch] = [torch.rand(2, 3, 8), ({"x": IMAGES}, None), IMAGES[:0]]
    assert list(in_image_format(made(Net), lambda: others)()) == others
