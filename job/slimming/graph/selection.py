"""Channels that a BatchNorm selects from a stream which others read too (Liu et al. 2017, 4.2)."""

from __future__ import annotations

import torch
from torch import nn

from job.slimming.graph.layers import BATCHNORM, modules_of


class SelectedChannels(nn.Module):
    """``norm`` over the channels ``indices`` (C,) int64 of its input (B, N, …)."""

    indices: torch.Tensor

    def __init__(self, norm: nn.Module, indices: torch.Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("indices", indices)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """stream (B, N, …) -> (B, C, …), normalised."""
        output: torch.Tensor = self.norm(stream.index_select(1, self.indices))
        return output


def unwrap_selection(module: nn.Module) -> nn.Module:
    """What selects its channels from a stream is the BatchNorm in it; else the module itself."""
    return module.norm if isinstance(module, SelectedChannels) else module


def batchnorms(network: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """BatchNorms by name, also by that of what selects their channels from a stream."""
    found = ((name, unwrap_selection(module)) for name, module in modules_of(network).items())
    return {name: norm for name, norm in found if isinstance(norm, BATCHNORM)}
