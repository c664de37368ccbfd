"""Taylor importance: against finite differences, and without labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from job.errors import UsageError
from job.slimming.analysis import analyse
from job.slimming.calibration.input_statistics import CalibrationData
from job.slimming.importance.criteria import score_channels
from support.cuts import randomise
from support.networks import Streams

IMAGES = torch.rand(32, 3, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def build_streams() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Streams()).double()


def test_taylor_is_how_the_loss_reacts_to_a_gate_on_each_channel() -> None:
    network = build_streams()
    head = nn.Sequential(network, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    graph = analyse(head, IMAGES)
    head.requires_grad_(False)
    labels = torch.arange(32) % 5
    pairs = [(IMAGES[:20], labels[:20]), (IMAGES[20:], labels[20:])]
    scores = score_channels("taylor", head, graph, CalibrationData(lambda: pairs))
    expected, step = np.zeros(8), 1e-5
    norm = network.norm
    for images, own in pairs:
        for channel in range(8):
            losses = []
            for gate in (1 + step, 1 - step):
                before = norm.weight[channel].clone(), norm.bias[channel].clone()
                norm.weight[channel], norm.bias[channel] = before[0] * gate, before[1] * gate
                losses.append(float(F.cross_entropy(head(images), own)))
                norm.weight[channel], norm.bias[channel] = before
            expected[channel] += ((losses[0] - losses[1]) / (2 * step)) ** 2
    (group,) = [group for group in graph.groups if group.size == 8]
    np.testing.assert_allclose(scores[group.channels], expected, rtol=1e-5)
    assert not any(p.requires_grad or p.grad is not None for p in head.parameters())


def test_taylor_without_labels_says_what_it_needs() -> None:
    network = build_streams()
    graph = analyse(network, IMAGES)
    for batches in (None, lambda: [IMAGES], lambda: [(IMAGES, torch.full((32,), -1))]):
        with pytest.raises(UsageError, match=r"calibration images with labels \(B,\)"):
            score_channels("taylor", network, graph, CalibrationData(batches))
