"""Lists of images: rows of a path, a label and a split, turned into a data set."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from job.console import counted
from job.data.dataset import Dataset
from job.data.split_names import CANONICAL, SPLIT_NAMES
from job.data.splits import UNLABELLED, FileSplit, Split
from job.errors import DataError, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from job.data.archive import FilePath

FILE_COLUMNS = (
    *("file", "path", "image", "filename", "filepath", "file_name", "file_path"),
    *("image_path", "image_name", "img", "img_path"),
)
LABEL_COLUMNS = ("label", "class", "target", "labels", "class_name", "category")
SPLIT_COLUMNS = ("split", "subset", "set")
MAX_DIGITS = 18  # of a class number; longer labels are names


@dataclass(frozen=True)
class Row:
    """One image; ``where`` is the file and line of the list, ``label`` is "" if there is none."""

    where: str
    path: str
    label: str
    split: str


@dataclass(frozen=True)
class Columns:
    """Indices of the columns of a list; None for a column that it lacks."""

    file: int
    label: int | None
    split: int | None

    @classmethod
    def of(cls, header: Iterable[str]) -> Columns | None:
        """Find the columns by their names; None if there is no column of paths."""
        names = [name.strip().lower().replace(" ", "_") for name in header]

        def find(known: tuple[str, ...]) -> int | None:
            return next((names.index(name) for name in known if name in names), None)

        file = find(FILE_COLUMNS)
        return None if file is None else cls(file, find(LABEL_COLUMNS), find(SPLIT_COLUMNS))

    def pick(self, values: Sequence[str]) -> tuple[str, str, str]:
        """Return the path, label and split of a line, "" where it has none."""
        picked = (
            values[at].strip() if at is not None and at < len(values) else ""
            for at in (self.file, self.label, self.split)
        )
        file, label, split = picked
        return file, label, split


def checked_rows(
    source: FilePath,
    lines: Iterable[tuple[int, tuple[str, str, str]]],
    default_split: Callable[[str], str],
) -> list[Row]:
    """Return the rows of a list; ``lines`` are (line number, (path, label, split)).

    ``default_split`` returns the split of a path whose line has no split. Raises DataError, with
    the line numbers, for invalid rows.
    """
    rows, problems = [], []
    for number, (path, label, split) in lines:
        name = CANONICAL.get(split.lower(), "") if split else default_split(path)
        row = Row(f"{shown(source)} line {number}", path, label, name)
        if problem := _problem(row, split):
            problems.append(f"line {number} has {problem}")
        else:
            rows.append(row)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError(
            f"{shown(source)}: {', '.join(problems[:3])}{more}; splits are named "
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


def listed_dataset(root: FilePath, rows: Sequence[Row], file: FilePath | None = None) -> Dataset:
    """Number the labels of training (of all splits if it has none) and group rows by split.

    Paths are relative to ``root``; ``file`` names the data set in messages. Raises DataError.
    """
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
                    f"{row.where} has the class {shown(row.label)!r}, which is not in the "
                    "training split"
                )
        if members:
            paths = tuple(row.path for row in members)
            class_numbers = [index.get(row.label, UNLABELLED) for row in members]
            splits[split] = FileSplit(root, paths, np.array(class_numbers, np.int64))
    if not splits:
        raise DataError(f"the list in {shown(file or root)} names no images")
    numbered = bool(names) and names == tuple(map(str, range(len(names))))
    return Dataset(shown(file or root), names, splits, numbered, notes=_repetition_notes(rows))


def _repetition_notes(rows: Sequence[Row]) -> tuple[str, ...]:
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
