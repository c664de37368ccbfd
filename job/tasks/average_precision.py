"""Mean average precision of boxes, as COCO defines it (Lin et al. 2014), exactly.

Each image is matched on its own; a class is then ranked by score over all images of the split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    Array = np.ndarray[Any, np.dtype[Any]]

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the IoU from which a box counts as found
RECALLS = np.linspace(0, 1, 101)  # at which precision is read
MOST = 100  # boxes of a class in an image that count, those of the highest scores
WRONG, RIGHT, IGNORED = 0, 1, 2


@dataclass(frozen=True)
class ImageMatches:
    """The boxes found in an image, in descending order of score within each class.

    ``scores`` (n,) float64, ``labels`` (n,), and ``results`` (n, 10) uint8: WRONG, RIGHT or IGNORED
    at each of THRESHOLDS. ``true`` are the labels (m,) of the true boxes, without crowds.
    ``number`` is the index of the image in its split.
    """

    number: int
    scores: Array
    labels: Array
    results: Array
    true: Array


def match_image(
    number: int,
    found: tuple[Array, Array, Array],
    true: tuple[Array, Array, Array],
) -> ImageMatches:
    """Match the boxes found in an image with the true ones.

    ``found`` are boxes (n, 4), labels (n,), scores (n,); ``true`` boxes (m, 4), labels (m,), and
    which of them hold a crowd (m,): a box found in a crowd is neither right nor wrong.
    """
    boxes, labels, scores = (np.asarray(part, np.float64) for part in found)
    true_boxes, true_labels, crowd = (np.asarray(part, np.float64) for part in true)
    order: list[Array] = []
    results: list[Array] = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        mine = mine[np.argsort(-scores[mine], kind="stable")][:MOST]
        theirs = true_labels == label
        order.append(mine)
        results.append(_match_class(boxes[mine], true_boxes[theirs], crowd[theirs] > 0))
    chosen = np.concatenate(order) if order else np.zeros(0, np.int64)
    matches = np.concatenate(results) if results else np.zeros((0, len(THRESHOLDS)), np.uint8)
    return ImageMatches(
        number, scores[chosen], labels[chosen], matches, true_labels[crowd == 0].astype(np.int64)
    )


def _match_class(boxes: Array, true: Array, crowd: Array) -> Array:
    """Return the results (n, 10) of boxes of one class, by falling score.

    A box matches the free true box with the largest IoU, or a crowd if there is no such box.
    """
    results = np.zeros((len(boxes), len(THRESHOLDS)), np.uint8)
    if not len(true):
        return results
    overlaps = box_overlaps(boxes, true, crowd)
    least = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    free = np.repeat(~crowd[None], len(THRESHOLDS), 0)
    every, last = np.arange(len(THRESHOLDS)), len(true) - 1
    for number, overlap in enumerate(overlaps):
        enough = overlap >= least  # (10, m)
        possible = np.where(enough & free, overlap, -1.0)
        best = last - possible[:, ::-1].argmax(1)  # the last of equals
        right = possible[every, best] >= 0
        free[every[right], best[right]] = False
        in_crowd = (enough & crowd).any(1)
        results[number] = np.where(right, RIGHT, np.where(in_crowd, IGNORED, WRONG))
    return results


def box_overlaps(boxes: Array, true: Array, crowd: Array) -> Array:
    """Return the IoU (n, m) of ``boxes`` (n, 4) and ``true`` boxes (m, 4).

    For a ``crowd`` (m,) it is the share of the box that is inside the crowd.
    """
    low = np.maximum(boxes[:, None, :2], true[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], true[None, :, 2:])
    shared = (high - low).clip(0).prod(2)
    areas, true_areas = ((part[:, 2:] - part[:, :2]).prod(1) for part in (boxes, true))
    either = areas[:, None] + true_areas[None] - shared
    whole = np.where(crowd[None], areas[:, None], either)
    overlaps: Array = np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)
    return overlaps


def mean_average_precision(images: Sequence[ImageMatches]) -> tuple[float, float]:
    """Return the mean average precision over the IoUs from 0.5 to 0.95, and at 0.5.

    It is the mean over the classes that have a true box; 0 without any. Images may have any order.
    """
    images = sorted(images, key=lambda image: image.number)
    true = np.concatenate([image.true for image in images]) if images else np.zeros(0)
    if not len(true):
        return 0.0, 0.0
    scores, labels, results = (
        np.concatenate([getattr(image, name) for image in images])
        for name in ("scores", "labels", "results")
    )
    by_class = []
    for label in np.unique(true):
        mine = np.flatnonzero(labels == label)
        mine = mine[np.argsort(-scores[mine], kind="stable")]
        by_class.append(_average_precisions(results[mine], int((true == label).sum())))
    precisions = np.stack(by_class)  # (classes, 10)
    return float(precisions.mean()), float(precisions[:, 0].mean())


def _average_precisions(results: Array, count: int) -> Array:
    """Return the average precision (10,) of a class with ``count`` true boxes.

    ``results`` (n, 10) are in descending order of score. The precision at a recall is the highest
    precision at that recall or a larger one. It is averaged over RECALLS.
    """
    averages = np.zeros(len(THRESHOLDS))
    right = (results == RIGHT).cumsum(0, dtype=np.float64)
    wrong = (results == WRONG).cumsum(0, dtype=np.float64)
    precision = right / np.maximum(right + wrong, 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    for column in range(len(THRESHOLDS)):
        places = np.searchsorted(right[:, column] / count, RECALLS, side="left")
        reached = places[places < len(results)]
        averages[column] = precision[reached, column].sum() / len(RECALLS)
    return averages
