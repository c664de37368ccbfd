"""StudentNet: the network of homework 7 of Hung-yi Lee's ML2020, designed by Arvin Liu."""

from __future__ import annotations

import torch
from torch import nn

MULTIPLIERS = (1, 2, 4, 8, 16, 16, 16, 16)
SCALED = range(3, 7)  # blocks whose output width follows width_mult
POOLED = range(4)  # blocks that halve the resolution
MAX_PARAMS = 2**26  # 67 million, 260 times the homework's: more must be a typing error


class StudentNet(nn.Module):
    """StudentNet: eight depthwise-separable blocks, global average pooling, one linear layer.

    Block i has ``base * MULTIPLIERS[i]`` output channels, which blocks 3 to 6 multiply by
    ``width_mult`` and round down. With base 16, width 1 and 11 classes the network has 256,779
    parameters. State-dict keys are the homework's: ``cnn.{block}.{layer}.*`` and ``fc.0.*``. Raises
    ValueError if a block would have no channels, or the network more than 67 million parameters.
    """

    def __init__(self, base: int = 16, width_mult: float = 1, num_classes: int = 11) -> None:
        super().__init__()
        widths = [base * multiplier for multiplier in MULTIPLIERS]
        for block in SCALED:
            widths[block] = int(widths[block] * width_mult)
        if min(widths) < 1:
            raise ValueError(f"width_mult {width_mult} leaves a block without channels")
        pairs = zip(widths, [*widths[1:], num_classes], strict=True)
        if sum(inputs * outputs for inputs, outputs in pairs) > MAX_PARAMS:
            raise ValueError(f"it would have more than {MAX_PARAMS:,} parameters")
        self.base, self.width_mult = base, width_mult
        blocks: list[nn.Module] = [_stem(widths[0])]
        blocks += [
            _separable(widths[i - 1], widths[i], pool=i in POOLED) for i in range(1, len(widths))
        ]
        self.cnn = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d((1, 1)))
        self.fc = nn.Sequential(nn.Linear(widths[-1], num_classes))

    @property
    def uniform_widths(self) -> dict[str, int]:
        """Layers whose outputs the homework scales by the width, and their full widths."""
        return {f"cnn.{block}.3": self.base * MULTIPLIERS[block] for block in SCALED}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, H, W) in [0, 1] to logits (B, num_classes)."""
        logits: torch.Tensor = self.fc(self.cnn(images).flatten(1))
        return logits


def _stem(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU6(), nn.MaxPool2d(2, 2, 0)
    )


def _separable(width: int, outputs: int, *, pool: bool) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(width, width, 3, 1, 1, groups=width),
        nn.BatchNorm2d(width),
        nn.ReLU6(),
        nn.Conv2d(width, outputs, 1),
    ]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2, 2, 0)] if pool else []))
