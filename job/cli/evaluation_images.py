"""Images for ``evaluate`` and ``predict``: a split of --data, or of the data of MODEL's run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from job.artifacts.model_card import find_model, read_card
from job.artifacts.provenance import find_run_data, valid_listing
from job.artifacts.records import Lineage
from job.console import counted, progress
from job.data.dataset import Dataset, hold_out_validation
from job.data.folders import CURRENT_LISTING
from job.data.image_check import check_images
from job.data.layout import (
    BUILT_IN,
    UNSPLIT,
    as_folder,
    has_numbered_files,
    is_data_file,
    open_data,
    open_splits,
    open_unlabelled,
)
from job.data.loader import default_workers
from job.data.preprocessing_options import PreprocessingOptions
from job.data.shard_layout import is_shard_pattern
from job.errors import InputNotFound, UsageError
from job.pipeline.training_data import SPLITS as TRAINING_SPLITS
from job.processes import local_world_size

if TYPE_CHECKING:
    import torch

    from job.artifacts.model_card import ModelCard
    from job.cli.command_options import (
        ImageOptions,
        ModelOptions,
        QuantisationOptions,
        ScoringOptions,
    )
    from job.data.splits import Split


@dataclass(frozen=True)
class EvaluationImages:
    """Images of the split ``name``, the only split of ``data``."""

    data: Dataset
    name: str
    largest: int  # side of any image, in pixels; 0 if they were not checked
    files: tuple[str, ...]  # all files of the split, also those that cannot be read

    @property
    def split(self) -> Split:
        """The images."""
        return self.data.splits[self.name]

    @property
    def numbers(self) -> list[int] | None:
        """Numbers of the files, e.g. 7 for 0007.jpg; None unless all names are distinct numbers."""
        stems = [Path(self.split.name(index)).stem for index in range(len(self.split))]
        numbers = [int(stem) for stem in stems if stem.isdecimal()]
        return numbers if len(set(numbers)) == len(stems) else None

    @property
    def split_of_numbers(self) -> bool:
        """Whether the split has numbered files, like the homework's testing folder."""
        return has_numbered_files(self.data) and self.numbers is not None

    def ids(self) -> list[int]:
        """Return the numbers of the files, else their indices in the split.

        Unreadable files count in the indices.
        """
        if numbers := self.numbers:
            return numbers
        indices = {name: index for index, name in enumerate(self.files)}
        return [indices[self.split.name(index)] for index in range(len(self.split))]


def loader_workers(options: ImageOptions | QuantisationOptions, device: torch.device) -> int:
    """Return the number of loader processes per process: --workers, or a default by the cores."""
    if options.workers is not None:
        return options.workers
    return default_workers(local_world_size(), device.type == "cuda")


def open_evaluation_images(
    model: ModelOptions, options: ScoringOptions, *, labelled: bool
) -> EvaluationImages:
    """Open the images for ``model``; unless ``labelled``, any folder of images is accepted.

    All images are checked first if the result depends on it: ``prune`` holds out a tenth of the
    readable images, and the preset of a weights file depends on the sizes of all images. Raises
    InputNotFound, DataError or UsageError.
    """
    PreprocessingOptions.of(model).check()
    data, name = _open(model, options, labelled=labelled)
    whole = name == "training" and options.split is None
    held_out = name in TRAINING_SPLITS and "validation" not in data.splits and not whole
    held_out = held_out and "training" in data.splits
    unsized = model.transform == "auto" and Path(model.path).is_file()
    if not held_out:
        data.split(name)  # fails before any image is read
    trained = [split for split in TRAINING_SPLITS if split in data.splits]
    checked, largest = trained if held_out or unsized else [], 0
    data, largest = check_images(data, checked, options.on_bad_image, progress("checking"))
    if held_out:
        data = hold_out_validation(data, _seed(model, options))
    split = data.labelled(name) if labelled else data.split(name)
    files = tuple(split.name(index) for index in range(len(split)))
    data = replace(data, splits={name: split})
    if name not in checked and not held_out and options.on_bad_image == "skip":
        data, largest_here = check_images(data, [name], options.on_bad_image, progress("checking"))
        largest = largest or largest_here
    elif unsized and not largest:
        data, largest = check_images(data, [name], options.on_bad_image, progress("checking"))
    return EvaluationImages(data, name, largest, files)


def _open(model: ModelOptions, options: ScoringOptions, *, labelled: bool) -> tuple[Dataset, str]:
    """Open the data set, and choose the name of the split."""
    card = _card(model)
    run_data = _own(model, card, options.data)
    path = options.data or run_data
    assert path
    place, split = Path(path), options.split
    built_in = path == BUILT_IN and not place.exists()
    if not labelled and split is None and not built_in and _has_no_splits(place):
        return open_unlabelled(place), "testing"
    name = split or ("validation" if labelled else "testing")
    listing = CURRENT_LISTING
    if card and name in TRAINING_SPLITS:  # to hold out the same images as the run
        listing = valid_listing(card.lineage.listing or 1)
    data = open_data(path, listing)
    if data.layout == UNSPLIT and split is None and not _same(path, run_data):
        note = f"there are no splits: {counted(len(data.splits['training']), 'image')} used"
        return replace(data, notes=(*data.notes, note)), "training"
    return data, name


def _has_no_splits(place: Path) -> bool:
    folder = as_folder(place)
    if not folder.is_dir():
        return not is_data_file(place) and not is_shard_pattern(str(place))
    return open_splits(folder) is None


def _card(model: ModelOptions) -> ModelCard | None:
    """Read the card of MODEL; None for a weights file."""
    path = Path(model.path)
    return None if path.is_file() else read_card(find_model(path))


def _own(model: ModelOptions, card: ModelCard | None, given: str | None) -> str | None:
    """Find the data of MODEL's run; None if they are unknown and others are ``given``."""
    try:
        return find_run_data(model.path, card.lineage if card else Lineage())
    except (UsageError, InputNotFound):
        if given is None:
            raise
        return None


def _same(path: str, run_data: str | None) -> bool:
    return run_data is not None and Path(path).absolute() == Path(run_data).absolute()


def _seed(model: ModelOptions, options: ScoringOptions) -> int:
    """Return the seed that holds out validation images: --seed, or that of MODEL's run."""
    card = _card(model) if options.seed is None else None
    return (card.lineage.seed or 0) if card else options.seed or 0
