"""Data sets of image folders with metadata files, as in Hugging Face's ``imagefolder``.

``metadata.csv`` or ``metadata.jsonl`` has the path of each image, relative to the file, and its
label. It is in the folder of the data set, or in each split folder.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from job.console import counted
from job.data.csv_layout import csv_columns, csv_rows, read_text
from job.data.image_lists import Columns, Row, checked_rows, listed_dataset
from job.data.split_names import CANONICAL
from job.errors import DataError, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from job.data.archive import FilePath
    from job.data.dataset import Dataset
    from job.data.folders import Lister

METADATA_FILES = ("metadata.csv", "metadata.jsonl")
MIN_LISTING = 3  # first version of the listing rules with these files
LABELLED_SPLITS = ("training", "validation")


def open_metadata_folder(root: FilePath, lister: Lister) -> Dataset | None:
    """Open the metadata file of ``root``, or those of its split folders.

    Returns None if none has labels, e.g. only captions. Raises DataError for invalid lines.
    """
    if lister.listing < MIN_LISTING:
        return None
    if (file := _metadata(root)) and _has_labels(file):
        return listed_dataset(root, _rows(file, _split_by_folder))
    folders = lister.split_folders(root)
    files = {split: file for split, folder in folders.items() if (file := _metadata(folder))}
    if not any(map(_has_labels, files.values())):
        return None
    rows = [row for split, file in files.items() for row in _rows_of(split, file)]
    notes: list[str] = []
    for split, folder in folders.items():
        images = lister.images_below(folder)
        if split in files:
            listed = {os.path.normpath(row.path) for row in rows if row.split == split}
            if missing := len(set(images) - listed):
                name = shown(files[split])
                notes.append(f"warning: left out: {counted(missing, 'image')} not in {name}")
        elif images and split in LABELLED_SPLITS:
            raise DataError(
                f"{shown(folder)} has no {' or '.join(METADATA_FILES)}, which "
                f"{shown(next(iter(files.values())).parent)} has: its images have no labels"
            )
        else:
            rows += [Row(shown(folder), path, "", split) for path in images]
    data = listed_dataset(root, rows)
    return replace(data, notes=(*data.notes, *notes))


def open_metadata_file(path: FilePath) -> Dataset:
    """Open a file of one JSON object a line; raises DataError."""
    return listed_dataset(path.parent, _rows(path, _split_by_folder), path)


def _metadata(folder: FilePath) -> FilePath | None:
    """Return the metadata file in ``folder``, if it names files."""
    files = [file for name in METADATA_FILES if (file := folder / name).is_file()]
    return next((file for file in files if _columns(file)), None)


def _has_labels(file: FilePath) -> bool:
    columns = _columns(file)
    return columns is not None and columns.label is not None


def _columns(file: FilePath) -> Columns | None:
    """Return the columns of a CSV file, or of the first object of a JSON Lines file."""
    if not _is_json(file):
        return csv_columns(file)
    return next((Columns.of(values) for _, values in _objects(file)), None)


def _rows_of(split: str, file: FilePath) -> list[Row]:
    """Read the file of a split folder; paths are relative to the parent of that folder."""
    inside = file.parent.name
    return [
        replace(row, path=os.path.join(inside, row.path))  # noqa: PTH118 (odd bytes)
        for row in _rows(file, lambda _: split)
    ]


def _rows(file: FilePath, default_split: Callable[[str], str]) -> list[Row]:
    if not _is_json(file):
        return csv_rows(file, default_split)
    return checked_rows(file, _picked(file), default_split)


def _split_by_folder(path: str) -> str:
    """Return the split that a path's first folder names, else training."""
    return CANONICAL.get(Path(os.path.normpath(path)).parts[0].lower(), "training")


def _is_json(file: FilePath) -> bool:
    return file.name.lower().endswith(".jsonl")


def _objects(file: FilePath) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Yield the line number and the object of each line; raises DataError."""
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{shown(file)} line {number} is not JSON: {error}") from error
            if not isinstance(values, dict):
                raise DataError(f"{shown(file)} line {number} is not a JSON object")
            yield number, values


def _picked(file: FilePath) -> Iterator[tuple[int, tuple[str, str, str]]]:
    for number, values in _objects(file):
        columns = Columns.of(values)
        if columns is None:
            raise DataError(f"{shown(file)} line {number} has no path: its key is file_name")
        cells = list(values.values())
        if columns.label is not None and isinstance(cells[columns.label], list | dict | float):
            raise DataError(
                f"{shown(file)} line {number}: its label is {json.dumps(cells[columns.label])}, "
                "not one name or number"
            )
        yield number, columns.pick(["" if cell is None else str(cell) for cell in cells])
