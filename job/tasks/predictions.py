"""Predictions of built-in tasks: classes of images, masks, and boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from job.config import DETECTION
from job.data.splits import FileSplit
from job.errors import DataError, UsageError, shown
from job.models.detectors import find_boxes
from job.models.outputs import logits_of
from job.tasks.coco import class_names_of, find_files, labels_of, read_coco
from job.tasks.multi_label import MULTI_LABEL, THRESHOLD
from job.tasks.segmentation import SEGMENTATION, logits_of_pixels, mask_of_image

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from PIL import Image
    from torch import nn

    from job.data.preprocessing import Preprocessing

    Predictor = Callable[[nn.Module, list[Image.Image], Preprocessing, torch.device], list[Any]]


@torch.inference_mode()
def predict_labels(
    network: nn.Module, images: list[Image.Image], how: Preprocessing, device: torch.device
) -> list[list[float]]:
    """Return the probability of each class for each image."""
    probabilities = logits_of(network(_inputs(images, how, device))).float().sigmoid()
    return [row.tolist() for row in probabilities.cpu()]


@torch.inference_mode()
def predict_masks(
    network: nn.Module, images: list[Image.Image], how: Preprocessing, device: torch.device
) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Return the mask (height, width) uint8 of each image, at the size of the image."""
    logits = logits_of_pixels(network(_inputs(images, how, device)))
    if logits.shape[-2:] != (how.size, how.size):
        logits = torch.nn.functional.interpolate(logits, how.size, mode="bilinear")
    classes = logits.argmax(1).to(torch.uint8).cpu().numpy()
    return [mask_of_image(mask, each.size, how) for mask, each in zip(classes, images, strict=True)]


@torch.inference_mode()
def predict_boxes(
    network: nn.Module, images: list[Image.Image], _how: Preprocessing, device: torch.device
) -> list[list[tuple[list[float], int, float]]]:
    """Return the boxes of each image: left, top, width and height in pixels, label, score."""
    inputs = [
        torch.from_numpy(np.array(image).transpose(2, 0, 1).copy()).to(device).float().div_(255)
        for image in images
    ]
    predicted = []
    for found in find_boxes(network, inputs):
        corners, labels, scores = (found[n].cpu() for n in ("boxes", "labels", "scores"))
        corners[:, 2:] -= corners[:, :2]
        boxes = [[round(value, 3) for value in box] for box in corners.float().tolist()]
        predicted.append(list(zip(boxes, labels.tolist(), scores.float().tolist(), strict=True)))
    return predicted


PREDICTORS: dict[str, Predictor] = {  # what each task predicts for some images
    MULTI_LABEL: predict_labels,
    SEGMENTATION: predict_masks,
    DETECTION: predict_boxes,
}


def label_row(probabilities: list[float], class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the predicted classes, separated by |, and the probability of every class."""
    predicted = [name for name, p in zip(class_names, probabilities, strict=True) if p >= THRESHOLD]
    return "|".join(predicted), *(f"{probability:.6f}" for probability in probabilities)


def coco_split(
    path: Path, name: str | None, class_names: tuple[str, ...]
) -> tuple[FileSplit, list[int], Mapping[int, int]] | None:
    """Return the images of a JSON file, their ids, and the category of each label.

    None if there is no such file in the folder ``path``. ``name`` is the split, by default
    ``testing``, else ``validation``, else the only one. Raises DataError or UsageError.
    """
    try:
        found = find_files(path)
    except DataError:
        return None
    order = name, "testing", "validation", next(iter(found))
    split = name if name in found else next(each for each in order[1:] if each in found)
    if name not in (None, split):
        raise UsageError(f"{shown(path)} has no {name} split; --split can be {', '.join(found)}")
    annotations = read_coco(path)[split]
    if class_names_of(annotations.categories) != class_names:
        raise DataError(f"{shown(annotations.file)} has other categories than the network")
    root = path.parent if path.is_file() else path
    paths = tuple(image.path for image in annotations.images)
    labels = {label: number for number, label in labels_of(annotations.categories).items()}
    ids = [image.id for image in annotations.images]
    return FileSplit(root, paths, np.zeros(len(paths), np.int64)), ids, labels


def _inputs(images: list[Image.Image], how: Preprocessing, device: torch.device) -> torch.Tensor:
    """Return inputs (B, 3, S, S) float32 as evaluation makes them."""
    made = torch.from_numpy(np.stack([np.array(how.evaluate(image)) for image in images]))
    return how.to_input(made.to(device)).contiguous()
