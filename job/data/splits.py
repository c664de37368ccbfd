"""Splits of a data set: images in a fixed order with their labels, as files or as one array."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from PIL import Image

from job.data.folders import natural_key
from job.data.images import load_rgb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.data.archive import FilePath
    from job.data.geometry import Croppable

Labels = np.ndarray[Any, np.dtype[np.int64]]
UNLABELLED = -1


class Split(Protocol):
    """Images in a fixed order, with labels."""

    @property
    def labels(self) -> Labels:
        """Class indices (N,) int64; -1 for an image without a label."""

    @property
    def lenient(self) -> bool:
        """Whether unreadable images are replaced instead of raising an error."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Croppable:
        """Return an image in RGB; raises DataError or StorageError."""

    def name(self, index: int) -> str:
        """Return the name of an image in messages and predictions."""

    def select(self, indices: Labels, labels: Labels | None = None) -> Split:
        """Return the images at ``indices``, in that order, with new labels if given."""

    def digest(self) -> bytes:
        """Return the SHA-256 of the content of the split."""


@dataclass(frozen=True)
class FileSplit:
    """Images in files; ``paths`` (N) are relative to ``root``."""

    root: FilePath
    paths: tuple[str, ...]
    labels: Labels
    lenient: bool = False  # --on-bad-image skip: files that fail later are replaced
    sizes: Labels | None = None  # (N, 2) int64: width and height, once the images are checked

    @classmethod
    def of(
        cls, root: FilePath, paths: Sequence[str], labels: Sequence[int], folder: FilePath
    ) -> FileSplit:
        """Build a split of files; ``paths`` are relative to ``folder``, in or equal to ``root``."""
        inside = "" if folder == root else os.path.relpath(folder, root)
        relative = tuple(os.path.join(inside, path) for path in paths)  # noqa: PTH118 (odd bytes)
        return cls(root, relative, np.array(labels, np.int64))

    @classmethod
    def unlabelled(
        cls, root: FilePath, paths: Sequence[str], folder: FilePath | None = None
    ) -> FileSplit:
        """Build a split of files without labels, sorted with 2.jpg before 10.jpg."""
        ordered = sorted(paths, key=natural_key)
        return cls.of(root, ordered, [UNLABELLED] * len(paths), folder or root)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> FilePath:
        """Return the path of image ``index``."""
        return self.root / self.paths[index]

    def image(self, index: int) -> Image.Image:  # noqa: D102
        return load_rgb(self.path(index))

    def name(self, index: int) -> str:  # noqa: D102
        return self.paths[index]

    def select(self, indices: Labels, labels: Labels | None = None) -> FileSplit:  # noqa: D102
        paths = tuple(self.paths[i] for i in indices)
        labels = self.labels[indices] if labels is None else labels
        sizes = None if self.sizes is None else self.sizes[indices]
        return replace(self, paths=paths, labels=labels, sizes=sizes)

    def digest(self) -> bytes:
        """Return the SHA-256 of paths, file sizes and labels; the images are not read."""
        sha = hashlib.sha256(self.labels.astype("<i8").tobytes())
        for index, path in enumerate(self.paths):
            sha.update(os.fsencode(path) + b"\0%d\0" % self.path(index).stat().st_size)
        return sha.digest()


@dataclass(frozen=True)
class ArraySplit:
    """Images in one array: (N, H, W) grey or (N, H, W, 3) RGB, uint8."""

    images: np.ndarray[Any, np.dtype[np.uint8]]
    labels: Labels
    lenient: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:  # noqa: D102
        return Image.fromarray(self.images[index]).convert("RGB")

    def name(self, index: int) -> str:  # noqa: D102
        return str(index)

    def select(self, indices: Labels, labels: Labels | None = None) -> ArraySplit:  # noqa: D102
        return ArraySplit(self.images[indices], self.labels[indices] if labels is None else labels)

    def digest(self) -> bytes:  # noqa: D102
        shape = repr(self.images.shape).encode()
        return hashlib.sha256(
            shape + self.images.tobytes() + self.labels.astype("<i8").tobytes()
        ).digest()
