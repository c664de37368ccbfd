"""Match the classes of a data set with those of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from job.errors import DataError

if TYPE_CHECKING:
    from job.artifacts.model_card import ModelCard
    from job.data.dataset import Dataset
    from job.data.splits import Split

NAMES_SHOWN = 12


def in_classes_of(card: ModelCard, data: Dataset, split: Split) -> Split:
    """Return ``split`` of ``data`` with labels in the numbering of the model.

    Named classes are matched by name; numbered classes are not changed. Raises DataError for a
    class that the model does not have.
    """
    if not card.class_names or data.class_names == card.class_names:
        return split
    if data.numbered and not all(name.isdecimal() for name in card.class_names):
        return split
    index = {name: number for number, name in enumerate(card.class_names)}
    present = {data.class_names[number] for number in np.unique(split.labels) if number >= 0}
    unknown = [name for name in data.class_names if name in present and name not in index]
    if unknown:
        raise DataError(
            f"{data.root} has the class {unknown[0]!r}, which the model does not know; "
            f"its classes are {', '.join(card.class_names[:NAMES_SHOWN])}"
        )
    numbers = np.array([index.get(name, 0) for name in data.class_names])
    return split.select(np.arange(len(split)), numbers[split.labels])
