"""Which images a command runs MODEL over: --data, or the data of MODEL's run, and --split."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from job.artifacts.model_card import find_model, read_card
from job.artifacts.provenance import as_listing, own_data
from job.console import progress
from job.data.dataset import Dataset, hold_out_validation
from job.data.folders import CURRENT_LISTING
from job.data.image_check import check_images
from job.data.layout import (
    BUILT_IN,
    UNSPLIT,
    has_numbered_files,
    is_data_file,
    open_data,
    open_splits,
    open_unlabelled,
)
from job.errors import InputNotFound, UsageError
from job.pipeline.training_data import SPLITS as TRAINING_SPLITS

if TYPE_CHECKING:
    from job.artifacts.model_card import ModelCard
    from job.cli.model import ModelOptions
    from job.data.splits import Split


@dataclass(frozen=True)
class DataOptions:
    """Which images to use, and where to run."""

    data: str | None
    split: str | None
    on_bad_image: str
    device: str
    precision: str
    workers: int | None
    seed: int | None


@dataclass(frozen=True)
class Chosen:
    """A data set that has only the split ``name``."""

    data: Dataset
    name: str
    largest: int  # side of any image; 0 where they are not checked
    files: tuple[str, ...]  # of the split, those that cannot be read included

    @property
    def split(self) -> Split:
        """The images."""
        return self.data.splits[self.name]

    @property
    def numbers(self) -> list[int] | None:
        """The number that each file's whole name is; None unless they are different ones."""
        stems = [Path(self.split.name(index)).stem for index in range(len(self.split))]
        numbers = [int(stem) for stem in stems if stem.isdecimal()]
        return numbers if len(set(numbers)) == len(stems) else None

    @property
    def split_of_numbers(self) -> bool:
        """Whether this is a split of files called by numbers, as the homework's testing folder."""
        return has_numbered_files(self.data) and self.numbers is not None

    def ids(self) -> list[int]:
        """The files' numbers, or their places in the split, where unreadable ones keep theirs."""
        if numbers := self.numbers:
            return numbers
        places = {name: index for index, name in enumerate(self.files)}
        return [places[self.split.name(index)] for index in range(len(self.split))]


def open_chosen(model: ModelOptions, options: DataOptions, *, labelled: bool) -> Chosen:
    """The images to run ``model`` over; without ``labelled`` any folder of them will do.

    They are checked first where the result depends on it: a tenth is held out of those that can be
    read, as ``prune`` does it, and a weights file's preset follows from all their sizes. Raises
    InputNotFound, DataError or UsageError.
    """
    model.check()
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
        data, own = check_images(data, [name], options.on_bad_image, progress("checking"))
        largest = largest or own
    elif unsized and not largest:
        data, largest = check_images(data, [name], options.on_bad_image, progress("checking"))
    return Chosen(data, name, largest, files)


def _open(model: ModelOptions, options: DataOptions, *, labelled: bool) -> tuple[Dataset, str]:
    """The data set, and which of its splits is meant."""
    if options.data == "":  # as from a shell variable that is not set
        raise UsageError("--data is empty: give a path, or leave the option out")
    card = _card(model)
    own = _own(model, card, options.data)
    path = options.data or own
    assert path
    place, split = Path(path), options.split
    built_in = path == BUILT_IN and not place.exists()
    if not labelled and split is None and not built_in and _has_no_splits(place):
        return open_unlabelled(place), "testing"
    name = split or ("validation" if labelled else "testing")
    listing = CURRENT_LISTING
    if card and name in TRAINING_SPLITS:  # held-out images are those that the run held out
        listing = as_listing(card.lineage.get("listing", 1))
    data = open_data(path, listing)
    if data.layout == UNSPLIT and split is None and not _same(path, own):
        note = f"there are no splits: all {len(data.splits['training']):,} images are used"
        return replace(data, notes=(*data.notes, note)), "training"
    return data, name


def _has_no_splits(place: Path) -> bool:
    if not place.is_dir():
        return not is_data_file(place)
    return open_splits(place) is None


def _card(model: ModelOptions) -> ModelCard | None:
    """The card of MODEL; None for a weights file."""
    path = Path(model.path)
    return None if path.is_file() else read_card(find_model(path))


def _own(model: ModelOptions, card: ModelCard | None, given: str | None) -> str | None:
    """The data of MODEL's run; raises as ``own_data`` where they are needed."""
    try:
        return own_data(model.path, card.lineage if card else {})
    except (UsageError, InputNotFound):
        if given is None:
            raise
        return None


def _same(path: str, own: str | None) -> bool:
    return own is not None and Path(path).absolute() == Path(own).absolute()


def _seed(model: ModelOptions, options: DataOptions) -> int:
    """The seed that held out the validation images: that of MODEL's run, unless one is given."""
    card = _card(model) if options.seed is None else None
    return int(card.lineage.get("seed", 0)) if card else options.seed or 0
