"""Memory of paired passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import job
from job.slimming.compensation import paired_passes

GIB = 2**30


@pytest.mark.parametrize(("growth", "trims"), [(0, 1), (GIB, 8)])
def test_freed_memory_is_returned_when_the_process_has_grown(
    monkeypatch: pytest.MonkeyPatch, growth: int, trims: int
) -> None:
    """Each pass frees into the heap of its own thread, where no other pass finds it."""
    resident, calls = [10 * GIB], []

    def memory() -> int:
        resident[0] += growth  # of each pass
        return resident[0]

    monkeypatch.setattr(paired_passes, "resident_memory", memory)
    monkeypatch.setattr(paired_passes, "trim_heap", lambda: calls.append(None))
    monkeypatch.setattr(paired_passes, "MAX_PAUSED_BYTES", 2**16)  # several passes
    layers: list[nn.Module] = []
    for before, after in ((3, 8), (8, 8)):
        layers += [nn.Conv2d(before, after, 3), nn.BatchNorm2d(after), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    job.slim(network, images[:1], calibration=images.split(4), compensate="regress")
    assert len(calls) >= trims if growth else len(calls) == trims
