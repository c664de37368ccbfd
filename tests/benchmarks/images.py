"""Images of class folders or IDX files, the accuracy on them, and fine-tuning with their labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from job.data.idx import read_idx

Data = tuple[torch.Tensor, torch.Tensor]  # images (N, 3, H, W) uint8, labels (N,)
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNIT = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Split:
    """Images that are decoded when they are asked for: ``read`` takes their numbers (n,)."""

    labels: torch.Tensor
    read: Callable[[torch.Tensor], torch.Tensor]

    def take(self, numbers: torch.Tensor) -> Data:
        return self.read(numbers), self.labels[numbers]

    def sample(self, count: int | None, seed: int, skip: int = 0) -> Data:
        """Return ``count`` images of the order that ``seed`` draws, or all, after ``skip``."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        return self.take(order[skip:][:count])


def read_folder(folder: Path, size: int) -> dict[str, Split]:
    """Return ``train`` and ``test``: of class folders, or of 28 x 28 IDX files padded to 32."""
    if (folder / "train").is_dir():
        return {split: _class_folders(folder / split, size) for split in ("train", "test")}
    return {"train": _idx(folder, "train"), "test": _idx(folder, "t10k")}


def _class_folders(folder: Path, size: int) -> Split:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted(name.iterdir())
        if path.suffix.lower() in SUFFIXES
    ]

    def read(numbers: torch.Tensor) -> torch.Tensor:
        pixels = np.empty((len(numbers), size, size, 3), np.uint8)
        for place, number in enumerate(numbers.tolist()):
            pixels[place] = _decode(files[number][0], size)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    return Split(torch.tensor([label for _, label in files]), read)


def _decode(path: Path, size: int) -> np.ndarray:
    """The pixels (size, size, 3); of another size, 7/8 of the shorter side are kept."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    if image.size != (size, size):
        scale = size * 8 / 7 / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


def _idx(folder: Path, split: str) -> Split:
    images = read_idx(next(folder.glob(f"{split}-images*")))
    labels = read_idx(next(folder.glob(f"{split}-labels*"))).astype(np.int64)
    pixels = torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2))))[:, None]
    return Split(torch.from_numpy(labels), lambda numbers: pixels[numbers].expand(-1, 3, -1, -1))


@dataclass(frozen=True)
class Normalisation:
    """What a network takes: (pixels / 255 - mean) / std."""

    mean: tuple[float, ...] = UNIT[0]
    std: tuple[float, ...] = UNIT[1]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


@torch.inference_mode()
def accuracy(network: nn.Module, data: Data, normalise: Normalisation) -> float:
    """Return the percentage of images that are classified correctly."""
    network.eval()
    batches = zip(data[0].split(250), data[1].split(250), strict=True)
    right = sum(int((network(normalise(x)).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / len(data[1])


def fine_tune(
    network: nn.Module, data: Data, epochs: int, normalise: Normalisation, bfloat16: bool = False
) -> nn.Module:
    """Train in place with the labels; every method is tuned by this recipe.

    SGD with momentum 0.9 from 0.01 down a cosine, weight decay 5e-4, batches of 128, random crops
    after padding by an eighth of the size, and flips; with ``bfloat16`` under autocast, the
    parameters in float32.
    """
    images, labels = data
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(
        network.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    size = min(128, len(images))
    steps = epochs * (len(images) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train().requires_grad_(True)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(size):
            if len(chosen) == size:
                batch = normalise(_augment(images[chosen], generator))
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    outputs = network(batch)
                F.cross_entropy(outputs.float(), labels[chosen]).backward()
                optimizer.step()
                schedule.step()
    return network.eval()


def _augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Crop at one random place for the batch, and flip half of the images."""
    size = images.shape[-1]
    margin = size // 8
    top, left = torch.randint(0, 2 * margin + 1, (2,), generator=generator).tolist()
    padded = F.pad(images, (margin,) * 4)[:, :, top : top + size, left : left + size]
    flipped = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flipped.view(-1, 1, 1, 1), padded.flip(3), padded)
