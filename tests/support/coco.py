"""Images of discs and squares with boxes as COCO has them, and small detectors for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign

from job.artifacts.saving import load
from job.data.preprocessing import Preprocessing
from job.tasks.average_precision import match_image, mean_average_precision
from job.tasks.detection import Detection
from job.tasks.image_task import TaskOptions

Json = dict[str, Any]
CATEGORIES = ({"id": 1, "name": "disc"}, {"id": 2, "name": "square"})


def draw(number: int) -> tuple[Image.Image, list[tuple[int, list[float]]]]:
    """A noisy image of some size, and the category and box of each of its shapes."""
    random = np.random.default_rng(number)
    height, width = random.integers(48, 72, 2).tolist()
    y, x = np.mgrid[:height, :width]
    image, boxes = random.normal(60, 10, (height, width, 3)), []
    for category in random.permutation((1, 2))[: random.integers(1, 3)].tolist():
        radius = float(random.integers(7, 12))
        left, top = random.uniform(radius, width - radius), random.uniform(radius, height - radius)
        down, right = abs(y + 0.5 - top), abs(x + 0.5 - left)
        away = np.hypot(down, right) if category == 1 else np.maximum(down, right)
        image[away <= radius] = (230, 60, 60) if category == 1 else (60, 60, 230)
        boxes.append((category, [left - radius, top - radius, 2 * radius, 2 * radius]))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)), boxes


def write_coco(folder: Path, counts: dict[str, int], year: str = "2017") -> Path:
    """Images and ``annotations/instances_SPLIT2017.json``; the first image of each has no box."""
    number = 0
    for split, count in counts.items():
        content: Json = {"images": [], "annotations": [], "categories": list(CATEGORIES)}
        (folder / f"{split}{year}").mkdir(parents=True)
        for place in range(count):
            number += 1
            image, boxes = draw(number)
            name = f"{number:04d}.png"
            image.save(folder / f"{split}{year}" / name)
            size = {"width": image.width, "height": image.height}
            content["images"].append({"id": number, "file_name": name, **size})
            for category, box in boxes if place else ():
                entry = {"image_id": number, "category_id": category, "bbox": box, "iscrowd": 0}
                content["annotations"].append({"id": len(content["annotations"]), **entry})
        write_json(folder, split, content, year)
    return folder


def json_file(folder: Path, split: str = "train", year: str = "2017") -> Path:
    return folder / "annotations" / f"instances_{split}{year}.json"


def write_json(folder: Path, split: str, content: object, year: str = "2017") -> None:
    file = json_file(folder, split, year)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


class Body(nn.Module):
    """Features at strides of 8 and 16."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.out_channels = 2 * width
        self.stem = nn.Sequential(*_layers(3, width), *_layers(width, width))
        self.eight = nn.Sequential(*_layers(width, 2 * width))
        self.sixteen = nn.Sequential(*_layers(2 * width, 2 * width))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        eight = self.eight(self.stem(images))
        return {"0": eight, "1": self.sixteen(eight)}


def _layers(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


def ssd(num_classes: int) -> nn.Module:
    boxes = DefaultBoxGenerator([[2], [2]], scales=[0.25, 0.35, 0.5])
    body: Any = Body()
    body.out_channels = [body.out_channels] * 2  # a number for each map
    return SSD(body, boxes, (64, 64), num_classes)


def fcos(num_classes: int) -> nn.Module:
    anchors = AnchorGenerator(((8,), (16,)), ((1.0,), (1.0,)))
    return FCOS(Body(16), num_classes, 64, 96, anchor_generator=anchors)


def retinanet(num_classes: int) -> nn.Module:
    anchors = AnchorGenerator(((16,), (24,)), ((1.0,), (1.0,)))
    return RetinaNet(Body(8), num_classes, 64, 96, anchor_generator=anchors)


def faster_rcnn(num_classes: int) -> nn.Module:
    return FasterRCNN(
        Body(8),
        num_classes,
        64,
        96,
        rpn_anchor_generator=AnchorGenerator(((16,), (24,)), ((1.0,), (1.0,))),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 4, 2),
        rpn_pre_nms_top_n_train=50,
        rpn_post_nms_top_n_train=20,
        rpn_post_nms_top_n_test=20,
        rpn_pre_nms_top_n_test=50,
    )


def map_by_image(run: str | Path, data: Path) -> float:
    """The metric of a loaded model that is called as torchvision's, one image at a time."""
    network: Any = load(run)
    images = Detection(TaskOptions(str(data), Preprocessing.of("small", 64))).validation
    matches = []
    for index in range(len(images)):
        image, true = images.sample(index, 0)
        with torch.no_grad():
            (found,) = network([image / 255])
        matches.append(
            match_image(
                index,
                (found["boxes"].numpy(), found["labels"].numpy(), found["scores"].numpy()),
                (true["boxes"].numpy(), true["labels"].numpy(), true["crowd"].numpy()),
            )
        )
    return mean_average_precision(matches)[0]
