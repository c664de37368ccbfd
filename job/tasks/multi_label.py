"""Multi-label classification: images of any number of classes each, listed in CSV files."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from job.data.csv_layout import DELIMITERS
from job.data.dataset import Dataset
from job.data.image_lists import FILE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS
from job.data.split_names import CANONICAL, SPLIT_NAMES
from job.data.splits import FileSplit
from job.errors import DataError, InputNotFound, shown
from job.models.outputs import logits_of
from job.tasks.image_task import LabelledImages, prepare_images

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from job.tasks.image_task import TaskOptions
    from job.training.task import Metrics

MULTI_LABEL = "multi-label"
MULTI_LABEL_DATA = (
    "a CSV file, or a folder with train.csv and val.csv: a column of paths, and one of class names "
    "separated by |, or a column of 0 and 1 for each class"
)
SEPARATORS = r"\s*[|;,]\s*"  # of class names in one field
THRESHOLD = 0.5  # probability from which a class counts as predicted


@dataclass(frozen=True)
class LabelledRow:
    """An image: its path, its split, and the names of its classes."""

    path: str
    split: str
    classes: frozenset[str]


class MultiLabel:
    """Images with a target (C,) of 0 and 1; binary cross entropy, and the mean F1 of classes."""

    def __init__(self, options: TaskOptions) -> None:
        root, rows, self.class_names = _read(Path(options.path(MULTI_LABEL, MULTI_LABEL_DATA)))
        known = {(row.split, row.path): row for row in rows}
        splits = {name: _split(root, name, rows) for name in SPLIT_NAMES}
        present = {name: split for name, split in splits.items() if len(split)}
        files, self.preprocessing = prepare_images(Dataset(shown(root), (), present), options)
        held_out = "validation" not in present
        self.sets: dict[str, LabelledImages] = {}
        for name, split in files.items():
            source = "training" if held_out and name == "validation" else name
            targets = np.zeros((len(split), len(self.class_names)), np.float32)
            for index, path in enumerate(split.paths):
                for label in known[source, path].classes:
                    targets[index, self.class_names.index(label)] = 1
            target = partial(_target, torch.from_numpy(targets))
            augment = name == "training"
            self.sets[name] = LabelledImages(split, self.preprocessing, target, augment)
        self.training, self.validation = self.sets["training"], self.sets["validation"]
        self.testing = self.sets.get("testing") or self.sets.get("evaluation")
        self.fingerprint = "".join(split.digest().hex() for split in files.values())

    def inputs(self, images: torch.Tensor) -> torch.Tensor:
        """Convert images (B, S, S, 3) uint8 to inputs (B, 3, S, S) float32."""
        return self.preprocessing.to_input(images)

    def loss(self, outputs: Any, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return the binary cross entropy, summed over images and averaged over classes."""
        loss = F.binary_cross_entropy_with_logits(logits_of(outputs), targets, reduction="sum")
        return loss / targets.shape[1], len(targets)

    def metrics(self, outputs: Any, targets: torch.Tensor) -> Metrics:
        """Return sums and counts: for the F1 of each class, and the share of correct labels."""
        predicted, true = logits_of(outputs).sigmoid() >= THRESHOLD, targets > 0
        both = 2 * (predicted & true).sum(0)
        right = (predicted == true).sum(), true.numel()
        return {"f1": (both, predicted.sum(0) + true.sum(0)), "label_acc": right}

    def distillation_loss(
        self, outputs: Any, teacher_outputs: Any, temperature: float
    ) -> torch.Tensor:
        """Return T² times the KL divergence of class probabilities, reduced as in ``loss``."""
        student, teacher = (logits_of(each) / temperature for each in (outputs, teacher_outputs))
        cross = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="sum")
        own = F.binary_cross_entropy_with_logits(teacher, teacher.sigmoid(), reduction="sum")
        return temperature**2 * (cross - own) / student.shape[1]


def _target(targets: torch.Tensor, index: int, _draw: object) -> torch.Tensor:
    return targets[index]


def _split(root: Path, name: str, rows: Sequence[LabelledRow]) -> FileSplit:
    """Return the images of a split; all have the label 0, so that a tenth can be held out."""
    paths = tuple(row.path for row in rows if row.split == name)
    return FileSplit(root, paths, np.zeros(len(paths), np.int64))


def _read(path: Path) -> tuple[Path, list[LabelledRow], tuple[str, ...]]:
    """Return the root of the paths, all rows, and the class names of training, sorted."""
    if not path.exists():
        raise InputNotFound(f"--data {shown(path)} does not exist")
    files = [path] if path.is_file() else sorted(path.glob("*.csv"))
    if path.is_dir() and len(files) > 1:
        files = [file for file in files if file.stem.lower() in CANONICAL]
    if not files:
        raise DataError(f"--data {shown(path)} has no list of images: {MULTI_LABEL_DATA}")
    rows = [row for file in files for row in _rows(file)]
    names = {label for row in rows if row.split == "training" for label in row.classes}
    if unknown := {label for row in rows for label in row.classes} - names:
        raise DataError(f"{shown(path)}: the class {shown(min(unknown))!r} has no training image")
    if not names:
        raise DataError(f"{shown(path)}: no training image has a class")
    return files[0].parent, rows, tuple(sorted(names))


def _rows(file: Path) -> list[LabelledRow]:
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(file)} cannot be read: {error}") from error
    lines = text.splitlines()
    delimiter = max(DELIMITERS, key=(lines or [""])[0].count)
    reader = csv.DictReader(lines, delimiter=delimiter)
    header = {name.strip().lower(): name for name in reader.fieldnames or ()}
    path, labels, split = (
        next((header[name] for name in names if name in header), None)
        for names in (FILE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS)
    )
    if path is None:
        raise DataError(f"{shown(file)} has no column of image paths: {MULTI_LABEL_DATA}")
    default = CANONICAL.get(file.stem.lower(), "training")
    columns = [name for name in header.values() if name not in (path, split)]
    rows = []
    for values in reader:
        where = f"{shown(file)} line {reader.line_num}"
        name = CANONICAL.get((values.get(split or "") or default).strip().lower(), default)
        text_of = {key: (values.get(key) or "").strip() for key in (path, *columns)}
        if labels is not None:
            found = frozenset(filter(None, re.split(SEPARATORS, text_of[labels])))
        else:
            found = _marked(where, {key.strip(): text_of[key] for key in columns})
        rows.append(LabelledRow(text_of[path], name, found))
    return rows


def _marked(where: str, values: Mapping[str, str]) -> frozenset[str]:
    """Return the classes whose column has a 1; raises DataError for other values than 0 and 1."""
    for name, value in values.items():
        if value not in ("0", "1", ""):
            raise DataError(f"{where} has {shown(value)!r} for the class {shown(name)!r}: 0 or 1")
    return frozenset(name for name, value in values.items() if value == "1")
