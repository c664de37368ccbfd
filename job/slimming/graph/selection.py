"""Selection of channels by a BatchNorm, from a stream that is not cut (Liu et al. 2017, 4.2)."""

from __future__ import annotations

import torch
from torch import nn

from job.slimming.graph.layers import BATCHNORM, modules_of


class SelectedChannels(nn.Module):
    """Apply ``norm`` to the channels ``indices`` (C,) int64 of the input (B, N, …)."""

    indices: torch.Tensor

    def __init__(self, norm: nn.Module, indices: torch.Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("indices", indices)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """Select and normalise channels: map stream (B, N, …) to (B, C, …)."""
        output: torch.Tensor = self.norm(stream.index_select(1, self.indices))
        return output


def unwrap_selection(module: nn.Module) -> nn.Module:
    """Return the BatchNorm within a SelectedChannels, or any other module itself."""
    return module.norm if isinstance(module, SelectedChannels) else module


def batchnorms(network: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Return the BatchNorms by name; one within SelectedChannels also by the name of that."""
    norms = ((name, unwrap_selection(module)) for name, module in modules_of(network).items())
    return {name: norm for name, norm in norms if isinstance(norm, BATCHNORM)}
