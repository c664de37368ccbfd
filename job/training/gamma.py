"""γ, the scales of BatchNorm layers, and statistics of γ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SMALL = 1e-2  # a γ below this fraction of the largest counts as small
BINS = 20


@dataclass(frozen=True)
class GammaHistogram:
    """A histogram of |γ|: ``count`` values, of which ``zeros`` are exactly 0.

    ``bins`` are the counts of equal bins from 0 to ``max``; the largest value is in the last one.
    """

    count: int
    zeros: int
    max: float
    bins: tuple[int, ...]


class GammaStatistics(TypedDict, total=False):
    """Statistics of |γ|: its mean, and the share of small ones; empty for a network without γ."""

    gamma_mean: float
    gamma_small: float


def gamma_layers(network: nn.Module) -> list[str]:
    """Return the names of the layers of ``network`` that have a γ: every affine BatchNorm."""
    return [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine
    ]


def gamma_parameters(network: nn.Module, layers: Iterable[str]) -> list[torch.Tensor]:
    """Return γ (C,) of each of ``layers``: the parameters themselves."""
    return [network.get_submodule(name).get_parameter("weight") for name in layers]


def gamma_statistics(gammas: Sequence[torch.Tensor]) -> GammaStatistics:
    """Return ``gamma_mean``, the mean of |γ|, and ``gamma_small``, the share of small ones.

    Empty for a network without γ.
    """
    if not gammas:
        return {}
    size = torch.cat([g.detach().double().abs() for g in gammas])
    mean, small = torch.stack([size.mean(), (size < SMALL * size.max()).double().mean()]).tolist()
    return {"gamma_mean": mean, "gamma_small": small}


def gamma_histogram(gammas: Sequence[torch.Tensor]) -> GammaHistogram:
    """Return the histogram of |γ|; it is empty for a network without γ."""
    size = torch.cat([g.detach().double().abs().cpu() for g in gammas] or [torch.zeros(0).double()])
    top = float(size.max()) if len(size) else 0.0
    bin_numbers = (size / (top or 1.0) * BINS).long().clamp_(0, BINS - 1)
    counts = torch.bincount(bin_numbers, minlength=BINS).tolist()
    return GammaHistogram(len(size), int((size == 0).sum()), top, tuple(counts))
