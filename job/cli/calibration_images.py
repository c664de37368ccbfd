"""Images for ``slim``, ``sensitivity`` and ``export --int8``: calibration and scoring splits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from job.artifacts.model_card import find_model, read_card
from job.artifacts.provenance import find_run_data, valid_listing
from job.artifacts.records import Lineage
from job.cli.class_matching import in_classes_of
from job.cli.evaluation_images import loader_workers
from job.console import counted, progress
from job.data.dataset import Dataset, hold_out_validation
from job.data.folders import CURRENT_LISTING
from job.data.image_check import check_images
from job.data.layout import open_data, open_unlabelled
from job.data.splits import UNLABELLED, Split
from job.errors import DataError
from job.training.calibration import Calibration

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator

    from job.artifacts.model_card import ModelCard
    from job.cli.command_options import (
        ModelOptions,
        QuantisationOptions,
        SensitivityOptions,
        SlimOptions,
    )

# the first split that exists is used
CALIBRATE = ("training", "validation", "evaluation", "testing")
SCORE = ("validation", "evaluation", "testing", "training")


class SlimImages:
    """Images of one data set: ``calibration`` and, if it has labels, ``scoring``.

    ``scored`` is the name of the scoring split; ``unscored`` is the reason if there is none.
    ``largest`` is the largest side of any image, in pixels.
    """

    def __init__(self, data: Dataset, largest: int) -> None:
        self.data, self.largest = data, largest
        self.calibrated, self.scored = _splits_of(data)
        self.calibration: Split = data.splits[self.calibrated]
        self.scoring = data.splits[self.scored] if self.scored else None
        self.unscored = f"{data.root} has no labels"

    def calibrate(
        self,
        card: ModelCard,
        accelerator: Accelerator,
        options: SlimOptions | SensitivityOptions | QuantisationOptions,
        progress: Callable[[int, int], None] | None = None,
    ) -> Calibration:
        """Return the calibration of a model: images preprocessed and labelled as ``card`` says."""
        self.fit(card)
        return Calibration(
            self.calibration,
            card.preprocessing,
            accelerator,
            loader_workers(options, accelerator.device),
            options.seed,
            most=options.calibration_images,
            progress=progress,
        )

    def fit(self, card: ModelCard) -> None:
        """Number the classes as the model does; drop the labels if the classes do not match."""
        names, class_names = card.class_names, self.data.class_names
        if self.scoring is None:
            return
        numbers = [s.labels.max(initial=0) for s in (self.scoring, self.calibration)]
        others = [name for name in class_names if name not in names]
        if self.data.numbered and max(numbers) >= card.num_classes:
            self._leave(
                f"{self.data.root} has a class {max(numbers)}, but the network has "
                f"{counted(card.num_classes, 'class')}, numbered from 0"
            )
        elif names and others and not self.data.numbered:
            self._leave(f"the model does not know the class {others[0]!r} of {self.data.root}")
        elif not names and not self.data.numbered and len(class_names) != card.num_classes:
            self._leave(
                f"{self.data.root} has {counted(len(class_names), 'class')}, "
                f"but the network has {card.num_classes:,}"
            )
        else:
            self.scoring = in_classes_of(card, self.data, self.scoring)
            if _labelled(self.calibration):
                self.calibration = in_classes_of(card, self.data, self.calibration)

    def _leave(self, reason: str) -> None:
        count = len(self.calibration)
        self.scoring, self.unscored = None, reason
        nothing = np.full(count, UNLABELLED, np.int64)
        self.calibration = self.calibration.select(np.arange(count), nothing)

    def describe(self) -> str:
        """Describe the scoring split, for the console."""
        count = len(self.scoring) if self.scoring is not None else 0
        what = f"the {self.scored} split of {self.data.root} ({counted(count, 'image')}"
        same = ", which also calibrated it" if self.scored == self.calibrated else ""
        return f"{what}{same})"


def calibration_data(model: ModelOptions, given: str | None) -> str:
    """Return the path of the images: ``given`` by --data, or the data of MODEL's run."""
    if given is not None:
        return given
    folder = Path(model.path)
    lineage = Lineage() if folder.is_file() else read_card(find_model(folder)).lineage
    return find_run_data(model.path, lineage)


def open_images(path: str, on_bad_image: str, model: ModelOptions, seed: int) -> SlimImages:
    """Open and check the images in ``path``: a data set of any layout, or unlabelled images.

    Without a validation split, a tenth of the training split is held out for scoring, as in MODEL's
    run. Raises InputNotFound or DataError.
    """
    folder = Path(model.path)
    lineage = read_card(find_model(folder)).lineage if folder.is_dir() else Lineage()
    data = _open(
        path, CURRENT_LISTING if lineage == Lineage() else valid_listing(lineage.listing or 1)
    )
    used = [name for name in dict.fromkeys(_splits_of(data)) if name]
    data, largest = check_images(data, used, on_bad_image, progress("checking"))
    training = data.splits.get("training")
    if training is not None and "validation" not in data.splits and _labelled(training):
        try:
            data = hold_out_validation(data, seed if lineage.seed is None else lineage.seed)
        except DataError:  # too few images: the calibration images score, which is reported
            return SlimImages(data, largest)
    return SlimImages(data, largest)


def _splits_of(data: Dataset) -> tuple[str, str]:
    """Return the names of the calibration and scoring splits; the latter is "" without labels."""
    calibrates = next(name for name in CALIBRATE if name in data.splits)
    scores = [name for name in SCORE if name in data.splits and _labelled(data.splits[name])]
    return calibrates, next(iter(scores), "")


def _labelled(split: Split) -> bool:
    return not bool((split.labels == UNLABELLED).any())


def _open(path: str, listing: int) -> Dataset:
    try:
        return open_data(path, listing)
    except DataError as error:
        try:
            return open_unlabelled(Path(path))
        except DataError:
            raise error from None
