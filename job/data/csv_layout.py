"""Data sets given as CSV files: a path and a label a row, and perhaps a split."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from job.data.dataset import Dataset
from job.data.folders import Lister, visible
from job.data.split_names import CANONICAL, SPLIT_NAMES
from job.data.splits import UNLABELLED, FileSplit, Split
from job.errors import DataError, shown
from job.files import read_bytes

if TYPE_CHECKING:
    from pathlib import Path

FILE_COLUMNS = (
    *("file", "path", "image", "filename", "filepath", "file_name", "file_path"),
    *("image_path", "image_name", "img", "img_path"),
)
LABEL_COLUMNS = ("label", "class", "target", "labels", "class_name", "category")
SPLIT_COLUMNS = ("split", "subset", "set")
DELIMITERS = ",;\t"
DIGITS = 18  # of a number; longer labels are names


@dataclass(frozen=True)
class Row:
    """One image: ``where`` names its file and line, ``label`` is empty where there is none."""

    where: str
    path: str
    label: str
    split: str


def open_csv_folder(root: Path, _lister: Lister) -> Dataset | None:
    """The data set of train.csv, val.csv, … in ``root``, or of its only CSV with such columns.

    Raises DataError that names rows which are wrong.
    """
    files = [root / n for n in visible(root) if n.lower().endswith(".csv") and (root / n).is_file()]
    named = [file for file in files if file.stem.lower() in CANONICAL]
    if not named and len(files) != 1:
        return None
    chosen = [file for file in named or files if _columns(_header(file)) is not None]
    with_labels = named or [f for f in chosen if _find(_header(f), LABEL_COLUMNS) is not None]
    return _dataset(root, [row for file in chosen for row in _rows(file)]) if with_labels else None


def open_csv_file(path: Path) -> Dataset:
    """The data set of one CSV file; raises DataError where it is not such a file."""
    if _columns(_header(path)) is None:
        raise DataError(
            f"--data {shown(path)} has no column of image paths: its first line names the columns, "
            "as in file,label or path,class,split"
        )
    return _dataset(path.parent, _rows(path), path)


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig", "surrogateescape")
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(path)} cannot be read: {error}") from error


def _lines(text: str) -> io.StringIO:
    """The lines of a CSV file, by its line ends alone: a name may hold what else ends a line."""
    return io.StringIO(text, newline="")


def _header(path: Path) -> list[str]:
    first = _lines(_text(path)).readline()
    delimiter = max(DELIMITERS, key=first.count)
    try:
        names = next(csv.reader([first], delimiter=delimiter), [])
    except csv.Error:  # a field longer than any name: a file of something else
        return []
    return [name.strip().lower().replace(" ", "_") for name in names]


def _find(header: list[str], names: tuple[str, ...]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)


def _columns(header: list[str]) -> tuple[int, int | None, int | None] | None:
    """Where the path, the label and the split stand in a row; None without a path."""
    file = _find(header, FILE_COLUMNS)
    if file is None:
        return None
    return file, _find(header, LABEL_COLUMNS), _find(header, SPLIT_COLUMNS)


def _rows(path: Path) -> list[Row]:
    columns = _columns(_header(path))
    assert columns
    text, bad, rows = _text(path), [], []
    default = CANONICAL.get(path.stem.lower(), "training")
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
                name = CANONICAL.get(split.lower()) if split else default
                where = f"{shown(path)} line {reader.line_num}"
                if not file or "\0" in file:
                    bad.append(f"line {reader.line_num} has no path")
                elif name is None:
                    bad.append(f"line {reader.line_num} has the split {shown(split)!r}")
                elif not label and name in ("training", "validation"):
                    bad.append(f"line {reader.line_num} has no label")
                else:
                    rows.append(Row(where, file, label, name))
    except csv.Error as error:
        raise DataError(f"{shown(path)} line {reader.line_num}: {error}") from error
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DataError(
            f"{shown(path)}: {', '.join(bad[:3])}{more}; splits are named "
            f"{', '.join(SPLIT_NAMES)}, train, val or test"
        )
    return rows


def _dataset(root: Path, rows: list[Row], file: Path | None = None) -> Dataset:
    labels = {r.label for r in rows if r.label and r.split == "training"}
    labels = labels or {row.label for row in rows if row.label}
    numbers = all(label.isdecimal() and len(label) <= DIGITS for label in labels)
    names = tuple(sorted(sorted(labels), key=int if numbers else str))
    index = {name: number for number, name in enumerate(names)}
    splits: dict[str, Split] = {}
    for split in SPLIT_NAMES:
        own = [row for row in rows if row.split == split]
        for row in own:
            if row.label and row.label not in index:
                raise DataError(
                    f"{row.where} has the class {shown(row.label)!r}, which training lacks"
                )
        if own:
            found = [index.get(row.label, UNLABELLED) for row in own]
            paths = tuple(row.path for row in own)
            splits[split] = FileSplit(root, paths, np.array(found, np.int64))
    if not splits:
        raise DataError(f"the CSV in {shown(file or root)} names no images")
    numbered = bool(names) and names == tuple(map(str, range(len(names))))
    return Dataset(shown(file or root), names, splits, numbered, notes=_repetitions(rows))


def _repetitions(rows: list[Row]) -> tuple[str, ...]:
    """A note on training images that are validated on, or may be: those of several rows."""
    training = Counter(os.path.normpath(row.path) for row in rows if row.split == "training")
    validation = {os.path.normpath(row.path) for row in rows if row.split == "validation"}
    again = [p for p, n in training.items() if (p in validation if validation else n > 1)]
    if not again:
        return ()
    names = ", ".join(map(shown, again[:3])) + (", …" if len(again) > 3 else "")
    where = "are in the validation split too" if validation else "have several rows"
    return (
        f"warning: {len(again):,} training images {where} ({names}): the accuracy on images that "
        "are trained on is too high",
    )
