"""The values that W&B gets."""

from __future__ import annotations

import torch
from torch import nn

from job.tracking.wandb_events import HISTOGRAM_BINS, gamma_histograms


def test_histograms_of_nearly_equal_gammas() -> None:
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight[0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    counts, edges = gamma_histograms(nn.Sequential(norm))["0"]
    assert sum(counts) == 4
    assert len(counts) == HISTOGRAM_BINS == len(edges) - 1
