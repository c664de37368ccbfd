"""Tasks on generated shapes, as a user writes them for ``--task``, and networks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

IGNORED = -1  # in place of the class of a pixel
CLASSES = ("background", "disc", "square")


def draw(number: int, side: int = 32) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """An image (side, side) float32 of a disc and a square, and the class of each pixel."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[:side, :side]
    image, mask = random.normal(0, 0.1, (side, side)), np.zeros((side, side), np.int64)
    for label in random.permutation((1, 2)):
        (top, left), radius = random.uniform(6, side - 6, 2), random.uniform(3, 7)
        down, right = abs(y - top), abs(x - left)
        away = np.hypot(down, right) if label == 1 else np.maximum(down, right)
        image = np.where(away <= radius, (0.5, 1.0)[label - 1], image)
        mask[away <= radius] = label
    mask[: random.integers(8)] = IGNORED  # rows that nobody has labelled
    return image.astype(np.float32), mask


class Shapes(torch.utils.data.Dataset[Any]):
    """Images (1, 32, 32) with masks; training images are flipped at random."""

    def __init__(self, first: int, count: int, flip: bool) -> None:
        self.pairs, self.flip = [draw(first + number) for number in range(count)], flip

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = (torch.from_numpy(array) for array in self.pairs[index])
        if self.flip and torch.rand(()) < 0.5:
            image, mask = image.flip(1), mask.flip(1)
        return image[None], mask


class Segmentation:
    """Classes of pixels: cross entropy over labelled pixels, and the mean IoU of the classes."""

    class_names = CLASSES

    def __init__(self) -> None:
        self.training, self.validation = Shapes(0, 65, True), Shapes(10_000, 23, False)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
        loss = F.cross_entropy(outputs, targets, ignore_index=IGNORED, reduction="sum")
        return loss, (targets != IGNORED).sum()

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
        labelled = targets != IGNORED
        classes, true = outputs.argmax(1)[labelled], targets[labelled]
        predicted, expected = (F.one_hot(c, len(CLASSES)).bool() for c in (classes, true))
        iou = (predicted & expected).sum(0), (predicted | expected).sum(0)
        return {"miou": iou, "pixel_acc": ((classes == true).sum(), len(true))}


def block(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """A U-Net of two levels: encoder, transposed convolutions, skips by concatenation."""

    def __init__(self, num_classes: int = 3, width: int = 8, channels: int = 1) -> None:
        super().__init__()
        self.one, self.two = block(channels, width), block(width, 2 * width)
        self.three = block(2 * width, 4 * width)
        self.up_two = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.back_two = block(4 * width, 2 * width)
        self.up_one = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.back_one, self.head = block(2 * width, width), nn.Conv2d(width, num_classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        one = self.one(images)
        two = self.two(F.max_pool2d(one, 2))
        three = self.three(F.max_pool2d(two, 2))
        two = self.back_two(torch.cat([self.up_two(three), two], 1))
        one = self.back_one(torch.cat([self.up_one(two), one], 1))
        logits: torch.Tensor = self.head(one)
        return logits


def rgb_unet(num_classes: int) -> nn.Module:
    return UNet(num_classes, channels=3)


def write_masks(
    folder: Path, counts: dict[str, int], *, by_split: bool = True, side: int = 32
) -> Path:
    """Grey images of a disc and a square as PNG, and masks of 0, 1, 2 and 255."""
    number = 0
    for split, count in counts.items():
        parts = (split, "{}") if by_split else ("{}", split)
        images, masks = (
            folder / "/".join(part for part in parts if part).format(kind)
            for kind in ("images", "masks")
        )
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for _ in range(count):
            image, mask = draw(number, side)
            pixels = (image * 120 + 60).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(images / f"{number}.png")
            labels = np.where(mask == IGNORED, 255, mask).astype(np.uint8)
            Image.fromarray(labels).save(masks / f"{number}.png")
            number += 1
    return folder
