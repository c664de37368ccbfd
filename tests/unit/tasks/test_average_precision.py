"""Mean average precision, against values by hand and against COCO's own implementation."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from job.tasks.average_precision import ImageMatches, match_image, mean_average_precision

BOX = [0.0, 0.0, 10.0, 10.0]
NOTHING: tuple[Any, ...] = (np.zeros((0, 4)), [], [])


def score(*images: tuple[Any, Any]) -> tuple[float, float]:
    """The metric of images of (boxes, labels, scores) and (boxes, labels, crowds)."""
    made = [match_image(number, *image) for number, image in enumerate(images)]
    return mean_average_precision(made)


def test_a_box_of_an_iou_of_0_8_counts_at_seven_of_ten_thresholds() -> None:
    """0.5, 0.55, …, 0.8: average precision 1 at these, 0 at 0.85, 0.9 and 0.95."""
    found = [[0.0, 0.0, 10.0, 8.0]], [1], [0.9]
    assert score((found, ([BOX], [1], [0]))) == pytest.approx((0.7, 1.0))


def test_precision_is_read_at_101_recalls() -> None:
    """Right, wrong, right of four: precision 1 up to a recall of 0.25, 2/3 up to 0.5, then 0."""
    places = np.arange(4)[:, None] * 20.0
    true = np.array([BOX]) + np.hstack([places, places * 0] * 2)
    found = np.array([true[0], [900.0, 0.0, 910.0, 10.0], true[1]])
    expected = (26 * 1 + 25 * 2 / 3) / 101
    image = (found, [1, 1, 1], [0.9, 0.8, 0.7]), (true, [1] * 4, [0] * 4)
    assert score(image) == pytest.approx((expected, expected))


def test_a_second_box_of_an_object_is_wrong_and_one_in_a_crowd_does_not_count() -> None:
    twice = [BOX, BOX], [1, 1], [0.9, 0.8]
    half = (51 * 1 + 50 * 0) / 101  # the other object is not found
    far = [50.0, 50.0, 60.0, 60.0]
    assert score((twice, ([BOX, far], [1, 1], [0, 0])))[0] == pytest.approx(half)
    crowd = [BOX, [20.0, 20.0, 22.0, 22.0], far], [1, 1, 1], [0.7, 0.8, 0.9]
    true = [BOX, [15.0, 15.0, 40.0, 40.0]], [1, 1], [0, 1]
    assert score((crowd, true))[0] == pytest.approx(0.5)  # behind one wrong box


def test_the_mean_is_over_the_classes_with_a_box() -> None:
    first = ([BOX], [1], [0.9]), ([BOX], [1], [0])
    second = ([BOX, BOX], [2, 3], [0.9, 0.9]), ([BOX], [2], [0])
    missed = NOTHING, ([BOX], [4], [0])
    assert score(first, second, missed) == pytest.approx((2 / 3, 2 / 3))
    assert score((NOTHING, NOTHING)) == score() == (0.0, 0.0)


def test_images_may_come_in_any_order() -> None:
    matches = [match_image(n, *image) for n, image in enumerate(scene(5))]
    assert mean_average_precision(matches[::-1]) == mean_average_precision(matches)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_coco_computes(seed: int) -> None:
    """Crowds, several classes, equal scores, more than a hundred boxes, images without any."""
    images = scene(seed)
    made: list[ImageMatches] = [match_image(n, *image) for n, image in enumerate(images)]
    assert mean_average_precision(made) == pytest.approx(of_coco(images), abs=1e-12)


def scene(seed: int) -> list[tuple[Any, Any]]:
    random = np.random.default_rng(seed)
    images = []
    for number in range(12):
        count = int(random.integers(0, 7)) if number else 40
        places, sizes = random.uniform(0, 80, (count, 2)), random.uniform(4, 40, (count, 2))
        true = np.hstack([places, places + sizes])
        labels, crowd = random.integers(1, 4, count), random.random(count) < 0.2
        near = true.repeat(3, 0) + random.normal(0, 3, (3 * count, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        guessed = np.where(random.random(3 * count) < 0.8, labels.repeat(3), 3)
        scores = random.random(3 * count).round(2)  # some are equal
        images.append(((near, guessed, scores), (true, labels, crowd)))
    return images


def of_coco(images: list[tuple[Any, Any]]) -> tuple[float, float]:
    """The first two numbers of COCO's own evaluation."""
    boxes, results = [], []
    for number, (found, true) in enumerate(images):
        for box, label, crowd in zip(*true, strict=True):
            entry = {"id": len(boxes) + 1, "image_id": number, "category_id": int(label)}
            size = sides(box)
            boxes.append(entry | {"bbox": size, "area": size[2] * size[3], "iscrowd": int(crowd)})
        for box, label, value in zip(*found, strict=True):
            entry = {"image_id": number, "category_id": int(label), "score": float(value)}
            results.append(entry | {"bbox": sides(box)})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": number} for number in range(len(images))],
            "annotations": boxes,
            "categories": [{"id": number} for number in (1, 2, 3)],
            "info": {},
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])


def sides(box: Any) -> list[float]:
    left, top, right, bottom = map(float, box)
    return [left, top, right - left, bottom - top]
