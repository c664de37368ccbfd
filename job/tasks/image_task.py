"""Images of built-in tasks: checked, divided into splits, augmented as those of classification."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from job.data.dataset import Dataset, hold_out_validation
from job.data.image_check import check_images
from job.data.sample_order import COLUMNS, Draw
from job.data.split_names import SPLIT_NAMES
from job.data.splits import FileSplit
from job.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from job.data.preprocessing import Preprocessing
    from job.data.preprocessing_options import PreprocessingOptions

CHECKED = ("training", "validation")


@dataclass(frozen=True)
class TaskOptions:
    """Options of a built-in task: the data, their preprocessing, and what to do with bad images."""

    data: str | None
    preprocessing: PreprocessingOptions | Preprocessing
    on_bad_image: str = "fail"
    seed: int = 0
    cache_max_side: int | None = None

    def path(self, task: str, expected: str) -> str:
        """Return the path of the data; raises UsageError without ``--data``."""
        if self.data is None:
            raise UsageError(f"--task {task} needs --data: {expected}")
        return self.data


def prepare_images(
    data: Dataset, options: TaskOptions
) -> tuple[Mapping[str, FileSplit], Preprocessing]:
    """Check the images of training and validation; return all splits, and the preprocessing.

    A tenth of training is held out if there is no validation split. Raises DataError.
    """
    if "training" not in data.splits:
        raise DataError(f"{data.root} has no training images")
    present = [name for name in CHECKED if name in data.splits]
    data, largest = check_images(data, present, options.on_bad_image)
    data = hold_out_validation(data, options.seed)
    limit = options.cache_max_side if largest > (options.cache_max_side or largest) else None
    given: Any = options.preprocessing
    side = min(largest, limit or largest)
    preprocessing = given.resolve(side) if hasattr(given, "resolve") else given
    splits = {name: data.splits[name] for name in SPLIT_NAMES if name in data.splits}
    files = {name: split for name, split in splits.items() if isinstance(split, FileSplit)}
    return files, replace(preprocessing, max_side=limit or preprocessing.max_side)


@dataclass(frozen=True)
class LabelledImages:
    """A data set of images (S, S, 3) uint8 and targets.

    ``target(index, draw)`` returns the target of an image. ``draw`` contains the random numbers of
    the augmentation, for targets that are images too; it is None without augmentation. With
    ``augment``, images are augmented by random numbers drawn from the seed of the item. Otherwise
    they are preprocessed as in evaluation.
    """

    split: FileSplit
    preprocessing: Preprocessing
    target: Callable[[int, Draw | None], Any]
    augment: bool

    def __len__(self) -> int:
        return len(self.split)

    def sample(self, index: int, seed: int) -> tuple[torch.Tensor, Any]:
        """Return an image and its target; raises DataError or StorageError."""
        image, draw = self.split.image(index), draw_of(index, seed) if self.augment else None
        made = self.preprocessing.train(image, draw) if draw else self.preprocessing.evaluate(image)
        return torch.from_numpy(np.array(made)), self.target(index, draw)


def draw_of(index: int, seed: int) -> Draw:
    """Return the random numbers of an item, drawn by its seed."""
    bits = np.random.Philox(key=seed).random_raw(len(COLUMNS))
    return Draw(index, *((bits >> np.uint64(11)) * 2.0**-53).tolist())
