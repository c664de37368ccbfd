"""Data sets of CSV files: each row has the path of an image, a label, and possibly a split."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from job.console import counted
from job.data.dataset import Dataset
from job.data.folders import Lister, visible
from job.data.split_names import CANONICAL, SPLIT_NAMES
from job.data.splits import UNLABELLED, FileSplit, Split
from job.errors import DataError, shown
from job.files import read_bytes

if TYPE_CHECKING:
    from job.data.archive import FilePath

FILE_COLUMNS = (
    *("file", "path", "image", "filename", "filepath", "file_name", "file_path"),
    *("image_path", "image_name", "img", "img_path"),
)
LABEL_COLUMNS = ("label", "class", "target", "labels", "class_name", "category")
SPLIT_COLUMNS = ("split", "subset", "set")
DELIMITERS = ",;\t"
MAX_DIGITS = 18  # of a class number; longer labels are names


@dataclass(frozen=True)
class Row:
    """One image; ``where`` is the CSV file and line, ``label`` is "" if there is none."""

    where: str
    path: str
    label: str
    split: str


def open_csv_folder(root: FilePath, _lister: Lister) -> Dataset | None:
    """Open train.csv, val.csv, … in ``root``, or its only CSV file with paths and labels.

    Returns None when there is none. Raises DataError, with the line numbers, for invalid rows.
    """
    files = [root / n for n in visible(root) if n.lower().endswith(".csv") and (root / n).is_file()]
    named = [file for file in files if file.stem.lower() in CANONICAL]
    if not named and len(files) != 1:
        return None
    lists = [file for file in named or files if _columns(_header(file)) is not None]
    labelled = named or [f for f in lists if _find(_header(f), LABEL_COLUMNS) is not None]
    return _to_dataset(root, [row for file in lists for row in _rows(file)]) if labelled else None


def open_csv_file(path: FilePath) -> Dataset:
    """Open one CSV file; raises DataError when it has no column of paths or invalid rows."""
    if _columns(_header(path)) is None:
        raise DataError(
            f"--data {shown(path)} has no column of image paths: its first line names the columns, "
            "e.g. file,label or path,class,split"
        )
    return _to_dataset(path.parent, _rows(path), path)


def _text(path: FilePath) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig", "surrogateescape")
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(path)} cannot be read: {error}") from error


def _lines(text: str) -> io.StringIO:
    """Return a reader of lines; ``splitlines`` would also split at characters inside names."""
    return io.StringIO(text, newline="")


def _header(path: FilePath) -> list[str]:
    first = _lines(_text(path)).readline()
    delimiter = max(DELIMITERS, key=first.count)
    try:
        names = next(csv.reader([first], delimiter=delimiter), [])
    except csv.Error:  # a field longer than any name: not a list of images
        return []
    return [name.strip().lower().replace(" ", "_") for name in names]


def _find(header: list[str], names: tuple[str, ...]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)


def _columns(header: list[str]) -> tuple[int, int | None, int | None] | None:
    """Return the columns of the path, label and split; None if there is no path column."""
    file = _find(header, FILE_COLUMNS)
    if file is None:
        return None
    return file, _find(header, LABEL_COLUMNS), _find(header, SPLIT_COLUMNS)


def _rows(path: FilePath) -> list[Row]:
    """Read the rows after the header; raises DataError for invalid rows."""
    columns = _columns(_header(path))
    assert columns
    text, problems, rows = _text(path), [], []
    default_split = CANONICAL.get(path.stem.lower(), "training")
    delimiter = max(DELIMITERS, key=_lines(text).readline().count)
    reader = csv.reader(_lines(text), delimiter=delimiter)
    try:
        next(reader)
        for values in reader:
            if any(value.strip() for value in values):
                file, label, split = (
                    values[at].strip() if at is not None and at < len(values) else ""
                    for at in columns
                )
                name = CANONICAL.get(split.lower(), "") if split else default_split
                row = Row(f"{shown(path)} line {reader.line_num}", file, label, name)
                if problem := _problem(row, split):
                    problems.append(f"line {reader.line_num} has {problem}")
                else:
                    rows.append(row)
    except csv.Error as error:
        raise DataError(f"{shown(path)} line {reader.line_num}: {error}") from error
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError(
            f"{shown(path)}: {', '.join(problems[:3])}{more}; splits are named "
            f"{', '.join(SPLIT_NAMES)}, train, val or test"
        )
    return rows


def _problem(row: Row, split: str) -> str:
    if not row.path or "\0" in row.path:
        return "no path"
    if not row.split:
        return f"the unknown split {shown(split)!r}"
    if not row.label and row.split in ("training", "validation"):
        return "no label"
    return ""


def _to_dataset(root: FilePath, rows: list[Row], file: FilePath | None = None) -> Dataset:
    """Number the labels of training (of all splits if it has none) and group rows by split."""
    labels = {row.label for row in rows if row.label and row.split == "training"}
    labels = labels or {row.label for row in rows if row.label}
    numbers = all(label.isdecimal() and len(label) <= MAX_DIGITS for label in labels)
    names = tuple(sorted(sorted(labels), key=int if numbers else str))
    index = {name: number for number, name in enumerate(names)}
    splits: dict[str, Split] = {}
    for split in SPLIT_NAMES:
        members = [row for row in rows if row.split == split]
        for row in members:
            if row.label and row.label not in index:
                raise DataError(
                    f"{row.where} has the class {shown(row.label)!r}, which training lacks"
                )
        if members:
            paths = tuple(row.path for row in members)
            class_numbers = [index.get(row.label, UNLABELLED) for row in members]
            splits[split] = FileSplit(root, paths, np.array(class_numbers, np.int64))
    if not splits:
        raise DataError(f"the CSV in {shown(file or root)} names no images")
    numbered = bool(names) and names == tuple(map(str, range(len(names))))
    return Dataset(shown(file or root), names, splits, numbered, notes=_repetition_notes(rows))


def _repetition_notes(rows: list[Row]) -> tuple[str, ...]:
    """Return a warning about training images that are, or may end up, in validation too."""
    training = Counter(os.path.normpath(row.path) for row in rows if row.split == "training")
    validation = {os.path.normpath(row.path) for row in rows if row.split == "validation"}
    repeated = [p for p, n in training.items() if (p in validation if validation else n > 1)]
    if not repeated:
        return ()
    names = ", ".join(map(shown, repeated[:3])) + (", …" if len(repeated) > 3 else "")
    where = "also in the validation split" if validation else "with several rows"
    return (
        f"warning: {counted(len(repeated), 'training image')} {where} ({names}): "
        "validation accuracy is too high when it includes training images",
    )
