"""Data sets of class folders: train/cat/x.jpg, or cat/x.jpg without splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from job.console import counted
from job.data.dataset import Dataset, list_names
from job.data.folders import subfolders
from job.data.splits import FileSplit, Split
from job.errors import DataError, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.data.archive import FilePath
    from job.data.folders import Lister


@dataclass(frozen=True)
class SplitFolder:
    """The images of a split, inside and outside class folders."""

    folder: FilePath
    classes: dict[str, list[str]]  # class -> paths relative to ``folder``
    unsorted: list[str]  # names in ``folder`` itself


def open_class_folders(root: FilePath, lister: Lister) -> Dataset | None:
    """Open split folders of class folders; returns None if none has images in class folders."""
    folders = lister.split_folders(root)
    classes = {split: lister.class_folders(folder) for split, folder in folders.items()}
    if not any(classes.values()):
        return None
    splits = {
        split: SplitFolder(folder, classes[split], lister.images(folder))
        for split, folder in folders.items()
    }
    return _dataset(root, splits, lister)


def open_unsplit_class_folders(root: FilePath, lister: Lister) -> Dataset | None:
    """Open class folders without splits as one split ``training``.

    Returns None when there are fewer than two classes, or when a sub-folder has split folders,
    because the folder then holds several data sets.
    """
    for entry in subfolders(root):
        if lister.split_folders(root / entry, unique=False):
            return None
    training = SplitFolder(root, lister.class_folders(root), lister.images(root))
    return _dataset(root, {"training": training}, lister) if len(training.classes) > 1 else None


def _dataset(root: FilePath, folders: dict[str, SplitFolder], lister: Lister) -> Dataset:
    """Build the data set; classes are those of training, else of all splits, sorted by name."""
    training = folders.get("training")
    every_class = {name for split in folders.values() for name in split.classes}
    names = tuple(sorted((training.classes if training else None) or every_class))
    notes = [*_order_note(names), *_mask_note(names), *lister.notes()]
    splits: dict[str, Split] = {}
    for name, split in folders.items():
        if split.classes and split.unsorted:
            place = f"{split.folder.name}: " if split.folder != root else ""
            notes.append(
                f"{place}{counted(len(split.unsorted), 'image')} outside class folders ignored"
            )
        if split.classes or split.unsorted:
            splits[name] = _labelled(root, split, names)
    return Dataset(shown(root), names, splits, notes=tuple(notes))


def _mask_note(names: Sequence[str]) -> list[str]:
    """Return a warning if the classes seem to be images and their masks."""
    found = {name.lower() for name in names}
    if not (found & {"images", "imgs"} and found & {"masks", "labels", "annotations"}):
        return []
    return [
        f"warning: {' and '.join(names[:2])} are taken for classes; for masks of images, give "
        "--task segmentation"
    ]


def _labelled(root: FilePath, split: SplitFolder, names: tuple[str, ...]) -> FileSplit:
    """Return the labelled images of a split, or unlabelled ones if it has no class folders."""
    if not split.classes:
        return FileSplit.unlabelled(root, split.unsorted, split.folder)
    for unknown in sorted(set(split.classes) - set(names)):
        raise DataError(
            f"{shown(split.folder / unknown)} is a class that the training split lacks; "
            f"it has: {list_names(names)}"
        )
    paths = [(path, i) for i, name in enumerate(names) for path in split.classes.get(name, [])]
    return FileSplit.of(root, [p for p, _ in paths], [i for _, i in paths], split.folder)


def _order_note(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return a warning if class folders are numbers whose text order is not numeric order."""
    if not all(name.isdecimal() for name in names) or list(names) == sorted(names, key=int):
        return ()
    number = next(n for n, name in enumerate(names) if name != sorted(names, key=int)[n])
    return (
        f"warning: class folders are numbers, but ordered as text, as in torchvision's ImageFolder "
        f"({list_names(names)}): class {number} of the network is folder {names[number]}; "
        "predict writes the folder's name",
    )
