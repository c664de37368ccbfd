"""The homework's network and surgery, written again from its table: what ours must equal.

Block i has BatchNorm channels and pointwise outputs as the table says; the surgery takes, for each
block, the channels of its own BatchNorm with the largest γ, in falling order, and block 0 is
permuted by the choice of block 1.
"""

from __future__ import annotations

import torch
from torch import nn

FULL = (16, 32, 64, 128, 256, 256, 256, 256)  # outputs of blocks 0 to 7 at width 1


def widths(width: float) -> list[int]:
    return [int(n * width) if 3 <= i <= 6 else n for i, n in enumerate(FULL)]


class PlainStudentNet(nn.Module):
    """StudentNet(width_mult) of the homework, for loading an exported state dict into."""

    def __init__(self, width_mult: float = 1, classes: int = 11) -> None:
        super().__init__()
        outs = widths(width_mult)
        blocks: list[nn.Module] = [
            nn.Sequential(
                nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU6(), nn.MaxPool2d(2)
            )
        ]
        for i in range(1, 8):
            inner, outer = outs[i - 1], outs[i]
            layers: list[nn.Module] = [
                nn.Conv2d(inner, inner, 3, 1, 1, groups=inner),
                nn.BatchNorm2d(inner),
                nn.ReLU6(),
                nn.Conv2d(inner, outer, 1),
            ]
            blocks.append(nn.Sequential(*layers, *([nn.MaxPool2d(2)] if i < 4 else [])))
        self.cnn = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Sequential(nn.Linear(outs[7], classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.cnn(x).flatten(1))


def homework_slimming(state: dict[str, torch.Tensor], width: float) -> dict[str, torch.Tensor]:
    """The state dict of StudentNet(width) cut from a wider one, channels permuted as it did."""
    outs = widths(width)
    ins = [3, *outs[:-1]]
    chosen = [torch.argsort(state[f"cnn.{i}.1.weight"], descending=True) for i in range(8)]
    chosen = [order[: (16 if i == 0 else ins[i])] for i, order in enumerate(chosen)]
    narrow = dict(state)

    def take(key: str, rows: torch.Tensor, dim: int = 0) -> None:
        narrow[key] = narrow[key].index_select(dim, rows)

    for i in range(8):
        inner = chosen[1] if i == 0 else chosen[i]
        for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
            take(f"cnn.{i}.{name}", inner)
        if i:
            take(f"cnn.{i}.3.weight", inner, 1)
        if 0 < i < 7:
            take(f"cnn.{i}.3.weight", chosen[i + 1])
            take(f"cnn.{i}.3.bias", chosen[i + 1])
    return narrow
