"""Data sets of IDX files: train-images-idx3-ubyte, t10k-labels-idx1-ubyte.gz, …"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from job.console import counted
from job.data.dataset import Dataset, number_classes
from job.data.folders import visible
from job.data.idx import read_idx
from job.data.split_names import CANONICAL
from job.data.splits import UNLABELLED, ArraySplit, Labels, Split
from job.errors import DataError, shown

if TYPE_CHECKING:
    from job.data.archive import FilePath
    from job.data.folders import Lister

_IDX = re.compile(
    r"(?:(?P<prefix>.*)[-_.])?(?P<split>train|validation|valid|val|t10k|test)"
    r"[-_.](?P<kind>images|labels)[-_.]idx\d[-_.](?:ubyte|int)(?:\.gz)?",
    re.IGNORECASE,
)


def open_idx_folder(root: FilePath, _lister: Lister) -> Dataset | None:
    """Open the IDX files in a folder; returns None if there are none, raises DataError."""
    files: dict[tuple[str, str, str], FilePath] = {}  # by prefix, split, and images or labels
    for entry in visible(root):
        match = _IDX.fullmatch(entry)
        if match and (root / entry).is_file():
            alias = match["split"].lower().replace("t10k", "test")
            key = (match["prefix"] or "", CANONICAL[alias], match["kind"].lower())
            files.setdefault(key, root / entry)
    if not files:
        return None
    prefixes = sorted({prefix for prefix, _, _ in files})
    if len(prefixes) > 1:
        raise DataError(
            f"{shown(root)} holds {len(prefixes)} sets of IDX files ({', '.join(prefixes)}): "
            "move the one to use into its own folder"
        )
    splits: dict[str, Split] = {
        name: _idx_split(path, files.get((prefixes[0], name, "labels")))
        for (_, name, kind), path in files.items()
        if kind == "images"
    }
    if not splits:
        raise DataError(f"{shown(root)} has IDX labels but no IDX images")
    labels = {str(n) for s in splits.values() for n in np.unique(s.labels) if n != UNLABELLED}
    names = number_classes(root, labels or {"0"})
    return Dataset(shown(root), names, splits, numbered=True)


def _idx_split(images_path: FilePath, labels_path: FilePath | None) -> ArraySplit:
    images = read_idx(images_path)
    grey, colour = images.ndim == 3, images.ndim == 4 and images.shape[-1] == 3
    if not (grey or colour) or images.dtype != np.uint8 or images.size == 0:
        raise DataError(
            f"{shown(images_path)} holds {images.dtype} of shape {images.shape}, not images: "
            "(N, height, width) or (N, height, width, 3) of unsigned bytes"
        )
    labels: Labels = np.full(len(images), UNLABELLED, np.int64)
    if labels_path is not None:
        stored = read_idx(labels_path)
        if stored.ndim == 2 and stored.shape[1]:
            stored = stored[:, 0]  # QMNIST: class, writer, …
        if stored.ndim != 1 or stored.dtype.kind not in "iu" or (stored < 0).any():
            raise DataError(
                f"{shown(labels_path)} holds {stored.dtype} of shape {stored.shape}, not labels: "
                "one non-negative integer per image"
            )
        if len(stored) != len(images):
            raise DataError(
                f"{shown(labels_path)} has {counted(len(stored), 'label')} "
                f"for {counted(len(images), 'image')}"
            )
        labels = stored.astype(np.int64)
    return ArraySplit(images, labels)
