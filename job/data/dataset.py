"""Data sets: splits by name and class names, and a validation split held out of training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from job.console import counted
from job.data.folders import CURRENT_LISTING
from job.data.sample_order import stable_order
from job.data.splits import UNLABELLED, Split
from job.errors import DataError, InputNotFound, shown

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Dataset:
    """Splits by canonical name (``training``, ``validation``, ``testing``, ``evaluation``)."""

    root: str  # its name in messages
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]
    numbered: bool = False  # whether class names are numbers
    layout: str = ""  # a key of LAYOUTS, or another name of job.data.layout
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()  # images left out by --on-bad-image skip
    source: str = ""  # the value of --data
    listing: int = CURRENT_LISTING  # version of the rules for listing folders, see job.data.folders

    def split(self, name: str) -> Split:
        """Return the split ``name``; ``testing`` and ``evaluation`` stand in for each other.

        Raises InputNotFound when there is none.
        """
        others = {"testing": "evaluation", "evaluation": "testing"}
        split = self.splits.get(name) or self.splits.get(others.get(name, ""))
        if not split:
            names = list(self.splits)
            training = self.splits.get("training")
            if "validation" not in names and training and (training.labels != UNLABELLED).all():
                names.append("validation (held out of training)")
            has = "it has:" if name == "training" else "--split can be"  # prune has no --split
            raise InputNotFound(f"{self.root} has no {name} split; {has} {', '.join(names)}")
        return split

    def labelled(self, name: str) -> Split:
        """Return the split ``name``; raises DataError unless all of its images have labels."""
        split = self.split(name)
        if (split.labels == UNLABELLED).any():
            raise DataError(
                f"the {name} split of {self.root} has no labels: use `gammaslim predict` on it"
            )
        return split

    def fingerprint(self, names: Sequence[str]) -> str:
        """Return the SHA-256 of the splits ``names`` and the class names, in hexadecimal."""
        sha = hashlib.sha256("\0".join(self.class_names).encode("utf-8", "surrogateescape"))
        for name in names:
            sha.update(name.encode() + self.splits[name].digest())
        return sha.hexdigest()

    def with_splits(self, **changed: Split) -> Dataset:
        """Return a copy with some splits replaced."""
        return replace(self, splits={**self.splits, **changed})


def number_classes(root: str | os.PathLike[str], tokens: set[str]) -> tuple[str, ...]:
    """Return class names "0" to the largest number; raises DataError for other tokens."""
    others = sorted(token for token in tokens if not token.isdecimal())
    if others:
        raise DataError(
            f"{shown(root)} mixes class numbers with the class name {others[0]!r}: "
            "files are named CLASS_NUMBER.jpg, e.g. 3_45.jpg"
        )
    highest = max(map(int, tokens))
    if highest >= max(1000, 10 * len(tokens)):
        raise DataError(
            f"{shown(root)} has an image of class {highest:,} but only "
            f"{counted(len(tokens), 'class')}: classes are numbered from 0, "
            "and Food-11 files named CLASS_NUMBER.jpg, e.g. 3_45.jpg"
        )
    return tuple(str(number) for number in range(highest + 1))


def list_names(names: Sequence[str]) -> str:
    """Return the first twelve names, and the number of names if there are more."""
    return ", ".join(names[:12]) + (f" … ({len(names)} in all)" if len(names) > 12 else "")


def missing_class_notes(data: Dataset) -> tuple[str, ...]:
    """Return a warning about training classes without validation images, if any."""
    if not {"training", "validation"} <= set(data.splits):
        return ()
    labels = {name: set(data.splits[name].labels.tolist()) for name in ("training", "validation")}
    missing = sorted(data.class_names[n] for n in labels["training"] - labels["validation"])
    if not missing:
        return ()
    names = ", ".join(map(shown, missing[:6])) + (", …" if len(missing) > 6 else "")
    return (f"warning: no validation images of {counted(len(missing), 'class')} ({names})",)


def hold_out_validation(data: Dataset, seed: int) -> Dataset:
    """Hold out a stratified tenth of training, drawn by ``seed``, if there is no validation split.

    A tenth of each class is held out, at least one image if it has two or more. Raises DataError
    if no image can be held out.
    """
    if "validation" in data.splits:
        return data
    training = data.labelled("training")
    order = stable_order(len(training), seed, stream="hold-out")
    held_out: list[int] = []
    for label in np.unique(training.labels):
        members = order[training.labels[order] == label]
        if len(members) > 1:
            held_out.extend(members[: max(1, round(len(members) / 10))].tolist())
    if not held_out:
        raise DataError(
            f"{data.root} has no validation split and too few images to hold some out: "
            "add a validation folder"
        )
    mask = np.zeros(len(training), bool)
    mask[held_out] = True
    note = f"no validation split: a stratified tenth of training ({len(held_out):,}) is held out"
    return replace(
        data.with_splits(
            training=training.select(np.flatnonzero(~mask)),
            validation=training.select(np.flatnonzero(mask)),
        ),
        notes=(*data.notes, note),
    )
