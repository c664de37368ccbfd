"""A small transformer around the attention that a test brings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

DIM = 24
MAKERS = nn.Linear | nn.Conv2d | nn.BatchNorm1d


class Transformer(nn.Module):
    """A patch embedding, two residual attentions, and a head."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 4, 4)
        self.blocks = nn.ModuleList(attention() for _ in range(2))
        self.head = nn.Linear(DIM, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        for attention in self.blocks:
            x = x + attention(x)
        return self.head(x.mean(1))


def zeroed_outputs(network: nn.Module, plan: Any) -> nn.Module:
    """The wide network in which layers produce zeros for the removed channels."""
    masked = copy.deepcopy(network)
    modules = dict(masked.named_modules())
    with torch.no_grad():
        for name, channels in plan.layers.items():
            layer = modules.get(name)  # None for a parameter outside of layers
            if channels.out is not None and isinstance(
                layer, nn.Linear | nn.Conv2d | nn.BatchNorm1d
            ):
                removed = sorted(set(range(len(layer.weight))) - set(channels.out))
                layer.weight[removed] = 0
                if layer.bias is not None:
                    layer.bias[removed] = 0
    return masked
