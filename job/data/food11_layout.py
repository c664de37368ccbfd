"""Data sets of Food-11 files: training/3_45.jpg is an image of class 3.

The class comes from the file name, never from its folders. File names outside training may lack a
class.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from job.data.dataset import Dataset, list_names, number_classes
from job.data.folders import natural_key
from job.data.splits import UNLABELLED, FileSplit, Split
from job.errors import DataError, shown

if TYPE_CHECKING:
    from job.data.archive import FilePath
    from job.data.folders import Lister

# splits that define the classes; the first entry with any class wins
SOURCES_OF_CLASSES = (("training", "validation"), ("evaluation",), ("testing",))


def open_food11_folder(root: FilePath, lister: Lister) -> Dataset | None:
    """Open split folders of files named CLASS_NUMBER.jpg; returns None if they hold no images."""
    folders = lister.split_folders(root)
    for folder in folders.values():
        lister.class_folders(folder)  # counts files in sub-folders, for the notes
    files = {split: lister.images(folder) for split, folder in folders.items()}
    if not any(files.values()):
        return None
    for name in files.get("training", ()):
        if class_token(name) is None:
            raise DataError(
                f"{shown(folders['training'] / name)} has no class in its name: "
                "images of the Food-11 layout are named CLASS_NUMBER.jpg, e.g. 3_45.jpg"
            )
    tokens = _classes(files)
    numbered = any(token.isdecimal() for token in tokens)
    names = number_classes(root, tokens) if numbered else tuple(sorted(tokens))
    splits: dict[str, Split] = {}
    for split, folder in folders.items():
        if files[split]:
            splits[split] = labelled = _labelled(root, folder, files[split], names, numbered)
            if split in ("training", "validation"):
                _check_labels(labelled, names)
    return Dataset(shown(root), names, splits, numbered, notes=lister.notes())


def class_token(name: str) -> str | None:
    """Return the part of a file name before its last underscore; None without underscore."""
    match = re.fullmatch(r"(.+)_[^_]*", Path(name).stem)
    return match[1] if match else None


def _classes(files: dict[str, list[str]]) -> set[str]:
    for splits in SOURCES_OF_CLASSES:
        names = [name for split in splits for name in files.get(split, ())]
        if tokens := {token for name in names if (token := class_token(name)) is not None}:
            return tokens
    return set()


def _labelled(
    root: FilePath, folder: FilePath, files: list[str], names: tuple[str, ...], numbered: bool
) -> FileSplit:
    index = {name: number for number, name in enumerate(names)}
    paths, labels = sorted(files, key=natural_key), []
    for path in paths:
        token = class_token(path) or ""
        if numbered and token.isdecimal():
            token = str(int(token))
            if token not in index:
                raise DataError(
                    f"{shown(folder / path)} is of class {token}; classes: {list_names(names)}"
                )
        labels.append(index.get(token, UNLABELLED))
    return FileSplit.of(root, paths, labels, folder)


def _check_labels(split: FileSplit, names: tuple[str, ...]) -> None:
    """Raise DataError for the first image without a label."""
    for number in (split.labels == UNLABELLED).nonzero()[0][:1]:
        raise DataError(
            f"{shown(split.path(number))} names no known class; classes: {list_names(names)}"
        )
