"""An anchor-free detector of squares, as a user writes it for ``--task``: FCOS in small.

A cell of 8 pixels at the centre of a square learns the distances to its four sides (Tian et al.
2019). The metric is the average precision at an IoU of 0.5, of histograms of scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import box_iou, nms

SIDE, CELL, BINS = 64, 8, 50


class Squares(torch.utils.data.Dataset[Any]):
    """Noisy images (1, 64, 64) of one to three bright squares, and their boxes (n, 4)."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.first + index)
        image, boxes = 0.2 * torch.randn(1, SIDE, SIDE), []
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            side = int(torch.randint(10, 22, (), generator=generator))
            left, top = torch.randint(SIDE - side, (2,), generator=generator).tolist()
            box = torch.tensor([left, top, left + side, top + side]).float()
            if not boxes or box_iou(box[None], torch.stack(boxes)).max() == 0:
                boxes.append(box)
                image[0, top : top + side, left : left + side] += 1
        return image, torch.stack(boxes)


class Detection:
    """Focal loss of the cells and IoU loss of the boxes, over the number of squares."""

    def __init__(self) -> None:
        self.training, self.validation = Squares(0, 120), Squares(10_000, 30)

    def collate(self, items: list[Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return torch.stack([image for image, _ in items]), [boxes for _, boxes in items]

    def loss(self, outputs: Any, targets: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
        heat, boxes = outputs["heat"][:, 0], decode(outputs["sides"])
        wanted, loss = torch.zeros_like(heat), heat.new_zeros(())
        for number, true in enumerate(targets):
            column, row = ((true[:, :2] + true[:, 2:]) / 2 / CELL).long().unbind(1)
            wanted[number, row, column] = 1
            loss = loss + (1 - box_iou(boxes[number, row, column], true).diagonal()).sum()
        chance = torch.where(wanted > 0, heat.sigmoid(), 1 - heat.sigmoid())
        entropy = F.binary_cross_entropy_with_logits(heat, wanted, reduction="none")
        return loss + ((1 - chance) ** 2 * entropy).sum(), sum(map(len, targets))

    def metrics(self, outputs: Any, targets: list[torch.Tensor]) -> dict[str, Any]:
        """Histograms of the scores of right and wrong boxes, and the number of squares."""
        scores, boxes = outputs["heat"][:, 0].sigmoid().flatten(1), decode(outputs["sides"])
        right, wrong = torch.zeros(2, BINS, device=scores.device)
        for score, box, true in zip(scores, boxes.flatten(1, 2), targets, strict=True):
            chosen = nms(box, score, 0.5)[:20]
            overlap, taken = box_iou(box[chosen], true), set()
            for place, number in enumerate(chosen.tolist()):
                best = int(overlap[place].argmax())
                hit = float(overlap[place, best]) >= 0.5 and best not in taken
                taken |= {best} if hit else set()
                (right if hit else wrong)[min(BINS - 1, int(score[number] * BINS))] += 1
        return {"boxes": (right, wrong), "squares": (sum(map(len, targets)), len(targets))}

    def scores(self, totals: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
        right, wrong = (part.flip(0).cumsum(0) for part in totals["boxes"])
        recall = right / totals["squares"][0]
        precision = (right / (right + wrong).clamp_min(1)).flip(0).cummax(0).values.flip(0)
        steps = torch.diff(recall, prepend=recall.new_zeros(1))
        return {"ap50": float((steps * precision).sum()), "recall": float(recall[-1])}


def decode(sides: torch.Tensor) -> torch.Tensor:
    """Boxes (B, H, W, 4) of the distances (B, 4, H, W) from the centres of the cells."""
    places = (torch.arange(SIDE // CELL, device=sides.device) + 0.5) * CELL
    y, x = torch.meshgrid(places, places, indexing="ij")
    left, top, right, bottom = (sides.clamp(-3, 3).exp() * CELL).unbind(1)
    return torch.stack([x - left, y - top, x + right, y + bottom], 3)


class Detector(nn.Module):
    """Three strides of two, a residual block, and two heads."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(layer(1, width, 2), layer(width, width, 2), layer(width, 32, 2))
        self.block = nn.Sequential(layer(32, 32, 1), nn.Conv2d(32, 32, 3, padding=1))
        self.heat, self.sides = (
            nn.Sequential(layer(32, 16, 1), nn.Conv2d(16, outputs, 1)) for outputs in (1, 4)
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.stem(images)
        features = (features + self.block(features)).relu()
        return {"heat": self.heat(features), "sides": self.sides(features)}


def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())
