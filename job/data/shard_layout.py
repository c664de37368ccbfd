"""Data sets of WebDataset shards: tar files of samples, each an image and its label.

The files of a sample have the same name before the first dot: 0001.jpg with 0001.cls (a class
number or name), or with 0001.json ({"label": …}).
"""

from __future__ import annotations

import json
import posixpath
import re
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from job.data.archive import ARCHIVES, ArchivePath, open_archives
from job.data.dataset import Dataset, list_names, number_classes
from job.data.folders import natural_key, visible
from job.data.split_names import CANONICAL, SPLIT_NAMES
from job.data.splits import UNLABELLED, FileSplit, Split
from job.errors import DataError, InputNotFound, shown

if TYPE_CHECKING:
    from job.data.archive import FilePath
    from job.data.folders import Lister

JSON_LABELS = ("label", "cls", "class", "target", "category")  # keys in a sample's JSON
MAX_SHARDS = 100_000
_RANGE = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}|\{([^{}]*,[^{}]*)\}")


def is_shard_pattern(path: str) -> bool:
    """Return whether ``path`` is a pattern of shards: ``train-{000..147}.tar``."""
    return bool(_RANGE.search(path)) and path.lower().endswith(ARCHIVES)


def expand_pattern(pattern: str) -> list[Path]:
    """Return the paths of ``train-{000..147}.tar`` or ``{train,val}-{0..7}.tar``, in order.

    Raises DataError for too many shards, InputNotFound if one does not exist.
    """
    parts, choices, end = [], [], 0
    for match in _RANGE.finditer(pattern):
        parts.append(pattern[end : match.start()])
        end = match.end()
        if match[3] is not None:
            choices.append(match[3].split(","))
            continue
        first, last, width = int(match[1]), int(match[2]), len(match[1])
        if last - first >= MAX_SHARDS:
            raise DataError(f"--data {shown(pattern)} names more than {MAX_SHARDS:,} shards")
        choices.append([f"{number:0{width}}" for number in range(first, last + 1)])
    texts = ["".join(map("".join, zip(parts, chosen, strict=True))) for chosen in product(*choices)]
    paths = [Path(text + pattern[end:]) for text in texts]
    if len(paths) > MAX_SHARDS or not paths:
        raise DataError(f"--data {shown(pattern)} names {len(paths):,} shards")
    if missing := [path for path in paths if not path.is_file()]:
        raise InputNotFound(
            f"--data {shown(pattern)}: {shown(missing[0])} does not exist"
            + (f" ({len(missing)} of {len(paths)} are missing)" if len(missing) > 1 else "")
        )
    return paths


def open_shard_folder(root: FilePath, lister: Lister) -> Dataset | None:
    """Open a folder of shards named train-000.tar, val-000.tar, …; None if there are none."""
    if isinstance(root, ArchivePath):
        return None
    names = [n for n in visible(root) if n.lower().endswith(ARCHIVES) and _split_of(n)]
    return open_shards([root / name for name in sorted(names, key=natural_key)], root, lister)


def open_shards(paths: list[Path], root: Path, lister: Lister) -> Dataset | None:
    """Open shards, whose names contain their split; it is ``training`` by default.

    Returns None if they contain no labels.
    """
    if not paths:
        return None
    archive = open_archives(paths)
    samples: dict[str, list[tuple[str, str | None]]] = {}
    for shard in paths:
        folder = archive / shard.name if len(paths) > 1 else archive
        samples.setdefault(_split_of(shard.name) or "training", []).extend(_samples(folder, lister))
    labelled = {label for split in samples.values() for _, label in split if label is not None}
    if not labelled:
        return None
    return _dataset(archive, shown(root), samples, lister)


def _split_of(name: str) -> str | None:
    """Return the first split in the name of a shard, e.g. val_1.tar; None without a split."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((CANONICAL[word] for word in words if word in CANONICAL), None)


def _samples(folder: ArchivePath, lister: Lister) -> list[tuple[str, str | None]]:
    """Return the path of each image below ``folder``, from the archive's root, and its label."""
    fields: dict[str, dict[str, str]] = {}
    prefix = f"{folder.inner}/" if folder.inner else ""
    for name in folder.archive.members:
        base = posixpath.basename(name)
        if name.startswith(prefix) and not base.startswith("."):
            stem, _, extension = base.partition(".")
            key = posixpath.join(posixpath.dirname(name), stem)
            fields.setdefault(key, {})[extension.lower()] = name
    found = []
    for extensions in fields.values():
        image = next((name for name in extensions.values() if lister.is_image(name)), None)
        if image is None:
            lister.others["without an image"] += 1
            continue
        found.append((image, _label(folder, extensions)))
    return found


def _label(folder: ArchivePath, extensions: dict[str, str]) -> str | None:
    for extension, name in extensions.items():
        if extension not in ("cls", "json"):
            continue
        try:
            text = folder.archive.read(name).decode().strip()
            if extension == "cls":
                return str(int(text)) if text.isdecimal() else text
            values = json.loads(text)
            return next(str(values[key]) for key in JSON_LABELS if key in values)
        except (ValueError, TypeError, RecursionError, StopIteration) as error:
            where = shown(ArchivePath(folder.archive, name))
            raise DataError(
                f"{where} is not a label: it must be a number, a name, or JSON with a label"
            ) from error
    return None


def _dataset(
    archive: ArchivePath,
    root: str,
    samples: dict[str, list[tuple[str, str | None]]],
    lister: Lister,
) -> Dataset:
    training = samples.get("training") or [pair for pairs in samples.values() for pair in pairs]
    tokens = {label for _, label in training if label is not None}
    numbered = all(token.isdecimal() for token in tokens)
    names = number_classes(Path(root), tokens) if numbered else tuple(sorted(tokens))
    index = {name: number for number, name in enumerate(names)}
    splits: dict[str, Split] = {}
    for split in SPLIT_NAMES:
        for path, label in samples.get(split, ()):
            if label is None and split in ("training", "validation"):
                raise DataError(
                    f"{shown(archive / path)} has no .cls or .json file of the same name"
                )
            if label is not None and label not in index:
                raise DataError(
                    f"{shown(archive / path)} has the class {label!r}, which is not in the "
                    f"training split; its classes: {list_names(names)}"
                )
        if members := samples.get(split):
            labels = [UNLABELLED if label is None else index[label] for _, label in members]
            paths = tuple(path for path, _ in members)
            splits[split] = FileSplit(archive, paths, np.array(labels, np.int64))
    return Dataset(root, names, splits, numbered, notes=lister.notes())
