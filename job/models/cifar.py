"""The networks of Network Slimming for 32 x 32 images (Liu et al. 2017, section 4.2).

VGG-19 with BatchNorm (Simonyan & Zisserman 2015), the pre-activation ResNet-164 of bottlenecks (He
et al. 2016), and DenseNet-40 with growth rate 12 (Huang et al. 2017). γ starts at 0.5.
Convolutions have no bias and are initialised as in He et al. 2015. State-dict keys are those of the
authors' code, https://github.com/Eric-mingjie/network-slimming, without its selection layers.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

GAMMA = 0.5  # Liu et al. 2017, section 4.3
VGG19 = (64, 64, 0, 128, 128, 0, *4 * (256,), 0, *4 * (512,), 0, *4 * (512,))  # 0: max pooling
STAGES = (16, 32, 64)  # planes of the bottlenecks of each stage of ResNet-164
BLOCKS = 18  # bottlenecks per stage: 3 * 18 * 3 + 2 = 164 layers
EXPANSION = 4
GROWTH = 12
BLOCK_LAYERS = 12  # layers of each of the three blocks of DenseNet-40: 3 * 12 + 4 = 40 layers


class Vgg19Cifar(nn.Module):
    """VGG-19: 16 3x3 convolutions in five stages, global average pooling, one linear layer.

    It has 20.04 million parameters with 10 classes. For images of 32 pixels the pooling is the
    paper's, 2 x 2.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        in_channels = 3
        for width in VGG19:
            if not width:
                layers.append(nn.MaxPool2d(2))
                continue
            convolution = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            in_channels = width
        self.feature = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, num_classes)
        _initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, H, W) to logits (B, num_classes)."""
        logits: torch.Tensor = self.classifier(_global_average_pool(self.feature(images)))
        return logits


class Bottleneck(nn.Module):
    """Pre-activation bottleneck: BatchNorm, ReLU and convolution three times, plus a shortcut.

    The shortcut is the identity, or a 1x1 convolution in the first block of a stage.
    """

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        out_channels = planes * EXPANSION
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        self.downsample = (
            nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            if in_channels != out_channels or stride > 1
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, H, W) to (B, 4 * planes, H / stride, W / stride)."""
        branch = self.conv1(F.relu(self.bn1(x)))
        branch = self.conv2(F.relu(self.bn2(branch)))
        branch = self.conv3(F.relu(self.bn3(branch)))
        shortcut = x if self.downsample is None else self.downsample(x)
        total: torch.Tensor = shortcut + branch
        return total


class ResNet164Cifar(nn.Module):
    """ResNet-164: three stages of 18 bottlenecks; 1.70 million parameters with 10 classes."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        in_channels = STAGES[0]
        self.conv1 = nn.Conv2d(3, in_channels, 3, padding=1, bias=False)
        for number, planes in enumerate(STAGES, 1):
            blocks = []
            for block in range(BLOCKS):
                stride = 2 if block == 0 and number > 1 else 1
                blocks.append(Bottleneck(in_channels, planes, stride))
                in_channels = planes * EXPANSION
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(in_channels)
        self.fc = nn.Linear(in_channels, num_classes)
        _initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, H, W) to logits (B, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        logits: torch.Tensor = self.fc(_global_average_pool(F.relu(self.bn(x))))
        return logits


class DenseLayer(nn.Module):
    """Dense layer: BatchNorm, ReLU and 3x3 convolution, concatenated with the input."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, H, W) to (B, C + 12, H, W)."""
        return torch.cat([x, self.conv1(F.relu(self.bn1(x)))], 1)


class Transition(nn.Module):
    """Transition: BatchNorm, ReLU, 1x1 convolution of the same width, 2x2 average pooling."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, H, W) to (B, C, H / 2, W / 2)."""
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class DenseNet40Cifar(nn.Module):
    """DenseNet-40: three dense blocks of 12 layers; 1.02 million parameters with 10 classes.

    ``first`` is the width of the first convolution. The counts in the paper hold for 16, the width
    in Huang et al. without bottlenecks; the authors' PyTorch code uses 24.
    """

    dense1: nn.Sequential
    dense2: nn.Sequential
    dense3: nn.Sequential
    trans1: Transition
    trans2: Transition

    def __init__(self, num_classes: int = 10, first: int = 16) -> None:
        super().__init__()
        width = first
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        for number in (1, 2, 3):
            block = nn.Sequential(*(DenseLayer(width + GROWTH * i) for i in range(BLOCK_LAYERS)))
            self.add_module(f"dense{number}", block)
            width += GROWTH * BLOCK_LAYERS
            if number < 3:
                self.add_module(f"trans{number}", Transition(width))
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)
        _initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, H, W) to logits (B, num_classes)."""
        x = self.trans1(self.dense1(self.conv1(images)))
        x = self.dense3(self.trans2(self.dense2(x)))
        logits: torch.Tensor = self.fc(_global_average_pool(F.relu(self.bn(x))))
        return logits


def _global_average_pool(x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _initialise(network: nn.Module) -> None:
    """Initialise the weights as the authors' code does.

    Convolutions follow He et al. 2015 with ``fan_out``, γ is 0.5, and the weights of the classifier
    have standard deviation 0.01.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels * math.prod(layer.kernel_size)
            nn.init.normal_(layer.weight, 0, math.sqrt(2 / fan_out))
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.constant_(layer.weight, GAMMA)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.01)
            nn.init.zeros_(layer.bias)
