"""The training of homework 7 as it was published: images decoded in RAM, transforms one by one.

No loader processes, channels first, an optimizer that is not fused, and two numbers read back from
the device after each step.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from job.models.student import StudentNet

BATCH = 32


class Photos(Dataset[Any]):
    """Food-11 files, decoded into memory."""

    def __init__(self, folder: Path, size: int, most: int) -> None:
        paths = sorted(folder.iterdir())[:most]
        self.images = [Image.open(path).convert("RGB") for path in paths]
        self.labels = [int(path.name.partition("_")[0]) for path in paths]
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(size, pad_if_needed=True, padding_mode="symmetric"),
                transforms.RandomHorizontalFlip(),
                transforms.RandomRotation(15),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.labels[index]


class Homework:
    """The network, the optimizer and the loader of the homework."""

    def __init__(self, folder: Path, device: str, size: int = 256, most: int = 320) -> None:
        self.device = torch.device(device)
        self.photos = Photos(folder / "training", size, most)
        self.batches = DataLoader(self.photos, batch_size=BATCH, shuffle=True)
        self.network = StudentNet(num_classes=11).to(self.device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3)
        self.criterion = nn.CrossEntropyLoss()

    def train(self, batches: Iterable[Any]) -> int:
        """Train on batches; return the number of images."""
        count = hits = 0
        loss_sum = 0.0
        self.network.train()
        for images, labels in batches:
            self.optimizer.zero_grad()
            images, labels = images.to(self.device), labels.to(self.device)
            logits = self.network(images)
            loss = self.criterion(logits, labels)
            loss.backward()
            self.optimizer.step()
            hits += int((logits.argmax(1) == labels).sum().item())
            loss_sum += loss.item() * len(labels)
            count += len(labels)
        return count
