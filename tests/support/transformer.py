"""A small transformer around the attention that a test brings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

DIM = 24


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
