"""Detection: images with boxes in COCO's JSON files, for the detectors of torchvision."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from job.config import DETECTION
from job.console import warn
from job.data.augmentation import limit_side
from job.data.dataset import Dataset
from job.data.splits import FileSplit
from job.errors import DataError, shown
from job.tasks.coco import COCO_DATA, ObjectBox, class_names_of, labels_of, read_coco
from job.tasks.detection_objective import DetectionObjective
from job.tasks.image_task import draw_of, prepare_images

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from job.tasks.coco import AnnotatedImage, Annotations
    from job.tasks.detection_objective import DetectionTarget
    from job.tasks.image_task import TaskOptions

    Sample = tuple[torch.Tensor, DetectionTarget]  # an image (3, H, W) uint8, and its target

LEAST = 0.1  # pixels of a box within its image; torchvision refuses boxes without an area


class Detection:
    """Images (3, H, W) uint8 of any size, and their boxes, labels and crowds."""

    def __init__(self, options: TaskOptions) -> None:
        root = Path(options.path(DETECTION, COCO_DATA))
        annotations = read_coco(root)
        first = next(iter(annotations.values()))
        categories = annotations.get("training", first).categories
        self.class_names = class_names_of(categories)
        folder = root.parent if root.is_file() else root
        known = {
            (name, image.path): image for name, each in annotations.items() for image in each.images
        }
        splits = {name: _split(folder, each) for name, each in annotations.items()}
        data = Dataset(shown(root), (), splits)
        files, self.preprocessing = prepare_images(data, options)
        held_out = "validation" not in annotations
        labels = labels_of(categories)
        sets = {}
        for name, split in files.items():
            source = "training" if held_out and name == "validation" else name
            images = [known[source, path] for path in split.paths]
            made = _targets(annotations[source].file, split, images, labels)
            limit = self.preprocessing.max_side
            sets[name] = DetectionImages(split, made, name == "training", limit)
        self.training, self.validation = sets["training"], sets["validation"]
        self.testing = sets.get("testing") or sets.get("evaluation")
        for name in ("training", "validation"):
            if not any((~target.crowd).any() for target in sets[name].targets):
                raise DataError(f"{shown(root)}: no {name} image has a box")
        self.fingerprint = "".join(
            each.split.digest().hex() + _digest(each.targets) for each in sets.values()
        )

    @staticmethod
    def collate(items: list[Sample]) -> tuple[list[torch.Tensor], list[DetectionTarget]]:
        """Return the images and targets of a batch as lists: images differ in size."""
        return [image for image, _ in items], [target for _, target in items]

    def objective(self, network: nn.Module) -> DetectionObjective:
        """Return the losses and the metric of a detector."""
        return DetectionObjective(network.transform)


@dataclass(frozen=True)
class TrueBoxes:
    """The boxes (n, 4) float32 of an image, their labels (n,), and which are crowds (n,)."""

    boxes: np.ndarray[Any, np.dtype[np.float32]]
    labels: np.ndarray[Any, np.dtype[np.int64]]
    crowd: np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class DetectionImages:
    """A data set of images and boxes; with ``augment`` half of the images are mirrored.

    Images are reduced to sides of at most ``max_side`` pixels; the network resizes them further.
    """

    split: FileSplit
    targets: tuple[TrueBoxes, ...]
    augment: bool
    max_side: int | None = None

    def __len__(self) -> int:
        return len(self.split)

    def sample(self, index: int, seed: int) -> Sample:
        """Return an image (3, H, W) uint8 and its target; raises DataError or StorageError."""
        image, target = self.split.image(index), self.targets[index]
        before = image.size
        pixels = np.array(limit_side(image, self.max_side))
        size = pixels.shape[1::-1]
        boxes = target.boxes * (np.array([*size, *size]) / [*before, *before]).astype(np.float32)
        if self.augment and draw_of(index, seed).flip < 0.5:
            pixels, boxes = pixels[:, ::-1], boxes.copy()
            boxes[:, [0, 2]] = size[0] - boxes[:, [2, 0]]
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), {
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
            "labels": torch.from_numpy(target.labels),
            "crowd": torch.from_numpy(target.crowd),
            "number": index,
            "seed": seed,
        }


def _split(root: Path, annotations: Annotations) -> FileSplit:
    paths = tuple(image.path for image in annotations.images)
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise DataError(f"{shown(annotations.file)} lists {shown(twice)} twice")
    return FileSplit(root, paths, np.zeros(len(paths), np.int64))


def _targets(
    file: Path, split: FileSplit, images: list[AnnotatedImage], labels: Mapping[int, int]
) -> tuple[TrueBoxes, ...]:
    """Return the boxes of each image, clipped to it; raises DataError if its size is wrong."""
    targets, outside, empty = [], 0, 0
    for index, image in enumerate(images):
        size = _size(file, split, index, image)
        boxes, over, none = clip_boxes(image.boxes, size)
        outside, empty = outside + over, empty + none
        corners = np.array([box.corners for box in boxes], np.float32).reshape(-1, 4)
        numbers = np.array([labels[box.category] for box in boxes], np.int64)
        targets.append(TrueBoxes(corners, numbers, np.array([box.crowd for box in boxes], bool)))
    for count, problem in ((outside, "outside of its image: clipped"), (empty, "without an area")):
        if count:
            boxes_ = "box is" if count == 1 else "boxes are"
            left = "" if problem.endswith("clipped") else ": left out"
            warn(f"{shown(file)}: {count:,} {boxes_} {problem}{left}")
    return tuple(targets)


def _size(file: Path, split: FileSplit, index: int, image: AnnotatedImage) -> tuple[int, int]:
    """Return the (width, height) of an image; raises DataError if its file says another one."""
    if split.sizes is None:  # only training and validation images are all decoded beforehand
        size = image.size or split.image(index).size
    else:
        size = tuple(split.sizes[index].tolist())
    if image.size and image.size != size:
        said = " x ".join(map(str, image.size))
        raise DataError(
            f"{shown(file)} says that {shown(image.path)} has {said} pixels, but it has "
            f"{size[0]} x {size[1]}: its boxes would be elsewhere"
        )
    return size


def clip_boxes(
    boxes: Iterable[ObjectBox], size: tuple[int, int]
) -> tuple[list[ObjectBox], int, int]:
    """Clip boxes to an image of ``size`` (width, height), in pixels.

    Also returns how many boxes extend more than a pixel beyond the image, and how many are left out
    because less than LEAST pixels of a side are inside the image.
    """
    kept, outside, empty = [], 0, 0
    width, height = size
    for box in boxes:
        left, top, right, bottom = box.corners
        inside = max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)
        if inside[2] - inside[0] < LEAST or inside[3] - inside[1] < LEAST:
            empty += 1
            continue
        outside += max(-left, -top, right - width, bottom - height) > 1
        kept.append(ObjectBox(inside, box.category, box.crowd))
    return kept, outside, empty


def _digest(targets: Iterable[TrueBoxes]) -> str:
    sha = hashlib.sha256()
    for target in targets:
        for part in (target.boxes, target.labels, target.crowd):
            sha.update(b"%d\0" % len(part) + part.tobytes())
    return sha.hexdigest()
