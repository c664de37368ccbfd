"""``rounds/NN/evaluation.json``: how the best model of a round classified the validation split.

The confusion counts follow from the images of each class and the images that were misclassified.
Needs no torch.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from job.artifacts.json_records import from_json, to_json
from job.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

EVALUATION_FILE = "evaluation.json"  # next to the model.json of a round


@dataclass(frozen=True)
class ErrorRecord:
    """Misclassified images: their numbers in the split, their classes, and the predictions.

    The three tuples have the same length.
    """

    WRITE_DEFAULTS: ClassVar[bool] = True

    index: tuple[int, ...] = ()
    label: tuple[int, ...] = ()
    predicted: tuple[int, ...] = ()


@dataclass(frozen=True)
class GammaBins:
    """Histogram of |γ| over every BatchNorm: counts of equal bins from 0 to ``max``."""

    count: int
    zeros: int
    max: float
    bins: tuple[int, ...]


@dataclass(frozen=True)
class ExampleImage:
    """An image that the base and this model classify differently; one of them is right.

    ``image`` is a small copy, cropped as for evaluation, as a data URL of PNG or JPEG.
    """

    name: str
    label: int
    base: int
    predicted: int
    image: str


@dataclass(frozen=True)
class RoundEvaluation:
    """Classification of the validation split by the best model of a round.

    ``counts`` holds the images of each class, without those that could not be read. ``lost`` and
    ``won`` count the images that the base alone, or this model alone, classifies correctly; None
    for the base. ``examples`` shows some of them.
    """

    WRITE_DEFAULTS: ClassVar[bool] = True

    counts: tuple[int, ...]
    errors: ErrorRecord
    gamma: GammaBins | None = None
    lost: int | None = None
    won: int | None = None
    examples: tuple[ExampleImage, ...] = ()
    format: int = 1

    def confusion(self) -> Counter[tuple[int, int]]:
        """Return the number of images by (true class, predicted class), without empty cells."""
        wrong = Counter(zip(self.errors.label, self.errors.predicted, strict=True))
        by_class = Counter(self.errors.label)
        right = {(label, label): count - by_class[label] for label, count in enumerate(self.counts)}
        return wrong + Counter(right)

    def class_accuracy(self) -> tuple[float | None, ...]:
        """Return the fraction of correct predictions per class; None without images."""
        wrong = Counter(self.errors.label)
        return tuple(
            1 - wrong[label] / count if count else None for label, count in enumerate(self.counts)
        )

    def check(self) -> None:
        """Raise ValueError for numbers that contradict each other."""
        errors, classes = self.errors, range(len(self.counts))
        columns = {len(errors.index), len(errors.label), len(errors.predicted)}
        used = {*errors.label, *errors.predicted}
        used |= {n for e in self.examples for n in (e.label, e.base, e.predicted)}
        wrong = Counter(errors.label)
        if len(columns) > 1 or any(number not in classes for number in used):
            raise ValueError("its classes are out of range")
        if any(not wrong[label] <= count for label, count in enumerate(self.counts)):
            raise ValueError("it has more errors than images")
        bins = self.gamma.bins if self.gamma else ()
        if any(count < 0 for count in (*self.counts, *bins, self.lost or 0, self.won or 0)):
            raise ValueError("its counts are negative")

    def to_text(self) -> str:
        """Return the content of the file: a line for each key."""
        lines = (f" {json.dumps(k)}: {json.dumps(v)}" for k, v in to_json(self).items())
        return "{\n" + ",\n".join(lines) + "\n}\n"


def read_evaluation(path: Path) -> RoundEvaluation:
    """Read evaluation.json; raises OSError, or ValueError if its content is impossible."""
    evaluation = from_json(RoundEvaluation, read_json(path))
    evaluation.check()
    return evaluation


def find_evaluation(folder: Path) -> RoundEvaluation | None:
    """Return the evaluation in the folder of a round; None if the file is missing or damaged."""
    try:
        return read_evaluation(folder / EVALUATION_FILE)
    except (OSError, ValueError):
        return None
