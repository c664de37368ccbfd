"""Data sets: splits by name, class names, and the part of training that is held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from job.data.sample_order import stable_order
from job.data.splits import UNLABELLED, Split
from job.errors import DataError, InputNotFound, shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Dataset:
    """Splits by canonical name: ``training``, ``validation``, ``testing``, ``evaluation``."""

    root: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]
    numbered: bool = False  # the classes have numbers in place of names
    layout: str = ""  # its name in job.data.layout
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = field(default=())  # images left out by --on-bad-image skip
    source: str = ""  # what --data was
    listing: int = 2  # how folders were read, see job.data.folders

    def split(self, name: str) -> Split:
        """The split ``name``; ``testing`` and ``evaluation`` stand in for one another.

        Raises InputNotFound when there is none.
        """
        others = {"testing": "evaluation", "evaluation": "testing"}
        found = self.splits.get(name) or self.splits.get(others.get(name, ""))
        if not found:
            there = list(self.splits)
            training = self.splits.get("training")
            if "validation" not in there and training and (training.labels != UNLABELLED).all():
                there.append("validation (held out of training)")
            has = "it has:" if name == "training" else "--split can be"  # prune has no such option
            raise InputNotFound(f"{self.root} has no {name} split; {has} {', '.join(there)}")
        return found

    def labelled(self, name: str) -> Split:
        """The split ``name``, whose images all have a class; raises DataError otherwise."""
        split = self.split(name)
        if (split.labels == UNLABELLED).any():
            raise DataError(
                f"the {name} split of {self.root} has no labels: use `gammaslim predict` on it"
            )
        return split

    def fingerprint(self, names: Sequence[str]) -> str:
        """SHA-256 over the splits ``names`` and the class names, as hexadecimal digits."""
        sha = hashlib.sha256("\0".join(self.class_names).encode("utf-8", "surrogateescape"))
        for name in names:
            sha.update(name.encode() + self.splits[name].digest())
        return sha.hexdigest()

    def with_splits(self, **changed: Split) -> Dataset:
        """The same data set with some splits replaced."""
        return replace(self, splits={**self.splits, **changed})


def number_classes(root: Path, tokens: set[str]) -> tuple[str, ...]:
    """Name classes that are numbers: "0" to the largest. Raises DataError for other tokens."""
    odd = sorted(token for token in tokens if not token.isdecimal())
    if odd:
        raise DataError(
            f"{shown(root)} mixes class numbers with the class name {odd[0]!r}: "
            "files are named CLASS_NUMBER.jpg, e.g. 3_45.jpg"
        )
    highest = max(map(int, tokens))
    if highest >= max(1000, 10 * len(tokens)):
        raise DataError(
            f"{shown(root)} has an image of class {highest:,} but only {len(tokens)} classes: "
            "classes are numbered from 0, and Food-11 files named CLASS_NUMBER.jpg, e.g. 3_45.jpg"
        )
    return tuple(str(number) for number in range(highest + 1))


def list_names(names: Sequence[str]) -> str:
    """The first twelve names, and how many there are."""
    return ", ".join(names[:12]) + (f" … ({len(names)} in all)" if len(names) > 12 else "")


def missing_class_notes(data: Dataset) -> tuple[str, ...]:
    """A note on classes of the training split that the validation split has no image of."""
    if not {"training", "validation"} <= set(data.splits):
        return ()
    has = set(data.splits["validation"].labels.tolist())
    lacks = [data.class_names[n] for n in set(data.splits["training"].labels.tolist()) - has]
    if not lacks:
        return ()
    names = ", ".join(shown(name) for name in sorted(lacks)[:6]) + (", …" if len(lacks) > 6 else "")
    return (f"warning: no validation images of {len(lacks):,} classes ({names})",)


def hold_out_validation(data: Dataset, seed: int) -> Dataset:
    """Hold a stratified tenth of training out, by ``seed``, when there is no validation split.

    Each class gives a tenth of its images, at least one of those that have two or more.
    """
    if "validation" in data.splits:
        return data
    training = data.labelled("training")
    order = stable_order(len(training), seed, stream="hold-out")
    held: list[int] = []
    for label in np.unique(training.labels):
        members = order[training.labels[order] == label]
        if len(members) > 1:
            held.extend(members[: max(1, round(len(members) / 10))].tolist())
    if not held:
        raise DataError(
            f"{data.root} has no validation split and too few images to hold some out: "
            "add a validation folder"
        )
    mask = np.zeros(len(training), bool)
    mask[held] = True
    note = f"no validation split: a stratified tenth of training ({len(held):,}) is held out"
    return replace(
        data.with_splits(
            training=training.select(np.flatnonzero(~mask)),
            validation=training.select(np.flatnonzero(mask)),
        ),
        notes=(*data.notes, note),
    )
