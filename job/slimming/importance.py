"""How much a channel matters: the larger, the later it is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from job.slimming.graph import ChannelGroup


def gamma_importance(network: nn.Module, group: ChannelGroup) -> torch.Tensor:
    """|γ| of the BatchNorms of ``group``, their mean: (C,) float64 on the CPU.

    Liu et al. 2017, section 3; the homework ranks by γ itself, which is the same while γ > 0.
    """
    scales = [network.get_parameter(f"{norm}.weight") for norm in group.norms]
    return torch.stack([scale.detach().double().abs().cpu() for scale in scales]).mean(0)


def strongest(importance: torch.Tensor, count: int) -> tuple[int, ...]:
    """Indices, rising, of the ``count`` largest of ``importance`` (C,); ties by lower index."""
    ranking = torch.argsort(importance, descending=True, stable=True)
    return tuple(sorted(ranking[:count].tolist()))
