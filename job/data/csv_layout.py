"""Data sets of CSV files: each row has the path of an image, a label, and possibly a split."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from job.data.folders import Lister, visible
from job.data.image_lists import Columns, Row, checked_rows, listed_dataset
from job.data.split_names import CANONICAL
from job.errors import DataError, shown
from job.files import read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from job.data.archive import FilePath
    from job.data.dataset import Dataset

DELIMITERS = ",;\t"


def open_csv_folder(root: FilePath, _lister: Lister) -> Dataset | None:
    """Open train.csv, val.csv, … in ``root``, or its only CSV file with paths and labels.

    Returns None when there is none. Raises DataError, with the line numbers, for invalid rows.
    """
    files = [root / n for n in visible(root) if n.lower().endswith(".csv") and (root / n).is_file()]
    named = [file for file in files if file.stem.lower() in CANONICAL]
    if not named and len(files) != 1:
        return None
    columns = {file: csv_columns(file) for file in named or files}
    lists = [file for file, found in columns.items() if found]
    labelled = named or [f for f, found in columns.items() if found and found.label is not None]
    rows = [row for file in lists for row in csv_rows(file, _split_by_name(file))]
    return listed_dataset(root, rows) if labelled else None


def open_csv_file(path: FilePath) -> Dataset:
    """Open one CSV file; raises DataError when it has no column of paths or invalid rows."""
    if csv_columns(path) is None:
        raise DataError(
            f"--data {shown(path)} has no column of image paths: its first line names the columns, "
            "e.g. file,label or path,class,split"
        )
    return listed_dataset(path.parent, csv_rows(path, _split_by_name(path)), path)


def csv_columns(path: FilePath) -> Columns | None:
    """Return the columns of the path, label and split; None if there is no path column."""
    first = _lines(read_text(path)).readline()
    try:
        return Columns.of(next(csv.reader([first], delimiter=_delimiter(first)), []))
    except csv.Error:  # a field longer than any name: not a list of images
        return None


def csv_rows(path: FilePath, default_split: Callable[[str], str]) -> list[Row]:
    """Read the rows after the header; raises DataError as `checked_rows` does."""
    return checked_rows(path, _picked(path), default_split)


def read_text(path: FilePath) -> str:
    """Return the text of a list of images; raises DataError."""
    try:
        return read_bytes(path).decode("utf-8-sig", "surrogateescape")
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(path)} cannot be read: {error}") from error


def _picked(path: FilePath) -> Iterator[tuple[int, tuple[str, str, str]]]:
    columns, text = csv_columns(path), read_text(path)
    assert columns
    reader = csv.reader(_lines(text), delimiter=_delimiter(_lines(text).readline()))
    try:
        next(reader)
        for values in reader:
            if any(value.strip() for value in values):
                yield reader.line_num, columns.pick(values)
    except csv.Error as error:
        raise DataError(f"{shown(path)} line {reader.line_num}: {error}") from error


def _split_by_name(path: FilePath) -> Callable[[str], str]:
    split = CANONICAL.get(path.stem.lower(), "training")
    return lambda _: split


def _delimiter(header: str) -> str:
    return max(DELIMITERS, key=header.count)


def _lines(text: str) -> io.StringIO:
    """Return a reader of lines; ``splitlines`` would also split at characters inside names."""
    return io.StringIO(text, newline="")
