"""Networks that the benchmarks measure on, by name."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from job.models.student import StudentNet


class Residual(nn.Module):
    """relu(BN(conv(relu(BN(conv(x))))) + shortcut), He et al. 2016.

    By default the shortcut of a block that halves the size is a convolution and a BatchNorm.
    """

    def __init__(
        self, read: int, written: int, stride: int, shortcut: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(read, written, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(written)
        self.conv2 = nn.Conv2d(written, written, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(written)
        self.shortcut = shortcut or nn.Sequential()
        if stride > 1 and shortcut is None:
            conv = nn.Conv2d(read, written, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(written))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet8() -> nn.Module:
    """The CIFAR ResNet of 8 layers, after a strided stem: a quarter of its multiply-adds."""
    stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    blocks = Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class PaddedShortcut(nn.Module):
    """A shortcut without parameters that halves the size (option A of He et al. 2016).

    It takes every second row and column, and zeros pad its channels on both sides.
    """

    def __init__(self, read: int, written: int) -> None:
        super().__init__()
        self.padding = (written - read) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class CifarResNet(nn.Module):
    """The ResNet of ``depth`` = 6 n + 2 layers for images of 32 pixels, He et al. 2016."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        read = 16
        for stage, written in enumerate((16, 32, 64), 1):
            blocks = []
            for number in range((depth - 2) // 6):
                stride = 2 if stage > 1 and number == 0 else 1
                shortcut = PaddedShortcut(read, written) if stride > 1 else None
                blocks.append(Residual(read, written, stride, shortcut))
                read = written
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


TRAINED_HERE = {"student": lambda: StudentNet(num_classes=10), "resnet": resnet8}
CIFAR_DEPTHS = (20, 32, 44, 56, 110)


def build(name: str, num_classes: int) -> nn.Module:
    """Return an untrained network: of CIFAR, of ``TRAINED_HERE``, ``module:factory``, torchvision.

    ``resnet20``, ``resnet32``, ``resnet44``, ``resnet56`` and ``resnet110`` are those for CIFAR.
    """
    if name in TRAINED_HERE:
        return TRAINED_HERE[name]()
    if name in {f"resnet{depth}" for depth in CIFAR_DEPTHS}:
        return CifarResNet(int(name.removeprefix("resnet")), num_classes)
    if ":" in name:
        module, factory = name.split(":")
        return getattr(importlib.import_module(module), factory)()
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes)


def load_weights(network: nn.Module, path: Path) -> nn.Module:
    """Load a state dict, and return the network in eval mode."""
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()
